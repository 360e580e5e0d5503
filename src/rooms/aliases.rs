//! Aliases: names of rooms that people can read.

use std::collections::BTreeSet;

use ruma::{
    CanonicalJsonObject, CanonicalJsonValue, OwnedRoomAliasId, RoomAliasId, ServerName, UserId,
    api::error::ErrorKind,
};

use crate::{
    error::{Refusal, Result},
    ids::RoomNum,
    schema,
    schema::rooms::AliasRow,
    store::{Batch, Direction, Fault, Read, key::Json},
};

/// An alias has at most this many bytes, as every id of the specification.
const ALIAS_BYTES_MAX: usize = 255;
/// A room gets no more aliases of this server than this many. One that replaces another may have more, which move to it.
pub(crate) const OF_ROOM_MAX: usize = 1_000;
/// Members who may not change the canonical alias give a room no more, once it has this many.
const OF_MEMBERS_MAX: usize = 500;
/// Such a member gives a room at most this many aliases, once it has as many.
const OF_MEMBER_MAX: usize = 50;

/// Refuses an alias that this server cannot give: 400 `M_INVALID_PARAM`.
pub fn check(alias: &RoomAliasId, server: &ServerName) -> Result<(), Refusal> {
    if alias.server_name() != server {
        return Err(Refusal::invalid_param(
            "The alias ends in another server's name; this server only gives aliases in its own.",
        ));
    }
    if alias.as_str().len() > ALIAS_BYTES_MAX || alias.alias().is_empty() {
        return Err(Refusal::invalid_param(
            "An alias needs a name before the colon and has at most 255 bytes.",
        ));
    }
    Ok(())
}

/// Refuses one more alias of a room that has as many as may be: 413 `M_TOO_LARGE`. Whoever `commands` its canonical alias has a larger
/// bound than all others together, who cannot use it up.
pub(crate) fn require_space(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    creator: &UserId,
    commands: bool,
) -> Result<()> {
    let aliases = list(read, room, OF_ROOM_MAX)?;
    if aliases.len() >= OF_ROOM_MAX {
        let why = format!("A room has at most {OF_ROOM_MAX} aliases of this server. Remove some of them.");
        return Err(Refusal::too_large(why).into());
    }
    if commands || aliases.len() < OF_MEMBER_MAX {
        return Ok(());
    }
    if aliases.len() >= OF_MEMBERS_MAX {
        let why = format!(
            "From {OF_MEMBERS_MAX} aliases of this server on, only members who may change the canonical alias give the room more."
        );
        return Err(Refusal::too_large(why).into());
    }
    let mut own = 0;
    for alias in &aliases {
        own += usize::from(find(read, alias)?.is_some_and(|row| row.creator == creator.as_str()));
    }
    if own >= OF_MEMBER_MAX {
        let why = format!(
            "A member gives a room at most {OF_MEMBER_MAX} aliases, without the power to change its canonical alias."
        );
        return Err(Refusal::too_large(why).into());
    }
    Ok(())
}

/// Makes the alias of this server with this name; it may be any name with which [`check`] lets an alias be added. Errors:
/// 400 `M_INVALID_PARAM`.
pub fn named_here(name: &str, server: &ServerName) -> Result<OwnedRoomAliasId, Refusal> {
    let alias = RoomAliasId::parse(format!("#{name}:{server}")).map_err(|why| {
        Refusal::invalid_param(format!("`room_alias_name` cannot be the name of an alias: {why}."))
    })?;
    check(&alias, server)?;
    Ok(alias)
}

/// Finds the room that an alias of this server names.
pub fn find(read: &(impl Read + ?Sized), alias: &RoomAliasId) -> Result<Option<AliasRow>, Fault> {
    Ok(schema::ALIAS.get(read, alias.as_str())?.map(|Json(row)| row))
}

/// Lists the first aliases of a room, sorted; at most `max`.
pub fn list(read: &(impl Read + ?Sized), room: RoomNum, max: usize) -> Result<Vec<OwnedRoomAliasId>, Fault> {
    let mut aliases = Vec::new();
    for row in schema::ROOM_ALIAS.prefix::<(RoomNum,)>(read, (room,), Direction::Up)?.take(max) {
        let ((_, alias), ()) = row?;
        aliases.push(OwnedRoomAliasId::try_from(alias).map_err(|_| Fault::Corrupt("an alias is none"))?);
    }
    Ok(aliases)
}

/// Lets an alias name a room. The batch is refused if the alias names a room already ([`is_taken`] tells that apart).
pub(crate) fn add(batch: &mut Batch, alias: &RoomAliasId, room: RoomNum, creator: &UserId) {
    schema::ALIAS.expect_absent(batch, alias.as_str());
    let row = AliasRow { room, creator: creator.to_string() };
    schema::ALIAS.put(batch, alias.as_str(), &Json(row));
    schema::ROOM_ALIAS.put(batch, (room, alias.as_str()), &());
}

/// Whether a batch was refused because an alias is taken.
pub(crate) fn is_taken(conflict: &crate::store::Conflict) -> bool {
    conflict.table == schema::ALIAS.name
}

/// Lets an alias name no room any more. The batch is refused if the alias has been given to another room meanwhile.
pub(crate) fn remove(batch: &mut Batch, alias: &RoomAliasId, row: &AliasRow) {
    schema::ALIAS.expect_value(batch, alias.as_str(), &Json(row.clone()));
    schema::ALIAS.delete(batch, alias.as_str());
    schema::ROOM_ALIAS.delete(batch, (row.room, alias.as_str()));
}

