//! The users whom a user does not want to hear of: account data `m.ignored_user_list`.
//!
//! Specification: client-server API, "Ignoring Users".

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    accounts::account_data,
    ids::UserNum,
    store::{Fault, Read},
};

/// The users whose messages and invitations one user does not want.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ignored(BTreeSet<String>);

impl Ignored {
    /// Reads the list of a user. A list that cannot be read ignores nobody.
    pub fn of(read: &(impl Read + ?Sized), user: UserNum) -> Result<Self, Fault> {
        let row = account_data::find(read, user, None, "m.ignored_user_list")?;
        Ok(row.map(|row| Self::parse(&row.content)).unwrap_or_default())
    }

    fn parse(content: &[u8]) -> Self {
        #[derive(serde::Deserialize)]
        struct Content {
            ignored_users: BTreeMap<String, serde::de::IgnoredAny>,
        }
        let content = serde_json::from_slice::<Content>(content).ok();
        Self(content.map(|content| content.ignored_users.into_keys().collect()).unwrap_or_default())
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
        let ignored = Ignored::parse(br#"{"ignored_users":{"@a:x":{},"@b:x":7}}"#);
        assert!(ignored.contains("@a:x") && ignored.contains("@b:x") && !ignored.contains("@c:x"));
        for content in ["", "{}", "[]", r#"{"ignored_users":["@a:x"]}"#] {
            assert!(Ignored::parse(content.as_bytes()).is_empty(), "{content}");
        }
    }
}
