//! Power levels: who may do what in a room, as far as the authorization rules do not check it themselves.

use std::{collections::HashSet, sync::Arc};

use ruma::{
    CanonicalJsonObject, CanonicalJsonValue, OwnedUserId, UserId,
    events::{TimelineEventType, room::power_levels::UserPowerLevel},
    room_version_rules::AuthorizationRules,
    state_res::events::{RoomCreateEvent, RoomPowerLevelsEvent},
};

use crate::{
    error::{Error, Refusal, Result},
    rooms::{
        self,
        event::{self, Event, StateEvent},
        state::{self, StateRef},
        view::RoomView,
    },
    schema::event_types::{CREATE, POWER_LEVELS},
    store::Read,
};

/// An action that needs a power level of its own.
pub use ruma::state_res::events::RoomPowerLevelsIntField as Action;

/// The power levels of a room at one moment.
pub struct Power {
    rules: &'static AuthorizationRules,
    creators: HashSet<OwnedUserId>,
    levels: Option<RoomPowerLevelsEvent<Event>>,
}

impl Power {
    /// Reads the current levels of a room.
    pub fn read(view: RoomView<'_, impl Read + ?Sized>) -> Result<Self> {
        let state = |event_type| -> Result<Option<Arc<StateEvent>>> {
            let stored = rooms::find_state(view.read, view.num, event_type, "")?;
            Ok(stored.map(|stored| StateEvent::read(view.row, &stored)).transpose()?)
        };
        let rules = &rooms::rules(view.row)?.authorization;
        Self::of(rules, state(CREATE)?, state(POWER_LEVELS)?)
    }

    /// Reads the levels in a state of a room.
    pub fn at(view: RoomView<'_, impl Read + ?Sized>, at: StateRef) -> Result<Self> {
        let RoomView { read, num, row } = view;
        let state = |event_type| -> Result<Option<Arc<StateEvent>>> {
            let Some(key) = state::find_key(read, num, event_type, "")? else { return Ok(None) };
            let Some(event) = state::at(read, num, at, key)?.event() else { return Ok(None) };
            Ok(Some(StateEvent::read(row, &event::require(read, num, event)?)?))
        };
        let rules = &rooms::rules(row)?.authorization;
        Self::of(rules, state(CREATE)?, state(POWER_LEVELS)?)
    }

    /// Takes the levels from these events of a room.
    pub(in crate::rooms) fn of(
        rules: &'static AuthorizationRules,
        create: Option<Arc<StateEvent>>,
        levels: Option<Arc<StateEvent>>,
    ) -> Result<Self> {
        let create = create.ok_or_else(|| Error::broken("a room has no create event"))?;
        let creators = RoomCreateEvent::new(&create.parsed).creators(rules).map_err(Error::broken)?;
        let levels = levels.map(|levels| RoomPowerLevelsEvent::new(levels.parsed.clone()));
        Ok(Self { rules, creators, levels })
    }

    /// Gives the power level of a user.
    pub fn of_user(&self, user: &UserId) -> Result<UserPowerLevel> {
        let creator = self.creators.contains(user);
        if creator && self.rules.explicitly_privilege_room_creators {
            return Ok(UserPowerLevel::Infinite);
        }
        match &self.levels {
            Some(levels) => levels.user_power_level(user, self.rules).map(Into::into).map_err(odd),
            // A room without a power levels event obeys its creator.
            None => Ok(UserPowerLevel::Int(ruma::Int::from(if creator { 100 } else { 0 }))),
        }
    }

    /// Lists the creators of a room whose creators stand above all levels (room version 12), sorted.
    pub fn list_privileged_creators(&self) -> Vec<OwnedUserId> {
        let mut creators: Vec<_> = match self.rules.explicitly_privilege_room_creators {
            true => self.creators.iter().cloned().collect(),
            false => Vec::new(),
        };
        creators.sort_unstable();
        creators
    }

