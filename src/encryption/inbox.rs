//! Inboxes of devices, in which messages wait until their device confirms them.
//!
//! An inbox is bounded, and a full one affects its own device only: messages to other devices are still delivered. When it is
//! full, old requests for room keys make room, because they are the least useful. If that is not enough, the new message is
//! refused. Each sender may fill only a part of what the others have left free, so that a few senders together cannot shut a
//! device off from the rest: the fuller the inbox, the less each newcomer may add to it.
//!
//! Another server can invent senders, so that each server has a part, too. Servers that share no room with the user may fill only a
//! half of the inbox, and those that do not all of it: what users of this server send has room besides. Where there is none for a
//! message that is no stranger's, the server that fills most gives way with its oldest messages.
//!
//! Specification: client-server API, "Send-to-Device messaging".

#[cfg(test)]
mod model;
mod rule;

pub use rule::Nearness;

use std::{
    collections::{BTreeMap, btree_map::Entry},
    ops::Bound,
};

use bytes::Bytes;
use ruma::{OwnedUserId, UserId};
use serde_json::value::RawValue;

use rule::{Bounds, Filled, Rule};

use crate::{
    encryption::keys::Owner,
    error::{Refusal, Result},
    ids::{DeviceNum, Position, UserNum},
    json::Object,
    schema::{
        self,
        encryption::{InboxShare, InboxState},
    },
    store::{Batch, Direction, Fault, LogEntry, Read, Write, migrate},
};

/// The content of a message has at most this many bytes.
pub const CONTENT_BYTES_MAX: usize = 64 << 10;
/// At most this many messages and bytes wait for a device.
const BOUNDS: Bounds = Bounds { messages: 20_000, bytes: 64 << 20 };
/// At most this many requests for room keys make room for one message, so that a batch stays small.
const GIVE_WAY_MAX: usize = 300;
/// The servers of a device's inbox that are looked at for the one that fills most of it.
const SERVERS_LOOKED_AT: usize = 1_000;
/// At most this many messages are confirmed at once; the next confirmation goes on from there.
const CONFIRMED_MAX: usize = 1_000;
/// The stored bytes of a request for a room key end with this, because the type is written last.
const KEY_REQUEST_TAIL: &[u8] = br#","type":"m.room_key_request"}"#;
/// A message is written with its sender and its type last, so they are found in this many bytes at its end.
const TAIL_BYTES_MAX: usize = 4 << 10;

/// The key of a message: its device, and when it was put there.
type At = (UserNum, DeviceNum, Position);

/// A message as its device will get it.
#[derive(Clone, Debug)]
pub struct Message {
    /// An object with content, sender and type.
    json: Bytes,
    sender: OwnedUserId,
    nearness: Nearness,
}

impl Message {
    /// Makes a message from its content. Errors: 413 for content that is too large, 400 for content that is no object.
    pub fn new(sender: &UserId, event_type: &str, content: &RawValue) -> Result<Self> {
        if content.get().len() > CONTENT_BYTES_MAX {
            return Err(
                Refusal::too_large("The content of a message to a device has at most 65,536 bytes.").into()
            );
        }
        if !content.get().starts_with('{') {
            return Err(Refusal::bad_json("The content of a message to a device must be an object.").into());
        }
        // `sender_of` and `is_key_request` rely on this order of the fields.
        let mut json = Object::with_capacity(content.get().len() + 128);
        json.json("content", content);
        json.text("sender", sender.as_str());
        json.text("type", event_type);
        Ok(Self { json: json.finish().into(), sender: sender.to_owned(), nearness: Nearness::Own })
    }

    /// The message, coming from another server that is as near as this to the user who gets it.
    pub fn from_elsewhere(self, nearness: Nearness) -> Self {
        Self { nearness, ..self }
    }

    /// The name under which the messages of its server are counted. None for a message of this server. A user id cannot begin
    /// like it.
    fn servers_part(&self) -> Option<String> {
        (self.nearness != Nearness::Own).then(|| format!(":{}", self.sender.server_name()))
    }

    /// The number of bytes that one inbox keeps of it.
    pub fn byte_count(&self) -> usize {
        self.json.len()
    }
}

