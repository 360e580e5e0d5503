//! Push rules are compiled once; then they answer which of them can hold in a room, and which one an event meets first.
//!
//! Compiling bounds what rules can cost: patterns become automata of a bounded size ([`Glob`]), and judging an event takes
//! a bounded number of steps ([`Steps`]), for rules are made by one user and judged at the cost of the server.

use std::sync::Arc;

use ruma::{
    UserId,
    push::{Action, AnyPushRuleRef, Ruleset, ScalarJsonValue, SoundTweakValue},
};
use serde_json::Value;

use crate::{
    json::JsonText,
    push::{
        condition::{Condition, Halt, Owner},
        glob::{Glob, Steps},
        scene::Scene,
    },
    schema::event_types::{ENCRYPTED, MESSAGE},
    schema::push::{Outcome, Sound},
    store::Read,
};

/// A user's own rules take about this many bytes of memory at most, once compiled; rules beyond that match nothing.
pub(crate) const COMPILED_BYTES_MAX: usize = 512 << 10;
/// Asking a condition costs at least this many steps, whatever it says.
const CONDITION_STEPS: usize = 4;

/// The rules of one user that are on, in the order in which they are tried.
#[derive(Debug)]
pub(crate) struct Compiled {
    rules: Vec<Rule>,
    bytes: usize,
}

/// One rule of a user that is on.
#[derive(Debug)]
pub(crate) struct Rule {
    /// The id of the rule, which tells people why they are notified.
    pub(crate) id: String,
    conditions: Vec<Condition>,
    /// The actions as the user wrote them: a gateway is told the tweaks among them. They are kept as JSON, because values that this server
    /// does not know take many times the memory of their text.
    pub(crate) actions: Arc<JsonText>,
    /// The effect of the actions on counts.
    pub(crate) outcome: Outcome,
}

impl Rule {
    fn asks_for_threads(&self) -> bool {
        self.conditions.iter().any(|condition| matches!(condition, Condition::Subscribed(_)))
    }
}

/// The way in which rules treat events of threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Threads {
    /// They treat them as any other event.
    AsOthers,
    /// A thread counts for those who subscribe to it, and only mentions do for others: the server's own rules, unchanged.
    BySubscription,
    /// They treat them in another way.
    Otherwise,
}

impl Compiled {
    /// Compiles the rules of a user.
    pub(crate) fn new(rules: &Ruleset, user_id: &UserId) -> Self {
        let mut compiled = Self { rules: Vec::new(), bytes: 0 };
        let mut own_bytes = 0;
        for rule in rules.iter().filter(|rule| rule.enabled()) {
            let mut conditions = conditions_of(rule, user_id);
            let bytes = bytes_of(rule, &conditions);
            // The server's own rules are few and small, and they hold whatever rules the user has.
            let after = if rule.is_server_default() { 0 } else { own_bytes + bytes };
            if after > COMPILED_BYTES_MAX {
                tracing::debug!(%user_id, rule = rule.rule_id(), "a push rule is left out: the user's rules are too large together");
                conditions = vec![Condition::Never];
                compiled.bytes += size_of::<Rule>() + rule.rule_id().len() + actions_of(rule).as_str().len();
            } else {
                own_bytes = own_bytes.max(after);
                compiled.bytes += bytes;
            }
            let (actions, outcome) = (Arc::new(actions_of(rule)), outcome_of(rule.actions()));
            compiled.rules.push(Rule { id: rule.rule_id().to_owned(), conditions, actions, outcome });
        }
        compiled
    }

    /// Whether any rule asks for subscriptions to threads.
    pub(crate) fn ask_for_threads(&self) -> bool {
        self.rules.iter().any(Rule::asks_for_threads)
    }

    /// About how many bytes the rules take in memory.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// About how many bytes a user's own rules that are on take in memory. Only as many as [`COMPILED_BYTES_MAX`] are judged.
    pub(crate) fn size_of_own(rules: &Ruleset, user_id: &UserId) -> usize {
        let own = rules.iter().filter(|rule| rule.enabled() && !rule.is_server_default());
        own.map(|rule| bytes_of(rule, &conditions_of(rule, user_id))).sum()
    }

