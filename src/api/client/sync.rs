//! The endpoints at which clients wait for news: `/sync`, and sliding sync (MSC4186).

use std::time::Duration;

use ruma::{
    api::client::{
        filter::FilterDefinition,
        sync::sync_events::{self, v3::Filter, v5},
    },
    presence::PresenceState,
};

use crate::{
    accounts::{Caller, filters},
    api::{
        Routes,
        extract::Client,
        policy::{Body, Guests, KIB},
        raw::Raw,
        reply::Polled,
    },
    error::{Error, Refusal, Result},
    flows::{
        App,
        device::{acknowledge, slide},
        limits::Limit,
        room::{presence, receipts},
    },
    sync::{
        Answered, Ask, Pos, Relations, SlidingAsk, SyncToken,
        sliding::ask::{Body as SlidingBody, SUBSCRIPTIONS_MAX},
        unknown_pos,
    },
};

/// A request to sliding sync has at most this many bytes: a hundred rooms, each with the state that is wanted of it.
const SLIDING_BODY_BYTES_MAX: usize = 256 * KIB;
/// A request at the path of before the proposal was settled may subscribe to this many rooms: it had no bound then.
const SUBSCRIPTIONS_MAX_BEFORE: usize = 1_000;

pub(crate) fn routes(r: &mut Routes) {
    r.client(sync_events).limit(Limit::Sync).guests(Guests::Yes).long_poll();
    let body = Body::Json(SLIDING_BODY_BYTES_MAX);
    r.client(sliding_sync).limit(Limit::Sync).guests(Guests::Yes).long_poll().body(body);
    r.client(sliding_sync_unstable).limit(Limit::Sync).guests(Guests::Yes).long_poll().body(body);
}

/// The name that `use_state_after` had before version 1.16 of the specification (MSC4222).
const UNSTABLE_STATE_AFTER: &str = "org.matrix.msc4222.use_state_after";

/// `GET /_matrix/client/v3/sync`
pub(crate) async fn sync_events(app: App, client: Client<Raw<sync_events::v3::Request>>) -> Result<Polled> {
    let Client { caller, request: raw, .. } = client;
    raw.check_query::<FilterDefinition>("filter")?;
    let request = raw.read()?;
    let since = match request.since {
        Some(since) => Some(app.polls.settle(SyncToken::parse(&since)?)?),
        None => None,
    };
    let (filter, relations) = match request.filter {
        None => (FilterDefinition::default(), Relations::default()),
        Some(Filter::FilterDefinition(filter)) => {
            filters::require_cheap(&filter)?;
            let relations = Relations::read(raw.query("filter").unwrap_or_default().as_bytes());
            (filter, relations.map_err(|why| Refusal::invalid_param(why.message))?)
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
    ask.relate(relations)?;
    ask.full_state = request.full_state;
    let asks_unstable = raw.query(UNSTABLE_STATE_AFTER).is_some_and(|value| value == "true");
    ask.is_unstable_state_after = asks_unstable && !request.use_state_after;
    ask.use_state_after = request.use_state_after || asks_unstable;
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
    Ok(polled(answer))
}

fn polled(answered: Answered) -> Polled {
    Polled { json: answered.answer, pos: answered.pos, is_news: answered.has_news }
}

/// Reads a filter that the user has stored. Refuses an id that is not known: 400 `M_INVALID_PARAM`.
fn require_filter(app: &App, caller: &Caller, id: &str) -> Result<(FilterDefinition, Relations)> {
    let row = filters::find(&*app.store.snapshot(), caller.user, id)?;
    let filter =
        row.map(|row| Ok::<_, Error>((filters::read(&row)?, Relations::read(&row).unwrap_or_default())));
    let filter = filter.transpose()?;
    filter.ok_or_else(|| Refusal::invalid_param("`filter` names no filter that you have stored.").into())
}

endpoint!(
    /// The path that sliding sync has by MSC4186 once it is in the specification. ruma does not know it yet.
    SlidingSync, POST,
    "/_matrix/client/v4/sync"
);

/// `POST /_matrix/client/v4/sync`
pub(crate) async fn sliding_sync(app: App, client: Client<Raw<SlidingSync>>) -> Result<Polled> {
    let poll = Sliding::read(&app, &client.caller, &client.request, SUBSCRIPTIONS_MAX)?;
    poll.answer(&app).await
}

/// `POST /_matrix/client/unstable/org.matrix.simplified_msc3575/sync`
pub(crate) async fn sliding_sync_unstable(app: App, client: Client<Raw<v5::Request>>) -> Result<Polled> {
    let poll = Sliding::read(&app, &client.caller, &client.request, SUBSCRIPTIONS_MAX_BEFORE)?;
    poll.answer(&app).await
}

/// A poll of sliding sync.
struct Sliding {
    ask: SlidingAsk,
    timeout: Duration,
    presence: PresenceState,
}

impl Sliding {
    /// Reads a request of either path.
    fn read<E>(app: &App, caller: &Caller, raw: &Raw<E>, subscriptions_max: usize) -> Result<Self> {
        let body: SlidingBody = raw.json()?;
        let timeout_ms = match raw.query("timeout") {
            Some(text) => Some(text.parse().map_err(|_| {
                Refusal::invalid_param(format!("`timeout` is {text:?}, which is no number of milliseconds."))
            })?),
            None => body.timeout,
        };
        let presence = raw.query("set_presence").or_else(|| body.set_presence.clone());
        let presence = presence.map_or(PresenceState::Online, PresenceState::from);
        let pos = raw.query("pos").or_else(|| body.pos.clone());
        let pos = pos.map(|text| settled(app, &text)).transpose()?;
        let mut ask = SlidingAsk::new(caller.clone(), pos, body, subscriptions_max)?;
        let settled =
            |since: Option<&str>| since.map(|since| app.polls.settle(SyncToken::parse(since)?)).transpose();
        ask.inbox = settled(ask.extensions.to_device.confirmed())?;
        ask.sticky = settled(ask.extensions.sticky.confirmed())?;
        Ok(Self { ask, timeout: Duration::from_millis(timeout_ms.unwrap_or(0)), presence })
    }

    async fn answer(self, app: &App) -> Result<Polled> {
        let Self { ask, timeout, presence } = self;
        let caller = ask.caller.clone();
        // The user counts as present until this is dropped, however the request ends.
        let _present = presence::begin_poll(app, &caller, presence).await?;
        receipts::settle(app, caller.user).await;
        let confirmed = match ask.inbox {
            Some(since) => {
                let upto = since.inbox_position(caller.user, caller.device);
                acknowledge::acknowledge(app, &caller, upto).await?
            }
            None => None,
        };
        let answer = slide::slide(app, &caller, &ask, timeout).await?;
        if let Some(confirmed) = confirmed {
            confirmed
                .await
                .map_err(|_| Error::broken("the server stopped before a confirmation was kept"))?;
        }
        Ok(polled(answer))
    }
}

/// Reads a position of sliding sync. Refuses one that this server did not give: 400 `M_UNKNOWN_POS`.
fn settled(app: &App, text: &str) -> Result<Pos> {
    let pos = Pos::read(text).ok_or_else(unknown_pos)?;
    let token = app.polls.settle(pos.token).map_err(|_| unknown_pos())?;
    Ok(Pos { token, ..pos })
}
