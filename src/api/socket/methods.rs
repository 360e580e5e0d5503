//! The methods of a socket, each as a request to its endpoint.

use bytes::Bytes;
use http::Method;
use ruma::{UserId, presence::PresenceState};
use serde_json::{Value, value::RawValue};

use crate::{
    api::checked::Checked,
    error::Refusal,
    json::{JsonText, Object},
    schema::event_types::{FULLY_READ, READ, READ_PRIVATE},
};

/// An id of a request has at most this many bytes as it is written, because the server keeps it until it has answered.
const ID_BYTES_MAX: usize = 64;
/// A number that is an id lies between this number and its negative, so that each reader of JSON reads the same.
const ID_NUMBER_MAX: i64 = 1 << 53;

/// A request, as a client has sent it.
pub(super) struct Asked {
    /// The id with which it is answered. None for a request that has none.
    pub(super) id: Option<JsonText>,
    /// The thing that is asked for, or why it cannot be.
    pub(super) wish: Result<Wish, Refusal>,
}

/// The thing that a client asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Wish {
    /// A request to an endpoint.
    Call(Call),
    /// The client wants to be told news.
    Sync(Sync),
    /// The client has kept the news.
    Ack(Ack),
}

/// The client has kept the news up to a position.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Ack {
    /// The position up to which it has kept them.
    pub(super) pos: String,
    /// The body of further requests to sliding sync. None if it stays as it is.
    pub(super) sliding: Option<Bytes>,
}

/// A request to an endpoint.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Call {
    /// Requests with the same lane are carried out one after the other.
    pub(super) lane: String,
    /// The method of the endpoint.
    pub(super) method: Method,
    /// The path of the endpoint, with its parameters encoded.
    pub(super) path: String,
    /// The body that the endpoint gets.
    pub(super) body: Bytes,
}

/// The parameters of `/sync` or of sliding sync, but for the position.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Sync {
    /// The position from which on news are told. None if the client begins.
    pub(super) since: Option<String>,
    /// The first answer has the whole state of each room.
    pub(super) full_state: bool,
    /// The body of requests to sliding sync. None for `/sync`.
    pub(super) sliding: Option<Bytes>,
    /// How present the client says its user is.
    pub(super) presence: PresenceState,
    /// The other parameters as they stand in a query, each with an ampersand before it.
    query: String,
}

impl Sync {
    /// A request that goes on from this position and does not wait: method, path with its query, and body.
    pub(super) fn request(&self, since: Option<&str>, full_state: bool) -> (Method, String, Bytes) {
        let (path, name) = match self.sliding {
            Some(_) => ("/_matrix/client/v4/sync", "pos"),
            None => ("/_matrix/client/v3/sync", "since"),
        };
        let mut path = format!("{path}?timeout=0{}", self.query);
        if let Some(since) = since {
            path.extend(["&", name, "=", &encoded(since)]);
        }
        match &self.sliding {
            Some(body) => (Method::POST, path, body.clone()),
            None => {
                if full_state {
                    path.push_str("&full_state=true");
                }
                (Method::GET, path, Bytes::new())
            }
        }
    }
}

/// The parameters of a request, read by name.
struct Params(Checked);

impl Params {
    /// The value of this name, as it was written. `null` counts as left out.
    fn find(&self, name: &str) -> Option<&str> {
        self.0.field(name).filter(|value| *value != "null")
    }

    fn require(&self, name: &str) -> Result<&str, Refusal> {
        self.find(name).ok_or_else(|| Refusal::missing_param(format!("`{name}` is missing in `params`.")))
    }

    fn find_text(&self, name: &str) -> Result<Option<String>, Refusal> {
        let text = self.find(name).map(serde_json::from_str::<String>).transpose();
        text.map_err(|_| Refusal::bad_json(format!("`{name}` must be a string.")))
    }

    fn find_flag(&self, name: &str) -> Result<Option<bool>, Refusal> {
        let flag = self.find(name).map(serde_json::from_str::<bool>).transpose();
        flag.map_err(|_| Refusal::bad_json(format!("`{name}` must be true or false.")))
    }

