//! Every endpoint that a homeserver has in Matrix 1.19, whether this server serves it yet or not: so that a method that a
//! path does not have is told from a path that nobody knows (client-server API, "Common error codes", `M_UNRECOGNIZED`).

/// The paths of one specification, after their common beginning, with the methods that they have. Parameters are empty braces.
struct Specified {
    /// How all the paths begin.
    prefix: &'static str,
    /// Path and methods.
    paths: &'static [(&'static str, &'static [&'static str])],
}

/// Every path with one method that it has.
pub(crate) fn list() -> impl Iterator<Item = (String, &'static str)> {
    SPECIFIED.iter().flat_map(|specified| {
        specified.paths.iter().flat_map(move |(path, methods)| {
            methods.iter().map(move |method| (format!("{}{path}", specified.prefix), *method))
        })
    })
}

/// All of them.
const SPECIFIED: [&Specified; 5] = [&CLIENT, &SERVER, &MEDIA, &KEYS, &WELL_KNOWN];

/// The client-server API.
const CLIENT: Specified = Specified {
    prefix: "/_matrix/client/",
    paths: &[
        ("v1/admin/lock/{}", &["GET", "PUT"]),
        ("v1/admin/suspend/{}", &["GET", "PUT"]),
        ("v1/appservice/{}/ping", &["POST"]),
        ("v1/auth_metadata", &["GET"]),
        ("v1/login/get_token", &["POST"]),
        ("v1/media/config", &["GET"]),
        ("v1/media/download/{}/{}", &["GET"]),
        ("v1/media/download/{}/{}/{}", &["GET"]),
        ("v1/media/preview_url", &["GET"]),
        ("v1/media/thumbnail/{}/{}", &["GET"]),
        ("v1/mutual_rooms", &["GET"]),
        ("v1/register/m.login.registration_token/validity", &["GET"]),
        ("v1/room_summary/{}", &["GET"]),
        ("v1/rooms/{}/hierarchy", &["GET"]),
        ("v1/rooms/{}/relations/{}", &["GET"]),
        ("v1/rooms/{}/relations/{}/{}", &["GET"]),
        ("v1/rooms/{}/relations/{}/{}/{}", &["GET"]),
        ("v1/rooms/{}/threads", &["GET"]),
        ("v1/rooms/{}/timestamp_to_event", &["GET"]),
        ("v3/account/3pid", &["GET", "POST"]),
        ("v3/account/3pid/add", &["POST"]),
        ("v3/account/3pid/bind", &["POST"]),
        ("v3/account/3pid/delete", &["POST"]),
        ("v3/account/3pid/email/requestToken", &["POST"]),
        ("v3/account/3pid/msisdn/requestToken", &["POST"]),
        ("v3/account/3pid/unbind", &["POST"]),
        ("v3/account/deactivate", &["POST"]),
        ("v3/account/password", &["POST"]),
        ("v3/account/password/email/requestToken", &["POST"]),
        ("v3/account/password/msisdn/requestToken", &["POST"]),
        ("v3/account/whoami", &["GET"]),
        ("v3/admin/whois/{}", &["GET"]),
        ("v3/capabilities", &["GET"]),
        ("v3/createRoom", &["POST"]),
        ("v3/delete_devices", &["POST"]),
        ("v3/devices", &["GET"]),
        ("v3/devices/{}", &["DELETE", "GET", "PUT"]),
        ("v3/directory/list/appservice/{}/{}", &["PUT"]),
        ("v3/directory/list/room/{}", &["GET", "PUT"]),
        ("v3/directory/room/{}", &["DELETE", "GET", "PUT"]),
        ("v3/events", &["GET"]),
        ("v3/events/{}", &["GET"]),
        ("v3/initialSync", &["GET"]),
        ("v3/join/{}", &["POST"]),
        ("v3/joined_rooms", &["GET"]),
        ("v3/keys/changes", &["GET"]),
        ("v3/keys/claim", &["POST"]),
        ("v3/keys/device_signing/upload", &["POST"]),
        ("v3/keys/query", &["POST"]),
        ("v3/keys/signatures/upload", &["POST"]),
        ("v3/keys/upload", &["POST"]),
        ("v3/knock/{}", &["POST"]),
        ("v3/login", &["GET", "POST"]),
        ("v3/login/sso/redirect", &["GET"]),
        ("v3/login/sso/redirect/{}", &["GET"]),
        ("v3/logout", &["POST"]),
        ("v3/logout/all", &["POST"]),
        ("v3/notifications", &["GET"]),
        ("v3/presence/{}/status", &["GET", "PUT"]),
        ("v3/profile/{}", &["GET"]),
        ("v3/profile/{}/{}", &["DELETE", "GET", "PUT"]),
        ("v3/publicRooms", &["GET", "POST"]),
        ("v3/pushers", &["GET"]),
        ("v3/pushers/set", &["POST"]),
        ("v3/pushrules/", &["GET"]),
        ("v3/pushrules/global/", &["GET"]),
        ("v3/pushrules/global/{}/{}", &["DELETE", "GET", "PUT"]),
        ("v3/pushrules/global/{}/{}/actions", &["GET", "PUT"]),
        ("v3/pushrules/global/{}/{}/enabled", &["GET", "PUT"]),
        ("v3/refresh", &["POST"]),
        ("v3/register", &["POST"]),
        ("v3/register/available", &["GET"]),
        ("v3/register/email/requestToken", &["POST"]),
        ("v3/register/msisdn/requestToken", &["POST"]),
        ("v3/room_keys/keys", &["DELETE", "GET", "PUT"]),
        ("v3/room_keys/keys/{}", &["DELETE", "GET", "PUT"]),
        ("v3/room_keys/keys/{}/{}", &["DELETE", "GET", "PUT"]),
        ("v3/room_keys/version", &["GET", "POST"]),
        ("v3/room_keys/version/{}", &["DELETE", "GET", "PUT"]),
        ("v3/rooms/{}/aliases", &["GET"]),
        ("v3/rooms/{}/ban", &["POST"]),
        ("v3/rooms/{}/context/{}", &["GET"]),
        ("v3/rooms/{}/event/{}", &["GET"]),
        ("v3/rooms/{}/forget", &["POST"]),
        ("v3/rooms/{}/initialSync", &["GET"]),
        ("v3/rooms/{}/invite", &["POST"]),
        ("v3/rooms/{}/join", &["POST"]),
        ("v3/rooms/{}/joined_members", &["GET"]),
        ("v3/rooms/{}/kick", &["POST"]),
        ("v3/rooms/{}/leave", &["POST"]),
        ("v3/rooms/{}/members", &["GET"]),
        ("v3/rooms/{}/messages", &["GET"]),
        ("v3/rooms/{}/read_markers", &["POST"]),
        ("v3/rooms/{}/receipt/{}/{}", &["POST"]),
        ("v3/rooms/{}/redact/{}/{}", &["PUT"]),
        ("v3/rooms/{}/report", &["POST"]),
        ("v3/rooms/{}/report/{}", &["POST"]),
        ("v3/rooms/{}/send/{}/{}", &["PUT"]),
        ("v3/rooms/{}/state", &["GET"]),
        ("v3/rooms/{}/state/{}/{}", &["GET", "PUT"]),
        ("v3/rooms/{}/typing/{}", &["PUT"]),
        ("v3/rooms/{}/unban", &["POST"]),
        ("v3/rooms/{}/upgrade", &["POST"]),
        ("v3/search", &["POST"]),
        ("v3/sendToDevice/{}/{}", &["PUT"]),
        ("v3/sync", &["GET"]),
        ("v3/thirdparty/location", &["GET"]),
        ("v3/thirdparty/location/{}", &["GET"]),
        ("v3/thirdparty/protocol/{}", &["GET"]),
        ("v3/thirdparty/protocols", &["GET"]),
        ("v3/thirdparty/user", &["GET"]),
        ("v3/thirdparty/user/{}", &["GET"]),
        ("v3/user/{}/account_data/{}", &["GET", "PUT"]),
        ("v3/user/{}/filter", &["POST"]),
        ("v3/user/{}/filter/{}", &["GET"]),
        ("v3/user/{}/openid/request_token", &["POST"]),
        ("v3/user/{}/rooms/{}/account_data/{}", &["GET", "PUT"]),
        ("v3/user/{}/rooms/{}/tags", &["GET"]),
        ("v3/user/{}/rooms/{}/tags/{}", &["DELETE", "PUT"]),
        ("v3/user_directory/search", &["POST"]),
        ("v3/users/{}/report", &["POST"]),
        ("v3/voip/turnServer", &["GET"]),
        ("versions", &["GET"]),
    ],
};

