//! The servers by way of which one of our users comes into a room or out of it: one after the other is asked until one can help.

use std::{collections::VecDeque, time::Duration};

use futures_util::{StreamExt, stream::FuturesUnordered};
use ruma::{OwnedServerName, RoomId, RoomOrAliasId, ServerName, UserId, api::error::ErrorKind};

use crate::{
    error::{Error, Refusal, Result},
    flows::{
        App,
        remote::ask::{self, Named},
    },
    ids::RoomNum,
    rooms::{self, aliases, members},
};

/// Ask at most this many servers for one act.
pub(crate) const CANDIDATES_MAX: usize = 10;
/// A server that has not answered after this time is not waited for alone.
const SLOW: Duration = Duration::from_secs(5);
/// All candidates together get this time for one question.
const OVERALL: Duration = Duration::from_secs(90);

/// Finds the room that an id or an alias names. The server of an alias is asked where that is not this one. Errors: 404
/// `M_NOT_FOUND` for an alias that names no room.
pub(crate) async fn find_named(app: &App, name: &RoomOrAliasId, via: Vec<OwnedServerName>) -> Result<Named> {
    let mut servers = via;
    let alias = match <&RoomId>::try_from(name) {
        Ok(room_id) => return Ok(Named { room_id: room_id.to_owned(), servers }),
        Err(alias) => alias,
    };
    if *alias.server_name() == *app.config.server.name {
        let snapshot = app.store.snapshot();
        let row = aliases::find(&*snapshot, alias)?
            .ok_or_else(|| Refusal::not_found("This server knows no such alias."))?;
        return Ok(Named { room_id: rooms::require_row(&*snapshot, row.room)?.id, servers });
    }
    let found = ask::alias(app, alias).await?;
    servers.extend(found.servers);
    Ok(Named { room_id: found.room_id, servers })
}

/// The server of a user; `None` for what is no user id.
pub(super) fn server_of(user: &str) -> Option<OwnedServerName> {
    Some(<&UserId>::try_from(user).ok()?.server_name().to_owned())
}

/// The number of a room whose events this server decides on by itself: users of ours are in it, or nobody of any server.
pub(crate) fn find_here(app: &App, room_id: &RoomId) -> Result<Option<RoomNum>> {
    let snapshot = app.store.snapshot();
    let Some(num) = rooms::find_room(&*snapshot, room_id)? else { return Ok(None) };
    let row = rooms::require_row(&*snapshot, num)?;
    if !row.resident.is_in() {
        return Ok(None);
    }
    let is_here = members::is_server_joined(&*snapshot, num, app.config.server.name.as_str())?
        || members::list_servers(&*snapshot, num)?.next().is_none();
    Ok(is_here.then_some(num))
}

/// The servers to ask about a room that this server is not in: those that the client names, and, where none of these is there or knows
/// the room, those that we knew in the room. A client that names servers is told what they say.
pub(crate) fn candidates(app: &App, room_id: &RoomId, named: Vec<OwnedServerName>) -> Result<Candidates> {
    if !app.config.federation.enabled {
        return Ok(Candidates::of(app, []));
    }
    let snapshot = app.store.snapshot();
    let mut known = Vec::new();
    if let Some(num) = rooms::find_room(&*snapshot, room_id)?
        && rooms::require_row(&*snapshot, num)?.resident.has_history()
    {
        for server in members::list_servers(&*snapshot, num)?.take(CANDIDATES_MAX) {
            known.extend(OwnedServerName::try_from(server?));
        }
    }
    let mut candidates = Candidates::of(app, named);
    known.retain(|server| !candidates.left.contains(server));
    candidates.resort = Candidates::of(app, known).left;
    if !candidates.is_empty() {
        return Ok(candidates);
    }
    // The server that made a room of the older versions stands in its id. It need not be in the room any more, so that
    // it is only asked where nothing better is known.
    Ok(Candidates::of(app, room_id.server_name().map(ToOwned::to_owned)))
}

/// Servers that may help, the likeliest first, and the best reason why those before them did not.
pub(crate) struct Candidates {
    left: VecDeque<OwnedServerName>,
    /// Those that are asked once nobody else is left, unless somebody has refused.
    resort: VecDeque<OwnedServerName>,
    why: Option<Error>,
}

