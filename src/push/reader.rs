//! One user's reading: what counts as unread for that user, by the user's own push rules and the list of ignored users.
//!
//! If the rules of a user count in a room just as those of a class do, the room's running numbers are the answer. If they do
//! not, the user's own sync judges the unread events, after the commit and at the cost of that sync. The results are cached, so
//! that each event is judged once. All of this is bounded: an event that is not judged counts as it does for the class that
//! comes closest.

use std::{
    cell::{OnceCell, RefCell},
    collections::BTreeSet,
    ops::Bound,
    sync::Arc,
};

use quick_cache::{Weighter, sync::Cache};
use ruma::UserId;

use crate::{
    accounts::{ignored::Ignored, subscriptions},
    ids::{Order, Position, RoomNum, UserNum},
    metrics::Metrics,
    push::{
        classes::Class,
        compiled::{Compiled, Local, Threads},
        condition::{Halt, Owner},
        defaults,
        floors::Floors,
        glob::Steps,
        lanes::Lanes,
        rules,
        scene::Scene,
        unread::{self, Sums, Tally},
    },
    rooms::{event::StoredEvent, relations, state},
    schema,
    schema::event_types::{IGNORED_USER_LIST, MEMBER},
    schema::{
        push::{Lane, Outcome},
        rooms::RoomRow,
    },
    store::{Direction, Fault, Read},
};

/// At most this many unread events of a room are judged by the user's own rules; older ones count as they do for a class.
const JUDGED_MAX: usize = 1_000;
/// Judging one event takes at most this many steps. An event that takes more counts as it does for a class.
const EVENT_STEPS: u64 = 400_000;
/// One look at all rooms of a user takes at most this many steps, so that no user's rules hold up others.
const LOOK_STEPS: u64 = 10_000_000;
/// Reading an event costs at least this many steps. A longer event costs one step a byte.
const READING_STEPS: usize = 500;
/// Look at no more than this many events for the last one that a user sent; if it is none of them, counts may have changed.
const SENT_LOOKED_AT: usize = 16;
/// Say in which rooms a user's subscriptions to threads changed if at most this many did; otherwise they may have in any room.
const RESUBSCRIBED_MAX: usize = 200;
/// If a user ignores at most this many others, these are looked up among the members of a room; otherwise one of them is taken
/// to be a member.
const IGNORED_LOOKED_UP_MAX: usize = 32;
/// The cache of users' compiled rules takes at most this many bytes.
const RULES_BYTES_MAX: u64 = 32 << 20;
/// The cache of judged events takes at most this many bytes.
const JUDGED_BYTES_MAX: u64 = 32 << 20;

/// The caches of push: compiled rules and judged events. It is cheap to clone, for clones share them.
#[derive(Clone)]
pub struct Push(Arc<Inner>);

struct Inner {
    rules: Cache<UserNum, Arc<Own>, ByBytes>,
    judged: Cache<(UserNum, RoomNum), Arc<Judged>, ByBytes>,
    metrics: Metrics,
}

/// The rules of a user and the users whom they ignore, which together decide what they are notified of.
#[derive(Debug)]
struct Own {
    version: Version,
    /// The compiled rules; none if the user has the default rules and ignores nobody.
    rules: Option<Compiled>,
    /// Whether the rules ask for subscriptions to threads.
    asks_for_threads: bool,
    ignored: BTreeSet<String>,
}

/// The positions at which the rules and the list of ignored users were last written.
type Version = (Position, Position);

/// An event that notifies a user, or would if their subscription to its thread were another.
#[derive(Clone, Copy, Debug)]
struct Notified {
    order: Order,
    lane: Lane,
    /// The effect on counts; of an event in a thread the effect for who subscribes to it.
    outcome: Outcome,
    /// The effect for who does not subscribe to the thread. Outside threads it is the same.
    unsubscribed: Outcome,
}

/// The events in a part of a room's timeline that notify one user.
#[derive(Clone, Debug)]
struct Judged {
    /// The version of the rules by which they were judged.
    version: Version,
    /// The place after which events were judged.
    from: Order,
    /// The last place that was judged.
    upto: Order,
    /// The events that notify, the newest first.
    events: Vec<Notified>,
}

