//! The messages that the server says, around the bodies that endpoints have answered.

use bytes::Bytes;
use serde_json::Value;

use crate::{
    api::socket::inward::Reply,
    json::{JsonText, Object},
};

/// The answer to the request with this id.
pub(super) fn answer(id: Option<&JsonText>, reply: Reply) -> Vec<Bytes> {
    let mut said = with_id(id);
    let name = if reply.is_ok { "result" } else { "error" };
    std::mem::take(&mut said).finish_around(name, reply.body)
}

/// The answer to a request with this id that has no result to tell.
pub(super) fn done(id: &JsonText) -> Vec<Bytes> {
    let mut said = with_id(Some(id));
    said.object("result", |_| ());
    vec![said.finish().into()]
}

/// News, or the reason why no more of them come.
pub(super) fn news(reply: Reply) -> Vec<Bytes> {
    let mut said = Object::new();
    said.text("method", "sync");
    said.finish_around(if reply.is_ok { "params" } else { "error" }, reply.body)
}

fn with_id(id: Option<&JsonText>) -> Object {
    let mut said = Object::new();
    match id {
        Some(id) => said.json("id", id),
        None => said.json("id", &JsonText::from(&Value::Null)),
    }
    said
}
