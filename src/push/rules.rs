//! The push rules of a user. A user who has changed none has no row, and gets the server's default rules.
//!
//! Specification: client-server API, "Push Rules".

use std::borrow::Cow;

use ruma::{
    UserId,
    api::error::ErrorKind,
    push::{
        Action, AnyPushRuleRef, InsertPushRuleError, NewPushRule, PushCondition, RemovePushRuleError,
        RuleKind, Ruleset,
    },
};

use crate::{
    error::{Error, Refusal, Result},
    ids::{Position, UserNum},
    push::{
        compiled::{COMPILED_BYTES_MAX, Compiled},
        defaults,
    },
    schema,
    schema::accounts::WrittenRow,
    store::{Batch, Fault, LogEntry, Read},
};

/// The rules of a user have at most this many bytes of JSON together.
const RULES_BYTES_MAX: usize = 128 << 10;
/// A user has at most this many rules, because each event may be compared with all of them.
const RULES_MAX: usize = 500;
const CONDITIONS_MAX: usize = 20;
const ACTIONS_MAX: usize = 20;
const RULE_ID_BYTES_MAX: usize = 255;
const PATTERN_BYTES_MAX: usize = 1024;
/// The name of the kind of rules between those of content and of rooms (MSC4306).
const POSTCONTENT: &str = "postcontent";

/// The beginning of a stored rule's id in the list of rooms, where what follows is no room's id: only such ids are stored there. A rule
/// of another id matches nothing, but clients may set one, as the specification's own example does.
const NO_ROOM: &str = "!\u{1}";

/// The id by which a rule is stored, from the one that its user gave it.
pub fn stored_id<'i>(kind: &RuleKind, id: &'i str) -> Cow<'i, str> {
    let is_stored_as_is = match id.as_bytes().first() {
        Some(b'!') => !id.starts_with(NO_ROOM),
        // The ids of the server's own rules.
        Some(b'.') => true,
        _ => false,
    };
    if *kind != RuleKind::Room || is_stored_as_is {
        return Cow::Borrowed(id);
    }
    Cow::Owned(format!("{NO_ROOM}{id}"))
}

/// The id that a user gave a rule of this kind, from the one by which it is stored.
pub fn given_id<'i>(kind: &RuleKind, id: &'i str) -> &'i str {
    if *kind == RuleKind::Room { id.strip_prefix(NO_ROOM).unwrap_or(id) } else { id }
}

/// The rules of this user, with the server's default rules among them.
pub fn rules_of(read: &(impl Read + ?Sized), user: UserNum, user_id: &UserId) -> Result<Ruleset, Fault> {
    Ok(find_own_rules(read, user, user_id)?.unwrap_or_else(|| defaults::default_rules(user_id)))
}

/// The rules of this user, if the user ever changed any. Default rules that are newer than the change are among them.
pub fn find_own_rules(
    read: &(impl Read + ?Sized),
    user: UserNum,
    user_id: &UserId,
) -> Result<Option<Ruleset>, Fault> {
    let Some(row) = schema::PUSH_RULES.get(read, user)? else { return Ok(None) };
    decode(&row, user_id).map(Some)
}

pub(super) fn decode(row: &WrittenRow, user_id: &UserId) -> Result<Ruleset, Fault> {
    let damaged =
        |_| Fault::CorruptRow { table: "PUSH_RULES", why: "the rules are not the JSON they should be" };
    let mut rules: Ruleset = serde_json::from_slice(&row.content).map_err(damaged)?;
    rules.update_with_server_default(defaults::default_rules(user_id));
    Ok(rules)
}

/// The rules as clients see them: kinds without a rule are empty lists, which some clients rely on.
pub fn as_json(rules: &Ruleset) -> Result<serde_json::Value> {
    let mut json = serde_json::to_value(rules).map_err(|error| Error::broken(error.to_string()))?;
    if let Some(kinds) = json.as_object_mut() {
        for kind in ["override", "content", "room", "sender", "underride"] {
            kinds.entry(kind).or_insert_with(|| serde_json::Value::Array(Vec::new()));
        }
        let rooms = kinds.get_mut("room").and_then(serde_json::Value::as_array_mut);
        for rule in rooms.into_iter().flatten() {
            if let Some(serde_json::Value::String(id)) = rule.get_mut("rule_id") {
                *id = given_id(&RuleKind::Room, id).to_owned();
            }
        }
    }
    Ok(json)
}

