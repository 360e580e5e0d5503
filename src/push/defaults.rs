//! The rules that everybody has: the specification's (client-server API, "Predefined Rules"), and those for polls as today's
//! clients send them (MSC3930, with its unstable names).

use ruma::{
    UserId,
    push::{
        Action, ConditionalPushRule, ConditionalPushRuleInit, EventMatchConditionData, PushCondition,
        RoomMemberCountConditionData, Ruleset, SoundTweakValue, Tweak,
    },
};

/// The rules of a user who has changed none. Those for threads are not among them: see [`add_thread_rules`].
pub fn default_rules(user_id: &UserId) -> Ruleset {
    let mut rules = Ruleset::server_default(user_id);
    rules.postcontent.clear();
    rules.override_.insert(poll_rule("poll_response", "response", false, vec![]));
    let loud = || vec![Action::Notify, Action::SetTweak(Tweak::Sound(SoundTweakValue::Default))];
    rules.underride.extend([
        poll_rule("poll_start_one_to_one", "start", true, loud()),
        poll_rule("poll_start", "start", false, vec![Action::Notify]),
        poll_rule("poll_end_one_to_one", "end", true, loud()),
        poll_rule("poll_end", "end", false, vec![Action::Notify]),
    ]);
    rules
}

/// Adds the rules by which a thread counts for those who subscribe to it (MSC4306), where they are not there. A user has them from
/// their first subscription on (`docs/decisions/thread-rules-begin-with-the-first-subscription.md`).
pub fn add_thread_rules(rules: &mut Ruleset) {
    for rule in [ConditionalPushRule::unsubscribed_thread(), ConditionalPushRule::subscribed_thread()] {
        rules.postcontent.insert(rule);
    }
}

/// A rule for one type of event of polls, in every room or in those of two.
fn poll_rule(id: &str, kind: &str, of_two: bool, actions: Vec<Action>) -> ConditionalPushRule {
    let is_kind = EventMatchConditionData::new("type".to_owned(), format!("org.matrix.msc3381.poll.{kind}"));
    let mut conditions = vec![PushCondition::EventMatch(is_kind)];
    if of_two {
        let two = RoomMemberCountConditionData::new(ruma::uint!(2).into());
        conditions.push(PushCondition::RoomMemberCount(two));
    }
    let rule_id = format!(".org.matrix.msc3930.rule.{id}");
    ConditionalPushRule::from(ConditionalPushRuleInit {
        actions,
        default: true,
        enabled: true,
        rule_id,
        conditions,
    })
}
