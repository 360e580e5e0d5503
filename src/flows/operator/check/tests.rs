//! A server that has rows in every table, each of which is then lost, and doubled under another key: the check names it.

mod parts;
mod wrong;

use std::collections::{BTreeMap, BTreeSet};

use axum::body::Body;
use bytes::Bytes;
use federation::ports::{StoredDocument, StoredKey};
use http::{Request, StatusCode, header};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tower::ServiceExt;

use super::*;
use crate::{
    api::extract::Peer,
    config::{Config, RegistrationMode},
    encryption::signatures::testing::Pair,
    env::Env,
    ids::{EventNum, Order, Position, RoomNum, SideNum, UserNum},
    schema::{
        remote::{InboundEventRow, InboundLineRow, InboundTransactionRow},
        rooms::{AsideRow, Place},
        state::{HoleRow, LeftOutRow, SideRow, StateValue},
    },
    server::{Lead, Server},
    store::{
        Direction, Durability, Engine, Family, Guard, Read, cursor,
        engine::{Change, Memory},
        key::Json,
        tables::TableInfo,
    },
};

struct Fixture {
    server: Server,
    token: String,
}

impl Fixture {
    async fn ask(&self, method: &str, path: &str, token: &str, body: Value) -> Value {
        let request = Request::builder().method(method).uri(path);
        let request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        let mut request = request.body(Body::from(body.to_string())).unwrap();
        request.extensions_mut().insert(Peer([192, 0, 2, 1].into()));
        let response = self.server.router().oneshot(request).await.unwrap();
        let status = response.status();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        let json = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
        assert_eq!(status, StatusCode::OK, "{method} {path}: {json}");
        json
    }

    async fn own(&self, method: &str, path: &str, body: Value) -> Value {
        self.ask(method, &format!("/_matrix/client/v3/{path}"), &self.token, body).await
    }

    fn store(&self) -> &Store {
        &self.server.app().store
    }

    /// Writes rows through the store, as their owners do.
    fn write(&self, change: impl FnOnce(&mut crate::store::Batch)) {
        let mut batch = self.store().batch(&Guard::alone());
        change(&mut batch);
        drop(self.store().enqueue(batch).unwrap());
        self.store().flush().unwrap();
    }

    /// Writes behind the store's back.
    fn damage(&self, change: Change) {
        self.store().engine().write(std::iter::once(&change), false).unwrap();
        self.write(|_| ());
    }

    fn rows(&self) -> BTreeMap<&'static str, Vec<(Family, Bytes, Bytes)>> {
        let snapshot = self.store().snapshot();
        let mut rows = BTreeMap::<_, Vec<_>>::new();
        for TableInfo { id, family, name, .. } in schema::all() {
            for row in snapshot.range_raw(*family, vec![*id], vec![*id + 1], Direction::Up).unwrap() {
                let (key, value) = row.unwrap();
                rows.entry(*name).or_default().push((*family, key, value));
            }
        }
        rows
    }

    fn findings(&self) -> Vec<String> {
        check(self.store(), &mut |_| ()).unwrap().findings
    }
}

fn text(json: &Value, key: &str) -> String {
    json[key].as_str().unwrap_or_else(|| panic!("no {key} in {json}")).to_owned()
}

fn register(name: &str) -> Value {
    json!({ "username": name, "password": "a password", "auth": { "type": "m.login.dummy" }, "refresh_token": true })
}