/// The sender of a message as it is kept.
pub(crate) fn sender_of(json: &[u8]) -> Option<String> {
    let tail = json.get(json.len().saturating_sub(TAIL_BYTES_MAX)..)?;
    // Within a string the quotes would be escaped, so these bytes can only be the field itself.
    let field = br#","sender":"#;
    let at = tail.windows(field.len()).rposition(|window| window == field)?;
    let mut values =
        serde_json::Deserializer::from_slice(tail.get(at + field.len()..)?).into_iter::<String>();
    values.next()?.ok()
}

/// Whether a message as it is kept is a request for a room key.
pub(crate) fn is_key_request(json: &[u8]) -> bool {
    json.ends_with(KEY_REQUEST_TAIL)
}

/// The fate of a message that came for a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Put {
    /// Whether it waits for the device now.
    pub kept: Result<Position, NoRoom>,
    /// The number of requests for room keys that made room for it.
    pub gave_way: usize,
    /// The number of messages of the server that fills most of the inbox that made room for it.
    pub taken: usize,
}

/// The reason why an inbox does not take a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoRoom {
    /// The sender's part of the inbox is used up.
    SenderQuota,
    /// The part of the inbox is used up that the sender's server may fill.
    ServerQuota,
    /// The inbox is full, and no request for a room key can make room.
    InboxFull,
}

impl NoRoom {
    /// The name of the reason in logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::SenderQuota => "sender_quota",
            Self::ServerQuota => "server_quota",
            Self::InboxFull => "inbox_full",
        }
    }
}

/// Puts a message into a device's inbox, if there is room. The caller holds the lock of the device's user.
pub fn put(batch: &mut Batch, owner: Owner, message: &Message) -> Result<Put, Fault> {
    put_within(batch, owner, message, BOUNDS)
}

fn put_within(batch: &mut Batch, owner: Owner, message: &Message, bounds: Bounds) -> Result<Put, Fault> {
    let (user, device) = owner;
    let size = message.json.len() as u64;
    let sender = message.sender.as_str();
    let servers_part = message.servers_part();
    let share = |batch: &Batch, of: &str| schema::INBOX_SHARE.get(batch, (user, device, of));
    let server = servers_part.as_deref().map(|server| share(batch, server)).transpose()?.flatten();
    let mut filled = Filled {
        state: state(batch, owner)?,
        sender: share(batch, sender)?.unwrap_or_default(),
        server: server.unwrap_or_default(),
    };
    let rule = Rule::of(bounds, message.nearness);
    let (mut gave_way, mut taken) = (0, 0);
    if let Some(no_room) = rule.refuse(&filled, size) {
        // A sender who has more than the part of an empty inbox is refused whatever else is in it, and nothing is read.
        let is_greedy = !rule.fits_sender(&InboxState::default(), &filled.sender, size);
        if !is_greedy {
            gave_way = make_room(batch, owner, &mut filled, message, rule)?;
        }
        if !is_greedy && gave_way == 0 && message.nearness != Nearness::Stranger {
            taken = take_from_fullest(batch, owner, &mut filled, message, (rule, bounds))?;
        }
        if gave_way + taken == 0 {
            return Ok(Put { kept: Err(no_room), gave_way, taken });
        }
    }
    let position = batch.position(&LogEntry::ToDevice { user });
    schema::INBOX.put(batch, (user, device, position), &message.json);
    if is_key_request(&message.json) {
        schema::INBOX_KEY_REQUEST.put(batch, (user, device, position), &());
    }
    let Filled { mut state, sender: mut share, mut server } = filled;
    state.messages += 1;
    state.bytes += size;
    share.messages += 1;
    share.bytes += size;
    debug_assert!(share.messages <= state.messages && share.bytes <= state.bytes, "a part exceeds the whole");
    schema::INBOX_STATE.put(batch, owner, &state);
    schema::INBOX_SHARE.put(batch, (user, device, sender), &share);
    if let Some(part) = &servers_part {
        server.messages += 1;
        server.bytes += size;
        schema::INBOX_SHARE.put(batch, (user, device, part), &server);
        schema::INBOX_OF_SERVER.put(batch, (user, device, part, position), &size);
    }
    Ok(Put { kept: Ok(position), gave_way, taken })
}

