//! Transactions of other servers: events of rooms, and ephemeral messages.

use std::fmt;

use bytes::Bytes;
use ruma::api::{error::ErrorKind, federation::transactions::send_transaction_message};
use serde::{
    Deserialize, Deserializer,
    de::{Error as _, SeqAccess, Visitor},
};
use serde_json::value::RawValue;

use crate::{
    api::{
        Routes,
        extract::Server,
        policy::{Body, MIB},
        raw::Raw,
        reply::RawJson,
    },
    error::{Refusal, Result},
    flows::{
        App,
        limits::Limit,
        remote::receive::{self, EDUS_MAX, EVENTS_MAX, Transaction},
    },
};

/// A transaction has at most this many bytes: 50 events and 100 messages of 64 KiB, with what may stand around them.
const BYTES_MAX: usize = 13 * MIB;

pub(crate) fn routes(r: &mut Routes) {
    // A fault of one event must not harm the others, so that the body is checked event by event.
    r.server(send_transaction).limit(Limit::Transaction).body(Body::Raw(BYTES_MAX));
}

/// `PUT /_matrix/federation/v1/send/{txnId}`
pub(crate) async fn send_transaction(
    app: App,
    server: Server<Raw<send_transaction_message::v1::Request>>,
) -> Result<RawJson> {
    let Server { origin, request, .. } = server;
    let id = request.arg(0).to_owned();
    let body = request.bytes;
    let lists = app.env.blocking(move || Ok(Lists::read(&body)?)).await?;
    let transaction = Transaction { id, pdus: lists.pdus, edus: lists.edus };
    let answer = receive::receive(&app, origin, transaction).await?;
    Ok(RawJson(answer.into()))
}

/// The events and messages of a transaction, each with the bytes that came.
#[derive(Debug)]
struct Lists {
    pdus: Vec<Bytes>,
    edus: Vec<Bytes>,
}

/// A list of at most `MAX` values, each as it came.
struct AtMost<'a, const MAX: usize>(Vec<&'a RawValue>);

impl<'de: 'a, 'a, const MAX: usize> Deserialize<'de> for AtMost<'a, MAX> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Bounded<const MAX: usize>;
        impl<'de, const MAX: usize> Visitor<'de> for Bounded<MAX> {
            type Value = Vec<&'de RawValue>;

            fn expecting(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(to, "a list of at most {MAX}")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
                let mut values = Vec::new();
                while let Some(value) = list.next_element::<&RawValue>()? {
                    if values.len() >= MAX {
                        return Err(A::Error::custom(format_args!("it has more than {MAX}")));
                    }
                    values.push(value);
                }
                Ok(values)
            }
        }
        from.deserialize_seq(Bounded::<MAX>).map(Self)
    }
}

#[derive(Deserialize)]
struct Content<'a> {
    #[serde(borrow, default, deserialize_with = "as_it_is")]
    pdus: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "as_it_is")]
    edus: Option<&'a RawValue>,
}

/// Reads a field that is there, also where it is `null`.
fn as_it_is<'de, D: Deserializer<'de>>(from: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(from).map(Some)
}

impl Lists {
    /// Reads the lists of a transaction. A list that is not there is empty, because some servers leave empty ones out. Refuses
    /// what is no JSON (400 `M_NOT_JSON`) and what is no transaction (400 `M_BAD_JSON`).
    fn read(body: &Bytes) -> Result<Self, Refusal> {
        if body.trim_ascii_start().first() == Some(&b'[') {
            return Err(Refusal::bad_json("The request's body is not an object."));
        }
        let content: Content<'_> = serde_json::from_slice(body).map_err(|error| {
            if error.is_data() {
                return Refusal::bad_json(format!("The transaction cannot be read: {error}."));
            }
            Refusal::new(ErrorKind::NotJson, "The request's body is not JSON.")
        })?;
        let wrong = |field: &'static str| {
            move |error: serde_json::Error| {
                Refusal::bad_json(format!("`{field}` is not as it must be: {error}."))
            }
        };
        let pdus = content.pdus.map_or("[]", RawValue::get);
        let AtMost(pdus) = serde_json::from_str::<AtMost<'_, EVENTS_MAX>>(pdus).map_err(wrong("pdus"))?;
        let edus = content.edus.map_or("[]", RawValue::get);
        let AtMost(edus) = serde_json::from_str::<AtMost<'_, EDUS_MAX>>(edus).map_err(wrong("edus"))?;
        let own = |values: Vec<&RawValue>| {
            values.into_iter().map(|value| body.slice_ref(value.get().as_bytes())).collect()
        };
        Ok(Self { pdus: own(pdus), edus: own(edus) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: &str) -> Result<(usize, usize), ErrorKind> {
        let lists = Lists::read(&Bytes::copy_from_slice(body.as_bytes()));
        lists.map(|lists| (lists.pdus.len(), lists.edus.len())).map_err(|refusal| refusal.kind)
    }

    #[test]
    fn a_transaction_is_read_with_the_bytes_of_each_of_its_events() {
        let body = Bytes::from_static(br#"{"pdus":[ {"a" : 1e2}, 7 ],"edus":[{"b":"\u00e9"}],"origin":"x"}"#);
        let lists = Lists::read(&body).unwrap();
        assert_eq!(lists.pdus, [&br#"{"a" : 1e2}"#[..], b"7"]);
        assert_eq!(lists.edus, [&br#"{"b":"\u00e9"}"#[..]]);
        assert_eq!(read("{}"), Ok((0, 0)));
    }

    #[test]
    fn a_transaction_that_is_none_or_too_large_is_refused() {
        let list = |field: &str, count: usize| {
            let items = vec!["{}"; count].join(",");
            read(&format!("{{\"{field}\":[{items}]}}"))
        };
        assert_eq!((list("pdus", 50), list("edus", 100)), (Ok((50, 0)), Ok((0, 100))));
        assert_eq!((list("pdus", 51), list("edus", 101)), (Err(ErrorKind::BadJson), Err(ErrorKind::BadJson)));
        for wrong in
            [r#"{"pdus":{}}"#, r#"{"edus":"x"}"#, r#"{"pdus":null}"#, "[]", "3", r#"{"pdus":[],"pdus":[]}"#]
        {
            assert_eq!(read(wrong), Err(ErrorKind::BadJson), "{wrong}");
        }
        for wrong in ["", "{", "{}}", "x", "{\"pdus\":[}"] {
            assert_eq!(read(wrong), Err(ErrorKind::NotJson), "{wrong}");
        }
    }
}
