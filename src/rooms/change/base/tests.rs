//! Joins of rooms that other servers made.

use std::collections::BTreeSet;

use parking_lot::Mutex;
use ruma::OwnedUserId;
use serde_json::json;

use super::{
    elsewhere::{Elsewhere, Key, ROOM, VERSION, alice, bob, content, user},
    *,
};
use crate::{
    accounts::users::{self, NewUser},
    env::Env,
    ids::Order,
    metrics::Metrics,
    rooms::{
        Rooms,
        build::{self, Draft},
        change::{
            Outcome, Step,
            sweep::{Sweep, Swept},
        },
        find_room, graph,
        resolve::Resolver,
        state::find_hole,
    },
    store::{Direction, Durability, Engine, Guard, check, engine::Memory, tables::TableInfo},
};

/// The server `here.example`, which joins rooms.
struct Here {
    store: Store,
    rooms: Rooms,
}

impl Here {
    fn over(memory: Memory) -> Self {
        let store = Store::open(Engine::Memory(memory), Durability::Os).unwrap();
        let resolver = Resolver::new(Env::simulated(1, 0), Metrics::new());
        let key = build::tests::a_key();
        let rooms =
            Rooms::open(&*store.snapshot(), "here.example".try_into().unwrap(), key, resolver).unwrap();
        Self { store, rooms }
    }

    /// A server with users who have the names of those in the room.
    fn new(members: usize) -> Self {
        let here = Self::over(Memory::default());
        let names = (0..members).flat_map(|number| {
            [format!("user{number}:here.example"), format!("invited{number}:here.example")]
        });
        for (number, name) in names.chain(["bob:here.example".to_owned()]).enumerate() {
            let mut batch = here.store.batch(&Guard::alone());
            let new = NewUser { user_id: user(&name), is_admin: false, is_guest: false, now_ms: 1 };
            users::create(&mut batch, UserNum(number as u64 + 1), &new);
            drop(here.store.enqueue(batch).unwrap());
        }
        here.store.flush().unwrap();
        here
    }

    fn num(&self, name: &str) -> UserNum {
        users::find_num(&*self.store.snapshot(), &user(name)).unwrap().unwrap()
    }

    fn base(&self, room: &RoomRow) -> Base {
        let claim = self.rooms.turns(ROOM).claim_join().unwrap();
        Base::new(&*self.store.snapshot(), claim, (room.id.clone(), room.version), "a.example".to_owned())
            .unwrap()
    }

    /// Joins a room by what another server brings.
    fn join(
        &self,
        room: &RoomRow,
        brought: impl IntoIterator<Item = Brought>,
        join: &Received,
    ) -> Result<()> {
        let mut base = self.base(room);
        let mut events = brought.into_iter();
        loop {
            let mut change = base.begin_part(&self.store, self.rooms.sit(ROOM))?;
            let is_more = base.take(&mut change, &mut events)?;
            drop(change.enqueue(&self.store)?);
            self.store.flush().unwrap();
            if !is_more {
                break;
            }
        }
        let (change, _) = base.finish(&self.store, self.rooms.sit(ROOM), join)?.unwrap();
        drop(change.enqueue(&self.store)?);
        self.store.flush().unwrap();
        Ok(())
    }

    /// Takes back what an unfinished join has left.
    fn clear(&self) {
        drop(Change::begin(&self.store, self.rooms.sit(ROOM), ROOM));
        self.store.flush().unwrap();
    }

    fn keep_crashes(&self) -> Arc<Mutex<Vec<Memory>>> {
        let kept = Arc::new(Mutex::new(Vec::new()));
        let keeps = Arc::clone(&kept);
        self.store.watch(move |store| {
            store.flush().unwrap();
            let is_open = stage::find(&*store.snapshot(), ROOM).unwrap().is_some();
            if let (true, Engine::Memory(memory)) = (is_open, store.engine()) {
                keeps.lock().push(memory.after_crash(usize::MAX));
            }
        });
        kept
    }

