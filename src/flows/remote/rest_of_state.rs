//! Fetches the state of a room that was joined without its members (`docs/decisions/partial-state-joins.md`): from the server that
//! let us in, and then from others that are said to be in the room. A server is asked for the state before the event that our join
//! cites, which is followed by that event; where the join cites several, for the state before the join.
//!
//! A state with nobody of a server that is in the room by the word of the one that let us in is doubted: either of them may lie. So such
//! servers are asked for theirs first, and at the next try the state counts, so that nobody holds up the others by naming who is
//! not there.
//!
//! Nothing is noted of how far this came: what was fetched and learned is there, and is found again by the next try.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use ruma::{OwnedEventId, OwnedServerName, ServerName};

use super::{
    brought,
    fetch::{Budget, Fetch},
    gaps, left_out,
    states::{self, Named},
};
use crate::{
    error::{Error, Result},
    flows::{App, commit, room::ingest::revise},
    ids::{EventNum, RoomNum, StateKeyNum},
    rooms::{
        self,
        change::{Change, left_out::LeftOut},
        event, members,
        state::{self, StateRef, StateValue},
    },
    schema::{
        event_types::{CREATE, MEMBER},
        rooms::PartialState,
    },
    store::{Fault, Snapshot, timer::Timer},
};

/// One try takes at most this long.
const TAKES_MAX: Duration = Duration::from_secs(1_800);
/// One try asks at most this many questions.
const REQUESTS_MAX: usize = 2_500;
/// One try asks for at most this many single events.
const EVENTS_MAX: usize = 5_000;
/// The state of a room that is joined without its members has at most this many events, as that of a room that is joined whole.
const STATE_MAX: usize = 400_000;
/// This many tries demand all events of a state, because servers that do not answer mostly come back.
const WHOLE_TRIES: u32 = 5;
/// This many tries leave it at that where a state has nobody of a server that is said to be in the room, and none of those that are asked
/// themselves gives one.
const DOUBTING_TRIES: u32 = 1;
/// At most this many of the servers of which a state has nobody are asked for theirs.
const DESERTED_ASKED_MAX: usize = 2;
/// Such a server gives the state within this time.
const DESERTED_TAKES_MAX: Duration = Duration::from_secs(30);
/// After so many tries, which take a day, the states of earlier stays are given up: the room is of use without them.
const EARLIER_TRIES_MAX: u32 = 14;
/// A server gives the whole state within this time, or another one is asked.
const FETCHING_TAKES_MAX: Duration = Duration::from_secs(300);
/// A server that refuses is asked for another event's state if it did so within this time.
const REFUSES_WITHIN: Duration = Duration::from_secs(10);

/// Completes the state of a room, or where that is whole the state of the latest earlier stay of ours there, and fires the timer of
/// the job. Gives `false` where there is nothing to complete: all is whole or given up, or nobody of ours is in the room any more.
/// Errors: [`Error::Remote`] where no server gave a state that can be used.
pub(crate) async fn complete(app: &App, room: RoomNum, timer: &Timer) -> Result<bool> {
    let snapshot = app.store.snapshot();
    let row = rooms::require_row(&*snapshot, room)?;
    let is_in = members::is_server_joined(&*snapshot, room, app.config.server.name.as_str())?;
    drop(snapshot);
    let Some(stay) = row.incomplete().filter(|_| is_in) else {
        app.completing.note();
        return Ok(false);
    };
    let (join, is_earlier) = (stay.join, row.partial.is_none());
    if is_earlier && timer.row.tries >= EARLIER_TRIES_MAX {
        tracing::warn!(%room, "nobody gives the state of an earlier stay in a room; it is given up");
        commit::in_room(app, room, move |change| change.give_up_stays(join)).await?;
        return Ok(false);
    }
    if !stay.is_filled {
        let tries = timer.row.tries;
        let wanted = Wanted { stay: stay.clone(), is_earlier, tries };
        fill(app, room, &wanted).await?;
    }
    revise::revise(app, room, timer).await?;
    // Events that came after a gap may have waited for this.
    app.staged.hurry(room);
    app.completing.note();
    Ok(true)
}

