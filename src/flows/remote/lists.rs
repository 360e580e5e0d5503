//! Keeps the device lists of users of other servers up to date: takes the changes that their servers tell, and asks for a whole list
//! again where a change was missed.
//!
//! A list that is stale is told to nobody, so that asking for it again is no hurry: a client that wants it asks for it itself. One list
//! of a server is asked for at a time. A server that does not answer is asked ever later and then no more; and a list that is
//! stale again and again is asked for ever later, so that a server cannot keep this one asking.
//!
//! After a restore no list counts that was kept before, because a change that was told meanwhile is lost. All are asked for again in
//! the background, and those that have become others are told as changed.
//!
//! Specification: server-server API, "Device Management".

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use federation::call::{Failure, Options};
use parking_lot::Mutex;
use ruma::{OwnedServerName, OwnedUserId, UserId};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::fetch_keys::{self, read_device, read_device_id, read_signing_key};
use crate::{
    encryption::{
        cross_signing::Usage,
        device_lists,
        elsewhere::{self, AskedAt, Change, OtherList, Outcome, Place, Witness},
    },
    error::{Error, Result},
    flows::{App, write},
    rooms::{change::invited::Source, members},
    store::{Read, Wake},
};

/// Lists of at most this many servers are asked for at once in the background.
const SERVERS_AT_ONCE: usize = 64;
/// At most this many of them have names of one owner, so that who lets this server wait keeps nobody else's lists stale.
const OF_SOURCE_AT_ONCE: usize = 8;
/// Lists of at most this many users of one server wait to be asked for.
const WAITING_OF_SERVER_MAX: usize = 1_000;
/// At most this many users are remembered whose lists were asked for lately.
const PACES_MAX: usize = 20_000;
/// A list that is stale again within this time after it was asked for waits before it is asked for again.
const CALM_AFTER: Duration = Duration::from_secs(10 * 60);
/// It waits this long the first time, and each time twice as long.
const FIRST_PAUSE: Duration = Duration::from_secs(2);
/// It never waits longer than this.
const PAUSE_MAX: Duration = Duration::from_secs(60 * 60);
/// A server that does not answer is asked again after this time, which doubles each time.
const FAILED_PAUSE: Duration = Duration::from_secs(10);
/// A server that did not answer this many times in a row is asked no more until it tells of a change.
const FAILURES_MAX: u32 = 6;
/// After a restore the lists are looked over this often, as long as they become fewer.
const RENEWED_EVERY: Duration = Duration::from_secs(30);
/// This many lists are looked over together.
const LOOKED_OVER_AT_ONCE: usize = 1_000;
/// Other work comes between two such looks.
const LOOKED_OVER_PAUSE: Duration = Duration::from_millis(100);
/// Nobody waits for these answers.
const OPTIONS: Options = Options {
    begins: Duration::from_secs(30),
    overall: Duration::from_secs(60),
    limits: federation::json::Limits::JSON,
    lane: federation::call::Lane::Fetches,
};
/// A change follows at most this many others.
const PREV_MAX: usize = 100;

/// The lists that are to be asked for again, which clones of this share.
#[derive(Clone, Default)]
pub(crate) struct Lists(Arc<Mutex<Stale>>);

#[derive(Default)]
struct Stale {
    /// The users whose lists wait, by the uptime from which on they may be asked for. A server that is here has a task.
    waiting: BTreeMap<OwnedServerName, BTreeSet<(Duration, OwnedUserId)>>,
    paces: BTreeMap<OwnedUserId, Pace>,
}

/// When a list was asked for last: uptime; and for how long it waits if it is stale again.
#[derive(Clone, Copy)]
struct Pace {
    asked: Duration,
    pause: Duration,
}

impl Stale {
    /// Adds a list. Answers whether a task must be started for its server. A list for which there is no room stays stale until
    /// somebody asks for it.
    fn add(&mut self, user_id: &UserId, now: Duration) -> bool {
        let due = self.paces.get(user_id).map_or(now, |pace| now.max(pace.asked.saturating_add(pace.pause)));
        if let Some(waiting) = self.waiting.get_mut(user_id.server_name()) {
            let has_room = waiting.len() < WAITING_OF_SERVER_MAX;
            if has_room && waiting.iter().all(|(_, it)| it != user_id) {
                waiting.insert((due, user_id.to_owned()));
            }
            return false;
        }
        let source = Source::of(user_id.server_name().as_str());
        let of_source = self.waiting.keys().filter(|server| Source::of(server.as_str()) == source);
        if self.waiting.len() >= SERVERS_AT_ONCE || of_source.count() >= OF_SOURCE_AT_ONCE {
            return false;
        }
        let waiting = BTreeSet::from([(due, user_id.to_owned())]);
        self.waiting.insert(user_id.server_name().to_owned(), waiting);
        true
    }

