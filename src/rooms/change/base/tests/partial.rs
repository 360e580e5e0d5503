//! Joins of rooms whose members are left out, and learnt afterwards.

use proptest::{prelude::*, sample::Index};
use ruma::OwnedUserId;

use super::{super::super::Completion, *};
use crate::{
    rooms::change::{Omitted, left_out},
    schema::event_types::MESSAGE,
};

mod beside;

impl Here {
    /// Joins a room of which the members are left out of what is brought.
    fn join_without_members(&self, room: &Elsewhere, join: &Received) {
        let others = room.brought().into_iter().map(|brought| {
            let is_member = brought.event.event().event_type.to_string() == MEMBER;
            Brought { is_state: brought.is_state && !is_member, ..brought }
        });
        // Only events that allow others come of the members.
        let allowing: BTreeSet<_> = room
            .brought()
            .iter()
            .chain([&as_brought(join)])
            .flat_map(|it| list_allowing(&room.row, it.event.event()).unwrap())
            .collect();
        let others: Vec<_> =
            others.filter(|brought| brought.is_state || allowing.contains(brought.event.id())).collect();
        let servers = ["a.example", "b.example", "c.example", "gone.example"].map(str::to_owned).to_vec();
        let omitted = Omitted { us: "here.example".to_owned(), servers };
        let mut base = self.base(&room.row).without_members(omitted);
        let mut events = others.into_iter();
        loop {
            let mut change = base.begin_part(&self.store, self.rooms.sit(ROOM)).unwrap();
            let is_more = base.take(&mut change, &mut events).unwrap();
            self.enqueue(change);
            if !is_more {
                break;
            }
        }
        let (change, _) = base.finish(&self.store, self.rooms.sit(ROOM), join).unwrap().unwrap();
        self.enqueue(change);
        assert_eq!(self.row().resident, Resident::Partial);
        assert_eq!(self.faults(), [""; 0]);
    }

    fn enqueue(&self, change: Change) {
        drop(change.enqueue(&self.store).unwrap());
        self.store.flush().unwrap();
    }

    fn begin(&self) -> Change {
        Change::begin(&self.store, self.rooms.sit(ROOM), ROOM).unwrap()
    }

    /// Takes in some events of a state that was fetched, and learns them.
    fn learn(&self, events: &[Received]) {
        let mut change = self.begin();
        let mut values = Vec::new();
        for event in events {
            change.receive_fetched(event).unwrap();
            let num = change.find_num(event.id()).unwrap().unwrap();
            let kept = event::require_kept(&change.batch, ROOM, num).unwrap();
            values.extend(kept.row.header.state_key.map(|key| (key, StateValue::Event(num))));
        }
        change.learn(&values).unwrap();
        self.enqueue(change);
        assert_eq!(self.faults(), [""; 0]);
    }

    /// Judges again what came since the join, and makes the state whole.
    fn make_whole(&self) {
        let mut change = self.begin();
        change.note_filled();
        self.enqueue(change);
        loop {
            let mut change = self.begin();
            let is_more = change.release_servers(1).unwrap();
            self.enqueue(change);
            if !is_more {
                break;
            }
        }
        self.rooms.resolver().recent().forget(ROOM);
        let (mut from, mut is_changed) = (EventNum(0), false);
        loop {
            let mut change = self.begin();
            let revision = change.revise(from, self.rooms.resolver(), 0).unwrap();
            self.enqueue(change);
            assert!(revision.asks.is_none(), "nothing takes long in a small room");
            is_changed |= revision.is_changed;
            from = revision.next;
            if revision.is_end && std::mem::take(&mut is_changed) {
                from = EventNum(0);
            } else if revision.is_end {
                break;
            }
        }
        let mut change = self.begin();
        let completion = change.make_whole(from, self.rooms.resolver()).unwrap();
        assert!(matches!(completion, Completion::Whole), "{completion:?}");
        self.enqueue(change);
        self.rooms.resolver().recent().forget(ROOM);
    }

    /// The state before an event of the room.
    fn state_before_id(&self, id: &ruma::EventId) -> BTreeMap<Key, OwnedEventId> {
        let snapshot = self.store.snapshot();
        let num = event::find_num(&*snapshot, ROOM, id).unwrap().unwrap();
        let stored = event::require(&*snapshot, ROOM, num).unwrap();
        let below = || state::just_below(&*snapshot, ROOM, stored.order).unwrap();
        self.state_at(stored.row.header.before.unwrap_or_else(below))
    }
}

