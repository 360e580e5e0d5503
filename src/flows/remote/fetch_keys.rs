//! Asks other servers for devices, keys and one-time keys of their users, and reads their answers within bounds. A server tells keys of
//! its own users, and of those who were asked for; whatever else stands in an answer is left out, and so are keys that name another
//! user or device. Signatures are the clients' to check: they know whom they trust.
//!
//! Specification: server-server API, "Device Management" and "End-to-End Encryption".

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashSet},
};

use federation::{
    call::{Failure, Options},
    json::Answer,
};
use ruma::{
    OneTimeKeyAlgorithm, OwnedDeviceId, OwnedUserId, ServerName, UserId,
    api::federation::{
        device::get_devices,
        keys::{claim_keys, get_keys},
    },
};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::value::RawValue;

use crate::{
    accounts::devices::DEVICE_ID_BYTES_MAX,
    encryption::{
        cross_signing::Usage,
        elsewhere::{OtherDevice, OtherList},
        keys::{self, KEY_BYTES_MAX},
        signatures::Signable,
    },
    flows::App,
};

/// The name of a device is cut to this many characters, because servers choose their bounds themselves.
const DISPLAY_NAME_CHARS_MAX: usize = 255;
/// A key with which a user signs others has at most this many bytes of JSON.
const SIGNING_KEY_BYTES_MAX: usize = 32 << 10;
/// No more devices of a user are read from an answer.
const DEVICES_OF_USER_MAX: usize = 10_000;

/// A device as its server tells it; none where the keys are not those of this device.
pub(super) fn read_device(
    user_id: &UserId,
    device_id: &str,
    keys: &RawValue,
    display_name: Option<&str>,
) -> Option<(OwnedDeviceId, OtherDevice)> {
    let device_id = read_device_id(device_id)?;
    keys::check_device_keys(keys, user_id, &device_id).ok()?;
    let display_name = display_name.map(|name| name.chars().take(DISPLAY_NAME_CHARS_MAX).collect());
    Some((device_id, OtherDevice { keys: keys.get().to_owned(), display_name }))
}

/// The id of a device, if it may be one.
pub(super) fn read_device_id(device_id: &str) -> Option<OwnedDeviceId> {
    let may_be = !device_id.is_empty() && device_id.len() <= DEVICE_ID_BYTES_MAX;
    may_be.then(|| device_id.into())
}

/// A key with which a user signs others; none where it is another kind of key, or somebody else's. Signatures of others are left out:
/// who has signed whose keys is nobody's business but theirs.
pub(super) fn read_signing_key(user_id: &UserId, key: &RawValue, usage: Usage) -> Option<String> {
    let is_small = key.get().len() <= SIGNING_KEY_BYTES_MAX;
    let read = is_small.then(|| Signable::parse(key.get().as_bytes()))??;
    let is_right = read.text("user_id") == Some(user_id.as_str())
        && read.texts("usage").any(|it| it == usage.as_str())
        && read.keys().count() == 1;
    if !is_right {
        return None;
    }
    let signatures: Vec<_> = read.signatures(user_id.as_str()).collect();
    let shown = read.clone().with_signatures(user_id.as_str(), signatures);
    Some(shown.json().into())
}

/// Reads an answer off the async threads.
async fn read<T: Send + 'static>(
    app: &App,
    answer: Answer,
    read: impl FnOnce(&[u8]) -> Option<T> + Send + 'static,
) -> Result<T, Failure> {
    let read = app.env.blocking(move || Ok(read(answer.bytes()))).await;
    match read {
        Ok(Some(read)) => Ok(read),
        Ok(None) => Err(Failure::Nonsense("it is not in the form of this answer".to_owned())),
        Err(_) => Err(Failure::Busy),
    }
}

fn parse<T: DeserializeOwned>(json: &RawValue) -> Option<T> {
    serde_json::from_str(json.get()).ok()
}

/// Asks for the whole device list of a user.
pub(super) async fn list(app: &App, user_id: &UserId, options: Options) -> Result<OtherList, Failure> {
    let request = get_devices::v1::Request::new(user_id.to_owned());
    let reply = app.remote.client.ask(user_id.server_name(), request, options).await?;
    let of = user_id.to_owned();
    read(app, reply.answer, move |bytes| read_list(&of, bytes)).await
}

