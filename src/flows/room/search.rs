//! Searches in messages (<https://spec.matrix.org/v1.19/client-server-api/#server-side-search>).
//!
//! The index is asked for what fits in the rooms of the caller, and each event that it gives is then judged by what the caller may
//! see, in one snapshot of the store. Nothing of an answer, neither its counts nor its tokens, says more than the events that the
//! caller may see.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fmt,
    sync::Arc,
};

use bytes::Bytes;
use ruma::{
    OwnedRoomId,
    api::client::filter::{RoomEventFilter, UrlFilter},
};

use crate::{
    accounts::{Caller, filters, ignored::Ignored},
    env::Long,
    error::{Error, Refusal, Result},
    flows::{
        App,
        room::look::{Around, FoundText, Look},
    },
    ids::{Order, RoomNum},
    json::{JsonText, Object},
    rooms::{self, filter::EventFilter, members, visibility::Sight},
    schema::{
        event_types::{MESSAGE, NAME, TOPIC},
        rooms::{Membership, UserRoomRow},
    },
    search::{
        find::{self, Candidate, Found, Key, OrderBy, Question, Scope, Words},
        index::{Index, TextKind},
    },
    store::{Read, Snapshot},
};

/// A page has this many results where the filter names no limit.
const RESULTS_DEFAULT: usize = 10;
/// A page has at most this many results.
const RESULTS_MAX: usize = 100;
/// At most this many events come before a result, and as many after it.
const CONTEXT_MAX: usize = 20;
/// At most this many of the events that the index gives are looked at for one page.
const LOOKED_AT_MAX: usize = 1_000;
/// A page ends once its results have this many bytes; the last one may exceed it.
const PAGE_BYTES: usize = 4 << 20;
/// The state of rooms is given until it has this many bytes; the last room may exceed it.
const STATE_BYTES: usize = 4 << 20;
/// Count the documents that fit in at most this many rooms.
const ROOMS_COUNTED_MAX: usize = 200;
/// At most this many predecessors of a room are followed.
const PREDECESSORS_MAX: usize = 20;
/// The index is told of at most this many users whom the caller ignores.
const IGNORED_NAMED_MAX: usize = 1_000;
/// A search says at most this many words to highlight.
const HIGHLIGHTS_MAX: usize = 100;

/// A search that is asked for.
#[derive(Debug)]
pub(crate) struct SearchWanted {
    /// The text that is searched for.
    pub(crate) term: String,
    /// The kinds of text that are searched.
    pub(crate) kinds: Vec<TextKind>,
    /// The filter for the events that are found.
    pub(crate) filter: RoomEventFilter,
    /// The order in which results come.
    pub(crate) order_by: OrderBy,
    /// The events around each result, if they are asked for.
    pub(crate) around: Option<Around>,
    /// Whether the state of the rooms comes with the results.
    pub(crate) include_state: bool,
    /// The ways in which the results are grouped.
    pub(crate) group_by: Vec<GroupBy>,
    /// The token of an earlier page, if this is a further one.
    pub(crate) next_batch: Option<String>,
}

/// A way in which results are grouped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum GroupBy {
    /// Results of one room are a group.
    Room,
    /// Results of one sender are a group.
    Sender,
}

impl GroupBy {
    fn name(self) -> &'static str {
        match self {
            Self::Room => "room_id",
            Self::Sender => "sender",
        }
    }
}

/// A group of results.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Group {
    Room(OwnedRoomId),
    Sender(String),
}

/// The place at which a further page begins, as it is given to clients.
#[derive(Clone, Debug, PartialEq, Eq)]
struct PageMark {
    order_by: OrderBy,
    after: Key,
    group: Option<Group>,
}

impl fmt::Display for PageMark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = match self.order_by {
            OrderBy::Rank => 'r',
            OrderBy::Recent => 'n',
        };
        let Key { score, sent_ms, room, event } = self.after;
        write!(f, "{letter}{score}_{sent_ms}_{room}_{event}")?;
        match &self.group {
            None => Ok(()),
            Some(Group::Room(room)) => write!(f, "_{room}"),
            Some(Group::Sender(sender)) => write!(f, "_{sender}"),
        }
    }
}

