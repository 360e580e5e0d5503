//! Sends messages to devices, once for each transaction id.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use ruma::{
    OwnedServerName, OwnedUserId, ServerName, TransactionId, events::AnyToDeviceEventContent, serde::Raw,
    to_device::DeviceIdOrAllDevices,
};

use crate::{
    accounts::{Caller, devices, users},
    delivery::servers::outbox::{self, Content},
    encryption::{
        inbox::{self, Message},
        keys::Owner,
        to_device,
    },
    error::{Refusal, Result},
    flows::{
        App,
        limits::{Limit, Source},
        write,
    },
    ids::{DeviceNum, UserNum},
    schema::encryption::SendProgress,
    store::{Batch, Fault, Read},
};

/// A batch is closed once it has this many rows; one more message still fits, with the deletions that make room for it.
const BATCH_ROWS: usize = 3_000;
/// A batch is closed once it has this many bytes.
const BATCH_BYTES: usize = 512 << 10;
/// A batch serves at most this many users of this server, so that few are locked at once.
const BATCH_USERS: usize = 500;
/// A batch serves at most this many targets.
const BATCH_TARGETS: usize = 5_000;
/// Messages for other servers go together up to this many bytes, which is what one event may have.
const TOGETHER_BYTES: usize = 60 << 10;
/// At most this many messages go together.
const TOGETHER_MAX: usize = 100;
/// The bytes around the ids and the content of a message.
const AROUND_BYTES: usize = 16;
/// A message counts as one act for its sender's limit for each of this many bytes, and for each device that it reaches.
const ACT_BYTES: usize = 4 << 10;
/// A request reaches at most this many devices.
const DEVICES_MAX: usize = 10_000;
/// Characters of the id by which another server knows a message again.
const MESSAGE_ID_CHARACTERS: usize = 24;
/// An event type or a transaction id has at most this many bytes, because both are part of keys.
const NAME_BYTES_MAX: usize = 255;

/// The content for each device, or for all devices of a user.
pub(crate) type Messages =
    BTreeMap<OwnedUserId, BTreeMap<DeviceIdOrAllDevices, Raw<AnyToDeviceEventContent>>>;

/// A request to send messages, as it was read and checked.
struct Request {
    sender: Owner,
    sender_id: OwnedUserId,
    event_type: String,
    txn_id: String,
    /// The targets in an order that is the same for each try, so that a retry goes on from where the last one ended.
    targets: Vec<Target>,
}

/// A device, or all devices of a user, and the message for them.
pub(crate) struct Target {
    to: Receiver,
    device: DeviceIdOrAllDevices,
    message: Message,
}

/// The user who gets a message.
enum Receiver {
    /// A user of this server.
    Here(UserNum),
    /// A user of another server, with the content as it goes there.
    Elsewhere(OwnedUserId, Raw<AnyToDeviceEventContent>),
    /// Nobody of this name is here, or other servers are not spoken to.
    Nobody,
}

/// A message for a user of another server.
#[derive(Clone, Copy)]
pub(crate) struct Elsewhere<'a> {
    user_id: &'a OwnedUserId,
    device: &'a DeviceIdOrAllDevices,
    content: &'a Raw<AnyToDeviceEventContent>,
}

impl<'a> Elsewhere<'a> {
    fn device(&self) -> &'a str {
        match self.device {
            DeviceIdOrAllDevices::DeviceId(id) => id.as_str(),
            DeviceIdOrAllDevices::AllDevices => "*",
        }
    }

    fn byte_count(&self) -> usize {
        let ids = self.user_id.as_str().len() + self.device().len();
        ids + self.content.json().get().len() + AROUND_BYTES
    }
}

impl Target {
    /// A message for a user of this server.
    pub(crate) fn here(user: UserNum, device: DeviceIdOrAllDevices, message: Message) -> Self {
        Self { to: Receiver::Here(user), device, message }
    }