    fn stop_keeping(&self, kept: &Mutex<Vec<Memory>>) -> Vec<Memory> {
        self.store.watch(|_| ());
        std::mem::take(&mut *kept.lock())
    }

    fn faults(&self) -> Vec<String> {
        let tables: Vec<_> = schema::all().collect();
        check::check(&self.store, &tables, &crate::rooms::check::checks, &mut |_| ()).unwrap().findings
    }

    /// Counts the rows of all tables but the log's, and but those that say that a step took a row away.
    fn row_count(&self) -> usize {
        let snapshot = self.store.snapshot();
        let count = |table: &TableInfo| {
            let rows = snapshot.range_raw(table.family, vec![table.id], vec![table.id + 1], Direction::Up);
            rows.unwrap().count()
        };
        let near = schema::ROOM_USER.prefix::<()>(&*snapshot, (), Direction::Up).unwrap();
        let taken_away = near.filter(|row| row.as_ref().unwrap().1.now.is_none()).count();
        schema::all().map(count).sum::<usize>() - taken_away
    }

    fn row(&self) -> RoomRow {
        crate::rooms::require_row(&*self.store.snapshot(), ROOM).unwrap()
    }

    fn state_at(&self, at: StateRef) -> BTreeMap<Key, OwnedEventId> {
        let (snapshot, room) = (self.store.snapshot(), self.row());
        let named = state::full(&*snapshot, ROOM, at).unwrap().map(|row| {
            let (key, num) = row.unwrap();
            let name = state::key_name(&*snapshot, ROOM, key).unwrap().unwrap();
            (name, event::require(&*snapshot, ROOM, num).unwrap().id(&room))
        });
        named.collect()
    }

    /// Checks that everything which readers find of the room is what its state says.
    fn assert_is(&self, room: &Elsewhere) {
        let now = StateRef::Main(Order::MAX);
        let tip = state::tip(&*self.store.snapshot(), ROOM).unwrap();
        assert_eq!(self.state_at(tip), room.ids());
        let (snapshot, joined) = (self.store.snapshot(), room.members("join"));
        assert_eq!(
            (self.row().joined as usize, self.row().invited as usize),
            (joined.len(), room.members("invite").len())
        );
        assert_eq!(members::count_joined_at(&*snapshot, ROOM, now).unwrap(), joined.len() as u64);
        let servers: BTreeSet<_> =
            joined.iter().map(|user| user.split_once(':').unwrap().1.to_owned()).collect();
        assert_eq!(
            members::list_servers_at(&*snapshot, ROOM, now).unwrap(),
            servers.into_iter().collect::<Vec<_>>()
        );
        let near = |membership: &str| {
            room.members(membership).into_iter().filter(|user| user.ends_with(":here.example"))
        };
        let near: BTreeSet<_> = near("join").chain(near("invite")).map(|user| self.num(&user[1..])).collect();
        assert_eq!(
            members::list_local_users(&*snapshot, ROOM).unwrap(),
            near.into_iter().collect::<Vec<_>>()
        );
        assert_eq!(self.faults(), [""; 0]);
    }

    /// Checks that nobody finds anything of the room.
    fn assert_unseen(&self, room: &Elsewhere) {
        let snapshot = self.store.snapshot();
        assert_eq!(members::list_local_users(&*snapshot, ROOM).unwrap(), []);
        for user in schema::USERS.prefix::<()>(&*snapshot, (), Direction::Up).unwrap() {
            assert!(members::find(&*snapshot, user.unwrap().0, ROOM).unwrap().is_none());
        }
        assert!(crate::rooms::require_room(&*snapshot, &room.row.id).is_err());
        assert_eq!(self.faults(), [""; 0]);
    }

    fn begin_sweep(&self) -> Sweep {
        let mut change = Change::begin(&self.store, self.rooms.sit(ROOM), ROOM).unwrap();
        let began = change.begin_sweep(self.rooms.resolver()).unwrap();
        drop(change);
        Sweep::look(&*self.store.snapshot(), began).unwrap()
    }

