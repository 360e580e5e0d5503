//! Tests of writes by a caller whose device has ended after the request was authenticated.

use bytes::Bytes;
use ruma::{TransactionId, api::error::ErrorKind};
use serde_json::json;

use crate::{
    accounts::{devices::Ending, tokens},
    encryption::uploads::Upload,
    env::Env,
    flows::{
        account::{change_password, keep, log_out, push_rules, seen, set_profile},
        device::{rename_device, send_to_device},
        keys,
        room::send,
    },
    server::Server,
    store::{Counting, Read},
};

use super::*;

fn is_unknown_token<T>(done: Result<T>) -> bool {
    let kind = done.err().and_then(|error| error.refusal().map(|refusal| refusal.kind.clone()));
    matches!(kind, Some(ErrorKind::UnknownToken(_)))
}

#[tokio::test(start_paused = true)]
async fn nothing_is_written_for_a_device_that_was_logged_out_meanwhile() {
    let server = Server::in_memory(Env::simulated(1, 0));
    let app = server.app();
    let caller = server.register("alice").await;
    let create = ruma::api::client::room::create_room::v3::Request::new();
    let room = crate::flows::room::create::create(app, &caller, create).await.unwrap().room_id;
    let data = Bytes::from_static(b"{}");
    keep::keep_account_data(app, &caller, None, "org.a".to_owned(), data.clone()).await.unwrap();
    // The request was authenticated, and then the device is logged out and swept before the request writes.
    log_out::log_out(app, &caller, Ending::One(caller.device)).await.unwrap();
    app.env.sleep(std::time::Duration::from_secs(1)).await;
    let before = app.store.snapshot().upto();
    let upload = Upload {
        device_keys: None,
        one_time_keys: serde_json::from_value(json!({ "a:b": "key" })).unwrap(),
        fallback_keys: Default::default(),
    };
    let message = send::Message {
        room,
        event_type: "m.test".to_owned(),
        txn: Some("1".to_owned()),
        content: Default::default(),
        redacts: None,
        sticky_ms: None,
    };
    let txn = <&TransactionId>::from("1");
    let name = Some("name".to_owned());
    assert!(is_unknown_token(keys::upload(app, &caller, upload).await));
    assert!(is_unknown_token(
        keep::keep_account_data(app, &caller, None, "org.b".to_owned(), data.clone()).await
    ));
    assert!(is_unknown_token(keep::keep_filter(app, &caller, data).await));
    assert!(is_unknown_token(
        rename_device::rename_device(app, &caller, caller.device_id.clone(), name).await
    ));
    let messages = Default::default();
    let sent = send_to_device::send_to_device(app, &caller, "m.test".to_owned(), txn, messages);
    assert!(is_unknown_token(sent.await));
    assert!(is_unknown_token(send::send(app, &caller, message).await));
    assert!(is_unknown_token(push_rules::change(app, &caller, |_| Ok(())).await));
    let value = Some(json!("Alice"));
    assert!(is_unknown_token(set_profile::set_profile(app, &caller, "displayname".to_owned(), value).await));
    let changed = change_password::change_password(app, &caller, "new password".to_owned(), true);
    assert!(is_unknown_token(changed.await));
    assert!(is_unknown_token(log_out::log_out(app, &caller, Ending::All).await));
    // When the device was seen is a note, whose refusal the request does not learn.
    seen::seen(app, &caller, [192, 0, 2, 1].into(), None).await.unwrap();
    app.env.sleep(std::time::Duration::from_secs(1)).await;
    let snapshot = app.store.snapshot();
    assert_eq!(snapshot.upto(), before);
    assert_eq!(crate::accounts::devices::find_seen(&*snapshot, caller.user, caller.device).unwrap(), None);
}

#[tokio::test(start_paused = true)]
async fn a_session_is_looked_up_in_the_row_of_the_account_and_in_that_of_the_device() {
    let server = Server::in_memory(Env::simulated(1, 0));
    let app = server.app();
    let caller = server.register("alice").await;
    let snapshot = app.store.snapshot();
    let counting = Counting::new(&snapshot);
    tokens::require_session(&counting, &caller).unwrap();
    assert_eq!(counting.rows(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_room_without_a_name_waits_for_nobody_who_has_the_servers_lock() {
    let server = Server::in_memory(Env::real().unwrap());
    let app = server.app();
    let caller = server.register("alice").await;
    let (release, released) = std::sync::mpsc::channel::<()>();
    let (lock, locked) = tokio::sync::oneshot::channel::<()>();
    let holder = app.clone();
    app.env.spawn_writing(crate::env::payer::Payers::SERVER, move || {
        let _server = lock_server(&holder);
        let _ = lock.send(());
        let _ = released.recv();
    });
    locked.await.unwrap();
    let create = ruma::api::client::room::create_room::v3::Request::new();
    let made = crate::flows::room::create::create(app, &caller, create);
    let made = tokio::time::timeout(std::time::Duration::from_secs(60), made).await;
    drop(release);
    made.unwrap().unwrap();
}
