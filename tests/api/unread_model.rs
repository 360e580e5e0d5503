//! Unread counts after random histories, held against a count that looks at every event.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    support::{TestClient, TestServer, encoded},
    sync::{Chain, act, create_room, env, must},
};

const RULES: &str = "/_matrix/client/v3/pushrules/global";
const NAMES: [&str; 4] = ["alice", "bob", "carol", "dora"];
const HIGHLIGHT: &str = "cake";

/// A small generator of numbers with a seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % bound
    }
}

/// Kinds of events, by what they do to those who may hear of them.
#[derive(Clone, Debug, PartialEq)]
enum Kind {
    Message,
    Keyword,
    Notice,
    /// Outside threads the default rules pass it over.
    Sticker,
    Mention(usize),
    Edit,
    Reaction,
    /// It never counts: redactions, topics, members.
    Other,
}

#[derive(Clone, Debug)]
struct Event {
    id: String,
    sender: usize,
    kind: Kind,
    /// The place of its thread's root in the list of events.
    thread: Option<usize>,
    is_redacted: bool,
}

/// The push rules that a user has.
#[derive(Clone, Debug, Default)]
struct Rules {
    master: bool,
    room_muted: bool,
    mentions_only: bool,
    keyword: bool,
    ignored: BTreeSet<usize>,
    /// Threads count for who subscribes to them, since the user subscribed to one.
    follows_threads: bool,
    /// The places of the roots of threads that the user subscribes to.
    subscribed: BTreeSet<usize>,
}

#[derive(Debug)]
struct Model {
    events: Vec<Event>,
    rules: Vec<Rules>,
    /// The place at which each user joined; none for who is not in the room.
    joined: Vec<Option<usize>>,
    /// The place up to which a user has read, by user and thread ("" for all, "main", or the root's id).
    receipts: BTreeMap<(usize, String), usize>,
    /// The place of the last event that a user sent, by user and thread.
    sent: BTreeMap<(usize, Option<usize>), usize>,
}

type Counts = (u64, u64);

impl Model {
    fn add(&mut self, id: String, sender: usize, kind: Kind, thread: Option<usize>, marks_read: bool) {
        self.events.push(Event { id, sender, kind, thread, is_redacted: false });
        if marks_read {
            self.sent.insert((sender, thread), self.events.len() - 1);
        }
    }

    fn read(&mut self, user: usize, thread: &str, at: usize) {
        let read = self.receipts.entry((user, thread.to_owned())).or_insert(at);
        *read = at.max(*read);
    }

    fn is_unread(&self, user: usize, at: usize) -> bool {
        let event = &self.events[at];
        let lane = event.thread.map_or("main".to_owned(), |root| self.events[root].id.clone());
        let receipt = |thread: &str| self.receipts.get(&(user, thread.to_owned())).copied();
        let sent = self.sent.get(&(user, event.thread)).copied();
        let read = [self.joined[user], receipt(""), receipt(&lane), sent].into_iter().flatten().max();
        read.is_none_or(|read| at > read)
    }

    fn outcome(&self, user: usize, event: &Event) -> Counts {
        let rules = &self.rules[user];
        let is_silent = event.sender == user
            || event.is_redacted
            || rules.ignored.contains(&event.sender)
            || rules.master
            || rules.room_muted;
        if is_silent {
            return (0, 0);
        }
        let thread = event.thread.filter(|_| rules.follows_threads);
        let is_subscribed = thread.map(|root| rules.subscribed.contains(&root));
        match event.kind {
            Kind::Mention(of) if of == user => (1, 1),
            Kind::Keyword if rules.keyword => (1, 1),
            Kind::Message | Kind::Keyword | Kind::Mention(_) | Kind::Sticker
                if is_subscribed == Some(true) =>
            {
                (1, 0)
            }
            _ if is_subscribed.is_some() => (0, 0),
            Kind::Message | Kind::Keyword | Kind::Mention(_) if !rules.mentions_only => (1, 0),
            _ => (0, 0),
        }
    }

