//! Permission to make an account: registration tokens, and nonces of the shared-secret registration.

use std::collections::BTreeMap;

use hmac::{Hmac, KeyInit, Mac};
use parking_lot::Mutex;
use ruma::api::error::ErrorKind;
use sha1::Sha1;
use subtle::ConstantTimeEq;

use crate::{
    accounts::{Accounts, users},
    env::Env,
    error::{Error, Refusal, Result},
    schema::{self, accounts::RegistrationTokenRow},
    store::{Batch, Direction, Fault, LogEntry, Read, key::Json},
};

/// A registration token has at most this many characters (the specification's bound).
pub const TOKEN_CHARS_MAX: usize = 64;
/// At most this many nonces are open, because anybody may ask for one; the oldest goes first.
const NONCES_MAX: usize = 1_000;
/// A nonce lives this long, in milliseconds.
const NONCE_MS: u64 = 60_000;

/// Whether the text can be a registration token: 1 to 64 of A-Z a-z 0-9 . _ ~ -
/// (<https://spec.matrix.org/v1.19/client-server-api/#token-authenticated-registration>).
pub fn is_token(text: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._~-".contains(&byte);
    (1..=TOKEN_CHARS_MAX).contains(&text.len()) && text.bytes().all(is_allowed)
}

/// Whether an account could be registered with this token now.
pub fn is_valid(
    read: &(impl Read + ?Sized),
    accounts: &Accounts,
    token: &str,
    now_ms: u64,
) -> Result<bool, Fault> {
    if is_first_token(accounts, token) {
        return Ok(!users::any(read)?);
    }
    if !is_token(token) {
        return Ok(false);
    }
    let row = schema::REGISTRATION_TOKENS.get(read, token)?;
    Ok(row.is_some_and(|Json(row)| is_live(&row, now_ms)))
}

fn is_first_token(accounts: &Accounts, token: &str) -> bool {
    accounts.first_token().is_some_and(|first| first.as_bytes().ct_eq(token.as_bytes()).into())
}

fn is_live(row: &RegistrationTokenRow, now_ms: u64) -> bool {
    row.uses_max.is_none_or(|max| row.uses < max) && row.expires_ms.is_none_or(|end| now_ms < end)
}

/// The kind of account that a registration token was spent on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spent {
    /// An account without special rights.
    User,
    /// The first account, which administers the server: the token was printed for the operator.
    FirstAdmin,
}

/// Uses the token for one account, in the batch that makes the account. The caller holds the server's lock.
/// Errors: 403 when it is no longer valid.
pub fn spend(batch: &mut Batch, accounts: &Accounts, token: &str, now_ms: u64) -> Result<Spent> {
    if !is_valid(batch, accounts, token, now_ms)? {
        return Err(Refusal::forbidden("This registration token is not valid.").into());
    }
    if is_first_token(accounts, token) {
        return Ok(Spent::FirstAdmin);
    }
    if let Some(Json(mut row)) = schema::REGISTRATION_TOKENS.get(batch, token)? {
        schema::REGISTRATION_TOKENS.expect_value(batch, token, &Json(row.clone()));
        row.uses += 1;
        schema::REGISTRATION_TOKENS.put(batch, token, &Json(row));
    }
    Ok(Spent::User)
}

/// Makes a registration token. The caller holds the server's lock. Errors: 400 if the text cannot be a token, if the token
/// exists, or if it could never be used.
pub fn create_token(batch: &mut Batch, token: &str, row: &RegistrationTokenRow) -> Result<()> {
    if !is_token(token) {
        let why = "A registration token has 1 to 64 of the characters A-Z a-z 0-9 . _ ~ -";
        return Err(Refusal::invalid_param(why).into());
    }
    if row.uses_max == Some(0) {
        return Err(
            Refusal::invalid_param("`uses` is 0; a registration token is for at least one use.").into()
        );
    }
    if row.expires_ms.is_some_and(|end| end <= row.created_ms) {
        return Err(Refusal::invalid_param("The registration token would end before its first use.").into());
    }
    if schema::REGISTRATION_TOKENS.contains(batch, token)? {
        return Err(Refusal::invalid_param("There is such a registration token already.").into());
    }
    schema::REGISTRATION_TOKENS.expect_absent(batch, token);
    schema::REGISTRATION_TOKENS.put(batch, token, &Json(row.clone()));
    batch.position(&LogEntry::Server);
    Ok(())
}

/// Deletes a registration token and answers its last row. The caller holds the server's lock. Errors: 404 if there is none.
pub fn revoke_token(batch: &mut Batch, token: &str) -> Result<RegistrationTokenRow> {
    let row = schema::REGISTRATION_TOKENS.get(batch, token)?;
    let Json(row) = row.ok_or_else(|| Refusal::not_found("There is no such registration token."))?;
    schema::REGISTRATION_TOKENS.delete(batch, token);
    batch.position(&LogEntry::Server);
    Ok(row)
}

/// Lists all registration tokens with their rows, also those that are used up or expired.
pub fn list_tokens(read: &(impl Read + ?Sized)) -> Result<Vec<(String, RegistrationTokenRow)>, Fault> {
    let rows = schema::REGISTRATION_TOKENS.prefix::<()>(read, (), Direction::Up)?;
    rows.map(|row| row.map(|(token, Json(row))| (token, row))).collect()
}