/// Deletes the oldest requests for room keys until a message fits, into the inbox and into its sender's part, or none if that
/// is not enough. For a stranger's message only requests of its own server go. Answers how many were deleted.
fn make_room(
    batch: &mut Batch,
    owner: Owner,
    filled: &mut Filled,
    message: &Message,
    rule: Rule,
) -> Result<usize, Fault> {
    let (user, device) = owner;
    let size = message.json.len() as u64;
    let mut left = *filled;
    let mut doomed = Vec::new();
    for position in list_key_requests(batch, owner, left.state.acknowledged)? {
        let Some(request) = schema::INBOX.get(batch, (user, device, position))? else { continue };
        let sender = sender_of(&request).unwrap_or_default();
        let is_of_server = message.servers_part().is_some_and(|part| part == servers_part_of(&sender));
        if message.nearness == Nearness::Stranger && !is_of_server {
            continue;
        }
        left = left.without(request.len() as u64, sender == message.sender.as_str(), is_of_server);
        doomed.push((position, request));
        if rule.refuse(&left, size).is_none() {
            break;
        }
    }
    if rule.refuse(&left, size).is_some() {
        return Ok(0);
    }
    delete(batch, owner, &doomed)?;
    *filled = left;
    Ok(doomed.len())
}

/// Deletes the oldest messages of the server that fills most of the inbox, until they have made as much room as a message takes,
/// or none if that is not enough. Only a server gives way that has more than the message's own server has with it. Answers how
/// many were deleted.
fn take_from_fullest(
    batch: &mut Batch,
    owner: Owner,
    filled: &mut Filled,
    message: &Message,
    (rule, bounds): (Rule, Bounds),
) -> Result<usize, Fault> {
    let (user, device) = owner;
    let size = message.json.len() as u64;
    let own = message.servers_part();
    let (low, high) = (Bound::Included((user, device, ":")), Bound::Excluded((user, device, ";")));
    let servers = schema::INBOX_SHARE
        .range::<(UserNum, DeviceNum, String)>(batch, low, high, Direction::Up)?
        .take(SERVERS_LOOKED_AT)
        .collect::<Result<Vec<_>, _>>()?;
    let others = servers.into_iter().filter(|((.., server), _)| own.as_ref() != Some(server));
    let Some(((.., fullest), mut share)) = others.max_by_key(|(_, share)| bounds.weight(share)) else {
        return Ok(0);
    };
    let grown = InboxShare { messages: filled.server.messages + 1, bytes: filled.server.bytes + size };
    let grown = if own.is_some() { bounds.weight(&grown) } else { 0 };
    let oldest = schema::INBOX_OF_SERVER
        .prefix::<(UserNum, DeviceNum, String)>(batch, (user, device, &fullest), Direction::Up)?
        .take(GIVE_WAY_MAX)
        .collect::<Result<Vec<_>, _>>()?;
    let (mut left, mut doomed) = (*filled, Vec::new());
    let is_enough = |left: &Filled| {
        let state = &left.state;
        let freed = filled.state.bytes.saturating_sub(state.bytes);
        state.messages < filled.state.messages
            && freed >= size
            && rule.bounds.have_room_for(state.messages.saturating_add(1), state.bytes.saturating_add(size))
    };
    for ((.., position), bytes) in oldest {
        if is_enough(&left) || bounds.weight(&share) <= grown {
            break;
        }
        share.messages = share.messages.saturating_sub(1);
        share.bytes = share.bytes.saturating_sub(bytes);
        left = left.without(bytes, false, false);
        doomed.push(position);
    }
    if !is_enough(&left) {
        return Ok(0);
    }
    let doomed = doomed
        .into_iter()
        .map(|position| Ok((position, schema::INBOX.get(batch, (user, device, position))?)));
    let doomed = doomed.collect::<Result<Vec<_>, Fault>>()?;
    let doomed: Vec<_> = doomed.into_iter().filter_map(|(at, message)| Some((at, message?))).collect();
    delete(batch, owner, &doomed)?;
    *filled = left;
    Ok(doomed.len())
}

