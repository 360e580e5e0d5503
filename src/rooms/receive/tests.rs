//! A room that forks: events with chosen places in the graph, as other servers would send them.

use std::sync::Arc;

use ruma::{CanonicalJsonObject, OwnedEventId, OwnedUserId, RoomId};
use serde_json::json;

use super::*;
use crate::{
    rooms::{
        Rooms,
        build::{Draft, Setting},
        commit::Change,
        members, state, versions,
    },
    store::{
        Durability, Engine, Store,
        engine::Memory,
        schema::rooms::{Resident, RoomRow},
    },
};

const ROOM: crate::ids::RoomNum = crate::ids::RoomNum(1);
const VERSION: u8 = 11;

struct House {
    store: Store,
    rooms: Rooms,
    time_ms: u64,
}

fn alice() -> OwnedUserId {
    "@alice:a.example".try_into().unwrap()
}

fn bob() -> OwnedUserId {
    "@bob:b.example".try_into().unwrap()
}

fn content(json: serde_json::Value) -> CanonicalJsonObject {
    serde_json::from_value(json).unwrap()
}

impl House {
    /// A room of Alice's, public, with Bob in it.
    fn new() -> Self {
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Os).unwrap();
        let key = crate::rooms::build::tests::a_key();
        let rooms = Rooms::open(&*store.snapshot(), "a.example".try_into().unwrap(), key).unwrap();
        let mut house = Self { store, rooms, time_ms: 1_000 };
        let row = RoomRow {
            id: RoomId::parse("!room:a.example").unwrap(),
            version: VERSION,
            resident: Resident::Yes,
            tip: Order::MIN,
            state_tip: Order::MIN,
            next_event: 0,
            next_key: 0,
            next_side: 0,
            heads: Vec::new(),
            joined: 0,
            invited: 0,
        };
        let seat = house.rooms.seat(ROOM).try_lock_owned().unwrap();
        let mut change = Change::begin_room(&house.store, seat, ROOM, row).unwrap();
        for (kind, key, json) in [
            ("m.room.create", "", json!({ "room_version": "11" })),
            ("m.room.member", "@alice:a.example", json!({ "membership": "join" })),
            (
                "m.room.power_levels",
                "",
                json!({ "users": { "@alice:a.example": 100 }, "events": { "x": 0 } }),
            ),
            ("m.room.join_rules", "", json!({ "join_rule": "public" })),
        ] {
            let draft = Draft::state(alice(), kind, key, content(json), house.time_ms);
            change.add(house.rooms.signer(), &draft, None).unwrap();
        }
        drop(change.enqueue(&house.store).unwrap());
        house.store.flush().unwrap();
        house.state(&bob(), "m.room.member", "@bob:b.example", json!({ "membership": "join" }), None);
        house
    }

    fn change<T>(&mut self, work: impl FnOnce(&mut Change) -> T) -> T {
        let seat = self.rooms.seat(ROOM).try_lock_owned().unwrap();
        let mut change = Change::begin(&self.store, seat, ROOM).unwrap();
        let answer = work(&mut change);
        drop(change.enqueue(&self.store).unwrap());
        self.store.flush().unwrap();
        answer
    }

    fn row(&self) -> RoomRow {
        crate::rooms::require_row(&*self.store.snapshot(), ROOM).unwrap()
    }

    fn heads(&self) -> Vec<OwnedEventId> {
        self.row().heads.iter().map(|head| event::event_id(&head.hash, VERSION)).collect()
    }

    /// The event on these prevs (on the heads, if none), with auth events from the state before the first of them.
    fn build(&mut self, draft: &Draft, prev: Option<&[OwnedEventId]>) -> Received {
        self.time_ms += 1;
        let draft = Draft { sent_ms: self.time_ms, ..draft.clone() };
        let prev = prev.map_or_else(|| self.heads(), <[_]>::to_vec);
        let rules = versions::find_rules(VERSION).unwrap();
        let seat = self.rooms.seat(ROOM).try_lock_owned().unwrap();
        let change = Change::begin(&self.store, seat, ROOM).unwrap();
        let first = event::find_num(&change.batch, ROOM, &prev[0]).unwrap().unwrap();
        let at = change.state_after(first).unwrap();
        let depth = event::require(&change.batch, ROOM, first).unwrap().row.header.depth + 1;
        let kind = draft.kind.as_str().into();
        let raw = draft.raw_content().unwrap();
        let needed =
            admit::needed_keys(&kind, &draft.sender, draft.state_key.as_deref(), &raw, &rules.authorization)
                .unwrap();
        let mut auth = Vec::new();
        for (kind, key) in needed {
            let key = state::find_key(&change.batch, ROOM, &kind.to_string(), &key).unwrap();
            let num = key.and_then(|key| state::at(&change.batch, ROOM, at, key).unwrap().event());
            auth.extend(num.map(|num| event::require(&change.batch, ROOM, num).unwrap().id(&change.row)));
        }
        let room_id = change.row.id.clone();
        let setting = Setting { room_id: Some(&room_id), rules, prev: &prev, auth: &auth, depth };
        let built = crate::rooms::build::build(self.rooms.signer(), &draft, &setting, VERSION).unwrap();
        Received { hash: built.hash, json: built.json, event: built.event, depth }
    }

    fn receive(&mut self, received: Received) -> (OwnedEventId, Outcome) {
        let (id, now_ms) = (received.event.id.clone(), self.time_ms);
        (id, self.change(|change| change.receive(received, now_ms).unwrap()))
    }

    fn state(
        &mut self,
        sender: &OwnedUserId,
        kind: &str,
        key: &str,
        json: serde_json::Value,
        prev: Option<&[OwnedEventId]>,
    ) -> (OwnedEventId, Outcome) {
        let draft = Draft::state(sender.clone(), kind, key, content(json), 0);
        let received = self.build(&draft, prev);
        self.receive(received)
    }

    fn say(
        &mut self,
        sender: &OwnedUserId,
        text: &str,
        prev: Option<&[OwnedEventId]>,
    ) -> (OwnedEventId, Outcome) {
        let draft = Draft {
            state_key: None,
            ..Draft::state(sender.clone(), "m.room.message", "", content(json!({ "body": text })), 0)
        };
        let received = self.build(&draft, prev);
        self.receive(received)
    }

    /// The current state by its names.
    fn current(&self) -> BTreeMap<(String, String), OwnedEventId> {
        let snapshot = self.store.snapshot();
        let room = self.row();
        state::list_current(&*snapshot, ROOM)
            .unwrap()
            .map(|row| {
                let (key, event) = row.unwrap();
                let name = state::key_name(&*snapshot, ROOM, key).unwrap().unwrap();
                (name, event::require(&*snapshot, ROOM, event).unwrap().id(&room))
            })
            .collect()
    }

    fn value(&self, kind: &str, key: &str) -> serde_json::Value {
        let stored = crate::rooms::find_state(&*self.store.snapshot(), ROOM, kind, key).unwrap();
        stored.map_or(serde_json::Value::Null, |stored| serde_json::from_str(stored.row.content()).unwrap())
    }
}

