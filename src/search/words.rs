//! Splits text into the words by which it is found, the same way when it is indexed and when it is searched for.
//!
//! Text is brought to one form first: NFKC, without case, and without marks in the scripts where people leave them out when they
//! type. Scripts that put no spaces between words (Chinese, Japanese, Thai and others), and Korean, whose words
//! take endings, are split into single characters and pairs of neighbours: a search for several characters is a search for
//! their pairs in this order.

use std::collections::BTreeSet;

use unicode_normalization::{
    UnicodeNormalization,
    char::{canonical_combining_class, is_combining_mark},
};

/// A word has at most this many characters; what is longer is cut, in the index as in searches.
const WORD_CHARS_MAX: usize = 64;
/// A word is found by a beginning of at least this many characters. With fewer, too many words begin so.
const BEGINNING_CHARS_MIN: usize = 3;
/// A word is found by a beginning of at most this many characters, because each beginning of each word is in the index.
const BEGINNING_CHARS_MAX: usize = 20;
/// At most this many words of one text are indexed. The largest event has less than twice as many.
const WORDS_MAX: usize = 40_000;

/// A word of a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Word {
    /// The word in the form in which words are compared.
    pub text: String,
    /// The byte of the text at which it begins.
    pub from: usize,
    /// The byte of the text at which it ends.
    pub to: usize,
    /// Its place among the words of the text. A pair has the place of its first character.
    pub place: usize,
    /// The way in which it was found.
    pub kind: Kind,
}

/// The ways in which words are found in a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The word stands between spaces or signs.
    Spaced,
    /// The word is one character of a script without spaces, or one sign that is a picture.
    Single,
    /// The word is two neighbouring characters of a script without spaces.
    Pair,
}

/// The parts that a text is read as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Spaced,
    Unspaced,
    Picture,
    /// A character inside a word that is not part of how it is compared, such as an apostrophe.
    Silent,
    Between,
}

/// Lists the words of a text, as far as the bound of [`WORDS_MAX`].
pub fn list(text: &str) -> Vec<Word> {
    let mut splitter = Splitter::default();
    for (from, to) in clusters(text) {
        let Some(cluster) = text.get(from..to) else { continue };
        normalized(cluster, |letter| splitter.take(letter, from, to));
        if splitter.words.len() >= WORDS_MAX {
            break;
        }
    }
    splitter.end_spaced();
    splitter.words.truncate(WORDS_MAX);
    splitter.words
}

/// Whether a word that is searched for also stands for those that begin with it.
pub fn is_beginning(word: &str) -> bool {
    (BEGINNING_CHARS_MIN..=BEGINNING_CHARS_MAX).contains(&word.chars().count())
}

/// Lists the beginnings by which these words are found, each once; the whole word is one, too. Words of scripts without spaces have
/// none.
pub fn list_beginnings(words: &[Word]) -> BTreeSet<&str> {
    let spaced = words.iter().filter(|word| word.kind == Kind::Spaced);
    let ends =
        |text: &str| text.char_indices().map(|(at, letter)| at + letter.len_utf8()).collect::<Vec<_>>();
    let mut found = BTreeSet::new();
    for word in spaced {
        let ends = ends(&word.text).into_iter().take(BEGINNING_CHARS_MAX).skip(BEGINNING_CHARS_MIN - 1);
        found.extend(ends.filter_map(|end| word.text.get(..end)));
    }
    found
}

/// The text in the form in which words are compared, with its spaces and signs.
pub fn folded(text: &str) -> String {
    let mut folded = String::with_capacity(text.len());
    for (from, to) in clusters(text) {
        if let Some(cluster) = text.get(from..to) {
            normalized(cluster, |letter| folded.push(letter));
        }
    }
    folded
}

