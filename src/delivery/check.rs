//! Invariants of the rows about other servers, which `db check` verifies.

use ruma::ServerName;
use serde_json::value::RawValue;

use crate::{
    schema,
    store::{check::RowCheck, key::Json, tables},
};

/// The checks of what other servers are still to be told.
pub fn checks() -> Vec<RowCheck> {
    let is_server = |name: &str| <&ServerName>::try_from(name).is_ok();
    vec![
        RowCheck::of(&schema::BEHIND, move |read, (server, room), place, doubts| {
            doubts.position(read, *place);
            doubts.unless(is_server(server), "its name is no name of a server");
            doubts.unless(
                schema::ROOM.contains(read, *room)?,
                "the room that it misses events of does not exist",
            );
            Ok(())
        }),
        RowCheck::of(&schema::DEVICES_BEHIND, move |read, (server, user), place, doubts| {
            doubts.position(read, *place);
            doubts.unless(is_server(server), "its name is no name of a server");
            let is_there = schema::USERS.contains(read, *user)?;
            doubts.unless(is_there, "the user whose devices it misses changes of does not exist");
            Ok(())
        }),
        RowCheck::of(&schema::DESTINATION, move |_, server, Json(row), doubts| {
            doubts.unless(is_server(server), "its name is no name of a server");
            doubts.unless(row.failing.failures > 0, "it has not failed");
            Ok(())
        }),
        RowCheck::of(&schema::SIGNING_KEYS, move |_, id, Json(row), doubts| {
            doubts.unless(id.starts_with("ed25519:"), "its id is that of no signing key");
            let waits = row.seed.is_some();
            let has_ended = row.public_key.is_some() && row.expired_ms.is_some();
            doubts.unless(waits != has_ended, "it neither waits nor has ended");
            Ok(())
        }),
        RowCheck::of(&schema::OUTBOX, move |read, (server, position), row, doubts| {
            doubts.position(read, *position);
            doubts.unless(is_server(server), "its name is no name of a server");
            doubts.unless(serde_json::from_slice::<&RawValue>(&row.json).is_ok(), "the news is not JSON");
            // Its entry in the log may be trimmed while it waits.
            let logged = tables::LOG.get(read, *position)?;
            let is_other =
                logged.is_some_and(|entry| !matches!(entry, crate::store::LogEntry::ToDevice { .. }));
            doubts.unless(!is_other, "the log says that something else happened there");
            Ok(())
        }),
    ]
}
