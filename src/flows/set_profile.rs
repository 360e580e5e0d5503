//! Changes a profile, and tells the rooms.

use serde_json::Value;
use tokio::sync::oneshot;

use crate::{
    accounts::{Caller, profiles},
    error::{Error, Result},
    flows::{App, membership, write},
};

/// Sets a field of the caller's profile, or deletes it; what rooms show of it is told to every room the user is in.
pub(crate) async fn set_profile(
    app: &App,
    caller: &Caller,
    field: String,
    value: Option<Value>,
) -> Result<()> {
    let user = caller.user;
    let is_shown = profiles::is_shown_in_rooms(&field);
    let changed = write::for_user(app, user, move |app, batch| {
        let changed = match value {
            Some(value) => profiles::set(batch, user, &field, value)?,
            None => profiles::delete(batch, user, &field)?,
        };
        if changed {
            write::wake(app, batch, user);
        }
        Ok(changed)
    })
    .await?;
    if !changed || !is_shown {
        return Ok(());
    }
    let (told, all_told) = oneshot::channel();
    let (house, user_id) = (app.clone(), caller.user_id.clone());
    // A task of its own: a client that goes away does not stop it between two rooms.
    app.env.spawn(async move {
        drop(told.send(membership::renew_profile(&house, user, &user_id).await));
    });
    all_told.await.map_err(|_| Error::broken("the server stops"))?
}
