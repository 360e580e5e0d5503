//! Dehydrated devices (MSC3814): a client leaves a device behind that nobody is logged in to, and another one reads later what was sent to it.

use bytes::Bytes;
use ruma::OwnedDeviceId;
use serde_json::value::RawValue;

use crate::{
    accounts::{
        Caller, dehydrated,
        devices::{self, Ending, LogIn},
    },
    encryption::{
        device_lists, inbox,
        keys::{self, Keys},
    },
    error::{Refusal, Result},
    flows::{App, account::log_out, jobs, write},
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
    /// The identity keys of the device.
    pub(crate) device_keys: Box<RawValue>,
    /// The keys of which each is given to one other device only.
    pub(crate) one_time_keys: Keys,
    /// The keys that are given when no one-time keys are left.
    pub(crate) fallback_keys: Keys,
}

/// `PUT /dehydrated_device`: makes a device with its keys, in place of the dehydrated one before, in one batch. Errors: 400 for keys that
/// are not those of the device, 403 for the id of a device that somebody is logged in to, 413 for data that is too large.
pub(crate) async fn dehydrate(app: &App, caller: &Caller, wanted: ToDehydrate) -> Result<()> {
    dehydrated::check_data(&wanted.device_data)?;
    keys::check_device_keys(&wanted.device_keys, &caller.user_id, &wanted.id)?;
    let (user, user_id) = (caller.user, caller.user_id.clone());
    let promised = write::for_caller(app, caller, move |app, batch| {
        let before = dehydrated::find(batch, user)?;
        let promised = match &before {
            Some(before) => log_out::end(app, batch, user, &user_id, &Ending::One(before.num))?,
            None => None,
        };
        let log_in = LogIn { id: Some(wanted.id), display_name: wanted.display_name, ip: None };
        let (device, is_new) = devices::log_in(batch, &app.env, user, log_in)?;
        if !is_new {
            let why = "`device_id` is that of a device that is logged in; a dehydrated device needs another.";
            return Err(Refusal::forbidden(why).into());
        }
        let owner = (user, device.num);
        keys::put_device_keys(batch, owner, &wanted.device_keys)?;
        keys::put_one_time_keys(batch, owner, &wanted.one_time_keys)?;
        keys::put_fallback_keys(batch, owner, &wanted.fallback_keys)?;
        dehydrated::set(batch, user, device.num, &device.id, wanted.device_data);
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

/// `/dehydrated_device/{device_id}/events`: a page of the messages that wait for the dehydrated device, after those of an earlier page.
/// Nothing is deleted, so that another client can begin anew where this one breaks off. Errors: 403 if the device is not the
/// dehydrated one, 400 for a token that no page has.
pub(crate) async fn read(
    app: &App,
    caller: &Caller,
    id: OwnedDeviceId,
    from: Option<String>,
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
        if let Some((last, _)) = messages.last().filter(|_| has_more) {
            answer.text("next_batch", &last.number().to_string());
        }
        Ok(answer.finish().into())
    };
    app.env.blocking(page).await
}

/// Reads where a page begins. Refuses what no page has told: 400 `M_INVALID_PARAM`.
fn read_token(token: &str) -> Result<Position> {
    let number = token.parse::<u64>().ok().filter(|number| number.to_string() == token);
    let odd = || Refusal::invalid_param("`from` must be the `next_batch` of an earlier page.");
    Ok(number.and_then(Position::new).ok_or_else(odd)?)
}
