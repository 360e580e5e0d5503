//! Glob patterns of push rules (`*` any text, `?` any one letter), matched without regard to case.
//!
//! A pattern is compiled into a small automaton whose states are bits: state `n` is on when the first `n` letters of the
//! pattern have been met. One letter of text moves all states at once, so matching costs (letters of the text) x (words of
//! 64 states), whatever the pattern and the text say. Both factors are bounded, and every step is counted.
//!
//! Specification: appendices, "Glob-style matching"; client-server API, "Push Rules: conditions".

use std::iter;

/// At most this many letters of a text are compared; a pattern that would need more of it does not match.
pub(crate) const TEXT_LETTERS_MAX: usize = 8 << 10;
/// A pattern has at most this many letters; a longer one matches nothing.
const PATTERN_LETTERS_MAX: usize = 1 << 10;
const BITS: usize = u64::BITS as usize;

/// The work that may still be done. Steps are counted instead of time, so that the same question always has the same answer.
#[derive(Debug)]
pub(crate) struct Steps {
    left: u64,
}

/// The error for work that would take more steps than are left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OutOfSteps;

impl Steps {
    pub(crate) fn new(count: u64) -> Self {
        Self { left: count }
    }

    /// Takes some steps. Once there are too few, none are left.
    pub(crate) fn take(&mut self, count: usize) -> Result<(), OutOfSteps> {
        let count = u64::try_from(count).unwrap_or(u64::MAX);
        let left = self.left.checked_sub(count);
        self.left = left.unwrap_or(0);
        left.map(drop).ok_or(OutOfSteps)
    }

    pub(crate) fn left(&self) -> u64 {
        self.left
    }
}

/// A text prepared for matching: in lower case, and cut after [`TEXT_LETTERS_MAX`] letters.
#[derive(Debug)]
pub(crate) struct Text {
    letters: Vec<Letter>,
    /// Whether the text was longer than is kept here.
    is_cut: bool,
}

#[derive(Clone, Copy, Debug)]
struct Letter {
    letter: char,
    /// Whether a match of words may begin at this letter: it or the one before is no part of a word.
    may_begin: bool,
    may_end: bool,
}

impl Text {
    /// Reads a text; each letter of it is a step.
    pub(crate) fn new(text: &str, steps: &mut Steps) -> Result<Self, OutOfSteps> {
        let lower = || lower(text);
        let is_cut = lower().nth(TEXT_LETTERS_MAX).is_some();
        let followers = lower().skip(1).map(Some).chain(iter::once(None));
        let mut before = None;
        let mut letters = Vec::new();
        for (letter, after) in lower().zip(followers).take(TEXT_LETTERS_MAX) {
            let is_edge =
                |beside: Option<char>| beside.is_none_or(|beside| !is_of_word(beside)) || !is_of_word(letter);
            letters.push(Letter { letter, may_begin: is_edge(before), may_end: is_edge(after) });
            before = Some(letter);
        }
        steps.take(letters.len())?;
        Ok(Self { letters, is_cut })
    }
}

fn lower(text: &str) -> impl Iterator<Item = char> {
    text.chars().flat_map(char::to_lowercase)
}

/// Whether a letter belongs to a word, as the specification defines words for push rules.
fn is_of_word(letter: char) -> bool {
    letter.is_ascii_alphanumeric() || letter == '_'
}

/// A pattern, compiled for how it will be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Glob {
    /// The pattern in lower case, which has neither `*` nor `?` and is compared as a whole.
    Plain(Box<str>),
    /// The pattern has wildcards, or is looked for in a text.
    Automaton(Automaton),
    /// The pattern is too long, and matches nothing.
    Nothing,
}

/// The automaton that the top of this file describes. State 0 is on at the start; in the last state the whole pattern is met.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Automaton {
    /// For each letter that the pattern names, the states at which a text with that letter moves on. It is sorted by letter.
    named: Vec<(char, Box<[u64]>)>,
    /// The states at which any other letter of text moves on: those where the pattern has `?`.
    others: Box<[u64]>,
    /// The states that stay on, because a `*` follows.
    stays: Box<[u64]>,
    /// The number of the last state.
    last: usize,
}

impl Glob {
    /// Compiles a pattern that is compared with a whole value.
    pub(crate) fn of_value(pattern: &str) -> Self {
        if pattern.contains(['*', '?']) {
            Self::automaton(pattern, true)
        } else if pattern.len() > PATTERN_LETTERS_MAX {
            Self::Nothing
        } else {
            Self::Plain(lower(pattern).collect::<String>().into())
        }
    }

    /// Compiles a pattern that is looked for among the words of a text.
    pub(crate) fn of_words(pattern: &str) -> Self {
        Self::automaton(pattern, true)
    }

    /// Compiles words that are looked for in a text. In them `*` and `?` stand for themselves.
    pub(crate) fn of_literal_words(words: &str) -> Self {
        Self::automaton(words, false)
    }