impl Candidates {
    /// Takes the first servers that this one may talk with, each once.
    pub(crate) fn of(app: &App, servers: impl IntoIterator<Item = OwnedServerName>) -> Self {
        let mut left = VecDeque::new();
        let us = &app.config.server.name;
        let allowed = app.remote.client.caller().servers();
        for server in servers {
            if left.len() >= CANDIDATES_MAX {
                break;
            }
            if server != *us && !left.contains(&server) && allowed.allows(&server) {
                left.push_back(server);
            }
        }
        Self { left, resort: VecDeque::new(), why: None }
    }

    /// The same, which asks all of them whatever the first ones say.
    pub(crate) fn unbidden(mut self) -> Self {
        let room = CANDIDATES_MAX.saturating_sub(self.left.len());
        self.left.extend(self.resort.drain(..).take(room));
        self
    }

    /// The servers, the likeliest first.
    pub(crate) fn into_servers(self) -> Vec<OwnedServerName> {
        self.unbidden().left.into()
    }

    /// Whether nobody is left to ask.
    pub(crate) fn is_empty(&self) -> bool {
        self.left.is_empty() && (self.resort.is_empty() || self.is_refused())
    }

    /// Whether somebody who knows the room has refused.
    fn is_refused(&self) -> bool {
        self.why.as_ref().is_some_and(|why| weight(why) >= REFUSED)
    }

    /// Takes the next one to ask.
    fn next(&mut self) -> Option<OwnedServerName> {
        if self.left.is_empty() && !self.is_refused() {
            self.left = std::mem::take(&mut self.resort);
        }
        self.left.pop_front()
    }

    /// Notes why a server could not help. What says most of the reason is kept.
    pub(crate) fn failed(&mut self, server: &ServerName, why: Error) {
        tracing::debug!(%server, %why, "a server could not help with a room");
        if self.why.as_ref().is_none_or(|known| weight(&why) > weight(known)) {
            self.why = Some(why);
        }
    }

    /// The reason why nobody could help. Errors: [`Error::Refused`] where a server refused, or where nobody could be asked.
    pub(crate) fn into_error(self) -> Error {
        self.why.unwrap_or_else(|| {
            Refusal::not_found(
                "This server knows no such room, and no server to ask for it. Name one in `via`.",
            )
            .into()
        })
    }

    /// Asks one server after the other, and the next one beside them where they are slow, until one gives an answer. Those that
    /// gave one or failed are not asked again. `None` where nobody is left: [`Self::into_error`] says why.
    pub(crate) async fn first<T, F>(
        &mut self,
        app: &App,
        ask: impl Fn(OwnedServerName) -> F,
    ) -> Option<(OwnedServerName, T)>
    where
        F: Future<Output = Result<T>> + Send,
    {
        let mut asked = FuturesUnordered::new();
        let mut waiting = VecDeque::new();
        let overall = app.env.sleep(OVERALL);
        tokio::pin!(overall);
        let mut is_next = true;
        loop {
            if std::mem::take(&mut is_next)
                && let Some(server) = self.next()
            {
                waiting.push_back(server.clone());
                let place = app.remote.asking.enter();
                let answer = ask(server.clone());
                asked.push(async move {
                    let _place = match place {
                        Ok(place) => place,
                        Err(busy) => return (server, Err(busy)),
                    };
                    (server, answer.await)
                });
            }
            if asked.is_empty() {
                return None;
            }
            tokio::select! {
                biased;
                answered = asked.next() => {
                    let (server, answer) = answered?;
                    waiting.retain(|asked| *asked != server);
                    match answer {
                        Ok(answer) => {
                            // Those who were slower may still help if this one can't do the rest.
                            self.left.extend(waiting);
                            return Some((server, answer));
                        }
                        Err(why) => self.failed(&server, why),
                    }
                    is_next = true;
                }
                () = &mut overall => {
                    for server in waiting {
                        let why = Error::Remote { server: server.to_string(), cause: "it did not answer in time".to_owned() };
                        self.failed(&server, why);
                    }
                    self.left.clear();
                    return None;
                }
                () = app.env.sleep(SLOW) => is_next = true,
            }
        }
    }
}

/// The weight of a refusal by a server that knows the room.
const REFUSED: u8 = 3;

/// How much a reason says to the user: that somebody refused them says more than that somebody was not there.
fn weight(why: &Error) -> u8 {
    match why {
        Error::Refused(refusal) => match refusal.kind {
            ErrorKind::NotFound => 2,
            _ => REFUSED,
        },
        Error::Remote { .. } => 1,
        Error::Busy { .. } | Error::Broken(_) => 0,
    }
}
