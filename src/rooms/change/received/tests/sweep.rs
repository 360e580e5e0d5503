//! Sweeps: what nothing needs is forgotten, and everything else stays.

use super::*;
use crate::{
    rooms::change::{
        aside::ASIDE_MAX,
        sweep::{Sweep, Swept},
    },
    store::{Direction, check},
};

impl Fixture {
    /// Sweeps the room in at most this many turns. Gives `false` if the sweep was interrupted then.
    pub(super) fn sweep(&mut self, turns_max: usize) -> bool {
        let mut sweep = self.look();
        for _ in 0..turns_max {
            match self.change(|change| change.sweep(&mut sweep).unwrap()) {
                Swept::All => return true,
                Swept::Part => {}
                Swept::Cited(cited) => panic!("{cited:?} were cited meanwhile"),
            }
        }
        false
    }

    fn look(&mut self) -> Sweep {
        let rooms = self.rooms.clone();
        let began = self.change(|change| change.begin_sweep(rooms.resolver()).unwrap());
        Sweep::look(&*self.store.snapshot(), began).unwrap()
    }

    pub(super) fn is_known(&self, id: &EventId) -> bool {
        event::find_num(&*self.store.snapshot(), ROOM, id).unwrap().is_some()
    }

    /// Checks each row with those that it refers to, like `db check`.
    pub(super) fn check_rows(&self) {
        let tables: Vec<_> = schema::all().collect();
        let report = check::check(&self.store, &tables, &crate::rooms::check::checks, &mut |_| {}).unwrap();
        // There are no accounts here.
        let findings = report.findings.iter().filter(|finding| !finding.contains("account"));
        assert_eq!(findings.collect::<Vec<_>>(), Vec::<&String>::new());
        self.check_marks();
    }

    /// Checks that as many events aside are marked as needed as are counted.
    fn check_marks(&self) {
        let snapshot = self.store.snapshot();
        let asides = schema::ASIDE.prefix::<()>(&*snapshot, (), Direction::Up).unwrap();
        let marked = asides.filter(|row| row.as_ref().unwrap().1.is_needed).count() as u64;
        let counted = schema::ASIDE_COUNT.get(&*snapshot, ROOM).unwrap().unwrap_or_default().needed;
        assert_eq!(counted, marked, "as many are counted as are marked");
    }

    fn count_asides(&self) -> u64 {
        schema::ASIDE.prefix::<()>(&*self.store.snapshot(), (), Direction::Up).unwrap().count() as u64
    }

    fn count_sides(&self) -> usize {
        state::list_sides(&*self.store.snapshot(), ROOM).unwrap().count()
    }

    fn count_keys(&self) -> u64 {
        state::list_keys(&*self.store.snapshot(), ROOM).unwrap().count() as u64
    }

    fn ban(&mut self, user: &OwnedUserId) {
        let ban = json!({ "membership": "ban" });
        assert!(accepted(&self.state(&alice(), "m.room.member", user.as_str(), ban, None).1));
    }

    /// Has a banned user send state from before the ban, a line of events or side by side, until none is taken in.
    fn fill_aside(
        &mut self,
        user: &OwnedUserId,
        before: &[OwnedEventId],
        is_line: bool,
    ) -> Vec<OwnedEventId> {
        let (mut sent, mut prev) = (Vec::new(), before.to_vec());
        for number in 0..=ASIDE_MAX {
            let key = format!("{number} of {}", self.time_ms);
            let (id, outcome) = self.state(user, "x", &key, json!({ "n": number }), Some(&prev));
            if matches!(outcome, Outcome::Unknown) {
                return sent;
            }
            assert!(matches!(outcome, Outcome::Aside(..)), "{outcome:?}");
            if is_line {
                prev = vec![id.clone()];
            }
            sent.push(id);
        }
        panic!("the number of events aside is not bounded")
    }

    fn outlier(&mut self, user: &OwnedUserId, key: &str) -> (OwnedEventId, Outcome) {
        let x = self.build(&Draft::state(user.clone(), "x", key, content(json!({})), 0), None);
        (x.id().to_owned(), self.change(|change| change.receive_outlier(&x).unwrap()))
    }
}

#[test]
fn a_banned_user_cannot_fill_the_places_aside_for_ever() {
    for is_line in [false, true] {
        let mut fixture = Fixture::new();
        let before = fixture.heads();
        fixture.ban(&bob());
        let (mut sent, mut sides, keys) = (Vec::new(), Vec::new(), fixture.count_keys());
        for _ in 0..3 {
            sent.extend(fixture.fill_aside(&bob(), &before, is_line));
            assert!(matches!(fixture.outlier(&alice(), "full").1, Outcome::Unknown));
            assert!(fixture.change(|change| change.wants_sweep().unwrap()));
            assert!(fixture.sweep(1_000));
            assert!(!fixture.change(|change| change.wants_sweep().unwrap()));
            assert!(fixture.count_asides() <= ASIDE_MAX / 2, "{}", fixture.count_asides());
            sides.push(fixture.count_sides());
            assert!(fixture.count_keys() <= keys + fixture.count_asides() + 1, "{}", fixture.count_keys());
            fixture.check_rows();
            fixture.check_state();
        }
        assert!(sides.iter().all(|count| *count <= ASIDE_MAX as usize), "{sides:?}");
        let (id, outcome) = fixture.outlier(&alice(), "new");
        assert!(matches!(outcome, Outcome::Outlier(_)), "{outcome:?}");
        assert!(fixture.is_known(&id));
        assert!(sent.iter().any(|id| !fixture.is_known(id)), "the oldest are forgotten");
    }
}