    /// A parameter that stands in a path, where it cannot be empty.
    fn text(&self, name: &str) -> Result<String, Refusal> {
        self.require(name)?;
        let text = self.find_text(name)?.unwrap_or_default();
        if text.is_empty() {
            return Err(Refusal::invalid_param(format!("`{name}` must not be empty.")));
        }
        Ok(text)
    }

    /// A body of these fields, as far as they are there.
    fn body(&self, names: &[&str]) -> Bytes {
        let mut body = Object::new();
        for name in names {
            let value = self.find(name).and_then(|value| serde_json::from_str::<&RawValue>(value).ok());
            if let Some(value) = value {
                body.json(name, value);
            }
        }
        body.finish().into()
    }

    /// The body of requests to sliding sync, if there is one. Its endpoint checks it.
    fn find_sliding(&self) -> Result<Option<Bytes>, Refusal> {
        match self.find("sliding") {
            Some(body) if body.starts_with('{') => Ok(Some(Bytes::copy_from_slice(body.as_bytes()))),
            Some(_) => Err(Refusal::bad_json("`sliding` must be an object.")),
            None => Ok(None),
        }
    }

    /// The content of an event, which is the whole body of its endpoint.
    fn content(&self) -> Result<Bytes, Refusal> {
        self.require("content").map(|content| Bytes::copy_from_slice(content.as_bytes()))
    }
}

/// Reads a message of a client. The user is the one who has the socket.
pub(super) fn read(message: Bytes, user: &UserId) -> Asked {
    let outer = match Checked::check(message) {
        Ok(outer) => outer,
        Err(refusal) => {
            let said = refusal.message.replace("request's body", "message");
            return Asked { id: None, wish: Err(Refusal { message: said, ..refusal }) };
        }
    };
    let id = match outer.field("id").map(read_id).transpose() {
        Ok(id) => id,
        Err(refusal) => return Asked { id: None, wish: Err(refusal) },
    };
    Asked { wish: read_wish(&outer, id.is_some(), user), id }
}

/// Reads an id. Refuses everything but short strings and whole numbers.
fn read_id(written: &str) -> Result<JsonText, Refusal> {
    let id = (written.len() <= ID_BYTES_MAX).then(|| serde_json::from_str::<Value>(written).ok()).flatten();
    let is_good = |id: &Value| match id {
        Value::String(_) => true,
        Value::Number(number) => {
            number.as_i64().is_some_and(|number| (-ID_NUMBER_MAX..=ID_NUMBER_MAX).contains(&number))
        }
        _ => false,
    };
    id.as_ref().filter(|id| is_good(id)).map(JsonText::from).ok_or_else(|| {
        Refusal::bad_json(format!(
            "`id` must be a string of at most {ID_BYTES_MAX} bytes, or a whole number below 2^53."
        ))
    })
}

fn read_wish(outer: &Checked, has_id: bool, user: &UserId) -> Result<Wish, Refusal> {
    let method = outer.field("method").and_then(|method| serde_json::from_str::<String>(method).ok());
    let Some(method) = method else {
        return Err(Refusal::bad_json("`method` must be the name of a method."));
    };
    if !has_id && method != "ack" {
        return Err(Refusal::bad_json("`id` is missing: a request has an id, by which it is answered."));
    }
    let params = match outer.field("params").filter(|params| *params != "null") {
        Some(params) => Checked::check(Bytes::copy_from_slice(params.as_bytes()))
            .map_err(|_| Refusal::bad_json("`params` must be an object."))?,
        None => Checked::empty(),
    };
    let params = Params(params);
    Ok(match method.as_str() {
        "sync" => Wish::Sync(read_sync(&params)?),
        "ack" => Wish::Ack(Ack { pos: params.text("pos")?, sliding: params.find_sliding()? }),
        other => Wish::Call(read_call(other, &params, user)?),
    })
}