#[derive(Clone)]
struct ByBytes;

impl Weighter<UserNum, Arc<Own>> for ByBytes {
    fn weight(&self, _: &UserNum, own: &Arc<Own>) -> u64 {
        let ignored: usize = own.ignored.iter().map(|user| user.len() + 48).sum();
        let rules = own.rules.as_ref().map_or(0, Compiled::bytes);
        u64::try_from(size_of::<Own>() + ignored + rules).unwrap_or(u64::MAX)
    }
}

impl Weighter<(UserNum, RoomNum), Arc<Judged>> for ByBytes {
    fn weight(&self, _: &(UserNum, RoomNum), judged: &Arc<Judged>) -> u64 {
        let events = judged.events.len() * size_of::<Notified>();
        u64::try_from(size_of::<Judged>() + events).unwrap_or(u64::MAX)
    }
}

impl Push {
    /// Makes empty caches of bounded size.
    pub fn new(metrics: Metrics) -> Self {
        let rules = Cache::with_weighter(1_024, RULES_BYTES_MAX, ByBytes);
        let judged = Cache::with_weighter(4_096, JUDGED_BYTES_MAX, ByBytes);
        Self(Arc::new(Inner { rules, judged, metrics }))
    }

    /// A reader for one look at a user's rooms.
    pub fn reader<'a>(
        &'a self,
        read: &(impl Read + ?Sized),
        user: UserNum,
        user_id: &'a UserId,
    ) -> Result<Reader<'a>, Fault> {
        let own = self.find_own(read, user, user_id)?;
        let steps = RefCell::new(Steps::new(LOOK_STEPS));
        Ok(Reader { push: self, user, user_id, own, defaults: OnceCell::new(), steps })
    }

    fn find_own(
        &self,
        read: &(impl Read + ?Sized),
        user: UserNum,
        user_id: &UserId,
    ) -> Result<Arc<Own>, Fault> {
        let rules = schema::PUSH_RULES.get(read, user)?;
        let ignored = schema::ACCOUNT_DATA.get(read, (user, "", IGNORED_USER_LIST))?;
        let written = |row: &Option<schema::accounts::WrittenRow>| {
            row.as_ref().map_or(Position::ZERO, |row| row.position)
        };
        let version = (written(&rules), written(&ignored));
        if version == (Position::ZERO, Position::ZERO) {
            let (rules, ignored) = (None, BTreeSet::new());
            return Ok(Arc::new(Own { version, rules, asks_for_threads: false, ignored }));
        }
        let known = self.0.rules.get(&user).filter(|own| own.version == version);
        self.0.metrics.cache("own_push_rules", known.is_some());
        if let Some(own) = known {
            return Ok(own);
        }
        let rules = match rules {
            Some(row) => rules::decode(&row, user_id)?,
            None => defaults::default_rules(user_id),
        };
        let rules = Compiled::new(&rules, user_id);
        let own = Arc::new(Own {
            version,
            asks_for_threads: rules.ask_for_threads(),
            rules: Some(rules),
            ignored: ignored.map(|row| Ignored::parse(&row.content, user_id).into_ids()).unwrap_or_default(),
        });
        self.0.rules.insert(user, Arc::clone(&own));
        Ok(own)
    }
}

/// Counts and judges for one user, during one look at their rooms.
pub struct Reader<'a> {
    push: &'a Push,
    user: UserNum,
    user_id: &'a UserId,
    own: Arc<Own>,
    /// The default rules, once a user who has no others asked by which of them an event notifies.
    defaults: OnceCell<Compiled>,
    /// The steps that are left for this look.
    steps: RefCell<Steps>,
}

/// A room as one of its members counts it.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The number of the room.
    pub num: RoomNum,
    /// The row of the room.
    pub row: &'a RoomRow,
    /// The position at which the user joined; older events do not count.
    pub joined: Position,
}

/// The way in which a user's unread events of one room are counted.
enum Judge<'r> {
    /// The user's rules count as those of a class for each lane, so the room's running numbers answer.
    Class(Lanes),
    /// No class counts as the user's rules do, so each event must be judged by them.
    Own(Local<'r>),
}

