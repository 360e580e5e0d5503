//! The events of a room that a search has found: whether the caller may see them, what stands around them, and the room's state.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
    sync::Arc,
};

use serde::Deserialize;

use super::{Look, Standpoint, pages::list_near};
use crate::{
    accounts::{Caller, ignored::Ignored},
    error::Result,
    ids::{EventNum, Order, RoomNum, StateKeyNum},
    json::{JsonText, Object},
    rooms::{
        self,
        event::{self, StoredEvent},
        filter::EventFilter,
        members,
        relations::edits,
        state,
        timeline::PageToken,
    },
    schema,
    schema::{
        event_types::{CREATE, ENCRYPTION, MEMBER},
        rooms::{Membership, RoomRow},
        state::StateRef,
    },
    search::follow::text_of,
    store::{Direction, Snapshot},
};

/// Look at most at this many events on each side of a found one for those that the caller sees.
const LOOKED_AT_MAX: usize = 200;
/// The state of a room is given with at most this many pieces that are no members.
const PIECES_MAX: usize = 500;
/// The state of a room is given with at most this many of its members, those who sent something of the answer first.
const MEMBERS_MAX: usize = 500;

/// An event that a search has found, and that the caller may see.
pub(crate) struct FoundText {
    stored: StoredEvent,
    membership: Membership,
    /// The text by which it was found.
    pub(crate) text: String,
}

impl FoundText {
    /// The id of the event's sender.
    pub(crate) fn sender(&self) -> String {
        self.stored.row.sender().into_owned()
    }
}

/// The events around a found one, as they are answered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Around {
    /// At most this many events before it.
    pub(crate) before: usize,
    /// At most this many events after it.
    pub(crate) after: usize,
    /// Whether the names and pictures that senders had then come with them.
    pub(crate) with_profiles: bool,
}

impl Look {
    /// A room in which somebody searches; `None` for a room in which nothing may be found: where the caller never was, and that is
    /// encrypted.
    pub(crate) fn for_search(
        snapshot: &Arc<Snapshot>,
        caller: &Caller,
        num: RoomNum,
        ignored: &Arc<Ignored>,
        now_ms: u64,
    ) -> Result<Option<Self>> {
        let Some(row) = rooms::find_row(&**snapshot, num)?.filter(|row| row.resident.has_history()) else {
            return Ok(None);
        };
        let look = Self::in_snapshot(Arc::clone(snapshot), caller, (num, row), Arc::clone(ignored), now_ms)?;
        let is_encrypted = rooms::find_state(&**snapshot, num, ENCRYPTION, "")?.is_some();
        Ok((look.reader.joined_until().is_some() && !is_encrypted).then_some(look))
    }

    /// The row of the room.
    pub(crate) fn room(&self) -> &RoomRow {
        &self.room
    }

    /// Whether the caller may see every event of the room.
    pub(crate) fn sees_everything(&self) -> Result<bool> {
        Ok(self.reader.may_see_everything(&*self.snapshot)?)
    }

    /// Finds an event that the index gave for a search, with the edit whose text was found. `None` where it is not the caller's
    /// to see, or the text is not the newest that they see: an edit that the caller does not see must not be found by its words, and
    /// the text before it is still theirs.
    pub(crate) fn find_text(&self, event: EventNum, edit: Option<EventNum>) -> Result<Option<FoundText>> {
        let read = &*self.snapshot;
        let Some(stored) = event::find(read, self.num, event)? else { return Ok(None) };
        let until = match self.standpoint()? {
            Standpoint::Now => Order::MAX,
            Standpoint::Left(order) => order,
        };
        let sees = |edit: &StoredEvent| self.reader.may_see(read, edit);
        let seen = edits::newest_edit_seen(read, self.num, &stored, until, sees)?;
        // The index may not have read yet that the text which it gives is another one now.
        if seen.as_ref().map(StoredEvent::event) != edit {
            return Ok(None);
        }
        let Some((_, text)) = text_of(&stored, seen.as_ref()) else { return Ok(None) };
        let (membership, sees) = self.reader.look(read, &stored)?;
        if !sees || self.viewer().hides(self.view(), &stored)? {
            return Ok(None);
        }
        Ok(Some(FoundText { stored, membership, text }))
    }

    /// Whether a filter lets a found event through.
    pub(crate) fn wants(&self, filter: &EventFilter, found: &FoundText) -> Result<bool> {
        Ok(filter.allows(self.view(), &found.stored, &self.viewer())?)
    }

    /// The id of a found event, and the event as the caller is shown it.
    pub(crate) fn show_found(&self, found: &FoundText) -> Result<(String, JsonText)> {
        Ok((found.stored.id(&self.room).to_string(), self.show(&found.stored, found.membership)?))
    }

