//! Logs a device in, with a password or a refresh token.

use ruma::{OwnedUserId, UserId, api::error::ErrorKind};

use crate::{
    accounts::{
        devices::{self, Device, LogIn},
        passwords,
        tokens::{self, Holder, Issued},
        users,
    },
    encryption::{cross_signing, device_lists},
    error::{Refusal, Result},
    flows::{App, account::guess, write},
    ids::UserNum,
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

/// The name under which somebody means to log in.
pub(crate) struct Named {
    /// The text that was given, whatever it is.
    pub(crate) given: String,
    /// The user of this server that the text means, whether they exist or not. None if it can mean no user of ours.
    pub(crate) meant: Option<OwnedUserId>,
}

/// Logs in with a password. Errors: 403 for a wrong user or password, both after the same time, and 429 for too many tries,
/// after as many for every name.
pub(crate) async fn with_password(
    app: &App,
    named: Named,
    password: String,
    log_in: LogIn,
    refreshable: bool,
) -> Result<LoggedIn> {
    let snapshot = app.store.snapshot();
    let known = match &named.meant {
        Some(meant) => users::find_meant(&*snapshot, meant)?,
        None => None,
    };
    let hash = match known {
        Some((user, _)) => passwords::find(&*snapshot, user)?,
        None => None,
    };
    drop(snapshot);
    let user = known.as_ref().map(|(user, _)| *user);
    let name = known.as_ref().map(|(_, user_id)| user_id).or(named.meant.as_ref());
    let name = name.map_or(named.given.as_str(), |user_id| user_id.as_str());
    let guess = guess::by_stranger(app, name, user, log_in.ip).await?;
    let is_right = guess.verify(app, hash.clone(), password).await?;
    let (Some((user, user_id)), true) = (known, is_right) else { return Err(wrong().into()) };
    write::for_user(app, user, move |app, batch| {
        // The password may have been changed, or the account deactivated, while this one was verified.
        if passwords::find(batch, user)? != hash || users::require(batch, user)?.is_deactivated {
            return Err(wrong().into());
        }
        if users::require(batch, user)?.is_locked {
            return Err(users::locked().into());
        }
        let session = build(app, batch, user, &user_id, log_in, refreshable)?;
        Ok(LoggedIn { user_id, session })
    })
    .await
}

/// The device that a log-in asks for, and whether it is new. All devices are made here, whether somebody logs in to them or not. Errors: those
/// of [`devices::log_in`]; 403 for the name of a key with which the user signs.
pub(crate) fn make_device(
    app: &App,
    batch: &mut Batch,
    user: UserNum,
    log_in: LogIn,
) -> Result<(Device, bool)> {
    let (device, is_new) = devices::log_in(batch, &app.env, user, log_in)?;
    if is_new && cross_signing::is_key(batch, user, &device.id)? {
        return Err(Refusal::forbidden("`device_id` is the name of a key with which the user signs.").into());
    }
    Ok((device, is_new))
}

/// Logs a device in, as part of a batch under the user's lock.
pub(crate) fn build(
    app: &App,
    batch: &mut Batch,
    user: UserNum,
    user_id: &UserId,
    log_in: LogIn,
    refreshable: bool,
) -> Result<Session> {
    let (device, is_new) = make_device(app, batch, user, log_in)?;
    if is_new {
        device_lists::changed(batch, user, user_id, std::slice::from_ref(&device.id))?;
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
