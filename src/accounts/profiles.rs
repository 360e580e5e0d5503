//! Profiles of local users: fields, of which two are shown in rooms.
//!
//! Specification: client-server API, "Profiles".

use bytes::Bytes;
use ruma::{MxcUri, UserId, api::error::ErrorKind};
use serde_json::{Map, Value};

use crate::{
    accounts::users,
    error::{Error, Refusal, Result},
    ids::UserNum,
    schema,
    store::{Batch, Direction, Fault, LogEntry, Read},
};

/// A whole profile is smaller than this many bytes of JSON (the specification's bound).
pub const PROFILE_BYTES_MAX: usize = 64 << 10;
/// The name of a field has at most this many bytes (the specification's bound).
pub const FIELD_BYTES_MAX: usize = 255;
/// A display name has at most this many characters, because each membership repeats it.
pub const DISPLAY_NAME_CHARS_MAX: usize = 256;
/// The address of an avatar has at most this many bytes, because each membership repeats it.
pub const AVATAR_URL_BYTES_MAX: usize = 1_000;
/// A field takes this many bytes beside its name and value: quotes, colon, comma.
const FIELD_OVERHEAD: usize = 4;

/// The fields that are shown with each membership of the user.
const SHOWN_IN_ROOMS: [&str; 2] = ["displayname", AVATAR_URL];
/// The field of the avatar's address.
const AVATAR_URL: &str = "avatar_url";

/// Whether the field is shown with each membership of the user.
pub fn is_shown_in_rooms(field: &str) -> bool {
    SHOWN_IN_ROOMS.contains(&field)
}

/// The user of ours who has this id and whose profile may be read. Errors: 404 `M_NOT_FOUND`, also for an account that ended.
pub fn require_user(read: &(impl Read + ?Sized), user_id: &UserId) -> Result<UserNum> {
    let unknown = || Error::from(Refusal::not_found("This server has no profile of this user."));
    let user = users::find_num(read, user_id)?.ok_or_else(unknown)?;
    if users::require(read, user)?.is_deactivated { Err(unknown()) } else { Ok(user) }
}

/// The JSON of one field.
pub fn find(read: &(impl Read + ?Sized), user: UserNum, field: &str) -> Result<Option<Bytes>, Fault> {
    schema::PROFILES.get(read, (user, field))
}

/// Reads all fields of a user's profile.
pub fn read(read: &(impl Read + ?Sized), user: UserNum) -> Result<Map<String, Value>, Fault> {
    let mut profile = Map::new();
    for row in schema::PROFILES.prefix::<(UserNum,)>(read, (user,), Direction::Up)? {
        let ((_, field), value) = row?;
        profile.insert(field, parse(&value)?);
    }
    Ok(profile)
}

/// Lists the addresses of all users' avatars.
pub fn list_avatars<'r>(
    read: &'r (impl Read + ?Sized),
) -> Result<impl Iterator<Item = Result<String, Fault>> + 'r, Fault> {
    let rows = schema::PROFILES.prefix::<()>(read, (), Direction::Up)?;
    Ok(rows.filter_map(|row| match row {
        Ok(((_, field), value)) if field == AVATAR_URL => serde_json::from_slice(&value).ok().map(Ok),
        Ok(_) => None,
        Err(error) => Some(Err(error)),
    }))
}

fn parse(value: &[u8]) -> Result<Value, Fault> {
    serde_json::from_slice(value).map_err(|_| Fault::Corrupt("a profile is not JSON"))
}

/// Reads the fields of a user's profile that rooms show.
pub fn read_shown(read: &(impl Read + ?Sized), user: UserNum) -> Result<Map<String, Value>, Fault> {
    let mut profile = Map::new();
    for field in SHOWN_IN_ROOMS {
        if let Some(value) = find(read, user, field)? {
            profile.insert(field.to_owned(), parse(&value)?);
        }
    }
    Ok(profile)
}

/// Whether a field can have this name, by the grammar of identifiers. Fields with a name that [`set`] no longer takes may be
/// there from before, and can be read and deleted. Errors: 400 `M_KEY_TOO_LARGE`, `M_INVALID_PARAM`.
pub fn check_field(field: &str) -> Result<()> {
    if field.len() > FIELD_BYTES_MAX {
        let refusal = Refusal::new(ErrorKind::KeyTooLarge, "The name of a field has at most 255 bytes.");
        return Err(refusal.into());
    }
    let begins = field.bytes().next().is_some_and(|byte| byte.is_ascii_lowercase());
    let is_allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte);
    if !begins || !field.bytes().all(is_allowed) {
        return Err(Refusal::invalid_param(
            "A field has a name of a-z, 0-9, and . _ - that begins with a-z.",
        )
        .into());
    }
    Ok(())
}

