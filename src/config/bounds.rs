//! The bounds of settings, and how settings must fit together: what their types alone cannot say.

use std::net::SocketAddr;

use federation::{guard::parse_network, transport::Proxy};
use http::Uri;
use lettre::message::Mailbox;
use ruma::RoomVersionId;

use crate::config::{Bucket, Config, EmailTls, Size};

/// A setting that is wrong, and what it should be.
type Wrong = (String, String);

/// The room versions that rooms may have here.
pub const ROOM_VERSIONS: [RoomVersionId; 12] = [
    RoomVersionId::V1,
    RoomVersionId::V2,
    RoomVersionId::V3,
    RoomVersionId::V4,
    RoomVersionId::V5,
    RoomVersionId::V6,
    RoomVersionId::V7,
    RoomVersionId::V8,
    RoomVersionId::V9,
    RoomVersionId::V10,
    RoomVersionId::V11,
    RoomVersionId::V12,
];

/// Finds the first setting that is wrong.
pub(super) fn require_all(config: &Config) -> Result<(), Wrong> {
    server(config)?;
    listeners(config)?;
    passwords(config)?;
    limits(config)?;
    log(config)?;
    require(ROOM_VERSIONS.contains(&config.rooms.default_version), "rooms.default_version", || {
        "expected a room version from 1 to 12".into()
    })?;
    require(config.rooms.delayed_events_max <= 1_000, "rooms.delayed_events_max", || {
        "expected 0 to 1000".into()
    })?;
    require((1..=3_650).contains(&config.rooms.delay_max_days), "rooms.delay_max_days", || {
        "expected 1 to 3650".into()
    })?;
    require(config.storage.cache_bytes_max >= Size::mib(1), "storage.cache_bytes_max", || {
        "expected at least 1 MiB".into()
    })?;
    federation(config)?;
    config.push_gateway.check().map_err(|(key, why)| (format!("push_gateway.{key}"), why))?;
    email(config)?;
    let search = &config.search;
    require(
        (Size::mib(16)..=Size::mib(2048)).contains(&search.writer_bytes_max),
        "search.writer_bytes_max",
        || "expected 16 MiB to 2 GiB".into(),
    )?;
    require((10..=3_600_000).contains(&search.delay_ms), "search.delay_ms", || {
        "expected 10 to 3600000 milliseconds".into()
    })?;
    media(config)?;
    let address = &config.metrics.address;
    require(address.is_empty() || address.parse::<SocketAddr>().is_ok(), "metrics.address", || {
        format!("expected an address and a port such as \"127.0.0.1:9090\", or nothing; found {address:?}")
    })
}

fn require(holds: bool, key: impl Into<String>, expected: impl FnOnce() -> String) -> Result<(), Wrong> {
    if holds { Ok(()) } else { Err((key.into(), expected())) }
}

fn server(config: &Config) -> Result<(), Wrong> {
    let url = &config.server.public_base_url;
    let parsed = url.parse::<Uri>().ok();
    let good = parsed.is_some_and(|uri| {
        matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some() && uri.query().is_none()
    });
    require(good, "server.public_base_url", || {
        format!("expected a URL such as \"https://matrix.example.org\"; found {url:?}")
    })?;
    require(!config.server.data_dir.as_os_str().is_empty(), "server.data_dir", || {
        "expected a directory".into()
    })
}