    /// Goes on with a sweep to its end. Tells how often events were cited meanwhile.
    fn end_sweep(&self, sweep: &mut Sweep) -> usize {
        let mut cited_times = 0;
        loop {
            let mut change = Change::begin(&self.store, self.rooms.sit(ROOM), ROOM).unwrap();
            let swept = change.sweep(sweep).unwrap();
            drop(change.enqueue(&self.store).unwrap());
            self.store.flush().unwrap();
            match swept {
                Swept::All => break,
                Swept::Part => {}
                Swept::Cited(cited) => {
                    cited_times += 1;
                    sweep.need_cited(&*self.store.snapshot(), &cited).unwrap();
                }
            }
        }
        self.rooms.turns(ROOM).end_sweep();
        cited_times
    }

    /// Receives an event of the room.
    fn receive(&self, received: &Received) -> Outcome {
        let mut change = Change::begin(&self.store, self.rooms.sit(ROOM), ROOM).unwrap();
        let step = change.receive(received, None, self.rooms.resolver(), 0).unwrap();
        drop(change.enqueue(&self.store).unwrap());
        self.store.flush().unwrap();
        match step {
            Step::Done(outcome) => outcome,
            other => panic!("{other:?}"),
        }
    }
}

mod fill;
mod left_out;
mod partial;

#[test]
fn a_first_join_counts_at_once_or_leaves_no_row_after_whichever_part_the_server_ends() {
    let mut elsewhere = Elsewhere::with_members(40);
    let here = Here::new(40);
    let (empty, brought) = (here.row_count(), elsewhere.brought());
    let join = elsewhere.join(&bob());
    let kept = here.keep_crashes();
    here.join(&elsewhere.row, brought.clone(), &join).unwrap();
    let crashes = here.stop_keeping(&kept);
    here.assert_is(&elsewhere);
    assert!(crashes.len() > 8, "{} parts", crashes.len());
    for (number, crash) in crashes.into_iter().enumerate() {
        let here = Here::over(crash);
        here.assert_unseen(&elsewhere);
        let kept = here.keep_crashes();
        here.clear();
        let taken_back = here.stop_keeping(&kept);
        assert_eq!(here.row_count(), empty, "rows are left after part {number}");
        assert!(taken_back.len() > number.min(2), "it is taken back in parts");
        for crash in taken_back {
            let here = Here::over(crash);
            here.assert_unseen(&elsewhere);
            here.clear();
            assert_eq!(here.row_count(), empty, "rows are left, half taken back after part {number}");
        }
        // The next try needs nobody to clear up before it.
        let here = Here::over(match here.store.engine() {
            Engine::Memory(memory) => memory.after_crash(usize::MAX),
            Engine::Rocks(_) => panic!("the engine of this test is in memory"),
        });
        here.join(&elsewhere.row, brought.clone(), &join).unwrap();
        here.assert_is(&elsewhere);
    }
}

#[test]
fn a_join_that_follows_one_that_was_left_begins_anew() {
    let mut elsewhere = Elsewhere::with_members(12);
    let here = Here::new(12);
    let brought = elsewhere.brought();
    let join = elsewhere.join(&bob());
    let mut base = here.base(&elsewhere.row);
    let mut change = base.begin_part(&here.store, here.rooms.sit(ROOM)).unwrap();
    assert!(base.take(&mut change, &mut brought.clone().into_iter()).unwrap());
    drop(change.enqueue(&here.store).unwrap());
    // Others come back while it goes on, and nobody else can join the room.
    let refused = Change::begin(&here.store, here.rooms.sit(ROOM), ROOM).err();
    assert!(matches!(refused, Some(Error::Busy { .. })), "{refused:?}");
    assert!(here.rooms.turns(ROOM).claim_join().is_none());
    assert_eq!(find_room(&here.store.view(), &elsewhere.row.id).unwrap(), Some(ROOM));
    drop(base);
    here.join(&elsewhere.row, brought, &join).unwrap();
    here.assert_is(&elsewhere);
}