/// A user who has used every feature, so that each table has rows.
async fn a_house() -> Fixture {
    let mut config = Config::default();
    config.server.name = "check.example".try_into().unwrap();
    config.registration.mode = RegistrationMode::Open;
    config.passwords.argon2_memory_kib = 8;
    config.passwords.argon2_iterations = 1;
    config.limits.rate_limits = false;
    let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
    let server =
        Server::start(config, Env::simulated(1, 1_767_225_600_000), store, Some(Lead::of_only_node()))
            .unwrap();
    let mut fixture = Fixture { server, token: String::new() };
    let alice = fixture.own("POST", "register", register("alice")).await;
    let bob = text(&fixture.own("POST", "register", register("bob")).await, "access_token");
    fixture.token = text(&alice, "access_token");
    let device = text(&alice, "device_id");
    fixture.own("PUT", "presence/@alice:check.example/status", json!({ "presence": "online" })).await;
    fixture.own("PUT", "profile/@alice:check.example/displayname", json!({ "displayname": "Alice" })).await;
    fixture.own("POST", "user/@alice:check.example/filter", json!({ "room": {} })).await;
    fixture.own("POST", "users/@bob:check.example/report", json!({ "reason": "so" })).await;
    fixture.own("PUT", "user/@alice:check.example/account_data/kind", json!({ "a": 1 })).await;
    fixture.own("PUT", "user/@alice:check.example/account_data/other", json!({ "a": 1 })).await;
    fixture
        .own("PUT", "pushrules/global/override/mine", json!({ "actions": ["notify"], "conditions": [] }))
        .await;
    let pusher = json!({
        "kind": "http", "app_id": "app", "pushkey": "key", "app_display_name": "App", "lang": "en",
        "device_display_name": "phone", "data": { "url": "https://push.example/_matrix/push/v1/notify" },
    });
    fixture.own("POST", "pushers/set", pusher).await;
    fixture
        .own(
            "POST",
            "keys/upload",
            json!({
                "device_keys": Pair::new(1).device_keys("@alice:check.example", &device),
                "one_time_keys": { "curve25519:A": "a", "curve25519:B": "b", "curve25519:C": "c" },
                "fallback_keys": { "curve25519:F": { "key": "f", "fallback": true } },
            }),
        )
        .await;
    let claim = json!({ "one_time_keys": { "@alice:check.example": { &device: "curve25519" } } });
    fixture.own("POST", "keys/claim", claim).await;
    fixture.own("POST", "room_keys/version", json!({ "algorithm": "a", "auth_data": {} })).await;
    let backed_up = json!({
        "first_message_index": 1, "forwarded_count": 0, "is_verified": true, "session_data": { "mac": "m" },
    });
    fixture.own("PUT", "room_keys/keys/!a:x/session?version=1", backed_up).await;
    let dehydrated = json!({
        "device_id": "DRY", "device_data": {}, "device_keys": {
            "user_id": "@alice:check.example", "device_id": "DRY", "algorithms": [], "keys": {}, "signatures": {},
        },
    });
    let path = "/_matrix/client/unstable/org.matrix.msc3814.v1/dehydrated_device";
    fixture.ask("PUT", path, &fixture.token, dehydrated).await;
    sign_keys(&fixture, &device, &bob).await;
    let to_alice = json!({ "messages": { "@alice:check.example": { "*": { "n": 1 } } } });
    fixture.own("PUT", "sendToDevice/m.test/1", to_alice.clone()).await;
    fixture.own("PUT", "sendToDevice/m.room_key_request/2", to_alice).await;
    let room = json!({
        "preset": "public_chat", "name": "A room", "room_alias_name": "here", "visibility": "public",
        "invite": ["@bob:check.example"], "power_level_content_override": { "events_default": 0 },
    });
    let room = text(&fixture.own("POST", "createRoom", room).await, "room_id");
    fixture.own("POST", "createRoom", json!({ "room_alias_name": "there", "visibility": "public" })).await;
    fixture.ask("POST", &format!("/_matrix/client/v3/join/{room}"), &bob, json!({})).await;
    fixture.own("POST", "user/@alice:check.example/openid/request_token", json!({})).await;
    let send = |txn: &str, content: Value| {
        let path = format!("rooms/{room}/send/m.room.message/{txn}");
        let fixture = &fixture;
        async move { text(&fixture.own("PUT", &path, content).await, "event_id") }
    };
    let said = send("1", json!({ "msgtype": "m.text", "body": "first" })).await;
    let edit = json!({ "rel_type": "m.replace", "event_id": said });
    send("2", json!({ "msgtype": "m.text", "body": "* 1", "m.relates_to": edit })).await;
    let thread = json!({ "rel_type": "m.thread", "event_id": said });
    send("3", json!({ "msgtype": "m.text", "body": "in thread", "m.relates_to": thread })).await;
    let hail =
        json!({ "msgtype": "m.text", "body": "Bob!", "m.mentions": { "user_ids": ["@bob:check.example"] } });
    send("4", hail).await;
    let reaction = json!({ "rel_type": "m.annotation", "event_id": said, "key": "+" });
    fixture.own("PUT", &format!("rooms/{room}/send/m.reaction/7"), json!({ "m.relates_to": reaction })).await;
    let sticky = format!("rooms/{room}/send/m.test/11?org.matrix.msc4354.sticky_duration_ms=3600000");
    fixture.own("PUT", &sticky, json!({})).await;
    let wrong = send("5", json!({ "msgtype": "m.text", "body": "wrong" })).await;
    fixture.own("PUT", &format!("rooms/{room}/redact/{wrong}/6"), json!({})).await;
    fixture.own("POST", &format!("rooms/{room}/receipt/m.read/{said}"), json!({})).await;
    fixture.own("POST", &format!("rooms/{room}/receipt/m.read.private/{said}"), json!({})).await;
    let bobs = format!("/_matrix/client/v3/rooms/{room}/receipt/m.read/{wrong}");
    fixture.ask("POST", &bobs, &bob, json!({})).await;
    let list = json!({ "range": [0, 9], "timeline_limit": 1, "required_state": { "include": [{}] } });
    let slide = json!({ "lists": { "all": list } });
    fixture.ask("POST", "/_matrix/client/v4/sync", &fixture.token, slide).await;
    fixture.server.app().env.sleep(std::time::Duration::from_secs(1)).await;
    let topic =
        fixture.own("PUT", &format!("rooms/{room}/state/m.room.topic"), json!({ "topic": "one" })).await;
    fixture.own("PUT", &format!("rooms/{room}/redact/{}/8", text(&topic, "event_id")), json!({})).await;
    fixture.own("PUT", &format!("rooms/{room}/state/m.room.topic"), json!({ "topic": "two" })).await;
    let thread =
        format!("/_matrix/client/unstable/io.element.msc4306/rooms/{room}/thread/{said}/subscription");
    fixture.ask("PUT", &thread, &fixture.token, json!({})).await;
    let later = async |txn: &str| {
        let path = format!("rooms/{room}/send/m.test/{txn}?org.matrix.msc4140.delay=86400000");
        text(&fixture.own("PUT", &path, json!({})).await, "delay_id")
    };
    later("9").await;
    let delayed = "/_matrix/client/unstable/org.matrix.msc4140/delayed_events";
    let cancel = format!("{delayed}/{}/cancel", later("10").await);
    fixture.ask("POST", &cancel, &fixture.token, json!({})).await;
    fixture.own("POST", "register", register("carol")).await;
    let token = crate::schema::accounts::RegistrationTokenRow::default();
    fixture.write(|batch| {
        crate::accounts::users::deactivate(batch, UserNum(3), true).unwrap();
        crate::accounts::registration::create_token(batch, "token", &token).unwrap();
        cursor::advance(batch, "reader", Position::new(3).unwrap());
        crate::store::timer::set(batch, &Job::TellRooms { user: UserNum(1) }.timer(u64::MAX));
    });
    while let Some(batch) = crate::store::tail::trim(fixture.store(), 1_767_225_600_000).unwrap() {
        drop(fixture.store().enqueue(batch).unwrap());
        fixture.store().flush().unwrap();
    }
    add_what_only_other_servers_make(&fixture);
    add_media(&fixture);
    add_mail(&fixture);
    fixture
}

