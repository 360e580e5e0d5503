//! Finds the rooms of an answer: those that stand in a range of some list, and those that are subscribed to.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
    sync::Arc,
};

use crate::{
    accounts::account_data,
    ids::{Order, Position, RoomNum, UserNum},
    rooms::{change::outside, event, members, state},
    schema::{
        self,
        event_types::{CREATE, DIRECT, ENCRYPTION, SPACE_CHILD, TAG},
        rooms::{Membership, Resident, RoomRow, UserRoomRow},
        state::{StateRef, StateValue},
        sync::RoomSent,
    },
    store::Fault,
    sync::{
        collect, look,
        sliding::{
            ask::{Filters, RoomConfig, SlidingAsk},
            facts::{self, Facts, RoomFacts},
        },
        window::Window,
    },
};

/// No more than this many children of the spaces that a request names are looked at, because each is read.
const CHILDREN_MAX: usize = 10_000;

/// A room of the user's, as lists see it.
struct Entry {
    num: RoomNum,
    user_row: UserRoomRow,
    row: RoomRow,
    /// When something happened in it last, as far as the user may know.
    recency: Position,
    /// Lists show it; otherwise only a subscription tells it.
    is_listed: bool,
}

/// A room that the answer may tell.
pub(crate) struct Chosen {
    pub(crate) num: RoomNum,
    pub(crate) user_row: UserRoomRow,
    pub(crate) row: RoomRow,
    /// How much of it the client wants: what all its lists and its subscription say together.
    pub(crate) config: Arc<RoomConfig>,
    /// The places in the request of the lists that it is in.
    pub(crate) lists: Vec<usize>,
    pub(crate) is_subscribed: bool,
}

/// The rooms of an answer, and how many each list has.
pub(crate) struct Choice {
    /// The number of rooms of each list, in the order of the request.
    pub(crate) counts: Vec<u64>,
    /// The rooms, those with the newest events first.
    pub(crate) rooms: Vec<Chosen>,
    /// The rooms that the user is in, and that a list matches in whatever range or a subscription names, with the position at which
    /// the user joined each. It is empty where nobody asks for it.
    pub(crate) matched: Vec<(RoomNum, Position)>,
}

/// The rooms that the user's account data names as direct chats.
pub(crate) fn direct_chats(window: &Window<'_>) -> Result<BTreeSet<String>, Fault> {
    let row = account_data::find(window.read, window.caller().user, None, DIRECT)?;
    let content: BTreeMap<String, serde_json::Value> =
        row.and_then(|row| serde_json::from_slice(&row.content).ok()).unwrap_or_default();
    let lists = content.values().filter_map(serde_json::Value::as_array).flatten();
    Ok(lists.filter_map(serde_json::Value::as_str).map(str::to_owned).collect())
}

