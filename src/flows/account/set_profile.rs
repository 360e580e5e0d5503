//! Changes a profile, and tells the rooms.

use serde_json::Value;

use crate::{
    accounts::{Caller, profiles},
    error::Result,
    flows::{App, account::follow_up, write},
};

/// Sets a field of the caller's profile, or deletes it; what rooms show of it is told to every room the user is in.
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
        write::wake(app, batch, user);
        Ok(profiles::is_shown_in_rooms(&field).then(|| follow_up::promise(app, batch, user)))
    })
    .await?;
    match promised {
        Some(promised) => follow_up::keep(app, user, promised).await,
        None => Ok(()),
    }
}
