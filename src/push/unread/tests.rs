//! The bounds of what counts: each event counts above the place up to which a user has read, and up to the end of the look.

use ruma::{OwnedUserId, RoomId};

use super::*;
use crate::{
    rooms::receipts,
    schema::{
        push::Sound,
        receipts::{ReceiptKind, ReceiptRow},
        rooms::{Resident, RoomRow},
    },
    store::{Durability, Engine, Guard, Snapshot, Store, engine::Memory},
};

pub(in crate::push) const ROOM: RoomNum = RoomNum(1);
pub(in crate::push) const BOB: UserNum = UserNum(2);
/// Where events stand, and between which the tests look.
const EVENTS: [u64; 3] = [10, 20, 30];
const PLACES: std::ops::RangeInclusive<u64> = 9..=31;

pub(in crate::push) fn bob() -> OwnedUserId {
    "@bob:a.example".try_into().unwrap()
}

pub(in crate::push) fn at(position: u64) -> Order {
    Order::live(Position::new(position).unwrap())
}

pub(in crate::push) fn room() -> RoomRow {
    let id = RoomId::parse("!room:a.example").unwrap();
    RoomRow { tip: at(31), ..RoomRow::new(id, 11, Resident::Yes) }
}

fn outcome(notify: bool, highlight: bool) -> Outcome {
    Outcome { notify, highlight, sound: Sound::None }
}

/// A message notifies those with the default rules, and nobody who hears of mentions only.
pub(in crate::push) fn message() -> Outcomes {
    let default = outcome(true, false);
    Outcomes { default, mentions: Outcome::default(), subscribed: default }
}

/// A call highlights for both classes.
fn call() -> Outcomes {
    let loud = outcome(true, true);
    Outcomes { default: loud, mentions: loud, subscribed: loud }
}

/// Counts an event after all that were counted before it.
pub(in crate::push) fn put(batch: &mut Batch, lane: Lane, position: u64, outcomes: Outcomes) {
    let before = totals(batch, ROOM, lane, at(position)).unwrap();
    put_totals(batch, ROOM, lane, at(position), before.plus(outcomes)).unwrap();
}

/// Stores a receipt for this place, at a position far above.
pub(in crate::push) fn put_receipt(batch: &mut Batch, thread: &str, upto: u64, stored: u64) {
    let row = ReceiptRow {
        position: Position::new(stored).unwrap(),
        order: at(upto),
        sent_ms: 1,
        event_id: "$event".try_into().unwrap(),
    };
    schema::RECEIPTS.put(batch, (ROOM, bob().as_str(), ReceiptKind::Private, thread), &row);
}

pub(in crate::push) fn store_with(write: impl FnOnce(&mut Batch)) -> Store {
    let store = Store::open(Engine::Memory(Memory::default()), Durability::Os).unwrap();
    let mut batch = store.batch(&Guard::alone());
    write(&mut batch);
    drop(store.enqueue(batch).unwrap());
    store.flush().unwrap();
    store
}

fn count(read: &Snapshot, class: Class, joined: u64, upto: u64) -> Tally {
    let (row, bob) = (room(), bob());
    let mut floors = Floors::new(read, (ROOM, &row), (BOB, &bob), at(joined)).unwrap();
    let mut sums = Sums::default();
    add_of_class(&mut sums, read, &mut Lanes::of(class), &mut floors, at(upto)).unwrap();
    sums.tally()
}

fn numbers(tally: &Tally) -> (u64, u64) {
    assert!(tally.threads.is_empty(), "{tally:?}");
    (tally.main.notifications, tally.main.highlights)
}

/// The number of events above a place and up to another.
fn between(floor: u64, upto: u64) -> u64 {
    EVENTS.into_iter().filter(|event| floor < *event && *event <= upto).count() as u64
}

/// Writes down that everything is read up to this place.
type ReadUpto = fn(&mut Batch, u64);