#[test]
fn the_room_goes_on_after_a_join() {
    for version in [6, 10, 11, 12] {
        let mut elsewhere = Elsewhere::new(version);
        elsewhere.join(&user("carol:c.example"));
        let here = Here::new(0);
        let brought = elsewhere.brought();
        let said = elsewhere.make(&alice(), "m.room.message", None, json!({ "body": "before you came" }));
        elsewhere.add(&said);
        let join = elsewhere.join(&bob());
        here.join(&elsewhere.row, brought, &join).unwrap();
        let hole = find_hole(&*here.store.snapshot(), ROOM, Order::MAX).unwrap().unwrap().1;
        assert!(hole.is_bottomless && hole.missing == [said.id().to_string()]);
        // Others stand on our event, and we on theirs.
        let name = elsewhere.make(&alice(), "m.room.name", Some(""), json!({ "name": "n" }));
        elsewhere.add(&name);
        assert!(matches!(here.receive(&name), Outcome::Accepted(_)), "version {version}");
        let mut change = Change::begin(&here.store, here.rooms.sit(ROOM), ROOM).unwrap();
        let draft = Draft::state(bob(), "x", "", content(json!({ "n": 1 })), 9);
        let own = change.add(here.rooms.signer(), &draft, None).unwrap();
        let own = Received::check(
            ROOM,
            &change.row,
            match &own.row.header.key {
                crate::schema::rooms::EventKey::Hash(hash) => *hash,
                crate::schema::rooms::EventKey::Chosen(..) => panic!("a chosen id"),
            },
            own.row.json,
        )
        .unwrap();
        drop(change.enqueue(&here.store).unwrap());
        here.store.flush().unwrap();
        elsewhere.add(&own);
        here.assert_is(&elsewhere);
        // An event from before our join stands on something that we do not have.
        let late = elsewhere.make(&alice(), "m.room.message", None, json!({ "body": "late" }));
        let mut json: serde_json::Value = serde_json::from_slice(late.json()).unwrap();
        json["prev_events"] = json!([said.id()]);
        let late = Received::check(ROOM, &elsewhere.row, [7; 32], json.to_string().into()).unwrap();
        assert!(matches!(here.receive(&late), Outcome::Need { .. }));
    }
}

#[test]
fn what_a_server_brings_wrongly_is_its_fault_and_leaves_no_row() {
    let mut elsewhere = Elsewhere::with_members(12);
    let (brought, ban) = (elsewhere.brought(), json!({ "membership": "ban" }));
    let join = elsewhere.clone().join(&bob());
    elsewhere.set(&alice(), MEMBER, bob().as_str(), ban);
    let without = |wanted: &str, stays: bool| -> Vec<Brought> {
        let is_it = |event: &Received| event.event().event_type.to_string() == wanted;
        let change = |it: &Brought| Brought { is_state: it.is_state && !is_it(&it.event), ..it.clone() };
        brought.iter().filter(|it| stays || !is_it(&it.event)).map(change).collect()
    };
    for (why, brought) in [
        ("without", without("m.room.power_levels", false)),
        ("create event", without(CREATE, true)),
        ("create event", Vec::new()),
        ("does not allow", elsewhere.brought()),
    ] {
        let here = Here::new(12);
        let empty = here.row_count();
        let error = here.join(&elsewhere.row, brought, &join).unwrap_err();
        let Error::Remote { server, cause } = error else { panic!("{error:?}") };
        assert!(server == "a.example" && cause.contains(why), "{cause}");
        here.clear();
        assert_eq!(here.row_count(), empty, "{why}");
    }
}

#[test]
fn a_rejected_event_is_no_part_of_the_state_that_is_brought() {
    let mut elsewhere = Elsewhere::with_members(5);
    let (here, state) = (Here::new(5), elsewhere.state.clone());
    // Somebody without power names the room, and another event rests on that.
    let member = user("user0:a.example");
    elsewhere.set(&member, "m.room.name", "", json!({ "name": "mine" }));
    let brought = elsewhere.brought();
    elsewhere.state = state;
    let join = elsewhere.join(&bob());
    here.join(&elsewhere.row, brought, &join).unwrap();
    here.assert_is(&elsewhere);
}