/// The rules of one kind as clients see them. Errors: 400 for an unknown kind.
pub fn of_kind_as_json(rules: &Ruleset, kind: RuleKind) -> Result<serde_json::Value> {
    let name = if require_kind(kind.clone())? == RuleKind::PostContent { POSTCONTENT } else { kind.as_str() };
    let mut rules = as_json(rules)?;
    let of_kind = rules.get_mut(name).map(serde_json::Value::take);
    Ok(of_kind.unwrap_or_else(|| serde_json::Value::Array(Vec::new())))
}

/// The position at which the rules were last changed; zero if they never were.
pub fn changed_at(read: &(impl Read + ?Sized), user: UserNum) -> Result<Position, Fault> {
    Ok(schema::PUSH_RULES.get(read, user)?.map_or(Position::ZERO, |row| row.position))
}

/// Changes the rules in this batch, and claims a position. The batch is accepted only if nobody else changes the rules
/// meanwhile; on a conflict, the caller makes a new batch and calls this again. Errors: 413 for a change that adds to rules that have
/// reached a bound; one that does not add is never refused, so that there is always a way back.
pub fn change(
    batch: &mut Batch,
    user: UserNum,
    user_id: &UserId,
    change: impl FnOnce(&mut Ruleset) -> Result<()>,
) -> Result<()> {
    let row = schema::PUSH_RULES.get(batch, user)?;
    let mut rules = match &row {
        Some(row) => decode(row, user_id)?,
        None => defaults::default_rules(user_id),
    };
    let before = Size::of(&rules, &encode(&rules)?, user_id);
    change(&mut rules)?;
    let json = encode(&rules)?;
    let after = Size::of(&rules, &json, user_id);
    let grows_past = |measure: fn(&Size) -> usize, most: usize| measure(&after) > most.max(measure(&before));
    if grows_past(|size| size.bytes, RULES_BYTES_MAX) || grows_past(|size| size.count, RULES_MAX) {
        let most = format!("A user has at most {RULES_MAX} push rules, and {RULES_BYTES_MAX} bytes of them.");
        return Err(Refusal::too_large(most).into());
    }
    if grows_past(|size| size.compiled, COMPILED_BYTES_MAX) {
        return Err(Refusal::too_large(
            "The patterns of your push rules are too long together; remove or shorten some.",
        )
        .into());
    }
    put(batch, user, row.as_ref(), json);
    Ok(())
}

fn encode(rules: &Ruleset) -> Result<Vec<u8>> {
    serde_json::to_vec(rules).map_err(|error| Error::broken(error.to_string()))
}

/// The cost of a user's rules. The server adds rules of its own past every bound, so that only changes that make rules larger are
/// held against the bounds.
struct Size {
    /// The bytes of their JSON, where a rule that is off takes no more than one that is on.
    bytes: usize,
    /// The number of rules.
    count: usize,
    /// About the bytes that they take in memory, to be judged.
    compiled: usize,
}

impl Size {
    fn of(rules: &Ruleset, json: &[u8], user_id: &UserId) -> Self {
        // The word "false" is a letter longer than "true".
        let off = rules.iter().filter(|rule| !rule.enabled()).count();
        let (bytes, count) = (json.len().saturating_sub(off), rules.iter().count());
        Self { bytes, count, compiled: Compiled::size_of_own(rules, user_id) }
    }
}

/// Writes the rules of a user as they are from here on.
fn put(batch: &mut Batch, user: UserNum, before: Option<&WrittenRow>, json: Vec<u8>) {
    match before {
        Some(row) => schema::PUSH_RULES.expect_value(batch, user, row),
        None => schema::PUSH_RULES.expect_absent(batch, user),
    }
    let position = batch.position(&LogEntry::AccountData { user });
    schema::PUSH_RULES.put(batch, user, &WrittenRow { position, content: json.into() });
}

