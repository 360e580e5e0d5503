//! The whole state of a room and lists of its members, in pages. The answer is read from the store only as fast as its client
//! takes it: between two pages neither a snapshot nor anything else of the room is held. All pages tell of one place of the
//! room's history, because the state at a place stays what it is.

use std::collections::BTreeMap;

use bytes::Bytes;
use ruma::{OwnedRoomId, RoomId};

use super::{Look, MembersWanted, Standpoint, looking, place};
use crate::{
    accounts::{Caller, tokens},
    error::Result,
    flows::{App, commit, room::completing},
    ids::StateKeyNum,
    json::{JsonText, Object, Pieces},
    rooms::{
        event::{self, StoredEvent},
        members, state,
    },
    schema::{
        rooms::Membership,
        state::{StateRef, StateValue},
    },
};

/// A page ends when it has this many bytes; the last event may exceed it.
const PAGE_BYTES: usize = 64 << 10;
/// A page ends after this many keys, so that it does not take long where hardly any of them are wanted.
const PAGE_KEYS: usize = 2_048;
/// The values of this many keys are looked up at once.
const KEYS_AT_ONCE: usize = 128;

/// An answer that is read in pages.
pub(crate) struct Whole {
    /// The bytes of the first page.
    pub(crate) first: Bytes,
    /// The rest, if there is more than one page.
    pub(crate) rest: Option<Pages>,
}

/// The pages of an answer that are still to be read.
pub(crate) struct Pages {
    app: App,
    caller: Caller,
    room: OwnedRoomId,
    /// Whether the caller was banned already when the answer began. They may read what they saw until then.
    was_banned: bool,
    walk: Walk,
}

impl Pages {
    /// Reads the next page, off the async threads, from a snapshot of its own. Fails where the caller has been logged out, may no
    /// longer look into the room, or was banned from it since the answer began.
    pub(crate) async fn next(self) -> Result<Whole> {
        let Self { app, caller, room, was_banned, mut walk } = self;
        loop {
            let (first, rest) = looking(&app, &caller, &room, move |look, caller| {
                tokens::require_session(&*look.snapshot, caller)?;
                look.standpoint()?;
                if !was_banned && is_banned(&look, caller)? {
                    return Err(commit::not_in_room().into());
                }
                walk.page(&look)
            })
            .await?;
            match rest {
                // A page without anything that is wanted is not worth sending.
                Some(rest) if first.is_empty() => walk = rest,
                rest => {
                    let rest = rest.map(|walk| Self { app, caller, room, was_banned, walk });
                    return Ok(Whole { first, rest });
                }
            }
        }
    }
}

/// The part of a room's state that an answer has.
enum Wanted {
    /// The answer has all keys that have an event.
    State,
    /// The answer has the member events that a request asks for.
    Members(MembersWanted),
    /// The answer has the profiles of those who are joined.
    Joined,
}

/// The key at which the next page begins.
enum Next {
    /// The key of this number; the answer ends before the second one.
    Key(StateKeyNum, StateKeyNum),
    /// The member key after that of this user.
    Member(Option<String>),
}

/// A walk over the keys of a room, which may stop between any two of them.
struct Walk {
    at: StateRef,
    wanted: Wanted,
    next: Next,
    json: Pieces,
}

impl Walk {
    /// Lists the next keys; none where the walk ends.
    fn next_keys(&self, look: &Look) -> Result<Vec<(StateKeyNum, Next)>> {
        match &self.next {
            Next::Key(next, end) => {
                let keys = (next.0..end.0).take(KEYS_AT_ONCE);
                Ok(keys.map(|key| (StateKeyNum(key), Next::Key(StateKeyNum(key + 1), *end))).collect())
            }
            Next::Member(after) => {
                let keys =
                    members::list_keys_after(&*look.snapshot, look.num, after.as_deref(), KEYS_AT_ONCE)?;
                Ok(keys.into_iter().map(|(user, key)| (key, Next::Member(Some(user)))).collect())
            }
        }
    }

    /// Reads a page. Gives its bytes, and the walk where it is not at its end.
    fn page(mut self, look: &Look) -> Result<(Bytes, Option<Self>)> {
        let mut key_count = 0;
        loop {
            let keys = self.next_keys(look)?;
            if keys.is_empty() {
                return Ok((self.json.finish(), None));
            }
            key_count += keys.len();
            let events = self.list_events(look, &keys)?;
            for (key, next) in keys {
                self.next = next;
                if let Some(event) = events.get(&key).and_then(|value| value.event())
                    // Keys that the server derives itself have no event, so they are left out.
                    && let Some(stored) = event::find_anywhere(&*look.snapshot, look.num, event)?
                {
                    self.add(look, &stored)?;
                }
                if self.json.byte_count() >= PAGE_BYTES {
                    return Ok((self.json.take(), Some(self)));
                }
            }
            if key_count >= PAGE_KEYS {
                return Ok((self.json.take(), Some(self)));
            }
        }
    }