/// Whether a profile of another server may be told to have this field. The two that rooms show are texts, and clients rely on that.
pub fn is_field_of_elsewhere(field: &str, value: &Value) -> bool {
    check_field(field).is_ok() && (!is_shown_in_rooms(field) || value.is_string())
}

/// Refuses to set a field of the specification that it does not have, or one of somebody's own without their namespace:
/// 400 `M_INVALID_PARAM`.
fn require_namespaced(field: &str) -> Result<()> {
    let is_namespaced = || {
        let begins = |part: &str| part.bytes().next().is_some_and(|byte| byte.is_ascii_lowercase());
        field.contains('.') && field.split('.').all(begins)
    };
    if matches!(field, "displayname" | "avatar_url") || is_namespaced() {
        return Ok(());
    }
    let why = "A field is `displayname`, `avatar_url`, `m.tz`, or has a name with a namespace such as `org.example.name`.";
    Err(Refusal::invalid_param(why).into())
}

/// The value to store for a field; none means that the field is deleted. Errors: 400 for a value that the field cannot have.
fn normalize(field: &str, value: Value) -> Result<Option<Value>> {
    let invalid = |why: &str| Err(Refusal::invalid_param(why).into());
    match (field, &value) {
        // Before there was a way to delete a field, clients emptied it.
        ("displayname" | "avatar_url", Value::String(text)) if text.is_empty() => Ok(None),
        ("displayname", Value::String(text)) if text.chars().count() > DISPLAY_NAME_CHARS_MAX => {
            invalid("A display name has at most 256 characters.")
        }
        ("avatar_url", Value::String(text)) if text.len() > AVATAR_URL_BYTES_MAX => {
            invalid("The address of an avatar has at most 1,000 bytes.")
        }
        // Clients have set addresses of other kinds since before MXC URIs were required, and show nothing for them.
        ("avatar_url", Value::String(text))
            if text.starts_with("mxc:") && !<&MxcUri>::from(text.as_str()).is_valid() =>
        {
            invalid("`avatar_url` must be a whole MXC URI, as an upload answers it.")
        }
        ("displayname" | "avatar_url" | "m.tz", Value::String(_)) => Ok(Some(value)),
        ("displayname" | "avatar_url" | "m.tz", _) => {
            invalid("This field must be text; to remove it, delete it.")
        }
        _ => Ok(Some(value)),
    }
}

/// Sets a field, and answers whether that changed anything. The caller holds the user's lock.
/// Errors: 400 for a name or value that the field cannot have, 400 `M_PROFILE_TOO_LARGE`.
pub fn set(batch: &mut Batch, user: UserNum, field: &str, value: Value) -> Result<bool> {
    check_field(field)?;
    require_namespaced(field)?;
    let Some(value) = normalize(field, value)? else { return Ok(delete(batch, user, field)?) };
    let json = Bytes::from(value.to_string());
    let mut bytes = 2 + field.len() + json.len() + FIELD_OVERHEAD;
    for row in schema::PROFILES.prefix::<(UserNum,)>(batch, (user,), Direction::Up)? {
        let ((_, other), there) = row?;
        if other != field {
            bytes += other.len() + there.len() + FIELD_OVERHEAD;
        } else if there == json {
            return Ok(false);
        }
    }
    if bytes >= PROFILE_BYTES_MAX {
        let refusal = Refusal::new(ErrorKind::ProfileTooLarge, "A whole profile is smaller than 64 KiB.");
        return Err(refusal.into());
    }
    schema::PROFILES.put(batch, (user, field), &json);
    batch.position(&LogEntry::Account { user });
    Ok(true)
}

/// Deletes a field, and answers whether it was there. The caller holds the user's lock.
pub fn delete(batch: &mut Batch, user: UserNum, field: &str) -> Result<bool, Fault> {
    let was_there = schema::PROFILES.contains(batch, (user, field))?;
    if was_there {
        schema::PROFILES.delete(batch, (user, field));
        batch.position(&LogEntry::Account { user });
    }
    Ok(was_there)
}

/// Deletes the whole profile, for an account that ends.
pub fn delete_all(batch: &mut Batch, user: UserNum) {
    schema::PROFILES.delete_prefix::<(UserNum,)>(batch, (user,));
}
