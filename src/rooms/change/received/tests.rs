//! A room that forks: events with chosen places in the graph, as other servers would send them.

#[cfg(test)]
mod aside;
mod chosen_ids;
#[cfg(test)]
mod far;
mod fetched;
mod large;
#[cfg(test)]
mod redactions;
#[cfg(test)]
mod sweep;
#[cfg(test)]
mod in_each_version;

use std::sync::Arc;

use proptest::prelude::*;
use ruma::{CanonicalJsonObject, OwnedEventId, OwnedUserId, RoomId};
use serde_json::json;

use super::*;
use crate::{
    env::Env,
    metrics::Metrics,
    rooms::{
        Rooms,
        build::{Draft, Setting},
        graph, members,
        resolve::{self, Resolver, StoredEvents},
        versions,
    },
    schema::{
        rooms::{Membership, RoomRow},
        state::StateValue,
    },
    store::{Batch, Durability, Engine, Guard, Store, engine::Memory},
};

const ROOM: crate::ids::RoomNum = crate::ids::RoomNum(1);
const VERSION: u8 = 11;

struct Fixture {
    store: Store,
    rooms: Rooms,
    time_ms: u64,
    /// Counts the resolutions that took longer than a turn may.
    worked_out: usize,
    metrics: Metrics,
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

impl Fixture {
    /// A store without any room.
    fn without_room() -> Self {
        Self::over(Memory::default(), 1_000)
    }

    /// Goes on from an engine as a crash left it.
    fn over(memory: Memory, time_ms: u64) -> Self {
        let store = Store::open(Engine::Memory(memory), Durability::Os).unwrap();
        let key = crate::rooms::build::tests::a_key();
        let metrics = Metrics::new();
        let resolver = Resolver::new(Env::simulated(1, 0), metrics.clone());
        let rooms = Rooms::open(&*store.snapshot(), "a.example".try_into().unwrap(), key, resolver).unwrap();
        Self { store, rooms, time_ms, worked_out: 0, metrics }
    }

    /// A public room of Alice's, with Bob in it.
    fn new() -> Self {
        let mut fixture = Self::without_room();
        let id = RoomId::parse("!room:a.example").unwrap();
        let seat = fixture.rooms.sit(ROOM);
        let mut change = Change::begin_room(&fixture.store, seat, ROOM, id, VERSION).unwrap();
        for (event_type, key, json) in [
            ("m.room.create", "", json!({ "room_version": "11" })),
            ("m.room.member", "@alice:a.example", json!({ "membership": "join" })),
            (
                "m.room.power_levels",
                "",
                json!({ "users": { "@alice:a.example": 100 }, "events": { "x": 0 } }),
            ),
            ("m.room.join_rules", "", json!({ "join_rule": "public" })),
        ] {
            let draft = Draft::state(alice(), event_type, key, content(json), fixture.time_ms);
            change.add(fixture.rooms.signer(), &draft, None).unwrap();
        }
        drop(change.enqueue(&fixture.store).unwrap());
        fixture.store.flush().unwrap();
        fixture.state(&bob(), "m.room.member", "@bob:b.example", json!({ "membership": "join" }), None);
        fixture
    }

    fn change<T>(&mut self, work: impl FnOnce(&mut Change) -> T) -> T {
        let seat = self.rooms.sit(ROOM);
        let mut change = Change::begin(&self.store, seat, ROOM).unwrap();
        let answer = work(&mut change);
        let answered = std::mem::take(&mut change.answered);
        let base = change.enqueue(&self.store).unwrap().base;
        self.rooms.resolver().keep(ROOM, answered, base);
        self.store.flush().unwrap();
        answer
    }

    fn row(&self) -> RoomRow {
        crate::rooms::require_row(&*self.store.snapshot(), ROOM).unwrap()
    }

    fn heads(&self) -> Vec<OwnedEventId> {
        let row = self.row();
        row.heads.iter().map(|head| event::event_id(&head.key, row.version)).collect()
    }

