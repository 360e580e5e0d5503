//! Limits on tried passwords. Each try is counted by account before the password is verified, so that neither many tries at
//! once nor many addresses allow more of them.
//!
//! Strangers share the tries of an account. A caller with a session of the account, or from a network where one of its devices
//! was seen last, has tries of their own, so that nobody else can lock an owner out there.

use std::net::IpAddr;

use ruma::UserId;
use sha2::{Digest, Sha256};

use crate::{
    accounts::{Caller, devices},
    error::Result,
    flows::{
        App,
        limits::{Limit, Source, network},
    },
    ids::UserNum,
};

/// The permission to verify one password now.
pub(crate) struct Guess(Source);

impl Guess {
    /// Gives the try back, because the password was right.
    pub(crate) fn was_right(self, app: &App) {
        app.limits.give_back(Limit::Password, self.0);
    }
}

/// Counts a password that a session of the account tries. Errors: 429 `M_LIMIT_EXCEEDED`.
pub(crate) fn by_session(app: &App, caller: &Caller) -> Result<Guess> {
    let source = Source::Device(caller.user, caller.device);
    app.limits.take(Limit::Password, source)?;
    Ok(Guess(source))
}

/// Counts a password that is tried to log in, from an address that may be known. Errors: 429 `M_LIMIT_EXCEEDED`.
pub(crate) async fn by_stranger(app: &App, user: UserNum, from: Option<IpAddr>) -> Result<Guess> {
    let all = Source::User(user);
    let Err(refused) = app.limits.take(Limit::Password, all) else { return Ok(Guess(all)) };
    let Some(from) = from else { return Err(refused) };
    if !was_seen_at(app, user, from).await? {
        return Err(refused);
    }
    let own = Source::user_at(user, from);
    app.limits.take(Limit::Password, own)?;
    Ok(Guess(own))
}

/// Counts a password for an account that does not exist, so that its name is answered like one that does. Errors: 429
/// `M_LIMIT_EXCEEDED`.
pub(crate) fn for_nobody(app: &App, user_id: &UserId) -> Result<()> {
    let digest: [u8; 32] = Sha256::digest(user_id.as_str()).into();
    let (name, _) = digest.split_at(16);
    let name = name.try_into().map_or(0, u128::from_be_bytes);
    app.limits.take(Limit::Password, Source::Name(name))
}

/// Whether a device of the account was last seen in the network of this address.
async fn was_seen_at(app: &App, user: UserNum, from: IpAddr) -> Result<bool> {
    let store = app.store.clone();
    let was_seen = move || {
        let near = |seen: &str| seen.parse().is_ok_and(|seen: IpAddr| network(seen) == network(from));
        Ok(devices::was_seen(&*store.snapshot(), user, near)?)
    };
    app.env.blocking(was_seen).await
}