fn read_list(user_id: &UserId, bytes: &[u8]) -> Option<OtherList> {
    #[derive(Deserialize)]
    struct Body<'a> {
        user_id: String,
        stream_id: u64,
        #[serde(borrow)]
        devices: Vec<&'a RawValue>,
        #[serde(borrow, default)]
        master_key: Option<&'a RawValue>,
        #[serde(borrow, default)]
        self_signing_key: Option<&'a RawValue>,
    }
    #[derive(Deserialize)]
    struct Device {
        device_id: String,
        /// Some servers list devices without keys, which nobody can encrypt for.
        #[serde(default)]
        keys: Option<Box<RawValue>>,
        #[serde(default)]
        device_display_name: Option<String>,
    }
    let body: Body<'_> = serde_json::from_slice(bytes).ok()?;
    if body.user_id != user_id.as_str() {
        return None;
    }
    let devices = body.devices.into_iter().take(DEVICES_OF_USER_MAX).filter_map(|device| {
        let device: Device = parse(device)?;
        read_device(user_id, &device.device_id, &device.keys?, device.device_display_name.as_deref())
    });
    let signing = |key: Option<&RawValue>, usage| read_signing_key(user_id, key?, usage);
    Some(OtherList {
        stream_id: body.stream_id,
        devices: devices.collect(),
        master_key: signing(body.master_key, Usage::Master),
        self_signing_key: signing(body.self_signing_key, Usage::SelfSigning),
    })
}

/// The users whose devices are asked for, each with the devices, or with none for all of them.
pub(super) type Wanted = BTreeMap<OwnedUserId, Vec<OwnedDeviceId>>;

/// Asks a server for keys of devices of its users. Their lists are not whole: they have no number, and only devices that were asked
/// for.
pub(super) async fn keys(
    app: &App,
    server: &ServerName,
    wanted: Wanted,
    options: Options,
) -> Result<BTreeMap<OwnedUserId, OtherList>, Failure> {
    let request = get_keys::v1::Request::new(wanted.clone());
    let reply = app.remote.client.ask(server, request, options).await?;
    read(app, reply.answer, move |bytes| read_keys(&wanted, bytes)).await
}

fn read_keys(wanted: &Wanted, bytes: &[u8]) -> Option<BTreeMap<OwnedUserId, OtherList>> {
    #[derive(Deserialize)]
    struct Body<'a> {
        #[serde(borrow)]
        device_keys: BTreeMap<Cow<'a, str>, &'a RawValue>,
        #[serde(borrow, default)]
        master_keys: Option<&'a RawValue>,
        #[serde(borrow, default)]
        self_signing_keys: Option<&'a RawValue>,
    }
    #[derive(Deserialize)]
    struct Named {
        #[serde(default)]
        unsigned: Option<Box<RawValue>>,
    }
    #[derive(Deserialize)]
    struct Unsigned {
        #[serde(default)]
        device_display_name: Option<String>,
    }
    type ByText = BTreeMap<String, Box<RawValue>>;
    let body: Body<'_> = serde_json::from_slice(bytes).ok()?;
    let by_user = |keys: Option<&RawValue>| keys.and_then(parse::<ByText>).unwrap_or_default();
    let (masters, self_signing) = (by_user(body.master_keys), by_user(body.self_signing_keys));
    let mut lists = BTreeMap::new();
    for (user_id, devices_wanted) in wanted {
        let mut list = OtherList::default();
        // Both sides may be long, and come from outside.
        let wanted_ids: HashSet<&str> = devices_wanted.iter().map(|id| id.as_str()).collect();
        let devices = body.device_keys.get(user_id.as_str()).copied().and_then(parse::<ByText>);
        for (device_id, keys) in devices.into_iter().flatten().take(DEVICES_OF_USER_MAX) {
            if !devices_wanted.is_empty() && !wanted_ids.contains(&*device_id) {
                continue;
            }
            let unsigned = parse::<Named>(&keys).and_then(|keys| parse::<Unsigned>(&keys.unsigned?));
            let name = unsigned.and_then(|unsigned| unsigned.device_display_name);
            list.devices.extend(read_device(user_id, &device_id, &keys, name.as_deref()));
        }
        let signing = |keys: &ByText, usage| read_signing_key(user_id, keys.get(user_id.as_str())?, usage);
        list.master_key = signing(&masters, Usage::Master);
        list.self_signing_key = signing(&self_signing, Usage::SelfSigning);
        if list != OtherList::default() || body.device_keys.contains_key(user_id.as_str()) {
            lists.insert(user_id.clone(), list);
        }
    }
    Some(lists)
}

