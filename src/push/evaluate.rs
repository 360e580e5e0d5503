//! What an event does to counts: by class of rules for the many, one by one for the few whose rules are their own.

use std::sync::LazyLock;

use futures_util::FutureExt;
use ruma::{
    OwnedUserId, UInt,
    events::room::power_levels::{RoomPowerLevels, RoomPowerLevelsEventContent},
    push::{
        Action, FlattenedJson, PushCondition, PushConditionPowerLevelsCtx, PushConditionRoomCtx, Ruleset,
    },
    serde::Raw,
};
use serde_json::value::RawValue;

use crate::{
    ids::RoomNum,
    push::defaults,
    rooms::{self, event::Stored},
    schema::{
        push::{Outcome, Outcomes},
        rooms::RoomRow,
    },
    store::{Fault, Read},
};

/// Which of a room's running numbers hold for a user. What a user's own rules say beyond that stands in rows of the
/// user's own, so that a class need not fit exactly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The default rules.
    Default,
    /// Mentions only.
    Mentions,
    /// Nothing at all.
    Muted,
}

impl Class {
    /// What an event does to whoever is of this class.
    pub fn outcome(self, outcomes: Outcomes) -> Outcome {
        match self {
            Self::Default => outcomes.default,
            Self::Mentions => outcomes.mentions,
            Self::Muted => Outcome::default(),
        }
    }

    /// The class that fits these rules best in this room.
    pub fn of(rules: &Ruleset, room_id: &str) -> Self {
        let silent = |actions: &[Action]| !actions.iter().any(Action::should_notify);
        let is_room = |condition: &PushCondition| match condition {
            PushCondition::EventMatch(condition) => {
                condition.key == "room_id" && condition.pattern == room_id
            }
            _ => false,
        };
        let mutes = rules.override_.iter().any(|rule| {
            let everywhere = rule.rule_id == ".m.rule.master";
            rule.enabled
                && silent(&rule.actions)
                && (everywhere || (!rule.conditions.is_empty() && rule.conditions.iter().all(is_room)))
        });
        if mutes {
            return Self::Muted;
        }
        let hushed = rules.room.get(room_id).is_some_and(|rule| rule.enabled && silent(&rule.actions));
        let is_off =
            |id: &str| rules.underride.get(id).is_none_or(|rule| !rule.enabled || silent(&rule.actions));
        if hushed || (is_off(".m.rule.message") && is_off(".m.rule.encrypted")) {
            return Self::Mentions;
        }
        Self::Default
    }
}

/// Somebody with the default rules whom no event concerns in person.
static NOBODY: LazyLock<Option<Nobody>> = LazyLock::new(|| {
    let user_id = OwnedUserId::try_from("@nobody:nowhere.invalid").ok()?;
    let default = defaults::default_rules(&user_id);
    let mut mentions = default.clone();
    mentions.underride.clear();
    Some(Nobody { user_id, default, mentions })
});

struct Nobody {
    user_id: OwnedUserId,
    default: Ruleset,
    mentions: Ruleset,
}

/// An event and the room it stands in, as rules see them.
pub(crate) struct Scene<'a> {
    room: &'a RoomRow,
    event: FlattenedJson,
    power_levels: Option<PushConditionPowerLevelsCtx>,
}

impl<'a> Scene<'a> {
    /// An event about to be stored. `None` if its bytes are not an event's.
    pub(crate) fn new(room: &'a RoomRow, stored: &Stored) -> Option<Self> {
        let json = String::from_utf8(stored.row.json.to_vec()).ok()?;
        let raw: Raw<()> = Raw::from_json(RawValue::from_string(json).ok()?);
        Some(Self { room, event: FlattenedJson::from_raw(&raw), power_levels: None })
    }

    /// A string field, by its path in push rules.
    pub(crate) fn text(&self, path: &str) -> Option<&str> {
        self.event.get_str(path)
    }

    /// Whom the event mentions.
    pub(crate) fn mentioned(&self) -> impl Iterator<Item = &str> {
        let users = self.event.get(r"content.m\.mentions.user_ids").and_then(|users| users.as_array());
        users.unwrap_or_default().iter().filter_map(|user| user.as_str())
    }

    /// Whether it mentions the whole room.
    pub(crate) fn mentions_room(&self) -> bool {
        self.event.get(r"content.m\.mentions.room").and_then(|room| room.as_bool()).unwrap_or(false)
    }