    fn automaton(pattern: &str, has_wildcards: bool) -> Self {
        let letters: Vec<char> = lower(pattern).take(PATTERN_LETTERS_MAX + 1).collect();
        if letters.len() > PATTERN_LETTERS_MAX {
            return Self::Nothing;
        }
        let is_star = |letter: &char| has_wildcards && *letter == '*';
        let last = letters.iter().filter(|letter| !is_star(letter)).count();
        let empty = || vec![0_u64; last / BITS + 1].into_boxed_slice();
        let (mut named, mut others, mut stays) = (Vec::<(char, Box<[u64]>)>::new(), empty(), empty());
        let mut state = 0;
        for letter in letters {
            if is_star(&letter) {
                set(&mut stays, state);
                continue;
            }
            if has_wildcards && letter == '?' {
                set(&mut others, state);
            } else if let Ok(at) = named.binary_search_by_key(&letter, |(letter, _)| *letter) {
                named.get_mut(at).into_iter().for_each(|(_, mask)| set(mask, state));
            } else {
                let mut mask = empty();
                set(&mut mask, state);
                let at = named.partition_point(|(known, _)| *known < letter);
                named.insert(at, (letter, mask));
            }
            state += 1;
        }
        for (_, mask) in &mut named {
            mask.iter_mut().zip(&others).for_each(|(mask, any)| *mask |= any);
        }
        Self::Automaton(Automaton { named, others, stays, last })
    }

    /// About how many bytes the pattern takes in memory.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Plain(text) => text.len(),
            Self::Automaton(it) => (it.named.len() + 2) * (it.others.len() * 8 + 24),
            Self::Nothing => 0,
        }
    }

    /// Whether a whole value matches the pattern.
    pub(crate) fn is_value(&self, value: &str, steps: &mut Steps) -> Result<bool, OutOfSteps> {
        match self {
            Self::Nothing => Ok(false),
            Self::Plain(text) => {
                // The comparison ends at the first letter that differs, so it costs less than an automaton.
                steps.take(text.len().min(value.len()) / 8 + 1)?;
                Ok(lower(value).eq(text.chars()))
            }
            Self::Automaton(it) => it.is_value(&Text::new(value, steps)?, steps),
        }
    }

    /// Whether some words of a text match the pattern.
    pub(crate) fn is_in(&self, text: &Text, steps: &mut Steps) -> Result<bool, OutOfSteps> {
        match self {
            Self::Automaton(it) => it.is_in(text, steps),
            Self::Plain(_) | Self::Nothing => Ok(false),
        }
    }
}

fn set(mask: &mut [u64], bit: usize) {
    if let Some(word) = mask.get_mut(bit / BITS) {
        *word |= 1 << (bit % BITS);
    }
}

fn has(mask: &[u64], bit: usize) -> bool {
    mask.get(bit / BITS).is_some_and(|word| word >> (bit % BITS) & 1 == 1)
}

impl Automaton {
    fn is_value(&self, text: &Text, steps: &mut Steps) -> Result<bool, OutOfSteps> {
        steps.take(text.letters.len() * self.others.len())?;
        let mut states = vec![0_u64; self.others.len()];
        set(&mut states, 0);
        for letter in &text.letters {
            self.step(&mut states, letter.letter);
        }
        // Only a `*` at the end meets the rest of a text that was cut.
        Ok(has(&states, self.last) && (!text.is_cut || has(&self.stays, self.last)))
    }