/// Lists the beginnings and ends of the parts of a text that are normalised together: a character with the marks that belong to it.
fn clusters(text: &str) -> impl Iterator<Item = (usize, usize)> + '_ {
    let mut letters = text.char_indices().peekable();
    std::iter::from_fn(move || {
        let (from, first) = letters.next()?;
        let mut to = from + first.len_utf8();
        if first.is_ascii() && letters.peek().is_none_or(|(_, next)| next.is_ascii()) {
            return Some((from, to));
        }
        // Thousands of marks on one letter are no text, and would be sorted together.
        for _ in 0..16 {
            let Some((at, next)) = letters.next_if(|(_, next)| joins(*next)) else { break };
            to = at + next.len_utf8();
        }
        Some((from, to))
    })
}

/// Whether a character is composed with the one before it.
fn joins(letter: char) -> bool {
    // The vowels and ends of Korean syllables, and the voice marks of half-width Japanese, compose without being marks.
    is_combining_mark(letter)
        || matches!(letter, '\u{1160}'..='\u{11FF}' | '\u{D7B0}'..='\u{D7FF}' | '\u{FF9E}' | '\u{FF9F}')
}

/// Gives the characters of a cluster in the form in which they are compared.
fn normalized(cluster: &str, mut take: impl FnMut(char)) {
    if let &[byte] = cluster.as_bytes() {
        return take(char::from(byte.to_ascii_lowercase()));
    }
    for composed in cluster.nfkc() {
        if composed.is_ascii() {
            take(composed.to_ascii_lowercase());
        } else if matches!(composed, 'й' | 'Й') {
            // A letter of its own, whose mark nobody leaves out.
            take('й');
        } else if leaves_out_marks(composed) {
            for part in std::iter::once(composed).nfd().filter(|part| !is_combining_mark(*part)) {
                fold(part, &mut take);
            }
        } else if !(is_left_out(composed) || is_stray_mark(composed)) {
            fold(composed, &mut take);
        }
    }
}

/// Whether a character belongs to a script whose marks people leave out when they type: Latin, Greek, Cyrillic, Hebrew, Arabic.
fn leaves_out_marks(letter: char) -> bool {
    matches!(letter, '\u{C0}'..='\u{24F}' | '\u{370}'..='\u{52F}' | '\u{5D0}'..='\u{5F4}' | '\u{620}'..='\u{64A}'
        | '\u{66E}'..='\u{6D3}' | '\u{750}'..='\u{77F}' | '\u{8A0}'..='\u{8C9}' | '\u{1E00}'..='\u{1FFF}')
}

/// Whether a mark is left over from such a script, because nothing composes with it.
fn is_stray_mark(letter: char) -> bool {
    matches!(letter, '\u{300}'..='\u{36F}' | '\u{483}'..='\u{489}' | '\u{591}'..='\u{5C7}' | '\u{610}'..='\u{61A}'
        | '\u{64B}'..='\u{65F}' | '\u{670}' | '\u{6D6}'..='\u{6ED}' | '\u{8CA}'..='\u{8FF}')
        && canonical_combining_class(letter) != 0
}

/// Whether a character changes only how its neighbours look.
fn is_left_out(letter: char) -> bool {
    matches!(letter, '\u{AD}' | '\u{640}' | '\u{200B}'..='\u{200F}' | '\u{202A}'..='\u{202E}' | '\u{2060}'..='\u{2069}'
        | '\u{FE00}'..='\u{FE0F}' | '\u{FEFF}')
}

/// Takes away what people write in several ways: the case of letters, and letters that stand for each other.
fn fold(letter: char, take: &mut impl FnMut(char)) {
    for lower in letter.to_lowercase() {
        match lower {
            'ß' => ['s', 's'].into_iter().for_each(&mut *take),
            'æ' => ['a', 'e'].into_iter().for_each(&mut *take),
            'œ' => ['o', 'e'].into_iter().for_each(&mut *take),
            'ø' => take('o'),
            'ł' => take('l'),
            'đ' => take('d'),
            'ı' => take('i'),
            'ς' => take('σ'),
            'ى' | 'ی' => take('ي'),
            'ة' => take('ه'),
            'ٱ' => take('ا'),
            'ک' => take('ك'),
            mark if is_combining_mark(mark) && letter != lower => {}
            other => take(other),
        }
    }
}

