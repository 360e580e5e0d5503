//! The graphs of a room's events: the auth edges, from each event to those that it allows, and the *heads*, which are
//! the events that no accepted event cites yet (the specification's forward extremities).

use std::collections::BTreeSet;

use ruma::events::TimelineEventType;

use crate::{
    ids::{EventNum, RoomNum},
    rooms::state::{self, StateRef},
    schema,
    schema::event_types::MERGE,
    schema::rooms::{Apart, Head, Place, RoomRow},
    store::{Batch, Direction, Fault, Read},
};

/// A room has at most this many heads: our own events cite all of them, and an event may cite 20.
pub const HEADS_MAX: usize = 20;
/// Above this many heads, merge them by an event that clients do not see.
pub const HEADS_WANTED: usize = 10;
/// Merge a head at once if its state differs from the current one in more keys than this.
pub const HEAD_DISTANCE_WANTED: u64 = 1_000;
/// A branch whose state differs from the room's in more keys than this stands apart until it is reunited. Tests use a
/// small bound to reach it in small rooms.
pub const APART_DISTANCE: u64 = if cfg!(test) { 200 } else { HEAD_DISTANCE_WANTED };
/// At most this many branches of a room stand apart.
pub const APART_MAX: usize = 20;
/// Drop a head of another server that is older than this before younger ones.
const HEAD_AGE_MS_MAX: u64 = 24 * 60 * 60 * 1000;
/// Likewise drop a head early that is this much less deep than the deepest.
const HEAD_LAG_MAX: u64 = 100;

/// A timer looks after branches that stand apart in steps of this many milliseconds.
const REUNION_STEP_MS: u64 = 2 * 60 * 1000;

/// The time at which a timer looks whether branches of a room still stand apart: some minutes from now, and the same for
/// all that come within two minutes, so that a room has few such timers.
pub fn reunion_due_ms(now_ms: u64) -> u64 {
    (now_ms / REUNION_STEP_MS).saturating_add(2).saturating_mul(REUNION_STEP_MS)
}

/// Notes that a state event names these events among its auth events. Only for state events, since a message allows no
/// other event, and not for rejected ones, since no state can rest on them.
pub fn put_auth_edges(batch: &mut Batch, room: RoomNum, event: EventNum, auth: &[EventNum]) {
    for allowing in auth {
        schema::AUTH_CHILD.put(batch, (room, *allowing, event), &());
    }
}

/// Deletes the edges that lead to an event from its auth events.
pub fn delete_auth_edges(batch: &mut Batch, room: RoomNum, event: EventNum, auth: &[EventNum]) {
    for allowing in auth {
        schema::AUTH_CHILD.delete(batch, (room, *allowing, event));
    }
}

/// Deletes the auth edges of a room that was never finished.
pub(super) fn clear(batch: &mut Batch, room: RoomNum) {
    schema::AUTH_CHILD.delete_prefix::<(RoomNum,)>(batch, (room,));
}

/// Lists the state events that name `event` among their auth events, newest first; only those stored before `before`.
pub fn list_auth_children<'r>(
    read: &'r (impl Read + ?Sized),
    room: RoomNum,
    event: EventNum,
    before: EventNum,
) -> Result<impl Iterator<Item = Result<EventNum, Fault>> + 'r, Fault> {
    let low = std::ops::Bound::Included((room, event, EventNum(0)));
    let high = std::ops::Bound::Excluded((room, event, before));
    let rows = schema::AUTH_CHILD.range::<(RoomNum, EventNum, EventNum)>(read, low, high, Direction::Down)?;
    Ok(rows.map(|row| row.map(|((_, _, child), ())| child)))
}

/// Walk at most this many events that are aside, to find the events that one cites by way of them.
const ASIDE_WALKED_MAX: usize = 1_000;

/// Lists the events that these cite by way of events that are aside (rejected or soft-failed): an event that stands on
/// a rejected one stands on the events which that one cites. Beyond the bound, heads that are cited so stay heads,
/// which only costs a merge.
pub fn list_cited_through_aside(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    cited: &[EventNum],
) -> Result<BTreeSet<EventNum>, Fault> {
    let (mut open, mut found, mut walked) = (cited.to_vec(), BTreeSet::new(), 0);
    while let Some(event) = open.pop() {
        let is_aside = matches!(schema::PLACE.get(read, (room, event))?, Some(Place::Aside));
        if !is_aside || walked >= ASIDE_WALKED_MAX {
            continue;
        }
        walked += 1;
        let Some(aside) = schema::ASIDE.get(read, (room, event))? else { continue };
        for prev in aside.row.header.prev {
            if found.insert(prev) {
                open.push(prev);
            }
        }
    }
    Ok(found)
}