fn accepted(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Accepted(_))
}

#[test]
fn a_line_of_received_events_needs_no_side_state() {
    let mut house = House::new();
    let (first, outcome) = house.state(&bob(), "x", "", json!({ "n": 1 }), None);
    assert!(accepted(&outcome), "{outcome:?}");
    let (second, outcome) = house.say(&bob(), "hello", None);
    assert!(accepted(&outcome), "{outcome:?}");
    assert_eq!(house.heads(), std::slice::from_ref(&second));
    assert_eq!(house.row().next_side, 0);
    assert_eq!(house.current()[&("x".to_owned(), String::new())], first);
    let again = house.build(&Draft::state(bob(), "x", "", content(json!({ "n": 2 })), 0), None);
    assert!(accepted(&house.receive(again.clone()).1));
    assert!(matches!(house.receive(again).1, Outcome::Known(_)));
}

#[test]
fn a_fork_is_resolved_the_same_in_whatever_order_it_comes() {
    let mut house = House::new();
    let base = house.heads();
    let mut branch = Vec::new();
    // Alice bans Bob on one side, who meanwhile sets things on the other.
    let ban =
        Draft::state(alice(), "m.room.member", "@bob:b.example", content(json!({ "membership": "ban" })), 0);
    let ban = house.build(&ban, Some(&base));
    let x = house.build(&Draft::state(bob(), "x", "", content(json!({ "n": 1 })), 0), Some(&base));
    let name = house
        .build(&Draft::state(alice(), "m.room.name", "", content(json!({ "name": "n" })), 0), Some(&base));
    branch.extend([ban, x, name]);
    let mut results = Vec::new();
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let mut house = House::new();
        let mut outcomes = Vec::new();
        for index in order {
            outcomes.push(house.receive(branch[index].clone()).1);
        }
        let merged = house.say(&alice(), "merge", None);
        assert!(accepted(&merged.1), "{order:?}: {outcomes:?} {:?}", merged.1);
        assert_eq!(house.heads().len(), 1, "a message on all heads merges them");
        let current = house.current();
        assert_eq!(house.value("m.room.member", "@bob:b.example")["membership"], "ban", "{order:?}");
        results.push(current[&("m.room.name".to_owned(), String::new())].clone());
        assert_eq!(house.row().joined, 1, "{order:?}");
    }
    results.dedup();
    assert_eq!(results.len(), 1);
}

#[test]
fn what_the_rules_forbid_is_kept_aside_with_its_why() {
    let mut house = House::new();
    let heads = house.heads();
    let (id, outcome) = house.state(&bob(), "m.room.name", "", json!({ "name": "mine" }), None);
    let Outcome::Aside(num, why) = outcome else { panic!("{outcome:?}") };
    assert!(why.contains("power"), "{why}");
    assert_eq!(house.heads(), heads);
    assert_eq!(house.value("m.room.name", ""), serde_json::Value::Null);
    let snapshot = house.store.snapshot();
    assert!(schema::ASIDE.get(&*snapshot, (ROOM, num)).unwrap().unwrap().rejected);
    assert!(event::find_by_id(&*snapshot, ROOM, &id).unwrap().is_none(), "clients do not see it");
    drop(snapshot);
    // It may be cited all the same, and changes nothing.
    let (_, outcome) = house.say(&bob(), "after", Some(&[id]));
    assert!(accepted(&outcome), "{outcome:?}");
    assert_eq!(house.value("m.room.name", ""), serde_json::Value::Null);
}

