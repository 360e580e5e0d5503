//! Reads `conduit.toml` and the environment. A wrong setting is refused with file, line, key and what was expected.

use std::{fmt, ops::Range, path::Path};

use toml::{
    Table, Value,
    de::{DeTable, DeValue},
};

use crate::config::{Config, bounds};

/// The beginning of the names of environment variables that override settings: `AQUEDUCT_SERVER__NAME`.
pub const ENVIRONMENT_PREFIX: &str = "AQUEDUCT_";

/// The reason why settings are refused, and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The place of the setting: `conduit.toml, line 3` or `environment variable AQUEDUCT_SERVER__NAME`.
    pub place: String,
    /// The setting, as in `server.name`; empty where the text is not TOML at all.
    pub key: String,
    /// A sentence that says how it is wrong and what was expected.
    pub why: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.place)?;
        if !self.key.is_empty() {
            write!(f, ", {}", self.key)?;
        }
        write!(f, ": {}", self.why)
    }
}

impl std::error::Error for Problem {}

impl Config {
    /// Reads the file and lays the variables over it. Variables that do not begin with [`ENVIRONMENT_PREFIX`], or have
    /// no `__`, are somebody else's. Errors: the first [`Problem`].
    pub fn load(
        path: &Path,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, Problem> {
        let text = std::fs::read_to_string(path).map_err(|error| Problem {
            place: path.display().to_string(),
            key: String::new(),
            why: format!("can't be read: {error}"),
        })?;
        Self::parse(&path.display().to_string(), &text, environment)
    }

    /// Like [`Config::load`], for the text of a file that is in memory already.
    pub fn parse(
        file: &str,
        text: &str,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, Problem> {
        let mut config: Self = toml::from_str(text).map_err(|error| in_file(file, text, &error))?;
        // A variable may set a part of what has its default as a whole, so it is laid over every value there is.
        let mut table = Table::try_from(&config).map_err(|error| Problem {
            place: file.to_owned(),
            key: String::new(),
            why: error.to_string(),
        })?;
        let mut set_by = Vec::new();
        for (name, value) in overrides(environment) {
            let key = dotted(&name);
            set(&mut table, &key, &value);
            config = Value::Table(table.clone()).try_into().map_err(|error: toml::de::Error| Problem {
                place: format!("environment variable {name}"),
                key: key.join("."),
                why: error.message().to_owned(),
            })?;
            set_by.push((key.join("."), name));
        }
        bounds::require_all(&config).map_err(|(key, why)| {
            let place = match set_by.iter().rev().find(|(set, _)| *set == key) {
                Some((_, name)) => format!("environment variable {name}"),
                None => match DeTable::parse(text).ok().and_then(|table| find(table.get_ref(), &key)) {
                    Some(span) => format!("{file}, line {}", line(text, span.start)),
                    None => file.to_owned(),
                },
            };
            Problem { place, key, why }
        })?;
        Ok(config)
    }
}

fn in_file(file: &str, text: &str, error: &toml::de::Error) -> Problem {
    let span = error.span().unwrap_or(0..0);
    let key = DeTable::parse(text).map(|table| key_at(table.get_ref(), &span)).unwrap_or_default();
    Problem {
        place: format!("{file}, line {}", line(text, span.start)),
        key,
        why: error.message().to_owned(),
    }
}

fn line(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|byte| *byte == b'\n').count() + 1
}

/// The dotted key whose name or value stands at this place.
fn key_at(table: &DeTable<'_>, span: &Range<usize>) -> String {
    for (key, value) in table {
        let name = key.get_ref();
        if key.span() == *span {
            return name.to_string();
        }
        let below = match value.get_ref() {
            DeValue::Table(below) => key_at(below, span),
            DeValue::Array(items) => items
                .iter()
                .filter_map(|item| item.get_ref().as_table())
                .map(|below| key_at(below, span))
                .find(|below| !below.is_empty())
                .unwrap_or_default(),
            _ => String::new(),
        };
        if !below.is_empty() {
            return format!("{name}.{below}");
        }
        let place = value.span();
        if place.contains(&span.start) {
            return name.to_string();
        }
    }
    String::new()
}

/// The place where this dotted key stands. Arrays of tables are entered by number, as in `listener.0.address`.
fn find(table: &DeTable<'_>, key: &str) -> Option<Range<usize>> {
    let (name, rest) = key.split_once('.').unwrap_or((key, ""));
    let (place, value) = table.iter().find(|(key, _)| key.get_ref() == name)?;
    if rest.is_empty() {
        return Some(place.span());
    }
    match value.get_ref() {
        DeValue::Table(below) => find(below, rest).or_else(|| Some(place.span())),
        DeValue::Array(items) => {
            let (number, rest) = rest.split_once('.').unwrap_or((rest, ""));
            let item = items.get(number.parse::<usize>().ok()?)?;
            let below = item.get_ref().as_table().and_then(|below| find(below, rest));
            below.or_else(|| Some(item.span()))
        }
        _ => Some(place.span()),
    }
}

fn overrides(environment: impl IntoIterator<Item = (String, String)>) -> Vec<(String, String)> {
    let ours = |name: &str| {
        name.strip_prefix(ENVIRONMENT_PREFIX).is_some_and(|rest| rest.contains("__") || rest == "LISTENER")
    };
    let mut found: Vec<_> = environment.into_iter().filter(|(name, _)| ours(name)).collect();
    found.sort();
    found
}

/// Lists variables that begin like ours and set nothing, because they are most likely mistyped.
pub fn list_unknown_variables(environment: impl IntoIterator<Item = (String, String)>) -> Vec<String> {
    let all: Vec<_> = environment.into_iter().collect();
    let known: Vec<_> = overrides(all.clone()).into_iter().map(|(name, _)| name).collect();
    let names = all.into_iter().map(|(name, _)| name);
    let mut unknown: Vec<_> =
        names.filter(|name| name.starts_with(ENVIRONMENT_PREFIX) && !known.contains(name)).collect();
    unknown.sort();
    unknown
}

fn dotted(name: &str) -> Vec<String> {
    let name = name.strip_prefix(ENVIRONMENT_PREFIX).unwrap_or(name);
    name.split("__").map(str::to_ascii_lowercase).collect()
}

/// Sets one key. A value that reads as TOML (a number, `true`, a list) is that, anything else a string; where the
/// default is a string it is taken as it stands.
fn set(table: &mut Table, key: &[String], value: &str) {
    let parsed = || {
        let document: Option<Table> = format!("it = {value}").parse().ok();
        document.and_then(|mut document| document.remove("it"))
    };
    let default = Value::try_from(Config::default()).ok();
    let wants_text = key
        .iter()
        .try_fold(default.as_ref(), |at, name| at.map(|at| at.get(name.as_str())))
        .flatten()
        .is_some_and(Value::is_str);
    let text = || Value::String(value.to_owned());
    let value = if wants_text && !value.starts_with('"') { text() } else { parsed().unwrap_or_else(text) };
    put(table, key, value);
}

fn put(table: &mut Table, key: &[String], value: Value) {
    match key {
        [] => {}
        [last] => drop(table.insert(last.clone(), value)),
        [first, rest @ ..] => {
            let below = table.entry(first.clone()).or_insert_with(|| Value::Table(Table::new()));
            match below {
                Value::Table(below) => put(below, rest, value),
                Value::Array(items) => {
                    let (Some((number, rest)), Some(first)) = (rest.split_first(), items.first().cloned())
                    else {
                        return;
                    };
                    let Ok(number) = number.parse::<usize>() else { return };
                    if number == items.len() {
                        items.push(first);
                    }
                    if let Some(Value::Table(item)) = items.get_mut(number) {
                        put(item, rest, value);
                    }
                }
                // Something else stands where a section should; the variable means the section, so it replaces that.
                other => {
                    let mut below = Table::new();
                    put(&mut below, rest, value);
                    *other = Value::Table(below);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse("conduit.toml", text, []).map_err(|problem| problem.to_string())
    }

    fn with(name: &str, value: &str) -> Result<Config, String> {
        Config::parse(
            "conduit.toml",
            "[server]\nname = \"a.example\"\n",
            [(name.to_owned(), value.to_owned())],
        )
        .map_err(|problem| problem.to_string())
    }

    #[test]
    fn an_empty_file_means_the_defaults() {
        assert_eq!(parse("").unwrap(), Config::default());
    }

    #[test]
    fn what_is_wrong_is_named_with_file_line_key_and_expectation() {
        for (text, place, words) in [
            ("[server]\nnane = \"x\"\n", "conduit.toml, line 2, server.nane: ", "expected one of `name`"),
            ("\n\n[sever]\nname = \"x\"\n", "conduit.toml, line 3, sever: ", "expected one of `server`"),
            ("[server]\nname = 5\n", "conduit.toml, line 2, server.name: ", "expected"),
            ("[server]\nname = \"not a name\"\n", "conduit.toml, line 2, server.name: ", "server name"),
            (
                "[limits]\nrate_limits = \"yes\"\n",
                "conduit.toml, line 2, limits.rate_limits: ",
                "expected a boolean",
            ),
            (
                "[limits]\nin_flight_bytes_max = \"1 elephant\"\n",
                "line 2, limits.in_flight_bytes_max: ",
                "256 MiB",
            ),
            (
                "[registration]\nmode = \"sometimes\"\n",
                "line 2, registration.mode: ",
                "`closed`, `token`, `open`",
            ),
            ("[[listener]]\naddress = \"nowhere\"\n", "line 2, listener.address: ", "socket address"),
            ("[[listener]]\nadress = \"x\"\n", "line 2, listener.adress: ", "expected one of `address`"),
            (
                "[limits]\nsockets_by_device_max = 0\n",
                "line 2, limits.sockets_by_device_max: ",
                "sockets_max = 0",
            ),
            ("[server\n", "conduit.toml, line 1: ", "]"),
            ("[[listener]]\n", "conduit.toml, line 1, listener.0.address: ", "address or unix"),
            ("[passwords]\n\nargon2_lanes = 0\n", "conduit.toml, line 3, passwords.argon2_lanes: ", "1"),
            (
                "[rooms]\ndelayed_events_max = 1001\n",
                "conduit.toml, line 2, rooms.delayed_events_max: ",
                "0 to 1000",
            ),
            ("[rooms]\ndelay_max_days = 0\n", "conduit.toml, line 2, rooms.delay_max_days: ", "1 to 3650"),
            (
                "[rooms]\ndefault_version = \"0\"\n",
                "conduit.toml, line 2, rooms.default_version: ",
                "1 to 12",
            ),
            ("[log]\nlevel = \"lots\"\n", "conduit.toml, line 2, log.level: ", "info"),
            (
                "[media.previews]\ndeny = [\"https://a.example/\"]\n",
                "conduit.toml, line 2, media.previews.deny: ",
                "*.example.org",
            ),
            ("[media.previews]\nallow = [\"\"]\n", "line 2, media.previews.allow: ", "found \"\""),
            (
                "[media.previews]\naccept_language = \"de\\nx: y\"\n",
                "line 2, media.previews.accept_language: ",
                "en;q=0.5",
            ),
            ("[media.s3]\nbucket = \"x\"\n", "conduit.toml, line 2, media.s3.bucket: ", "3 to 63"),
            (
                "[media.s3]\nbucket = \"files\"\n",
                "conduit.toml, line 1, media.s3.access_key_id: ",
                "the id of the key",
            ),
            (
                "[media.s3]\nbucket = \"files\"\naccess_key_id = \"a\"\n",
                "conduit.toml, line 1, media.s3.secret_access_key: ",
                "secret_access_key_file",
            ),
            (
                "[media.s3]\nbucket = \"files\"\nendpoint = \"s3.example\"\n",
                "conduit.toml, line 3, media.s3.endpoint: ",
                "https://s3.example.org",
            ),
            (
                "[media.s3]\nbucket = \"files\"\nprefix = \"/a\"\n",
                "conduit.toml, line 3, media.s3.prefix: ",
                "aqueduct/media",
            ),
            (
                "[media.s3]\nbucket = \"files\"\naccess_key_id = \"a\"\nsecret_access_key = \"b\"\nredirect_lifetime_s = 9\n",
                "conduit.toml, line 5, media.s3.redirect_lifetime_s: ",
                "10 to 1200",
            ),
            (
                "[push_gateway]\nnetworks_allowed = [\"10/8\"]\n",
                "conduit.toml, line 2, push_gateway.networks_allowed: ",
                "10.0.0.0/8",
            ),
            (
                "[[push_gateway.app]]\nid = \"a\"\nkind = \"gcm\"\n",
                "line 3, push_gateway.app.kind: ",
                "`webpush`, `unifiedpush`, `fcm`, `apns`",
            ),
            (
                "[[push_gateway.app]]\nid = \"a\"\nkind = \"unifiedpush\"\nttl_s = 9999999\n",
                "conduit.toml, line 4, push_gateway.app.0.ttl_s: ",
                "2419200",
            ),
            (
                "[[push_gateway.app]]\nid = \"a\"\nkind = \"fcm\"\nservice_account_file = \"/none\"\n",
                "conduit.toml, line 4, push_gateway.app.0.service_account_file: ",
                "there is no file",
            ),
            ("[email]\nhost = \"mail.a.example\"\n", "email.from: ", "noreply@example.org"),
            ("[email]\nhost = \"a b\"\n", "conduit.toml, line 2, email.host: ", "mail.example.org"),
            ("[email]\ndelay_s = 0\n", "conduit.toml, line 2, email.delay_s: ", "1 to 86400"),
            ("[email]\ntimeout_s = 4\n", "conduit.toml, line 2, email.timeout_s: ", "5 to 600"),
            ("[email]\nport = 0\n", "conduit.toml, line 2, email.port: ", "1 to 65535"),
            ("[email]\nuser = \"a\"\n", "conduit.toml, line 2, email.user: ", "a user beside a password"),
            (
                "[email]\npassword_file = \"/none\"\n",
                "conduit.toml, line 2, email.password_file: ",
                "there is no file",
            ),
            (
                "[email]\nuser = \"a\"\npassword = \"b\"\ntls = \"none\"\n",
                "conduit.toml, line 4, email.tls: ",
                "starttls or tls",
            ),
            ("[search]\ndelay_ms = 9\n", "conduit.toml, line 2, search.delay_ms: ", "10 to 3600000"),
            ("[search]\n\ndelay_ms = 3600001\n", "conduit.toml, line 3, search.delay_ms: ", "10 to 3600000"),
            (
                "[search]\nwriter_bytes_max = \"15 MiB\"\n",
                "conduit.toml, line 2, search.writer_bytes_max: ",
                "16 MiB",
            ),
            (
                "[search]\nwriter_bytes_max = \"2049 MiB\"\n",
                "conduit.toml, line 2, search.writer_bytes_max: ",
                "2 GiB",
            ),
        ] {
            let problem = parse(text).unwrap_err();
            assert!(problem.contains(place), "{problem}");
            assert!(problem.contains(words), "{problem}");
        }
    }

    #[test]
    fn the_bounds_of_search_are_settings_themselves() {
        let search = |delay_ms: &str, bytes: &str| {
            parse(&format!("[search]\ndelay_ms = {delay_ms}\nwriter_bytes_max = \"{bytes}\"\n"))
                .unwrap()
                .search
        };
        assert_eq!(search("10", "16 MiB").delay_ms, 10);
        assert_eq!(search("10", "16 MiB").writer_bytes_max, crate::config::Size::mib(16));
        assert_eq!(search("3600000", "2 GiB").delay_ms, 3_600_000);
        assert_eq!(search("3600000", "2 GiB").writer_bytes_max, crate::config::Size::mib(2048));
    }

    #[test]
    fn the_environment_overrides_the_file() {
        assert_eq!(with("AQUEDUCT_SERVER__NAME", "b.example").unwrap().server.name, "b.example");
        assert_eq!(with("AQUEDUCT_PASSWORDS__ARGON2_LANES", "2").unwrap().passwords.argon2_lanes, 2);
        assert!(!with("AQUEDUCT_LIMITS__RATE_LIMITS", "false").unwrap().limits.rate_limits);
        assert_eq!(
            with("AQUEDUCT_ROOMS__DEFAULT_VERSION", "11").unwrap().rooms.default_version.as_str(),
            "11"
        );
        assert_eq!(with("AQUEDUCT_LIMITS__LOGIN__BURST", "7").unwrap().limits.login.burst, 7);
        let listeners = with("AQUEDUCT_LISTENER", "[{ address = \"0.0.0.0:80\" }]").unwrap().listeners;
        assert_eq!(listeners[0].address.unwrap().port(), 80);
        let listeners = with("AQUEDUCT_LISTENER__0__ADDRESS", "0.0.0.0:81").unwrap().listeners;
        assert_eq!(listeners[0].address.unwrap().port(), 81);
        // This variable is not a setting.
        assert_eq!(with("AQUEDUCT_SEED", "1").unwrap().server.name, "a.example");
    }

    #[test]
    fn a_variable_that_sets_nothing_is_listed() {
        let variables = ["AQUEDUCT_SERVER_NAME", "AQUEDUCT_SERVER__NAME", "AQUEDUCT_LISTENER", "PATH"];
        let variables = variables.map(|name| (name.to_owned(), "x".to_owned()));
        assert_eq!(list_unknown_variables(variables), ["AQUEDUCT_SERVER_NAME"]);
    }

    #[test]
    fn a_listener_has_its_own_address_and_its_files() {
        for (text, words) in [
            (
                "[[listener]]\naddress = \"127.0.0.1:1\"\n[[listener]]\naddress = \"127.0.0.1:1\"\n",
                "listener.1: another listener",
            ),
            ("[[listener]]\nunix = \"/x\"\n[[listener]]\nunix = \"/x\"\n", "listener.1: another listener"),
            (
                "[[listener]]\naddress = \"127.0.0.1:1\"\n[metrics]\naddress = \"127.0.0.1:1\"\n",
                "metrics.address: a listener",
            ),
            (
                "[[listener]]\naddress = \"127.0.0.1:1\"\ntls = { certificate = \"/none.pem\", key = \"/none.key\" }\n",
                "there is no file /none.pem",
            ),
        ] {
            let problem = parse(text).unwrap_err();
            assert!(problem.contains(words), "{problem}");
        }
    }

    #[test]
    fn a_mail_server_has_a_sender_and_its_password_is_not_shown() {
        let text = "[email]\nhost = \"127.0.0.1\"\nfrom = \"Example <noreply@example.org>\"\nuser = \"a\"\npassword = \"secret\"\n";
        let email = parse(text).unwrap().email;
        assert_eq!((email.port, email.tls), (587, crate::config::EmailTls::Starttls));
        assert!(!format!("{email:?}").contains("secret"), "{email:?}");
        for from in ["noreply@localhost", "\\\"A, B\\\" <noreply@example.org>"] {
            let text = format!("[email]\nhost = \"::1\"\nfrom = \"{from}\"\ntls = \"none\"\nport = 25\n");
            assert!(parse(&text).is_ok(), "{:?}", parse(&text).err());
        }
        for from in [
            "noreply",
            "<noreply@example.org",
            "noreply@example",
            "no\\nreply@example.org",
            "n\u{f6}@example.org",
        ] {
            let problem = parse(&format!("[email]\nhost = \"mail\"\nfrom = \"{from}\"\n")).unwrap_err();
            assert!(problem.contains("email.from: "), "{problem}");
        }
    }

    #[test]
    fn a_wrong_variable_is_named() {
        for (name, value, words) in [
            ("AQUEDUCT_SERVER__NANE", "x", "unknown field"),
            ("AQUEDUCT_LIMITS__RATE_LIMITS", "maybe", "expected a boolean"),
            ("AQUEDUCT_PASSWORDS__ARGON2_LANES", "0", "1"),
        ] {
            let problem = with(name, value).unwrap_err();
            assert!(problem.starts_with(&format!("environment variable {name}, ")), "{problem}");
            assert!(problem.contains(words), "{problem}");
        }
    }
}
