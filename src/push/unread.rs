//! Unread counts that cost nothing a member.
//!
//! Each event is judged once a *class* of rules, and the running number of each class stands beside the event. Unread
//! is the number now less the number at the receipt. Only where an event does something else to one user than to the
//! user's class (who sent it, who is mentioned, who has rules of their own) is there a row for that user.

use std::{
    collections::BTreeMap,
    ops::Bound,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use quick_cache::sync::Cache;
use ruma::{EventId, UserId};

use crate::{
    accounts,
    ids::{EventNum, Order, RoomNum, UserNum},
    metrics::Metrics,
    push::{
        defaults,
        evaluate::{Class, Scene},
        rules,
    },
    rooms::{
        change::Change,
        event::{self, Stored},
        members,
        receipts::ReadUpTo,
    },
    schema,
    schema::{
        push::{Lane, Outcome, Outcomes, OwnOutcome, RedactedOutcome, Totals},
        rooms::{Membership, RoomRow},
    },
    store::{Batch, Direction, Fault, Read},
};

/// Rooms whose users with own rules are remembered.
const ROOMS_KEPT: usize = 4_096;
/// Mentions in one event beyond this notify nobody.
const MENTIONS_MAX: usize = 200;
/// Threads with news, and rows of a user's own, that are counted; more unread than that is as good as that.
const THREADS_COUNTED: usize = 500;
const OWN_COUNTED: usize = 5_000;
/// Rows that one receipt sweeps away; the next goes on.
const SWEPT: usize = 200;

/// What push keeps in memory. Cheap to clone.
#[derive(Clone)]
pub struct Push(Arc<Inner>);

struct Inner {
    /// Users in a room who have own rules, and the generation in which that was looked up.
    own: Cache<RoomNum, (u64, Arc<[UserNum]>)>,
    /// Rises when somebody has own rules who had none.
    generation: AtomicU64,
    metrics: Metrics,
}

impl Default for Push {
    fn default() -> Self {
        Self::new(Metrics::new())
    }
}

impl Push {
    /// Nothing is remembered yet.
    pub fn new(metrics: Metrics) -> Self {
        Self(Arc::new(Inner { own: Cache::new(ROOMS_KEPT), generation: AtomicU64::new(0), metrics }))
    }

    /// Somebody has own rules now. Called after the batch that says so is accepted.
    pub fn rules_changed(&self) {
        self.0.generation.fetch_add(1, Ordering::SeqCst);
    }

    /// Somebody came to a room or left it. Called under the room's lock.
    fn members_changed(&self, room: RoomNum) {
        self.0.own.remove(&room);
    }

    fn with_own_rules(&self, batch: &Batch, room: RoomNum) -> Result<Arc<[UserNum]>, Fault> {
        let generation = self.0.generation.load(Ordering::SeqCst);
        let known = self.0.own.get(&room).filter(|(of, _)| *of == generation);
        self.0.metrics.cache("own_push_rules", known.is_some());
        if let Some((_, users)) = known {
            return Ok(users);
        }
        let joined = members::list_joined_local_users(batch, room)?;
        let rows = schema::PUSH_RULES.get_many(batch, joined.iter().copied())?;
        let own = joined.into_iter().zip(rows).filter(|(_, row)| row.is_some()).map(|(user, _)| user);
        let own: Arc<[UserNum]> = own.collect();
        self.0.own.insert(room, (generation, Arc::clone(&own)));
        Ok(own)
    }
}

/// Writes what an event does to counts. Part of the event's batch, under the room's lock, after its member rows.
pub fn count(change: &mut Change, push: &Push, stored: &Stored) -> Result<(), Fault> {
    let Change { batch, num, row, unread, .. } = change;
    let room = *num;
    if stored.row.header.unseen || stored.order.minor != 0 {
        return Ok(());
    }
    if stored.membership().is_some() {
        push.members_changed(room);
    }
    let Some(mut scene) = Scene::new(row, stored) else { return Ok(()) };
    let own_rules = push.with_own_rules(batch, room)?;
    if scene.mentions_room() || !own_rules.is_empty() {
        scene.load_power_levels(batch, room)?;
    }
    let classes = scene.outcomes();
    let lane = lane_of(batch, room, &scene)?;
    if classes != Outcomes::default() {
        let before = match *unread {
            Some(known) if lane == Lane::MAIN => known,
            _ => totals(batch, room, lane, Order::MAX)?,
        };
        let after = before.plus(classes);
        put_totals(batch, room, lane, stored.order, after)?;
        if lane == Lane::MAIN {
            *unread = Some(after);
        }
    }
    for user in exceptions(batch, room, &scene, &own_rules, classes)? {
        let (own, class) = judge(batch, room, row, &scene, user)?;
        if own != class.outcome(classes) {
            schema::UNREAD_OWN.put(batch, (room, user, stored.order), &OwnOutcome { lane, own, classes });
        }
    }
    Ok(())
}

/// What the event does to one user, and the user's class.
fn judge(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    row: &RoomRow,
    scene: &Scene<'_>,
    user: UserNum,
) -> Result<(Outcome, Class), Fault> {
    let nothing = (Outcome::default(), Class::Default);
    let Some(account) = accounts::users::find(read, user)? else { return Ok(nothing) };
    let user_id = account.user_id;
    let own = rules::find_own_rules(read, user, &user_id)?;
    let class = own.as_ref().map_or(Class::Default, |rules| Class::of(rules, row.id.as_str()));
    // Nobody is told of what they did themselves; no need to ask the rules.
    if scene.text("sender") == Some(user_id.as_str()) {
        return Ok((Outcome::default(), class));
    }
    let outcome = match own {
        Some(rules) => scene.outcome(&rules, &user_id, &display_name(read, room, &user_id)?),
        // The default rules do not ask for the name.
        None => scene.outcome(&defaults::default_rules(&user_id), &user_id, ""),
    };
    Ok((outcome, class))
}

/// The users of this server in the room to whom the event may do something else than to their class.
fn exceptions(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    scene: &Scene<'_>,
    own_rules: &[UserNum],
    classes: Outcomes,
) -> Result<Vec<UserNum>, Fault> {
    let mut users = own_rules.to_vec();
    // To its sender an event does nothing: an exception only where it does something to others.
    let sender = scene.text("sender").filter(|_| classes != Outcomes::default());
    for user_id in scene.mentioned().take(MENTIONS_MAX).chain(sender) {
        let Ok(user_id) = <&UserId>::try_from(user_id) else { continue };
        users.extend(accounts::users::find_num(read, user_id)?);
    }
    users.sort_unstable();
    users.dedup();
    let mut joined = Vec::with_capacity(users.len());
    for user in users {
        if schema::ROOM_USER.get(read, (room, user))? == Some(Membership::Join) {
            joined.push(user);
        }
    }
    Ok(joined)
}

fn display_name(read: &(impl Read + ?Sized), room: RoomNum, user_id: &UserId) -> Result<String, Fault> {
    #[derive(serde::Deserialize)]
    struct Content {
        displayname: Option<String>,
    }
    let member = crate::rooms::find_state(read, room, "m.room.member", user_id.as_str())?;
    let content = member.and_then(|member| serde_json::from_str::<Content>(member.row.content()).ok());
    Ok(content.and_then(|content| content.displayname).unwrap_or_else(|| user_id.localpart().to_owned()))
}

/// The thread that an event says it stands in.
fn lane_of(read: &(impl Read + ?Sized), room: RoomNum, scene: &Scene<'_>) -> Result<Lane, Fault> {
    if scene.text(r"content.m\.relates_to.rel_type") != Some("m.thread") {
        return Ok(Lane::MAIN);
    }
    let root = scene.text(r"content.m\.relates_to.event_id").and_then(|id| <&EventId>::try_from(id).ok());
    let root = root.map(|id| event::find_num(read, room, id)).transpose()?.flatten();
    Ok(root.map_or(Lane::MAIN, Lane::thread))
}

fn put_totals(
    batch: &mut Batch,
    room: RoomNum,
    lane: Lane,
    order: Order,
    totals: Totals,
) -> Result<(), Fault> {
    schema::UNREAD.put(batch, (room, lane, order), &totals);
    if lane != Lane::MAIN {
        if let Some(last) = schema::UNREAD_THREAD.get(batch, (room, lane))? {
            schema::UNREAD_THREAD_LOG.delete(batch, (room, last));
        }
        schema::UNREAD_THREAD.put(batch, (room, lane), &order);
        schema::UNREAD_THREAD_LOG.put(batch, (room, order), &lane);
    }
    Ok(())
}

/// The running numbers of a lane up to and including an order.
fn totals(read: &(impl Read + ?Sized), room: RoomNum, lane: Lane, upto: Order) -> Result<Totals, Fault> {
    let (low, high) = (Bound::Included((room, lane, Order::MIN)), Bound::Included((room, lane, upto)));
    let mut rows = schema::UNREAD.range::<(RoomNum, Lane, Order)>(read, low, high, Direction::Down)?;
    Ok(rows.next().transpose()?.map(|(_, totals)| totals).unwrap_or_default())
}

/// An event that stood at this order is redacted: it no longer counts. `original` is the event as it was. Part of the
/// redaction's batch, under the room's lock.
pub fn uncount(batch: &mut Batch, room: RoomNum, row: &RoomRow, original: &Stored) -> Result<(), Fault> {
    let Some(scene) = Scene::new(row, original) else { return Ok(()) };
    let lane = lane_of(batch, room, &scene)?;
    let counted = schema::UNREAD.get(batch, (room, lane, original.order))?;
    let classes = counted.map(|totals| totals.last).unwrap_or_default();
    schema::UNREAD_REDACTED.put(batch, (room, original.order), &RedactedOutcome { lane, classes });
    Ok(())
}

/// A user has read everything up to and including this order: rows that only counted go. Those of highlights stay, for
/// whoever asks later what there was.
pub fn forget_read(batch: &mut Batch, room: RoomNum, user: UserNum, upto: Order) -> Result<(), Fault> {
    let (low, high) = (Bound::Included((room, user, Order::MIN)), Bound::Included((room, user, upto)));
    let mut read = Vec::new();
    for row in
        schema::UNREAD_OWN.range::<(RoomNum, UserNum, Order)>(batch, low, high, Direction::Down)?.take(SWEPT)
    {
        let ((.., order), row) = row?;
        if !row.own.highlight {
            read.push(order);
        }
    }
    for order in read {
        schema::UNREAD_OWN.delete(batch, (room, user, order));
    }
    Ok(())
}

/// Unread events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unread {
    /// Those that notify.
    pub notifications: u64,
    /// Those of them that highlight.
    pub highlights: u64,
}