    fn list_events(
        &self,
        look: &Look,
        keys: &[(StateKeyNum, Next)],
    ) -> Result<BTreeMap<StateKeyNum, StateValue>> {
        let mut keys: Vec<StateKeyNum> = keys.iter().map(|(key, _)| *key).collect();
        keys.sort_unstable();
        let values = state::at_many(&*look.snapshot, look.num, self.at, &keys)?;
        Ok(keys.into_iter().zip(values).collect())
    }

    fn add(&mut self, look: &Look, stored: &StoredEvent) -> Result<()> {
        match &self.wanted {
            Wanted::State => self.json.item(&look.show_state(stored)?),
            Wanted::Members(wanted) => {
                let membership = stored.membership().map(Membership::as_str);
                if wanted.includes(membership) {
                    self.json.item(&look.show_state(stored)?);
                }
            }
            Wanted::Joined if stored.membership() == Some(Membership::Join) => {
                if let Some(user_id) = stored.row.state_key() {
                    self.json.field(&user_id, &profile(look, stored)?);
                }
            }
            Wanted::Joined => {}
        }
        Ok(())
    }
}

/// The name and the picture of a member; a field that is not text is told as none.
fn profile(look: &Look, stored: &StoredEvent) -> Result<JsonText> {
    let seen = look.viewer().seen(look.view(), stored)?;
    let content: serde_json::Value = serde_json::from_str(seen.row.content()).unwrap_or_default();
    let mut profile = Object::new();
    for (name, field) in [("display_name", "displayname"), ("avatar_url", "avatar_url")] {
        let text = content.get(field).filter(|value| value.is_string()).unwrap_or(&serde_json::Value::Null);
        profile.json(name, &JsonText::from(text));
    }
    Ok(profile.finish())
}

/// Begins an answer: `begin` says where it stands, and refuses who may not have it.
async fn begin(
    app: &App,
    caller: &Caller,
    room: &RoomId,
    begin: impl FnOnce(&Look) -> Result<Walk> + Send + 'static,
) -> Result<Whole> {
    completing::whole(app, caller, room).await?;
    let read = move |look: Look, caller: &Caller| {
        let (first, rest) = begin(&look)?.page(&look)?;
        Ok((first, rest, is_banned(&look, caller)?))
    };
    let (first, rest, was_banned) = looking(app, caller, room, read).await?;
    let (app, caller, room) = (app.clone(), caller.clone(), room.to_owned());
    let rest = rest.map(|walk| Pages { app, caller, room, was_banned, walk });
    Ok(Whole { first, rest })
}

fn is_banned(look: &Look, caller: &Caller) -> Result<bool> {
    let row = members::find(&*look.snapshot, caller.user, look.num)?;
    Ok(row.is_some_and(|row| row.membership == Membership::Ban))
}

/// Answers the whole state of a room: the current one, or that of the moment when the caller left.
pub(crate) async fn state(app: &App, caller: &Caller, room: &RoomId) -> Result<Whole> {
    begin(app, caller, room, |look| {
        let at = match look.standpoint()? {
            Standpoint::Now => look.room.state_tip,
            Standpoint::Left(order) => order,
        };
        let next = Next::Key(StateKeyNum(0), StateKeyNum(look.room.next_key));
        Ok(Walk { at: StateRef::Main(at), wanted: Wanted::State, next, json: Pieces::list() })
    })
    .await
}

/// Answers the member events of a room that are asked for.
pub(crate) async fn members(
    app: &App,
    caller: &Caller,
    room: &RoomId,
    wanted: MembersWanted,
) -> Result<Whole> {
    begin(app, caller, room, move |look| {
        let end = match look.standpoint()? {
            Standpoint::Now => look.room.state_tip,
            Standpoint::Left(left) => left,
        };
        let at = wanted.at.as_deref().map(place).transpose()?;
        let at = at.map(|at| look.not_before_the_maker(at)).transpose()?;
        let at = at.map(|at| look.not_before_sight(at)).transpose()?.flatten();
        let at = at.map_or(end, |at| at.0.min(end));
        let (next, mut json) = (Next::Member(None), Pieces::object());
        json.open_list("chunk");
        Ok(Walk { at: StateRef::Main(at), wanted: Wanted::Members(wanted), next, json })
    })
    .await
}

/// Answers who is in a room, with their names and pictures. Errors: 403 `M_FORBIDDEN` for a caller who is not in it.
pub(crate) async fn joined_members(app: &App, caller: &Caller, room: &RoomId) -> Result<Whole> {
    begin(app, caller, room, |look| {
        if !look.reader.is_joined() {
            tracing::debug!(room = %look.num, reason = "not in the room", "the members of a room are withheld");
            return Err(commit::not_in_room().into());
        }
        let (next, mut json) = (Next::Member(None), Pieces::object());
        json.open_object("joined");
        Ok(Walk { at: StateRef::Main(look.room.state_tip), wanted: Wanted::Joined, next, json })
    })
    .await
}
