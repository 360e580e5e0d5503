//! Finds the event nearest to a time.

use std::sync::Arc;

use ruma::{OwnedEventId, RoomId};

use super::looking;
use crate::{
    accounts::Caller,
    error::{Refusal, Result},
    flows::App,
    ids::{Order, Position, RoomNum},
    rooms::{
        event::StoredEvent,
        state,
        timeline::{self, PageToken},
    },
    store::{Direction, Fault, Read, Snapshot},
};

/// The search for a time halves the timeline at most this often, enough for any number of 64 bits.
const TIME_STEPS_MAX: usize = 64;
/// At most this many events near the time are compared.
const TIME_SCANNED_MAX: usize = 1_000;

/// The findings of a room near a time.
pub(crate) struct NearTime {
    /// The number of the room.
    pub(crate) num: RoomNum,
    /// The nearest event that this server has, and when it was sent: the first at or after the time, or the last at or before it.
    pub(crate) found: Option<(OwnedEventId, u64)>,
    /// A hole in the room's past in which a nearer event may be missing.
    pub(crate) hole: Option<Order>,
}

/// Finds the event nearest to a time.
///
/// Events stand in the order in which they came, which is nearly that of their times. So the place is found by halving the
/// timeline, and then the events around it are compared.
pub(crate) async fn event_at_time(
    app: &App,
    caller: &Caller,
    room: &RoomId,
    time_ms: u64,
    direction: Direction,
) -> Result<NearTime> {
    looking(app, caller, room, move |look, _| {
        let newest = look.end()?.min(Order::upto(look.snapshot.upto()));
        let snapshot = Arc::clone(&look.snapshot);
        let sees = |stored: &StoredEvent| look.reader.sees(&*snapshot, stored);
        let best = nearest(&snapshot, look.num, newest, time_ms, direction, sees)?;
        let mut hole = state::find_hole(&*snapshot, look.num, newest)?.map(|(hole, _)| hole);
        if hole.is_some() {
            let other = nearest(&snapshot, look.num, newest, time_ms, direction.opposite(), sees)?;
            let (older, newer) = match direction {
                Direction::Up => (&other, &best),
                Direction::Down => (&best, &other),
            };
            let upto = newer.as_ref().map_or(newest, |newer| newer.order);
            let is_between = |hole: &Order| older.as_ref().is_none_or(|older| *hole > older.order);
            hole = state::find_hole(&*snapshot, look.num, upto)?.map(|(hole, _)| hole).filter(is_between);
        }
        let found = best.map(|best| (best.id(&look.room), best.row.header.sent_ms));
        Ok(NearTime { num: look.num, found, hole })
    })
    .await
}

/// The refusal where a room has no event near a time: 404 `M_NOT_FOUND`.
pub(crate) fn nothing_near() -> Refusal {
    Refusal::not_found("There is no event near that time.")
}

/// Finds the event of a room nearest to a time, up to the newest that counts, among those that the asker sees.
pub(crate) fn nearest(
    snapshot: &Snapshot,
    room: RoomNum,
    newest: Order,
    time_ms: u64,
    direction: Direction,
    mut sees: impl FnMut(&StoredEvent) -> Result<bool, Fault>,
) -> Result<Option<StoredEvent>, Fault> {
    let (mut low, mut high) = (0, newest.anchor.number());
    for _ in 0..TIME_STEPS_MAX {
        let middle = low + (high - low) / 2;
        if middle == low {
            break;
        }
        let below = PageToken(Order::upto(Position::new(middle).unwrap_or(newest.anchor)));
        let first = timeline::page(snapshot, room, below, None, Direction::Up)?.next().transpose()?;
        match first {
            Some(stored) if stored.row.header.sent_ms < time_ms => low = middle,
            _ => high = middle,
        }
    }
    // The times come from other clocks and may be out of order, so some events before the place are read, too.
    let near = PageToken(Order::upto(Position::new(low).unwrap_or(newest.anchor)));
    let start =
        timeline::page(snapshot, room, near, None, direction.opposite())?.take(TIME_SCANNED_MAX / 10).last();
    let start = match start.transpose()? {
        Some(stored) if direction == Direction::Up => PageToken::below(stored.order),
        Some(stored) => PageToken::above(stored.order),
        None => near,
    };
    let mut best: Option<StoredEvent> = None;
    for stored in timeline::page(snapshot, room, start, None, direction)?.take(TIME_SCANNED_MAX) {
        let stored = stored?;
        let time = stored.row.header.sent_ms;
        let fits = if direction == Direction::Up { time >= time_ms } else { time <= time_ms };
        let nearer = best
            .as_ref()
            .is_none_or(|best| time.abs_diff(time_ms) < best.row.header.sent_ms.abs_diff(time_ms));
        if fits && nearer && stored.order <= newest && sees(&stored)? {
            best = Some(stored);
        }
    }
    Ok(best)
}