    /// The counts of each thread; those of the main timeline stand under none.
    fn count(&self, user: usize) -> BTreeMap<Option<usize>, Counts> {
        let mut counts = BTreeMap::from([(None, (0, 0))]);
        for (_, event) in self.events.iter().enumerate().filter(|(at, _)| self.is_unread(user, *at)) {
            let (notify, highlight) = self.outcome(user, event);
            let sum = counts.entry(event.thread).or_default();
            *sum = (sum.0 + notify, sum.1 + highlight);
        }
        counts.retain(|thread, counts| thread.is_none() || *counts != (0, 0));
        counts
    }
}

struct World {
    server: TestServer,
    people: Vec<TestClient>,
    room: String,
    dice: Dice,
    model: Model,
    step: usize,
}

impl World {
    async fn new(seed: u64) -> Self {
        let server = TestServer::new();
        let mut people = Vec::new();
        for name in NAMES {
            people.push(server.register(name).await);
        }
        let room = create_room(&people[0], json!({ "preset": "public_chat" })).await;
        let count = NAMES.len();
        let model = Model {
            events: Vec::new(),
            rules: vec![Rules::default(); count],
            joined: vec![None; count],
            receipts: BTreeMap::new(),
            sent: BTreeMap::new(),
        };
        let mut world = Self { server, people, room, dice: Dice(seed), model, step: 0 };
        world.model.joined[0] = Some(0);
        world.model.add("(created)".to_owned(), 0, Kind::Other, None, true);
        for user in 1..count {
            world.join(user).await;
        }
        world
    }

    fn member(&mut self) -> Option<usize> {
        let user = self.dice.below(NAMES.len());
        self.model.joined[user].map(|_| user)
    }

    async fn join(&mut self, user: usize) {
        must(&self.people[user], &self.room, "join", json!({})).await;
        self.model.add("(joined)".to_owned(), user, Kind::Other, None, false);
        self.model.joined[user] = Some(self.model.events.len() - 1);
    }

    async fn put(&self, user: usize, path: &str, body: Value) -> Value {
        let (status, json) = self.people[user].put(path, body).await;
        assert_eq!(status, StatusCode::OK, "{path}: {json}");
        json
    }

    async fn send(&self, user: usize, event_type: &str, content: Value) -> String {
        let path = format!("/_matrix/client/v3/rooms/{}/send/{event_type}/t{}", self.room, self.step);
        self.put(user, &path, content).await["event_id"].as_str().unwrap().to_owned()
    }

    /// An event that can be related to.
    fn some_event(&mut self) -> Option<usize> {
        let at = self.dice.below(self.model.events.len());
        self.model.events[at].id.starts_with('$').then_some(at)
    }

    async fn say(&mut self) -> Option<()> {
        let user = self.member()?;
        let (kind, mut content) = match self.dice.below(6) {
            0 => (Kind::Keyword, json!({ "msgtype": "m.text", "body": format!("some {HIGHLIGHT}, please") })),
            1 => (Kind::Notice, json!({ "msgtype": "m.notice", "body": "a notice" })),
            5 => (
                Kind::Sticker,
                json!({ "body": "a sticker", "url": "mxc://test.example/sticker", "info": {} }),
            ),
            2 => {
                let of = self.dice.below(NAMES.len());
                let mentions = json!({ "user_ids": [self.people[of].user_id] });
                (Kind::Mention(of), json!({ "msgtype": "m.text", "body": "you", "m.mentions": mentions }))
            }
            _ => (Kind::Message, json!({ "msgtype": "m.text", "body": "hello" })),
        };
        let mut thread = None;
        if self.dice.below(3) == 0 {
            let root = self.some_event()?;
            let event = &self.model.events[root];
            let can_be_root = event.thread.is_none()
                && matches!(event.kind, Kind::Message | Kind::Keyword | Kind::Notice | Kind::Mention(_));
            thread = can_be_root.then_some(root);
        }
        if let Some(root) = thread {
            content["m.relates_to"] =
                json!({ "rel_type": "m.thread", "event_id": self.model.events[root].id });
        }
        let event_type = if kind == Kind::Sticker { "m.sticker" } else { "m.room.message" };
        let id = self.send(user, event_type, content).await;
        self.model.add(id, user, kind, thread, true);
        Some(())
    }