/// Adds an address of Alice, a pusher that mails there, and what she wishes of that.
fn add_mail(fixture: &Fixture) {
    use crate::{
        accounts::emails,
        ids::DeviceNum,
        push::pushers::{self, NewPusher, Takes},
        schema::email::PreferencesRow,
    };
    let (alice, address) = (UserNum(1), "alice@example.org");
    let pusher = json!({
        "kind": "email", "app_id": "m.email", "pushkey": address, "app_display_name": "", "lang": "en",
        "device_display_name": "", "data": {},
    });
    let pusher = serde_json::from_value(pusher).unwrap();
    let new = NewPusher { pusher, append: true, is_enabled: true, now_ms: 1, secret: "secret".to_owned() };
    fixture.write(|batch| {
        emails::add(batch, alice, address, 1).unwrap();
        let takes = Takes { http_gateways: false, email: true };
        pushers::set(batch, (alice, DeviceNum(1)), &new, takes).unwrap();
        pushers::set_preferences(batch, alice, PreferencesRow::default()).unwrap();
    });
}

/// Adds items with and without bytes, a thumbnail, an item of another server, and a blob that is about to be.
fn add_media(fixture: &Fixture) {
    use crate::{
        media::{
            Name,
            items::{self, UserBounds},
            links, objects,
        },
        schema::media::{ContentRow, Digest, Home, ThumbnailRow},
    };
    let (alice, now_ms) = (UserNum(1), 1_767_225_600_000);
    let name = |id: &str| Name::of("check.example", id).unwrap();
    let (content_type, digest) = ("image/png".to_owned(), Digest([1; 32]));
    let content = ContentRow { digest, bytes: 10, content_type: content_type.clone(), name: None };
    fixture.write(|batch| {
        let bounds = UserBounds { bytes_max: 0, created_max: 9 };
        let object = objects::claim(batch, &digest, 10, (now_ms, Home::Disk)).unwrap();
        let (own, at) = ((&name("one"), None), (now_ms, false));
        assert!(items::keep_own(batch, alice, own, (content.clone(), object), at, bounds).unwrap());
        let original = Digest([4; 32]);
        let beside = objects::claim(batch, &original, 20, (now_ms, Home::Disk)).unwrap();
        let uploaded = ContentRow { digest: original, bytes: 20, ..content.clone() };
        assert!(items::keep_original(batch, alice, &name("one"), (uploaded, beside), bounds).unwrap());
        let other = Name::of("b.example", "three").unwrap();
        let kept = items::keep_other(batch, &other, (content.clone(), object), at).unwrap();
        assert_eq!(kept, items::Kept::New);
        items::create(batch, alice, &name("two"), (now_ms, now_ms + 864_000_000), bounds).unwrap();
        let thumbnail = ThumbnailRow { digest: Digest([2; 32]), bytes: 5, content_type };
        let object = objects::claim(batch, &thumbnail.digest, 5, (now_ms, Home::Disk)).unwrap();
        let of_one = (&name("one"), "8x8");
        assert!(items::keep_thumbnail(batch, of_one, (&thumbnail, object), now_ms).unwrap());
        objects::claim(batch, &Digest([3; 32]), 7, (now_ms, Home::Disk)).unwrap();
        let wish = links::Wish { lifetime_ms: links::LIFETIME_MAX_MS, is_once: true };
        links::make(batch, (alice, false), &name("one"), ("a token", "an_id"), (wish, now_ms)).unwrap();
    });
    add_preview(fixture, now_ms);
    let mut note = fixture.store().note(&Guard::own_tables());
    items::note_seen(&mut note, &name("one"), now_ms);
    drop(fixture.store().enqueue_note(note).unwrap());
    fixture.store().flush().unwrap();
}

