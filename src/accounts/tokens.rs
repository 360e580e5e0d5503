//! Access and refresh tokens. A token is 256 random bits; only its SHA-256 is stored.
//!
//! A refreshed pair is derived from the refresh token that was presented and a stored seed. So a client that presents the same
//! token again (a retry, a race) gets the same answer, though the stored rows do not reveal any token. The old pair lives until
//! the new access token or the new refresh token is first used
//! (<https://spec.matrix.org/v1.19/client-server-api/#refreshing-access-tokens>).

use std::{ops::Bound, time::Duration};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit, Mac};
use ruma::{
    DeviceId, OwnedDeviceId,
    api::error::{ErrorKind, UnknownTokenErrorData},
};
use sha2::{Digest, Sha256};

use crate::{
    accounts::{Caller, devices, users},
    env::Env,
    error::{Error, Refusal, Result},
    ids::{DeviceNum, UserNum},
    schema::{
        self,
        accounts::{AccessTokenRow, RefreshTokenRow, Successor, UserRow},
    },
    store::{Batch, Direction, Fault, LogEntry, Read, key::Json},
};

/// An access token that can be refreshed lives this long, in milliseconds.
pub const REFRESHABLE_MS: u64 = 60 * 60 * 1000;
/// Our tokens have fewer than this many bytes; a longer one is refused before it is hashed.
const TOKEN_BYTES_MAX: usize = 256;

pub(super) const KIND_ACCESS: u8 = 0;
pub(super) const KIND_REFRESH: u8 = 1;

type Hash = [u8; 32];

/// The tokens of a log-in, for the one who logged in. Nothing prints them.
pub struct Issued {
    /// The access token, which goes with each request.
    pub access_token: String,
    /// The refresh token, which is exchanged for a new pair; none if the client cannot refresh.
    pub refresh_token: Option<String>,
    /// How long the access token lives; for ever, if none.
    pub expires_in: Option<Duration>,
}

/// A refreshed access token that was not used before, with the pair that its first use must delete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unused {
    access: Hash,
    replaces: Hash,
}

fn hash(token: &str) -> Hash {
    Sha256::digest(token.as_bytes()).into()
}

fn random_token(env: &Env, prefix: &str) -> String {
    let mut secret = [0; 32];
    env.fill_random(&mut secret);
    format!("{prefix}{}", URL_SAFE_NO_PAD.encode(secret))
}

const ACCESS_PREFIX: &str = "aqa_";
const REFRESH_PREFIX: &str = "aqr_";

/// The refusal of a token: 401 `M_UNKNOWN_TOKEN`.
fn unknown_token(message: &str, soft_logout: bool) -> Error {
    let mut data = UnknownTokenErrorData::new();
    data.soft_logout = soft_logout;
    Refusal::new(ErrorKind::UnknownToken(data), message).into()
}

/// The caller that an access token stands for, found with two reads. Before the caller may act, `flows::account::seen` is
/// called.
/// Errors: 401 `M_UNKNOWN_TOKEN`, with `soft_logout` where the token has expired.
pub fn find_caller(read: &(impl Read + ?Sized), now_ms: u64, token: &str) -> Result<Caller> {
    let unknown = || unknown_token("This access token is not known.", false);
    if token.len() > TOKEN_BYTES_MAX {
        return Err(unknown());
    }
    let access = hash(token);
    let row = schema::ACCESS_TOKENS.get(read, &access)?.ok_or_else(unknown)?;
    if row.expires_ms.is_some_and(|end| end <= now_ms) {
        return Err(unknown_token("This access token has expired.", true));
    }
    let user = schema::USERS.get(read, row.user)?.ok_or_else(unknown)?;
    if user.is_deactivated || user.ended.contains(row.device) {
        return Err(unknown());
    }
    Ok(Caller {
        user: row.user,
        user_id: user.user_id,
        device: row.device,
        device_id: row.device_id,
        is_guest: user.is_guest,
        is_admin: user.is_admin,
        is_locked: user.is_locked,
        is_suspended: user.is_suspended,
        unused: row.replaces.map(|replaces| Unused { access, replaces }),
    })
}

/// When an access token expires, in milliseconds since the epoch. None for one that does not, or that is not known.
pub fn find_expiry(read: &(impl Read + ?Sized), token: &str) -> Result<Option<u64>, Fault> {
    if token.len() > TOKEN_BYTES_MAX {
        return Ok(None);
    }
    Ok(schema::ACCESS_TOKENS.get(read, &hash(token))?.and_then(|row| row.expires_ms))
}

/// Refuses a caller whose device has ended since their request was authenticated: 401 `M_UNKNOWN_TOKEN`. What is written for
/// a device is swept when it ends, and nothing may be written for it after that.
pub fn require_session(read: &(impl Read + ?Sized), caller: &Caller) -> Result<()> {
    require_account(read, caller).map(drop)
}

