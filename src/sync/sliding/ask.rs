//! The request of a client to sliding sync, checked and ready for use.
//!
//! Clients speak two forms of it: that of MSC4186 as it was settled, and the one that they spoke before, in which state is named
//! by pairs and lists have several ranges. Both are read, at either path.

use std::collections::{BTreeMap, BTreeSet};

use ruma::api::client::filter::FilterDefinition;
use serde::{Deserialize, Deserializer};

use crate::{
    accounts::Caller,
    error::Refusal,
    schema::{
        event_types::MEMBER,
        sync::{StatePattern, StateWish},
    },
    sync::{Ask, Pos, SyncToken},
};

/// A request has at most this many lists, because each is held against all rooms of the user.
pub const LISTS_MAX: usize = 100;
/// A request subscribes to at most this many rooms (MSC4186).
pub const SUBSCRIPTIONS_MAX: usize = 100;
/// A request names at most this many patterns of state, because each is held against each change of each room.
pub const PATTERNS_MAX: usize = 1_000;
/// A list has at most this many ranges.
pub const RANGES_MAX: usize = 20;
/// A filter names at most this many spaces, types or tags, because each is looked for.
pub const FILTER_ENTRIES_MAX: usize = 100;
/// A timeline has at most this many events, whatever limit the client gives, because an answer is held in memory.
const TIMELINE_MAX: u64 = 1_000;
/// A timeline has this many events at most, unless the client gives a limit.
const TIMELINE_DEFAULT: u64 = 10;
/// A name that a client gives to a connection, a list or a request has at most this many bytes.
const NAME_BYTES_MAX: usize = 255;

/// The body of a request, as clients write it.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Body {
    /// The id that the client gives the connection.
    pub conn_id: Option<String>,
    /// A word of the client that the answer repeats.
    pub txn_id: Option<String>,
    /// Where the client stands. It may stand in the query instead.
    pub pos: Option<String>,
    /// How long to wait for news, in milliseconds. It may stand in the query instead.
    pub timeout: Option<u64>,
    /// Whether the user counts as present. It may stand in the query instead.
    pub set_presence: Option<String>,
    lists: BTreeMap<String, ListBody>,
    room_subscriptions: BTreeMap<String, RoomBody>,
    extensions: Extensions,
}

#[derive(Debug, Deserialize)]
struct RoomBody {
    #[serde(default)]
    required_state: StateBody,
    timeline_limit: Option<u64>,
}

#[derive(Debug, Deserialize)]
struct ListBody {
    #[serde(flatten)]
    room: RoomBody,
    range: Option<(u64, u64)>,
    ranges: Option<Vec<(u64, u64)>>,
    /// A word of the form before: the client wants all rooms.
    #[serde(default)]
    slow_get_all_rooms: bool,
    #[serde(default)]
    filters: Option<Filters>,
}

/// The state that a client wants, in either form.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum StateBody {
    Pairs(Vec<(String, String)>),
    Wish(StateWish),
}

impl Default for StateBody {
    fn default() -> Self {
        Self::Pairs(Vec::new())
    }
}

/// The rooms that a list shows. What is not given is not asked.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Filters {
    /// The room is a direct chat, or is none.
    pub is_dm: Option<bool>,
    /// The room is encrypted, or is not.
    pub is_encrypted: Option<bool>,
    /// The user is invited to the room, or is not.
    #[serde(alias = "is_invite")]
    pub is_invited: Option<bool>,
    /// The room is a child of one of these spaces, which the user is in.
    pub spaces: Option<Vec<String>>,
    /// The room is of one of these types. `null` is the type of a room without one.
    pub room_types: Option<Vec<Option<String>>>,
    /// The room is of none of these types.
    pub not_room_types: Option<Vec<Option<String>>>,
    /// The room has one of these tags.
    pub tags: Option<Vec<String>>,
    /// The room has none of these tags.
    pub not_tags: Option<Vec<String>>,
}

/// The extensions that a client wants. A further extension is a field here, and is told by `sync/sliding/extensions.rs`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Extensions {
    /// Messages to the device.
    #[serde(deserialize_with = "or_default")]
    pub to_device: Paged,
    /// Changes of device lists, and how many keys the device has left.
    #[serde(deserialize_with = "or_default")]
    pub e2ee: Extension,
    /// Account data, of rooms and of none.
    #[serde(deserialize_with = "or_default")]
    pub account_data: Extension,
    /// The receipts of rooms.
    #[serde(deserialize_with = "or_default")]
    pub receipts: Extension,
    /// The users who type in rooms.
    #[serde(deserialize_with = "or_default")]
    pub typing: Extension,
    /// Sticky events (MSC4354, MSC4480).
    #[serde(rename = "org.matrix.msc4354.sticky_events", deserialize_with = "or_default")]
    pub sticky: Paged,
    /// Changes of the threads that the user subscribes to (MSC4308).
    #[serde(rename = "io.element.msc4308.thread_subscriptions", deserialize_with = "or_default")]
    pub subscriptions: Limited,
}

