//! Canonical aliases that other servers give. Whoever calls a room by one has us ask its server, before the room's turn, whether the alias
//! names the room (client-server API, "PUT /rooms/{roomId}/state": `M_BAD_ALIAS`).

use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt, stream};
use ruma::{CanonicalJsonObject, OwnedRoomAliasId, RoomId, api::error::ErrorKind};

use super::ask;
use crate::{
    accounts::Caller,
    error::{Error, Refusal, Result},
    flows::{App, commit},
    rooms::{self, aliases, members, power::Power, view::RoomView},
    schema::event_types::CANONICAL_ALIAS,
};

/// One event adds at most this many aliases of other servers.
const ASKED_MAX: usize = 20;
/// At most this many of them are asked for at once.
const AT_ONCE: usize = 5;
/// All answers together take at most this long: clients give up not much later.
const TAKES_MAX: Duration = Duration::from_secs(20);

/// Asks for those aliases of other servers that a new canonical alias event adds, and gives them when all of them name the room. Errors:
/// 403 `M_FORBIDDEN` for somebody who is not in the room or may not set its canonical alias; 400 `M_BAD_ALIAS`; [`Error::Busy`].
pub(crate) async fn confirm(
    app: &App,
    caller: &Caller,
    room: &RoomId,
    state_key: &str,
    content: &CanonicalJsonObject,
) -> Result<Vec<OwnedRoomAliasId>> {
    let added = list_added(app, caller, room, state_key, content)?;
    if added.len() > ASKED_MAX {
        let why = format!("An event adds at most {ASKED_MAX} aliases of other servers. Add fewer at a time.");
        return Err(Refusal::new(ErrorKind::BadAlias, why).into());
    }
    if added.is_empty() {
        return Ok(added);
    }
    let questions: Vec<_> = added.into_iter().map(|alias| confirm_one(app, room, alias)).collect();
    let answers = stream::iter(questions).buffer_unordered(AT_ONCE).try_collect::<Vec<_>>();
    tokio::select! {
        biased;
        confirmed = answers => confirmed,
        () = app.env.sleep(TAKES_MAX) => {
            let why = "The servers of the aliases do not answer.";
            Err(Refusal::new(ErrorKind::BadAlias, why).into())
        }
    }
}

/// The aliases of other servers that are new in the content. Nothing is asked for somebody who could not set them, whom the room refuses anyway.
fn list_added(
    app: &App,
    caller: &Caller,
    room: &RoomId,
    state_key: &str,
    content: &CanonicalJsonObject,
) -> Result<Vec<OwnedRoomAliasId>> {
    let num = commit::require_num(app, room)?;
    let snapshot = app.store.snapshot();
    if !members::is_joined(&*snapshot, caller.user, num)? {
        return Err(commit::not_in_room().into());
    }
    let old = rooms::find_state(&*snapshot, num, CANONICAL_ALIAS, state_key)?;
    let added = aliases::list_added(content, old.as_ref().map(|event| event.row.content()))?;
    let parsed = added.into_iter().filter_map(|alias| OwnedRoomAliasId::try_from(alias).ok());
    let added: Vec<_> = parsed.filter(|alias| *alias.server_name() != app.config.server.name).collect();
    let row = rooms::require_row(&*snapshot, num)?;
    let power = Power::read(RoomView { read: &*snapshot, num, row: &row })?;
    if !added.is_empty() && !power.may_send_state(&caller.user_id, CANONICAL_ALIAS)? {
        let why = "Your power level does not suffice to change the room's canonical alias.";
        return Err(Refusal::forbidden(why).into());
    }
    Ok(added)
}

async fn confirm_one(app: &App, room: &RoomId, alias: OwnedRoomAliasId) -> Result<OwnedRoomAliasId> {
    let bad = |why: &str| Err(Refusal::new(ErrorKind::BadAlias, format!("{alias} {why}")).into());
    match ask::alias(app, &alias).await {
        Ok(named) if named.room_id == room => Ok(alias),
        Ok(_) => bad("names another room."),
        Err(Error::Refused(why)) => bad(&format!("does not name this room: {}", why.message)),
        Err(Error::Remote { server, cause }) => {
            tracing::debug!(%alias, server, cause, "a canonical alias is refused, because its server does not answer");
            bad("names no room that its server tells of.")
        }
        Err(other) => Err(other),
    }
}
