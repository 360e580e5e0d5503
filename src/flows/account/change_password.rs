//! Sets the password of an account and ends its sessions if that is wanted.

use ruma::OwnedUserId;

use crate::{
    accounts::{Caller, devices::Ending, passwords},
    env::Long,
    error::Result,
    flows::{App, account::log_out, write},
    ids::UserNum,
};

/// Sets the caller's password, and logs out their other devices if `log_out_others` is set. Errors: 400 `M_WEAK_PASSWORD`.
pub(crate) async fn change_password(
    app: &App,
    caller: &Caller,
    password: String,
    log_out_others: bool,
) -> Result<()> {
    let ending = log_out_others.then_some(Ending::AllBut(caller.device));
    set_password(app, caller.user, caller.user_id.clone(), password, ending).await
}

/// Sets a user's password and ends the sessions that `ending` names, in one batch. Errors: 400 `M_WEAK_PASSWORD`.
pub(crate) async fn set_password(
    app: &App,
    user: UserNum,
    user_id: OwnedUserId,
    password: String,
    ending: Option<Ending>,
) -> Result<()> {
    passwords::check(&password)?;
    let owned = app.clone();
    let hash = move || passwords::hash(&owned.env, &owned.config.passwords, &password);
    let hash = app.env.blocking_long(Long::Password, hash).await?;
    let promised = write::for_user(app, user, move |app, batch| {
        passwords::set(batch, user, Some(&hash));
        match &ending {
            Some(ending) => log_out::end(app, batch, user, &user_id, ending),
            None => Ok(None),
        }
    })
    .await?;
    log_out::begin_sweep(app, promised);
    Ok(())
}