fn put_messages(batch: &mut Batch) {
    EVENTS.into_iter().for_each(|event| put(batch, Lane::MAIN, event, message()));
}

#[test]
fn events_count_above_the_place_that_was_read_and_up_to_the_end() {
    for floor in PLACES {
        let ways: [(&str, ReadUpto); 4] = [
            ("joined there", |_, _| ()),
            ("a receipt for everything", |batch, floor| put_receipt(batch, receipts::NO_THREAD, floor, 90)),
            ("a receipt outside threads", |batch, floor| {
                put_receipt(batch, receipts::MAIN_THREAD, floor, 90)
            }),
            ("sent there", |batch, floor| {
                schema::UNREAD_SENT.put(batch, (ROOM, BOB, Lane::MAIN), &at(floor));
            }),
        ];
        for (way, read_upto) in ways {
            let store = store_with(|batch| {
                put_messages(batch);
                read_upto(batch, floor);
            });
            let joined = if way == "joined there" { floor } else { 1 };
            for upto in PLACES {
                let expected = between(floor, upto);
                let read = &store.snapshot();
                let found = count(read, Class::Default, joined, upto);
                assert_eq!(
                    numbers(&found),
                    (expected, 0),
                    "{way}, read up to {floor}, looked at up to {upto}"
                );
                assert_eq!(numbers(&count(read, Class::Mentions, joined, upto)), (0, 0));
                assert_eq!(numbers(&count(read, Class::Muted, joined, upto)), (0, 0));
            }
        }
    }
}

#[test]
fn each_class_has_its_own_notifications_and_highlights() {
    let store = store_with(|batch| {
        put(batch, Lane::MAIN, 10, message());
        put(batch, Lane::MAIN, 20, call());
        put(batch, Lane::MAIN, 30, message());
    });
    let of = |class, floor, upto| numbers(&count(&store.snapshot(), class, floor, upto));
    assert_eq!(
        [of(Class::Default, 9, 30), of(Class::Default, 10, 20), of(Class::Default, 20, 30)],
        [(3, 1), (1, 1), (1, 0)]
    );
    assert_eq!(
        [of(Class::Mentions, 9, 30), of(Class::Mentions, 19, 20), of(Class::Mentions, 20, 30)],
        [(1, 1), (1, 1), (0, 0)]
    );
}

#[test]
fn what_was_redacted_is_taken_away_where_it_was_counted() {
    for redacted in EVENTS {
        let store = store_with(|batch| {
            EVENTS.into_iter().for_each(|event| put(batch, Lane::MAIN, event, call()));
            let redacted_at = Position::new(80).unwrap();
            let row = RedactedOutcome { lane: Lane::MAIN, classes: call(), redacted_at };
            schema::UNREAD_REDACTED.put(batch, (ROOM, at(redacted)), &row);
        });
        for floor in PLACES {
            for upto in PLACES {
                let gone = u64::from(floor < redacted && redacted <= upto);
                let expected = between(floor, upto) - gone;
                for class in [Class::Default, Class::Mentions] {
                    let found = numbers(&count(&store.snapshot(), class, floor, upto));
                    assert_eq!(found, (expected, expected), "{redacted} of {floor} to {upto}");
                }
            }
        }
    }
}

