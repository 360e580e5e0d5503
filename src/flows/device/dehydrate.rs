//! Dehydrated devices (MSC3814): a client leaves a device behind that nobody is logged in to, and another one reads later what was sent to it.

use bytes::Bytes;
use ruma::OwnedDeviceId;

use crate::{
    accounts::{
        Caller, dehydrated,
        devices::{Ending, LogIn},
    },
    encryption::{device_lists, inbox, uploads::Upload},
    error::{Refusal, Result},
    flows::{
        App,
        account::{log_in, log_out},
        jobs, write,
    },
    ids::Position,
    json::{JsonRef, Object},
    store::Read,
};

/// A page has at most this many messages.
const PAGE_MESSAGES: usize = 100;
/// A page ends once its messages have this many bytes.
const PAGE_BYTES: usize = 1 << 20;

/// A device that is to be dehydrated, as its client describes it.
pub(crate) struct ToDehydrate {
    /// The id that the device is to have.
    pub(crate) id: OwnedDeviceId,
    /// The name for people.
    pub(crate) display_name: Option<String>,
    /// The JSON by which a client uses the device later.
    pub(crate) device_data: String,
    /// The keys of the device, its identity keys among them.
    pub(crate) keys: Upload,
}

/// `PUT /dehydrated_device`: makes a device with its keys, in place of the dehydrated one before, in one batch. Errors: 400 for keys that
/// are not those of the device or that it has not signed as it should, 403 for the id of a device that somebody is logged in to or of a key
/// with which the user signs, 413 for data that is too large.
pub(crate) async fn dehydrate(app: &App, caller: &Caller, wanted: ToDehydrate) -> Result<()> {
    dehydrated::check_data(&wanted.device_data)?;
    let (user, user_id) = (caller.user, caller.user_id.clone());
    // Signatures take a while to check, and others wait for the user's lock. Identity keys that come along are all that they are judged by.
    let of = user_id.clone();
    let check = move || wanted.keys.judge((&of, &wanted.id), || Ok(None)).map(|_| wanted);
    let wanted = app.env.blocking(check).await?;
    let promised = write::for_caller(app, caller, move |app, batch| {
        let before = dehydrated::find(batch, user)?;
        let promised = match &before {
            Some(before) => log_out::end(app, batch, user, &user_id, &Ending::One(before.num))?,
            None => None,
        };
        let log_in = LogIn { id: Some(wanted.id), display_name: wanted.display_name, ip: None };
        let (device, is_new) = log_in::make_device(app, batch, user, log_in)?;
        if !is_new {
            let why = "`device_id` is that of a device that is logged in; a dehydrated device needs another.";
            return Err(Refusal::forbidden(why).into());
        }
        wanted.keys.put(batch, (user, device.num), (&user_id, &device.id))?;
        dehydrated::set(batch, user, device.num, &device.id, wanted.device_data);
        // The device is new, so others are told of it whatever its keys are.
        device_lists::changed(batch, user, &user_id, &[device.id])?;
        write::wake_sharing(batch, user);
        Ok(promised)
    })
    .await?;
    jobs::begin(app, promised);
    Ok(())
}

/// `DELETE /dehydrated_device`: ends the dehydrated device, and answers its id. Errors: 404 if there is none.
pub(crate) async fn delete(app: &App, caller: &Caller) -> Result<OwnedDeviceId> {
    let (user, user_id) = (caller.user, caller.user_id.clone());
    let (id, promised) = write::for_caller(app, caller, move |app, batch| {
        let device = dehydrated::require(batch, user)?;
        let promised = log_out::end(app, batch, user, &user_id, &Ending::One(device.num))?;
        Ok((device.id, promised))
    })
    .await?;
    jobs::begin(app, promised);
    Ok(id)
}

/// Says how a reader of pages knows that there are no more. The forms of the proposal differ in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The last page with messages has no `next_batch`.
    NoToken,
    /// Each page has a `next_batch`, and a page without messages is the last. Clients of this form that find no `next_batch` begin anew.
    NoMessages,
}

/// `/dehydrated_device/{device_id}/events`: a page of the messages that wait for the dehydrated device, after those of an earlier page.
/// Nothing is deleted, so that another client can begin anew where this one breaks off. Errors: 403 if the device is not the
/// dehydrated one, 400 for a token that no page has.
pub(crate) async fn read(
    app: &App,
    caller: &Caller,
    id: OwnedDeviceId,
    from: Option<String>,
    end: End,
) -> Result<Bytes> {
    let (store, user) = (app.store.clone(), caller.user);
    let page = move || {
        let snapshot = store.snapshot();
        let device = dehydrated::find(&*snapshot, user)?.filter(|device| device.id == id);
        let device = device.ok_or_else(|| {
            Refusal::forbidden("Only the messages of your dehydrated device are read here; this is another.")
        })?;
        let after = from.map_or(Ok(Position::ZERO), |from| read_token(&from))?;
        let owner = (user, device.num);
        let mut messages = inbox::list(&*snapshot, owner, after, snapshot.upto(), PAGE_MESSAGES + 1)?;
        let mut bytes = 0;
        // The first message is always told, so that the client gets on.
        let fits = messages.iter().take(PAGE_MESSAGES).enumerate().take_while(|(at, (_, message))| {
            bytes += message.len();
            *at == 0 || bytes <= PAGE_BYTES
        });
        let count = fits.count();
        let has_more = messages.len() > count;
        messages.truncate(count);
        let mut answer = Object::with_capacity(bytes + 64);
        answer.list("events", messages.iter().map(|(_, message)| JsonRef::stored(message)));
        if has_more || end == End::NoMessages {
            let last = messages.last().map_or(after, |(last, _)| *last);
            answer.text("next_batch", &last.number().to_string());
        }
        Ok(answer.finish().into())
    };
    app.env.blocking(page).await
}

/// Reads where a page begins. Refuses what no page has told: 400 `M_INVALID_PARAM`.
fn read_token(token: &str) -> Result<Position> {
    let number = token.parse::<u64>().ok().filter(|number| number.to_string() == token);
    let odd = || Refusal::invalid_param("A page is asked for by the `next_batch` of an earlier one.");
    Ok(number.and_then(Position::new).ok_or_else(odd)?)
}