    /// All rules, for rule sets in which no rule names a room.
    pub(crate) fn everywhere(&self) -> Local<'_> {
        Local(self.rules.iter().collect())
    }

    /// The rules that can be met in this room.
    pub(crate) fn in_room(&self, room_id: &str) -> Local<'_> {
        let can_hold = |condition: &Condition| {
            condition != &Condition::Never && condition.for_room(room_id).unwrap_or(true)
        };
        Local(self.rules.iter().filter(|rule| rule.conditions.iter().all(can_hold)).collect())
    }
}

/// About how many bytes a compiled rule takes in memory.
fn bytes_of(rule: AnyPushRuleRef<'_>, conditions: &[Condition]) -> usize {
    let texts = rule.rule_id().len() + actions_of(rule).as_str().len();
    conditions.iter().map(Condition::bytes).sum::<usize>() + size_of::<Rule>() + texts
}

fn actions_of(rule: AnyPushRuleRef<'_>) -> JsonText {
    let actions = rule.actions().iter().filter_map(|action| serde_json::to_value(action).ok()).collect();
    JsonText::from(&Value::Array(actions))
}

fn conditions_of(rule: AnyPushRuleRef<'_>, user_id: &UserId) -> Vec<Condition> {
    match rule {
        AnyPushRuleRef::Override(rule)
        | AnyPushRuleRef::PostContent(rule)
        | AnyPushRuleRef::Underride(rule) => {
            rule.conditions.iter().map(|condition| Condition::new(condition, user_id)).collect()
        }
        AnyPushRuleRef::Content(rule) => vec![Condition::Says(Glob::of_words(&rule.pattern))],
        AnyPushRuleRef::Room(rule) => vec![Condition::InRoom(rule.rule_id.as_str().into())],
        AnyPushRuleRef::Sender(rule) => {
            let value = ScalarJsonValue::String(rule.rule_id.to_string());
            vec![Condition::Is { key: "sender".into(), value }]
        }
        // Rules of a kind that this server does not know match nothing.
        _ => vec![Condition::Never],
    }
}

/// The effect of actions on counts. A highlight or sound counts only together with a notification.
pub(crate) fn outcome_of(actions: &[Action]) -> Outcome {
    let notify = actions.iter().any(Action::should_notify);
    let sound = match actions.iter().find_map(Action::sound) {
        Some(_) if !notify => Sound::None,
        None => Sound::None,
        Some(SoundTweakValue::Default) => Sound::Default,
        Some(sound) if sound.as_str() == "ring" => Sound::Ring,
        Some(_) => Sound::Other,
    };
    Outcome { notify, highlight: notify && actions.iter().any(Action::is_highlight), sound }
}

/// The rules of a user that events of one room can meet: their conditions on the room's id are known to hold.
#[derive(Clone, Debug)]
pub(crate) struct Local<'c>(Vec<&'c Rule>);

/// The conditions of rules, with whether they notify and highlight. Rules with equal essence have the same effect on counts.
type Essence<'l> = Vec<(Vec<&'l Condition>, bool, bool)>;

