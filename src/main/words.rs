//! The words in which the outcome of a command is told to people.

use aqueduct::flows::operator::{
    accounts::DeviceEntry,
    federation::{CheckedServer, ServerStatus},
    media::{ItemEntry, MediaOutcome},
    operate::{Outcome, UserEntry},
    reports::Reported,
    tokens::TokenEntry,
};

/// Writes an outcome in words for people.
pub(super) fn for_people(outcome: &Outcome) -> String {
    match outcome {
        Outcome::UserCreated(it) => {
            let role = if it.admin { ", an admin of this server" } else { "" };
            with_made(format!("Created {}{role}.", it.user_id), it.password.as_deref())
        }
        Outcome::Users(list) => lines(list, user_line, "There is no account yet."),
        Outcome::AdminSet(it) if it.admin => format!("{} is an admin of this server now.", it.user_id),
        Outcome::AdminSet(it) => format!("{} is no admin of this server now.", it.user_id),
        Outcome::StandingSet(it) => match (it.locked, it.suspended) {
            (true, true) => format!("{} is locked and suspended.", it.user_id),
            (true, false) => format!("{} is locked.", it.user_id),
            (false, true) => format!("{} is suspended.", it.user_id),
            (false, false) => format!("{} is neither locked nor suspended.", it.user_id),
        },
        Outcome::Reports(list) => lines(list, report_line, "Nobody has reported anything."),
        Outcome::ReportDismissed(it) => format!("Dismissed the report of {} by {}.", it.about, it.by),
        Outcome::PasswordSet(it) => {
            let text = format!("Set the password of {}, and ended all its sessions.", it.user_id);
            with_made(text, it.password.as_deref())
        }
        Outcome::UserDeactivated(it) => format!("Deactivated {}.", it.user_id),
        Outcome::Devices(it) => lines(&it.devices, device_line, "The account has no device."),
        Outcome::LoggedOut(it) => format!("Ended {} sessions of {}.", it.devices, it.user_id),
        Outcome::TokenCreated(it) => it.token.clone(),
        Outcome::Tokens(list) => lines(list, token_line, "There is no registration token."),
        Outcome::TokenRevoked(it) => format!("Revoked {}.", it.token),
        Outcome::BackedUp(it) => format!("Backed up everything to position {}.", it.position),
        Outcome::Restored(it) => {
            let kept = it
                .replaced
                .as_ref()
                .map_or_else(String::new, |path| format!(" What was there before is in {}.", path.display()));
            format!("Restored everything up to position {}.{kept}", it.position)
        }
        Outcome::Explained(it) => it.to_string().trim_end().to_owned(),
        Outcome::Servers(it) => {
            let servers = lines(&it.servers, server_line, "All servers answer, and nothing waits for any.");
            format!("{servers}\n{} positions of the log are still to be told.", it.lag)
        }
        Outcome::ServerRetried(it) if it.waited => format!("{} is tried again now.", it.server),
        Outcome::ServerRetried(it) => format!("Nothing waits for {}.", it.server),
        Outcome::ServerChecked(it) => checked_server(it),
        Outcome::KeyMade(it) => {
            format!(
                "Made {}. It takes the place of {} when the server is started next.",
                it.key_id, it.replaces
            )
        }
        Outcome::SearchBegun(_) => {
            "The index of search is built anew, beside the server or when it is started next.".to_owned()
        }
        Outcome::SearchIs(it) => {
            let filling = if it.is_filling { " It is new, and is still being filled." } else { "" };
            format!(
                "{} texts are indexed, and {} positions of the log are to be read.{filling}",
                it.documents, it.lag
            )
        }
        Outcome::Media(it) => media(it),
        Outcome::Emails(it) => {
            lines(&it.addresses, |it| it.address.clone(), "The account has no e-mail address.")
        }
        Outcome::Checked(it) => {
            let rows: u64 = it.rows.values().sum();
            let mut text = match it.faults {
                0 => format!("Read {rows} rows: nothing is wrong."),
                faults => format!("Read {rows} rows, {faults} faults:\n{}", it.findings.join("\n")),
            };
            if it.unjudged > 0 {
                let unjudged = it.unjudged;
                text.push_str(&format!(
                    "\n{unjudged} rows take too long beside a running server: check a copy of the store."
                ));
            }
            text
        }
    }
}

fn with_made(text: String, password: Option<&str>) -> String {
    password.map_or(text.clone(), |password| format!("{text}\nPassword: {password}"))
}

fn lines<T>(list: &[T], line: fn(&T) -> String, none: &str) -> String {
    if list.is_empty() { none.to_owned() } else { list.iter().map(line).collect::<Vec<_>>().join("\n") }
}

fn user_line(user: &UserEntry) -> String {
    let notes = [
        (user.admin, "admin"),
        (user.guest, "guest"),
        (user.deactivated, "deactivated"),
        (user.locked, "locked"),
        (user.suspended, "suspended"),
    ];
    let notes: Vec<_> = notes.into_iter().filter(|(is, _)| *is).map(|(_, note)| note).collect();
    format!("{}  {}", user.user_id, notes.join(", ")).trim_end().to_owned()
}

/// Writes a report in one line. Its reason is written as Rust writes text, because anybody may put control characters there.
fn report_line(it: &Reported) -> String {
    let score = it.report.score.map_or_else(String::new, |score| format!(" (score {score})"));
    format!("{}  by {}, {} ago{score}: {:?}", it.about, it.by, span(it.made_s_ago), it.report.reason)
}