impl Reader<'_> {
    /// The position at which the user's rules or list of ignored users last changed; counts may have changed with them.
    pub fn changed(&self) -> Position {
        self.own.version.0.max(self.own.version.1)
    }

    /// The rooms in which the user subscribed to threads or unsubscribed from them in (from, upto], which may change counts there; `None`
    /// if there are too many to say. It costs nothing for a user who never subscribed to any.
    pub fn list_resubscribed(
        &self,
        read: &(impl Read + ?Sized),
        span: (Position, Position),
    ) -> Result<Option<BTreeSet<RoomNum>>, Fault> {
        if !self.own.asks_for_threads {
            return Ok(Some(BTreeSet::new()));
        }
        let page = subscriptions::list_changes(read, self.user, span, RESUBSCRIBED_MAX)?;
        Ok((!page.has_more).then(|| page.changes.iter().map(|change| change.room).collect()))
    }

    fn is_resubscribed(
        &self,
        read: &(impl Read + ?Sized),
        room: RoomNum,
        span: (Position, Position),
    ) -> Result<bool, Fault> {
        Ok(self.list_resubscribed(read, span)?.is_none_or(|rooms| rooms.contains(&room)))
    }

    /// Counts what the user has not read of a room, up to and including a position.
    pub fn tally(
        &self,
        read: &(impl Read + ?Sized),
        place: Place<'_>,
        upto: Position,
    ) -> Result<Tally, Fault> {
        let mut floors = self.floors(read, place)?;
        self.tally_above(read, place, &mut floors, Order::upto(upto))
    }

    /// Whether the unread counts may differ from those at position `from`. They may even if the room has no other news for
    /// the user: rules have changed, something was read, or the events that count, or redactions of them, are filtered out.
    pub fn is_news(
        &self,
        read: &(impl Read + ?Sized),
        place: Place<'_>,
        from: Position,
        upto: Position,
    ) -> Result<bool, Fault> {
        let mut floors = self.floors(read, place)?;
        if floors.base() < place.row.tip
            && (self.changed() > from || self.is_resubscribed(read, place.num, (from, upto))?)
        {
            return Ok(true);
        }
        let now = self.tally_above(read, place, &mut floors, Order::upto(upto))?;
        floors.of_lane(read, Lane::MAIN)?;
        if floors.moved_after(from) {
            return Ok(true);
        }
        // Both counts leave out what is redacted now, also what still counted at `from`.
        let redacted = unread::list_redacted(read, place.num, floors.base(), Order::upto(from))?;
        if redacted.values().any(|row| row.redacted_at > from) {
            return Ok(true);
        }
        if floors.sent_after(from) {
            // A user who sends something has read what came before; that is no news where all of it was read already.
            let sent = self.find_sent(read, place, floors.base(), Order::upto(from))?;
            let Some(sent) = sent.filter(|_| now == Tally::default()) else { return Ok(true) };
            floors = floors.before_sending(sent);
        }
        Ok(now != self.tally_above(read, place, &mut floors, Order::upto(from))?)
    }

    /// Finds the newest event at or below `upto` that the user sent outside threads; `base` if there is none above that. `None`
    /// if it does not stand among the next few events.
    fn find_sent(
        &self,
        read: &(impl Read + ?Sized),
        place: Place<'_>,
        base: Order,
        upto: Order,
    ) -> Result<Option<Order>, Fault> {
        let (low, high) = (Bound::Excluded((place.num, base)), Bound::Included((place.num, upto)));
        let mut rows = schema::TIMELINE.range::<(RoomNum, Order)>(read, low, high, Direction::Down)?;
        for row in rows.by_ref().take(SENT_LOOKED_AT) {
            let ((_, order), row) = row?;
            let stored = StoredEvent { order, row };
            let is_own = *stored.row.sender() == *self.user_id.as_str() && stored.membership().is_none();
            if is_own && relations::lane_of(read, place.num, &stored)? == Lane::MAIN {
                return Ok(Some(order));
            }
        }
        Ok(rows.next().is_none().then_some(base))
    }

    fn floors<'p>(&'p self, read: &(impl Read + ?Sized), place: Place<'p>) -> Result<Floors<'p>, Fault> {
        let joined = Order::live(place.joined);
        Floors::new(read, (place.num, place.row), (self.user, self.user_id), joined)
    }

    fn tally_above(
        &self,
        read: &(impl Read + ?Sized),
        place: Place<'_>,
        floors: &mut Floors<'_>,
        upto: Order,
    ) -> Result<Tally, Fault> {
        let mut sums = Sums::default();
        if floors.base() >= upto {
            return Ok(sums.tally());
        }
        match self.judge_of(read, place)? {
            Judge::Class(mut lanes) => unread::add_of_class(&mut sums, read, &mut lanes, floors, upto)?,
            Judge::Own(local) => {
                let judged = self.judge_unread(read, place, &local, floors.base(), upto)?;
                let mut lanes = closest_to(&local);
                if judged.from > floors.base() {
                    unread::add_of_class(&mut sums, read, &mut lanes, floors, judged.from.min(upto))?;
                }
                add_judged(&mut sums, read, &judged, (floors, &mut lanes), upto)?;
            }
        }
        Ok(sums.tally())
    }

    fn judge_of(&self, read: &(impl Read + ?Sized), place: Place<'_>) -> Result<Judge<'_>, Fault> {
        let Some(rules) = &self.own.rules else { return Ok(Judge::Class(Lanes::of(Class::Default))) };
        let ignores = self.ignores_members(read, place.num)?;
        let local = rules.in_room(place.row.id.as_str());
        if !self.own.asks_for_threads {
            return Ok(match Class::of(&local) {
                Some(Class::Muted) => Judge::Class(Lanes::of(Class::Muted)),
                Some(class) if !ignores => Judge::Class(Lanes::of(class)),
                _ => Judge::Own(local),
            });
        }
        if local.is_silent() {
            return Ok(Judge::Class(Lanes::of(Class::Muted)));
        }
        let (others, threads) = local.apart_from_threads();
        Ok(match (Class::of(&others), threads) {
            // The other rules notify of nothing, but that for threads does.
            (None | Some(Class::Muted), _) | (_, Threads::Otherwise) => Judge::Own(local),
            _ if ignores => Judge::Own(local),
            (Some(class), Threads::AsOthers) => Judge::Class(Lanes::of(class)),
            (Some(class), Threads::BySubscription) => Judge::Class(Lanes::by_subscription(class)),
        })
    }

    /// Whether somebody whom the user ignores is or was in the room, so that the room's running numbers may be wrong for them.
    fn ignores_members(&self, read: &(impl Read + ?Sized), room: RoomNum) -> Result<bool, Fault> {
        let ignored = &self.own.ignored;
        if ignored.is_empty() || ignored.len() > IGNORED_LOOKED_UP_MAX {
            return Ok(!ignored.is_empty());
        }
        let keys = state::find_keys(read, room, MEMBER, ignored.iter().map(String::as_str))?;
        Ok(keys.iter().any(Option::is_some))
    }

    /// Judges the unread events of a room by the user's own rules. Events that were judged before come from the cache.
    fn judge_unread(
        &self,
        read: &(impl Read + ?Sized),
        place: Place<'_>,
        rules: &Local<'_>,
        base: Order,
        upto: Order,
    ) -> Result<Arc<Judged>, Fault> {
        let key = (self.user, place.num);
        let known = self.push.0.judged.get(&key).filter(|known| known.version == self.own.version);
        let begin = known.as_ref().map_or(base, |known| known.upto.max(base));
        if let Some(known) = &known
            && (begin >= upto || begin >= place.row.tip)
        {
            return Ok(Arc::clone(known));
        }
        let (mut events, cut) = self.judge_between(read, place, rules, begin, upto)?;
        let from = match (cut, &known) {
            (Some(cut), _) => cut,
            (None, Some(known)) if known.upto >= base => {
                events.extend(known.events.iter().filter(|event| event.order > base));
                known.from
            }
            (None, _) => begin,
        };
        let judged = Arc::new(Judged { version: self.own.version, from, upto, events });
        self.push.0.judged.insert(key, Arc::clone(&judged));
        Ok(judged)
    }

    /// Judges the events between two orders, the newest first. Answers those that notify, and up to where events were left
    /// out, if there were too many.
    fn judge_between(
        &self,
        read: &(impl Read + ?Sized),
        place: Place<'_>,
        rules: &Local<'_>,
        begin: Order,
        upto: Order,
    ) -> Result<(Vec<Notified>, Option<Order>), Fault> {
        let (low, high) = (Bound::Excluded((place.num, begin)), Bound::Included((place.num, upto)));
        let mut owner = Owner::new(self.user_id);
        let mut events = Vec::new();
        let rows = schema::TIMELINE.range::<(RoomNum, Order)>(read, low, high, Direction::Down)?;
        for (count, row) in rows.enumerate() {
            let ((_, order), row) = row?;
            let stored = StoredEvent { order, row };
            let is_paid = self.steps.borrow_mut().take(READING_STEPS.max(stored.row.json.len())).is_ok();
            if count == JUDGED_MAX || !is_paid {
                let reason =
                    if is_paid { "too many events are unread" } else { "the steps of this look are used up" };
                tracing::debug!(user = %self.user, room = %place.num, reason, "older events count as they do for a class");
                return Ok((events, Some(order)));
            }
            let judged = self.judge_one(read, place, rules, &mut owner, &stored)?;
            events.extend(judged.filter(|event| event.outcome.notify || event.unsubscribed.notify));
        }
        Ok((events, None))
    }

    /// The effect of one event on the user's counts, by the user's own rules or, if that costs too much, by the closest class; none for
    /// an event that does nothing to them.
    fn judge_one(
        &self,
        read: &(impl Read + ?Sized),
        place: Place<'_>,
        rules: &Local<'_>,
        owner: &mut Owner<'_>,
        stored: &StoredEvent,
    ) -> Result<Option<Notified>, Fault> {
        let row = &stored.row;
        if row.header.unseen || stored.order.minor != 0 || row.is_redacted() {
            return Ok(None);
        }
        let sender = row.sender();
        if *sender == *self.user_id.as_str() || self.own.ignored.contains(&*sender) {
            return Ok(None);
        }
        let Some(scene) = Scene::of_past(read, place.num, place.row, stored) else { return Ok(None) };
        let lane = relations::lane_of(read, place.num, stored)?;
        let mut look = self.steps.borrow_mut();
        let allowed = EVENT_STEPS.min(look.left());
        let mut steps = Steps::new(allowed);
        let mut judge = |subscribed: Option<bool>| {
            owner.set_subscribed(subscribed);
            let rule = rules.judge(&scene, owner, &mut steps)?;
            Ok::<_, Halt>(rule.map(|rule| rule.outcome).unwrap_or_default())
        };
        // Both effects are remembered, so that they hold whatever the user subscribes to later.
        let judged = match self.own.asks_for_threads && lane != Lane::MAIN {
            true => judge(Some(true)).and_then(|outcome| Ok((outcome, judge(Some(false))?))),
            false => judge(None).map(|outcome| (outcome, outcome)),
        };
        let taken = allowed.saturating_sub(steps.left());
        // If too few steps are left, the next event ends the look.
        look.take(usize::try_from(taken).unwrap_or(usize::MAX)).unwrap_or(());
        let (outcome, unsubscribed) = match judged {
            Ok(outcomes) => outcomes,
            Err(Halt::Fault(fault)) => return Err(fault),
            Err(Halt::OutOfSteps) => {
                let reason = "judging it by the user's own rules takes too many steps";
                tracing::debug!(user = %self.user, room = %place.num, event = %stored.event(), reason, "an event counts by class");
                self.judge_by_class(rules, &scene, lane)?
            }
        };
        Ok(Some(Notified { order: stored.order, lane, outcome, unsubscribed }))
    }
}

