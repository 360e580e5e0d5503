//! `conduit.toml` is complete and true: it lists every setting, with the default of the code and what it means.

use aqueduct::config::Config;
use toml::{Table, Value};

const TEXT: &str = include_str!("../conduit.toml");

#[test]
fn conduit_toml_says_exactly_the_defaults() {
    let written: Table = TEXT.parse().unwrap();
    let Value::Table(defaults) = Value::try_from(Config::default()).unwrap() else { panic!("not a table") };
    for (section, default) in &defaults {
        let Some(value) = written.get(section) else { panic!("conduit.toml has no section {section}") };
        if let (Value::Table(default), Value::Table(value)) = (default, value) {
            for (key, default) in default {
                assert_eq!(value.get(key), Some(default), "{section}.{key}");
            }
        }
        assert_eq!(value, default, "{section}");
    }
    assert_eq!(written.keys().collect::<Vec<_>>(), defaults.keys().collect::<Vec<_>>());
    assert_eq!(Config::parse("conduit.toml", TEXT, []).unwrap(), Config::default());
}

#[test]
fn every_setting_is_explained() {
    let lines: Vec<_> = TEXT.lines().collect();
    for (number, line) in lines.iter().enumerate() {
        if line.contains(" = ") && !line.starts_with('#') {
            assert!(
                lines[number - 1].starts_with('#'),
                "line {}: nothing says what it means: {line}",
                number + 1
            );
        }
    }
    // Settings without a default can't stand there as values.
    let of_apps = ["id", "kind", "payload", "ttl_s", "vapid_key_file", "vapid_contact", "hosts_allowed"];
    let of_providers =
        ["service_account_file", "message", "key_file", "key_id", "team_id", "topic", "sandbox"];
    for key in of_apps.into_iter().chain(of_providers).chain(["push_type", "token_encoding", "url"]) {
        assert!(TEXT.contains(&format!("\n# {key} = ")), "push_gateway.app: {key}");
    }
    for optional in ["unix = ", "tls = ", "certificate = ", "key = "] {
        assert!(TEXT.contains(optional), "{optional}");
    }
}