/// Deletes messages that make room for another.
fn delete(batch: &mut Batch, owner: Owner, doomed: &[(Position, Bytes)]) -> Result<(), Fault> {
    let (user, device) = owner;
    for (position, _) in doomed {
        schema::INBOX.delete(batch, (user, device, *position));
        schema::INBOX_KEY_REQUEST.delete(batch, (user, device, *position));
    }
    take_from_shares(batch, owner, doomed)
}

/// The name under which the messages of a sender's server are counted.
fn servers_part_of(sender: &str) -> String {
    sender.split_once(':').map_or_else(String::new, |(_, server)| format!(":{server}"))
}

/// The requests for room keys that wait, oldest first, no more than may give way at once.
fn list_key_requests(batch: &Batch, owner: Owner, after: Position) -> Result<Vec<Position>, Fault> {
    let (user, device) = owner;
    let low = Bound::Excluded((user, device, after));
    let high = Bound::Included((user, device, Position::MAX));
    schema::INBOX_KEY_REQUEST
        .range::<(UserNum, DeviceNum, Position)>(batch, low, high, Direction::Up)?
        .take(GIVE_WAY_MAX)
        .map(|row| row.map(|((.., position), ())| position))
        .collect()
}

/// Subtracts messages that have left the inbox from the parts of their senders and servers.
fn take_from_shares(
    to: &mut impl Write,
    (user, device): Owner,
    messages: &[(Position, Bytes)],
) -> Result<(), Fault> {
    let mut gone = BTreeMap::<String, InboxShare>::new();
    let mut add = |of: &str, size| {
        let share = gone.entry(of.to_owned()).or_default();
        share.messages += 1;
        share.bytes += size;
    };
    let mut are_counted = BTreeMap::new();
    for (position, message) in messages {
        let Some(sender) = sender_of(message) else { continue };
        add(&sender, message.len() as u64);
        let server = servers_part_of(&sender);
        let is_counted = match are_counted.get(&server) {
            Some(known) => *known,
            None => {
                let is_counted = schema::INBOX_SHARE.contains(to, (user, device, server.as_str()))?;
                are_counted.insert(server.clone(), is_counted);
                is_counted
            }
        };
        // Older versions did not count messages by server.
        let key = (user, device, server.as_str(), *position);
        if is_counted && schema::INBOX_OF_SERVER.contains(to, key)? {
            schema::INBOX_OF_SERVER.delete(to, key);
            add(&server, message.len() as u64);
        }
    }
    for (of, gone) in gone {
        let key = (user, device, of.as_str());
        let Some(share) = schema::INBOX_SHARE.get(to, key)? else { continue };
        if share.messages <= gone.messages {
            schema::INBOX_SHARE.delete(to, key);
        } else {
            let left = InboxShare {
                messages: share.messages - gone.messages,
                bytes: share.bytes.saturating_sub(gone.bytes),
            };
            schema::INBOX_SHARE.put(to, key, &left);
        }
    }
    Ok(())
}

/// The position up to which the device has confirmed, and the numbers of messages and bytes that wait.
pub fn state(read: &(impl Read + ?Sized), owner: Owner) -> Result<InboxState, Fault> {
    Ok(schema::INBOX_STATE.get(read, owner)?.unwrap_or_default())
}

/// Lists up to `max` messages for a device in (after, upto], the oldest first. The range begins after the confirmed messages,
/// so that deleted rows are not read over.
pub fn list(
    read: &(impl Read + ?Sized),
    owner: Owner,
    after: Position,
    upto: Position,
    max: usize,
) -> Result<Vec<(Position, Bytes)>, Fault> {
    let after = after.max(state(read, owner)?.acknowledged);
    if after >= upto {
        return Ok(Vec::new());
    }
    let (user, device) = owner;
    let (low, high) = (Bound::Excluded((user, device, after)), Bound::Included((user, device, upto)));
    schema::INBOX
        .range::<(UserNum, DeviceNum, Position)>(read, low, high, Direction::Up)?
        .take(max)
        .map(|row| row.map(|((_, _, position), message)| (position, message)))
        .collect()
}

