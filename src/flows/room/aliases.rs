//! The use cases of aliases, which name rooms, and of the public directory.

use ruma::{
    OwnedRoomAliasId, OwnedRoomId, RoomAliasId, RoomId, UInt,
    api::error::ErrorKind,
    directory::{Filter, PublicRoomsChunk, RoomNetwork, RoomTypeFilter},
};

use crate::{
    accounts::Caller,
    env::Long,
    error::{Error, Exception, Refusal, Result},
    flows::{App, commit},
    rooms::{
        self, aliases,
        build::Draft,
        directory, members,
        policy::{self, Author},
        visibility::{self, HistoryVisibility},
    },
    store::LogEntry,
};

/// A page of the directory has at most this many rooms, and as many if the client names no limit.
const PAGE_MAX: usize = 500;
/// A page of the directory ends with the room at which its names and topics have this many bytes, because anybody may ask for it.
const PAGE_BYTES_MAX: usize = 256 << 10;

/// Lets an alias name a room. Errors: 409 `M_UNKNOWN` for an alias that names a room already, even this one.
pub(crate) async fn add(app: &App, caller: &Caller, alias: &RoomAliasId, room: &RoomId) -> Result<()> {
    aliases::check(alias, app.rooms.signer().server())?;
    let snapshot = app.store.snapshot();
    // That an alias is taken is no secret, so this comes before the question whether the caller is in the room.
    if aliases::find(&*snapshot, alias)?.is_some() {
        return Err(taken());
    }
    let (num, _) = rooms::require_room(&*snapshot, room)?;
    let (caller, alias) = (caller.clone(), alias.to_owned());
    commit::in_room_and_server(app, num, move |change| {
        if aliases::find(&change.batch, &alias)?.is_some() {
            return Err(taken());
        }
        if !members::is_joined(&change.batch, caller.user, change.num)? {
            return Err(commit::not_in_room().into());
        }
        change.batch.position(&LogEntry::Server);
        aliases::add(&mut change.batch, &alias, change.num, &caller.user_id);
        Ok(())
    })
    .await
}

/// The refusal of an alias that names a room already: 409 `M_UNKNOWN`.
fn taken() -> Error {
    Refusal::new(ErrorKind::Unknown, "The alias is taken.").exception(Exception::Taken).into()
}

/// Deletes an alias. Its creator, an administrator, and members who may change the room's canonical alias may do so; the last
/// also take it out of that event.
pub(crate) async fn remove(app: &App, caller: &Caller, alias: &RoomAliasId) -> Result<()> {
    let unknown = || Error::from(Refusal::not_found("There is no such alias."));
    aliases::check(alias, app.rooms.signer().server()).map_err(|_| unknown())?;
    let row = aliases::find(&*app.store.snapshot(), alias)?.ok_or_else(unknown)?;
    let (owned, caller, alias) = (app.clone(), caller.clone(), alias.to_owned());
    commit::in_room_and_server(app, row.room, move |change| {
        let row = aliases::find(&change.batch, &alias)?.filter(|row| row.room == change.num);
        let row = row.ok_or_else(|| Error::from(Refusal::not_found("There is no such alias.")))?;
        let is_joined = members::is_joined(&change.batch, caller.user, change.num)?;
        let commands = is_joined && change.power()?.may_send_state(&caller.user_id, CANONICAL_ALIAS)?;
        if !commands && !caller.is_admin && row.creator != caller.user_id.as_str() {
            return Err(Refusal::forbidden(
                "Only its creator and members who may change the canonical alias may remove this alias.",
            )
            .into());
        }
        change.batch.position(&LogEntry::Server);
        aliases::remove(&mut change.batch, &alias, &row);
        let canonical = change.state(CANONICAL_ALIAS, "")?;
        let content = canonical.and_then(|event| aliases::without(event.parsed.content.get(), &alias));
        if let Some(content) = content.filter(|_| commands) {
            let now_ms = owned.env.event_ms();
            let draft = Draft::state(caller.user_id.clone(), CANONICAL_ALIAS, "", content, now_ms);
            let signer = owned.rooms.signer();
            policy::approve(change, signer.server(), &Author::from(&caller), draft)?.add(change, signer)?;
        }
        Ok(())
    })
    .await
}

const CANONICAL_ALIAS: &str = "m.room.canonical_alias";

/// The room that an alias names. Errors: 404 `M_NOT_FOUND` for an alias that names none.
pub(crate) fn find(app: &App, alias: &RoomAliasId) -> Result<OwnedRoomId> {
    let snapshot = app.store.snapshot();
    let row = aliases::find(&*snapshot, alias)?;
    let row = row.ok_or_else(|| Error::from(Refusal::not_found("There is no such alias.")))?;
    Ok(rooms::require_row(&*snapshot, row.room)?.id)
}

