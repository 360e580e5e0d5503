//! One look of sliding sync chooses rooms, tells each from the place at which the client knows it, and says what the connection
//! has to remember.
//!
//! A room that is told up to the connection's own position is *live*: the changes since then are found together, as `/sync` finds
//! them. A room with changes that the answer does not tell is *behind* from then on: its row says where, and it is told from there
//! when it is chosen next. So nothing is missed, and a room in which nothing changed costs nothing.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    ids::{EventNum, Order, Position, RoomNum, StateKeyNum},
    rooms::visibility::Reader,
    schema::{
        rooms::{Membership, RoomRow, UserRoomRow},
        sync::{RoomSent, StateWish},
    },
    store::Fault,
    sync::{
        Pos, SyncToken,
        changes::Changes,
        collect::{
            self,
            required::Wanted,
            sliding::{self, RoomNews},
        },
        connections::{self, Connection, STEP_BYTES_MAX, Update},
        look::{self, Answered},
        shape::sliding::{Answer, RoomHead},
        sliding::{
            ask::{RoomConfig, SlidingAsk},
            extensions::{self, Beside, Covered, Scope},
            facts::Facts,
            lists::{self, Chosen},
            sticky,
        },
        streams::account_data::{self, AccountData},
        window::{RoomPlace, RoomWindow, Standing, Window},
    },
};

/// An answer tells at most this many rooms; the next one goes on with the others.
const ROOMS_MAX: usize = 1_000;
/// An answer tells no further room once its rooms have this many bytes, because it is held in memory.
const ROOMS_BYTES_MAX: usize = 16 << 20;
/// An answer tells no further room once what it changes of the connection has about this many bytes, because that is written at
/// once. Rooms that fall behind come on top.
const STEP_BYTES_TOLD_MAX: usize = 400 << 10;
/// Remember the union of at most this many wishes for the state of a room; beyond that, remember those of now.
const WISHES_MAX: usize = 8;

/// An answer of sliding sync, and what has to be kept before it is given.
#[derive(Debug)]
pub(crate) struct Slid {
    pub(crate) answered: Answered,
    pub(crate) update: Option<Update>,
    /// The connection has to end: it would have to remember more at once than can be written.
    pub(crate) is_over: bool,
}

/// Looks at everything that the client has not been told of, and writes the answer.
pub(crate) fn look(
    window: &Window<'_>,
    ask: &SlidingAsk,
    connection: &Connection,
    facts: &Facts,
) -> Result<Slid, Fault> {
    let mut changes = Changes::default();
    let mut data = AccountData::default();
    if window.since.is_some() {
        changes = look::find_changes(window)?;
        data = account_data::collect(window, &changes)?;
        look::add_rooms_with_data(window, &mut changes.rooms, &data)?;
    }
    let direct = lists::direct_chats(window)?;
    let choice = lists::choose(window, ask, facts, &connection.rooms, &direct)?;
    let mut walk = Walk {
        window,
        ask,
        connection,
        data,
        direct,
        changed: changes.rooms.iter().map(|(room, _)| *room).collect(),
        configs: connection.configs.clone(),
        kept: BTreeMap::new(),
        answer: Answer::new(window),
        shown: BTreeMap::new(),
        told: 0,
        step_bytes: 0,
        touched: BTreeSet::new(),
        is_cut: false,
    };
    for chosen in &choice.rooms {
        walk.add(chosen)?;
    }
    walk.leave_behind(&choice.rooms);
    let Walk { configs, kept, mut answer, shown, changed, is_cut, .. } = walk;
    let is_over = connection.bytes_of(kept.keys()) > STEP_BYTES_MAX;
    let counts = ask.lists.iter().map(|list| list.name.as_str()).zip(choice.counts.iter().copied());
    let hash = hash(counts.clone());
    answer.lists(counts);
    let mut beside = extensions::beside_rooms(window, ask, &mut answer)?;
    if ask.extensions.sticky.is_on() {
        let rooms = sticky::Rooms { matched: &choice.matched, changed: &changed, shown: &shown };
        let told = sticky::tell(window, ask, &rooms, &mut answer)?;
        beside.has_news |= told.has_news;
        beside.sticky = told.complete;
    }
    let has_news = window.since.is_none()
        || is_cut
        || answer.has_rooms()
        || beside.has_news
        || ask.pos.is_some_and(|pos| pos.counts != hash);
    let caller = window.caller();
    let owner = (caller.user, caller.device);
    let (step, update) = connection.update(owner, ask.conn_id(), kept, configs, window.now_ms);
    let token = SyncToken {
        position: window.upto,
        boot: window.ephemeral.boot(),
        ephemeral: window.moment.number,
        inbox: None,
        receipts: window.receipts_told_upto(),
        invites: None,
        sticky: None,
        device: Some(SyncToken::mark(caller.user, caller.device)),
    };
    let connection = connection.number();
    let Beside { lists, data, subscriptions, sticky, .. } = beside;
    let pos = Pos { token, connection, step, counts: hash, lists, data, subscriptions, sticky };
    let has_news = has_news || window.receipts_told_upto().is_some();
    let answer = answer.finish(&pos, ask.txn_id.as_deref());
    Ok(Slid { answered: Answered { answer, pos: pos.to_string(), has_news }, update, is_over })
}

