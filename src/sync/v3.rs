//! The shape of `/sync` (client-server API, `GET /_matrix/client/v3/sync`).

use std::{
    cell::OnceCell,
    collections::{BTreeMap, BTreeSet},
};

use ruma::api::client::filter::FilterDefinition;

use crate::{
    accounts::Caller,
    error::Result,
    ids::{RoomNum, UserNum},
    rooms::erased::Erased,
    schema,
    schema::rooms::{Membership, UserRoomRow},
    store::{Fault, Read, Snapshot},
    sync::{
        Found, Inner, SyncToken,
        answer::Object,
        filter::Filter,
        news::News,
        room::{self, Room},
        streams::{
            Moment, Window, account_data, device_lists, device_lists::Shares, presence, to_device,
            to_device::Inbox,
        },
    },
};

/// What a client asks for.
#[derive(Debug)]
pub struct Ask {
    /// Who asks.
    pub caller: Caller,
    /// Where the client stands: its token, settled ([`Polls::settle`](crate::sync::Polls::settle)).
    pub since: Option<SyncToken>,
    /// What it wants to hear of.
    pub(crate) filter: Filter,
    /// The whole state of each room, whether it changed or not.
    pub full_state: bool,
    /// State as it is after the timeline (MSC4222).
    pub use_state_after: bool,
}

impl Ask {
    /// Asks for what this filter lets through.
    pub fn new(caller: Caller, since: Option<SyncToken>, filter: &FilterDefinition) -> Self {
        Self { caller, since, filter: Filter::new(filter), full_state: false, use_state_after: false }
    }
}

/// One look at everything: the whole answer, and whether it says anything.
pub(crate) fn look(polls: &Inner, read: &Snapshot, ask: &Ask) -> Result<Found> {
    let upto = read.upto();
    let boot = polls.ephemeral.boot();
    let since = ask.since;
    let window = Window {
        read,
        ask,
        since,
        from: since.map(|token| token.position).unwrap_or_default(),
        upto,
        moment: moment(polls, since),
        ephemeral: &polls.ephemeral,
        ignored: BTreeSet::new(),
        now_ms: polls.env.now_ms(),
        sent: &polls.sent,
        push: &polls.push,
        reader: OnceCell::new(),
        erased: Erased::default(),
    };
    let caller = &ask.caller;
    let device = Some(SyncToken::mark(caller.user, caller.device));
    let next = SyncToken { position: upto, boot, ephemeral: window.moment.number, inbox: None, device };
    Ok(answer(window, next)?)
}

/// What is ephemeral, all of one moment.
fn moment(polls: &Inner, since: Option<SyncToken>) -> Moment {
    let known = since.map_or(0, |token| token.ephemeral);
    polls.ephemeral.read(|board| Moment {
        number: board.number(),
        typing: board.typing.changed_since(known).map(|room| (room, board.typing.list(room))).collect(),
        presence: board.presence.changed_since(known).collect(),
    })
}

fn answer(mut window: Window<'_>, mut next: SyncToken) -> Result<Found, Fault> {
    let caller = &window.ask.caller;
    let begins = window.since.is_none() || window.ask.full_state;
    let typing: BTreeSet<RoomNum> = window.moment.typing.iter().map(|(room, _)| *room).collect();
    let mut news = if begins {
        News::everything(window.read, caller.user)?
    } else {
        News::find(window.read, caller.user, window.from, window.upto, &typing)?
    };
    if !begins && window.reader()?.changed() > window.from {
        // Counts change with the rules, and with who is ignored.
        news.add_joined(window.read, caller.user)?;
    }
    let mut data =
        if news.account_data { account_data::collect(&window)? } else { account_data::ByRoom::new() };
    add_rooms_with_data(&window, &mut news.rooms, &data)?;
    if !news.rooms.is_empty() || !window.moment.presence.is_empty() {
        window.ignored = list_ignored(window.read, caller.user)?;
    }
    let mut shares = Shares::default();
    let rooms = list_rooms(&window, &news.rooms, &mut data, &mut shares)?;
    let is_behind =
        window.since.is_some_and(|token| token.inbox_position(caller.user, caller.device) < token.position);
    let inbox = if news.to_device || is_behind { to_device::collect(&window)? } else { Inbox::default() };
    next.inbox = inbox.told_upto;
    let presence = presence::collect(&window, &shares.came)?;
    next.ephemeral = presence.told_upto.unwrap_or(next.ephemeral);
    let mut body = Object::new();
    body.text("next_batch", &next.to_string());
    let bare = body.len();
    if !rooms.is_empty() {
        body.raw("rooms", &rooms.finish());
    }
    let mut global = account_data::show(&data.remove("").unwrap_or_default(), |kind| {
        window.ask.filter.account_data.wants_type(kind)
    });
    if news.account_data {
        global.extend(account_data::push_rules(&window)?);
    }
    if !global.is_empty() {
        body.events("account_data", global);
    }
    if presence.is_news {
        body.events("presence", &presence.events);
    }
    if !inbox.messages.is_empty() {
        body.events("to_device", inbox.messages);
    }
    let any_shares = !shares.came.is_empty() || !shares.went.is_empty();
    if (news.device_lists || any_shares)
        && let Some(lists) = device_lists::collect(&window, news.device_lists, shares)?
    {
        body.raw("device_lists", &lists);
    }
    let has_news = begins || body.len() > bare;
    if !presence.is_news && !presence.events.is_empty() {
        body.events("presence", &presence.events);
    }
    to_device::put_key_counts(&window, &mut body)?;
    Ok(Found { answer: body.finish().into(), has_news })
}