/// Reads `null` as if the field were not there.
fn or_default<'de, T: Default + Deserialize<'de>, D: Deserializer<'de>>(from: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

/// An extension, and the rooms of which the client wants it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Extension {
    enabled: Option<bool>,
    /// The lists whose rooms it is told of; all lists if there is no such field.
    lists: Option<Vec<String>>,
    /// The subscribed rooms that it is told of; all of them if there is no such field, or `*` is named.
    rooms: Option<Vec<String>>,
}

impl Extension {
    /// Whether the client wants it at all.
    pub(crate) fn is_on(&self) -> bool {
        self.enabled == Some(true)
    }

    /// Whether the client wants it of a room, by the lists that the room is in and whether it is subscribed to.
    pub(crate) fn covers(&self, room_id: &str, lists: &[&str], is_subscribed: bool) -> bool {
        let names = |list: &Vec<String>, name: &str| list.iter().any(|it| it == name || it == "*");
        let by_list = match &self.lists {
            None => !lists.is_empty(),
            Some(wanted) => lists.iter().any(|list| names(wanted, list)),
        };
        let by_room = is_subscribed && self.rooms.as_ref().is_none_or(|wanted| names(wanted, room_id));
        self.is_on() && (by_list || by_room)
    }
}

/// An extension that is told in pieces, each of which the client confirms by a token.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Paged {
    enabled: Option<bool>,
    /// The client has received everything up to this token.
    pub since: Option<String>,
    /// An answer tells at most this many of them.
    pub limit: Option<u64>,
}

impl Paged {
    /// Whether the client wants it at all.
    pub fn is_on(&self) -> bool {
        self.enabled == Some(true)
    }

    /// The token by which the client confirms what it has received, if it wants the extension.
    pub fn confirmed(&self) -> Option<&str> {
        self.since.as_deref().filter(|_| self.is_on())
    }
}

/// An extension of which an answer tells at most some number.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Limited {
    enabled: Option<bool>,
    /// An answer tells at most this many.
    pub limit: Option<u64>,
}

impl Limited {
    /// Whether the client wants it at all.
    pub fn is_on(&self) -> bool {
        self.enabled == Some(true)
    }
}

/// How much of a room the client wants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct RoomConfig {
    /// The timeline has at most this many events.
    pub(crate) timeline_limit: usize,
    /// The state that is told: what any of these wishes names.
    pub(crate) wishes: Vec<StateWish>,
}

impl RoomConfig {
    /// Adds what another config wants.
    pub(crate) fn add(&mut self, other: &Self) {
        self.timeline_limit = self.timeline_limit.max(other.timeline_limit);
        for wish in &other.wishes {
            if !self.wishes.contains(wish) {
                self.wishes.push(wish.clone());
            }
        }
        self.wishes.sort_unstable();
    }
}

/// A list of rooms that the client watches.
#[derive(Clone, Debug)]
pub(crate) struct List {
    pub(crate) name: String,
    pub(crate) config: RoomConfig,
    /// The places of the list that are told, both ends included. None for all of them.
    pub(crate) ranges: Option<Vec<(u64, u64)>>,
    pub(crate) filters: Filters,
}

/// A client's request to sliding sync.
#[derive(Clone, Debug)]
pub struct SlidingAsk {
    /// The user who asks, and the device they ask with.
    pub caller: Caller,
    /// Where the client stands. None if it begins.
    pub pos: Option<Pos>,
    /// The extensions that the client wants.
    pub extensions: Extensions,
    /// Up to where the device has received its messages, as the client says it.
    pub inbox: Option<SyncToken>,
    /// Up to where the client has received sticky events, as it says it.
    pub sticky: Option<SyncToken>,
    conn_id: String,
    pub(crate) txn_id: Option<String>,
    pub(crate) lists: Vec<List>,
    /// The rooms that the client watches by their ids.
    pub(crate) subscriptions: BTreeMap<String, RoomConfig>,
}

impl SlidingAsk {
    /// The request to `/sync` by which the news is collected: everything, with the state after the timeline.
    pub(crate) fn as_sync(&self) -> Result<Ask, Refusal> {
        let since = self.pos.map(|pos| pos.token);
        let everything = Ask::new(self.caller.clone(), since, &FilterDefinition::default())?;
        Ok(Ask { use_state_after: true, ..everything })
    }

    /// The id that the client gives its connection.
    pub(crate) fn conn_id(&self) -> &str {
        &self.conn_id
    }

