//! The directory of users: a search for people by name or id.

use ruma::api::client::user_directory::search_users;
use serde_json::json;

use crate::{
    api::{Routes, extract::Client, reply::RawJson},
    env::Long,
    error::Result,
    flows::{App, limits::Limit},
    search::people,
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(search_users).limit(Limit::Other);
}

/// A search finds at most this many people, whatever limit the client gives.
const PEOPLE_MAX: usize = 50;

/// `POST /_matrix/client/v3/user_directory/search`
pub(crate) async fn search_users(app: App, client: Client<search_users::v3::Request>) -> Result<RawJson> {
    let (store, user, term) = (app.store.clone(), client.caller.user, client.request.search_term);
    let limit = usize::try_from(u64::from(client.request.limit)).unwrap_or(PEOPLE_MAX).min(PEOPLE_MAX);
    let found = app
        .env
        .blocking_long(Long::Search, move || Ok(people::find(&*store.snapshot(), user, &term, limit)?));
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
