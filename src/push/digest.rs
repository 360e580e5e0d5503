//! Plans the digest that is mailed to a user who is away: what notified them and is not read.
//!
//! A notification waits for a while, in case it is read. Then a mail tells it, with all else that is unread by then. A room that a mail told
//! of waits before another mail is sent for it: ten minutes at first, and longer each time, up to a day. Once the user has read what was told
//! there, it waits no longer. What is to be told is looked for when the mail is planned, so that nothing is in it that was read or redacted
//! since, or that the user may not see.

use ruma::OwnedUserId;
use serde::Deserialize;

use crate::{
    accounts::{emails, users},
    ids::{Position, UserNum},
    push::{
        Push,
        gather::{Found, Search},
        looker::Looker,
        mailboxes::{self, Standing},
        notice::Told,
        places, pushers,
    },
    rooms,
    schema::{
        email::{MailboxRow, MailedInvites, MailedRoom},
        event_types::{ENCRYPTED, MESSAGE},
        push::{PusherPlace, PusherRow},
    },
    store::{Fault, Read},
};

const MINUTE_MS: u64 = 60_000;
const DAY_MS: u64 = 24 * 60 * MINUTE_MS;
/// Nothing that is older than this is mailed. It is more than a room ever waits.
const OLD_MS: u64 = 3 * DAY_MS;
/// A room waits this long after the first mail that told of it.
const WAIT_FIRST_MS: u64 = 10 * MINUTE_MS;
/// The wait grows by this factor with each mail: ten minutes, an hour, six hours, a day.
const WAIT_GROWS_BY: u64 = 6;
/// A room never waits for longer than this.
const WAIT_MOST_MS: u64 = DAY_MS;
/// A mail tells of at most this many rooms; of others it says how many there are.
const ROOMS_TOLD_MAX: usize = 20;
/// A text is cut to this many characters.
const TEXT_CHARACTERS_MAX: usize = 300;
/// A name is cut to this many characters.
const NAME_CHARACTERS_MAX: usize = 60;
/// Remember the waits of at most this many rooms, those that were mailed last.
const MAILED_ROOMS_MAX: usize = 200;

/// A pusher for which a mail may be due.
#[derive(Clone, Debug)]
pub struct Ask {
    /// The user who has the pusher.
    pub user: UserNum,
    /// The app id of the pusher.
    pub app_id: String,
    /// The pushkey of the pusher, which is the address.
    pub pushkey: String,
    /// The time for which a notification waits to be read, where the user has not said otherwise, in milliseconds.
    pub delay_ms: u64,
    /// Everything up to this position was looked at before, and held nothing to tell.
    pub seen: Position,
    /// The time now, in milliseconds since the epoch.
    pub now_ms: u64,
    /// The search for what is to be told, if it has begun.
    pub search: Option<Search>,
}

/// The next step of a pusher.
#[derive(Clone, Debug)]
pub enum Plan {
    /// There is no such pusher any more, or none that mails are sent for.
    Gone,
    /// There is nothing to tell up to this position.
    Nothing {
        /// Everything up to here was looked at.
        seen: Position,
    },
    /// There is something, and it may still be read.
    Later {
        /// When to look again, in milliseconds since the epoch.
        due_ms: u64,
    },
    /// The search for what is to be told goes on in the next plan.
    Search(Search),
    /// This is to be mailed.
    Send(Box<Digest>),
}

/// A digest that is to be mailed.
#[derive(Clone, Debug)]
pub struct Digest {
    /// The user whom it is for.
    pub user: UserNum,
    /// The id of that user.
    pub user_id: OwnedUserId,
    /// The address to which it goes.
    pub address: String,
    /// The name of the service that the mail shows, if the app that set the pusher gave one.
    pub brand: Option<String>,
    /// The rooms, those with highlights first.
    pub rooms: Vec<RoomNews>,
    /// The number of further rooms with news.
    pub further_rooms: usize,
    /// The pusher as it was when the digest was planned.
    pub pusher: PusherRow,
    /// Where the pusher stands.
    pub known: Standing,
    /// Where it stands once the digest is sent.
    pub next: Standing,
}

/// The news of a room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoomNews {
    /// The id of the room.
    pub room_id: String,
    /// The name of the room, where it has one.
    pub name: Option<String>,
    /// The newest of the events that notified the user, the oldest of these first.
    pub events: Vec<News>,
    /// The number of further events that notified the user.
    pub further_events: usize,
    /// Whether one of them highlights.
    pub highlights: bool,
}