/// Adds the rules by which threads count for those who subscribe to them (MSC4306), for a user who subscribes to one. Nothing is
/// written where the user has them. They are the server's own, so that they fit whatever rules the user has.
pub fn follow_threads(batch: &mut Batch, user: UserNum, user_id: &UserId) -> Result<()> {
    let row = schema::PUSH_RULES.get(batch, user)?;
    let mut rules = match &row {
        Some(row) => decode(row, user_id)?,
        None => defaults::default_rules(user_id),
    };
    if !rules.postcontent.is_empty() {
        return Ok(());
    }
    defaults::add_thread_rules(&mut rules);
    let json = encode(&rules)?;
    put(batch, user, row.as_ref(), json);
    Ok(())
}

/// Deletes the rules, for an account that ends.
pub fn delete_all(batch: &mut Batch, user: UserNum) {
    schema::PUSH_RULES.delete(batch, user);
}

/// Adds a rule or replaces the one of its kind and id, and moves it as asked.
/// Errors: 400 for the id of a default rule, an invalid id, or a place that does not exist. The rules may be changed in part
/// then, so the caller drops them.
pub fn insert(
    rules: &mut Ruleset,
    rule: NewPushRule,
    after: Option<&str>,
    before: Option<&str>,
) -> Result<()> {
    check(&rule)?;
    let (kind, id) = (rule.kind(), rule.rule_id().to_owned());
    let [after, before] = [after, before].map(|id| id.map(|id| stored_id(&kind, id)));
    let (after, before) = (after.as_deref(), before.as_deref());
    if [after, before].contains(&Some(id.as_str())) {
        return Err(Refusal::invalid_param("A rule cannot be placed before or after itself.").into());
    }
    // ruma moves a rule that is already there by an index that counts the rule itself, and panics at the end of the list.
    // So a rule that gets another place is removed first; if it was off, it is switched off again.
    let was_enabled = match after.or(before) {
        Some(_) => {
            rules.get(kind.clone(), &id).filter(|rule| !rule.is_server_default()).map(|rule| rule.enabled())
        }
        None => None,
    };
    if was_enabled.is_some() {
        rules.remove(kind.clone(), &id).map_err(|_| no_such_rule())?;
    }
    place(rules, rule, after, before)?;
    if let Some(enabled) = was_enabled {
        set_enabled(rules, kind.clone(), given_id(&kind, &id), enabled)?;
    }
    Ok(())
}

fn place(rules: &mut Ruleset, rule: NewPushRule, after: Option<&str>, before: Option<&str>) -> Result<()> {
    rules.insert(rule, after, before).map_err(|why| {
        let message = match why {
            InsertPushRuleError::ServerDefaultRuleId => {
                "Ids that begin with a dot are for the server's own rules."
            }
            InsertPushRuleError::InvalidRuleId => "`ruleId` cannot contain / or \\.",
            InsertPushRuleError::RelativeToServerDefaultRule => {
                "A rule cannot be placed before or after one of the server's own rules."
            }
            InsertPushRuleError::UnknownRuleId => "`before` or `after` names a rule that does not exist.",
            InsertPushRuleError::BeforeHigherThanAfter => {
                "The rule in `before` comes earlier than the rule in `after`."
            }
            _ => "This rule cannot be added.",
        };
        Refusal::invalid_param(message).into()
    })
}

fn check(rule: &NewPushRule) -> Result<()> {
    let (actions, conditions, pattern): (&[Action], &[PushCondition], &str) = match rule {
        NewPushRule::Override(rule) | NewPushRule::Underride(rule) => (&rule.actions, &rule.conditions, ""),
        NewPushRule::Content(rule) => (&rule.actions, &[], &rule.pattern),
        NewPushRule::Room(rule) => (&rule.actions, &[], ""),
        NewPushRule::Sender(rule) => (&rule.actions, &[], ""),
        _ => return Err(no_such_kind().into()),
    };
    check_actions(actions)?;
    if rule.rule_id().len() > RULE_ID_BYTES_MAX || pattern.len() > PATTERN_BYTES_MAX {
        return Err(Refusal::invalid_param(
            "A rule's id has at most 255 bytes, and its pattern at most 1,024.",
        )
        .into());
    }
    let too_long = conditions.iter().any(|condition| match condition {
        PushCondition::EventMatch(condition) => {
            condition.pattern.len() + condition.key.len() > PATTERN_BYTES_MAX
        }
        _ => false,
    });
    if conditions.len() > CONDITIONS_MAX || too_long {
        return Err(Refusal::invalid_param(
            "A rule has at most 20 conditions, each with a key and pattern of at most 1,024 bytes.",
        )
        .into());
    }
    Ok(())
}

