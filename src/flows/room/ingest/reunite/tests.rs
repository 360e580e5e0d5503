//! A room whose state stands still while far branches are reunited with it.

use std::cell::Cell;

use ruma::{
    OwnedEventId, OwnedRoomId, OwnedUserId, RoomVersionId,
    api::client::room::create_room::v3::{Request, RoomPreset},
};
use serde_json::{Value, json};

use super::*;
use crate::{
    accounts::Caller,
    env::Env,
    error::Error,
    flows::room::{create, ingest::ingest, send},
    rooms::{
        self, admit,
        build::{self, Draft, Setting},
        change::{Outcome, Received},
        event,
        policy::{self, Author},
    },
    schema::rooms::RoomRow,
    server::Server,
};

/// The key of the state that is set again and again.
const MOVES: &str = "moves";

/// A public room of Alice's, in which Bob of another server is, too. Everybody may set state of the type `x`.
struct Fixture {
    server: Server,
    alice: Caller,
    id: OwnedRoomId,
    room: RoomNum,
}

fn bob() -> OwnedUserId {
    "@bob:b.example".try_into().unwrap()
}

fn is_accepted(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Accepted(_))
}

impl Fixture {
    async fn new() -> Self {
        let server = Server::in_memory(Env::simulated(1, 0));
        let app = server.app();
        let alice = server.register("alice").await;
        let mut request = Request::new();
        request.preset = Some(RoomPreset::PublicChat);
        request.room_version = Some(RoomVersionId::V11);
        let levels = json!({ "events": { "x": 0 } });
        request.power_level_content_override = Some(serde_json::from_value(levels).unwrap());
        let id = create::create(app, &alice, request).await.unwrap().room_id;
        let room = rooms::find_room(&*app.store.snapshot(), &id).unwrap().unwrap();
        let fixture = Self { server, alice, id, room };
        let join = json!({ "membership": "join" });
        let join = fixture.by_bob("m.room.member", bob().as_str(), join, &fixture.heads());
        assert!(is_accepted(&fixture.ingest(join).await.unwrap()));
        fixture
    }

    fn app(&self) -> &App {
        self.server.app()
    }

    fn row(&self) -> RoomRow {
        rooms::require_row(&*self.app().store.snapshot(), self.room).unwrap()
    }

    fn heads(&self) -> Vec<OwnedEventId> {
        let row = self.row();
        row.heads.iter().map(|head| event::event_id(&head.key, row.version)).collect()
    }

    /// The number in the state of type `x` under this key.
    fn value(&self, key: &str) -> Option<Value> {
        let stored = rooms::find_state(&*self.app().store.snapshot(), self.room, "x", key).unwrap()?;
        let content: Value = serde_json::from_str(stored.row.content()).unwrap();
        Some(content["n"].clone())
    }

    /// Builds a state event of Bob's on these events, as his server would send it.
    fn by_bob(&self, event_type: &str, key: &str, content: Value, prev: &[OwnedEventId]) -> Received {
        let (snapshot, row) = (self.app().store.snapshot(), self.row());
        let rules = rooms::rules(&row).unwrap();
        let content = serde_json::from_value(content).unwrap();
        let draft = Draft::state(bob(), event_type, key, content, self.app().env.now_ms());
        let raw = draft.raw_content().unwrap();
        let needed = admit::needed_keys(
            &event_type.into(),
            &draft.sender,
            draft.state_key.as_deref(),
            &raw,
            &rules.authorization,
        );
        let found = |(kind, key): (ruma::events::StateEventType, String)| {
            rooms::find_state(&*snapshot, self.room, &kind.to_string(), &key).unwrap()
        };
        let auth = needed.unwrap().into_iter().filter_map(found).map(|stored| stored.id(&row));
        let auth: Vec<_> = auth.collect();
        let setting = Setting {
            room_id: Some(&row.id),
            rules,
            prev,
            auth: &auth,
            hashes: crate::rooms::reference::NO_HASHES,
            depth: 20,
        };
        let built = build::build(self.app().rooms.signer(), &draft, &setting, row.version).unwrap();
        Received::check(self.room, &row, built.hash, built.json).unwrap()
    }

    async fn ingest(&self, event: Received) -> Result<Outcome> {
        Ok(ingest(self.app(), self.room, vec![event]).await?.remove(0))
    }

    /// Alice sets this many keys of the type `x`.
    async fn set_many(&self, count: usize) {
        for part in (0..count).collect::<Vec<_>>().chunks(200) {
            let (app, part, author) = (self.app().clone(), part.to_vec(), Author::from(&self.alice));
            let set = move |change: &mut crate::rooms::change::Change| {
                let signer = app.rooms.signer();
                for number in part {
                    let content = serde_json::from_value(json!({ "n": number })).unwrap();
                    let sender = author.user_id.clone();
                    let draft = Draft::state(sender, "x", &number.to_string(), content, app.env.event_ms());
                    policy::approve(change, signer.server(), &author, draft)?.add(change, signer)?;
                }
                Ok(())
            };
            commit::in_room(self.app(), self.room, set).await.unwrap();
        }
    }

