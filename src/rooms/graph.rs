//! The graphs of a room's events: who allows whom (auth edges), and the *heads*: the events that no accepted event
//! cites yet (the specification's forward extremities).

use std::collections::BTreeSet;

use crate::{
    ids::{EventNum, RoomNum},
    rooms::state::{self, Ref},
    store::{Batch, Direction, Fault, Read, schema},
};

/// A room has no more heads: our own events cite all of them, and an event may cite 20.
pub const HEADS_MAX: usize = 20;
/// Above this many heads we merge them by an event that clients do not see.
pub const HEADS_WANTED: usize = 10;
/// A head whose state differs from the current one in more keys is merged at once.
pub const HEAD_DISTANCE_WANTED: u64 = 1_000;
/// An event whose state is further from the current one is kept off the heads, and unseen like a soft failure, until
/// another accepted event cites it: what it would cost at each later event is its sender's choice.
pub const HEAD_DISTANCE_MAX: u64 = 20_000;
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
    /// The state after it.
    pub after: Ref,
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
        let adds_state = states.insert(head.after);
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

/// What to do with an event whose state is not the current one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It becomes a head.
    Head,
    /// It becomes a head, and a local member who may send should merge the heads.
    HeadToMerge,
    /// It is kept off the heads and unseen until another accepted event cites it.
    TooFar,
}

/// What an event with this state after it may become, in a room with this current state and, with the event, this many
/// heads. Costs two seeks, whatever the answer.
pub fn standing(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    current: Ref,
    after: Ref,
    heads: usize,
) -> Result<Standing, Fault> {
    Ok(standing_at(state::distance(read, room, current, after)?, heads))
}

fn standing_at(distance: u64, heads: usize) -> Standing {
    if distance > HEAD_DISTANCE_MAX {
        Standing::TooFar
    } else if distance > HEAD_DISTANCE_WANTED || heads > HEADS_WANTED {
        Standing::HeadToMerge
    } else {
        Standing::Head
    }
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
        let after = Ref::Side(SideNum(state));
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
    fn far_states_are_merged_and_very_far_ones_kept_off() {
        assert_eq!(standing_at(0, 1), Standing::Head);
        assert_eq!(standing_at(1_000, 10), Standing::Head);
        assert_eq!(standing_at(1_001, 1), Standing::HeadToMerge);
        assert_eq!(standing_at(0, 11), Standing::HeadToMerge);
        assert_eq!(standing_at(20_000, 2), Standing::HeadToMerge);
        assert_eq!(standing_at(20_001, 2), Standing::TooFar);
    }

    #[test]
    fn the_distance_is_the_changes_between() {
        let bench = Bench::new();
        let orders: Vec<Order> =
            (0..1_200).map(|number| bench.step(&[(key(number % 7), event(number.into()))])).collect();
        let snapshot = bench.store.snapshot();
        let tip = state::tip(&*snapshot, bench.room).unwrap();
        let of = |order: Order| standing(&*snapshot, bench.room, tip, Ref::Main(order), 2).unwrap();
        assert_eq!(of(orders[1_199]), Standing::Head);
        assert_eq!(of(orders[199]), Standing::Head);
        assert_eq!(of(orders[198]), Standing::HeadToMerge);
        let side = bench.write(|batch| {
            let changes: Vec<_> = (0..1_001).map(|number| (key(100 + number), Val::Absent)).collect();
            let set: Vec<_> = changes.iter().map(|(key, _)| (*key, event(5))).collect();
            state::make_side(batch, bench.room, &mut 0, tip, &set).unwrap()
        });
        let snapshot = bench.store.snapshot();
        assert_eq!(standing(&*snapshot, bench.room, tip, side, 2).unwrap(), Standing::HeadToMerge);
    }
}