#[test]
fn what_an_accepted_event_stands_on_stays_and_takes_no_place_from_others() {
    let mut fixture = Fixture::new();
    let before = fixture.heads();
    fixture.ban(&bob());
    let sent = fixture.fill_aside(&bob(), &before, true);
    // Alice stands on the last of the line, so all of it is part of the state before her event.
    let said = fixture.say(&alice(), "after all", Some(&sent[sent.len() - 1..]));
    assert!(accepted(&said.1), "{:?}", said.1);
    assert!(fixture.sweep(1_000));
    assert!(sent.iter().all(|id| fixture.is_known(id)));
    fixture.check_rows();
    fixture.check_state();
    assert!(matches!(fixture.outlier(&alice(), "new").1, Outcome::Outlier(_)));
    assert!(fixture.count_asides() > ASIDE_MAX);
}

#[test]
fn one_server_does_not_push_out_the_events_of_others() {
    let mut fixture = Fixture::new();
    let join = json!({ "membership": "join" });
    fixture.state(&carol(), "m.room.member", carol().as_str(), join, None);
    let before = fixture.heads();
    let outliers: Vec<_> = (0..3).map(|number| fixture.outlier(&carol(), &number.to_string()).0).collect();
    fixture.ban(&bob());
    for _ in 0..3 {
        fixture.fill_aside(&bob(), &before, false);
        assert!(fixture.sweep(1_000));
        assert!(outliers.iter().all(|id| fixture.is_known(id)));
    }
}

#[test]
fn an_event_that_is_cited_while_a_sweep_goes_on_stays() {
    let mut fixture = Fixture::new();
    let before = fixture.heads();
    fixture.ban(&bob());
    let sent = fixture.fill_aside(&bob(), &before, true);
    let mut sweep = fixture.look();
    // Two of the line are needed: one is cited before the first part, the other after some.
    let mut cited_times = 0;
    for (turn, index) in [(0, 3), (2, 1)] {
        for _ in 0..turn {
            assert!(matches!(fixture.change(|change| change.sweep(&mut sweep).unwrap()), Swept::Part));
        }
        if !fixture.is_known(&sent[index]) {
            continue;
        }
        assert!(accepted(&fixture.say(&alice(), "on it", Some(&sent[index..=index])).1));
        let swept = fixture.change(|change| change.sweep(&mut sweep).unwrap());
        if let Swept::Cited(cited) = swept {
            cited_times += 1;
            sweep.need_cited(&*fixture.store.snapshot(), &cited).unwrap();
        }
        fixture.check_rows();
    }
    assert!(cited_times > 0, "none of those was to be forgotten");
    while !matches!(fixture.change(|change| change.sweep(&mut sweep).unwrap()), Swept::All) {
        fixture.check_rows();
    }
    assert!(sent[..=3].iter().all(|id| fixture.is_known(id)), "the line up to the one that was cited");
    assert!(sent.iter().any(|id| !fixture.is_known(id)), "the others are forgotten");
    fixture.check_rows();
    fixture.check_state();
}

#[test]
fn side_states_that_nothing_names_are_swept_also_after_an_interrupted_sweep() {
    let mut fixture = Fixture::new();
    for number in 0..10_u64 {
        // A change that came to nothing has left its parts behind.
        let value = [(crate::ids::StateKeyNum(0), StateValue::Event(EventNum(number % 3)))];
        fixture.change(|change| {
            let next_side = &mut change.row.next_side;
            state::make_side(&mut change.batch, ROOM, next_side, StateRef::EMPTY, &value).unwrap();
            change.put_room();
        });
    }
    assert_eq!(fixture.count_sides(), 10);
    assert!(!fixture.sweep(2), "the sweep is interrupted");
    assert_eq!(fixture.count_sides(), 4);
    assert!(fixture.sweep(10));
    assert_eq!(fixture.count_sides(), 0);
}