fn check_actions(actions: &[Action]) -> Result<()> {
    if actions.len() > ACTIONS_MAX {
        return Err(Refusal::invalid_param("A rule has at most 20 actions.").into());
    }
    Ok(())
}

fn no_such_kind() -> Refusal {
    Refusal::invalid_param("`kind` must be override, content, room, sender or underride.")
}

fn no_such_rule() -> Error {
    Refusal::not_found("There is no such push rule.").into()
}

/// The rule of this kind and id. Errors: 400 for an unknown kind, 404 for an unknown id.
pub fn require_rule<'r>(rules: &'r Ruleset, kind: RuleKind, rule_id: &str) -> Result<AnyPushRuleRef<'r>> {
    let kind = require_kind(kind)?;
    let id = stored_id(&kind, rule_id);
    rules.get(kind, &*id).ok_or_else(no_such_rule)
}

/// The kind of this name. Errors: 400 for an unknown one.
fn require_kind(kind: RuleKind) -> Result<RuleKind> {
    // The rules between those of content and of rooms have this name in the rules themselves, and another one where ruma reads a path.
    if kind.as_str() == POSTCONTENT {
        return Ok(RuleKind::PostContent);
    }
    let known = [
        RuleKind::Override,
        RuleKind::Content,
        RuleKind::PostContent,
        RuleKind::Room,
        RuleKind::Sender,
        RuleKind::Underride,
    ];
    if known.contains(&kind) { Ok(kind) } else { Err(no_such_kind().into()) }
}

/// Removes a rule. Errors: 400 for one of the server's own rules and for an unknown kind, 404 for an unknown id.
pub fn remove(rules: &mut Ruleset, kind: RuleKind, rule_id: &str) -> Result<()> {
    let kind = require_kind(kind)?;
    let id = stored_id(&kind, rule_id);
    rules.remove(kind, &*id).map_err(|why| match why {
        RemovePushRuleError::ServerDefault => {
            Refusal::new(ErrorKind::InvalidParam, "The server's own rules can be disabled, but not removed.")
                .into()
        }
        _ => no_such_rule(),
    })
}

/// Switches a rule on or off. Errors: 400 for an unknown kind, 404 for an unknown id.
pub fn set_enabled(rules: &mut Ruleset, kind: RuleKind, rule_id: &str, enabled: bool) -> Result<()> {
    let kind = require_kind(kind)?;
    let id = stored_id(&kind, rule_id);
    rules.set_enabled(kind, &*id, enabled).map_err(|_| no_such_rule())
}

/// Changes the actions of a rule, which may be one of the server's own. Errors: 400 for too many actions and for an unknown kind, 404
/// for an unknown id.
pub fn set_actions(rules: &mut Ruleset, kind: RuleKind, rule_id: &str, actions: Vec<Action>) -> Result<()> {
    let kind = require_kind(kind)?;
    check_actions(&actions)?;
    let id = stored_id(&kind, rule_id);
    rules.set_actions(kind, &*id, actions).map_err(|_| no_such_rule())
}

#[cfg(test)]
mod tests {
    use ruma::{
        push::{NewPatternedPushRule, NewSimplePushRule},
        room_id, user_id,
    };

    use super::*;
    use crate::store::{Durability, Engine, Guard, NotAccepted, Store};

    const ALICE: UserNum = UserNum(1);

    fn store() -> Store {
        Store::open(Engine::Memory(crate::store::engine::Memory::default()), Durability::Fsync).unwrap()
    }

    fn keyword(id: &str) -> NewPushRule {
        NewPushRule::Content(NewPatternedPushRule::new(
            id.to_owned(),
            "cake".to_owned(),
            vec![Action::Notify],
        ))
    }

    #[test]
    fn who_changed_nothing_has_the_default_rules_and_no_row() {
        let store = store();
        let alice = user_id!("@alice:x");
        let snapshot = store.snapshot();
        let rules = rules_of(&*snapshot, ALICE, alice).unwrap();
        assert!(require_rule(&rules, RuleKind::Underride, ".m.rule.message").is_ok());
        assert!(find_own_rules(&*snapshot, ALICE, alice).unwrap().is_none());
        assert_eq!(changed_at(&*snapshot, ALICE).unwrap(), Position::ZERO);
    }

