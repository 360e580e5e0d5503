//! The state of a room as another server hands it over to who joins (server-server API, "PUT /send_join"): which of its events can
//! be believed, and in which order they are taken in. Of each event its bytes stay in memory, and not what they mean.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use bytes::Bytes;
use federation::json::Answer;
use futures_util::{StreamExt, TryStreamExt, stream};
use ruma::{OwnedEventId, OwnedServerName, OwnedServerSigningKeyId, ServerName};
use serde::{
    Deserialize, Deserializer,
    de::{self, SeqAccess, Visitor},
};
use serde_json::value::RawValue;

use crate::{
    error::{Error, Result},
    flows::{
        App,
        remote::{
            ask::at_fault,
            verify::{self, Ask, Verified},
        },
        room::base::Events,
    },
    ids::RoomNum,
    rooms::change::{
        Brought, Received, Signed,
        left_out::{LEFT_OUT_MAX, LeftOut},
        list_allowing, order_by_auth,
    },
    schema::rooms::RoomRow,
};

/// An answer has at most this many events of the state, and as many of those that allow them.
const EVENTS_MAX: usize = 400_000;
/// Believe of at most this many servers that they are in a room of which the members are left out, because each is told what
/// happens there.
const SERVERS_MAX: usize = 10_000;
/// The name of a server has at most this many bytes.
const NAME_BYTES_MAX: usize = 255;
/// Check this many events at once.
const CHECKED_AT_ONCE: usize = 200;
/// Check at most this many of such parts at a time.
const PARTS_AT_ONCE: usize = 4;
/// Read the keys of this many events at once.
const KEYS_AT_ONCE: usize = 2_000;
/// Ask for at most this many keys of one server for an event.
const KEYS_OF_EVENT_MAX: usize = 3;

/// Events of an answer, as they stand in its bytes.
struct Listed<'a>(Vec<&'a RawValue>);

/// The fields of a server's answer to a join.
#[derive(Deserialize)]
struct Fields<'a> {
    #[serde(borrow)]
    state: Listed<'a>,
    #[serde(borrow)]
    auth_chain: Listed<'a>,
    #[serde(borrow, default)]
    event: Option<&'a RawValue>,
    #[serde(default)]
    members_omitted: bool,
    #[serde(borrow, default)]
    servers_in_room: Option<&'a RawValue>,
}

/// The state that a join brings, before anything of it is believed.
pub(super) struct Answered {
    answer: Answer,
    /// The events of the state, and how many they are; those that allow them follow.
    events: Vec<Bytes>,
    state_count: usize,
    /// The event of the join itself, with the signature of another server.
    pub(super) event: Option<Bytes>,
    /// The servers that are said to be in the room, where the state has no members.
    pub(super) servers: Option<Vec<OwnedServerName>>,
}

/// Names of servers, of which only the first ones are kept that are names.
#[derive(Default)]
struct Servers(BTreeSet<OwnedServerName>);

impl<'de> Deserialize<'de> for Servers {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Named;
        impl<'de> Visitor<'de> for Named {
            type Value = Servers;

            fn expecting(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(to, "a list of servers")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut from: A) -> Result<Self::Value, A::Error> {
                let mut servers = Servers::default();
                while let Some(name) = from.next_element::<Cow<'de, str>>()? {
                    if servers.0.len() < SERVERS_MAX && name.len() <= NAME_BYTES_MAX {
                        servers.0.extend(OwnedServerName::try_from(&*name));
                    }
                }
                Ok(servers)
            }
        }
        from.deserialize_seq(Named)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Listed<'a> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Counted;
        impl<'de> Visitor<'de> for Counted {
            type Value = Vec<&'de RawValue>;

            fn expecting(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(to, "a list of at most {EVENTS_MAX} events")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut from: A) -> Result<Self::Value, A::Error> {
                let mut events = Vec::new();
                while let Some(event) = from.next_element()? {
                    if events.len() >= EVENTS_MAX {
                        return Err(de::Error::invalid_length(events.len(), &self));
                    }
                    events.push(event);
                }
                Ok(events)
            }
        }
        from.deserialize_seq(Counted).map(Listed)
    }
}

