//! The endpoint `/sync`, at which clients wait for news.

use std::time::Duration;

use ruma::api::client::{
    filter::FilterDefinition,
    sync::sync_events::{self, v3::Filter},
};

use crate::{
    accounts::{Caller, filters},
    api::{Routes, extract::Client, policy::Guests, raw::Raw, reply::RawJson},
    error::{Error, Refusal, Result},
    flows::{
        App,
        device::acknowledge,
        limits::Limit,
        room::{presence, receipts},
    },
    sync::{Ask, SyncToken},
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(sync_events).limit(Limit::Sync).guests(Guests::Yes).long_poll();
}

/// `GET /_matrix/client/v3/sync`
pub(crate) async fn sync_events(app: App, client: Client<Raw<sync_events::v3::Request>>) -> Result<RawJson> {
    let Client { caller, request: raw, .. } = client;
    raw.check_query::<FilterDefinition>("filter")?;
    let request = raw.read()?;
    let since = match request.since {
        Some(since) => Some(app.polls.settle(SyncToken::parse(&since)?)?),
        None => None,
    };
    let filter = match request.filter {
        None => FilterDefinition::default(),
        Some(Filter::FilterDefinition(filter)) => {
            filters::require_cheap(&filter)?;
            filter
        }
        Some(Filter::FilterId(id)) => require_filter(&app, &caller, &id)?,
        Some(_) => {
            return Err(Refusal::invalid_param(
                "`filter` must be the id of a stored filter, or a filter as JSON.",
            )
            .into());
        }
    };
    let mut ask = Ask::new(caller.clone(), since, &filter)?;
    ask.full_state = request.full_state;
    ask.use_state_after = request.use_state_after;
    // The user counts as present until this is dropped, however the request ends.
    let _present = presence::begin_poll(&app, &caller, request.set_presence).await?;
    receipts::settle(&app, caller.user).await;
    let confirmed = match since {
        Some(since) => {
            let upto = since.inbox_position(caller.user, caller.device);
            acknowledge::acknowledge(&app, &caller, upto).await?
        }
        None => None,
    };
    let timeout = request.timeout.unwrap_or(Duration::ZERO);
    let answer = app.polls.poll(ask, timeout).await?;
    if let Some(confirmed) = confirmed {
        confirmed.await.map_err(|_| Error::broken("the server stopped before a confirmation was kept"))?;
    }
    Ok(RawJson(answer))
}

/// Reads a filter that the user has stored. Refuses an id that is not known: 400 `M_INVALID_PARAM`.
fn require_filter(app: &App, caller: &Caller, id: &str) -> Result<FilterDefinition> {
    let row = filters::find(&*app.store.snapshot(), caller.user, id)?;
    let filter = row.map(|row| filters::read(&row)).transpose()?;
    filter.ok_or_else(|| Refusal::invalid_param("`filter` names no filter that you have stored.").into())
}
