//! Events that a join left out, because the keys of their servers could not be had.

use super::*;
use crate::rooms::change::left_out::{self, LeftOut, Remembered};

fn carol() -> OwnedUserId {
    user("carol:c.example")
}

impl Here {
    /// Joins a room without those of its events that are left out, and remembers these.
    fn join_without(&self, elsewhere: &mut Elsewhere, is_left_out: impl Fn(&Received) -> bool) -> Received {
        self.join_and_leave_out(elsewhere, is_left_out, Vec::new())
    }

    /// Joins a room like [`Self::join_without`], by an answer that has further events which are left out.
    fn join_and_leave_out(
        &self,
        elsewhere: &mut Elsewhere,
        is_left_out: impl Fn(&Received) -> bool,
        also: Vec<Brought>,
    ) -> Received {
        let (left, brought): (Vec<_>, Vec<_>) =
            elsewhere.brought().into_iter().partition(|it| is_left_out(&it.event));
        let join = elsewhere.join(&bob());
        let (mut base, mut brought) = (self.base(&elsewhere.row), brought.into_iter());
        loop {
            let mut change = base.begin_part(&self.store, self.rooms.sit(ROOM)).unwrap();
            let is_more = base.take(&mut change, &mut brought).unwrap();
            drop(change.enqueue(&self.store).unwrap());
            self.store.flush().unwrap();
            if !is_more {
                break;
            }
        }
        let (mut change, _) = base.finish(&self.store, self.rooms.sit(ROOM), &join).unwrap().unwrap();
        let left: Vec<LeftOut> = left
            .into_iter()
            .chain(also)
            .map(|Brought { event, is_state }| LeftOut {
                event_type: event.event().event_type.to_string(),
                state_key: event.event().state_key.clone().unwrap(),
                is_state,
                json: event.json().clone(),
            })
            .collect();
        assert_eq!(change.leave_out(&left, 1).unwrap(), 0);
        drop(change.enqueue(&self.store).unwrap());
        self.store.flush().unwrap();
        join
    }

    fn left_out(&self) -> Vec<Remembered> {
        left_out::list(&*self.store.snapshot(), ROOM).unwrap()
    }

    /// Takes in all events that were left out, as they are among those of the room.
    fn take_left_out(&self, elsewhere: &Elsewhere) -> usize {
        let mut events = Vec::new();
        for event in &elsewhere.events {
            let is_it = |it: &&Remembered| it.row.json == *event.json();
            let remembered = self.left_out().iter().find(is_it).cloned();
            events.extend(remembered.map(|it| (it, Some(event.clone()))));
        }
        let mut change = Change::begin(&self.store, self.rooms.sit(ROOM), ROOM).unwrap();
        let done = change.take_left_out(&events).unwrap();
        drop(change.enqueue(&self.store).unwrap());
        self.store.flush().unwrap();
        done
    }
}

/// A room in which Carol has joined and set something.
fn with_carol() -> Elsewhere {
    let mut elsewhere = Elsewhere::with_members(6);
    elsewhere.join(&carol());
    elsewhere.set(&carol(), "x", "", json!({ "by": "carol" }));
    elsewhere
}

fn is_carols(event: &Received) -> bool {
    event.event().sender == carol()
}

#[test]
fn what_a_join_left_out_is_in_the_state_from_the_join_on_once_it_can_be_believed() {
    let mut elsewhere = with_carol();
    let here = Here::new(6);
    here.join_without(&mut elsewhere, is_carols);
    let at_join = StateRef::Main(here.row().tip);
    assert_eq!(here.left_out().len(), 2);
    assert_eq!(here.faults(), [""; 0]);
    // Others may not rely on the state meanwhile.
    assert!(left_out::require_whole(&*here.store.snapshot(), ROOM).is_err());
    let topic = json!({ "topic": "meanwhile" });
    let between = elsewhere.make(&alice(), "m.room.topic", Some(""), topic);
    elsewhere.add(&between);
    assert!(matches!(here.receive(&between), Outcome::Accepted(_)));
    let at = here.row();
    assert_eq!(here.take_left_out(&elsewhere), 2);
    here.assert_is(&elsewhere);
    let mut then = elsewhere.clone();
    then.state.retain(|(kind, _), _| kind != "m.room.topic");
    assert_eq!(here.state_at(at_join), then.ids(), "it was so at the join");
    let now = here.row();
    assert!(now.state_tip > at.state_tip, "readers are told");
    assert_eq!(now.heads[0].after, StateRef::Main(now.state_tip));
    assert!(left_out::require_whole(&*here.store.snapshot(), ROOM).is_ok());
}

