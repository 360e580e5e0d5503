//! The lists that go over to the room that replaces another one: bans, and the children of a space. They go over whole, or the room is
//! not replaced: a child that is lost is missed late, and a ban that is lost never.

use std::ops::ControlFlow;

use ruma::{OwnedUserId, RoomId, UserId, events::AnyInitialStateEvent, serde::Raw};
use serde_json::{Map, Value, json};

use crate::{
    error::{Error, Refusal, Result},
    ids::RoomNum,
    rooms::{event, members, spaces},
    schema::{
        event_types::{MEMBER, SPACE_CHILD},
        rooms::Membership,
    },
    store::Read,
};

/// At most this many bans and children go over to the new room, which is made in parts.
pub(super) const EVENTS_MAX: usize = 10_000;
/// Their contents have at most this many bytes together.
const BYTES_MAX: usize = 8 << 20;
/// A child has a content of at most this many bytes.
const CHILD_BYTES_MAX: usize = 16 << 10;
/// At most this many state keys of children are looked at, of which some may name none any more.
const LINKS_LOOKED_AT_MAX: usize = 200_000;
/// Bans are looked for among at most this many users who are or were in the old room, in pages of these sizes.
const MEMBERS_LOOKED_AT_MAX: usize = 2_000_000;
const MEMBERS_AT_ONCE: (usize, usize) = (1_000, 4_000);

/// The state that is carried over, and whether something was left behind.
#[derive(Default)]
pub(super) struct Carried {
    events: Vec<(&'static str, String, Value)>,
    bytes: usize,
    is_more: bool,
}

impl Carried {
    fn add(&mut self, event_type: &'static str, state_key: String, content: Value) {
        self.bytes += state_key.len() + content.to_string().len();
        self.is_more |= self.events.len() >= EVENTS_MAX || self.bytes > BYTES_MAX;
        if !self.is_more {
            self.events.push((event_type, state_key, content));
        }
    }

    /// The events of the new room. Errors: 413 `M_TOO_LARGE` where they are too many.
    pub(super) fn into_events(self) -> Result<Vec<Raw<AnyInitialStateEvent>>> {
        if self.is_more {
            let why = format!(
                "The room has more than {EVENTS_MAX} bans and children, or more than {BYTES_MAX} bytes of them, and cannot be replaced with all of them. Remove some."
            );
            return Err(Refusal::too_large(why).into());
        }
        self.events.into_iter().map(|(kind, key, content)| state_event(kind, &key, &content)).collect()
    }

    /// Adds the bans of those users whom whoever makes the new room may ban there. The specification leaves memberships behind because no
    /// server speaks for the users of others; a ban is the word of whoever replaces the room, and without it the banned would be back.
    pub(super) fn add_bans(
        &mut self,
        read: &(impl Read + ?Sized),
        num: RoomNum,
        may_ban: impl Fn(&UserId) -> bool,
    ) -> Result<()> {
        let mut looked_at = 0;
        members::walk(read, num, MEMBERS_AT_ONCE, |some| {
            let keys = some.iter().map(|(_, key)| *key).collect();
            let memberships = members::list_memberships(read, num, keys, None)?;
            for (user, key) in some {
                if let Some((event, Membership::Ban)) = memberships.get(key)
                    && let Ok(user) = OwnedUserId::try_from(user.as_str())
                    && may_ban(&user)
                    && let Some(stored) = event::find_anywhere(read, num, *event)?
                {
                    self.add(MEMBER, user.to_string(), ban(stored.row.content()));
                }
            }
            looked_at += some.len();
            self.is_more |= looked_at >= MEMBERS_LOOKED_AT_MAX;
            Ok(if self.is_more { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        })?;
        Ok(())
    }

    /// Adds the children that a space names. Keys that name none any more are no children, nor are those that are no ids of rooms, and those
    /// of a size that no client gives them: anybody who may name a child could have the room not replaced by that.
    pub(super) fn add_children(&mut self, read: &(impl Read + ?Sized), num: RoomNum) -> Result<()> {
        let looked_at = spaces::each_link(read, num, LINKS_LOOKED_AT_MAX, |stored| {
            if spaces::names_child(stored)
                && stored.row.content().len() <= CHILD_BYTES_MAX
                && let (Ok(content), Some(key)) =
                    (serde_json::from_str(stored.row.content()), stored.row.state_key())
                && RoomId::parse(&*key).is_ok()
            {
                self.add(SPACE_CHILD, key.into_owned(), content);
            }
            !self.is_more
        })?;
        self.is_more |= looked_at >= LINKS_LOOKED_AT_MAX;
        Ok(())
    }
}

/// The content of a ban without what it says of the user's profile.
fn ban(content: &str) -> Value {
    let content: Map<String, Value> = serde_json::from_str(content).unwrap_or_default();
    let kept = content.into_iter().filter(|(field, _)| field == "membership" || field == "reason");
    Value::Object(kept.collect())
}

/// A piece of state of the new room.
pub(super) fn state_event<T>(event_type: &str, state_key: &str, content: &Value) -> Result<Raw<T>> {
    raw(&json!({ "type": event_type, "state_key": state_key, "content": content }))
}

/// JSON of a type that is read later.
pub(super) fn raw<T>(value: &Value) -> Result<Raw<T>> {
    let text = serde_json::value::to_raw_value(value).map_err(|error| Error::broken(error.to_string()))?;
    Ok(Raw::from_json(text))
}
