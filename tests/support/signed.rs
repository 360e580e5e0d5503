//! Events that a fake server hashes and signs, as servers do for their users.

use federation::json::Json;
use http::{Method, StatusCode};
use ruma::{
    CanonicalJsonObject, RoomVersionId,
    canonical_json::redact,
    room_version_rules::RoomVersionRules,
    signatures::{content_hash, reference_hash},
};
use serde_json::{Value, json};

use super::{TestServer, encoded, network::Peer};

fn rules(version: &str) -> RoomVersionRules {
    RoomVersionId::try_from(version).unwrap().rules().unwrap()
}

fn object(event: &Value) -> CanonicalJsonObject {
    serde_json::from_value(event.clone()).unwrap()
}

impl Peer {
    /// The event with its content hash and this server's signature, as a room of this version asks for, and its id.
    pub(crate) fn sign_event(&self, event: &Value, version: &str) -> (String, Value) {
        let rules = rules(version);
        let mut event = event.clone();
        for field in ["hashes", "signatures", "unsigned"] {
            event.as_object_mut().unwrap().remove(field);
        }
        if version == "1" || version == "2" {
            if event["event_id"].is_null() {
                let hash = content_hash(&object(&event)).unwrap().encode().replace(['/', '+'], "-");
                let (_, server) = event["sender"].as_str().unwrap().split_once(':').unwrap();
                event["event_id"] = json!(format!("${}:{server}", &hash[..12]));
            }
        } else {
            event.as_object_mut().unwrap().remove("event_id");
        }
        event["hashes"] = json!({ "sha256": content_hash(&object(&event)).unwrap() });
        let redacted = redact(object(&event), &rules.redaction, None).unwrap();
        let redacted = Json::parse(&serde_json::to_vec(&redacted).unwrap()).unwrap();
        let signed: Value =
            serde_json::from_str(self.own.sign_object(redacted).canonical().as_str()).unwrap();
        event["signatures"] = signed["signatures"].clone();
        let id = match event["event_id"].as_str() {
            Some(id) => id.to_owned(),
            None => format!("${}", reference_hash(&object(&event), &rules).unwrap()),
        };
        (id, event)
    }

    /// Asks for the template of an event by which a user moves.
    pub(crate) async fn make(
        &self,
        server: &TestServer,
        way: &str,
        room: &str,
        user: &str,
        query: &str,
    ) -> (StatusCode, Value) {
        let uri = format!("/_matrix/federation/v1/make_{way}/{}/{}{query}", encoded(room), encoded(user));
        self.ask(server, Method::GET, &uri, None).await
    }

    /// Sends an event by which a user moves, to this version of the endpoint.
    pub(crate) async fn send(
        &self,
        server: &TestServer,
        way: &str,
        room: &str,
        id: &str,
        event: &Value,
    ) -> (StatusCode, Value) {
        let uri = format!("/_matrix/federation/{way}/{}/{}", encoded(room), encoded(id));
        self.ask(server, Method::PUT, &uri, Some(event)).await
    }

    /// The template of a user's move, which must be given, completed and signed, with its id.
    pub(crate) async fn made(
        &self,
        server: &TestServer,
        way: &str,
        room: &str,
        user: &str,
    ) -> (String, Value) {
        let query = (1..=12).map(|version| format!("&ver={version}")).collect::<String>();
        let (status, made) = self.make(server, way, room, user, &query.replacen('&', "?", 1)).await;
        assert_eq!(status, StatusCode::OK, "make_{way}: {made}");
        self.sign_event(&made["event"], made["room_version"].as_str().unwrap())
    }

    /// Has a user of this server join, and gives the event and the answer.
    pub(crate) async fn join(&self, server: &TestServer, room: &str, user: &str) -> (String, Value) {
        let (id, event) = self.made(server, "join", room, user).await;
        let (status, answer) = self.send(server, "v2/send_join", room, &id, &event).await;
        assert_eq!(status, StatusCode::OK, "send_join: {answer}");
        (id, answer)
    }
}