/// Hashes the names of lists and how many rooms each has (FNV-1a), so that a change of them is news.
fn hash<'a>(counts: impl Iterator<Item = (&'a str, u64)>) -> u32 {
    let mut hash = 0x811c_9dc5_u32;
    for (name, count) in counts {
        for byte in name.bytes().chain([0]).chain(count.to_be_bytes()) {
            hash = (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193);
        }
    }
    hash
}

/// The rooms of one answer while they are being told.
struct Walk<'a, 'w> {
    window: &'a Window<'w>,
    ask: &'a SlidingAsk,
    connection: &'a Connection,
    data: AccountData,
    direct: BTreeSet<String>,
    /// The rooms in which something changed since the position of the connection.
    changed: BTreeSet<RoomNum>,
    configs: BTreeMap<u32, Vec<StateWish>>,
    /// The rooms that the connection has to remember otherwise than before.
    kept: BTreeMap<RoomNum, Option<RoomSent>>,
    answer: Answer<'a, 'w>,
    /// The events that the timelines of this answer show, where the client asks for sticky events, too.
    shown: BTreeMap<RoomNum, Vec<Order>>,
    told: usize,
    /// About how many bytes the step writes for the rooms that were told.
    step_bytes: usize,
    /// The parts of the connection that it writes.
    touched: BTreeSet<u8>,
    /// Some rooms were left for the next answer.
    is_cut: bool,
}

/// The parts of what is remembered of a room that depend on how it was told.
struct Telling {
    config: u32,
    events: u32,
    members: Vec<StateKeyNum>,
    /// Where the timeline begins, if it has events from before what the client knew.
    shown_from: Option<Order>,
}