/// The server-server API.
const SERVER: Specified = Specified {
    prefix: "/_matrix/federation/",
    paths: &[
        ("v1/3pid/onbind", &["PUT"]),
        ("v1/backfill/{}", &["GET"]),
        ("v1/event/{}", &["GET"]),
        ("v1/event_auth/{}/{}", &["GET"]),
        ("v1/exchange_third_party_invite/{}", &["PUT"]),
        ("v1/get_missing_events/{}", &["POST"]),
        ("v1/hierarchy/{}", &["GET"]),
        ("v1/invite/{}/{}", &["PUT"]),
        ("v1/make_join/{}/{}", &["GET"]),
        ("v1/make_knock/{}/{}", &["GET"]),
        ("v1/make_leave/{}/{}", &["GET"]),
        ("v1/media/download/{}", &["GET"]),
        ("v1/media/thumbnail/{}", &["GET"]),
        ("v1/openid/userinfo", &["GET"]),
        ("v1/publicRooms", &["GET", "POST"]),
        ("v1/query/directory", &["GET"]),
        ("v1/query/profile", &["GET"]),
        ("v1/query/{}", &["GET"]),
        ("v1/send/{}", &["PUT"]),
        ("v1/send_knock/{}/{}", &["PUT"]),
        ("v1/state/{}", &["GET"]),
        ("v1/state_ids/{}", &["GET"]),
        ("v1/timestamp_to_event/{}", &["GET"]),
        ("v1/user/devices/{}", &["GET"]),
        ("v1/user/keys/claim", &["POST"]),
        ("v1/user/keys/query", &["POST"]),
        ("v1/version", &["GET"]),
        ("v2/invite/{}/{}", &["PUT"]),
        ("v2/send_join/{}/{}", &["PUT"]),
        ("v2/send_leave/{}/{}", &["PUT"]),
    ],
};

