//! Sweeps as a running server makes them, by a clock that stands still.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use ruma::{OwnedEventId, OwnedUserId, RoomId};
use serde_json::json;

use super::*;
use crate::{
    accounts::users::{self, NewUser},
    config::Config,
    env::Env,
    flows::room::ingest::ingest,
    ids::UserNum,
    rooms::{
        admit,
        build::{self, Draft, Setting, Signer},
        change::{Change, Outcome, Received, elsewhere::content},
        event,
        policy::{self, Author},
        versions,
    },
    schema::{self, jobs::Job},
    server::{Lead, Server},
    store::{Direction, Durability, Engine, Guard, Store, engine::Memory, timer},
};

const ROOM: RoomNum = RoomNum(1);
const VERSION: u8 = 11;

struct Fixture {
    server: Server,
    /// The heads of the room before Bob was banned.
    before_ban: Vec<OwnedEventId>,
    /// The events that allowed Bob then.
    auth: Vec<OwnedEventId>,
    sent: u64,
}

fn user(name: &str) -> OwnedUserId {
    OwnedUserId::try_from(format!("@{name}.example")).unwrap()
}

/// Adds a state event of Alice's.
fn add(
    change: &mut Change,
    signer: &Signer,
    event_type: &str,
    key: &str,
    json: serde_json::Value,
) -> Result<()> {
    let author = Author::of(&change.batch, UserNum(1))?;
    let draft = Draft::state(author.user_id.clone(), event_type, key, content(json), 1);
    policy::approve(change, signer.server(), &author, draft)?.add(change, signer).map(drop)
}

fn start(store: Store) -> Server {
    let mut config = Config::default();
    config.server.name = "a.example".try_into().unwrap();
    Server::start(config, Env::simulated(1, 1_767_225_600_000), store, Some(Lead::of_only_node())).unwrap()
}

impl Fixture {
    /// A room of Alice's, from which Bob of another server was banned.
    async fn new() -> Self {
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
        let mut batch = store.batch(&Guard::alone());
        let alice = NewUser { user_id: user("alice:a"), is_admin: false, is_guest: false, now_ms: 1 };
        users::create(&mut batch, UserNum(1), &alice);
        drop(store.enqueue(batch).unwrap());
        let server = start(store);
        let mut fixture = Self { server, before_ban: Vec::new(), auth: Vec::new(), sent: 0 };
        let signer = fixture.app().rooms.signer().clone();
        let id = RoomId::parse("!room:a.example").unwrap();
        let (begins, adds) = (id.clone(), signer.clone());
        let begin = move |app: &App, seat| Change::begin_room(&app.store, seat, ROOM, begins, VERSION);
        let fill = move |change: &mut Change, _: &mut commit::ServerLock<'_>| {
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
                add(change, &adds, event_type, key, json)?;
            }
            Ok(())
        };
        commit::in_turn(fixture.app(), ROOM, begin, fill, Error::from).await.unwrap();
        let join = fixture.make("m.room.member", "@bob:b.example", json!({ "membership": "join" }), None);
        assert!(matches!(fixture.ingest(join).await, Outcome::Accepted(_)));
        let speaks = fixture.make("x", "", json!({}), None);
        (fixture.before_ban, fixture.auth) = (speaks.event().prev.clone(), speaks.event().auth.clone());
        let ban = move |change: &mut Change| {
            add(change, &signer, "m.room.member", "@bob:b.example", json!({ "membership": "ban" }))
        };
        commit::in_room(fixture.app(), ROOM, ban).await.unwrap();
        fixture
    }

    fn app(&self) -> &App {
        self.server.app()
    }

    /// Makes an event of Bob's, on the heads and by the state of now, or on these.
    fn make(
        &self,
        event_type: &str,
        key: &str,
        json: serde_json::Value,
        on: Option<(&[OwnedEventId], &[OwnedEventId])>,
    ) -> Received {
        let (app, bob) = (self.app(), user("bob:b"));
        let (snapshot, rules) = (app.store.snapshot(), versions::find_rules(VERSION).unwrap());
        let row = rooms::require_row(&*snapshot, ROOM).unwrap();
        let draft = Draft::state(bob.clone(), event_type, key, content(json), 10 + self.sent);
        let (prev, auth) = match on {
            Some((prev, auth)) => (prev.to_vec(), auth.to_vec()),
            None => {
                let raw = draft.raw_content().unwrap();
                let needed =
                    admit::needed_keys(&event_type.into(), &bob, Some(key), &raw, &rules.authorization);
                let needed = needed.unwrap().into_iter().filter_map(|(kind, key)| {
                    rooms::find_state(&*snapshot, ROOM, &kind.to_string(), &key).unwrap()
                });
                let prev = row.heads.iter().map(|head| event::event_id(&head.key, VERSION)).collect();
                (prev, needed.map(|event| event.id(&row)).collect())
            }
        };
        let setting = Setting {
            room_id: Some(&row.id),
            rules,
            prev: &prev,
            auth: &auth,
            hashes: crate::rooms::reference::NO_HASHES,
            depth: 7,
        };
        let built = build::build(app.rooms.signer(), &draft, &setting, VERSION).unwrap();
        Received::check(ROOM, &row, built.hash, built.json).unwrap()
    }

    async fn ingest(&self, received: Received) -> Outcome {
        ingest(self.app(), ROOM, vec![received]).await.unwrap().remove(0)
    }

    /// Has Bob send state from before the ban until this many events are kept aside.
    async fn fill_aside(&mut self, count: usize) {
        while self.count_asides() < count {
            self.sent += 1;
            let key = self.sent.to_string();
            let late = self.make("x", &key, json!({}), Some((&self.before_ban, &self.auth)));
            let outcome = self.ingest(late).await;
            assert!(matches!(outcome, Outcome::Aside(..)), "{outcome:?}");
        }
    }

    fn count_asides(&self) -> usize {
        schema::ASIDE.prefix::<()>(&*self.app().store.snapshot(), (), Direction::Up).unwrap().count()
    }

    fn count_timers(&self) -> usize {
        let kind = Job::Sweep { room: ROOM }.kind();
        timer::list_due(&self.app().store.view(), u64::MAX, 100, |of| of == kind).unwrap().len()
    }
}

