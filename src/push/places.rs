//! How far each pusher has come, so that a crash repeats no more than the request that was under way.
//!
//! A pusher whose gateway takes what it is sent is as far as the reader of the log, or as far as its row says, whichever is more. One whose
//! gateway does not is behind: its row alone says where it stands, and the reader goes on without it.

use crate::{
    ids::{Position, UserNum},
    schema::{self, push::PusherPlace},
    store::{Batch, Direction, Fault, Read, key::Json},
};

/// The place of one pusher.
pub fn find(
    read: &(impl Read + ?Sized),
    (user, app_id, pushkey): (UserNum, &str, &str),
) -> Result<Option<PusherPlace>, Fault> {
    schema::PUSHER_PLACES.get(read, (user, app_id, pushkey))
}

/// The place of a pusher, with its app id and its pushkey.
pub type Placed = ((String, String), PusherPlace);

/// The places of all pushers of a user, by app id and pushkey.
pub fn list(read: &(impl Read + ?Sized), user: UserNum) -> Result<Vec<Placed>, Fault> {
    let rows = schema::PUSHER_PLACES.prefix::<(UserNum,)>(read, (user,), Direction::Up)?;
    rows.map(|row| row.map(|((_, app_id, pushkey), place)| ((app_id, pushkey), place))).collect()
}

/// Has a pusher begin at a position, as part of the batch that sets it. Nothing that came before is sent to it.
pub(super) fn begin(batch: &mut Batch, key: (UserNum, &str, &str), at: Position) -> Result<(), Fault> {
    let badge = find(batch, key)?.and_then(|place| place.badge);
    schema::PUSHER_PLACES.put(batch, key, &PusherPlace { upto: at, is_behind: false, badge });
    Ok(())
}

pub(super) fn forget(batch: &mut Batch, key: (UserNum, &str, &str)) {
    schema::PUSHER_PLACES.delete(batch, key);
}

/// Gives places to pushers from before there were places, at most `count`: they begin now. Answers whether there may be more. Nobody sets
/// pushers meanwhile.
pub fn begin_old(batch: &mut Batch, now: Position, count: usize) -> Result<bool, Fault> {
    let mut old = Vec::new();
    for row in schema::PUSHERS.prefix::<()>(batch, (), Direction::Up)? {
        let ((user, app_id, pushkey), Json(row)) = row?;
        if !row.has_place && find(batch, (user, &app_id, &pushkey))?.is_none() {
            old.push((user, app_id, pushkey));
        }
        if old.len() == count {
            break;
        }
    }
    for (user, app_id, pushkey) in &old {
        begin(batch, (*user, app_id, pushkey), now)?;
    }
    Ok(old.len() == count)
}

/// Moves a pusher on, if its place is still the one that is `known`. Answers whether it is; where it is not, the pusher was deleted or set
/// anew meanwhile, and nothing is written.
pub fn advance(
    batch: &mut Batch,
    key: (UserNum, &str, &str),
    known: PusherPlace,
    to: PusherPlace,
) -> Result<bool, Fault> {
    if schema::PUSHER_PLACES.expect_as_read(batch, key)? != Some(known) {
        return Ok(false);
    }
    debug_assert!(!to.upto.is_pending(), "a pusher has come no further than what is accepted");
    schema::PUSHER_PLACES.put(batch, key, &to);
    Ok(true)
}