/// Adds the preview of a page, with an image that has been deleted since.
fn add_preview(fixture: &Fixture, at_ms: u64) {
    use crate::{
        media::preview::{address, rows},
        schema::previews::{ImageRow, PreviewRow, Told},
    };
    let url = address::parse("https://a.example/").unwrap();
    let image =
        ImageRow { id: "gone".to_owned(), content_type: "image/png".to_owned(), bytes: 5, size: None };
    let (told, until_ms) = (Some(Told::default()), at_ms + rows::FRESH_MS);
    let row = PreviewRow { url: url.to_string(), until_ms, told, image: Some(image) };
    fixture.write(|batch| {
        rows::put(batch, "check.example", (rows::digest(&url), at_ms), &row).unwrap();
    });
}

/// Has Alice sign with keys of her own: her device, her master key, and that of Bob.
async fn sign_keys(fixture: &Fixture, device: &str, bob: &str) {
    let (alice, [master, self_signing, user_signing]) = ("@alice:check.example", [2, 3, 4].map(Pair::new));
    let by_device = |key: Value| {
        let mut key = key;
        Pair::new(1).sign(alice, device, &mut key);
        key
    };
    let by_master = |mut key: Value| {
        master.sign(alice, &master.public(), &mut key);
        key
    };
    let keys = json!({
        "master_key": by_device(master.signing_key(alice, "master")),
        "self_signing_key": by_master(self_signing.signing_key(alice, "self_signing")),
        "user_signing_key": by_master(user_signing.signing_key(alice, "user_signing")),
    });
    fixture.own("POST", "keys/device_signing/upload", keys).await;
    let bobs = Pair::new(5).signing_key("@bob:check.example", "master");
    let path = "/_matrix/client/v3/keys/device_signing/upload";
    fixture.ask("POST", path, bob, json!({ "master_key": bobs })).await;
    let mut device_keys = Pair::new(1).device_keys(alice, device);
    self_signing.sign(alice, &self_signing.public(), &mut device_keys);
    let mut bobs = bobs;
    user_signing.sign(alice, &user_signing.public(), &mut bobs);
    let signed =
        json!({ alice: { device: device_keys }, "@bob:check.example": { Pair::new(5).public(): bobs } });
    let answer = fixture.own("POST", "keys/signatures/upload", signed).await;
    assert_eq!(answer, json!({ "failures": {} }));
}