    /// Builds an event on these prevs (on the heads, if none), with auth events from the state before the first of
    /// them.
    fn build(&mut self, draft: &Draft, prev: Option<&[OwnedEventId]>) -> Received {
        self.time_ms += 1;
        let draft = Draft { sent_ms: self.time_ms, ..draft.clone() };
        let prev = prev.map_or_else(|| self.heads(), <[_]>::to_vec);
        let rules = versions::find_rules(VERSION).unwrap();
        let seat = self.rooms.sit(ROOM);
        let change = Change::begin(&self.store, seat, ROOM).unwrap();
        let first = event::find_num(&change.batch, ROOM, &prev[0]).unwrap().unwrap();
        let at = change.state_after(first).unwrap();
        let depth = event::require(&change.batch, ROOM, first).unwrap().row.header.depth + 1;
        let event_type = draft.event_type.as_str().into();
        let raw = draft.raw_content().unwrap();
        let needed = admit::needed_keys(
            &event_type,
            &draft.sender,
            draft.state_key.as_deref(),
            &raw,
            &rules.authorization,
        )
        .unwrap();
        let mut auth = Vec::new();
        for (event_type, key) in needed {
            let key = state::find_key(&change.batch, ROOM, &event_type.to_string(), &key).unwrap();
            let num = key.and_then(|key| state::at(&change.batch, ROOM, at, key).unwrap().event());
            auth.extend(num.map(|num| event::require(&change.batch, ROOM, num).unwrap().id(&change.row)));
        }
        let room_id = change.row.id.clone();
        let setting = Setting {
            room_id: Some(&room_id),
            rules,
            prev: &prev,
            auth: &auth,
            hashes: crate::rooms::reference::NO_HASHES,
            depth,
        };
        let built = crate::rooms::build::build(self.rooms.signer(), &draft, &setting, VERSION).unwrap();
        Received::check(ROOM, &change.row, built.hash, built.json).unwrap()
    }

    /// Gives an event with another value of a top-level field. Nothing looks at its hash here.
    fn rewritten(&self, received: &Received, field: &str, value: serde_json::Value) -> Received {
        let mut json: serde_json::Value = serde_json::from_slice(received.json()).unwrap();
        json[field] = value;
        Received::check(ROOM, &self.row(), received.hash(), json.to_string().into()).unwrap()
    }

    fn receive(&mut self, received: Received) -> (OwnedEventId, Outcome) {
        let (id, now_ms, rooms) = (received.id().to_owned(), self.time_ms, self.rooms.clone());
        let mut has_taken = None;
        for _ in 0..3 {
            let step =
                self.change(|change| change.receive(&received, has_taken, rooms.resolver(), now_ms).unwrap());
            match step {
                Step::Done(outcome) => return (id, outcome),
                Step::Resolve(question, taken) => {
                    let loaded = resolve::Loaded::default();
                    let snapshot = self.store.snapshot();
                    let version = self.row().version;
                    let (resolver, all) = (rooms.resolver(), resolve::EVENTS_MAX);
                    resolver.work_out(&*snapshot, ROOM, version, &question, &loaded, all).unwrap();
                    self.worked_out += 1;
                    has_taken = taken;
                }
                Step::EndTurn(_) | Step::Unsigned(..) => {
                    panic!("nothing is pending before the first event of a turn")
                }
            }
        }
        panic!("what was worked out is not found")
    }

