//! Every endpoint that a homeserver has in Matrix 1.19, whether this server serves it or not (`endpoints.tsv`). By this
//! list a method that a path does not have is told from a path that nobody knows (client-server API, "Common error
//! codes", `M_UNRECOGNIZED`), and our own routes are held against the specification.

/// One endpoint of the specification.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Specified {
    /// The method, in capitals.
    pub(crate) method: &'static str,
    /// The path, with its parameters in braces.
    pub(crate) path: &'static str,
    /// The kind of caller: `none`, `optional`, `token`, `service` or `server`.
    #[cfg_attr(not(test), expect(dead_code, reason = "the tests hold our routes against it"))]
    pub(crate) auth: &'static str,
    /// The specification asks for a rate limit.
    #[cfg_attr(not(test), expect(dead_code, reason = "the tests hold our routes against it"))]
    pub(crate) is_limited: bool,
}

/// Lists the endpoints of the table, in its order.
pub(crate) fn list() -> impl Iterator<Item = Specified> {
    include_str!("endpoints.tsv").lines().filter(|line| !line.starts_with('#')).filter_map(|line| {
        let mut columns = line.split('\t');
        let (method, path) = (columns.next()?, columns.next()?);
        let (auth, limit) = (columns.next()?, columns.next()?);
        Some(Specified { method, path, auth, is_limited: limit == "limited" })
    })
}

#[cfg(test)]
mod tests {
    use std::{
        collections::{BTreeMap, BTreeSet},
        fmt::Write,
        path::Path,
    };

    use super::*;
    use crate::api::{
        Routes,
        policy::{Guests, Suspended, Who},
        routes::Listed,
    };

    /// If this variable is set, the page of endpoints is written anew instead of being compared.
    const WRITE: &str = "AQUEDUCT_WRITE_DOCS";

    /// Endpoints that the specification does not have, or no longer has, and that old clients ask all the same.
    const OLD: [&str; 11] = [
        "GET /_matrix/client/v3/pushrules/global/{}/",
        "GET /_matrix/client/v3/pushrules/{}/",
        "GET /_matrix/client/v3/pushrules/{}/{}/",
        "GET /_matrix/client/v3/pushrules/{}/{}/{}",
        "GET /_matrix/client/v3/pushrules/{}/{}/{}/{}",
        "PUT /_matrix/client/v3/pushrules/{}/",
        "PUT /_matrix/client/v3/pushrules/{}/{}/",
        "PUT /_matrix/client/v3/pushrules/{}/{}/{}",
        "PUT /_matrix/client/v3/pushrules/{}/{}/{}/{}",
        "POST /_matrix/client/v3/rooms/{}/redact/{}",
        "POST /_matrix/client/v3/rooms/{}/send/{}",
    ];

    fn nameless(path: &str) -> String {
        let parts = path.split('/').map(|part| if part.starts_with('{') { "{}" } else { part });
        parts.collect::<Vec<_>>().join("/")
    }

    fn specified() -> BTreeMap<(String, &'static str), Specified> {
        list().map(|it| ((nameless(it.path), it.method), it)).collect()
    }

    fn is_stable(path: &str) -> bool {
        ["v1/", "v3/", "versions"].iter().any(|version| {
            path.strip_prefix("/_matrix/client/").is_some_and(|rest| rest.starts_with(version))
        })
    }

    #[test]
    fn the_table_is_read_whole() {
        let lines = include_str!("endpoints.tsv").lines().filter(|line| !line.starts_with('#'));
        assert_eq!(specified().len(), lines.count());
        assert!(specified().len() > 180);
        for it in list() {
            assert!(["none", "optional", "token", "service", "server"].contains(&it.auth), "{it:?}");
        }
    }