/// Media without authentication: deprecated, and uploads.
const MEDIA: Specified = Specified {
    prefix: "/_matrix/media/",
    paths: &[
        ("v1/create", &["POST"]),
        ("v3/config", &["GET"]),
        ("v3/download/{}/{}", &["GET"]),
        ("v3/download/{}/{}/{}", &["GET"]),
        ("v3/preview_url", &["GET"]),
        ("v3/thumbnail/{}/{}", &["GET"]),
        ("v3/upload", &["POST"]),
        ("v3/upload/{}/{}", &["PUT"]),
    ],
};

/// Keys of servers.
const KEYS: Specified = Specified {
    prefix: "/_matrix/key/",
    paths: &[("v2/query", &["POST"]), ("v2/query/{}", &["GET"]), ("v2/server", &["GET"])],
};

/// What is found outside `/_matrix`.
const WELL_KNOWN: Specified = Specified {
    prefix: "/.well-known/matrix/",
    paths: &[("client", &["GET"]), ("policy_server", &["GET"]), ("server", &["GET"]), ("support", &["GET"])],
};

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::api::Routes;

    fn nameless(path: &str) -> String {
        let parts = path.split('/').map(|part| if part.starts_with('{') { "{}" } else { part });
        parts.collect::<Vec<_>>().join("/")
    }

    /// What ruma and the specification call by one name: else a path of ours would have a method too many, or this list
    /// would be wrong.
    #[test]
    fn what_is_served_stands_in_the_specification() {
        let specified: BTreeSet<_> = list().collect();
        assert!(specified.len() > 180, "{}", specified.len());
        let is_stable = |path: &str| {
            ["v1/", "v3/", "versions"].iter().any(|version| {
                path.strip_prefix("/_matrix/client/").is_some_and(|rest| rest.starts_with(version))
            })
        };
        let mut served = 0;
        for (method, path) in Routes::all().list() {
            if is_stable(path) {
                served += 1;
                let path = nameless(path);
                // Not an endpoint of its own there: an empty state key.
                assert!(specified.contains(&(path.clone(), method)), "{method} {path}");
            }
        }
        assert!(served > 80, "{served}");
    }
}