impl<'w> Walk<'_, 'w> {
    fn add(&mut self, chosen: &Chosen) -> Result<(), Fault> {
        let Chosen { num, user_row, row, config, .. } = chosen;
        let sent = self.connection.rooms.get(num);
        let names: Vec<&str> =
            chosen.lists.iter().filter_map(|at| Some(self.ask.lists.get(*at)?.name.as_str())).collect();
        let scope = Scope { room_id: row.id.as_str(), lists: &names, is_subscribed: chosen.is_subscribed };
        let covered = extensions::covered(&self.ask.extensions, &scope, user_row.membership);
        let is_dm = self.direct.contains(row.id.as_str());
        if let Some(sent) = sent {
            let is_same = sent.is_dm == is_dm && covered == Covered::of(sent);
            let is_live = sent.upto.is_none() && !self.changed.contains(num);
            if is_live && is_same && !self.expands(sent, config) && sent.membership == user_row.membership {
                return Ok(());
            }
        }
        let is_full = self.told >= ROOMS_MAX || self.answer.room_bytes() >= ROOMS_BYTES_MAX;
        if is_full || self.is_step_full(*num) {
            self.is_cut = true;
            self.fall_behind(*num);
            return Ok(());
        }
        let caller = self.window.caller();
        let reader = Reader::with_row(*num, &caller.user_id, user_row, self.window.ignored()?.clone());
        let at = Look { chosen, sent, reader: &reader, is_dm, names: &names, covered };
        self.tell(&at)?;
        self.note_step(*num);
        Ok(())
    }

    /// Whether the step would grow too large if it changed one more room. One room is always told, so that each answer gets further.
    fn is_step_full(&self, num: RoomNum) -> bool {
        !self.kept.is_empty() && self.step_bytes + self.part_bytes(num) > STEP_BYTES_TOLD_MAX
    }

    /// About how many bytes of the room's part are written with it, if no other room has it written.
    fn part_bytes(&self, num: RoomNum) -> usize {
        let (part, bytes) = self.connection.part(num);
        if self.touched.contains(&part) { 0 } else { bytes }
    }

    /// Notes that the step changes a room that was told.
    fn note_step(&mut self, num: RoomNum) {
        let Some(kept) = self.kept.get(&num) else { return };
        let members = kept.as_ref().map_or(0, |sent| sent.members.len());
        self.step_bytes += self.part_bytes(num) + connections::bytes_of_room(members);
        self.touched.insert(self.connection.part(num).0);
    }

    /// Whether a client wants more of a room than it was told.
    fn expands(&self, sent: &RoomSent, config: &RoomConfig) -> bool {
        if matches!(sent.membership, Membership::Invite | Membership::Knock) {
            return false;
        }
        let known = self.configs.get(&sent.config);
        let is_known = |wish: &StateWish| known.is_some_and(|known| known.contains(wish));
        config.timeline_limit > sent.events as usize || !config.wishes.iter().all(is_known)
    }

    /// The position up to which the client was told a room.
    fn position_of(&self, sent: &RoomSent) -> Position {
        sent.upto.unwrap_or(self.window.from).min(self.window.from)
    }

    fn place(&self, at: &Look<'_>, standing: Standing) -> RoomPlace {
        let end = Order::upto(self.window.upto);
        RoomPlace {
            standing,
            whole_state: false,
            timeline_limit: at.chosen.config.timeline_limit,
            end: at.reader.joined_until().unwrap_or(end).min(end),
        }
    }

    fn tell(&mut self, at: &Look<'_>) -> Result<(), Fault> {
        match at.chosen.user_row.membership {
            Membership::Join => self.tell_joined(at),
            Membership::Invite | Membership::Knock => self.tell_outside(at),
            Membership::Leave | Membership::Ban => self.tell_left(at, at.chosen.user_row.membership),
        }
    }

    fn tell_joined(&mut self, at: &Look<'_>) -> Result<(), Fault> {
        let (window, config) = (self.window, &at.chosen.config);
        let stays = at.sent.filter(|sent| {
            sent.membership == Membership::Join && at.chosen.user_row.since <= self.position_of(sent)
        });
        let standing = match (stays, at.sent) {
            (Some(sent), _) => Standing::Knows(Order::upto(self.position_of(sent))),
            (None, Some(_)) => Standing::Returns(None),
            (None, None) => Standing::New,
        };
        let room = at.room(window, self.place(at, standing));
        let known = stays.and_then(|sent| self.configs.get(&sent.config).cloned());
        let wanted = Wanted {
            wishes: &config.wishes,
            known: known.as_deref(),
            members: stays.map(|sent| sent.members.as_slice()).unwrap_or_default(),
        };
        let limit = u32::try_from(config.timeline_limit).unwrap_or(u32::MAX);
        let had = stays.map_or(0, |sent| sent.events);
        let news = sliding::joined(&room, wanted, had)?;
        let events = match news.timeline.limited {
            // A timeline that goes back to the beginning leaves nothing to be told.
            false if stays.is_none() || news.is_expanded => u32::MAX,
            false => had.max(limit),
            true => limit,
        };
        let config = self.remember(known, &config.wishes, news.state.has_stale);
        let shown_from = (stays.is_none() || news.is_expanded).then_some(news.timeline.start);
        let telling = Telling { config, events, members: news.state.members.clone(), shown_from };
        if news.is_news {
            self.write(at, &room, &news, stays.is_none())?;
            if self.ask.extensions.sticky.is_on() {
                let shown = news.timeline.events.iter().map(|(stored, _)| stored.order).collect();
                self.shown.insert(at.chosen.num, shown);
            }
        } else {
            self.write_dm(at)?;
        }
        self.keep(at, &room, Membership::Join, telling, stays.is_some())
    }

    fn tell_outside(&mut self, at: &Look<'_>) -> Result<(), Fault> {
        let user_row = &at.chosen.user_row;
        let is_told = at.sent.is_some_and(|sent| {
            sent.own == user_row.event
                && (sent.membership == user_row.membership || sent.membership == Membership::Leave)
        });
        if is_told {
            return self.write_dm_and_keep(at);
        }
        let room = at.room(self.window, self.place(at, Standing::New));
        match collect::outside(&room)? {
            Some(state) => {
                let head = at.head(at.sent.is_none());
                self.answer.outside(&room, &head, &state)?;
                self.told += 1;
                let telling = Telling { config: 0, events: 0, members: Vec::new(), shown_from: None };
                self.keep(at, &room, user_row.membership, telling, false)
            }
            // The user is not told of an invitation, but that an earlier stay has ended.
            None if at.sent.is_some_and(|sent| sent.membership == Membership::Join) => {
                self.tell_left(at, Membership::Leave)
            }
            None => Ok(()),
        }
    }

    fn tell_left(&mut self, at: &Look<'_>, membership: Membership) -> Result<(), Fault> {
        let (window, user_row, config) = (self.window, &at.chosen.user_row, &at.chosen.config);
        if let Some(sent) = at.sent
            && sent.own == user_row.event
            && sent.membership == membership
        {
            return self.write_dm_and_keep(at);
        }
        let came_between = |sent: &RoomSent| {
            sent.membership != Membership::Join
                && user_row.left.is_some_and(|left| left > Order::upto(self.position_of(sent)))
        };
        let known = at.sent.filter(|sent| !came_between(sent));
        let standing = match (known, at.sent) {
            (Some(sent), _) => Standing::Knows(Order::upto(self.position_of(sent))),
            (None, Some(_)) => Standing::Returns(None),
            (None, None) => Standing::New,
        };
        let room = at.room(window, self.place(at, standing));
        // A client that was told of an invitation alone is told how that ended, and nothing of the room.
        let is_outside =
            known.is_some_and(|sent| matches!(sent.membership, Membership::Invite | Membership::Knock));
        let wishes: &[StateWish] = if is_outside { &[] } else { &config.wishes };
        let held = known.and_then(|sent| self.configs.get(&sent.config).cloned());
        let wanted = Wanted {
            wishes,
            known: if is_outside { Some(&[]) } else { held.as_deref() },
            members: known.map(|sent| sent.members.as_slice()).unwrap_or_default(),
        };
        let news = sliding::left(&room, wanted)?;
        let config = self.remember(held, wishes, news.state.has_stale);
        let members = news.state.members.clone();
        let telling = Telling { config, events: u32::MAX, members, shown_from: None };
        self.write(at, &room, &news, known.is_none())?;
        self.keep(at, &room, membership, telling, known.is_some())?;
        if user_row.forgotten {
            self.kept.insert(at.chosen.num, None);
        }
        Ok(())
    }

    fn write(
        &mut self,
        at: &Look<'_>,
        room: &RoomWindow<'_, 'w>,
        news: &RoomNews,
        is_initial: bool,
    ) -> Result<(), Fault> {
        self.told += 1;
        self.answer.room(room, &at.head(is_initial), news)
    }

    /// Tells that a room is a direct chat now, or is none any more, where nothing else of it is news.
    fn write_dm(&mut self, at: &Look<'_>) -> Result<(), Fault> {
        if at.sent.is_some_and(|sent| sent.is_dm != at.is_dm) {
            self.told += 1;
            self.answer.head(&at.chosen.row.id, &at.head(false));
        }
        Ok(())
    }

    /// Goes on with a room that the user is not in and of which the client knows everything.
    fn write_dm_and_keep(&mut self, at: &Look<'_>) -> Result<(), Fault> {
        self.write_dm(at)?;
        let Some(sent) = at.sent else { return Ok(()) };
        let room = at.room(self.window, self.place(at, Standing::Knows(Order::upto(self.position_of(sent)))));
        let members = sent.members.clone();
        let telling = Telling { config: sent.config, events: sent.events, members, shown_from: None };
        self.keep(at, &room, sent.membership, telling, true)
    }

    /// Tells the extensions of a room, and remembers what the client knows of it from here on.
    fn keep(
        &mut self,
        at: &Look<'_>,
        room: &RoomWindow<'_, 'w>,
        membership: Membership,
        telling: Telling,
        goes_on: bool,
    ) -> Result<(), Fault> {
        let known = at.sent.filter(|_| goes_on);
        let Telling { config, events, members, shown_from } = telling;
        extensions::of_room(room, (known, shown_from), at.covered, &mut self.data, &mut self.answer)?;
        let now = RoomSent {
            upto: None,
            membership,
            own: own_of(at.sent, membership, &at.chosen.user_row),
            config,
            events,
            is_dm: at.is_dm,
            has_typing: at.covered.typing,
            has_receipts: at.covered.receipts,
            has_data: at.covered.data,
            members,
        };
        if at.sent != Some(&now) {
            self.kept.insert(at.chosen.num, Some(now));
        }
        Ok(())
    }

    /// Remembers the wishes for a room's state that the client holds from here on, and gives their number.
    fn remember(&mut self, known: Option<Vec<StateWish>>, wishes: &[StateWish], has_stale: bool) -> u32 {
        let mut held = if has_stale { Vec::new() } else { known.unwrap_or_default() };
        held.extend(wishes.iter().cloned());
        held.sort_unstable();
        held.dedup();
        if held.len() > WISHES_MAX {
            held = wishes.to_vec();
        }
        if let Some((config, _)) = self.configs.iter().find(|(_, wishes)| **wishes == held) {
            return *config;
        }
        let config = self.configs.last_key_value().map_or(1, |(last, _)| last.saturating_add(1));
        self.configs.insert(config, held);
        config
    }

    /// Notes that a room is not told its changes now, so that it is told them later.
    fn fall_behind(&mut self, num: RoomNum) {
        let Some(sent) = self.connection.rooms.get(&num) else { return };
        if sent.upto.is_none() && self.changed.contains(&num) {
            let behind = RoomSent { upto: Some(self.window.from), ..sent.clone() };
            self.kept.insert(num, Some(behind));
        }
    }

    /// Notes the rooms with changes that were not chosen.
    fn leave_behind(&mut self, chosen: &[Chosen]) {
        let chosen: BTreeSet<RoomNum> = chosen.iter().map(|chosen| chosen.num).collect();
        let others: Vec<RoomNum> = self.changed.difference(&chosen).copied().collect();
        for num in others {
            self.fall_behind(num);
        }
    }
}

