//! An event and the room it stands in, as push rules see them.

use std::cell::OnceCell;

use ruma::{
    OwnedUserId, UserId,
    events::room::power_levels::{RoomPowerLevels, RoomPowerLevelsEventContent},
    power_levels::NotificationPowerLevelsKey,
    push::{FlattenedJson, FlattenedJsonValue, PushConditionPowerLevelsCtx},
    serde::Raw,
};
use serde_json::value::RawValue;

use crate::{
    ids::{Order, RoomNum},
    json::{JsonText, Object},
    push::glob::{OutOfSteps, Steps, Text},
    rooms::{
        self,
        event::{self, StoredEvent},
        members, state,
    },
    schema::event_types::{CREATE, MEMBER, POWER_LEVELS},
    schema::{rooms::RoomRow, state::StateRef},
    store::{Fault, Read},
};

/// An event and its room. Properties that few rules need are read when a rule first asks for them.
pub(crate) struct Scene<'a, R: ?Sized> {
    read: &'a R,
    num: RoomNum,
    room: &'a RoomRow,
    /// The place of a stored event, at which the room is looked at; none for an event that is about to be stored.
    at: Option<Order>,
    event: FlattenedJson,
    body: OnceCell<Option<Text>>,
    joined: OnceCell<u64>,
    power_levels: OnceCell<PushConditionPowerLevelsCtx>,
}

impl<'a, R: Read + ?Sized> Scene<'a, R> {
    /// An event that is about to be stored, for the rules of classes: the room is as the event leaves it. Those rules look at
    /// no more than these fields, so the rest, most of which is hashes and signatures, need not be read. `None` if its bytes
    /// are not JSON.
    pub(crate) fn of_new(read: &'a R, num: RoomNum, room: &'a RoomRow, stored: &StoredEvent) -> Option<Self> {
        let (row, spans) = (&stored.row, &stored.row.header.spans);
        let mut event = Object::with_capacity(row.content().len() + 512);
        event.json("content", row.json_of(spans.content));
        event.json("sender", row.json_of(spans.sender));
        if spans.state_key.length > 0 {
            event.json("state_key", row.json_of(spans.state_key));
        }
        event.json("type", row.json_of(spans.event_type));
        Self::of_json(read, num, room, event.finish().into(), None)
    }

    /// An event that was stored earlier: the room is looked at as it was then. `None` if its bytes are not JSON.
    pub(crate) fn of_past(
        read: &'a R,
        num: RoomNum,
        room: &'a RoomRow,
        stored: &StoredEvent,
    ) -> Option<Self> {
        let json = String::from_utf8(stored.row.json.to_vec()).ok()?;
        Self::of_json(read, num, room, json, Some(stored.order))
    }

    /// An event that stands nowhere in the room: an invitation from outside. The room is looked at as it is now, which mostly is not known
    /// at all. `None` if the bytes are not JSON.
    pub(crate) fn of_outside(read: &'a R, num: RoomNum, room: &'a RoomRow, event: &JsonText) -> Option<Self> {
        Self::of_json(read, num, room, event.as_str().to_owned(), None)
    }

    fn of_json(
        read: &'a R,
        num: RoomNum,
        room: &'a RoomRow,
        json: String,
        at: Option<Order>,
    ) -> Option<Self> {
        let raw: Raw<()> = Raw::from_json(RawValue::from_string(json).ok()?);
        Some(Self {
            read,
            num,
            room,
            at,
            event: FlattenedJson::from_raw(&raw),
            body: OnceCell::new(),
            joined: OnceCell::new(),
            power_levels: OnceCell::new(),
        })
    }

    /// An event that is about to be stored in a room without state.
    #[cfg(test)]
    pub(crate) fn of_text(read: &'a R, room: &'a RoomRow, json: &str) -> Self {
        Self::of_json(read, RoomNum(1), room, json.to_owned(), None).unwrap()
    }

    /// A field, by its path in push rules.
    pub(crate) fn field(&self, path: &str) -> Option<&FlattenedJsonValue> {
        self.event.get(path)
    }

    /// A field that is a string. An event need not name its room, so `room_id` comes from the room itself.
    pub(crate) fn text(&self, path: &str) -> Option<&str> {
        if path == "room_id" { Some(self.room.id.as_str()) } else { self.event.get_str(path) }
    }

