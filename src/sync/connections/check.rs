//! Invariants of the rows of connections, which `db check` verifies.

use std::collections::BTreeMap;

use super::{Owner, part_of};
use crate::{
    accounts::check::Devices,
    schema::{self, sync::ConnectionRooms},
    store::{
        Direction, Fault, Snapshot,
        check::{Doubts, RowCheck},
        key::Json,
    },
};

/// The checks of connections.
pub(crate) fn checks() -> Vec<RowCheck> {
    let (mut devices, mut numbers) = (Devices::default(), Numbers::default());
    vec![
        RowCheck::of(&schema::SYNC_CONNECTION, move |read, (user, device, _), Json(row), doubts| {
            doubts.unless(devices.has(read, *user, *device)?, "its device is gone");
            doubts.unless(row.next.is_none_or(|next| next > row.base), "its next step is not a later one");
            Ok(())
        }),
        RowCheck::of(
            &schema::SYNC_CONNECTION_ROOMS,
            move |read, (user, device, number, part), row, doubts| {
                let last = numbers.last_step(read, (*user, *device), *number)?;
                doubts.unless(last.is_some(), "there is no such connection");
                check_part(row, *part, last.unwrap_or(u64::MAX), doubts);
                Ok(())
            },
        ),
    ]
}

fn check_part(row: &ConnectionRooms, part: u8, last: u64, doubts: &mut Doubts) {
    doubts.unless(row.rooms.is_sorted_by(|(a, _), (b, _)| a < b), "its rooms do not rise");
    for (room, steps) in &row.rooms {
        doubts.unless(part_of(*room) == part, format!("room {room} belongs into another part"));
        let rise = steps.is_sorted_by(|(a, _), (b, _)| a < b);
        let is_past = steps.last().is_some_and(|(step, _)| *step <= last);
        doubts.unless(
            rise && is_past,
            format!("the steps at which room {room} was told are none of the connection"),
        );
    }
}

/// The connections of one device, by number, each with its last step. One device is remembered at a time, for rows come in the
/// order of devices.
#[derive(Default)]
struct Numbers {
    of: Option<Owner>,
    last_steps: BTreeMap<u64, u64>,
}

impl Numbers {
    fn last_step(&mut self, read: &Snapshot, owner: Owner, number: u64) -> Result<Option<u64>, Fault> {
        if self.of != Some(owner) {
            self.last_steps.clear();
            for row in schema::SYNC_CONNECTION.prefix::<Owner>(read, owner, Direction::Up)? {
                let (_, Json(row)) = row?;
                self.last_steps.insert(row.number, row.next.unwrap_or(row.base));
            }
            self.of = Some(owner);
        }
        Ok(self.last_steps.get(&number).copied())
    }
}
