//! Events after which more of a room's state differs than a batch holds.

use parking_lot::Mutex;

use super::*;
use crate::{
    accounts::users::{self, NewUser},
    ids::UserNum,
    rooms::change::staged,
    schema::rooms::UserRoomRow,
    store::{Guard, check},
};

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
                rooms
                    .resolver()
                    .work_out(&*snapshot, ROOM, VERSION, &question, &loaded, resolve::EVENTS_MAX)
                    .unwrap();
                taken = numbers;
            }
            Step::EndTurn(_) | Step::Unsigned(..) => {
                panic!("nothing is pending before the first event of a turn")
            }
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

impl Fixture {
    /// Keeps the engine as a crash would leave it after each batch while a step of the room is unfinished.
    fn keep_crashes(&self) -> Arc<Mutex<Vec<Memory>>> {
        let kept = Arc::new(Mutex::new(Vec::new()));
        let keeps = Arc::clone(&kept);
        self.store.watch(move |store| {
            store.flush().unwrap();
            let is_open = state::stage::find(&*store.snapshot(), ROOM).unwrap().is_some();
            if let (true, Engine::Memory(memory)) = (is_open, store.engine()) {
                keeps.lock().push(memory.after_crash(usize::MAX));
            }
        });
        kept
    }

    fn faults(&self) -> Vec<String> {
        let tables: Vec<_> = schema::all().collect();
        check::check(&self.store, &tables, &crate::rooms::check::checks, &mut |_| ()).unwrap().findings
    }

