//! Follows the log, and offers to the pushers of our users what may concern them, whether a gateway is told of it or a mail is sent. Whether it
//! does is looked at again before it is.
//!
//! Nothing is written for it, however many members a room has: for those whose rules count as those of many, the running numbers of the
//! room say whether an event notifies them, and whoever is left is asked when it is their turn.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use ruma::{OwnedUserId, UserId};
use tokio::sync::watch;

use crate::{
    accounts::users,
    delivery::{
        gateways::{
            board::{Stored, Watchers},
            shared::{READER, Shared, list_stored},
        },
        mail::Mailboxes,
    },
    error::Result,
    ids::{Position, RoomNum, UserNum},
    push::{Push, plan::Item, reader::Place, unread},
    rooms::{
        self,
        event::{self, StoredEvent},
        members,
    },
    schema::{self, event_types::REDACTION, receipts::ReceiptKind, rooms::Membership},
    store::{Direction, Fault, Guard, LogEntry, Read, Snapshot, cursor, key::Json, tail},
};

/// One page has at most this many entries.
const PAGE_MAX: usize = 128;
/// The cursor is noted no more often than this.
const NOTED_EVERY: Duration = Duration::from_secs(1);
/// After a failure the log is read again after this time.
const FAILED_AGAIN_AFTER: Duration = Duration::from_secs(2);
/// Up to this many users with pushers are looked up among the members of a room; with more, the room's members are gone through.
const LOOKED_UP_MAX: usize = 64;
/// A private receipt does not say whose it is where the log names it. Ask at most this many users of its room; the numbers of others are
/// right again with their next notification.
const ASKED_MAX: usize = 1_000;
/// Look at no more than this many users who are something to a room from outside.
const OUTSIDE_MAX: usize = 1_000;

/// The news that a page of the log has.
#[derive(Default)]
struct News {
    /// News of users, in the order of the log.
    items: Vec<(UserNum, Item)>,
    /// The pushers of users whose accounts changed.
    accounts: BTreeMap<UserNum, Account>,
}

/// The pushers of a user whose account changed.
struct Account {
    user_id: Option<OwnedUserId>,
    stored: Vec<Stored>,
    mailboxes: Mailboxes,
}

/// The users who have pushers, of either kind.
#[derive(Default)]
struct Watching {
    pushed: Watchers,
    mailed: Watchers,
}

impl Watching {
    fn is_empty(&self) -> bool {
        self.pushed.is_empty() && self.mailed.is_empty()
    }

    /// No fewer than there are.
    fn len_most(&self) -> usize {
        self.pushed.len() + self.mailed.len()
    }

    fn contains_key(&self, user: &UserNum) -> bool {
        self.pushed.contains_key(user) || self.mailed.contains_key(user)
    }

    fn get(&self, user: &UserNum) -> Option<&OwnedUserId> {
        self.pushed.get(user).or_else(|| self.mailed.get(user))
    }

    /// The users, each once.
    fn keys(&self) -> impl Iterator<Item = &UserNum> {
        self.pushed.keys().chain(self.mailed.keys().filter(|user| !self.pushed.contains_key(user)))
    }

    /// Takes over what the store has of a user.
    fn set(&mut self, user: UserNum, account: &Account) {
        let id = account.user_id.as_ref();
        let of = |has: bool| id.filter(|_| has).cloned();
        set(&mut self.pushed, user, of(!account.stored.is_empty()));
        set(&mut self.mailed, user, of(!account.mailboxes.keys.is_empty()));
    }
}

fn set(watchers: &mut Watchers, user: UserNum, user_id: Option<OwnedUserId>) {
    match user_id {
        Some(user_id) => drop(Arc::make_mut(watchers).insert(user, user_id)),
        None if watchers.contains_key(&user) => drop(Arc::make_mut(watchers).remove(&user)),
        None => {}
    }
}

/// Follows the log until the server ends.
pub(super) async fn follow(shared: Arc<Shared>, mut written: watch::Receiver<()>) {
    let mut noted = Position::ZERO;
    let mut noted_at = shared.env.instant();
    loop {
        written.mark_unchanged();
        let is_all = match read_page(&shared).await {
            Ok(is_all) => is_all,
            Err(error) => {
                tracing::warn!(%error, "the log could not be read for push gateways; it is tried again");
                shared.env.sleep(FAILED_AGAIN_AFTER).await;
                continue;
            }
        };
        let told = shared.board.lock().told_upto();
        let since = shared.env.instant().saturating_duration_since(noted_at);
        if told > noted && (since >= NOTED_EVERY || noted == Position::ZERO) {
            match note(&shared, told) {
                Ok(()) => (noted, noted_at) = (told, shared.env.instant()),
                Err(error) => tracing::warn!(%error, "the cursor of push gateways could not be noted"),
            }
        }
        if !is_all {
            continue;
        }
        let is_behind = noted < shared.board.lock().read;
        if is_behind {
            // Whatever waits is sent meanwhile, so that the cursor may move without news.
            tokio::select! {
                biased;
                changed = written.changed() => if changed.is_err() { return },
                () = shared.env.sleep(NOTED_EVERY) => {}
            }
        } else if written.changed().await.is_err() {
            return;
        }
    }
}

