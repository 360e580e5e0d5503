//! Locks and suspends accounts, and ends that again.

use crate::{
    accounts::users,
    error::{Refusal, Result},
    flows::{App, write},
    ids::UserNum,
    schema::accounts::UserRow,
    store::Wake,
};

/// Sets whether an account is locked, and whether it is suspended; what is none stays as it is. Its tokens stay valid, so that its
/// devices go on where they were once that ends. Errors: 404 `M_NOT_FOUND` for an account that has ended.
pub(crate) async fn set(
    app: &App,
    user: UserNum,
    locked: Option<bool>,
    suspended: Option<bool>,
) -> Result<UserRow> {
    write::for_user(app, user, move |_, batch| {
        if users::require(batch, user)?.is_deactivated {
            return Err(Refusal::not_found("The account has ended.").into());
        }
        let row = users::set_standing(batch, user, locked, suspended)?;
        if row.is_locked {
            batch.wake(Wake::Locked { user });
        }
        Ok(row)
    })
    .await
}