fn device_line(device: &DeviceEntry) -> String {
    let name = device.display_name.as_deref().unwrap_or("(no name)");
    let seen = device.seen_s_ago.map_or_else(String::new, |ago| format!("  last seen {} ago", span(ago)));
    let ip = device.last_seen_ip.as_ref().map_or_else(String::new, |ip| format!(" from {ip}"));
    format!("{}  {name}{seen}{ip}", device.device_id)
}

fn server_line(it: &ServerStatus) -> String {
    let mut parts = Vec::new();
    if let (Some(since), Some(next)) = (it.failing_for_s, it.next_try_in_s) {
        let why = it.why.as_deref().unwrap_or("unknown");
        parts.push(format!("no answer for {}, tried again in {}: {why}", span(since), span(next)));
    }
    if it.rooms_behind > 0 {
        parts.push(format!("{} rooms behind", it.rooms_behind));
    }
    if it.messages_waiting > 0 {
        parts.push(format!("{} messages to devices wait", it.messages_waiting));
    }
    if it.sending {
        parts.push("sending".to_owned());
    }
    if parts.is_empty() {
        parts.push("nothing waits".to_owned());
    }
    format!("{}  {}", it.server, parts.join("; "))
}

fn checked_server(it: &CheckedServer) -> String {
    let mut text = it.steps.clone();
    if let (Some(step), Some(name)) = (&it.found_by, &it.tls_name) {
        text.push(format!("Found by step {step}; its certificate must be for {name}."));
    }
    text.extend(it.version.as_ref().map(|version| format!("Version: {version}")));
    if !it.keys.is_empty() {
        text.push(format!("Keys: {}", it.keys.join(", ")));
    }
    text.extend(it.status.as_ref().map(server_line));
    match it.faults.as_slice() {
        [] => text.push(format!("Others reach {}.", it.server)),
        faults => text.extend(faults.iter().map(|fault| format!("Wrong: {fault}"))),
    }
    text.join("\n")
}

fn token_line(token: &TokenEntry) -> String {
    let uses_max = token.uses_max.map_or_else(|| "any number of".to_owned(), |max| max.to_string());
    let end = match token.ends_in_s {
        None => String::new(),
        Some(0) => ", expired".to_owned(),
        Some(left) => format!(", ends in {}", span(left)),
    };
    format!("{}  {} of {uses_max} uses{end}", token.token, token.uses)
}

/// Writes a number of seconds in the largest unit that says it well.
fn span(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7_200 => format!("{} min", seconds / 60),
        7_200..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} days", seconds / 86_400),
    }
}

fn media(outcome: &MediaOutcome) -> String {
    match outcome {
        MediaOutcome::Status(it) => format!(
            "{} files of users of this server have {} bytes, {} files of other servers have {}, and {} images of previews have {}. \
             Stored are {} files with {} bytes, of which {} with {} bytes lie in the bucket. {} URIs wait for an upload, and {} files \
             are quarantined.",
            it.own.0,
            it.own.1,
            it.others.0,
            it.others.1,
            it.previews.0,
            it.previews.1,
            it.files.0,
            it.files.1,
            it.in_bucket.0,
            it.in_bucket.1,
            it.pending,
            it.quarantined
        ),
        MediaOutcome::Item(it) => item(it),
        MediaOutcome::Moved(it) => {
            let mut text =
                format!("Moved {} files with {} bytes; {} were there already.", it.files, it.bytes, it.there);
            if it.passing > 0 {
                text.push_str(&format!(
                    " {} were about to come or to go: give the command again.",
                    it.passing
                ));
            }
            if it.lost > 0 {
                text.push_str(&format!(" {} are not where they should be; the log names them.", it.lost));
            }
            text
        }
        MediaOutcome::Done(it) => {
            let mut text = format!("Dealt with {} files.", it.items);
            if it.bytes > 0 {
                text.push_str(&format!(" They had {} bytes.", it.bytes));
            }
            if it.protected > 0 {
                text.push_str(&format!(" {} are protected, and stay as they are.", it.protected));
            }
            if it.has_more {
                text.push_str(" There are more: give the command again.");
            }
            text
        }
    }
}

fn item(it: &ItemEntry) -> String {
    let by = it.user.as_deref().unwrap_or(match it.row.is_preview {
        true => "nobody: it is the image of a preview",
        false => "a user of that server",
    });
    let mut text = format!("{}, by {by}", it.uri);
    match &it.row.content {
        Some(content) => {
            text.push_str(&format!(
                ": {}, {} bytes, SHA-256 {}",
                content.content_type, content.bytes, content.digest
            ));
        }
        None => text.push_str(": nothing was uploaded to it yet"),
    }
    if let Some(original) = &it.original {
        text.push_str(&format!(
            ", made of a file of {} bytes with SHA-256 {}",
            original.bytes, original.digest
        ));
    }
    for (is, said) in [
        (it.row.is_quarantined, ", quarantined"),
        (it.row.is_protected, ", protected"),
        (it.row.is_open, ", given to everybody"),
    ] {
        text.push_str(if is { said } else { "" });
    }
    text.push_str(&format!(", {} thumbnails.", it.thumbnails));
    text
}
