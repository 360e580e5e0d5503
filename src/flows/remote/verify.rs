//! Checks the signatures of events that other servers send, with keys that are fetched where they are not known yet
//! (server-server API, "Checks performed on receipt of a PDU", check 2).

use std::{collections::BTreeMap, sync::Arc};

use ed25519_dalek::VerifyingKey;
use federation::keys::{KeyFailure, Purpose, Wanted};
use ruma::{OwnedServerName, OwnedServerSigningKeyId};

use crate::{
    error::{Error, Refusal, Result},
    flows::App,
    rooms::{
        change::{Received, Signed},
        versions,
    },
};

/// Check at most this many events at once, because the keys of all of them are asked for together.
const AT_ONCE: usize = 200;

/// The outcome of checking one event.
#[derive(Debug)]
pub(crate) enum Verified {
    /// Everybody has signed it who must have.
    Received(Box<Received>),
    /// A signature that it must have is wrong, or made with a key that its server does not publish.
    Forged(Refusal),
    /// The keys of this server cannot be had now, so that the event is to be checked again later.
    Later(OwnedServerName),
}

/// The keys that are known, by server and id, each with its failure where it cannot be used at the time at which the
/// event with this place was sent.
type Keys = BTreeMap<(OwnedServerName, String, u64), Result<VerifyingKey, KeyFailure>>;

/// Whether keys that are not known are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    Servers,
    Nobody,
}

/// Whether the keys of a room of this version must have been valid when an event was sent.
fn is_strict(version: u8) -> bool {
    versions::find_rules(version).is_some_and(|rules| rules.enforce_key_validity)
}

/// Checks events of a room of this version, each with its own outcome, in their order. Errors: [`Error::Broken`] where the
/// cache of keys cannot be read.
pub(crate) async fn verify(app: &App, version: u8, events: Vec<Signed>) -> Result<Vec<Verified>> {
    verify_by(app, version, events, Ask::Servers).await
}

/// Asks for keys, so that they are known to who verifies by them later. Gives up where servers take long.
pub(super) async fn learn_keys(
    app: &App,
    version: u8,
    keys: BTreeMap<(OwnedServerName, OwnedServerSigningKeyId), u64>,
) {
    let is_strict = is_strict(version);
    let wanted = keys.into_iter().map(|((server, key_id), sent_ms)| {
        let sent_ms = if is_strict { sent_ms } else { 0 };
        Wanted { server, key_id, purpose: Purpose::Event { sent_ms, is_strict } }
    });
    app.remote.ring.list(&wanted.collect::<Vec<_>>()).await;
}

/// Like [`verify`], by keys that are asked for or only by those that are known.
pub(super) async fn verify_by(
    app: &App,
    version: u8,
    events: Vec<Signed>,
    ask: Ask,
) -> Result<Vec<Verified>> {
    let is_strict = is_strict(version);
    let mut outcomes = Vec::with_capacity(events.len());
    let mut events = events.into_iter().peekable();
    while events.peek().is_some() {
        let some: Vec<Signed> = events.by_ref().take(AT_ONCE).collect();
        let keys = find_keys(app, is_strict, &some, ask).await?;
        let check =
            move || Ok(some.into_iter().map(|event| check(event, is_strict, &keys)).collect::<Vec<_>>());
        outcomes.extend(app.env.blocking(check).await?);
    }
    Ok(outcomes)
}

/// The time at which a key must have been valid, as far as the room's version asks for that.
fn needed_ms(event: &Signed, is_strict: bool) -> u64 {
    if is_strict { event.sent().get().into() } else { 0 }
}

async fn find_keys(app: &App, is_strict: bool, events: &[Signed], ask: Ask) -> Result<Arc<Keys>> {
    let mut wanted = BTreeMap::new();
    for event in events {
        let sent_ms = needed_ms(event, is_strict);
        for (server, id) in event.keys() {
            let Ok(key_id) = OwnedServerSigningKeyId::try_from(id) else { continue };
            let purpose = Purpose::Event { sent_ms, is_strict };
            let it = Wanted { server: server.to_owned(), key_id, purpose };
            wanted.insert((server.to_owned(), id.to_owned(), sent_ms), it);
        }
    }
    let (places, wanted): (Vec<_>, Vec<_>) = wanted.into_iter().unzip();
    let found = match ask {
        Ask::Servers => app.remote.ring.list(&wanted).await,
        Ask::Nobody => app.remote.ring.list_known(&wanted).await,
    };
    let mut keys = Keys::new();
    for (place, found) in places.into_iter().zip(found) {
        let key = match found {
            Err(KeyFailure::Store(failed)) => return Err(Error::broken(failed.to_string())),
            Err(failure) => Err(failure),
            Ok(bytes) => VerifyingKey::from_bytes(&bytes)
                .map_err(|_| KeyFailure::Unknown { server: place.0.clone(), key_id: place.1.clone() }),
        };
        keys.insert(place, key);
    }
    Ok(Arc::new(keys))
}

fn check(event: Signed, is_strict: bool, keys: &Keys) -> Verified {
    let sent_ms = needed_ms(&event, is_strict);
    let find = |server: &ruma::ServerName, id: &str| {
        keys.get(&(server.to_owned(), id.to_owned(), sent_ms)).and_then(|key| key.as_ref().ok()).copied()
    };
    let unavailable: Vec<OwnedServerName> = event
        .keys()
        .filter(|(server, id)| {
            let key = keys.get(&((*server).to_owned(), (*id).to_owned(), sent_ms));
            matches!(key, Some(Err(KeyFailure::Unavailable { .. })))
        })
        .map(|(server, _)| server.to_owned())
        .collect();
    match event.verify(find) {
        Ok(received) => Verified::Received(Box::new(received)),
        // A signature may be right by a key that nobody could be asked for.
        Err(refusal) => match unavailable.into_iter().next() {
            Some(server) => Verified::Later(server),
            None => Verified::Forged(refusal),
        },
    }
}