/// Writes an event put aside, two side states, a hole and a step that is not finished: rows that come with federation.
fn add_what_only_other_servers_make(fixture: &Fixture) {
    fixture.write(|batch| {
        let room = RoomNum(1);
        let mut row = schema::ROOM.get(batch, room).unwrap().unwrap();
        let ((_, order), event) =
            schema::TIMELINE.prefix::<(RoomNum,)>(batch, (room,), Direction::Down).unwrap().next().unwrap().unwrap();
        let key = event.header.state_key.unwrap();
        let base = crate::schema::state::StateRef::Main(row.state_tip);
        let own = SideRow::new(base, 1, [(key, StateValue::Absent)]);
        schema::SIDE.put(batch, (room, SideNum(row.next_side)), &own);
        let base = crate::schema::state::StateRef::Side(SideNum(row.next_side));
        let other = SideNum(row.next_side + 1);
        schema::SIDE.put(batch, (room, other), &SideRow::new(base, 2, [(key, StateValue::Absent)]));
        let base = crate::schema::state::StateRef::Side(other);
        row.next_side += 2;
        // A message that cites the newest event, as if it were somebody else's.
        let (header, json) = {
            let rules = crate::rooms::rules(&row).unwrap();
            let json = json!({
                "auth_events": [], "content": {}, "depth": 99, "hashes": { "sha256": "" }, "origin_server_ts": 1,
                "prev_events": [], "sender": "@carol:elsewhere.example", "signatures": {}, "type": "x",
            });
            let bytes = Bytes::from(json.to_string());
            let object: ruma::CanonicalJsonObject = serde_json::from_slice(&bytes).unwrap();
            let hash = ruma::signatures::reference_hash(&object, rules).unwrap();
            let id = ruma::EventId::parse(format!("${hash}")).unwrap();
            let header = crate::schema::rooms::EventHeader {
                event: EventNum(row.next_event),
                key: crate::rooms::event::parse_event_id(&id, room, row.version).unwrap(),
                state_key: None,
                replaces: None,
                redacted_by: None,
                before: Some(base),
                after: None,
                prev: vec![event.header.event],
                auth: Vec::new(),
                sent_by: None,
                spans: crate::rooms::event::locate(&bytes).unwrap(),
                ..event.header.clone()
            };
            (header, bytes)
        };
        row.next_event += 1;
        schema::EVENT_ID.put(batch, &header.key, &(room, header.event));
        schema::PLACE.put(batch, (room, header.event), &Place::Aside);
        let number = header.event;
        let row_of_event = crate::schema::rooms::EventRow { header, json };
        let aside = AsideRow { rejected: true, is_needed: false, why: "so".to_owned(), row: row_of_event };
        schema::ASIDE.put(batch, (room, number), &aside);
        let counted = crate::schema::rooms::AsideCount { count: 1, ..Default::default() };
        schema::ASIDE_COUNT.put(batch, room, &counted);
        schema::STICKY_ASIDE.put(batch, (room, "@carol:elsewhere.example", number), &u64::MAX);
        let waiting = crate::schema::rooms::RedactionWaitingRow { by_power: true };
        schema::REDACTION_WAITING.put(batch, (room, &[7; 32].into(), number), &waiting);
        schema::RELATION_WAITING.put(batch, (room, &[8; 32].into(), number), &());
        let json = aside.row.json.clone();
        let left_out = LeftOutRow { base: order, is_state: true, at_ms: 1, json };
        schema::LEFT_OUT.put(batch, (room, "m.room.topic", "", 1), &left_out);
        schema::HOLE.put(batch, (room, order), &HoleRow::default());
        schema::PURGE.put(batch, room, &crate::schema::state::PurgeRow { below: order });
        let retention = crate::schema::rooms::RetentionRow { below: order, due_ms: Some(1), lifetime_ms: 1 };
        schema::RETENTION.put(batch, room, &retention);
        let marker = Order { minor: -1, ..order };
        let count = schema::STATE_LOG.get(batch, (room, order)).unwrap().unwrap().count - 1;
        let log = crate::schema::state::LogRow { count, changes: Vec::new() };
        schema::STATE_LOG.put(batch, (room, marker), &log);
        schema::ROOM.put(batch, room, &row);
        let step = crate::schema::state::StageRow { anchor: Some(Position::MAX), makes_room: false, brings_from: None };
        schema::STAGE.put(batch, room, &step);
        let key = StoredKey { public_key: [1; 32], valid_until_ms: 2, expired_ms: None, fetched_ms: 1 };
        let key = crate::schema::remote::ServerKeyRow { key, asked_ms: 1 };
        schema::SERVER_KEYS.put(batch, ("b.example", "ed25519:k"), &Json(key));
        let document = StoredDocument { json: "{}".to_owned(), valid_until_ms: 2, fetched_ms: 1 };
        schema::SERVER_DOCUMENTS.put(batch, "b.example", &Json(document));
        let answered =
            InboundTransactionRow { number: 17, id: "x".to_owned(), at_ms: 1, answer: "{}".to_owned() };
        schema::INBOUND_TRANSACTION.put(batch, ("b.example", 1), &Json(answered));
        let waits = InboundEventRow {
            origin: "b.example".to_owned(),
            id: "$waits:b.example".try_into().unwrap(),
            received_ms: 1,
            json: Bytes::from_static(b"{}"),
        };
        schema::INBOUND_EVENT.put(batch, (room, 1), &waits);
        schema::INBOUND_MESSAGE.put(batch, ("b.example", "x"), &Default::default());
        let place = InboundLineRow { origin: "b.example".to_owned(), id: "x".to_owned() };
        schema::INBOUND_LINE.put(batch, ("b.example", 1), &Json(place));
        let to = (UserNum(1), crate::ids::DeviceNum(1));
        let content = serde_json::value::RawValue::from_string("{}".to_owned()).unwrap();
        let sender = ruma::user_id!("@carol:b.example");
        let message = crate::encryption::inbox::Message::new(sender, "m.test", &content).unwrap();
        let message = message.from_elsewhere(crate::encryption::inbox::Nearness::Stranger);
        crate::encryption::inbox::put(batch, to, &message).unwrap().kept.unwrap();
        schema::BEHIND.put(batch, ("b.example", room), &Position::new(3).unwrap());
        schema::DEVICES_BEHIND.put(batch, ("b.example", UserNum(1)), &Position::new(3).unwrap());
        // The list of the one device of Carol.
        let carol = "@carol:b.example";
        let device = crate::schema::encryption::OtherDeviceRow { keys: "{}".to_owned(), display_name: None };
        schema::OTHER_DEVICE.put(batch, (carol, "DEV"), &Json(device));
        let list =
            crate::schema::encryption::OtherListRow { streams: vec![1], devices: 1, bytes: 5, ..Default::default() };
        schema::OTHER_LIST.put(batch, ("b.example", carol), &Json(list));
        let count = crate::schema::encryption::OtherCount { users: 1, bytes: 5 };
        schema::OTHER_COUNT.put(batch, "b.example", &count);
        let failing = federation::backoff::Failing { failures: 1, since_ms: 1, next_try_ms: 2 };
        let failing = crate::schema::remote::DestinationRow { failing, why: "so".to_owned() };
        schema::DESTINATION.put(batch, "b.example", &Json(failing));
        let key = crate::schema::remote::SigningKeyRow {
            seed: None,
            public_key: Some("A".repeat(43)),
            expired_ms: Some(1),
        };
        schema::SIGNING_KEYS.put(batch, "ed25519:old", &Json(key));
        let message = Bytes::from_static(b"{}");
        crate::delivery::servers::outbox::put(batch, "b.example", UserNum(1), message, 1);
        // A room that another server has invited Bob to.
        let (user, invited) = (UserNum(2), RoomNum(3));
        let id = ruma::RoomId::parse("!elsewhere:b.example").unwrap();
        let mut row = schema::rooms::RoomRow::new(id, 11, schema::rooms::Resident::Invited);
        row.next_event = 1;
        schema::ROOM_ID.put(batch, row.id.as_str(), &invited);
        schema::ROOM.put(batch, invited, &row);
        let row = schema::rooms::UserRoomRow {
            membership: schema::rooms::Membership::Invite,
            since: Position::new(3).unwrap(),
            event: EventNum(0),
            forgotten: false,
            left: None,
            forgotten_below: None,
        };
        schema::USER_ROOM.put(batch, (user, invited), &row.into());
        schema::ROOM_USER.put(batch, (invited, user), &row.membership.into());
        let shown = schema::remote::Standing {
            sender: "@carol:b.example".to_owned(),
            event: "{}".to_owned(),
            state: vec!["{}".to_owned()],
            version: 11,
            via: String::new(),
        };
        let row = schema::remote::OutsideRow { number: 0, shown, others: Vec::new() };
        schema::OUTSIDE.put(batch, (invited, user), &Json(row));
        schema::INVITED.put(batch, (user, "b.example", invited), &());
    });
}

