//! Events that refer to others: edits, threads, references, annotations (client-server API, "Forming relationships").

use std::{borrow::Cow, fmt::Write as _, ops::Bound};

use ruma::{OwnedEventId, UserId};
use serde::Deserialize;

use crate::{
    ids::{EventNum, Order, RoomNum},
    rooms::event::{self, Stored, Viewer},
    store::{
        Batch, Direction, Fault, Read, schema,
        schema::rooms::{RelationRow, RoomRow},
    },
};

/// References that are bundled with an event, at most.
const REFERENCES_MAX: usize = 100;

/// How an event refers to another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelatesTo {
    /// How.
    pub rel_type: String,
    /// To which event.
    pub event_id: OwnedEventId,
}

/// What an event's content says of its relation; `None` if it has none, or none with a type.
pub fn relates_to(content: &str) -> Option<RelatesTo> {
    #[derive(Deserialize)]
    struct Relation<'a> {
        #[serde(borrow)]
        rel_type: Cow<'a, str>,
        event_id: OwnedEventId,
    }
    #[derive(Deserialize)]
    struct Content<'a> {
        #[serde(borrow, rename = "m.relates_to")]
        relates_to: Relation<'a>,
    }
    // Most events have none: do not parse those.
    if !content.contains("m.relates_to") {
        return None;
    }
    let relation = serde_json::from_str::<Content<'_>>(content).ok()?.relates_to;
    Some(RelatesTo { rel_type: relation.rel_type.into_owned(), event_id: relation.event_id })
}

/// Writes the row of an accepted event that refers to another one of its room.
pub(crate) fn index(batch: &mut Batch, room: RoomNum, stored: &Stored) -> Result<(), Fault> {
    let Some(relation) = relates_to(stored.row.content()) else { return Ok(()) };
    let Some(parent) = event::find_num(batch, room, &relation.event_id)? else { return Ok(()) };
    if relation.rel_type == "m.thread" {
        if let Some(tip) = schema::THREAD_TIP.get(batch, (room, parent))? {
            schema::THREAD.delete(batch, (room, tip));
        }
        schema::THREAD_TIP.put(batch, (room, parent), &stored.order);
        schema::THREAD.put(batch, (room, stored.order), &parent);
    }
    let row = RelationRow {
        event: stored.event(),
        rel_type: relation.rel_type,
        event_type: stored.row.event_type().into_owned(),
        sender: stored.row.sender().into_owned(),
    };
    schema::RELATION.put(batch, (room, parent, stored.order), &row);
    Ok(())
}

/// Takes the row away of an event that is about to be redacted: its relation goes with its content.
pub(crate) fn unlink(batch: &mut Batch, room: RoomNum, stored: &Stored) -> Result<(), Fault> {
    let Some(relation) = relates_to(stored.row.content()) else { return Ok(()) };
    if let Some(parent) = event::find_num(batch, room, &relation.event_id)? {
        schema::RELATION.delete(batch, (room, parent, stored.order));
    }
    Ok(())
}

/// The events that refer to this one, by their order.
pub fn list<'r>(
    read: &'r (impl Read + ?Sized),
    room: RoomNum,
    parent: EventNum,
    direction: Direction,
) -> Result<impl Iterator<Item = Result<(Order, RelationRow), Fault>> + 'r, Fault> {
    let rows = schema::RELATION.prefix::<(RoomNum, EventNum)>(read, (room, parent), direction)?;
    let end = Order::upto(read.upto());
    Ok(rows
        .map(|row| row.map(|((_, _, order), row)| (order, row)))
        .filter(move |row| row.as_ref().map_or(true, |(order, _)| *order <= end)))
}

/// The events that threads of a room grow from, with the order of the thread's newest event, newest first; those
/// below `from` only.
pub fn list_threads<'r>(
    read: &'r (impl Read + ?Sized),
    room: RoomNum,
    from: Order,
) -> Result<impl Iterator<Item = Result<(Order, EventNum), Fault>> + 'r, Fault> {
    let low = Bound::Included((room, Order::MIN));
    let rows = schema::THREAD.range::<(RoomNum, Order)>(
        read,
        low,
        Bound::Included((room, from)),
        Direction::Down,
    )?;
    Ok(rows.map(|row| row.map(|((_, order), root)| (order, root))))
}