fn note(shared: &Shared, told: Position) -> Result<()> {
    let mut note = shared.store.note(&Guard::own_tables());
    cursor::advance(&mut note, READER, told);
    // A crash may lose it: then the same entries are read again, and what was sent of them is known by the places of pushers.
    drop(shared.store.enqueue_note(note)?);
    Ok(())
}

/// Reads one page of the log. Answers whether it was the last.
async fn read_page(shared: &Arc<Shared>) -> Result<bool> {
    let owned = Arc::clone(shared);
    let read = move || {
        let snapshot = owned.store.snapshot();
        let (after, pushed) = {
            let board = owned.board.lock();
            (board.read, board.watchers())
        };
        let watchers = Watching { pushed, mailed: owned.mails.watchers() };
        if after >= snapshot.upto() {
            return Ok(true);
        }
        let (entries, upto, is_all) = match tail::read_after(&*snapshot, after, PAGE_MAX)? {
            tail::Tail::Entries(entries) => {
                let is_all = entries.len() < PAGE_MAX;
                let last = entries.last().map(|(position, _)| *position).filter(|_| !is_all);
                (entries, last.unwrap_or(snapshot.upto()), is_all)
            }
            // Whatever was trimmed is older than anything that is pushed.
            tail::Tail::Resync { from } => (Vec::new(), from, false),
        };
        let news = find_news(&snapshot, &owned.push, watchers, &entries)?;
        let now_ms = owned.env.now_ms();
        let mut board = owned.board.lock();
        for (user, Account { user_id, stored, mailboxes }) in news.accounts {
            owned.mails.reload(user, user_id.clone(), mailboxes);
            board.reload(user, user_id.filter(|_| !stored.is_empty()), stored, now_ms);
        }
        for (user, item) in news.items {
            // Counts alone are nothing that is mailed.
            if matches!(item, Item::Event { .. }) {
                owned.mails.offer(user);
            }
            board.offer(user, item, now_ms);
        }
        board.read = upto;
        drop(board);
        owned.turns.notify_one();
        Ok(is_all)
    };
    shared.env.blocking(read).await
}

fn find_news(
    snapshot: &Snapshot,
    push: &Push,
    mut watchers: Watching,
    entries: &[(Position, LogEntry)],
) -> Result<News, Fault> {
    let mut news = News::default();
    for (at, entry) in entries {
        let at = *at;
        match entry {
            LogEntry::Event { room, event } => {
                let finder = Finder { snapshot, push, watchers: &watchers, room: *room, at };
                if !watchers.is_empty()
                    && let Some(stored) = event::find(snapshot, *room, *event)?
                {
                    finder.add_event(&mut news, &stored)?;
                }
            }
            LogEntry::RoomState { room } => {
                if !watchers.is_empty() {
                    add_outside(&mut news, snapshot, &watchers, (*room, at))?;
                }
            }
            LogEntry::Receipts { room } => {
                if !watchers.is_empty() {
                    let finder = Finder { snapshot, push, watchers: &watchers, room: *room, at };
                    finder.add_receipt(&mut news)?;
                }
            }
            LogEntry::AccountData { user } => {
                if watchers.contains_key(user) {
                    news.items.push((*user, Item::Counts { at }));
                }
            }
            LogEntry::Account { user } => {
                // Each is read once a page, in the snapshot that has all of it: a user who changes their account in a loop costs others
                // no more than one who changes it once.
                if news.accounts.contains_key(user) {
                    continue;
                }
                let account = Account {
                    user_id: users::find(snapshot, *user)?.map(|account| account.user_id),
                    stored: list_stored(snapshot, *user)?,
                    mailboxes: Mailboxes::list(snapshot, *user)?,
                };
                // The rest of this page concerns them already.
                watchers.set(*user, &account);
                news.accounts.insert(*user, account);
            }
            LogEntry::Device { .. }
            | LogEntry::ToDevice { .. }
            | LogEntry::DeviceList { .. }
            | LogEntry::OtherDeviceList
            | LogEntry::Filled { .. }
            | LogEntry::Expired { .. }
            | LogEntry::Server => {}
        }
    }
    Ok(news)
}

/// Looks for those whom an entry about a room concerns.
struct Finder<'a> {
    snapshot: &'a Snapshot,
    push: &'a Push,
    watchers: &'a Watching,
    room: RoomNum,
    at: Position,
}

