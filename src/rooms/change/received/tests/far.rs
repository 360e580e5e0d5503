//! Branches whose state is far from the room's: they stand apart, and are reunited with the room once for all of their
//! events.

use super::*;

/// The rows that were read and written by some work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rows {
    read: u64,
    written: usize,
}

impl Fixture {
    /// Alice sets keys of the room this many times, each of `keys` keys in turn, as changes of her own server.
    pub(super) fn set_many(&mut self, count: usize, keys: usize) {
        let signer = self.rooms.signer().clone();
        for part in (0..count).collect::<Vec<_>>().chunks(250) {
            self.time_ms += 1;
            let now = self.time_ms;
            self.change(|change| {
                for number in part {
                    let key = (number % keys).to_string();
                    let draft = Draft::state(alice(), "x", &key, content(json!({ "n": number })), now);
                    change.add(&signer, &draft, None).unwrap();
                }
            });
        }
    }

    fn reads(&self) -> u64 {
        match self.store.engine() {
            Engine::Memory(memory) => memory.reads(),
            Engine::Rocks(_) => 0,
        }
    }

    fn store_rows(&self) -> u64 {
        match self.store.engine() {
            Engine::Memory(memory) => memory.count_rows(),
            Engine::Rocks(_) => 0,
        }
    }

    /// The number of resolutions so far.
    fn resolutions(&self) -> u64 {
        let text = self.metrics.text();
        let mut lines =
            text.lines().filter_map(|line| line.strip_prefix("aqueduct_state_resolutions_total "));
        lines.next().unwrap().parse().unwrap()
    }

    /// Takes an event in, which needs no question to be answered beside the room, and counts its rows.
    fn receive_counted(&mut self, received: &Received) -> Rows {
        let (rooms, now_ms, before) = (self.rooms.clone(), self.time_ms, self.reads());
        let (step, written) = self.change(|change| {
            let step = change.receive(received, None, rooms.resolver(), now_ms).unwrap();
            (step, change.batch.row_count())
        });
        assert!(matches!(&step, Step::Done(outcome) if accepted(outcome)), "{step:?}");
        Rows { read: self.reads() - before, written }
    }

    /// Reunites the branches that stand apart, and counts the rows that were read.
    fn reunite(&mut self) -> u64 {
        let (rooms, now_ms, before) = (self.rooms.clone(), self.time_ms, self.reads());
        let loaded = resolve::Loaded::default();
        for _ in 0..2 {
            let reunion = self.change(|change| {
                let resolving = Resolving { loaded: Some(&loaded), ..rooms.resolver().into() };
                change.reunite(resolving, now_ms).unwrap()
            });
            match reunion {
                Reunion::Done => return self.reads() - before,
                Reunion::Resolve(question) => {
                    let snapshot = self.store.snapshot();
                    rooms
                        .resolver()
                        .work_out(&*snapshot, ROOM, VERSION, &question, &loaded, resolve::EVENTS_MAX)
                        .unwrap();
                }
            }
        }
        panic!("what was worked out is not found")
    }
}

#[test]
fn a_branch_twenty_thousand_changes_back_comes_back_and_goes_on() {
    let mut fixture = Fixture::new();
    let old = fixture.heads();
    fixture.set_many(20_001, 50);
    let mut branch = old;
    for text in ["first", "second", "third"] {
        let (id, outcome) = fixture.say(&bob(), text, Some(&branch));
        assert!(accepted(&outcome), "{outcome:?}");
        assert!(fixture.seen_in_timeline(&id));
        branch = vec![id];
    }
    assert_eq!((fixture.row().heads.len(), fixture.row().apart.len()), (1, 1));
    let name = json!({ "membership": "join", "displayname": "Bob" });
    let (last, outcome) = fixture.state(&bob(), "m.room.member", bob().as_str(), name, Some(&branch));
    assert!(accepted(&outcome), "{outcome:?}");
    fixture.reunite();
    assert_eq!((fixture.row().heads.len(), fixture.row().apart.len()), (2, 0));
    fixture.check_state();
    assert_eq!(fixture.value("m.room.member", bob().as_str())["displayname"], "Bob");
    assert_eq!(fixture.value("x", "49")["n"], 19_999, "what the branch did not touch");
    assert_eq!(fixture.row().joined, 2, "a member of both branches is counted once");
    // An event that cites both merges them, and the room goes on as before.
    let heads = fixture.heads();
    assert!(heads.contains(&last));
    assert!(accepted(&fixture.say(&bob(), "merge", Some(&heads)).1));
    assert!(accepted(&fixture.state(&bob(), "x", "0", json!({ "n": "after" }), None).1));
    assert_eq!(fixture.heads().len(), 1);
    fixture.check_state();
}

