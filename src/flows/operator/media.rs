//! The operator's commands for media: what there is, what is given to nobody, what is kept in any case, and what is deleted.

use std::ops::Bound;

use ruma::{RoomId, UserId};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::accounts::require_user;
use crate::{
    accounts::users,
    env::Long,
    error::{Error, Refusal, Result},
    flows::{
        App,
        media::{
            avatars,
            moving::{self, Moved},
            tend,
        },
        write,
    },
    ids::{Order, RoomNum},
    media::{
        Name,
        items::{self, Deleted, Mark, Marked},
        objects,
    },
    rooms::{self, event::StoredEvent},
    schema::{
        self,
        media::{ContentRow, Home, ItemRow},
    },
    store::{Direction, Read, backup::Progress},
};

/// One command deals with at most this many items, because their names are held in memory. Whoever has more asks again.
const ITEMS_MAX: usize = 100_000;
/// This many rows are read in one snapshot.
const ROWS_AT_ONCE: usize = 2_000;
/// The beginning of the URI of an item.
const SCHEME: &str = "mxc://";

/// A command for media.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "media")]
pub enum MediaCommand {
    /// Says how much there is.
    Status,
    /// Says what is known of an item.
    Show {
        /// The `mxc://` URI of the item.
        uri: String,
    },
    /// Has items given to nobody, or to everybody again.
    Quarantine {
        /// The items that this is about.
        of: Chosen,
        /// Whether they are given to nobody.
        is: bool,
    },
    /// Has items outlive what would delete them otherwise, or no longer.
    Protect {
        /// The items that this is about.
        of: Chosen,
        /// Whether they are protected.
        is: bool,
    },
    /// Deletes items for good, but for those that are protected.
    Delete {
        /// The items that this is about.
        of: Chosen,
    },
    /// Moves all files to a place.
    Move {
        /// The place where they lie after that.
        to: Home,
    },
}

/// The items that a command is about.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Chosen {
    /// The item of this `mxc://` URI.
    Item(String),
    /// The items that a user of this server has uploaded, at least so many seconds ago.
    OfUser(String, u64),
    /// The items that came with events of a room that can be read here: those that the sender of the event has uploaded.
    OfRoom(String),
    /// Items of users of this server that nobody has asked for in so many seconds.
    OwnUnused(u64),
    /// Items of other servers that nobody has asked for in so many seconds.
    OthersUnused(u64),
}

/// The outcome of a command for media.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MediaOutcome {
    /// How much there is.
    Status(MediaStatus),
    /// An item, as it is known.
    Item(Box<ItemEntry>),
    /// Items were dealt with.
    Done(Dealt),
    /// Files were moved to a place.
    Moved(MovedFiles),
}

/// How much media there is.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct MediaStatus {
    /// The number of items of users of this server, and of their bytes as if each had its own.
    pub own: (u64, u64),
    /// The number of items of other servers, and of their bytes likewise.
    pub others: (u64, u64),
    /// The number of images of previews, and of their bytes likewise.
    #[serde(default)]
    pub previews: (u64, u64),
    /// The number of URIs to which nothing was uploaded yet.
    pub pending: u64,
    /// The number of items that are given to nobody.
    pub quarantined: u64,
    /// The number of files, and of their bytes: what is the same is stored once, and thumbnails count.
    pub files: (u64, u64),
    /// The number of those that lie in the bucket, and of their bytes.
    #[serde(default)]
    pub in_bucket: (u64, u64),
}

/// Files that were moved.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MovedFiles {
    /// The place to which they were moved.
    pub to: Home,
    /// The number of files that were moved.
    pub files: u64,
    /// The number of their bytes.
    pub bytes: u64,
    /// The number of files that were there already.
    pub there: u64,
    /// The number of files that were about to come or to go, and stay where they are.
    pub passing: u64,
    /// The number of files that are not where they should be.
    pub lost: u64,
}

/// An item, as it is shown.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ItemEntry {
    /// The `mxc://` URI of the item.
    pub uri: String,
    /// The user of this server who has uploaded it.
    pub user: Option<String>,
    /// The facts that are known of it.
    #[serde(flatten)]
    pub row: ItemRow,
    /// The file as it was uploaded, where the item has a smaller one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original: Option<ContentRow>,
    /// When it was last asked for, in milliseconds since the epoch.
    pub seen_ms: Option<u64>,
    /// The number of its thumbnails.
    pub thumbnails: usize,
}

