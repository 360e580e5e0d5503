//! Spaces: rooms whose state names other rooms as their children, and who may look at which of them.
//!
//! Specification: client-server API, "Spaces"; server-server API, "Spaces".

use ruma::{
    MilliSecondsSinceUnixEpoch, OwnedRoomId, OwnedServerName, OwnedUserId, RoomId, ServerName,
    room::{JoinRuleSummary, RoomSummary},
};
use serde::Deserialize;
use serde_json::{Map, Value, value::RawValue};

use crate::{
    ids::{RoomNum, UserNum},
    json::{JsonText, Object},
    rooms::{
        acl,
        directory::{self, Descriptions, find_content},
        event::{self, StoredEvent},
        members, rules, state,
        visibility::{self, HistoryVisibility},
        vouch,
    },
    schema::event_types::{CREATE, ENCRYPTION, JOIN_RULES, SPACE_CHILD},
    schema::rooms::{Membership, RoomRow},
    store::{Fault, Read},
};

/// The type of a room that is a space.
pub const SPACE: &str = "m.space";
/// One answer looks at no more than this many children that spaces name or have named.
pub const CHILDREN_LOOKED_AT: usize = 10_000;
/// The events of a space's children have at most this many bytes together.
const CHILDREN_BYTES_MAX: usize = 1 << 20;
/// The children of a space are read this many at a time.
const CHILDREN_AT_ONCE: usize = 64;
/// At most this many rooms are looked at of those whose members may enter a room of another server.
const ALLOWED_MAX: usize = 100;
/// At most this many servers are taken of those that may know a child.
const VIA_MAX: usize = 5;
/// The order of a child has at most this many characters (the specification's bound).
const ORDER_CHARS_MAX: usize = 50;

/// Somebody who asks for the rooms of a space, or for what a room is.
#[derive(Clone, Copy, Debug)]
pub enum Asker<'a> {
    /// Somebody without an account.
    Anybody,
    /// A user of this server.
    User(UserNum),
    /// Another server, in the name of all of its users.
    Server(&'a ServerName),
}

/// A room that a space names as its child.
#[derive(Clone, Debug)]
pub struct Child {
    /// The id of the room, which this server need not know.
    pub room_id: OwnedRoomId,
    /// The event by which the space names it, stripped and with the time at which it was sent.
    pub event: JsonText,
    /// The servers that may know the room, the likeliest first.
    pub via: Vec<OwnedServerName>,
    order: Option<String>,
    sent_ms: u64,
}

#[derive(Deserialize)]
struct Link {
    #[serde(default)]
    via: Value,
    #[serde(default)]
    suggested: Value,
    #[serde(default)]
    order: Value,
}

impl Link {
    /// Reads the content of an event that names a child; `None` where it names none, or none that is suggested if only those are
    /// wanted.
    fn read(content: &str, suggested_only: bool) -> Option<Self> {
        let link: Self = serde_json::from_str(content).ok()?;
        let is_named = link.via.as_array().is_some_and(|via| via.iter().any(Value::is_string));
        (is_named && (!suggested_only || link.suggested == Value::Bool(true))).then_some(link)
    }

    fn child(self, room_id: OwnedRoomId, event: JsonText, sent_ms: u64) -> Child {
        let is_order = |order: &&str| {
            order.len() <= ORDER_CHARS_MAX && order.bytes().all(|byte| (0x20..=0x7e).contains(&byte))
        };
        let order = self.order.as_str().filter(is_order).map(str::to_owned);
        let via = self.via.as_array().into_iter().flatten().filter_map(Value::as_str);
        let via = via.filter_map(|name| OwnedServerName::try_from(name).ok()).take(VIA_MAX).collect();
        Child { room_id, event, via, order, sent_ms }
    }
}

/// Whether a room is a space.
pub fn is_space(read: &(impl Read + ?Sized), room: RoomNum) -> Result<bool, Fault> {
    #[derive(Deserialize)]
    struct Create {
        #[serde(rename = "type")]
        room_type: Option<String>,
    }
    let create = find_content::<Create>(read, room, CREATE)?;
    Ok(create.and_then(|create| create.room_type).as_deref() == Some(SPACE))
}

/// Lists the children that a space names, in the order in which clients show them; only those that it suggests, if that is
/// asked for. A room that is no space has none. `looked_at` counts the children that an answer has looked at, of which there are
/// at most [`CHILDREN_LOOKED_AT`]: the others are left out.
pub fn list_children(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    suggested_only: bool,
    looked_at: &mut usize,
) -> Result<Vec<Child>, Fault> {
    if !is_space(read, room)? {
        return Ok(Vec::new());
    }
    let max = CHILDREN_LOOKED_AT.saturating_sub(*looked_at);
    let (mut children, mut bytes) = (Vec::new(), 0);
    *looked_at += each_link(read, room, max, |stored| {
        let Some(child) = child(stored, suggested_only) else { return true };
        bytes += child.event.as_str().len();
        if bytes > CHILDREN_BYTES_MAX {
            return false;
        }
        children.push(child);
        true
    })?;
    sort(&mut children);
    Ok(children)
}

