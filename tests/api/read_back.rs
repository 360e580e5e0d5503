//! The past of a room that came from other servers: pages in both directions, the event nearest to a time, and servers that
//! read it here in their turn (client-server API, "Syncing", "timestamp_to_event"; server-server API, "Backfilling").

use std::{collections::BTreeSet, time::Duration};

use federation::testing::Weather;
use http::StatusCode;
use serde_json::{Value, json};

use crate::{
    rooms::Rooms,
    support::{TestClient, encoded, federated::Federated},
};

struct Past {
    federated: Federated,
    alice: TestClient,
    room: String,
    /// The ids of what alice said before anybody else came, and the times at which she did, in milliseconds.
    said: Vec<(String, u64)>,
}

/// Lets this time go by for all servers.
async fn pass(federated: &Federated, time: Duration) {
    federated.server(0).server().app().env.sleep(time).await;
}

impl Past {
    /// A room in which alice said so many things, one a minute.
    async fn new(count: usize) -> Self {
        Self::among(&["a.example", "b.example", "c.example"], count).await
    }

    /// Like [`Past::new`], in a network of these servers.
    async fn among(servers: &[&str], count: usize) -> Self {
        let federated = Federated::new(servers);
        let alice = federated.server(0).register("alice").await;
        let room = alice.create(json!({ "preset": "public_chat" })).await;
        let mut said = Vec::new();
        for number in 0..count {
            pass(&federated, Duration::from_secs(60)).await;
            let id = alice.say(&room, &format!("t{number}"), &format!("said {number}")).await;
            let (_, event) =
                alice.get(&format!("/_matrix/client/v3/rooms/{room}/event/{}", encoded(&id))).await;
            said.push((id, event["origin_server_ts"].as_u64().unwrap()));
        }
        pass(&federated, Duration::from_secs(60)).await;
        Self { federated, alice, room, said }
    }

    async fn join(&self, place: usize, name: &str, via: &str) -> TestClient {
        let client = self.federated.server(place).register(name).await;
        let path = format!("/join/{}?server_name={via}", encoded(&self.room));
        client.ok_post(&path, json!({})).await;
        client
    }

    async fn page(&self, client: &TestClient, query: &str) -> Value {
        client.ok_get(&format!("/rooms/{}/messages?limit=50{query}", encoded(&self.room))).await
    }

    /// Reads pages until there are no more, and gives the ids of all messages.
    async fn read_all(&self, client: &TestClient, dir: &str, from: Option<String>) -> Vec<String> {
        let (mut from, mut all) = (from, Vec::new());
        for _ in 0..100 {
            let token = from.take().map(|from| format!("&from={}", encoded(&from))).unwrap_or_default();
            let page = self.page(client, &format!("&dir={dir}{token}")).await;
            let messages =
                page["chunk"].as_array().unwrap().iter().filter(|event| event["type"] == "m.room.message");
            all.extend(messages.map(|event| event["event_id"].as_str().unwrap().to_owned()));
            match page["end"].as_str() {
                Some(end) if page["start"] != page["end"] => from = Some(end.to_owned()),
                _ => return all,
            }
        }
        panic!("the pages have no end")
    }

    async fn near(&self, client: &TestClient, time_ms: u64, dir: &str) -> (StatusCode, Value) {
        let room = encoded(&self.room);
        client
            .get(&format!("/_matrix/client/v1/rooms/{room}/timestamp_to_event?ts={time_ms}&dir={dir}"))
            .await
    }
}

fn assert_all_once(past: &Past, read: &[String]) {
    let (once, said): (BTreeSet<_>, BTreeSet<_>) =
        (read.iter().collect(), past.said.iter().map(|(id, _)| id).collect());
    assert_eq!(once.len(), read.len(), "no event comes twice");
    assert!(said.is_subset(&once), "{} of {} are missing", said.difference(&once).count(), said.len());
}

#[tokio::test(start_paused = true)]
async fn a_server_reads_back_by_way_of_one_that_filled_its_own_hole() {
    let past = Past::new(130).await;
    let bob = past.join(1, "bob", "a.example").await;
    assert_all_once(&past, &past.read_all(&bob, "b", None).await);
    let carol = past.join(2, "carol", "b.example").await;
    past.federated.weather(0, Weather::Refuses, Duration::ZERO);
    assert_all_once(&past, &past.read_all(&carol, "b", None).await);
}