/// Items that were dealt with.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Dealt {
    /// The number of items.
    pub items: u64,
    /// The number of their bytes, for those that were deleted.
    pub bytes: u64,
    /// The number of items that stay as they are, because they are protected.
    pub protected: u64,
    /// There are more than one command deals with.
    pub has_more: bool,
}

/// Carries out a command. Errors: 400 for what is no URI, room or user, 404 for what is not there.
/// `progress` is called while a long command runs.
pub async fn operate(
    app: &App,
    command: MediaCommand,
    mut progress: impl FnMut(Progress) + Send,
) -> Result<MediaOutcome> {
    Ok(match command {
        MediaCommand::Status => MediaOutcome::Status(status(app).await?),
        MediaCommand::Show { uri } => MediaOutcome::Item(Box::new(show(app, &uri).await?)),
        MediaCommand::Quarantine { of, is } => {
            // A room or a user may have the bytes of anybody's files.
            let with_bytes = matches!(of, Chosen::Item(_));
            MediaOutcome::Done(mark_all(app, of, Mark::Quarantined { is, with_bytes }).await?)
        }
        MediaCommand::Protect { of, is } => MediaOutcome::Done(mark_all(app, of, Mark::Protected(is)).await?),
        MediaCommand::Delete { of } => MediaOutcome::Done(delete_all(app, of).await?),
        MediaCommand::Move { to } => {
            let Moved { blobs, bytes, there, passing, lost } =
                moving::move_all(app, to, &mut progress).await?;
            MediaOutcome::Moved(MovedFiles { to, files: blobs, bytes, there, passing, lost })
        }
    })
}

fn named(uri: &str) -> Result<Name> {
    let wrong = || Refusal::invalid_param(format!("{uri:?} is no URI such as \"mxc://example.org/AbC\"."));
    Name::of_uri(uri).ok_or_else(|| wrong().into())
}

async fn status(app: &App) -> Result<MediaStatus> {
    let mut status = MediaStatus::default();
    let mut count = |_: &Name, row: &ItemRow| {
        let bytes = row.content.as_ref().map(|content| content.bytes);
        let of = match (row.by.is_some(), row.is_preview) {
            (true, _) => &mut status.own,
            (false, true) => &mut status.previews,
            (false, false) => &mut status.others,
        };
        match bytes {
            Some(bytes) => *of = (of.0 + 1, of.1 + bytes),
            None => status.pending += 1,
        }
        status.quarantined += u64::from(row.is_quarantined);
    };
    let mut after = None;
    loop {
        let page = page_after(app, after).await?;
        page.iter().for_each(|(name, row)| count(name, row));
        match page.into_iter().last() {
            Some((name, _)) => after = Some(name),
            None => break,
        }
    }
    let total = objects::total(&*app.store.snapshot())?;
    status.files = (total.blobs, total.bytes);
    let mut after = None;
    loop {
        let snapshot = app.store.snapshot();
        let list = move || Ok(objects::list_after(&*snapshot, after, ROWS_AT_ONCE)?);
        let page = app.env.blocking(list).await?;
        let Some((last, _)) = page.last() else { return Ok(status) };
        after = Some(*last);
        for (_, row) in page.iter().filter(|(_, row)| row.home == Home::S3) {
            status.in_bucket = (status.in_bucket.0 + 1, status.in_bucket.1 + row.bytes);
        }
    }
}

async fn page_after(app: &App, after: Option<Name>) -> Result<Vec<(Name, ItemRow)>> {
    let snapshot = app.store.snapshot();
    app.env.blocking(move || Ok(items::list_after(&*snapshot, after.as_ref(), ROWS_AT_ONCE)?)).await
}

async fn show(app: &App, uri: &str) -> Result<ItemEntry> {
    let name = named(uri)?;
    let snapshot = app.store.snapshot();
    let show = move || {
        let row = items::find(&*snapshot, &name)?.ok_or_else(items::no_such_item)?;
        let by = row.by.map(|user| crate::accounts::users::require(&*snapshot, user)).transpose()?;
        Ok(ItemEntry {
            uri: name.uri(),
            user: by.map(|user| user.user_id.to_string()),
            original: items::find_original(&*snapshot, &name)?,
            seen_ms: items::find_seen(&*snapshot, &name)?,
            thumbnails: items::list_thumbnails(&*snapshot, &name)?.len(),
            row,
        })
    };
    app.env.blocking(show).await
}