/// Lets an alias name another room. The batch is refused if the alias has been given to another room meanwhile.
pub(crate) fn move_to(batch: &mut Batch, alias: &RoomAliasId, row: &AliasRow, room: RoomNum) {
    schema::ALIAS.expect_value(batch, alias.as_str(), &Json(row.clone()));
    schema::ALIAS.put(batch, alias.as_str(), &Json(AliasRow { room, ..row.clone() }));
    schema::ROOM_ALIAS.delete(batch, (row.room, alias.as_str()));
    schema::ROOM_ALIAS.put(batch, (room, alias.as_str()), &());
}

/// Lists the aliases that a new `m.room.canonical_alias` adds to those of the `old` one. Errors: 400 `M_BAD_JSON`.
pub(crate) fn list_added(
    content: &CanonicalJsonObject,
    old: Option<&str>,
) -> Result<BTreeSet<String>, Refusal> {
    let old: CanonicalJsonObject = old.and_then(|old| serde_json::from_str(old).ok()).unwrap_or_default();
    let known = named(&old).unwrap_or_default();
    let mut added = named(content)?;
    added.retain(|alias| !known.contains(alias));
    Ok(added)
}

/// Checks the aliases that a new `m.room.canonical_alias` adds: each must be an alias (400 `M_INVALID_PARAM`), and name
/// this room (400 `M_BAD_ALIAS`), or be one of those that are known to name it: one that is promised to it, or one of another server,
/// which was asked.
pub fn check_canonical(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    content: &CanonicalJsonObject,
    old: Option<&str>,
    known: &[OwnedRoomAliasId],
) -> Result<()> {
    for alias in list_added(content, old)? {
        let parsed = <&RoomAliasId>::try_from(alias.as_str())
            .map_err(|_| Refusal::invalid_param(format!("{alias} is not an alias.")))?;
        let is_known = known.iter().any(|known| known == parsed);
        if !is_known && find(read, parsed)?.is_none_or(|row| row.room != room) {
            let why = format!("{alias} does not name this room.");
            return Err(Refusal::new(ErrorKind::BadAlias, why).into());
        }
    }
    Ok(())
}

/// Gives the content of a canonical alias event without all but those aliases of ours that name this room; `None` if none does.
pub(crate) fn canonical_of(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    content: &CanonicalJsonObject,
) -> Result<Option<CanonicalJsonObject>, Fault> {
    let others = content.get("alt_aliases").and_then(CanonicalJsonValue::as_array);
    let all = content.get("alias").into_iter().chain(others.into_iter().flatten());
    let mut naming = BTreeSet::new();
    for alias in all.filter_map(|alias| <&RoomAliasId>::try_from(alias.as_str()?).ok()) {
        if find(read, alias)?.is_some_and(|row| row.room == room) {
            naming.insert(alias.as_str());
        }
    }
    let is_naming = |value: &CanonicalJsonValue| value.as_str().is_some_and(|alias| naming.contains(alias));
    let mut content = content.clone();
    content.retain(|field, value| match (field.as_str(), value) {
        ("alias", alias) => is_naming(alias),
        ("alt_aliases", CanonicalJsonValue::Array(others)) => {
            others.retain(is_naming);
            !others.is_empty()
        }
        _ => false,
    });
    Ok((!content.is_empty()).then_some(content))
}

/// Gives the content of a canonical alias event without this alias; `None` if the content does not name it.
pub(crate) fn without(content: &str, alias: &RoomAliasId) -> Option<CanonicalJsonObject> {
    let mut content: CanonicalJsonObject = serde_json::from_str(content).ok()?;
    let mut changed = false;
    if content.get("alias").and_then(CanonicalJsonValue::as_str) == Some(alias.as_str()) {
        content.remove("alias");
        changed = true;
    }
    if let Some(CanonicalJsonValue::Array(others)) = content.get_mut("alt_aliases") {
        let before = others.len();
        others.retain(|other| other.as_str() != Some(alias.as_str()));
        changed |= others.len() != before;
        if others.is_empty() {
            content.remove("alt_aliases");
        }
    }
    changed.then_some(content)
}

/// The aliases in the content of a canonical alias event. Errors: 400 `M_BAD_JSON`.
pub(crate) fn named(content: &CanonicalJsonObject) -> Result<BTreeSet<String>, Refusal> {
    let odd = || Refusal::bad_json("`alias` must be a string, and `alt_aliases` a list of strings.");
    let mut aliases = BTreeSet::new();
    match content.get("alias") {
        None | Some(CanonicalJsonValue::Null) => {}
        Some(CanonicalJsonValue::String(alias)) if alias.is_empty() => {}
        Some(CanonicalJsonValue::String(alias)) => {
            aliases.insert(alias.clone());
        }
        Some(_) => return Err(odd()),
    }
    match content.get("alt_aliases") {
        None | Some(CanonicalJsonValue::Null) => {}
        Some(CanonicalJsonValue::Array(others)) => {
            for alias in others {
                aliases.insert(alias.as_str().ok_or_else(odd)?.to_owned());
            }
        }
        Some(_) => return Err(odd()),
    }
    Ok(aliases)
}
