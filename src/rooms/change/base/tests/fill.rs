//! Holes that are filled with events from before a join.

use super::*;
use crate::{
    rooms::{
        change::{Backfill, Filling, Older},
        resolve, timeline,
    },
    schema::event_types::MESSAGE,
    store::{Read, tables},
};

impl Here {
    fn hole(&self) -> Option<Order> {
        find_hole(&*self.store.snapshot(), ROOM, Order::MAX).unwrap().map(|(hole, _)| hole)
    }

    /// Fills the highest hole of the room with these events.
    fn fill(&self, older: Vec<Older>) -> Result<()> {
        let claim = self.rooms.turns(ROOM).claim_history().unwrap();
        let mut backfill = Backfill::new(claim, self.hole().unwrap(), older, "a.example".to_owned());
        loop {
            let mut change = Change::begin(&self.store, self.rooms.sit(ROOM), ROOM)?;
            let filling = change.fill(&mut backfill, self.rooms.resolver())?;
            assert!(!change.batch.has_position(), "nothing of it is in the log");
            let answered = std::mem::take(&mut change.answered);
            let base = change.enqueue(&self.store)?.base;
            self.rooms.resolver().keep(ROOM, answered, base);
            self.store.flush().unwrap();
            match filling {
                Filling::All => return Ok(()),
                Filling::Part => {}
                Filling::Resolve(question) => {
                    let (loaded, snapshot) = (resolve::Loaded::default(), self.store.snapshot());
                    let (resolver, all) = (self.rooms.resolver(), resolve::EVENTS_MAX);
                    resolver.work_out(&*snapshot, ROOM, VERSION, &question, &loaded, all).unwrap();
                }
            }
        }
    }

    /// Lists the events of the timeline, oldest first.
    fn timeline(&self) -> Vec<(OwnedEventId, StoredEvent)> {
        let (snapshot, room) = (self.store.snapshot(), self.row());
        let page =
            timeline::page(&*snapshot, ROOM, timeline::PageToken(Order::MIN), None, Direction::Up).unwrap();
        page.map(|stored| stored.map(|stored| (stored.id(&room), stored)).unwrap()).collect()
    }

    fn state_before(&self, stored: &StoredEvent) -> StateRef {
        let below = || state::just_below(&*self.store.snapshot(), ROOM, stored.order).unwrap();
        stored.row.header.before.unwrap_or_else(below)
    }

    fn log_len(&self) -> (usize, crate::ids::Position) {
        let snapshot = self.store.snapshot();
        (tables::LOG.prefix::<()>(&*snapshot, (), Direction::Up).unwrap().count(), snapshot.upto())
    }

    /// Checks that the timeline ends with these events of the room, each with the state before it and the members of that.
    fn assert_has(&self, room: &Elsewhere, from: usize) {
        let timeline = self.timeline();
        let expected: Vec<_> = room.timeline[from..].iter().map(|(event, _)| event.id().to_owned()).collect();
        assert_eq!(timeline.iter().map(|(id, _)| id.clone()).collect::<Vec<_>>(), expected);
        for ((_, stored), (event, before)) in timeline.iter().zip(&room.timeline[from..]) {
            let mut there = room.clone();
            there.state.clone_from(before);
            let at = self.state_before(stored);
            assert_eq!(self.state_at(at), there.ids(), "the state before {}", event.id());
            let (snapshot, joined) = (self.store.snapshot(), there.members("join"));
            assert_eq!(members::count_joined_at(&*snapshot, ROOM, at).unwrap(), joined.len() as u64);
            let servers: BTreeSet<_> =
                joined.iter().map(|user| user.split_once(':').unwrap().1.to_owned()).collect();
            let listed = members::list_servers_at(&*snapshot, ROOM, at).unwrap();
            assert_eq!(listed, servers.into_iter().collect::<Vec<_>>(), "at {}", event.id());
        }
    }
}

/// A room in which people come, go and speak, and which we join at its end.
fn talkative() -> (Elsewhere, Here) {
    let mut elsewhere = Elsewhere::new(VERSION);
    for number in 0..14 {
        let member = user(&format!("user{number}:{}.example", ["a", "b", "here", "c", "d"][number % 5]));
        elsewhere.join(&member);
        elsewhere.say(&member, json!({ "body": number }));
        if number % 4 == 3 {
            elsewhere.set(&member, MEMBER, member.as_str(), json!({ "membership": "leave" }));
        }
        if number % 3 == 2 {
            elsewhere.set(&alice(), "m.room.topic", "", json!({ "topic": number }));
        }
    }
    let here = Here::new(14);
    let brought = elsewhere.brought();
    let join = elsewhere.join(&bob());
    here.join(&elsewhere.row, brought, &join).unwrap();
    (elsewhere, here)
}

