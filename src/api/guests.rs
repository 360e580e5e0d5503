//! What guests may do: a list in the specification (client-server API, "Guest Access"); everything else is refused.

use ruma::api::error::ErrorKind;

use crate::error::{Refusal, Result};

/// Methods and paths after `/_matrix/client/{version}`, with the names of parameters left out.
const ALLOWED: [(&str, &str); 34] = [
    ("GET", "/rooms/{}/state"),
    ("GET", "/rooms/{}/state/{}"),
    ("GET", "/rooms/{}/state/{}/{}"),
    ("GET", "/rooms/{}/context/{}"),
    ("GET", "/rooms/{}/event/{}"),
    ("GET", "/rooms/{}/messages"),
    ("GET", "/rooms/{}/members"),
    ("GET", "/rooms/{}/initialSync"),
    ("GET", "/sync"),
    ("GET", "/events"),
    ("GET", "/media/download/{}/{}"),
    ("GET", "/media/download/{}/{}/{}"),
    ("GET", "/media/thumbnail/{}/{}"),
    ("POST", "/rooms/{}/join"),
    ("POST", "/join/{}"),
    ("POST", "/rooms/{}/leave"),
    ("PUT", "/rooms/{}/send/{}/{}"),
    ("PUT", "/rooms/{}/state/{}"),
    ("PUT", "/rooms/{}/state/{}/{}"),
    ("PUT", "/sendToDevice/{}/{}"),
    // Of the profile, the name only: the endpoint itself looks.
    ("PUT", "/profile/{}/{}"),
    ("DELETE", "/profile/{}/{}"),
    ("GET", "/devices"),
    ("GET", "/devices/{}"),
    ("PUT", "/devices/{}"),
    ("GET", "/account/whoami"),
    ("POST", "/keys/upload"),
    ("POST", "/keys/query"),
    ("POST", "/keys/claim"),
    // Not in the list: what a client needs to sync and to end.
    ("GET", "/user/{}/filter/{}"),
    ("POST", "/user/{}/filter"),
    ("GET", "/capabilities"),
    ("GET", "/versions"),
    ("POST", "/logout"),
];

/// Whether a guest may use this endpoint. Errors: 403 `M_GUEST_ACCESS_FORBIDDEN`.
pub(crate) fn require_allowed(method: &str, template: &str) -> Result<()> {
    let path = without_version(&without_names(template));
    if ALLOWED.contains(&(method, path.as_str())) {
        return Ok(());
    }
    Err(refusal().into())
}

/// 403 `M_GUEST_ACCESS_FORBIDDEN`.
pub(crate) fn refusal() -> Refusal {
    Refusal::new(ErrorKind::GuestAccessForbidden, "Guests cannot do this.")
        .status(http::StatusCode::FORBIDDEN)
}

fn without_names(template: &str) -> String {
    let parts = template.split('/').map(|part| if part.starts_with('{') { "{}" } else { part });
    parts.collect::<Vec<_>>().join("/")
}

fn without_version(path: &str) -> String {
    let rest = path.strip_prefix("/_matrix/client/").unwrap_or(path);
    let is_version = |part: &str| {
        part == "r0" || part.strip_prefix('v').is_some_and(|number| number.parse::<u8>().is_ok())
    };
    match rest.split_once('/') {
        Some((version, rest)) if is_version(version) => format!("/{rest}"),
        _ => format!("/{rest}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_holds_for_every_version_and_for_nothing_else() {
        for (method, path) in [
            ("GET", "/_matrix/client/v3/sync"),
            ("GET", "/_matrix/client/r0/rooms/{room_id}/state/{event_type}/{state_key}"),
            ("GET", "/_matrix/client/v1/media/download/{server_name}/{media_id}"),
            ("GET", "/_matrix/client/versions"),
        ] {
            assert!(require_allowed(method, path).is_ok(), "{path}");
        }
        for (method, path) in [
            ("POST", "/_matrix/client/v3/createRoom"),
            ("POST", "/_matrix/client/v3/rooms/{room_id}/invite"),
            ("DELETE", "/_matrix/client/v3/devices/{device_id}"),
            ("POST", "/_matrix/client/v3/sync"),
            ("GET", "/_matrix/client/unstable/sync"),
        ] {
            assert!(require_allowed(method, path).is_err(), "{path}");
        }
    }
}