/// Finds the rooms of an answer. `sent` are the rooms that the client was told of, `direct` the direct chats.
pub(crate) fn choose(
    window: &Window<'_>,
    ask: &SlidingAsk,
    facts: &Facts,
    sent: &BTreeMap<RoomNum, RoomSent>,
    direct: &BTreeSet<String>,
) -> Result<Choice, Fault> {
    if ask.lists.is_empty() && ask.subscriptions.is_empty() {
        return Ok(Choice { counts: Vec::new(), rooms: Vec::new(), matched: Vec::new() });
    }
    let mut entries = list_entries(window, ask, facts, sent)?;
    entries.sort_unstable_by_key(|entry| std::cmp::Reverse((entry.recency, entry.num)));
    let mut counts = vec![0; ask.lists.len()];
    let mut shown: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    let read_once = ReadOnce::default();
    let mut is_matched = vec![false; if ask.extensions.sticky.is_on() { entries.len() } else { 0 }];
    for ((list_at, list), count) in ask.lists.iter().enumerate().zip(&mut counts) {
        let sieve = Sieve::new(window, facts, &list.filters, direct, &read_once)?;
        for (at, entry) in entries.iter().enumerate() {
            if !entry.is_listed || !sieve.lets_through(entry)? {
                continue;
            }
            let is_shown = list
                .ranges
                .as_ref()
                .is_none_or(|ranges| ranges.iter().any(|(first, last)| *first <= *count && *count <= *last));
            *count += 1;
            if let Some(is_matched) = is_matched.get_mut(at) {
                *is_matched = true;
            }
            if is_shown {
                shown.entry(at).or_default().push(list_at);
            }
        }
    }
    // Most rooms are in the same lists.
    let mut configs: BTreeMap<Vec<usize>, Arc<RoomConfig>> = BTreeMap::new();
    let (mut rooms, mut matched) = (Vec::new(), Vec::new());
    for (at, Entry { num, user_row, row, .. }) in entries.into_iter().enumerate() {
        let lists = shown.remove(&at).unwrap_or_default();
        let subscribed = ask.subscriptions.get(row.id.as_str());
        if let Some(is_listed) = is_matched.get(at)
            && (*is_listed || subscribed.is_some())
            && user_row.membership == Membership::Join
        {
            matched.push((num, user_row.since));
        }
        if lists.is_empty() && subscribed.is_none() {
            continue;
        }
        let config = match configs.get(&lists).filter(|_| subscribed.is_none()) {
            Some(config) => Arc::clone(config),
            None => {
                let of_lists = lists.iter().filter_map(|at| Some(&ask.lists.get(*at)?.config));
                let mut config = RoomConfig::default();
                of_lists.chain(subscribed).for_each(|other| config.add(other));
                let config = Arc::new(config);
                if subscribed.is_none() {
                    configs.insert(lists.clone(), Arc::clone(&config));
                }
                config
            }
        };
        rooms.push(Chosen { num, user_row, row, config, lists, is_subscribed: subscribed.is_some() });
    }
    Ok(Choice { counts, rooms, matched })
}

fn list_entries(
    window: &Window<'_>,
    ask: &SlidingAsk,
    facts: &Facts,
    sent: &BTreeMap<RoomNum, RoomSent>,
) -> Result<Vec<Entry>, Fault> {
    let user = window.caller().user;
    let mut listed = Vec::new();
    for row in members::list_user_rooms(window.read, user)? {
        let (num, user_row) = row?;
        if is_listed(window, facts, (num, &user_row), sent.get(&num))? {
            listed.push((num, user_row, true));
        } else if !user_row.forgotten && user_row.left.is_some() {
            // A room that the user was in is told to who subscribes to it, though no list shows it.
            listed.push((num, user_row, false));
        }
    }
    let rows = schema::ROOM.get_many(window.read, listed.iter().map(|(num, ..)| *num))?;
    let mut entries = Vec::with_capacity(listed.len());
    for ((num, user_row, is_listed), row) in listed.into_iter().zip(rows) {
        let Some(row) = row else { continue };
        if !is_listed && !ask.subscriptions.contains_key(row.id.as_str()) {
            continue;
        }
        let recency = match user_row.membership {
            Membership::Join => row.tip.anchor,
            Membership::Invite | Membership::Knock => look::came_at(window, num, &user_row)?
                .map_or(user_row.since, |came: Order| came.anchor.max(user_row.since)),
            Membership::Leave | Membership::Ban => user_row.since,
        };
        entries.push(Entry { num, user_row, row, recency, is_listed });
    }
    Ok(entries)
}

/// Whether lists show a room to the user: one that they are in or stand before, or were made to leave. One that they left
/// by themselves is shown to who was told of it before.
fn is_listed(
    window: &Window<'_>,
    facts: &Facts,
    (num, user_row): (RoomNum, &UserRoomRow),
    sent: Option<&RoomSent>,
) -> Result<bool, Fault> {
    // A user who leaves and forgets a room is still told once that they left it.
    let is_told =
        sent.is_some_and(|sent| sent.own == user_row.event && sent.membership == user_row.membership);
    if user_row.forgotten && (sent.is_none() || is_told) {
        return Ok(false);
    }
    Ok(match user_row.membership {
        Membership::Join => true,
        Membership::Knock => true,
        Membership::Invite => {
            let was_in = sent.is_some_and(|sent| sent.membership != Membership::Invite);
            was_in || collect::is_wanted_invitation(window, num, user_row)?
        }
        Membership::Leave | Membership::Ban if sent.is_some() => true,
        Membership::Leave | Membership::Ban => facts.was_removed(window, num, user_row)?,
    })
}

