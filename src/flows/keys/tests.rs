//! Tests of queries for more devices than a request over the router can log in.

use crate::{
    accounts::devices::LogIn,
    env::Env,
    flows::account::{log_in, register},
    server::Server,
    store::Batch,
};

use super::*;

/// A user who is logged in on one device.
async fn register(app: &App, name: &str) -> Caller {
    let wish = register::Wish {
        username: Some(name.to_owned()),
        password: None,
        log_in: Some(LogIn::default()),
        refreshable: false,
    };
    let made = register::register_by_operator(app, wish, None).await.unwrap();
    let token = made.session.unwrap().tokens.access_token;
    tokens::find_caller(&*app.store.snapshot(), app.env.now_ms(), &token).unwrap()
}

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
    let (first, mut rest) = query(app, caller, wanted).await.unwrap();
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
    let (alice, bob) = (register(app, "alice").await, register(app, "bob").await);
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