fn as_brought(event: &Received) -> Brought {
    Brought { event: event.clone(), is_state: false }
}

/// Something that happens elsewhere after our join.
#[derive(Clone, Debug)]
enum Act {
    Says(Index),
    Renames(Index),
    Leaves(Index),
    Joins(u8),
    Kicks(Index),
    Names,
    /// This server learns this many members meanwhile.
    Learns(usize),
}

fn an_act() -> impl Strategy<Value = Act> {
    prop_oneof![
        any::<Index>().prop_map(Act::Says),
        any::<Index>().prop_map(Act::Renames),
        any::<Index>().prop_map(Act::Leaves),
        any::<u8>().prop_map(Act::Joins),
        any::<Index>().prop_map(Act::Kicks),
        Just(Act::Names),
        (1_usize..6).prop_map(Act::Learns),
    ]
}

/// One of those who are joined elsewhere, Alice and our users aside.
fn one_of(room: &Elsewhere, index: &Index) -> Option<OwnedUserId> {
    let joined = room.members("join");
    let joined: Vec<_> =
        joined.into_iter().filter(|it| *it != alice() && !it.ends_with(":here.example")).collect();
    (!joined.is_empty()).then(|| OwnedUserId::try_from(index.get(&joined).as_str()).unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_room_whose_members_are_learnt_is_as_one_that_was_joined_whole(
        acts in prop::collection::vec(an_act(), 0..25),
        seed in any::<u64>(),
    ) {
        let mut elsewhere = Elsewhere::with_members(24);
        let here = Here::new(24);
        let mut unknown: Vec<Received> = elsewhere.state.values().cloned().collect();
        // The members are learnt in some order.
        unknown.sort_by_key(|event| {
            let hash = event.id().as_bytes().iter().fold(seed, |hash, byte| hash.rotate_left(5) ^ u64::from(*byte));
            hash.wrapping_mul(0x9E37_79B9_7F4A_7C15)
        });
        let before_join = elsewhere.clone();
        let join = elsewhere.join(&bob());
        here.join_without_members(&before_join, &join);
        for act in acts {
            let member = |membership: &str, name: u64| json!({ "membership": membership, "displayname": name.to_string() });
            let depth = elsewhere.timeline.len() as u64;
            let made = match act {
                Act::Says(index) => {
                    let sender = one_of(&elsewhere, &index).unwrap_or_else(alice);
                    elsewhere.make(&sender, MESSAGE, None, json!({ "body": depth }))
                }
                Act::Renames(index) => match one_of(&elsewhere, &index) {
                    Some(user) => elsewhere.make(&user, MEMBER, Some(user.as_str()), member("join", depth)),
                    None => continue,
                },
                Act::Leaves(index) => match one_of(&elsewhere, &index) {
                    Some(user) => elsewhere.make(&user, MEMBER, Some(user.as_str()), member("leave", depth)),
                    None => continue,
                },
                Act::Joins(number) => {
                    let user = user(&format!("new{}:{}.example", number / 3, ["a", "b", "d"][usize::from(number % 3)]));
                    elsewhere.make(&user, MEMBER, Some(user.as_str()), member("join", depth))
                }
                Act::Kicks(index) => match one_of(&elsewhere, &index) {
                    Some(user) => elsewhere.make(&alice(), MEMBER, Some(user.as_str()), member("leave", depth)),
                    None => continue,
                },
                Act::Names => elsewhere.make(&alice(), "m.room.name", Some(""), json!({ "name": depth })),
                Act::Learns(count) => {
                    let some = unknown.split_off(unknown.len().saturating_sub(count));
                    here.learn(&some);
                    continue;
                }
            };
            // Events that allow this one are fetched where they are not known.
            let mut change = here.begin();
            for id in list_allowing(&elsewhere.row, made.event()).unwrap() {
                if change.find_num(&id).unwrap().is_none() {
                    let allowing = elsewhere.events.iter().find(|event| *event.id() == *id).unwrap();
                    change.receive_outlier(allowing).unwrap();
                }
            }
            here.enqueue(change);
            elsewhere.add(&made);
            let outcome = here.receive(&made);
            prop_assert!(matches!(outcome, Outcome::Accepted(_)), "{:?}", outcome);
            let servers: Vec<_> = members::list_servers(&*here.store.snapshot(), ROOM).unwrap().map(Result::unwrap).collect();
            prop_assert!(servers.contains(&"gone.example".to_owned()) && servers.contains(&"b.example".to_owned()));
        }
        here.learn(&unknown);
        here.make_whole();
        here.assert_is(&elsewhere);
        let row = here.row();
        prop_assert!(row.resident == Resident::Yes && row.partial.is_none() && row.filled_at.is_some());
        for (event, before) in elsewhere.timeline.iter().skip(before_join.timeline.len()) {
            let before: BTreeMap<_, _> = before.iter().map(|(key, event)| (key.clone(), event.id().to_owned())).collect();
            prop_assert_eq!(here.state_before_id(event.id()), before);
        }
    }
}

#[test]
fn learning_goes_on_after_a_crash_at_any_step() {
    let mut elsewhere = Elsewhere::with_members(24);
    let here = Here::new(24);
    let unknown: Vec<Received> = elsewhere.state.values().cloned().collect();
    let before_join = elsewhere.clone();
    let join = elsewhere.join(&bob());
    here.join_without_members(&before_join, &join);
    for event_type in ["m.room.name", "x"] {
        let made = elsewhere.make(&alice(), event_type, Some(""), json!({}));
        elsewhere.add(&made);
        let mut change = here.begin();
        for allowing in &before_join.events {
            if made.event().auth.iter().any(|id| **id == *allowing.id()) {
                change.receive_outlier(allowing).unwrap();
            }
        }
        here.enqueue(change);
        assert!(matches!(here.receive(&made), Outcome::Accepted(_)));
    }
    let kept = Arc::new(Mutex::new(Vec::new()));
    let keeps = Arc::clone(&kept);
    here.store.watch(move |store| {
        store.flush().unwrap();
        if let Engine::Memory(memory) = store.engine() {
            keeps.lock().push(memory.after_crash(usize::MAX));
        }
    });
    for some in unknown.chunks(6) {
        here.learn(some);
    }
    here.make_whole();
    let crashes = here.stop_keeping(&kept);
    here.assert_is(&elsewhere);
    assert!(crashes.len() > 8, "{} steps", crashes.len());
    for crash in crashes {
        let here = Here::over(crash);
        assert_eq!(here.faults(), [""; 0]);
        here.learn(&unknown);
        here.make_whole();
        here.assert_is(&elsewhere);
    }
}

#[test]
fn somebody_who_left_comes_back_by_a_new_invitation() {
    let mut elsewhere = Elsewhere::new(VERSION);
    elsewhere.set(&alice(), "m.room.join_rules", "", json!({ "join_rule": "invite" }));
    let here = Here::new(0);
    for _ in 0..2 {
        elsewhere.set(&alice(), MEMBER, bob().as_str(), json!({ "membership": "invite" }));
        let before_join = elsewhere.clone();
        let join = elsewhere.join(&bob());
        here.join_without_members(&before_join, &join);
        let unknown: Vec<Received> = before_join.state.values().cloned().collect();
        here.learn(&unknown);
        here.make_whole();
        here.assert_is(&elsewhere);
        let leave = elsewhere.make(&bob(), MEMBER, Some(bob().as_str()), json!({ "membership": "leave" }));
        elsewhere.add(&leave);
        assert!(matches!(here.receive(&leave), Outcome::Accepted(_)));
    }
}

#[test]
fn a_server_that_came_since_goes_with_its_last_member_and_one_that_was_there_may_have_more() {
    let mut elsewhere = Elsewhere::new(VERSION);
    let here = Here::new(0);
    let before_join = elsewhere.clone();
    let join = elsewhere.join(&bob());
    here.join_without_members(&before_join, &join);
    let servers = || -> Vec<String> {
        let snapshot = here.store.snapshot();
        members::list_servers(&*snapshot, ROOM).unwrap().map(Result::unwrap).collect()
    };
    let named = servers();
    assert!(named.contains(&"b.example".to_owned()), "{named:?}");
    let mut go = |membership: &str| {
        for user in ["@new:b.example", "@new:d.example"].map(user) {
            let made =
                elsewhere.make(&user, MEMBER, Some(user.as_str()), json!({ "membership": membership }));
            elsewhere.add(&made);
            assert!(matches!(here.receive(&made), Outcome::Accepted(_)));
        }
    };
    go("join");
    assert_eq!(servers().len(), named.len() + 1, "{:?}", servers());
    go("leave");
    assert_eq!(servers(), named);
    go("join");
    let unknown: Vec<Received> = before_join.state.values().cloned().collect();
    here.learn(&unknown);
    here.make_whole();
    here.assert_is(&elsewhere);
}

#[test]
fn the_state_of_an_earlier_stay_becomes_whole_after_that_of_the_one_now() {
    let carol = user("carol:c.example");
    let mut elsewhere = Elsewhere::with_members(6);
    elsewhere.join(&carol);
    let here = Here::new(6);
    let mut stays = Vec::new();
    for _ in 0..2 {
        let before_join = elsewhere.clone();
        let join = elsewhere.join(&bob());
        here.join_without_members(&before_join, &join);
        stays.push((before_join, elsewhere.clone(), StateRef::Main(here.row().tip)));
        if stays.len() == 1 {
            leave(&here, &mut elsewhere, &bob());
            elsewhere.say(&alice(), json!({ "body": "not heard here" }));
        }
    }
    let known = |room: &Elsewhere| room.state.values().cloned().collect::<Vec<_>>();
    here.learn(&known(&stays[1].0));
    here.make_whole();
    here.assert_is(&elsewhere);
    let is_told = || left_out::require_whole(&*here.store.snapshot(), ROOM).is_ok();
    assert_eq!((here.row().resident, here.row().earlier.len(), is_told()), (Resident::Yes, 1, false));
    // Carol speaks on the first join, before which nobody knows of her.
    let (_, mut fork, at_first) = stays[0].clone();
    let said = fork.say(&carol, json!({ "body": "you are here" }));
    let outcome = here.receive(&said);
    assert!(matches!(outcome, Outcome::Aside(..)), "{outcome:?}");
    assert!(here.state_at(at_first).len() < fork.ids().len());
    let tip = here.row().state_tip;
    here.learn(&known(&stays[0].0));
    assert_eq!(here.row().state_tip, tip, "the room is as it was");
    here.assert_is(&elsewhere);
    here.make_whole();
    here.assert_is(&elsewhere);
    assert_eq!(here.row().earlier, []);
    assert!(is_told());
    assert_eq!(here.state_at(at_first), fork.ids());
    assert_eq!(here.state_at(stays[1].2), stays[1].1.ids());
    assert_eq!(here.state_before_id(said.id()), fork.ids());
    let snapshot = here.store.snapshot();
    let num = event::find_num(&*snapshot, ROOM, said.id()).unwrap().unwrap();
    let place = schema::PLACE.get(&*snapshot, (ROOM, num)).unwrap();
    assert!(matches!(place, Some(Place::Timeline(_))), "{place:?}");
}

#[test]
fn only_the_latest_stays_are_remembered_and_are_given_up_together() {
    let mut elsewhere = Elsewhere::new(VERSION);
    let here = Here::new(0);
    for stay in 0..7 {
        let before_join = elsewhere.clone();
        let join = elsewhere.join(&bob());
        here.join_without_members(&before_join, &join);
        assert_eq!(here.row().earlier.len(), stay.min(4));
        leave(&here, &mut elsewhere, &bob());
        elsewhere.say(&alice(), json!({ "body": "not heard here" }));
    }
    let before_join = elsewhere.clone();
    let join = elsewhere.join(&bob());
    here.join_without_members(&before_join, &join);
    let earlier = here.row().earlier.last().unwrap().state.join;
    let give_up = || {
        let mut change = here.begin();
        change.give_up_stays(earlier).unwrap();
        here.enqueue(change);
        here.row().earlier.len()
    };
    assert_eq!(give_up(), 4, "the stay of now comes first");
    here.learn(&before_join.state.values().cloned().collect::<Vec<_>>());
    here.make_whole();
    assert_eq!(give_up(), 0);
    here.assert_is(&elsewhere);
}