/// An event as a mail tells it. Its texts are one line each, without control characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct News {
    /// The name of the sender, or their user id.
    pub sender: String,
    /// The user id of the sender.
    pub sender_id: String,
    /// When the sender says that it was sent, in milliseconds since the epoch.
    pub sent_ms: u64,
    /// The part of the content that is told.
    pub what: What,
}

/// The part of an event's content that a mail tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// The message is this text.
    Text(String),
    /// The message says what the sender does.
    Action(String),
    /// The message is a file of a kind, such as `image`.
    File(&'static str),
    /// Nobody here can read the message.
    Encrypted,
    /// The sender invites the user.
    Invitation,
    /// Something else happened in the room.
    Other,
}

/// Plans what comes next for a pusher.
pub fn plan(read: &(impl Read + ?Sized), push: &Push, ask: &Ask) -> Result<Plan, Fault> {
    let key = (ask.user, ask.app_id.as_str(), ask.pushkey.as_str());
    let pusher = pushers::find(read, key)?.filter(|row| row.is_enabled && row.is_email());
    let (place, row) = (places::find(read, key)?, mailboxes::find(read, key)?);
    let (Some(pusher), Some(place), Some(row)) = (pusher, place, row) else { return Ok(Plan::Gone) };
    let Some(account) = users::find(read, ask.user)?.filter(|account| !account.is_deactivated) else {
        return Ok(Plan::Gone);
    };
    if !emails::has(read, ask.user, &ask.pushkey)? {
        return Ok(Plan::Gone);
    }
    let (wishes, upto) = (mailboxes::preferences(read, ask.user)?, read.upto());
    if account.is_locked || !wishes.enabled {
        return Ok(Plan::Nothing { seen: upto });
    }
    if row.not_before_ms > ask.now_ms {
        return Ok(Plan::Later { due_ms: row.not_before_ms });
    }
    let oldest_ms = ask.now_ms.saturating_sub(OLD_MS);
    let looker = Looker::new(read, push, (ask.user, &account.user_id), oldest_ms)?;
    let delay_ms = wishes.delay_ms.unwrap_or(ask.delay_ms);
    let after = place.upto.max(ask.seen);
    let begin = || Search::begin(upto, ask.now_ms, wishes.only_highlights);
    let mut search = ask.search.clone().unwrap_or_else(begin);
    let was_done = search.is_done();
    if !search.go_on(&looker, ask.user, after)? {
        return Ok(Plan::Search(search));
    }
    let planner = Planner { looker, now_ms: ask.now_ms, only_highlights: wishes.only_highlights };
    let found = &search.gathered.rooms;
    if found.is_empty() {
        return Ok(Plan::Nothing { seen: search.upto() });
    }
    let before = Pauses { rooms: planner.still_waiting(&row.rooms, found)?, invited: row.invited };
    let due_ms = found.iter().map(|found| before.due_ms(found, delay_ms)).min();
    if let Some(due_ms) = due_ms.filter(|due_ms| *due_ms > ask.now_ms) {
        return Ok(Plan::Later { due_ms });
    }
    let (first, others) = first_rooms(found);
    let mut rooms = Vec::new();
    for found in first {
        rooms.extend(planner.tell(found, after)?);
    }
    if planner.looker.reader.is_spent() && !was_done {
        // Everything was looked at. The next plan has all its steps for what is told.
        return Ok(Plan::Search(search));
    }
    if rooms.is_empty() {
        // All of it was read or redacted since it was found.
        return Ok(Plan::Later { due_ms: ask.now_ms });
    }
    let Pauses { rooms: waits, invited } = before.after_mail(found, (delay_ms, ask.now_ms));
    let next = Standing {
        place: PusherPlace { upto: search.upto(), is_behind: false, badge: None },
        row: MailboxRow { rooms: waits, invited, refusals: 0, not_before_ms: 0, secret: row.secret.clone() },
    };
    let further_rooms = others + search.gathered.further_rooms;
    let brand = pusher.pusher.get("data").and_then(|data| data.get("brand")).and_then(|brand| brand.as_str());
    Ok(Plan::Send(Box::new(Digest {
        user: ask.user,
        user_id: account.user_id.clone(),
        address: ask.pushkey.clone(),
        brand: brand.map(|brand| clean(brand, NAME_CHARACTERS_MAX)).filter(|brand| !brand.is_empty()),
        rooms,
        further_rooms,
        pusher,
        known: Standing { place, row },
        next,
    })))
}