#[test]
fn what_a_join_brings_takes_no_place_from_other_events_aside() {
    let mut elsewhere = Elsewhere::with_members(40);
    let here = Here::new(40);
    let brought = elsewhere.brought();
    let count = brought.len() as u64;
    assert!(count > super::super::aside::ASIDE_MAX);
    let join = elsewhere.join(&bob());
    here.join(&elsewhere.row, brought, &join).unwrap();
    let row = schema::ASIDE_COUNT.get(&*here.store.snapshot(), ROOM).unwrap().unwrap();
    assert_eq!((row.count, row.needed), (count, count));
    let mut change = Change::begin(&here.store, here.rooms.sit(ROOM), ROOM).unwrap();
    assert!(!change.wants_sweep().unwrap());
    let outlier = elsewhere.make(&alice(), "x", Some("aside"), json!({}));
    assert!(matches!(change.receive_outlier(&outlier).unwrap(), Outcome::Outlier(_)));
}

#[test]
fn what_a_join_brings_and_the_rules_forbid_takes_bounded_places() {
    use super::super::aside::ASIDE_MAX;
    for (junk, is_too_much) in [(2 * ASIDE_MAX, false), (4 * ASIDE_MAX, true)] {
        let mut elsewhere = Elsewhere::with_members(9);
        let (here, state) = (Here::new(9), elsewhere.state.clone());
        let mut brought = elsewhere.brought();
        let allowed = brought.len();
        let member = user("user0:a.example");
        for number in 0..junk {
            elsewhere.set(&member, "org.example.junk", &number.to_string(), json!({}));
        }
        // Everything that rests on something forbidden is forbidden.
        elsewhere.set(&member, "m.room.power_levels", "", json!({ "users": { &member: 100 } }));
        elsewhere.set(&alice(), "m.room.name", "", json!({ "name": "n" }));
        let mut forbidden = elsewhere.brought();
        forbidden.retain(|it| brought.iter().all(|other| other.event.id() != it.event.id()));
        brought.extend(forbidden.into_iter().map(|it| Brought { is_state: true, ..it }));
        assert_eq!(brought.len() as u64, allowed as u64 + junk + 2);
        elsewhere.state = state;
        // A message is no state, so that nothing needs it.
        let said = elsewhere.say(&alice(), json!({ "body": "x" }));
        brought.push(Brought { event: said, is_state: false });
        let join = elsewhere.join(&bob());
        let joined = here.join(&elsewhere.row, brought, &join);
        if is_too_much {
            assert!(matches!(joined, Err(Error::Remote { .. })), "{joined:?}");
            continue;
        }
        joined.unwrap();
        here.assert_is(&elsewhere);
        let row = schema::ASIDE_COUNT.get(&*here.store.snapshot(), ROOM).unwrap().unwrap();
        assert_eq!(row.count - row.needed, ASIDE_MAX);
    }
}

#[test]
fn an_event_that_a_join_brings_is_not_swept_away_though_a_sweep_had_doomed_it() {
    let mut elsewhere = Elsewhere::with_members(4);
    let here = Here::new(4);
    let brought = elsewhere.brought();
    let join = elsewhere.join(&bob());
    here.join(&elsewhere.row, brought, &join).unwrap();
    let outliers: Vec<_> = (0..20)
        .map(|number| elsewhere.make(&alice(), "x", Some(&format!("aside {number}")), json!({})))
        .collect();
    let mut change = Change::begin(&here.store, here.rooms.sit(ROOM), ROOM).unwrap();
    for outlier in &outliers {
        assert!(matches!(change.receive_outlier(outlier).unwrap(), Outcome::Outlier(_)));
    }
    drop(change.enqueue(&here.store).unwrap());
    here.store.flush().unwrap();
    let mut sweep = here.begin_sweep();
    leave(&here, &mut elsewhere, &bob());
    elsewhere.add(&outliers[0]);
    let brought = elsewhere.brought();
    let join = elsewhere.join(&bob());
    here.join(&elsewhere.row, brought, &join).unwrap();
    assert!(here.end_sweep(&mut sweep) > 0);
    let known = |event: &Received| event::find_num(&*here.store.snapshot(), ROOM, event.id()).unwrap();
    assert!(known(&outliers[1]).is_none(), "others are swept");
    assert!(known(&outliers[0]).is_some());
    assert_eq!(here.faults(), [""; 0]);
}