#[test]
fn an_event_that_concerns_a_user_counts_for_them_as_it_does_for_nobody_else() {
    let own = |own, classes| OwnOutcome { lane: Lane::MAIN, own, classes };
    for (mine, classes, is_redacted) in [
        (outcome(true, true), message(), false),
        (outcome(true, true), message(), true),
        (outcome(false, false), message(), false),
        (outcome(true, false), Outcomes::default(), false),
    ] {
        let store = store_with(|batch| {
            put(batch, Lane::MAIN, 10, message());
            put(batch, Lane::MAIN, 20, classes);
            put(batch, Lane::MAIN, 30, message());
            schema::UNREAD_OWN.put(batch, (ROOM, BOB, at(20)), &own(mine, classes));
            // An outcome for somebody else is none of Bob's counts.
            schema::UNREAD_OWN.put(batch, (ROOM, UserNum(3), at(20)), &own(outcome(true, true), classes));
            if is_redacted {
                let row = RedactedOutcome { lane: Lane::MAIN, classes, redacted_at: Position::ZERO };
                schema::UNREAD_REDACTED.put(batch, (ROOM, at(20)), &row);
            }
        });
        for (floor, upto) in [(9, 30), (19, 20), (20, 30), (9, 19), (19, 19), (20, 20), (10, 20)] {
            let is_in = |event: u64| u64::from(floor < event && event <= upto);
            let counts = |flag: bool| if is_redacted { 0 } else { is_in(20) * u64::from(flag) };
            let expected = (is_in(10) + is_in(30) + counts(mine.notify), counts(mine.highlight));
            let found = numbers(&count(&store.snapshot(), Class::Default, floor, upto));
            assert_eq!(found, expected, "{mine:?}, redacted: {is_redacted}, {floor} to {upto}");
        }
    }
}

#[test]
fn a_thread_whose_root_nobody_sees_counts_outside_threads_by_what_was_read_there() {
    let thread = Lane::thread(EventNum(77));
    let store = store_with(|batch| {
        EVENTS.into_iter().for_each(|event| put(batch, thread, event, message()));
        put(batch, Lane::MAIN, 15, call());
    });
    let of = |floor, upto| numbers(&count(&store.snapshot(), Class::Default, floor, upto));
    assert_eq!(
        [of(9, 30), of(10, 30), of(10, 20), of(15, 30), of(29, 30)],
        [(4, 1), (3, 1), (2, 1), (2, 0), (1, 0)]
    );
    // The log names a thread at its newest event alone, from which on it has no news.
    assert_eq!(lanes_with_news(&*store.snapshot(), ROOM, at(29)).unwrap(), [Lane::MAIN, thread].into());
    assert_eq!(lanes_with_news(&*store.snapshot(), ROOM, at(30)).unwrap(), [Lane::MAIN].into());
}

#[test]
fn the_threads_with_the_newest_events_are_counted_and_no_more_than_a_bound() {
    let store = store_with(|batch| {
        for thread in 0..THREADS_COUNTED as u64 + 1 {
            put(batch, Lane::thread(EventNum(thread)), 10 + thread, message());
        }
    });
    let upto = 10 + THREADS_COUNTED as u64;
    assert_eq!(numbers(&count(&store.snapshot(), Class::Default, 10, upto)).0, THREADS_COUNTED as u64);
    assert_eq!(numbers(&count(&store.snapshot(), Class::Default, 9, upto)).0, THREADS_COUNTED as u64);
    let lanes = lanes_with_news(&*store.snapshot(), ROOM, at(9)).unwrap();
    assert!(
        lanes.contains(&Lane::MAIN) && !lanes.contains(&Lane::thread(EventNum(0))),
        "the oldest is left out"
    );
}

#[test]
fn a_tally_adds_up_its_lanes_and_leaves_out_threads_without_news() {
    let (one, other) = (Lane::thread(EventNum(0)), Lane::thread(EventNum(9)));
    let mut sums = Sums::default();
    sums.add(Lane::MAIN, outcome(true, false));
    sums.add(Lane::MAIN, outcome(true, true));
    sums.add(one, outcome(true, true));
    sums.add(one, outcome(true, false));
    sums.add(one, outcome(false, false));
    sums.add(other, outcome(true, false));
    sums.add_numbers(other, -1, 0);
    let tally = sums.tally();
    assert_eq!(tally.main, Unread { notifications: 2, highlights: 1 });
    assert_eq!(tally.threads, [(EventNum(0), Unread { notifications: 2, highlights: 1 })].into());
    assert_eq!(tally.total(), Unread { notifications: 4, highlights: 2 });
    assert_eq!(Tally::default().total(), Unread::default());
}
