//! A random model of sliding sync: whatever happens in rooms, and whatever a client asks for and loses, what it puts together of
//! each room is what the server has and what a client of `/sync` would be told.

use std::collections::{BTreeMap, BTreeSet};

use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    forks::Forker,
    sliding_sync::Slide,
    support::{TestClient, TestServer, encoded},
    sync::{Chain, Dice, create_room},
    sync_model::{restarted, step},
};

/// A room's state: (type, state key) to event id and content.
type State = BTreeMap<(String, String), (String, Value)>;

/// An event of a timeline, by its id. Of a message also its sender, who may be ignored before or after.
type Shown = (String, Option<String>);

fn shown(event: &Value) -> Shown {
    let is_state = event["state_key"].is_string();
    (text(&event["event_id"]).unwrap(), text(&event["sender"]).filter(|_| !is_state))
}

/// Everything that a client knows of one room.
#[derive(Clone, Debug, Default)]
struct Known {
    membership: String,
    name: Option<String>,
    is_dm: bool,
    joined: u64,
    invited: u64,
    unread: u64,
    /// The events that were shown since the last gap or beginning, the oldest first.
    events: Vec<Shown>,
    /// Whether nothing stands before these events that the client might ask for.
    is_whole: bool,
    state: State,
    /// For some time the client wanted no members, so that those that it was told lazily before may be old.
    has_old_members: bool,
}

/// The wishes for state that clients have by turns.
fn wishes() -> [Value; 5] {
    [
        json!([["*", "*"]]),
        json!([["m.room.name", ""], ["m.room.member", "$LAZY"], ["m.room.member", "$ME"]]),
        json!([["org.example.thing", "*"], ["m.room.topic", ""]]),
        json!({ "include": [{}], "exclude": [{ "type": "m.room.topic" }], "lazy_members": true }),
        json!([]),
    ]
}

/// Whether a wish names a state key, apart from members that are told lazily.
fn names(wish: usize, (event_type, state_key): &(String, String), me: &str) -> bool {
    let is_member = event_type == "m.room.member";
    match wish {
        0 => true,
        1 => event_type == "m.room.name" || (is_member && state_key == me),
        2 => event_type == "org.example.thing" || event_type == "m.room.topic",
        3 => event_type != "m.room.topic" && !is_member,
        _ => false,
    }
}

fn key(event: &Value) -> (String, String) {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    (text(&event["type"]), text(&event["state_key"]))
}

fn list<'a>(room: &'a Value, part: &str) -> impl Iterator<Item = &'a Value> {
    room[part].as_array().into_iter().flatten()
}

fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

/// The account data of a user that matters: their direct chats, and everybody whom they ever ignored.
#[derive(Clone, Default)]
struct OfUser {
    direct: BTreeSet<String>,
    ignored: BTreeSet<String>,
}

/// A client of sliding sync, with what it has put together.
struct Listener {
    slide: Slide,
    rooms: BTreeMap<String, Known>,
    count: u64,
}

impl Listener {
    fn new(client: &TestClient, conn_id: &str) -> Self {
        let slide = Slide::of(client, json!({ "conn_id": conn_id }));
        Self { slide, rooms: BTreeMap::new(), count: 0 }
    }

    /// Asks for something else than before: ranges, limits, wishes and subscriptions.
    fn wish(&mut self, dice: &mut Dice, rooms: &[String]) {
        let wish = |dice: &mut Dice| {
            let (limit, state) = ([1, 2, 5, 20][dice.below(4)], wishes()[dice.below(5)].clone());
            json!({ "timeline_limit": limit, "required_state": state })
        };
        let mut list = wish(dice);
        list["ranges"] = json!([[0, dice.below(4)]]);
        let mut subscriptions = json!({});
        for room in rooms {
            if dice.below(3) == 0 {
                subscriptions[room] = wish(dice);
            }
        }
        self.slide.body["lists"] = json!({ "all": list });
        self.slide.body["room_subscriptions"] = subscriptions;
        // A client that wants no members of a room is told of no changes of those that it has: it must not show their names any more.
        let wished: Vec<BTreeSet<usize>> =
            self.rooms.keys().map(|room| self.wishes_for(room, true)).collect();
        for (known, wishes) in self.rooms.values_mut().zip(wished) {
            known.has_old_members |= !wishes.iter().any(|wish| [0, 1, 3].contains(wish));
        }
    }

