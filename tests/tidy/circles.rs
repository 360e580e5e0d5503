//! Files inside a module form no circle: see "Files form no circle" in `docs/style.md`.
//!
//! The check reads each file's paths (`use` with its braces, and paths inside of code), follows names that a file re-exports to
//! the file that holds them, and draws an edge from the user to the holder. Method calls have no path and are not seen.

#![expect(clippy::indexing_slicing, reason = "what is not as expected fails the test")]

use std::collections::{BTreeMap, BTreeSet};

use super::{Source, fail_if_any, own_sources};

/// The segments of a module's path; the crate's root has none.
type Path = Vec<String>;

/// A word, `::`, or one character of a text of Rust, with its line. Comments, literals and what is there for tests are left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Token {
    pub(super) line: usize,
    pub(super) text: String,
}

fn is_word(it: char) -> bool {
    it.is_alphanumeric() || it == '_'
}

pub(super) fn tokens(text: &str) -> Vec<Token> {
    let chars: Vec<char> = text.chars().collect();
    let at = |index: usize| chars.get(index).copied().unwrap_or('\0');
    let (mut index, mut line) = (0, 1);
    let mut found: Vec<Token> = Vec::new();
    while index < chars.len() {
        let begin = index;
        let it = at(index);
        if it == '/' && at(index + 1) == '/' {
            while index < chars.len() && at(index) != '\n' {
                index += 1;
            }
        } else if it == '"' {
            let before = &chars[..index];
            let hashes = before.iter().rev().take_while(|it| **it == '#').count();
            let is_raw = before.len() > hashes && before[before.len() - 1 - hashes] == 'r';
            index += 1;
            while index < chars.len() {
                if at(index) == '\\' && !is_raw {
                    index += 2;
                    continue;
                }
                index += 1;
                if at(index - 1) == '"' && (!is_raw || (0..hashes).all(|more| at(index + more) == '#')) {
                    break;
                }
            }
        } else if it == '\'' && at(index + 1) == '\\' {
            index += 3;
            while index < chars.len() && at(index - 1) != '\'' {
                index += 1;
            }
        } else if it == '\'' && at(index + 2) == '\'' {
            index += 3;
        } else if is_word(it) {
            while is_word(at(index)) {
                index += 1;
            }
            found.push(Token { line, text: chars[begin..index].iter().collect() });
        } else if it == ':' && at(index + 1) == ':' {
            index += 2;
            found.push(Token { line, text: "::".to_owned() });
        } else {
            index += 1;
            if !it.is_whitespace() {
                found.push(Token { line, text: it.to_string() });
            }
        }
        line += chars[begin..index].iter().filter(|it| **it == '\n').count();
    }
    without_tests(found)
}

/// Leaves out each item under `#[cfg(test)]`.
fn without_tests(tokens: Vec<Token>) -> Vec<Token> {
    let mut kept = Vec::new();
    let mut index = 0;
    let is_at = |index: usize, words: &[&str]| {
        words
            .iter()
            .enumerate()
            .all(|(more, word)| tokens.get(index + more).is_some_and(|it| it.text == *word))
    };
    while index < tokens.len() {
        if !is_at(index, &["#", "[", "cfg", "(", "test", ")", "]"]) {
            kept.push(tokens[index].clone());
            index += 1;
            continue;
        }
        index += 7;
        let mut depth = 0_usize;
        while index < tokens.len() {
            match tokens[index].text.as_str() {
                "{" | "(" | "[" => depth += 1,
                "}" | ")" | "]" => depth -= 1,
                _ => {}
            }
            let is_end = match tokens[index].text.as_str() {
                ";" => depth == 0,
                // The braces of a `use` are followed by its semicolon.
                "}" => depth == 0 && !is_at(index + 1, &[";"]),
                _ => false,
            };
            index += 1;
            if is_end {
                break;
            }
        }
    }
    kept
}

/// One file: the paths that it names, and the names that it imports.
#[derive(Debug, Default)]
struct File {
    name: String,
    /// The paths as they are written, with their lines.
    paths: Vec<(usize, Path)>,
    /// The names that a `use` brings in, with the paths for which they stand.
    imported: BTreeMap<String, Path>,
}

fn read(name: &str, text: &str) -> File {
    let tokens = tokens(text);
    let mut file = File { name: name.to_owned(), ..File::default() };
    let mut index = 0;
    while index < tokens.len() {
        if tokens[index].text == "use" {
            index += 1;
            read_use(&tokens, &mut index, &[], &mut file);
            continue;
        }
        let (line, mut path) = (tokens[index].line, Path::new());
        while tokens.get(index).is_some_and(|it| it.text.starts_with(is_word)) {
            path.push(tokens[index].text.clone());
            index += 1;
            if tokens.get(index).is_none_or(|it| it.text != "::") {
                break;
            }
            index += 1;
        }
        match path.len() {
            0 => index += 1,
            1 => {}
            _ => file.paths.push((line, path)),
        }
    }
    file
}