/// Notes that the device has received everything up to and including this position, and deletes it. Nothing is written if that
/// was known. The caller holds the user's lock.
pub fn acknowledge(to: &mut impl Write, owner: Owner, upto: Position) -> Result<(), Fault> {
    let (user, device) = owner;
    let mut state = state(to, owner)?;
    // A device without messages needs no row.
    if upto <= state.acknowledged || state.messages == 0 {
        return Ok(());
    }
    let received = list(to, owner, state.acknowledged, upto, CONFIRMED_MAX)?;
    let Some((last, _)) = received.last() else { return Ok(()) };
    let upto = if received.len() < CONFIRMED_MAX { upto } else { *last };
    // The range begins after what was confirmed before: a look for its first rows would walk over those that are deleted there.
    let first = (user, device, state.acknowledged.plus(1));
    let below = (user, device, upto.plus(1));
    schema::INBOX.delete_below::<At, At>(to, first, below);
    schema::INBOX_KEY_REQUEST.delete_below::<At, At>(to, first, below);
    take_from_shares(to, owner, &received)?;
    state.acknowledged = upto;
    state.messages = state.messages.saturating_sub(received.len() as u64);
    let bytes: usize = received.iter().map(|(_, message)| message.len()).sum();
    state.bytes = state.bytes.saturating_sub(bytes as u64);
    schema::INBOX_STATE.put(to, owner, &state);
    Ok(())
}

/// Deletes the inboxes of ended devices, from the first to the last number.
pub fn sweep(batch: &mut Batch, user: UserNum, (first, last): (DeviceNum, DeviceNum)) {
    let (low, high) = ((user, first), (user, DeviceNum(last.0.saturating_add(1))));
    schema::INBOX.delete_below::<Owner, Owner>(batch, low, high);
    schema::INBOX_KEY_REQUEST.delete_below::<Owner, Owner>(batch, low, high);
    schema::INBOX_SHARE.delete_below::<Owner, Owner>(batch, low, high);
    schema::INBOX_OF_SERVER.delete_below::<Owner, Owner>(batch, low, high);
    schema::INBOX_STATE.delete_below::<Owner, Owner>(batch, low, high);
}

/// At most this many messages are counted in one part of [`recount`].
const COUNTED_AT_ONCE: usize = if cfg!(test) { 1 } else { 1_000 };

/// A step from an older layout: counts the messages of each inbox by sender, and lists those that are requests for room keys.
/// Messages that were put before there were such rows have none.
pub(crate) fn recount(
    read: &dyn Read,
    after: Option<Bytes>,
    batch: &mut Batch,
) -> Result<Option<Bytes>, Fault> {
    if after.is_none() {
        schema::INBOX_SHARE.delete_prefix::<()>(batch, ());
        schema::INBOX_OF_SERVER.delete_prefix::<()>(batch, ());
        schema::INBOX_KEY_REQUEST.delete_prefix::<()>(batch, ());
    }
    let low = migrate::after_place::<At>(after)?;
    let mut shares = BTreeMap::<(Owner, String), InboxShare>::new();
    let mut last = None;
    for row in schema::INBOX.range::<At>(read, low, Bound::Unbounded, Direction::Up)?.take(COUNTED_AT_ONCE) {
        let (at, message) = row?;
        let (user, device, _) = at;
        let share = match shares.entry(((user, device), sender_of(&message).unwrap_or_default())) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => {
                let counted = schema::INBOX_SHARE.get(batch, (user, device, new.key().1.as_str()))?;
                new.insert(counted.unwrap_or_default())
            }
        };
        share.messages += 1;
        share.bytes += message.len() as u64;
        if is_key_request(&message) {
            schema::INBOX_KEY_REQUEST.put(batch, at, &());
        }
        last = Some(migrate::place_of::<At>(at));
    }
    for (((user, device), sender), share) in shares {
        schema::INBOX_SHARE.put(batch, (user, device, &sender), &share);
    }
    Ok(last)
}

#[cfg(test)]
mod tests {
    use ruma::user_id;

    use super::*;
    use crate::store::{Durability, Engine, Guard, Store, engine::Memory};

    const PHONE: Owner = (UserNum(1), DeviceNum(1));
    const SMALL: Bounds = Bounds { messages: 8, bytes: 4_000 };