impl<'c> Local<'c> {
    /// The rule that an event meets first; none if it meets none, or if the user sent the event.
    pub(crate) fn judge<R: Read + ?Sized>(
        &self,
        scene: &Scene<'_, R>,
        owner: &Owner<'_>,
        steps: &mut Steps,
    ) -> Result<Option<&'c Rule>, Halt> {
        if scene.sender() == Some(owner.user_id().as_str()) {
            return Ok(None);
        }
        'rules: for rule in &self.0 {
            for condition in &rule.conditions {
                steps.take(CONDITION_STEPS)?;
                if !condition.holds(scene, owner, steps)? {
                    continue 'rules;
                }
            }
            return Ok(Some(rule));
        }
        Ok(None)
    }

    /// These rules without those that ask for subscriptions to threads, and the way in which they treat threads.
    pub(crate) fn apart_from_threads(&self) -> (Self, Threads) {
        let (threads, others): (Vec<&Rule>, Vec<&Rule>) =
            self.0.iter().partition(|rule| rule.asks_for_threads());
        let way = match threads.as_slice() {
            [] => Threads::AsOthers,
            [silent, loud]
                if silent.conditions == [Condition::Subscribed(false)]
                    && loud.conditions == [Condition::Subscribed(true)]
                    && !silent.outcome.notify
                    && loud.outcome.notify
                    && !loud.outcome.highlight =>
            {
                Threads::BySubscription
            }
            _ => Threads::Otherwise,
        };
        (Self(others), way)
    }

    /// Whether both sets have the same effect on counts, whatever happens in the room.
    pub(crate) fn counts_like(&self, other: &Local<'_>) -> bool {
        self.essence() == other.essence()
    }

    /// Whether nothing that happens in the room can notify.
    pub(crate) fn is_silent(&self) -> bool {
        self.essence().is_empty()
    }

    /// Whether ordinary messages of other people notify: plain ones, or encrypted ones.
    pub(crate) fn wants_messages(&self) -> bool {
        let is_type = |condition: &Condition| match condition {
            Condition::Like { key, glob: Glob::Plain(text) } => {
                &**key == "type" && matches!(&**text, MESSAGE | ENCRYPTED)
            }
            _ => false,
        };
        self.essence()
            .iter()
            .any(|(conditions, notify, _)| *notify && conditions.iter().all(|it| is_type(it)))
    }

    fn essence(&self) -> Essence<'_> {
        let mut essence = Essence::new();
        for rule in &self.0 {
            let asks_event =
                |condition: &&Condition| !matches!(condition, Condition::InRoom(_) | Condition::RoomLike(_));
            let conditions: Vec<_> = rule.conditions.iter().filter(asks_event).collect();
            let is_last = conditions.is_empty();
            essence.push((conditions, rule.outcome.notify, rule.outcome.highlight));
            if is_last {
                break;
            }
        }
        // A silent rule at the end is like no rule at all, so it makes no difference between two sets.
        while essence.pop_if(|(_, notify, _)| !*notify).is_some() {}
        essence
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use futures_util::FutureExt;
    use proptest::prelude::*;
    use ruma::{
        push::{
            ConditionalPushRule, ConditionalPushRuleInit, EventMatchConditionData, PatternedPushRule,
            PatternedPushRuleInit, PushCondition, PushConditionRoomCtx,
        },
        room_id,
        serde::Raw,
        uint, user_id,
    };
    use serde_json::json;

    use super::*;
    use crate::{
        ids::Order,
        push::defaults,
        schema::rooms::{Resident, RoomRow},
        store::{Durability, Engine, Store, engine::Memory},
    };

    /// The row of a room with two members, which is not in the store.
    pub(crate) fn a_room() -> RoomRow {
        RoomRow {
            id: room_id!("!r:x").to_owned(),
            version: 11,
            resident: Resident::Yes,
            tip: Order::MIN,
            state_tip: Order::MIN,
            next_event: 0,
            next_key: 0,
            next_side: 0,
            heads: Vec::new(),
            apart: Vec::new(),
            joined: 2,
            invited: 0,
            partial: None,
            filled_at: None,
            earlier: Vec::new(),
        }
    }

    pub(crate) fn a_store() -> Store {
        Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap()
    }

    fn content_rule(id: usize, pattern: &str) -> PatternedPushRule {
        PatternedPushRule::from(PatternedPushRuleInit {
            actions: vec![Action::Notify],
            default: false,
            enabled: true,
            rule_id: format!("rule {id}"),
            pattern: pattern.to_owned(),
        })
    }

    fn with_content_rules(patterns: impl IntoIterator<Item = String>) -> Ruleset {
        let mut rules = defaults::default_rules(user_id!("@a:x"));
        for (id, pattern) in patterns.into_iter().enumerate() {
            rules.content.insert(content_rule(id, &pattern));
        }
        rules
    }

    fn message(body: &str) -> String {
        json!({ "type": "m.room.message", "sender": "@b:x", "content": { "msgtype": "m.text", "body": body } })
            .to_string()
    }

    /// How many steps it takes to judge an event.
    fn steps_of(rules: &Ruleset, event: &str) -> u64 {
        const MANY: u64 = 1 << 50;
        let (store, room) = (a_store(), a_room());
        let read = store.snapshot();
        let compiled = Compiled::new(rules, user_id!("@a:x"));
        let scene = Scene::of_text(&*read, &room, event);
        let (owner, mut steps) = (Owner::new(user_id!("@a:x")), Steps::new(MANY));
        compiled.in_room("!r:x").judge(&scene, &owner, &mut steps).unwrap();
        MANY - steps.left()
    }

    #[test]
    fn hostile_rules_cost_a_bounded_number_of_steps() {
        let long = "a".repeat(60_000);
        let fifteen = with_content_rules((0..15).map(|id| format!("*{}{id}", "a".repeat(900))));
        let taken = steps_of(&fifteen, &message(&long));
        // 8,192 letters, and for each rule 15 words of states a letter: a matcher that tries every way takes 800 million.
        assert!(taken < 2_200_000, "{taken}");
        let hundred = with_content_rules((0..110).map(|id| format!("{}{id}", "?a".repeat(30))));
        let taken = steps_of(&hundred, &message("an ordinary message, as people write them"));
        assert!(taken < 10_000, "{taken}");
        assert!(steps_of(&hundred, &message(&long)) < 1_000_000);
    }

    #[test]
    fn rules_that_are_too_large_together_match_nothing() {
        // The pattern names many different letters, because each of them takes memory of its own.
        let letters: String = (0..1_000).filter_map(|letter| char::from_u32(0x4e00 + letter)).collect();
        let rules = with_content_rules((0..40).map(|id| format!("{id}{letters}")));
        assert!(Compiled::size_of_own(&rules, user_id!("@a:x")) > COMPILED_BYTES_MAX);
        assert!(Compiled::new(&rules, user_id!("@a:x")).bytes() < 2 * COMPILED_BYTES_MAX);
        let few = with_content_rules(["word".to_owned()]);
        assert!(Compiled::size_of_own(&few, user_id!("@a:x")) <= COMPILED_BYTES_MAX);
    }

    /// Patterns that ruma matches as the specification says. It takes the second of two wildcards in a row for a letter, and in
    /// some texts it misses a pattern that begins or ends with a space, so such patterns are left out here.
    fn words() -> impl Strategy<Value = String> {
        "[*?]?[ab]{1,2}([*? ][ab]{1,2})?[*?]?"
    }

    fn condition() -> impl Strategy<Value = PushCondition> {
        let like = |key: &str, pattern: String| {
            PushCondition::EventMatch(EventMatchConditionData::new(key.to_owned(), pattern))
        };
        prop_oneof![
            words().prop_map(move |pattern| like("content.body", pattern)),
            "[ab*?]{0,4}".prop_map(move |pattern| like("content.x", pattern)),
            prop_oneof!["m\\.room\\.(message|topic)", "m.*"].prop_map(move |kind| like("type", kind)),
            Just(like("room_id", "!r:x".to_owned())),
            Just(like("room_id", "!?:*".to_owned())),
            Just(like("state_key", "@a:x".to_owned())),
        ]
    }

    fn ruleset() -> impl Strategy<Value = Ruleset> {
        let rule = (proptest::collection::vec(condition(), 0..3), any::<bool>(), any::<bool>());
        let words = proptest::collection::vec(words(), 0..3);
        (proptest::collection::vec(rule, 0..4), words).prop_map(|(overrides, words)| {
            let mut rules = with_content_rules(words);
            for (id, (conditions, notify, enabled)) in overrides.into_iter().enumerate() {
                let actions = if notify { vec![Action::Notify] } else { vec![] };
                let rule_id = format!("own {id}");
                let init = ConditionalPushRuleInit { actions, default: false, enabled, rule_id, conditions };
                rules.override_.shift_insert(0, ConditionalPushRule::from(init));
            }
            rules
        })
    }

    proptest! {
        #[test]
        fn judged_as_ruma_judges(
            rules in ruleset(), body in "[ab ]{0,8}", x in "[abAB]{0,4}", mentions: bool, by_owner: bool,
        ) {
            let owner_id = user_id!("@a:x");
            let sender = if by_owner { "@a:x" } else { "@b:x" };
            let mentioned = if mentions { vec!["@a:x"] } else { vec![] };
            let event = json!({
                "type": "m.room.message", "sender": sender, "room_id": "!r:x",
                "content": { "body": body, "x": x, "m.mentions": { "user_ids": mentioned } },
            })
            .to_string();
            let context =
                PushConditionRoomCtx::new(room_id!("!r:x").to_owned(), uint!(2), owner_id.to_owned(), "A".to_owned());
            let raw: Raw<()> = serde_json::from_str(&event).unwrap();
            let theirs = rules.get_actions(&raw, &context).now_or_never().unwrap();
            let (store, room) = (a_store(), a_room());
            let read = store.snapshot();
            let compiled = Compiled::new(&rules, owner_id);
            let scene = Scene::of_text(&*read, &room, &event);
            let rule =
                compiled.in_room("!r:x").judge(&scene, &Owner::new(owner_id), &mut Steps::new(1 << 40)).unwrap();
            let ours = rule.map(|rule| rule.outcome).unwrap_or_default();
            prop_assert_eq!(ours, outcome_of(theirs));
        }
    }
}