impl PageMark {
    /// Reads a token. Refuses one that this server did not make for such a search: 400 `M_INVALID_PARAM`.
    fn parse(text: &str, order_by: OrderBy) -> Result<Self, Refusal> {
        let read = || {
            let (letter, rest) = text.split_at_checked(1)?;
            let order_by = match letter {
                "r" => OrderBy::Rank,
                "n" => OrderBy::Recent,
                _ => return None,
            };
            let mut parts = rest.splitn(5, '_');
            let after = Key {
                score: number(parts.next()?)?,
                sent_ms: number(parts.next()?)?,
                room: number(parts.next()?)?,
                event: number(parts.next()?)?,
            };
            let group = match parts.next() {
                None => None,
                Some(id) if id.starts_with('@') => Some(Group::Sender(id.to_owned())),
                Some(id) => Some(Group::Room(OwnedRoomId::try_from(id).ok()?)),
            };
            Some(Self { order_by, after, group })
        };
        read().filter(|mark| mark.order_by == order_by).ok_or_else(|| {
            Refusal::invalid_param("`next_batch` must be a token from an earlier page of the same search.")
        })
    }
}

/// Reads a number that consists of digits alone.
fn number<N: std::str::FromStr>(digits: &str) -> Option<N> {
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok()).flatten()
}

/// Answers a page of a search, as the results of the category `room_events`. Errors: 400 `M_INVALID_PARAM` for a search or a token
/// that is not valid, 404 `M_UNRECOGNIZED` where search is switched off, [`Error::Busy`] where too many searches wait.
pub(crate) async fn search(app: &App, caller: &Caller, wanted: SearchWanted) -> Result<Bytes> {
    let index = app.searching.require()?;
    filters::require_cheap_events(&wanted.filter)?;
    let words = Words::parse(&wanted.term)?;
    let mark =
        wanted.next_batch.as_deref().map(|token| PageMark::parse(token, wanted.order_by)).transpose()?;
    let filter = EventFilter::new(&wanted.filter)?;
    // A user who has just sent a message finds it. A further page goes on in what the first one found.
    if mark.is_none() {
        app.searching.settle(&app.env, app.store.snapshot().upto()).await;
    }
    let (store, caller, now_ms) = (app.store.clone(), caller.clone(), app.env.now_ms());
    let work = move || {
        let snapshot = store.snapshot();
        let ignored = Arc::new(Ignored::of(&*snapshot, caller.user, &caller.user_id)?);
        let rooms = list_rooms(&snapshot, &caller, &wanted.filter, mark.as_ref())?;
        let search = Search { snapshot, caller, ignored, now_ms, wanted, words, filter, mark };
        let found = search.ask(index.index(), &rooms).inspect_err(|error| {
            if matches!(error, Error::Broken(_)) {
                index.set_damaged();
            }
        })?;
        search.answer(&found)
    };
    app.env.blocking_long(Long::Search, work).await
}

/// Lists the rooms in which the caller searches, by rising number: those they are or were in and have not forgotten, as far as the
/// filter and the token want them. A room that the filter names stands for those that it has replaced, too.
fn list_rooms(
    snapshot: &Arc<Snapshot>,
    caller: &Caller,
    filter: &RoomEventFilter,
    mark: Option<&PageMark>,
) -> Result<Vec<Scope>> {
    let read = &**snapshot;
    let find_all = |ids: &[OwnedRoomId]| -> Result<HashSet<RoomNum>> {
        let mut found = HashSet::new();
        for id in ids {
            found.extend(rooms::find_room(read, id)?);
        }
        Ok(found)
    };
    let not_wanted = find_all(&filter.not_rooms)?;
    let mut wanted = filter.rooms.as_deref().map(find_all).transpose()?;
    if let Some(Group::Room(room)) = mark.and_then(|mark| mark.group.as_ref()) {
        let only = find_all(std::slice::from_ref(room))?;
        wanted = Some(match wanted {
            Some(wanted) => with_predecessors(read, wanted, caller)?.intersection(&only).copied().collect(),
            None => only,
        });
    } else if let Some(named) = wanted {
        wanted = Some(with_predecessors(read, named, caller)?);
    }
    let is_wanted = |room: RoomNum| {
        !not_wanted.contains(&room) && wanted.as_ref().is_none_or(|wanted| wanted.contains(&room))
    };
    let mut scopes = Vec::new();
    for row in members::list_user_rooms(read, caller.user)? {
        let (room, row) = row?;
        if let Some(upto) = seen_upto(&row).filter(|_| is_wanted(room)) {
            // A message that the caller may not see is no candidate: it would take the place of one that they may see, and they would notice.
            let mut seen = Sight::of(read, room, caller.user, &caller.user_id)?.seen(read)?;
            seen.retain_mut(|(first, last)| {
                *last = upto.anchor.min(*last);
                first <= last
            });
            scopes.push(Scope { room, seen });
        }
    }
    scopes.sort_by_key(|scope| scope.room);
    Ok(scopes)
}

