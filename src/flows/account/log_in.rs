//! Logs a device in, with a password or a refresh token.

use ruma::{OwnedUserId, UserId, api::error::ErrorKind};

use crate::{
    accounts::{
        devices::{self, LogIn},
        passwords,
        tokens::{self, Holder, Issued},
        users,
    },
    encryption::device_lists,
    env::Long,
    error::{Refusal, Result},
    flows::{App, account::guess, write},
    store::Batch,
};

/// A device that was logged in, with the user id of its account.
pub(crate) struct LoggedIn {
    /// The user id of the account.
    pub(crate) user_id: OwnedUserId,
    /// The device and its tokens.
    pub(crate) session: Session,
}

/// A device that was logged in.
pub(crate) struct Session {
    /// The account and device.
    pub(crate) holder: Holder,
    /// The tokens that were given out to the device.
    pub(crate) tokens: Issued,
}

fn wrong() -> Refusal {
    Refusal::new(ErrorKind::Forbidden, "The user name or the password is not right.")
}

/// Logs in with a password. Errors: 403 for a wrong user or password, both after the same time.
pub(crate) async fn with_password(
    app: &App,
    meant: Option<OwnedUserId>,
    password: String,
    log_in: LogIn,
    refreshable: bool,
) -> Result<LoggedIn> {
    let snapshot = app.store.snapshot();
    let known = match &meant {
        Some(meant) => users::find_meant(&*snapshot, meant)?,
        None => None,
    };
    let hash = match known {
        Some((user, _)) => passwords::find(&*snapshot, user)?,
        None => None,
    };
    let guess = match (&known, &meant) {
        (Some((user, _)), _) => Some(guess::by_stranger(app, *user, log_in.ip).await?),
        (None, Some(meant)) => guess::for_nobody(app, meant).map(|()| None)?,
        (None, None) => None,
    };
    let owned = app.clone();
    let stored = hash.clone();
    let verify = move || passwords::verify(&owned.env, &owned.config.passwords, stored.as_deref(), &password);
    let right = app.env.blocking_long(Long::Password, verify).await?;
    let (Some((user, user_id)), true) = (known, right) else { return Err(wrong().into()) };
    if let Some(guess) = guess {
        guess.was_right(app);
    }
    write::for_user(app, user, move |app, batch| {
        // The password may have been changed, or the account deactivated, while this one was verified.
        if passwords::find(batch, user)? != hash || users::require(batch, user)?.is_deactivated {
            return Err(wrong().into());
        }
        let session = build(app, batch, user, &user_id, log_in, refreshable)?;
        Ok(LoggedIn { user_id, session })
    })
    .await
}

/// Logs a device in, as part of a batch under the user's lock.
pub(crate) fn build(
    app: &App,
    batch: &mut Batch,
    user: crate::ids::UserNum,
    user_id: &UserId,
    log_in: LogIn,
    refreshable: bool,
) -> Result<Session> {
    let (device, is_new) = devices::log_in(batch, &app.env, user, log_in)?;
    if is_new {
        device_lists::changed(batch, user, user_id)?;
        write::wake_sharing(batch, user);
    } else {
        // The id may have been that of an earlier device, whose tokens must not work for this one.
        tokens::revoke(batch, user, device.num)?;
    }
    let holder = Holder { user, device: device.num, device_id: device.id };
    let tokens = tokens::issue(batch, &app.env, &holder, refreshable);
    Ok(Session { holder, tokens })
}

/// `POST /refresh`: answers one new pair for a token, however often and however many at once ask with it.
/// Errors: 401 `M_UNKNOWN_TOKEN`.
pub(crate) async fn refresh(app: &App, token: String) -> Result<Issued> {
    // A new token may be accepted but not visible yet, so its user is looked up in the view of accepted rows.
    let user = tokens::require_refresh_holder(&app.store.view(), &token)?;
    write::for_user(app, user, move |app, batch| tokens::refresh(batch, &app.env, &token)).await
}
