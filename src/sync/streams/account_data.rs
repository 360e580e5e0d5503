//! What the user's clients keep here: account data, global and of rooms; push rules are global account data.

use std::{collections::BTreeMap, ops::Bound};

use crate::{
    ids::{Position, UserNum},
    push::rules,
    schema,
    schema::accounts::WrittenRow,
    store::{Direction, Fault, key::Json},
    sync::{answer::plain_event, streams::Window},
};

/// Account data by room ("" is global) and type.
pub(crate) type ByRoom = BTreeMap<String, Vec<(String, WrittenRow)>>;

/// What changed since the client asked last, or everything if it begins.
pub(crate) fn collect(window: &Window<'_>) -> Result<ByRoom, Fault> {
    let user = window.ask.caller.user;
    let mut found = ByRoom::new();
    if window.since.is_none() {
        for row in schema::ACCOUNT_DATA.prefix::<(UserNum,)>(window.read, (user,), Direction::Up)? {
            let ((_, room, kind), row) = row?;
            found.entry(room).or_default().push((kind, row));
        }
        return Ok(found);
    }
    if window.from >= window.upto {
        return Ok(found);
    }
    let (low, high) = (Bound::Excluded((user, window.from)), Bound::Included((user, window.upto)));
    let log = schema::ACCOUNT_DATA_LOG.range::<(UserNum, Position)>(window.read, low, high, Direction::Up)?;
    for entry in log {
        let ((_, position), Json(key)) = entry?;
        let row = schema::ACCOUNT_DATA.get(window.read, (user, key.room.as_str(), key.kind.as_str()))?;
        if let Some(row) = row.filter(|row| row.position == position) {
            found.entry(key.room).or_default().push((key.kind, row));
        }
    }
    Ok(found)
}

/// All that is kept for a room, for a client to which the room is new.
pub(crate) fn of_room(window: &Window<'_>, room: &str) -> Result<Vec<(String, WrittenRow)>, Fault> {
    let prefix = (window.ask.caller.user, room);
    let rows = schema::ACCOUNT_DATA.prefix::<(UserNum, String)>(window.read, prefix, Direction::Up)?;
    rows.map(|row| row.map(|((.., kind), row)| (kind, row))).collect()
}

/// Account data as events.
pub(crate) fn show(data: &[(String, WrittenRow)], wants_type: impl Fn(&str) -> bool) -> Vec<String> {
    let wanted = data.iter().filter(|(kind, _)| wants_type(kind));
    wanted.map(|(kind, row)| plain_event(kind, std::str::from_utf8(&row.content).unwrap_or("{}"))).collect()
}

/// The user's push rules as `m.push_rules`, if they are new to the client.
pub(crate) fn push_rules(window: &Window<'_>) -> Result<Option<String>, Fault> {
    let caller = &window.ask.caller;
    let is_new = window.since.is_none() || rules::changed_at(window.read, caller.user)? > window.from;
    if !is_new || !window.ask.filter.account_data.wants_type("m.push_rules") {
        return Ok(None);
    }
    let rules = rules::rules_of(window.read, caller.user, &caller.user_id)?;
    let Ok(rules) = rules::as_json(&rules) else { return Ok(None) };
    let content = serde_json::json!({ "global": rules });
    Ok(Some(plain_event("m.push_rules", &content.to_string())))
}