/// The state that is to be completed.
struct Wanted {
    stay: PartialState,
    /// Whether the stay is over, and another one followed.
    is_earlier: bool,
    /// The number of tries that failed.
    tries: u32,
}

impl Wanted {
    /// Whether the state is taken though events of it are lost on the way.
    fn may_lack(&self) -> bool {
        self.tries >= WHOLE_TRIES
    }
}

/// The outcome of asking a server that gave a state.
enum Given {
    /// The state was learnt.
    Learnt,
    /// It has nobody of these servers, who are in the room by the word of the one that let us in.
    Deserts(Vec<OwnedServerName>),
}

/// How a server is asked for the state.
#[derive(Clone, Copy)]
struct Asking {
    /// It gives the state within this time.
    within: Duration,
    /// Whether the state counts, whoever else is said to be in the room.
    is_believed: bool,
}

/// Our join, and the events that it cites.
struct Join {
    num: EventNum,
    id: OwnedEventId,
    prev: Vec<OwnedEventId>,
}

async fn fill(app: &App, room: RoomNum, wanted: &Wanted) -> Result<()> {
    let partial = &wanted.stay;
    let budget = Budget::new(app, TAKES_MAX, REQUESTS_MAX, EVENTS_MAX);
    let via = OwnedServerName::try_from(partial.via.as_str()).into_iter().collect();
    let mut fetch = Fetch::begin(app, room, via, budget).await?;
    let (owned, row, num) = (app.clone(), fetch.row.clone(), partial.join);
    let find = move || {
        let stored = event::require(&*owned.store.snapshot(), room, num)?;
        let parsed = event::StateEvent::read(&row, &stored)?;
        Ok(Join { num, id: parsed.parsed.id.clone(), prev: parsed.parsed.prev.clone() })
    };
    let join = app.env.blocking(find).await?;
    let (mut failed, mut fullest, mut doubted) = (None, states::Fullest::default(), None);
    let asking = Asking { within: FETCHING_TAKES_MAX, is_believed: wanted.may_lack() };
    for server in fetch.servers.clone() {
        match fill_boxed(&mut fetch, (&server, asking), &join, wanted, &mut fullest).await {
            Ok(Given::Learnt) => return Ok(()),
            Ok(Given::Deserts(deserted)) => note_doubted(room, &mut doubted, server, deserted),
            Err(error @ Error::Remote { .. }) => failed = Some(note_failure(room, &server, error)),
            Err(other) => return Err(other),
        }
    }
    let Some((_, deserted)) = &doubted else {
        return Err(failed.unwrap_or_else(|| Error::Busy { retry_after: Duration::from_secs(60) }));
    };
    // Their answers are held against nobody else's, and nobody else's against it.
    let mut apart = states::Fullest::default();
    let within = Asking { within: DESERTED_TAKES_MAX, is_believed: false };
    for server in choose_deserted(&fetch, deserted.clone()) {
        fetch.servers.push(server.clone());
        match fill_boxed(&mut fetch, (&server, within), &join, wanted, &mut apart).await {
            Ok(Given::Learnt) => return Ok(()),
            Ok(Given::Deserts(deserted)) => note_doubted(room, &mut doubted, server, deserted),
            Err(error @ Error::Remote { .. }) => drop(note_failure(room, &server, error)),
            Err(other) => return Err(other),
        }
    }
    if let Some((server, _)) = doubted.filter(|_| wanted.tries >= DOUBTING_TRIES) {
        let asking = Asking { is_believed: true, ..asking };
        if let Given::Learnt = fill_boxed(&mut fetch, (&server, asking), &join, wanted, &mut fullest).await? {
            return Ok(());
        }
    }
    Err(Error::Remote {
        server: partial.via.clone(),
        cause: "it named servers who are in a room, of whom others give a state with nobody".to_owned(),
    })
}