    fn state(
        &mut self,
        sender: &OwnedUserId,
        event_type: &str,
        key: &str,
        json: serde_json::Value,
        prev: Option<&[OwnedEventId]>,
    ) -> (OwnedEventId, Outcome) {
        let draft = Draft::state(sender.clone(), event_type, key, content(json), 0);
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

    /// Checks that the room's state is what its heads resolve to, worked out anew from what is stored.
    fn check_state(&self) {
        let snapshot = self.store.snapshot();
        let version = self.row().version;
        let rules = versions::find_rules(version).unwrap();
        let states: Vec<Sketch> = self.row().heads.iter().map(|head| head.after.into()).collect();
        let source = StoredEvents::new(&*snapshot, ROOM, version);
        let bounds = resolve::Bounds::of(resolve::EVENTS_MAX);
        let resolved = resolve::resolve(&*snapshot, ROOM, rules, &states, &source, bounds);
        let tip = Sketch::from(state::tip(&*snapshot, ROOM).unwrap());
        let differing = tip.diff(&*snapshot, ROOM, &resolved.unwrap().state).unwrap();
        assert_eq!(differing, [], "heads {:?}", self.row().heads);
    }

    /// Gives the current state by the names of its keys.
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

    fn value(&self, event_type: &str, key: &str) -> serde_json::Value {
        let stored = crate::rooms::find_state(&*self.store.snapshot(), ROOM, event_type, key).unwrap();
        stored.map_or(serde_json::Value::Null, |stored| serde_json::from_str(stored.row.content()).unwrap())
    }
}

fn accepted(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Accepted(_))
}

#[test]
fn a_line_of_received_events_needs_no_side_state() {
    let mut fixture = Fixture::new();
    let (first, outcome) = fixture.state(&bob(), "x", "", json!({ "n": 1 }), None);
    assert!(accepted(&outcome), "{outcome:?}");
    let (second, outcome) = fixture.say(&bob(), "hello", None);
    assert!(accepted(&outcome), "{outcome:?}");
    assert_eq!(fixture.heads(), std::slice::from_ref(&second));
    assert_eq!(fixture.row().next_side, 0);
    assert_eq!(fixture.current()[&("x".to_owned(), String::new())], first);
    let again = fixture.build(&Draft::state(bob(), "x", "", content(json!({ "n": 2 })), 0), None);
    assert!(accepted(&fixture.receive(again.clone()).1));
    assert!(matches!(fixture.receive(again).1, Outcome::Known(_)));
}

#[test]
fn a_fork_is_resolved_the_same_in_whatever_order_it_comes() {
    let mut fixture = Fixture::new();
    let base = fixture.heads();
    let mut branch = Vec::new();
    // Alice bans Bob on one side, who meanwhile sets things on the other.
    let ban =
        Draft::state(alice(), "m.room.member", "@bob:b.example", content(json!({ "membership": "ban" })), 0);
    let ban = fixture.build(&ban, Some(&base));
    let x = fixture.build(&Draft::state(bob(), "x", "", content(json!({ "n": 1 })), 0), Some(&base));
    let name = fixture
        .build(&Draft::state(alice(), "m.room.name", "", content(json!({ "name": "n" })), 0), Some(&base));
    branch.extend([ban, x, name]);
    let mut results = Vec::new();
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let mut fixture = Fixture::new();
        let mut outcomes = Vec::new();
        for index in order {
            outcomes.push(fixture.receive(branch[index].clone()).1);
        }
        let merged = fixture.say(&alice(), "merge", None);
        assert!(accepted(&merged.1), "{order:?}: {outcomes:?} {:?}", merged.1);
        assert_eq!(fixture.heads().len(), 1, "a message on all heads merges them");
        let current = fixture.current();
        assert_eq!(fixture.value("m.room.member", "@bob:b.example")["membership"], "ban", "{order:?}");
        results.push(current[&("m.room.name".to_owned(), String::new())].clone());
        assert_eq!(fixture.row().joined, 1, "{order:?}");
    }
    results.dedup();
    assert_eq!(results.len(), 1);
}

#[test]
fn what_the_rules_forbid_is_kept_aside_with_its_why() {
    let mut fixture = Fixture::new();
    let heads = fixture.heads();
    let (id, outcome) = fixture.state(&bob(), "m.room.name", "", json!({ "name": "mine" }), None);
    let Outcome::Aside(num, why) = outcome else { panic!("{outcome:?}") };
    assert!(why.contains("power"), "{why}");
    assert_eq!(fixture.heads(), heads);
    assert_eq!(fixture.value("m.room.name", ""), serde_json::Value::Null);
    let snapshot = fixture.store.snapshot();
    assert!(schema::ASIDE.get(&*snapshot, (ROOM, num)).unwrap().unwrap().rejected);
    assert!(event::find_by_id(&*snapshot, ROOM, &id).unwrap().is_none(), "clients do not see it");
    drop(snapshot);
    // Another event may cite it all the same, and the name stays unset.
    let (_, outcome) = fixture.say(&bob(), "after", Some(&[id]));
    assert!(accepted(&outcome), "{outcome:?}");
    assert_eq!(fixture.value("m.room.name", ""), serde_json::Value::Null);
}