struct Planner<'a, R: ?Sized> {
    looker: Looker<'a, R>,
    now_ms: u64,
    only_highlights: bool,
}

impl<R: Read + ?Sized> Planner<'_, R> {
    /// Tells what a room has, as far as it is still so: much may have happened since it was found.
    fn tell(&self, found: &Found, after: Position) -> Result<Option<RoomNews>, Fault> {
        let (mut news, mut further) = (None::<RoomNews>, found.further_events);
        for at in found.shown.iter().copied().filter(|at| *at > after) {
            if self.looker.reader.is_spent() && news.is_some() {
                further += 1;
                continue;
            }
            let Some(told) = self.looker.find_newest(found.room, at)? else { continue };
            if self.only_highlights && !told.highlights && !told.is_invitation() {
                continue;
            }
            let news = news.get_or_insert_with(|| room_news(&told));
            news.highlights |= told.highlights;
            news.events.push(news_of(&told));
        }
        // They were found from the newest on, and are read from the oldest on.
        Ok(news.map(|mut news| {
            news.events.reverse();
            news.further_events = further;
            news.highlights |= found.highlights && found.further_events > 0;
            news
        }))
    }

    /// The rooms that mails told of and that still wait: those where the user has not read what was told.
    fn still_waiting(&self, rooms: &[MailedRoom], found: &[Found]) -> Result<Vec<MailedRoom>, Fault> {
        let mut waiting = Vec::new();
        for mailed in rooms {
            // A room that has waited out the longest time begins anew.
            if mailed.mailed_ms.saturating_add(2 * WAIT_MOST_MS) < self.now_ms {
                continue;
            }
            let is_asked_for = found.iter().any(|found| found.room == mailed.room);
            let was_read = match (Position::new(mailed.newest), is_asked_for) {
                (Some(newest), true) => match rooms::find_row(self.looker.read, mailed.room)? {
                    Some(row) => self.looker.was_read(mailed.room, &row, newest)?,
                    None => true,
                },
                (_, false) => false,
                (None, true) => true,
            };
            if !was_read {
                waiting.push(*mailed);
            }
        }
        Ok(waiting)
    }
}

/// The pauses between the mails of a pusher.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Pauses {
    rooms: Vec<MailedRoom>,
    invited: MailedInvites,
}

impl Pauses {
    /// When a mail is due for what was found, in milliseconds since the epoch. All invitations have one pause, because each comes from a room
    /// that had none.
    fn due_ms(&self, found: &Found, delay_ms: u64) -> u64 {
        let waits_until_ms = if found.is_invitation {
            self.invited.mailed_ms.saturating_add(self.invited.wait_ms)
        } else {
            let mailed = self.rooms.iter().find(|mailed| mailed.room == found.room);
            mailed.map_or(0, |mailed| mailed.mailed_ms.saturating_add(mailed.wait_ms))
        };
        found.since_ms.saturating_add(delay_ms).max(waits_until_ms)
    }

    /// The pauses once these are mailed. Only what was due itself waits for longer the next time, and not what another mail brought along.
    fn after_mail(self, found: &[Found], (delay_ms, now_ms): (u64, u64)) -> Self {
        let is_due = |found: &Found| self.due_ms(found, delay_ms) <= now_ms;
        let is_for_room = found.iter().any(|found| !found.is_invitation && is_due(found));
        let invited = if is_for_room { self.invited } else { longer(self.invited, now_ms) };
        let is_of_room = |found: &&Found| !found.is_invitation;
        let mailed = |found: &Found| {
            let (room, newest) = (found.room, found.newest.number());
            let before = self.rooms.iter().find(|mailed| mailed.room == room);
            match before {
                Some(before) if !is_due(found) => MailedRoom { newest, ..*before },
                Some(before) => {
                    MailedRoom { room, mailed_ms: now_ms, wait_ms: grown(before.wait_ms), newest }
                }
                None => MailedRoom { room, mailed_ms: now_ms, wait_ms: WAIT_FIRST_MS, newest },
            }
        };
        let mut rooms: Vec<_> = found.iter().filter(is_of_room).map(mailed).collect();
        let others = self.rooms.iter().filter(|mailed| found.iter().all(|found| found.room != mailed.room));
        rooms.extend(others);
        rooms.sort_by_key(|mailed| std::cmp::Reverse(mailed.mailed_ms));
        rooms.truncate(MAILED_ROOMS_MAX);
        Self { rooms, invited }
    }
}

