//! Asks other servers, for a client of ours, for keys of devices of their users, and claims their one-time keys. All servers are
//! asked at once, and none is waited for longer than the client waits: those that have answered by then are told, and the others are
//! named as failures.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    future::Future,
    sync::Arc,
    time::Duration,
};

use federation::{
    call::{Failure, Lane, Options},
    json::Limits,
};
use futures_util::{StreamExt, future::join_all, stream::iter};
use parking_lot::Mutex;
use ruma::{OwnedDeviceId, OwnedServerName, OwnedUserId};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{
    fetch_keys::{self, Claimed, Wanted, Wishes},
    lists,
};
use crate::{
    delivery::servers,
    encryption::elsewhere::{OtherList, Witness},
    error::Result,
    flows::{App, remote::identify::require_federation},
    ids::UserNum,
    json::{JsonText, Object},
};

/// A client that names no time waits this long.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(10);
/// Other servers are waited for at least this long.
const TIMEOUT_MIN: Duration = Duration::from_secs(1);
/// Other servers are waited for at most this long.
const TIMEOUT_MAX: Duration = Duration::from_secs(30);
/// At most this many servers are asked for one request; the others are failures.
const SERVERS_MAX: usize = 2_000;
/// At most this many servers are asked at once for one request, which is what one user may have us ask at once.
const AT_ONCE: usize = 64;
/// A server that did not answer is asked after the others for this time.
const SILENT: Duration = Duration::from_secs(300);
/// It counts as one that did not answer only if it had this long.
const SILENT_MIN: Duration = Duration::from_secs(5);
/// A name of a server that did not answer takes this many bytes beside its own.
const SILENT_OVERHEAD: usize = 64;
/// Where at most this many users of a server are asked for, the whole list of each is asked for, so that it is kept.
const LISTS_AT_ONCE: usize = 5;
/// The answers for one request have at most this many bytes; the servers beyond that are failures.
const BYTES_MAX: u64 = 32 << 20;
/// Answers of other servers that our clients were not told yet have at most this many KiB over all requests.
const KIB_IN_MEMORY: usize = 256 << 10;

/// The memory that answers of other servers take until they are told. Clones share it.
#[derive(Clone)]
pub(crate) struct AnswerMemory(Arc<Semaphore>);

impl Default for AnswerMemory {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(KIB_IN_MEMORY)))
    }
}

/// Why servers could not be asked, in words.
pub(crate) type Failures = BTreeMap<OwnedServerName, String>;

/// Writes why servers could not be asked, as clients are told.
pub(crate) fn show(failures: &Failures) -> JsonText {
    let mut shown = Object::new();
    for (server, why) in failures {
        shown.object(server.as_str(), |failure| {
            failure.text("message", why);
            failure.number("status", 503);
        });
    }
    shown.finish()
}

/// The answers of other servers to one request.
pub(crate) struct Told<T> {
    /// The answers of these servers.
    pub(crate) told: T,
    /// The servers without an answer.
    pub(crate) failures: Failures,
    /// The memory that the answers take.
    pub(crate) held: Vec<OwnedSemaphorePermit>,
}

impl<T: Default> Default for Told<T> {
    fn default() -> Self {
        Self { told: T::default(), failures: Failures::new(), held: Vec::new() }
    }
}

/// How long other servers are waited for.
fn bounded(timeout: Duration) -> Duration {
    timeout.clamp(TIMEOUT_MIN, TIMEOUT_MAX)
}

fn options(timeout: Duration) -> Options {
    Options { begins: timeout, overall: timeout, limits: Limits::JSON, lane: Lane::Devices }
}

fn in_words(failure: &Failure) -> String {
    match failure {
        // The log tells the operator what this server found on its way to the other.
        Failure::NotFound(_) | Failure::Unreachable(_) => "The server cannot be reached.".to_owned(),
        Failure::TimedOut => "The server did not answer in time.".to_owned(),
        Failure::NotAllowed { .. } => "This server does not talk with it.".to_owned(),
        Failure::Refused { status, .. } => format!("The server refused with {status}."),
        Failure::Nonsense(_) => "The server's answer makes no sense, or is too large.".to_owned(),
        Failure::BadRequest(_) | Failure::Busy => "This server has too much to do.".to_owned(),
    }
}

