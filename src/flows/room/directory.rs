//! Reads the public directory: a page of the rooms that anybody may find.

use bytes::Bytes;
use ruma::{
    OwnedServerName, RoomId, UInt,
    directory::{Filter, PublicRoomsChunk, RoomNetwork, RoomTypeFilter},
};
use serde_json::{Value, json};

use crate::{
    env::Long,
    error::{Error, Refusal, Result},
    flows::App,
    ids::RoomNum,
    rooms::{
        self, acl,
        directory::{self, Place},
    },
    store::{Direction, Fault, Snapshot},
};

/// A page of the directory has at most this many rooms, and as many if the client names no limit.
const PAGE_MAX: usize = 500;
/// A page ends with the room at which the texts of its entries have this many bytes, because anybody may ask for it.
const PAGE_BYTES_MAX: usize = 256 << 10;
/// A search looks at at most this many rooms for a page. A page may thus have few rooms, or none, and still go on.
const LOOKED_AT_MAX: usize = 5_000;
/// Rooms are taken from the order in portions of this many, so that its lock is held only for moments.
const PORTION: usize = 256;

/// A request for a page of the directory.
pub(crate) struct Ask {
    pub(crate) limit: Option<UInt>,
    pub(crate) since: Option<String>,
    pub(crate) filter: Filter,
    pub(crate) network: RoomNetwork,
}

/// The kind of those who ask for a page.
enum Reader {
    Anybody,
    /// Another server, whose users can enter only rooms that may be shared and that admit the server.
    Server(OwnedServerName),
}

impl Reader {
    fn may_enter(&self, snapshot: &Snapshot, room: RoomNum) -> Result<bool, Fault> {
        match self {
            Self::Anybody => Ok(true),
            Self::Server(server) => {
                Ok(directory::is_shared(snapshot, room)? && acl::admits(snapshot, room, server)?)
            }
        }
    }
}

/// The side of a place on which a page lies.
struct Since {
    place: Option<Place>,
    direction: Direction,
}

/// The rooms that were found for a page, in the order in which they were looked at.
#[derive(Default)]
struct Found {
    rooms: Vec<(Place, PublicRoomsChunk)>,
    /// The last room that was looked at, if others come after it.
    goes_on_from: Option<Place>,
}

/// Reads a page of the directory as JSON: the rooms with the most members first. Errors: 400 for a token that is none.
pub(crate) async fn page(app: &App, ask: Ask) -> Result<Bytes> {
    page_for(app, ask, Reader::Anybody).await
}

/// Reads a page for another server. Errors: as for [`page`]; 403 `M_FORBIDDEN` where the operator does not show the directory to
/// other servers.
pub(crate) async fn page_for_server(app: &App, origin: OwnedServerName, mut ask: Ask) -> Result<Bytes> {
    if !app.config.federation.public_rooms {
        return Err(Refusal::forbidden("This server does not show its directory to other servers.").into());
    }
    // Servers ask for everything in this way.
    ask.limit = ask.limit.filter(|limit| *limit > UInt::MIN);
    page_for(app, ask, Reader::Server(origin)).await
}

async fn page_for(app: &App, ask: Ask, reader: Reader) -> Result<Bytes> {
    let since = ask.since.as_deref().map(read_token).transpose()?;
    let since = since.unwrap_or(Since { place: None, direction: Direction::Up });
    let limit = ask.limit.and_then(|limit| usize::try_from(u64::from(limit)).ok());
    let limit = limit.unwrap_or(PAGE_MAX).min(PAGE_MAX);
    // No bridge brings rooms of other networks to this server, so there are none to list.
    if matches!(ask.network, RoomNetwork::ThirdParty(_)) {
        return Ok(json!({ "chunk": [], "total_room_count_estimate": 0 }).to_string().into());
    }
    let owned = app.clone();
    let read = move || {
        let found = find(&owned, &since, limit, &ask.filter, &reader)?;
        Ok(show(found, &since, &ask.filter, owned.rooms.listing().len()))
    };
    app.env.blocking_long(Long::Search, read).await
}

