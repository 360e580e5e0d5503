//! The repository's own lints: rules that the compiler doesn't know. Each fails with file, line and what to do.

#![expect(clippy::unwrap_used, reason = "what is not as expected fails the test")]

#[path = "tidy/circles.rs"]
mod circles;
#[path = "tidy/exhaustive.rs"]
mod exhaustive;
#[path = "tidy/places.rs"]
mod places;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// The modules of `src/` in import order: a module uses only what stands left of it.
const LINE: [&str; 20] = [
    "ids",
    "json",
    "error",
    "config",
    "env",
    "metrics",
    "store",
    "schema",
    "media",
    "accounts",
    "rooms",
    "encryption",
    "push",
    "search",
    "delivery",
    "sync",
    "flows",
    "api",
    "server",
    "main",
];

/// Where waiting is allowed.
const WAITING: [&str; 7] = ["env", "delivery", "sync", "flows", "api", "server", "main"];

/// A file is split by idea well before this many lines.
const LINES_MAX: usize = 800;
/// So is what a file of `src/` has before its tests.
const CODE_LINES_MAX: usize = 600;

struct Source {
    /// Relative to the repository.
    path: PathBuf,
    text: String,
}

impl Source {
    /// Its place among the modules: `rooms` for `src/rooms/admit.rs`.
    fn module(&self) -> String {
        let below = self.path.strip_prefix("src").unwrap();
        let first = below.components().next().unwrap().as_os_str().to_str().unwrap();
        first.trim_end_matches(".rs").to_owned()
    }

    /// Its module path: `rooms::admit`.
    fn module_path(&self) -> String {
        let below = self.path.strip_prefix("src").unwrap().with_extension("");
        below.components().map(|part| part.as_os_str().to_str().unwrap()).collect::<Vec<_>>().join("::")
    }

    /// Lines with their numbers, up to the tests, without comments.
    fn code(&self) -> Vec<(usize, &str)> {
        numbered(&self.text)
            .into_iter()
            .take_while(|(_, line)| !line.starts_with("#[cfg(test)]") || line.contains("mod tests;"))
            .map(|(number, line)| (number, line.split("//").next().unwrap_or_default()))
            .collect()
    }