    fn store() -> Store {
        Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap()
    }

    fn message(sender: &str, event_type: &str, content: &str) -> Message {
        let content = RawValue::from_string(content.to_owned()).unwrap();
        Message::new(<&UserId>::try_from(sender).unwrap(), event_type, &content).unwrap()
    }

    fn write<T>(store: &Store, build: impl FnOnce(&mut Batch) -> T) -> T {
        let mut batch = store.batch(&Guard::alone());
        let answer = build(&mut batch);
        drop(store.enqueue(batch).unwrap());
        store.flush().unwrap();
        answer
    }

    fn waiting(store: &Store, after: Position, max: usize) -> Vec<(Position, Bytes)> {
        let snapshot = store.snapshot();
        list(&*snapshot, PHONE, after, snapshot.upto(), max).unwrap()
    }

    #[test]
    fn messages_wait_until_they_are_confirmed() {
        let store = store();
        for number in 0..3 {
            let message = message("@bob:s", "m.test", &format!(r#"{{"n":{number}}}"#));
            assert!(write(&store, |batch| put(batch, PHONE, &message).unwrap()).kept.is_ok());
        }
        let all = waiting(&store, Position::ZERO, 10);
        assert_eq!(all.len(), 3);
        assert_eq!(&all[0].1[..], br#"{"content":{"n":0},"sender":"@bob:s","type":"m.test"}"#);
        assert_eq!(waiting(&store, Position::ZERO, 2), all[..2]);
        assert_eq!(waiting(&store, all[0].0, 10), all[1..]);
        write(&store, |batch| acknowledge(batch, PHONE, all[1].0).unwrap());
        assert_eq!(waiting(&store, Position::ZERO, 10), all[2..]);
        assert_eq!(state(&*store.snapshot(), PHONE).unwrap().messages, 1);
        let mut batch = store.batch(&Guard::alone());
        acknowledge(&mut batch, PHONE, all[1].0).unwrap();
        assert_eq!(batch.row_count(), 0, "nothing new is nothing to write");
        write(&store, |batch| acknowledge(batch, PHONE, all[2].0).unwrap());
        let state = state(&*store.snapshot(), PHONE).unwrap();
        assert_eq!((state.messages, state.bytes), (0, 0));
        assert_eq!(
            schema::INBOX_SHARE.prefix::<()>(&*store.snapshot(), (), Direction::Up).unwrap().count(),
            0
        );
    }

    fn contents(store: &Store) -> Vec<u64> {
        let number = |message: &Bytes| {
            serde_json::from_slice::<serde_json::Value>(message).unwrap()["content"]["n"].as_u64().unwrap()
        };
        waiting(store, Position::ZERO, 5_000).iter().map(|(_, message)| number(message)).collect()
    }

    #[test]
    fn in_a_full_inbox_old_requests_for_keys_make_room_and_then_the_newest_is_refused() {
        let store = store();
        let kept = |sender: &str, event_type: &str, number: u64| {
            let message = message(sender, event_type, &format!(r#"{{"n":{number}}}"#));
            write(&store, |batch| put_within(batch, PHONE, &message, SMALL).unwrap())
        };
        for number in 0..8 {
            let event_type = if number % 4 == 2 { "m.room_key_request" } else { "m.other" };
            assert!(kept(&format!("@user{number}:s"), event_type, number).kept.is_ok());
        }
        let put = kept("@bob:s", "m.other", 8);
        assert!(put.kept.is_ok());
        assert_eq!((put.gave_way, contents(&store)), (1, vec![0, 1, 3, 4, 5, 6, 7, 8]));
        assert!(kept("@dave:s", "m.room_key_request", 9).kept.is_ok());
        assert_eq!(contents(&store), [0, 1, 3, 4, 5, 7, 8, 9]);
        assert!(kept("@carol:s", "m.other", 10).kept.is_ok());
        let refused = kept("@carol:s", "m.other", 11);
        assert_eq!(refused, Put { kept: Err(NoRoom::InboxFull), gave_way: 0, taken: 0 });
        assert_eq!(contents(&store), [0, 1, 3, 4, 5, 7, 8, 10]);
        let other = message("@carol:s", "m.other", "{}");
        let elsewhere = (UserNum(1), DeviceNum(2));
        assert!(write(&store, |batch| put_within(batch, elsewhere, &other, SMALL).unwrap()).kept.is_ok());
    }

    #[test]
    fn requests_for_keys_go_only_if_that_is_enough() {
        let store = store();
        let big = |size: usize| format!(r#"{{"n":1,"b":"{}"}}"#, "b".repeat(size));
        let put = |sender: &str, event_type: &str, size: usize| {
            let message = message(sender, event_type, &big(size));
            write(&store, |batch| put_within(batch, PHONE, &message, SMALL).unwrap())
        };
        put("@a:s", "m.room_key_request", 100);
        for sender in ["@b:s", "@c:s"] {
            assert!(put(sender, "m.other", 350).kept.is_ok());
        }
        assert_eq!(
            put("@f:s", "m.other", 350),
            Put { kept: Err(NoRoom::SenderQuota), gave_way: 0, taken: 0 }
        );
        assert_eq!(contents(&store).len(), 3, "nothing was given up for nothing");
        assert_eq!(put("@f:s", "m.other", 330).gave_way, 1);
    }

    #[test]
    fn no_sender_fills_an_inbox_alone() {
        let store = store();
        let put = |sender: &str| {
            let message = message(sender, "m.other", r#"{"n":1}"#);
            let bounds = Bounds { messages: 16, ..SMALL };
            write(&store, |batch| put_within(batch, PHONE, &message, bounds).unwrap()).kept
        };
        assert!(put("@mallory:s").is_ok() && put("@mallory:s").is_ok());
        assert_eq!(put("@mallory:s"), Err(NoRoom::SenderQuota));
        assert!(put("@alice:s").is_ok());
        let first = waiting(&store, Position::ZERO, 1)[0].0;
        write(&store, |batch| acknowledge(batch, PHONE, first).unwrap());
        assert!(put("@mallory:s").is_ok(), "what was received does not count");
        assert_eq!(put("@mallory:s"), Err(NoRoom::SenderQuota));
    }

    #[test]
    fn twenty_senders_who_send_all_they_can_leave_a_place_for_a_room_key() {
        let store = store();
        let bounds = Bounds { messages: 800, bytes: 80_000 };
        let put = |sender: &str| {
            let message = message(sender, "m.room.encrypted", r#"{"n":1}"#);
            write(&store, |batch| put_within(batch, PHONE, &message, bounds).unwrap()).kept
        };
        for number in 0..20 {
            let mallory = format!("@mallory{number}:s");
            assert!(put(&mallory).is_ok(), "each comes in with something");
            while put(&mallory).is_ok() {}
            assert_eq!(put(&mallory), Err(NoRoom::SenderQuota));
        }
        for _ in 0..3 {
            assert!(put("@alice:s").is_ok(), "{:?}", state(&*store.snapshot(), PHONE));
        }
    }

    /// Puts as many messages as are kept, each of another sender of this server; answers how many.
    fn flood(store: &Store, server: &str, nearness: Nearness, bounds: Bounds) -> usize {
        let put = |number| {
            let message = message(&format!("@m{number}:{server}"), "m.other", r#"{"n":666}"#);
            let message = message.from_elsewhere(nearness);
            write(store, |batch| put_within(batch, PHONE, &message, bounds).unwrap()).kept.is_ok()
        };
        (0..2_000).take_while(|number| put(*number)).count()
    }

    /// How many of ten messages of one sender are kept.
    fn keys_kept(store: &Store, sender: &str, nearness: Nearness, bounds: Bounds) -> usize {
        let put = |number| {
            let message = message(sender, "m.room.encrypted", &format!(r#"{{"n":{number}}}"#));
            let message = message.from_elsewhere(nearness);
            write(store, |batch| put_within(batch, PHONE, &message, bounds).unwrap()).kept.is_ok()
        };
        (0..10).filter(|number| put(*number)).count()
    }

    const LARGE: Bounds = Bounds { messages: 1_600, bytes: 1_600_000 };

    #[test]
    fn a_server_that_invents_senders_fills_its_own_part_alone() {
        for (nearness, part) in [(Nearness::Stranger, 200), (Nearness::Sharing, 700)] {
            let store = store();
            assert_eq!(flood(&store, "evil.example", nearness, LARGE), part);
            let refused = message("@more:evil.example", "m.other", "{}").from_elsewhere(nearness);
            let refused = write(&store, |batch| put_within(batch, PHONE, &refused, LARGE).unwrap());
            assert_eq!(refused.kept, Err(NoRoom::ServerQuota));
            for (sender, of) in [("@g:good.example", Nearness::Stranger), ("@bob:s", Nearness::Own)] {
                assert_eq!(keys_kept(&store, sender, of, LARGE), 10, "{sender} beside {nearness:?}");
            }
        }
    }

    #[test]
    fn many_servers_that_share_no_room_leave_a_half_and_those_that_do_give_way() {
        let store = store();
        for number in 0..30 {
            flood(&store, &format!("s{number}.example"), Nearness::Stranger, LARGE);
        }
        assert!(state(&*store.snapshot(), PHONE).unwrap().messages <= 800);
        assert_eq!(keys_kept(&store, "@near:near.example", Nearness::Sharing, LARGE), 10);
        for number in 0..30 {
            flood(&store, &format!("n{number}.example"), Nearness::Sharing, LARGE);
        }
        let full = state(&*store.snapshot(), PHONE).unwrap().messages;
        assert!((1_350..=1_400).contains(&full), "{full}");
        // A stranger takes nobody's place, and a neighbour takes those of the server that has most.
        assert_eq!(keys_kept(&store, "@far:far.example", Nearness::Stranger, LARGE), 0);
        assert_eq!(keys_kept(&store, "@late:late.example", Nearness::Sharing, LARGE), 10);
        assert_eq!(keys_kept(&store, "@bob:s", Nearness::Own, LARGE), 10);
        // Messages of others made room for the neighbour's, and their own for bob's come besides.
        let now = state(&*store.snapshot(), PHONE).unwrap().messages;
        assert!((full..=full + 10).contains(&now), "{now} after {full}");
        let kept = contents(&store).into_iter().filter(|number| *number < 10).count();
        assert_eq!(kept, 30, "what was kept of innocents is still there");
        let last = waiting(&store, Position::ZERO, 5_000).last().unwrap().0;
        while state(&*store.snapshot(), PHONE).unwrap().messages > 0 {
            write(&store, |batch| acknowledge(batch, PHONE, last).unwrap());
        }
        let shares = schema::INBOX_SHARE.prefix::<()>(&*store.snapshot(), (), Direction::Up).unwrap().count();
        let listed =
            schema::INBOX_OF_SERVER.prefix::<()>(&*store.snapshot(), (), Direction::Up).unwrap().count();
        assert_eq!((shares, listed), (0, 0));
    }

    #[test]
    fn the_sender_is_read_from_what_is_kept_whatever_type_and_content_are() {
        let tricky = r#"{"a":",\"sender\":\"@x:s\"","sender":"@y:s"}"#;
        for event_type in ["m.test", r#"a","sender":"@z:s"#, "m.room_key_request", "\u{1}\\"] {
            let kept = message("@bob:s", event_type, tricky);
            assert_eq!(sender_of(&kept.json).as_deref(), Some("@bob:s"), "{event_type}");
            assert_eq!(is_key_request(&kept.json), event_type == "m.room_key_request");
            assert!(serde_json::from_slice::<&RawValue>(&kept.json).is_ok());
        }
        let kept = message("@bob:s", r#"x","type":"m.room_key_request"#, "{}");
        assert!(!is_key_request(&kept.json));
    }

    #[test]
    fn contents_are_bounded_objects() {
        let raw = |text: String| RawValue::from_string(text).unwrap();
        let bob = user_id!("@bob:s");
        assert!(Message::new(bob, "a", &raw("[]".to_owned())).is_err());
        let too_large = raw(format!(r#"{{"a":"{}"}}"#, "a".repeat(CONTENT_BYTES_MAX)));
        assert!(Message::new(bob, "a", &too_large).is_err());
    }
}