    /// Checks a request. Refuses one that costs too much, or that names what cannot be: 400 `M_INVALID_PARAM`.
    pub fn new(
        caller: Caller,
        pos: Option<Pos>,
        body: Body,
        subscriptions_max: usize,
    ) -> Result<Self, Refusal> {
        let Body { conn_id, txn_id, lists, room_subscriptions, extensions, .. } = body;
        let conn_id = conn_id.unwrap_or_default();
        for (field, name) in [("conn_id", Some(&conn_id)), ("txn_id", txn_id.as_ref())] {
            if name.is_some_and(|name| name.len() > NAME_BYTES_MAX) {
                return Err(too_long(field));
            }
        }
        let counts = [
            ("lists", lists.len(), LISTS_MAX),
            ("room_subscriptions", room_subscriptions.len(), subscriptions_max),
        ];
        for (field, count, max) in counts {
            if count > max {
                let why = format!("`{field}` has {count} entries; a request may have at most {max}.");
                return Err(Refusal::invalid_param(why));
            }
        }
        let mut patterns = 0;
        let mut config = |room: RoomBody| config(room, &caller, &mut patterns);
        let mut checked = Vec::with_capacity(lists.len());
        for (name, list) in lists {
            if name.len() > NAME_BYTES_MAX {
                return Err(too_long("lists"));
            }
            let filters = list.filters.unwrap_or_default();
            check_filters(&filters)?;
            let ranges = match (list.range, list.ranges, list.slow_get_all_rooms) {
                (_, _, true) | (None, None, _) => None,
                (Some(range), _, _) => Some(vec![range]),
                (None, Some(ranges), _) => Some(ranges),
            };
            check_ranges(ranges.as_deref().unwrap_or_default())?;
            checked.push(List { name, config: config(list.room)?, ranges, filters });
        }
        let mut subscriptions = BTreeMap::new();
        for (room_id, room) in room_subscriptions {
            subscriptions.insert(room_id, config(room)?);
        }
        let (inbox, sticky) = (None, None);
        Ok(Self { caller, pos, extensions, inbox, sticky, conn_id, txn_id, lists: checked, subscriptions })
    }
}

fn too_long(field: &str) -> Refusal {
    Refusal::invalid_param(format!("A name in `{field}` is longer than {NAME_BYTES_MAX} bytes."))
}

fn config(room: RoomBody, caller: &Caller, patterns: &mut usize) -> Result<RoomConfig, Refusal> {
    let limit = room.timeline_limit.unwrap_or(TIMELINE_DEFAULT).min(TIMELINE_MAX);
    let mut wish = match room.required_state {
        StateBody::Pairs(pairs) => wish_of_pairs(pairs, caller),
        StateBody::Wish(wish) => wish,
    };
    for list in [&mut wish.include, &mut wish.exclude] {
        *list = std::mem::take(list).into_iter().collect::<BTreeSet<_>>().into_iter().collect();
    }
    *patterns += wish.include.len() + wish.exclude.len();
    if *patterns > PATTERNS_MAX {
        let why = format!("`required_state` names more than {PATTERNS_MAX} pieces of state in all.");
        return Err(Refusal::invalid_param(why));
    }
    let texts = wish.include.iter().chain(&wish.exclude).flat_map(|it| [&it.event_type, &it.state_key]);
    if texts.flatten().any(|text| text.len() > NAME_BYTES_MAX) {
        return Err(too_long("required_state"));
    }
    let timeline_limit = usize::try_from(limit).unwrap_or_default();
    Ok(RoomConfig { timeline_limit, wishes: vec![wish] })
}

/// Reads pairs of type and state key, in which `*` stands for any, `$ME` for the user, and `$LAZY` for lazy members.
fn wish_of_pairs(pairs: Vec<(String, String)>, caller: &Caller) -> StateWish {
    let mut wish = StateWish::default();
    let any = |text: String| (text != "*").then_some(text);
    for (event_type, state_key) in pairs {
        let state_key = match state_key.as_str() {
            "$LAZY" if event_type == MEMBER => {
                wish.lazy_members = true;
                continue;
            }
            "$ME" => Some(caller.user_id.to_string()),
            _ => any(state_key),
        };
        wish.include.push(StatePattern { event_type: any(event_type), state_key });
    }
    wish
}

fn check_ranges(ranges: &[(u64, u64)]) -> Result<(), Refusal> {
    if ranges.len() > RANGES_MAX {
        return Err(Refusal::invalid_param(format!("`ranges` has more than {RANGES_MAX} entries.")));
    }
    match ranges.iter().find(|(first, last)| first > last) {
        Some((first, last)) => {
            Err(Refusal::invalid_param(format!("A range goes from {first} to {last}, which is before it.")))
        }
        None => Ok(()),
    }
}

fn check_filters(filters: &Filters) -> Result<(), Refusal> {
    let count = |list: &Option<Vec<String>>| list.as_ref().map_or(0, Vec::len);
    let types = |list: &Option<Vec<Option<String>>>| list.as_ref().map_or(0, Vec::len);
    let counts = [
        ("spaces", count(&filters.spaces)),
        ("tags", count(&filters.tags)),
        ("not_tags", count(&filters.not_tags)),
        ("room_types", types(&filters.room_types)),
        ("not_room_types", types(&filters.not_room_types)),
    ];
    match counts.iter().find(|(_, count)| *count > FILTER_ENTRIES_MAX) {
        Some((field, count)) => {
            let why = format!("`{field}` has {count} entries; a filter may have {FILTER_ENTRIES_MAX}.");
            Err(Refusal::invalid_param(why))
        }
        None => Ok(()),
    }
}
