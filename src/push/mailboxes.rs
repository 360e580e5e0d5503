//! The state of pushers of kind `email`, and what users wish of digests.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use subtle::ConstantTimeEq;

use crate::{
    env::Env,
    ids::UserNum,
    push::places,
    schema::{
        self,
        email::{MailboxRow, PreferencesRow},
        push::PusherPlace,
    },
    store::{Batch, Direction, Fault, Read, key::Json},
};

/// The shortest time for which a user may have a notification wait, in milliseconds.
pub const DELAY_MS_MIN: u64 = 60_000;
/// The longest time for which a user may have a notification wait, in milliseconds.
pub const DELAY_MS_MAX: u64 = 24 * 60 * 60 * 1_000;
/// The number of random bytes of a secret.
const SECRET_BYTES: usize = 32;
/// The number of bytes that name the user in a link.
const USER_BYTES: usize = 8;

/// Makes the secret of a link.
pub fn make_secret(env: &Env) -> String {
    let mut secret = [0; SECRET_BYTES];
    env.fill_random(&mut secret);
    URL_SAFE_NO_PAD.encode(secret)
}

/// The token of the link by which a pusher of this user ends. It names the user, so that no index of tokens is kept.
pub fn token_of(user: UserNum, secret: &str) -> String {
    [URL_SAFE_NO_PAD.encode(user.0.to_be_bytes()).as_str(), secret].concat()
}

/// The user and the secret that a token names.
fn read_token(token: &str) -> Option<(UserNum, &str)> {
    // Base64 writes 4 characters for 3 bytes; the rest of a group is as long as it must be.
    let (user, secret) = token.split_at_checked(USER_BYTES * 4 / 3 + 1)?;
    let user: [u8; USER_BYTES] = URL_SAFE_NO_PAD.decode(user).ok()?.try_into().ok()?;
    Some((UserNum(u64::from_be_bytes(user)), secret))
}

/// Finds the pusher of kind `email` that a token names: its user, app id and pushkey. A stranger may ask with any token, so that nothing is
/// read but the few rows of pushers of this kind.
pub(super) fn find_by_token(
    read: &(impl Read + ?Sized),
    token: &str,
) -> Result<Option<(UserNum, String, String)>, Fault> {
    let Some((user, secret)) = read_token(token) else { return Ok(None) };
    for row in schema::MAILBOXES.prefix::<(UserNum,)>(read, (user,), Direction::Up)? {
        let (key, Json(row)) = row?;
        if is_secret(&row, secret) {
            return Ok(Some(key));
        }
    }
    Ok(None)
}

/// Whether this is the secret of a pusher.
fn is_secret(row: &MailboxRow, secret: &str) -> bool {
    !row.secret.is_empty() && bool::from(row.secret.as_bytes().ct_eq(secret.as_bytes()))
}

/// The state of one pusher.
pub fn find(read: &(impl Read + ?Sized), key: (UserNum, &str, &str)) -> Result<Option<MailboxRow>, Fault> {
    Ok(schema::MAILBOXES.get(read, key)?.map(|Json(row)| row))
}

/// Begins the state of a pusher that is set, as part of the batch that sets it. One that had a state keeps its link and its pauses, and is
/// tried again.
pub(super) fn begin(batch: &mut Batch, key: (UserNum, &str, &str), secret: String) -> Result<(), Fault> {
    let row = match find(batch, key)? {
        Some(known) => MailboxRow { refusals: 0, not_before_ms: 0, ..known },
        None => MailboxRow { secret, ..MailboxRow::default() },
    };
    schema::MAILBOXES.put(batch, key, &Json(row));
    Ok(())
}

pub(super) fn forget(batch: &mut Batch, key: (UserNum, &str, &str)) {
    schema::MAILBOXES.delete(batch, key);
}

/// How far a pusher has come: its place, and its state beside that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The position up to which everything is dealt with.
    pub place: PusherPlace,
    /// The rest of its state.
    pub row: MailboxRow,
}

/// Moves a pusher on, if it still stands where it is `known` to. Answers whether it does; where it does not, the pusher was deleted or set
/// anew meanwhile, and nothing is written.
pub fn advance(
    batch: &mut Batch,
    key: (UserNum, &str, &str),
    known: &Standing,
    to: &Standing,
) -> Result<bool, Fault> {
    let row = schema::MAILBOXES.expect_as_read(batch, key)?.map(|Json(row)| row);
    if row.as_ref() != Some(&known.row) || !places::advance(batch, key, known.place, to.place)? {
        return Ok(false);
    }
    schema::MAILBOXES.put(batch, key, &Json(to.row.clone()));
    Ok(true)
}

/// The wishes of a user; those of one who has said none are the defaults.
pub fn preferences(read: &(impl Read + ?Sized), user: UserNum) -> Result<PreferencesRow, Fault> {
    Ok(schema::EMAIL_PREFERENCES.get(read, user)?.map(|Json(row)| row).unwrap_or_default())
}

/// Keeps the wishes of a user. The caller holds the user's lock.
pub(super) fn set_preferences(batch: &mut Batch, user: UserNum, wishes: PreferencesRow) {
    schema::EMAIL_PREFERENCES.put(batch, user, &Json(wishes));
}

/// Forgets the wishes of a user whose account ends. The caller holds the user's lock.
pub fn forget_preferences(batch: &mut Batch, user: UserNum) {
    schema::EMAIL_PREFERENCES.delete(batch, user);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_names_its_user_and_holds_the_secret() {
        let env = Env::simulated(1, 0);
        let (one, other) = (make_secret(&env), make_secret(&env));
        assert_ne!(one, other);
        let token = token_of(UserNum(u64::MAX - 7), &one);
        assert!(token.bytes().all(|it| it.is_ascii_alphanumeric() || it == b'-' || it == b'_'), "{token}");
        let (user, secret) = read_token(&token).unwrap();
        assert_eq!((user, secret), (UserNum(u64::MAX - 7), one.as_str()));
        let row = MailboxRow { secret: one.clone(), ..MailboxRow::default() };
        assert!(is_secret(&row, secret) && !is_secret(&row, &other) && !is_secret(&row, ""));
        assert!(!is_secret(&MailboxRow::default(), ""), "no secret opens nothing");
        for wrong in
            ["", "a", "AAAAAAAAAA", "??????????????????????", "\u{e4}\u{e4}\u{e4}\u{e4}\u{e4}\u{e4}\u{e4}"]
        {
            assert!(read_token(wrong).is_none_or(|(_, secret)| !is_secret(&row, secret)), "{wrong}");
        }
    }
}