/// The things that the filters of all lists of a request ask for. Each is read once, however many lists ask for it.
#[derive(Default)]
struct ReadOnce {
    /// The children of each space.
    children: RefCell<BTreeMap<String, Rc<BTreeSet<String>>>>,
    /// How many children were looked at.
    looked_at: Cell<usize>,
    /// The tags of each room.
    tags: RefCell<BTreeMap<RoomNum, Rc<BTreeSet<String>>>>,
}

impl ReadOnce {
    fn children(&self, window: &Window<'_>, space: &str) -> Result<Rc<BTreeSet<String>>, Fault> {
        if let Some(known) = self.children.borrow().get(space) {
            return Ok(Rc::clone(known));
        }
        let left = CHILDREN_MAX.saturating_sub(self.looked_at.get());
        let (found, looked_at) = children(window, space, left)?;
        self.looked_at.set(self.looked_at.get() + looked_at);
        let found = Rc::new(found);
        self.children.borrow_mut().insert(space.to_owned(), Rc::clone(&found));
        Ok(found)
    }

    fn tags(&self, window: &Window<'_>, entry: &Entry) -> Result<Rc<BTreeSet<String>>, Fault> {
        if let Some(known) = self.tags.borrow().get(&entry.num) {
            return Ok(Rc::clone(known));
        }
        let found = Rc::new(tags_of(window, entry.row.id.as_str())?);
        self.tags.borrow_mut().insert(entry.num, Rc::clone(&found));
        Ok(found)
    }
}

/// The filters of one list, with what they ask of the user's account.
struct Sieve<'a, 'w> {
    window: &'a Window<'w>,
    facts: &'a Facts,
    filters: &'a Filters,
    direct: &'a BTreeSet<String>,
    read_once: &'a ReadOnce,
    /// The children of each space that the filter names.
    children: Option<Vec<Rc<BTreeSet<String>>>>,
}

impl<'a, 'w> Sieve<'a, 'w> {
    fn new(
        window: &'a Window<'w>,
        facts: &'a Facts,
        filters: &'a Filters,
        direct: &'a BTreeSet<String>,
        read_once: &'a ReadOnce,
    ) -> Result<Self, Fault> {
        let children = filters.spaces.as_ref().map(|spaces| {
            let spaces: BTreeSet<&String> = spaces.iter().collect();
            spaces.into_iter().map(|space| read_once.children(window, space)).collect()
        });
        Ok(Self { window, facts, filters, direct, read_once, children: children.transpose()? })
    }

    fn lets_through(&self, entry: &Entry) -> Result<bool, Fault> {
        let Filters { is_dm, is_invited, is_encrypted, room_types, not_room_types, tags, not_tags, .. } =
            self.filters;
        let room_id = entry.row.id.as_str();
        let is_invite = entry.user_row.membership == Membership::Invite;
        if is_invited.is_some_and(|wanted| wanted != is_invite)
            || is_dm.is_some_and(|wanted| wanted != self.direct.contains(room_id))
            || self
                .children
                .as_ref()
                .is_some_and(|spaces| !spaces.iter().any(|children| children.contains(room_id)))
        {
            return Ok(false);
        }
        if tags.is_some() || not_tags.is_some() {
            let has = self.read_once.tags(self.window, entry)?;
            let any = |wanted: &Vec<String>| wanted.iter().any(|tag| has.contains(tag));
            if tags.as_ref().is_some_and(|tags| !any(tags)) || not_tags.as_ref().is_some_and(any) {
                return Ok(false);
            }
        }
        if is_encrypted.is_none() && room_types.is_none() && not_room_types.is_none() {
            return Ok(true);
        }
        let facts = facts_of(self.window, self.facts, entry)?;
        let named = |types: &Vec<Option<String>>| types.contains(&facts.room_type);
        Ok(is_encrypted.is_none_or(|wanted| wanted == facts.is_encrypted)
            && room_types.as_ref().is_none_or(named)
            && !not_room_types.as_ref().is_some_and(named))
    }
}

