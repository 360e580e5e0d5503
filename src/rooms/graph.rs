//! The graphs of a room's events: who allows whom (auth edges), and the *heads*: the events that no accepted event
//! cites yet (the specification's forward extremities).

use std::collections::BTreeSet;

use ruma::events::TimelineEventType;

use crate::{
    ids::{EventNum, RoomNum},
    rooms::state::{self, Ref},
    schema,
    schema::rooms::{Head, Place, RoomRow},
    store::{Batch, Direction, Fault, Read},
};

/// A room has no more heads: our own events cite all of them, and an event may cite 20.
pub const HEADS_MAX: usize = 20;
/// Above this many heads we merge them by an event that clients do not see.
pub const HEADS_WANTED: usize = 10;
/// A head whose state differs from the current one in more keys is merged at once.
pub const HEAD_DISTANCE_WANTED: u64 = 1_000;
/// A head of another server that is older is given up before younger ones.
const HEAD_AGE_MS_MAX: u64 = 24 * 60 * 60 * 1000;
/// So is one that is so much less deep than the deepest.
const HEAD_LAG_MAX: u64 = 100;

/// Notes that a state event names these events among its auth events. State events only: nothing is allowed by a
/// message. Not for rejected events: no state can rest on them.
pub fn put_auth_edges(batch: &mut Batch, room: RoomNum, event: EventNum, auth: &[EventNum]) {
    for allowing in auth {
        schema::AUTH_CHILD.put(batch, (room, *allowing, event), &());
    }
}

/// Deletes the auth edges of a room that did not come to be.
pub(super) fn clear(batch: &mut Batch, room: RoomNum) {
    schema::AUTH_CHILD.delete_prefix::<(RoomNum,)>(batch, (room,));
}

/// State events that name `event` among their auth events, newest first; those stored before `before` only.
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

/// Walk at most this many events that are aside, to find what an event cites by way of them.
const ASIDE_WALKED_MAX: usize = 1_000;

/// The events that these cite by way of events that are aside (rejected, soft-failed): an event that stands on a rejected
/// one stands on what that one cites. Beyond the bound, heads that are cited so stay heads, which only costs a merge.
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

/// A head, as far as it matters whether it is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadFacts {
    /// Which.
    pub event: EventNum,
    /// Made by this server: never given up.
    pub is_own: bool,
    /// Its depth.
    pub depth: u64,
    /// When we stored it, in milliseconds since the epoch.
    pub stored_ms: u64,
    /// The state after it; `None` where that is not written down yet, and so a state of its own.
    pub after: Option<Ref>,
}

/// The heads to give up so that at most [`HEADS_MAX`] are left; none while there are no more. First those of other
/// servers that add no state of their own, then old and shallow ones, then whatever is oldest. Ours stay: as they cite
/// all heads, there is at most one.
pub fn list_heads_to_drop(heads: &[HeadFacts], now_ms: u64) -> Vec<EventNum> {
    let excess = heads.len().saturating_sub(HEADS_MAX);
    let deepest = heads.iter().map(|head| head.depth).max().unwrap_or(0);
    // Whose state is held by an own or newer head already: seen from the newest on.
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

/// Gives up heads above the bound, but never the one whose state is newest on the main line: else whoever speaks from
/// many old places could turn the room's state back. The others are left in the order of their numbers. The state after
/// the head `unwritten` is not written down yet: what the head says of it does not count.
pub fn drop_heads(heads: &mut Vec<Head>, unwritten: Option<EventNum>, now_ms: u64) {
    let is_written = |head: &Head| Some(head.event) != unwritten;
    let on_main_line = |head: &&Head| is_written(head) && matches!(head.after, Ref::Main(_));
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

/// What to do with an event whose state is not the current one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It becomes a head.
    Head,
    /// It becomes a head, and a local member who may send should merge the heads: however far away a branch is that comes
    /// back, what it differs in is resolved once and not at each later event.
    HeadToMerge,
}

/// What an event may become whose state differs from the current one in at most so many keys ([`state::distance`]), in
/// a room that has, with the event, so many heads.
pub fn standing(distance: u64, heads: usize) -> Standing {
    if distance > HEAD_DISTANCE_WANTED || heads > HEADS_WANTED {
        Standing::HeadToMerge
    } else {
        Standing::Head
    }
}

/// Whether the heads are too many, or one of them too far from the current state, so that somebody should merge them.
/// Costs a few seeks a head.
pub fn want_merge(read: &(impl Read + ?Sized), room: RoomNum, row: &RoomRow) -> Result<bool, Fault> {
    let RoomRow { heads, state_tip, .. } = row;
    if heads.len() < 2 {
        return Ok(false);
    }
    let tip = Ref::Main(*state_tip);
    for head in heads {
        if standing(state::distance(read, room, tip, head.after)?, heads.len()) != Standing::Head {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The type of an event that only merges heads: other servers send them, too, and hide them from their clients
/// (`docs/decisions/events-that-only-merge.md`).
pub const MERGE: &str = "org.matrix.dummy_event";

/// Whether an event only merges heads: clients do not see it.
pub fn only_merges(kind: &TimelineEventType, is_state: bool) -> bool {
    !is_state && kind.to_string() == MERGE
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        ids::{Order, SideNum},
        rooms::state::{
            Val,
            tests::{Bench, event, key},
        },
    };

    const DAY_MS: u64 = HEAD_AGE_MS_MAX;

    fn head(number: u64, stored_ms: u64, state: u32) -> HeadFacts {
        let after = Some(Ref::Side(SideNum(state)));
        HeadFacts { event: EventNum(number), is_own: false, depth: 1_000, stored_ms, after }
    }

    #[test]
    fn twenty_heads_are_kept_however_old() {
        let heads: Vec<_> = (0..20).map(|number| head(number, 0, 1)).collect();
        assert!(list_heads_to_drop(&heads, 9 * DAY_MS).is_empty());
    }

    #[test]
    fn heads_of_one_state_go_before_old_ones_and_old_ones_before_the_oldest() {
        // 18 fresh ones, each with a state of its own; one of them again; one of yesterday; one that lags.
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
        assert_eq!(standing(0, 1), Standing::Head);
        assert_eq!(standing(1_000, 10), Standing::Head);
        assert_eq!(standing(1_001, 1), Standing::HeadToMerge);
        assert_eq!(standing(0, 11), Standing::HeadToMerge);
        assert_eq!(standing(u64::MAX, 2), Standing::HeadToMerge);
    }

    #[test]
    fn the_distance_is_the_changes_between() {
        let bench = Bench::new();
        let orders: Vec<Order> =
            (0..1_200).map(|number| bench.step(&[(key(number % 7), event(number.into()))])).collect();
        let snapshot = bench.store.snapshot();
        let tip = state::tip(&*snapshot, bench.room).unwrap();
        let of = |state: Ref| standing(state::distance(&*snapshot, bench.room, tip, state).unwrap(), 2);
        assert_eq!(of(Ref::Main(orders[1_199])), Standing::Head);
        assert_eq!(of(Ref::Main(orders[199])), Standing::Head);
        assert_eq!(of(Ref::Main(orders[198])), Standing::HeadToMerge);
        let side = bench.write(|batch| {
            let changes: Vec<_> = (0..1_001).map(|number| (key(100 + number), Val::Absent)).collect();
            let set: Vec<_> = changes.iter().map(|(key, _)| (*key, event(5))).collect();
            state::make_side(batch, bench.room, &mut 0, tip, &set).unwrap()
        });
        let snapshot = bench.store.snapshot();
        assert_eq!(state::distance(&*snapshot, bench.room, tip, side).unwrap(), 1_001);
    }
}