fn note_failure(room: RoomNum, server: &ServerName, error: Error) -> Error {
    tracing::info!(%room, %server, %error, "a server did not give the state of a room that was joined without its members");
    error
}

/// A server that gave a state, and the servers of which it has nobody though they are said to be in the room.
type Doubted = (OwnedServerName, Vec<OwnedServerName>);

/// Notes a state that has nobody of some servers. Of several, the first with the fewest of these counts.
fn note_doubted(
    room: RoomNum,
    doubted: &mut Option<Doubted>,
    server: OwnedServerName,
    deserted: Vec<OwnedServerName>,
) {
    tracing::info!(%room, %server, missing = deserted.len(), "a server gave a state with nobody of others who are said to be in the room");
    if doubted.as_ref().is_none_or(|(_, fewest)| deserted.len() < fewest.len()) {
        *doubted = Some((server, deserted));
    }
}

/// Chooses some of the servers that a state has nobody of, who have not been asked for theirs.
fn choose_deserted(fetch: &Fetch<'_>, mut deserted: Vec<OwnedServerName>) -> Vec<OwnedServerName> {
    deserted.retain(|server| !fetch.servers.contains(server));
    let mut chosen = Vec::new();
    while chosen.len() < DESERTED_ASKED_MAX && !deserted.is_empty() {
        let at = usize::try_from(fetch.app.env.random_below(deserted.len() as u64)).unwrap_or(0);
        chosen.push(deserted.swap_remove(at));
    }
    chosen
}

/// Asks one server for the state, and learns what it gives. The future is large, and lies in the heap, so that whoever waits for it stays
/// small on the stack.
fn fill_boxed<'a>(
    fetch: &'a mut Fetch<'_>,
    asked: (&'a ServerName, Asking),
    join: &'a Join,
    wanted: &'a Wanted,
    fullest: &'a mut states::Fullest,
) -> impl Future<Output = Result<Given>> + 'a {
    Box::pin(fill_from(fetch, asked, join, wanted, fullest))
}