/// Reads the facts of a room; of one that this server is not in, as far as it was told of them, and of one that the user left as they
/// were then.
fn facts_of(window: &Window<'_>, facts: &Facts, entry: &Entry) -> Result<RoomFacts, Fault> {
    if matches!(entry.user_row.membership, Membership::Leave | Membership::Ban) {
        let mut found = facts.of(window.read, entry.num, &entry.row).map(|facts| RoomFacts::clone(&facts))?;
        let key = state::find_key(window.read, entry.num, ENCRYPTION, "")?;
        let then = key.zip(entry.user_row.left).map(|(key, left)| {
            Ok::<_, Fault>(state::at(window.read, entry.num, StateRef::Main(left), key)?.event().is_some())
        });
        found.is_encrypted = then.transpose()?.unwrap_or(false);
        return Ok(found);
    }
    let is_outside = matches!(entry.user_row.membership, Membership::Invite | Membership::Knock);
    if !is_outside || entry.row.resident != Resident::No {
        return facts.of(window.read, entry.num, &entry.row).map(|facts| RoomFacts::clone(&facts));
    }
    let told = outside::find(window.read, entry.num, window.caller().user, &entry.user_row)?;
    let mut found = RoomFacts::default();
    for event in told.into_iter().flat_map(|told| told.shown.state) {
        let Ok(event) = serde_json::from_str::<serde_json::Value>(&event) else { continue };
        match event.get("type").and_then(serde_json::Value::as_str) {
            Some(CREATE) => {
                let content = event.get("content").map(ToString::to_string).unwrap_or_default();
                found.room_type = facts::room_type(&content);
            }
            Some(ENCRYPTION) => found.is_encrypted = true,
            _ => {}
        }
    }
    Ok(found)
}

fn tags_of(window: &Window<'_>, room_id: &str) -> Result<BTreeSet<String>, Fault> {
    let key = (window.caller().user, room_id, TAG);
    let row = schema::ACCOUNT_DATA.get(window.read, key)?;
    let content: serde_json::Value =
        row.and_then(|row| serde_json::from_slice(&row.content).ok()).unwrap_or_default();
    let tags = content.get("tags").and_then(serde_json::Value::as_object);
    Ok(tags.into_iter().flat_map(|tags| tags.keys().cloned()).collect())
}

/// Lists the rooms that a space names as its children, and how many of them were looked at, which are at most so many. A space that the
/// user is not in says nothing.
fn children(
    window: &Window<'_>,
    space: &str,
    children_max: usize,
) -> Result<(BTreeSet<String>, usize), Fault> {
    let (read, user): (_, UserNum) = (window.read, window.caller().user);
    let mut found = BTreeSet::new();
    let Some(num) = schema::ROOM_ID.get(read, space)? else { return Ok((found, 0)) };
    if !members::is_joined(read, user, num)? {
        return Ok((found, 0));
    }
    let keys = state::list_keys_of(read, num, SPACE_CHILD, children_max)?;
    let looked_at = keys.len();
    let values = state::list_now(read, num, keys)?;
    let events = values.into_iter().filter_map(StateValue::event).collect();
    for stored in event::list_anywhere(read, num, events)? {
        let content: serde_json::Value = serde_json::from_str(stored.row.content()).unwrap_or_default();
        // A child without servers is none any more (client-server API, `m.space.child`).
        if content.get("via").is_some_and(serde_json::Value::is_array) {
            found.extend(stored.row.state_key().map(std::borrow::Cow::into_owned));
        }
    }
    Ok((found, looked_at))
}