    /// The user who sent the event.
    pub(crate) fn sender(&self) -> Option<&str> {
        self.event.get_str("sender")
    }

    /// The body of a message, prepared for looking for words.
    pub(crate) fn body(&self, steps: &mut Steps) -> Result<Option<&Text>, OutOfSteps> {
        if let Some(known) = self.body.get() {
            return Ok(known.as_ref());
        }
        let body = self.text("content.body").map(|body| Text::new(body, steps)).transpose()?;
        Ok(self.body.get_or_init(|| body).as_ref())
    }

    /// The users whom the event mentions.
    pub(crate) fn mentioned(&self) -> impl Iterator<Item = &str> {
        let users = self.event.get(r"content.m\.mentions.user_ids").and_then(|users| users.as_array());
        users.unwrap_or_default().iter().filter_map(|user| user.as_str())
    }

    /// The user whom the event invites.
    pub(crate) fn invited(&self) -> Option<&str> {
        let is_invite = self.event.get_str("type") == Some(MEMBER)
            && self.event.get_str("content.membership") == Some("invite");
        self.event.get_str("state_key").filter(|_| is_invite)
    }

    /// The number of members who were joined to the room at the event.
    pub(crate) fn joined(&self) -> Result<u64, Fault> {
        if let Some(known) = self.joined.get() {
            return Ok(*known);
        }
        let count = match self.at {
            Some(order) => members::count_joined_at(self.read, self.num, StateRef::Main(order))?,
            None => u64::from(self.room.joined),
        };
        Ok(*self.joined.get_or_init(|| count))
    }

    /// The name of a user in the room: the one that the member event gives, or else the localpart.
    pub(crate) fn name_of(&self, user_id: &UserId) -> Result<String, Fault> {
        #[derive(serde::Deserialize)]
        struct Content {
            displayname: Option<String>,
        }
        let member = self.find_state(MEMBER, user_id.as_str())?;
        let content = member.and_then(|member| serde_json::from_str::<Content>(member.row.content()).ok());
        let name = content.and_then(|content| content.displayname);
        Ok(name.unwrap_or_else(|| user_id.localpart().to_owned()))
    }

    /// Whether the sender had the power level for this kind of notification (`notifications` in the power levels).
    pub(crate) fn may_notify(&self, key: &NotificationPowerLevelsKey) -> Result<bool, Fault> {
        let Some(sender) = self.sender().and_then(|sender| <&UserId>::try_from(sender).ok()) else {
            return Ok(false);
        };
        let levels = match self.power_levels.get() {
            Some(known) => known,
            None => {
                let levels = self.read_power_levels()?;
                self.power_levels.get_or_init(|| levels)
            }
        };
        Ok(levels.has_sender_notification_permission(sender, key))
    }

    fn read_power_levels(&self) -> Result<PushConditionPowerLevelsCtx, Fault> {
        let rules = &rooms::rules(self.room)?.authorization;
        let levels = self.find_state(POWER_LEVELS, "")?.and_then(|stored| {
            serde_json::from_str::<RoomPowerLevelsEventContent>(stored.row.content()).ok()
        });
        let create = self.find_state(CREATE, "")?;
        let creators = create.map(|create| creators(&create)).unwrap_or_default();
        Ok(RoomPowerLevels::new(levels.into(), rules, creators).into())
    }

    fn find_state(&self, event_type: &str, state_key: &str) -> Result<Option<StoredEvent>, Fault> {
        let Some(order) = self.at else {
            return rooms::find_state(self.read, self.num, event_type, state_key);
        };
        let Some(key) = state::find_key(self.read, self.num, event_type, state_key)? else { return Ok(None) };
        let value = state::at(self.read, self.num, StateRef::Main(order), key)?;
        value.event().map(|event| event::require(self.read, self.num, event)).transpose()
    }
}

fn creators(create: &StoredEvent) -> Vec<OwnedUserId> {
    #[derive(Default, serde::Deserialize)]
    struct Content {
        #[serde(default)]
        additional_creators: Vec<OwnedUserId>,
    }
    let content: Content = serde_json::from_str(create.row.content()).unwrap_or_default();
    let sender = OwnedUserId::try_from(create.row.sender().as_ref()).ok();
    content.additional_creators.into_iter().chain(sender).collect()
}
