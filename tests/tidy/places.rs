//! Some things are said in one place only: the status of a refusal, and the types of events.

use super::{fail_if_any, files, literals, numbered, own_sources};

/// The files that name HTTP statuses beside `src/api/reply.rs`, with how many lines do, and why they may.
const STATUS_EXCEPTIONS: [(&str, usize, &str); 3] = [
    ("src/server/listen.rs", 2, "the address of the metrics speaks plain HTTP and has no errors of Matrix"),
    ("src/server/gateway.rs", 2, "the push gateway alone has no homeserver whose error a panic could be"),
    ("src/api/serve.rs", 2, "it reads the status of an answer that came too late, and sets none"),
];

/// The lines that name a status, or change that of an answer.
fn statuses<'s>(code: &[(usize, &'s str)]) -> Vec<(usize, &'s str)> {
    let is_one =
        |line: &str| ["StatusCode", "status_mut(", ".status("].iter().any(|mark| line.contains(mark));
    let is_read = |line: &str| line.contains(".status()") && !line.contains("StatusCode");
    code.iter().filter(|(_, line)| is_one(line) && !is_read(line)).copied().collect()
}

#[test]
fn statuses_of_refusals_are_set_in_one_place() {
    let mut wrong = Vec::new();
    for source in own_sources().filter(|source| source.path.to_str() != Some("src/api/reply.rs")) {
        let (path, found) = (source.path.to_str().unwrap(), statuses(&source.code()));
        let exception = STATUS_EXCEPTIONS.iter().find(|(file, ..)| *file == path);
        if found.len() > exception.map_or(0, |(_, lines, _)| *lines) {
            wrong.extend(found.iter().map(|(number, line)| format!("{path}:{number}: {}", line.trim())));
        }
    }
    fail_if_any(
        &wrong,
        "A refusal names an error code, and src/api/reply.rs gives that its status; a code with another status is an \
         `Exception` in src/error.rs. Anything else needs a reason in STATUS_EXCEPTIONS:",
    );
}

#[test]
fn statuses_beside_the_one_place_are_found() {
    let wrong = "return (StatusCode::CONFLICT, \"x\");\n*response.status_mut() = code;\nResponse::builder().status(409)";
    assert_eq!(statuses(&numbered(wrong)).len(), 3);
    let right = "let status = response.status().as_u16();\nresponse.status_msg = presence.status_msg;";
    assert!(statuses(&numbered(right)).is_empty());
}

/// The page of the names that the specification gives to types of events and relations.
const EVENT_TYPES: &str = "src/schema/event_types.rs";

/// The names on the page.
fn event_types() -> Vec<String> {
    let page = files("src/schema", "rs").into_iter().find(|source| source.path.to_str() == Some(EVENT_TYPES));
    let page = page.unwrap();
    page.code()
        .into_iter()
        .filter(|(_, line)| line.starts_with("pub const"))
        .flat_map(|(_, line)| literals(line))
        .filter(|name| name.starts_with("m.") || name.starts_with("org."))
        .collect()
}

/// The lines that write the type of an event out: one of the page, or any other below `m.room.`.
fn event_types_written_out<'s>(code: &[(usize, &'s str)], known: &[String]) -> Vec<(usize, &'s str)> {
    let is_plain = |name: &str| name.chars().all(|it| it.is_ascii_lowercase() || it == '_' || it == '.');
    let is_one = |name: String| {
        known.contains(&name) || (name.len() > 7 && name.starts_with("m.room.") && is_plain(&name))
    };
    let is_attribute = |line: &str| line.trim_start().starts_with("#[");
    code.iter()
        .filter(|(_, line)| !is_attribute(line) && literals(line).into_iter().any(is_one))
        .copied()
        .collect()
}

#[test]
fn types_of_events_are_written_out_on_one_page() {
    let known = event_types();
    assert!(known.len() > 20, "the types of events were not found");
    let mut wrong = Vec::new();
    for source in own_sources().filter(|source| source.path.to_str() != Some(EVENT_TYPES)) {
        for (number, line) in event_types_written_out(&source.code(), &known) {
            wrong.push(format!("{}:{number}: {}", source.path.display(), line.trim()));
        }
    }
    fail_if_any(&wrong, "Use the constant of src/schema/event_types.rs, or add one there:");
}

#[test]
fn types_of_events_that_are_written_out_are_found() {
    let known = ["m.tag".to_owned(), "m.room.member".to_owned()];
    let wrong =
        "const A: &str = \"m.room.member\";\nif x == \"m.tag\" {}\nfind(\"m.room.pinned_events\", \"\")";
    assert_eq!(event_types_written_out(&numbered(wrong), &known).len(), 3);
    let right = "a(MEMBER);\n#[serde(rename = \"m.tag\")]\nb(\"m.room_versions\");\nc(\"a message of m.room.member\");";
    let found = event_types_written_out(&numbered(right), &known);
    assert!(found.is_empty(), "{found:?}");
}