/// Asks these users' servers for their devices: those that are named, or all. Answers what they told of each user.
pub(crate) async fn query(
    app: &App,
    own: UserNum,
    wanted: Wanted,
    timeout: Duration,
) -> Result<Told<BTreeMap<OwnedUserId, OtherList>>> {
    if wanted.is_empty() {
        return Ok(Told::default());
    }
    let user_ids: Vec<OwnedUserId> = wanted.keys().cloned().collect();
    let finder = app.clone();
    let find = move || Ok(Witness::find_many(&*finder.store.snapshot(), own, user_ids)?);
    let witnesses = app.env.blocking(find).await?;
    let mut by_server = BTreeMap::<OwnedServerName, BTreeMap<OwnedUserId, Asked>>::new();
    for (user_id, devices) in wanted {
        let witness = witnesses.get(&user_id).copied();
        let of_server = by_server.entry(user_id.server_name().to_owned()).or_default();
        of_server.insert(user_id, Asked { devices, witness });
    }
    let timeout = bounded(timeout);
    let ask = |server: OwnedServerName, users| {
        let app = app.clone();
        async move { ask_server(&app, &server, users, timeout).await }
    };
    let bytes = |lists: &BTreeMap<OwnedUserId, OtherList>| lists.values().map(bytes_of).sum();
    ask_all(app, by_server, timeout, ask, bytes).await
}

fn bytes_of(list: &OtherList) -> u64 {
    let length = |text: &Option<String>| text.as_ref().map_or(0, String::len);
    let devices = list
        .devices
        .iter()
        .map(|(id, device)| id.as_str().len() + device.keys.len() + length(&device.display_name));
    (devices.sum::<usize>() + length(&list.master_key) + length(&list.self_signing_key)) as u64
}

/// Claims one-time keys of devices at their servers.
pub(crate) async fn claim(app: &App, wishes: Wishes, timeout: Duration) -> Result<Told<Vec<Claimed>>> {
    let mut by_server = BTreeMap::<OwnedServerName, Wishes>::new();
    for (user_id, devices) in wishes {
        by_server.entry(user_id.server_name().to_owned()).or_default().insert(user_id, devices);
    }
    let timeout = bounded(timeout);
    let ask = |server: OwnedServerName, wishes| {
        let app = app.clone();
        async move { fetch_keys::claim(&app, &server, wishes, options(timeout)).await }
    };
    let bytes = |claimed: &Vec<Claimed>| claimed.iter().map(|(.., key)| key.get().len() as u64).sum();
    ask_all(app, by_server, timeout, ask, bytes).await
}

/// Asks servers at once, and gathers what has come when the time is over.
async fn ask_all<Q: Send + 'static, T, F>(
    app: &App,
    mut by_server: BTreeMap<OwnedServerName, Q>,
    timeout: Duration,
    ask: impl Fn(OwnedServerName, Q) -> F,
    bytes_of: impl Fn(&T) -> u64,
) -> Result<Told<T>>
where
    T: Default + Extend<<T as IntoIterator>::Item> + IntoIterator,
    F: Future<Output = Result<T, Failure>>,
{
    let (mut told, mut bytes) = (Told::<T>::default(), 0);
    if by_server.is_empty() {
        return Ok(told);
    }
    if require_federation(app).is_err() {
        let why = "This server shares no rooms with other servers.";
        told.failures.extend(by_server.into_keys().map(|server| (server, why.to_owned())));
        return Ok(told);
    }
    if let Some(first_left) = by_server.keys().nth(SERVERS_MAX).cloned() {
        let why = format!("One request asks at most {SERVERS_MAX} servers.");
        told.failures.extend(by_server.split_off(&first_left).into_keys().map(|it| (it, why.clone())));
    }
    // A server that has not answered in the end has failed.
    let late = in_words(&Failure::TimedOut);
    let mut late: Failures = by_server.keys().map(|server| (server.clone(), late.clone())).collect();
    let begun = Mutex::new(BTreeSet::new());
    let asking = by_answering(app, by_server).await?.into_iter().map(|(server, question)| {
        let asked = ask(server.clone(), question);
        let begun = &begun;
        async move {
            let _place = app.remote.asking.enter_for_devices().await;
            begun.lock().insert(server.clone());
            (server, asked.await)
        }
    });
    let mut asking = iter(asking).buffer_unordered(AT_ONCE);
    let over = app.env.sleep(timeout);
    tokio::pin!(over);
    loop {
        let (server, answer) = tokio::select! {
            biased;
            next = asking.next() => match next {
                Some(next) => next,
                None => break,
            },
            () = &mut over => break,
        };
        late.remove(&server);
        match answer {
            Ok(answer) => {
                let of_answer = bytes_of(&answer);
                let kib = u32::try_from(of_answer / 1024 + 1).unwrap_or(u32::MAX);
                let memory = Arc::clone(&app.remote.answers.0).try_acquire_many_owned(kib);
                match memory {
                    Ok(memory) if bytes + of_answer <= BYTES_MAX => {
                        bytes += of_answer;
                        told.held.push(memory);
                        told.told.extend(answer);
                    }
                    _ => {
                        tracing::debug!(%server, of_answer, reason = "no memory", "an answer about keys is not told");
                        told.failures.insert(server, in_words(&Failure::Busy));
                    }
                }
            }
            Err(failure) => {
                tracing::debug!(%server, %failure, "another server did not tell keys of its users");
                if matches!(failure, Failure::NotFound(_) | Failure::Unreachable(_) | Failure::TimedOut) {
                    note_silent(app, &server);
                }
                told.failures.insert(server, in_words(&failure));
            }
        }
    }
    drop(asking);
    if timeout >= SILENT_MIN {
        begun.into_inner().iter().filter(|server| late.contains_key(*server)).for_each(|server| {
            note_silent(app, server);
        });
    }
    told.failures.append(&mut late);
    Ok(told)
}

