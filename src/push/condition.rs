//! A condition of a push rule is compiled once and then asked whether events meet it.
//!
//! Specification: client-server API, "Push Rules: conditions".

use std::{cell::OnceCell, ops::RangeBounds};

use ruma::{
    UserId,
    power_levels::NotificationPowerLevelsKey,
    push::{FlattenedJsonValue, PushCondition, RoomMemberCountIs, ScalarJsonValue},
};

use crate::{
    push::{
        glob::{Glob, OutOfSteps, Steps},
        scene::Scene,
    },
    rooms::property_path,
    store::{Fault, Read},
};

/// One condition of a rule, on an event or its room.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Condition {
    /// The room has this id.
    InRoom(Box<str>),
    /// The room's id matches this pattern.
    RoomLike(Glob),
    /// A field that is a string matches this pattern as a whole.
    Like { key: Box<str>, glob: Glob },
    /// Some words of the body match this pattern.
    Says(Glob),
    /// A field is the id of the user whose rules these are.
    IsOwner { key: Box<str> },
    /// The body has the name of the user whose rules these are.
    SaysOwnersName,
    /// The number of joined members is in this range.
    Joined(RoomMemberCountIs),
    /// The sender has the power level for this kind of notification.
    MayNotify(NotificationPowerLevelsKey),
    /// A field is exactly this.
    Is { key: Box<str>, value: ScalarJsonValue },
    /// A list contains exactly this value.
    Contains { key: Box<str>, value: ScalarJsonValue },
    /// A list contains the id of the user whose rules these are.
    ContainsOwner { key: Box<str> },
    /// The event stands in a thread, and the user whose rules these are subscribes to it, or does not (MSC4306).
    Subscribed(bool),
    /// The condition never holds, because this server does not know its kind or its rule is too large.
    Never,
}

impl Condition {
    pub(crate) fn new(condition: &PushCondition, user_id: &UserId) -> Self {
        let is_owner = |text: &str| text == user_id.as_str();
        // Properties of events are looked up by paths that have no escapes but those they need.
        let flat = |key: &str| property_path::join(&property_path::split(key)).into();
        match condition {
            PushCondition::EventMatch(it) if it.key == "content.body" => {
                Self::Says(Glob::of_words(&it.pattern))
            }
            PushCondition::EventMatch(it) if it.key == "room_id" => {
                Self::RoomLike(Glob::of_value(&it.pattern))
            }
            PushCondition::EventMatch(it) if is_owner(&it.pattern) => Self::IsOwner { key: flat(&it.key) },
            PushCondition::EventMatch(it) => {
                Self::Like { key: flat(&it.key), glob: Glob::of_value(&it.pattern) }
            }
            #[expect(deprecated, reason = "clients still have rules with it")]
            PushCondition::ContainsDisplayName => Self::SaysOwnersName,
            PushCondition::RoomMemberCount(it) => Self::Joined(it.is),
            PushCondition::SenderNotificationPermission(it) => Self::MayNotify(it.key.clone()),
            PushCondition::EventPropertyIs(it) => Self::Is { key: flat(&it.key), value: it.value.clone() },
            PushCondition::EventPropertyContains(it) if it.value.as_str().is_some_and(is_owner) => {
                Self::ContainsOwner { key: flat(&it.key) }
            }
            PushCondition::EventPropertyContains(it) => {
                Self::Contains { key: flat(&it.key), value: it.value.clone() }
            }
            PushCondition::ThreadSubscription(it) => Self::Subscribed(it.subscribed),
            // The specification says that a condition of an unknown kind matches nothing.
            _ => Self::Never,
        }
    }

    /// The answer of a condition on the room's id; none for a condition that depends on the event.
    pub(crate) fn for_room(&self, room_id: &str) -> Option<bool> {
        match self {
            Self::InRoom(id) => Some(**id == *room_id),
            // Room ids are short, so this cannot run out of steps that matter.
            Self::RoomLike(glob) => Some(glob.is_value(room_id, &mut Steps::new(u64::MAX)).unwrap_or(false)),
            _ => None,
        }
    }

