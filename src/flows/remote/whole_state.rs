//! A whole state of a room and the events that allowed it, for another server, in pieces. It is read from the store only as fast
//! as the other server takes it: between two pieces nothing of the room is held but a bit for each event that was given, and
//! the numbers of those that come next. The state at a place stays what it is, so that all pieces tell of one state.

use bytes::Bytes;
use ruma::{OwnedServerName, ServerName, UserId};
use serde_json::Value;

use crate::{
    error::{Refusal, Result},
    flows::App,
    ids::{EventNum, RoomNum, StateKeyNum},
    json::{JsonText, Pieces},
    rooms::{
        acl,
        event::{self, StoredEvent},
        members, state,
    },
    schema::{
        event_types::{CANONICAL_ALIAS, MEMBER, NAME},
        rooms::{Membership, RoomRow},
        state::StateRef,
    },
    store::{Fault, Snapshot},
};

/// A piece ends when it has this many bytes; the last event may exceed it.
const PIECE_BYTES: usize = 64 << 10;
/// A piece ends after this many keys, so that it does not take long where hardly any of them are wanted.
const PIECE_KEYS: usize = 2_048;
/// Read this many events at once.
const EVENTS_AT_ONCE: usize = 64;
/// A room without a name is named after this many members.
const HEROES: usize = 5;
/// Look at no more than this many members for those after whom the room is named.
const HEROES_LOOKED_AT: usize = 1_000;

/// The bytes that stand around an answer and tell which one it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// The answer is one object.
    Object,
    /// A list of the status 200 and the object, as the first version of the endpoints has it.
    Listed,
}

/// The members whose events an answer has.
enum Members {
    All,
    /// Only the events of these keys.
    Only(Vec<StateKeyNum>),
}

/// The part of the answer that comes next.
enum Part {
    State { next: u32, end: u32 },
    Chain,
}

/// One bit for each event of a room that stands in the answer, or is about to.
#[derive(Default)]
struct Seen(Vec<u64>);

impl Seen {
    /// Notes an event. Gives `true` if it was not noted before.
    fn insert(&mut self, event: EventNum) -> Result<bool, Fault> {
        let place =
            usize::try_from(event.0 / 64).map_err(|_| Fault::Corrupt("an event has a huge number"))?;
        if self.0.len() <= place {
            self.0.resize(place + 1, 0);
        }
        let bit = 1 << (event.0 % 64);
        let Some(bits) = self.0.get_mut(place) else { return Ok(false) };
        let is_new = *bits & bit == 0;
        *bits |= bit;
        Ok(is_new)
    }
}

/// An answer that is read in pieces, as far as it is still to be read.
pub(crate) struct Walk {
    app: App,
    room: RoomNum,
    /// The server that is answered.
    to: OwnedServerName,
    at: StateRef,
    members: Members,
    part: Part,
    seen: Seen,
    /// The events of the state, where members are left out: a server that can do without those needs no event twice.
    told: Seen,
    /// The events of the chain that come next.
    waiting: Vec<EventNum>,
    json: Pieces,
}

/// The names of the two lists of an answer, and what stands before them.
pub(crate) struct Wanted<'a> {
    /// The server that is answered.
    pub(crate) to: &'a ServerName,
    /// The state that is told.
    pub(crate) at: StateRef,
    /// The name of the list of the state's events.
    pub(crate) name: &'static str,
    /// Events whose chains are told, too.
    pub(crate) with: &'a [EventNum],
    /// The user for whom most members are left out; `None` where all are told.
    pub(crate) without_members_for: Option<&'a UserId>,
    /// The event that is told before the state.
    pub(crate) event: Option<&'a StoredEvent>,
    /// The form of the answer.
    pub(crate) form: Form,
}

impl Walk {
    /// Begins an answer with its first piece.
    pub(crate) fn begin(
        app: &App,
        snapshot: &Snapshot,
        num: RoomNum,
        row: &RoomRow,
        wanted: &Wanted<'_>,
    ) -> Result<Self> {
        let mut json = match wanted.form {
            Form::Object => Pieces::object(),
            Form::Listed => {
                let mut json = Pieces::list();
                json.item(&JsonText::from(&Value::from(200)));
                json.open_item();
                json
            }
        };
        if let Some(event) = wanted.event {
            json.field("event", &JsonText::stored(&event.row.json));
        }
        let members = match wanted.without_members_for {
            None => Members::All,
            Some(user) => {
                let servers = members::list_servers_at(snapshot, num, wanted.at)?;
                let servers = servers.iter().map(|server| JsonText::string(server));
                json.field("members_omitted", &JsonText::from(&Value::Bool(true)));
                json.field("servers_in_room", &JsonText::list(servers.collect::<Vec<_>>().iter()));
                Members::Only(list_heroes(snapshot, num, wanted.at, user)?)
            }
        };
        json.open_list(wanted.name);
        let part = Part::State { next: 0, end: row.next_key };
        let (seen, told, waiting) = (Seen::default(), Seen::default(), Vec::new());
        let (app, to) = (app.clone(), wanted.to.to_owned());
        let mut walk = Self { app, room: num, to, at: wanted.at, members, part, seen, told, waiting, json };
        walk.expect(wanted.with.iter().copied())?;
        Ok(walk)
    }