/// Puts those servers first that are likely to answer, so that nobody waits for them behind others that do not.
async fn by_answering<Q: Send + 'static>(
    app: &App,
    by_server: BTreeMap<OwnedServerName, Q>,
) -> Result<Vec<(OwnedServerName, Q)>> {
    let owned = app.clone();
    let order = move || {
        let (snapshot, now_ms, uptime) = (owned.store.snapshot(), owned.env.now_ms(), owned.env.uptime());
        let (mut first, mut last) = (Vec::new(), Vec::new());
        for (server, question) in by_server {
            let is_silent = owned.remote.asking.silent().find(&server, uptime).is_some()
                || servers::is_left_alone(&*snapshot, &server, now_ms)?;
            let side = if is_silent { &mut last } else { &mut first };
            side.push((server, question));
        }
        first.append(&mut last);
        Ok(first)
    };
    app.env.blocking(order).await
}

fn note_silent(app: &App, server: &OwnedServerName) {
    let bytes = server.as_str().len() + SILENT_OVERHEAD;
    app.remote.asking.silent().keep(server.clone(), (), bytes, app.env.uptime() + SILENT);
}

/// A user of another server whose devices are asked for.
struct Asked {
    /// The devices that are asked for; empty for all of them.
    devices: Vec<OwnedDeviceId>,
    /// How it is known that the user's server tells of changes; none where nobody who asks shares a room with the user.
    witness: Option<Witness>,
}

/// Asks one server for devices of its users. Lists that will be kept up to date are asked for whole where they are few, and kept; where
/// they are many, they are asked for later, one after the other.
async fn ask_server(
    app: &App,
    server: &OwnedServerName,
    mut users: BTreeMap<OwnedUserId, Asked>,
    timeout: Duration,
) -> Result<BTreeMap<OwnedUserId, OtherList>, Failure> {
    let mut answer = BTreeMap::new();
    if users.len() <= LISTS_AT_ONCE {
        let kept = users.iter().filter_map(|(user_id, asked)| {
            let witness = asked.witness?;
            Some(
                async move { (user_id.clone(), lists::renew(app, user_id, witness, options(timeout)).await) },
            )
        });
        for (user_id, renewed) in join_all(kept).await {
            match renewed {
                Ok(Ok((mut list, is_stale))) => {
                    let devices = users.remove(&user_id).map(|asked| asked.devices).unwrap_or_default();
                    let devices: HashSet<OwnedDeviceId> = devices.into_iter().collect();
                    list.devices.retain(|id, _| devices.is_empty() || devices.contains(id));
                    if is_stale {
                        lists::ask_soon(app, &user_id);
                    }
                    answer.insert(user_id, list);
                }
                // A server that does not answer this question may answer the other.
                Ok(Err(Failure::Refused { .. } | Failure::Nonsense(_))) => {}
                Ok(Err(failure)) => return Err(failure),
                Err(error) => {
                    tracing::warn!(%error, "a device list could not be kept");
                    return Err(Failure::Busy);
                }
            }
        }
    } else {
        users.iter().filter(|(_, asked)| asked.witness.is_some()).for_each(|(user_id, _)| {
            lists::ask_soon(app, user_id);
        });
    }
    if !users.is_empty() {
        let wanted = users.into_iter().map(|(user_id, asked)| (user_id, asked.devices)).collect();
        answer.extend(fetch_keys::keys(app, server, wanted, options(timeout)).await?);
    }
    Ok(answer)
}