#[test]
fn a_far_branch_costs_as_much_as_its_events_and_one_state() {
    let mut fixture = Fixture::new();
    let old = fixture.heads();
    let keys = 600;
    fixture.set_many(keys, keys);
    let mut prev = old;
    let mut costs = Vec::new();
    for number in 0..100 {
        let json = json!({ "n": "bob's" });
        let draft = Draft::state(bob(), "x", &format!("new{number}"), content(json), 0);
        let event = fixture.build(&draft, Some(&prev));
        costs.push(fixture.receive_counted(&event));
        prev = vec![event.id().to_owned()];
    }
    let reads: Vec<u64> = costs.iter().map(|rows| rows.read).collect();
    let writes: Vec<usize> = costs.iter().map(|rows| rows.written).collect();
    assert!(reads.iter().sum::<u64>() < 100 * 110, "{reads:?}");
    assert!(writes.iter().all(|written| *written < 20), "{writes:?}");
    let (early, late) = (reads[10..20].iter().sum::<u64>(), reads[90..].iter().sum::<u64>());
    assert!(late < 2 * early, "an event late in the branch costs about the same: {reads:?}");
    let of_reunion = fixture.reunite();
    assert!(of_reunion < 60 * keys as u64, "{of_reunion}");
    fixture.check_state();
    for number in [0, 99] {
        assert_eq!(fixture.value("x", &format!("new{number}"))["n"], "bob's");
    }
}

#[test]
fn the_directory_follows_a_reunion_that_no_event_causes() {
    let mut fixture = Fixture::new();
    let old = fixture.heads();
    fixture.set_many(300, 300);
    let carol: OwnedUserId = "@carol:b.example".try_into().unwrap();
    let join = json!({ "membership": "join" });
    assert!(accepted(&fixture.state(&carol, "m.room.member", carol.as_str(), join, Some(&old)).1));
    let listed = |fixture: &Fixture| {
        let descriptions = fixture.rooms.descriptions();
        let chunk = descriptions.of(&*fixture.store.snapshot(), ROOM, &fixture.row()).unwrap();
        u64::from(chunk.num_joined_members)
    };
    let before = fixture.row();
    assert_eq!(listed(&fixture), 2);
    fixture.reunite();
    assert_eq!(fixture.row().tip, before.tip, "the state has changed without an event");
    assert_eq!(listed(&fixture), 3);
}

#[test]
fn a_branch_that_goes_on_after_a_reunion_stands_apart_again_and_replaces_its_head() {
    let mut fixture = Fixture::new();
    let old = fixture.heads();
    fixture.set_many(300, 300);
    let (first, outcome) = fixture.state(&bob(), "x", "bob", json!({ "n": 1 }), Some(&old));
    assert!(accepted(&outcome), "{outcome:?}");
    assert_eq!(fixture.value("x", "bob"), serde_json::Value::Null, "the state follows with the reunion");
    fixture.reunite();
    assert_eq!(fixture.value("x", "bob")["n"], 1);
    let mut branch = vec![first.clone()];
    for number in 2..5 {
        let (id, outcome) = fixture.state(&bob(), "x", "bob", json!({ "n": number }), Some(&branch));
        assert!(accepted(&outcome), "{outcome:?}");
        fixture.check_state();
        branch = vec![id];
    }
    assert!(fixture.heads().contains(&first), "the state of the room still rests on it");
    fixture.reunite();
    fixture.check_state();
    assert_eq!(fixture.value("x", "bob")["n"], 4);
    let heads = fixture.heads();
    assert!(!heads.contains(&first) && heads.contains(&branch[0]) && heads.len() == 2, "{heads:?}");
    // An event that cites the branch and the room leaves nothing apart.
    let (far, outcome) = fixture.state(&bob(), "x", "bob", json!({ "n": 5 }), Some(&branch));
    assert!(accepted(&outcome), "{outcome:?}");
    let mut all = fixture.heads();
    all.push(far);
    assert!(accepted(&fixture.say(&bob(), "merge", Some(&all)).1));
    assert_eq!((fixture.heads().len(), fixture.row().apart.len()), (1, 0));
    assert_eq!(fixture.value("x", "bob")["n"], 5);
    fixture.check_state();
}