fn read_call(name: &str, params: &Params, user: &UserId) -> Result<Call, Refusal> {
    let in_room = |method: Method, parts: &[&str], body: Bytes| {
        let room = params.text("room_id")?;
        let parts: String = parts.iter().flat_map(|part| ["/".to_owned(), encoded(part)]).collect();
        let path = format!("/_matrix/client/v3/rooms/{}{parts}", encoded(&room));
        Ok(Call { lane: room, method, path, body })
    };
    match name {
        "send" => {
            let (event_type, txn_id) = (params.text("type")?, params.text("txn_id")?);
            in_room(Method::PUT, &["send", &event_type, &txn_id], params.content()?)
        }
        "state" => {
            let (event_type, key) =
                (params.text("type")?, params.find_text("state_key")?.unwrap_or_default());
            let parts = ["state", event_type.as_str(), key.as_str()];
            // Without a state key, the path stands for the state of this type with an empty state key.
            let parts = if key.is_empty() { parts.get(..2).unwrap_or_default() } else { &parts };
            in_room(Method::PUT, parts, params.content()?)
        }
        "redact" => {
            let (event, txn_id) = (params.text("event_id")?, params.text("txn_id")?);
            in_room(Method::PUT, &["redact", &event, &txn_id], params.body(&["reason"]))
        }
        "typing" => in_room(Method::PUT, &["typing", user.as_str()], params.body(&["typing", "timeout"])),
        "receipt" => {
            let (kind, event) = (params.text("receipt_type")?, params.text("event_id")?);
            in_room(Method::POST, &["receipt", &kind, &event], params.body(&["thread_id"]))
        }
        "read_markers" => {
            let body = params.body(&[FULLY_READ, READ, READ_PRIVATE]);
            in_room(Method::POST, &["read_markers"], body)
        }
        "to_device" => {
            let (event_type, txn_id) = (params.text("type")?, params.text("txn_id")?);
            let path =
                format!("/_matrix/client/v3/sendToDevice/{}/{}", encoded(&event_type), encoded(&txn_id));
            let (lane, method) = (String::new(), Method::PUT);
            Ok(Call { lane, method, path, body: params.body(&["messages"]) })
        }
        _ => Err(Refusal::unrecognized("There is no such method.")),
    }
}

fn read_sync(params: &Params) -> Result<Sync, Refusal> {
    let mut query = String::new();
    let mut add = |name: &str, value: &str| {
        query.push('&');
        query.push_str(name);
        query.push('=');
        query.push_str(&encoded(value));
    };
    match params.find("filter") {
        Some(filter) if filter.starts_with('{') => add("filter", filter),
        Some(_) => add("filter", &params.find_text("filter")?.unwrap_or_default()),
        None => {}
    }
    let presence = params.find_text("set_presence")?;
    if let Some(presence) = &presence {
        add("set_presence", presence);
    }
    if params.find_flag("use_state_after")?.unwrap_or_default() {
        add("use_state_after", "true");
    }
    let full_state = params.find_flag("full_state")?.unwrap_or_default();
    let presence = presence.map_or(PresenceState::Online, PresenceState::from);
    Ok(Sync {
        since: params.find_text("since")?,
        full_state,
        sliding: params.find_sliding()?,
        presence,
        query,
    })
}

