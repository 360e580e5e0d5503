//! Pages of a room's past, for which other servers are asked where this one has a hole.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use ruma::RoomId;

use super::backfill;
use crate::{
    accounts::Caller,
    error::Result,
    flows::{
        App,
        room::look::{PageWanted, read_messages},
    },
};

/// A reader waits for at most this long until other servers fill a hole.
const HOLE_WAITS_MAX: Duration = Duration::from_secs(10);
/// One page is read at most this many times, because holes were filled or passed over.
const READINGS_MAX: usize = 12;

/// Answers a page of a room's timeline. Where a page towards older events comes to a hole in the room's past, other servers are asked for what is
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