#[test]
fn who_is_banned_now_cannot_speak_from_before() {
    let mut house = House::new();
    let before = house.heads();
    let (_, outcome) =
        house.state(&alice(), "m.room.member", "@bob:b.example", json!({ "membership": "ban" }), None);
    assert!(accepted(&outcome), "{outcome:?}");
    let (_, outcome) = house.say(&bob(), "late", Some(&before));
    let Outcome::Aside(num, _) = outcome else { panic!("{outcome:?}") };
    let aside = schema::ASIDE.get(&*house.store.snapshot(), (ROOM, num)).unwrap().unwrap();
    assert!(!aside.rejected, "soft-failed, not rejected: {}", aside.why);
    assert_eq!(house.row().joined, 1);
}

#[test]
fn what_is_missing_is_named_and_nothing_is_stored() {
    let mut house = House::new();
    let mut received = house.build(&Draft::state(bob(), "x", "", content(json!({})), 0), None);
    let (auth, prev) = (event::event_id(&[1; 32], VERSION), event::event_id(&[2; 32], VERSION));
    received.event.auth.push(auth.clone());
    received.event.prev.push(prev.clone());
    let next = house.row().next_event;
    let seat = house.rooms.seat(ROOM).try_lock_owned().unwrap();
    let mut change = Change::begin(&house.store, seat, ROOM).unwrap();
    match change.receive(received, 0).unwrap() {
        Outcome::Need { auth: needed, prev: cited } => assert_eq!((needed, cited), (vec![auth], vec![prev])),
        other => panic!("{other:?}"),
    }
    assert_eq!(change.batch.row_count(), 0);
    assert_eq!(change.row.next_event, next);
}

#[test]
fn many_events_on_old_places_leave_twenty_heads_and_the_state_as_it_is() {
    let mut house = House::new();
    let mut places = vec![house.heads()[0].clone()];
    for number in 0..50 {
        let (id, outcome) = house.state(&bob(), "x", &number.to_string(), json!({ "n": number }), None);
        assert!(accepted(&outcome), "{outcome:?}");
        places.push(id);
    }
    let before = house.current();
    for number in 0..200 {
        let place = places[number % places.len()].clone();
        let (_, outcome) = house.say(&bob(), &number.to_string(), Some(&[place]));
        assert!(accepted(&outcome), "{outcome:?}");
        assert!(house.heads().len() <= graph::HEADS_MAX);
    }
    assert_eq!(house.current(), before, "messages change no state");
    // Whoever of this server speaks next cites all of them, and the room is one again.
    let now = house.time_ms;
    let signer = house.rooms.signer().clone();
    house.change(|change| {
        let draft =
            Draft { state_key: None, ..Draft::state(alice(), "m.room.message", "", content(json!({})), now) };
        change.add(&signer, &draft, None).unwrap();
    });
    assert_eq!(house.heads().len(), 1);
    assert!(members::list_current(&*house.store.snapshot(), ROOM).unwrap().len() == 2);
}

#[test]
fn a_message_far_back_changes_nothing_and_keeps_its_own_state() {
    let mut house = House::new();
    let old = house.heads();
    for number in 0..300 {
        house.state(&bob(), "x", &number.to_string(), json!({ "n": number }), None);
    }
    let before = house.current();
    let (id, outcome) = house.say(&bob(), "from long ago", Some(&old));
    assert!(accepted(&outcome), "{outcome:?}");
    assert_eq!(house.current(), before);
    let snapshot = house.store.snapshot();
    let stored = event::find_by_id(&*snapshot, ROOM, &id).unwrap().unwrap();
    let at = stored.row.header.before.unwrap();
    let key = state::find_key(&*snapshot, ROOM, "x", "0").unwrap().unwrap();
    assert_eq!(state::at(&*snapshot, ROOM, at, key).unwrap(), Val::Absent);
}

#[test]
fn two_settings_of_one_key_leave_one_and_the_loser_comes_back_never() {
    let mut house = House::new();
    let base = house.heads();
    let (first, _) = house.state(&bob(), "x", "", json!({ "n": 1 }), Some(&base));
    let (second, outcome) = house.state(&alice(), "x", "", json!({ "n": 2 }), Some(&base));
    assert!(accepted(&outcome), "{outcome:?}");
    let winner = house.current()[&("x".to_owned(), String::new())].clone();
    assert!(winner == first || winner == second);
    let parsed: Arc<StateEvent> = house.change(|change| change.state("x", "").unwrap().unwrap());
    assert_eq!(parsed.parsed.id, winner, "what writers remember is what is stored");
    house.say(&alice(), "merge", None);
    assert_eq!(house.current()[&("x".to_owned(), String::new())], winner);
    assert_eq!(house.heads().len(), 1);
}