#[test]
fn what_stands_on_an_aside_event_replaces_the_heads_below_it() {
    let mut fixture = Fixture::new();
    let base = fixture.heads();
    // A chain of rejected events, however long, does not keep a head that an accepted event stands on.
    let mut prev = base;
    for number in 0..5 {
        let name = json!({ "name": number });
        let (id, outcome) = fixture.state(&bob(), "m.room.name", "", name, Some(&prev));
        assert!(matches!(outcome, Outcome::Aside(..)), "{outcome:?}");
        prev = vec![id];
    }
    let (after, outcome) = fixture.say(&bob(), "after", Some(&prev));
    assert!(accepted(&outcome), "{outcome:?}");
    assert_eq!(fixture.heads(), [after]);
    // A soft-failed event does not keep such a head, either.
    let old = fixture.heads();
    let ban = json!({ "membership": "ban" });
    fixture.state(&alice(), "m.room.member", bob().as_str(), ban, None);
    let (late, outcome) = fixture.say(&bob(), "late", Some(&old));
    assert!(matches!(outcome, Outcome::Aside(..)), "{outcome:?}");
    let mut prev = fixture.heads();
    prev.push(late);
    let (merge, outcome) = fixture.say(&alice(), "merge", Some(&prev));
    assert!(accepted(&outcome), "{outcome:?}");
    assert_eq!(fixture.heads(), [merge]);
}

#[test]
fn a_head_below_a_rejected_event_does_not_turn_the_state_back() {
    let mut fixture = Fixture::new();
    fixture.time_ms = 10_000;
    let (_, outcome) = fixture.state(&bob(), "x", "", json!({ "n": "old" }), None);
    assert!(accepted(&outcome));
    let (rejected, outcome) = fixture.state(&bob(), "m.room.name", "", json!({ "name": "mine" }), None);
    assert!(matches!(outcome, Outcome::Aside(..)));
    // Bob's clock goes back, so that the older value would win if both events were heads.
    fixture.time_ms = 5_000;
    let prev = std::slice::from_ref(&rejected);
    let (_, outcome) = fixture.state(&bob(), "x", "", json!({ "n": "new" }), Some(prev));
    assert!(accepted(&outcome), "{outcome:?}");
    assert_eq!(fixture.value("x", "")["n"], "new");
}

#[test]
fn rejected_events_take_no_state_keys() {
    let mut fixture = Fixture::new();
    let before = fixture.row().next_key;
    for number in 0..20 {
        let (_, outcome) = fixture.state(&bob(), "org.example.junk", &number.to_string(), json!({}), None);
        assert!(matches!(outcome, Outcome::Aside(..)));
    }
    assert_eq!(fixture.row().next_key, before);
}

#[test]
fn a_question_about_the_batch_that_is_being_built_stays_in_its_turn() {
    let mut fixture = Fixture::new();
    let old = fixture.heads();
    for number in 0..60 {
        fixture.state(&alice(), "x", &number.to_string(), json!({ "n": number }), None);
    }
    let rename = |fixture: &mut Fixture, name: &str| {
        let member = json!({ "membership": "join", "displayname": name });
        fixture.build(&Draft::state(bob(), "m.room.member", bob().as_str(), content(member), 0), None)
    };
    for name in ["one", "two"] {
        // The second event stands on the first, which only this batch has, and on one far away.
        let first = rename(&mut fixture, name);
        let second = fixture.build(&text(&bob(), name), Some(&old));
        let second = fixture.rewritten(&second, "prev_events", json!([first.id(), old[0]]));
        let rooms = fixture.rooms.clone();
        let steps = fixture.change(|change| {
            [&first, &second].map(|event| change.receive(event, None, rooms.resolver(), 0).unwrap())
        });
        assert!(matches!(&steps[0], Step::Done(Outcome::Accepted(_))), "{steps:?}");
        assert!(matches!(&steps[1], Step::EndTurn(_)), "{steps:?}");
        assert!(accepted(&fixture.receive(second).1));
        fixture.check_state();
        assert_eq!(fixture.value("m.room.member", bob().as_str())["displayname"], name);
        fixture.state(&alice(), "m.room.name", "", json!({ "name": name }), None);
    }
}

#[test]
fn who_is_banned_now_cannot_speak_from_before() {
    let mut fixture = Fixture::new();
    let before = fixture.heads();
    let (_, outcome) =
        fixture.state(&alice(), "m.room.member", "@bob:b.example", json!({ "membership": "ban" }), None);
    assert!(accepted(&outcome), "{outcome:?}");
    let (_, outcome) = fixture.say(&bob(), "late", Some(&before));
    let Outcome::Aside(num, _) = outcome else { panic!("{outcome:?}") };
    let aside = schema::ASIDE.get(&*fixture.store.snapshot(), (ROOM, num)).unwrap().unwrap();
    assert!(!aside.rejected, "soft-failed, not rejected: {}", aside.why);
    assert_eq!(fixture.row().joined, 1);
}

