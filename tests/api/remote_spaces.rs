//! Spaces whose rooms other servers know (client-server API, "Spaces"; server-server API, "Spaces").

use std::{sync::Arc, time::Duration};

use federation::testing::{Weather, json as answer};
use futures_util::FutureExt;
use http::StatusCode;
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::{
    rooms::Rooms,
    support::{TestClient, encoded, federated::Federated},
};

/// Three servers, each with a user: alice, bob and carol.
async fn three() -> (Federated, [TestClient; 3]) {
    let federated = Federated::new(&["a.example", "b.example", "c.example"]);
    let alice = federated.server(0).register("alice").await;
    let bob = federated.server(1).register("bob").await;
    let carol = federated.server(2).register("carol").await;
    (federated, [alice, bob, carol])
}

async fn room(client: &TestClient, name: &str, is_space: bool, rule: &str) -> String {
    let kind = if is_space { json!({ "type": "m.space" }) } else { json!({}) };
    let rules = json!({ "type": "m.room.join_rules", "content": { "join_rule": rule } });
    let body =
        json!({ "name": name, "preset": "public_chat", "creation_content": kind, "initial_state": [rules] });
    client.create(body).await
}

async fn link(client: &TestClient, space: &str, child: &str, via: &[&str], order: &str) {
    let path = format!("/rooms/{}/state/m.space.child/{}", encoded(space), encoded(child));
    client.ok_put(&path, json!({ "via": via, "order": order })).await;
}

async fn walk(client: &TestClient, space: &str, query: &str) -> (StatusCode, Value) {
    client.get(&format!("/_matrix/client/v1/rooms/{}/hierarchy{query}", encoded(space))).await
}

fn names(page: &Value) -> Vec<&str> {
    let rooms = page["rooms"].as_array().unwrap_or_else(|| panic!("no rooms: {page}"));
    rooms.iter().map(|room| room["name"].as_str().unwrap_or("-")).collect()
}

#[tokio::test(start_paused = true)]
async fn a_walk_asks_other_servers_for_rooms_that_are_not_here() {
    let (federated, [alice, bob, carol]) = three().await;
    let top = room(&bob, "Top", true, "public").await;
    let space = room(&alice, "Space of a", true, "public").await;
    let open = room(&alice, "Open", false, "public").await;
    let secret = room(&alice, "Secret", false, "invite").await;
    let deeper = room(&carol, "Space of c", true, "public").await;
    let knocked = room(&carol, "Knocked", false, "knock").await;
    let last = room(&bob, "Last", false, "public").await;
    link(&bob, &top, &space, &["gone.example", "a.example"], "a").await;
    link(&bob, &top, &last, &["b.example"], "b").await;
    link(&alice, &space, &open, &["a.example"], "a").await;
    link(&alice, &space, &secret, &["a.example"], "b").await;
    link(&alice, &space, &deeper, &["c.example"], "c").await;
    link(&carol, &deeper, &knocked, &["c.example"], "a").await;
    link(&carol, &deeper, &top, &["b.example"], "b").await;
    let (_, page) = walk(&bob, &top, "").await;
    assert_eq!(names(&page), ["Top", "Space of a", "Open", "Space of c", "Knocked", "Last"]);
    assert!(page.get("next_batch").is_none(), "{page}");
    let told = &page["rooms"][1];
    assert_eq!(told["room_id"], space);
    assert_eq!(told["room_type"], "m.space");
    let children = told["children_state"].as_array().unwrap();
    assert_eq!(children.len(), 3, "a child that cannot be entered is still named: {told}");
    assert_eq!(children[0]["state_key"], open);
    assert_eq!(page["rooms"][2]["children_state"], json!([]));
    // Pages and depth hold across servers.
    let (_, shallow) = walk(&bob, &top, "?max_depth=1").await;
    assert_eq!(names(&shallow), ["Top", "Space of a", "Last"]);
    let (mut all, mut query) = (Vec::new(), "?limit=2".to_owned());
    loop {
        let (_, page) = walk(&bob, &top, &query).await;
        assert!(names(&page).len() <= 2);
        all.extend(names(&page).into_iter().map(str::to_owned));
        let Some(next) = page["next_batch"].as_str() else { break };
        query = format!("?limit=2&from={}", encoded(next));
    }
    assert_eq!(all, names(&walk(&bob, &top, "").await.1));
    // The answer is kept for a while, also when its server is gone.
    federated.weather(2, Weather::Silent, Duration::ZERO);
    assert!(names(&walk(&bob, &top, "").await.1).contains(&"Knocked"));
    bob.server.server().app().env.sleep(Duration::from_secs(301)).await;
    let (_, page) = walk(&bob, &top, "").await;
    assert_eq!(names(&page), ["Top", "Space of a", "Open", "Last"], "c does not answer now");
}

