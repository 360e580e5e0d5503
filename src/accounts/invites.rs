//! The invitations that a user takes, as account data says it of inviters.
//!
//! Three things are asked, in this order, and the first that speaks decides:
//!
//! 1. `m.invite_permission_config`: a `default_action` of `block` refuses all invitations (client-server API, "Invite
//!    permission"; MSC4380 under its unstable name).
//! 2. `m.ignored_user_list`: an inviter who is ignored is not told of it, and the invitation is not shown.
//! 3. The lists of MSC4155 under their unstable name: users before servers, and of each those that are allowed, then ignored,
//!    then blocked.
//!
//! A blocked invitation is refused, an ignored one is made and never shown: whoever makes an invitation asks [`check`], and
//! whoever shows one (or notifies of one) asks [`Permissions::judge`].

use std::sync::Arc;

use ruma::{UserId, api::error::ErrorKind};
use serde_json::{Map, Value};

use crate::{
    accounts::{account_data, ignored::Ignored, users},
    error::{Refusal, Result},
    ids::UserNum,
    schema::event_types::INVITE_PERMISSIONS,
    store::{Fault, Read},
};

/// The types whose `default_action` is heeded.
const BLOCKING: [&str; 2] = [INVITE_PERMISSIONS, "org.matrix.msc4380.invite_permission_config"];
/// The type that lists users and servers. No stable name of it is in the specification yet.
const FILTERING: &str = "org.matrix.msc4155.invite_permission_config";
/// Such a configuration has at most this many bytes, because each invitation is held against all of it.
pub const CONFIG_BYTES_MAX: usize = 64 << 10;

/// The fate of an invitation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The user is told of it.
    Allow,
    /// It is made as if nothing were the matter, and the user never hears of it.
    Ignore,
    /// It is refused, and the inviter is told so.
    Block,
}

/// The fields of the lists in the order in which they are asked, with what they say of those who match.
const USERS: [(&str, Verdict); 3] = [
    ("allowed_users", Verdict::Allow),
    ("ignored_users", Verdict::Ignore),
    ("blocked_users", Verdict::Block),
];
const SERVERS: [(&str, Verdict); 3] = [
    ("allowed_servers", Verdict::Allow),
    ("ignored_servers", Verdict::Ignore),
    ("blocked_servers", Verdict::Block),
];

/// The words of one user on inviters, read at one moment.
#[derive(Clone, Debug, Default)]
pub struct Permissions {
    blocks_all: bool,
    ignored: Arc<Ignored>,
    /// Each list of patterns for user ids, in the order in which they are asked.
    users: Vec<(Verdict, Vec<String>)>,
    /// Each list of patterns for names of servers. They are in lower case.
    servers: Vec<(Verdict, Vec<String>)>,
}

impl Permissions {
    /// Reads the words of a user whose list of ignored users is this. What cannot be read of a configuration says nothing.
    pub fn of(read: &(impl Read + ?Sized), user: UserNum, ignored: Arc<Ignored>) -> Result<Self, Fault> {
        let mut found = Self { ignored, ..Self::default() };
        for event_type in BLOCKING {
            let config = config(read, user, event_type)?;
            found.blocks_all |= config.get("default_action").and_then(Value::as_str) == Some("block");
        }
        let config = config(read, user, FILTERING)?;
        if config.get("enabled") != Some(&Value::Bool(false)) {
            found.users = USERS.map(|(field, verdict)| (verdict, patterns(&config, field))).into();
            let lower = |list: Vec<String>| list.iter().map(|it| it.to_lowercase()).collect();
            found.servers = SERVERS.map(|(field, verdict)| (verdict, lower(patterns(&config, field)))).into();
        }
        Ok(found)
    }

    /// Whether every invitation is allowed, whoever sends it, so that no sender need be looked at.
    pub fn allows_all(&self) -> bool {
        let lists = self.users.iter().chain(&self.servers);
        !self.blocks_all && self.ignored.is_empty() && lists.into_iter().all(|(_, list)| list.is_empty())
    }