    /// The list of a server that comes next, which goes on waiting. If there is none, the server's task ends.
    fn next(&mut self, server: &OwnedServerName) -> Option<(Duration, OwnedUserId)> {
        let next = self.waiting.get(server).and_then(|waiting| waiting.first().cloned());
        if next.is_none() {
            self.waiting.remove(server);
        }
        next
    }

    /// Notes that a list is being asked for. Changes that come from now on have it asked for once more.
    fn begin(&mut self, entry: &(Duration, OwnedUserId), now: Duration) {
        if let Some(waiting) = self.waiting.get_mut(entry.1.server_name()) {
            waiting.remove(entry);
        }
        if self.paces.len() >= PACES_MAX {
            self.paces.retain(|_, pace| now.saturating_sub(pace.asked) < CALM_AFTER.max(pace.pause));
        }
        let before = self.paces.get(&entry.1);
        let is_calm =
            before.is_none_or(|pace| now.saturating_sub(pace.asked) >= CALM_AFTER.max(pace.pause * 2));
        let pause = match before {
            Some(pace) if !is_calm => (pace.pause * 2).min(PAUSE_MAX),
            _ => FIRST_PAUSE,
        };
        if self.paces.len() < PACES_MAX || before.is_some() {
            self.paces.insert(entry.1.clone(), Pace { asked: now, pause });
        }
    }
}

/// Reads a message of a server about the devices or keys of one of its users. None where it names no user of that server.
pub(super) fn read_change(
    origin: &OwnedServerName,
    is_device: bool,
    content: &RawValue,
) -> Option<(OwnedUserId, Change)> {
    #[derive(Deserialize)]
    struct Named {
        user_id: String,
    }
    let Named { user_id } = serde_json::from_str(content.get()).ok()?;
    let user_id = UserId::parse(user_id).ok().filter(|user_id| user_id.server_name() == origin)?;
    let change =
        if is_device { read_device_change(&user_id, content) } else { read_key_change(&user_id, content) };
    Some((user_id, change.unwrap_or(Change::Unreadable)))
}

fn read_device_change(user_id: &UserId, content: &RawValue) -> Option<Change> {
    #[derive(Deserialize)]
    struct Content {
        device_id: String,
        #[serde(default)]
        device_display_name: Option<String>,
        stream_id: u64,
        #[serde(default)]
        prev_id: Option<Vec<u64>>,
        #[serde(default)]
        deleted: Option<bool>,
        #[serde(default)]
        keys: Option<Box<RawValue>>,
    }
    let content: Content = serde_json::from_str(content.get()).ok()?;
    let prev_ids = content.prev_id.unwrap_or_default();
    if prev_ids.len() > PREV_MAX {
        return None;
    }
    let device_id = read_device_id(&content.device_id)?;
    let device = match content.keys.filter(|_| content.deleted != Some(true)) {
        Some(keys) => {
            let name = content.device_display_name.as_deref();
            Some(read_device(user_id, device_id.as_str(), &keys, name)?.1)
        }
        None => None,
    };
    Some(Change::Device { stream_id: content.stream_id, prev_ids, device_id, device })
}

fn read_key_change(user_id: &UserId, content: &RawValue) -> Option<Change> {
    #[derive(Deserialize)]
    struct Content {
        #[serde(default)]
        master_key: Option<Box<RawValue>>,
        #[serde(default)]
        self_signing_key: Option<Box<RawValue>>,
    }
    let Content { master_key, self_signing_key } = serde_json::from_str(content.get()).ok()?;
    let read = |key: Option<Box<RawValue>>, usage| match key {
        Some(key) => read_signing_key(user_id, &key, usage).map(Some),
        None => Some(None),
    };
    let master_key = read(master_key, Usage::Master)?;
    let self_signing_key = read(self_signing_key, Usage::SelfSigning)?;
    Some(Change::SigningKeys { master_key, self_signing_key })
}