#[tokio::test(start_paused = true)]
async fn the_event_nearest_to_a_time_is_found_below_a_hole() {
    let past = Past::new(250).await;
    let bob = past.join(1, "bob", "a.example").await;
    let (id, time_ms) = past.said[20].clone();
    for (ask_ms, dir) in [(time_ms - 1_000, "f"), (time_ms + 1_000, "b"), (time_ms, "f"), (time_ms, "b")] {
        let (status, near) = past.near(&bob, ask_ms, dir).await;
        assert_eq!((status, near["event_id"].as_str()), (StatusCode::OK, Some(&*id)), "{dir}: {near}");
        assert_eq!(near["origin_server_ts"], time_ms);
    }
    // The client goes on from there.
    let context =
        bob.ok_get(&format!("/rooms/{}/context/{}?limit=4", encoded(&past.room), encoded(&id))).await;
    assert_eq!(context["event"]["event_id"], id);
    let (status, none) = past.near(&bob, 1, "b").await;
    assert_eq!((status, none["errcode"].as_str()), (StatusCode::NOT_FOUND, Some("M_NOT_FOUND")));
    let (_, newest) = past.near(&bob, u64::from(u32::MAX) * 2_000, "b").await;
    assert!(newest["event_id"].is_string(), "{newest}");
}

#[tokio::test(start_paused = true)]
async fn a_time_before_what_is_here_is_answered_also_when_nobody_can_be_asked() {
    let past = Past::new(30).await;
    let bob = past.join(1, "bob", "a.example").await;
    past.federated.weather(0, Weather::Silent, Duration::ZERO);
    let (status, near) = past.near(&bob, past.said[3].1, "f").await;
    assert_eq!(status, StatusCode::OK, "the nearest that is here: {near}");
    assert_eq!(past.near(&bob, past.said[3].1, "b").await.0, StatusCode::NOT_FOUND);
}

#[tokio::test(start_paused = true)]
async fn a_page_forward_crosses_no_hole_unfilled() {
    let past = Past::new(20).await;
    let bob = past.join(1, "bob", "a.example").await;
    let first = past.page(&bob, "&dir=b").await;
    let oldest = past.read_all(&bob, "b", None).await;
    assert_all_once(&past, &oldest);
    // While b is away, more is said than is fetched when it comes back.
    past.federated.weather(1, Weather::Refuses, Duration::ZERO);
    let mut said = Vec::new();
    for number in 0..400 {
        said.push(past.alice.say(&past.room, &format!("away{number}"), "while you were away").await);
    }
    pass(&past.federated, Duration::from_secs(3_600)).await;
    past.federated.weather(1, Weather::Fair, Duration::ZERO);
    said.push(past.alice.say(&past.room, "back", "hello again").await);
    pass(&past.federated, Duration::from_secs(3_600)).await;
    let rows = past.federated.server(1).assert_whole();
    assert!(rows.iter().any(|(table, count)| *table == "HOLE" && *count > 0), "there is a hole to cross");
    let from = first["start"].as_str().unwrap().to_owned();
    let read = past.read_all(&bob, "f", Some(from)).await;
    let (read, said): (BTreeSet<_>, BTreeSet<_>) = (read.iter().collect(), said.iter().collect());
    assert!(said.is_subset(&read), "{} of {} are missing", said.difference(&read).count(), said.len());
}

#[tokio::test(start_paused = true)]
async fn a_room_of_many_servers_is_read_back_by_way_of_the_one_that_made_it() {
    let servers: Vec<String> = ('a'..='h').map(|name| format!("{name}.example")).collect();
    let servers: Vec<&str> = servers.iter().map(String::as_str).collect();
    let past = Past::among(&servers, 5).await;
    let mut last = None;
    for place in 1..servers.len() {
        last = Some(past.join(place, "bob", "a.example").await);
    }
    pass(&past.federated, Duration::from_secs(60)).await;
    // Nobody else has anything from before they came.
    assert_all_once(&past, &past.read_all(&last.unwrap(), "b", None).await);
}