    /// Whether it is there for tests only: by its name, by its folder, or because its parent declares it so.
    fn is_test(&self) -> bool {
        let is_below_tests = self.path.components().any(|part| part.as_os_str() == "tests");
        if is_below_tests || self.path.ends_with("tests.rs") {
            return true;
        }
        let name = self.path.file_stem().unwrap().to_str().unwrap();
        let parent = self.path.with_file_name("");
        let declared = |file: PathBuf| {
            fs::read_to_string(root().join(file))
                .is_ok_and(|text| text.contains(&format!("#[cfg(test)]\nmod {name};")))
        };
        let parent = PathBuf::from(parent.to_str().unwrap().trim_end_matches('/'));
        declared(parent.with_extension("rs")) || declared(parent.join("lib.rs"))
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn files(below: &str, extension: &str) -> Vec<Source> {
    let mut found = Vec::new();
    let mut open = vec![root().join(below)];
    while let Some(path) = open.pop() {
        if path.is_dir() {
            open.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else if path.extension().is_some_and(|it| it == extension) {
            let text = fs::read_to_string(&path).unwrap();
            found.push(Source { path: path.strip_prefix(root()).unwrap().to_owned(), text });
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

/// The files of `src/` that are there not only for tests.
fn own_sources() -> impl Iterator<Item = Source> {
    files("src", "rs").into_iter().filter(|source| !source.is_test())
}

/// The files of `src/`, `tests/` and `appservices/`.
fn all_sources() -> impl Iterator<Item = Source> {
    ["src", "tests", "appservices"].into_iter().flat_map(|below| files(below, "rs"))
}

/// The lines of a text with their numbers, from 1 on.
fn numbered(text: &str) -> Vec<(usize, &str)> {
    text.lines().enumerate().map(|(index, line)| (index + 1, line)).collect()
}

fn fail_if_any(wrong: &[String], rule: &str) {
    assert!(wrong.is_empty(), "{rule}\n{}", wrong.join("\n"));
}

/// The modules that lines of code name after `crate::`, also in braces over several lines.
fn imports(code: &[(usize, &str)]) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let word = |text: &str| -> String {
        text.chars().take_while(|it| it.is_ascii_alphanumeric() || *it == '_').collect()
    };
    let mut depth = 0_usize;
    for (number, line) in code {
        let mut rest = *line;
        if depth == 0 {
            while let Some(at) = rest.find("crate::") {
                rest = &rest[at + "crate::".len()..];
                if let Some(inside) = rest.strip_prefix('{') {
                    depth = 1;
                    rest = inside;
                    break;
                }
                found.push((*number, word(rest)));
            }
        }
        if depth > 0 {
            // Names at the first level of the braces.
            let mut at_name = true;
            let mut skip = 0;
            for (at, it) in rest.char_indices() {
                if at < skip {
                    continue;
                }
                match it {
                    '{' => depth += 1,
                    '}' => {
                        depth -= 1;
                        if depth == 0 {
                            break;
                        }
                    }
                    ',' => at_name = true,
                    it if it.is_alphanumeric() || it == '_' => {
                        let name = word(&rest[at..]);
                        skip = at + name.len();
                        if depth == 1 && at_name {
                            found.push((*number, name));
                        }
                        at_name = false;
                    }
                    _ => {}
                }
            }
        }
    }
    found
}

#[test]
fn imports_point_left() {
    let place = |module: &str| LINE.iter().position(|it| *it == module);
    let mut wrong = Vec::new();
    for source in own_sources() {
        let module = source.module();
        if module == "lib" {
            continue;
        }
        let Some(own) = place(&module) else {
            wrong.push(format!("{}: module {module} has no place in the line", source.path.display()));
            continue;
        };
        for (number, used) in imports(&source.code()) {
            if place(&used).is_some_and(|used| used > own) {
                wrong.push(format!("{}:{number}: {module} uses {used}", source.path.display()));
            }
        }
    }
    fail_if_any(&wrong, "A module uses only what stands left of it (docs/architecture.md). Use a flow:");
}

#[test]
fn the_imports_of_a_file_are_found() {
    let code = "use crate::{\n    api::{Routes, server},\n    error::Result, flows,\n};\nlet x = crate::sync::token();";
    let found: Vec<_> = imports(&numbered(code)).into_iter().map(|(_, name)| name).collect();
    assert_eq!(found, ["api", "error", "flows", "sync"]);
}

#[test]
fn the_library_lists_its_modules_in_the_order_of_the_line() {
    let text = fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let listed: Vec<_> = text
        .lines()
        .filter_map(|line| line.strip_prefix("pub mod ").or_else(|| line.strip_prefix("mod ")))
        .map(|name| name.trim_end_matches(';'))
        .collect();
    let expected: Vec<_> = LINE.into_iter().filter(|name| listed.contains(name)).collect();
    assert_eq!(listed, expected);
}

/// Lines of the one future that the store makes for those above.
const BARRIER_WAITS: usize = 3;

/// The lines that wait, or make something that does.
fn waits<'s>(code: &[(usize, &'s str)]) -> Vec<(usize, &'s str)> {
    let is_awaited = |line: &str| {
        line.split(".await").skip(1).any(|rest| !rest.starts_with(|it: char| it.is_ascii_alphanumeric()))
    };
    let is_one = |line: &str| {
        is_awaited(line) || ["async fn", "async move", "async {"].iter().any(|it| line.contains(it))
    };
    code.iter().filter(|(_, line)| is_one(line)).copied().collect()
}

#[test]
fn lines_that_wait_are_found() {
    let code =
        "async fn a() {}\nlet b = async move {};\nlet c = async {};\nd().await;\nlet e = self.awaited;";
    assert_eq!(waits(&numbered(code)).len(), 4);
}

/// The lines that give a table another name, under which nobody would see who writes it.
fn tables_renamed<'s>(code: &[(usize, &'s str)]) -> Vec<(usize, &'s str)> {
    let is_one = |line: &str| {
        let is_bound = ["= &schema::", "= &crate::schema::", "= &tables::", "= &store::tables::"]
            .iter()
            .any(|it| line.contains(it));
        let is_import = line.trim_start().starts_with("use ");
        line.split("schema::")
            .flat_map(|part| part.split("tables::").skip(1))
            .chain(line.split("schema::").skip(1))
            .any(|rest| {
                let name = rest.split(|it: char| !it.is_ascii_alphanumeric() && it != '_').next().unwrap();
                let is_table = name.len() > 1 && name.chars().all(|it| !it.is_ascii_lowercase());
                is_table && (is_bound || is_import || rest[name.len()..].starts_with(" as "))
            })
    };
    code.iter().filter(|(_, line)| is_one(line)).copied().collect()
}

