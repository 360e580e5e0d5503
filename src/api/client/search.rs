//! The endpoint by which clients search in messages.

use ruma::api::client::{filter::RoomEventFilter, search::search_events};
use serde::Deserialize;

use crate::{
    api::{Routes, extract::Client, raw::Raw, reply::RawJson},
    error::{Refusal, Result},
    flows::{
        App,
        limits::Limit,
        room::{
            look::Around,
            search::{self, GroupBy, SearchWanted},
        },
    },
    json::{JsonRef, Object},
    search::{find::OrderBy, index::TextKind},
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(search_events).limit(Limit::Other);
}

/// The body of a search. Its optional parts are told apart from their defaults, which ruma does not do.
#[derive(Deserialize)]
struct Body {
    search_categories: Categories,
}

#[derive(Deserialize)]
struct Categories {
    #[serde(default)]
    room_events: Option<RoomEvents>,
}

#[derive(Deserialize)]
struct RoomEvents {
    search_term: String,
    #[serde(default)]
    keys: Option<Vec<String>>,
    #[serde(default)]
    filter: Option<RoomEventFilter>,
    #[serde(default)]
    order_by: Option<String>,
    #[serde(default)]
    event_context: Option<EventContext>,
    #[serde(default)]
    include_state: Option<bool>,
    #[serde(default)]
    groupings: Option<Groupings>,
}

#[derive(Deserialize)]
struct EventContext {
    #[serde(default = "context_default")]
    before_limit: u32,
    #[serde(default = "context_default")]
    after_limit: u32,
    #[serde(default)]
    include_profile: bool,
}

#[derive(Default, Deserialize)]
struct Groupings {
    #[serde(default)]
    group_by: Vec<Grouping>,
}

#[derive(Deserialize)]
struct Grouping {
    key: String,
}

/// The number of events before or after a result where the request names none.
fn context_default() -> u32 {
    5
}

/// `POST /_matrix/client/v3/search`
pub(crate) async fn search_events(
    app: App,
    client: Client<Raw<search_events::v3::Request>>,
) -> Result<RawJson> {
    let body: Body = client.request.json()?;
    let next_batch = client.request.query("next_batch");
    let mut answer = Object::new();
    let found = match body.search_categories.room_events {
        Some(room_events) => {
            Some(search::search(&app, &client.caller, wanted(room_events, next_batch)?).await?)
        }
        None => None,
    };
    answer.object("search_categories", |categories| {
        if let Some(found) = &found {
            categories.json("room_events", JsonRef::stored(found));
        }
    });
    Ok(RawJson(answer.finish().into()))
}

fn wanted(body: RoomEvents, next_batch: Option<String>) -> Result<SearchWanted, Refusal> {
    let kinds = match body.keys {
        None => TextKind::ALL.to_vec(),
        Some(keys) => keys.iter().map(|key| kind(key)).collect::<Result<_, _>>()?,
    };
    let order_by = match body.order_by.as_deref() {
        None | Some("rank") => OrderBy::Rank,
        Some("recent") => OrderBy::Recent,
        Some(other) => {
            let why = format!("`order_by` must be `rank` or `recent`, and not {other:?}.");
            return Err(Refusal::invalid_param(why));
        }
    };
    let mut group_by = Vec::new();
    for grouping in body.groupings.unwrap_or_default().group_by {
        let by = match grouping.key.as_str() {
            "room_id" => GroupBy::Room,
            "sender" => GroupBy::Sender,
            other => {
                let why =
                    format!("The `key` of a grouping must be `room_id` or `sender`, and not {other:?}.");
                return Err(Refusal::invalid_param(why));
            }
        };
        if !group_by.contains(&by) {
            group_by.push(by);
        }
    }
    let size = |limit: u32| usize::try_from(limit).unwrap_or(usize::MAX);
    Ok(SearchWanted {
        term: body.search_term,
        kinds,
        filter: body.filter.unwrap_or_default(),
        order_by,
        around: body.event_context.map(|context| Around {
            before: size(context.before_limit),
            after: size(context.after_limit),
            with_profiles: context.include_profile,
        }),
        include_state: body.include_state.unwrap_or(false),
        group_by,
        next_batch,
    })
}

fn kind(key: &str) -> Result<TextKind, Refusal> {
    match key {
        "content.body" => Ok(TextKind::Body),
        "content.name" => Ok(TextKind::Name),
        "content.topic" => Ok(TextKind::Topic),
        other => {
            let why = format!(
                "`keys` may have `content.body`, `content.name` and `content.topic`, and not {other:?}."
            );
            Err(Refusal::invalid_param(why))
        }
    }
}