    #[test]
    fn changes_are_kept_and_the_loser_of_a_race_is_told() {
        let store = store();
        let alice = user_id!("@alice:x");
        let (mut first, mut second) = (store.batch(&Guard::alone()), store.batch(&Guard::alone()));
        change(&mut first, ALICE, alice, |rules| insert(rules, keyword("a"), None, None)).unwrap();
        change(&mut second, ALICE, alice, |rules| insert(rules, keyword("b"), None, None)).unwrap();
        let accepted = store.enqueue(first).unwrap();
        assert!(matches!(store.enqueue(second), Err(NotAccepted::Conflict(_))));
        store.flush().unwrap();
        let snapshot = store.snapshot();
        let rules = rules_of(&*snapshot, ALICE, alice).unwrap();
        assert!(require_rule(&rules, RuleKind::Content, "a").is_ok());
        assert!(require_rule(&rules, RuleKind::Content, "b").is_err());
        assert_eq!(changed_at(&*snapshot, ALICE).unwrap(), accepted.base);
    }

    #[test]
    fn rules_that_cannot_be_are_refused() {
        let mut rules = defaults::default_rules(user_id!("@alice:x"));
        for id in [".m.mine", "a/b", "a\\b", &"x".repeat(300)] {
            let error = insert(&mut rules, keyword(id), None, None).unwrap_err();
            assert_eq!(error.refusal().unwrap().kind, ErrorKind::InvalidParam, "{id}");
        }
        assert!(insert(&mut rules, keyword("a"), Some("nowhere"), None).is_err());
        assert!(remove(&mut rules, RuleKind::Underride, ".m.rule.message").is_err());
        assert_eq!(
            remove(&mut rules, RuleKind::Content, "none").unwrap_err().refusal().unwrap().kind,
            ErrorKind::NotFound
        );
        assert!(set_enabled(&mut rules, RuleKind::from("sideways"), "a", true).is_err());
        set_actions(&mut rules, RuleKind::Underride, ".m.rule.message", vec![]).unwrap();
        assert!(require_rule(&rules, RuleKind::Underride, ".m.rule.message").unwrap().actions().is_empty());
    }

    /// Makes one change of the rules, and has it written.
    fn write(store: &Store, make: impl FnOnce(&mut Ruleset) -> Result<()>) -> Result<()> {
        let mut batch = store.batch(&Guard::alone());
        change(&mut batch, ALICE, user_id!("@alice:x"), make)?;
        drop(store.enqueue(batch).unwrap());
        store.flush().unwrap();
        Ok(())
    }