#[test]
fn tables_go_by_their_own_names() {
    let mut wrong = Vec::new();
    for source in own_sources() {
        for (number, line) in tables_renamed(&source.code()) {
            wrong.push(format!("{}:{number}: {}", source.path.display(), line.trim()));
        }
    }
    fail_if_any(&wrong, "Who writes a table is seen by its name; call it schema::NAME where it is used:");
}

#[test]
fn tables_under_other_names_are_found() {
    let wrong = "let t = &schema::ROOM;\nlet t = &crate::schema::USER_ROOM;\nuse crate::schema::TXN as T;";
    assert_eq!(tables_renamed(&numbered(wrong)).len(), 3);
    let right = "schema::ROOM.put(batch, num, row);\nlet x = schema::Rooms::new();";
    assert!(tables_renamed(&numbered(right)).is_empty());
}

/// The literals of a line of code, with their escapes undone, and the length of braces that stand for themselves kept.
fn literals(line: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut rest = line;
    while let Some(at) = rest.find('"') {
        // A quote as a character, or as a byte, opens nothing.
        if rest[..at].ends_with('\'') && rest[at + 1..].starts_with('\'') {
            rest = &rest[at + 2..];
            continue;
        }
        let is_raw = rest[..at].ends_with("r#");
        let (before, inside) = (at + 1, &rest[at + 1..]);
        let mut literal = String::new();
        let mut end = inside.len();
        let mut chars = inside.char_indices();
        while let Some((index, it)) = chars.next() {
            match it {
                '"' if !is_raw || inside[index + 1..].starts_with('#') => {
                    end = index + 1;
                    break;
                }
                '\\' if !is_raw => literal.extend(chars.next().map(|(_, it)| it)),
                it => literal.push(it),
            }
        }
        found.push(literal);
        rest = &rest[(before + end).min(rest.len())..];
    }
    found
}

/// The lines that put JSON together by hand: something is put between quotes, or after the name of a field, or a literal
/// begins an object.
fn json_by_hand<'s>(code: &[(usize, &'s str)]) -> Vec<(usize, &'s str)> {
    let is_one = |literal: String| {
        let text = literal.replace("{{", "\u{1}").replace("}}", "\u{2}");
        let interpolates = text.contains('{');
        interpolates && ["\"{", "\":{", "\u{1}\""].iter().any(|it| text.contains(it))
    };
    code.iter().filter(|(_, line)| literals(line).into_iter().any(is_one)).copied().collect()
}

#[test]
fn json_is_written_by_its_writer() {
    let mut wrong = Vec::new();
    for source in own_sources() {
        for (number, line) in json_by_hand(&source.code()) {
            wrong.push(format!("{}:{number}: {}", source.path.display(), line.trim()));
        }
    }
    fail_if_any(&wrong, "What somebody wrote could end a string early; write JSON with crate::json:");
}

#[test]
fn json_that_is_put_together_by_hand_is_found() {
    let wrong = [
        r##"let a = format!(r#"{{"chunk":{}}}"#, list);"##,
        r##"write!(json, r#","redacts":"{redacts}""#);"##,
        r##"let b = format!("\"{name}\"");"##,
        r##"let c = format!("{{\"a\":{b}}}");"##,
    ];
    let code: Vec<_> = wrong.into_iter().enumerate().collect();
    assert_eq!(json_by_hand(&code).len(), 4, "{:?}", json_by_hand(&code));
    let right = [
        r##"let a = format!("{name} is {why:?}");"##,
        r##"let b = '"'; let c = format!("`{field}`");"##,
        r##"let d = r#"{"type":"m.room.message"}"#;"##,
        r##"let e = format!("{{{}}}", "\"");"##,
    ];
    assert!(json_by_hand(&right.into_iter().enumerate().collect::<Vec<_>>()).is_empty());
}

#[test]
fn nothing_waits_below_the_line() {
    let mut wrong = Vec::new();
    for source in own_sources() {
        if WAITING.contains(&source.module().as_str()) {
            continue;
        }
        // A future that those above wait for: nothing below does.
        if source.path == Path::new("src/store/queue.rs") {
            assert_eq!(waits(&source.code()).len(), BARRIER_WAITS, "the store makes one future, the barrier");
            continue;
        }
        for (number, line) in waits(&source.code()) {
            wrong.push(format!("{}:{number}: {}", source.path.display(), line.trim()));
        }
    }
    fail_if_any(&wrong, "Plain functions below, async above (law 2):");
}