/// A room with this many events aside wants a sweep, which leaves at most [`LEFT`].
const WANTED: usize = 21;
const LEFT: usize = 15;
/// A room keeps at most this many events aside.
const MOST: usize = 30;

#[tokio::test(start_paused = true)]
async fn a_room_is_swept_at_once_and_then_at_a_distance() {
    let mut fixture = Fixture::new().await;
    fixture.fill_aside(WANTED - 1).await;
    fixture.app().env.sleep(Duration::from_secs(3_600)).await;
    assert_eq!((fixture.count_asides(), fixture.count_timers()), (WANTED - 1, 0));
    fixture.fill_aside(WANTED).await;
    fixture.app().env.sleep(Duration::from_millis(100)).await;
    assert!(fixture.count_asides() <= LEFT, "{}", fixture.count_asides());
    // The next one keeps a distance of ten seconds.
    fixture.fill_aside(WANTED).await;
    fixture.app().env.sleep(Duration::from_secs(8)).await;
    assert_eq!(fixture.count_asides(), WANTED);
    fixture.app().env.sleep(Duration::from_secs(3)).await;
    assert!(fixture.count_asides() <= LEFT, "{}", fixture.count_asides());
    fixture.app().env.sleep(Duration::from_secs(3_600)).await;
    assert_eq!(fixture.count_timers(), 0, "the timers find nothing to do, and go");
}

#[tokio::test(start_paused = true)]
async fn a_sweep_that_the_server_ended_before_is_made_after_it_starts() {
    let mut fixture = Fixture::new().await;
    fixture.fill_aside(WANTED).await;
    fixture.app().env.sleep(Duration::from_millis(100)).await;
    fixture.fill_aside(WANTED).await;
    assert!(fixture.count_timers() > 0);
    let crash = match fixture.app().store.engine() {
        Engine::Memory(memory) => memory.after_crash(usize::MAX),
        Engine::Rocks(_) => panic!("the engine of this test is in memory"),
    };
    // Nothing comes into the room any more, and nobody of this server is in it.
    let store = Store::open(Engine::Memory(crash), Durability::Fsync).unwrap();
    let mut batch = store.batch(&Guard::alone());
    let mut row = schema::ROOM.get(&batch, ROOM).unwrap().unwrap();
    row.resident = schema::rooms::Resident::Left;
    schema::ROOM.put(&mut batch, ROOM, &row);
    drop(store.enqueue(batch).unwrap());
    fixture.server = start(store);
    fixture.app().env.sleep(Duration::from_secs(60)).await;
    assert_eq!(fixture.count_asides(), WANTED);
    fixture.app().env.sleep(Duration::from_secs(900)).await;
    assert!(fixture.count_asides() <= LEFT, "{}", fixture.count_asides());
    fixture.app().env.sleep(Duration::from_secs(900)).await;
    assert_eq!(fixture.count_timers(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_room_goes_on_while_it_is_swept() {
    let mut fixture = Fixture::new().await;
    // More than a sweep waits for gather in the pause after one.
    fixture.fill_aside(WANTED).await;
    fixture.app().env.sleep(Duration::from_secs(1)).await;
    fixture.fill_aside(MOST).await;
    let (most, turns) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (sees_most, sees_turns, owned) = (Arc::clone(&most), Arc::clone(&turns), fixture.app().clone());
    let (tell, told) = tokio::sync::oneshot::channel();
    let (mut before, mut tell) = (MOST, Some(tell));
    fixture.app().store.watch(move |store| {
        let view = store.view();
        let left = schema::ASIDE.prefix::<()>(&view, (), Direction::Up).unwrap().count();
        let deleted = before.saturating_sub(left);
        before = left;
        if deleted == 0 {
            return;
        }
        sees_most.fetch_max(deleted, Ordering::Relaxed);
        sees_turns.fetch_add(1, Ordering::Relaxed);
        // Alice speaks as soon as the sweep has begun to delete, and need not wait for its end.
        let (Some(tell), app) = (tell.take(), owned.clone()) else { return };
        let signer = owned.rooms.signer().clone();
        owned.env.spawn(async move {
            let speak = move |change: &mut Change| {
                add(change, &signer, "x", "mine", json!({}))?;
                Ok(schema::ASIDE.prefix::<()>(&change.batch, (), Direction::Up)?.count())
            };
            tell.send(commit::in_room(&app, ROOM, speak).await.unwrap()).unwrap();
        });
    });
    fixture.app().env.sleep(Duration::from_secs(20)).await;
    let left = told.await.unwrap();
    assert!((LEFT + 1..MOST).contains(&left), "{left}: Alice had her turn before the sweep, or after it");
    fixture.app().env.sleep(Duration::from_secs(1)).await;
    assert!(fixture.count_asides() <= LEFT);
    // In tests a turn deletes three things.
    assert!(most.load(Ordering::Relaxed) <= 3 && turns.load(Ordering::Relaxed) >= 5);
    fixture.app().store.watch(|_| ());
}