/// Has changes of the devices and keys of a user come into the list that is kept of them, and tells those who share a room with
/// the user. Nothing happens for a user with whom nobody here shares a room: nobody is told of them, and no list of theirs
/// counts.
pub(super) async fn take_changes(app: &App, user_id: OwnedUserId, changes: Vec<Change>) -> Result<()> {
    let (owned, of) = (app.clone(), user_id.clone());
    let find = move || {
        let snapshot = owned.store.snapshot();
        let is_kept = elsewhere::find(&*snapshot, &of)?.is_some();
        Ok((members::list_rooms_of_other(&*snapshot, of.as_str())?, is_kept))
    };
    let (rooms, is_kept) = app.env.blocking(find).await?;
    if rooms.is_empty() {
        // The same stay in a room may count again, where forks are resolved otherwise, and the list must not count with it: it lacks this change.
        return if is_kept { forget(app, &user_id).await } else { Ok(()) };
    }
    let of = user_id.clone();
    let is_stale = write::for_other(app, &user_id, move |_, batch| {
        let (mut is_new, mut is_stale) = (false, false);
        for change in changes {
            let outcome = elsewhere::apply(batch, &of, change)?;
            is_new |= outcome != Outcome::Known;
            is_stale |= outcome == Outcome::Stale;
        }
        if is_new {
            device_lists::changed_elsewhere(batch, &of)?;
            batch.wake(Wake::InRooms { rooms: rooms.into() });
        }
        Ok(is_stale)
    })
    .await?;
    if is_stale {
        ask_soon(app, &user_id);
    }
    Ok(())
}

/// Has the list of a user asked for in the background.
pub(super) fn ask_soon(app: &App, user_id: &UserId) {
    if app.remote.lists.0.lock().add(user_id, app.env.uptime()) {
        let (owned, server) = (app.clone(), user_id.server_name().to_owned());
        app.env.spawn(async move { work_off(&owned, &server).await });
    }
}

/// Asks a server for the lists that wait, one after the other.
async fn work_off(app: &App, server: &OwnedServerName) {
    let mut failures: u32 = 0;
    loop {
        let Some(next) = app.remote.lists.0.lock().next(server) else { return };
        let now = app.env.uptime();
        if next.0 > now {
            // Another list may be due before, so that this looks again in between.
            app.env.sleep((next.0 - now).min(FAILED_PAUSE)).await;
            continue;
        }
        app.remote.lists.0.lock().begin(&next, now);
        match ask_again(app, &next.1).await {
            Ok(is_stale) => {
                failures = 0;
                if is_stale {
                    app.remote.lists.0.lock().add(&next.1, app.env.uptime());
                }
            }
            Err(why) => {
                failures += 1;
                tracing::debug!(%server, user = %next.1, %why, failures, "a device list could not be asked for");
                if failures >= FAILURES_MAX {
                    app.remote.lists.0.lock().waiting.remove(server);
                    return;
                }
                app.remote.lists.0.lock().add(&next.1, app.env.uptime());
                app.env.sleep(FAILED_PAUSE * 2_u32.saturating_pow(failures - 1)).await;
            }
        }
    }
}

/// Asks for a list that is not current, if somebody here still shares a room with its user, and forgets it otherwise. Answers whether it
/// is stale again.
async fn ask_again(app: &App, user_id: &OwnedUserId) -> Result<bool> {
    let (owned, of) = (app.clone(), user_id.clone());
    let look = move || {
        let snapshot = owned.store.snapshot();
        let rooms = members::list_rooms_of_other(&*snapshot, of.as_str())?;
        let is_current = elsewhere::is_current(&snapshot, &of)?;
        if is_current && !elsewhere::has_anybody_come_since(&*snapshot, &rooms, &of)? {
            return Ok(None);
        }
        Ok(Some(Witness::find_in(&*snapshot, &rooms, &of)?))
    };
    match app.env.blocking(look).await? {
        None => Ok(false),
        Some(Some(witness)) => match renew(app, user_id, witness, OPTIONS).await? {
            Ok((_, is_stale)) => Ok(is_stale),
            Err(failure) => {
                Err(Error::Remote { server: user_id.server_name().to_string(), cause: failure.to_string() })
            }
        },
        Some(None) => {
            forget(app, user_id).await?;
            Ok(false)
        }
    }
}

