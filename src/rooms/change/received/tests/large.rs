//! Events after which more of a room's state differs than a batch holds.

use super::*;
use crate::rooms::change::staged;

/// A public room that many users joined, and the event that had closed it before, on another branch.
fn raided() -> (Fixture, Received) {
    let mut fixture = Fixture::new();
    let old = fixture.heads();
    for number in 0..2 * staged::KEYS_MAX {
        let raider: OwnedUserId = format!("@raider{number}:c.example").try_into().unwrap();
        let (_, outcome) =
            fixture.state(&raider, "m.room.member", raider.as_str(), json!({ "membership": "join" }), None);
        assert!(accepted(&outcome), "{outcome:?}");
    }
    let close = Draft::state(alice(), "m.room.join_rules", "", content(json!({ "join_rule": "invite" })), 0);
    let close = fixture.build(&close, Some(&old));
    (fixture, close)
}

fn stages(fixture: &Fixture) -> usize {
    state::stage::list_rooms(&*fixture.store.snapshot()).unwrap().len()
}

#[test]
fn an_event_that_turns_more_keys_than_a_batch_holds_is_accepted() {
    let (mut fixture, close) = raided();
    let (before, joined) = (fixture.current(), fixture.row().joined);
    let tip = fixture.row().state_tip;
    let (_, outcome) = fixture.receive(close);
    assert!(accepted(&outcome), "{outcome:?}");
    assert_eq!(fixture.value("m.room.join_rules", "")["join_rule"], "invite");
    assert_eq!((fixture.row().joined, joined as usize), (2, 2 + 2 * staged::KEYS_MAX));
    assert_eq!(stages(&fixture), 0);
    fixture.check_state();
    // The state before the large step is still readable.
    let snapshot = fixture.store.snapshot();
    let there = state::full(&*snapshot, ROOM, StateRef::Main(tip)).unwrap().map(Result::unwrap);
    assert!(there.count() >= before.len());
    let servers =
        members::list_servers_at(&*snapshot, ROOM, StateRef::Main(fixture.row().state_tip)).unwrap();
    assert_eq!(servers, ["a.example", "b.example"]);
    drop(snapshot);
    // The room goes on as before.
    assert!(accepted(&fixture.state(&bob(), "x", "", json!({ "n": 1 }), None).1));
    assert!(accepted(&fixture.say(&alice(), "merge", None).1));
    assert_eq!(fixture.heads().len(), 1);
    fixture.check_state();
}

#[test]
fn a_large_step_that_comes_to_nothing_is_never_seen_and_is_cleared() {
    let (mut fixture, close) = raided();
    let before = fixture.current();
    let rooms = fixture.rooms.clone();
    // The parts are written, and then the server ends before the last batch.
    let mut taken = None;
    for _ in 0..3 {
        let mut change = Change::begin(&fixture.store, fixture.rooms.sit(ROOM), ROOM).unwrap();
        match change.receive(&close, taken, rooms.resolver(), 0).unwrap() {
            Step::Done(_) => break,
            Step::Resolve(question, numbers) => {
                drop(change.enqueue(&fixture.store).unwrap());
                fixture.store.flush().unwrap();
                let loaded = resolve::Loaded::default();
                let snapshot = fixture.store.snapshot();
                rooms.resolver().work_out(&*snapshot, ROOM, VERSION, &question, &loaded).unwrap();
                taken = numbers;
            }
            Step::EndTurn(_) => panic!("nothing is pending before the first event of a turn"),
        }
    }
    fixture.store.flush().unwrap();
    assert_eq!(stages(&fixture), 1);
    assert_eq!(fixture.current(), before, "what is staged does not count");
    fixture.check_state();
    // The next change clears the parts and goes on from the state before them.
    assert!(accepted(&fixture.state(&alice(), "x", "", json!({ "n": 1 }), None).1));
    assert_eq!(stages(&fixture), 0);
    fixture.check_state();
    assert_eq!(fixture.row().joined as usize, 2 + 2 * staged::KEYS_MAX);
    let (_, outcome) = fixture.receive(close);
    assert!(accepted(&outcome), "{outcome:?}");
    assert_eq!(fixture.row().joined, 2);
    fixture.check_state();
}