/// Rooms in which nothing but the user's account data changed.
fn add_rooms_with_data(
    window: &Window<'_>,
    rooms: &mut Vec<(RoomNum, UserRoomRow)>,
    data: &account_data::ByRoom,
) -> Result<(), Fault> {
    for id in data.keys().filter(|id| !id.is_empty()) {
        let Some(room) = schema::ROOM_ID.get(window.read, id)? else { continue };
        if rooms.iter().any(|(known, _)| *known == room) {
            continue;
        }
        rooms.extend(
            schema::USER_ROOM.get(window.read, (window.ask.caller.user, room))?.map(|row| (room, row)),
        );
    }
    Ok(())
}

/// Users whose messages and invites the user does not want (`m.ignored_user_list`).
fn list_ignored(read: &Snapshot, user: UserNum) -> Result<BTreeSet<String>, Fault> {
    #[derive(serde::Deserialize)]
    struct Content {
        ignored_users: BTreeMap<String, serde::de::IgnoredAny>,
    }
    let row = schema::ACCOUNT_DATA.get(read, (user, "", "m.ignored_user_list"))?;
    let content = row.and_then(|row| serde_json::from_slice::<Content>(&row.content).ok());
    Ok(content.map(|content| content.ignored_users.into_keys().collect()).unwrap_or_default())
}

pub(super) fn list_rooms(
    window: &Window<'_>,
    rooms: &[(RoomNum, UserRoomRow)],
    data: &mut account_data::ByRoom,
    shares: &mut Shares,
) -> Result<Object, Fault> {
    let mut sections = [Object::new(), Object::new(), Object::new(), Object::new()];
    let rows = schema::ROOM.get_many(window.read, rooms.iter().map(|(room, _)| *room))?;
    for ((num, user_row), row) in rooms.iter().zip(rows) {
        let Some(row) = row else { continue };
        // Who forgets a room at once is told all the same that they left it.
        let is_old = window.since.is_none() || user_row.since <= window.from;
        if (user_row.forgotten && is_old) || !window.ask.filter.wants_room(&row.id) {
            continue;
        }
        let account_data = data.remove(row.id.as_str()).unwrap_or_default();
        let room = Room { num: *num, row: &row, user_row, account_data: &account_data };
        let (section, shown) = one_room(window, &room, shares)?;
        if let (Some(section), Some(json)) = (sections.get_mut(section), shown) {
            section.raw(row.id.as_str(), &json);
        }
    }
    let mut answer = Object::new();
    for (name, section) in ["join", "invite", "knock", "leave"].into_iter().zip(sections) {
        if !section.is_empty() {
            answer.raw(name, &section.finish());
        }
    }
    Ok(answer)
}

/// The section that the room belongs to, and what is told of it there.
fn one_room(
    window: &Window<'_>,
    room: &Room<'_>,
    shares: &mut Shares,
) -> Result<(usize, Option<String>), Fault> {
    let begins = window.since.is_none() || window.ask.full_state;
    let is_news = begins || room.user_row.since > window.from;
    Ok(match room.user_row.membership {
        Membership::Join => (0, room::joined(window, room, shares)?),
        Membership::Invite if is_news => (1, room::invited(window, room)?),
        Membership::Knock if is_news => (2, room::knocked(window, room)?),
        Membership::Leave | Membership::Ban
            if room.user_row.since > window.from
                && (window.since.is_some() || window.ask.filter.include_leave) =>
        {
            (3, room::left(window, room, shares)?)
        }
        _ => (3, None),
    })
}
