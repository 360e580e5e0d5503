//! Passwords at rest: argon2id. Hashing takes long on purpose, so callers do it in `env.blocking_long`, outside locks.

use argon2::{Algorithm, Argon2, Params, PasswordVerifier, Version, password_hash::PasswordHasher};
use ruma::api::error::ErrorKind;

use crate::{
    config::Passwords,
    env::Env,
    error::{Error, Refusal, Result},
    ids::UserNum,
    schema,
    store::{Batch, Fault, LogEntry, Read},
};

/// A password has at most this many bytes; hashing a longer one would cost more and protect no better.
pub const PASSWORD_BYTES_MAX: usize = 1024;

fn argon2(cost: &Passwords) -> Result<Argon2<'static>> {
    let params = Params::new(cost.argon2_memory_kib, cost.argon2_iterations, cost.argon2_lanes, None)
        .map_err(|error| {
            Error::broken(format!("argon2 does not accept the settings of passwords: {error}"))
        })?;
    Ok(Argon2::new(Algorithm::Argon2id, Version::V0x13, params))
}

/// Refuses a text that cannot be a new password. Errors: 400 `M_WEAK_PASSWORD` if it is empty, 400 `M_INVALID_PARAM` if it
/// is longer than [`PASSWORD_BYTES_MAX`].
pub fn check(password: &str) -> Result<()> {
    if password.is_empty() {
        let refusal = Refusal::new(ErrorKind::WeakPassword, "A password cannot be empty.");
        return Err(refusal.into());
    }
    if password.len() > PASSWORD_BYTES_MAX {
        return Err(Refusal::invalid_param("A password has at most 1,024 bytes.").into());
    }
    Ok(())
}

/// The hash of a password, with a salt of its own, as a PHC string.
pub fn hash(env: &Env, cost: &Passwords, password: &str) -> Result<String> {
    let mut salt = [0; 16];
    env.fill_random(&mut salt);
    let hash = argon2(cost)?
        .hash_password_with_salt(password.as_bytes(), &salt)
        .map_err(|error| Error::broken(format!("a password cannot be hashed: {error}")))?;
    Ok(hash.to_string())
}

/// Whether the password is the one that was hashed. Without a hash (no such user, no password) the answer is no after the
/// same work, so that its time does not tell which users exist.
pub fn verify(env: &Env, cost: &Passwords, hash: Option<&str>, password: &str) -> Result<bool> {
    if password.len() > PASSWORD_BYTES_MAX {
        return Ok(false);
    }
    match hash {
        Some(hash) => Ok(argon2(cost)?.verify_password(password.as_bytes(), hash).is_ok()),
        None => self::hash(env, cost, password).map(|_| false),
    }
}

/// The hash of a user's password; none if they have none.
pub fn find(read: &(impl Read + ?Sized), user: UserNum) -> Result<Option<String>, Fault> {
    schema::PASSWORDS.get(read, user)
}

/// Sets a user's password to the one with this hash, or takes it away. The caller holds the user's lock.
pub fn set(batch: &mut Batch, user: UserNum, hash: Option<&str>) {
    match hash {
        Some(hash) => schema::PASSWORDS.put(batch, user, &hash.to_owned()),
        None => schema::PASSWORDS.delete(batch, user),
    }
    batch.position(&LogEntry::Account { user });
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHEAP: &Passwords = &Passwords { argon2_memory_kib: 8, argon2_iterations: 1, argon2_lanes: 1 };

    #[test]
    fn a_password_verifies_and_another_does_not() {
        let env = Env::simulated(1, 0);
        let stored = hash(&env, CHEAP, "correct horse").unwrap();
        assert!(stored.starts_with("$argon2id$v=19$m=8,t=1,p=1$"), "{stored}");
        assert!(verify(&env, CHEAP, Some(&stored), "correct horse").unwrap());
        assert!(!verify(&env, CHEAP, Some(&stored), "correct hors").unwrap());
        assert!(!verify(&env, CHEAP, Some("not a hash"), "correct horse").unwrap());
        assert!(!verify(&env, CHEAP, None, "correct horse").unwrap());
        assert_ne!(stored, hash(&env, CHEAP, "correct horse").unwrap());
    }

    #[test]
    fn a_hash_made_at_another_cost_still_verifies() {
        let env = Env::simulated(1, 0);
        let stored = hash(&env, &Passwords { argon2_iterations: 2, ..*CHEAP }, "p").unwrap();
        assert!(verify(&env, CHEAP, Some(&stored), "p").unwrap());
    }

    #[test]
    fn a_new_password_is_not_empty_and_not_endless() {
        assert_eq!(check("").unwrap_err().refusal().unwrap().kind, ErrorKind::WeakPassword);
        assert!(check(&"a".repeat(PASSWORD_BYTES_MAX)).is_ok());
        assert!(check(&"a".repeat(PASSWORD_BYTES_MAX + 1)).is_err());
    }
}