/// The classes that come closest to these rules, for events that are not judged by the rules themselves.
fn closest_to(rules: &Local<'_>) -> Lanes {
    let (others, threads) = rules.apart_from_threads();
    let class = Class::closest_to(&others);
    match threads {
        Threads::BySubscription => Lanes::by_subscription(class),
        Threads::AsOthers | Threads::Otherwise => Lanes::of(class),
    }
}

/// Adds the judged events that the user has not read and that were not redacted since.
fn add_judged(
    sums: &mut Sums,
    read: &(impl Read + ?Sized),
    judged: &Judged,
    (floors, lanes): (&mut Floors<'_>, &mut Lanes),
    upto: Order,
) -> Result<(), Fault> {
    let is_unread = |order: Order, base: Order| order > base && order > judged.from && order <= upto;
    let base = floors.base();
    let unread: Vec<_> = judged.events.iter().filter(|event| is_unread(event.order, base)).collect();
    if unread.is_empty() {
        return Ok(());
    }
    let redacted = unread::list_redacted(read, floors.room(), base, upto)?;
    let of = (floors.user(), floors.room());
    for Notified { order, lane, outcome, unsubscribed } in unread {
        let shown = floors.shown(read, *lane)?;
        if *order > floors.of_lane(read, shown)? && !redacted.contains_key(order) {
            let is_alike = outcome == unsubscribed || lanes.is_subscribed(read, of, *lane)?;
            sums.add(shown, if is_alike { *outcome } else { *unsubscribed });
        }
    }
    Ok(())
}

mod again;
mod explain;

pub use again::{Invitation, Notifies};
pub use explain::Explained;

#[cfg(test)]
mod tests {
    use ruma::push::{NewPushRule, NewSimplePushRule};
    use serde_json::json;

    use super::*;
    use crate::{
        accounts::Caller,
        env::Env,
        flows::{
            App,
            account::{keep, push_rules},
        },
        server::Server,
    };

    /// The rules and the ignored users of a caller, as the cache gives them.
    fn find(app: &App, caller: &Caller) -> Arc<Own> {
        let snapshot = app.store.snapshot();
        let own = app.push.find_own(&*snapshot, caller.user, &caller.user_id).unwrap();
        let read = Push::new(Metrics::new()).find_own(&*snapshot, caller.user, &caller.user_id).unwrap();
        assert_eq!((own.version, &own.ignored), (read.version, &read.ignored));
        own
    }

    #[tokio::test(start_paused = true)]
    async fn compiled_rules_follow_the_rules_and_the_ignored_users_of_their_owner() {
        let server = Server::in_memory(Env::simulated(1, 0));
        let (app, alice) = (server.app(), server.register("alice").await);
        assert!(find(app, &alice).rules.is_none());
        let list = json!({ "ignored_users": { "@bob:x": {} } }).to_string().into();
        keep::keep_account_data(app, &alice, None, IGNORED_USER_LIST.to_owned(), list).await.unwrap();
        let ignores = find(app, &alice);
        assert_eq!(ignores.ignored, BTreeSet::from(["@bob:x".to_owned()]));
        assert!(Arc::ptr_eq(&ignores, &find(app, &alice)), "what did not change is compiled once");
        let room = ruma::RoomId::parse("!room:x").unwrap();
        let rule = NewPushRule::Room(NewSimplePushRule::new(room, Vec::new()));
        let change = |rules: &mut ruma::push::Ruleset| rules::insert(rules, rule, None, None);
        push_rules::change(app, &alice, change).await.unwrap();
        let ruled = find(app, &alice);
        assert!(ruled.version.0 > ignores.version.0 && ruled.ignored == ignores.ignored);
    }

    #[test]
    fn rules_and_judged_events_are_bounded_by_their_bytes() {
        let push = Push::new(Metrics::new());
        let version = (Position::ZERO, Position::ZERO);
        let ignored = (0..1_000).map(|number| format!("@user{number}:a.example")).collect();
        let own = Arc::new(Own { version, rules: None, asks_for_threads: false, ignored });
        let (outcome, unsubscribed) = (Outcome::default(), Outcome::default());
        let notified = Notified { order: Order::MIN, lane: Lane::MAIN, outcome, unsubscribed };
        let events = vec![notified; JUDGED_MAX];
        let judged = Arc::new(Judged { version, from: Order::MIN, upto: Order::MIN, events });
        for number in 0..4_000 {
            push.0.rules.insert(UserNum(number), Arc::clone(&own));
            push.0.judged.insert((UserNum(number), RoomNum(1)), Arc::clone(&judged));
        }
        assert!(push.0.rules.len() > 100 && push.0.rules.weight() <= RULES_BYTES_MAX);
        assert!(push.0.judged.len() > 100 && push.0.judged.weight() <= JUDGED_BYTES_MAX);
    }
}

#[cfg(test)]
mod bounds;