    /// Reads the next piece, off the async threads, from a snapshot of its own. Refuses to go on for a server that the room does not
    /// admit any more: 403 `M_FORBIDDEN`.
    pub(crate) async fn next(self) -> Result<(Bytes, Option<Self>)> {
        let env = self.app.env.clone();
        env.blocking(move || {
            let snapshot = self.app.store.snapshot();
            if !acl::admits(&*snapshot, self.room, &self.to)? {
                return Err(Refusal::forbidden("The room does not admit your server.").into());
            }
            self.piece(&snapshot)
        })
        .await
    }

    /// Reads a piece. Gives its bytes, and the walk where it is not at its end.
    pub(crate) fn piece(mut self, snapshot: &Snapshot) -> Result<(Bytes, Option<Self>)> {
        let mut key_count = 0;
        // A piece without anything that is wanted is not worth sending.
        while self.json.byte_count() < PIECE_BYTES && (key_count < PIECE_KEYS || self.json.byte_count() == 0)
        {
            let events = match &mut self.part {
                Part::State { next, end } if *next < *end => {
                    let last = u32::min(*end, next.saturating_add(EVENTS_AT_ONCE as u32));
                    let keys = *next..last;
                    *next = keys.end;
                    key_count += keys.len();
                    let events = self.list_state(snapshot, keys.map(StateKeyNum).collect())?;
                    if matches!(self.members, Members::Only(_)) {
                        for event in &events {
                            self.told.insert(*event)?;
                        }
                    }
                    events
                }
                Part::State { .. } => {
                    self.json.close();
                    self.json.open_list("auth_chain");
                    self.part = Part::Chain;
                    continue;
                }
                Part::Chain => {
                    let left = self.waiting.len().saturating_sub(EVENTS_AT_ONCE);
                    let events = self.waiting.split_off(left);
                    if events.is_empty() {
                        return Ok((self.json.finish(), None));
                    }
                    key_count += events.len();
                    let mut chain = Vec::with_capacity(events.len());
                    for event in events {
                        if self.told.insert(event)? {
                            chain.push(event);
                        }
                    }
                    chain
                }
            };
            let count = events.len();
            let stored = event::list_anywhere(snapshot, self.room, events)?;
            if stored.len() != count {
                return Err(Fault::Corrupt("an event is missing").into());
            }
            for stored in stored {
                self.json.item(&JsonText::stored(&stored.row.json));
                self.expect(stored.row.header.auth.iter().copied())?;
            }
        }
        Ok((self.json.take(), Some(self)))
    }

    /// Has these events told in the chain, unless they are told already.
    fn expect(&mut self, events: impl IntoIterator<Item = EventNum>) -> Result<(), Fault> {
        for event in events {
            if self.seen.insert(event)? {
                self.waiting.push(event);
            }
        }
        Ok(())
    }

    /// Lists the events of these keys, those that are wanted.
    fn list_state(&self, snapshot: &Snapshot, mut keys: Vec<StateKeyNum>) -> Result<Vec<EventNum>, Fault> {
        if let Members::Only(wanted) = &self.members {
            let names = state::list_key_names(snapshot, self.room, keys.iter().copied())?;
            let is_wanted = |(key, name): (StateKeyNum, Option<(String, String)>)| {
                let is_member = name.is_some_and(|(event_type, _)| event_type == MEMBER);
                (!is_member || wanted.contains(&key)).then_some(key)
            };
            keys = keys.into_iter().zip(names).filter_map(is_wanted).collect();
        }
        let values = state::at_many(snapshot, self.room, self.at, &keys)?;
        // Keys that the server derives itself have no event, so they are left out.
        Ok(values.into_iter().filter_map(|value| value.event()).collect())
    }
}

/// Lists the keys of the members after whom a room without a name is called, for this user; none where it has a name.
fn list_heroes(
    snapshot: &Snapshot,
    room: RoomNum,
    at: StateRef,
    user: &UserId,
) -> Result<Vec<StateKeyNum>, Fault> {
    for event_type in [NAME, CANONICAL_ALIAS] {
        let key = state::find_key(snapshot, room, event_type, "")?;
        let named = key.map(|key| state::at(snapshot, room, at, key)).transpose()?;
        if named.is_some_and(|value| value.event().is_some()) {
            return Ok(Vec::new());
        }
    }
    let keys = members::list_keys_after(snapshot, room, None, HEROES_LOOKED_AT)?;
    let keys = keys.into_iter().filter(|(member, _)| member != user.as_str());
    let mut keys: Vec<_> = keys.map(|(_, key)| key).collect();
    keys.sort_unstable();
    let values = state::at_many(snapshot, room, at, &keys)?;
    let mut here = Vec::new();
    for (key, value) in keys.into_iter().zip(values) {
        let Some(event) = value.event() else { continue };
        let membership = members::membership_of_event(snapshot, room, event)?;
        if matches!(membership, Membership::Join | Membership::Invite) {
            here.push((event, key));
        }
    }
    here.sort_unstable();
    Ok(here.into_iter().take(HEROES).map(|(_, key)| key).collect())
}
