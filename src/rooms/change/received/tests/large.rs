//! Events after which more of a room's state differs than a batch holds.

use super::*;
use crate::rooms::change::staged;

/// A public room that many users joined, and the event that had closed it before, on another branch.
fn raided() -> (House, Received) {
    let mut house = House::new();
    let old = house.heads();
    for number in 0..2 * staged::KEYS_MAX {
        let raider: OwnedUserId = format!("@raider{number}:c.example").try_into().unwrap();
        let (_, outcome) =
            house.state(&raider, "m.room.member", raider.as_str(), json!({ "membership": "join" }), None);
        assert!(accepted(&outcome), "{outcome:?}");
    }
    let close = Draft::state(alice(), "m.room.join_rules", "", content(json!({ "join_rule": "invite" })), 0);
    let close = house.build(&close, Some(&old));
    (house, close)
}

fn stages(house: &House) -> usize {
    state::stage::list_rooms(&*house.store.snapshot()).unwrap().len()
}

#[test]
fn an_event_that_turns_more_keys_than_a_batch_holds_is_accepted() {
    let (mut house, close) = raided();
    let (before, joined) = (house.current(), house.row().joined);
    let tip = house.row().state_tip;
    let (_, outcome) = house.receive(close);
    assert!(accepted(&outcome), "{outcome:?}");
    assert_eq!(house.value("m.room.join_rules", "")["join_rule"], "invite");
    assert_eq!((house.row().joined, joined as usize), (2, 2 + 2 * staged::KEYS_MAX));
    assert_eq!(stages(&house), 0);
    house.check_state();
    // The state before the large step is still readable.
    let snapshot = house.store.snapshot();
    let there = state::full(&*snapshot, ROOM, Ref::Main(tip)).unwrap().map(Result::unwrap);
    assert!(there.count() >= before.len());
    let servers = members::list_servers_at(&*snapshot, ROOM, Ref::Main(house.row().state_tip)).unwrap();
    assert_eq!(servers, ["a.example", "b.example"]);
    drop(snapshot);
    // The room goes on as before.
    assert!(accepted(&house.state(&bob(), "x", "", json!({ "n": 1 }), None).1));
    assert!(accepted(&house.say(&alice(), "merge", None).1));
    assert_eq!(house.heads().len(), 1);
    house.check_state();
}

#[test]
fn a_large_step_that_comes_to_nothing_is_never_seen_and_is_cleared() {
    let (mut house, close) = raided();
    let before = house.current();
    let rooms = house.rooms.clone();
    // The parts are written, and then the server ends before the last batch.
    let mut taken = None;
    for _ in 0..3 {
        let mut change = Change::begin(&house.store, house.rooms.sit(ROOM), ROOM).unwrap();
        match change.receive(&close, taken, rooms.resolver(), 0).unwrap() {
            Step::Done(_) => break,
            Step::Resolve(question, numbers) => {
                drop(change.enqueue(&house.store).unwrap());
                house.store.flush().unwrap();
                let loaded = resolve::Loaded::default();
                let snapshot = house.store.snapshot();
                rooms.resolver().work_out(&*snapshot, ROOM, VERSION, &question, &loaded).unwrap();
                taken = numbers;
            }
            Step::EndTurn(_) => panic!("nothing is pending before the first event of a turn"),
        }
    }
    house.store.flush().unwrap();
    assert_eq!(stages(&house), 1);
    assert_eq!(house.current(), before, "what is staged does not count");
    house.check_state();
    // The next change clears the parts and goes on from the state before them.
    assert!(accepted(&house.state(&alice(), "x", "", json!({ "n": 1 }), None).1));
    assert_eq!(stages(&house), 0);
    house.check_state();
    assert_eq!(house.row().joined as usize, 2 + 2 * staged::KEYS_MAX);
    let (_, outcome) = house.receive(close);
    assert!(accepted(&outcome), "{outcome:?}");
    assert_eq!(house.row().joined, 2);
    house.check_state();
}