    /// The number of the user who gets it, if it is one of this server.
    pub(crate) fn user(&self) -> Option<UserNum> {
        match &self.to {
            Receiver::Here(user) => Some(*user),
            Receiver::Elsewhere(..) | Receiver::Nobody => None,
        }
    }
}

/// `PUT /sendToDevice`: sends messages once for each transaction id, however often the request comes and even if the server
/// crashes meanwhile. Messages to users of other servers wait in the outboxes of these. Unknown users and devices are passed over,
/// and so is a device whose inbox, or a server whose outbox, is full. Errors: 413 for a message that is too large, or more than 10,000 devices.
pub(crate) async fn send_to_device(
    app: &App,
    caller: &Caller,
    event_type: String,
    txn_id: &TransactionId,
    messages: Messages,
) -> Result<()> {
    if event_type.len() > NAME_BYTES_MAX || txn_id.as_str().len() > NAME_BYTES_MAX {
        return Err(Refusal::invalid_param("`eventType` and `txnId` have at most 255 bytes.").into());
    }
    let (begun, sender, txn_id) = (app.clone(), caller.clone(), txn_id.to_string());
    let read = move || read_request(&begun, &sender, event_type, txn_id, messages);
    let (request, mut progress) = app.env.blocking(read).await?;
    let request = Arc::new(request);
    while !progress.is_done {
        progress = serve_next(app, caller, Arc::clone(&request), progress).await?;
    }
    Ok(())
}

/// Reads and checks the request, and looks up the progress of earlier tries.
fn read_request(
    app: &App,
    caller: &Caller,
    event_type: String,
    txn_id: String,
    messages: Messages,
) -> Result<(Request, SendProgress)> {
    let snapshot = app.store.snapshot();
    let mut targets = Vec::new();
    for (user_id, devices) in messages {
        let is_here = user_id.server_name() == app.config.server.name;
        let user = users::find_num(&*snapshot, &user_id)?;
        for (device, content) in devices {
            // An invalid message is refused even if its user is not here, so that the error does not depend on who exists.
            let message = Message::new(&caller.user_id, &event_type, content.json())?;
            let to = match user {
                Some(user) => Receiver::Here(user),
                None if is_here || !app.config.federation.enabled => Receiver::Nobody,
                None => Receiver::Elsewhere(user_id.clone(), content),
            };
            targets.push(Target { to, device, message });
        }
    }
    let sender = (caller.user, caller.device);
    let progress = to_device::progress(&*snapshot, sender, &event_type, &txn_id)?;
    let sender_id = caller.user_id.clone();
    let request = Request { sender, sender_id, event_type, txn_id, targets };
    if progress == SendProgress::default() {
        let acts = count_acts(&*snapshot, &request)?;
        // The route has counted one act already.
        app.limits.take_more(Limit::ToDevice, Source::User(caller.user), acts.saturating_sub(1))?;
    }
    Ok((request, progress))
}

/// The number of acts that a request is: a message to a device is one, and a large message is several. Refuses (413) a request
/// that reaches too many devices, before anything is sent.
fn count_acts(read: &(impl Read + ?Sized), request: &Request) -> Result<usize> {
    let (mut count, mut sum) = (0, 0);
    for target in &request.targets {
        let devices = match &target.to {
            // How many devices the user has, the other server knows.
            Receiver::Elsewhere(..) => 1,
            Receiver::Here(_) | Receiver::Nobody => list_devices(read, target, DeviceNum(0))?.len(),
        };
        count += devices;
        sum += devices * acts(&target.message);
        if count > DEVICES_MAX {
            let why = format!("A request reaches at most {DEVICES_MAX} devices; name fewer in `messages`.");
            return Err(Refusal::too_large(why).into());
        }
    }
    Ok(sum)
}

/// The number of acts that a message is for each device that it reaches.
pub(crate) fn acts(message: &Message) -> usize {
    message.byte_count().div_ceil(ACT_BYTES)
}