/// The event that is remembered as what a user is to a room. A user who changes their profile stays what they are.
fn own_of(sent: Option<&RoomSent>, membership: Membership, user_row: &UserRoomRow) -> EventNum {
    match sent {
        Some(sent) if membership == Membership::Join && sent.membership == membership => sent.own,
        _ => user_row.event,
    }
}

/// One room of an answer, with what the client knows of it.
struct Look<'a> {
    chosen: &'a Chosen,
    sent: Option<&'a RoomSent>,
    reader: &'a Reader,
    is_dm: bool,
    names: &'a [&'a str],
    covered: Covered,
}

impl<'a> Look<'a> {
    fn room<'w>(&self, window: &'a Window<'w>, place: RoomPlace) -> RoomWindow<'a, 'w> {
        let row: &RoomRow = &self.chosen.row;
        RoomWindow {
            window,
            num: self.chosen.num,
            row,
            user_row: &self.chosen.user_row,
            place,
            reader: self.reader,
        }
    }

    fn head(&self, is_initial: bool) -> RoomHead<'_> {
        let is_dm = match self.sent {
            Some(sent) if !is_initial => (sent.is_dm != self.is_dm).then_some(self.is_dm),
            _ => self.is_dm.then_some(true),
        };
        RoomHead { is_initial, is_dm, lists: self.names, membership: self.chosen.user_row.membership }
    }
}
