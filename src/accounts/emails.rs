//! The e-mail addresses of accounts. An address belongs to one account at most.
//!
//! Specification: appendices, "3PID Types", "E-Mail"; client-server API, `GET /account/3pid`.

use ruma::api::error::ErrorKind;

use crate::{
    error::{Exception, Refusal, Result},
    ids::UserNum,
    schema::{self, email::AddressRow},
    store::{Batch, Direction, Fault, Read, key::Json},
};

/// An account has at most this many addresses.
const ADDRESSES_MAX: usize = 20;
/// An address has at most this many bytes (RFC 5321, section 4.5.3.1.3).
const ADDRESS_BYTES_MAX: usize = 254;
/// The part before the `@` has at most this many bytes (RFC 5321, section 4.5.3.1.1).
const NAME_BYTES_MAX: usize = 64;
/// A label of a domain has at most this many bytes (RFC 1035, section 2.3.4).
const LABEL_BYTES_MAX: usize = 63;

/// The canonical form of an address, by which it is compared. Only ASCII is taken, where case folding is to write in lower case; a domain
/// in another script is written in its ASCII form. Errors: 400 `M_INVALID_PARAM` for what is no address.
pub fn canonical(address: &str) -> Result<String, Refusal> {
    let why = "An e-mail address is `name@example.org`, in ASCII and without quotes.";
    let wrong = || Refusal::invalid_param(why);
    let (name, domain) = address.rsplit_once('@').ok_or_else(wrong)?;
    // These may stand in a name without quotes (RFC 5322, section 3.2.3).
    let is_of_name = |it: u8| it.is_ascii_alphanumeric() || b"!#$%&'*+-/=?^_`{|}~".contains(&it);
    let is_part = |part: &str| !part.is_empty() && part.bytes().all(is_of_name);
    let is_of_label = |it: u8| it.is_ascii_alphanumeric() || it == b'-';
    let is_label = |label: &str| {
        (1..=LABEL_BYTES_MAX).contains(&label.len())
            && label.bytes().all(is_of_label)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let is_it = address.len() <= ADDRESS_BYTES_MAX
        && name.len() <= NAME_BYTES_MAX
        && name.split('.').all(is_part)
        && domain.contains('.')
        && domain.split('.').all(is_label)
        && domain.rsplit('.').next().is_some_and(|last| last.bytes().any(|it| it.is_ascii_alphabetic()));
    if is_it { Ok(address.to_ascii_lowercase()) } else { Err(wrong()) }
}

/// Lists the addresses of an account.
pub fn list(read: &(impl Read + ?Sized), user: UserNum) -> Result<Vec<(String, AddressRow)>, Fault> {
    let rows = schema::EMAILS.prefix::<(UserNum,)>(read, (user,), Direction::Up)?;
    rows.map(|row| row.map(|((_, address), Json(row))| (address, row))).collect()
}

/// Whether an account has this address, which is in its canonical form.
pub fn has(read: &(impl Read + ?Sized), user: UserNum, address: &str) -> Result<bool, Fault> {
    schema::EMAILS.contains(read, (user, address))
}

/// Adds an address, in its canonical form, to an account. The caller holds the locks of the user and of the server. Errors: 409
/// `M_THREEPID_IN_USE` for one that another account has; 413 for too many. One that the account has already stays as it is.
pub fn add(batch: &mut Batch, user: UserNum, address: &str, now_ms: u64) -> Result<()> {
    match schema::EMAIL_OWNERS.get(batch, address)? {
        Some(owner) if owner == user => return Ok(()),
        Some(_) => {
            let why = "Another account has this e-mail address; remove it there first.";
            return Err(Refusal::new(ErrorKind::ThreepidInUse, why).exception(Exception::Taken).into());
        }
        None => {}
    }
    if list(batch, user)?.len() >= ADDRESSES_MAX {
        let why = format!("An account has at most {ADDRESSES_MAX} e-mail addresses.");
        return Err(Refusal::too_large(why).into());
    }
    let row = AddressRow { validated_ms: now_ms, added_ms: now_ms };
    schema::EMAILS.put(batch, (user, address), &Json(row));
    schema::EMAIL_OWNERS.put(batch, address, &user);
    Ok(())
}

/// Removes an address from an account, if the account has it. The caller holds the locks of the user and of the server.
pub fn remove(batch: &mut Batch, user: UserNum, address: &str) -> Result<bool, Fault> {
    let is_there = has(batch, user, address)?;
    if is_there {
        schema::EMAILS.delete(batch, (user, address));
        schema::EMAIL_OWNERS.delete(batch, address);
    }
    Ok(is_there)
}

/// Removes all addresses of an account that ends. The caller holds the locks of the user and of the server.
pub fn remove_all(batch: &mut Batch, user: UserNum) -> Result<(), Fault> {
    for (address, _) in list(batch, user)? {
        remove(batch, user, &address)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_written_in_lower_case() {
        for (address, expected) in [
            ("Alice@Example.ORG", "alice@example.org"),
            ("a.b+c_d@x-y.example", "a.b+c_d@x-y.example"),
            ("o'neil@xn--bcher-kva.example", "o'neil@xn--bcher-kva.example"),
        ] {
            assert_eq!(canonical(address).unwrap(), expected);
        }
        let long = format!("{}@{}.example", "a".repeat(64), "b".repeat(63));
        assert_eq!(canonical(&long).unwrap(), long);
    }

    #[test]
    fn no_address_holds_what_a_mail_server_takes_for_something_else() {
        for address in [
            "",
            "alice",
            "@example.org",
            "alice@",
            "alice@localhost",
            "alice@[127.0.0.1]",
            "alice@127.0.0.1",
            "a b@example.org",
            "\"a b\"@example.org",
            "<alice@example.org>",
            "mailto:alice@example.org",
            "alice@example.org>",
            "alice@example.org\r\nRCPT TO:<bob@example.org>",
            "alice\n@example.org",
            "alice@exa\u{0}mple.org",
            ".alice@example.org",
            "alice.@example.org",
            "a..b@example.org",
            "alice@-a.example",
            "alice@a-.example",
            "alice@a..example",
            "alice@example.org.",
            "alice@bob@example.org",
            "alice,bob@example.org",
            "Strau\u{df}@example.org",
            "alice@b\u{fc}cher.example",
        ] {
            assert!(canonical(address).is_err(), "{address:?}");
        }
        for (name, label) in [(65, 3), (3, 64)] {
            assert!(canonical(&format!("{}@{}.example", "a".repeat(name), "b".repeat(label))).is_err());
        }
        let label = format!("{}.", "b".repeat(60));
        assert!(canonical(&format!("a@{}example", label.repeat(5))).is_err(), "the whole is too long");
    }
}
