//! The account data that the user's clients keep here, global and of rooms. Push rules are told as global account data.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::{
    accounts::account_data,
    ids::{Position, UserNum},
    push::rules,
    schema,
    schema::accounts::WrittenRow,
    schema::event_types::PUSH_RULES,
    store::{Direction, Fault},
    sync::{changes::Changes, window::Window},
};

/// The account data of one room, or the global account data, as pairs of type and row.
pub(crate) type Data = Vec<(String, WrittenRow)>;

/// The account data that is news to the client.
#[derive(Debug, Default)]
pub(crate) struct AccountData {
    /// By room id; global account data stands under "".
    pub(crate) by_room: BTreeMap<String, Data>,
    /// The content of `m.push_rules`. None if the rules have not changed or are not wanted.
    pub(crate) push_rules: Option<Value>,
}

/// Collects the account data that changed since the client asked last, or all of it if the client begins.
pub(crate) fn collect(window: &Window<'_>, changes: &Changes) -> Result<AccountData, Fault> {
    let user = window.ask.caller.user;
    let mut found = AccountData::default();
    if !changes.account_data {
        return Ok(found);
    }
    if window.since.is_none() {
        for row in schema::ACCOUNT_DATA.prefix::<(UserNum,)>(window.read, (user,), Direction::Up)? {
            let ((_, room, kind), row) = row?;
            if account_data::is_deleted(&row.content) {
                continue;
            }
            found.by_room.entry(room).or_default().push((kind, row));
        }
    } else {
        for (key, row) in account_data::list_changes(window.read, user, window.from, window.upto)? {
            found.by_room.entry(key.room).or_default().push((key.kind, row));
        }
    }
    found.push_rules = push_rules(window, window.since.map(|_| window.from))?;
    Ok(found)
}

/// Collects the account data that belongs to no room and that changed after a position, or all of it, and the push rules.
pub(crate) fn global(window: &Window<'_>, from: Option<Position>) -> Result<(Data, Option<Value>), Fault> {
    let data = match from {
        None => of_room(window, "")?,
        Some(from) => {
            let changes = account_data::list_changes(window.read, window.ask.caller.user, from, window.upto)?;
            let global = changes.into_iter().filter(|(key, _)| key.room.is_empty());
            global.map(|(key, row)| (key.kind, row)).collect()
        }
    };
    Ok((data, push_rules(window, from)?))
}

/// Lists all account data of a room, for a client to which the room is new. It is told nothing of what was deleted.
pub(crate) fn of_room(window: &Window<'_>, room: &str) -> Result<Data, Fault> {
    let prefix = (window.ask.caller.user, room);
    let rows = schema::ACCOUNT_DATA.prefix::<(UserNum, String)>(window.read, prefix, Direction::Up)?;
    let rows = rows.map(|row| row.map(|((.., kind), row)| (kind, row)));
    rows.filter(|row| row.as_ref().map_or(true, |(_, row)| !account_data::is_deleted(&row.content))).collect()
}

fn push_rules(window: &Window<'_>, from: Option<Position>) -> Result<Option<Value>, Fault> {
    let caller = &window.ask.caller;
    let is_new = match from {
        None => true,
        Some(from) => rules::changed_at(window.read, caller.user)? > from,
    };
    if !is_new || !window.ask.filter.account_data.wants_type(PUSH_RULES) {
        return Ok(None);
    }
    let rules = rules::rules_of(window.read, caller.user, &caller.user_id)?;
    Ok(rules::as_json(&rules).ok().map(|rules| serde_json::json!({ "global": rules })))
}