/// Reads one tree of a `use`, which begins at `index`.
fn read_use(tokens: &[Token], index: &mut usize, before: &[String], file: &mut File) {
    let mut path = before.to_vec();
    while let Some(token) = tokens.get(*index) {
        *index += 1;
        match token.text.as_str() {
            "::" => {}
            "{" => {
                while tokens.get(*index).is_some_and(|it| it.text != "}") {
                    read_use(tokens, index, &path, file);
                    if tokens.get(*index).is_some_and(|it| it.text == ",") {
                        *index += 1;
                    }
                }
                *index += 1;
                return;
            }
            // A type of precise capturing (`impl Trait + use<'a>`) imports nothing.
            "<" => return,
            word => {
                if word != "self" || path.is_empty() {
                    path.push(word.to_owned());
                }
                let next = tokens.get(*index).map(|it| it.text.as_str());
                if next == Some("::") {
                    continue;
                }
                let name = if next == Some("as") {
                    *index += 2;
                    tokens[*index - 1].text.clone()
                } else {
                    path.last().cloned().unwrap_or_default()
                };
                file.paths.push((token.line, path.clone()));
                file.imported.insert(name, path);
                return;
            }
        }
    }
}

/// All files by their module's path.
type Files = BTreeMap<Path, File>;

/// The module that holds what a path names as it is written in the file of `from`. None where it is not ours.
fn holder(files: &Files, from: &[String], written: &[String], steps_left: usize) -> Option<Path> {
    let steps_left = steps_left.checked_sub(1)?;
    let (first, rest) = written.split_first()?;
    let file = files.get(from)?;
    match first.as_str() {
        "crate" => walk(files, Path::new(), rest, steps_left),
        "self" => walk(files, from.to_vec(), rest, steps_left),
        "super" => {
            let mut parent = from.to_vec();
            parent.pop()?;
            let above = rest.iter().take_while(|it| *it == "super").count();
            for _ in 0..above {
                parent.pop()?;
            }
            walk(files, parent, &rest[above..], steps_left)
        }
        name => {
            let child: Path = from.iter().cloned().chain([name.to_owned()]).collect();
            if files.contains_key(&child) {
                return walk(files, child, rest, steps_left);
            }
            let imported = file.imported.get(name)?;
            // An import of its own name, as `use ruma;`, leads nowhere.
            if imported.first()? == name {
                return None;
            }
            let full: Path = imported.iter().chain(rest).cloned().collect();
            holder(files, from, &full, steps_left)
        }
    }
}

/// Goes down from a module by the segments of a path, and through what files re-export.
fn walk(files: &Files, mut module: Path, segments: &[String], steps_left: usize) -> Option<Path> {
    for (done, segment) in segments.iter().enumerate() {
        let child: Path = module.iter().cloned().chain([segment.clone()]).collect();
        if files.contains_key(&child) {
            module = child;
            continue;
        }
        let rest = &segments[done + 1..];
        if let Some(imported) = files.get(&module).and_then(|file| file.imported.get(segment)) {
            let full: Path = imported.iter().chain(rest).cloned().collect();
            return holder(files, &module, &full, steps_left).or(Some(module));
        }
        return Some(module);
    }
    Some(module)
}

/// The uses between the modules of one level: from, to, and where.
type Uses = BTreeMap<(String, String), BTreeSet<String>>;

/// The level below which a use happens, with the two modules there. The file of a module itself is no module below it.
fn at_level(from: &[String], to: &[String]) -> Option<(Path, String, String)> {
    let shared = from.iter().zip(to).take_while(|(a, b)| a == b).count();
    Some((from[..shared].to_vec(), from.get(shared)?.clone(), to.get(shared)?.clone()))
}

/// The circles of all levels: each as lines that say who uses whom, and where.
fn circles(files: &Files) -> Vec<String> {
    let mut levels: BTreeMap<Path, Uses> = BTreeMap::new();
    for (module, file) in files {
        for (line, written) in &file.paths {
            let Some(target) = holder(files, module, written, 20) else { continue };
            if let Some((level, from, to)) = at_level(module, &target) {
                let place = format!("{}:{line}: {}", file.name, written.join("::"));
                levels.entry(level).or_default().entry((from, to)).or_default().insert(place);
            }
        }
    }
    let mut found = Vec::new();
    for (level, uses) in levels {
        for ((from, to), places) in &uses {
            if !reaches(&uses, to, from) {
                continue;
            }
            let level = if level.is_empty() { "crate".to_owned() } else { level.join("::") };
            let places: Vec<_> = places.iter().take(8).map(|it| format!("    {it}")).collect();
            found.push(format!(
                "{level}: {from} uses {to}, which comes back to {from}\n{}",
                places.join("\n")
            ));
        }
    }
    found
}

