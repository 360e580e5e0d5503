//! Judges events of another server: their signatures first, then by the rules of their room. An event that cannot be judged now
//! is to be tried again.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use futures_util::future::join_all;
use ruma::{OwnedEventId, OwnedServerName, ServerName};

use super::{
    take_in::{self, Silence},
    verify::{self, Verified},
};
use crate::{
    error::Error,
    flows::App,
    ids::RoomNum,
    rooms::change::{Outcome, Signed},
};

/// The signatures are given up this long before the events are, so that those whose keys are known are judged.
const SIGNATURES_BEFORE: Duration = Duration::from_secs(1);

/// An event whose form was checked.
#[derive(Clone, Debug)]
pub(super) struct Coming {
    /// The id of the event.
    pub(super) id: OwnedEventId,
    /// The event, whose signatures were not checked yet.
    pub(super) signed: Signed,
}

impl Coming {
    /// The event as canonical JSON, from which it can be read again.
    pub(super) fn json(&self) -> Bytes {
        self.signed.json().clone()
    }
}

/// The outcome of judging one event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It was judged, and stored in whatever way that says, now or earlier.
    Done,
    /// It is not taken, for this reason.
    Refused(String),
    /// It is to be judged again later: something that it needs cannot be had now.
    Waits,
    /// It is to be judged as soon as there is time for it.
    Unjudged,
}

/// Judges events of a room in their order. `until` is the uptime at which those that are left wait; without one it takes as long
/// as it takes.
pub(super) async fn judge(
    app: &App,
    (room, version): (RoomNum, u8),
    origin: &ServerName,
    events: &[Coming],
    until: Option<Duration>,
) -> Vec<Fate> {
    let signatures_until = until.map(|until| until.saturating_sub(SIGNATURES_BEFORE));
    let verified = check_signatures(app, version, events, signatures_until).await;
    let mut fates = vec![Fate::Waits; events.len()];
    let (mut places, mut received) = (Vec::new(), Vec::new());
    for ((at, verified), fate) in verified.into_iter().enumerate().zip(&mut fates) {
        match verified {
            Some(Verified::Received(event)) => {
                places.push(at);
                received.push(*event);
            }
            Some(Verified::Forged(refusal)) => *fate = Fate::Refused(refusal.message),
            Some(Verified::Later(server)) => {
                tracing::debug!(%room, %server, reason = "its keys cannot be had now", "an event waits");
            }
            None => *fate = Fate::Unjudged,
        }
    }
    if received.is_empty() {
        return fates;
    }
    // Events that were tried before are tried harder.
    let silence = if until.is_some() { Silence::Waits } else { Silence::FetchesState };
    let judged = within(app, until, take_in::take_in(app, room, origin, received, silence)).await;
    let outcomes: Vec<Fate> = match judged {
        Some(Ok(outcomes)) => outcomes.iter().map(fate_of).collect(),
        Some(Err(Error::Refused(refusal))) => vec![Fate::Refused(refusal.message); places.len()],
        Some(Err(error)) => {
            if matches!(error, Error::Broken(_)) {
                tracing::error!(%error, %room, "events of another server could not be judged; they wait");
            }
            vec![Fate::Waits; places.len()]
        }
        None => vec![Fate::Unjudged; places.len()],
    };
    for (at, outcome) in places.into_iter().zip(outcomes) {
        if let Some(fate) = fates.get_mut(at) {
            *fate = outcome;
        }
    }
    fates
}

fn fate_of(outcome: &Outcome) -> Fate {
    match outcome {
        Outcome::Accepted(_) | Outcome::Aside(..) | Outcome::Outlier(_) | Outcome::Known(_) => Fate::Done,
        Outcome::Need { .. } | Outcome::Unknown | Outcome::Held => Fate::Waits,
    }
}

/// Checks the signatures of events; none where that took too long. Events that the same servers have signed are checked together,
/// and apart from those of others, so that a server that does not answer holds up its own events alone.
async fn check_signatures(
    app: &App,
    version: u8,
    events: &[Coming],
    until: Option<Duration>,
) -> Vec<Option<Verified>> {
    let mut groups = BTreeMap::<Vec<OwnedServerName>, Vec<usize>>::new();
    for (at, event) in events.iter().enumerate() {
        let mut servers: Vec<_> = event.signed.keys().map(|(server, _)| server.to_owned()).collect();
        servers.dedup();
        groups.entry(servers).or_default().push(at);
    }
    let checks = groups.into_values().map(|places| async move {
        let signed = places.iter().filter_map(|at| events.get(*at)).map(|event| event.signed.clone());
        let verified = within(app, until, verify::verify(app, version, signed.collect())).await;
        (places, verified)
    });
    let mut verified: Vec<Option<Verified>> = events.iter().map(|_| None).collect();
    for (places, checked) in join_all(checks).await {
        match checked {
            Some(Ok(checked)) => {
                for (at, it) in places.into_iter().zip(checked) {
                    if let Some(place) = verified.get_mut(at) {
                        *place = Some(it);
                    }
                }
            }
            Some(Err(error)) => {
                tracing::error!(%error, "signatures of events could not be checked; they wait")
            }
            None => {}
        }
    }
    verified
}

/// Waits for this at most until the uptime that is named; answers none where it takes longer, and drops it then.
pub(super) async fn within<T>(
    app: &App,
    until: Option<Duration>,
    work: impl Future<Output = T>,
) -> Option<T> {
    let Some(until) = until else { return Some(work.await) };
    let left = until.saturating_sub(app.env.uptime());
    tokio::select! {
        biased;
        done = work => Some(done),
        () = app.env.sleep(left) => None,
    }
}