/// The devices of which a one-time key is wanted, each with the algorithm of the key.
pub(super) type Wishes = BTreeMap<OwnedUserId, BTreeMap<OwnedDeviceId, OneTimeKeyAlgorithm>>;
/// A claimed key: the user, the device, its id and its JSON.
pub(super) type Claimed = (OwnedUserId, OwnedDeviceId, String, Box<RawValue>);

/// Claims a one-time key of each of these devices at their server.
pub(super) async fn claim(
    app: &App,
    server: &ServerName,
    wishes: Wishes,
    options: Options,
) -> Result<Vec<Claimed>, Failure> {
    let request = claim_keys::v1::Request::new(wishes.clone());
    let reply = app.remote.client.ask(server, request, options).await?;
    read(app, reply.answer, move |bytes| read_claimed(&wishes, bytes)).await
}

fn read_claimed(wishes: &Wishes, bytes: &[u8]) -> Option<Vec<Claimed>> {
    type Keys = BTreeMap<String, Box<RawValue>>;
    #[derive(Deserialize)]
    struct Body<'a> {
        #[serde(borrow)]
        one_time_keys: BTreeMap<Cow<'a, str>, &'a RawValue>,
    }
    let body: Body<'_> = serde_json::from_slice(bytes).ok()?;
    let mut claimed = Vec::new();
    for (user_id, wishes) in wishes {
        let devices = body.one_time_keys.get(user_id.as_str()).copied().and_then(parse::<Keys>);
        let Some(mut devices) = devices else { continue };
        for (device_id, algorithm) in wishes {
            let keys = devices.remove(device_id.as_str()).and_then(|keys| parse::<Keys>(&keys));
            // One key was asked for: whoever answers with more gives keys away that others need.
            let key = keys.into_iter().flatten().find(|(id, key)| {
                let is_of =
                    id.split_once(':').is_some_and(|(of, id)| of == algorithm.as_ref() && !id.is_empty());
                let is_small = id.len() <= DEVICE_ID_BYTES_MAX && key.get().len() <= KEY_BYTES_MAX;
                is_of && is_small && key.get().starts_with(['{', '"'])
            });
            claimed.extend(key.map(|(id, key)| (user_id.clone(), device_id.clone(), id, key)));
        }
    }
    Some(claimed)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn bob() -> OwnedUserId {
        "@bob:b.example".try_into().unwrap()
    }

    fn keys(user: &str, device: &str) -> Value {
        json!({
            "user_id": user, "device_id": device, "algorithms": [], "keys": {}, "signatures": {},
            "unsigned": { "device_display_name": "Phone", "other": 1 },
        })
    }

    fn signing(user: &str, usage: &str) -> Value {
        json!({ "user_id": user, "usage": [usage], "keys": { "ed25519:k": "k" } })
    }

    #[test]
    fn many_devices_that_are_asked_for_are_found_among_many_that_are_told() {
        let devices: serde_json::Map<_, _> =
            (0..DEVICES_OF_USER_MAX).map(|number| (format!("D{number:05}"), json!({}))).collect();
        let answer = json!({ "device_keys": { "@bob:b.example": devices } }).to_string();
        let read = |asked: usize| {
            // None of these is among those that are told, so that each would be compared with all of them.
            let ids = (0..asked).map(|number| OwnedDeviceId::from(format!("X{number:05}"))).collect();
            let wanted = Wanted::from([(bob(), ids)]);
            let took = |_| {
                #[expect(
                    clippy::disallowed_methods,
                    reason = "the test measures the time that the work takes"
                )]
                let began = std::time::Instant::now();
                assert!(read_keys(&wanted, answer.as_bytes()).unwrap()[&bob()].devices.is_empty());
                began.elapsed()
            };
            (0..3).map(took).min().unwrap()
        };
        let (few, many) = (read(1), read(90_000));
        assert!(many < few * 25, "{few:?} for one, {many:?} for 90,000");
    }

    #[test]
    fn a_list_has_what_is_of_its_user_and_whole() {
        let answer = json!({
            "user_id": "@bob:b.example", "stream_id": 7,
            "devices": [
                { "device_id": "A", "keys": keys("@bob:b.example", "A"), "device_display_name": "N".repeat(300) },
                { "device_id": "B", "keys": keys("@bob:b.example", "A") },
                { "device_id": "C", "keys": keys("@eve:b.example", "C") },
                { "device_id": "D" },
                { "device_id": "", "keys": keys("@bob:b.example", "") },
                { "device_id": "E", "keys": { "user_id": "@bob:b.example", "device_id": "E" } },
                7,
            ],
            "master_key": signing("@bob:b.example", "master"),
            "self_signing_key": signing("@bob:b.example", "master"),
        });
        let list = read_list(&bob(), answer.to_string().as_bytes()).unwrap();
        assert_eq!(list.devices.keys().map(|id| id.as_str()).collect::<Vec<_>>(), ["A"]);
        assert_eq!(list.devices.values().next().unwrap().display_name.as_ref().unwrap().len(), 255);
        assert_eq!((list.stream_id, list.self_signing_key), (7, None));
        assert!(list.master_key.unwrap().contains("master"));
        for wrong in [
            json!([]),
            json!({}),
            json!({ "user_id": "@eve:b.example", "stream_id": 7, "devices": [] }),
            json!({ "user_id": "@bob:b.example", "stream_id": -7, "devices": [] }),
            json!({ "user_id": "@bob:b.example", "stream_id": 7, "devices": {} }),
        ] {
            assert_eq!(read_list(&bob(), wrong.to_string().as_bytes()), None, "{wrong}");
        }
        assert_eq!(read_list(&bob(), b"{"), None);
    }

    #[test]
    fn an_answer_about_keys_has_what_was_asked_for() {
        let answer = json!({
            "device_keys": {
                "@bob:b.example": {
                    "A": keys("@bob:b.example", "A"), "B": keys("@bob:b.example", "B"),
                    "C": keys("@bob:b.example", "X"), "D": 1,
                },
                "@eve:b.example": { "A": keys("@eve:b.example", "A") },
                "@carol:b.example": "nothing",
            },
            "master_keys": { "@bob:b.example": signing("@eve:b.example", "master") },
            "self_signing_keys": { "@bob:b.example": signing("@bob:b.example", "self_signing"), "x": 1 },
        });
        let carol: OwnedUserId = "@carol:b.example".try_into().unwrap();
        let all = Wanted::from([(bob(), Vec::new()), (carol.clone(), Vec::new())]);
        let lists = read_keys(&all, answer.to_string().as_bytes()).unwrap();
        assert_eq!(lists.len(), 2);
        assert_eq!(lists[&carol], OtherList::default());
        let bobs = &lists[&bob()];
        assert_eq!(bobs.devices.keys().map(|id| id.as_str()).collect::<Vec<_>>(), ["A", "B"]);
        assert_eq!(bobs.devices.values().next().unwrap().display_name.as_deref(), Some("Phone"));
        assert!(bobs.master_key.is_none() && bobs.self_signing_key.is_some());
        let one = Wanted::from([(bob(), vec!["B".into()])]);
        let lists = read_keys(&one, answer.to_string().as_bytes()).unwrap();
        assert_eq!(lists[&bob()].devices.len(), 1);
        assert!(read_keys(&one, b"{}").is_none());
        assert!(read_keys(&one, br#"{"device_keys":{}}"#).unwrap().is_empty());
    }

    #[test]
    fn one_key_of_the_right_kind_is_taken_for_each_device() {
        let wishes = |devices: &[&str]| -> Wishes {
            let devices = devices.iter().map(|id| ((*id).into(), OneTimeKeyAlgorithm::SignedCurve25519));
            Wishes::from([(bob(), devices.collect())])
        };
        let answer = json!({ "one_time_keys": {
            "@bob:b.example": {
                "A": { "curve25519:X": "x", "signed_curve25519:Y": { "key": "y" }, "signed_curve25519:Z": { "key": "z" } },
                "B": { "signed_curve25519:": { "key": "y" }, "signed_curve25519:N": 5 },
                "C": { "signed_curve25519:L": { "key": "k".repeat(KEY_BYTES_MAX) } },
                "D": [],
                "E": { "signed_curve25519:E": { "key": "e" } },
            },
            "@eve:b.example": { "A": { "signed_curve25519:Y": { "key": "y" } } },
        } });
        let claimed =
            read_claimed(&wishes(&["A", "B", "C", "D", "F"]), answer.to_string().as_bytes()).unwrap();
        let claimed: Vec<_> = claimed
            .iter()
            .map(|(user, device, id, key)| (user.as_str(), device.as_str(), &**id, key.get()))
            .collect();
        assert_eq!(claimed, [("@bob:b.example", "A", "signed_curve25519:Y", r#"{"key":"y"}"#)]);
        assert!(read_claimed(&wishes(&["A"]), b"[]").is_none());
    }
}
