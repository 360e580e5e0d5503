//! The changes of the threads that a user subscribes to (MSC4308): the newest ones, with a token that leads to the others.

use std::collections::BTreeMap;

use crate::{
    accounts::subscriptions::{self, Standing},
    ids::{Position, UserNum},
    json::{JsonText, Object},
    rooms::{self, event},
    store::{Fault, Read},
    sync::{Pos, SyncToken},
};

/// One answer tells at most this many changes, whatever a client asks for.
pub(crate) const CHANGES_MAX: usize = 500;
/// A client that asks for no number of changes is told at most this many.
pub(crate) const CHANGES_DEFAULT: usize = 100;
/// Tokens of pages begin with this.
const TOKEN: &str = "ts";

/// A change of a subscription, as clients are told it.
#[derive(Debug)]
struct Change {
    is_automatic: bool,
    bump_stamp: u64,
}

/// Some changes of the subscriptions of a user.
#[derive(Debug, Default)]
pub(crate) struct Subscriptions {
    /// The threads that the user subscribes to, by room and root.
    subscribed: BTreeMap<String, BTreeMap<String, Change>>,
    /// The threads from which the user has unsubscribed.
    unsubscribed: BTreeMap<String, BTreeMap<String, Change>>,
    /// The token that leads to older changes, if there are any.
    pub(crate) rest: Option<String>,
}

impl Subscriptions {
    /// Whether no subscription changed.
    pub(crate) fn is_empty(&self) -> bool {
        self.subscribed.is_empty() && self.unsubscribed.is_empty() && self.rest.is_none()
    }

    /// Writes them as an object, with the token under this name.
    pub(crate) fn write(&self, json: &mut Object, rest_name: &str) {
        write_rooms(json, "subscribed", &self.subscribed, true);
        write_rooms(json, "unsubscribed", &self.unsubscribed, false);
        if let Some(rest) = &self.rest {
            json.text(rest_name, rest);
        }
    }

    /// Gives them as JSON, with the token under this name.
    pub(crate) fn json(&self, rest_name: &str) -> JsonText {
        let mut json = Object::new();
        self.write(&mut json, rest_name);
        json.finish()
    }
}

fn write_rooms(
    json: &mut Object,
    name: &str,
    rooms: &BTreeMap<String, BTreeMap<String, Change>>,
    is_subscribed: bool,
) {
    if rooms.is_empty() {
        return;
    }
    json.object(name, |json| {
        for (room, threads) in rooms {
            json.object(room, |json| {
                for (root, change) in threads {
                    json.object(root, |json| {
                        if is_subscribed {
                            json.flag("automatic", change.is_automatic);
                        }
                        json.number("bump_stamp", change.bump_stamp);
                    });
                }
            });
        }
    });
}

/// Lists the newest changes in (after, upto], at most so many.
pub(crate) fn collect(
    read: &(impl Read + ?Sized),
    user: UserNum,
    (after, upto): (Position, Position),
    count: usize,
) -> Result<Subscriptions, Fault> {
    let page = subscriptions::list_changes(read, user, (after, upto), count.clamp(1, CHANGES_MAX))?;
    let mut found = Subscriptions::default();
    if page.has_more {
        found.rest = page.changes.last().map(|oldest| format!("{TOKEN}{}", oldest.position.before()));
    }
    for change in page.changes {
        let Some(row) = rooms::find_row(read, change.room)? else { continue };
        let Some(root) = event::find(read, change.room, change.root)? else { continue };
        let into = match change.standing {
            Standing::Manual | Standing::Automatic => &mut found.subscribed,
            Standing::Unsubscribed => &mut found.unsubscribed,
        };
        let told = Change {
            is_automatic: change.standing == Standing::Automatic,
            bump_stamp: change.position.number(),
        };
        into.entry(row.id.to_string()).or_default().insert(root.id(&row).to_string(), told);
    }
    Ok(found)
}

/// Reads a token of a page, or a position of a sync: changes up to there are meant.
pub(crate) fn read_token(text: &str) -> Option<Position> {
    if let Some(digits) = text.strip_prefix(TOKEN) {
        let is_plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
        return is_plain.then(|| digits.parse().ok()).flatten().and_then(Position::new);
    }
    // A position of sliding sync says how far changes are told by itself, because the client may have had the extension off.
    if let Some(pos) = Pos::read(text) {
        return Some(pos.subscriptions.unwrap_or_default());
    }
    SyncToken::parse(text).ok().map(|token| token.position)
}
