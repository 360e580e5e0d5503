//! Sets the password of an account and ends its sessions if that is wanted.

use ruma::{OwnedUserId, UserId};

use crate::{
    accounts::{Caller, devices::Ending, passwords},
    error::Result,
    flows::{
        App,
        account::{log_out, password},
        jobs, write,
    },
    ids::UserNum,
    store::{Batch, timer::Timer},
};

/// Sets the caller's password, and logs out their other devices if `log_out_others` is set. Errors: 400 `M_WEAK_PASSWORD`.
pub(crate) async fn change_password(
    app: &App,
    caller: &Caller,
    password: String,
    log_out_others: bool,
) -> Result<()> {
    let hash = password::hash(app, password).await?;
    let ending = log_out_others.then_some(Ending::AllBut(caller.device));
    let (user, user_id) = (caller.user, caller.user_id.clone());
    let store = move |app: &App, batch: &mut Batch| store(app, batch, user, &user_id, &hash, ending.as_ref());
    let promised = write::for_caller(app, caller, store).await?;
    jobs::begin(app, promised);
    Ok(())
}

/// Sets a user's password for the operator, and ends all sessions of the account, in one batch. Errors: 400 `M_WEAK_PASSWORD`.
pub(crate) async fn reset_password(
    app: &App,
    user: UserNum,
    user_id: OwnedUserId,
    password: String,
) -> Result<()> {
    let hash = password::hash(app, password).await?;
    let store =
        move |app: &App, batch: &mut Batch| store(app, batch, user, &user_id, &hash, Some(&Ending::All));
    let promised = write::for_user(app, user, store).await?;
    jobs::begin(app, promised);
    Ok(())
}

/// Stores the hash of a new password, and ends the sessions that `ending` names.
fn store(
    app: &App,
    batch: &mut Batch,
    user: UserNum,
    user_id: &UserId,
    hash: &str,
    ending: Option<&Ending>,
) -> Result<Option<Timer>> {
    passwords::set(batch, user, Some(hash));
    match ending {
        Some(ending) => log_out::end(app, batch, user, user_id, ending),
        None => Ok(None),
    }
}
