//! The use cases of aliases, which name rooms, and of listing a room in the public directory.

use ruma::{OwnedRoomAliasId, RoomAliasId, RoomId, api::error::ErrorKind};

use crate::{
    accounts::Caller,
    error::{Error, Exception, Refusal, Result},
    flows::{
        App,
        commit::{self, ServerLock},
        own_events,
    },
    rooms::{
        self, aliases,
        build::Draft,
        change::Change,
        directory, members,
        policy::{self, Author},
        turns::Seat,
        visibility::{self, HistoryVisibility},
    },
    schema::event_types::CANONICAL_ALIAS,
    store::LogEntry,
};

/// Lets an alias name a room. Errors: 409 `M_UNKNOWN` for an alias that names a room already, even this one; 413 `M_TOO_LARGE` where the
/// room or the caller has as many as may be.
pub(crate) async fn add(app: &App, caller: &Caller, alias: &RoomAliasId, room: &RoomId) -> Result<()> {
    aliases::check(alias, app.rooms.signer().server())?;
    let snapshot = app.store.snapshot();
    // That an alias is taken is no secret, so this comes before the question whether the caller is in the room.
    if aliases::find(&*snapshot, alias)?.is_some() {
        return Err(taken());
    }
    let (num, _) = rooms::require_room(&*snapshot, room)?;
    let (caller, alias) = (caller.clone(), alias.to_owned());
    let begin = move |app: &App, seat: Seat| Change::begin_beside(&app.store, seat, num);
    let work = move |change: &mut Change, server: &mut ServerLock<'_>| {
        if !members::is_joined(&change.batch, caller.user, change.num)? {
            return Err(commit::not_in_room().into());
        }
        let commands = caller.is_admin || change.power()?.may_send_state(&caller.user_id, CANONICAL_ALIAS)?;
        aliases::require_space(&change.batch, change.num, &caller.user_id, commands)?;
        // Everybody who names a room waits for the lock, so that it is taken when all else is done.
        server.take(change);
        if aliases::find(&change.batch, &alias)?.is_some() {
            return Err(taken());
        }
        change.batch.position(&LogEntry::Server);
        aliases::add(&mut change.batch, &alias, change.num, &caller.user_id);
        Ok(())
    };
    commit::in_turn(app, num, begin, work, Error::from).await
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
    own_events::in_room_and_server(app, row.room, Vec::new(), move |change| {
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

/// An answer lists at most this many aliases of a room. Only rooms from before there were bounds have more.
const LISTED_MAX: usize = 2 * aliases::OF_ROOM_MAX;

/// The aliases of a room on this server. Errors: 403 for a caller who is not in the room and may not look in.
pub(crate) fn list(app: &App, caller: &Caller, room: &RoomId) -> Result<Vec<OwnedRoomAliasId>> {
    let snapshot = app.store.snapshot();
    let num = commit::require_num(app, room)?;
    let may = members::is_joined(&*snapshot, caller.user, num)?
        || visibility::current(&*snapshot, num)? == HistoryVisibility::WorldReadable;
    if !may {
        return Err(commit::not_in_room().into());
    }
    Ok(aliases::list(&*snapshot, num, LISTED_MAX)?)
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