/// The loss of a row of these tables leaves no trace in other tables: nothing refers to the row, it counts from nothing, it is
/// a note, or it is a log entry that is trimmed one day. A head is written again with each flush.
const MAY_BE_LOST: &[&str] = &[
    "ACCOUNT_DATA_SIZE",
    "BEHIND",
    "CROSS_SIGNING_KEYS",
    "CURSOR",
    "DEHYDRATED",
    "DELAYED_TIMER",
    "DESTINATION",
    "DEVICES_BEHIND",
    "DEVICE_KEYS",
    "DEVICE_SEEN",
    "DEVICE_SIGNED",
    "DEVICE_STEP",
    "EMAIL_PREFERENCES",
    "FILTERS",
    "HEAD",
    "HOLE",
    "INBOUND_EVENT",
    "INBOUND_LINE",
    "INBOUND_MESSAGE",
    "INBOUND_TRANSACTION",
    "INVITED",
    "LEFT_OUT",
    "LOG",
    "LOG_TIME",
    "MASTER_SIGNED",
    "MEDIA_SEEN",
    "OPENID_TOKENS",
    "OUTBOX",
    "PASSWORDS",
    "PRESENCE",
    "PROFILES",
    "PUBLISHED",
    "PURGE",
    "PUSH_RULES",
    "REDACTED_ORIGINAL",
    "REDACTED_STATE",
    "REDACTION_WAITING",
    "REGISTRATION_TOKENS",
    "RELATION_WAITING",
    "RETENTION",
    "REPORTS",
    "SERVER_DOCUMENTS",
    "SERVER_FACTS",
    "SERVER_KEYS",
    "SIGNING_KEYS",
    "STAGE",
    "STICKY_ASIDE",
    "SYNC_CONNECTION_ROOMS",
    "TIMER",
    "TO_DEVICE_TXN_LOG",
    "UNREAD",
    "UNREAD_OWN",
    "UNREAD_REDACTED",
    "UNREAD_SENT",
    "URL_PREVIEW",
];
/// A second row under another key is no fault in these tables: any hour may have a row, an empty row of the log of states is
/// a marker, an entry of the log may stand at any position that staged steps have jumped over, and an event of another server may
/// wait or be left out, and a message be remembered, under any number.
const MAY_BE_STRAY: [&str; 6] = ["INBOUND_EVENT", "INBOUND_LINE", "LEFT_OUT", "LOG", "LOG_TIME", "STATE_LOG"];