    /// The wishes under which a room is told now.
    fn wishes_for(&self, room: &str, is_listed: bool) -> BTreeSet<usize> {
        let list = is_listed.then(|| self.slide.body["lists"]["all"]["required_state"].clone());
        let subscription =
            self.slide.body["room_subscriptions"].get(room).map(|it| it["required_state"].clone());
        let wished = [list, subscription].into_iter().flatten();
        wished.map(|it| wishes().iter().position(|wish| *wish == it).unwrap()).collect()
    }

    fn learn(&mut self, answer: &Value, moment: &str) {
        self.count = answer["lists"]["all"]["count"].as_u64().unwrap();
        for (room, told) in answer["rooms"].as_object().unwrap() {
            let is_initial = told["initial"] == true;
            if is_initial {
                self.rooms.remove(room);
            }
            let known = self.rooms.entry(room.clone()).or_default();
            known.membership = text(&told["membership"]).unwrap();
            if let Some(name) = told.get("name") {
                known.name = text(name);
            }
            known.is_dm = told["is_dm"].as_bool().unwrap_or(known.is_dm);
            known.joined = told["joined_count"].as_u64().unwrap_or(known.joined);
            known.invited = told["invited_count"].as_u64().unwrap_or(known.invited);
            known.unread = told["notification_count"].as_u64().unwrap_or(known.unread);
            if told["stripped_state"].is_array() {
                *known =
                    Known { membership: known.membership.clone(), is_dm: known.is_dm, ..Known::default() };
                continue;
            }
            let shown: Vec<Shown> = list(told, "timeline").map(shown).collect();
            let live = told["num_live"].as_u64().unwrap_or(0) as usize;
            assert!(live <= shown.len(), "{moment}: {told:#}");
            if is_initial || told["limited"] == true || told["expanded_timeline"] == true {
                known.events = shown;
                known.is_whole = told["limited"] != true;
            } else {
                for event in &shown {
                    assert!(!known.events.contains(event), "{moment}: {event:?} is told twice: {told:#}");
                }
                known.events.extend(shown);
            }
            for event in list(told, "required_state") {
                match event.get("event_id") {
                    Some(id) => {
                        let content = event["content"].clone();
                        known.state.insert(key(event), (text(id).unwrap(), content));
                    }
                    None => _ = known.state.remove(&key(event)),
                }
            }
        }
    }

    /// Polls, and sometimes loses the answer.
    async fn poll(&mut self, dice: &mut Dice, moment: &str) {
        let (mut status, mut json) = self.slide.try_within(0).await;
        if dice.below(4) == 0 {
            (status, json) = self.slide.try_within(0).await;
        }
        if status == StatusCode::BAD_REQUEST && json["errcode"] == "M_UNKNOWN_POS" {
            panic!("{moment}: the connection ended: {json}");
        }
        assert_eq!(status, StatusCode::OK, "{moment}: {json}");
        self.slide.pos = text(&json["pos"]);
        self.learn(&json, moment);
    }

    /// Polls with a range that shows all rooms until nothing is new, and compares what is known with the server's word.
    async fn compare(&mut self, dice: &mut Dice, of_user: &OfUser, moment: &str) {
        let OfUser { direct, ignored } = of_user;
        self.slide.body["lists"]["all"]["ranges"] = json!([[0, 99]]);
        self.poll(dice, moment).await;
        let (_, idle) = self.slide.try_within(0).await;
        assert_eq!(idle["rooms"], json!({}), "{moment}: there is more: {idle:#}");
        let client = self.slide.client.clone();
        let v3 = Chain::filtered(&client, json!({ "room": { "timeline": { "limit": 50 } } })).next().await;
        let mut expected = BTreeMap::new();
        for (section, membership) in [("join", "join"), ("invite", "invite"), ("knock", "knock")] {
            for (room, news) in v3["rooms"][section].as_object().into_iter().flatten() {
                expected.insert(room.clone(), (membership, news.clone()));
            }
        }
        for (room, (membership, news)) in &expected {
            let known = self.rooms.get(room);
            let known = known.unwrap_or_else(|| panic!("{moment}: {room} is not told"));
            let who = &client.user_id;
            assert_eq!(known.membership, *membership, "{moment}: {who} in {room}");
            assert_eq!(known.is_dm, direct.contains(room), "{moment}: {who} in {room}");
            if *membership == "join" {
                self.compare_joined(room, known, news, ignored, moment).await;
            }
        }
        for (room, known) in &self.rooms {
            let is_out = known.membership == "leave" || known.membership == "ban";
            let who = &client.user_id;
            assert!(
                is_out || expected.contains_key(room),
                "{moment}: {who} is not {} {room}",
                known.membership
            );
        }
        let here = expected.len() as u64;
        let out = self.rooms.values().filter(|it| it.membership == "leave" || it.membership == "ban").count();
        assert!(here <= self.count && self.count <= here + out as u64, "{moment}: {} and {here}", self.count);
    }