/// Leaves the room, as the last one here: nobody of ours is in it then.
fn leave(here: &Here, elsewhere: &mut Elsewhere, member: &OwnedUserId) {
    let left = elsewhere.make(member, MEMBER, Some(member.as_str()), json!({ "membership": "leave" }));
    elsewhere.add(&left);
    assert!(matches!(here.receive(&left), Outcome::Accepted(_)));
    let mut change = Change::begin(&here.store, here.rooms.sit(ROOM), ROOM).unwrap();
    change.row.resident = Resident::Left;
    change.put_room();
    drop(change.enqueue(&here.store).unwrap());
    here.store.flush().unwrap();
}

#[test]
fn a_room_is_joined_again_over_the_hole_of_the_last_time() {
    let mut elsewhere = Elsewhere::with_members(12);
    let here = Here::new(40);
    let brought = elsewhere.brought();
    let join = elsewhere.join(&bob());
    here.join(&elsewhere.row, brought, &join).unwrap();
    leave(&here, &mut elsewhere, &bob());
    let (before, old_tip, rows) = (elsewhere.clone(), here.row().state_tip, here.row_count());
    // Much happens in the room: some leave, and others come.
    for number in 0..40 {
        let member = user(&format!("user{number}:{}.example", ["a", "b", "here", "c"][number % 4]));
        if number % 3 == 0 && elsewhere.members("join").contains(member.as_str()) {
            elsewhere.set(&member, MEMBER, member.as_str(), json!({ "membership": "leave" }));
        } else {
            elsewhere.join(&member);
        }
    }
    let brought = elsewhere.brought();
    let join = elsewhere.join(&bob());
    let kept = here.keep_crashes();
    here.join(&elsewhere.row, brought.clone(), &join).unwrap();
    let crashes = here.stop_keeping(&kept);
    here.assert_is(&elsewhere);
    let at_old = StateRef::Main(old_tip);
    assert_eq!(here.state_at(at_old), before.ids(), "what the room was before stays readable");
    let holes =
        schema::HOLE.prefix::<(RoomNum,)>(&*here.store.snapshot(), (ROOM,), Direction::Up).unwrap().count();
    assert_eq!(holes, 2);
    let after = elsewhere.make(&alice(), "m.room.name", Some(""), json!({ "name": "n" }));
    elsewhere.add(&after);
    assert!(matches!(here.receive(&after), Outcome::Accepted(_)));
    here.assert_is(&elsewhere);
    assert!(crashes.len() > 8, "{} parts", crashes.len());
    for (number, crash) in crashes.into_iter().enumerate() {
        let here = Here::over(crash);
        here.assert_is(&before);
        let kept = here.keep_crashes();
        here.clear();
        for crash in here.stop_keeping(&kept) {
            let here = Here::over(crash);
            here.assert_is(&before);
            here.clear();
            assert_eq!(here.row_count(), rows, "rows are left, half taken back after part {number}");
        }
        here.assert_is(&before);
        assert_eq!(here.row_count(), rows, "rows are left after part {number}");
        here.join(&elsewhere.row, brought.clone(), &join).unwrap();
        assert_eq!(here.row().resident, Resident::Yes);
    }
}