/// The aliases of a room on this server. Errors: 403 for a caller who is not in the room and may not look in.
pub(crate) fn list(app: &App, caller: &Caller, room: &RoomId) -> Result<Vec<OwnedRoomAliasId>> {
    let snapshot = app.store.snapshot();
    let num = commit::require_num(app, room)?;
    let may = members::is_joined(&*snapshot, caller.user, num)?
        || visibility::current(&*snapshot, num)? == HistoryVisibility::WorldReadable;
    if !may {
        return Err(commit::not_in_room().into());
    }
    Ok(aliases::list(&*snapshot, num)?)
}

/// Whether a room is in the directory.
pub(crate) fn is_published(app: &App, room: &RoomId) -> Result<bool> {
    let snapshot = app.store.snapshot();
    let (num, _) = rooms::require_room(&*snapshot, room)?;
    Ok(directory::is_published(&*snapshot, num)?)
}

/// Puts a room into the directory or takes it out. Administrators and members who may change its canonical alias may do so.
pub(crate) async fn publish(app: &App, caller: &Caller, room: &RoomId, published: bool) -> Result<()> {
    let (num, _) = rooms::require_room(&*app.store.snapshot(), room)?;
    let caller = caller.clone();
    commit::in_room_and_server(app, num, move |change| {
        let may = caller.is_admin
            || members::is_joined(&change.batch, caller.user, change.num)?
                && change.power()?.may_send_state(&caller.user_id, CANONICAL_ALIAS)?;
        if !may {
            return Err(Refusal::forbidden(
                "Only members who may change the canonical alias may list or unlist this room.",
            )
            .into());
        }
        change.batch.position(&LogEntry::Server);
        directory::publish(&mut change.batch, change.num, published);
        Ok(())
    })
    .await
}

/// A page of the directory.
#[derive(Debug)]
pub(crate) struct DirectoryPage {
    pub(crate) rooms: Vec<PublicRoomsChunk>,
    pub(crate) next: Option<String>,
    pub(crate) prev: Option<String>,
    pub(crate) total: UInt,
}

/// Reads the directory: the rooms with the most members first.
pub(crate) async fn directory(
    app: &App,
    limit: Option<UInt>,
    since: Option<String>,
    filter: Filter,
    network: RoomNetwork,
) -> Result<DirectoryPage> {
    let offset =
        since.map_or(Some(0), |since| since.strip_prefix('p').and_then(|offset| offset.parse().ok()));
    let offset: usize =
        offset.ok_or_else(|| Refusal::invalid_param("`since` is not a token of the directory."))?;
    let limit =
        limit.and_then(|limit| usize::try_from(u64::from(limit)).ok()).unwrap_or(PAGE_MAX).min(PAGE_MAX);
    // No bridge brings rooms of other networks to this server, so there are none to list.
    if matches!(network, RoomNetwork::ThirdParty(_)) {
        return Ok(DirectoryPage { rooms: Vec::new(), next: None, prev: None, total: UInt::default() });
    }
    let (store, known) = (app.store.clone(), app.rooms.clone());
    app.env
        .blocking_long(Long::Search, move || {
            let snapshot = store.snapshot();
            let mut rooms = Vec::new();
            for room in directory::list(&*snapshot)? {
                let room = room?;
                let Some(row) = rooms::find_row(&*snapshot, room)? else { continue };
                let chunk = known.descriptions().of(&*snapshot, room, &row)?;
                if allows(&filter, &chunk) {
                    rooms.push(chunk);
                }
            }
            rooms.sort_by(|a, b| {
                b.num_joined_members.cmp(&a.num_joined_members).then_with(|| a.room_id.cmp(&b.room_id))
            });
            let total = rooms.len();
            let mut byte_count = 0;
            let page = rooms.iter().skip(offset).take(limit).take_while(|room| {
                let has_room = byte_count < PAGE_BYTES_MAX;
                byte_count += [&room.name, &room.topic].into_iter().flatten().map(String::len).sum::<usize>();
                has_room
            });
            let page: Vec<_> = page.map(|room| PublicRoomsChunk::clone(room)).collect();
            let end = offset.saturating_add(page.len());
            Ok(DirectoryPage {
                next: (end < total && !page.is_empty()).then(|| format!("p{end}")),
                prev: (offset > 0).then(|| format!("p{}", offset.saturating_sub(limit))),
                total: UInt::new_saturating(total as u64),
                rooms: page,
            })
        })
        .await
}

fn allows(filter: &Filter, chunk: &PublicRoomsChunk) -> bool {
    let fits_type = filter.room_types.is_empty()
        || filter.room_types.iter().any(|wanted| match (wanted, &chunk.room_type) {
            (RoomTypeFilter::Default, None) => true,
            (wanted, Some(room_type)) => wanted.as_str() == Some(room_type.as_str()),
            _ => false,
        });
    let Some(term) = filter.generic_search_term.as_ref().map(|term| term.to_lowercase()) else {
        return fits_type;
    };
    let alias = chunk.canonical_alias.as_ref().map(|alias| alias.as_str());
    let texts = [chunk.name.as_deref(), chunk.topic.as_deref(), alias, Some(chunk.room_id.as_str())];
    fits_type && texts.into_iter().flatten().any(|text| text.to_lowercase().contains(&term))
}