    /// Judges an invitation by its sender. The cost grows with the bytes of the configuration alone, whatever they are.
    pub fn judge(&self, sender: &str) -> Verdict {
        if self.blocks_all {
            return Verdict::Block;
        }
        if self.ignored.contains(sender) {
            return Verdict::Ignore;
        }
        let server = <&UserId>::try_from(sender).map(|sender| sender.server_name().host().to_lowercase());
        let asked = [(&self.users, Some(sender.to_owned())), (&self.servers, server.ok())];
        for (lists, name) in asked {
            let Some(name) = name.filter(|_| lists.iter().any(|(_, list)| !list.is_empty())) else {
                continue;
            };
            let name = Name::new(&name);
            let found = lists.iter().find(|(_, list)| list.iter().any(|pattern| name.matches(pattern)));
            if let Some((verdict, _)) = found {
                return *verdict;
            }
        }
        Verdict::Allow
    }
}

fn config(read: &(impl Read + ?Sized), user: UserNum, event_type: &str) -> Result<Map<String, Value>, Fault> {
    let row = account_data::find(read, user, None, event_type)?;
    Ok(row.and_then(|row| serde_json::from_slice(&row.content).ok()).unwrap_or_default())
}

fn patterns(config: &Map<String, Value>, field: &str) -> Vec<String> {
    let list = config.get(field).and_then(Value::as_array).into_iter().flatten();
    list.filter_map(Value::as_str).map(str::to_owned).collect()
}

/// Refuses an invitation that the invited user blocks: 403 `M_INVITE_BLOCKED`. The code is that of the specification for whichever
/// configuration it was, because it tells the inviter the same. Users who have no account here are not known to block anything.
pub fn check(read: &(impl Read + ?Sized), target: &UserId, sender: &UserId) -> Result<()> {
    let Some(user) = users::find_num(read, target)? else { return Ok(()) };
    let ignored = Arc::new(Ignored::of(read, user, target)?);
    match Permissions::of(read, user, ignored)?.judge(sender.as_str()) {
        Verdict::Allow | Verdict::Ignore => Ok(()),
        Verdict::Block => {
            Err(Refusal::new(ErrorKind::InviteBlocked, "This user takes no invitations from you.").into())
        }
    }
}

/// Refuses a configuration that is too large to hold each invitation against: 413 `M_TOO_LARGE`. Other types of account data pass.
pub fn check_config(event_type: &str, content: &[u8]) -> Result<()> {
    let is_config = event_type == FILTERING || BLOCKING.contains(&event_type);
    if is_config && content.len() > CONFIG_BYTES_MAX {
        let why =
            format!("`{event_type}` has at most {CONFIG_BYTES_MAX} bytes; list fewer users and servers.");
        return Err(Refusal::too_large(why).into());
    }
    Ok(())
}

/// A name has at most this many letters, which is the bound of user ids; nothing matches a longer one.
const LETTERS_MAX: usize = 255;
const BITS: usize = u64::BITS as usize;
const WORDS: usize = (LETTERS_MAX + 1).div_ceil(BITS);

/// Places in a name, as bits: place `n` is before letter `n`.
type Places = [u64; WORDS];

/// A name that is compared with many glob patterns (`*` any letters, `?` any one; specification: appendices, "Glob-style
/// matching").
///
/// The letters of the pattern move a set of the places up to which the name has been met, all at once. So a pattern costs a few
/// steps for each of its letters, and none costs more by what it says.
struct Name {
    /// For each letter of the name, the places before which it stands. It is sorted by letter.
    letters: Vec<(char, Places)>,
    /// How many letters the name has. `None` where it is too long.
    length: Option<usize>,
}

impl Name {
    fn new(name: &str) -> Self {
        let mut letters: Vec<(char, Places)> = Vec::new();
        let mut length = 0;
        for letter in name.chars() {
            if length == LETTERS_MAX {
                return Self { letters, length: None };
            }
            match letters.binary_search_by_key(&letter, |(known, _)| *known) {
                Ok(at) => letters.get_mut(at).into_iter().for_each(|(_, places)| set(places, length)),
                Err(at) => {
                    let mut places = Places::default();
                    set(&mut places, length);
                    letters.insert(at, (letter, places));
                }
            }
            length += 1;
        }
        Self { letters, length: Some(length) }
    }