    /// Subscribes somebody to a thread, or unsubscribes them from it. Half of the people never do, so that their rules stay as they are.
    async fn subscribe(&mut self) -> Option<()> {
        let user = self.member().filter(|user| user % 2 == 0)?;
        let at = self.some_event()?;
        let root = self.model.events[at].thread?;
        let thread = encoded(&self.model.events[root].id);
        let path = "/_matrix/client/unstable/io.element.msc4306/rooms";
        let path = format!("{path}/{}/thread/{thread}/subscription", encoded(&self.room));
        let rules = &mut self.model.rules[user];
        if rules.subscribed.remove(&root) {
            let (status, json) = self.people[user].delete(&path, json!({})).await;
            assert_eq!(status, StatusCode::OK, "{json}");
        } else {
            rules.subscribed.insert(root);
            rules.follows_threads = true;
            self.put(user, &path, json!({})).await;
        }
        Some(())
    }

    async fn relate(&mut self) -> Option<()> {
        let user = self.member()?;
        let parent = self.some_event()?;
        let (parent_id, thread) = (self.model.events[parent].id.clone(), self.model.events[parent].thread);
        // A relation to one that relates itself would be more than three away from a thread's root one day.
        if matches!(self.model.events[parent].kind, Kind::Edit | Kind::Reaction) {
            return None;
        }
        let (kind, event_type, content) = if self.dice.below(2) == 0 {
            let relation = json!({ "rel_type": "m.replace", "event_id": parent_id });
            let new = json!({ "msgtype": "m.text", "body": "new" });
            let content = json!({ "msgtype": "m.text", "body": "* new", "m.new_content": new, "m.relates_to": relation });
            (Kind::Edit, "m.room.message", content)
        } else {
            let key = format!("{}", self.step);
            let relation = json!({ "rel_type": "m.annotation", "event_id": parent_id, "key": key });
            (Kind::Reaction, "m.reaction", json!({ "m.relates_to": relation }))
        };
        let id = self.send(user, event_type, content).await;
        self.model.add(id, user, kind, thread, true);
        Some(())
    }

    async fn redact(&mut self) -> Option<()> {
        let at = self.some_event()?;
        let event = &self.model.events[at];
        let user = event.sender;
        if event.is_redacted || event.kind == Kind::Other || self.model.joined[user].is_none() {
            return None;
        }
        let (id, step) = (encoded(&event.id), self.step);
        let path = format!("/_matrix/client/v3/rooms/{}/redact/{id}/t{step}", self.room);
        let redaction = self.put(user, &path, json!({})).await["event_id"].as_str().unwrap().to_owned();
        self.model.events[at].is_redacted = true;
        self.model.add(redaction, user, Kind::Other, None, true);
        Some(())
    }

    async fn read(&mut self) -> Option<()> {
        let user = self.member()?;
        let at = self.some_event()?;
        let event = self.model.events[at].clone();
        let kind = if self.dice.below(2) == 0 { "m.read" } else { "m.read.private" };
        let lane = event.thread.map_or("main".to_owned(), |root| self.model.events[root].id.clone());
        let (thread, body) = match self.dice.below(3) {
            0 => (String::new(), json!({})),
            _ => (lane.clone(), json!({ "thread_id": lane })),
        };
        must(&self.people[user], &self.room, &format!("receipt/{kind}/{}", encoded(&event.id)), body).await;
        self.model.read(user, &thread, at);
        Some(())
    }

    async fn change_rules(&mut self) -> Option<()> {
        let user = self.dice.below(NAMES.len());
        let room = encoded(&self.room);
        let mut rules = self.model.rules[user].clone();
        match self.dice.below(5) {
            0 if self.dice.below(3) == 0 => {
                rules.master = !rules.master;
                let path = format!("{RULES}/override/.m.rule.master/enabled");
                self.put(user, &path, json!({ "enabled": rules.master })).await;
            }
            1 => {
                rules.room_muted = !rules.room_muted;
                let path = format!("{RULES}/override/{room}");
                let is_room = json!({ "kind": "event_match", "key": "room_id", "pattern": self.room });
                self.switch(user, &path, rules.room_muted, json!({ "actions": [], "conditions": [is_room] }))
                    .await;
            }
            2 => {
                rules.mentions_only = !rules.mentions_only;
                let path = format!("{RULES}/room/{room}");
                self.switch(user, &path, rules.mentions_only, json!({ "actions": [] })).await;
            }
            3 => {
                rules.keyword = !rules.keyword;
                let actions = json!(["notify", { "set_tweak": "highlight" }]);
                let body = json!({ "pattern": HIGHLIGHT, "actions": actions });
                self.switch(user, &format!("{RULES}/content/keyword"), rules.keyword, body).await;
            }
            _ => {
                let other = self.dice.below(NAMES.len());
                if !rules.ignored.remove(&other) {
                    rules.ignored.insert(other);
                }
                let ids = rules.ignored.iter().map(|other| self.people[*other].user_id.clone());
                let users: serde_json::Map<String, Value> = ids.map(|id| (id, json!({}))).collect();
                let user_id = &self.people[user].user_id;
                let path = format!("/_matrix/client/v3/user/{user_id}/account_data/m.ignored_user_list");
                self.put(user, &path, json!({ "ignored_users": users })).await;
            }
        }
        self.model.rules[user] = rules;
        Some(())
    }