    /// Reads the room's power levels, which few rules ask for.
    pub(crate) fn load_power_levels(
        &mut self,
        read: &(impl Read + ?Sized),
        room: RoomNum,
    ) -> Result<(), Fault> {
        if self.power_levels.is_some() {
            return Ok(());
        }
        let rules = &rooms::rules(self.room)?.authorization;
        let levels = rooms::find_state(read, room, "m.room.power_levels", "")?.and_then(|stored| {
            serde_json::from_str::<RoomPowerLevelsEventContent>(stored.row.content()).ok()
        });
        let create = rooms::find_state(read, room, "m.room.create", "")?;
        let creators = create.map(|create| creators(&create)).unwrap_or_default();
        self.power_levels = Some(RoomPowerLevels::new(levels.into(), rules, creators).into());
        Ok(())
    }

    /// What the event does to each class.
    pub(crate) fn outcomes(&self) -> Outcomes {
        let Some(nobody) = &*NOBODY else { return Outcomes::default() };
        let default = self.outcome(&nobody.default, &nobody.user_id, "");
        // Fewer rules cannot say more.
        let mentions = if default.notify {
            self.outcome(&nobody.mentions, &nobody.user_id, "")
        } else {
            Outcome::default()
        };
        Outcomes { default, mentions }
    }

    /// What the event does to a user with these rules.
    pub(crate) fn outcome(&self, rules: &Ruleset, user_id: &OwnedUserId, display_name: &str) -> Outcome {
        if self.event.get_str("sender") == Some(user_id.as_str()) {
            return Outcome::default();
        }
        let member_count = UInt::from(self.room.joined);
        let mut context = PushConditionRoomCtx::new(
            self.room.id.clone(),
            member_count,
            user_id.clone(),
            display_name.to_owned(),
        );
        context.power_levels.clone_from(&self.power_levels);
        // Nothing here waits: ruma's conditions wait only where threads are subscribed to.
        let rule =
            rules.iter().find(|rule| rule.applies(&self.event, &context).now_or_never().unwrap_or(false));
        let notify = rule.is_some_and(|rule| rule.triggers_notification());
        Outcome { notify, highlight: notify && rule.is_some_and(|rule| rule.triggers_highlight()) }
    }
}

fn creators(create: &Stored) -> Vec<OwnedUserId> {
    #[derive(Default, serde::Deserialize)]
    struct Content {
        #[serde(default)]
        additional_creators: Vec<OwnedUserId>,
    }
    let content: Content = serde_json::from_str(create.row.content()).unwrap_or_default();
    let sender = OwnedUserId::try_from(create.row.sender().as_ref()).ok();
    content.additional_creators.into_iter().chain(sender).collect()
}

#[cfg(test)]
mod tests {
    use ruma::{
        push::{
            ConditionalPushRule, ConditionalPushRuleInit, EventMatchConditionData, NewPushRule,
            NewSimplePushRule, RuleKind,
        },
        room_id, user_id,
    };

    use super::*;

    const ROOM: &str = "!r:x";

    #[test]
    fn classes_follow_from_what_clients_write() {
        let default = defaults::default_rules(user_id!("@a:x"));
        assert_eq!(Class::of(&default, ROOM), Class::Default);

        let mut mentions = default.clone();
        let rule = NewSimplePushRule::new(room_id!("!r:x").to_owned(), vec![]);
        mentions.insert(NewPushRule::Room(rule), None, None).unwrap();
        assert_eq!(Class::of(&mentions, ROOM), Class::Mentions);
        assert_eq!(Class::of(&mentions, "!other:x"), Class::Default);
        mentions.set_enabled(RuleKind::Room, ROOM, false).unwrap();
        assert_eq!(Class::of(&mentions, ROOM), Class::Default);

        let mut muted = default.clone();
        let condition =
            PushCondition::EventMatch(EventMatchConditionData::new("room_id".into(), ROOM.into()));
        muted.override_.insert(ConditionalPushRule::from(ConditionalPushRuleInit {
            actions: vec![],
            default: false,
            enabled: true,
            rule_id: ROOM.into(),
            conditions: vec![condition],
        }));
        assert_eq!(Class::of(&muted, ROOM), Class::Muted);
        assert_eq!(Class::of(&muted, "!other:x"), Class::Default);

        let mut off = default.clone();
        off.set_enabled(RuleKind::Override, ".m.rule.master", true).unwrap();
        assert_eq!(Class::of(&off, ROOM), Class::Muted);

        let mut quiet = default;
        quiet.set_actions(RuleKind::Underride, ".m.rule.message", vec![]).unwrap();
        quiet.set_enabled(RuleKind::Underride, ".m.rule.encrypted", false).unwrap();
        assert_eq!(Class::of(&quiet, ROOM), Class::Mentions);
    }
}