#[test]
fn far_states_that_are_cited_again_are_not_resolved_again() {
    let mut fixture = Fixture::new();
    let old = fixture.heads();
    fixture.set_many(300, 300);
    let near = fixture.heads().remove(0);
    let (far, outcome) = fixture.state(&bob(), "x", "bob", json!({ "n": 1 }), Some(&old));
    assert!(accepted(&outcome), "{outcome:?}");
    assert_eq!(fixture.row().apart.len(), 1);
    let both = [near.clone(), far.clone()];
    let (mut counts, mut ids) = (Vec::new(), Vec::new());
    for (number, prev) in [&both, &both, &[far, near]].into_iter().enumerate() {
        let (id, outcome) = fixture.say(&bob(), &number.to_string(), Some(prev));
        assert!(accepted(&outcome), "{outcome:?}");
        fixture.check_state();
        counts.push((fixture.resolutions(), fixture.worked_out));
        ids.push(id);
    }
    assert_eq!(counts, [(1, 1); 3]);
    assert_eq!(fixture.heads().len(), 3);
    assert_eq!(fixture.value("x", "bob")["n"], 1);
}

#[test]
fn branches_that_stand_apart_are_bounded() {
    let mut fixture = Fixture::new();
    let old = fixture.heads();
    fixture.set_many(300, 300);
    for number in 0..3 * graph::APART_MAX {
        let (_, outcome) = fixture.state(&bob(), "x", &number.to_string(), json!({}), Some(&old));
        assert!(accepted(&outcome), "{outcome:?}");
        assert!(fixture.row().apart.len() <= graph::APART_MAX);
    }
    fixture.reunite();
    assert!(fixture.row().heads.len() <= graph::HEADS_MAX);
    fixture.check_state();
}

#[test]
fn a_far_event_costs_the_same_however_far_it_is() {
    let mut costs = Vec::new();
    for count in [300, 3_000] {
        let mut fixture = Fixture::new();
        let old = fixture.heads();
        fixture.set_many(count, 250);
        let event = fixture.build(&Draft::state(bob(), "x", "bob", content(json!({})), 0), Some(&old));
        costs.push(fixture.receive_counted(&event));
        assert_eq!(fixture.row().apart.len(), 1);
    }
    assert!(costs[1].read <= costs[0].read + 5 && costs[1].written == costs[0].written, "{costs:?}");
}

#[test]
fn events_on_hundreds_of_old_places_cost_a_bounded_number_of_rows_and_of_bytes() {
    let mut fixture = Fixture::new();
    let mut places = Vec::new();
    for number in 0..300 {
        places.push(fixture.heads()[0].clone());
        fixture.state(&alice(), "x", &number.to_string(), json!({ "n": number }), None);
    }
    let mut written = Vec::new();
    for (number, place) in places.iter().enumerate() {
        // Each has a state of its own, on a place of its own.
        let draft = Draft::state(bob(), "x", &format!("bob{number}"), content(json!({})), 0);
        let event = fixture.build(&draft, Some(std::slice::from_ref(place)));
        let before = fixture.store_rows();
        let outcome = fixture.receive(event).1;
        assert!(accepted(&outcome), "{outcome:?}");
        written.push(fixture.store_rows() - before);
        let row = fixture.row();
        assert!(row.heads.len() <= graph::HEADS_MAX && row.apart.len() <= graph::APART_MAX);
    }
    assert!(written.iter().all(|rows| *rows < 150), "{written:?}");
    let results = fixture.rooms.resolver().recent().byte_count();
    assert!(results <= crate::rooms::resolve::RESULTS_BYTES_MAX, "{results}");
    let tip = fixture.rooms.sit(ROOM).tip.as_ref().map_or(0, crate::rooms::tip::Tip::byte_count);
    assert!(tip < 1 << 20, "{tip}");
    fixture.reunite();
    fixture.check_state();
}

#[test]
fn a_long_chain_of_auth_events_is_walked_once() {
    let mut fixture = Fixture::new();
    let old = fixture.heads();
    // Each of these names the one before it among its auth events.
    let signer = fixture.rooms.signer().clone();
    for part in 0..4 {
        fixture.change(|change| {
            for number in 0..100 {
                let users = json!({ "@alice:a.example": 100, "@bob:b.example": number % 50 });
                let levels = content(json!({ "users": users, "events": { "x": 0 } }));
                let draft =
                    Draft::state(alice(), "m.room.power_levels", "", levels, 2_000 + part * 100 + number);
                change.add(&signer, &draft, None).unwrap();
            }
        });
    }
    let (_, outcome) = fixture.state(&alice(), "m.room.name", "", json!({ "name": "near" }), Some(&old));
    assert!(accepted(&outcome), "{outcome:?}");
    let reads = fixture.reunite();
    assert!(reads < 80 * 400, "{reads}");
    fixture.check_state();
}