/// The account of a device that has not ended. None where either has.
pub(super) fn find_account_of(
    read: &(impl Read + ?Sized),
    user: UserNum,
    (device, device_id): (DeviceNum, &DeviceId),
) -> Result<Option<UserRow>, Fault> {
    let Some(account) = users::find(read, user)?.filter(|account| !account.is_deactivated) else {
        return Ok(None);
    };
    let found = devices::find_live(read, user, &account.ended, device_id)?;
    Ok(found.is_some_and(|found| found.num == device).then_some(account))
}

/// The account of a caller whose device has not ended.
fn require_account(read: &(impl Read + ?Sized), caller: &Caller) -> Result<UserRow> {
    if let Some(account) = find_account_of(read, caller.user, (caller.device, &*caller.device_id))? {
        return Ok(account);
    }
    tracing::debug!(user = %caller.user, device = %caller.device, reason = "the device has ended", "a write is refused");
    Err(unknown_token("The device was logged out while the request was under way.", false))
}

/// Refuses a caller who has waited, where their device has ended meanwhile (401 `M_UNKNOWN_TOKEN`) or their account was locked (401
/// `M_USER_LOCKED`).
pub fn require_still(read: &(impl Read + ?Sized), caller: &Caller) -> Result<()> {
    if require_account(read, caller)?.is_locked { Err(users::locked().into()) } else { Ok(()) }
}

/// The device that tokens are given out to.
#[derive(Clone, Debug)]
pub struct Holder {
    /// The account that the device belongs to.
    pub user: UserNum,
    /// The number of the device.
    pub device: DeviceNum,
    /// The id of the device.
    pub device_id: OwnedDeviceId,
}

/// Gives out tokens for a log-in: a pair if the client can refresh, and otherwise an access token that lives until the device
/// is logged out.
pub fn issue(batch: &mut Batch, env: &Env, holder: &Holder, refreshable: bool) -> Issued {
    let access_token = random_token(env, ACCESS_PREFIX);
    let access = hash(&access_token);
    let expires_ms = refreshable.then(|| env.now_ms() + REFRESHABLE_MS);
    put_access(batch, holder, &access, expires_ms, None);
    let refresh_token = refreshable.then(|| random_token(env, REFRESH_PREFIX));
    if let Some(token) = &refresh_token {
        put_refresh(batch, holder, &hash(token), access, None);
    }
    batch.position(&LogEntry::Device { user: holder.user });
    Issued {
        access_token,
        refresh_token,
        expires_in: refreshable.then_some(Duration::from_millis(REFRESHABLE_MS)),
    }
}

fn put_access(
    batch: &mut Batch,
    holder: &Holder,
    access: &Hash,
    expires_ms: Option<u64>,
    replaces: Option<Hash>,
) {
    let (user, device, device_id) = (holder.user, holder.device, holder.device_id.clone());
    let row = AccessTokenRow { user, device, device_id, expires_ms, replaces };
    schema::ACCESS_TOKENS.put(batch, access, &row);
    schema::DEVICE_TOKENS.put(batch, (user, device, KIND_ACCESS, access), &());
}

fn put_refresh(batch: &mut Batch, holder: &Holder, refresh: &Hash, access: Hash, replaces: Option<Hash>) {
    let row = RefreshTokenRow {
        user: holder.user,
        device: holder.device,
        device_id: holder.device_id.clone(),
        access,
        replaces,
        successor: None,
    };
    schema::REFRESH_TOKENS.put(batch, refresh, &Json(row));
    schema::DEVICE_TOKENS.put(batch, (holder.user, holder.device, KIND_REFRESH, refresh), &());
}

/// The user who holds this refresh token, whose lock [`refresh`] needs. Errors: 401 `M_UNKNOWN_TOKEN`.
pub fn require_refresh_holder(read: &(impl Read + ?Sized), token: &str) -> Result<UserNum> {
    require_refresh(read, token).map(|(_, row)| row.user)
}

fn require_refresh(read: &(impl Read + ?Sized), token: &str) -> Result<(Hash, RefreshTokenRow)> {
    let unknown = || unknown_token("This refresh token is not known.", false);
    if token.len() > TOKEN_BYTES_MAX {
        return Err(unknown());
    }
    let refresh = hash(token);
    let Json(row) = schema::REFRESH_TOKENS.get(read, &refresh)?.ok_or_else(unknown)?;
    let user = schema::USERS.get(read, row.user)?.ok_or_else(unknown)?;
    if user.is_deactivated || user.ended.contains(row.device) {
        return Err(unknown());
    }
    if user.is_locked {
        return Err(users::locked().into());
    }
    Ok((refresh, row))
}

