//! Carries a user's settings over from a room to the one that replaced it, when the user joins the new room (client-server
//! API, "Room Upgrades"). The settings are push rules, tags, and whether the room is a direct chat.
//!
//! The batch of the join promises this as a job, and the batch that carries the settings over deletes the job. So it is done
//! once, even if the process ends in between.

use bytes::Bytes;
use ruma::{
    OwnedRoomId, RoomId, UserId,
    push::{
        ConditionalPushRule, NewConditionalPushRule, NewPushRule, NewSimplePushRule, PushCondition, Ruleset,
    },
};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{
    accounts::{account_data, users},
    error::{Error, Result},
    flows::{App, jobs, write},
    ids::{RoomNum, UserNum},
    push::rules,
    rooms::{self, change::Change, members},
    schema::{
        event_types::{CREATE, DIRECT, TAG, TOMBSTONE},
        jobs::{Job, Move},
        rooms::Membership,
    },
    store::{
        Batch, Fault, Read,
        timer::{self, Timer},
    },
};

/// At most this many users who were in the new room before the old one's tombstone came have their settings carried over.
const EARLY_MAX: usize = 500;

/// Gives the room that another one replaces, as its create event says.
pub(crate) fn predecessor(create: &str) -> Option<OwnedRoomId> {
    #[derive(Deserialize)]
    struct Create {
        predecessor: Predecessor,
    }
    #[derive(Deserialize)]
    struct Predecessor {
        room_id: OwnedRoomId,
    }
    serde_json::from_str(create).ok().map(|create: Create| create.predecessor.room_id)
}

/// Gives the room that replaces another one, as its tombstone says.
pub(crate) fn replacement(tombstone: &str) -> Option<OwnedRoomId> {
    #[derive(Deserialize)]
    struct Tombstone {
        replacement_room: OwnedRoomId,
    }
    serde_json::from_str(tombstone).ok().map(|tombstone: Tombstone| tombstone.replacement_room)
}

/// Promises, in the batch in which a user joins a room, that their settings for its predecessor will be carried over. Answers
/// `None` if there is no predecessor that they were in. Anybody can make a room that calls any other its predecessor, so the old
/// room must say by its tombstone that it was replaced by this one.
pub(crate) fn promise(app: &App, change: &mut Change, user: UserNum) -> Result<Option<Timer>> {
    let create = change.state(CREATE, "")?;
    let Some(from) = create.and_then(|event| predecessor(event.parsed.content.get())) else {
        return Ok(None);
    };
    let Some(old) = rooms::find_room(&change.batch, &from)? else { return Ok(None) };
    if !was_ever_in(&change.batch, user, old)? {
        return Ok(None);
    }
    let tombstone = rooms::find_state(&change.batch, old, TOMBSTONE, "")?;
    if tombstone.and_then(|event| replacement(event.row.content())).as_ref() != Some(&change.row.id) {
        tracing::debug!(room = %change.num, %old, %user, reason = "no tombstone names the room", "settings are not carried over");
        return Ok(None);
    }
    let moved = Move { from, to: change.row.id.clone() };
    let job = Job::CarryOver { user, room: change.num, moved };
    Ok(Some(jobs::promise(app, &mut change.batch, &job)))
}

/// The room that replaces this one, as both of them say.
fn find_replacement(change: &mut Change) -> Result<Option<(RoomNum, OwnedRoomId)>> {
    let tombstone = change.state(TOMBSTONE, "")?;
    let to = tombstone.and_then(|event| replacement(event.parsed.content.get()));
    let Some(to) = to else { return Ok(None) };
    let Some(room) = rooms::find_room(&change.batch, &to)? else { return Ok(None) };
    let create = rooms::find_state(&change.batch, room, CREATE, "")?;
    let named = create.and_then(|event| predecessor(event.row.content()));
    Ok((named.as_ref() == Some(&change.row.id)).then_some((room, to)))
}

/// Promises the same in the batch in which a user sets the tombstone of a room, if they are in the new room already: who
/// replaces a room makes the new one first.
pub(crate) fn promise_to_author(app: &App, change: &mut Change, user: UserNum) -> Result<Option<Timer>> {
    let Some((room, to)) = find_replacement(change)? else { return Ok(None) };
    if !members::is_joined(&change.batch, user, room)? {
        return Ok(None);
    }
    let job = Job::CarryOver { user, room, moved: Move { from: change.row.id.clone(), to } };
    Ok(Some(jobs::promise(app, &mut change.batch, &job)))
}

/// Promises the same in the batch in which another server's tombstone comes, to users of ours who were quicker: they are in the new
/// room already.
pub(crate) fn promise_to_early(app: &App, change: &mut Change) -> Result<Vec<Timer>> {
    let Some((room, to)) = find_replacement(change)? else { return Ok(Vec::new()) };
    let early: Vec<UserNum> =
        members::joined_local_users(&change.batch, room)?.take(EARLY_MAX).collect::<Result<_, _>>()?;
    let mut promised = Vec::new();
    for user in early {
        if was_ever_in(&change.batch, user, change.num)? {
            let moved = Move { from: change.row.id.clone(), to: to.clone() };
            promised.push(jobs::promise(app, &mut change.batch, &Job::CarryOver { user, room, moved }));
        }
    }
    Ok(promised)
}