#[test]
fn a_question_is_answered_although_the_state_moves_at_each_turn() {
    // The first event is near enough to be resolved for itself, and the second stands apart.
    for count in [120, 300] {
        let mut fixture = Fixture::new();
        let old = fixture.heads();
        fixture.set_many(count, count);
        let rooms = fixture.rooms.clone();
        let event =
            fixture.build(&Draft::state(bob(), "x", "bob", content(json!({ "n": 1 })), 0), Some(&old));
        let (mut worked_out, mut taken, mut is_in) = (0, None, false);
        let mut loaded = None;
        loop {
            let moved = json!({ "n": worked_out });
            assert!(accepted(&fixture.state(&alice(), "x", "moves", moved, None).1));
            let resolving = Resolving { resolver: rooms.resolver(), loaded: loaded.as_ref() };
            let asked = fixture.change(|change| {
                if is_in {
                    return match change.reunite(resolving, 0).unwrap() {
                        Reunion::Done => None,
                        Reunion::Resolve(question) => Some(question),
                    };
                }
                match change.receive(&event, taken, resolving, 0).unwrap() {
                    Step::Done(outcome) => {
                        assert!(accepted(&outcome), "{outcome:?}");
                        None
                    }
                    Step::Resolve(question, numbers) => {
                        taken = numbers;
                        Some(question)
                    }
                    Step::EndTurn(_) | Step::Unsigned(..) => {
                        panic!("nothing is pending before the first event of a turn")
                    }
                }
            });
            let Some(question) = asked else {
                if fixture.row().apart.is_empty() {
                    break;
                }
                is_in = true;
                continue;
            };
            // The state moves while the answer is worked out, too.
            let snapshot = fixture.store.snapshot();
            assert!(accepted(&fixture.state(&alice(), "x", "moves", json!({ "n": "between" }), None).1));
            let read = resolve::Loaded::default();
            rooms
                .resolver()
                .work_out(&*snapshot, ROOM, VERSION, &question, &read, resolve::EVENTS_MAX)
                .unwrap();
            loaded = Some(read);
            worked_out += 1;
            assert!(worked_out <= 1, "{count}");
        }
        assert!(worked_out > 0, "{count}");
        fixture.check_state();
        assert_eq!(fixture.value("x", "bob")["n"], 1);
    }
}

#[test]
fn a_conflict_that_does_not_fit_in_memory_waits_until_the_state_stands_still() {
    let mut fixture = Fixture::new();
    let old = fixture.heads();
    let count = resolve::EVENTS_AT_ONCE + 200;
    fixture.set_many(count, count);
    let (_, outcome) = fixture.state(&bob(), "x", "bob", json!({ "n": 1 }), Some(&old));
    assert!(accepted(&outcome), "{outcome:?}");
    let rooms = fixture.rooms.clone();
    let (mut loaded, mut worked_out) = (None, 0);
    loop {
        // It moves before each of the first turns, and stands still after the last question.
        if worked_out < 3 {
            assert!(accepted(&fixture.state(&alice(), "x", "moves", json!({ "n": worked_out }), None).1));
        }
        let before = fixture.row().states();
        let resolving = Resolving { resolver: rooms.resolver(), loaded: loaded.as_ref() };
        let question = match fixture.change(|change| change.reunite(resolving, 0).unwrap()) {
            Reunion::Done => break,
            Reunion::Resolve(question) => question,
        };
        let snapshot = fixture.store.snapshot();
        let read = resolve::Loaded::default();
        rooms.resolver().work_out(&*snapshot, ROOM, VERSION, &question, &read, resolve::EVENTS_MAX).unwrap();
        assert!(read.count() <= resolve::EVENTS_AT_ONCE);
        loaded = Some(read);
        worked_out += 1;
        // Messages of our users go on and leave the states of the heads as they are, and a change of the state does not.
        fixture.say(&alice(), "meanwhile", None);
        assert!(fixture.row().states().is_subset(&before));
    }
    assert_eq!(worked_out, 3);
    fixture.check_state();
    assert_eq!(fixture.value("x", "bob")["n"], 1);
    assert_eq!(fixture.value("x", "moves")["n"], 2);
}
