//! Answers which keys devices have: of users of this server from the store; of users of other servers from the list that is kept of
//! them, where it is known to be current, and otherwise from what their servers say.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
    time::Duration,
};

use bytes::Bytes;
use ruma::{OwnedDeviceId, OwnedUserId};
use serde_json::Value;
use tokio::sync::OwnedSemaphorePermit;

use super::{require_at_most, require_own};
use crate::{
    accounts::{
        Caller,
        devices::{self, DevicePage},
        tokens, users,
    },
    encryption::{
        cross_signing::{self, Usage},
        elsewhere::{self, Asker, OtherDevice, OtherList},
        keys,
        signatures::Signable,
    },
    error::Result,
    flows::{App, remote::ask_keys},
    ids::UserNum,
    json::{JsonRef, JsonText, Pieces},
    store::{Fault, Read, Snapshot},
};

/// A request for keys names at most this many users.
const USERS_MAX: usize = 10_000;
/// An answer of more than one piece has the keys of at most this many devices, those of ten accounts with as many as may be.
const QUERIED_MAX: usize = 50_000;
/// A piece of the answer to a query ends once it has this many bytes. Answers that are smaller come whole.
const PIECE_BYTES: usize = 1 << 20;
/// A piece of the answer to a query ends once it has looked at this many devices, because devices without keys add no bytes to it.
const PIECE_DEVICES: usize = 5_000;

/// A query for keys that is answered piece by piece.
pub(crate) struct Query {
    app: App,
    /// The client that asks; none where another server does.
    caller: Option<Caller>,
    users: Vec<Asked>,
    part: Part,
    /// The place in `users` of the one who is written next.
    next: usize,
    /// The last device of that user that was written.
    after: Option<OwnedDeviceId>,
    /// Whether the part has begun: an object that would be empty is left out where it need not be there.
    is_open: bool,
    pieces: Pieces,
    /// The memory of what other servers told.
    _held: Vec<OwnedSemaphorePermit>,
}

/// The part of an answer that is written now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Devices,
    MasterKeys,
    SelfSigningKeys,
    /// Only clients are told of a user-signing key: their own.
    UserSigningKeys,
}

/// A user whose keys are asked for.
struct Asked {
    user_id: OwnedUserId,
    /// The devices that are asked for; empty for all of them.
    devices: BTreeSet<OwnedDeviceId>,
    source: Source,
}

/// Where the keys of a user come from.
enum Source {
    /// The user is of this server.
    Here,
    /// The list that is kept here is current.
    Kept,
    /// The user's server told them just now.
    Told(OtherList),
    /// Nobody knows of any.
    Unknown,
}

/// The users whose keys are asked for, each with the devices, or with none for all of them.
type Wanted = BTreeMap<OwnedUserId, Vec<OwnedDeviceId>>;

/// `POST /keys/query`: answers the identity keys of these devices, or of all devices of users for whom none are named. An answer
/// that is large comes in pieces, so that its size costs the server no memory: the first one, as JSON, and the query for the
/// rest, if there is more. Other servers are waited for no longer than `timeout`. Errors: 413 `M_TOO_LARGE` for too many
/// users or devices.
pub(crate) async fn query(
    app: &App,
    caller: &Caller,
    wanted: Wanted,
    timeout: Option<Duration>,
) -> Result<(Bytes, Option<Box<Query>>)> {
    require_at_most(USERS_MAX, wanted.len(), "users")?;
    let (owned, own) = (app.clone(), caller.user);
    let (mut users, elsewhere) = app.env.blocking(move || Ok(split(&owned, own, wanted)?)).await?;
    let told = ask_keys::query(app, caller.user, elsewhere, timeout.unwrap_or(ask_keys::TIMEOUT)).await?;
    let (mut lists, failures, held) = (told.told, told.failures, told.held);
    for asked in &mut users {
        if let Some(list) = lists.remove(&asked.user_id) {
            asked.source = Source::Told(list);
        }
    }
    let mut pieces = Pieces::object();
    pieces.field("failures", &ask_keys::show(&failures));
    begin(app, Some(caller.clone()), users, pieces, held).await
}

/// Answers the identity keys of devices of this server for another one, as [`query`] does. Errors: 403 `M_FORBIDDEN` for users of
/// other servers, 413 `M_TOO_LARGE` for too many users or devices.
pub(crate) async fn query_for_server(app: &App, wanted: Wanted) -> Result<(Bytes, Option<Box<Query>>)> {
    require_at_most(USERS_MAX, wanted.len(), "users")?;
    require_own(app, wanted.keys().map(|user_id| &**user_id))?;
    let asked = |(user_id, devices): (_, Vec<_>)| Asked {
        user_id,
        devices: devices.into_iter().collect(),
        source: Source::Here,
    };
    let users = wanted.into_iter().map(asked).collect();
    begin(app, None, users, Pieces::object(), Vec::new()).await
}