impl Answered {
    /// The bytes of the answer.
    pub(super) fn byte_count(&self) -> usize {
        self.answer.bytes().len()
    }

    /// Reads an answer: the object itself, or in the older form of the endpoint, which does not leave out members, a list of 200
    /// and the object. Gives what is wrong with the answer where it is none.
    pub(super) fn read(answer: Answer, is_old_form: bool) -> Result<Self, String> {
        let told = |error: serde_json::Error| format!("its answer to a join makes no sense: {error}");
        let bytes = answer.bytes().clone();
        let fields: Fields<'_> = if is_old_form {
            let (_, fields): (u16, Fields<'_>) = serde_json::from_slice(&bytes).map_err(told)?;
            fields
        } else {
            serde_json::from_slice(&bytes).map_err(told)?
        };
        let servers = match (fields.members_omitted, fields.servers_in_room) {
            (false, _) => None,
            (true, _) if is_old_form => {
                return Err("it left out the members of the room, which it was not asked to".to_owned());
            }
            (true, None) => {
                return Err("it left out the members of the room, and does not name its servers".to_owned());
            }
            (true, Some(servers)) => {
                let servers: Servers = serde_json::from_str(servers.get()).map_err(told)?;
                Some(servers.0.into_iter().collect())
            }
        };
        let state_count = fields.state.0.len();
        let slice = |event: &RawValue| bytes.slice_ref(event.get().as_bytes());
        let events = fields.state.0.into_iter().chain(fields.auth_chain.0).map(slice).collect();
        Ok(Self { events, state_count, event: fields.event.map(slice), servers, answer })
    }
}

/// An event that somebody has signed who may.
struct Believed {
    place: usize,
    id: OwnedEventId,
    allowing: Vec<OwnedEventId>,
}

/// The fields of an event that say whose keys it takes to check it.
#[derive(Deserialize)]
struct Signers<'a> {
    #[serde(borrow)]
    sender: Cow<'a, str>,
    origin_server_ts: u64,
    #[serde(borrow)]
    signatures: BTreeMap<Cow<'a, str>, BTreeMap<Cow<'a, str>, &'a RawValue>>,
    #[serde(borrow)]
    content: &'a RawValue,
}

#[derive(Deserialize)]
struct Vouched<'a> {
    #[serde(borrow)]
    join_authorised_via_users_server: Option<Cow<'a, str>>,
}

/// Lists the keys by which these events must be signed, each with the latest time at which it must have been valid.
fn list_keys<'a>(
    events: impl Iterator<Item = &'a [u8]>,
) -> BTreeMap<(OwnedServerName, OwnedServerSigningKeyId), u64> {
    let mut keys = BTreeMap::new();
    for json in events {
        let Ok(event) = serde_json::from_slice::<Signers<'_>>(json) else { continue };
        let vouched: Option<Vouched<'_>> = serde_json::from_str(event.content.get()).ok();
        let by = vouched.and_then(|it| it.join_authorised_via_users_server);
        for user in [Some(event.sender), by].into_iter().flatten() {
            let Some((_, server)) = user.split_once(':') else { continue };
            let Ok(name) = OwnedServerName::try_from(server) else { continue };
            let by_key = event.signatures.get(server).into_iter().flat_map(BTreeMap::keys);
            for key in by_key.take(KEYS_OF_EVENT_MAX) {
                let Ok(key) = OwnedServerSigningKeyId::try_from(&**key) else { continue };
                let sent_ms = keys.entry((name.clone(), key)).or_insert(0);
                *sent_ms = event.origin_server_ts.max(*sent_ms);
            }
        }
    }
    keys
}

