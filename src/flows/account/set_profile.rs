//! Changes a profile, and writes it into the user's rooms.

use serde_json::Value;

use crate::{
    accounts::{Caller, profiles},
    error::Result,
    flows::{App, follow_up, write},
    schema::jobs::Job,
};

/// Sets a field of the caller's profile, or deletes it if `value` is none. A field that rooms show is written into every room
/// that the user is in.
pub(crate) async fn set_profile(
    app: &App,
    caller: &Caller,
    field: String,
    value: Option<Value>,
) -> Result<()> {
    let user = caller.user;
    let promised = write::for_user(app, user, move |app, batch| {
        let changed = match value {
            Some(value) => profiles::set(batch, user, &field, value)?,
            None => profiles::delete(batch, user, &field)?,
        };
        if !changed {
            return Ok(None);
        }
        write::wake(batch, user);
        let tell = || follow_up::promise(app, batch, &Job::TellRooms { user });
        Ok(profiles::is_shown_in_rooms(&field).then(tell))
    })
    .await?;
    match promised {
        Some(promised) => follow_up::keep(app, promised).await,
        None => Ok(()),
    }
}