#[test]
fn a_hole_is_filled_page_by_page_and_nothing_that_was_told_changes() {
    let (elsewhere, here) = talkative();
    let (row, log) = (here.row(), here.log_len());
    let mut from = elsewhere.timeline.len() - 1;
    while from > 0 {
        let page = from.saturating_sub(8);
        here.fill(elsewhere.older(page..from)).unwrap();
        from = page;
        here.assert_has(&elsewhere, from);
        here.assert_is(&elsewhere);
        let now = here.row();
        assert_eq!(
            (now.heads, now.tip, now.state_tip, now.joined),
            (row.heads.clone(), row.tip, row.state_tip, row.joined)
        );
        assert_eq!(here.log_len(), log);
        assert_eq!(here.hole().is_none(), from == 0);
    }
    // All events have their places: nothing is left aside.
    let count = schema::ASIDE_COUNT.get(&*here.store.snapshot(), ROOM).unwrap().unwrap();
    assert_eq!(count.count, 0);
    assert_eq!(here.timeline().iter().filter(|(_, stored)| stored.order.minor == 0).count(), 1, "live");
}

#[test]
fn a_fill_that_the_server_ended_in_is_made_again() {
    let (elsewhere, here) = talkative();
    let (to, from) = (elsewhere.timeline.len() - 1, elsewhere.timeline.len() - 21);
    let kept = Arc::new(Mutex::new(Vec::new()));
    let keeps = Arc::clone(&kept);
    here.store.watch(move |store| {
        store.flush().unwrap();
        let Engine::Memory(memory) = store.engine() else { return };
        keeps.lock().push(memory.after_crash(usize::MAX));
    });
    here.fill(elsewhere.older(from..to)).unwrap();
    let crashes = here.stop_keeping(&kept);
    here.assert_has(&elsewhere, from);
    assert!(crashes.len() > 10, "{} parts", crashes.len());
    for crash in crashes {
        let here = Here::over(crash);
        here.assert_is(&elsewhere);
        let filled = elsewhere.timeline.len() - here.timeline().len();
        here.assert_has(&elsewhere, filled);
        here.fill(elsewhere.older(from..to)).unwrap();
        here.assert_has(&elsewhere, from);
        here.assert_is(&elsewhere);
    }
}

#[test]
fn events_from_before_are_not_soft_failed_and_rejected_ones_are_kept_aside() {
    let mut elsewhere = Elsewhere::new(VERSION);
    let carol = user("carol:c.example");
    elsewhere.join(&carol);
    elsewhere.set(&carol, "x", "", json!({ "n": 1 }));
    // Carol may not name the room, and others stand on that event all the same.
    let state = elsewhere.state.clone();
    elsewhere.set(&carol, "m.room.name", "", json!({ "name": "mine" }));
    elsewhere.state = state;
    elsewhere.say(&carol, json!({ "body": "soon banned" }));
    elsewhere.set(&alice(), MEMBER, carol.as_str(), json!({ "membership": "ban" }));
    let here = Here::new(0);
    let brought = elsewhere.brought();
    let join = elsewhere.join(&bob());
    here.join(&elsewhere.row, brought, &join).unwrap();
    let all = elsewhere.timeline.len() - 1;
    here.fill(elsewhere.older(0..all)).unwrap();
    let rejected = |(event, _): &(Received, _)| event.event().event_type.to_string() == "m.room.name";
    let name = elsewhere.timeline.iter().find(|it| rejected(it)).unwrap().0.clone();
    elsewhere.timeline.retain(|it| !rejected(it));
    here.assert_has(&elsewhere, 0);
    here.assert_is(&elsewhere);
    assert_eq!(here.hole(), None);
    let snapshot = here.store.snapshot();
    let num = event::find_num(&*snapshot, ROOM, name.id()).unwrap().unwrap();
    assert!(schema::ASIDE.get(&*snapshot, (ROOM, num)).unwrap().unwrap().rejected);
}

