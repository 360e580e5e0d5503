//! Another server in a room of ours: its events stand wherever in the graph it wants. Tests and benchmarks share it, so
//! it names nothing of either.

use aqueduct::{
    flows::{App, room::ingest},
    ids::RoomNum,
    rooms::{
        self, admit,
        build::{self, Built, Draft, Setting, Signer},
        change::{Outcome, Received},
        event,
        reference::Hashes,
    },
};
use ruma::{CanonicalJsonObject, OwnedEventId, OwnedUserId, RoomId};
use serde_json::Value;

/// A user of another server, who acts in one room.
#[derive(Clone)]
pub(crate) struct Remote {
    pub(crate) app: App,
    pub(crate) room: RoomNum,
    pub(crate) user: OwnedUserId,
}

impl Remote {
    /// `@bob:b.example` in this room, who has not joined yet.
    pub(crate) fn new(app: &App, room_id: &str) -> Self {
        let room_id = RoomId::parse(room_id).unwrap();
        let room = rooms::find_room(&*app.store.snapshot(), &room_id).unwrap().unwrap();
        Self { app: app.clone(), room, user: "@bob:b.example".try_into().unwrap() }
    }

    /// The ids of the room's heads.
    pub(crate) fn heads(&self) -> Vec<OwnedEventId> {
        let row = rooms::require_row(&*self.app.store.snapshot(), self.room).unwrap();
        row.heads.iter().map(|head| event::event_id(&head.key, row.version)).collect()
    }

    /// An event on these, allowed by events of the room's current state. Its signature is not checked here.
    pub(crate) fn event(
        &self,
        kind: &str,
        state_key: Option<&str>,
        content: Value,
        prev: &[OwnedEventId],
    ) -> Received {
        let built = self.build(self.app.rooms.signer(), kind, state_key, content, prev);
        let row = rooms::require_row(&*self.app.store.snapshot(), self.room).unwrap();
        Received::check(self.room, &row, built.hash, built.json).unwrap()
    }

    /// Like [`Remote::event`], as whoever has this key builds it.
    pub(crate) fn build(
        &self,
        signer: &Signer,
        kind: &str,
        state_key: Option<&str>,
        content: Value,
        prev: &[OwnedEventId],
    ) -> Built {
        let content: CanonicalJsonObject = serde_json::from_value(content).unwrap();
        let sent_ms = self.app.env.now_ms();
        let draft = Draft::state(self.user.clone(), kind, "", content, sent_ms);
        self.build_draft(signer, Draft { state_key: state_key.map(str::to_owned), ..draft }, prev)
    }

    /// A message of a type of the tests' own that is sticky for some time, on these events.
    pub(crate) fn sticky(&self, body: &str, for_ms: u64, prev: &[OwnedEventId]) -> Received {
        let content = serde_json::from_value(serde_json::json!({ "body": body })).unwrap();
        let draft = Draft::state(self.user.clone(), "m.test", "", content, self.app.env.now_ms());
        let draft = Draft { state_key: None, sticky_ms: Some(for_ms), ..draft };
        let built = self.build_draft(self.app.rooms.signer(), draft, prev);
        let row = rooms::require_row(&*self.app.store.snapshot(), self.room).unwrap();
        Received::check(self.room, &row, built.hash, built.json).unwrap()
    }

    fn build_draft(&self, signer: &Signer, draft: Draft, prev: &[OwnedEventId]) -> Built {
        let snapshot = self.app.store.snapshot();
        let row = rooms::require_row(&*snapshot, self.room).unwrap();
        let rules = rooms::rules(&row).unwrap();
        let raw = draft.raw_content().unwrap();
        let (kind, state_key) = (draft.event_type.as_str(), draft.state_key.as_deref());
        let needed =
            admit::needed_keys(&kind.into(), &self.user, state_key, &raw, &rules.authorization).unwrap();
        let is_implied = rules.authorization.room_create_event_id_as_room_id;
        let mut auth = Vec::new();
        for (kind, key) in needed {
            let found = rooms::find_state(&*snapshot, self.room, &kind.to_string(), &key).unwrap();
            let found = found.filter(|_| !(is_implied && kind.to_string() == "m.room.create"));
            auth.extend(found.map(|stored| stored.id(&row)));
        }
        // The events that it cites need not be known here yet.
        let depth_of = |id: &OwnedEventId| {
            let num = event::find_num(&*snapshot, self.room, id).unwrap();
            num.map_or(1_000, |num| event::require(&*snapshot, self.room, num).unwrap().row.header.depth)
        };
        let depth = prev.iter().map(depth_of).max().unwrap_or(0) + 1;
        let setting = Setting {
            room_id: Some(&row.id),
            rules,
            prev,
            auth: &auth,
            hashes: &some_hashes(&[prev, &auth]),
            depth,
        };
        build::build(signer, &draft, &setting, row.version).unwrap()
    }

    /// A message whose previous events are these.
    pub(crate) fn message(&self, text: &str, prev: &[OwnedEventId]) -> Received {
        self.event("m.room.message", None, serde_json::json!({ "msgtype": "m.text", "body": text }), prev)
    }

    /// Gives one event to our server, which takes it in or refuses it.
    pub(crate) async fn send(&self, event: Received) -> Outcome {
        let mut outcomes = ingest::ingest(&self.app, self.room, vec![event]).await.unwrap();
        assert_eq!(outcomes.len(), 1);
        outcomes.remove(0)
    }

    /// Joins the room, on its heads.
    pub(crate) async fn join(&self) -> OwnedEventId {
        let content = serde_json::json!({ "membership": "join" });
        let event = self.event("m.room.member", Some(self.user.as_str()), content, &self.heads());
        let id = event.id().to_owned();
        let outcome = self.send(event).await;
        assert!(matches!(outcome, Outcome::Accepted(_)), "{outcome:?}");
        id
    }

    /// The event with another value of a top-level field. Nothing looks at its hash here.
    pub(crate) fn rewritten(&self, received: &Received, field: &str, value: Value) -> Received {
        let mut json: Value = serde_json::from_slice(received.json()).unwrap();
        json[field] = value;
        let row = rooms::require_row(&*self.app.store.snapshot(), self.room).unwrap();
        Received::check(self.room, &row, received.hash(), json.to_string().into()).unwrap()
    }
}

/// Some hash for each of these events, for room versions that cite events with their hashes.
pub(crate) fn some_hashes(of: &[&[OwnedEventId]]) -> Hashes {
    of.iter().copied().flatten().map(|id| (id.clone(), Some("x".to_owned()))).collect()
}