/// Exchanges a refresh token for a new pair, or answers the pair that it was exchanged for before. The caller holds the
/// user's lock.
/// Errors: 401 `M_UNKNOWN_TOKEN`.
pub fn refresh(batch: &mut Batch, env: &Env, token: &str) -> Result<Issued> {
    let (old, mut row) = require_refresh(batch, token)?;
    let now_ms = env.now_ms();
    // Using the new refresh token ends the pair it came from, also when the new access token was never used.
    if let Some(replaced) = row.replaces.take() {
        delete_pair(batch, &replaced)?;
        if let Some(mut access) = schema::ACCESS_TOKENS.get(batch, &row.access)? {
            access.replaces = None;
            schema::ACCESS_TOKENS.put(batch, &row.access, &access);
        }
        schema::REFRESH_TOKENS.put(batch, &old, &Json(row.clone()));
    }
    let successor = match row.successor.clone() {
        Some(successor) => successor,
        None => {
            let mut seed = [0; 32];
            env.fill_random(&mut seed);
            Successor { seed, expires_ms: now_ms + REFRESHABLE_MS }
        }
    };
    let access_token = derive(token, &successor.seed, ACCESS_PREFIX)?;
    let refresh_token = derive(token, &successor.seed, REFRESH_PREFIX)?;
    if row.successor.is_none() {
        let holder = Holder { user: row.user, device: row.device, device_id: row.device_id.clone() };
        let access = hash(&access_token);
        put_access(batch, &holder, &access, Some(successor.expires_ms), Some(old));
        put_refresh(batch, &holder, &hash(&refresh_token), access, Some(old));
        row.successor = Some(successor.clone());
        schema::REFRESH_TOKENS.put(batch, &old, &Json(row));
        batch.position(&LogEntry::Device { user: holder.user });
    }
    let left = successor.expires_ms.saturating_sub(now_ms);
    Ok(Issued {
        access_token,
        refresh_token: Some(refresh_token),
        expires_in: Some(Duration::from_millis(left)),
    })
}

/// A token that follows from the presented refresh token and the seed, and from neither alone.
fn derive(token: &str, seed: &[u8; 32], prefix: &str) -> Result<String> {
    let mut mac = Hmac::<Sha256>::new_from_slice(token.as_bytes())
        .map_err(|_| Error::broken("a token cannot be a key of HMAC"))?;
    mac.update(prefix.as_bytes());
    mac.update(seed);
    Ok(format!("{prefix}{}", URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes())))
}

/// The refreshed token is used for the first time, so the pair that it replaces is deleted. The caller holds the user's lock.
pub fn confirm(batch: &mut Batch, unused: &Unused) -> Result<(), Fault> {
    let Some(mut access) = schema::ACCESS_TOKENS.get(batch, &unused.access)? else { return Ok(()) };
    if access.replaces.take() != Some(unused.replaces) {
        return Ok(());
    }
    let user = access.user;
    schema::ACCESS_TOKENS.put(batch, &unused.access, &access);
    delete_pair(batch, &unused.replaces)?;
    batch.position(&LogEntry::Device { user });
    Ok(())
}

fn delete_pair(batch: &mut Batch, refresh: &Hash) -> Result<(), Fault> {
    let Some(Json(row)) = schema::REFRESH_TOKENS.get(batch, refresh)? else { return Ok(()) };
    let (user, device) = (row.user, row.device);
    schema::REFRESH_TOKENS.delete(batch, refresh);
    schema::DEVICE_TOKENS.delete(batch, (user, device, KIND_REFRESH, refresh));
    schema::ACCESS_TOKENS.delete(batch, &row.access);
    schema::DEVICE_TOKENS.delete(batch, (user, device, KIND_ACCESS, &row.access));
    Ok(())
}

/// Deletes every token of a device. The caller holds the user's lock.
pub fn revoke(batch: &mut Batch, user: UserNum, device: DeviceNum) -> Result<(), Fault> {
    sweep(batch, user, (device, device), usize::MAX).map(drop)
}

/// Deletes at most `tokens_max` tokens of the devices from the first to the last number. Answers whether none is left.
pub(crate) fn sweep(
    batch: &mut Batch,
    user: UserNum,
    (first, last): (DeviceNum, DeviceNum),
    tokens_max: usize,
) -> Result<bool, Fault> {
    let (low, high) = (Bound::Included((user, first)), Bound::Included((user, last)));
    let mut rows = schema::DEVICE_TOKENS.range::<(UserNum, DeviceNum)>(batch, low, high, Direction::Up)?;
    let some = rows.by_ref().take(tokens_max).collect::<Result<Vec<_>, _>>()?;
    let is_all = rows.next().transpose()?.is_none();
    drop(rows);
    for ((_, device, kind, hash), ()) in some {
        schema::DEVICE_TOKENS.delete(batch, (user, device, kind, &hash));
        match kind {
            KIND_ACCESS => schema::ACCESS_TOKENS.delete(batch, &hash),
            _ => schema::REFRESH_TOKENS.delete(batch, &hash),
        }
    }
    Ok(is_all)
}