/// The next wait after one.
fn grown(wait_ms: u64) -> u64 {
    wait_ms.saturating_mul(WAIT_GROWS_BY).clamp(WAIT_FIRST_MS, WAIT_MOST_MS)
}

/// The pause of invitations after another mail of them. One that was waited out for long begins anew.
fn longer(invited: MailedInvites, now_ms: u64) -> MailedInvites {
    let begins_anew = invited.mailed_ms.saturating_add(2 * WAIT_MOST_MS) < now_ms;
    let wait_ms = if begins_anew { WAIT_FIRST_MS } else { grown(invited.wait_ms) };
    MailedInvites { mailed_ms: now_ms, wait_ms }
}

/// The rooms that a mail tells of, and the number of the others.
fn first_rooms(found: &[Found]) -> (Vec<&Found>, usize) {
    let mut first: Vec<_> = found.iter().collect();
    first.sort_by_key(|found| found.rank());
    first.truncate(ROOMS_TOLD_MAX);
    let others = found.len().saturating_sub(first.len());
    (first, others)
}

fn room_news(told: &Told) -> RoomNews {
    let name = told.room_name.as_deref().map(|name| clean(name, NAME_CHARACTERS_MAX));
    RoomNews {
        room_id: told.room_id.clone(),
        name: name.filter(|name| !name.is_empty()),
        events: Vec::new(),
        further_events: 0,
        highlights: told.highlights,
    }
}

fn news_of(told: &Told) -> News {
    let name = told.sender_name.as_deref().map(|name| clean(name, NAME_CHARACTERS_MAX));
    let sender = name.filter(|name| !name.is_empty());
    let sender_id = clean(&told.sender, 2 * NAME_CHARACTERS_MAX);
    News {
        sender: sender.unwrap_or_else(|| sender_id.clone()),
        sender_id,
        sent_ms: told.sent_ms,
        what: what_of(told),
    }
}

fn what_of(told: &Told) -> What {
    #[derive(Deserialize)]
    struct Content {
        msgtype: String,
        body: String,
    }
    if told.event_type == ENCRYPTED {
        return What::Encrypted;
    }
    if told.is_invitation() {
        return What::Invitation;
    }
    if told.event_type != MESSAGE {
        return What::Other;
    }
    let Ok(content) = serde_json::from_str::<Content>(told.content.as_str()) else { return What::Other };
    let text = clean(&content.body, TEXT_CHARACTERS_MAX);
    match content.msgtype.as_str() {
        "m.image" => What::File("image"),
        "m.video" => What::File("video"),
        "m.audio" => What::File("audio"),
        "m.file" => What::File("file"),
        "m.emote" if !text.is_empty() => What::Action(text),
        _ if !text.is_empty() => What::Text(text),
        _ => What::Other,
    }
}

