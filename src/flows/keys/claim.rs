//! Claims one-time keys: each is given to one device only.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use ruma::{OneTimeKeyAlgorithm, OwnedDeviceId, OwnedUserId, ServerName};

use super::{require_at_most, require_own};
use crate::{
    accounts::{Caller, devices, users},
    encryption::keys,
    error::Result,
    flows::{
        App,
        limits::{Limit, Source},
        remote::ask_keys::{self, Failures},
        write,
    },
    ids::{DeviceNum, UserNum},
    json::{JsonRef, Pieces},
    store::{Fault, Read},
};

/// A request claims keys of at most this many devices.
const CLAIMS_MAX: usize = 10_000;
/// A request claims no more keys once those that it has claimed have this many bytes.
const CLAIMED_BYTES_MAX: usize = 4 << 20;
/// One batch claims at most this many keys; the rest follows in the next one.
pub(super) const CLAIMS_PER_BATCH: usize = 500;

/// The devices of which keys are wanted, each with the algorithm of the key.
pub(crate) type Wishes = BTreeMap<OwnedUserId, BTreeMap<OwnedDeviceId, OneTimeKeyAlgorithm>>;

/// A device and the algorithm of which a key is wanted.
struct Claim {
    user: UserNum,
    device: DeviceNum,
    user_id: OwnedUserId,
    device_id: OwnedDeviceId,
    algorithm: String,
}

/// A claimed key: its user, its device, its id and its JSON.
type Claimed = (OwnedUserId, OwnedDeviceId, String, Bytes);

/// `POST /keys/claim`: answers a key of each of these devices that has one, as JSON. The deletion of a key is durable before the
/// key is told, so that no key is given twice. Once the keys of this server are [`CLAIMED_BYTES_MAX`], or a
/// later batch fails, no more are given; the client finds the devices that are left missing, and asks for them again. Keys of users of
/// other servers are claimed there at the same time; servers that do not answer are named. Each device counts as a message to it does.
/// Errors: 413 `M_TOO_LARGE` for too many devices, 429 `M_LIMIT_EXCEEDED`.
pub(crate) async fn claim(app: &App, caller: &Caller, mut wanted: Wishes) -> Result<Bytes> {
    let count = count_devices(&wanted)?;
    app.limits.take_more(Limit::ToDevice, Source::User(caller.user), count)?;
    let own = app.accounts.server_name();
    let elsewhere: BTreeSet<_> =
        wanted.keys().filter(|user_id| user_id.server_name() != own).cloned().collect();
    let elsewhere: Wishes =
        elsewhere.into_iter().filter_map(|user_id| wanted.remove_entry(&user_id)).collect();
    let here = claim_here(app, Some(caller), wanted);
    let (here, there) = tokio::join!(here, ask_keys::claim(app, elsewhere, ask_keys::TIMEOUT));
    // Those keys are told that were claimed, because nobody gets them again.
    let (mut claimed, there) = match (here, there) {
        (Ok(claimed), Ok(there)) => (claimed, there),
        (Err(why), _) => return Err(why),
        (Ok(claimed), Err(why)) if !claimed.is_empty() => {
            tracing::warn!(%why, claimed = claimed.len(), "the part of a claim at other servers is left out");
            (claimed, ask_keys::Told::default())
        }
        (Ok(_), Err(why)) => return Err(why),
    };
    let of_others = there
        .told
        .into_iter()
        .map(|(user_id, device_id, id, key)| (user_id, device_id, id, Bytes::from(key.get().to_owned())));
    claimed.extend(of_others);
    let failures = there.failures;
    app.env.blocking(move || Ok(show_claimed(claimed, Some(&failures)))).await
}