fn class(letter: char) -> Class {
    if letter.is_ascii() {
        return match letter {
            _ if letter.is_ascii_alphanumeric() => Class::Spaced,
            '\'' => Class::Silent,
            _ => Class::Between,
        };
    }
    match letter {
        '\u{2019}' => Class::Silent,
        _ if is_unspaced(letter) => Class::Unspaced,
        _ if letter.is_alphanumeric() || is_combining_mark(letter) => Class::Spaced,
        '\u{2600}'..='\u{27BF}' | '\u{2B00}'..='\u{2BFF}' | '\u{1F000}'..='\u{1FAFF}' => Class::Picture,
        _ => Class::Between,
    }
}

/// Whether a letter is of a script without spaces between words, or Korean.
fn is_unspaced(letter: char) -> bool {
    (letter.is_alphanumeric() || is_combining_mark(letter))
        && matches!(letter,
            // Thai, Lao, Myanmar, Khmer.
            '\u{E00}'..='\u{EFF}' | '\u{1000}'..='\u{109F}' | '\u{1780}'..='\u{17FF}'
            // The parts of Korean syllables, and whole ones.
            | '\u{1100}'..='\u{11FF}' | '\u{3130}'..='\u{318F}' | '\u{A960}'..='\u{A97F}' | '\u{AC00}'..='\u{D7FF}'
            // Japanese, and signs that stand for Chinese characters.
            | '\u{3005}'..='\u{3007}' | '\u{3031}'..='\u{30FF}' | '\u{3100}'..='\u{312F}' | '\u{31A0}'..='\u{31BF}'
            | '\u{31F0}'..='\u{31FF}'
            // These are the Chinese characters.
            | '\u{3400}'..='\u{4DBF}' | '\u{4E00}'..='\u{9FFF}' | '\u{F900}'..='\u{FAFF}' | '\u{20000}'..='\u{3FFFF}')
}

/// Puts words together from characters.
#[derive(Default)]
struct Splitter {
    words: Vec<Word>,
    next_place: usize,
    /// The word between spaces that is being read, with its number of characters.
    open: Option<(Word, usize)>,
    /// The character of a script without spaces before this one.
    last: Option<(char, usize)>,
}

impl Splitter {
    fn take(&mut self, letter: char, from: usize, to: usize) {
        match class(letter) {
            Class::Spaced => self.take_spaced(letter, from, to),
            Class::Silent => self.last = None,
            Class::Between => {
                self.end_spaced();
                self.last = None;
            }
            Class::Picture => {
                self.end_spaced();
                self.last = None;
                self.push(letter.to_string(), from, to, Kind::Single);
                self.next_place += 1;
            }
            Class::Unspaced => {
                self.end_spaced();
                if let Some((before, began)) = self.last {
                    let place = self.next_place.saturating_sub(1);
                    let text = String::from_iter([before, letter]);
                    self.words.push(Word { text, from: began, to, place, kind: Kind::Pair });
                }
                self.push(letter.to_string(), from, to, Kind::Single);
                self.next_place += 1;
                self.last = Some((letter, from));
            }
        }
    }

    fn take_spaced(&mut self, letter: char, from: usize, to: usize) {
        self.last = None;
        let place = self.next_place;
        let (word, count) = self
            .open
            .get_or_insert_with(|| (Word { text: String::new(), from, to, place, kind: Kind::Spaced }, 0));
        word.to = to;
        if *count < WORD_CHARS_MAX {
            word.text.push(letter);
            *count += 1;
        }
    }

    fn end_spaced(&mut self) {
        if let Some((word, _)) = self.open.take() {
            self.next_place += 1;
            self.words.push(word);
        }
    }