/// Encodes a text so that it can be one segment of a path, or a value in a query.
fn encoded(text: &str) -> String {
    let mut path = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            path.push(char::from(byte));
        } else {
            path.push('%');
            for digit in [byte >> 4, byte & 0xf] {
                path.extend(char::from_digit(digit.into(), 16).map(|digit| digit.to_ascii_uppercase()));
            }
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn asked(message: &Value) -> Asked {
        let user = <&UserId>::try_from("@alice:test.example").unwrap();
        read(message.to_string().into(), user)
    }

    fn call(method: &str, params: Value) -> (String, String, Value) {
        match asked(&json!({ "id": 1, "method": method, "params": params })).wish {
            Ok(Wish::Call(it)) => {
                (it.lane, format!("{} {}", it.method, it.path), serde_json::from_slice(&it.body).unwrap())
            }
            other => panic!("{method}: {other:?}"),
        }
    }

    fn code(asked: &Asked) -> String {
        asked.wish.as_ref().map_or_else(|it| it.kind.errcode().to_string(), |_| "none".to_owned())
    }

    #[test]
    fn each_method_is_a_request_to_its_endpoint() {
        let room = "!a/b:x";
        let cases = [
            (
                "send",
                json!({ "room_id": room, "type": "m.x", "txn_id": "a b", "content": { "k": [1] } }),
                "PUT /_matrix/client/v3/rooms/%21a%2Fb%3Ax/send/m.x/a%20b",
                json!({ "k": [1] }),
            ),
            (
                "state",
                json!({ "room_id": room, "type": "m.x", "state_key": "@a", "content": {} }),
                "PUT /_matrix/client/v3/rooms/%21a%2Fb%3Ax/state/m.x/%40a",
                json!({}),
            ),
            (
                "state",
                json!({ "room_id": room, "type": "m.x", "content": {} }),
                "PUT /_matrix/client/v3/rooms/%21a%2Fb%3Ax/state/m.x",
                json!({}),
            ),
            (
                "redact",
                json!({ "room_id": room, "event_id": "$e", "txn_id": "1", "reason": "r", "other": 1 }),
                "PUT /_matrix/client/v3/rooms/%21a%2Fb%3Ax/redact/%24e/1",
                json!({ "reason": "r" }),
            ),
            (
                "typing",
                json!({ "room_id": room, "typing": true, "timeout": 5 }),
                "PUT /_matrix/client/v3/rooms/%21a%2Fb%3Ax/typing/%40alice%3Atest.example",
                json!({ "typing": true, "timeout": 5 }),
            ),
            (
                "receipt",
                json!({ "room_id": room, "receipt_type": "m.read", "event_id": "$e", "thread_id": null }),
                "POST /_matrix/client/v3/rooms/%21a%2Fb%3Ax/receipt/m.read/%24e",
                json!({}),
            ),
            (
                "read_markers",
                json!({ "room_id": room, "m.read": "$e" }),
                "POST /_matrix/client/v3/rooms/%21a%2Fb%3Ax/read_markers",
                json!({ "m.read": "$e" }),
            ),
        ];
        for (method, params, line, body) in cases {
            assert_eq!(call(method, params), (room.to_owned(), line.to_owned(), body), "{method}");
        }
        let params = json!({ "type": "m.x", "txn_id": "1", "messages": { "@a:x": { "*": {} } } });
        let body = json!({ "messages": { "@a:x": { "*": {} } } });
        let line = "PUT /_matrix/client/v3/sendToDevice/m.x/1";
        assert_eq!(call("to_device", params), (String::new(), line.to_owned(), body));
    }

    #[test]
    fn sync_has_the_parameters_of_its_endpoint() {
        let filter = json!({ "room": { "timeline": { "limit": 1 } } });
        let params = json!({
            "since": "s1", "filter": filter, "full_state": true, "set_presence": "offline", "use_state_after": true
        });
        let wish = asked(&json!({ "id": "x", "method": "sync", "params": params })).wish;
        let Ok(Wish::Sync(sync)) = wish else { panic!("{wish:?}") };
        let (method, path, body) = sync.request(sync.since.as_deref(), sync.full_state);
        assert_eq!((method, body), (Method::GET, Bytes::new()));
        assert!(path.starts_with("/_matrix/client/v3/sync?timeout=0&filter=%7B%22room%22"), "{path}");
        assert!(
            path.ends_with("&set_presence=offline&use_state_after=true&since=s1&full_state=true"),
            "{path}"
        );
        let wish = asked(&json!({ "id": 1, "method": "sync" })).wish;
        assert_eq!(wish.unwrap(), Wish::Sync(Sync::default()));
        let params = json!({ "since": "p~1", "sliding": { "conn_id": "a" }, "set_presence": "offline" });
        let wish = asked(&json!({ "id": 1, "method": "sync", "params": params })).wish;
        let Ok(Wish::Sync(sync)) = wish else { panic!("{wish:?}") };
        let (method, path, body) = sync.request(sync.since.as_deref(), false);
        assert_eq!((method, &*body), (Method::POST, &br#"{"conn_id":"a"}"#[..]));
        assert_eq!(path, "/_matrix/client/v4/sync?timeout=0&set_presence=offline&pos=p~1");
        let wish = asked(&json!({ "method": "ack", "params": { "pos": "p~2", "sliding": {} } })).wish;
        let ack = Ack { pos: "p~2".to_owned(), sliding: Some(Bytes::from_static(b"{}")) };
        assert_eq!(wish.unwrap(), Wish::Ack(ack));
    }

    #[test]
    fn odd_messages_are_refused_and_keep_their_id_if_it_is_one() {
        let send = |params| json!({ "id": 1, "method": "send", "params": params });
        let cases = [
            (json!([]), "M_BAD_JSON", None),
            (json!({}), "M_BAD_JSON", None),
            (json!({ "method": "send" }), "M_BAD_JSON", None),
            (json!({ "id": null, "method": "sync" }), "M_BAD_JSON", None),
            (json!({ "id": [1], "method": "sync" }), "M_BAD_JSON", None),
            (json!({ "id": 1.5, "method": "sync" }), "M_BAD_JSON", None),
            (json!({ "id": 1_u64 << 54, "method": "sync" }), "M_BAD_JSON", None),
            (json!({ "id": "x".repeat(63), "method": "sync" }), "M_BAD_JSON", None),
            (json!({ "id": "x".repeat(62), "method": "sync" }), "none", Some(json!("x".repeat(62)))),
            (json!({ "id": "\"}", "method": 5 }), "M_BAD_JSON", Some(json!("\"}"))),
            (json!({ "id": -3, "method": "nothing" }), "M_UNRECOGNIZED", Some(json!(-3))),
            (json!({ "id": 1, "method": "sync", "params": [] }), "M_BAD_JSON", Some(json!(1))),
            (json!({ "id": 1, "method": "sync", "params": { "since": 5 } }), "M_BAD_JSON", Some(json!(1))),
            (json!({ "id": 1, "method": "sync", "params": { "sliding": 5 } }), "M_BAD_JSON", Some(json!(1))),
            (json!({ "id": 1, "method": "sync", "params": { "filter": 5 } }), "M_BAD_JSON", Some(json!(1))),
            (send(json!({})), "M_MISSING_PARAM", Some(json!(1))),
            (send(json!({ "type": "x", "txn_id": "1", "content": {} })), "M_MISSING_PARAM", Some(json!(1))),
            (send(json!({ "room_id": "!a", "type": "x", "txn_id": "1" })), "M_MISSING_PARAM", Some(json!(1))),
            (
                send(json!({ "room_id": 5, "type": "x", "txn_id": "1", "content": {} })),
                "M_BAD_JSON",
                Some(json!(1)),
            ),
            (send(json!({ "type": "", "txn_id": "1" })), "M_INVALID_PARAM", Some(json!(1))),
            (json!({ "method": "ack", "params": { "pos": "s1" } }), "none", None),
            (json!({ "method": "ack" }), "M_MISSING_PARAM", None),
        ];
        for (message, expected, id) in cases {
            let asked = asked(&message);
            assert_eq!(code(&asked), expected, "{message}");
            let written = asked.id.map(|id| serde_json::from_str::<Value>(id.as_str()).unwrap());
            assert_eq!(written, id, "{message}");
        }
        let user = <&UserId>::try_from("@alice:test.example").unwrap();
        assert_eq!(code(&read(Bytes::from_static(b"{\"id\":1,"), user)), "M_NOT_JSON");
    }

    proptest! {
        #[test]
        fn arbitrary_messages_never_panic(text in "\\PC{0,60}", id in "[0-9eE.+\\-\"]{0,8}", name: String) {
            let user = <&UserId>::try_from("@alice:test.example").unwrap();
            read(text.into(), user);
            read([r#"{"method":"send","id":"#, &id, "}"].concat().into(), user);
            asked(&json!({ "id": 1, "method": name, "params": { "room_id": name, "type": name } }));
        }
    }
}