#[tokio::test(start_paused = true)]
async fn a_restricted_room_elsewhere_is_told_to_those_whom_its_rules_admit() {
    let (_federated, [alice, bob, _]) = three().await;
    let club = room(&bob, "Club", false, "invite").await;
    let top = room(&bob, "Top", true, "public").await;
    let space = room(&alice, "Space", true, "public").await;
    // The server of the members is let in for a look because it is in the room that is named.
    alice.ok_post(&format!("/join/{}?server_name=b.example", encoded(&top)), json!({})).await;
    let allow = |room: &str| {
        let allow = json!([{ "type": "m.room_membership", "room_id": room }]);
        json!({ "type": "m.room.join_rules", "content": { "join_rule": "restricted", "allow": allow } })
    };
    let body = json!({ "name": "Inner", "initial_state": [allow(&top)] });
    let inner = alice.create(body).await;
    let body = json!({ "name": "Other", "initial_state": [allow(&club)] });
    let other = alice.create(body).await;
    link(&alice, &space, &inner, &["a.example"], "a").await;
    link(&alice, &space, &other, &["a.example"], "b").await;
    link(&bob, &top, &space, &["a.example"], "a").await;
    assert_eq!(names(&walk(&bob, &top, "").await.1), ["Top", "Space", "Inner"]);
    let dave = bob.server.register("dave").await;
    assert_eq!(
        names(&walk(&dave, &top, "").await.1),
        ["Top", "Space"],
        "dave is not in the room that admits"
    );
}

/// A server `evil.example` that answers every question for a space like this, and counts the questions.
fn evil(federated: &Federated, reply: impl Fn(&str) -> Value + Send + Sync + 'static) -> Arc<Mutex<usize>> {
    let count = Arc::new(Mutex::new(0));
    let counted = Arc::clone(&count);
    federated.net.host("evil.example", &["6.6.6.6"]);
    federated.net.serve("6.6.6.6:8448", &["evil.example"], move |arrived| {
        let path = arrived.request.uri().path().to_owned();
        let body = match path.strip_prefix("/_matrix/federation/v1/hierarchy/") {
            Some(room) => {
                *counted.lock() += 1;
                reply(&room.replace("%21", "!").replace("%3A", ":")).to_string()
            }
            None => "{}".to_owned(),
        };
        async move { answer(200, body) }.boxed()
    });
    count
}

fn summary(id: &str, name: &str, is_space: bool) -> Value {
    let mut summary = json!({
        "room_id": id, "name": name, "num_joined_members": 1, "world_readable": true,
        "guest_can_join": false, "join_rule": "public",
    });
    if is_space {
        summary["room_type"] = json!("m.space");
    }
    summary
}

#[tokio::test(start_paused = true)]
async fn what_one_server_says_of_a_room_is_not_told_to_those_who_ask_another() {
    let (federated, [alice, bob, _]) = three().await;
    let good = room(&alice, "Good", true, "public").await;
    let _count = evil(&federated, |id| {
        let mut room = summary(id, "Evil", true);
        room["children_state"] = json!([]);
        json!({ "room": room, "children": [], "inaccessible_children": [] })
    });
    let trap = room(&bob, "Trap", true, "public").await;
    link(&bob, &trap, &good, &["evil.example", "a.example"], "a").await;
    assert_eq!(names(&walk(&bob, &trap, "").await.1), ["Trap", "Evil"]);
    let top = room(&bob, "Top", true, "public").await;
    link(&bob, &top, &good, &["a.example"], "a").await;
    assert_eq!(names(&walk(&bob, &top, "").await.1), ["Top", "Good"]);
}