fn listeners(config: &Config) -> Result<(), Wrong> {
    require(!config.listeners.is_empty(), "listener", || "expected at least one [[listener]]".into())?;
    for (number, listener) in config.listeners.iter().enumerate() {
        let one = listener.address.is_some() != listener.unix.is_some();
        require(one, format!("listener.{number}.address"), || {
            "a listener has either address or unix: expected exactly one of them".into()
        })?;
        require(listener.tls.is_none() || listener.unix.is_none(), format!("listener.{number}.tls"), || {
            "a Unix socket has no TLS: expected a TCP address beside tls".into()
        })?;
        let earlier = config.listeners.iter().take(number);
        let is_doubled = earlier.clone().any(|it| it.unix == listener.unix && it.address == listener.address);
        require(!is_doubled, format!("listener.{number}"), || {
            "another listener has this address already: expected one of its own".into()
        })?;
        for (key, file) in
            listener.tls.iter().flat_map(|tls| [("certificate", &tls.certificate), ("key", &tls.key)])
        {
            require(file.is_file(), format!("listener.{number}.tls.{key}"), || {
                format!("expected a file in PEM format; there is no file {}", file.display())
            })?;
        }
    }
    let metrics = config.metrics.address.parse::<SocketAddr>().ok();
    let is_taken = metrics.is_some_and(|it| config.listeners.iter().any(|other| other.address == Some(it)));
    require(!is_taken, "metrics.address", || {
        "a listener has this address already: expected one of its own".into()
    })
}

fn federation(config: &Config) -> Result<(), Wrong> {
    let it = &config.federation;
    let authorities = &it.trusted_ca_file;
    require(
        authorities.as_os_str().is_empty() || authorities.is_file(),
        "federation.trusted_ca_file",
        || format!("expected a file in PEM format; there is no file {}", authorities.display()),
    )?;
    for network in &it.networks_allowed {
        parse_network(network).map_err(|expected| ("federation.networks_allowed".to_owned(), expected))?;
    }
    let is_proxy = it.proxy.is_empty() || Proxy::parse(&it.proxy).is_ok();
    // The URL may hold a password, so that it is not said again.
    require(is_proxy, "federation.proxy", || {
        "expected a URL such as \"http://proxy.example.org:3128\", or nothing".to_owned()
    })
}

fn email(config: &Config) -> Result<(), Wrong> {
    let it = &config.email;
    require((5..=600).contains(&it.timeout_s), "email.timeout_s", || "expected 5 to 600 seconds".into())?;
    require((1..=86_400).contains(&it.delay_s), "email.delay_s", || "expected 1 to 86400 seconds".into())?;
    require(it.port > 0, "email.port", || "expected 1 to 65535".into())?;
    let is_of_host = |it: u8| it.is_ascii_alphanumeric() || b".-_:".contains(&it);
    require(it.host.len() <= 253 && it.host.bytes().all(is_of_host), "email.host", || {
        format!("expected the name of a host such as \"mail.example.org\", or nothing; found {:?}", it.host)
    })?;
    let has_password = !it.password.is_empty() || !it.password_file.as_os_str().is_empty();
    require(
        it.password.is_empty() || it.password_file.as_os_str().is_empty(),
        "email.password_file",
        || "email.password is set already: expected only one of them".into(),
    )?;
    let file = &it.password_file;
    require(file.as_os_str().is_empty() || file.is_file(), "email.password_file", || {
        format!("expected a file with a password; there is no file {}", file.display())
    })?;
    require(has_password != it.user.is_empty(), "email.user", || {
        "expected a user beside a password, or neither of them".into()
    })?;
    require(it.user.is_empty() || it.tls != EmailTls::None, "email.tls", || {
        "expected starttls or tls beside email.user: without it everybody on the way reads the password"
            .into()
    })?;
    // A sender is asked for only where mails are sent at all.
    let is_sender = it.from.parse::<Mailbox>().is_ok_and(|from| {
        let domain = from.email.domain();
        it.from.bytes().all(|it| (b' '..=b'~').contains(&it))
            && (domain.contains('.') || domain == "localhost")
    });
    require(it.host.is_empty() || is_sender, "email.from", || {
        format!("expected a sender such as \"Example <noreply@example.org>\"; found {:?}", it.from)
    })
}

/// The largest upload that can be allowed.
pub const UPLOAD_BYTES_MAX: Size = Size::mib(16 << 10);