/// Asks for the keys by which the events of an answer are to be checked, for a minute or two at most. The events of servers that
/// do not tell theirs by then are left out.
pub(super) async fn learn_keys(app: &App, version: u8, answered: &Answered) -> Result<()> {
    // All events are gone through before anybody is asked, so that each server is asked once.
    let mut keys = BTreeMap::new();
    for part in answered.events.chunks(KEYS_AT_ONCE) {
        let part = part.to_vec();
        let list = move || Ok(list_keys(part.iter().map(|json| &**json)));
        merge(&mut keys, app.env.blocking(list).await?);
    }
    verify::learn_keys(app, version, keys).await;
    Ok(())
}

/// Asks for the keys by which the events of a whole state are to be checked, like [`learn_keys`]. Gives the events back.
pub(super) async fn learn_keys_of_state(
    app: &App,
    version: u8,
    mut events: Vec<Box<RawValue>>,
) -> Result<Vec<Box<RawValue>>> {
    let (mut keys, mut done) = (BTreeMap::new(), 0);
    while done < events.len() {
        let list = move || {
            let part = events.iter().skip(done).take(KEYS_AT_ONCE);
            Ok((list_keys(part.map(|event| event.get().as_bytes())), events))
        };
        let (of_part, all) = app.env.blocking(list).await?;
        merge(&mut keys, of_part);
        (events, done) = (all, done + KEYS_AT_ONCE);
    }
    verify::learn_keys(app, version, keys).await;
    Ok(events)
}

/// Adds keys that events must be signed by to others. Of each the latest time counts.
fn merge<K: Ord>(keys: &mut BTreeMap<K, u64>, more: BTreeMap<K, u64>) {
    for (key, sent_ms) in more {
        let latest = keys.entry(key).or_insert(0);
        *latest = sent_ms.max(*latest);
    }
}

/// Checks all events of an answer by the keys that are known, and gives those that can be believed in the order in which a join takes them in. An event that
/// is not signed as it must be, whose keys cannot be had, or that stands on such an event, is left out. Gives the first of those
/// that may be believed later, too.
/// Errors: [`Error::Broken`] where the cache of keys cannot be read.
pub(super) async fn believed(
    app: &App,
    via: &ServerName,
    (num, row): (RoomNum, &RoomRow),
    answered: Answered,
) -> Result<(Events, Vec<LeftOut>)> {
    let Answered { answer, events, state_count, event: _, servers: _ } = answered;
    let events: Arc<[Bytes]> = events.into();
    let numbered: Vec<(usize, Bytes)> = events.iter().cloned().enumerate().collect();
    let parts = numbered.chunks(CHECKED_AT_ONCE).map(<[_]>::to_vec);
    let checks: Vec<_> = parts.map(|part| check(app, via, (num, row.clone()), part)).collect();
    let parts: Vec<Checked> = stream::iter(checks).buffered(PARTS_AT_ONCE).try_collect().await?;
    let (row, in_form, raw) = (row.clone(), row.clone(), Arc::clone(&events));
    let ordered = move || {
        let (mut believed, mut later) = (Vec::new(), Vec::new());
        for part in parts {
            believed.extend(part.believed);
            later.extend(part.later);
        }
        let ids: Vec<_> = believed.iter().map(|it| (it.id.clone(), it.allowing.clone())).collect();
        let mut kept = BTreeSet::new();
        let mut order = Vec::with_capacity(ids.len());
        for at in order_by_auth(&ids) {
            let Some(event) = believed.get(at) else { continue };
            // Whatever stands on an event that was left out cannot be judged, and is left out with it.
            if event.allowing.iter().all(|id| kept.contains(id)) {
                kept.insert(event.id.clone());
                order.push(event.place);
            } else {
                later.push(event.place);
            }
        }
        // The events of the state come first in the answer, and so they are remembered first.
        later.sort_unstable();
        let places = later.into_iter().take(LEFT_OUT_MAX);
        let later = places.filter_map(|place| left_out(num, &in_form, raw.get(place)?, place < state_count));
        Ok((order, later.collect::<Vec<_>>()))
    };
    let total = events.len();
    let (order, later) = app.env.blocking(ordered).await?;
    if order.len() < total {
        let (left_out, later) = (total - order.len(), later.len());
        tracing::info!(server = %via, room = %row.id, left_out, later, total, "events of a room's state are left out of a join");
    }
    let read = move |place: usize| {
        // The bytes stay charged to those that other servers' answers may take as long as they are here.
        let _held = &answer;
        let json = events.get(place).cloned().unwrap_or_default();
        let signed = Signed::read(num, &row, &json)
            .map_err(|_| Error::broken("an event of a join is read in two ways"))?;
        Ok(Brought { event: signed.into_verified(), is_state: place < state_count })
    };
    Ok((Box::new(order.into_iter().map(read)), later))
}