/// The facts about a head that decide whether it is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadFacts {
    /// The number of the head's event.
    pub event: EventNum,
    /// Whether this server made the event; such a head is never dropped.
    pub is_own: bool,
    /// The depth that the event states.
    pub depth: u64,
    /// The time at which we stored the event, in milliseconds since the epoch.
    pub stored_ms: u64,
    /// The state after the event; `None` where it is not written down yet, and so differs from all others.
    pub after: Option<StateRef>,
}

/// Lists the heads to drop so that at most [`HEADS_MAX`] are left; none if there are no more. The first to go are those
/// of other servers that add no state of their own, then old and shallow ones, then the oldest. Ours stay: as they cite
/// all heads, there is at most one.
pub fn list_heads_to_drop(heads: &[HeadFacts], now_ms: u64) -> Vec<EventNum> {
    list_excess(heads, HEADS_MAX, now_ms)
}

fn list_excess(heads: &[HeadFacts], heads_max: usize, now_ms: u64) -> Vec<EventNum> {
    let excess = heads.len().saturating_sub(heads_max);
    let deepest = heads.iter().map(|head| head.depth).max().unwrap_or(0);
    // A head adds no state if ours or a newer one has the same, so the newest are looked at first.
    let mut newest_first: Vec<&HeadFacts> = heads.iter().collect();
    newest_first.sort_by_key(|head| (!head.is_own, std::cmp::Reverse((head.stored_ms, head.event))));
    let mut states = BTreeSet::new();
    let mut candidates = Vec::new();
    for head in newest_first {
        let adds_state = head.after.is_none_or(|after| states.insert(after));
        if head.is_own {
            continue;
        }
        let is_old = now_ms.saturating_sub(head.stored_ms) > HEAD_AGE_MS_MAX;
        let is_shallow = deepest.saturating_sub(head.depth) > HEAD_LAG_MAX;
        let class = match (adds_state, is_old || is_shallow) {
            (false, _) => 0,
            (true, true) => 1,
            (true, false) => 2,
        };
        candidates.push((class, head.stored_ms, head.depth, head.event));
    }
    candidates.sort_unstable();
    candidates.into_iter().take(excess).map(|(.., event)| event).collect()
}

/// Drops heads above the bound, but never the one whose state is newest on the main line: otherwise a server that
/// speaks from many old places could turn the room's state back. The others stay, sorted by their numbers. The state
/// after the head `unwritten` is not written down yet, so that head's `after` does not count.
pub fn drop_heads(heads: &mut Vec<Head>, unwritten: Option<EventNum>, now_ms: u64) {
    let is_written = |head: &Head| Some(head.event) != unwritten;
    let on_main_line = |head: &&Head| is_written(head) && matches!(head.after, StateRef::Main(_));
    let newest = heads.iter().filter(on_main_line).max_by_key(|head| (head.after, head.event));
    let newest = newest.map(|head| head.event);
    let facts: Vec<HeadFacts> = heads
        .iter()
        .map(|head| {
            let Head { event, depth, stored_ms, .. } = *head;
            let after = is_written(head).then_some(head.after);
            HeadFacts { event, is_own: head.is_own || Some(event) == newest, depth, stored_ms, after }
        })
        .collect();
    let dropped = list_heads_to_drop(&facts, now_ms);
    heads.retain(|head| !dropped.contains(&head.event));
    heads.sort_by_key(|head| head.event);
}

/// Drops branches above [`APART_MAX`], by the same choice as heads: those that add no state first, then old and shallow
/// ones, then the oldest. A branch that is dropped comes back with the next event that stands on it.
pub fn drop_apart(apart: &mut Vec<Apart>, now_ms: u64) {
    let facts: Vec<HeadFacts> = apart
        .iter()
        .map(|Apart { head, .. }| {
            let Head { event, depth, stored_ms, is_own, after, .. } = *head;
            HeadFacts { event, is_own, depth, stored_ms, after: Some(after) }
        })
        .collect();
    let dropped = list_excess(&facts, APART_MAX, now_ms);
    for event in &dropped {
        tracing::debug!(%event, "a branch is dropped, because too many stand apart from the room's state");
    }
    apart.retain(|branch| !dropped.contains(&branch.head.event));
    apart.sort_by_key(|branch| branch.head.event);
}

/// Whether a local member who may send should merge the heads: the state of a branch that comes back from far away is then
/// resolved once, and not at each later event. The state of one of the room's `heads` heads differs from the current one in
/// at most `distance` keys ([`state::distance`]).
fn wants_merge(distance: u64, heads: usize) -> bool {
    distance > HEAD_DISTANCE_WANTED || heads > HEADS_WANTED
}