fn media(config: &Config) -> Result<(), Wrong> {
    let it = &config.media;
    for (key, size) in
        [("media.upload_bytes_max", it.upload_bytes_max), ("media.remote_bytes_max", it.remote_bytes_max)]
    {
        require((Size::kib(1)..=UPLOAD_BYTES_MAX).contains(&size), key, || {
            "expected 1 KiB to 16 GiB".into()
        })?;
    }
    require((1..=1_000).contains(&it.pending_uploads_max), "media.pending_uploads_max", || {
        "expected 1 to 1000".into()
    })?;
    require((1..=720).contains(&it.pending_upload_hours), "media.pending_upload_hours", || {
        "expected 1 to 720".into()
    })?;
    previews(config)?;
    let compression = &it.compression;
    require((1..=100).contains(&compression.jpeg_quality), "media.compression.jpeg_quality", || {
        "expected 1 to 100".into()
    })?;
    let is_side = compression.side_max == 0 || (64..=65_535).contains(&compression.side_max);
    require(is_side, "media.compression.side_max", || "expected 0, or 64 to 65535".into())?;
    s3(config)?;
    // Each pixel takes four bytes while a thumbnail is made, and there may be two at once.
    require((10_000..=400_000_000).contains(&it.thumbnail_pixels_max), "media.thumbnail_pixels_max", || {
        "expected 10000 to 400000000".into()
    })
}

fn previews(config: &Config) -> Result<(), Wrong> {
    let it = &config.media.previews;
    for (key, patterns) in [("media.previews.allow", &it.allow), ("media.previews.deny", &it.deny)] {
        // A pattern that can fit no host would deny nothing, and nobody would notice.
        let is_of_hosts = |pattern: &String| {
            let is_allowed = |it: u8| it.is_ascii_alphanumeric() || b".-_*?:".contains(&it);
            !pattern.is_empty() && pattern.bytes().all(is_allowed)
        };
        if let Some(pattern) = patterns.iter().find(|pattern| !is_of_hosts(pattern)) {
            let expected = "expected patterns of hosts such as \"*.example.org\"";
            return Err((key.to_owned(), format!("{expected}; found {pattern:?}")));
        }
    }
    let languages = &it.accept_language;
    let is_field =
        (1..=200).contains(&languages.len()) && languages.bytes().all(|it| (b' '..=b'~').contains(&it));
    require(is_field, "media.previews.accept_language", || {
        format!("expected languages such as \"en\" or \"de, en;q=0.5\"; found {languages:?}")
    })
}

fn s3(config: &Config) -> Result<(), Wrong> {
    let it = &config.media.s3;
    if !it.is_used() {
        return Ok(());
    }
    let is_name =
        |text: &str, others: &[u8]| text.bytes().all(|it| it.is_ascii_alphanumeric() || others.contains(&it));
    let is_bucket = (3..=63).contains(&it.bucket.len()) && is_name(&it.bucket, b"-._");
    require(is_bucket, "media.s3.bucket", || {
        format!(
            "expected the name of a bucket, of 3 to 63 letters, digits, \"-\", \".\" and \"_\"; found {:?}",
            it.bucket
        )
    })?;
    require(!it.region.is_empty() && is_name(&it.region, b"-"), "media.s3.region", || {
        format!("expected the name of a region such as \"us-east-1\"; found {:?}", it.region)
    })?;
    let is_prefix = it.prefix.len() <= 200
        && is_name(&it.prefix, b"-._/")
        && (it.prefix.is_empty() || it.prefix.split('/').all(|part| !matches!(part, "" | "." | "..")));
    require(is_prefix, "media.s3.prefix", || {
        format!(
            "expected names with \"/\" between them, as \"aqueduct/media\", or nothing; found {:?}",
            it.prefix
        )
    })?;
    for (key, url, text) in [
        ("media.s3.endpoint", it.bucket_url(), &it.endpoint),
        ("media.s3.redirect_endpoint", it.redirect_url(), &it.redirect_endpoint),
    ] {
        require(url.is_some(), key, || {
            format!("expected a URL such as \"https://s3.example.org\", or nothing; found {text:?}")
        })?;
    }
    require(!it.access_key_id.is_empty(), "media.s3.access_key_id", || {
        "expected the id of the key with which requests to the bucket are signed".into()
    })?;
    let (secret, file) = (&it.secret_access_key, &it.secret_access_key_file);
    let one = secret.is_empty() != file.as_os_str().is_empty();
    require(one, "media.s3.secret_access_key", || {
        "expected the secret of the key here or in secret_access_key_file, and not in both".into()
    })?;
    for (key, file) in
        [("media.s3.secret_access_key_file", file), ("media.s3.trusted_ca_file", &it.trusted_ca_file)]
    {
        require(file.as_os_str().is_empty() || file.is_file(), key, || {
            format!("expected a file; there is no file {}", file.display())
        })?;
    }
    // A file that has moved stays at its former place for thirty minutes.
    require((10..=1_200).contains(&it.redirect_lifetime_s), "media.s3.redirect_lifetime_s", || {
        "expected 10 to 1200 seconds".into()
    })
}