    async fn compare_joined(
        &self,
        room: &str,
        known: &Known,
        news: &Value,
        ignored: &BTreeSet<String>,
        moment: &str,
    ) {
        let client = &self.slide.client;
        let who = format!("{moment}: {} in {room}", client.user_id);
        let server = state_of(client, room).await;
        let summary = &news["summary"];
        let counts = (summary["m.joined_member_count"].as_u64(), summary["m.invited_member_count"].as_u64());
        assert_eq!((Some(known.joined), Some(known.invited)), counts, "{who}");
        let name = server.get(&("m.room.name".to_owned(), String::new()));
        let name = name.and_then(|(_, content)| text(&content["name"]));
        assert_eq!(known.name, name, "{who}");
        assert_eq!(known.unread, news["unread_notifications"]["notification_count"], "{who}");
        // The timeline ends as that of `/sync` does, without a gap.
        let timeline = news["timeline"]["events"].as_array().unwrap();
        let is_steady = |event: &Shown| event.1.as_ref().is_none_or(|sender| !ignored.contains(sender));
        let told: Vec<Shown> = timeline.iter().map(shown).filter(is_steady).collect();
        let shown: Vec<Shown> = known.events.iter().filter(|event| is_steady(event)).cloned().collect();
        let common = told.len().min(shown.len());
        assert_eq!(shown[shown.len() - common..], told[told.len() - common..], "{who}");
        if known.is_whole && news["timeline"]["limited"] != true {
            assert!(shown.len() >= told.len(), "{who}: {shown:?} of {told:?}");
        }
        let wishes = self.wishes_for(room, true);
        let mut wrong = Vec::new();
        for key in server.keys().chain(known.state.keys()) {
            let is_wanted = wishes.iter().any(|wish| names(*wish, key, &client.user_id));
            if is_wanted && known.state.get(key) != server.get(key) {
                wrong.push((key, known.state.get(key), server.get(key)));
            }
        }
        // Members that were told lazily are right, unless the client has to look for them anew.
        let is_lazy = wishes.contains(&1) || wishes.contains(&3);
        if is_lazy && !known.has_old_members {
            for event in timeline.iter().filter(|it| known.events.contains(&self::shown(it))) {
                let sender = ("m.room.member".to_owned(), text(&event["sender"]).unwrap());
                let is_there = known.state.contains_key(&sender);
                if is_there && known.state.get(&sender) != server.get(&sender) {
                    wrong.push((server.get_key_value(&sender).unwrap().0, None, server.get(&sender)));
                }
            }
        }
        assert!(wrong.is_empty(), "{who}: {wishes:?}: {wrong:#?}");
    }
}

async fn state_of(client: &TestClient, room: &str) -> State {
    let json = client.ok_get(&format!("/rooms/{room}/state")).await;
    let pair = |event: &Value| (key(event), (text(&event["event_id"]).unwrap(), event["content"].clone()));
    json.as_array().unwrap().iter().map(pair).collect()
}