#[tokio::test(start_paused = true)]
async fn a_space_without_end_and_odd_answers_cost_little() {
    let (federated, [alice, bob, _]) = three().await;
    // Each space names two more, and a room that it was not asked for.
    let count = evil(&federated, |id| {
        let name = id.trim_start_matches('!').split(':').next().unwrap().to_owned();
        if name == "odd" {
            return json!({ "room": summary("!another:evil.example", "Another", true), "children": [], "inaccessible_children": [] });
        }
        let mut room = summary(id, &name, true);
        let child = |end: &str, sender: &str| {
            json!({
                "type": "m.space.child", "state_key": format!("!{name}{end}:evil.example"), "sender": sender,
                "content": { "via": ["evil.example", 7, "not a name"] }, "origin_server_ts": 1,
            })
        };
        room["children_state"] = json!([
            child("0", "@e:evil.example"), child("1", "@e:evil.example"), child("2", "nobody"),
            { "type": "m.room.member", "state_key": "!x:evil.example", "sender": "@e:evil.example", "content": {}, "origin_server_ts": 1 },
            "odd", 7,
        ]);
        let stranger = summary("!stranger:a.example", "Stranger", false);
        let odd = json!({ "room_id": 7 });
        json!({ "room": room, "children": [7, odd, stranger], "inaccessible_children": [7, "not an id", id] })
    });
    let top = room(&bob, "Top", true, "public").await;
    link(&bob, &top, "!s:evil.example", &["evil.example"], "a").await;
    link(&bob, &top, "!odd:evil.example", &["evil.example"], "b").await;
    let (_, page) = walk(&bob, &top, "").await;
    assert!(*count.lock() <= 10, "{} questions for one page", count.lock());
    assert!(!names(&page).iter().any(|name| ["Stranger", "Another"].contains(name)), "{page}");
    assert_eq!(page["rooms"][1]["children_state"].as_array().unwrap().len(), 2, "{page}");
    // The walk comes to its end, page by page.
    let (mut query, mut pages) = (String::new(), 0);
    loop {
        let (_, page) = walk(&bob, &top, &query).await;
        pages += 1;
        let Some(next) = page["next_batch"].as_str() else { break };
        assert!(pages < 2_000);
        query = format!("?from={}", encoded(next));
    }
    assert!(*count.lock() <= 1_000, "{} questions", count.lock());
    // A space that only another server knows is shown by its id; one that nobody knows is refused.
    assert_eq!(walk(&alice, "!s:evil.example", "").await.0, StatusCode::OK);
    for unknown in ["!s:gone.example", "!odd:evil.example", "!s:a.example"] {
        let (status, refused) = walk(&alice, unknown, "").await;
        assert_eq!(
            (status, refused["errcode"].as_str()),
            (StatusCode::FORBIDDEN, Some("M_FORBIDDEN")),
            "{unknown}"
        );
    }
}

async fn sum_up(client: &TestClient, name: &str, query: &str) -> (StatusCode, Value) {
    client.get(&format!("/_matrix/client/v1/room_summary/{}{query}", encoded(name))).await
}

#[tokio::test(start_paused = true)]
async fn a_room_is_summed_up_for_who_may_look_wherever_it_is() {
    let (federated, [alice, bob, carol]) = three().await;
    let body = json!({ "name": "Open", "preset": "public_chat", "room_alias_name": "open" });
    let open = alice.create(body).await;
    let secret = alice.create(json!({ "name": "Secret", "preset": "private_chat" })).await;
    let nobody = alice.server.anonymous();
    let (_, own) = sum_up(&alice, &open, "").await;
    assert_eq!((&own["name"], &own["membership"]), (&json!("Open"), &json!("join")));
    let (_, own) = sum_up(&alice, &secret, "").await;
    assert_eq!((&own["room_id"], &own["membership"]), (&json!(secret), &json!("join")));
    assert!(own.get("allowed_room_ids").is_none(), "{own}");
    let (_, seen) = sum_up(&nobody, "#open:a.example", "").await;
    assert_eq!(seen["room_id"], open);
    assert!(seen.get("membership").is_none(), "{seen}");
    // From another server: by its alias, and by id with a server to ask.
    for (name, query) in [("#open:a.example", ""), (&*open, "?via=a.example")] {
        let (_, seen) = sum_up(&bob, name, query).await;
        assert_eq!((&seen["name"], &seen["membership"]), (&json!("Open"), &json!("leave")), "{seen}");
    }
    for (client, name, query) in [
        (&bob, &*secret, "?via=a.example"),
        (&bob, "!none:a.example", ""),
        (&carol, "!none:gone.example", "?via=gone.example"),
        (&nobody, &*secret, ""),
    ] {
        let (status, refused) = sum_up(client, name, query).await;
        assert_eq!((status, &refused["errcode"]), (StatusCode::NOT_FOUND, &json!("M_NOT_FOUND")), "{name}");
    }
    // Nobody has other servers asked who has no account.
    federated.net.take_arrived();
    let elsewhere = bob.server.anonymous();
    for (name, query) in [("#open:a.example", ""), (&*open, "?via=a.example")] {
        assert_eq!(sum_up(&elsewhere, name, query).await.0, StatusCode::NOT_FOUND);
    }
    let arrived = federated.net.take_arrived();
    assert!(arrived.is_empty(), "{arrived:?}");
}