    /// The events around a found one, with tokens to read on from both ends. Adds their senders to `senders`.
    pub(crate) fn around_found(
        &self,
        found: &FoundText,
        wanted: Around,
        senders: &mut BTreeSet<String>,
    ) -> Result<JsonText> {
        let order = found.stored.order;
        let (below, above) = (PageToken::below(order), PageToken::above(order));
        let before = list_near(self, below, Direction::Down, wanted.before, LOOKED_AT_MAX)?;
        let after = list_near(self, above, Direction::Up, wanted.after, LOOKED_AT_MAX)?;
        let start = before.last().map_or(below, |(oldest, _)| PageToken::below(oldest.order));
        let end = after.last().map_or(above, |(newest, _)| PageToken::above(newest.order));
        let around = before.iter().chain(&after).map(|(stored, _)| stored);
        let shown: BTreeSet<String> =
            around.chain([&found.stored]).map(|stored| stored.row.sender().into_owned()).collect();
        let mut context = Object::new();
        context.text("start", &start.to_string());
        context.text("end", &end.to_string());
        context.list("events_before", &self.show_all(&before)?);
        context.list("events_after", &self.show_all(&after)?);
        if wanted.with_profiles {
            let profiles = self.profiles_at(&shown, order)?;
            context.object("profile_info", |info| {
                for (user, profile) in &profiles {
                    info.json(user, profile);
                }
            });
        }
        senders.extend(shown);
        Ok(context.finish())
    }

    /// The names and pictures that users had at a place of the room's history.
    fn profiles_at(&self, users: &BTreeSet<String>, at: Order) -> Result<BTreeMap<String, JsonText>> {
        #[derive(Deserialize)]
        struct Content {
            #[serde(default)]
            displayname: Option<String>,
            #[serde(default)]
            avatar_url: Option<String>,
        }
        let mut profiles = BTreeMap::new();
        for user in users {
            let Some(member) = self.find_state(Standpoint::Left(at), MEMBER, user)? else { continue };
            let seen = self.viewer().seen(self.view(), &member)?;
            let Ok(content) = serde_json::from_str::<Content>(seen.row.content()) else { continue };
            let mut profile = Object::new();
            if let Some(name) = content.displayname {
                profile.text("displayname", &name);
            }
            if let Some(avatar) = content.avatar_url {
                profile.text("avatar_url", &avatar);
            }
            profiles.insert(user.clone(), profile.finish());
        }
        Ok(profiles)
    }

    /// The state of the room as the caller may see it: all that is no member, within bounds, the members who sent something, and
    /// unless `lazy`, others up to a bound.
    pub(crate) fn state_for_search(&self, senders: &BTreeSet<String>, lazy: bool) -> Result<Vec<JsonText>> {
        let read = &*self.snapshot;
        let at = match self.standpoint()? {
            Standpoint::Now => self.room.state_tip,
            Standpoint::Left(order) => order,
        };
        let start = (self.num, "", "");
        // No type stands between that of members and the first one after it.
        let parts = [
            (Bound::Included(start), Bound::Excluded((self.num, MEMBER, ""))),
            (Bound::Excluded((self.num, "m.room.member\u{0}", "")), Bound::Unbounded),
        ];
        let mut keys: Vec<StateKeyNum> = Vec::new();
        for (low, high) in parts {
            let rows =
                schema::STATE_KEY_NUM.range::<(RoomNum, String, String)>(read, low, high, Direction::Up)?;
            for row in rows.take(PIECES_MAX) {
                let ((room, ..), key) = row?;
                if room != self.num {
                    break;
                }
                keys.push(key);
            }
        }
        let mut members: Vec<StateKeyNum> = Vec::new();
        for sender in senders {
            members.extend(state::find_key(read, self.num, MEMBER, sender)?);
        }
        if !lazy {
            let others = members::list_keys_after(read, self.num, None, MEMBERS_MAX)?;
            members.extend(others.into_iter().map(|(_, key)| key));
        }
        let mut seen = BTreeSet::new();
        members.retain(|key| seen.insert(*key));
        members.truncate(MEMBERS_MAX);
        let mut shown = Vec::new();
        for key in keys.into_iter().chain(members) {
            let Some(event) = state::at(read, self.num, StateRef::Main(at), key)?.event() else { continue };
            if let Some(stored) = event::find_anywhere(read, self.num, event)? {
                shown.push(self.show_state(&stored)?);
            }
        }
        Ok(shown)
    }

    /// The room of which this one is the successor, as its create event says.
    pub(crate) fn predecessor(snapshot: &Snapshot, num: RoomNum) -> Result<Option<RoomNum>> {
        #[derive(Deserialize)]
        struct Predecessor {
            room_id: ruma::OwnedRoomId,
        }
        #[derive(Deserialize)]
        struct Content {
            predecessor: Predecessor,
        }
        let Some(create) = rooms::find_state(snapshot, num, CREATE, "")? else { return Ok(None) };
        let Ok(content) = serde_json::from_str::<Content>(create.row.content()) else { return Ok(None) };
        Ok(rooms::find_room(snapshot, &content.predecessor.room_id)?)
    }
}
