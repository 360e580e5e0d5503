//! Holes that are filled with events from before a join.

use super::*;
use crate::{
    rooms::{
        change::{Backfill, Filling, Older, Signed},
        redact, resolve,
        state::Sketch,
        timeline,
        visibility::Sight,
    },
    schema::event_types::MESSAGE,
    store::{LogEntry, tables},
};

impl Here {
    fn hole(&self) -> Option<Order> {
        find_hole(&*self.store.snapshot(), ROOM, Order::MAX).unwrap().map(|(hole, _)| hole)
    }

    /// Fills the highest hole of the room with these events.
    fn fill(&self, older: Vec<Older>) -> Result<()> {
        self.fill_while(older, |_| ())
    }

    /// Fills the highest hole of the room with these events, while something else is done between the turns.
    fn fill_while(&self, older: Vec<Older>, mut between: impl FnMut(usize)) -> Result<()> {
        let mut turns = 0;
        let claim = self.rooms.turns(ROOM).claim_history().unwrap();
        let mut backfill = Backfill::new(claim, self.hole().unwrap(), older, "a.example".to_owned());
        loop {
            let mut change = Change::begin(&self.store, self.rooms.sit(ROOM), ROOM)?;
            let filling = change.fill(&mut backfill, self.rooms.resolver())?;
            // The log says that a part of a hole was filled, and nothing of its events.
            assert!(change.batch.position_count() <= 1, "nothing of its events is in the log");
            assert!(change.wakes_only.as_ref().is_none_or(Vec::is_empty), "nobody is woken");
            let answered = std::mem::take(&mut change.answered);
            let base = change.enqueue(&self.store)?.base;
            self.rooms.resolver().keep(ROOM, answered, base);
            self.store.flush().unwrap();
            turns += 1;
            between(turns);
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

    fn log_len(&self) -> usize {
        let snapshot = self.store.snapshot();
        let entries = tables::LOG.prefix::<()>(&*snapshot, (), Direction::Up).unwrap();
        entries.filter(|entry| !matches!(entry, Ok((_, LogEntry::Filled { .. })))).count()
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
    assert_eq!((count.count, count.needed), (0, 0));
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
    let Some(crate::rooms::change::Before::Ids(ids)) = &mut older[0].state_before else {
        panic!("a state was fetched")
    };
    ids.push(OwnedEventId::try_from("$nowhere").unwrap());
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

#[test]
fn an_event_that_is_listed_twice_fills_a_hole_once() {
    let (elsewhere, here) = talkative();
    let (from, to) = (elsewhere.timeline.len() - 9, elsewhere.timeline.len() - 1);
    let mut older = Vec::new();
    for one in elsewhere.older(from..to) {
        older.extend([one.clone(), Older { state_before: None, ..one }]);
    }
    here.fill(older).unwrap();
    here.assert_has(&elsewhere, from);
    here.assert_is(&elsewhere);
}

#[test]
fn an_event_that_comes_in_by_itself_while_a_hole_is_filled_stands_once() {
    // Whenever it comes, it has one place, and all rows fit together.
    for turn in 1..9 {
        let (mut elsewhere, here) = talkative();
        leave(&here, &mut elsewhere, &bob());
        let left = elsewhere.timeline.len();
        let late = user("later:e.example");
        elsewhere.join(&late);
        for number in 0..5 {
            elsewhere.say(&late, json!({ "body": number }));
        }
        let brought = elsewhere.brought();
        let join = elsewhere.join(&bob());
        here.join(&elsewhere.row, brought, &join).unwrap();
        let all = elsewhere.timeline.len() - 1;
        let mut rest = elsewhere.older(left..all);
        rest[0].state_before = None;
        let came = |turns| {
            if turns == turn {
                // The first of them stands on what was known from the first stay.
                for (event, _) in &elsewhere.timeline[left..left + 3] {
                    let outcome = here.receive(event);
                    assert!(matches!(outcome, Outcome::Accepted(_) | Outcome::Known(_)), "{outcome:?}");
                }
            }
        };
        here.fill_while(rest, came).unwrap();
        let mut told: Vec<_> = here.timeline().into_iter().map(|(id, _)| id).collect();
        let count = told.len();
        told.sort();
        told.dedup();
        assert_eq!(told.len(), count, "in turn {turn} an event is there twice");
        for (event, _) in &elsewhere.timeline[left..all] {
            assert!(told.contains(&event.id().to_owned()));
        }
        assert_eq!(here.faults(), [""; 0], "turn {turn}");
    }
}

#[test]
fn a_rejected_event_of_a_hole_is_redacted_as_any_other() {
    // The redaction waits for the event, or has redacted the outlier that it was.
    for is_outlier in [false, true] {
        let mut elsewhere = Elsewhere::new(VERSION);
        let carol = user("carol:c.example");
        elsewhere.join(&carol);
        let state = elsewhere.state.clone();
        elsewhere.set(&carol, "m.room.name", "", json!({ "name": "mine" }));
        elsewhere.state = state;
        let name = elsewhere.timeline.last().unwrap().0.clone();
        let here = Here::new(0);
        let mut brought = elsewhere.brought();
        brought.retain(|it| is_outlier || it.event.id() != name.id());
        let join = elsewhere.join(&bob());
        let all = elsewhere.timeline.len() - 1;
        here.join(&elsewhere.row, brought, &join).unwrap();
        let redaction = elsewhere.make(&alice(), "m.room.redaction", None, json!({ "redacts": name.id() }));
        assert!(matches!(here.receive(&redaction), Outcome::Accepted(_)));
        here.fill(elsewhere.older(0..all)).unwrap();
        let snapshot = here.store.snapshot();
        let num = event::find_num(&*snapshot, ROOM, name.id()).unwrap().unwrap();
        let aside = schema::ASIDE.get(&*snapshot, (ROOM, num)).unwrap().unwrap();
        assert!(aside.rejected && aside.row.is_redacted(), "{is_outlier}");
        assert!(!std::str::from_utf8(&aside.row.json).unwrap().contains("mine"));
        assert_eq!(here.faults(), [""; 0]);
    }
}

#[test]
fn a_rejected_event_of_a_hole_leaves_no_row_where_there_is_no_place_aside() {
    let mut elsewhere = Elsewhere::new(VERSION);
    // Carol is not in the room, and others stand on what she says all the same.
    elsewhere.say(&user("carol:c.example"), json!({ "body": "not allowed" }));
    let here = Here::new(0);
    let brought = elsewhere.brought();
    let join = elsewhere.join(&bob());
    here.join(&elsewhere.row, brought, &join).unwrap();
    let mut number = 0;
    loop {
        let outlier = elsewhere.make(&alice(), "x", Some(&format!("aside {number}")), json!({}));
        let mut change = Change::begin(&here.store, here.rooms.sit(ROOM), ROOM).unwrap();
        let outcome = change.receive_outlier(&outlier).unwrap();
        drop(change.enqueue(&here.store).unwrap());
        if matches!(outcome, Outcome::Unknown) {
            break;
        }
        number += 1;
    }
    here.store.flush().unwrap();
    let all = elsewhere.timeline.len() - 1;
    here.fill(elsewhere.older(0..all)).unwrap();
    assert_eq!(here.faults(), [""; 0]);
}

#[test]
fn a_state_that_is_far_from_the_hole_is_kept_once_for_all_events_of_a_fill() {
    let mut elsewhere = Elsewhere::new(VERSION);
    let here = Here::new(0);
    for number in 0..10 {
        elsewhere.say(&alice(), json!({ "body": number }));
    }
    // The state above the hole has many more keys than those before its events.
    for number in 0..300 {
        elsewhere.set(&alice(), "x", &number.to_string(), json!({ "n": number }));
    }
    let brought = elsewhere.brought();
    let join = elsewhere.join(&bob());
    here.join(&elsewhere.row, brought, &join).unwrap();
    let sides = here.row().next_side;
    let older: Vec<_> = elsewhere.timeline[4..14]
        .iter()
        .map(|(event, before)| Older {
            event: event.clone(),
            state_before: Some(crate::rooms::change::Before::Ids(
                before.values().map(|event| event.id().to_owned()).collect(),
            )),
        })
        .collect();
    // No sweep begins meanwhile, because nothing stored needs that state yet.
    let between = |_| {
        let mut change = Change::begin(&here.store, here.rooms.sit(ROOM), ROOM).unwrap();
        assert!(matches!(change.begin_sweep(here.rooms.resolver()), Err(Error::Busy { .. })));
    };
    here.fill_while(older, between).unwrap();
    assert!(here.row().next_side > sides, "the state is written down");
    assert_eq!(here.faults(), [""; 0]);
    here.end_sweep(&mut here.begin_sweep());
    assert_eq!(here.faults(), [""; 0]);
    for (event, before) in &elsewhere.timeline[4..14] {
        let (snapshot, room) = (here.store.snapshot(), here.row());
        let stored = event::find_by_id(&*snapshot, ROOM, event.id()).unwrap().unwrap();
        let mut there = elsewhere.clone();
        there.state.clone_from(before);
        assert_eq!(here.state_at(here.state_before(&stored)), there.ids(), "{}", stored.id(&room));
    }
    let told: Vec<_> = here.timeline().into_iter().take(10).map(|(id, _)| id).collect();
    let expected = elsewhere.timeline[4..14].iter().map(|(event, _)| event.id().to_owned());
    assert_eq!(told, expected.collect::<Vec<_>>());
}

fn relates(kind: &str, to: &Received) -> serde_json::Value {
    json!({ "body": "x", "m.relates_to": { "rel_type": kind, "event_id": to.id(), "key": "k" } })
}

#[test]
fn what_refers_to_an_event_counts_once_a_fill_brings_that() {
    let mut elsewhere = Elsewhere::new(VERSION);
    let here = Here::new(0);
    let root = elsewhere.say(&alice(), json!({ "body": "root" }));
    // A thread, and an edit and a reaction to what stands in it, which come with other parts of the fill.
    let reply = elsewhere.say(&alice(), relates("m.thread", &root));
    for number in 0..8 {
        elsewhere.say(&alice(), json!({ "body": number }));
    }
    elsewhere.say(&alice(), relates("m.annotation", &reply));
    let brought = elsewhere.brought();
    let join = elsewhere.join(&bob());
    here.join(&elsewhere.row, brought, &join).unwrap();
    let all = elsewhere.timeline.len() - 1;
    let mut edit = relates("m.replace", &root);
    edit["m.new_content"] = json!({ "body": "new" });
    let mut redacted = None;
    for content in [
        relates("m.thread", &root),
        edit,
        relates("m.reference", &root),
        relates("m.annotation", &root),
        relates("m.annotation", &reply),
        relates("m.reference", &root),
        relates("m.reference", &reply),
    ] {
        let said = elsewhere.say(&alice(), content);
        assert!(matches!(here.receive(&said), Outcome::Accepted(_)));
        redacted = Some(said);
    }
    let waiting = || {
        let snapshot = here.store.snapshot();
        schema::RELATION_WAITING.prefix::<()>(&*snapshot, (), Direction::Up).unwrap().count()
    };
    assert_eq!(waiting(), 7);
    // An event that is redacted refers to nothing any more.
    let redaction = json!({ "redacts": redacted.unwrap().id() });
    let redaction = elsewhere.make(&alice(), "m.room.redaction", None, redaction);
    elsewhere.add(&redaction);
    assert!(matches!(here.receive(&redaction), Outcome::Accepted(_)));
    assert_eq!(waiting(), 6);
    assert_eq!(here.faults(), [""; 0]);
    here.fill(elsewhere.older(0..all)).unwrap();
    assert_eq!((waiting(), here.faults()), (0, Vec::new()));
    let snapshot = here.store.snapshot();
    let num = |event: &Received| event::find_num(&*snapshot, ROOM, event.id()).unwrap().unwrap();
    let related = schema::RELATED.get(&*snapshot, (ROOM, num(&root))).unwrap().unwrap();
    assert_eq!((related.thread_count, related.reference_count), (2, 2));
    assert!(related.edit.is_some());
    let of_reply =
        schema::RELATION.prefix::<(RoomNum, EventNum)>(&*snapshot, (ROOM, num(&reply)), Direction::Up);
    assert_eq!(of_reply.unwrap().count(), 2);
}

#[test]
fn a_flood_of_events_that_refer_to_nothing_waits_in_bounds() {
    let mut elsewhere = Elsewhere::new(VERSION);
    let here = Here::new(0);
    let root = elsewhere.say(&alice(), json!({ "body": "root" }));
    let brought = elsewhere.brought();
    let join = elsewhere.join(&bob());
    here.join(&elsewhere.row, brought, &join).unwrap();
    let all = elsewhere.timeline.len() - 1;
    for _ in 0..20 {
        let said = elsewhere.say(&alice(), relates("m.reference", &root));
        assert!(matches!(here.receive(&said), Outcome::Accepted(_)));
    }
    let waiting = || {
        let snapshot = here.store.snapshot();
        schema::RELATION_WAITING.prefix::<()>(&*snapshot, (), Direction::Up).unwrap().count()
    };
    assert_eq!(waiting(), 5);
    here.fill(elsewhere.older(0..all)).unwrap();
    assert_eq!((waiting(), here.faults()), (0, Vec::new()));
}

#[test]
fn nobody_is_kept_out_of_the_past_by_a_state_that_one_server_gave() {
    let (elsewhere, here) = talkative();
    let (from, all) = (elsewhere.timeline.len() - 12, elsewhere.timeline.len() - 1);
    // The server leaves out everybody but Alice, as far as the states say that rest on its word.
    let mut older = elsewhere.older(from..all);
    let Some(crate::rooms::change::Before::Ids(ids)) = &mut older[0].state_before else {
        panic!("a state was fetched")
    };
    let of_others = elsewhere.events.iter().filter(|it| it.event().sender != alice());
    let of_others: BTreeSet<_> = of_others.map(|event| event.id().to_owned()).collect();
    ids.retain(|id| !of_others.contains(id));
    here.fill(older).unwrap();
    let told: BTreeSet<_> = here.timeline().into_iter().map(|(id, _)| id).collect();
    let snapshot = here.store.snapshot();
    let mut missing = 0;
    for (event, _) in &elsewhere.timeline[from..all] {
        missing += usize::from(!told.contains(event.id()));
        let num = event::find_num(&*snapshot, ROOM, event.id()).unwrap();
        let place = num.and_then(|num| schema::PLACE.get(&*snapshot, (ROOM, num)).unwrap());
        assert_ne!(place, Some(Place::Aside), "it is not rejected for that");
    }
    assert!(missing > 0, "the state does keep somebody out");
    here.assert_is(&elsewhere);
    assert!(here.hole().is_some(), "what is missing is asked for again");
}

#[test]
fn an_event_that_a_join_brought_whole_stays_so_when_others_show_less_of_it() {
    let mut elsewhere = Elsewhere::new(VERSION);
    elsewhere.set(&alice(), "m.room.server_acl", "", json!({ "allow": ["*"] }));
    let acl = elsewhere.timeline.last().unwrap().0.clone();
    let here = Here::new(0);
    let brought = elsewhere.brought();
    let join = elsewhere.join(&bob());
    here.join(&elsewhere.row, brought, &join).unwrap();
    let all = elsewhere.timeline.len() - 1;
    let mut older = elsewhere.older(0..all);
    for one in &mut older {
        if one.event.id() == acl.id() {
            let shown = redact::redacted(acl.json(), crate::rooms::rules(&elsewhere.row).unwrap()).unwrap();
            let cut = Signed::read(ROOM, &elsewhere.row, &shown).unwrap();
            assert!(cut.is_redacted());
            one.event = cut.into_verified();
        }
    }
    here.fill(older).unwrap();
    here.assert_has(&elsewhere, 0);
    let timeline = here.timeline();
    let (_, stored) = timeline.iter().find(|(id, _)| id == acl.id()).unwrap();
    assert_eq!(stored.row.json, *acl.json());
    assert_eq!(here.faults(), [""; 0]);
}

#[test]
fn an_event_from_before_the_join_is_not_seen_because_it_fills_a_hole_above_it() {
    let mut elsewhere = Elsewhere::new(VERSION);
    elsewhere.set(&alice(), "m.room.history_visibility", "", json!({ "history_visibility": "joined" }));
    let mut other = elsewhere.clone();
    let hidden = other.say(&alice(), json!({ "body": "before Bob came" }));
    let before = other.state.clone();
    let late = other.say(&alice(), json!({ "body": "told late" }));
    let here = Here::new(0);
    let brought = elsewhere.brought();
    let join = elsewhere.join(&bob());
    here.join(&elsewhere.row, brought, &join).unwrap();
    // The last event of the branch that does not know of the join comes first, with the state before it.
    let snapshot = here.store.snapshot();
    let tip = StateRef::Main(here.row().state_tip);
    let num = |event: &Received| event::find_num(&*snapshot, ROOM, event.id()).unwrap().unwrap();
    let brought = before.values().map(|event| {
        let stored = event::require(&*snapshot, ROOM, num(event)).unwrap();
        (stored.row.header.state_key.unwrap(), num(event))
    });
    let differing = state::differing_from(&*snapshot, ROOM, tip, &brought.collect()).unwrap();
    let fetched = Sketch::from(tip).with(differing.into_iter().map(|(key, _, val)| (key, val)));
    let mut change = Change::begin(&here.store, here.rooms.sit(ROOM), ROOM).unwrap();
    let step = change.receive_with(&late, Some(&fetched), None, here.rooms.resolver(), 0).unwrap();
    assert!(matches!(step, Step::Done(Outcome::Accepted(_))), "{step:?}");
    drop(change.enqueue(&here.store).unwrap());
    here.store.flush().unwrap();
    let ids = before.values().map(|event| event.id().to_owned()).collect();
    let state_before = Some(crate::rooms::change::Before::Ids(ids));
    here.fill(vec![Older { event: hidden.clone(), state_before }]).unwrap();
    let snapshot = here.store.snapshot();
    let mut sight = Sight::of(&*snapshot, ROOM, here.num("bob:here.example"), &bob()).unwrap();
    let seen: Vec<_> = here
        .timeline()
        .into_iter()
        .filter(|(_, stored)| sight.can_see(&*snapshot, stored).unwrap())
        .map(|(id, _)| id)
        .collect();
    assert!(here.timeline().iter().any(|(id, _)| id == hidden.id()), "it is there");
    assert!(!seen.contains(&hidden.id().to_owned()) && seen.contains(&join.id().to_owned()), "{seen:?}");
}
