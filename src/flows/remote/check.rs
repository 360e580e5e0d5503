//! Invariants of the rows about what came from other servers, which `db check` verifies.

use ruma::ServerName;
use serde_json::value::RawValue;

use super::{receive, remembered};
use crate::{
    schema,
    store::{
        check::{Doubts, RowCheck},
        key::Json,
    },
};

/// The checks of transactions, events and messages of other servers.
pub(crate) fn checks() -> Vec<RowCheck> {
    vec![
        RowCheck::of(&schema::INBOUND_TRANSACTION, |_, (origin, slot), Json(row), doubts| {
            of_server(origin, doubts);
            doubts.unless(receive::slot(row.number) == *slot, "its number belongs into another row");
            doubts.unless(is_json(row.answer.as_bytes()), "its answer is not JSON");
            Ok(())
        }),
        RowCheck::of(&schema::INBOUND_EVENT, |read, (room, _), row, doubts| {
            of_server(&row.origin, doubts);
            doubts.unless(schema::ROOM.contains(read, *room)?, "the room for which it waits does not exist");
            doubts.unless(is_json(&row.json), "the event that waits is not JSON");
            Ok(())
        }),
        RowCheck::of(&schema::INBOUND_LINE, |_, (line, number), Json(row), doubts| {
            of_server(&row.origin, doubts);
            let is_right = *number > 0 && remembered::is_line_of(line, row);
            doubts.unless(is_right, "it stands in the line of another server");
            Ok(())
        }),
        RowCheck::of(&schema::INBOUND_MESSAGE, |_, (origin, _), _, doubts| {
            of_server(origin, doubts);
            Ok(())
        }),
    ]
}

fn of_server(origin: &str, doubts: &mut Doubts) {
    doubts.unless(<&ServerName>::try_from(origin).is_ok(), "it came from no server");
}

fn is_json(bytes: &[u8]) -> bool {
    serde_json::from_slice::<&RawValue>(bytes).is_ok()
}
