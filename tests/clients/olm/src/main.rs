//! Holds the keys and sessions of devices, and encrypts and decrypts for them. Each line of its input is a request, an object that
//! names a device (`who`) and what it does (`do`); each is answered by a line: an object, with `error` where it could not be done.

use std::{
    collections::BTreeMap,
    io::{BufRead, Write},
};

use serde_json::{Value, json};
use vodozemac::{
    Curve25519PublicKey, Ed25519PublicKey, Ed25519Signature,
    megolm::{self, GroupSession, InboundGroupSession, MegolmMessage, SessionKey},
    olm::{Account, OlmMessage, Session, SessionConfig},
};

type Answer = Result<Value, Box<dyn std::error::Error>>;

/// A device, with all that it keeps.
struct Device {
    account: Account,
    /// The sessions with each other device, by its curve25519 key: the newest one last.
    sessions: BTreeMap<String, Vec<Session>>,
    /// The sessions with which it encrypts for rooms, by id.
    own: BTreeMap<String, GroupSession>,
    /// The sessions that it can decrypt, by id.
    known: BTreeMap<String, InboundGroupSession>,
}

fn text<'a>(request: &'a Value, field: &str) -> Result<&'a str, String> {
    request[field].as_str().ok_or_else(|| format!("`{field}` is missing"))
}

impl Device {
    fn new() -> Self {
        Self {
            account: Account::new(),
            sessions: BTreeMap::new(),
            own: BTreeMap::new(),
            known: BTreeMap::new(),
        }
    }

    fn act(&mut self, action: &str, request: &Value) -> Answer {
        match action {
            "identity" => {
                let keys = self.account.identity_keys();
                Ok(json!({ "curve25519": keys.curve25519.to_base64(), "ed25519": keys.ed25519.to_base64() }))
            }
            "sign" => Ok(json!({ "signature": self.account.sign(text(request, "text")?).to_base64() })),
            "verify" => {
                let key = Ed25519PublicKey::from_base64(text(request, "key")?)?;
                let signature = Ed25519Signature::from_base64(text(request, "signature")?)?;
                key.verify(text(request, "text")?.as_bytes(), &signature)?;
                Ok(json!({}))
            }
            "one_time_keys" => {
                let count = request["count"].as_u64().unwrap_or(0);
                self.account.generate_one_time_keys(usize::try_from(count)?);
                let keys = self.account.one_time_keys().into_iter();
                let keys: BTreeMap<_, _> = keys.map(|(id, key)| (id.to_base64(), key.to_base64())).collect();
                Ok(json!({ "keys": keys }))
            }
            "fallback_key" => {
                self.account.generate_fallback_key();
                let keys = self.account.fallback_key().into_iter();
                let keys: BTreeMap<_, _> = keys.map(|(id, key)| (id.to_base64(), key.to_base64())).collect();
                Ok(json!({ "keys": keys }))
            }
            "published" => {
                self.account.mark_keys_as_published();
                Ok(json!({}))
            }
            "begin" => {
                let their = Curve25519PublicKey::from_base64(text(request, "their")?)?;
                let key = Curve25519PublicKey::from_base64(text(request, "key")?)?;
                let session = self.account.create_outbound_session(SessionConfig::version_1(), their, key)?;
                self.sessions.entry(their.to_base64()).or_default().push(session);
                Ok(json!({}))
            }
            "seal" => {
                let sessions = self.sessions.get_mut(text(request, "their")?);
                let session =
                    sessions.and_then(|sessions| sessions.last_mut()).ok_or("there is no session")?;
                let message = session.encrypt(text(request, "text")?)?;
                Ok(serde_json::to_value(message)?)
            }
            "open" => {
                let message: OlmMessage = serde_json::from_value(request["message"].clone())?;
                let plain = self.open(text(request, "their")?, &message)?;
                Ok(json!({ "text": String::from_utf8(plain)? }))
            }
            "begin_room" => {
                let session = GroupSession::new(megolm::SessionConfig::version_1());
                let known =
                    InboundGroupSession::new(&session.session_key(), megolm::SessionConfig::version_1());
                let id = session.session_id();
                self.known.insert(id.clone(), known);
                self.own.insert(id.clone(), session);
                Ok(json!({ "session_id": id }))
            }
            "room_key" => {
                let session = self.own.get(text(request, "session_id")?).ok_or("there is no such session")?;
                Ok(
                    json!({ "session_key": session.session_key().to_base64(), "index": session.message_index() }),
                )
            }
            "take_room_key" => {
                let key = SessionKey::from_base64(text(request, "session_key")?)?;
                let session = InboundGroupSession::new(&key, megolm::SessionConfig::version_1());
                let id = session.session_id();
                if id != text(request, "session_id")? {
                    return Err("the key is that of another session".into());
                }
                let index = session.first_known_index();
                // The key that reaches further back is kept.
                if self.known.get(&id).is_none_or(|known| known.first_known_index() > index) {
                    self.known.insert(id, session);
                }
                Ok(json!({ "index": index }))
            }
            "seal_event" => {
                let session =
                    self.own.get_mut(text(request, "session_id")?).ok_or("there is no such session")?;
                let index = session.message_index();
                let ciphertext = session.encrypt(text(request, "text")?).to_base64();
                Ok(json!({ "ciphertext": ciphertext, "index": index }))
            }
            "open_event" => {
                let session = self.known.get_mut(text(request, "session_id")?);
                let session = session.ok_or("the session is not known")?;
                let opened = session.decrypt(&MegolmMessage::from_base64(text(request, "ciphertext")?)?)?;
                let text = String::from_utf8(opened.plaintext)?;
                Ok(json!({ "text": text, "index": opened.message_index }))
            }
            _ => Err("nobody can do that".into()),
        }
    }