/// The device numbers of a target above this one, in rising order.
pub(crate) fn list_devices(
    read: &(impl Read + ?Sized),
    target: &Target,
    above: DeviceNum,
) -> Result<Vec<DeviceNum>, Fault> {
    let Some(user) = target.user() else { return Ok(Vec::new()) };
    let chosen = match &target.device {
        DeviceIdOrAllDevices::DeviceId(id) => devices::find(read, user, id)?.into_iter().collect(),
        DeviceIdOrAllDevices::AllDevices => devices::list(read, user)?,
    };
    let mut nums: Vec<_> = chosen.iter().map(|device| device.num).filter(|num| *num > above).collect();
    nums.sort_unstable();
    Ok(nums)
}

/// Sends as many messages as fit into one batch, from where this try or a parallel one has got to.
async fn serve_next(
    app: &App,
    caller: &Caller,
    request: Arc<Request>,
    known: SendProgress,
) -> Result<SendProgress> {
    let (locked, end) = next_of(&request.targets, known);
    let (after, filled) = write::for_caller_and_users(app, caller, locked, move |app, batch| {
        let (event_type, txn_id) = (&request.event_type, &request.txn_id);
        let before = to_device::progress(batch, request.sender, event_type, txn_id)?;
        if before.is_done || before.targets != known.targets {
            return Ok((before, BTreeSet::new()));
        }
        let mut outgoing = Outgoing::new(app, &request);
        let after =
            fill(app, batch, &request.targets, before, end, &mut |batch, to| outgoing.add(batch, to))?;
        let filled = outgoing.put_all(batch);
        to_device::note_progress(batch, request.sender, event_type, txn_id, &after, app.env.now_ms())?;
        Ok((after, filled))
    })
    .await?;
    for server in filled {
        app.delivery.outbox_filled(&server);
    }
    Ok(after)
}

/// The users whose inboxes the next batch fills, and the target with which it ends.
pub(crate) fn next_of(all: &[Target], progress: SendProgress) -> (Vec<UserNum>, usize) {
    let begin = usize::try_from(progress.targets).unwrap_or(usize::MAX).min(all.len());
    let (mut users, mut end) = (Vec::new(), begin);
    for target in all.iter().skip(begin).take(BATCH_TARGETS) {
        if users.len() == BATCH_USERS {
            break;
        }
        users.extend(target.user());
        end += 1;
    }
    (users, end)
}

/// Fills a batch with messages to the targets before `end`, and answers the progress. `elsewhere` takes those for users of other servers, and
/// answers how many bytes of them are still to come into the batch.
pub(crate) fn fill<'t>(
    app: &App,
    batch: &mut Batch,
    all: &'t [Target],
    mut progress: SendProgress,
    end: usize,
    elsewhere: &mut dyn FnMut(&mut Batch, Elsewhere<'t>) -> usize,
) -> Result<SendProgress> {
    let mut waiting = 0;
    let is_full = |batch: &Batch, waiting: usize| {
        batch.row_count() >= BATCH_ROWS || batch.byte_count() + waiting >= BATCH_BYTES
    };
    let begin = usize::try_from(progress.targets).unwrap_or(usize::MAX);
    let targets = all.get(begin..end).unwrap_or_default();
    for target in targets {
        if let Receiver::Elsewhere(user_id, content) = &target.to {
            if is_full(batch, waiting) {
                return Ok(progress);
            }
            waiting = elsewhere(batch, Elsewhere { user_id, device: &target.device, content });
        }
        let devices = list_devices(batch, target, progress.device)?;
        for device in devices {
            if is_full(batch, waiting) {
                return Ok(progress);
            }
            if let Some(user) = target.user() {
                put(app, batch, (user, device), &target.message)?;
            }
            progress.device = device;
        }
        progress = SendProgress { targets: progress.targets + 1, ..SendProgress::default() };
    }
    progress.is_done = end == all.len();
    Ok(progress)
}

/// The messages of a request for users of other servers. Those for one server go together: many devices cost few rows and few requests.
struct Outgoing<'r> {
    app: &'r App,
    request: &'r Request,
    open: BTreeMap<&'r ServerName, Together<'r>>,
    /// The bytes of all that is open.
    bytes: usize,
    /// The servers whose outboxes have taken something.
    filled: BTreeSet<OwnedServerName>,
}