fn find(app: &App, since: &Since, limit: usize, filter: &Filter, reader: &Reader) -> Result<Found> {
    let listing = app.rooms.listing();
    let snapshot = listing.renew(&app.store)?;
    let (mut found, mut looked_at, mut byte_count) = (Found::default(), 0, 0);
    let mut from = since.place.clone();
    loop {
        let portion = listing.list(from.as_ref(), since.direction, PORTION);
        if portion.is_empty() {
            return Ok(found);
        }
        for (place, room) in portion {
            if found.rooms.len() >= limit || byte_count >= PAGE_BYTES_MAX || looked_at >= LOOKED_AT_MAX {
                found.goes_on_from = from;
                return Ok(found);
            }
            looked_at += 1;
            from = Some(place.clone());
            let Some(row) = rooms::find_row(&*snapshot, room)? else { continue };
            let chunk = app.rooms.descriptions().of(&*snapshot, room, &row)?;
            if allows(filter, &chunk) && reader.may_enter(&snapshot, room)? {
                byte_count += directory::text_bytes(&chunk);
                found.rooms.push((place, PublicRoomsChunk::clone(&chunk)));
            }
        }
    }
}

/// Writes the page as JSON.
fn show(mut found: Found, since: &Since, filter: &Filter, listed: usize) -> Bytes {
    let goes_on = found.goes_on_from.as_ref().map(|place| write_token(since.direction, place));
    // A caller with a token comes from the other side of it, where there are rooms.
    let back_from = found.rooms.first().map(|(place, _)| place).filter(|_| since.place.is_some());
    let back_from = back_from.or(since.place.as_ref());
    let (next, prev) = match since.direction {
        Direction::Up => (goes_on, back_from.map(|place| write_token(Direction::Down, place))),
        Direction::Down => (back_from.map(|place| write_token(Direction::Up, place)), goes_on),
    };
    if since.direction == Direction::Down {
        found.rooms.reverse();
    }
    // A search does not count what it does not look at.
    let is_whole = since.place.is_none() && found.goes_on_from.is_none();
    let is_search = filter.generic_search_term.is_some() || !filter.room_types.is_empty();
    let total = if is_whole && is_search { found.rooms.len() } else { listed };
    let rooms: Vec<_> = found.rooms.iter().map(|(_, chunk)| chunk).collect();
    let mut page = json!({ "chunk": rooms, "total_room_count_estimate": total });
    // A rule that is left out means `public`, but some clients look for the field.
    let chunk = page.get_mut("chunk").and_then(Value::as_array_mut);
    for room in chunk.into_iter().flatten().filter_map(Value::as_object_mut) {
        room.entry("join_rule").or_insert_with(|| "public".into());
    }
    for (name, token) in [("next_batch", next), ("prev_batch", prev)] {
        if let (Some(token), Some(page)) = (token, page.as_object_mut()) {
            page.insert(name.to_owned(), token.into());
        }
    }
    page.to_string().into()
}

/// Writes a token: the side, the number of members, and the id of the room.
fn write_token(direction: Direction, place: &Place) -> String {
    let side = if direction == Direction::Up { 'n' } else { 'p' };
    format!("{side}{}~{}", place.joined(), place.room_id())
}

fn read_token(token: &str) -> Result<Since> {
    let read = || {
        let (direction, rest) = match token.strip_prefix('n') {
            Some(rest) => (Direction::Up, rest),
            None => (Direction::Down, token.strip_prefix('p')?),
        };
        let (joined, room_id) = rest.split_once('~')?;
        let place = Place::new(joined.parse().ok()?, RoomId::parse(room_id).ok()?);
        Some(Since { place: Some(place), direction })
    };
    read().ok_or_else(|| Error::from(Refusal::invalid_param("`since` is not a token of the directory.")))
}

fn allows(filter: &Filter, chunk: &PublicRoomsChunk) -> bool {
    let fits_type = filter.room_types.is_empty()
        || filter.room_types.iter().any(|wanted| match (wanted, &chunk.room_type) {
            (RoomTypeFilter::Default, None) => true,
            (wanted, Some(room_type)) => wanted.as_str() == Some(room_type.as_str()),
            _ => false,
        });
    let Some(term) = filter.generic_search_term.as_ref().map(|term| term.to_lowercase()) else {
        return fits_type;
    };
    let alias = chunk.canonical_alias.as_ref().map(|alias| alias.as_str());
    let texts = [chunk.name.as_deref(), chunk.topic.as_deref(), alias, Some(chunk.room_id.as_str())];
    fits_type && texts.into_iter().flatten().any(|text| text.to_lowercase().contains(&term))
}