    fn is_in(&self, text: &Text, steps: &mut Steps) -> Result<bool, OutOfSteps> {
        if self.last == 0 {
            return Ok(has(&self.stays, 0) || text.letters.is_empty());
        }
        steps.take(text.letters.len() * self.others.len())?;
        let mut states = vec![0_u64; self.others.len()];
        for letter in &text.letters {
            if letter.may_begin {
                set(&mut states, 0);
            }
            self.step(&mut states, letter.letter);
            if letter.may_end && has(&states, self.last) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Moves all states by one letter: each that meets it turns the next one on, and those before a `*` stay on.
    fn step(&self, states: &mut [u64], letter: char) {
        let named = self.named.binary_search_by_key(&letter, |(letter, _)| *letter);
        let named = named.ok().and_then(|at| self.named.get(at));
        let meets = named.map_or(&self.others, |(_, mask)| mask);
        let mut carried = 0;
        for ((states, meets), stays) in states.iter_mut().zip(meets).zip(&self.stays) {
            let met = *states & meets;
            *states = met << 1 | carried | (*states & stays);
            carried = met >> (BITS - 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MANY: u64 = 1 << 40;

    fn is_value(pattern: &str, value: &str) -> bool {
        Glob::of_value(pattern).is_value(value, &mut Steps::new(MANY)).unwrap()
    }

    fn is_in(pattern: &str, text: &str) -> bool {
        let mut steps = Steps::new(MANY);
        let text = Text::new(text, &mut steps).unwrap();
        Glob::of_words(pattern).is_in(&text, &mut steps).unwrap()
    }

    #[test]
    fn values_match_as_the_specification_says() {
        for value in ["Lunch plans", "LUNCH"] {
            assert!(is_value("lunc?*", value), "{value}");
        }
        for value in [" lunch", "lunc"] {
            assert!(!is_value("lunc?*", value), "{value}");
        }
        assert!(is_value("", ""));
        assert!(!is_value("", "x"));
        assert!(is_value("*", ""));
        assert!(is_value("m.room.message", "M.room.MESSAGE"));
        assert!(!is_value("?", ""));
    }

    #[test]
    fn words_match_as_the_specification_says() {
        for text in ["An example event.", "exple", "An exciting triple-whammy"] {
            assert!(is_in("ex*ple", text), "{text}");
        }
        for text in ["examples", "an_example", "", "unexample"] {
            assert!(!is_in("ex*ple", text), "{text}");
        }
        assert!(is_in("cake", "There is CAKE!"));
        assert!(is_in("@room", "hi @room"));
        assert!(is_in("*", ""));
        assert!(!is_in("", "text"));
        assert!(is_in("ü?er", "ganz ÜBER alles"));
    }

    #[test]
    fn a_long_text_is_looked_at_up_to_a_bound() {
        let long = format!("{}needle", "x ".repeat(TEXT_LETTERS_MAX));
        assert!(!is_in("needle", &long));
        assert!(is_value("x*", &long));
        assert!(!is_value("x*needle", &long));
        assert!(is_in("needle", &format!("needle {long}")));
    }

    #[test]
    fn what_a_pattern_costs_does_not_depend_on_what_it_says() {
        let text = "a".repeat(60_000);
        let hostile =
            ["?a".repeat(450), "*a".repeat(450), format!("*{}b", "a".repeat(900)), "a?*".repeat(300)];
        for pattern in hostile {
            let mut steps = Steps::new(MANY);
            let text = Text::new(&text, &mut steps).unwrap();
            Glob::of_words(&pattern).is_in(&text, &mut steps).unwrap();
            let taken = MANY - steps.left();
            let words = PATTERN_LETTERS_MAX / BITS + 1;
            assert!(taken <= (TEXT_LETTERS_MAX * (1 + words)) as u64, "{pattern}: {taken}");
        }
        let mut few = Steps::new(5_000);
        assert_eq!(Text::new(&text, &mut few).map(drop), Err(OutOfSteps));
        assert_eq!(few.left(), 0);
    }

    /// Matches by trying every way, as a simple reference for the automaton.
    fn is_like(pattern: &[char], text: &[char]) -> bool {
        match pattern.split_first() {
            None => text.is_empty(),
            Some(('*', rest)) => (0..=text.len()).any(|at| is_like(rest, &text[at..])),
            Some((letter, rest)) => text
                .split_first()
                .is_some_and(|(first, others)| (*letter == '?' || letter == first) && is_like(rest, others)),
        }
    }

    proptest! {
        #[test]
        fn patterns_match_what_every_way_of_trying_finds(pattern in "[ab?*]{0,9}", text in "[ab]{0,12}") {
            let letters = |text: &str| text.chars().collect::<Vec<_>>();
            prop_assert_eq!(is_value(&pattern, &text), is_like(&letters(&pattern), &letters(&text)));
        }

        #[test]
        fn words_are_found_wherever_they_stand(pattern in "[ab?*]{1,5}", text in "[ab .]{0,12}") {
            // A pattern of stars alone matches even an empty text.
            prop_assume!(pattern.chars().any(|letter| letter != '*'));
            let (letters, text_letters): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
            let is_word =
                |at: Option<usize>| at.and_then(|at| text_letters.get(at)).is_some_and(|letter| is_of_word(*letter));
            let is_edge = |at: usize| !(is_word(at.checked_sub(1)) && is_word(Some(at)));
            let mut found = false;
            for from in (0..text_letters.len()).filter(|at| is_edge(*at)) {
                for upto in (from + 1..=text_letters.len()).filter(|at| is_edge(*at)) {
                    found |= is_like(&letters, &text_letters[from..upto]);
                }
            }
            prop_assert_eq!(is_in(&pattern, &text), found);
        }

        #[test]
        fn long_patterns_are_met_letter_by_letter(text in "[ab]{60,200}", at: usize) {
            let at = at % text.len();
            let any = format!("{}?{}", &text[..at], &text[at + 1..]);
            let wrong = format!("{}x{}", &text[..at], &text[at + 1..]);
            prop_assert!(is_value(&any, &text) && is_in(&any, &text));
            let behind_a_star = ["*", &wrong].concat();
            prop_assert!(!is_value(&behind_a_star, &text) && !is_in(&wrong, &text));
        }

        #[test]
        fn nothing_panics(pattern: String, text: String) {
            is_value(&pattern, &text);
            is_in(&pattern, &text);
        }
    }
}