#[test]
fn an_event_that_cannot_be_believed_does_not_make_another_doubtful() {
    let mut elsewhere = with_carol();
    // The server that gives the state adds a second event of a key that has one, in the name of a server that does not answer.
    let forged = elsewhere.make(&carol(), "x", Some(""), json!({ "by": "nobody" }));
    let here = Here::new(6);
    let allows = elsewhere.make(&carol(), "y", Some(""), json!({}));
    let also = [(forged, true), (allows, false)].map(|(event, is_state)| Brought { event, is_state });
    here.join_and_leave_out(&mut elsewhere, |_| false, also.into());
    assert_eq!(here.left_out().len(), 1, "that allows others, and is no part of the state");
    assert!(left_out::require_whole(&*here.store.snapshot(), ROOM).is_ok());
    assert_eq!(here.faults(), [""; 0]);
}

#[test]
fn an_event_waits_while_nobody_knows_what_the_state_says_of_its_sender() {
    let mut elsewhere = with_carol();
    let here = Here::new(6);
    here.join_without(&mut elsewhere, is_carols);
    // Her member event comes in as one that allows what she says.
    let member = elsewhere.state[&(MEMBER.to_owned(), carol().to_string())].clone();
    let mut change = Change::begin(&here.store, here.rooms.sit(ROOM), ROOM).unwrap();
    assert!(matches!(change.receive_outlier(&member).unwrap(), Outcome::Outlier(_)));
    drop(change.enqueue(&here.store).unwrap());
    let stranger = elsewhere.make(&user("mallory:d.example"), "x", Some("y"), json!({}));
    let said = elsewhere.say(&carol(), json!({ "body": "hello" }));
    assert!(matches!(here.receive(&said), Outcome::Unknown), "it is not rejected");
    // The state says of others what it says.
    let outcome = here.receive(&stranger);
    assert!(matches!(outcome, Outcome::Aside(..)), "{outcome:?}");
    assert_eq!(here.take_left_out(&elsewhere), 2);
    assert!(matches!(here.receive(&said), Outcome::Accepted(_)));
    here.assert_is(&elsewhere);
}

#[test]
fn what_came_later_under_the_key_of_an_event_that_was_left_out_stays() {
    let mut elsewhere = with_carol();
    let here = Here::new(6);
    here.join_without(&mut elsewhere, is_carols);
    let at_join = StateRef::Main(here.row().tip);
    let mut then = elsewhere.clone();
    let later = elsewhere.make(&alice(), "x", Some(""), json!({ "by": "alice" }));
    elsewhere.add(&later);
    assert!(matches!(here.receive(&later), Outcome::Accepted(_)));
    assert_eq!(here.take_left_out(&elsewhere), 2);
    here.assert_is(&elsewhere);
    then.state.retain(|_, event| event.id() != later.id());
    assert_eq!(here.state_at(at_join), then.ids());
}

#[test]
fn what_is_forged_or_given_up_is_forgotten_and_another_join_begins_anew() {
    let mut elsewhere = with_carol();
    let here = Here::new(6);
    here.join_without(&mut elsewhere, is_carols);
    let remembered = here.left_out();
    let mut change = Change::begin(&here.store, here.rooms.sit(ROOM), ROOM).unwrap();
    assert_eq!(change.take_left_out(&[(remembered[0].clone(), None)]).unwrap(), 1);
    drop(change.enqueue(&here.store).unwrap());
    here.store.flush().unwrap();
    assert_eq!(here.left_out().len(), 1);
    leave(&here, &mut elsewhere, &bob());
    let ended = here.row().tip;
    here.join_without(&mut elsewhere, |_| false);
    assert_eq!(here.left_out().len(), 0);
    // The state of the earlier stay is asked for as a whole instead.
    let [earlier] = &*here.row().earlier else { panic!("{:?}", here.row().earlier) };
    assert!(!earlier.state.is_filled && earlier.state.base == remembered[1].row.base && earlier.end > ended);
    assert_eq!(earlier.state.us, "here.example");
    // The older one is of no use to those who still have it.
    let mut change = Change::begin(&here.store, here.rooms.sit(ROOM), ROOM).unwrap();
    assert_eq!(change.take_left_out(&[(remembered[1].clone(), None)]).unwrap(), 0);
    drop(change);
    here.assert_is(&elsewhere);
}

#[test]
fn a_room_that_was_left_keeps_what_was_known_of_it_below_the_join() {
    let mut elsewhere = Elsewhere::with_members(6);
    let here = Here::new(6);
    here.join_without(&mut elsewhere, |_| false);
    leave(&here, &mut elsewhere, &bob());
    let (before, old) = (elsewhere.clone(), here.row().state_tip);
    elsewhere.join(&carol());
    elsewhere.set(&carol(), "x", "", json!({ "by": "carol" }));
    here.join_without(&mut elsewhere, is_carols);
    assert_eq!(here.take_left_out(&elsewhere), 2);
    here.assert_is(&elsewhere);
    assert_eq!(here.state_at(StateRef::Main(old)), before.ids());
}