    fn matches(&self, pattern: &str) -> bool {
        let Some(length) = self.length else { return false };
        let mut reached = Places::default();
        set(&mut reached, 0);
        for letter in pattern.chars() {
            reached = match letter {
                '*' => onward(reached),
                // Places beyond the end may be set, and are never asked for.
                '?' => next(reached),
                letter => match self.letters.binary_search_by_key(&letter, |(known, _)| *known) {
                    Ok(at) => self
                        .letters
                        .get(at)
                        .map_or(Places::default(), |(_, places)| next(both(reached, places))),
                    Err(_) => return false,
                },
            };
            if reached == Places::default() {
                return false;
            }
        }
        reached.get(length / BITS).is_some_and(|word| word >> (length % BITS) & 1 == 1)
    }
}

fn set(places: &mut Places, place: usize) {
    if let Some(word) = places.get_mut(place / BITS) {
        *word |= 1 << (place % BITS);
    }
}

fn both(mut some: Places, others: &Places) -> Places {
    some.iter_mut().zip(others).for_each(|(word, other)| *word &= other);
    some
}

/// Moves each place one letter on. The place after the last of all falls away.
fn next(mut places: Places) -> Places {
    let mut carried = 0;
    for word in &mut places {
        (*word, carried) = (*word << 1 | carried, *word >> (BITS - 1));
    }
    places
}