/// Asks for the whole list of a user with whom somebody here shares a room, and keeps it. Answers it, and whether a change has come meanwhile,
/// so that what is kept is stale.
pub(super) async fn renew(
    app: &App,
    user_id: &OwnedUserId,
    witness: Witness,
    options: Options,
) -> Result<std::result::Result<(OtherList, bool), Failure>> {
    let (owned, of) = (app.clone(), user_id.clone());
    let find = move || {
        let upto = owned.store.snapshot().upto();
        Ok(AskedAt::now(&owned.store.view(), &of, upto)?)
    };
    let asked_at = app.env.blocking(find).await?;
    let list = match fetch_keys::list(app, user_id, options).await {
        Ok(list) => list,
        Err(failure) => return Ok(Err(failure)),
    };
    let of = user_id.clone();
    let kept = write::for_other(app, user_id, move |_, batch| {
        let is_stale = elsewhere::keep(batch, &of, &list, witness, asked_at)?;
        Ok((list, is_stale))
    });
    Ok(Ok(kept.await?))
}

/// Forgets the list that is kept of a user.
pub(super) async fn forget(app: &App, user_id: &OwnedUserId) -> Result<()> {
    let of = user_id.clone();
    write::for_other(app, user_id, move |_, batch| Ok(elsewhere::forget(batch, &of)?)).await
}

/// Has the lists asked for again that were asked for before this incarnation of the store, until none is left. Few are asked for at once, as
/// always, so that this looks at them again and again.
pub(super) async fn renew_old(app: &App) {
    if app.store.incarnation() == 0 {
        return;
    }
    let (mut pause, mut before) = (RENEWED_EVERY, usize::MAX);
    loop {
        match ask_for_old(app).await {
            Ok(0) => return,
            Ok(left) => {
                // Those that are left for long are lists of servers that do not answer.
                pause = if left < before { RENEWED_EVERY } else { (pause * 2).min(PAUSE_MAX) };
                before = left;
                tracing::debug!(left, "device lists from before a restore are asked for again");
            }
            Err(error) => {
                tracing::warn!(%error, "device lists from before a restore could not be looked over")
            }
        }
        app.env.sleep(pause).await;
    }
}

/// Has some lists asked for that are from before this incarnation. Answers how many there were.
async fn ask_for_old(app: &App) -> Result<usize> {
    let (mut after, mut count) = (None, 0);
    loop {
        let owned = app.clone();
        let look = move || {
            let snapshot = owned.store.snapshot();
            let (mut old, goes_on) = elsewhere::list_kept(&*snapshot, after, LOOKED_OVER_AT_ONCE)?;
            let mut is_old = Vec::with_capacity(old.len());
            for user_id in &old {
                is_old.push(elsewhere::is_from_before(&snapshot, user_id)?);
            }
            let mut is_old = is_old.into_iter();
            old.retain(|_| is_old.next() == Some(true));
            Ok((old, goes_on))
        };
        let (old, goes_on) = app.env.blocking(look).await?;
        count += old.len();
        old.iter().for_each(|user_id| ask_soon(app, user_id));
        after = goes_on;
        if after.is_none() {
            return Ok(count);
        }
        app.env.sleep(LOOKED_OVER_PAUSE).await;
    }
}

