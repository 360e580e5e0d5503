//! Filled holes, as users see them.

use ruma::OwnedEventId;
use serde_json::{Value, json};

use super::*;
use crate::{
    flows::room::base::{
        self,
        tests::{Here, events},
    },
    ids::Order,
    rooms::{
        change::Before,
        change::elsewhere::{Elsewhere, ROOM, alice, bob},
        state,
    },
};

/// A room whose past has a thread, and which Bob has joined.
async fn joined() -> (Here, Elsewhere, OwnedEventId) {
    let mut elsewhere = Elsewhere::with_members(10);
    let root = elsewhere.say(&alice(), json!({ "msgtype": "m.text", "body": "root" }));
    for number in 0..2 {
        let in_thread = json!({ "rel_type": "m.thread", "event_id": root.id() });
        let reply =
            json!({ "msgtype": "m.text", "body": format!("reply {number}"), "m.relates_to": in_thread });
        elsewhere.say(&alice(), reply);
    }
    let here = Here::new().await;
    let brought = elsewhere.brought();
    let join = elsewhere.join(&bob());
    base::join(here.app(), here.base(&elsewhere), events(brought), join, |_| Ok(())).await.unwrap();
    (here, elsewhere, root.id().to_owned())
}

fn backfill(here: &Here, elsewhere: &Elsewhere, range: std::ops::Range<usize>) -> Backfill {
    let app = here.app();
    let claim = app.rooms.turns(ROOM).claim_history().unwrap();
    let (hole, _) = state::find_hole(&*app.store.snapshot(), ROOM, Order::MAX).unwrap().unwrap();
    Backfill::new(claim, hole, elsewhere.older(range), "a.example".to_owned())
}

#[tokio::test(start_paused = true)]
async fn events_from_before_are_in_the_past_of_a_room_and_in_no_sync() {
    let (here, elsewhere, root) = joined().await;
    let first = here.ask("GET", "sync", Value::Null).await;
    let since = first["next_batch"].as_str().unwrap().to_owned();
    let all = elsewhere.timeline.len() - 1;
    fill(here.app(), ROOM, backfill(&here, &elsewhere, 0..all)).await.unwrap();
    let sync = here.ask("GET", &format!("sync?since={since}&timeout=0"), Value::Null).await;
    assert!(sync["rooms"].is_null(), "{sync}");
    let room = elsewhere.row.id.as_str();
    let whole = here.ask("GET", "sync?full_state=true", Value::Null).await;
    let told = &whole["rooms"]["join"][room];
    let ids = |events: &Value| -> Vec<String> {
        let events = events.as_array().unwrap();
        events.iter().map(|event| event["event_id"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(ids(&told["timeline"]["events"]), ids(&first["rooms"]["join"][room]["timeline"]["events"]));
    assert_eq!(told["unread_notifications"]["notification_count"], 0);
    // The timeline goes on where the sync's ends.
    let (mut from, mut read) = (told["timeline"]["prev_batch"].as_str().unwrap().to_owned(), Vec::new());
    let mut thread = Value::Null;
    loop {
        let path = format!("rooms/{room}/messages?dir=b&limit=7&from={from}");
        let page = here.ask("GET", &path, Value::Null).await;
        read.extend(ids(&page["chunk"]));
        let chunk = page["chunk"].as_array().unwrap();
        if let Some(event) = chunk.iter().find(|event| event["event_id"] == root.as_str()) {
            thread = event["unsigned"]["m.relations"]["m.thread"].clone();
        }
        let Some(end) = page["end"].as_str() else { break };
        from = end.to_owned();
    }
    read.reverse();
    let expected = elsewhere.timeline[..all].iter().map(|(event, _)| event.id().to_string());
    assert_eq!(read, expected.collect::<Vec<_>>());
    assert_eq!(
        (thread["count"].clone(), thread["latest_event"]["content"]["body"].clone()),
        (json!(2), json!("reply 1"))
    );
}

#[tokio::test(start_paused = true)]
async fn a_fill_that_fails_keeps_what_it_has_filled_and_can_be_made_again() {
    let (here, elsewhere, _) = joined().await;
    let all = elsewhere.timeline.len() - 1;
    fill(here.app(), ROOM, backfill(&here, &elsewhere, all - 5..all)).await.unwrap();
    let mut wrong = elsewhere.older(0..all - 5);
    wrong[0].state_before = Some(Before::Ids(vec![OwnedEventId::try_from("$nowhere").unwrap()]));
    let claim = here.app().rooms.turns(ROOM).claim_history().unwrap();
    let (hole, _) = state::find_hole(&*here.app().store.snapshot(), ROOM, Order::MAX).unwrap().unwrap();
    let failed = fill(here.app(), ROOM, Backfill::new(claim, hole, wrong, "a.example".to_owned())).await;
    assert!(matches!(failed, Err(Error::Remote { .. })), "{failed:?}");
    fill(here.app(), ROOM, backfill(&here, &elsewhere, 0..all - 5)).await.unwrap();
    assert!(state::find_hole(&*here.app().store.snapshot(), ROOM, Order::MAX).unwrap().is_none());
}