async fn begin(
    app: &App,
    caller: Option<Caller>,
    users: Vec<Asked>,
    mut pieces: Pieces,
    held: Vec<OwnedSemaphorePermit>,
) -> Result<(Bytes, Option<Box<Query>>)> {
    let owned = app.clone();
    let begin = move || {
        pieces.open_object("device_keys");
        let (part, next, after, is_open) = (Part::Devices, 0, None, true);
        let mut query = Query { app: owned, caller, users, part, next, after, is_open, pieces, _held: held };
        let (first, is_done) = query.write_piece()?;
        if is_done {
            return Ok((first, None));
        }
        // Nothing was answered yet, so a query that would go on for too long is still refused.
        query.require_few_devices()?;
        Ok((first, Some(Box::new(query))))
    };
    app.env.blocking(begin).await
}

/// Says of each user where the keys come from, and which of them are to be asked for at their servers.
fn split(app: &App, own: UserNum, wanted: Wanted) -> Result<(Vec<Asked>, Wanted), Fault> {
    let (mut users, mut elsewhere) = (Vec::new(), BTreeMap::new());
    let snapshot = app.store.snapshot();
    let mut asker = Asker::new(&*snapshot, own)?;
    for (user_id, devices) in wanted {
        let source = if user_id.server_name() == app.accounts.server_name() {
            Source::Here
        } else if asker.may_use(&snapshot, &user_id)? {
            Source::Kept
        } else {
            elsewhere.insert(user_id.clone(), devices.clone());
            Source::Unknown
        };
        users.push(Asked { user_id, devices: devices.into_iter().collect(), source });
    }
    Ok((users, elsewhere))
}

impl Query {
    /// Writes the next piece, off the async threads, and answers the query for the rest, if there is more. Fails where the caller
    /// has been logged out.
    pub(crate) async fn next(mut self: Box<Self>) -> Result<(Bytes, Option<Box<Self>>)> {
        let env = self.app.env.clone();
        let write = move || {
            let (piece, is_done) = self.write_piece()?;
            Ok((piece, (!is_done).then_some(self)))
        };
        env.blocking(write).await
    }

    /// Writes until there is a piece of [`PIECE_BYTES`] or [`PIECE_DEVICES`]. Answers whether it is the last one.
    fn write_piece(&mut self) -> Result<(Bytes, bool)> {
        let snapshot = self.app.store.snapshot();
        if let Some(caller) = &self.caller {
            tokens::require_session(&*snapshot, caller)?;
        }
        let mut left = PIECE_DEVICES;
        loop {
            while let Some(asked) = self.users.get(self.next) {
                if left == 0 || self.pieces.byte_count() >= PIECE_BYTES {
                    return Ok((self.pieces.take(), false));
                }
                let (after, pieces) = (self.after.take(), &mut self.pieces);
                let goes_on_after = match self.part {
                    Part::Devices => asked.write_devices(&snapshot, after, &mut left, pieces)?,
                    part => {
                        left = left.saturating_sub(1);
                        if let Some(key) = asked.find_signing_key(&snapshot, self.caller.as_ref(), part)? {
                            if !std::mem::replace(&mut self.is_open, true) {
                                pieces.open_object(part.name());
                            }
                            let json = key.json();
                            pieces.field(asked.user_id.as_str(), JsonRef::stored(json.as_str().as_bytes()));
                        }
                        None
                    }
                };
                if goes_on_after.is_none() {
                    self.next += 1;
                }
                self.after = goes_on_after;
            }
            if std::mem::take(&mut self.is_open) {
                self.pieces.close();
            }
            self.next = 0;
            self.part = match self.part {
                Part::Devices => Part::MasterKeys,
                Part::MasterKeys => Part::SelfSigningKeys,
                Part::SelfSigningKeys => Part::UserSigningKeys,
                Part::UserSigningKeys => return Ok((self.pieces.finish(), true)),
            };
        }
    }

    /// Refuses a query for too many devices: 413 `M_TOO_LARGE`. Those of other servers are bounded otherwise.
    fn require_few_devices(&self) -> Result<()> {
        let snapshot = self.app.store.snapshot();
        let mut count = 0;
        let left = match self.part {
            Part::Devices => self.next,
            Part::MasterKeys | Part::SelfSigningKeys | Part::UserSigningKeys => self.users.len(),
        };
        for asked in self.users.iter().skip(left).filter(|asked| matches!(asked.source, Source::Here)) {
            if let Some(user) = users::find_num(&*snapshot, &asked.user_id)? {
                count += match asked.devices.len() {
                    0 => devices::list(&*snapshot, user)?.len(),
                    named => named,
                };
            }
            require_at_most(QUERIED_MAX, count, "devices")?;
        }
        Ok(())
    }
}

impl Part {
    /// The name of the object that an answer has for this part.
    fn name(self) -> &'static str {
        match self {
            Self::Devices => "device_keys",
            Self::MasterKeys => "master_keys",
            Self::SelfSigningKeys => "self_signing_keys",
            Self::UserSigningKeys => "user_signing_keys",
        }
    }
}