/// Shows the events by which a room names its children, some of which may name none any more, until `see` has seen enough of them.
/// Gives the number of keys that were looked up, which are at most `max`.
pub fn each_link(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    max: usize,
    mut see: impl FnMut(&StoredEvent) -> bool,
) -> Result<usize, Fault> {
    let keys = state::list_keys_of(read, room, SPACE_CHILD, max)?;
    for some in keys.chunks(CHILDREN_AT_ONCE) {
        let values = state::list_now(read, room, some.to_vec())?;
        let events = values.into_iter().filter_map(|value| value.event()).collect();
        if !event::list_anywhere(read, room, events)?.iter().all(&mut see) {
            break;
        }
    }
    Ok(keys.len())
}

/// Whether an event by which a room named a child still names it.
pub fn names_child(stored: &StoredEvent) -> bool {
    Link::read(stored.row.content(), false).is_some()
}

/// Puts the children of a space into the order in which clients show them.
fn sort(children: &mut [Child]) {
    children.sort_by(|a, b| {
        let place = |child: &Child| (child.order.is_none(), child.order.clone(), child.sent_ms);
        place(a).cmp(&place(b)).then_with(|| a.room_id.cmp(&b.room_id))
    });
}

/// Reads the children of a space as another server tells them: stripped events with a time. What names no child is left out, and
/// so are the children beyond [`CHILDREN_LOOKED_AT`].
pub fn read_children<'a>(events: impl IntoIterator<Item = &'a RawValue>, suggested_only: bool) -> Vec<Child> {
    #[derive(Deserialize)]
    struct Stripped<'a> {
        #[serde(rename = "type")]
        event_type: String,
        state_key: OwnedRoomId,
        sender: OwnedUserId,
        origin_server_ts: MilliSecondsSinceUnixEpoch,
        #[serde(borrow)]
        content: &'a RawValue,
    }
    let told = |raw: &RawValue| {
        let stripped: Stripped<'_> = serde_json::from_str(raw.get()).ok()?;
        let link = Link::read(stripped.content.get(), suggested_only)?;
        if stripped.event_type != SPACE_CHILD {
            return None;
        }
        let content: Value = serde_json::from_str(stripped.content.get()).ok()?;
        let sent_ms = u64::from(stripped.origin_server_ts.0);
        let mut event = Object::new();
        event.json("content", &JsonText::from(&content));
        event.number("origin_server_ts", sent_ms);
        event.text("sender", stripped.sender.as_str());
        event.text("state_key", stripped.state_key.as_str());
        event.text("type", SPACE_CHILD);
        Some(link.child(stripped.state_key, event.finish(), sent_ms))
    };
    let mut children: Vec<Child> = events.into_iter().take(CHILDREN_LOOKED_AT).filter_map(told).collect();
    sort(&mut children);
    children
}

/// Reads a child; `None` for an event that names none any more, or that does not name it as it must.
fn child(stored: &StoredEvent, suggested_only: bool) -> Option<Child> {
    let row = &stored.row;
    let room_id = RoomId::parse(&*row.state_key()?).ok()?;
    let link = Link::read(row.content(), suggested_only)?;
    let spans = &row.header.spans;
    let mut event = Object::new();
    event.json("content", row.json_of(spans.content));
    event.number("origin_server_ts", row.header.sent_ms);
    event.json("sender", row.json_of(spans.sender));
    event.json("state_key", row.json_of(spans.state_key));
    event.json("type", row.json_of(spans.event_type));
    Some(link.child(room_id, event.finish(), row.header.sent_ms))
}

#[derive(Default, Deserialize)]
struct JoinRules {
    #[serde(default)]
    join_rule: Value,
    #[serde(default)]
    allow: Value,
}

impl JoinRules {
    fn read(read: &(impl Read + ?Sized), room: RoomNum) -> Result<Self, Fault> {
        Ok(find_content(read, room, JOIN_RULES)?.unwrap_or_default())
    }

    /// Whether the members of other rooms may enter, in a room of this version.
    fn is_restricted(&self, row: &RoomRow) -> Result<bool, Fault> {
        let authorization = &rules(row)?.authorization;
        Ok(match self.join_rule.as_str() {
            Some("restricted") => authorization.restricted_join_rule,
            Some("knock_restricted") => authorization.knock_restricted_join_rule,
            _ => false,
        })
    }