/// Whether a user wrote the first event of a thread or a later one.
pub fn took_part(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    root: &Stored,
    user: &UserId,
) -> Result<bool, Fault> {
    if root.row.sender() == user.as_str() {
        return Ok(true);
    }
    for row in list(read, room, root.event(), Direction::Up)? {
        let (_, row) = row?;
        if row.rel_type == "m.thread" && row.sender == user.as_str() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// How much is bundled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Depth {
    /// Everything.
    Full,
    /// The newest edit only: for an event inside another's bundle, so that chains of threads cost nothing.
    Edit,
}

/// What refers to an event, as it stands in the event's `unsigned`; `None` if nothing does.
pub(crate) fn bundle(
    read: &(impl Read + ?Sized),
    num: RoomNum,
    room: &RoomRow,
    stored: &Stored,
    viewer: &Viewer<'_>,
    depth: Depth,
) -> Result<Option<String>, Fault> {
    let (mut edit, mut thread, mut threads, mut took_part) = (None::<Stored>, None, 0_u64, false);
    let mut references = Vec::new();
    let (sender, event_type) = (stored.row.sender(), stored.row.event_type());
    for row in list(read, num, stored.event(), Direction::Up)? {
        let (_, row) = row?;
        match row.rel_type.as_str() {
            "m.replace" if row.sender == sender && row.event_type == event_type => {
                let newer = event::find(read, num, row.event)?.filter(|new| {
                    let time = |stored: &Stored| (stored.row.header.sent_ms, stored.row.header.hash);
                    edit.as_ref().is_none_or(|old| time(old) < time(new))
                });
                edit = newer.or(edit);
            }
            "m.thread" if depth == Depth::Full => {
                threads += 1;
                took_part |= row.sender == viewer.user.as_str();
                thread = Some(row.event);
            }
            "m.reference" if depth == Depth::Full && references.len() < REFERENCES_MAX => {
                references.push(row.event)
            }
            _ => {}
        }
    }
    // Edits are of messages: redacted events and state events have none, and an edit is not edited itself.
    let is_edit =
        || relates_to(stored.row.content()).is_some_and(|relation| relation.rel_type == "m.replace");
    if edit.is_some() && (stored.row.is_redacted() || stored.row.header.state_key.is_some() || is_edit()) {
        edit = None;
    }
    took_part |= threads > 0 && sender == viewer.user.as_str();
    let mut parts = Vec::new();
    if let Some(edit) = edit {
        parts.push(format!(r#""m.replace":{}"#, event::show_plain(read, num, room, &edit, viewer)?));
    }
    if !references.is_empty() {
        let mut chunk = String::new();
        for reference in references {
            let id = event::require(read, num, reference)?.id(room);
            let _ = write!(chunk, r#"{}{{"event_id":"{id}"}}"#, if chunk.is_empty() { "" } else { "," });
        }
        parts.push(format!(r#""m.reference":{{"chunk":[{chunk}]}}"#));
    }
    if let Some(latest) = thread {
        let latest = event::require(read, num, latest)?;
        // The newest event of a thread shows its own newest edit, but no more than that.
        let latest = event::show_inside(read, num, room, &latest, viewer)?;
        parts.push(format!(
            r#""m.thread":{{"count":{threads},"current_user_participated":{took_part},"latest_event":{latest}}}"#
        ));
    }
    Ok((!parts.is_empty()).then(|| format!("{{{}}}", parts.join(","))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relation_needs_a_type_and_an_event() {
        let content = r#"{"m.relates_to":{"rel_type":"m.thread","event_id":"$x"}}"#;
        assert_eq!(relates_to(content).unwrap().rel_type, "m.thread");
        for content in [
            r#"{"m.relates_to":{"event_id":"$x"}}"#,
            r#"{"m.relates_to":{"m.in_reply_to":{"event_id":"$x"}}}"#,
            r#"{"m.relates_to":7}"#,
            r#"{"body":"m.relates_to"}"#,
        ] {
            assert_eq!(relates_to(content), None, "{content}");
        }
    }
}
