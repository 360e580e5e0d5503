//! The bounds within which counts are news, and within which judged events count.

use super::*;
use crate::{
    push::unread::tests::{BOB, ROOM, at, bob, message, put, put_receipt, room, store_with},
    rooms::receipts,
    schema::{accounts::WrittenRow, push::RedactedOutcome},
    store::Store,
};

const JOINED: u64 = 1;

fn is_news(store: &Store, tip: u64, from: u64, upto: u64) -> bool {
    let (push, bob) = (Push::new(Metrics::new()), bob());
    let (read, row) = (&*store.snapshot(), RoomRow { tip: at(tip), ..room() });
    let position = |number| Position::new(number).unwrap();
    let place = Place { num: ROOM, row: &row, joined: position(JOINED) };
    push.reader(read, BOB, &bob).unwrap().is_news(read, place, position(from), position(upto)).unwrap()
}

#[test]
fn counts_are_news_from_the_position_on_at_which_something_counts() {
    let store = store_with(|batch| put(batch, Lane::MAIN, 20, message()));
    for (from, upto, expected) in
        [(19, 20, true), (20, 20, false), (20, 21, false), (18, 19, false), (1, 20, true)]
    {
        assert_eq!(is_news(&store, 20, from, upto), expected, "{from} to {upto}");
    }
}

#[test]
fn counts_are_news_when_something_was_read_or_redacted_since() {
    let read = store_with(|batch| {
        put(batch, Lane::MAIN, 20, message());
        put_receipt(batch, receipts::MAIN_THREAD, 20, 40);
    });
    assert!(is_news(&read, 20, 39, 50) && !is_news(&read, 20, 40, 50));
    let redacted = store_with(|batch| {
        put(batch, Lane::MAIN, 20, message());
        let redacted_at = Position::new(40).unwrap();
        let row = RedactedOutcome { lane: Lane::MAIN, classes: message(), redacted_at };
        schema::UNREAD_REDACTED.put(batch, (ROOM, at(20)), &row);
    });
    assert!(is_news(&redacted, 20, 39, 50) && !is_news(&redacted, 20, 40, 50));
    assert!(!is_news(&redacted, 20, 19, 50), "a client that was told before the event knows of no count");
}

#[test]
fn counts_are_news_when_rules_changed_since_and_something_is_unread() {
    let store = store_with(|batch| {
        let content = serde_json::to_vec(&defaults::default_rules(&bob())).unwrap().into();
        schema::PUSH_RULES.put(batch, BOB, &WrittenRow { position: Position::new(40).unwrap(), content });
        put_receipt(batch, receipts::NO_THREAD, 20, 5);
    });
    assert!(is_news(&store, 21, 39, 50), "the tip is above what was read");
    assert!(!is_news(&store, 20, 39, 50), "everything was read");
    assert!(!is_news(&store, 21, 40, 50));
}

#[test]
fn judged_events_count_within_all_their_bounds() {
    let store = store_with(|batch| put_receipt(batch, receipts::MAIN_THREAD, 15, 5));
    let (row, bob, read) = (room(), bob(), &*store.snapshot());
    let outcome = message().default;
    let count = |base: u64, from: u64, upto: u64| {
        let event = |place| Notified { order: at(place), lane: Lane::MAIN, outcome, unsubscribed: outcome };
        let events = (10..=30).rev().map(event).collect();
        let judged = Judged { version: Default::default(), from: at(from), upto: at(30), events };
        let mut floors = Floors::new(read, (ROOM, &row), (BOB, &bob), at(base)).unwrap();
        let mut sums = Sums::default();
        let lanes = &mut Lanes::of(Class::Default);
        add_judged(&mut sums, read, &judged, (&mut floors, lanes), at(upto)).unwrap();
        sums.tally().main.notifications
    };
    // The receipt is for 15, so that the first one that counts is 16.
    assert_eq!([count(9, 9, 30), count(20, 9, 30), count(9, 20, 30), count(9, 9, 20)], [15, 10, 10, 5]);
    assert_eq!([count(9, 9, 16), count(9, 9, 15), count(29, 9, 30), count(30, 9, 30)], [1, 0, 1, 0]);
    assert_eq!([count(9, 29, 30), count(9, 30, 30)], [1, 0]);
}