/// Claims keys of devices of this server for another one, as [`claim`] does. Errors: 403 `M_FORBIDDEN` for users of other
/// servers, 413 `M_TOO_LARGE` for too many devices, 429 `M_LIMIT_EXCEEDED`.
pub(crate) async fn claim_for_server(app: &App, server: &ServerName, wanted: Wishes) -> Result<Bytes> {
    let count = count_devices(&wanted)?;
    app.limits.take_more(Limit::InboundToDevice, Source::host(server.host()), count)?;
    require_own(app, wanted.keys().map(|user_id| &**user_id))?;
    let claimed = claim_here(app, None, wanted).await?;
    app.env.blocking(move || Ok(show_claimed(claimed, None))).await
}

/// Counts the devices of which keys are wanted: a device has few keys, and whoever takes them all leaves none to others. Errors: 413
/// `M_TOO_LARGE`.
fn count_devices(wanted: &Wishes) -> Result<usize> {
    let count = wanted.values().map(BTreeMap::len).sum();
    require_at_most(CLAIMS_MAX, count, "devices")?;
    Ok(count)
}

/// Claims keys of devices of this server, for a client of it or for another server.
async fn claim_here(app: &App, caller: Option<&Caller>, wanted: Wishes) -> Result<Vec<Claimed>> {
    let finder = app.clone();
    let find = move || Ok(list_claims(&*finder.store.snapshot(), wanted)?);
    let mut claims = app.env.blocking(find).await?;
    let (mut claimed, mut byte_count) = (Vec::new(), 0);
    while !claims.is_empty() && byte_count < CLAIMED_BYTES_MAX {
        let later = claims.split_off(claims.len().min(CLAIMS_PER_BATCH));
        let now = std::mem::replace(&mut claims, later);
        let locked = now.iter().map(|claim| claim.user).collect();
        let build = move |_: &App, batch: &mut crate::store::Batch| {
            let mut given: Vec<Claimed> = Vec::new();
            for claim in now {
                if byte_count >= CLAIMED_BYTES_MAX {
                    tracing::debug!(byte_count, "the rest of a claim is left out: the keys are large");
                    break;
                }
                if let Some((id, key)) = keys::claim(batch, (claim.user, claim.device), &claim.algorithm)? {
                    byte_count += key.len();
                    given.push((claim.user_id, claim.device_id, id, key));
                }
            }
            Ok((given, byte_count))
        };
        let given = match caller {
            Some(caller) => write::for_caller_and_users(app, caller, locked, build).await,
            None => write::for_users(app, locked, build).await,
        };
        match given {
            Ok((given, count)) => {
                claimed.extend(given);
                byte_count = count;
            }
            // Those keys are told that were claimed before, because nobody gets them again.
            Err(why) if !claimed.is_empty() => {
                tracing::warn!(%why, claimed = claimed.len(), "the rest of a claim is left out");
                break;
            }
            Err(why) => return Err(why),
        }
    }
    Ok(claimed)
}

fn list_claims(read: &(impl Read + ?Sized), wanted: Wishes) -> Result<Vec<Claim>, Fault> {
    let mut claims = Vec::new();
    for (user_id, devices) in wanted {
        let Some(user) = users::find_num(read, &user_id)? else { continue };
        let ended = devices::find_ended(read, user)?;
        for (device_id, algorithm) in devices {
            let Some(device) = devices::find_live(read, user, &ended, &device_id)? else { continue };
            let (user_id, algorithm) = (user_id.clone(), algorithm.to_string());
            claims.push(Claim { user, device: device.num, user_id, device_id, algorithm });
        }
    }
    Ok(claims)
}

/// Writes the answer to a claim. The keys of a user follow each other.
fn show_claimed(claimed: Vec<Claimed>, failures: Option<&Failures>) -> Bytes {
    let mut json = Pieces::object();
    if let Some(failures) = failures {
        json.field("failures", &ask_keys::show(failures));
    }
    json.open_object("one_time_keys");
    for of_user in claimed.chunk_by(|one, other| one.0 == other.0) {
        let Some((user_id, ..)) = of_user.first() else { continue };
        json.open_object(user_id.as_str());
        for (_, device_id, id, key) in of_user {
            json.open_object(device_id.as_str());
            json.field(id, JsonRef::stored(key));
            json.close();
        }
        json.close();
    }
    json.finish()
}
