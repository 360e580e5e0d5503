//! Most users have one of three sets of push rules. An event is judged once for each of these classes, however many users are
//! in it.

use std::sync::LazyLock;

use ruma::{OwnedUserId, UserId, push::ConditionalPushRule};

use crate::{
    push::{
        compiled::{Compiled, Local},
        condition::{Halt, Owner},
        defaults,
        glob::Steps,
        scene::Scene,
    },
    schema::push::{Lane, Outcome, Outcomes},
    store::{Fault, Read},
};

/// Judging an event for a class takes at most this many steps. Our own rules need few, so an event that takes more was made to
/// be costly, and notifies nobody.
const CLASS_STEPS: u64 = 200_000;

/// A set of push rules that many users share; each class has running numbers of its own in a room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The user has the default rules.
    Default,
    /// The user is notified of mentions only.
    Mentions,
    /// The user has the default rules and subscribes to the thread in which an event stands.
    Subscribed,
    /// The user is notified of nothing.
    Muted,
}

impl Class {
    /// The outcome for this class, out of an event's outcomes for all classes.
    pub fn outcome(self, outcomes: Outcomes) -> Outcome {
        match self {
            Self::Default => outcomes.default,
            Self::Mentions => outcomes.mentions,
            Self::Subscribed => outcomes.subscribed,
            Self::Muted => Outcome::default(),
        }
    }

    /// The class whose rules count in this room exactly as these rules do, if there is one.
    pub(crate) fn of(rules: &Local<'_>) -> Option<Self> {
        if rules.is_silent() {
            return Some(Self::Muted);
        }
        let classes = CLASSES.as_ref()?;
        if rules.counts_like(&classes.default.everywhere()) {
            Some(Self::Default)
        } else if rules.counts_like(&classes.mentions.everywhere()) {
            Some(Self::Mentions)
        } else {
            None
        }
    }

    /// The class that comes closest to these rules, for events that would cost too much to judge by the rules themselves.
    pub(crate) fn closest_to(rules: &Local<'_>) -> Self {
        match Self::of(rules) {
            Some(class) => class,
            None if rules.wants_messages() => Self::Default,
            None => Self::Mentions,
        }
    }
}

/// The compiled rules of the classes, for a user id that no event mentions or invites.
static CLASSES: LazyLock<Option<Classes>> = LazyLock::new(|| {
    let nobody = OwnedUserId::try_from("@nobody:nowhere.invalid").ok()?;
    let default = defaults::default_rules(&nobody);
    let mut mentions = default.clone();
    mentions.underride.clear();
    let mut subscribed = mentions.clone();
    let mut of_threads = ConditionalPushRule::subscribed_thread();
    of_threads.conditions.clear();
    subscribed.postcontent.insert(of_threads);
    Some(Classes {
        default: Compiled::new(&default, &nobody),
        mentions: Compiled::new(&mentions, &nobody),
        subscribed: Compiled::new(&subscribed, &nobody),
        nobody,
    })
});

struct Classes {
    nobody: OwnedUserId,
    default: Compiled,
    mentions: Compiled,
    /// The rules for events of a thread to which a user subscribes.
    subscribed: Compiled,
}

/// Judges an event for each class, as for members whom it does not concern in person.
pub(crate) fn judge<R: Read + ?Sized>(scene: &Scene<'_, R>, lane: Lane) -> Result<Outcomes, Fault> {
    let Some(classes) = &*CLASSES else { return Ok(Outcomes::default()) };
    judge_as(classes, (scene, lane), &classes.nobody)
}

/// Judges an event for one member of each class. The outcome differs from that of the other members if the event concerns the
/// user in person: it mentions or invites them.
pub(crate) fn judge_for<R: Read + ?Sized>(
    scene: &Scene<'_, R>,
    lane: Lane,
    user_id: &UserId,
) -> Result<Outcomes, Fault> {
    let Some(classes) = &*CLASSES else { return Ok(Outcomes::default()) };
    judge_as(classes, (scene, lane), user_id)
}