/// Forgets, of some lists, those that are not known to be current any more: the next who wants one asks for it. A list from before this
/// incarnation stays, so that it is seen whether it has changed meanwhile. Answers where to go on, if there may be more.
pub(super) async fn forget_old(app: &App, after: Option<Place>, count: usize) -> Result<Option<Place>> {
    let owned = app.clone();
    let look = move || {
        let snapshot = owned.store.snapshot();
        let (user_ids, goes_on) = elsewhere::list_kept(&*snapshot, after, count)?;
        let mut old = Vec::new();
        for user_id in user_ids {
            if !elsewhere::is_current(&snapshot, &user_id)?
                && !elsewhere::is_from_before(&snapshot, &user_id)?
            {
                old.push(user_id);
            }
        }
        Ok((old, goes_on))
    };
    let (old, goes_on) = app.env.blocking(look).await?;
    for user_id in old {
        forget(app, &user_id).await?;
    }
    Ok(goes_on)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn bob(number: usize) -> OwnedUserId {
        format!("@bob{number}:b.example").try_into().unwrap()
    }

    fn change(is_device: bool, content: &Value) -> Option<Change> {
        let content = serde_json::value::to_raw_value(content).unwrap();
        read_change(&"b.example".try_into().unwrap(), is_device, &content).map(|(_, change)| change)
    }

    #[test]
    fn a_change_that_cannot_be_read_is_one_all_the_same() {
        let keys = json!({
            "user_id": "@bob:b.example", "device_id": "A", "algorithms": [], "keys": {}, "signatures": {},
        });
        let read = change(
            true,
            &json!({ "user_id": "@bob:b.example", "device_id": "A", "stream_id": 5, "prev_id": [4], "keys": keys }),
        );
        let Some(Change::Device { stream_id: 5, prev_ids, device: Some(_), .. }) = read else {
            panic!("{read:?}")
        };
        assert_eq!(prev_ids, [4]);
        let gone = json!({
            "user_id": "@bob:b.example", "device_id": "A", "stream_id": 5, "deleted": true, "keys": keys,
        });
        assert!(matches!(change(true, &gone), Some(Change::Device { device: None, .. })));
        for wrong in [
            json!({ "user_id": "@bob:b.example" }),
            json!({ "user_id": "@bob:b.example", "device_id": "A", "stream_id": -5 }),
            json!({ "user_id": "@bob:b.example", "device_id": "A", "stream_id": 5, "prev_id": "4" }),
            json!({ "user_id": "@bob:b.example", "device_id": "A", "stream_id": 5, "prev_id": vec![1; 101] }),
            json!({ "user_id": "@bob:b.example", "device_id": "B", "stream_id": 5, "keys": keys }),
            json!({ "user_id": "@bob:b.example", "device_id": "", "stream_id": 5 }),
        ] {
            assert_eq!(change(true, &wrong), Some(Change::Unreadable), "{wrong}");
        }
        assert_eq!(change(true, &json!({ "user_id": "@bob:c.example" })), None);
        assert_eq!(change(true, &json!({})), None);
        let key = json!({ "user_id": "@bob:b.example", "usage": ["master"], "keys": { "ed25519:k": "k" } });
        let read = change(false, &json!({ "user_id": "@bob:b.example", "master_key": key }));
        assert!(matches!(read, Some(Change::SigningKeys { master_key: Some(_), self_signing_key: None })));
        let wrong = json!({ "user_id": "@bob:b.example", "self_signing_key": key });
        assert_eq!(change(false, &wrong), Some(Change::Unreadable));
    }

    #[test]
    fn lists_that_are_stale_again_wait_ever_longer_and_are_bounded() {
        let (mut stale, server) = (Stale::default(), OwnedServerName::try_from("b.example").unwrap());
        let (user, mut now, mut waits) = (bob(0), Duration::from_secs(100), Vec::new());
        assert!(stale.add(&user, now) && !stale.add(&user, now));
        for _ in 0..14 {
            let next = stale.next(&server).unwrap();
            waits.push((next.0.saturating_sub(now)).as_secs());
            now = now.max(next.0);
            stale.begin(&next, now);
            stale.add(&user, now);
        }
        assert_eq!(waits, [0, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1_024, 2_048, 3_600, 3_600]);
        let next = stale.next(&server).unwrap();
        now = next.0 + PAUSE_MAX * 3;
        stale.begin(&next, now);
        stale.add(&user, now);
        assert_eq!(stale.next(&server).unwrap().0, now + FIRST_PAUSE, "it was quiet for long");
        for number in 0..2 * WAITING_OF_SERVER_MAX {
            stale.add(&bob(number), now);
        }
        assert_eq!(stale.waiting[&server].len(), WAITING_OF_SERVER_MAX);
        for number in 0..2 * SERVERS_AT_ONCE {
            let user: OwnedUserId = format!("@a:s.d{number}").try_into().unwrap();
            stale.add(&user, now);
        }
        assert_eq!(stale.waiting.len(), SERVERS_AT_ONCE);
        let mut other = Stale::default();
        let evil = |port: usize| OwnedUserId::try_from(format!("@a:evil.example:{port}")).unwrap();
        let names = (1_000..1_100).filter(|port| other.add(&evil(*port), now));
        assert_eq!(names.count(), OF_SOURCE_AT_ONCE);
        assert!(other.add(&bob(1), now));
        for number in 0..PACES_MAX + 100 {
            stale.begin(&(now, bob(number)), now);
        }
        assert_eq!(stale.paces.len(), PACES_MAX);
    }
}
