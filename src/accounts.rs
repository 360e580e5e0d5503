//! The people and programs that use this server.

pub mod tokens;

use ruma::{OwnedDeviceId, OwnedUserId};

use crate::ids::UserNum;

/// Who makes a request.
#[derive(Debug, Clone)]
pub struct Caller {
    /// The account.
    pub user: UserNum,
    /// The account's Matrix id.
    pub user_id: OwnedUserId,
    /// The device that the access token belongs to.
    pub device_id: OwnedDeviceId,
    /// Whether it is a guest.
    pub is_guest: bool,
    /// Whether it administers this server.
    pub is_admin: bool,
}