/// Nonces of the shared-secret registration: each good for one request within a minute.
#[derive(Debug, Default)]
pub(crate) struct Nonces(Mutex<Open>);

#[derive(Debug, Default)]
struct Open {
    /// Each nonce and when it was made (milliseconds since the epoch) by serial number, so that the oldest is found first.
    by_serial: BTreeMap<u64, (String, u64)>,
    last_serial: u64,
}

impl Nonces {
    /// Makes a nonce that is good for one request within a minute.
    pub(crate) fn make(&self, env: &Env) -> String {
        let nonce = env.random_string(32);
        let mut open = self.0.lock();
        open.last_serial += 1;
        let serial = open.last_serial;
        open.by_serial.insert(serial, (nonce.clone(), env.now_ms()));
        while open.by_serial.len() > NONCES_MAX {
            open.by_serial.pop_first();
        }
        nonce
    }

    /// Takes a nonce, and answers whether it was open. It cannot be used again.
    pub(crate) fn spend(&self, nonce: &str, now_ms: u64) -> bool {
        let mut open = self.0.lock();
        open.by_serial.retain(|_, (_, made_ms)| now_ms.abs_diff(*made_ms) < NONCE_MS);
        let serial = open.by_serial.iter().find(|(_, (made, _))| made == nonce).map(|(serial, _)| *serial);
        serial.is_some_and(|serial| open.by_serial.remove(&serial).is_some())
    }
}

/// The fields of a registration that are signed with the shared secret.
#[derive(Clone, Copy, Debug)]
pub struct Claim<'a> {
    /// The nonce that this server gave out.
    pub nonce: &'a str,
    /// The localpart of the new account.
    pub username: &'a str,
    /// The password of the new account.
    pub password: &'a str,
    /// Whether the account is to administer the server.
    pub is_admin: bool,
    /// The kind of user that the ecosystem's tools may name; signed where it is given.
    pub user_type: Option<&'a str>,
}

/// Whether the claim is signed with the shared secret: HMAC-SHA1 in hex over its fields, parted by zero bytes.
/// Errors: 403 `M_FORBIDDEN` for another signature.
pub fn check_claim(secret: &str, claim: &Claim<'_>, mac: &str) -> Result<()> {
    let mut expected = Hmac::<Sha1>::new_from_slice(secret.as_bytes())
        .map_err(|_| Error::broken("the shared secret cannot be a key of HMAC"))?;
    let admin = if claim.is_admin { "admin" } else { "notadmin" };
    let fields = [claim.nonce, claim.username, claim.password, admin];
    for (index, field) in fields.into_iter().chain(claim.user_type).enumerate() {
        if index > 0 {
            expected.update(&[0]);
        }
        expected.update(field.as_bytes());
    }
    let expected: String =
        expected.finalize().into_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    if bool::from(expected.as_bytes().ct_eq(mac.to_ascii_lowercase().as_bytes())) {
        return Ok(());
    }
    Err(Refusal::new(ErrorKind::Forbidden, "`mac` is not the HMAC of these fields under the shared secret.")
        .into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_have_the_specifications_grammar() {
        assert!(is_token("aZ09._~-"));
        assert!(is_token(&"a".repeat(64)));
        for bad in ["", "a b", "ä", &"a".repeat(65)] {
            assert!(!is_token(bad), "{bad}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_nonce_is_good_once_and_for_a_minute() {
        let (env, nonces) = (Env::simulated(1, 0), Nonces::default());
        let (first, second) = (nonces.make(&env), nonces.make(&env));
        assert!(nonces.spend(&first, env.now_ms()));
        assert!(!nonces.spend(&first, env.now_ms()));
        env.sleep(std::time::Duration::from_secs(61)).await;
        assert!(!nonces.spend(&second, env.now_ms()));
        assert!(!nonces.spend("other", env.now_ms()));
    }

    #[test]
    fn a_claim_is_signed_field_by_field() {
        // Made with: printf 'n\0alice\0pw\0notadmin' | openssl dgst -sha1 -hmac secret
        let claim = Claim { nonce: "n", username: "alice", password: "pw", is_admin: false, user_type: None };
        let good = "bed7b1c8bbb7b4e3701c0e2242bfeab2478b3713";
        assert!(check_claim("secret", &claim, good).is_ok());
        assert!(check_claim("secret", &claim, &good.to_uppercase()).is_ok());
        assert!(check_claim("other", &claim, good).is_err());
        assert!(check_claim("secret", &Claim { is_admin: true, ..claim }, good).is_err());
        assert!(check_claim("secret", &Claim { user_type: Some("bot"), ..claim }, good).is_err());
        assert!(check_claim("secret", &claim, "").is_err());
    }

    #[test]
    fn nonces_are_bounded_and_the_oldest_goes_first() {
        let (env, nonces) = (Env::simulated(1, 0), Nonces::default());
        let made: Vec<_> = (0..NONCES_MAX + 1).map(|_| nonces.make(&env)).collect();
        assert!(!nonces.spend(&made[0], env.now_ms()));
        assert!(made.iter().skip(1).all(|nonce| nonces.spend(nonce, env.now_ms())));
    }
}