/// Whether the heads are too many, or one of them is too far from the current state, so that somebody should merge
/// them. Costs a few seeks a head.
pub fn want_merge(read: &(impl Read + ?Sized), room: RoomNum, row: &RoomRow) -> Result<bool, Fault> {
    let RoomRow { heads, state_tip, .. } = row;
    if heads.len() < 2 {
        return Ok(false);
    }
    let tip = StateRef::Main(*state_tip);
    for head in heads {
        if wants_merge(state::distance(read, room, tip, head.after)?, heads.len()) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether an event only merges heads, so that clients do not see it.
pub fn only_merges(event_type: &TimelineEventType, is_state: bool) -> bool {
    !is_state && event_type.to_string() == MERGE
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        ids::{Order, SideNum},
        rooms::state::{
            StateValue,
            tests::{Bench, event, key},
        },
    };

    const DAY_MS: u64 = HEAD_AGE_MS_MAX;

    fn head(number: u64, stored_ms: u64, state: u32) -> HeadFacts {
        let after = Some(StateRef::Side(SideNum(state)));
        HeadFacts { event: EventNum(number), is_own: false, depth: 1_000, stored_ms, after }
    }

    #[test]
    fn twenty_heads_are_kept_however_old() {
        let heads: Vec<_> = (0..20).map(|number| head(number, 0, 1)).collect();
        assert!(list_heads_to_drop(&heads, 9 * DAY_MS).is_empty());
    }

    #[test]
    fn heads_of_one_state_go_before_old_ones_and_old_ones_before_the_oldest() {
        // Eighteen heads are fresh, each with a state of its own; one repeats a state, one is of yesterday, and one
        // lags.
        let now = 10 * DAY_MS;
        let mut heads: Vec<_> =
            (0..18).map(|number| head(number, now - 50 + number, number as u32)).collect();
        heads.push(head(100, now - 60, 3));
        heads.push(head(101, now - 2 * DAY_MS, 101));
        heads.push(HeadFacts { depth: 899, ..head(102, now - 1, 102) });
        assert_eq!(list_heads_to_drop(&heads, now), [EventNum(100)]);
        heads.push(head(103, now, 103));
        heads.push(head(104, now, 104));
        assert_eq!(list_heads_to_drop(&heads, now), [EventNum(100), EventNum(101), EventNum(102)]);
        heads.push(head(105, now, 105));
        assert_eq!(list_heads_to_drop(&heads, now).last(), Some(&EventNum(0)));
    }

    proptest! {
        #[test]
        fn at_most_twenty_heads_are_left_and_ours_among_them(
            heads in prop::collection::vec((any::<u64>(), 0_u64..2_000, 0_u32..30), 0..1_000),
            own in any::<prop::sample::Index>(),
            now: u64,
        ) {
            let mut heads: Vec<_> = heads
                .into_iter()
                .enumerate()
                .map(|(number, (stored_ms, depth, state))| {
                    HeadFacts { depth, ..head(number as u64, stored_ms, state) }
                })
                .collect();
            let own = if heads.is_empty() { None } else { Some(own.index(heads.len())) };
            if let Some(own) = own {
                heads[own].is_own = true;
            }
            let dropped = list_heads_to_drop(&heads, now);
            prop_assert_eq!(heads.len() - dropped.len(), heads.len().min(HEADS_MAX));
            prop_assert!(own.is_none_or(|own| !dropped.contains(&heads[own].event)));
            let distinct: BTreeSet<_> = dropped.iter().collect();
            prop_assert_eq!(distinct.len(), dropped.len());
        }
    }

    #[test]
    fn far_states_are_merged() {
        assert!(!wants_merge(0, 1));
        assert!(!wants_merge(1_000, 10));
        assert!(wants_merge(1_001, 1));
        assert!(wants_merge(0, 11));
        assert!(wants_merge(u64::MAX, 2));
    }

    #[test]
    fn the_distance_is_the_changes_between() {
        let bench = Bench::new();
        let orders: Vec<Order> =
            (0..1_200).map(|number| bench.step(&[(key(number % 7), event(number.into()))])).collect();
        let snapshot = bench.store.snapshot();
        let tip = state::tip(&*snapshot, bench.room).unwrap();
        let is_far = |order: Order| {
            let distance = state::distance(&*snapshot, bench.room, tip, StateRef::Main(order));
            wants_merge(distance.unwrap(), 2)
        };
        assert!(!is_far(orders[1_199]) && !is_far(orders[199]));
        assert!(is_far(orders[198]));
        let side = bench.write(|batch| {
            let changes: Vec<_> = (0..1_001).map(|number| (key(100 + number), StateValue::Absent)).collect();
            let set: Vec<_> = changes.iter().map(|(key, _)| (*key, event(5))).collect();
            state::make_side(batch, bench.room, &mut 0, tip, &set).unwrap()
        });
        let snapshot = bench.store.snapshot();
        assert_eq!(state::distance(&*snapshot, bench.room, tip, side).unwrap(), 1_001);
    }
}