/// The order above which somebody with this row sees nothing of a room by having been in it. What everybody may see of it
/// after they left is not searched.
fn seen_upto(row: &UserRoomRow) -> Option<Order> {
    match row.membership {
        Membership::Join => Some(Order::MAX),
        _ if row.forgotten => None,
        _ => row.left,
    }
}

/// Adds the rooms that these have replaced, as far as the caller has been in them.
fn with_predecessors(read: &Snapshot, rooms: HashSet<RoomNum>, caller: &Caller) -> Result<HashSet<RoomNum>> {
    let mut all = rooms.clone();
    for room in rooms {
        let mut at = room;
        for _ in 0..PREDECESSORS_MAX {
            // Nobody learns anything of a room by naming one in which they never were.
            if members::find(read, caller.user, at)?.as_ref().and_then(seen_upto).is_none() {
                break;
            }
            let Some(before) = Look::predecessor(read, at)?.filter(|before| all.insert(*before)) else {
                break;
            };
            at = before;
        }
    }
    Ok(all)
}

/// A search that goes on.
struct Search {
    snapshot: Arc<Snapshot>,
    caller: Caller,
    ignored: Arc<Ignored>,
    now_ms: u64,
    wanted: SearchWanted,
    words: Words,
    filter: EventFilter,
    mark: Option<PageMark>,
}

/// A result of a page.
struct SearchResult {
    candidate: Candidate,
    room_id: OwnedRoomId,
    found: FoundText,
    id: String,
    json: JsonText,
}

impl SearchResult {
    fn group(&self, by: GroupBy) -> Group {
        match by {
            GroupBy::Room => Group::Room(self.room_id.clone()),
            GroupBy::Sender => Group::Sender(self.found.sender()),
        }
    }
}

/// The candidates of a search, which are looked at one by one.
struct Candidates<'s> {
    search: &'s Search,
    left: std::slice::Iter<'s, Candidate>,
    looks: HashMap<RoomNum, Option<Look>>,
    looked_at: usize,
    /// The last candidate that was looked at and that the caller may see.
    last: Option<Key>,
}

impl Candidates<'_> {
    /// The next candidate that the caller may see and that the filter lets through.
    fn next(&mut self) -> Result<Option<(Candidate, FoundText)>> {
        let filter = &self.search.filter;
        while self.looked_at < LOOKED_AT_MAX
            && let Some(candidate) = self.left.next()
        {
            self.looked_at += 1;
            let Some(look) = self.look(candidate.room())? else { continue };
            let Some(found) = look.find_text(candidate.event(), candidate.edit)? else { continue };
            let is_wanted = look.wants(filter, &found)?;
            // No token names what the caller may not see.
            self.last = Some(candidate.key);
            if is_wanted {
                return Ok(Some((*candidate, found)));
            }
        }
        Ok(None)
    }

    fn look(&mut self, room: RoomNum) -> Result<Option<&Look>> {
        if !self.looks.contains_key(&room) {
            let Search { snapshot, caller, ignored, now_ms, .. } = self.search;
            let look = Look::for_search(snapshot, caller, room, ignored, *now_ms)?;
            self.looks.insert(room, look);
        }
        Ok(self.looks.get(&room).and_then(Option::as_ref))
    }
}

impl Search {
    /// Asks the index for what fits.
    fn ask(&self, index: &Index, rooms: &[Scope]) -> Result<Found> {
        let types = [(TextKind::Body, MESSAGE), (TextKind::Name, NAME), (TextKind::Topic, TOPIC)];
        let is_wanted = |kind: &TextKind| {
            let event_type = types.iter().find(|(of, _)| of == kind).map(|(_, event_type)| *event_type);
            self.wanted.kinds.contains(kind)
                && event_type.is_some_and(|event_type| self.filter.allows_type(event_type))
        };
        let kinds: Vec<TextKind> = TextKind::ALL.into_iter().filter(is_wanted).collect();
        let mut senders: Option<Vec<String>> =
            self.wanted.filter.senders.as_ref().map(|list| list.iter().map(ToString::to_string).collect());
        if let Some(Group::Sender(sender)) = self.mark.as_ref().and_then(|mark| mark.group.as_ref()) {
            let is_allowed = senders.as_ref().is_none_or(|senders| senders.contains(sender));
            senders = Some(if is_allowed { vec![sender.clone()] } else { Vec::new() });
        }
        let not_senders: Vec<String> =
            self.ignored.ids().take(IGNORED_NAMED_MAX).map(str::to_owned).collect();
        find::find(
            index,
            &Question {
                words: &self.words,
                rooms,
                kinds: &kinds,
                url: self.wanted.filter.url_filter.map(|wanted| wanted == UrlFilter::EventsWithUrl),
                senders: senders.as_deref(),
                not_senders: &not_senders,
                order_by: self.wanted.order_by,
                after: self.mark.as_ref().map(|mark| mark.after),
            },
        )
    }

