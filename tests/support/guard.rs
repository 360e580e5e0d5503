//! A policy server that exists as a script only: what it says of an event may be changed by a test.

use std::{sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use ed25519_dalek::{Signer as _, SigningKey};
use federation::testing::{Answered, Net, json};
use parking_lot::Mutex;
use ruma::{CanonicalJsonObject, RoomVersionId, canonical_json::redact};
use serde_json::{Value, json};

use super::{BEGAN_MS, network::Peer};

/// The name of the policy server.
pub(crate) const GUARD: &str = "p.example";
/// Where it is in the network.
pub(crate) const ADDRESS: &str = "5.0.0.9";
/// The room version of which it signs events.
pub(crate) const VERSION: &str = "11";

/// The answer of the policy server to a request.
#[derive(Clone)]
pub(crate) enum Says {
    /// It signs with the key that was made from this number.
    Signs(u8),
    /// It answers this status and body.
    Answers(u16, Value),
    /// It never answers at all.
    Nothing,
    /// It says something else after this time.
    After(Duration, Box<Self>),
}

/// A word on an event.
type Script = Box<dyn Fn(&Value) -> Says + Send>;

/// The policy server: a peer that also signs events.
pub(crate) struct Guard {
    pub(crate) peer: Peer,
    asked: Arc<Mutex<Vec<Value>>>,
    script: Arc<Mutex<Script>>,
}

impl Guard {
    /// Puts the policy server into the network. It signs everything with key 1.
    pub(crate) fn new(net: &Net) -> Self {
        let peer = Peer::new(net, GUARD, ADDRESS, 9);
        let asked: Arc<Mutex<Vec<Value>>> = Arc::default();
        let script: Arc<Mutex<Script>> = Arc::new(Mutex::new(Box::new(|_| Says::Signs(1))));
        let (notes, says, own) = (Arc::clone(&asked), Arc::clone(&script), Arc::clone(&peer.own));
        net.serve(&format!("{ADDRESS}:8448"), &[GUARD], move |arrived| {
            let path = arrived.request.uri().path().to_owned();
            let body: Value = serde_json::from_slice(arrived.request.body()).unwrap_or(Value::Null);
            let answer = if path == "/_matrix/policy/v1/sign" {
                assert!(arrived.request.headers().contains_key("authorization"));
                notes.lock().push(body.clone());
                says.lock()(&body)
            } else if path.starts_with("/_matrix/key/") {
                let document: Value = serde_json::from_str(&own.document(BEGAN_MS)).unwrap();
                Says::Answers(200, document)
            } else {
                Says::Answers(200, json!({}))
            };
            give(answer, body)
        });
        Self { peer, asked, script }
    }

    /// Changes the word on events from now on.
    pub(crate) fn says(&self, says: impl Fn(&Value) -> Says + Send + 'static) {
        *self.script.lock() = Box::new(says);
    }

    /// The events that it was asked about since the last call.
    pub(crate) fn take_asked(&self) -> Vec<Value> {
        std::mem::take(&mut self.asked.lock())
    }

    /// The types of these.
    pub(crate) fn take_asked_types(&self) -> Vec<String> {
        self.take_asked().iter().map(|event| event["type"].as_str().unwrap().to_owned()).collect()
    }
}

async fn give(says: Says, event: Value) -> Answered {
    let mut says = says;
    loop {
        match says {
            Says::Signs(seed) => {
                let signature = json!({ GUARD: { "ed25519:policy_server": signature(&event, seed) } });
                return json(200, signature.to_string());
            }
            Says::Answers(status, body) => return json(status, body.to_string()),
            Says::Nothing => return std::future::pending().await,
            Says::After(time, later) => {
                // It never comes; only the time passes.
                let _ = tokio::time::timeout(time, std::future::pending::<()>()).await;
                says = *later;
            }
        }
    }
}

/// The signature of an event by the key that is made from this number.
pub(crate) fn signature(event: &Value, seed: u8) -> String {
    let rules = RoomVersionId::try_from(VERSION).unwrap().rules().unwrap();
    let object: CanonicalJsonObject = serde_json::from_value(event.clone()).unwrap();
    let mut signed = redact(object, &rules.redaction, None).unwrap();
    for field in ["signatures", "unsigned"] {
        signed.remove(field);
    }
    let signed = serde_json::to_vec(&signed).unwrap();
    STANDARD_NO_PAD.encode(SigningKey::from_bytes(&[seed; 32]).sign(&signed).to_bytes())
}

/// The content of `m.room.policy` with the key that is made from this number.
pub(crate) fn policy(seed: u8) -> Value {
    let key = SigningKey::from_bytes(&[seed; 32]).verifying_key();
    json!({ "via": GUARD, "public_keys": { "ed25519": STANDARD_NO_PAD.encode(key.as_bytes()) } })
}