#[tokio::test(start_paused = true)]
async fn whichever_row_is_lost_or_stray_is_found() {
    let fixture = a_house().await;
    assert_eq!(fixture.findings(), [""; 0]);
    let all = fixture.rows();
    let (mut lost, mut stray, mut said) = (BTreeSet::new(), BTreeSet::new(), Vec::new());
    for (name, rows) in &all {
        for (family, key, value) in rows {
            fixture.damage(Change::Row(*family, key.clone(), None));
            let findings = fixture.findings();
            if findings.is_empty() {
                lost.insert(*name);
            }
            said.extend(findings);
            fixture.damage(Change::Row(*family, key.clone(), Some(value.clone())));
            // The same row under the next number.
            let mut other = key.to_vec();
            *other.last_mut().unwrap() ^= 0x40;
            if rows.iter().any(|(_, key, _)| **key == *other) || other[0] != key[0] {
                continue;
            }
            fixture.damage(Change::Row(*family, other.clone().into(), Some(value.clone())));
            let findings = fixture.findings();
            if findings.iter().all(|finding| !finding.contains(name)) {
                stray.insert(*name);
            }
            said.extend(findings);
            fixture.damage(Change::Row(*family, other.into(), None));
        }
    }
    assert!(all.len() + 1 >= schema::all().count(), "some tables have no row: {:?}", all.keys());
    assert_eq!(lost, MAY_BE_LOST.iter().copied().collect());
    // The changed key may name a position at which another message was sent, or one from before the last change of a device list,
    // which is superseded. It follows from all that the fixture does whether it does.
    for table in ["DEVICE_LOG", "OUTBOX"] {
        stray.remove(table);
    }
    assert_eq!(stray, BTreeSet::from(MAY_BE_STRAY));
    assert_eq!(fixture.findings(), [""; 0]);
    wrong::damage_each(&fixture, &mut said);
    assert_eq!(fixture.findings(), [""; 0]);
    assert_eq!(wrong::list_unsaid(&said), [""; 0], "kinds of faults that this test never sees reported");
}

#[test]
fn what_the_log_names_must_be_there() {
    let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
    for entry in [
        LogEntry::Receipts { room: RoomNum(1) },
        LogEntry::RoomState { room: RoomNum(2) },
        LogEntry::Account { user: UserNum(3) },
        LogEntry::ToDevice { user: UserNum(4) },
    ] {
        let mut batch = store.batch(&Guard::alone());
        batch.position(&entry);
        drop(store.enqueue(batch).unwrap());
    }
    store.flush().unwrap();
    let findings = check(&store, &mut |_| ()).unwrap().findings;
    let named = ["room 1", "room 2", "account 3", "account 4"];
    assert_eq!(findings.len(), 4, "{findings:?}");
    assert!(findings.iter().zip(named).all(|(finding, named)| finding.ends_with(named)), "{findings:?}");
}

