//! Tests of requests for the keys of more devices than a test over the router can log in.

use std::collections::BTreeMap;

use bytes::Bytes;
use ruma::{OwnedDeviceId, OwnedUserId};
use serde_json::json;

use crate::{
    accounts::devices::{self, Device, Ending, LogIn},
    encryption::keys::Keys,
    env::Env,
    flows::account::{log_in, log_out},
    server::Server,
    store::Batch,
};

use super::{
    claim::{CLAIMS_PER_BATCH, Wishes},
    *,
};

/// Logs this many further devices of a user in. None of them uploads keys.
async fn log_in(app: &App, caller: &Caller, count: usize) {
    for from in (0..count).step_by(500) {
        let (user, user_id) = (caller.user, caller.user_id.clone());
        let build = move |app: &App, batch: &mut Batch| {
            for number in from..count.min(from + 500) {
                let id = Some(format!("D{number:05}").into());
                let device = LogIn { id, ..LogIn::default() };
                log_in::build(app, batch, user, &user_id, device, false)?;
            }
            Ok(())
        };
        write::for_user(app, caller.user, build).await.unwrap();
    }
}

/// The pieces of the answer to a query.
async fn pieces(app: &App, caller: &Caller, wanted: BTreeMap<OwnedUserId, Vec<OwnedDeviceId>>) -> Vec<Bytes> {
    let (first, mut rest) = query(app, caller, wanted, None).await.unwrap();
    let mut pieces = vec![first];
    while let Some(query) = rest.take() {
        let (piece, left) = query.next().await.unwrap();
        pieces.push(piece);
        rest = left;
    }
    pieces
}

#[tokio::test(start_paused = true)]
async fn a_piece_looks_at_a_bounded_number_of_devices_that_have_no_keys() {
    let server = Server::in_memory(Env::simulated(1, 0));
    let app = server.app();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    for user in [&alice, &bob] {
        log_in(app, user, 3_000).await;
    }
    let keys = json!({ "user_id": bob.user_id, "device_id": bob.device_id, "algorithms": [],
        "keys": {}, "signatures": {} });
    let device_keys = serde_json::value::to_raw_value(&keys).unwrap();
    let (one_time_keys, fallback_keys) = (Keys::default(), Keys::default());
    upload(app, &bob, Upload { device_keys: Some(device_keys), one_time_keys, fallback_keys }).await.unwrap();

    let all = BTreeMap::from([(alice.user_id.clone(), Vec::new()), (bob.user_id.clone(), Vec::new())]);
    let of_all = pieces(app, &alice, all).await;
    assert_eq!(of_all.len(), 2, "6,002 devices take two pieces");
    let answer: serde_json::Value = serde_json::from_slice(&of_all.concat()).unwrap();
    assert_eq!(answer["device_keys"][alice.user_id.as_str()], json!({}));
    assert_eq!(answer["device_keys"][bob.user_id.as_str()].as_object().unwrap().len(), 1);

    // Devices that are named are counted as well, also those that are not there.
    let named = (0..12_000).map(|number| format!("D{number:05}").into()).chain([bob.device_id.clone()]);
    let of_named = pieces(app, &alice, BTreeMap::from([(bob.user_id.clone(), named.collect())])).await;
    assert_eq!(of_named.len(), 3, "12,001 devices take three pieces");
    let answer: serde_json::Value = serde_json::from_slice(&of_named.concat()).unwrap();
    assert_eq!(answer["device_keys"][bob.user_id.as_str()].as_object().unwrap().len(), 1);
}

/// Gives each device of a user a one-time key, and lists the devices.
async fn give_keys(app: &App, caller: &Caller) -> Vec<Device> {
    let user = caller.user;
    let devices = devices::list(&*app.store.snapshot(), user).unwrap();
    for some in devices.chunks(500) {
        let some = some.to_vec();
        let build = move |_: &App, batch: &mut Batch| {
            for device in some {
                let key = serde_json::value::to_raw_value(&json!({ "key": device.id })).unwrap();
                keys::put_one_time_keys(batch, (user, device.num), &Keys::from([("a:1".to_owned(), key)]))?;
            }
            Ok(())
        };
        write::for_user(app, user, build).await.unwrap();
    }
    devices
}

#[tokio::test(start_paused = true)]
async fn keys_that_were_taken_are_told_when_a_later_part_of_the_claim_fails() {
    let server = Server::in_memory(Env::simulated(1, 0));
    let app = server.app();
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    log_in(app, &bob, CLAIMS_PER_BATCH + 100).await;
    let devices = give_keys(app, &bob).await;
    let of_each: BTreeMap<_, _> = devices.iter().map(|device| (device.id.clone(), "a".into())).collect();
    let wanted = Wishes::from([(bob.user_id.clone(), of_each)]);
    let mut claiming = Box::pin(claim(app, &alice, wanted.clone()));
    // The first part of the claim is accepted, and waits until it is durable.
    assert!(futures_util::FutureExt::now_or_never(claiming.as_mut()).is_none());
    log_out::log_out(app, &alice, Ending::One(alice.device)).await.unwrap();
    let answer: serde_json::Value = serde_json::from_slice(&claiming.await.unwrap()).unwrap();
    let told = answer["one_time_keys"][bob.user_id.as_str()].as_object().unwrap();
    assert_eq!(told.len(), CLAIMS_PER_BATCH);
    let snapshot = app.store.snapshot();
    for device in devices {
        let left = keys::counts(&*snapshot, (bob.user, device.num)).unwrap().one_time;
        let is_told = told.contains_key(device.id.as_str());
        assert_eq!(left.values().all(|count| *count == 0), is_told, "{}: a key is told or left", device.id);
    }
    // A claim that fails before it has taken anything is refused.
    assert!(claim(app, &alice, wanted).await.is_err());
}
