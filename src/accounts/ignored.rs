//! The users whom a user does not want to hear of: account data `m.ignored_user_list`.
//!
//! Specification: client-server API, "Ignoring Users".

use std::collections::{BTreeMap, BTreeSet};

use ruma::UserId;

use crate::{
    accounts::account_data,
    ids::UserNum,
    schema::event_types::IGNORED_USER_LIST,
    store::{Fault, Read},
};

/// The users whose messages and invitations one user does not want.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ignored(BTreeSet<String>);

impl Ignored {
    /// Reads the list of a user, with the number of the account. A list that cannot be read ignores nobody, and nobody
    /// ignores themselves: a list that names its own user would hide from them what they send.
    pub fn of(read: &(impl Read + ?Sized), user: UserNum, user_id: &UserId) -> Result<Self, Fault> {
        let row = account_data::find(read, user, None, IGNORED_USER_LIST)?;
        Ok(row.map(|row| Self::parse(&row.content, user_id)).unwrap_or_default())
    }

    /// Reads the users whom the content of such a list names, without the user whose list it is.
    pub(crate) fn parse(content: &[u8], user_id: &UserId) -> Self {
        #[derive(serde::Deserialize)]
        struct Content {
            ignored_users: BTreeMap<String, serde::de::IgnoredAny>,
        }
        let content = serde_json::from_slice::<Content>(content).ok();
        let mut ignored: BTreeSet<String> =
            content.map(|content| content.ignored_users.into_keys().collect()).unwrap_or_default();
        ignored.remove(user_id.as_str());
        Self(ignored)
    }

    /// Gives the ids of the users who are ignored.
    pub(crate) fn into_ids(self) -> BTreeSet<String> {
        self.0
    }

    /// Lists the ids of the users who are ignored.
    pub fn ids(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }

    /// Whether this user is ignored.
    pub fn contains(&self, user_id: &str) -> bool {
        self.0.contains(user_id)
    }

    /// Whether nobody is ignored.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_that_cannot_be_read_ignores_nobody() {
        let own = UserId::parse("@own:x").unwrap();
        let ignored = Ignored::parse(br#"{"ignored_users":{"@a:x":{},"@b:x":7}}"#, &own);
        assert!(ignored.contains("@a:x") && ignored.contains("@b:x") && !ignored.contains("@c:x"));
        for content in ["", "{}", "[]", r#"{"ignored_users":["@a:x"]}"#] {
            assert!(Ignored::parse(content.as_bytes(), &own).is_empty(), "{content}");
        }
    }
}