    /// Everything that readers find of the room beside its events.
    fn seen(&self) -> Seen {
        let snapshot = self.store.snapshot();
        let users = members::list_local_users(&*snapshot, ROOM).unwrap();
        let rows = (0..1_000).map(UserNum);
        let rows = rows.filter_map(|user| Some((user, members::find(&*snapshot, user, ROOM).unwrap()?)));
        let now = StateRef::Main(crate::ids::Order::MAX);
        Seen {
            state: self.current(),
            users,
            rows: rows.collect(),
            servers: members::list_servers_at(&*snapshot, ROOM, now).unwrap(),
            joined: (self.row().joined, members::count_joined_at(&*snapshot, ROOM, now).unwrap()),
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
struct Seen {
    state: BTreeMap<(String, String), OwnedEventId>,
    users: Vec<UserNum>,
    rows: Vec<(UserNum, UserRoomRow)>,
    servers: Vec<String>,
    joined: (u32, u64),
}

/// Like [`raided`], but half of the raiders are users of ours, and each of the others has a server of its own.
fn raided_by_our_own() -> (Fixture, Received) {
    let mut fixture = Fixture::new();
    let old = fixture.heads();
    for number in 0..2 * staged::KEYS_MAX as u64 {
        let server = if number % 2 == 0 { "a".to_owned() } else { format!("s{number}") };
        let raider: OwnedUserId = format!("@raider{number}:{server}.example").try_into().unwrap();
        if number % 2 == 0 {
            let mut batch = fixture.store.batch(&Guard::alone());
            let new = NewUser { user_id: raider.clone(), is_admin: false, is_guest: false, now_ms: 1 };
            users::create(&mut batch, UserNum(number + 1), &new);
            drop(fixture.store.enqueue(batch).unwrap());
        }
        let join = json!({ "membership": "join" });
        let (_, outcome) = fixture.state(&raider, "m.room.member", raider.as_str(), join, None);
        assert!(accepted(&outcome), "{outcome:?}");
    }
    let close = Draft::state(alice(), "m.room.join_rules", "", content(json!({ "join_rule": "invite" })), 0);
    let close = fixture.build(&close, Some(&old));
    (fixture, close)
}

#[test]
fn a_large_step_is_gone_or_whole_after_whichever_part_the_server_ends() {
    let (mut fixture, close) = raided_by_our_own();
    assert_eq!(fixture.faults(), [""; 0]);
    let before = fixture.seen();
    assert_eq!(before.users.len(), staged::KEYS_MAX, "our own raiders");
    let crashes = fixture.keep_crashes();
    assert!(accepted(&fixture.receive(close.clone()).1));
    fixture.store.watch(|_| ());
    let after = fixture.seen();
    assert!(after.users.is_empty() && after.rows.len() == before.rows.len(), "{after:?}");
    assert_eq!((after.joined, after.servers.len()), ((2, 2), 2));
    assert_eq!(fixture.faults(), [""; 0]);
    let crashes = std::mem::take(&mut *crashes.lock());
    assert!(crashes.len() > 12, "keys and counts are written in {} parts", crashes.len());
    for (number, crash) in crashes.into_iter().enumerate() {
        let mut fixture = Fixture::over(crash, fixture.time_ms);
        assert_eq!(fixture.seen(), before, "a part is seen after {number}");
        assert_eq!(fixture.faults(), [""; 0], "after part {number}");
        // The step is taken back in parts, too, and the server may end after each of them.
        let taken_back = fixture.keep_crashes();
        assert!(accepted(&fixture.state(&alice(), "x", "", json!({ "n": 1 }), None).1));
        fixture.store.watch(|_| ());
        assert_eq!((stages(&fixture), fixture.seen().rows), (0, before.rows.clone()));
        assert_eq!(fixture.faults(), [""; 0], "taken back after part {number}");
        fixture.check_state();
        for crash in std::mem::take(&mut *taken_back.lock()) {
            let fixture = Fixture::over(crash, fixture.time_ms);
            assert_eq!(fixture.seen(), before, "half taken back after {number}");
            assert_eq!(fixture.faults(), [""; 0], "half taken back after {number}");
        }
        // The event comes again, and the room is as if nothing had happened.
        assert!(accepted(&fixture.receive(close.clone()).1));
        let seen = fixture.seen();
        assert_eq!(
            (seen.users, seen.servers, seen.joined),
            (after.users.clone(), after.servers.clone(), (2, 2))
        );
        assert_eq!(fixture.faults(), [""; 0]);
        fixture.check_state();
    }
}

#[test]
fn the_state_that_a_join_brings_is_laid_down_in_parts_and_counts_at_once() {
    // The state that is brought: of the first raid, some are gone, and others have come.
    let (mut fixture, _) = raided_by_our_own();
    let snapshot = fixture.store.snapshot();
    let old: BTreeMap<_, _> =
        state::list_current(&*snapshot, ROOM).unwrap().map(|row| row.unwrap()).collect();
    let is_kept = |key: crate::ids::StateKeyNum| {
        let name = state::key_name(&*snapshot, ROOM, key).unwrap().unwrap().1;
        !name.starts_with("@raider") || name.ends_with('4') || name.starts_with("@raider1")
    };
    let brought: BTreeMap<_, _> =
        old.iter().map(|(key, event)| (*key, *event)).filter(|(key, _)| is_kept(*key)).collect();
    assert!(old.len() - brought.len() > 2 * state::stage::PART_KEYS_MAX);
    let tip = fixture.row().state_tip;
    let before = fixture.seen();
    let crashes = fixture.keep_crashes();
    let rooms = fixture.rooms.clone();
    fixture.change(|change| {
        change.lay_base(&brought, &std::collections::BTreeSet::new(), vec!["$missing".to_owned()]).unwrap();
        let draft = Draft::state(alice(), "x", "", content(json!({ "n": 1 })), 1);
        change.add(rooms.signer(), &draft, None).unwrap();
    });
    fixture.store.watch(|_| ());
    let after = fixture.seen();
    let now: BTreeMap<_, _> =
        state::list_current(&*fixture.store.snapshot(), ROOM).unwrap().map(|row| row.unwrap()).collect();
    assert_eq!(now.len(), brought.len() + 1, "the state is the one that was brought, and the event after it");
    assert!(brought.iter().all(|(key, event)| now.get(key) == Some(event)));
    assert!(after.users.len() < before.users.len() && after.joined.0 < before.joined.0);
    assert_eq!(u64::from(after.joined.0), after.joined.1);
    let there: BTreeMap<_, _> = state::full(&*fixture.store.snapshot(), ROOM, StateRef::Main(tip))
        .unwrap()
        .map(|row| row.unwrap())
        .collect();
    assert_eq!(there, old, "what we had of the room before stays readable");
    let crashes = std::mem::take(&mut *crashes.lock());
    assert!(crashes.len() > 4, "{} parts", crashes.len());
    for crash in crashes {
        let mut fixture = Fixture::over(crash, fixture.time_ms);
        assert_eq!(fixture.seen(), before, "a part of a base is seen");
        assert_eq!(fixture.faults(), [""; 0]);
        assert!(accepted(&fixture.state(&alice(), "x", "", json!({ "n": 1 }), None).1));
        assert_eq!(fixture.seen().rows, before.rows);
        assert_eq!(fixture.faults(), [""; 0]);
    }
}
