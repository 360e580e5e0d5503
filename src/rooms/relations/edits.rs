//! Edits: which events are valid ones, which of them counts, and which counts for a reader who does not see all of them (client-server API,
//! "Event replacements").

use std::collections::BTreeMap;

use serde::{Deserialize, de::IgnoredAny};
use serde_json::value::RawValue;

use super::{AGAIN_MAX, ANYWHERE, Span, list_kind, relates_to, upto};
use crate::{
    ids::{EventNum, Order, RoomNum},
    json::JsonText,
    rooms::event::{self, StoredEvent},
    schema,
    schema::event_types::{ENCRYPTED, REPLACE},
    schema::{relations::RelationKind, rooms::EventKey},
    store::{Direction, Fault, Read},
};

/// Look at no more than this many events that refer to a message as edits do. A look costs a row, and not an event.
const LOOKED_AT_MAX: usize = 20_000;

/// Whether an event is a valid edit of another. Only messages are edited: redacted events and state events have no
/// edits, an edit is not edited itself, nobody edits the events of others, and an edit says what the event reads now.
///
/// Specification: client-server API, "Validity of replacement events".
pub(in crate::rooms) fn is_edit_of(original: &StoredEvent, edit: &StoredEvent) -> bool {
    can_be_edited(original)
        && original.row.sender() == edit.row.sender()
        && original.row.event_type() == edit.row.event_type()
        && edit.row.header.state_key.is_none()
        && has_new_content(edit)
}

/// Whether an edit has `m.new_content`. Only clients can tell that of an encrypted one.
fn has_new_content(edit: &StoredEvent) -> bool {
    #[derive(Deserialize)]
    struct Content {
        #[serde(rename = "m.new_content")]
        _new_content: BTreeMap<String, IgnoredAny>,
    }
    edit.row.event_type() == ENCRYPTED || serde_json::from_str::<Content>(edit.row.content()).is_ok()
}

/// The content that an edit gives the event which it edits; none of one that is encrypted.
pub(crate) fn new_content(edit: &StoredEvent) -> Option<JsonText> {
    #[derive(Deserialize)]
    struct Content<'a> {
        #[serde(rename = "m.new_content", borrow)]
        new_content: &'a RawValue,
    }
    let content: Content<'_> = serde_json::from_str(edit.row.content()).ok()?;
    Some(JsonText::stored(content.new_content.get().as_bytes()))
}

/// Whether an event may have edits: a message that is neither redacted nor an edit itself.
pub(in crate::rooms) fn can_be_edited(original: &StoredEvent) -> bool {
    let is_edit = || relates_to(original.row.content()).is_some_and(|relation| relation.rel_type == REPLACE);
    !original.row.is_redacted() && original.row.header.state_key.is_none() && !is_edit()
}

/// Gives the rank of an edit: the one sent later counts, and of two sent at once the one with the greater id.
pub(in crate::rooms) fn sent(edit: &StoredEvent) -> (u64, &EventKey) {
    (edit.row.header.sent_ms, &edit.row.header.key)
}

/// Lists the events that replace another and may do so, because their sender and type are the same, the last one first. Anybody in a room can
/// refer to a message in the same way, and must not hide the edits of its author by that.
fn list_of_author<'r>(
    read: &'r (impl Read + ?Sized),
    room: RoomNum,
    original: &'r StoredEvent,
    span: Span,
) -> Result<impl Iterator<Item = Result<EventNum, Fault>> + 'r, Fault> {
    let rows = list_kind(read, room, original.event(), RelationKind::Replace, span, Direction::Down)?;
    let (sender, event_type) = (original.row.sender(), original.row.event_type());
    Ok(rows.take(LOOKED_AT_MAX).filter_map(move |row| match row {
        Ok((_, row)) if *row.sender.as_str() == *sender && *row.event_type == *event_type => {
            Some(Ok(row.event))
        }
        Ok(_) => None,
        Err(error) => Some(Err(error)),
    }))
}

/// Finds the edit that counts among those that a reader sees, who sees nothing above `until`.
pub(in crate::rooms) fn newest_edit(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    original: &StoredEvent,
    until: Order,
    sees: impl Fn(&StoredEvent) -> Result<bool, Fault>,
) -> Result<Option<StoredEvent>, Fault> {
    let mut newest = None::<StoredEvent>;
    for num in list_of_author(read, room, original, upto(until))?.take(AGAIN_MAX) {
        let Some(edit) = event::find(read, room, num?)? else { continue };
        if is_edit_of(original, &edit)
            && newest.as_ref().is_none_or(|old| sent(old) < sent(&edit))
            && sees(&edit)?
        {
            newest = Some(edit);
        }
    }
    Ok(newest)
}

/// Finds the edit that counts for a reader, who sees nothing above `until`; mostly that is the newest of all.
pub(crate) fn newest_edit_seen(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    original: &StoredEvent,
    until: Order,
    sees: impl Fn(&StoredEvent) -> Result<bool, Fault>,
) -> Result<Option<StoredEvent>, Fault> {
    let related = schema::RELATED.get(read, (room, original.event()))?;
    let Some(newest) = related.and_then(|related| related.edit) else { return Ok(None) };
    if let Some(edit) = event::find(read, room, newest)?
        && edit.order <= until
        && is_edit_of(original, &edit)
        && sees(&edit)?
    {
        return Ok(Some(edit));
    }
    newest_edit(read, room, original, until, sees)
}

/// Lists the edits of an event, the one that counts first, and those that would count in its place after it: at most this many, of those that came
/// last.
pub(crate) fn list_edits(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    original: &StoredEvent,
    count_max: usize,
) -> Result<Vec<StoredEvent>, Fault> {
    let related = schema::RELATED.get(read, (room, original.event()))?;
    let Some(newest) = related.and_then(|related| related.edit) else { return Ok(Vec::new()) };
    let mut nums: Vec<EventNum> =
        list_of_author(read, room, original, ANYWHERE)?.take(count_max).collect::<Result<_, _>>()?;
    // The one that counts is that which was sent last, and may have come before others.
    if !nums.contains(&newest) {
        nums.truncate(count_max.saturating_sub(1));
        nums.push(newest);
    }
    let mut edits = Vec::new();
    for num in nums {
        edits.extend(event::find(read, room, num)?.filter(|edit| is_edit_of(original, edit)));
    }
    edits.sort_by(|a, b| sent(b).cmp(&sent(a)));
    Ok(edits)
}