#[test]
fn what_is_missing_is_named_and_nothing_is_stored() {
    let mut fixture = Fixture::new();
    let received = fixture.build(&Draft::state(bob(), "x", "", content(json!({})), 0), None);
    let (auth, prev) = (event::event_id(&[1; 32].into(), VERSION), event::event_id(&[2; 32].into(), VERSION));
    let mut ids = received.event().auth.clone();
    ids.push(auth.clone());
    let received = fixture.rewritten(&received, "auth_events", json!(ids));
    let mut ids = received.event().prev.clone();
    ids.push(prev.clone());
    let received = fixture.rewritten(&received, "prev_events", json!(ids));
    let next = fixture.row().next_event;
    let seat = fixture.rooms.sit(ROOM);
    let mut change = Change::begin(&fixture.store, seat, ROOM).unwrap();
    match change.receive(&received, None, fixture.rooms.resolver(), 0).unwrap() {
        Step::Done(Outcome::Need { auth: needed, prev: cited }) => {
            assert_eq!((needed, cited), (vec![auth], vec![prev]));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(change.batch.row_count(), 0);
    assert_eq!(change.row.next_event, next);
}

#[test]
fn a_thousand_events_on_a_thousand_old_places_leave_twenty_heads_and_bounded_memory() {
    let mut fixture = Fixture::new();
    let mut places = vec![fixture.heads()[0].clone()];
    for number in 0..1_000 {
        let (id, outcome) = if number % 20 == 0 {
            fixture.state(&bob(), "x", &number.to_string(), json!({ "n": number }), None)
        } else {
            fixture.say(&bob(), "place", None)
        };
        assert!(accepted(&outcome), "{outcome:?}");
        places.push(id);
    }
    let before = fixture.current();
    for place in &places[..1_000] {
        let (_, outcome) = fixture.say(&bob(), "fork", Some(std::slice::from_ref(place)));
        assert!(accepted(&outcome), "{outcome:?}");
        assert!(fixture.heads().len() <= graph::HEADS_MAX);
    }
    assert_eq!(fixture.current(), before, "messages change no state");
    // The room holds no side states, a bounded tip and bounded results.
    assert_eq!(fixture.row().next_side, 0);
    let tip_size = fixture.rooms.sit(ROOM).tip.as_ref().unwrap().state_count();
    assert!(tip_size <= crate::rooms::tip::STATE_MAX, "{tip_size}");
    let results = fixture.rooms.resolver().recent().byte_count();
    assert!(results > 0 && results <= crate::rooms::resolve::RESULTS_BYTES_MAX, "{results}");
    // The next event of a user of this server cites all heads, and the room has one head again.
    let now = fixture.time_ms;
    let signer = fixture.rooms.signer().clone();
    fixture.change(|change| {
        let draft =
            Draft { state_key: None, ..Draft::state(alice(), "m.room.message", "", content(json!({})), now) };
        change.add(&signer, &draft, None).unwrap();
    });
    assert_eq!(fixture.heads().len(), 1);
    let read = fixture.store.snapshot();
    let keys = members::list_keys(&*read, ROOM).unwrap().map(Result::unwrap);
    let current = keys.filter(|(_, key)| state::current(&*read, ROOM, *key).unwrap().is_some());
    assert_eq!(current.count(), 2);
}

#[test]
fn a_message_far_back_changes_nothing_and_keeps_its_own_state() {
    let mut fixture = Fixture::new();
    let old = fixture.heads();
    for number in 0..300 {
        fixture.state(&bob(), "x", &number.to_string(), json!({ "n": number }), None);
    }
    let before = fixture.current();
    let (id, outcome) = fixture.say(&bob(), "from long ago", Some(&old));
    assert!(accepted(&outcome), "{outcome:?}");
    assert_eq!(fixture.current(), before);
    let snapshot = fixture.store.snapshot();
    let stored = event::find_by_id(&*snapshot, ROOM, &id).unwrap().unwrap();
    let at = stored.row.header.before.unwrap();
    let key = state::find_key(&*snapshot, ROOM, "x", "0").unwrap().unwrap();
    assert_eq!(state::at(&*snapshot, ROOM, at, key).unwrap(), StateValue::Absent);
}

#[test]
fn two_settings_of_one_key_leave_one_and_the_loser_comes_back_never() {
    let mut fixture = Fixture::new();
    let base = fixture.heads();
    let (first, _) = fixture.state(&bob(), "x", "", json!({ "n": 1 }), Some(&base));
    let (second, outcome) = fixture.state(&alice(), "x", "", json!({ "n": 2 }), Some(&base));
    assert!(accepted(&outcome), "{outcome:?}");
    let winner = fixture.current()[&("x".to_owned(), String::new())].clone();
    assert!(winner == first || winner == second);
    let parsed: Arc<StateEvent> = fixture.change(|change| change.state("x", "").unwrap().unwrap());
    assert_eq!(parsed.parsed.id, winner, "what writers remember is what is stored");
    fixture.say(&alice(), "merge", None);
    assert_eq!(fixture.current()[&("x".to_owned(), String::new())], winner);
    assert_eq!(fixture.heads().len(), 1);
}

#[test]
fn a_fork_that_is_worked_out_beside_the_room_changes_state_as_one_in_its_turn() {
    let mut fixture = Fixture::new();
    let base = fixture.heads();
    // Bob's branch is further from the room's state than a turn resolves.
    for number in 0..60 {
        fixture.state(&alice(), "x", &number.to_string(), json!({ "n": number }), None);
    }
    let mut branch = base;
    for number in 40..70 {
        let json = json!({ "n": "bob's" });
        let (id, outcome) = fixture.state(&bob(), "x", &number.to_string(), json, Some(&branch));
        assert!(accepted(&outcome), "{outcome:?}");
        fixture.check_state();
        branch = vec![id];
    }
    assert!(fixture.worked_out > 10, "{}", fixture.worked_out);
    assert_eq!(fixture.value("x", "69")["n"], "bob's", "what nobody else set");
    assert_eq!(fixture.value("x", "0")["n"], 0, "what Bob did not touch");
    // The event uses a state key that is new, and while its question is answered another event uses another new one.
    let event = Draft::state(bob(), "x", "new", content(json!({ "n": 1 })), 0);
    let event = fixture.build(&event, Some(&branch));
    let rooms = fixture.rooms.clone();
    let step = fixture.change(|change| change.receive(&event, None, rooms.resolver(), 0).unwrap());
    let Step::Resolve(question, taken) = step else { panic!("{step:?}") };
    let next = fixture.row().next_event;
    fixture.say(&alice(), "meanwhile", None);
    fixture.state(&alice(), "x", "other", json!({}), None);
    let loaded = resolve::Loaded::default();
    rooms
        .resolver()
        .work_out(&*fixture.store.snapshot(), ROOM, VERSION, &question, &loaded, resolve::EVENTS_MAX)
        .unwrap();
    assert!(loaded.count() > 0);
    let step = fixture.change(|change| change.receive(&event, taken, rooms.resolver(), 0).unwrap());
    // The heads have moved, so another question is asked; the event keeps the numbers that it took.
    let Step::Resolve(question, again) = step else { panic!("{step:?}") };
    assert_eq!(again, taken);
    assert_eq!(question.question().states().len(), 2);
    // With the events at hand that were read before, it is answered in the turn, however often the heads move.
    fixture.state(&alice(), "x", "again", json!({}), None);
    let step = fixture.change(|change| {
        let resolving = resolve::Resolving { loaded: Some(&loaded), ..rooms.resolver().into() };
        change.receive(&event, taken, resolving, 0).unwrap()
    });
    let Step::Done(Outcome::Accepted(stored)) = step else { panic!("{step:?}") };
    assert!(stored.event().0 < next, "it was numbered before what came meanwhile");
    fixture.check_state();
    assert_eq!(fixture.value("x", "new")["n"], 1);
    fixture.say(&alice(), "merge", None);
    assert_eq!(fixture.heads().len(), 1);
    fixture.check_state();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_comes_in_the_state_is_what_the_heads_resolve_to(
        tries in prop::collection::vec((0_u8..14, 0_u8..6, prop::collection::vec(any::<prop::sample::Index>(), 1..4)), 1..40),
    ) {
        let mut fixture = Fixture::new();
        let mut events = fixture.heads();
        for (what, value, prevs) in tries {
            if what >= 12 {
                // A sweep that is interrupted after some parts is like one that ends with the server.
                fixture.sweep(usize::from(value) * 2);
                fixture.check_rows();
                events.retain(|id| fixture.is_known(id));
                continue;
            }
            let mut prev: Vec<_> = prevs.iter().map(|index| index.get(&events).clone()).collect();
            prev.dedup();
            let prev = if what % 3 == 0 { fixture.heads() } else { prev };
            let (sender, key) = if what % 2 == 0 { (alice(), "") } else { (bob(), "k") };
            let member = |membership: &str| json!({ "membership": membership });
            let (event_type, key, json) = match what {
                0 | 1 => ("m.room.member", "@bob:b.example", member(if what == 0 { "ban" } else { "join" })),
                2 => ("m.room.member", "@bob:b.example", member("leave")),
                3 | 4 => {
                    let users = json!({ "@alice:a.example": 100, "@bob:b.example": value * 20 });
                    ("m.room.power_levels", "", json!({ "users": users, "events": { "x": 0 } }))
                }
                5..9 => ("x", key, json!({ "n": value })),
                _ => {
                    events.push(fixture.say(&sender, "said", Some(&prev)).0);
                    fixture.check_state();
                    continue;
                }
            };
            events.push(fixture.state(&sender, event_type, key, json, Some(&prev)).0);
            fixture.check_state();
        }
    }
}

fn text(sender: &OwnedUserId, text: &str) -> Draft {
    Draft {
        state_key: None,
        ..Draft::state(sender.clone(), "m.room.message", "", content(json!({ "body": text })), 0)
    }
}

fn carol() -> OwnedUserId {
    "@carol:c.example".try_into().unwrap()
}

impl Fixture {
    fn seen_in_timeline(&self, id: &OwnedEventId) -> bool {
        use crate::{ids::Order, rooms::timeline, store::Direction};
        let snapshot = self.store.snapshot();
        let from = timeline::PageToken(Order::MIN);
        let room = self.row();
        timeline::page(&*snapshot, ROOM, from, None, Direction::Up)
            .unwrap()
            .any(|stored| stored.unwrap().id(&room) == *id)
    }
}

#[test]
fn an_event_that_cites_ids_in_another_alphabet_cites_what_nobody_knows() {
    let mut fixture = Fixture::new();
    let mut head = fixture.heads()[0].clone();
    while !head.as_str().contains(['-', '_']) {
        head = fixture.say(&bob(), "x", None).0;
    }
    let other: OwnedEventId = head.as_str().replace('-', "+").replace('_', "/").try_into().unwrap();
    let odd = fixture.build(&text(&bob(), "odd"), None);
    let odd = fixture.rewritten(&odd, "prev_events", json!([other]));
    assert!(matches!(fixture.receive(odd).1, Outcome::Need { prev, .. } if prev == [other]));
}

#[test]
fn what_is_written_without_a_turn_is_seen_by_the_next_turn_of_each_room() {
    let mut fixture = Fixture::new();
    const CAROL: crate::ids::UserNum = crate::ids::UserNum(7);
    let (store, signer) = (fixture.store.clone(), fixture.rooms.signer().clone());
    let say = |change: &mut Change| {
        let said = Draft::state(alice(), "m.room.message", "", content(json!({ "body": "x" })), 5_000);
        change.add(&signer, &Draft { state_key: None, ..said }, None).unwrap();
        change.list_concerned().unwrap().to_vec()
    };
    let write_below = |write: fn(&mut Batch)| {
        let mut batch = store.batch(&Guard::alone());
        write(&mut batch);
        drop(store.enqueue(batch).unwrap());
    };
    assert_eq!(fixture.change(say), [], "the tip remembers that no user of ours is in the room");
    write_below(|batch| {
        let row = RoomRow { invited: 5, ..schema::ROOM.get(batch, ROOM).unwrap().unwrap() };
        schema::ROOM.put(batch, ROOM, &row);
        schema::ROOM_USER.put(batch, (ROOM, CAROL), &Membership::Join.into());
    });
    assert_eq!(fixture.change(say), [CAROL]);
    assert_eq!(fixture.row().invited, 5, "the row is not overwritten by the one that was remembered");
    fixture.change(|change| {
        say(change);
        write_below(|batch| schema::ROOM_USER.delete(batch, (ROOM, CAROL)));
    });
    assert_eq!(fixture.change(say), [], "the turn after one during which something was written sees it");
    // Rows of other domains are none of the rooms' business.
    let before = store.written_alone();
    write_below(|batch| crate::store::cursor::advance(batch, "reader", crate::ids::Position::ZERO));
    assert_eq!(store.written_alone(), before);
}