#[test]
fn each_table_is_written_by_its_owner_only() {
    let page = |path: &str| fs::read_to_string(root().join(path)).unwrap();
    let schema = page("src/schema.rs") + &page("src/store/tables.rs");
    let mut owners = BTreeMap::new();
    for line in schema.lines() {
        let mut words = line.split_whitespace();
        let is_table = words.next().is_some_and(|id| id.parse::<u8>().is_ok());
        if let (true, Some((name, _)), Some((_, owner))) =
            (is_table, line.split_once('('), line.split_once("of \""))
        {
            let name = name.split_whitespace().nth(1).unwrap();
            owners.insert(name.to_owned(), owner.split('"').next().unwrap().to_owned());
        }
    }
    assert!(owners.len() > 20, "the tables were not found");
    let mut wrong = Vec::new();
    for source in own_sources() {
        let path = source.module_path();
        let code: String = source.code().iter().map(|(_, line)| format!("{}\n", line.trim())).collect();
        for verb in [".put(", ".delete(", ".delete_prefix", ".delete_below"] {
            for (at, _) in code.match_indices(verb) {
                let before = code[..at].trim_end();
                let name =
                    before.rsplit(|it: char| !it.is_ascii_uppercase() && !it.is_ascii_digit() && it != '_');
                let Some(owner) = name.into_iter().next().and_then(|name| owners.get(name)) else { continue };
                if path != *owner && !path.starts_with(&format!("{owner}::")) {
                    let what: String =
                        code[before.rfind('\n').map_or(0, |at| at + 1)..].chars().take(60).collect();
                    wrong.push(format!("{}: {} (owner: {owner})", source.path.display(), what.trim()));
                }
            }
        }
    }
    fail_if_any(
        &wrong,
        "A table is written by the module that owns it (src/schema.rs, src/store/tables.rs):",
    );
}

/// Where locks are taken and guards are made, beside tests: what follows a mark stands only below these paths.
const DOORS: [(&str, &[&str]); 7] = [
    ("Guard::of_users(", &["src/flows/write.rs"]),
    ("accounts.lock_all(", &["src/flows/write.rs"]),
    ("accounts.lock_server(", &["src/flows/write.rs"]),
    // Only a room's seat makes its guard, and only the thread that works off the room's turns takes the seat.
    ("Guard::of_room(", &["src/rooms/turns.rs"]),
    (".sit()", &["src/rooms/turns.rs"]),
    // Nobody else writes yet.
    ("Guard::alone(", &["src/store", "src/server/identity.rs", "src/encryption/incarnation.rs"]),
    // Every write has the number of a batch, which a replica can follow.
    ("engine.write(", &["src/store/flush.rs"]),
];

/// The lines of a file that go past a door, with the mark of the door.
fn past_the_doors<'s>(path: &str, code: &[(usize, &'s str)]) -> Vec<(usize, &'static str)> {
    let past = |(number, line): &(usize, &'s str)| {
        let number = *number;
        let doors = DOORS.iter().filter(|(mark, below)| {
            line.contains(mark) && !below.iter().any(|below| path.starts_with(below))
        });
        doors.map(|(mark, _)| (number, *mark)).collect::<Vec<_>>()
    };
    code.iter().flat_map(past).collect()
}

#[test]
fn locks_are_taken_and_the_engine_is_written_at_their_doors_only() {
    let mut wrong = Vec::new();
    for source in own_sources() {
        let path = source.path.to_str().unwrap();
        // The one function of `src/rooms.rs` that takes a seat is there for tests.
        let is_excused = |line: &str| path == "src/rooms.rs" && line.contains("self.turns(room).sit()");
        let code = source.code().into_iter().filter(|(_, line)| !is_excused(line));
        for (number, mark) in past_the_doors(path, &code.collect::<Vec<_>>()) {
            wrong.push(format!("{path}:{number}: {mark}..)"));
        }
    }
    fail_if_any(
        &wrong,
        "Write through flows/write.rs or a change to the room (docs/store.md, \"Who may write\"):",
    );
}

