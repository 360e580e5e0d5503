//! Tokens by which users show other services who they are: the service exchanges one for the user's id. They open nothing of
//! the account. A token names the user, so that one row holds all that a user has, and it is found without an index.
//!
//! A token proves who the user is for as long as the user could ask for another one: it ends with its device, and proves nothing while the
//! account is locked or suspended, because others see what a service lets its users do.
//!
//! Specification: client-server API, "OpenID"; server-server API, "OpenID".

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use ruma::{DeviceId, OwnedUserId, ServerName, UserId};
use sha2::{Digest, Sha256};

use crate::{
    accounts::{Caller, tokens, users},
    env::Env,
    ids::UserNum,
    schema::{
        self,
        accounts::{OpenIdRow, OpenIdToken},
    },
    store::{Batch, Fault, Read, key::Json},
};

/// A token lives this long, in milliseconds.
pub const LIFETIME_MS: u64 = 60 * 60 * 1_000;
/// A user has at most this many tokens; a newer one takes the place of the oldest.
pub const TOKENS_MAX: usize = 20;
/// Our tokens have fewer than this many bytes: the name of a user is at most 255 bytes long, and base64 makes four of three.
const TOKEN_BYTES_MAX: usize = 512;

const PREFIX: &str = "aqo_";

fn hash(token: &str) -> [u8; 32] {
    Sha256::digest(token.as_bytes()).into()
}

/// Makes a token of the caller's device.
pub fn make(batch: &mut Batch, env: &Env, caller: &Caller) -> Result<String, Fault> {
    let user = caller.user;
    let mut secret = [0; 32];
    env.fill_random(&mut secret);
    let name = URL_SAFE_NO_PAD.encode(caller.user_id.localpart());
    let token = format!("{PREFIX}{name}.{}", URL_SAFE_NO_PAD.encode(secret));
    let now_ms = env.now_ms();
    let mut row = schema::OPENID_TOKENS.get(batch, user)?.map_or_else(OpenIdRow::default, |Json(row)| row);
    row.tokens.retain(|token| token.expires_ms > now_ms);
    let excess = (row.tokens.len() + 1).saturating_sub(TOKENS_MAX);
    drop(row.tokens.drain(..excess));
    row.tokens.push(OpenIdToken {
        hash: hash(&token),
        expires_ms: now_ms.saturating_add(LIFETIME_MS),
        device_id: caller.device_id.to_string(),
        device: caller.device,
    });
    schema::OPENID_TOKENS.put(batch, user, &Json(row));
    Ok(token)
}

/// Finds the user whom a token names; `None` for one that is unknown or has expired, whose device has ended, or whose account is locked
/// or suspended.
pub fn find_user(
    read: &(impl Read + ?Sized),
    server: &ServerName,
    now_ms: u64,
    token: &str,
) -> Result<Option<OwnedUserId>, Fault> {
    let Some(user_id) = named(token, server) else { return Ok(None) };
    let Some(user) = users::find_num(read, &user_id)? else { return Ok(None) };
    let Some(Json(row)) = schema::OPENID_TOKENS.get(read, user)? else { return Ok(None) };
    let hash = hash(token);
    let is_it = |token: &&OpenIdToken| token.hash == hash && token.expires_ms > now_ms;
    let Some(token) = row.tokens.iter().find(is_it) else { return Ok(None) };
    let device = (token.device, <&DeviceId>::from(token.device_id.as_str()));
    let account = tokens::find_account_of(read, user, device)?;
    Ok(account.is_some_and(|account| !account.is_locked && !account.is_suspended).then_some(user_id))
}

fn named(token: &str, server: &ServerName) -> Option<OwnedUserId> {
    if token.len() > TOKEN_BYTES_MAX {
        return None;
    }
    let (name, _) = token.strip_prefix(PREFIX)?.split_once('.')?;
    let name = String::from_utf8(URL_SAFE_NO_PAD.decode(name).ok()?).ok()?;
    UserId::parse(format!("@{name}:{server}")).ok()
}

/// Deletes the tokens of a user whose account ends.
pub fn delete_all(batch: &mut Batch, user: UserNum) {
    schema::OPENID_TOKENS.delete(batch, user);
}