/// Adds to the places all that come after the first of them.
fn onward(mut places: Places) -> Places {
    let mut is_after = false;
    for word in &mut places {
        if is_after {
            *word = u64::MAX;
        } else if *word != 0 {
            *word |= word.wrapping_neg();
            is_after = true;
        }
    }
    places
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use ruma::user_id;
    use serde_json::json;

    use super::*;
    use crate::store::{Durability, Engine, Guard, Store, engine::Memory};

    const ALICE: UserNum = UserNum(1);

    fn verdict(configs: &[(&str, Value)], sender: &str) -> Verdict {
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
        let mut batch = store.batch(&Guard::alone());
        for (event_type, content) in configs {
            account_data::put(&mut batch, ALICE, None, event_type, content.to_string().into()).unwrap();
        }
        drop(store.enqueue(batch).unwrap());
        store.flush().unwrap();
        let snapshot = store.snapshot();
        let ignored = Ignored::of(&*snapshot, ALICE, user_id!("@alice:x")).unwrap();
        Permissions::of(&*snapshot, ALICE, Arc::new(ignored)).unwrap().judge(sender)
    }

    fn by_lists(config: Value, sender: &str) -> Verdict {
        verdict(&[(FILTERING, config)], sender)
    }

    #[test]
    fn the_first_list_that_names_the_inviter_decides() {
        // Each list names the inviter together with all those that are asked after it.
        let names = |field: &str| if field.ends_with("users") { "@bob:b.org" } else { "b.org" };
        let order = USERS.iter().chain(&SERVERS);
        for at in 0..6 {
            let config: Map<String, Value> = order
                .clone()
                .skip(at)
                .map(|(field, _)| ((*field).to_owned(), json!([names(field)])))
                .collect();
            let expected = order.clone().nth(at).unwrap().1;
            assert_eq!(by_lists(Value::Object(config.clone()), "@bob:b.org"), expected, "{config:?}");
            assert_eq!(by_lists(Value::Object(config), "@carol:c.org"), Verdict::Allow);
        }
    }

    #[test]
    fn patterns_are_of_whole_names_and_servers_have_no_port() {
        for (config, sender, expected) in [
            (json!({ "blocked_servers": ["*"] }), "@bob:b.org", Verdict::Block),
            (json!({ "blocked_servers": ["B.org"] }), "@bob:b.org:8448", Verdict::Block),
            (json!({ "blocked_servers": ["b.org:8448"] }), "@bob:b.org:8448", Verdict::Allow),
            (json!({ "blocked_servers": ["b.or?"] }), "@bob:b.org", Verdict::Block),
            (json!({ "blocked_servers": ["b.or"] }), "@bob:b.org", Verdict::Allow),
            (json!({ "blocked_servers": ["org", "*.org.x"] }), "@bob:b.org", Verdict::Allow),
            (json!({ "blocked_users": ["@bo?:b.org"] }), "@bob:b.org", Verdict::Block),
            (json!({ "blocked_users": ["@bob*"] }), "@bob:b.org", Verdict::Block),
            (json!({ "blocked_users": ["bob"] }), "@bob:b.org", Verdict::Allow),
            (json!({ "blocked_users": ["@Bob:b.org"] }), "@bob:b.org", Verdict::Allow),
            (json!({ "ignored_users": ["@bob:b.org:*"] }), "@bob:b.org:8448", Verdict::Ignore),
        ] {
            assert_eq!(by_lists(config.clone(), sender), expected, "{config} {sender}");
        }
    }

    #[test]
    fn lists_can_be_switched_off_and_what_is_wrong_in_them_says_nothing() {
        for enabled in [json!(true), json!(null), json!("no")] {
            let config = json!({ "enabled": enabled, "blocked_users": [7, null, "@bob:*"] });
            assert_eq!(by_lists(config, "@bob:b.org"), Verdict::Block);
        }
        for config in [
            json!({ "enabled": false, "blocked_users": ["*"] }),
            json!({ "blocked_users": null, "allowed_servers": null }),
            json!({ "blocked_users": "*", "blocked_servers": { "*": {} } }),
            json!(["blocked_users", "*"]),
            json!("*"),
        ] {
            assert_eq!(by_lists(config.clone(), "@bob:b.org"), Verdict::Allow, "{config}");
        }
    }

    #[test]
    fn a_user_who_takes_none_blocks_all_and_who_ignores_somebody_does_not_tell_them() {
        let allowed = || (FILTERING, json!({ "allowed_users": ["*"] }));
        let ignored = || ("m.ignored_user_list", json!({ "ignored_users": { "@bob:b.org": {} } }));
        for event_type in BLOCKING {
            let all = (event_type, json!({ "default_action": "block" }));
            assert_eq!(verdict(&[all, allowed(), ignored()], "@bob:b.org"), Verdict::Block);
            let none = (event_type, json!({ "default_action": "allow" }));
            assert_eq!(verdict(&[none], "@bob:b.org"), Verdict::Allow);
        }
        assert_eq!(verdict(&[allowed(), ignored()], "@bob:b.org"), Verdict::Ignore);
        let blocked = (FILTERING, json!({ "blocked_users": ["*"] }));
        assert_eq!(verdict(&[blocked.clone(), ignored()], "@bob:b.org"), Verdict::Ignore);
        assert_eq!(verdict(&[blocked, ignored()], "@carol:b.org"), Verdict::Block);
        // Lists count under the name that the proposal has for them, and nowhere else.
        let stable = (INVITE_PERMISSIONS, json!({ "blocked_users": ["*"] }));
        assert_eq!(verdict(&[stable], "@bob:b.org"), Verdict::Allow);
    }

    #[test]
    fn names_and_patterns_may_be_as_long_as_they_like() {
        let longest = "ä".repeat(LETTERS_MAX);
        let name = Name::new(&longest);
        assert!(name.matches(&longest) && name.matches("*ä") && name.matches(&"?".repeat(LETTERS_MAX)));
        assert!(!name.matches(&"?".repeat(LETTERS_MAX + 1)) && !name.matches(&"?".repeat(LETTERS_MAX - 1)));
        assert!(!name.matches(&format!("*{}b", "ä*".repeat(40_000))));
        assert!(!Name::new(&"a".repeat(LETTERS_MAX + 1)).matches("*"));
        assert!(Name::new("").matches("***") && !Name::new("").matches("?"));
    }

    /// Matches by trying every way, as a simple reference.
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
            prop_assert_eq!(Name::new(&text).matches(&pattern), is_like(&letters(&pattern), &letters(&text)));
        }

        #[test]
        fn places_beyond_a_word_are_met(text in "[ab]{60,255}", at: usize) {
            let at = at % text.len();
            let name = Name::new(&text);
            for any in ["?", "*"] {
                let found = format!("{}{any}{}", &text[..at], &text[at + 1..]);
                prop_assert!(name.matches(&found), "{}", found);
            }
            let wrong = format!("*{}x{}", &text[..at], &text[at + 1..]);
            prop_assert!(!name.matches(&wrong));
        }
    }
}
