//! The syntax of user names (<https://spec.matrix.org/v1.19/appendices/#user-identifiers>).

use ruma::{OwnedUserId, ServerName, UserId, api::error::ErrorKind};

use crate::error::{Refusal, Result};

/// A user id has at most this many bytes with its sigil and server name (the specification's bound).
const USER_ID_BYTES_MAX: usize = 255;

/// The user id of a new account with this localpart. Upper-case letters are taken as lower-case ones.
/// Errors: 400 `M_INVALID_USERNAME`.
pub fn new_user_id(localpart: &str, server_name: &ServerName) -> Result<OwnedUserId> {
    let invalid = |why: &str| Refusal::new(ErrorKind::InvalidUsername, why);
    let localpart = localpart.to_ascii_lowercase();
    if localpart.is_empty() {
        return Err(invalid("A user name cannot be empty.").into());
    }
    if localpart.len() + server_name.as_str().len() + 2 > USER_ID_BYTES_MAX {
        return Err(invalid("This user name is too long.").into());
    }
    let is_allowed =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._=-/+".contains(&byte);
    if !localpart.bytes().all(is_allowed) {
        return Err(invalid("A user name can have the characters a-z, 0-9, and . _ = - / + only.").into());
    }
    if localpart.starts_with('_') {
        return Err(invalid("User names that begin with _ are kept for bridges.").into());
    }
    UserId::parse(format!("@{localpart}:{server_name}"))
        .map_err(|_| invalid("This is not a user name.").into())
}

/// The localpart of a new account, from a text that is either a localpart or a full user id of this server.
/// Errors: 400 `M_INVALID_USERNAME` for a user id of another server.
pub fn localpart_of<'n>(given: &'n str, server_name: &ServerName) -> Result<&'n str> {
    let Some(user_id) = given.strip_prefix('@') else { return Ok(given) };
    match user_id.split_once(':') {
        Some((localpart, server)) if server == server_name.as_str() => Ok(localpart),
        _ => {
            let why = format!("{given} is not a user id of this server, {server_name}.");
            Err(Refusal::new(ErrorKind::InvalidUsername, why).into())
        }
    }
}

/// The user id for a text with which somebody logs in: a full user id of this server, or a localpart. None if it cannot be one
/// of ours. Historical user ids are accepted, for accounts of that kind may exist.
pub fn meant_user_id(given: &str, server_name: &ServerName) -> Option<OwnedUserId> {
    let user_id = match given.strip_prefix('@') {
        Some(_) => UserId::parse(given).ok()?,
        None => UserId::parse(format!("@{given}:{server_name}")).ok()?,
    };
    (user_id.server_name() == server_name).then_some(user_id)
}

#[cfg(test)]
mod tests {
    use ruma::server_name;

    use super::*;

    #[test]
    fn new_names_follow_the_strict_grammar() {
        let server = server_name!("a.example");
        assert_eq!(new_user_id("Alice.1=/+-", server).unwrap(), "@alice.1=/+-:a.example");
        for bad in ["", "a b", "ä", "a:b", "@a", "_bridge", "a\0", "a!", &"a".repeat(245)] {
            let error = new_user_id(bad, server).unwrap_err();
            assert_eq!(error.refusal().unwrap().kind, ErrorKind::InvalidUsername, "{bad}");
        }
        assert_eq!(new_user_id(&"a".repeat(244), server).unwrap().as_str().len(), 255);
    }

    #[test]
    fn a_full_user_id_of_this_server_names_a_new_account_too() {
        let server = server_name!("a.example:8448");
        assert_eq!(localpart_of("alice", server).unwrap(), "alice");
        assert_eq!(localpart_of("@alice:a.example:8448", server).unwrap(), "alice");
        for other in ["@alice", "@alice:a.example", "@alice:b.example"] {
            assert!(localpart_of(other, server).is_err(), "{other}");
        }
    }

    #[test]
    fn who_logs_in_may_name_a_localpart_or_a_user_id_of_this_server() {
        let server = server_name!("a.example");
        assert_eq!(meant_user_id("alice", server).unwrap(), "@alice:a.example");
        assert_eq!(meant_user_id("@Alice!:a.example", server).unwrap(), "@Alice!:a.example");
        assert!(meant_user_id("@alice:b.example", server).is_none());
        assert!(meant_user_id("@alice", server).is_none());
        assert!(
            meant_user_id("", server).is_none() || meant_user_id("", server).unwrap().localpart().is_empty()
        );
    }
}
