//! Other users: the directory of them, and rooms that one shares with them.

use http::Method;
use ruma::{
    UserId,
    api::{
        IncomingRequest, Metadata,
        auth_scheme::AccessToken,
        client::{membership::get_mutual_rooms, user_directory::search_users},
        error::DeserializationError,
        path_builder::SinglePath,
    },
};
use serde_json::json;

use crate::{
    accounts::users,
    api::{Routes, extract::Client, raw::Raw, reply::RawJson},
    error::{Refusal, Result},
    flows::App,
    ids::RoomNum,
    rooms::{self, members},
    search::people,
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(search_users);
    r.client(mutual_rooms);
}

/// Whoever looks for somebody gets no more at once.
const PEOPLE_MAX: usize = 50;

/// `POST /_matrix/client/v3/user_directory/search`
pub(crate) async fn search_users(app: App, client: Client<search_users::v3::Request>) -> Result<RawJson> {
    let (store, user, term) = (app.store.clone(), client.caller.user, client.request.search_term);
    let limit = usize::try_from(u64::from(client.request.limit)).unwrap_or(PEOPLE_MAX).min(PEOPLE_MAX);
    let found = app.env.blocking_long(move || Ok(people::find(&*store.snapshot(), user, &term, limit)?));
    let (found, limited) = found.await?;
    let results = found.into_iter().map(|person| {
        let mut shown = json!({ "user_id": person.user_id });
        for (key, value) in [("display_name", person.display_name), ("avatar_url", person.avatar_url)] {
            if let (Some(value), Some(shown)) = (value, shown.as_object_mut()) {
                shown.insert(key.to_owned(), value.into());
            }
        }
        shown
    });
    let results: Vec<_> = results.collect();
    Ok(RawJson(json!({ "results": results, "limited": limited }).to_string().into()))
}

/// What ruma knows under its unstable path only.
pub(crate) struct MutualRooms(Raw<get_mutual_rooms::unstable::Request>);

impl Metadata for MutualRooms {
    const METHOD: Method = Method::GET;
    const RATE_LIMITED: bool = true;
    type Authentication = AccessToken;
    type PathBuilder = SinglePath;
    const PATH_BUILDER: SinglePath = SinglePath::new("/_matrix/client/v1/mutual_rooms");
}

impl IncomingRequest for MutualRooms {
    type EndpointError = ruma::api::error::Error;
    type OutgoingResponse = get_mutual_rooms::unstable::Response;

    fn try_from_http_request_inner(
        request: http::Request<&[u8]>,
        path_args: &[&str],
    ) -> Result<Self, DeserializationError> {
        Raw::try_from_http_request_inner(request, path_args).map(Self)
    }
}

/// So many rooms are in one page.
const ROOMS_A_PAGE: usize = 500;

/// `GET /_matrix/client/v1/mutual_rooms`
pub(crate) async fn mutual_rooms(app: App, client: Client<MutualRooms>) -> Result<RawJson> {
    let (caller, request) = (client.caller, client.request.0);
    let other = request.query("user_id").ok_or_else(|| Refusal::invalid_param("A `user_id` is missing."))?;
    let other = UserId::parse(other).map_err(|_| Refusal::invalid_param("This is not a user id."))?;
    if other == caller.user_id {
        return Err(Refusal::invalid_param("You share all your rooms with yourself.").into());
    }
    let after: u64 = match request.query("from") {
        Some(from) => from
            .strip_prefix('m')
            .and_then(|room| room.parse().ok())
            .ok_or_else(|| Refusal::invalid_param("This is not a token of this list."))?,
        None => 0,
    };
    let store = app.store.clone();
    let json = app.env.blocking(move || {
        let snapshot = store.snapshot();
        let Some(other) = users::find_num(&*snapshot, &other)? else {
            return Ok(json!({ "joined": [], "count": 0 }));
        };
        let theirs = members::list_joined_rooms(&*snapshot, other)?;
        let mut shared = members::list_joined_rooms(&*snapshot, caller.user)?;
        shared.retain(|room| theirs.binary_search(room).is_ok());
        let count = shared.len();
        let mut rest = shared.into_iter().filter(|room| *room > RoomNum(after));
        let page: Vec<RoomNum> = rest.by_ref().take(ROOMS_A_PAGE).collect();
        let ids = page.iter().map(|room| rooms::require_row(&*snapshot, *room).map(|row| row.id));
        let ids = ids.collect::<std::result::Result<Vec<_>, _>>()?;
        let mut json = json!({ "joined": ids, "count": count });
        if let (Some(_), Some(last), Some(json)) = (rest.next(), page.last(), json.as_object_mut()) {
            json.insert("next_batch".to_owned(), format!("m{}", last.0).into());
        }
        Ok(json)
    });
    Ok(RawJson(json.await?.to_string().into()))
}
