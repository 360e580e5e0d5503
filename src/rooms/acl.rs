//! The servers that a room admits (client-server API, "Server Access Control Lists").

use ruma::{ServerName, events::room::server_acl::RoomServerAclEventContent};
use serde_json::{Map, Value};

use crate::{
    ids::RoomNum,
    schema::event_types::SERVER_ACL,
    store::{Fault, Read},
};

/// Whether the room, as it is now, admits a server. A room without a list admits all.
pub fn admits(read: &(impl Read + ?Sized), room: RoomNum, server: &ServerName) -> Result<bool, Fault> {
    let event = super::find_state(read, room, SERVER_ACL, "")?;
    Ok(event.is_none_or(|event| list(event.row.content()).is_allowed(server)))
}

/// Reads the content of `m.room.server_acl`. What is not as it should be in it says nothing, so that a list of which nothing
/// can be read admits nobody.
fn list(content: &str) -> RoomServerAclEventContent {
    let content: Map<String, Value> = serde_json::from_str(content).unwrap_or_default();
    let patterns = |field: &str| {
        let patterns = content.get(field).and_then(Value::as_array).into_iter().flatten();
        patterns.filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let allow_ip_literals = content.get("allow_ip_literals") != Some(&Value::Bool(false));
    RoomServerAclEventContent::new(allow_ip_literals, patterns("allow"), patterns("deny"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn is_admitted(content: &Value, server: &str) -> bool {
        list(&content.to_string()).is_allowed(server.try_into().unwrap())
    }

    #[test]
    fn a_server_is_admitted_if_it_is_allowed_and_not_denied() {
        let content = json!({ "allow": ["*.example", "B.org"], "deny": ["evil.*"] });
        for (server, admitted) in [
            ("a.example", true),
            ("a.example:8448", true),
            ("b.org", true),
            ("evil.example", false),
            ("EVIL.example:1", false),
            ("other.net", false),
            ("1.2.3.4", false),
        ] {
            assert_eq!(is_admitted(&content, server), admitted, "{server}");
        }
    }

    #[test]
    fn addresses_are_admitted_unless_the_list_says_no() {
        for (literals, admitted) in [(json!(true), true), (json!("no"), true), (json!(false), false)] {
            let content = json!({ "allow": ["*"], "allow_ip_literals": literals });
            assert!(is_admitted(&content, "a.example"));
            for address in ["1.2.3.4", "1.2.3.4:8448", "[::1]"] {
                assert_eq!(is_admitted(&content, address), admitted, "{address}");
            }
        }
    }

    #[test]
    fn a_list_of_which_nothing_can_be_read_admits_nobody() {
        for content in
            [json!({}), json!({ "allow": "*" }), json!({ "allow": [1, null] }), json!({ "deny": [] })]
        {
            assert!(!is_admitted(&content, "a.example"), "{content}");
        }
        assert!(is_admitted(&json!({ "allow": [1, "*"], "deny": "*" }), "a.example"));
    }
}