async fn fill_from(
    fetch: &mut Fetch<'_>,
    (server, asking): (&ServerName, Asking),
    join: &Join,
    wanted: &Wanted,
    fullest: &mut states::Fullest,
) -> Result<Given> {
    let Wanted { stay: partial, is_earlier, .. } = wanted;
    let (app, room, began) = (fetch.app.clone(), fetch.num, fetch.app.env.uptime());
    let fault = |cause: &str| Error::Remote { server: server.to_string(), cause: cause.to_owned() };
    // Servers of the room may not have heard of our join yet, but know the event that it cites.
    let mut at = match &*join.prev {
        [prev] => prev.clone(),
        _ => join.id.clone(),
    };
    // The future that fetches a state is large, and lies in the heap, so that whoever waits for it stays small on the stack.
    let fetching = Box::pin(async {
        let mut ids = states::ids(fetch, server, &at, STATE_MAX).await;
        if matches!(ids, Err(Error::Remote { .. }))
            && at != join.id
            && app.env.uptime().saturating_sub(began) < REFUSES_WITHIN
        {
            (at, ids) = (join.id.clone(), states::ids(fetch, server, &join.id, STATE_MAX).await);
        }
        let ids = ids?;
        let missing = states::missing(fetch, server, &at, &ids).await?;
        Ok::<_, Error>((ids, missing))
    });
    let (mut ids, missing) = tokio::select! {
        biased;
        fetched = fetching => fetched?,
        () = app.env.sleep(asking.within) => return Err(fault("it did not give the state in time")),
    };
    if !fullest.is_within(ids.state.len()) {
        return Err(fault("it gave a state of fewer events than another server"));
    }
    // From here to the end of learning, nothing that was fetched may be swept.
    let unswept = gaps::keep_unswept(&app, room).await;
    let _unswept = unswept.ok_or(Error::Busy { retry_after: Duration::from_secs(10) })?;
    // Until there is a place for working on the state that came, it counts as an answer, for a bounded time.
    let _place = states::bring(fetch, missing, ids.state.len()).await?;
    if at != join.id {
        // The join stands behind this event, and not before it.
        states::bring_missing(fetch, vec![at.clone()]).await?;
        ids.state.push(at.clone());
    }
    let claim = gaps::claim_history(&app, room).await;
    let _claim = claim.ok_or(Error::Busy { retry_after: Duration::from_secs(10) })?;
    let (owned, state, partial) = (app.clone(), ids.state.clone(), partial.clone());
    let via = partial.via.clone();
    let last = (at != join.id).then(|| at.clone());
    // Events that an earlier stay leaves out are not remembered, because they could not be told from those of now.
    let later = if *is_earlier { Default::default() } else { fetch.unbelieved.list_later() };
    let (row, mut later) = (fetch.row.clone(), later);
    let compare = move || {
        let snapshot = owned.store.snapshot();
        let Some(mut compared) =
            list_unknown(&snapshot, (room, row.version), (&state, last.as_ref()), &partial)?
        else {
            return Ok(None);
        };
        later.retain(|(id, _)| !matches!(states::find(&snapshot, (room, row.version), id), Ok(Some(_))));
        let state: BTreeSet<&OwnedEventId> = state.iter().collect();
        let left_out = later.iter().filter_map(|(id, json)| {
            brought::left_out(room, &row, json, state.contains(id)).map(|event| (id.clone(), event))
        });
        let mut left_out: BTreeMap<OwnedEventId, LeftOut> = left_out.collect();
        if let Some(last) = &last {
            forget_replaced(&snapshot, (room, row.version), last, &mut left_out)?;
        }
        let at = StateRef::Main(partial.base);
        for (id, event) in left_out.iter().filter(|(_, event)| event.is_state) {
            let (is_last, is_member) = (last.as_ref() == Some(id), event.event_type == MEMBER);
            if !is_last && (!is_member || event::is_of(&event.state_key, &partial.us)) {
                continue;
            }
            let Some(key) = state::find_key(&*snapshot, room, &event.event_type, &event.state_key)? else {
                continue;
            };
            if is_last {
                // The event that it took the place of would stand where it is to come.
                compared.unknown.retain(|(of, _)| *of != key);
            }
            // A member event that was presumed is not so here, and would stand where the true one is to come.
            if is_member && state::at(&*snapshot, room, at, key)? != StateValue::Absent {
                compared.unknown.push((key, StateValue::Absent));
            }
        }
        Ok(Some((compared, left_out)))
    };
    let (Compared { unknown, mut lacking, deserted }, left_out) =
        app.env.blocking(compare).await?.ok_or_else(|| fault("it gave no state of the room"))?;
    let is_all_here = lacking.is_empty() && left_out.is_empty();
    if !deserted.is_empty() && is_all_here && !asking.is_believed && *server != *via {
        // Who let us in is believed more, and mostly comes back.
        return Ok(Given::Deserts(deserted));
    }
    // Nothing is lost that is tried again later.
    lacking.retain(|id| !left_out.contains_key(id));
    if states::lacks_much(lacking.len(), ids.state.len()) {
        return Err(fault("it gave a state whose events it does not give"));
    }
    if !wanted.may_lack() && lacking.iter().any(|id| *is_earlier || !fetch.unbelieved.contains(id)) {
        fullest.note(ids.state.len(), lacking.len());
        return Err(fault(
            "it gave a state of which it did not give some events, which may come at the next try",
        ));
    }
    if !lacking.is_empty() {
        tracing::info!(%room, lacking = lacking.len(), "the state of a room lacks events that nobody gave, or that are forged");
    }
    tracing::debug!(%room, %server, keys = unknown.len(), left_out = left_out.len(), "the state of a room is learned that was joined without its members");
    let (owned, left_out) = (app.clone(), left_out.into_values().collect::<Vec<_>>());
    let after = move |change: &mut Change| Ok(left_out::remember_more(&owned, change, &left_out)?);
    revise::learn(&app, room, join.num, unknown, after).await?;
    Ok(Given::Learnt)
}