    /// Decrypts a message of another device. One that begins a session makes it.
    fn open(&mut self, their: &str, message: &OlmMessage) -> Result<Vec<u8>, Box<dyn std::error::Error>> {
        let sessions = self.sessions.entry(their.to_owned()).or_default();
        let mut why = None;
        for at in (0..sessions.len()).rev() {
            let is_of = match message {
                OlmMessage::PreKey(message) => message.session_id() == sessions[at].session_id(),
                OlmMessage::Normal(_) => true,
            };
            if !is_of {
                continue;
            }
            match sessions[at].decrypt(message) {
                Ok(plain) => {
                    // The session that was used last is the one to answer with, so that both come to use the same one.
                    let used = sessions.remove(at);
                    sessions.push(used);
                    return Ok(plain);
                }
                Err(error) => why = Some(error),
            }
        }
        match (message, why) {
            (_, Some(why)) => Err(why.into()),
            (OlmMessage::Normal(_), None) => Err("there is no session".into()),
            (OlmMessage::PreKey(message), None) => {
                let their = Curve25519PublicKey::from_base64(their)?;
                let made = self.account.create_inbound_session(SessionConfig::version_1(), their, message)?;
                self.sessions.entry(their.to_base64()).or_default().push(made.session);
                Ok(made.plaintext)
            }
        }
    }
}

fn answer(devices: &mut BTreeMap<String, Device>, line: &str) -> Answer {
    let request: Value = serde_json::from_str(line)?;
    let who = text(&request, "who")?.to_owned();
    let device = devices.entry(who).or_insert_with(Device::new);
    device.act(text(&request, "do")?, &request)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (mut devices, mut out) = (BTreeMap::new(), std::io::stdout().lock());
    for line in std::io::stdin().lock().lines() {
        let answer = answer(&mut devices, &line?).unwrap_or_else(|why| json!({ "error": why.to_string() }));
        writeln!(out, "{answer}")?;
        out.flush()?;
    }
    Ok(())
}