    /// Says what becomes of rules that have reached a bound when the server adds its own for threads.
    fn full_rules_can_be_changed(full: &[NewPushRule], more: &NewPushRule) {
        let (store, alice) = (store(), user_id!("@alice:x"));
        write(&store, |rules| full.iter().try_for_each(|rule| insert(rules, rule.clone(), None, None)))
            .unwrap();
        let too_large = |result: Result<()>| {
            assert_eq!(result.unwrap_err().refusal().unwrap().kind, ErrorKind::TooLarge);
        };
        too_large(write(&store, |rules| insert(rules, more.clone(), None, None)));
        let mut batch = store.batch(&Guard::alone());
        follow_threads(&mut batch, ALICE, alice).unwrap();
        drop(store.enqueue(batch).unwrap());
        store.flush().unwrap();
        let enable = |id: &'static str, is_on| {
            write(&store, |rules| {
                let kinds = [RuleKind::Override, RuleKind::Content];
                kinds
                    .into_iter()
                    .find_map(|kind| set_enabled(rules, kind, id, is_on).ok())
                    .ok_or_else(no_such_rule)
            })
        };
        for is_on in [true, false] {
            enable(".m.rule.master", is_on).unwrap();
        }
        write(&store, |rules| set_actions(rules, RuleKind::Content, "rule 0", vec![])).unwrap();
        for is_on in [false, true] {
            enable("rule 0", is_on).unwrap();
        }
        too_large(write(&store, |rules| insert(rules, more.clone(), None, None)));
        write(&store, |rules| insert(rules, keyword("rule 0"), None, None)).unwrap();
        write(&store, |rules| remove(rules, RuleKind::Content, "rule 0")).unwrap();
        let left = rules_of(&*store.snapshot(), ALICE, alice).unwrap();
        assert!(require_rule(&left, RuleKind::Content, "rule 0").is_err());
        assert_eq!(left.postcontent.len(), 2);
    }

    fn patterns(count: usize, pattern: &str) -> Vec<NewPushRule> {
        let rule = |id| {
            NewPatternedPushRule::new(format!("rule {id}"), format!("{id}{pattern}"), vec![Action::Notify])
        };
        (0..count).map(|id| NewPushRule::Content(rule(id))).collect()
    }

    #[test]
    fn rules_past_their_number_can_be_changed_and_removed() {
        let own = RULES_MAX - defaults::default_rules(user_id!("@alice:x")).iter().count();
        full_rules_can_be_changed(&patterns(own, "word"), &keyword("one more"));
    }

    #[test]
    fn rules_past_their_bytes_can_be_changed_and_removed() {
        let mut rules = defaults::default_rules(user_id!("@alice:x"));
        let mut full = patterns(400, &"a".repeat(500));
        let end = full.iter().position(|rule| {
            insert(&mut rules, rule.clone(), None, None).unwrap();
            encode(&rules).unwrap().len() > RULES_BYTES_MAX
        });
        full.truncate(end.unwrap());
        // The rest is filled by one more, to the byte.
        let mut rules = defaults::default_rules(user_id!("@alice:x"));
        full.iter().for_each(|rule| insert(&mut rules, rule.clone(), None, None).unwrap());
        let empty = NewPatternedPushRule::new("last".to_owned(), String::new(), vec![]);
        insert(&mut rules, NewPushRule::Content(empty), None, None).unwrap();
        let left = RULES_BYTES_MAX.checked_sub(encode(&rules).unwrap().len());
        if let Some(left) = left {
            let last = NewPatternedPushRule::new("last".to_owned(), "b".repeat(left), vec![]);
            full.push(NewPushRule::Content(last));
        }
        full_rules_can_be_changed(&full, &keyword("one more"));
    }

    #[test]
    fn rules_past_what_is_judged_can_be_changed_and_removed() {
        let alice = user_id!("@alice:x");
        // Many different letters take much memory.
        let letters: String = (0..300).filter_map(|letter| char::from_u32(0x4e00 + letter)).collect();
        let mut rules = defaults::default_rules(alice);
        let mut full = patterns(100, &letters);
        let end = full.iter().position(|rule| {
            insert(&mut rules, rule.clone(), None, None).unwrap();
            Compiled::size_of_own(&rules, alice) > COMPILED_BYTES_MAX
        });
        full.truncate(end.unwrap());
        let more = NewPatternedPushRule::new("one more".to_owned(), letters, vec![Action::Notify]);
        full_rules_can_be_changed(&full, &NewPushRule::Content(more));
    }

    #[test]
    fn a_rule_is_placed_before_and_after_others() {
        let mut rules = defaults::default_rules(user_id!("@alice:x"));
        for room in [room_id!("!a:x"), room_id!("!b:x"), room_id!("!c:x")] {
            let rule = NewPushRule::Room(NewSimplePushRule::new(room.to_owned(), vec![]));
            insert(&mut rules, rule, None, None).unwrap();
        }
        let moved = NewPushRule::Room(NewSimplePushRule::new(room_id!("!c:x").to_owned(), vec![]));
        insert(&mut rules, moved, Some("!a:x"), None).unwrap();
        let order: Vec<_> = rules.room.iter().map(|rule| rule.rule_id.as_str()).collect();
        assert_eq!(order, ["!b:x", "!a:x", "!c:x"]);
        let first = NewPushRule::Room(NewSimplePushRule::new(room_id!("!b:x").to_owned(), vec![]));
        set_enabled(&mut rules, RuleKind::Room, "!b:x", false).unwrap();
        insert(&mut rules, first.clone(), Some("!c:x"), None).unwrap();
        let order: Vec<_> = rules.room.iter().map(|rule| (rule.rule_id.as_str(), rule.enabled)).collect();
        assert_eq!(order, [("!a:x", true), ("!c:x", true), ("!b:x", false)]);
        assert!(insert(&mut rules.clone(), first.clone(), Some("!b:x"), None).is_err());
        assert!(insert(&mut rules, first, Some("!c:x"), Some("!a:x")).is_err());
    }
}
