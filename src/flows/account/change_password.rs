//! Sets the password of an account.

use crate::{
    accounts::{Caller, passwords},
    env::Long,
    error::Result,
    flows::{
        App,
        account::log_out::{Which, log_out},
        write,
    },
    ids::UserNum,
};

/// Sets the caller's password, and logs their other devices out if that is wanted. Errors: 400 `M_WEAK_PASSWORD`.
pub(crate) async fn change_password(
    app: &App,
    caller: &Caller,
    password: String,
    log_out_others: bool,
) -> Result<()> {
    set_password(app, caller.user, password).await?;
    if log_out_others {
        log_out(app, caller, Which::Others).await?;
    }
    Ok(())
}

/// Sets somebody's password.
pub(crate) async fn set_password(app: &App, user: UserNum, password: String) -> Result<()> {
    passwords::check(&password)?;
    let house = app.clone();
    let hash = move || passwords::hash(&house.env, &house.config.passwords, &password);
    let hash = app.env.blocking_long(Long::Password, hash).await?;
    write::for_user(app, user, move |_, batch| {
        passwords::set(batch, user, Some(&hash));
        Ok(())
    })
    .await
}