fn judge_as<R: Read + ?Sized>(
    classes: &Classes,
    (scene, lane): (&Scene<'_, R>, Lane),
    user_id: &UserId,
) -> Result<Outcomes, Fault> {
    let owner = Owner::new(user_id);
    let mut steps = Steps::new(CLASS_STEPS);
    let mut outcome = |rules: &Compiled| match rules.everywhere().judge(scene, &owner, &mut steps) {
        Ok(rule) => Ok(rule.map(|rule| rule.outcome).unwrap_or_default()),
        Err(Halt::Fault(fault)) => Err(fault),
        Err(Halt::OutOfSteps) => {
            tracing::debug!(reason = "judging it takes too many steps", "an event notifies nobody");
            Ok(Outcome::default())
        }
    };
    let default = outcome(&classes.default)?;
    // The rules of `Mentions` are some of the default ones, so they notify only where those do.
    let mentions = if default.notify { outcome(&classes.mentions)? } else { Outcome::default() };
    let subscribed = if lane == Lane::MAIN { default } else { outcome(&classes.subscribed)? };
    Ok(Outcomes { default, mentions, subscribed })
}

#[cfg(test)]
mod tests {
    use ruma::{
        push::{
            ConditionalPushRule, ConditionalPushRuleInit, EventMatchConditionData, NewPatternedPushRule,
            NewPushRule, NewSimplePushRule, PushCondition, RuleKind, Ruleset,
        },
        room_id, user_id,
    };
    use serde_json::json;

    use super::*;
    use crate::{
        ids::EventNum,
        push::compiled::tests::{a_room, a_store},
        schema::{push::Sound, rooms::RoomRow},
    };

    fn class_of(rules: &Ruleset, room_id: &str) -> Option<Class> {
        Class::of(&Compiled::new(rules, user_id!("@a:x")).in_room(room_id))
    }

    fn closest_to(rules: &Ruleset) -> Class {
        Class::closest_to(&Compiled::new(rules, user_id!("@a:x")).in_room(ROOM))
    }

    const ROOM: &str = "!r:x";

    #[test]
    fn classes_follow_from_what_clients_write() {
        let default = defaults::default_rules(user_id!("@a:x"));
        assert_eq!(class_of(&default, ROOM), Some(Class::Default));

        let mut mentions = default.clone();
        let rule = NewSimplePushRule::new(room_id!("!r:x").to_owned(), vec![]);
        mentions.insert(NewPushRule::Room(rule), None, None).unwrap();
        assert_eq!(class_of(&mentions, ROOM), Some(Class::Mentions));
        assert_eq!(class_of(&mentions, "!other:x"), Some(Class::Default));
        mentions.set_enabled(RuleKind::Room, ROOM, false).unwrap();
        assert_eq!(class_of(&mentions, ROOM), Some(Class::Default));

        let mut muted = default.clone();
        let condition =
            PushCondition::EventMatch(EventMatchConditionData::new("room_id".into(), ROOM.into()));
        muted.override_.shift_insert(
            0,
            ConditionalPushRule::from(ConditionalPushRuleInit {
                actions: vec![],
                default: false,
                enabled: true,
                rule_id: ROOM.into(),
                conditions: vec![condition],
            }),
        );
        assert_eq!(class_of(&muted, ROOM), Some(Class::Muted));
        assert_eq!(class_of(&muted, "!other:x"), Some(Class::Default));

        let mut off = default.clone();
        off.set_enabled(RuleKind::Override, ".m.rule.master", true).unwrap();
        assert_eq!(class_of(&off, ROOM), Some(Class::Muted));

        let mut quieter = default;
        quieter.set_actions(RuleKind::Underride, ".m.rule.message", vec![]).unwrap();
        assert_eq!(class_of(&quieter, ROOM), None, "rooms of two, encrypted rooms and calls still notify");
        assert_eq!(closest_to(&quieter), Class::Default);
        let word = NewPatternedPushRule::new("w".into(), "word".into(), vec![]);
        quieter.insert(NewPushRule::Content(word), None, None).unwrap();
        for id in [".m.rule.encrypted", ".m.rule.room_one_to_one", ".m.rule.encrypted_room_one_to_one"] {
            quieter.set_enabled(RuleKind::Underride, id, false).unwrap();
        }
        assert_eq!((class_of(&quieter, ROOM), closest_to(&quieter)), (None, Class::Mentions));
    }

    #[test]
    fn what_concerns_a_user_in_person_differs_from_what_it_does_to_the_class() {
        let (store, room) = (a_store(), a_room());
        let read = store.snapshot();
        let a = user_id!("@a:x");
        let loud = Outcome { notify: true, highlight: true, sound: Sound::Default };
        let mention = json!({
            "type": "m.room.message", "sender": "@b:x",
            "content": { "msgtype": "m.text", "body": "x", "m.mentions": { "user_ids": ["@a:x"] } },
        });
        let scene = Scene::of_text(&*read, &room, &mention.to_string());
        let all_loud = Outcomes { default: loud, mentions: loud, subscribed: loud };
        assert_eq!(judge_for(&scene, Lane::MAIN, a).unwrap(), all_loud);
        // The room has two members, and the default rule for such rooms notifies of plain messages with a sound.
        let plain = Outcome { highlight: false, ..loud };
        let expected = Outcomes { default: plain, mentions: Outcome::default(), subscribed: plain };
        assert_eq!(judge(&scene, Lane::MAIN).unwrap(), expected);
        assert_eq!(scene.mentioned().collect::<Vec<_>>(), ["@a:x"]);

        let invite = json!({
            "type": "m.room.member", "sender": "@b:x", "state_key": "@a:x", "content": { "membership": "invite" },
        });
        let scene = Scene::of_text(&*read, &room, &invite.to_string());
        assert_eq!(judge_for(&scene, Lane::MAIN, a).unwrap().default, plain);
        assert_eq!(judge(&scene, Lane::MAIN).unwrap(), Outcomes::default());
        assert_eq!(scene.invited(), Some("@a:x"));
    }

    #[test]
    fn whatever_no_rule_silences_counts_for_those_who_subscribe_to_its_thread() {
        let (store, room) = (a_store(), RoomRow { joined: 3, ..a_room() });
        let read = store.snapshot();
        let thread = Lane::thread(EventNum(5));
        let of = |event_type: &str, content: serde_json::Value, lane| {
            let event = json!({ "type": event_type, "sender": "@b:x", "content": content });
            let judged = judge(&Scene::of_text(&*read, &room, &event.to_string()), lane).unwrap();
            [judged.default, judged.mentions, judged.subscribed]
                .map(|outcome| (outcome.notify, outcome.highlight))
        };
        let (yes, no) = ((true, false), (false, false));
        let text = json!({ "msgtype": "m.text", "body": "x" });
        assert_eq!(of("m.room.message", text.clone(), thread), [yes, no, yes]);
        assert_eq!(of("m.sticker", json!({}), thread), [no, no, yes]);
        assert_eq!(of("m.sticker", json!({}), Lane::MAIN), [no, no, no]);
        let notice = json!({ "msgtype": "m.notice", "body": "x" });
        assert_eq!(of("m.room.message", notice, thread), [no, no, no]);
        let mut to_all = text;
        to_all["m.mentions"] = json!({ "room": true });
        // The sender has not the level to notify all.
        assert_eq!(of("m.room.message", to_all, thread), [yes, no, yes]);
    }
}