    async fn switch(&self, user: usize, path: &str, on: bool, body: Value) {
        if on {
            self.put(user, path, body).await;
        } else {
            let (status, json) = self.people[user].delete(path, json!({})).await;
            assert_eq!(status, StatusCode::OK, "{path}: {json}");
        }
    }

    async fn come_or_go(&mut self) -> Option<()> {
        let user = 1 + self.dice.below(NAMES.len() - 1);
        match self.model.joined[user] {
            Some(_) if self.dice.below(3) == 0 => {
                must(&self.people[user], &self.room, "leave", json!({})).await;
                self.model.add("(left)".to_owned(), user, Kind::Other, None, false);
                self.model.joined[user] = None;
            }
            Some(_) => {}
            None => self.join(user).await,
        }
        Some(())
    }

    async fn next(&mut self) {
        self.step += 1;
        match self.dice.below(16) {
            0..=4 => self.say().await,
            5 | 6 => self.relate().await,
            7 => self.redact().await,
            8..=10 => self.read().await,
            11 | 12 => self.change_rules().await,
            13 | 14 => self.subscribe().await,
            _ => self.come_or_go().await,
        };
        if self.dice.below(4) == 0 {
            self.compare().await;
        }
    }

    /// Each member's client is told, at once and without waiting for receipts, what the model counts.
    async fn compare(&self) {
        let by_thread =
            json!({ "room": { "timeline": { "limit": 1, "unread_thread_notifications": true } } });
        let together = json!({ "room": { "timeline": { "limit": 1 } } });
        for user in (0..NAMES.len()).filter(|user| self.model.joined[*user].is_some()) {
            let counted = self.model.count(user);
            let sync = Chain::filtered(&self.people[user], by_thread.clone()).next().await;
            let told = &sync["rooms"]["join"][&self.room];
            let mut seen = BTreeMap::from([(None, counts(&told["unread_notifications"]))]);
            for (root, unread) in told["unread_thread_notifications"].as_object().into_iter().flatten() {
                let root = self.model.events.iter().position(|event| event.id == *root).unwrap();
                seen.insert(Some(root), counts(unread));
            }
            assert_eq!(seen, counted, "{} after {} steps: {:#?}", NAMES[user], self.step, self.model);
            let sync = Chain::filtered(&self.people[user], together.clone()).next().await;
            let seen = counts(&sync["rooms"]["join"][&self.room]["unread_notifications"]);
            let all = counted.values().fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
            assert_eq!(seen, all, "{} after {} steps", NAMES[user], self.step);
        }
    }
}

fn counts(json: &Value) -> Counts {
    let number = |name: &str| json[name].as_u64().unwrap_or_else(|| panic!("no {name} in {json}"));
    (number("notification_count"), number("highlight_count"))
}

#[tokio::test(start_paused = true)]
async fn unread_counts_are_what_a_count_of_every_event_says() {
    let seeds =
        std::env::var("AQUEDUCT_UNREAD_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(12);
    for seed in 0..seeds {
        let mut world = World::new(seed).await;
        for _ in 0..120 {
            world.next().await;
        }
        world.compare().await;
        env(&world.server).sleep(Duration::from_secs(1)).await;
        world.compare().await;
        let (status, _) = act(&world.people[0], &world.room, "leave", json!({})).await;
        assert_eq!(status, StatusCode::OK, "seed {seed}");
    }
}