/// Lists the items that are meant, and whether there are more.
async fn list(app: &App, of: Chosen) -> Result<(Vec<Name>, bool)> {
    let now_ms = app.env.now_ms();
    let before = |seconds: u64| now_ms.saturating_sub(seconds.saturating_mul(1000));
    match of {
        Chosen::Item(uri) => {
            let name = named(&uri)?;
            if items::find(&*app.store.snapshot(), &name)?.is_none() {
                return Err(items::no_such_item().into());
            }
            Ok((vec![name], false))
        }
        Chosen::OfUser(name, seconds) => {
            let (user, _) = require_user(app, &name)?;
            let (snapshot, before_ms) = (app.store.snapshot(), before(seconds).saturating_add(1));
            let list = move || Ok(items::list_of_user(&*snapshot, user, before_ms, ITEMS_MAX + 1)?);
            let mut ids = app.env.blocking(list).await?;
            let has_more = ids.len() > ITEMS_MAX;
            ids.truncate(ITEMS_MAX);
            let server = app.config.server.name.to_string();
            Ok((ids.into_iter().map(|id| Name { server: server.clone(), id }).collect(), has_more))
        }
        Chosen::OfRoom(room_id) => of_room(app, &room_id).await,
        Chosen::OwnUnused(seconds) => unused(app, true, before(seconds)).await,
        Chosen::OthersUnused(seconds) => unused(app, false, before(seconds)).await,
    }
}

/// Lists items that nobody has asked for since a time, but for avatars in use.
async fn unused(app: &App, is_own: bool, before_ms: u64) -> Result<(Vec<Name>, bool)> {
    let (mut found, mut after) = (Vec::new(), None);
    loop {
        let page = page_after(app, after).await?;
        let Some((last, _)) = page.last() else { return Ok((found, false)) };
        after = Some(last.clone());
        let snapshot = app.store.snapshot();
        let look = move || {
            let mut unused = Vec::new();
            for (name, row) in page {
                // Images of previews end with these.
                let is_meant = row.by.is_some() == is_own && row.content.is_some() && !row.is_preview;
                let seen_ms = items::find_seen(&*snapshot, &name)?.unwrap_or_default().max(row.at_ms);
                if is_meant && seen_ms <= before_ms {
                    unused.push(name);
                }
            }
            avatars::spare(&*snapshot, &mut unused, |name| name)?;
            Ok(unused)
        };
        for name in app.env.blocking_long(Long::Media, look).await? {
            if found.len() == ITEMS_MAX {
                return Ok((found, true));
            }
            found.push(name);
        }
    }
}

/// Lists the items that came with events of a room. What encrypted events refer to is not seen.
async fn of_room(app: &App, room_id: &str) -> Result<(Vec<Name>, bool)> {
    let room_id =
        <&RoomId>::try_from(room_id).map_err(|_| Refusal::invalid_param("This is not a room id."))?;
    let room = rooms::find_room(&*app.store.snapshot(), room_id)?;
    let room = room.ok_or_else(|| Refusal::not_found("This server knows no such room."))?;
    let mut found = std::collections::BTreeSet::new();
    let mut after = None;
    loop {
        let snapshot = app.store.snapshot();
        let page = app.env.blocking(move || list_in_room(&*snapshot, room, after)).await?;
        for name in page.0 {
            if found.len() == ITEMS_MAX {
                return Ok((found.into_iter().collect(), true));
            }
            found.insert(name);
        }
        match page.1 {
            Some(order) => after = Some(order),
            None => return Ok((found.into_iter().collect(), false)),
        }
    }
}

