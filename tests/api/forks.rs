//! A user of another server, whose events stand wherever in a room's graph they like: the random models of sync let them fork the
//! rooms, so that resolution changes the state, with an event that loses, without an event, and back to where a key is not set.

use ruma::OwnedEventId;
use serde_json::{Value, json};

use crate::{
    support::{TestClient, TestServer, encoded, remote::Remote},
    sync::Dice,
};

/// The number of events that are remembered as places from which a fork may begin.
const PLACES: usize = 16;

/// A user of another server in one room.
pub(crate) struct Forker {
    room: String,
    remote: Remote,
    places: Vec<OwnedEventId>,
}

impl Forker {
    /// `@bob:b.example`, who joins the room.
    pub(crate) async fn join(server: &TestServer, room: &str) -> Self {
        let remote = Remote::new(server.server().app(), room);
        let places = vec![remote.join().await];
        Self { room: room.to_owned(), remote, places }
    }

    /// Goes on with the server after a restart.
    pub(crate) fn restarted(&mut self, server: &TestServer) {
        self.remote.app = server.server().app().clone();
    }

    fn remember(&mut self, event: OwnedEventId) {
        if !self.places.contains(&event) {
            self.places.push(event);
        }
        let many = self.places.len().saturating_sub(PLACES);
        self.places.drain(..many);
    }

    /// Sends one event on any of the places, or has the room's creator change how much the user may do.
    pub(crate) async fn act(&mut self, dice: &mut Dice, people: &[TestClient], number: usize) {
        for head in self.remote.heads() {
            self.remember(head);
        }
        let path = format!("/_matrix/client/v3/rooms/{}/state/m.room.power_levels/", encoded(&self.room));
        let (status, mut levels) = people[0].get(&path).await;
        if !status.is_success() {
            // The creator has left the room.
            return;
        }
        let me = self.remote.user.to_string();
        if dice.below(5) == 0 {
            levels["users"][&me] = json!([0, 50, 75][dice.below(3)]);
            let (status, json) = people[0].put(&path, levels).await;
            assert!(status.is_success() || json["errcode"].is_string(), "{status}: {json}");
            return;
        }
        let mut prev = vec![self.places[dice.below(self.places.len())].clone()];
        let other = &self.places[dice.below(self.places.len())];
        if dice.below(3) == 0 && !prev.contains(other) {
            prev.push(other.clone());
        }
        let whom = people[dice.below(people.len())].user_id.clone();
        let text = number.to_string();
        let (kind, key, content): (&str, Option<String>, Value) = match dice.below(12) {
            0 | 1 => ("m.room.topic", Some(String::new()), json!({ "topic": text })),
            2 => ("m.room.name", Some(String::new()), json!({ "name": text })),
            3 | 4 => ("org.example.thing", Some(dice.below(6).to_string()), json!({ "number": number })),
            5 => {
                let word = ["leave", "ban", "invite"][dice.below(3)];
                ("m.room.member", Some(whom), json!({ "membership": word }))
            }
            6 => {
                levels["users"][&whom] = json!([0, 50][dice.below(2)]);
                ("m.room.power_levels", Some(String::new()), levels)
            }
            7 => {
                let word = ["public", "invite"][dice.below(2)];
                ("m.room.join_rules", Some(String::new()), json!({ "join_rule": word }))
            }
            8 => {
                let word = if dice.below(3) == 0 { "leave" } else { "join" };
                ("m.room.member", Some(me), json!({ "membership": word, "displayname": text }))
            }
            9 => {
                let word = ["world_readable", "shared", "joined"][dice.below(3)];
                let content = json!({ "history_visibility": word });
                ("m.room.history_visibility", Some(String::new()), content)
            }
            _ => ("m.room.message", None, json!({ "msgtype": "m.text", "body": text })),
        };
        let event = self.remote.event(kind, key.as_deref(), content, &prev);
        let id = event.id().to_owned();
        if matches!(self.remote.send(event).await, aqueduct::rooms::change::Outcome::Accepted(_)) {
            self.remember(id);
        }
    }
}