impl Asked {
    /// Writes the user's devices from the one after `after` on. Answers the last one, where it stopped before the end.
    fn write_devices(
        &self,
        read: &Snapshot,
        after: Option<OwnedDeviceId>,
        left: &mut usize,
        pieces: &mut Pieces,
    ) -> Result<Option<OwnedDeviceId>, Fault> {
        match &self.source {
            Source::Here => self.write_own(read, after, left, pieces),
            Source::Kept => {
                let devices = elsewhere::list_devices(read, &self.user_id)?;
                *left = left.saturating_sub(devices.len());
                self.write_told(devices.iter().map(|(id, device)| (id, device)), pieces)?;
                Ok(None)
            }
            Source::Told(list) => {
                *left = left.saturating_sub(list.devices.len());
                self.write_told(list.devices.iter(), pieces)?;
                Ok(None)
            }
            Source::Unknown => Ok(None),
        }
    }

    fn write_own(
        &self,
        read: &Snapshot,
        after: Option<OwnedDeviceId>,
        left: &mut usize,
        pieces: &mut Pieces,
    ) -> Result<Option<OwnedDeviceId>, Fault> {
        let Some(user) = users::find_num(read, &self.user_id)? else { return Ok(None) };
        if after.is_none() {
            pieces.open_object(self.user_id.as_str());
        }
        let page = self.list_devices(read, user, after.as_ref(), *left)?;
        *left = left.saturating_sub(page.looked_at);
        let mut goes_on_after = page.goes_on_after;
        for device in page.devices {
            let name = device.display_name.as_deref();
            if let Some(keys) = keys::find_device_keys(read, (&self.user_id, (user, device.num)), name)? {
                pieces.field(device.id.as_str(), &JsonText::from(&keys));
            }
            if pieces.byte_count() >= PIECE_BYTES {
                goes_on_after = Some(device.id);
                break;
            }
        }
        if goes_on_after.is_none() {
            pieces.close();
        }
        Ok(goes_on_after)
    }

    /// Writes devices of a user of another server that are asked for.
    fn write_told<'a>(
        &self,
        devices: impl Iterator<Item = (&'a OwnedDeviceId, &'a OtherDevice)>,
        pieces: &mut Pieces,
    ) -> Result<(), Fault> {
        pieces.open_object(self.user_id.as_str());
        for (id, device) in devices.filter(|(id, _)| self.devices.is_empty() || self.devices.contains(*id)) {
            let name = device.display_name.as_deref();
            let shown = Value::Object(keys::show(device.keys.as_bytes(), name)?);
            pieces.field(id.as_str(), &JsonText::from(&shown));
        }
        pieces.close();
        Ok(())
    }

    /// A key with which this user signs, as the caller may see it: with the caller's own signature, and their own user-signing key.
    fn find_signing_key(
        &self,
        read: &Snapshot,
        caller: Option<&Caller>,
        part: Part,
    ) -> Result<Option<Signable>, Fault> {
        let is_own = caller.is_some_and(|caller| caller.user_id == self.user_id);
        let usage = match part {
            Part::MasterKeys => Usage::Master,
            Part::SelfSigningKeys => Usage::SelfSigning,
            Part::UserSigningKeys if is_own => Usage::UserSigning,
            Part::Devices | Part::UserSigningKeys => return Ok(None),
        };
        let pick = |master: Option<String>, self_signing: Option<String>| {
            let key = if usage == Usage::Master { master } else { self_signing };
            key.and_then(|key| Signable::parse(key.as_bytes()))
        };
        let mut key = match &self.source {
            Source::Here => match users::find_num(read, &self.user_id)? {
                Some(user) => cross_signing::find_shown(read, (user, &self.user_id), usage)?,
                None => None,
            },
            Source::Unknown => None,
            Source::Kept => elsewhere::find(read, &self.user_id)?
                .and_then(|row| pick(row.master_key, row.self_signing_key)),
            Source::Told(list) => pick(list.master_key.clone(), list.self_signing_key.clone()),
        };
        if let (Some(master), Some(caller), Usage::Master) = (&mut key, caller, usage) {
            cross_signing::add_own_signature(read, (caller.user, &caller.user_id), &self.user_id, master)?;
        }
        Ok(key)
    }

    /// Looks at no more than `devices_max` of the user's devices that are asked for, by id, from the one after `after` on.
    fn list_devices(
        &self,
        read: &(impl Read + ?Sized),
        user: UserNum,
        after: Option<&OwnedDeviceId>,
        devices_max: usize,
    ) -> Result<DevicePage, Fault> {
        if self.devices.is_empty() {
            return devices::list_after(read, user, after.map(|after| &**after), devices_max);
        }
        let low = after.map_or(Bound::Unbounded, Bound::Excluded);
        let mut named = self.devices.range::<OwnedDeviceId, _>((low, Bound::Unbounded));
        let some: Vec<_> = named.by_ref().take(devices_max).collect();
        let goes_on = named.next().is_some();
        let ended = devices::find_ended(read, user)?;
        let found = some.iter().filter_map(|id| devices::find_live(read, user, &ended, id).transpose());
        let devices = found.collect::<Result<_, _>>()?;
        let goes_on_after = some.last().filter(|_| goes_on).map(|last| (**last).clone());
        Ok(DevicePage { devices, looked_at: some.len(), goes_on_after })
    }
}