/// Messages for one server.
#[derive(Default)]
struct Together<'r> {
    messages: Vec<Elsewhere<'r>>,
    bytes: usize,
}

impl<'r> Outgoing<'r> {
    fn new(app: &'r App, request: &'r Request) -> Self {
        Self { app, request, open: BTreeMap::new(), bytes: 0, filled: BTreeSet::new() }
    }

    /// Adds a message. Answers the bytes of those that are not in the batch yet.
    fn add(&mut self, batch: &mut Batch, message: Elsewhere<'r>) -> usize {
        let server = message.user_id.server_name();
        let bytes = message.byte_count();
        // How many devices a user has, the other server knows, which takes no message to very many: those go alone.
        if matches!(message.device, DeviceIdOrAllDevices::AllDevices) {
            self.put(batch, server, &[message]);
            return self.bytes;
        }
        let open = self.open.entry(server).or_default();
        if open.messages.len() >= TOGETHER_MAX || open.bytes + bytes > TOGETHER_BYTES {
            let full = std::mem::take(open);
            self.bytes -= full.bytes;
            self.put(batch, server, &full.messages);
        }
        let open = self.open.entry(server).or_default();
        open.messages.push(message);
        open.bytes += bytes;
        self.bytes += bytes;
        self.bytes
    }

    /// Puts all that is left into the outboxes. Answers the servers whose outboxes have taken something.
    fn put_all(mut self, batch: &mut Batch) -> BTreeSet<OwnedServerName> {
        for (server, open) in std::mem::take(&mut self.open) {
            self.put(batch, server, &open.messages);
        }
        self.filled
    }

    /// Puts messages into the outbox of another server. A full outbox affects this server only, so the request goes on.
    fn put(&mut self, batch: &mut Batch, server: &ServerName, messages: &[Elsewhere<'r>]) {
        if messages.is_empty() {
            return;
        }
        let (app, request) = (self.app, self.request);
        let content =
            |it: &Elsewhere<'r>| Content { to: it.user_id, device: it.device(), content: it.content };
        let contents: Vec<_> = messages.iter().map(content).collect();
        let message = outbox::Message {
            sender: &request.sender_id,
            event_type: &request.event_type,
            message_id: &app.env.random_string(MESSAGE_ID_CHARACTERS),
            contents: &contents,
        };
        let json = message.json();
        if !app.delivery.reserve_outbox(server, &request.sender_id, &request.event_type, json.len()) {
            app.metrics.to_device_dropped("outbox_full", messages.len());
            tracing::debug!(%server, count = messages.len(), reason = "it is full, or may not be spoken to", "the outbox of a server does not take messages");
            return;
        }
        outbox::put(batch, server.as_str(), request.sender.0, json, app.env.now_ms());
        self.filled.insert(server.to_owned());
    }
}

/// Puts a message into one inbox. A full inbox affects its own device only, so the request goes on.
fn put(app: &App, batch: &mut Batch, owner: Owner, message: &Message) -> Result<(), Fault> {
    let (user, device) = owner;
    let put = inbox::put(batch, owner, message)?;
    if put.gave_way > 0 {
        app.metrics.to_device_dropped("key_request", put.gave_way);
        tracing::debug!(%user, %device, reason = "key_request", count = put.gave_way, "a full inbox makes room");
    }
    if put.taken > 0 {
        app.metrics.to_device_dropped("fullest_server", put.taken);
        tracing::debug!(%user, %device, reason = "fullest_server", count = put.taken, "a full inbox makes room");
    }
    match put.kept {
        Ok(_) => write::wake(batch, user),
        Err(why) => {
            app.metrics.to_device_dropped(why.name(), 1);
            tracing::debug!(%user, %device, reason = why.name(), "an inbox does not take a message");
        }
    }
    Ok(())
}