/// The items that came with some events of a room, and the order of the last of those events, if there may be more.
fn list_in_room(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    after: Option<Order>,
) -> Result<(Vec<Name>, Option<Order>)> {
    let low = after.map_or(Bound::Included((room, Order::MIN)), |order| Bound::Excluded((room, order)));
    let high = Bound::Included((room, Order::MAX));
    let rows = schema::TIMELINE.range::<(RoomNum, Order)>(read, low, high, Direction::Up)?;
    let (mut found, mut last, mut count) = (Vec::new(), None, 0);
    for row in rows.take(ROWS_AT_ONCE) {
        let ((_, order), row) = row?;
        let stored = StoredEvent { order, row };
        // Members have their avatars elsewhere, too.
        if stored.membership().is_none() {
            let (event, sender) = (stored.row.json.as_ref(), stored.row.sender());
            let mut names = Vec::new();
            collect_names(&serde_json::from_slice(event).unwrap_or_default(), &mut names);
            for name in names {
                if is_of(read, &name, &sender)? {
                    found.push(name);
                }
            }
        }
        (last, count) = (Some(order), count + 1);
    }
    Ok((found, last.filter(|_| count == ROWS_AT_ONCE)))
}

/// Whether an item came with an event of this sender: they have uploaded it, or it is of their server. Anybody can name the files of
/// others, who lose nothing by that.
fn is_of(read: &(impl Read + ?Sized), name: &Name, sender: &str) -> Result<bool> {
    let Some(row) = items::find(read, name)? else { return Ok(false) };
    let Ok(sender) = <&UserId>::try_from(sender) else { return Ok(false) };
    Ok(match row.by {
        Some(by) => users::find_num(read, sender)? == Some(by),
        None => sender.server_name().as_str() == name.server,
    })
}

/// Collects the media that a value names anywhere. Its texts are looked at and not its JSON, which may write any character in other ways.
fn collect_names(value: &Value, names: &mut Vec<Name>) {
    match value {
        Value::String(text) => names.extend(names_in(text)),
        Value::Array(values) => values.iter().for_each(|value| collect_names(value, names)),
        Value::Object(fields) => {
            for (key, value) in fields {
                names.extend(names_in(key));
                collect_names(value, names);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// The URIs of media in a text, wherever they stand. Clients pass over whatever stands behind an id, such as `#auto`.
fn names_in(text: &str) -> impl Iterator<Item = Name> {
    text.match_indices(SCHEME).filter_map(|(at, _)| {
        let (server, rest) = text.get(at + SCHEME.len()..)?.split_once('/')?;
        let is_of_id = |it: char| it.is_ascii_alphanumeric() || it == '-' || it == '_';
        let id = rest.split(|it| !is_of_id(it)).next()?;
        Name::of_uri(&format!("{SCHEME}{server}/{id}"))
    })
}

async fn mark_all(app: &App, of: Chosen, mark: Mark) -> Result<Dealt> {
    let (names, has_more) = list(app, of).await?;
    let mut dealt = Dealt { has_more, ..Dealt::default() };
    for name in names {
        let set = move |_: &App, batch: &mut _| Ok(items::mark(batch, &name, mark)?);
        match write::for_server(app, set, Error::from).await? {
            Marked::Set => dealt.items += 1,
            Marked::Protected => dealt.protected += 1,
            Marked::NoItem => {}
        }
    }
    Ok(dealt)
}

async fn delete_all(app: &App, of: Chosen) -> Result<Dealt> {
    let (names, has_more) = list(app, of).await?;
    let mut dealt = Dealt { has_more, ..Dealt::default() };
    for name in names {
        match tend::delete(app, &name).await? {
            Deleted::Gone(bytes) => {
                dealt.items += 1;
                dealt.bytes += bytes;
            }
            Deleted::Protected => dealt.protected += 1,
            Deleted::NoItem => {}
        }
    }
    Ok(dealt)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_are_found_wherever_they_stand_in_an_event() {
        let event = serde_json::from_str(
            r#"{"url":"mxc://a.example/One","info":{"thumbnail_url":["mxc:\/\/b.example:1\/tw\u006f-2"]},
            "formatted_body":"<img src=\"mxc://a.example/three\">","broken":"mxc://a.example/../x",
            "odd":"mxc://a.example/four#auto mxc://a.example/five?x=mxc://a.example/six/","mxc://a.example/seven":1}"#,
        );
        let mut found = Vec::new();
        collect_names(&event.unwrap(), &mut found);
        let found: std::collections::BTreeSet<_> = found.iter().map(Name::uri).collect();
        let ids = ["five", "four", "One", "seven", "six", "three"].map(|id| format!("mxc://a.example/{id}"));
        assert_eq!(found, ids.into_iter().chain(["mxc://b.example:1/two-2".to_owned()]).collect());
    }
}
