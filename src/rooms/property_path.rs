//! Paths of properties in events, such as `content.body` (appendices, "Dot-separated property paths").

/// Splits a path into the names of properties. In a name, `\.` is a dot and `\\` a backslash; a backslash before anything
/// else stands for itself.
pub fn split(path: &str) -> Vec<String> {
    let mut names = vec![String::new()];
    let mut rest = path.chars().peekable();
    while let Some(character) = rest.next() {
        let character = match character {
            '.' => {
                names.push(String::new());
                continue;
            }
            '\\' => rest.next_if(|next| matches!(next, '.' | '\\')).unwrap_or('\\'),
            other => other,
        };
        if let Some(name) = names.last_mut() {
            name.push(character);
        }
    }
    names
}

/// Joins names of properties to a path, with those escapes alone that it needs.
pub fn join(names: &[String]) -> String {
    let escaped: Vec<_> = names.iter().map(|name| name.replace('\\', r"\\").replace('.', r"\.")).collect();
    escaped.join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_dots_and_backslashes_are_escaped() {
        for (path, names, joined) in [
            (r"content.body", ["content", "body"].as_slice(), r"content.body"),
            (r"content.m\.relates_to", &["content", "m.relates_to"], r"content.m\.relates_to"),
            (r"content.m\\foo", &["content", r"m\foo"], r"content.m\\foo"),
            (r"content.\x", &["content", r"\x"], r"content.\\x"),
            (r"a\", &[r"a\"], r"a\\"),
            (r"a\\.b", &[r"a\", "b"], r"a\\.b"),
            ("", &[""], ""),
        ] {
            let found = split(path);
            assert_eq!(found, names, "{path}");
            assert_eq!(join(&found), joined);
            assert_eq!(split(joined), names, "a joined path is split into the same names");
        }
    }
}
