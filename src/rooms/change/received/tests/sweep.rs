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
        let began = self.change(|change| change.begin_sweep(rooms.resolver()));
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
    }

    fn count_asides(&self) -> u64 {
        schema::ASIDE.prefix::<()>(&*self.store.snapshot(), (), Direction::Up).unwrap().count() as u64
    }

    fn count_sides(&self) -> usize {
        state::list_sides(&*self.store.snapshot(), ROOM).unwrap().count()
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
            let (id, outcome) =
                self.state(user, "x", &number.to_string(), json!({ "n": number }), Some(&prev));
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
        let (mut sent, mut sides) = (Vec::new(), Vec::new());
        for _ in 0..3 {
            sent.extend(fixture.fill_aside(&bob(), &before, is_line));
            assert!(matches!(fixture.outlier(&alice(), "full").1, Outcome::Unknown));
            assert!(fixture.change(|change| change.wants_sweep().unwrap()));
            assert!(fixture.sweep(1_000));
            assert!(!fixture.change(|change| change.wants_sweep().unwrap()));
            assert!(fixture.count_asides() <= ASIDE_MAX / 2, "{}", fixture.count_asides());
            sides.push(fixture.count_sides());
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