/// One random history. `is_forked`: a user of another server forks the rooms.
async fn run(seed: u64, steps: usize, is_forked: bool) {
    let mut server = TestServer::new();
    let mut dice = Dice(seed);
    let mut people = Vec::new();
    for name in ["alice", "bob", "carol"] {
        people.push(server.register(name).await);
    }
    let levels = json!({ "users_default": 50 });
    let mut rooms = Vec::new();
    for _ in 0..4 {
        let body = json!({ "preset": "public_chat", "power_level_content_override": levels });
        rooms.push(create_room(&people[0], body).await);
    }
    let mut forkers = Vec::new();
    for room in rooms.iter().filter(|_| is_forked) {
        forkers.push(Forker::join(&server, room).await);
    }
    let mut of_users = vec![OfUser::default(); people.len()];
    let mut listeners: Vec<(usize, Listener)> = Vec::new();
    for (at, client) in people.iter().enumerate() {
        for conn_id in ["a", "b"] {
            let mut listener = Listener::new(client, conn_id);
            listener.wish(&mut dice, &rooms);
            listeners.push((at, listener));
        }
    }
    for number in 0..steps {
        let moment = format!("seed {seed} step {number}");
        let which = dice.below(listeners.len());
        match dice.below(60) {
            0 => {
                server = restarted(&server).await;
                for client in &mut people {
                    client.server = server.clone();
                }
                for (_, listener) in &mut listeners {
                    listener.slide.client.server = server.clone();
                }
                forkers.iter_mut().for_each(|forker| forker.restarted(&server));
            }
            1..=8 => listeners[which].1.poll(&mut dice, &moment).await,
            9..=14 => {
                listeners[which].1.wish(&mut dice, &rooms);
                listeners[which].1.poll(&mut dice, &moment).await;
            }
            15 | 16 => {
                let (at, listener) = &mut listeners[which];
                let of_user = of_users[*at].clone();
                listener.compare(&mut dice, &of_user, &moment).await;
            }
            17 => {
                let at = dice.below(people.len());
                let room = rooms[dice.below(rooms.len())].clone();
                of_users[at].direct =
                    if dice.below(2) == 0 { BTreeSet::from([room]) } else { BTreeSet::new() };
                let path = format!("/user/{}/account_data/m.direct", people[at].user_id);
                people[at].ok_put(&path, json!({ "@x:y": of_users[at].direct })).await;
            }
            18 => {
                let (at, room) = (dice.below(people.len()), &rooms[dice.below(rooms.len())]);
                let (_, json) =
                    people[at].get(&format!("/_matrix/client/v3/rooms/{room}/messages?dir=b&limit=3")).await;
                if let Some(event) = json["chunk"][dice.below(3)]["event_id"].as_str() {
                    let path = format!("/_matrix/client/v3/rooms/{room}/receipt/m.read/{}", encoded(event));
                    let _ = people[at].post(&path, json!({})).await;
                }
            }
            19..=32 if is_forked => {
                let at = dice.below(forkers.len());
                forkers[at].act(&mut dice, &people, number).await;
            }
            _ => {
                let room = rooms[dice.below(rooms.len())].clone();
                step(&mut dice, &people, &room, number).await;
                for (client, of_user) in people.iter().zip(&mut of_users) {
                    let path = format!(
                        "/_matrix/client/v3/user/{}/account_data/m.ignored_user_list",
                        client.user_id
                    );
                    let (_, json) = client.get(&path).await;
                    let ignored = json["ignored_users"].as_object().into_iter().flatten();
                    of_user.ignored.extend(ignored.map(|(user_id, _)| user_id.clone()));
                }
            }
        }
    }
    for (at, listener) in &mut listeners {
        listener.compare(&mut dice, &of_users[*at], &format!("seed {seed} end")).await;
    }
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn what_a_client_of_sliding_sync_puts_together_is_what_sync_tells() {
    for seed in 0..6 {
        run(seed, 300, false).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_of_sliding_sync_follows_the_state_wherever_resolution_leads_it() {
    for seed in 0..6 {
        run(seed, 300, true).await;
    }
}

#[tokio::test(start_paused = true)]
#[ignore = "takes minutes: for whoever changes what sliding sync tells"]
async fn what_many_clients_of_sliding_sync_put_together_is_what_sync_tells() {
    for seed in 100..500 {
        run(seed, 400, seed % 2 == 0).await;
    }
}