/// Makes one line of a text that somebody wrote, at most this many characters long: without control characters, which could end a field of
/// a mail's head, and without those that turn the direction of what follows.
pub fn clean(text: &str, characters_max: usize) -> String {
    let turns = |it: char| matches!(it, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}');
    let is_space = |it: char| it.is_whitespace() || it.is_control();
    let (mut line, mut count, mut has_gap) = (String::new(), 0, false);
    // A text is an event long at most, and is not gone through further than what is shown of it.
    for it in text.chars().filter(|it| !turns(*it)).take(4 * characters_max) {
        if is_space(it) {
            has_gap = !line.is_empty();
            continue;
        }
        if count >= characters_max {
            line.push('\u{2026}');
            break;
        }
        if has_gap {
            line.push(' ');
        }
        line.push(it);
        count += 1 + usize::from(has_gap);
        has_gap = false;
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::RoomNum;

    fn found(room: u64, newest: u64, highlights: bool) -> Found {
        Found {
            room: RoomNum(room),
            shown: Vec::new(),
            further_events: 0,
            highlights,
            is_invitation: false,
            since_ms: 0,
            newest: Position::new(newest).unwrap(),
        }
    }

    fn invitation(room: u64) -> Found {
        Found { is_invitation: true, ..found(room, room, false) }
    }

    fn pauses() -> Pauses {
        Pauses { rooms: Vec::new(), invited: MailedInvites::default() }
    }

    #[test]
    fn a_room_waits_longer_with_each_mail_and_others_keep_their_wait() {
        let mut mailed = pauses();
        let mut waits = Vec::new();
        for round in 0..5 {
            mailed = mailed.after_mail(&[found(1, 10 + round, false)], (0, (round + 1) * DAY_MS));
            waits.push(mailed.rooms[0].wait_ms / MINUTE_MS);
        }
        assert_eq!(waits, [10, 60, 360, 1_440, 1_440]);
        let both = mailed.clone().after_mail(&[found(2, 20, false)], (0, 9 * DAY_MS));
        assert_eq!(
            both.rooms.iter().map(|it| (it.room.0, it.wait_ms)).collect::<Vec<_>>(),
            [(2, WAIT_FIRST_MS), (1, WAIT_MOST_MS)]
        );
        assert_eq!(both.rooms[1], mailed.rooms[0]);
        let many: Vec<_> = (0..300).map(|room| found(room, room + 1, false)).collect();
        assert_eq!(mailed.after_mail(&many, (0, 10 * DAY_MS)).rooms.len(), MAILED_ROOMS_MAX);
    }

    #[test]
    fn a_room_that_another_mail_brings_along_keeps_its_pause() {
        let first = pauses().after_mail(&[found(1, 10, false)], (0, DAY_MS));
        let now_ms = DAY_MS + MINUTE_MS;
        let along = first.clone().after_mail(&[found(1, 20, false), found(2, 21, false)], (0, now_ms));
        let room = along.rooms.iter().find(|it| it.room == RoomNum(1)).unwrap();
        assert_eq!(*room, MailedRoom { newest: 20, ..first.rooms[0] });
    }

    #[test]
    fn mails_of_invitations_alone_have_one_pause_that_grows_and_ends() {
        let (mut mailed, mut waits, mut now_ms) = (pauses(), Vec::new(), DAY_MS);
        for room in 1..6 {
            assert_eq!(mailed.due_ms(&invitation(room), MINUTE_MS).max(now_ms), now_ms, "{room}");
            mailed = mailed.after_mail(&[invitation(room)], (MINUTE_MS, now_ms));
            assert!(mailed.rooms.is_empty(), "they push no room out");
            waits.push(mailed.invited.wait_ms / MINUTE_MS);
            assert_eq!(mailed.due_ms(&invitation(90 + room), MINUTE_MS), now_ms + mailed.invited.wait_ms);
            now_ms += mailed.invited.wait_ms;
        }
        assert_eq!(waits, [10, 60, 360, 1_440, 1_440]);
        let along = mailed.clone().after_mail(&[invitation(7), found(8, 80, false)], (0, now_ms));
        assert_eq!(along.invited, mailed.invited, "a mail for a room brings them along");
        let later = mailed.after_mail(&[invitation(9)], (0, now_ms + 3 * DAY_MS));
        assert_eq!(later.invited.wait_ms, WAIT_FIRST_MS);
    }

    #[test]
    fn rooms_with_highlights_come_first_and_only_some_are_told() {
        let all = [found(1, 9, false), found(2, 5, true), found(3, 7, false)];
        let (rooms, others) = first_rooms(&all);
        let nums: Vec<_> = rooms.iter().map(|found| found.room.0).collect();
        assert_eq!((nums, others), (vec![2, 1, 3], 0));
        let all: Vec<_> = (0..25).map(|room| found(room, room + 1, false)).collect();
        let (rooms, others) = first_rooms(&all);
        assert_eq!((rooms.len(), others), (ROOMS_TOLD_MAX, 5));
    }

    #[test]
    fn a_text_becomes_one_line_that_ends_no_field() {
        for (text, expected) in [
            ("plain", "plain"),
            ("a\r\nBcc: eve@x.example", "a Bcc: eve@x.example"),
            ("  a \t\u{0}\u{1b}[31m b\u{2028}c  ", "a [31m b c"),
            ("\u{202e}evil\u{2066}\u{feff}", "evil"),
            ("\u{e4}\u{1f600}", "\u{e4}\u{1f600}"),
            ("\r\n\r\n", ""),
        ] {
            assert_eq!(clean(text, 60), expected, "{text:?}");
        }
        assert_eq!(clean(&"x".repeat(100), 10), "xxxxxxxxxx\u{2026}");
        assert_eq!(clean(&"x".repeat(10), 10), "xxxxxxxxxx");
        assert_eq!(clean("xxxxxxxxxx  ", 10), "xxxxxxxxxx");
        assert_eq!(clean(&" ".repeat(1_000_000), 10), "");
    }
}