#[test]
fn what_goes_past_a_door_is_found() {
    let code =
        [(3, "let guard = Guard::of_room(num);"), (4, "let seat = turns.sit();"), (5, "engine.write(x);")];
    let all = [(3, "Guard::of_room("), (4, ".sit()"), (5, "engine.write(")];
    assert_eq!(past_the_doors("src/rooms/change.rs", &code), all);
    assert_eq!(past_the_doors("src/flows/room/send.rs", &code), all);
    assert_eq!(past_the_doors("src/rooms/turns.rs", &code), [(5, "engine.write(")]);
    assert_eq!(past_the_doors("src/store/flush.rs", &code).len(), 2);
}

#[test]
fn no_word_stands_for_work_not_done() {
    // Put together, for this file is read, too.
    let banned: Vec<_> =
        ["to-do!(", "un-implemented!(", "d-bg!(", "FIX-ME", "TO-DO", "X-XX", "#[al-low(", "#![al-low("]
            .map(|word| word.replace('-', ""))
            .to_vec();
    let mut wrong = Vec::new();
    for source in all_sources() {
        for (number, line) in numbered(&source.text) {
            if let Some(word) = banned.iter().find(|word| line.contains(word.as_str())) {
                wrong.push(format!("{}:{number}: {word}", source.path.display()));
            }
        }
    }
    fail_if_any(
        &wrong,
        "Finish it, or refuse the request with a Matrix error; exceptions are #[expect(.., reason)]:",
    );
}

#[test]
fn files_say_what_they_are_for_and_stay_readable() {
    let mut wrong = Vec::new();
    for source in all_sources() {
        let path = source.path.display().to_string();
        if !source.text.starts_with("//!") {
            wrong.push(format!("{path}: does not open with //! and what it is for"));
        }
        let lines = source.text.lines().count();
        if lines > LINES_MAX {
            wrong.push(format!("{path}: {lines} lines; split it by idea"));
        }
        let code = source.code().len();
        if path.starts_with("src") && !source.is_test() && code > CODE_LINES_MAX {
            wrong.push(format!("{path}: {code} lines before its tests; split it by idea"));
        }
        if path.ends_with("/mod.rs") && !path.starts_with("tests/support") {
            wrong.push(format!("{path}: is named after its folder here: rooms.rs + rooms/"));
        }
        let banned = ["utils", "helpers", "common", "core", "manager", "service", "globals", "types"];
        let stem = source.path.file_stem().unwrap().to_str().unwrap();
        if banned.contains(&stem) {
            wrong.push(format!("{path}: a module is a noun of the domain"));
        }
        // Handlers are named like ruma's modules; get is one of the store's verbs.
        if !["src/api/", "src/store", "tests/tidy.rs"].iter().any(|not_here| path.starts_with(not_here)) {
            for (number, line) in source.code() {
                if line.contains("fn get_") {
                    wrong.push(format!("{path}:{number}: find_x, require_x or list_x, not get_x"));
                }
            }
        }
    }
    fail_if_any(&wrong, "Files:");
}

/// Words with which no comment opens: the reader would learn the subject after the condition.
const OPENINGS_BANNED: [&str; 7] = ["So many ", "So much ", "Of ", "What ", "Whoever ", "Whose ", "Which "];
/// A comment has at least this many words.
const COMMENT_WORDS_MIN: usize = 4;

/// The comments of a text: the line on which each begins, and its words in one line. Code blocks and separators are left out.
fn comments(text: &str) -> Vec<(usize, String)> {
    let mut found: Vec<(usize, String)> = Vec::new();
    let mut before: Option<&str> = None;
    let mut is_code = false;
    for (number, line) in numbered(text) {
        let line = line.trim_start();
        let marker = ["//!", "///", "//"].into_iter().find(|marker| line.starts_with(marker));
        let Some(marker) = marker else {
            before = None;
            continue;
        };
        let words = line[marker.len()..].trim();
        if words.starts_with("```") {
            is_code = !is_code;
        }
        if is_code || words.is_empty() || words.starts_with("```") || words.starts_with("---") {
            before = None;
            continue;
        }
        match found.last_mut() {
            Some((_, comment)) if before == Some(marker) => {
                comment.push(' ');
                comment.push_str(words);
            }
            _ => found.push((number, words.to_owned())),
        }
        before = Some(marker);
    }
    found
}

/// Says what is wrong with a comment, if anything is.
fn comment_fault(comment: &str) -> Option<String> {
    // Handlers open with method and path, and `See [..]` points to where the sentence stands.
    let is_reference = comment.starts_with('`') || comment.starts_with('<') || comment.starts_with("See [");
    if let Some(opening) = OPENINGS_BANNED.iter().find(|opening| comment.starts_with(**opening)) {
        return Some(format!("opens with \"{}\"", opening.trim_end()));
    }
    let words = comment.split_whitespace().count();
    (words < COMMENT_WORDS_MIN && !is_reference).then(|| format!("has {words} words"))
}