impl Finder<'_> {
    /// The users with pushers who are in the room.
    fn list_members(&self, count: usize) -> Result<Vec<UserNum>, Fault> {
        let (read, room) = (self.snapshot, self.room);
        if self.watchers.len_most() <= LOOKED_UP_MAX {
            let mut users = Vec::new();
            for user in self.watchers.keys().take(count) {
                if members::find_near(read, room, *user)? == Some(Membership::Join) {
                    users.push(*user);
                }
            }
            return Ok(users);
        }
        let joined = members::joined_local_users(read, room)?;
        let watching = |user: &Result<UserNum, Fault>| {
            user.as_ref().map_or(true, |user| self.watchers.contains_key(user))
        };
        joined.filter(watching).take(count).collect()
    }

    fn add_event(&self, news: &mut News, stored: &StoredEvent) -> Result<(), Fault> {
        if stored.order.minor != 0 || stored.row.header.unseen {
            return Ok(());
        }
        let (read, room, at) = (self.snapshot, self.room, self.at);
        let Some(row) = rooms::find_row(read, room)? else { return Ok(()) };
        let find = |user_id: &str| match <&UserId>::try_from(user_id) {
            Ok(user_id) => users::find_num(read, user_id),
            Err(_) => Ok(None),
        };
        let watches = |user: &UserNum| self.watchers.contains_key(user);
        let sender = find(&stored.row.sender())?;
        let target = match (stored.membership(), stored.row.state_key()) {
            (Some(membership), Some(user_id)) => find(&user_id)?.map(|user| (user, membership)),
            _ => None,
        };
        if let Some((user, membership)) = target.filter(|(user, _)| watches(user)) {
            // A user who is let in, leaves or is thrown out has other counts than before.
            let item = match membership {
                Membership::Invite => Item::Event { room, at },
                _ => Item::Counts { at },
            };
            news.items.push((user, item));
        } else if let Some(user) = sender.filter(watches) {
            // A user who sends something has read what came before it.
            news.items.push((user, Item::Counts { at }));
        }
        let members = self.list_members(usize::MAX)?;
        if members.is_empty() {
            return Ok(());
        }
        let is_redaction = stored.row.event_type() == REDACTION;
        let (lane, classes) = unread::find_outcomes(read, room, stored)?;
        for user in members.into_iter().filter(|user| Some(*user) != sender) {
            let Some(user_id) = self.watchers.get(&user) else { continue };
            let place = Place { num: room, row: &row, joined: Position::ZERO };
            let reader = self.push.reader(read, user, user_id)?;
            if reader.may_notify(read, place, (stored, lane, classes))? {
                news.items.push((user, Item::Event { room, at }));
            } else if is_redaction {
                news.items.push((user, Item::Counts { at }));
            }
        }
        Ok(())
    }

    /// The user of a receipt has other counts than before.
    fn add_receipt(&self, news: &mut News) -> Result<(), Fault> {
        let (read, room, at) = (self.snapshot, self.room, self.at);
        let public = schema::RECEIPT_LOG.get(read, (room, at))?;
        if let Some(Json(key)) = public {
            debug_assert!(key.kind == ReceiptKind::Public, "a private receipt stands in the public log");
            let user_id = <&UserId>::try_from(key.user.as_str()).ok();
            let user = user_id.map(|user_id| users::find_num(read, user_id)).transpose()?.flatten();
            news.items.extend(
                user.filter(|user| self.watchers.contains_key(user)).map(|user| (user, Item::Counts { at })),
            );
            return Ok(());
        }
        for user in self.list_members(ASKED_MAX)? {
            let Some(user_id) = self.watchers.get(&user) else { continue };
            if schema::PRIVATE_RECEIPT_LOG.contains(read, (room, user_id.as_str(), at))? {
                news.items.push((user, Item::Counts { at }));
                return Ok(());
            }
        }
        Ok(())
    }
}

/// Those who were invited to a room from outside at this position, and those of whom such an invitation ended.
fn add_outside(
    news: &mut News,
    snapshot: &Snapshot,
    watchers: &Watching,
    (room, at): (RoomNum, Position),
) -> Result<(), Fault> {
    let rows = schema::OUTSIDE.prefix::<(RoomNum,)>(snapshot, (room,), Direction::Up)?;
    for row in rows.take(OUTSIDE_MAX) {
        let ((_, user), _) = row?;
        if !watchers.contains_key(&user) {
            continue;
        }
        match members::find(snapshot, user, room)? {
            Some(own) if own.since == at && own.membership == Membership::Invite => {
                news.items.push((user, Item::Event { room, at }));
            }
            Some(own) if own.since == at => news.items.push((user, Item::Counts { at })),
            Some(_) | None => {}
        }
    }
    Ok(())
}
