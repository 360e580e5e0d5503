//! Rows of e-mail: the addresses of accounts, and what is to be mailed to them.

use serde::{Deserialize, Serialize};

use crate::ids::RoomNum;

/// An e-mail address of an account.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressRow {
    /// When it was shown to be the user's, in milliseconds since the epoch. An operator who adds it vouches for that.
    pub validated_ms: u64,
    /// When it was added to the account, in milliseconds since the epoch.
    pub added_ms: u64,
}

/// A user's wishes for digests by e-mail.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreferencesRow {
    /// Whether any are sent.
    #[serde(default = "yes")]
    pub enabled: bool,
    /// The number of milliseconds for which a notification waits to be read; none for what the server's settings say.
    #[serde(default)]
    pub delay_ms: Option<u64>,
    /// Whether only notifications that highlight are told, and invitations.
    #[serde(default)]
    pub only_highlights: bool,
}

fn yes() -> bool {
    true
}

impl Default for PreferencesRow {
    fn default() -> Self {
        Self { enabled: true, delay_ms: None, only_highlights: false }
    }
}

/// The state of a pusher of kind `email`, as far as a crash must not forget it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MailboxRow {
    /// The secret of the link by which it ends: whoever has it can do nothing else.
    pub secret: String,
    /// The rooms that mails told of lately, and that wait before a mail is sent for them again.
    #[serde(default)]
    pub rooms: Vec<MailedRoom>,
    /// The mail that told of nothing but invitations last.
    #[serde(default)]
    pub invited: MailedInvites,
    /// How often in a row the mail server said that it will never take mail for this address.
    #[serde(default)]
    pub refusals: u32,
    /// Nothing is sent before this time, in milliseconds since the epoch; 0 where nothing was refused.
    #[serde(default)]
    pub not_before_ms: u64,
}

/// The pause between mails that tell of nothing but invitations, from whomever they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MailedInvites {
    /// When the last of them was sent, in milliseconds since the epoch; 0 where none was.
    pub mailed_ms: u64,
    /// The number of milliseconds from then until the next of them.
    pub wait_ms: u64,
}

/// A room of which a mail told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MailedRoom {
    /// The number of the room.
    pub room: RoomNum,
    /// When the mail was sent, in milliseconds since the epoch.
    pub mailed_ms: u64,
    /// The number of milliseconds from then until the next mail for this room.
    pub wait_ms: u64,
    /// The position of the newest event that was told: once it is read, the room waits no longer.
    pub newest: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_without_later_fields_are_read() {
        let row: MailboxRow = serde_json::from_str(r#"{"secret":"s"}"#).unwrap();
        assert_eq!(row, MailboxRow { secret: "s".to_owned(), ..MailboxRow::default() });
        assert_eq!(serde_json::from_str::<PreferencesRow>("{}").unwrap(), PreferencesRow::default());
    }
}