/// The events of a part of an answer, as they were checked.
#[derive(Default)]
struct Checked {
    believed: Vec<Believed>,
    /// The places of the events of which nobody can say yet whether they can be believed.
    later: Vec<usize>,
}

/// Reads an event that may be believed later.
pub(super) fn left_out(num: RoomNum, row: &RoomRow, json: &Bytes, is_state: bool) -> Option<LeftOut> {
    let signed = Signed::read(num, row, json).ok()?;
    let event = signed.unverified();
    let (event_type, state_key) = (event.event_type.to_string(), event.state_key.clone()?);
    // The bytes of the answer go when the join ends, so that these are copied.
    let json = Bytes::copy_from_slice(signed.json());
    Some(LeftOut { event_type, state_key, is_state, json })
}

async fn check(
    app: &App,
    via: &ServerName,
    (num, row): (RoomNum, RoomRow),
    part: Vec<(usize, Bytes)>,
) -> Result<Checked> {
    let version = row.version;
    let in_form = row.clone();
    let (places, signed) = app
        .env
        .blocking(move || {
            let (mut places, mut read) = (Vec::new(), Vec::new());
            for (place, json) in part {
                if let Ok(event) = Signed::read(num, &in_form, &json) {
                    places.push(place);
                    read.push(event);
                }
            }
            Ok((places, read))
        })
        .await?;
    let mut checked = Checked::default();
    for (place, verified) in
        places.into_iter().zip(verify::verify_by(app, version, signed, Ask::Nobody).await?)
    {
        match verified {
            Verified::Received(event) => {
                let (id, allowing) = (event.id().to_owned(), list_allowing(&row, event.event())?);
                checked.believed.push(Believed { place, id, allowing });
            }
            Verified::Forged(why) => {
                tracing::debug!(server = %via, why = why.message, "an event of a join is not signed as it must be");
            }
            Verified::Later(of) => {
                tracing::debug!(server = %via, %of, "an event of a join is left out, because a server's keys cannot be had");
                checked.later.push(place);
            }
        }
    }
    Ok(checked)
}

/// Checks that an event which a server gives back is ours, with its signature added. Errors: [`Error::Remote`].
pub(super) async fn cosigned(
    app: &App,
    via: &ServerName,
    row: &RoomRow,
    ours: &Received,
    json: &[u8],
) -> Result<Received> {
    let other = || at_fault(via, "it gave back another event than the one that it was to sign");
    let signed = Signed::read(RoomNum(0), row, json).map_err(|_| other())?;
    if signed.unverified().id != *ours.id() || signed.is_redacted() {
        return Err(other());
    }
    match verify::verify(app, row.version, vec![signed]).await?.pop() {
        Some(Verified::Received(event)) => Ok(*event),
        Some(Verified::Later(_)) => Err(at_fault(via, "its keys cannot be had")),
        Some(Verified::Forged(_)) | None => {
            Err(at_fault(via, "it did not sign the event that it was to sign"))
        }
    }
}