    fn push(&mut self, text: String, from: usize, to: usize, kind: Kind) {
        let place = self.next_place;
        self.words.push(Word { text, from, to, place, kind });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(text: &str) -> Vec<String> {
        list(text).into_iter().map(|word| word.text).collect()
    }

    #[test]
    fn what_is_written_in_several_ways_is_one_word() {
        for (one, other) in [
            ("Café", "cafe"),
            ("Cafe\u{301}", "CAFÉ"),
            ("STRASSE", "straße"),
            ("ＦＵＬＬ", "full"),
            ("ΟΔΟΣ", "οδός"),
            ("Ёлка", "елка"),
            ("МОЙ", "мой"),
            ("İstanbul", "istanbul"),
            ("ISPARTA", "ısparta"),
            ("ﬁn", "fin"),
            ("Łódź", "lodz"),
            ("don't", "dont"),
            ("don’t", "DONT"),
            ("co\u{AD}operate", "cooperate"),
            ("أحمد", "احمد"),
            ("مَدْرَسَة", "مدرسه"),
            ("כֹּל", "כל"),
            ("ｶﾞｷﾞ", "ガギ"),
            ("ガ", "カ\u{3099}"),
            ("한글", "한글"),
            ("ǆ", "dž"),
        ] {
            assert_eq!(texts(one), texts(other), "{one} {other}");
            assert!(!texts(one).is_empty(), "{one}");
        }
        assert_ne!(texts("мой"), texts("мои"));
        assert_ne!(texts("が"), texts("か"));
        // Indic vowels are marks, and make other words.
        assert_ne!(texts("की"), texts("का"));
    }

    #[test]
    fn a_folded_text_keeps_its_spaces_and_signs() {
        assert_eq!(folded("Łukasz O'Neill-Ärger, @Bob:S.Example"), "lukasz o'neill-arger, @bob:s.example");
        assert_eq!(folded(""), "");
    }

    #[test]
    fn words_stand_between_spaces_and_signs() {
        assert_eq!(
            texts("Hello, WORLD!  x_y a-b https://a.example/z?q=1"),
            ["hello", "world", "x", "y", "a", "b", "https", "a", "example", "z", "q", "1"]
        );
        assert_eq!(texts(""), Vec::<String>::new());
        assert_eq!(texts("!? ... \u{0} \n"), Vec::<String>::new());
    }

    #[test]
    fn text_without_spaces_is_split_into_characters_and_pairs() {
        assert_eq!(texts("東京都"), ["東", "東京", "京", "京都", "都"]);
        let words = list("a東京b 猫");
        let places: Vec<_> = words.iter().map(|word| (word.text.as_str(), word.place)).collect();
        assert_eq!(places, [("a", 0), ("東", 1), ("東京", 1), ("京", 2), ("b", 3), ("猫", 4)]);
        assert_eq!(texts("ไทย"), ["ไ", "ไท", "ท", "ทย", "ย"]);
        assert_eq!(texts("👍🏽 ok"), ["👍", "🏽", "ok"]);
    }

    #[test]
    fn a_word_knows_where_it_stands_in_the_text() {
        let text = "Ein Café\u{301}, ｶﾞ und İx";
        let found: Vec<_> =
            list(text).iter().map(|word| (word.text.clone(), text[word.from..word.to].to_owned())).collect();
        assert!(found.contains(&("cafe".into(), "Café\u{301}".into())), "{found:?}");
        assert!(found.contains(&("ガ".into(), "ｶﾞ".into())), "{found:?}");
        assert!(found.contains(&("ix".into(), "İx".into())), "{found:?}");
    }

    #[test]
    fn what_is_too_long_is_cut_and_hostile_text_ends() {
        let long = "x".repeat(65_000);
        assert_eq!(texts(&long), ["x".repeat(WORD_CHARS_MAX)]);
        let marks = format!("a{} b", "\u{301}".repeat(30_000));
        assert_eq!(texts(&marks), ["a", "b"]);
        assert_eq!(list(&"a ".repeat(50_000)).len(), WORDS_MAX);
        // One character that NFKC makes eighteen of.
        assert!(list(&"\u{FDFA}".repeat(20_000)).len() <= WORDS_MAX);
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_split_and_its_words_are_split_into_themselves(text in "\\PC{0,60}") {
            for word in list(&text) {
                proptest::prop_assert!(text.get(word.from..word.to).is_some());
                proptest::prop_assert!(!word.text.is_empty());
            }
        }
    }
}