/// Whether the user is or was in a room; an invitation alone is not enough.
fn was_ever_in(read: &(impl Read + ?Sized), user: UserNum, room: RoomNum) -> Result<bool, Fault> {
    let row = members::find(read, user, room)?;
    Ok(row.is_some_and(|row| row.membership == Membership::Join || row.left.is_some()))
}

/// Carries a user's settings over, unless that was done already.
pub(crate) async fn carry_over(app: &App, user: UserNum, carried: Move, timer: Timer) -> Result<()> {
    write::for_user(app, user, move |_, batch| {
        // Each run of this job holds the user's lock, so only one of them finds the timer.
        if !timer::fire(batch, &timer)? {
            return Ok(());
        }
        let user_id = users::require(batch, user)?.user_id;
        carry_rules(batch, user, &user_id, &carried)?;
        carry_tags(batch, user, &carried)?;
        carry_direct(batch, user, &carried)?;
        write::wake(batch, user);
        Ok(())
    })
    .await
}

/// Passes over a refusal: settings that would exceed a bound in the new room stay with the old one.
fn unless_refused<T>(done: Result<T>) -> Result<Option<T>> {
    match done {
        Ok(done) => Ok(Some(done)),
        Err(Error::Refused(_)) => Ok(None),
        Err(other) => Err(other),
    }
}

fn carry_rules(batch: &mut Batch, user: UserNum, user_id: &UserId, carried: &Move) -> Result<()> {
    let Some(own) = rules::find_own_rules(batch, user, user_id)? else { return Ok(()) };
    let new = rules_for(&own, carried);
    if new.is_empty() {
        return Ok(());
    }
    let change = |rules: &mut Ruleset| {
        // A new rule is placed before the others, so the last rule is inserted first.
        for (rule, enabled) in new.into_iter().rev() {
            let (kind, id) = (rule.kind(), rule.rule_id().to_owned());
            if rules.get(kind.clone(), &id).is_none() {
                rules::insert(rules, rule, None, None)?;
                rules::set_enabled(rules, kind, &id, enabled)?;
            }
        }
        Ok(())
    };
    unless_refused(rules::change(batch, user, user_id, change)).map(drop)
}

/// The user's rules about the old room, rewritten for the new one, and whether each is on.
fn rules_for(own: &Ruleset, carried: &Move) -> Vec<(NewPushRule, bool)> {
    let mut new = Vec::new();
    let conditional = |rule: &ConditionalPushRule| {
        let conditions = moved(&rule.conditions, carried).filter(|_| !rule.default)?;
        let id = if rule.rule_id.contains(carried.from.as_str()) {
            rule.rule_id.replace(carried.from.as_str(), carried.to.as_str())
        } else {
            format!("{}.{}", rule.rule_id, carried.to)
        };
        Some((NewConditionalPushRule::new(id, conditions, rule.actions.clone()), rule.enabled))
    };
    for (rule, enabled) in own.override_.iter().filter_map(conditional) {
        new.push((NewPushRule::Override(rule), enabled));
    }
    if let Some(rule) = own.room.get(carried.from.as_str()) {
        let moved = NewSimplePushRule::new(carried.to.clone(), rule.actions.clone());
        new.push((NewPushRule::Room(moved), rule.enabled));
    }
    for (rule, enabled) in own.underride.iter().filter_map(conditional) {
        new.push((NewPushRule::Underride(rule), enabled));
    }
    new
}

/// The conditions with the new room in place of the old one; `None` if they do not name the old one.
fn moved(conditions: &[PushCondition], carried: &Move) -> Option<Vec<PushCondition>> {
    let mut found = false;
    let moved = conditions.iter().cloned().map(|mut condition| {
        if let PushCondition::EventMatch(condition) = &mut condition
            && condition.key == "room_id"
            && condition.pattern == carried.from.as_str()
        {
            condition.pattern = carried.to.to_string();
            found = true;
        }
        condition
    });
    let moved = moved.collect();
    found.then_some(moved)
}

fn find_object(
    batch: &Batch,
    user: UserNum,
    room: Option<&RoomId>,
    kind: &str,
) -> Result<Map<String, Value>, Fault> {
    let row = account_data::find(batch, user, room, kind)?;
    Ok(row.and_then(|row| serde_json::from_slice(&row.content).ok()).unwrap_or_default())
}

fn carry_tags(batch: &mut Batch, user: UserNum, carried: &Move) -> Result<()> {
    let Some(old) = account_data::find(batch, user, Some(&carried.from), TAG)? else { return Ok(()) };
    // Tags that the new room has already are newer, so they stay.
    if account_data::find(batch, user, Some(&carried.to), TAG)?.is_none() {
        unless_refused(account_data::put(batch, user, Some(&carried.to), TAG, old.content))?;
    }
    Ok(())
}

fn carry_direct(batch: &mut Batch, user: UserNum, carried: &Move) -> Result<()> {
    let mut direct = find_object(batch, user, None, DIRECT)?;
    let mut changed = false;
    for rooms in direct.values_mut().filter_map(Value::as_array_mut) {
        let has = |room: &RoomId| rooms.iter().any(|other| other.as_str() == Some(room.as_str()));
        if has(&carried.from) && !has(&carried.to) {
            rooms.push(carried.to.as_str().into());
            changed = true;
        }
    }
    if changed {
        let content = Bytes::from(Value::Object(direct).to_string());
        unless_refused(account_data::put(batch, user, None, DIRECT, content))?;
    }
    Ok(())
}
