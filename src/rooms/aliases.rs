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

/// Lists the aliases of a room, sorted.
pub fn list(read: &(impl Read + ?Sized), room: RoomNum) -> Result<Vec<OwnedRoomAliasId>, Fault> {
    let mut aliases = Vec::new();
    for row in schema::ROOM_ALIAS.prefix::<(RoomNum,)>(read, (room,), Direction::Up)? {
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

/// Checks the aliases that a new `m.room.canonical_alias` adds: each must be an alias (400 `M_INVALID_PARAM`), and name
/// this room (400 `M_BAD_ALIAS`), or be the one that is promised to it.
pub fn check_canonical(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    server: &ServerName,
    content: &CanonicalJsonObject,
    old: Option<&str>,
    promised: Option<&RoomAliasId>,
) -> Result<()> {
    let old: CanonicalJsonObject = old.and_then(|old| serde_json::from_str(old).ok()).unwrap_or_default();
    let known = named(&old).unwrap_or_default();
    for alias in named(content)?.difference(&known) {
        let bad = |why: &str| Refusal::new(ErrorKind::BadAlias, format!("{alias} {why}"));
        let parsed = <&RoomAliasId>::try_from(alias.as_str())
            .map_err(|_| Refusal::invalid_param(format!("{alias} is not an alias.")))?;
        if parsed.server_name() != server {
            return Err(bad("is an alias of another server, which cannot be asked.").into());
        }
        if promised != Some(parsed) && find(read, parsed)?.is_none_or(|row| row.room != room) {
            return Err(bad("does not name this room.").into());
        }
    }
    Ok(())
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

fn named(content: &CanonicalJsonObject) -> Result<BTreeSet<String>, Refusal> {
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