#[test]
fn only_rooms_that_this_server_is_in_take_events() {
    let mut elsewhere = Elsewhere::new(VERSION);
    let here = Here::new(0);
    let brought = elsewhere.brought();
    let join = elsewhere.join(&bob());
    here.join(&elsewhere.row, brought, &join).unwrap();
    for (resident, is_busy) in [
        (Resident::No, false),
        (Resident::Joining, true),
        (Resident::Invited, false),
        (Resident::Knocked, false),
        (Resident::Left, false),
    ] {
        let mut batch = here.store.batch(&Guard::alone());
        schema::ROOM.put(&mut batch, ROOM, &RoomRow { resident, ..here.row() });
        drop(here.store.enqueue(batch).unwrap());
        here.store.flush().unwrap();
        here.rooms.sit(ROOM).tip = None;
        let refused = Change::begin(&here.store, here.rooms.sit(ROOM), ROOM).err().unwrap();
        assert_eq!(matches!(refused, Error::Busy { .. }), is_busy, "{resident:?} {refused:?}");
        assert_eq!(matches!(refused, Error::Refused(_)), !is_busy, "{resident:?} {refused:?}");
        assert!(crate::rooms::require_room(&*here.store.snapshot(), &elsewhere.row.id).is_err());
        // Rows beside its events are written also in a room that was left, but no events.
        let beside = Change::begin_beside(&here.store, here.rooms.sit(ROOM), ROOM);
        assert_eq!(beside.is_ok(), resident.counts(), "{resident:?}");
        if let Ok(mut change) = beside {
            let draft = Draft::state(bob(), "x", "", content(json!({ "n": 1 })), 9);
            assert!(change.add(here.rooms.signer(), &draft, None).is_err(), "{resident:?}");
        }
    }
}

#[test]
fn events_are_ordered_by_what_allows_them() {
    let id = |name: &str| OwnedEventId::try_from(format!("${name}:x")).unwrap();
    let named = |names: &[(&str, &[&str])]| -> Vec<(OwnedEventId, Vec<OwnedEventId>)> {
        names.iter().map(|(name, allowing)| (id(name), allowing.iter().map(|it| id(it)).collect())).collect()
    };
    let events = named(&[("c", &["a", "b", "b"]), ("b", &["a"]), ("d", &["elsewhere"]), ("a", &[])]);
    assert_eq!(order_by_auth(&events), [2, 3, 1, 0]);
    let circle = named(&[("a", &["b"]), ("b", &["a"]), ("self", &["self"]), ("c", &[])]);
    assert_eq!(order_by_auth(&circle), [3]);
    assert_eq!(graph::HEADS_MAX, 20);
}

/// Joins a room with this many members and counts them, without holding them in memory.
fn join_large(members: usize) -> Here {
    let mut elsewhere = Elsewhere::new(VERSION);
    let (here, first) = (Here::new(0), elsewhere.brought());
    let rest = (0..members).map(|number| {
        let member = user(&format!("user{number}:s{}.example", number % 500));
        let join = elsewhere.make(&member, MEMBER, Some(member.as_str()), json!({ "membership": "join" }));
        Brought { event: join, is_state: true }
    });
    let join = elsewhere.make(&bob(), MEMBER, Some(bob().as_str()), json!({ "membership": "join" }));
    here.join(&elsewhere.row, first.into_iter().chain(rest), &join).unwrap();
    assert_eq!(here.row().joined as usize, members + 2);
    let snapshot = here.store.snapshot();
    assert_eq!(state::list_current(&*snapshot, ROOM).unwrap().count(), members + 5);
    let now = StateRef::Main(Order::MAX);
    assert_eq!(members::list_servers_at(&*snapshot, ROOM, now).unwrap().len(), 502.min(members + 2));
    drop(snapshot);
    elsewhere.add(&join);
    let name = elsewhere.make(&alice(), "m.room.name", Some(""), json!({ "name": "n" }));
    assert!(matches!(here.receive(&name), Outcome::Accepted(_)));
    here
}

#[test]
fn a_room_of_twenty_thousand_members_is_joined() {
    join_large(20_000);
}

#[test]
#[ignore = "takes a minute in a debug build"]
fn a_room_of_a_hundred_thousand_members_is_joined() {
    assert_eq!(join_large(100_000).faults(), [""; 0]);
}