/// What a user has not read of a room.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Outside threads.
    pub main: Unread,
    /// By the thread's root; only threads in which something is unread.
    pub threads: BTreeMap<EventNum, Unread>,
}

impl Tally {
    /// In threads and outside.
    pub fn total(&self) -> Unread {
        self.threads.values().fold(self.main, |sum, thread| Unread {
            notifications: sum.notifications + thread.notifications,
            highlights: sum.highlights + thread.highlights,
        })
    }
}

/// Whose reading is counted.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a> {
    /// The user.
    pub user: UserNum,
    /// The user's class in the room.
    pub class: Class,
    /// When the user came: what is older does not count.
    pub joined: Order,
    /// How far the user has read.
    pub read: &'a ReadUpTo,
}

/// Signed numbers, since what is subtracted may come first.
type Sums = BTreeMap<Lane, (i64, i64)>;

/// What a user has not read of a room up to and including an order.
pub fn tally(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    reader: &Reader<'_>,
    upto: Order,
) -> Result<Tally, Fault> {
    let base = reader.read.all.unwrap_or_default().max(reader.joined);
    let mut floors = BTreeMap::from([(Lane::MAIN, reader.read.main.unwrap_or_default().max(base))]);
    for (root, order) in reader.read.threads.iter().filter(|(_, order)| **order > base) {
        let root = EventId::parse(root.as_str()).ok().map(|root| event::find_num(read, room, &root));
        if let Some(root) = root.transpose()?.flatten() {
            floors.insert(Lane::thread(root), *order);
        }
    }
    let floor = |lane: Lane| floors.get(&lane).copied().unwrap_or(base);
    let mut sums = Sums::new();
    if base >= upto {
        return Ok(Tally::default());
    }
    for lane in lanes_with_news(read, room, base, upto)? {
        let (was, is) = (totals(read, room, lane, floor(lane))?, totals(read, room, lane, upto)?);
        if let Some(sum) = difference(reader.class, was, is) {
            sums.insert(lane, sum);
        }
    }
    let redacted = list_redacted(read, room, base, upto)?;
    for (order, row) in &redacted {
        if *order > floor(row.lane) {
            let counted = reader.class.outcome(row.classes);
            add(&mut sums, row.lane, -i64::from(counted.notify), -i64::from(counted.highlight));
        }
    }
    let (low, high) =
        (Bound::Excluded((room, reader.user, base)), Bound::Included((room, reader.user, upto)));
    let own = schema::UNREAD_OWN.range::<(RoomNum, UserNum, Order)>(read, low, high, Direction::Down)?;
    for row in own.take(OWN_COUNTED) {
        let ((.., order), row) = row?;
        if order > floor(row.lane) && !redacted.contains_key(&order) {
            let class = reader.class.outcome(row.classes);
            let more = |own: bool, class: bool| i64::from(own) - i64::from(class);
            let (notify, highlight) =
                (more(row.own.notify, class.notify), more(row.own.highlight, class.highlight));
            add(&mut sums, row.lane, notify, highlight);
        }
    }
    Ok(settled(sums))
}