#[test]
fn a_fork_of_the_past_is_resolved_where_it_ends() {
    let mut elsewhere = Elsewhere::new(VERSION);
    let carol = user("carol:c.example");
    elsewhere.join(&carol);
    let mut other = elsewhere.clone();
    // Two branches set keys, and one of the keys in both.
    for number in 0..3 {
        elsewhere.set(&alice(), "x", &format!("a{number}"), json!({ "n": number }));
        other.set(&carol, "x", &format!("c{number}"), json!({ "n": number }));
    }
    elsewhere.set(&alice(), "x", "both", json!({ "n": "alice" }));
    other.set(&carol, "x", "both", json!({ "n": "carol" }));
    let branch = elsewhere.timeline.len() - 4;
    let theirs = other.timeline[branch..].to_vec();
    let ours = elsewhere.timeline.split_off(branch);
    // Their events come in turns.
    for (one, another) in ours.into_iter().zip(theirs) {
        elsewhere.timeline.extend([one, another]);
    }
    elsewhere.heads.extend(other.heads.clone());
    let of_both = ("x".to_owned(), "both".to_owned());
    let carols = other.state[&of_both].clone();
    for (key, event) in &other.state {
        elsewhere.state.entry(key.clone()).or_insert_with(|| event.clone());
    }
    // Both were sent at the same time, and the greater id wins.
    if carols.id() > elsewhere.state[&of_both].id() {
        elsewhere.state.insert(of_both, carols);
    }
    elsewhere.events.extend(other.events.split_off(elsewhere.events.len() - 4));
    elsewhere.say(&alice(), json!({ "body": "merged" }));
    let here = Here::new(0);
    let brought = elsewhere.brought();
    let join = elsewhere.join(&bob());
    here.join(&elsewhere.row, brought, &join).unwrap();
    let all = elsewhere.timeline.len() - 1;
    here.fill(elsewhere.older(0..all)).unwrap();
    here.assert_has(&elsewhere, 0);
    here.assert_is(&elsewhere);
    assert_eq!(here.hole(), None);
    // Events that come in now may stand on those of the past.
    let late = elsewhere.make(&alice(), MESSAGE, None, json!({ "body": "late" }));
    let mut json: serde_json::Value = serde_json::from_slice(late.json()).unwrap();
    json["prev_events"] = json!([elsewhere.timeline[branch].0.id()]);
    let late = Received::check(ROOM, &elsewhere.row, [7; 32], json.to_string().into()).unwrap();
    assert!(matches!(here.receive(&late), Outcome::Accepted(_)));
}

#[test]
fn a_hole_between_two_stays_closes_at_what_was_known() {
    let (mut elsewhere, here) = talkative();
    leave(&here, &mut elsewhere, &bob());
    let (before, old_tip, left) = (elsewhere.clone(), here.row().state_tip, elsewhere.timeline.len());
    for number in 0..12 {
        let member = user(&format!("later{number}:e.example"));
        elsewhere.join(&member);
        elsewhere.say(&member, json!({ "body": number }));
    }
    let brought = elsewhere.brought();
    let join = elsewhere.join(&bob());
    here.join(&elsewhere.row, brought, &join).unwrap();
    let all = elsewhere.timeline.len() - 1;
    let middle = (left + all) / 2;
    here.fill(elsewhere.older(middle..all)).unwrap();
    // The state before the first of the others is known, because the one that it stands on is.
    let mut rest = elsewhere.older(left..middle);
    rest[0].state_before = None;
    here.fill(rest).unwrap();
    let told: Vec<_> = here.timeline().into_iter().map(|(id, _)| id).collect();
    let expected = &elsewhere.timeline[left - 2..];
    assert_eq!(told, expected.iter().map(|(event, _)| event.id().to_owned()).collect::<Vec<_>>());
    here.assert_has(&elsewhere, left - 2);
    here.assert_is(&elsewhere);
    assert_eq!(here.state_at(StateRef::Main(old_tip)), before.ids());
    // The hole below the first stay is left.
    let (_, row) = find_hole(&*here.store.snapshot(), ROOM, Order::MAX).unwrap().unwrap();
    assert!(row.is_bottomless);
}

#[test]
fn events_without_what_they_stand_on_fill_nothing() {
    let (elsewhere, here) = talkative();
    let all = elsewhere.timeline.len() - 1;
    let mut older = elsewhere.older(all - 4..all);
    older[0].state_before = None;
    let before = here.timeline().len();
    assert!(matches!(here.fill(older).unwrap_err(), Error::Remote { .. }));
    let mut older = elsewhere.older(all - 4..all);
    older[0].state_before.as_mut().unwrap().push(OwnedEventId::try_from("$nowhere").unwrap());
    assert!(matches!(here.fill(older).unwrap_err(), Error::Remote { .. }));
    assert_eq!(here.timeline().len(), before);
    here.assert_is(&elsewhere);
    // One fill at a time, and none while the room is swept.
    let claim = here.rooms.turns(ROOM).claim_history().unwrap();
    assert!(here.rooms.turns(ROOM).claim_history().is_none());
    let mut change = Change::begin(&here.store, here.rooms.sit(ROOM), ROOM).unwrap();
    assert!(matches!(change.begin_sweep(here.rooms.resolver()), Err(Error::Busy { .. })));
    drop(claim);
    assert!(change.begin_sweep(here.rooms.resolver()).is_ok());
    assert!(here.rooms.turns(ROOM).claim_history().is_none());
}