    fn limit(&self) -> usize {
        let limit = self
            .wanted
            .filter
            .limit
            .map_or(RESULTS_DEFAULT, |limit| usize::try_from(u64::from(limit)).unwrap_or(RESULTS_MAX));
        limit.clamp(1, RESULTS_MAX)
    }

    fn mark_after(&self, after: Key, group: Option<Group>) -> String {
        // A page of a group is followed by pages of the same group.
        let group = group.or_else(|| self.mark.as_ref().and_then(|mark| mark.group.clone()));
        PageMark { order_by: self.wanted.order_by, after, group }.to_string()
    }

    fn answer(&self, found: &Found) -> Result<Bytes> {
        let mut candidates = Candidates {
            search: self,
            left: found.candidates.iter(),
            looks: HashMap::new(),
            looked_at: 0,
            last: None,
        };
        let (mut results, mut contexts, mut senders) = (Vec::new(), Vec::new(), BTreeMap::new());
        let (mut bytes, mut highlights) = (0, BTreeSet::new());
        while results.len() < self.limit() && bytes < PAGE_BYTES {
            let Some((candidate, found)) = candidates.next()? else { break };
            let Some(look) = candidates.look(candidate.room())? else { continue };
            let (id, json) = look.show_found(&found)?;
            bytes += json.as_str().len();
            if highlights.len() < HIGHLIGHTS_MAX {
                self.words.add_highlights(&found.text, &mut highlights);
            }
            let of_room: &mut BTreeSet<String> = senders.entry(candidate.room()).or_default();
            of_room.insert(found.sender());
            if let Some(wanted) = self.wanted.around {
                let wanted = Around {
                    before: wanted.before.min(CONTEXT_MAX),
                    after: wanted.after.min(CONTEXT_MAX),
                    ..wanted
                };
                let context = look.around_found(&found, wanted, of_room)?;
                bytes += context.as_str().len();
                contexts.push(context);
            }
            results.push(SearchResult { candidate, room_id: look.room().id.clone(), found, id, json });
        }
        let (next, groups) = self.look_ahead(&mut candidates, found, &results)?;
        let count = count(&mut candidates, found, &results)?;
        let mut answer = Object::with_capacity(bytes + 1024);
        answer.number("count", count);
        answer.texts("highlights", highlights.iter().take(HIGHLIGHTS_MAX));
        answer.list_with("results", |list| {
            for (at, result) in results.iter().enumerate() {
                list.object(|shown| {
                    shown.json("rank", &JsonText::from(&serde_json::Value::from(result.candidate.score)));
                    shown.json("result", &result.json);
                    if let Some(context) = contexts.get(at) {
                        shown.json("context", context);
                    }
                });
            }
        });
        if self.wanted.include_state {
            let states = self.states(&mut candidates, &senders)?;
            answer.object("state", |rooms| {
                for (room_id, state) in &states {
                    rooms.list(room_id, state);
                }
            });
        }
        if !self.wanted.group_by.is_empty() {
            write_groups(&mut answer, &groups);
        }
        if let Some(next) = next {
            answer.text("next_batch", &next);
        }
        Ok(answer.finish().into())
    }

