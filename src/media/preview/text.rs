//! Text of pages, as clients get it: one line, without characters that steer a terminal or a screen, and cut.

/// Makes one line of a text and cuts it after this many characters. None where nothing is left.
pub(super) fn clean(text: &str, characters_max: usize) -> Option<String> {
    let mut line = String::new();
    let (mut count, mut is_parted) = (0, false);
    for character in text.chars() {
        if character.is_whitespace() {
            is_parted = !line.is_empty();
            continue;
        }
        if character.is_control() || is_steering(character) {
            continue;
        }
        let parts = usize::from(is_parted);
        if count + parts + 1 > characters_max {
            // The last character makes room for the sign that there was more.
            line.pop();
            line.push('…');
            break;
        }
        if is_parted {
            line.push(' ');
        }
        line.push(character);
        (count, is_parted) = (count + parts + 1, false);
    }
    (!line.is_empty()).then_some(line)
}

/// Cuts a text to this many bytes at most, between two characters.
pub(super) fn cut(text: &str, bytes_max: usize) -> &str {
    let mut end = bytes_max.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default()
}

/// Whether a character changes the direction of what stands around it, or is nothing but a mark for machines. The joiners stay,
/// because letters of some scripts and emoji are made with them.
fn is_steering(character: char) -> bool {
    matches!(
        character,
        '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e001f}'
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_becomes_one_line_without_signs_that_steer() {
        for (text, line) in [
            ("  a \n\t b\u{a0}c ", Some("a b c")),
            ("a\u{0}b\u{1b}[31mc\u{7f}\u{9b}", Some("ab[31mc")),
            ("\u{202e}abc\u{202c}\u{2066}d\u{2069}\u{feff}", Some("abcd")),
            ("👩\u{200d}💻", Some("👩\u{200d}💻")),
            (" \n\u{0} \u{200b}", None),
            ("", None),
        ] {
            assert_eq!(clean(text, 100).as_deref(), line, "{text:?}");
        }
    }

    #[test]
    fn a_long_text_is_cut_between_characters() {
        assert_eq!(clean("abcd", 4).as_deref(), Some("abcd"));
        assert_eq!(clean("abcde", 4).as_deref(), Some("abc…"));
        assert_eq!(clean("ab cd", 4).as_deref(), Some("ab …"));
        assert_eq!(clean("ééééé", 4).as_deref(), Some("ééé…"));
        assert_eq!(clean("abcd   \n ", 4).as_deref(), Some("abcd"));
        let long = clean(&"x ".repeat(1_000_000), 300).unwrap();
        assert!(long.chars().count() <= 300 && long.ends_with('…'), "{long}");
        assert_eq!((cut("aé", 2), cut("aé", 3), cut("aé", 9), cut("é", 0)), ("a", "aé", "aé", ""));
    }
}