    async fn set(&self, key: &str, number: u64) -> Result<()> {
        let content = serde_json::from_value(json!({ "n": number })).unwrap();
        let piece = send::Piece {
            event_type: "x".to_owned(),
            state_key: key.to_owned(),
            content,
            confirmed: Vec::new(),
            sticky_ms: None,
        };
        send::set_state(self.app(), &self.alice, &self.id, piece).await.map(drop)
    }

    async fn say(&self, txn: &str) {
        let message = send::Message {
            room: self.id.clone(),
            event_type: "m.room.message".to_owned(),
            txn: Some(txn.to_owned()),
            content: serde_json::from_value(json!({ "body": "hello" })).unwrap(),
            redacts: None,
            sticky_ms: None,
        };
        send::send(self.app(), &self.alice, message).await.unwrap();
    }

    /// Sets one key again and again until `is_over`. Answers after how long it might come back, each time that it was
    /// refused; it sends a message then.
    async fn keep_moving(&self, key: &str, is_over: &Cell<bool>) -> Vec<Duration> {
        let (mut refused, mut number) = (Vec::new(), 0);
        while !is_over.get() {
            number += 1;
            match self.set(key, number).await {
                Ok(()) => {}
                Err(Error::Busy { retry_after }) => {
                    refused.push(retry_after);
                    self.say(&format!("{key}{number}")).await;
                }
                Err(other) => panic!("{other:?}"),
            }
        }
        refused
    }
}

/// How long to wait before the state may be changed, if that is refused now.
fn refused_for<T>(done: Result<T>) -> Option<Duration> {
    match done {
        Ok(_) => None,
        Err(Error::Busy { retry_after }) => Some(retry_after),
        Err(other) => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn while_the_state_stands_still_changes_of_it_are_refused_and_after_a_minute_they_are_not() {
    let fixture = Fixture::new().await;
    let (app, turns) = (fixture.app(), fixture.app().rooms.turns(fixture.room));
    fixture.set(MOVES, 1).await.unwrap();
    let held_from = app.env.uptime();
    turns.hold_still(held_from + STILL_MAX);
    let by_bob = fixture.by_bob("x", "bob", json!({ "n": 1 }), &fixture.heads());
    for number in 0..59 {
        let left = held_from + STILL_MAX - app.env.uptime();
        for refused in [
            refused_for(fixture.set(MOVES, 2).await),
            refused_for(fixture.set("new", 1).await),
            refused_for(fixture.ingest(by_bob.clone()).await),
        ] {
            assert!(refused.is_some_and(|for_long| for_long <= left && !for_long.is_zero()), "{refused:?}");
        }
        assert_eq!(refused_for(fixture.set(MOVES, 1).await), None, "what is set already changes nothing");
        fixture.say(&number.to_string()).await;
        app.env.sleep(Duration::from_secs(1)).await;
    }
    assert_eq!((fixture.value(MOVES), fixture.value("new")), (Some(json!(1)), None));
    app.env.sleep(held_from + STILL_MAX - app.env.uptime()).await;
    assert_eq!(refused_for(fixture.set(MOVES, 2).await), None);
    assert!(is_accepted(&fixture.ingest(by_bob).await.unwrap()));
    assert_eq!((fixture.value(MOVES), fixture.value("bob")), (Some(json!(2)), Some(json!(1))));
}

#[tokio::test(start_paused = true)]
async fn the_state_stands_still_for_a_resolution_that_it_outruns() {
    let fixture = Fixture::new().await;
    let old = fixture.heads();
    // The conflict does not fit in memory, so a turn cannot resolve again what moved meanwhile.
    fixture.set_many(crate::rooms::resolve::EVENTS_AT_ONCE + 200).await;
    let far = fixture.by_bob("x", "bob", json!({ "n": 1 }), &old);
    let is_over = Cell::new(false);
    let comes_in = async {
        let outcome = fixture.ingest(far).await.unwrap();
        is_over.set(true);
        outcome
    };
    let (outcome, one, other) =
        tokio::join!(comes_in, fixture.keep_moving("one", &is_over), fixture.keep_moving("other", &is_over),);
    assert!(is_accepted(&outcome), "{outcome:?}");
    let refused = [one, other].concat();
    assert!(!refused.is_empty(), "the state never stood still");
    assert!(refused.iter().all(|refused| *refused <= STILL_MAX), "{refused:?}");
    assert_eq!(fixture.value("bob"), Some(json!(1)), "the branch is reunited");
    assert!(fixture.row().apart.is_empty());
    fixture.set(MOVES, 1).await.unwrap();
}