    /// Finds out whether there is more, of all and of each group. A token is given where the page is full, as clients are used to from
    /// other servers, where there is a further event that the caller may see, or where too many were looked at to know.
    fn look_ahead(
        &self,
        candidates: &mut Candidates<'_>,
        found: &Found,
        results: &[SearchResult],
    ) -> Result<(Option<String>, Groups)> {
        let mut groups = Groups::default();
        for by in &self.wanted.group_by {
            let list = groups.entry(*by).or_default();
            for result in results {
                let next_order = list.len() + 1;
                let group = list
                    .entry(result.group(*by))
                    .or_insert_with(|| GroupPage { order: next_order, ..GroupPage::default() });
                group.results.push(result.id.clone());
            }
        }
        let shown_upto = results.last().map(|result| result.candidate.key);
        let mut is_more = false;
        while !(is_more && groups.values().flat_map(BTreeMap::values).all(|group| group.is_more)) {
            let Some((candidate, further)) = candidates.next()? else { break };
            is_more = true;
            let Some(look) = candidates.look(candidate.room())? else { continue };
            for (by, list) in &mut groups {
                let group = match by {
                    GroupBy::Room => Group::Room(look.room().id.clone()),
                    GroupBy::Sender => Group::Sender(further.sender()),
                };
                if let Some(group) = list.get_mut(&group) {
                    group.is_more = true;
                }
            }
        }
        let is_unknown = candidates.left.len() > 0 || found.is_more;
        // Where nothing further was found yet, the next page goes on below all that was looked at.
        let is_full = results.len() == self.limit();
        let after = if is_more || is_full { shown_upto } else { candidates.last.filter(|_| is_unknown) };
        for group in groups.values_mut().flat_map(BTreeMap::values_mut) {
            group.is_more |= is_unknown;
        }
        let mut tokens = Vec::new();
        for (id, group) in groups.values_mut().flat_map(BTreeMap::iter_mut) {
            tokens.push((id.clone(), group));
        }
        for (id, group) in tokens {
            group.next = shown_upto.filter(|_| group.is_more).map(|after| self.mark_after(after, Some(id)));
        }
        Ok((after.map(|after| self.mark_after(after, None)), groups))
    }

    fn states(
        &self,
        candidates: &mut Candidates<'_>,
        senders: &BTreeMap<RoomNum, BTreeSet<String>>,
    ) -> Result<Vec<(String, Vec<JsonText>)>> {
        let (mut states, mut bytes) = (Vec::new(), 0);
        for (room, senders) in senders {
            let Some(look) = candidates.look(*room)? else { continue };
            let state = look.state_for_search(senders, self.filter.lazy_members)?;
            bytes += state.iter().map(|event| event.as_str().len()).sum::<usize>();
            states.push((look.room().id.to_string(), state));
            if bytes >= STATE_BYTES {
                break;
            }
        }
        Ok(states)
    }
}

/// The groups of a page, by the way in which they are made.
type Groups = BTreeMap<GroupBy, BTreeMap<Group, GroupPage>>;

/// The results of one group.
#[derive(Default)]
struct GroupPage {
    order: usize,
    results: Vec<String>,
    is_more: bool,
    next: Option<String>,
}

/// Counts what fits: in rooms of which the caller sees everything as the index has it, and in others what was seen.
fn count(candidates: &mut Candidates<'_>, found: &Found, results: &[SearchResult]) -> Result<u64> {
    let mut rooms: Vec<_> = found.counts.iter().collect();
    rooms.sort_unstable();
    let mut sum = 0;
    let mut open = HashSet::new();
    for (room, count) in rooms.into_iter().take(ROOMS_COUNTED_MAX) {
        if let Some(look) = candidates.look(*room)?
            && look.sees_everything()?
        {
            open.insert(*room);
            sum += count;
        }
    }
    let others = results.iter().filter(|result| !open.contains(&result.candidate.room())).count();
    Ok(sum + u64::try_from(others).unwrap_or(0))
}

fn write_groups(answer: &mut Object, groups: &Groups) {
    answer.object("groups", |all| {
        for (by, list) in groups {
            all.object(by.name(), |of_key| {
                for (group, page) in list {
                    let id = match group {
                        Group::Room(room) => room.as_str(),
                        Group::Sender(sender) => sender,
                    };
                    of_key.object(id, |shown| {
                        shown.number("order", u64::try_from(page.order).unwrap_or(0));
                        shown.texts("results", &page.results);
                        if let Some(next) = &page.next {
                            shown.text("next_batch", next);
                        }
                    });
                }
            });
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_come_back_and_what_is_none_is_refused() {
        let after = Key { score: u32::MAX, sent_ms: 7, room: 3, event: u64::MAX };
        let room = OwnedRoomId::try_from("!a_b:c").unwrap();
        for group in [None, Some(Group::Room(room)), Some(Group::Sender("@a_b:c".into()))] {
            for order_by in [OrderBy::Rank, OrderBy::Recent] {
                let mark = PageMark { order_by, after, group: group.clone() };
                assert_eq!(PageMark::parse(&mark.to_string(), order_by).unwrap(), mark);
            }
        }
        for text in [
            "",
            "r",
            "r1_2_3",
            "r1_2_3_+4",
            "r-1_2_3_4",
            "x1_2_3_4",
            "n1_2_3_4",
            "r1_2_3_4_x",
            "é1_2_3_4",
            "r4294967296_2_3_4",
        ] {
            assert!(PageMark::parse(text, OrderBy::Rank).is_err(), "{text}");
        }
    }
}
