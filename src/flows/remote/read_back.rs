//! Reads of a room's past for which other servers are asked where this one has a hole.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use ruma::{
    MilliSecondsSinceUnixEpoch, OwnedEventId, OwnedServerName, RoomId, UInt,
    api::{Direction as Asked, federation::event::get_event_by_timestamp},
};

use super::{
    ask::{self, ANSWERS},
    backfill,
    candidates::{CANDIDATES_MAX, Candidates},
};
use crate::{
    accounts::Caller,
    error::Result,
    flows::{
        App,
        room::look::{self, PageWanted, read_messages},
    },
    ids::RoomNum,
    rooms::members,
    store::Direction,
};

/// A reader waits for at most this long until other servers fill a hole.
const HOLE_WAITS_MAX: Duration = Duration::from_secs(10);
/// One page is read at most this many times, because holes were filled or passed over.
const READINGS_MAX: usize = 12;

/// A hole is filled at most this many times for the event near a time: a search may go deeper than a page.
const FILLS_MAX: usize = 40;

/// Answers a page of a room's timeline. Where a page comes to a hole in the room's past, other servers are asked for what is
/// missing. If they do not answer soon, the page ends there, and its token goes on at the hole. A page that would begin at a hole which nobody can fill
/// goes on below it, and has no token if there is nothing: a client that reads on comes to an end.
pub(crate) async fn messages(app: &App, caller: &Caller, room: &RoomId, wanted: PageWanted) -> Result<Bytes> {
    let (wanted, until) = (Arc::new(wanted), app.env.uptime().saturating_add(HOLE_WAITS_MAX));
    let mut passed = None;
    let mut answered = read_messages(app, caller, room, &wanted, passed).await?;
    for _ in 1..READINGS_MAX {
        let Some(hole) = answered.hole else { break };
        let left = until.saturating_sub(app.env.uptime());
        let is_filled = !left.is_zero() && backfill::fill_for_reader(app, answered.num, hole, left).await;
        if !is_filled {
            if !answered.is_empty {
                break;
            }
            tracing::debug!(room = %answered.num, ?hole, "a page passes over a hole that cannot be filled now");
            passed = Some(hole);
        }
        answered = read_messages(app, caller, room, &wanted, passed).await?;
    }
    Ok(answered.json)
}

/// Finds the event nearest to a time: the first at or after it, or the last at or before it. Where one that is nearer may be missing
/// here, another server is asked whether there is one, and the hole is filled as far as it stands, for which the reader waits a while.
/// Errors: 404 `M_NOT_FOUND` if there is none.
pub(crate) async fn event_at_time(
    app: &App,
    caller: &Caller,
    room: &RoomId,
    time_ms: u64,
    direction: Direction,
) -> Result<(OwnedEventId, u64)> {
    let until = app.env.uptime().saturating_add(HOLE_WAITS_MAX);
    let left = || until.saturating_sub(app.env.uptime());
    let mut near = look::event_at_time(app, caller, room, time_ms, direction).await?;
    let elsewhere = match near.hole {
        Some(_) => time_elsewhere(app, near.num, room, (time_ms, direction), left()).await,
        None => None,
    };
    if let Some(elsewhere) = elsewhere {
        for _ in 0..FILLS_MAX {
            let is_found = near
                .found
                .as_ref()
                .is_some_and(|(_, sent_ms)| sent_ms.abs_diff(time_ms) <= elsewhere.abs_diff(time_ms));
            let Some(hole) = near.hole.filter(|_| !is_found && !left().is_zero()) else { break };
            if !backfill::fill_for_reader(app, near.num, hole, left()).await {
                break;
            }
            near = look::event_at_time(app, caller, room, time_ms, direction).await?;
        }
    }
    near.found.ok_or_else(|| look::nothing_near().into())
}

/// When the event nearest to a time was sent that another server has; `None` if nobody knows one.
async fn time_elsewhere(
    app: &App,
    num: RoomNum,
    room: &RoomId,
    (time_ms, direction): (u64, Direction),
    takes_max: Duration,
) -> Option<u64> {
    let owned = app.clone();
    let list = move || {
        let snapshot = owned.store.snapshot();
        let names = members::list_servers(&*snapshot, num)?.take(CANDIDATES_MAX + 1);
        Ok(names.collect::<Result<Vec<_>, _>>()?)
    };
    let names = app.env.blocking(list).await.ok()?;
    let names = names.into_iter().filter_map(|name| OwnedServerName::try_from(name).ok());
    let mut candidates = Candidates::of(app, names);
    let dir = match direction {
        Direction::Up => Asked::Forward,
        Direction::Down => Asked::Backward,
    };
    let ask = |server: OwnedServerName| async move {
        let at = MilliSecondsSinceUnixEpoch(UInt::new_saturating(time_ms));
        let request = get_event_by_timestamp::v1::Request::new(room.to_owned(), at, dir);
        let answer = app.remote.client.send(&server, request, ANSWERS).await;
        answer.map_err(|failure| ask::failed(&server, failure))
    };
    let (_, answer) = tokio::select! {
        biased;
        first = candidates.first(app, ask) => first?,
        () = app.env.sleep(takes_max) => return None,
    };
    let sent_ms = u64::from(answer.origin_server_ts.0);
    let fits = match direction {
        Direction::Up => sent_ms >= time_ms,
        Direction::Down => sent_ms <= time_ms,
    };
    fits.then_some(sent_ms)
}