#[test]
fn a_key_that_is_used_while_a_sweep_goes_on_stays() {
    let mut fixture = Fixture::new();
    let before = fixture.heads();
    fixture.ban(&bob());
    let sent = fixture.fill_aside(&bob(), &before, false);
    let names: Vec<_> = sent
        .iter()
        .map(|id| {
            let snapshot = fixture.store.snapshot();
            let num = event::find_num(&*snapshot, ROOM, id).unwrap().unwrap();
            event::require(&*snapshot, ROOM, num).unwrap().row.state_key().unwrap().into_owned()
        })
        .collect();
    let find =
        |fixture: &Fixture, name: &str| state::find_key(&*fixture.store.snapshot(), ROOM, "x", name).unwrap();
    let mut sweep = fixture.look();
    // Alice uses a key before the first part, and one after some. Those of the newest events stay anyway.
    for (turns, name) in [(0, &names[0]), (4, &names[2])] {
        for _ in 0..turns {
            assert!(matches!(fixture.change(|change| change.sweep(&mut sweep).unwrap()), Swept::Part));
        }
        let old = find(&fixture, name);
        assert!(accepted(&fixture.state(&alice(), "x", name, json!({ "n": "mine" }), None).1));
        assert!(old.is_none_or(|old| find(&fixture, name) == Some(old)));
    }
    while !matches!(fixture.change(|change| change.sweep(&mut sweep).unwrap()), Swept::All) {
        fixture.check_rows();
    }
    fixture.check_rows();
    assert_eq!(find(&fixture, &names[1]), None, "nothing names the key any more");
    for name in [&names[0], &names[2]] {
        assert_eq!(fixture.value("x", name)["n"], "mine");
    }
    let newest = names.last().unwrap();
    assert!(find(&fixture, newest).is_some(), "an event aside that stays has it");
}

#[test]
fn an_event_that_comes_back_finds_its_key_again_though_that_was_swept() {
    let mut fixture = Fixture::new();
    let old = fixture.heads();
    fixture.set_many(120, 120);
    let rooms = fixture.rooms.clone();
    let draft = Draft::state(bob(), "x", "bob", content(json!({ "n": 1 })), 0);
    let received = fixture.build(&draft, Some(&old));
    let asked = fixture.change(|change| change.receive(&received, None, rooms.resolver(), 0).unwrap());
    let Step::Resolve(_, taken) = asked else { panic!("{asked:?}") };
    let find = |fixture: &Fixture| state::find_key(&*fixture.store.snapshot(), ROOM, "x", "bob").unwrap();
    let key = find(&fixture);
    assert!(
        key.is_some() && fixture.change(|change| change.wants_sweep().unwrap()),
        "keys alone want a sweep"
    );
    assert!(fixture.sweep(1_000));
    assert_eq!(find(&fixture), None);
    let mut has_taken = taken;
    for _ in 0..3 {
        let step =
            fixture.change(|change| change.receive(&received, has_taken, rooms.resolver(), 0).unwrap());
        match step {
            Step::Done(outcome) => assert!(accepted(&outcome), "{outcome:?}"),
            Step::Resolve(question, taken) => {
                let (loaded, snapshot) = (resolve::Loaded::default(), fixture.store.snapshot());
                let (resolver, all) = (rooms.resolver(), resolve::EVENTS_MAX);
                resolver.work_out(&*snapshot, ROOM, VERSION, &question, &loaded, all).unwrap();
                has_taken = taken;
                continue;
            }
            Step::EndTurn(_) | Step::Unsigned(..) => {
                panic!("nothing is pending before the first event of a turn")
            }
        }
        break;
    }
    assert!(find(&fixture).is_some_and(|new| Some(new) != key), "its number is not given again");
    assert_eq!(fixture.value("x", "bob")["n"], 1);
    fixture.check_rows();
    fixture.check_state();
}

#[test]
fn an_outlier_that_the_room_needs_is_no_more_counted_once_it_has_its_place() {
    let mut fixture = Fixture::new();
    let needed = |fixture: &Fixture| {
        let snapshot = fixture.store.snapshot();
        schema::ASIDE_COUNT.get(&*snapshot, ROOM).unwrap().unwrap_or_default().needed
    };
    let rename = json!({ "membership": "join", "displayname": "Bob" });
    let old = fixture.current()[&("m.room.member".to_owned(), bob().to_string())].clone();
    let draft = Draft::state(bob(), "m.room.member", bob().as_str(), content(rename), 0);
    let rename = fixture.build(&draft, None);
    let outcome = fixture.change(|change| change.receive_outlier(&rename).unwrap());
    assert!(matches!(outcome, Outcome::Outlier(_)), "{outcome:?}");
    // An event of the timeline names it.
    let said = fixture.build(&text(&bob(), "allowed by an outlier"), None);
    let auth = said.event().auth.iter().map(|id| if *id == old { rename.id() } else { id });
    let said = fixture.rewritten(&said, "auth_events", json!(auth.collect::<Vec<_>>()));
    let outcome = fixture.receive(said).1;
    assert!(accepted(&outcome), "{outcome:?}");
    // A store of before has rows without marks, and a count that says more.
    fixture.change(|change| {
        let count = change.count_aside().unwrap();
        schema::ASIDE_COUNT.put(
            &mut change.batch,
            ROOM,
            &crate::schema::rooms::AsideCount { needed: 7, ..count },
        );
    });
    assert!(fixture.sweep(1_000));
    fixture.check_marks();
    assert_eq!(needed(&fixture), 1);
    assert!(accepted(&fixture.receive(rename).1));
    assert_eq!(needed(&fixture), 0);
    fixture.check_marks();
}
