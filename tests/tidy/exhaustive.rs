//! A `match` over an enum that will grow names every variant, so that a new one does not compile until each place has decided.

#![expect(clippy::indexing_slicing, reason = "what is not as expected fails the test")]

use super::{
    circles::{Token, tokens},
    fail_if_any, own_sources,
};

/// The enums that later parts of the server will add variants to, each with the file that declares it.
const GROWING: [(&str, &str); 4] = [
    ("LogEntry", "src/store/log.rs"),
    ("Tail", "src/store/tail.rs"),
    ("Wake", "src/store/wake.rs"),
    ("Job", "src/schema/jobs.rs"),
];

/// The lines of arms that take whatever is left, in a `match` over one of these enums.
fn arms_for_the_rest(tokens: &[Token], is_growing: impl Fn(&str) -> bool) -> Vec<usize> {
    let mut found = Vec::new();
    for at in (0..tokens.len()).filter(|at| tokens[*at].text == "match") {
        let arms = arms(&tokens[at + 1..]);
        let names_one =
            arms.iter().any(|arm| arm.windows(2).any(|two| is_growing(&two[0].text) && two[1].text == "::"));
        let is_rest = |arm: &&[Token]| {
            arm.len() == 1 && arm[0].text.starts_with(|it: char| it == '_' || it.is_lowercase())
        };
        if names_one {
            found.extend(arms.iter().copied().filter(is_rest).map(|arm| arm[0].line));
        }
    }
    found
}

/// The patterns of the arms of a `match`, whose tokens begin after that word.
fn arms(tokens: &[Token]) -> Vec<&[Token]> {
    let (mut depth, mut is_inside, mut begin, mut is_pattern) = (0_usize, false, 0, true);
    let mut found = Vec::new();
    for (at, token) in tokens.iter().enumerate() {
        match token.text.as_str() {
            "{" if depth == 0 && !is_inside => (is_inside, begin) = (true, at + 1),
            "{" | "(" | "[" => depth += 1,
            "}" if depth == 0 => break,
            "}" | ")" | "]" => {
                depth -= 1;
                // An arm whose value is a block may have no comma after it.
                if is_inside && depth == 0 && !is_pattern && token.text == "}" {
                    (is_pattern, begin) = (true, at + 1);
                }
            }
            "," if is_inside && depth == 0 => (is_pattern, begin) = (true, at + 1),
            "=" if is_inside
                && depth == 0
                && is_pattern
                && tokens.get(at + 1).is_some_and(|next| next.text == ">") =>
            {
                found.push(&tokens[begin..at]);
                is_pattern = false;
            }
            _ => {}
        }
    }
    found
}

#[test]
fn growing_enums_are_matched_without_an_arm_for_the_rest() {
    let mut wrong = Vec::new();
    for source in own_sources() {
        let path = source.path.to_str().unwrap();
        let is_growing = |name: &str| {
            GROWING.iter().any(|(growing, file)| name == *growing || (name == "Self" && path == *file))
        };
        for line in arms_for_the_rest(&tokens(&source.text), is_growing) {
            wrong.push(format!("{path}:{line}"));
        }
    }
    fail_if_any(&wrong, "Name every variant, so that a new one must be decided on here:");
}

#[test]
fn arms_for_the_rest_are_found() {
    let is_growing = |name: &str| name == "Job";
    let wrong = "fn f() { match job {\n Job::A { user } => g(user),\n Job::B => { h() }\n _ => {}\n } }\n\
                 fn g() { match (job) { Job::A => 1,\n other => match x { 1 => 2, _ => 3 } } }";
    assert_eq!(arms_for_the_rest(&tokens(wrong), is_growing), [4, 7]);
    let right = "match job { Job::A => match number { 1 => x, _ => y }, Job::B { a, .. } if a => { z } Job::B { .. } => w }\n\
                 match number { 7 => Job::A, _ => Job::B }";
    assert_eq!(arms_for_the_rest(&tokens(right), is_growing), Vec::<usize>::new());
}
