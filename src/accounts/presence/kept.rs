//! The presence that others were told last, as it is kept for the next run of the server: clients go on showing it, so that the
//! next run must know what to take back.

use ruma::presence::PresenceState;

use super::Presence;
use crate::{
    ids::UserNum,
    schema::{self, accounts::PresenceRow},
    store::{Direction, Fault, Read, Write, key::Json},
};

/// Keeps what others were told of a user. Of a user who is offline and has no status message there is nothing to keep.
pub fn keep(to: &mut impl Write, user: UserNum, told: &Presence) {
    if told.state == PresenceState::Offline && told.status_msg.is_none() {
        schema::PRESENCE.delete(to, user);
        return;
    }
    let row = PresenceRow {
        state: told.state.to_string(),
        status_msg: told.status_msg.clone(),
        last_active_ms: told.last_active_ms,
    };
    schema::PRESENCE.put(to, user, &Json(row));
}

/// Forgets what others were told of a user, for an account that ends.
pub fn forget(to: &mut impl Write, user: UserNum) {
    schema::PRESENCE.delete(to, user);
}

/// Lists the users of whom others were told something that lasts, at most `max`.
pub fn list(read: &(impl Read + ?Sized), max: usize) -> Result<Vec<(UserNum, Presence)>, Fault> {
    let rows = schema::PRESENCE.prefix::<()>(read, (), Direction::Up)?.take(max);
    let presence = |row: PresenceRow| Presence {
        state: PresenceState::from(row.state),
        status_msg: row.status_msg,
        last_active_ms: row.last_active_ms,
    };
    rows.map(|row| row.map(|(user, Json(row))| (user, presence(row)))).collect()
}
