//! The rows of accounts: they are found, made, changed and ended here.

use ruma::{OwnedUserId, UserId, api::error::ErrorKind};

use crate::{
    error::{Error, Refusal, Result},
    ids::{DeviceNum, UserNum},
    schema::{
        self,
        accounts::{EndedDevices, UserRow},
    },
    store::{Batch, Direction, Fault, LogEntry, NotAccepted, Read},
};

/// The properties of an account that is about to be made.
#[derive(Clone, Debug)]
pub struct NewUser {
    /// The full user id, which names this server.
    pub user_id: OwnedUserId,
    /// Whether it administers the server.
    pub is_admin: bool,
    /// Whether it is a guest.
    pub is_guest: bool,
    /// The time of its making, in milliseconds since the epoch.
    pub now_ms: u64,
}

/// The number of the last account.
pub(crate) fn last_num(read: &(impl Read + ?Sized)) -> Result<Option<UserNum>, Fault> {
    let last = schema::USERS.prefix::<()>(read, (), Direction::Down)?.next().transpose()?;
    Ok(last.map(|(user, _)| user))
}

/// Whether there is an account that is not a guest.
pub fn any(read: &(impl Read + ?Sized)) -> Result<bool, Fault> {
    for row in schema::USERS.prefix::<()>(read, (), Direction::Up)? {
        if !row?.1.is_guest {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The account with this number.
pub fn find(read: &(impl Read + ?Sized), user: UserNum) -> Result<Option<UserRow>, Fault> {
    schema::USERS.get(read, user)
}

/// The account with this number, which must exist.
pub fn require(read: &(impl Read + ?Sized), user: UserNum) -> Result<UserRow> {
    find(read, user)?.ok_or_else(|| Error::broken(format!("account {user} is gone")))
}

/// The number of the account with this user id; none if it is not one of ours. Deactivated accounts have one too.
pub fn find_num(read: &(impl Read + ?Sized), user_id: &UserId) -> Result<Option<UserNum>, Fault> {
    let Some(user) = schema::USER_NAMES.get(read, user_id.localpart())? else { return Ok(None) };
    // A remote user may have the localpart of one of ours.
    let row = find(read, user)?;
    Ok(row.filter(|row| row.user_id == user_id).map(|_| user))
}

/// The numbers of the accounts with these user ids, in their order; none for one without an account here. The ids are of this server: its
/// name is not looked at.
pub fn find_nums<'u>(
    read: &(impl Read + ?Sized),
    user_ids: impl IntoIterator<Item = &'u UserId>,
) -> Result<Vec<Option<UserNum>>, Fault> {
    schema::USER_NAMES.get_many(read, user_ids.into_iter().map(UserId::localpart))
}

/// The number of the account with this user id, which must be one of ours. Errors: 404 `M_NOT_FOUND`.
pub fn require_num(read: &(impl Read + ?Sized), user_id: &UserId) -> Result<UserNum> {
    find_num(read, user_id)?.ok_or_else(|| Refusal::not_found("There is no such user here.").into())
}

/// The account for a user id that a person wrote: exactly that one, or else the one whose name it is in lower case, for names
/// are lower-cased when they are registered.
pub fn find_meant(
    read: &(impl Read + ?Sized),
    meant: &UserId,
) -> Result<Option<(UserNum, OwnedUserId)>, Fault> {
    if let Some(user) = find_num(read, meant)? {
        return Ok(Some((user, meant.to_owned())));
    }
    let lower = meant.localpart().to_ascii_lowercase();
    let Ok(user_id) = UserId::parse(format!("@{lower}:{}", meant.server_name())) else { return Ok(None) };
    Ok(find_num(read, &user_id)?.map(|user| (user, user_id)))
}

/// All accounts, oldest first.
pub fn list(
    read: &(impl Read + ?Sized),
) -> Result<impl Iterator<Item = Result<(UserNum, UserRow), Fault>> + '_, Fault> {
    schema::USERS.prefix::<()>(read, (), Direction::Up)
}

/// Whether the name is free. It may be taken before the account is made: the batch of [`create`] decides.
pub fn is_free(read: &(impl Read + ?Sized), user_id: &UserId) -> Result<bool, Fault> {
    Ok(!schema::USER_NAMES.contains(read, user_id.localpart())?)
}

/// The refusal for a name that is taken: 400 `M_USER_IN_USE`.
pub fn in_use() -> Refusal {
    Refusal::new(ErrorKind::UserInUse, "This user name is taken.")
}

/// Makes an account with a number that no other has, from [`next_user`](crate::accounts::Accounts::next_user). The caller holds
/// the lock of that user and the server's. The batch is accepted only if the name is still free: see [`or_in_use`].
pub fn create(batch: &mut Batch, user: UserNum, new: &NewUser) {
    let row = UserRow {
        user_id: new.user_id.clone(),
        created_ms: new.now_ms,
        last_device: DeviceNum(0),
        is_admin: new.is_admin,
        is_guest: new.is_guest,
        is_deactivated: false,
        is_erased: false,
        is_locked: false,
        is_suspended: false,
        ended: EndedDevices::default(),
    };
    schema::USER_NAMES.expect_absent(batch, new.user_id.localpart());
    schema::USER_NAMES.put(batch, new.user_id.localpart(), &user);
    schema::USERS.put(batch, user, &row);
    batch.position(&LogEntry::Account { user });
}

/// The refusal for a batch with [`create`] that was not accepted: 400 `M_USER_IN_USE` if somebody else took the name first.
pub fn or_in_use(why: NotAccepted) -> Error {
    match why {
        NotAccepted::Conflict(conflict) if schema::USER_NAMES.conflicting(&conflict).is_some() => {
            in_use().into()
        }
        why => why.into(),
    }
}

/// Changes an account under its user's lock.
pub(crate) fn change(batch: &mut Batch, user: UserNum, change: impl FnOnce(&mut UserRow)) -> Result<UserRow> {
    let mut row = require(batch, user)?;
    change(&mut row);
    schema::USERS.put(batch, user, &row);
    Ok(row)
}

/// Sets which devices have ended and still have rows. The caller holds the user's lock.
pub(crate) fn set_ended(batch: &mut Batch, user: UserNum, ended: EndedDevices) -> Result<()> {
    change(batch, user, |row| row.ended = ended).map(drop)
}

/// Makes somebody an administrator of this server, or no longer one.
pub fn set_admin(batch: &mut Batch, user: UserNum, is_admin: bool) -> Result<()> {
    change(batch, user, |row| row.is_admin = is_admin)?;
    batch.position(&LogEntry::Account { user });
    Ok(())
}

/// Locks or unlocks an account, and suspends it or ends that; what is none stays as it is. The caller holds the user's lock.
pub fn set_standing(
    batch: &mut Batch,
    user: UserNum,
    locked: Option<bool>,
    suspended: Option<bool>,
) -> Result<UserRow> {
    let row = change(batch, user, |row| {
        row.is_locked = locked.unwrap_or(row.is_locked);
        row.is_suspended = suspended.unwrap_or(row.is_suspended);
    })?;
    batch.position(&LogEntry::Account { user });
    Ok(row)
}

/// The refusal for an account that is locked: 401 `M_USER_LOCKED` with `soft_logout`, so that clients keep what they have
/// (<https://spec.matrix.org/v1.19/client-server-api/#account-locking>).
pub fn locked() -> Refusal {
    let message = "This account is locked. Ask those who run this server.";
    let mut refusal = Refusal::new(ErrorKind::UserLocked, message);
    refusal.body =
        Some(serde_json::json!({ "errcode": "M_USER_LOCKED", "error": message, "soft_logout": true }));
    refusal
}

/// The refusal of what a suspended account may not do: 403 `M_USER_SUSPENDED`.
pub fn suspended() -> Refusal {
    Refusal::new(ErrorKind::UserSuspended, "This account is suspended, so that it cannot do this.")
}

/// Refuses an account that is locked (401 `M_USER_LOCKED`) or suspended (403 `M_USER_SUSPENDED`).
pub fn require_active(read: &(impl Read + ?Sized), user: UserNum) -> Result<()> {
    match require(read, user)? {
        row if row.is_locked => Err(locked().into()),
        row if row.is_suspended => Err(suspended().into()),
        _ => Ok(()),
    }
}

/// Turns a guest into a full account. The caller holds the user's and the server's lock.
pub fn make_user(batch: &mut Batch, user: UserNum, is_admin: bool) -> Result<()> {
    change(batch, user, |row| {
        row.is_guest = false;
        row.is_admin |= is_admin;
    })?;
    batch.position(&LogEntry::Account { user });
    Ok(())
}

/// Ends an account for good. The caller ends its devices, tokens, password, profile and rooms.
pub fn deactivate(batch: &mut Batch, user: UserNum, erase: bool) -> Result<UserRow> {
    let row = change(batch, user, |row| {
        row.is_deactivated = true;
        row.is_admin = false;
        row.is_erased |= erase;
    })?;
    if erase {
        schema::ERASED_USERS.put(batch, row.user_id.as_str(), &());
    }
    batch.position(&LogEntry::Account { user });
    Ok(row)
}

/// Whether anybody at all asked to be erased.
pub fn any_erased(read: &(impl Read + ?Sized)) -> Result<bool, Fault> {
    Ok(schema::ERASED_USERS.prefix::<()>(read, (), Direction::Up)?.next().transpose()?.is_some())
}

/// Whether this user asked to be erased.
pub fn is_erased(read: &(impl Read + ?Sized), user_id: &str) -> Result<bool, Fault> {
    schema::ERASED_USERS.contains(read, user_id)
}