    /// Ruma and the specification must name an endpoint alike; otherwise a path of ours would have a method too many,
    /// or the table would be wrong.
    #[test]
    fn the_policy_of_each_route_agrees_with_the_specification() {
        let specified = specified();
        let (mut served, mut wrong) = (0, Vec::new());
        for Listed { method, path, policy } in Routes::all().list_policies() {
            if policy.limit.is_none() != policy.is_unlimited {
                wrong.push(format!("{method} {path}: says neither `.limit(..)` nor `.unlimited()`, or both"));
            }
            if !is_stable(path) {
                continue;
            }
            if OLD.contains(&format!("{method} {}", nameless(path)).as_str()) {
                continue;
            }
            served += 1;
            let Some(it) = specified.get(&(nameless(path), method)) else {
                wrong.push(format!("{method} {path}: src/api/endpoints.tsv does not have it"));
                continue;
            };
            let expected = match it.auth {
                "none" => Who::Public,
                "optional" => Who::MaybeClient,
                "token" => Who::Client,
                "service" => Who::Appservice,
                _ => Who::Server,
            };
            // The specification does not tell admins from other clients.
            let is_right = policy.who == expected || (policy.who == Who::Admin && expected == Who::Client);
            if !is_right {
                wrong.push(format!("{method} {path}: for {}, and specified for {expected}", policy.who));
            }
            if it.is_limited && policy.limit.is_none() {
                wrong.push(format!("{method} {path}: the specification asks for a rate limit"));
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        assert!(served > 80, "{served}");
    }

    /// The list is that of the specification (client-server API, "Guest Access"), as far as it is served, and what a
    /// guest's client needs to sync and to end: capabilities, filters, versions, logging out.
    #[test]
    fn guests_may_call_what_is_listed_and_nothing_else() {
        const ALLOWED: [&str; 33] = [
            "DELETE /_matrix/client/v3/profile/{}/{}",
            "GET /_matrix/client/v1/media/download/{}/{}",
            "GET /_matrix/client/v1/media/download/{}/{}/{}",
            "GET /_matrix/client/v1/media/thumbnail/{}/{}",
            "GET /_matrix/client/v3/account/whoami",
            "GET /_matrix/client/v3/capabilities",
            "GET /_matrix/client/v3/devices",
            "GET /_matrix/client/v3/devices/{}",
            "GET /_matrix/client/v3/events",
            "GET /_matrix/client/v3/rooms/{}/context/{}",
            "GET /_matrix/client/v3/rooms/{}/event/{}",
            "GET /_matrix/client/v3/rooms/{}/initialSync",
            "GET /_matrix/client/v3/rooms/{}/members",
            "GET /_matrix/client/v3/rooms/{}/messages",
            "GET /_matrix/client/v3/rooms/{}/state",
            "GET /_matrix/client/v3/rooms/{}/state/{}/{}",
            "GET /_matrix/client/v3/sync",
            "GET /_matrix/client/v3/user/{}/filter/{}",
            "GET /_matrix/client/versions",
            "POST /_matrix/client/v3/join/{}",
            "POST /_matrix/client/v3/keys/claim",
            "POST /_matrix/client/v3/keys/query",
            "POST /_matrix/client/v3/keys/upload",
            "POST /_matrix/client/v3/logout",
            "POST /_matrix/client/v3/rooms/{}/join",
            "POST /_matrix/client/v3/rooms/{}/leave",
            "POST /_matrix/client/v3/rooms/{}/send/{}",
            "POST /_matrix/client/v3/user/{}/filter",
            "PUT /_matrix/client/v3/devices/{}",
            "PUT /_matrix/client/v3/profile/{}/{}",
            "PUT /_matrix/client/v3/rooms/{}/send/{}/{}",
            "PUT /_matrix/client/v3/rooms/{}/state/{}/{}",
            "PUT /_matrix/client/v3/sendToDevice/{}/{}",
        ];
        let mut found: Vec<_> = Routes::all()
            .list_policies()
            .into_iter()
            .filter(|it| it.policy.guests == Guests::Yes && is_stable(it.path))
            .map(|it| format!("{} {}", it.method, nameless(it.path)))
            .collect();
        found.sort();
        found.dedup();
        assert_eq!(found, ALLOWED);
    }

    /// The list is that which the specification recommends (client-server API, "Account suspension"), and what else others see: rooms
    /// that are made, their state, members and names, presence and typing. A redaction is decided by its handler.
    #[test]
    fn suspended_users_may_not_call_what_is_listed() {
        const REFUSED: [&str; 28] = [
            "DELETE /_matrix/client/v3/directory/room/{}",
            "DELETE /_matrix/client/v3/profile/{}/{}",
            "GET /_matrix/client/v1/admin/lock/{}",
            "GET /_matrix/client/v1/admin/suspend/{}",
            "POST /_matrix/client/v3/account/3pid/bind",
            "POST /_matrix/client/v3/account/3pid/delete",
            "POST /_matrix/client/v3/account/3pid/unbind",
            "POST /_matrix/client/v3/createRoom",
            "POST /_matrix/client/v3/join/{}",
            "POST /_matrix/client/v3/knock/{}",
            "POST /_matrix/client/v3/rooms/{}/ban",
            "POST /_matrix/client/v3/rooms/{}/invite",
            "POST /_matrix/client/v3/rooms/{}/join",
            "POST /_matrix/client/v3/rooms/{}/kick",
            "POST /_matrix/client/v3/rooms/{}/send/{}",
            "POST /_matrix/client/v3/rooms/{}/unban",
            "POST /_matrix/client/v3/rooms/{}/upgrade",
            "POST /_matrix/client/v3/user/{}/openid/request_token",
            "PUT /_matrix/client/v1/admin/lock/{}",
            "PUT /_matrix/client/v1/admin/suspend/{}",
            "PUT /_matrix/client/v3/devices/{}",
            "PUT /_matrix/client/v3/directory/list/room/{}",
            "PUT /_matrix/client/v3/directory/room/{}",
            "PUT /_matrix/client/v3/presence/{}/status",
            "PUT /_matrix/client/v3/profile/{}/{}",
            "PUT /_matrix/client/v3/rooms/{}/send/{}/{}",
            "PUT /_matrix/client/v3/rooms/{}/state/{}/{}",
            "PUT /_matrix/client/v3/rooms/{}/typing/{}",
        ];
        const LOOKED_AT: [&str; 6] = [
            "GET /_matrix/client/v3/admin/whois/{}",
            "POST /_matrix/client/v3/keys/device_signing/upload",
            "POST /_matrix/client/v3/keys/upload",
            "POST /_matrix/client/v3/rooms/{}/read_markers",
            "POST /_matrix/client/v3/rooms/{}/receipt/{}/{}",
            "PUT /_matrix/client/v3/sendToDevice/{}/{}",
        ];
        let list = |is_meant: fn(&Suspended) -> bool| {
            let all = Routes::all().list_policies().into_iter();
            let found = all.filter(|it| is_meant(&it.policy.suspended) && is_stable(it.path));
            found.map(|it| format!("{} {}", it.method, nameless(it.path))).collect::<BTreeSet<_>>()
        };
        assert_eq!(list(|it| matches!(it, Suspended::No)), BTreeSet::from(REFUSED.map(str::to_owned)));
        assert_eq!(list(|it| matches!(it, Suspended::If(_))), BTreeSet::from(LOOKED_AT.map(str::to_owned)));
        let also_locked = Routes::all().list_policies().into_iter().filter(|it| it.policy.is_for_locked);
        let mut also_locked: Vec<_> = also_locked.filter(|it| is_stable(it.path)).map(|it| it.path).collect();
        also_locked.sort_unstable();
        assert_eq!(also_locked, ["/_matrix/client/v3/logout", "/_matrix/client/v3/logout/all"]);
    }

    /// The page for developers and operators: one line for each endpoint, with those not served yet at the end.
    fn page() -> String {
        let mut page = String::from(
            "# Endpoints\n\n\
             This page is generated: after a change of the routes, run \
             `AQUEDUCT_WRITE_DOCS=1 cargo test --lib api::endpoints` and look at the difference.\n\n\
             *Who* may call an endpoint, *guests*, the *limit* (a setting in `[limits]`) and the *body* are said beside the \
             handler in `src/api/client/`. Every path of `v3` is served under `r0`, too, whether the table has it or not.\n\n\
             ## Served\n\n\
             | Method | Path | Who | Guests | Limit | Body |\n|---|---|---|---|---|---|\n",
        );
        let routes = Routes::all().list_policies();
        for Listed { method, path, policy } in &routes {
            let limit = policy.limit.map_or_else(|| "none".to_owned(), |limit| limit.setting().to_owned());
            let guests = match (policy.who, policy.guests) {
                (Who::Public, _) => "",
                (_, Guests::Yes) => "yes",
                (_, Guests::No) => "no",
            };
            let waits = if policy.is_long_poll { " (waits for news)" } else { "" };
            let _ = writeln!(
                page,
                "| {method} | `{path}`{waits} | {} | {guests} | {limit} | {} |",
                policy.who, policy.body
            );
        }
        page.push_str(
            "\n## What suspended users may not ask\n\n\
             They get 403 `M_USER_SUSPENDED`. *In part*: for what others see alone, as the function beside the handler decides.\n\n\
             | Method | Path | Refused |\n|---|---|---|\n",
        );
        for Listed { method, path, policy } in routes.iter().filter(|it| !it.path.contains("/client/r0/")) {
            let refused = match policy.suspended {
                Suspended::Yes => continue,
                Suspended::No => "always",
                Suspended::If(_) => "in part",
            };
            let _ = writeln!(page, "| {method} | `{path}` | {refused} |");
        }
        page.push_str("\n## Not served yet\n\nThe server answers 404 `M_UNRECOGNIZED`.\n\n| Method | Path |\n|---|---|\n");
        let served: Vec<_> = routes.iter().map(|it| (it.method, nameless(it.path))).collect();
        for it in list().filter(|it| !served.contains(&(it.method, nameless(it.path)))) {
            let _ = writeln!(page, "| {} | `{}` |", it.method, it.path);
        }
        page
    }

    #[test]
    fn the_page_of_endpoints_is_true() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/endpoints.md");
        if std::env::var_os(WRITE).is_some() {
            std::fs::write(&path, page()).unwrap();
        }
        let written = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            written == page(),
            "docs/endpoints.md is old: set {WRITE}=1, run this test again and look at the difference"
        );
    }
}