#[test]
fn comments_are_sentences() {
    let mut wrong = Vec::new();
    for source in all_sources() {
        for (line, comment) in comments(&source.text) {
            if let Some(fault) = comment_fault(&comment) {
                wrong.push(format!("{}:{line}: {fault}: {comment}", source.path.display()));
            }
        }
    }
    fail_if_any(&wrong, "A comment is a sentence that stands by itself and says why (docs/style.md):");
}

#[test]
fn comments_that_are_no_sentences_are_found() {
    let text = "/// Lanes.\nlet a = 1;\n// So many steps back it goes\n// by walking.\n\n// --- rooms ---\n/// Walk back at most this many rows.\n/// `GET /sync`\n";
    let found: Vec<_> =
        comments(text).into_iter().map(|(line, comment)| (line, comment_fault(&comment).is_some())).collect();
    assert_eq!(found, [(1, true), (3, true), (7, false)]);
}

#[test]
fn select_takes_its_branches_in_order() {
    let mut wrong = Vec::new();
    for source in files("src", "rs") {
        let lines: Vec<_> = source.text.lines().collect();
        for (number, line) in lines.iter().enumerate() {
            if line.contains("select! {") && lines.get(number + 1).is_none_or(|next| next.trim() != "biased;")
            {
                wrong.push(format!("{}:{}", source.path.display(), number + 1));
            }
        }
    }
    fail_if_any(&wrong, "select! begins with biased;, or a simulation can't be repeated:");
}

#[test]
fn handlers_say_their_method_and_path() {
    let methods = ["`GET /", "`PUT /", "`POST /", "`DELETE /"];
    let mut wrong = Vec::new();
    for source in files("src/api/client", "rs") {
        let lines: Vec<_> = source.text.lines().collect();
        let calls = ["r.client(", "r.public(", "r.maybe_client(", "r.admin(", "r.appservice(", "r.server("];
        let names: BTreeSet<_> = calls
            .into_iter()
            .flat_map(|call| source.text.split(call).skip(1))
            .filter_map(|rest| rest.split(')').next())
            .collect();
        for (number, line) in lines.iter().enumerate() {
            let Some(name) = line.split("async fn ").nth(1).and_then(|rest| rest.split(['(', '<']).next())
            else {
                continue;
            };
            if !names.contains(name) {
                continue;
            }
            let above = lines[..number].iter().rev();
            let first = above
                .take_while(|line| line.starts_with("///") || line.starts_with("#["))
                .filter(|line| line.starts_with("///"))
                .last();
            if !first.is_some_and(|doc| methods.iter().any(|method| doc.contains(method))) {
                wrong.push(format!("{}:{}: {name}", source.path.display(), number + 1));
            }
        }
    }
    fail_if_any(&wrong, "The doc of a handler begins with its method and path:");
}

#[test]
fn paths_named_in_the_documentation_exist() {
    let mut documents = files("docs", "md");
    documents.push(Source {
        path: "README.md".into(),
        text: fs::read_to_string(root().join("README.md")).unwrap(),
    });
    let tops: BTreeSet<String> = fs::read_dir(root())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    // A build or a running server makes these.
    let made = ["data", "target", ".git"];
    let mut wrong = Vec::new();
    let mut checked = 0;
    for document in &documents {
        for (number, line) in numbered(&document.text) {
            // These texts stand in backticks or are targets of links.
            let quoted = line.split('`').skip(1).step_by(2);
            let linked = line.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next());
            for path in quoted.chain(linked) {
                let path = path.split([' ', ':', '(']).next().unwrap_or_default().trim_end_matches('/');
                let top = path.split('/').next().unwrap_or_default();
                let relative = document.path.with_file_name("").join(path);
                let is_path = path.contains('/') && (tops.contains(top) || top == "docs" || top == "..");
                if !is_path || made.contains(&top) || path.contains(['*', '<', '{']) {
                    continue;
                }
                checked += 1;
                if !root().join(path).exists() && !root().join(relative).exists() {
                    wrong.push(format!("{}:{number}: {path}", document.path.display()));
                }
            }
        }
    }
    fail_if_any(&wrong, "The documentation names what is not there:");
    assert!(checked > 20, "the paths in the documentation were not found");
}