fn reaches(uses: &Uses, from: &str, to: &str) -> bool {
    let (mut seen, mut open) = (BTreeSet::from([from]), vec![from]);
    while let Some(here) = open.pop() {
        if here == to {
            return true;
        }
        open.extend(uses.keys().filter(|(a, b)| a == here && seen.insert(b)).map(|(_, b)| b.as_str()));
    }
    false
}

fn module_path(source: &Source) -> Path {
    let path = source.module_path();
    if path == "lib" { Path::new() } else { path.split("::").map(str::to_owned).collect() }
}

#[test]
fn files_form_no_circle() {
    let files: Files = own_sources()
        .map(|source| (module_path(&source), read(&source.path.display().to_string(), &source.text)))
        .collect();
    assert!(files.len() > 200, "the files were not found");
    fail_if_any(
        &circles(&files),
        "Modules side by side form a circle; see docs/style.md for how to mend it:",
    );
}

/// The circles of files that are given as paths of modules with their texts.
fn circles_of(texts: &[(&str, &str)]) -> Vec<String> {
    let path = |name: &str| name.split("::").filter(|it| !it.is_empty()).map(str::to_owned).collect::<Path>();
    let files = texts.iter().map(|(name, text)| (path(name), read(name, text))).collect();
    circles(&files).into_iter().map(|it| it.lines().next().unwrap_or_default().to_owned()).collect()
}

#[test]
fn circles_of_files_are_found() {
    let parent = "pub mod a;\npub mod b;\npub mod c;\npub use b::{Thing as Renamed, other};";
    let cases = [
        // The uses stand in a `use`, in nested braces, below `super`, in a path inside of code, and behind another name.
        ("use crate::m::b;", "use crate::m::a::f;"),
        ("use crate::{ids::Num, m::{c, b::{self, x}}};", "use super::a;"),
        ("fn f() -> crate::m::b::X { todo() }", "fn g() { super::a::f() }"),
        ("use crate::m; fn f() { m::b::g() }", "use crate::m::a as first; fn g() { first::f() }"),
        // A name that the parent re-exports is its holder's.
        ("use crate::m::Renamed;", "use crate::m::a;"),
        ("use super::other;", "use crate::{m::a::{f, g}};"),
        ("fn f() { m::Renamed::new() } use crate::m;", "use crate::m::a;"),
    ];
    for (a, b) in cases {
        let found = circles_of(&[("", "pub mod m;"), ("m", parent), ("m::a", a), ("m::b", b), ("m::c", "")]);
        let expected =
            ["m: a uses b, which comes back to a", "m: b uses a, which comes back to b"].map(str::to_owned);
        assert_eq!(found, expected, "{a} / {b}");
    }
    // A circle over three, of which one goes through a file further down.
    let three = [
        ("", "mod m;"),
        ("m", "mod a; mod b; mod c;"),
        ("m::a", "use super::b;"),
        ("m::b", "mod deep;"),
        ("m::b::deep", "use super::super::c::x;"),
        ("m::c", "use crate::m::a;"),
    ];
    assert_eq!(circles_of(&three).len(), 3);
    // Below a file there may be a circle, too.
    let below = [
        ("", "mod m;"),
        ("m", "mod a;"),
        ("m::a", "mod b; mod c;"),
        ("m::a::b", "use super::c;"),
        ("m::a::c", "use super::b;"),
    ];
    assert_eq!(circles_of(&below).len(), 2);
}

#[test]
fn uses_that_form_no_circle_are_let_pass() {
    let texts = [
        ("", "mod m;"),
        // A parent uses its children, and they use what it holds.
        ("m", "mod a; mod b; pub struct Own; fn f() { a::f(); b::g() }"),
        ("m::a", "use crate::m::{Own, b};\nuse ruma::a;"),
        // Comments, texts, tests, methods and paths of others are no uses.
        (
            "m::b",
            "use super::Own;\n// use super::a;\nconst A: &str = \"super::a::f\"; const B: &str = r#\"\"super::a\"#;\n\
             fn g<'a>(x: &'a str) -> impl Iterator<Item = char> + use<'a> { x.a().chars() }\nfn h() { ruma::m::a::f(); let c = '\\''; }\n\
             #[cfg(test)]\npub use super::a::only_tests;\n#[cfg(test)]\nmod tests { use crate::m::a; fn t() { a::f() } }",
        ),
    ];
    assert_eq!(circles_of(&texts), Vec::<String>::new());
}
