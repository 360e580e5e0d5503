//! Forgetting events that are kept aside.

use std::ops::Bound;

use crate::{
    ids::{EventNum, RoomNum},
    rooms::{graph, redact},
    schema,
    schema::rooms::{AsideCount, AsideRow, RedactionWaitingRow},
    store::{Batch, Direction, Fault},
};

/// An event aside is taken off the count of those.
pub(super) fn count_less(count: &mut AsideCount, aside: &AsideRow) {
    count.count = count.count.saturating_sub(1);
    count.needed = count.needed.saturating_sub(u64::from(aside.is_needed));
}

/// Deletes the rows of an event that is kept aside; the caller counts it.
pub(super) fn delete(batch: &mut Batch, room: RoomNum, aside: &AsideRow) {
    let header = &aside.row.header;
    schema::ASIDE.delete(batch, (room, header.event));
    schema::PLACE.delete(batch, (room, header.event));
    schema::EVENT_ID.delete(batch, &header.key);
    if header.state_key.is_some() {
        graph::delete_auth_edges(batch, room, header.event, &header.auth);
    }
    if header.redacted_by.is_some() {
        redact::forget_original(batch, room, header.event);
    }
}

/// Lets a redaction wait again for an event that was aside and is forgotten. It was found then that it may redact the event.
pub(super) fn let_wait(batch: &mut Batch, room: RoomNum, aside: &AsideRow, redaction: EventNum) {
    let waiting = RedactionWaitingRow { by_power: true };
    schema::REDACTION_WAITING.put(batch, (room, &aside.row.header.key, redaction), &waiting);
}

/// Takes back some of the events that an unfinished step brought, of which the first has this number: nothing names them.
/// Gives `true` when none are left.
pub(super) fn take_back(
    batch: &mut Batch,
    room: RoomNum,
    first: EventNum,
    events_max: usize,
) -> Result<bool, Fault> {
    let above = RoomNum(room.0.saturating_add(1));
    let (low, high) = (Bound::Included((room, first)), Bound::Excluded((above, EventNum(0))));
    let rows = schema::ASIDE.range::<(RoomNum, EventNum)>(&*batch, low, high, Direction::Down)?;
    let rows: Vec<_> = rows.take(events_max).collect::<Result<_, _>>()?;
    let mut count = schema::ASIDE_COUNT.get(&*batch, room)?.unwrap_or_default();
    for (_, aside) in &rows {
        delete(batch, room, aside);
        count_less(&mut count, aside);
        // A redaction that was here before waits again.
        if let Some(redaction) = aside.row.header.redacted_by.filter(|redaction| *redaction < first) {
            let_wait(batch, room, aside, redaction);
        }
    }
    if count == AsideCount::default() {
        schema::ASIDE_COUNT.delete(batch, room);
    } else if !rows.is_empty() {
        schema::ASIDE_COUNT.put(batch, room, &count);
    }
    Ok(rows.is_empty())
}
