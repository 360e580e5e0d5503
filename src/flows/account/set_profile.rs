//! Changes a profile, and writes it into the user's rooms.

use serde_json::Value;

use crate::{
    accounts::{Caller, profiles},
    error::Result,
    flows::{
        App, jobs,
        limits::{Limit, Source},
        write,
    },
    rooms::members,
    schema::jobs::Job,
};

/// Sets a field of the caller's profile, or deletes it if `value` is none. A field that rooms show is written into every room
/// that the user is in. Each of these rooms counts as a membership. Errors: 429 `M_LIMIT_EXCEEDED`, and then nothing is changed.
pub(crate) async fn set_profile(
    app: &App,
    caller: &Caller,
    field: String,
    value: Option<Value>,
) -> Result<()> {
    let user = caller.user;
    let promised = write::for_caller(app, caller, move |app, batch| {
        let changed = match value {
            Some(value) => profiles::set(batch, user, &field, value)?,
            None => profiles::delete(batch, user, &field)?,
        };
        if !changed {
            return Ok(None);
        }
        let told = profiles::is_shown_in_rooms(&field);
        if told {
            let rooms = members::list_joined_rooms(batch, user)?.len();
            app.limits.take_following(Limit::Membership, Source::User(user), rooms)?;
        }
        write::wake(batch, user);
        Ok(told.then(|| jobs::promise(app, batch, &Job::TellRooms { user })))
    })
    .await?;
    jobs::keep(app, promised).await
}