    /// The rooms whose members may enter.
    fn list_allowed(&self) -> impl Iterator<Item = OwnedRoomId> {
        let conditions = self.allow.as_array().into_iter().flatten();
        let rooms =
            conditions.filter(|it| it.get("type").and_then(Value::as_str) == Some("m.room_membership"));
        rooms.filter_map(|it| RoomId::parse(it.get("room_id")?.as_str()?).ok())
    }
}

/// Whether somebody may learn what a room is called and how many are in it: they are in it, may come in, may ask to be let in,
/// or may read it from outside.
pub fn may_look(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    row: &RoomRow,
    asker: Asker<'_>,
) -> Result<bool, Fault> {
    match asker {
        Asker::Anybody => {}
        Asker::User(user) => {
            let membership = members::find(read, user, room)?.map(|row| row.membership);
            match membership {
                Some(Membership::Join | Membership::Invite) => return Ok(true),
                Some(Membership::Ban) => return Ok(false),
                Some(Membership::Leave | Membership::Knock) | None => {}
            }
        }
        Asker::Server(server) => {
            if !acl::admits(read, room, server)? {
                return Ok(false);
            }
            if members::is_server_joined(read, room, server.as_str())? {
                return Ok(true);
            }
            if !directory::is_shared(read, room)? {
                return Ok(false);
            }
        }
    }
    if visibility::current(read, room)? == HistoryVisibility::WorldReadable {
        return Ok(true);
    }
    let join_rules = JoinRules::read(read, room)?;
    let authorization = &rules(row)?.authorization;
    match join_rules.join_rule.as_str() {
        Some("public") => return Ok(true),
        Some("knock") => return Ok(authorization.knocking),
        Some("knock_restricted") if authorization.knock_restricted_join_rule => return Ok(true),
        _ => {}
    }
    if !join_rules.is_restricted(row)? {
        return Ok(false);
    }
    for allowed in join_rules.list_allowed() {
        let Some(allowed) = super::find_room(read, &allowed)? else { continue };
        let is_in = match asker {
            Asker::Anybody => false,
            Asker::User(user) => members::is_joined(read, user, allowed)?,
            Asker::Server(server) => {
                vouch::is_current(read, allowed)?
                    && members::is_server_joined(read, allowed, server.as_str())?
            }
        };
        if is_in {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether a user may learn of a room that this server is not in what another server tells of it: they are invited to it, may
/// come in, may ask to be let in, or may read it from outside.
pub fn may_look_abroad(
    read: &(impl Read + ?Sized),
    user: UserNum,
    summary: &RoomSummary,
) -> Result<bool, Fault> {
    if let Some(room) = super::find_room(read, &summary.room_id)? {
        match members::find(read, user, room)?.map(|row| row.membership) {
            Some(Membership::Join | Membership::Invite) => return Ok(true),
            Some(Membership::Ban) => return Ok(false),
            Some(Membership::Leave | Membership::Knock) | None => {}
        }
    }
    if summary.world_readable {
        return Ok(true);
    }
    let allowed = match &summary.join_rule {
        JoinRuleSummary::Public | JoinRuleSummary::Knock | JoinRuleSummary::KnockRestricted(_) => {
            return Ok(true);
        }
        JoinRuleSummary::Restricted(restricted) => &restricted.allowed_room_ids,
        _ => return Ok(false),
    };
    for allowed in allowed.iter().take(ALLOWED_MAX) {
        if let Some(allowed) = super::find_room(read, allowed)?
            && members::is_joined(read, user, allowed)?
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Gives what is told of a room before somebody enters it: its entry in the directory, and by what it admits whom.
pub fn summary(
    read: &(impl Read + ?Sized),
    descriptions: &Descriptions,
    room: RoomNum,
    row: &RoomRow,
) -> Result<Map<String, Value>, Fault> {
    #[derive(Deserialize)]
    struct Encryption {
        algorithm: String,
    }
    let described = serde_json::to_value(&*descriptions.of(read, room, row)?);
    let Ok(Value::Object(mut summary)) = described else {
        return Err(Fault::Corrupt("a room cannot be described"));
    };
    summary.insert("room_version".to_owned(), row.version.to_string().into());
    if let Some(encryption) = find_content::<Encryption>(read, room, ENCRYPTION)? {
        summary.insert("encryption".to_owned(), encryption.algorithm.into());
    }
    let join_rules = JoinRules::read(read, room)?;
    if join_rules.is_restricted(row)? {
        let allowed: Vec<Value> = join_rules.list_allowed().map(|id| id.to_string().into()).collect();
        summary.insert("allowed_room_ids".to_owned(), allowed.into());
    }
    Ok(summary)
}