fn lanes_with_news(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    base: Order,
    upto: Order,
) -> Result<Vec<Lane>, Fault> {
    let (low, high) = (Bound::Excluded((room, base)), Bound::Included((room, upto)));
    let threads = schema::UNREAD_THREAD_LOG.range::<(RoomNum, Order)>(read, low, high, Direction::Down)?;
    let threads = threads.take(THREADS_COUNTED).map(|row| row.map(|(_, lane)| lane));
    std::iter::once(Ok(Lane::MAIN)).chain(threads).collect()
}

fn difference(class: Class, was: Totals, is: Totals) -> Option<(i64, i64)> {
    let ((was_notify, was_highlight), (notify, highlight)) = match class {
        Class::Default => (was.default, is.default),
        Class::Mentions => (was.mentions, is.mentions),
        Class::Muted => return None,
    };
    let less = |is: u64, was: u64| i64::try_from(is.saturating_sub(was)).unwrap_or(i64::MAX);
    Some((less(notify, was_notify), less(highlight, was_highlight)))
}

fn list_redacted(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    base: Order,
    upto: Order,
) -> Result<BTreeMap<Order, RedactedOutcome>, Fault> {
    let (low, high) = (Bound::Excluded((room, base)), Bound::Included((room, upto)));
    let rows = schema::UNREAD_REDACTED.range::<(RoomNum, Order)>(read, low, high, Direction::Down)?;
    rows.take(OWN_COUNTED).map(|row| row.map(|((_, order), row)| (order, row))).collect()
}

fn add(sums: &mut Sums, lane: Lane, notify: i64, highlight: i64) {
    let sum = sums.entry(lane).or_default();
    sum.0 = sum.0.saturating_add(notify);
    sum.1 = sum.1.saturating_add(highlight);
}

fn settled(sums: Sums) -> Tally {
    let mut tally = Tally::default();
    for (lane, (notify, highlight)) in sums {
        let unread = Unread {
            notifications: u64::try_from(notify).unwrap_or(0),
            highlights: u64::try_from(highlight).unwrap_or(0),
        };
        match lane.root() {
            None => tally.main = unread,
            Some(root) if unread != Unread::default() => {
                tally.threads.insert(root, unread);
            }
            Some(_) => {}
        }
    }
    tally
}