fn passwords(config: &Config) -> Result<(), Wrong> {
    let it = &config.passwords;
    require((1..=64).contains(&it.argon2_lanes), "passwords.argon2_lanes", || "expected 1 to 64".into())?;
    require((1..=100).contains(&it.argon2_iterations), "passwords.argon2_iterations", || {
        "expected 1 to 100".into()
    })?;
    let least = it.argon2_lanes * 8;
    require((least..=4 << 20).contains(&it.argon2_memory_kib), "passwords.argon2_memory_kib", || {
        format!("expected {least} (8 a lane) to 4194304")
    })
}

fn limits(config: &Config) -> Result<(), Wrong> {
    let it = &config.limits;
    // The largest body has to fit into the share of one address.
    require(it.in_flight_bytes_max >= Size::mib(64), "limits.in_flight_bytes_max", || {
        "expected \"64 MiB\" or more".into()
    })?;
    require(it.connections_max > 0, "limits.connections_max", || "expected 1 or more".into())?;
    require(it.connections_by_address_max > 0, "limits.connections_by_address_max", || {
        "expected 1 or more".into()
    })?;
    // All sockets are turned off by `sockets_max`, so that a bound of 0 for some of them is a mistake.
    let sockets = [
        ("sockets_by_address_max", it.sockets_by_address_max),
        ("sockets_by_user_max", it.sockets_by_user_max),
        ("sockets_by_device_max", it.sockets_by_device_max),
    ];
    for (name, count_max) in sockets {
        require(count_max > 0, format!("limits.{name}"), || {
            "expected 1 or more; sockets_max = 0 turns sockets off".into()
        })?;
    }
    let buckets: [(&str, &Bucket); 11] = [
        ("login", &it.login),
        ("password", &it.password),
        ("register", &it.register),
        ("send", &it.send),
        ("membership", &it.membership),
        ("to_device", &it.to_device),
        ("inbound_to_device", &it.inbound_to_device),
        ("sync", &it.sync),
        ("read", &it.read),
        ("transaction", &it.transaction),
        ("other", &it.other),
    ];
    // An owner who mistypes never waits for longer than a minute.
    require(it.password.per_second >= 1.0 / 60.0, "limits.password.per_second", || {
        "expected 0.017 or more: one try a minute".into()
    })?;
    for (name, bucket) in buckets {
        let rate = bucket.per_second;
        require(rate.is_finite() && rate > 0.0, format!("limits.{name}.per_second"), || {
            "expected a number above 0".into()
        })?;
        require(bucket.burst > 0, format!("limits.{name}.burst"), || "expected 1 or more".into())?;
    }
    Ok(())
}

fn log(config: &Config) -> Result<(), Wrong> {
    let level = &config.log.level;
    // A bare word would be taken for the name of a module.
    let known = |word: &str| matches!(word, "error" | "warn" | "info" | "debug" | "trace" | "off");
    let good = level.split(',').all(|part| {
        let (module, level) = part.trim().rsplit_once('=').unwrap_or(("aqueduct", part.trim()));
        known(level) && !module.is_empty()
    });
    require(good, "log.level", || {
        format!(
            "expected error, warn, info, debug or trace, or a list such as \"info,aqueduct::sync=debug\"; found {level:?}"
        )
    })
}
