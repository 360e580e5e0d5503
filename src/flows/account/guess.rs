//! Limits on tried passwords. Each try is counted by account before the password is verified, so that neither many tries at
//! once nor many addresses allow more of them.
//!
//! Strangers share the tries of an account. A caller with a session of the account, or from a network where one of its devices
//! was seen last, has tries of their own, so that nobody else can lock an owner out there.
//!
//! Tries are counted by the name that was given, in one form for all ways to write it, and whether or not an account has it.
//! So the limit says the same of a name that exists and of one that does not.
//!
//! A right password is no guess, but it costs as much to verify. That is bounded by the shares of the queue in which it waits
//! (`env/payer.rs`), in which each try counts for its account and its address.

use std::net::IpAddr;

use sha2::{Digest, Sha256};

use crate::{
    accounts::{Caller, devices, passwords},
    env::{
        Long,
        payer::{self, Payer, network},
    },
    error::Result,
    flows::{
        App,
        limits::{Limit, Source},
    },
    ids::UserNum,
};

/// The permission to verify one password now.
pub(crate) struct Guess {
    source: Source,
    payer: Payer,
}

impl Guess {
    /// Whether the password is the one that was hashed; without a hash it is not, after the same work. The work counts for the
    /// account as well as for the address. A password that is right is no guess, and its try is given back. Errors: 429
    /// `M_LIMIT_EXCEEDED` where too many passwords wait to be verified, of all or of these payers.
    pub(crate) async fn verify(self, app: &App, hash: Option<String>, password: String) -> Result<bool> {
        let owned = app.clone();
        let verify =
            move || passwords::verify(&owned.env, &owned.config.passwords, hash.as_deref(), &password);
        let verified = app.env.blocking_long(Long::Password, verify);
        let is_right = payer::current().led_by(self.payer).during(verified).await?;
        if is_right {
            app.limits.give_back(Limit::Password, self.source);
        }
        Ok(is_right)
    }
}

/// Counts a password that a session of the account tries. Errors: 429 `M_LIMIT_EXCEEDED`.
pub(crate) fn by_session(app: &App, caller: &Caller) -> Result<Guess> {
    let source = Source::Device(caller.user, caller.device);
    app.limits.take(Limit::Password, source)?;
    Ok(Guess { source, payer: Payer::User(caller.user) })
}

/// Counts a password that is tried to log in under a name, from an address that may be known. `user` is the account that the
/// name means, if there is one. Errors: 429 `M_LIMIT_EXCEEDED`.
pub(crate) async fn by_stranger(
    app: &App,
    name: &str,
    user: Option<UserNum>,
    from: Option<IpAddr>,
) -> Result<Guess> {
    let name = digest(name);
    let payer = user.map_or(Payer::Name(name), Payer::User);
    let source = Source::Name(name);
    let Err(refused) = app.limits.take(Limit::Password, source) else { return Ok(Guess { source, payer }) };
    let (Some(user), Some(from)) = (user, from) else { return Err(refused) };
    if !was_seen_at(app, user, from).await? {
        return Err(refused);
    }
    let source = Source::user_at(user, from);
    app.limits.take(Limit::Password, source)?;
    Ok(Guess { source, payer })
}

/// The digest of a name, in which the case of letters makes no difference, as it makes none to log in.
fn digest(name: &str) -> u128 {
    let digest: [u8; 32] = Sha256::digest(name.to_lowercase()).into();
    let (name, _) = digest.split_at(16);
    name.try_into().map_or(0, u128::from_be_bytes)
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