/// Counts what the last event of a state took the place of as no part of it: the state before that event was given, and then the event.
fn forget_replaced(
    read: &Snapshot,
    (room, version): (RoomNum, u8),
    last: &OwnedEventId,
    left_out: &mut BTreeMap<OwnedEventId, LeftOut>,
) -> Result<(), Fault> {
    let name = match left_out.get(last) {
        Some(event) => Some((event.event_type.clone(), event.state_key.clone())),
        None => match states::find(read, (room, version), last)?.and_then(|found| found.key()) {
            Some(key) => state::key_name(read, room, key)?,
            None => None,
        },
    };
    let Some((event_type, state_key)) = name else { return Ok(()) };
    for (id, event) in left_out {
        event.is_state &= id == last || event.event_type != event_type || event.state_key != state_key;
    }
    Ok(())
}

/// The comparison of a state that a server gave with what is known of it.
struct Compared {
    /// The keys to learn.
    unknown: Vec<(StateKeyNum, StateValue)>,
    /// The ids of the events that are not here.
    lacking: BTreeSet<OwnedEventId>,
    /// The servers that are said to have somebody in the room, of whom neither this state nor this server knows.
    deserted: Vec<OwnedServerName>,
}

/// Compares a state that a server gave with what is known of the state before our join; `None` for what is no state of the room. Of members the whole state is right, of others what we were joined with: the join was judged by
/// that.
fn list_unknown(
    read: &Snapshot,
    (room, version): (RoomNum, u8),
    (ids, last): (&[OwnedEventId], Option<&OwnedEventId>),
    partial: &PartialState,
) -> Result<Option<Compared>> {
    let Named { brought, lacking, joined, is_state } = Named::read(read, (room, version), ids, last)?;
    let at = StateRef::Main(partial.base);
    let create = state::find_key(read, room, CREATE, "")?;
    let create = create.map(|key| Ok::<_, Fault>((key, state::at(read, room, at, key)?))).transpose()?;
    let is_of_room = create
        .is_some_and(|(key, event)| event.event().is_some() && brought.get(&key) == event.event().as_ref());
    if !is_of_room || !is_state {
        return Ok(None);
    }
    let mut unknown = Vec::new();
    let mut of_members = BTreeMap::new();
    for row in members::list_keys(read, room)? {
        let (user, key) = row?;
        of_members.insert(key, user);
    }
    for (key, event) in &brought {
        let known = state::at(read, room, at, *key)?;
        let is_open = known == StateValue::Absent || of_members.contains_key(key);
        if known != StateValue::Event(*event) && is_open {
            unknown.push((*key, StateValue::Event(*event)));
        }
    }
    // Members whom an event made up are none, unless the state lacks events, so that they may be of those.
    for key in of_members.keys().filter(|key| lacking.is_empty() && !brought.contains_key(key)) {
        if state::at(read, room, at, *key)? != StateValue::Absent {
            unknown.push((*key, StateValue::Absent));
        }
    }
    let inhabited = of_members.iter().filter(|(key, _)| joined.contains(key));
    let inhabited: BTreeSet<&str> = inhabited.filter_map(|(_, user)| Some(user.split_once(':')?.1)).collect();
    let claimed = members::list_claimed(read, room, usize::MAX)?;
    let deserted =
        claimed.into_iter().filter(|server| *server != partial.us && !inhabited.contains(&**server));
    let deserted = deserted.filter_map(|server| server.try_into().ok()).collect();
    Ok(Some(Compared { unknown, lacking, deserted }))
}