    /// Whether an event meets the condition. One on the room's id counts as met, for [`Condition::for_room`] has answered it.
    pub(crate) fn holds<R: Read + ?Sized>(
        &self,
        scene: &Scene<'_, R>,
        owner: &Owner<'_>,
        steps: &mut Steps,
    ) -> Result<bool, Halt> {
        Ok(match self {
            Condition::InRoom(_) | Condition::RoomLike(_) => true,
            Condition::Never => false,
            Condition::Subscribed(subscribed) => owner.subscribed == Some(*subscribed),
            Condition::Like { key, glob } => match scene.text(key) {
                Some(value) => glob.is_value(value, steps)?,
                None => false,
            },
            Condition::Says(glob) => match scene.body(steps)? {
                Some(body) => glob.is_in(body, steps)?,
                None => false,
            },
            Condition::IsOwner { key } => {
                scene.text(key).is_some_and(|value| value.eq_ignore_ascii_case(owner.user_id.as_str()))
            }
            Condition::SaysOwnersName => says_owners_name(scene, owner, steps)?,
            Condition::Joined(is) => is.contains(&ruma::UInt::new_saturating(scene.joined()?)),
            Condition::MayNotify(key) => scene.may_notify(key)?,
            Condition::Is { key, value } => match value {
                // The scene knows the room's id even where the event does not name it.
                ScalarJsonValue::String(text) => scene.text(key) == Some(text),
                value => scene.field(key).is_some_and(|field| *field == *value),
            },
            Condition::Contains { key, value } => list(scene.field(key), steps)?.contains(value),
            Condition::ContainsOwner { key } => {
                let owner = owner.user_id.as_str();
                list(scene.field(key), steps)?.iter().any(|value| value.as_str() == Some(owner))
            }
        })
    }

    pub(crate) fn bytes(&self) -> usize {
        let pattern = match self {
            Self::RoomLike(glob) | Self::Says(glob) => glob.bytes(),
            Self::Like { key, glob } => key.len() + glob.bytes(),
            Self::InRoom(text) | Self::IsOwner { key: text } | Self::ContainsOwner { key: text } => {
                text.len()
            }
            Self::Is { key, value } | Self::Contains { key, value } => {
                key.len() + value.as_str().map_or(0, str::len)
            }
            Self::SaysOwnersName
            | Self::Joined(_)
            | Self::MayNotify(_)
            | Self::Subscribed(_)
            | Self::Never => 0,
        };
        pattern + size_of::<Self>()
    }
}

/// The user whose rules an event is judged by, with the user's name in the room once a rule asked for it.
pub(crate) struct Owner<'a> {
    user_id: &'a UserId,
    name: OnceCell<Glob>,
    subscribed: Option<bool>,
}

impl<'a> Owner<'a> {
    pub(crate) fn new(user_id: &'a UserId) -> Self {
        Self { user_id, name: OnceCell::new(), subscribed: None }
    }

    /// Whether the user subscribes to the thread of the event, if that is known.
    pub(crate) fn is_subscribed(&self) -> Option<bool> {
        self.subscribed
    }

    /// Says of the events that are judged next whether the user subscribes to their thread; `None` for events outside threads.
    pub(crate) fn set_subscribed(&mut self, subscribed: Option<bool>) {
        self.subscribed = subscribed;
    }

    pub(crate) fn user_id(&self) -> &UserId {
        self.user_id
    }
}

/// The reason why an event could not be judged.
#[derive(Debug)]
pub(crate) enum Halt {
    /// The store failed while something was looked up.
    Fault(Fault),
    /// The steps were used up before the answer was known.
    OutOfSteps,
}

impl From<Fault> for Halt {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl From<OutOfSteps> for Halt {
    fn from(_: OutOfSteps) -> Self {
        Self::OutOfSteps
    }
}

fn list<'f>(
    field: Option<&'f FlattenedJsonValue>,
    steps: &mut Steps,
) -> Result<&'f [ScalarJsonValue], OutOfSteps> {
    let list = field.and_then(FlattenedJsonValue::as_array).unwrap_or_default();
    steps.take(list.len())?;
    Ok(list)
}

fn says_owners_name<R: Read + ?Sized>(
    scene: &Scene<'_, R>,
    owner: &Owner<'_>,
    steps: &mut Steps,
) -> Result<bool, Halt> {
    let Some(body) = scene.body(steps)? else { return Ok(false) };
    let glob = match owner.name.get() {
        Some(known) => known,
        None => {
            let name = scene.name_of(owner.user_id)?;
            owner.name.get_or_init(|| Glob::of_literal_words(&name))
        }
    };
    Ok(glob.is_in(body, steps)?)
}
