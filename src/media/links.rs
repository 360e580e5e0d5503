//! Temporary links: a random token that gives one item, without an access token, until a time. Only the SHA-256 of the token is stored,
//! so that whoever reads the store opens nothing.
//!
//! A link belongs to the user who made it, who lists and revokes it by an id that opens nothing either. A link that is for one opening
//! goes with the batch that its opening waits for (`flows/media/link.rs`).

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use sha2::{Digest as _, Sha256};

use crate::{
    env::Env,
    error::{Refusal, Result},
    ids::UserNum,
    media::{Name, items},
    schema::{
        self,
        jobs::Job,
        media::{Digest, LinkRow},
    },
    store::{Batch, Direction, Fault, Read, key::Json, timer},
};

/// A user has at most this many links at once.
pub const LINKS_MAX: usize = 100;
/// A link lives at least this long, in milliseconds.
pub const LIFETIME_MIN_MS: u64 = 1_000;
/// A link lives at most this long, in milliseconds: thirty days.
pub const LIFETIME_MAX_MS: u64 = 30 * 24 * 60 * 60 * 1_000;
/// A link lives this long, in milliseconds, where its maker says nothing: a day.
pub const LIFETIME_DEFAULT_MS: u64 = 24 * 60 * 60 * 1_000;
/// Our tokens have fewer than this many bytes; a longer one is refused before it is hashed.
const TOKEN_BYTES_MAX: usize = 128;
/// The id of a link has this many characters.
const ID_CHARS: usize = 16;

const PREFIX: &str = "aql_";

fn hash(token: &str) -> [u8; 32] {
    Sha256::digest(token.as_bytes()).into()
}

/// The refusal of a link that was never there, has ended, or gives nothing any more; nobody is told which: 404 `M_NOT_FOUND`.
pub fn no_such_link() -> Refusal {
    Refusal::not_found("There is no such link.")
}

/// The wish for a link.
#[derive(Clone, Copy, Debug)]
pub struct Wish {
    /// How long the link lives, in milliseconds.
    pub lifetime_ms: u64,
    /// Whether it is for one opening alone.
    pub is_once: bool,
}

/// Draws a token and the id of its link.
pub fn draw(env: &Env) -> (String, String) {
    let mut secret = [0; 32];
    env.fill_random(&mut secret);
    (format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(secret)), env.random_string(ID_CHARS))
}

/// Makes a link of a user to an item. The caller holds the user's lock. Errors: 404 `M_NOT_FOUND` where there is no such item or it is
/// given to nobody, 403 `M_FORBIDDEN` where it is another's and the user is no admin, 400 `M_INVALID_PARAM` for a lifetime out of bounds,
/// 403 `M_FORBIDDEN` where the user has as many links as a user may have.
pub fn make(
    batch: &mut Batch,
    (user, is_admin): (UserNum, bool),
    name: &Name,
    (token, id): (&str, &str),
    (wish, now_ms): (Wish, u64),
) -> Result<LinkRow> {
    if !(LIFETIME_MIN_MS..=LIFETIME_MAX_MS).contains(&wish.lifetime_ms) {
        let why =
            format!("`expires_in_ms` must be from {LIFETIME_MIN_MS} to {LIFETIME_MAX_MS} milliseconds.");
        return Err(Refusal::invalid_param(why).into());
    }
    let item = items::find(batch, name)?.ok_or_else(items::no_such_item)?;
    items::given(&item).ok_or_else(items::no_such_item)?;
    if item.by != Some(user) && !is_admin {
        return Err(
            Refusal::forbidden("Only who has uploaded a file, or an admin, makes links to it.").into()
        );
    }
    if list(batch, user)?.len() >= LINKS_MAX {
        let why =
            format!("You have {LINKS_MAX} links, as many as you may have: revoke one, or wait for its end.");
        return Err(Refusal::forbidden(why).into());
    }
    let row = LinkRow {
        id: id.to_owned(),
        user,
        server: name.server.clone(),
        media_id: name.id.clone(),
        at_ms: now_ms,
        expires_ms: now_ms.saturating_add(wish.lifetime_ms),
        is_once: wish.is_once,
    };
    let hash = hash(token);
    schema::MEDIA_LINK.expect_absent(batch, &hash);
    schema::MEDIA_LINK.put(batch, &hash, &Json(row.clone()));
    schema::MEDIA_LINK_OF_USER.put(batch, (user, id), &Json(Digest(hash)));
    timer::set(batch, &job(&row).timer(row.expires_ms));
    Ok(row)
}

/// Lists the links of a user, in the order of their ids, with those whose time is over and that are about to go.
pub fn list(read: &(impl Read + ?Sized), user: UserNum) -> Result<Vec<LinkRow>, Fault> {
    let mut links = Vec::new();
    for row in schema::MEDIA_LINK_OF_USER.prefix::<(UserNum,)>(read, (user,), Direction::Up)? {
        let (_, Json(hash)) = row?;
        links.extend(schema::MEDIA_LINK.get(read, &hash.0)?.map(|Json(link)| link));
    }
    Ok(links)
}

/// Finds the link of a token. None for one that is unknown or has ended, or whose user may no longer make it: the account has ended or is
/// locked, or was an admin's and is none any more. Whether the item is given at all is decided where it is given.
pub fn find(read: &(impl Read + ?Sized), token: &str, now_ms: u64) -> Result<Option<LinkRow>, Fault> {
    if token.len() > TOKEN_BYTES_MAX {
        return Ok(None);
    }
    let row = schema::MEDIA_LINK.get(read, &hash(token))?.map(|Json(row)| row);
    let Some(row) = row.filter(|row| row.expires_ms > now_ms) else { return Ok(None) };
    let user = schema::USERS.get(read, row.user)?.filter(|user| !user.is_deactivated && !user.is_locked);
    let Some(user) = user else { return Ok(None) };
    let name = Name { server: row.server.clone(), id: row.media_id.clone() };
    let item = items::find(read, &name)?;
    let may = item.is_some_and(|item| item.by == Some(row.user) || user.is_admin);
    Ok(may.then_some(row))
}

/// Ends a link of a user. Answers whether there was one. The caller holds the user's lock.
pub fn end(batch: &mut Batch, user: UserNum, id: &str) -> Result<bool, Fault> {
    let Some(Json(hash)) = schema::MEDIA_LINK_OF_USER.get(batch, (user, id))? else { return Ok(false) };
    if let Some(Json(row)) = schema::MEDIA_LINK.get(batch, &hash.0)? {
        timer::cancel(batch, &job(&row).timer(row.expires_ms));
        schema::MEDIA_LINK.delete(batch, &hash.0);
    }
    schema::MEDIA_LINK_OF_USER.delete(batch, (user, id));
    Ok(true)
}

/// Ends all links of a user. The caller holds the user's lock.
pub fn end_all(batch: &mut Batch, user: UserNum) -> Result<(), Fault> {
    for link in list(batch, user)? {
        end(batch, user, &link.id)?;
    }
    Ok(())
}

/// The timer's job by which a link goes.
pub(super) fn job(row: &LinkRow) -> Job {
    Job::EndLink { user: row.user, id: row.id.clone() }
}