    /// Refuses content that does not state power levels, and levels that name a creator of a room whose creators stand
    /// above all levels (room version 12): 400 `M_BAD_JSON`.
    pub fn check_levels(&self, content: &CanonicalJsonObject) -> Result<(), Refusal> {
        self.check_shape(content)?;
        let users = content.get("users").and_then(CanonicalJsonValue::as_object);
        let named =
            users.is_some_and(|users| self.creators.iter().any(|user| users.contains_key(user.as_str())));
        if named && self.rules.explicitly_privilege_room_creators {
            return Err(Refusal::bad_json(
                "`users` names a creator of this room, who stands above all power levels; leave them out.",
            ));
        }
        Ok(())
    }

    /// Checks the types of the fields. The authorization rules refuse the same, but as something that is not allowed.
    fn check_shape(&self, content: &CanonicalJsonObject) -> Result<(), Refusal> {
        let odd =
            |field: &str| Refusal::bad_json(format!("`{field}` must hold power levels, which are integers."));
        let is_level = |value: &CanonicalJsonValue| match value {
            CanonicalJsonValue::Integer(_) => true,
            CanonicalJsonValue::String(text) => {
                !self.rules.integer_power_levels && text.trim().parse::<i64>().is_ok()
            }
            _ => false,
        };
        for (field, value) in content {
            let fits = match field.as_str() {
                "ban" | "events_default" | "invite" | "kick" | "redact" | "state_default"
                | "users_default" => is_level(value),
                "events" | "notifications" | "users" => value.as_object().is_some_and(|levels| {
                    levels.iter().all(|(key, level)| {
                        is_level(level) && (field != "users" || UserId::parse(key).is_ok())
                    })
                }),
                _ => true,
            };
            if !fits {
                return Err(odd(field));
            }
        }
        Ok(())
    }

    /// Gives the level that an action needs.
    fn needed(&self, action: Action) -> Result<ruma::Int> {
        match &self.levels {
            Some(levels) => levels.get_as_int_or_default(action, self.rules).map_err(odd),
            None => Ok(action.default_value()),
        }
    }

    /// Whether a user has the level for this action.
    pub fn may(&self, user: &UserId, action: Action) -> Result<bool> {
        Ok(self.of_user(user)? >= self.needed(action)?)
    }

    /// Lists the creators and users with a level of their own who may do this, sorted; `None` where the default level
    /// suffices, so that nearly every member may.
    pub fn list_named_who_may(&self, action: Action) -> Result<Option<Vec<OwnedUserId>>> {
        let (everybody, named) = match &self.levels {
            Some(levels) => (
                levels.get_as_int_or_default(Action::UsersDefault, self.rules).map_err(odd)?,
                levels.users(self.rules).map_err(odd)?,
            ),
            None => (ruma::Int::default(), None),
        };
        if everybody >= self.needed(action)? {
            return Ok(None);
        }
        let mut found = Vec::new();
        for user in self.creators.iter().chain(named.into_iter().flat_map(|named| named.keys())) {
            if self.may(user, action)? {
                found.push(user.clone());
            }
        }
        found.sort_unstable();
        found.dedup();
        Ok(Some(found))
    }

    /// Whether a user has the level to send state events of this type.
    pub fn may_send_state(&self, user: &UserId, event_type: &str) -> Result<bool> {
        let event_type = TimelineEventType::from(event_type);
        let own = match &self.levels {
            Some(levels) => {
                levels.events(self.rules).map_err(odd)?.and_then(|events| events.get(&event_type).copied())
            }
            None => None,
        };
        match own {
            Some(needed) => Ok(self.of_user(user)? >= needed),
            None => self.may(user, Action::StateDefault),
        }
    }
}

/// Levels that cannot be read allow nobody anything, and the refusal says why.
fn odd(why: String) -> Error {
    Refusal::forbidden(format!("The room's power levels cannot be read, so nobody may do this: {why}."))
        .into()
}
