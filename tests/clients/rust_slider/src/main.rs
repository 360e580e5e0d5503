//! A person who follows sliding sync with matrix-sdk as Element X does (`SyncService` and its `RoomListService`), driven by `slide.py`
//! through lines of JSON: commands in, answers out, and a whole view of what the person sees whenever it changes.

use std::{collections::BTreeMap, error::Error, pin::Pin, time::Duration};

use futures_util::{Stream, StreamExt};
use matrix_sdk::{
    Client, RoomState, ThreadingSupport,
    ruma::{EventId, OwnedRoomId, RoomId},
};
use matrix_sdk_ui::{
    eyeball_im::{Vector, VectorDiff},
    room_list_service::{RoomList, RoomListItem, RoomListLoadingState, filters},
    sync_service::SyncService,
};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};

type Anything<T> = Result<T, Box<dyn Error>>;

/// Somebody who has logged in.
struct Person {
    client: Client,
    sync: SyncService,
    list: &'static RoomList,
    entries: Pin<Box<dyn Stream<Item = Vec<VectorDiff<RoomListItem>>>>>,
    rooms: Vector<RoomListItem>,
    opened: Vec<OwnedRoomId>,
}

impl Person {
    async fn log_in(url: &str, user: &str, password: &str) -> Anything<Self> {
        let threads = ThreadingSupport::Enabled { with_subscriptions: true };
        let client = Client::builder().homeserver_url(url).with_threading_support(threads).build().await?;
        client.matrix_auth().login_username(user, password).send().await?;
        let sync = SyncService::builder(client.clone()).with_offline_mode().build().await?;
        // The process ends with the person, so that the list may live as long.
        let list: &'static RoomList = Box::leak(Box::new(sync.room_list_service().all_rooms().await?));
        let (entries, controller) = list.entries_with_dynamic_adapters(100);
        controller.set_filter(Box::new(filters::new_filter_non_left()));
        Box::leak(Box::new(controller));
        sync.start().await;
        Ok(Self { client, sync, list, entries: Box::pin(entries), rooms: Vector::new(), opened: Vec::new() })
    }

    async fn obey(&mut self, verb: &str, details: &Value) -> Anything<Value> {
        let text = |name: &str| details[name].as_str().unwrap_or_default();
        match verb {
            // The library grows its window by itself.
            "grow" => {}
            "open" => {
                self.opened.push(RoomId::parse(text("room"))?);
                let opened: Vec<&RoomId> = self.opened.iter().map(AsRef::as_ref).collect();
                self.sync.room_list_service().subscribe_to_rooms(&opened).await;
            }
            "accept" => {
                let room = self.client.get_room(&RoomId::parse(text("room"))?).ok_or("no such room")?;
                room.join().await?;
            }
            "thread" => {
                let (room, root) = (RoomId::parse(text("room"))?, EventId::parse(text("root"))?);
                let found = self.client.state_store().load_thread_subscription(&room, &root).await?;
                return Ok(found.map_or(Value::Null, |found| format!("{:?}", found.status).into()));
            }
            _ => return Err(format!("there is no command {verb}").into()),
        }
        Ok(Value::Null)
    }

    /// The rooms that the person sees now.
    async fn view(&self) -> Anything<Value> {
        let count = match self.list.loading_state().get() {
            RoomListLoadingState::Loaded { maximum_number_of_rooms } => maximum_number_of_rooms,
            RoomListLoadingState::NotLoaded => None,
        };
        // Element X compares rooms by the time of their last messages where it has both; this is the order that the server tells.
        let mut rooms: Vec<&RoomListItem> = self.rooms.iter().collect();
        rooms.sort_by_key(|room| std::cmp::Reverse(room.recency_stamp().map(u64::from)));
        let of = |state: RoomState| -> Vec<&str> {
            rooms.iter().filter(|room| room.state() == state).map(|room| room.room_id().as_str()).collect()
        };
        let mut unread = BTreeMap::new();
        for room in self.rooms.iter().filter(|room| room.state() == RoomState::Joined) {
            let counts = room.unread_notification_counts();
            unread.insert(room.room_id(), [counts.notification_count, counts.highlight_count]);
        }
        let (mut said, mut topics) = (BTreeMap::new(), BTreeMap::new());
        for id in &self.opened {
            let Some(room) = self.client.get_room(id) else { continue };
            let (cache, _drop_with_the_view) = room.event_cache().await?;
            let mut bodies = Vec::new();
            for event in cache.events().await? {
                let content: Option<Value> = event.raw().get_field("content")?;
                bodies.extend(content.and_then(|content| content["body"].as_str().map(str::to_owned)));
            }
            said.insert(id.as_str(), bodies);
            topics.insert(id.as_str(), room.topic());
        }
        let (rooms, invites) = (of(RoomState::Joined), of(RoomState::Invited));
        Ok(json!({
            "count": count, "rooms": rooms, "invites": invites, "unread": unread, "said": said, "topics": topics,
        }))
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Anything<()> {
    let url = std::env::args().nth(1).ok_or("the first argument is the address of the server")?;
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    let mut look = tokio::time::interval(Duration::from_millis(20));
    let mut person: Option<Person> = None;
    let mut shown = Value::Null;
    loop {
        let news = async {
            match &mut person {
                Some(person) => person.entries.next().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            line = lines.next_line() => {
                let Some(line) = line? else { break };
                let asked: Value = serde_json::from_str(&line)?;
                let text = |name: &str| asked[name].as_str().unwrap_or_default();
                let done = match (text("do"), &mut person) {
                    ("login", person) => {
                        let found = Person::log_in(&url, text("user"), text("password")).await;
                        found.map(|found| { *person = Some(found); Value::Null })
                    }
                    (verb, Some(person)) => person.obey(verb, &asked).await,
                    (_, None) => Err("nobody has logged in".into()),
                };
                match done {
                    Ok(result) => println!("{}", json!({ "id": asked["id"], "result": result })),
                    Err(error) => println!("{}", json!({ "id": asked["id"], "error": error.to_string() })),
                }
            }
            diffs = news => {
                let person = person.as_mut().ok_or("news comes to somebody")?;
                for diff in diffs.ok_or("the list of rooms ended")? {
                    diff.apply(&mut person.rooms);
                }
            }
            _ = look.tick() => {
                if let Some(person) = &person {
                    let view = person.view().await?;
                    if view != shown {
                        println!("{}", json!({ "view": view }));
                        shown = view;
                    }
                }
            }
        }
    }
    if let Some(person) = person {
        person.sync.stop().await;
    }
    Ok(())
}