#[tokio::test(start_paused = true)]
async fn a_room_that_is_made_in_parts_is_no_fault_whenever_the_server_ends() {
    let mut fixture = a_house().await;
    fixture.write(|batch| schema::STAGE.delete(batch, RoomNum(1)));
    let before = fixture.own("GET", "joined_rooms", Value::Null).await;
    // The engine is kept as a crash would leave it after each batch while the room is unfinished.
    let kept = std::sync::Arc::new(parking_lot::Mutex::new(Vec::new()));
    let keeps = std::sync::Arc::clone(&kept);
    let keep = move |store: &Store| {
        store.flush().unwrap();
        let is_open = !crate::rooms::state::stage::list_rooms(&*store.snapshot()).unwrap().is_empty();
        if let (true, Engine::Memory(memory)) = (is_open, store.engine()) {
            keeps.lock().push(memory.after_crash(usize::MAX));
        }
    };
    fixture.store().watch(keep.clone());
    let initial: Vec<_> =
        (0..16).map(|key| json!({ "type": "x", "state_key": key.to_string(), "content": {} })).collect();
    let body = json!({ "name": "Made in parts", "invite": ["@bob:check.example"], "initial_state": initial });
    let room = text(&fixture.own("POST", "createRoom", body).await, "room_id");
    fixture.store().watch(|_| ());
    assert_eq!(fixture.findings(), [""; 0]);
    let crashes = std::mem::take(&mut *kept.lock());
    assert!(crashes.len() >= 2, "the room is written in {} parts", crashes.len());
    for (number, crash) in crashes.into_iter().enumerate() {
        let store = Store::open(Engine::Memory(crash), Durability::Fsync).unwrap();
        assert_eq!(check(&store, &mut |_| ()).unwrap().findings, [""; 0], "after part {number}");
        // The server starts, and takes the room back in parts; it may end after each of them.
        store.watch(keep.clone());
        let config = fixture.server.app().config.as_ref().clone();
        let env = Env::simulated(2, 1_767_225_700_000);
        fixture.server = Server::start(config, env, store, Some(Lead::of_only_node())).unwrap();
        fixture.server.app().env.sleep(std::time::Duration::from_secs(1)).await;
        let snapshot = fixture.store().snapshot();
        assert_eq!(crate::rooms::state::stage::list_rooms(&*snapshot).unwrap(), []);
        assert_eq!(schema::ROOM_ID.get(&*snapshot, &room).unwrap(), None, "nothing is left of the room");
        assert_eq!(fixture.findings(), [""; 0], "taken back after part {number}");
        assert_eq!(fixture.own("GET", "joined_rooms", Value::Null).await, before);
        for crash in std::mem::take(&mut *kept.lock()) {
            let store = Store::open(Engine::Memory(crash), Durability::Fsync).unwrap();
            assert_eq!(
                check(&store, &mut |_| ()).unwrap().findings,
                [""; 0],
                "half taken back after {number}"
            );
        }
        fixture.store().watch(|_| ());
    }
}

#[tokio::test(start_paused = true)]
async fn rows_of_older_versions_get_what_rows_have_now() {
    let mut fixture = a_house().await;
    fixture.write(|batch| schema::STAGE.delete(batch, RoomNum(1)));
    let to_alice = json!({ "messages": { "@alice:check.example": { "*": { "n": 2 } } } });
    fixture.own("PUT", "sendToDevice/m.test/3", to_alice).await;
    let now = fixture.rows();
    // Rows as older versions wrote them: no counts of inboxes and of events aside, one log for all receipts, another table of transactions.
    for table in ["INBOX_SHARE", "INBOX_KEY_REQUEST", "ASIDE_COUNT"] {
        for (family, key, _) in &now[table] {
            fixture.damage(Change::Row(*family, key.clone(), None));
        }
    }
    fixture.write(|batch| {
        let private: Vec<_> = schema::PRIVATE_RECEIPT_LOG
            .prefix::<()>(batch, (), Direction::Up)
            .unwrap()
            .map(Result::unwrap)
            .collect();
        assert!(!private.is_empty());
        for ((room, user, position), key) in private {
            schema::PRIVATE_RECEIPT_LOG.delete(batch, (room, user.as_str(), position));
            schema::RECEIPT_LOG.put(batch, (room, position), &key);
        }
    });
    fixture.damage(Change::Row(Family::Index, vec![17, 1].into(), Some(Bytes::from_static(b"x"))));
    let is_layout = |(_, key, _): &&(Family, Bytes, Bytes)| key.windows(6).any(|part| part == b"layout");
    let (family, key, value) = now["HEAD"].iter().find(is_layout).unwrap();
    let first: Vec<u8> = value.iter().map(|byte| u8::from(*byte != 0)).collect();
    fixture.damage(Change::Row(*family, key.clone(), Some(first.into())));
    assert!(fixture.findings().len() >= 5, "{:?}", fixture.findings());
    fixture.store().flush().unwrap();
    let Engine::Memory(memory) = fixture.store().engine() else { unreachable!() };
    let store = Store::open(Engine::Memory(memory.after_crash(usize::MAX)), Durability::Fsync).unwrap();
    let config = fixture.server.app().config.as_ref().clone();
    let env = Env::simulated(2, 1_767_225_700_000);
    fixture.server = Server::start(config, env, store, Some(Lead::of_only_node())).unwrap();
    assert_eq!(fixture.findings(), [""; 0]);
    let after = fixture.rows();
    for table in ["INBOX_SHARE", "INBOX_KEY_REQUEST", "ASIDE_COUNT", "PRIVATE_RECEIPT_LOG", "RECEIPT_LOG"] {
        // Stores so old have no messages of other servers, whose parts are counted since there are such.
        let is_old = |(_, key, _): &&(Family, Bytes, Bytes)| {
            table != "INBOX_SHARE" || !key.contains(&b':') || key.contains(&b'@')
        };
        let (found, expected): (Vec<_>, Vec<_>) =
            (after[table].iter().filter(is_old).collect(), now[table].iter().filter(is_old).collect());
        assert_eq!(found, expected, "{table}");
    }
    assert_eq!(after["HEAD"].iter().find(is_layout), now["HEAD"].iter().find(is_layout));
}
