//! `src/delivery/mail.rs`: users who are away are mailed what they have not read, by a mail server that speaks SMTP.

mod digests;
mod office;

use std::{sync::Arc, time::Duration};

use aqueduct::{
    config::{Config, EmailTls},
    env::Env,
    error::Result,
    flows::operator::{
        emails::EmailCommand,
        operate::{Command, Outcome, operate},
    },
    store::{Durability, Engine, Store, engine::Memory},
};
use http::{Method, Request, StatusCode};
use http_body_util::BodyExt;
use office::{Mail, PostOffice};
use serde_json::{Value, json};

use crate::{
    rooms::Rooms,
    support::{BEGAN_MS, TestClient, TestServer, encoded},
};

const SET: &str = "/_matrix/client/v3/pushers/set";
const PREFERENCES: &str = "/_aqueduct/client/v1/email_preferences";
const ADDRESS: &str = "alice@example.org";
const MINUTE: u64 = 60;
const HOUR: u64 = 60 * MINUTE;

fn settings(config: &mut Config) {
    config.email.host = "mail.example".to_owned();
    config.email.from = "Example <noreply@example.org>".to_owned();
    config.email.tls = EmailTls::None;
}

fn start(office: &PostOffice, store: Store, began_ms: u64, change: impl FnOnce(&mut Config)) -> TestServer {
    let env = Env::simulated(1, began_ms).with_hosts(Arc::new(office.clone()));
    let server = TestServer::start(env, store, |config| {
        settings(config);
        change(config);
    });
    office.run_in(&server.server().app().env);
    server
}

fn memory() -> Store {
    Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap()
}

async fn email(server: &TestServer, command: EmailCommand) -> Result<Vec<String>> {
    match operate(server.server().app(), Command::Email(command), |_| {}).await? {
        Outcome::Emails(it) => Ok(it.addresses.into_iter().map(|it| it.address).collect()),
        other => panic!("{other:?}"),
    }
}

fn add(name: &str, address: &str) -> EmailCommand {
    EmailCommand::Add { name: name.to_owned(), address: address.to_owned() }
}

fn remove(name: &str, address: &str) -> EmailCommand {
    EmailCommand::Remove { name: name.to_owned(), address: address.to_owned() }
}

fn pusher(address: &str) -> Value {
    json!({
        "pushkey": address, "kind": "email", "app_id": "m.email", "app_display_name": "E-mail",
        "device_display_name": address, "lang": "en", "data": { "brand": "Example Chat" },
    })
}

async fn pushers(client: &TestClient) -> usize {
    client.ok_get("/pushers").await["pushers"].as_array().unwrap().len()
}

async fn read(client: &TestClient, room: &str, event: &str) {
    client.ok_post(&format!("/rooms/{room}/receipt/m.read/{}", encoded(event)), json!({})).await;
}

/// A mail server, and a room of Alice and Bob. Alice has digests sent to her address.
struct House {
    office: PostOffice,
    server: TestServer,
    alice: TestClient,
    bob: TestClient,
    room: String,
}

impl House {
    async fn new() -> Self {
        Self::with(|_| {}).await
    }

    async fn with(change: impl FnOnce(&mut Config)) -> Self {
        let office = PostOffice::default();
        let server = start(&office, memory(), BEGAN_MS, change);
        let (alice, bob) = (server.register("alice").await, server.register("bob").await);
        email(&server, add("alice", "Alice@Example.org")).await.unwrap();
        let house = Self { office, server, alice, bob, room: String::new() };
        let room = house.room_of(json!({ "name": "The room" })).await;
        house.bob.say(&room, "before", "from before the pusher").await;
        house.alice.ok_post(SET, pusher(ADDRESS)).await;
        Self { room, ..house }
    }

    /// A room of Bob's that Alice is in.
    async fn room_of(&self, mut body: Value) -> String {
        body["preset"] = json!("public_chat");
        let room = self.bob.create(body).await;
        self.alice.ok_post(&format!("/join/{room}"), json!({})).await;
        room
    }

    async fn pause(&self, seconds: u64) {
        self.server.server().app().env.sleep(Duration::from_secs(seconds)).await;
    }

    /// The mails that came within this time.
    async fn mails(&self, seconds: u64) -> Vec<Mail> {
        self.pause(seconds).await;
        self.office.take()
    }

    /// The only mail that came within this time.
    async fn mail(&self, seconds: u64) -> Mail {
        let mut mails = self.mails(seconds).await;
        assert_eq!(mails.len(), 1, "{mails:?}");
        mails.remove(0)
    }

    /// The same people after a crash, which keeps this many of the writes that were not synced.
    fn crashed(self, kept: usize) -> Self {
        let app = self.server.server().app();
        let Engine::Memory(memory) = app.store.engine() else { panic!("not in memory") };
        let store = Store::open(Engine::Memory(memory.after_crash(kept)), Durability::Fsync).unwrap();
        let now_ms = app.env.now_ms();
        app.env.kill();
        let server = start(&self.office, store, now_ms, |_| {});
        let of = |client: TestClient| TestClient { server: server.clone(), ..client };
        let (alice, bob) = (of(self.alice), of(self.bob));
        Self { server, alice, bob, ..self }
    }

    async fn ask(&self, method: Method, path: &str, body: &str) -> (StatusCode, String) {
        let request = Request::builder().method(method).uri(path);
        let request = request.header("Content-Type", "application/x-www-form-urlencoded");
        let response = self.server.send(request.body(body.to_owned().into()).unwrap()).await;
        let (head, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        (head.status, String::from_utf8(body.to_vec()).unwrap())
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_not_read_within_ten_minutes_is_told_by_one_mail() {
    let house = House::new().await;
    let other = house.room_of(json!({ "name": "Other <b>room</b>" })).await;
    house.bob.say(&house.room, "1", "hello & <welcome>").await;
    house.pause(5 * MINUTE).await;
    house.bob.say(&other, "2", "second").await;
    let wave = json!({ "msgtype": "m.emote", "body": "waves" });
    house.bob.ok_put(&format!("/rooms/{other}/send/m.room.message/3"), wave).await;
    assert!(house.mails(5 * MINUTE - 1).await.is_empty(), "it may still be read");
    let mail = house.mail(3).await;
    assert_eq!(mail.envelope, ("noreply@example.org".to_owned(), ADDRESS.to_owned()));
    assert_eq!((mail.field("From"), mail.field("To")), ("Example <noreply@example.org>", ADDRESS));
    assert_eq!(mail.field("Subject"), "[Example Chat] News in 2 rooms");
    assert_eq!(mail.field("List-Unsubscribe-Post"), "List-Unsubscribe=One-Click");
    assert_eq!(mail.field("Auto-Submitted"), "auto-generated");
    assert!(mail.field("Date").starts_with("Thu, 01 Jan 2026 00:10:0"), "{}", mail.field("Date"));
    for said in ["bob: hello & <welcome>", "bob: second", "* bob waves", "The room", "Other <b>room</b>"] {
        assert!(mail.text.contains(said), "{said} is not in {}", mail.text);
    }
    assert!(!mail.text.contains("from before the pusher"), "{}", mail.text);
    assert!(mail.html.contains("<b>bob</b>: hello &amp; &lt;welcome&gt;"), "{}", mail.html);
    assert!(
        mail.html.contains("Other &lt;b&gt;room&lt;/b&gt;") && !mail.html.contains("<img"),
        "{}",
        mail.html
    );
    assert!(house.mails(30 * HOUR).await.is_empty(), "nothing is told twice");
    house.server.assert_whole();
    let figures = house.server.server().app().metrics.text();
    assert!(figures.contains("aqueduct_mails_sent_total 1"), "{figures}");
}

#[tokio::test(start_paused = true)]
async fn what_does_not_concern_the_reader_any_more_is_not_mailed() {
    let house = House::new().await;
    let left = house.room_of(json!({ "name": "Left" })).await;
    let muted = house.room_of(json!({ "name": "Muted" })).await;
    let seen = house.room_of(json!({ "name": "Seen" })).await;
    let redacted = house.bob.say(&house.room, "1", "redacted words").await;
    house.bob.say(&left, "1", "words of a room that was left").await;
    house.bob.say(&muted, "1", "muted words").await;
    let read_event = house.bob.say(&seen, "1", "read words").await;
    let own = house.room_of(json!({ "name": "Own" })).await;
    house.alice.say(&own, "1", "own words").await;
    let redact = format!("/rooms/{}/redact/{}/r", house.room, encoded(&redacted));
    house.bob.ok_put(&redact, json!({})).await;
    house.alice.ok_post(&format!("/rooms/{left}/leave"), json!({})).await;
    let rule = format!("/pushrules/global/room/{}", encoded(&muted));
    house.alice.ok_put(&rule, json!({ "actions": [] })).await;
    read(&house.alice, &seen, &read_event).await;
    assert!(house.mails(30 * HOUR).await.is_empty());
    // A message that nobody but its readers can read is told without content.
    let secret = json!({ "algorithm": "m.megolm.v1.aes-sha2", "ciphertext": "CIPHERTEXT", "body": "leaked" });
    house.bob.ok_put(&format!("/rooms/{}/send/m.room.encrypted/2", house.room), secret).await;
    let mail = house.mail(11 * MINUTE).await;
    assert!(mail.text.contains("bob sent an encrypted message."), "{}", mail.text);
    assert!(![&mail.text, &mail.html].iter().any(|it| it.contains("CIPHERTEXT") || it.contains("leaked")));
}

#[tokio::test(start_paused = true)]
async fn an_invitation_is_mailed_and_a_mention_is_said_in_the_subject() {
    let house = House::new().await;
    let private = house.bob.create(json!({ "name": "Private" })).await;
    house.bob.ok_post(&format!("/rooms/{private}/invite"), json!({ "user_id": house.alice.user_id })).await;
    let mail = house.mail(11 * MINUTE).await;
    let inviter = format!("bob ({})", house.bob.user_id);
    assert_eq!(mail.field("Subject"), format!("[Example Chat] {inviter} invites you"));
    assert!(mail.text.contains(&format!("{inviter} invites you.")), "{}", mail.text);
    let mention = json!({
        "msgtype": "m.text", "body": "alice!", "m.mentions": { "user_ids": [house.alice.user_id] },
    });
    house.bob.ok_put(&format!("/rooms/{}/send/m.room.message/1", house.room), mention).await;
    let mail = house.mail(11 * MINUTE).await;
    assert_eq!(mail.field("Subject"), "[Example Chat] News in The room that mention you");
    assert!(!mail.text.contains("invites you"), "it was told before: {}", mail.text);
}

#[tokio::test(start_paused = true)]
async fn a_room_is_mailed_ever_more_seldom_until_it_is_read() {
    let house = House::new().await;
    let mut number = 0;
    let mut said = async || {
        number += 1;
        house.bob.say(&house.room, &number.to_string(), &format!("message {number}.")).await
    };
    said().await;
    house.mail(11 * MINUTE).await;
    // The first mail went a minute ago, so that ten minutes are over for both: room and message.
    said().await;
    assert!(house.mails(9 * MINUTE).await.is_empty());
    let mail = house.mail(2 * MINUTE).await;
    assert!(mail.text.contains("message 2.") && !mail.text.contains("message 1."), "{}", mail.text);
    // From now on an hour has to pass, then six, then a day.
    for (hours, expected) in [(1, 3), (6, 4), (24, 5)] {
        said().await;
        assert!(house.mails(hours * HOUR - 10 * MINUTE).await.is_empty(), "message {expected}");
        let mail = house.mail(12 * MINUTE).await;
        assert!(mail.text.contains(&format!("message {expected}.")), "{}", mail.text);
    }
    // Another room is told at its own pace, and brings along what the slow one has.
    let other = house.room_of(json!({ "name": "Other" })).await;
    said().await;
    house.bob.say(&other, "1", "in another room").await;
    let mail = house.mail(11 * MINUTE).await;
    assert!(mail.text.contains("message 6.") && mail.text.contains("in another room"), "{}", mail.text);
    let last = said().await;
    assert!(house.mails(HOUR).await.is_empty());
    read(&house.alice, &house.room, &last).await;
    said().await;
    let mail = house.mail(11 * MINUTE).await;
    assert!(mail.text.contains("message 8.") && !mail.text.contains("message 7."), "{}", mail.text);
}

#[tokio::test(start_paused = true)]
async fn a_mail_has_bounds_and_says_what_it_leaves_out() {
    let house = House::new().await;
    for number in 0..15 {
        let text = format!("{number}: {}", "long ".repeat(200));
        house.bob.say(&house.room, &number.to_string(), &text).await;
    }
    for number in 0..22 {
        let room = house.room_of(json!({ "name": format!("Room {number}") })).await;
        house.bob.say(&room, "1", "a text").await;
    }
    let mail = house.mail(11 * MINUTE).await;
    assert_eq!(mail.field("Subject"), "[Example Chat] News in 23 rooms");
    assert!(mail.text.contains("There is news in 3 more rooms."), "{}", mail.text);
    assert!(mail.text.len() < 20_000 && mail.html.len() < 40_000, "{} {}", mail.text.len(), mail.html.len());
    // The oldest room stands at the end, where it is left out; its own bound shows once others are read.
    assert!(!mail.text.contains("14: long"), "{}", mail.text);
    for number in 20..35 {
        house.bob.say(&house.room, &number.to_string(), &format!("{number}: {}", "long ".repeat(200))).await;
    }
    let mail = house.mail(HOUR).await;
    assert!(mail.text.contains("  5 earlier messages\n"), "{}", mail.text);
    assert!(mail.text.contains("25: long") && !mail.text.contains("24: long"), "{}", mail.text);
}

#[tokio::test(start_paused = true)]
async fn names_write_no_fields_into_a_mail() {
    let house = House::new().await;
    let evil = "x\r\nBcc: eve@example.org\r\n\r\n<script>\u{202e}";
    house
        .bob
        .ok_put(&format!("/profile/{}/displayname", house.bob.user_id), json!({ "displayname": evil }))
        .await;
    house
        .alice
        .ok_post(SET, {
            let mut pusher = pusher(ADDRESS);
            pusher["data"]["brand"] = json!(evil);
            pusher
        })
        .await;
    let room = house.room_of(json!({ "name": evil })).await;
    house.bob.say(&room, "1", "a\r\n.\r\nMAIL FROM:<eve@example.org>\r\nb").await;
    let mail = house.mail(11 * MINUTE).await;
    let names: Vec<_> = mail.head.iter().map(|(name, _)| name.as_str()).collect();
    let expected =
        ["From", "To", "Date", "Message-ID", "Subject", "List-Unsubscribe", "List-Unsubscribe-Post"];
    assert!(names.starts_with(&expected) && !names.contains(&"Bcc"), "{names:?}");
    assert!(!mail.html.contains("<script") && mail.html.contains("&lt;script&gt;"), "{}", mail.html);
    assert!(mail.text.contains("a . MAIL FROM:<eve@example.org> b"), "{}", mail.text);
    let said = house.office.said();
    assert_eq!(said.iter().filter(|line| line.starts_with("MAIL")).count(), 1, "{said:?}");
}

#[tokio::test(start_paused = true)]
async fn a_crash_loses_no_mail_and_repeats_one_at_most() {
    let house = House::new().await;
    house.bob.say(&house.room, "1", "first").await;
    house.pause(5 * MINUTE).await;
    let house = house.crashed(0);
    assert!(house.mail(6 * MINUTE).await.text.contains("first"), "what waited is found again");
    let house = house.crashed(0);
    assert!(house.mails(30 * HOUR).await.is_empty(), "the place was durable");
    // The server ends after the mail is taken and before it can note that.
    house.bob.say(&house.room, "2", "second").await;
    let env = house.server.server().app().env.clone();
    house.office.on_mail(move || env.kill());
    // The clock of the test goes on without the server.
    house.pause(11 * MINUTE).await;
    assert_eq!(house.office.take().len(), 1);
    house.office.on_mail(|| {});
    let house = house.crashed(0);
    assert!(house.mail(11 * MINUTE).await.text.contains("second"), "it is repeated");
    assert!(house.mails(30 * HOUR).await.is_empty(), "once");
    house.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_mail_server_that_is_away_or_hangs_gets_the_mail_later() {
    let house = House::new().await;
    house.office.change(|manners| manners.is_down = true);
    house.bob.say(&house.room, "1", "first").await;
    assert!(house.mails(3 * HOUR).await.is_empty());
    house.office.change(|manners| manners.is_down = false);
    assert!(house.mail(2 * HOUR).await.text.contains("first"));
    for (verb, number) in [("", 2), ("EHLO", 3), ("MAIL", 4), ("RCPT", 5), ("DATA", 6)] {
        let room = house.room_of(json!({ "name": "New" })).await;
        house.bob.say(&room, "1", &format!("message {number}.")).await;
        house.office.change(|manners| manners.hangs_at = Some(verb));
        assert!(house.mails(20 * MINUTE).await.is_empty(), "{verb}");
        house.office.change(|manners| manners.hangs_at = None);
        let mail = house.mail(2 * HOUR).await;
        assert!(mail.text.contains(&format!("message {number}.")), "{verb}: {}", mail.text);
        house.office.said();
    }
    let room = house.room_of(json!({ "name": "Babble" })).await;
    house.bob.say(&room, "1", "at last").await;
    house.office.change(|manners| manners.babbles = true);
    assert!(house.mails(20 * MINUTE).await.is_empty());
    house.office.change(|manners| manners.babbles = false);
    assert!(house.mail(2 * HOUR).await.text.contains("at last"));
    house.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn an_address_that_is_put_off_holds_up_nobody_and_one_that_is_refused_for_days_ends_its_pusher() {
    let house = House::new().await;
    email(&house.server, add("bob", "bob@example.org")).await.unwrap();
    house.bob.ok_post(SET, pusher("bob@example.org")).await;
    house.office.change(|manners| manners.recipient = Some("450 not now"));
    house.bob.say(&house.room, "1", "of bob").await;
    assert!(house.mails(11 * MINUTE).await.is_empty());
    house.office.change(|manners| manners.recipient = None);
    let other = house.room_of(json!({ "name": "Other" })).await;
    house.alice.say(&other, "1", "of alice").await;
    let mails = house.mails(HOUR).await;
    let to: Vec<_> = mails.iter().map(|mail| mail.envelope.1.as_str()).collect();
    assert!(to.contains(&ADDRESS) && to.contains(&"bob@example.org") && to.len() == 2, "{to:?}");

    // The server takes mails of others meanwhile.
    house.office.change(|manners| {
        (manners.recipient, manners.only) = (Some("550 5.1.1 no such user"), ADDRESS);
    });
    let room = house.room_of(json!({ "name": "New" })).await;
    house.bob.say(&room, "1", "into the void").await;
    for round in 0..35 {
        let said = house.alice.say(&other, &format!("round{round}"), "of alice").await;
        assert_eq!(house.mails(2 * HOUR).await.len(), 1, "round {round}");
        read(&house.bob, &other, &said).await;
        assert!(round > 12 || pushers(&house.alice).await == 1, "the mail server may be mistaken");
    }
    assert_eq!(pushers(&house.alice).await, 0);
    house.office.change(|manners| manners.recipient = None);
    assert!(house.mails(48 * HOUR).await.is_empty());
    house.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_mail_that_is_refused_as_such_does_not_end_its_pusher() {
    let house = House::new().await;
    house.office.change(|manners| manners.data = Some("554 this looks like spam"));
    house.bob.say(&house.room, "1", "first").await;
    assert!(house.mails(60 * HOUR).await.is_empty());
    assert_eq!(pushers(&house.alice).await, 1);
    house.office.change(|manners| manners.data = None);
    assert!(house.mail(7 * HOUR).await.text.contains("first"));
}

#[tokio::test(start_paused = true)]
async fn the_link_stops_mails_once_its_button_is_pressed_and_nobody_forges_it() {
    let house = House::new().await;
    house.bob.say(&house.room, "1", "first").await;
    let link = house.mail(11 * MINUTE).await.link();
    let (path, token) = link.split_once("?token=").unwrap();
    assert!(!token.contains(house.alice.token.as_deref().unwrap()));
    // Programs that look at links before their readers do stop nothing.
    let (status, page) = house.ask(Method::GET, &link, "").await;
    assert_eq!(status, StatusCode::OK);
    assert!(page.contains("Stop these mails") && page.contains(token), "{page}");
    assert_eq!(pushers(&house.alice).await, 1);
    let mut forged = token.to_owned();
    let last = if forged.pop() == Some('A') { 'E' } else { 'A' };
    forged.push(last);
    for wrong in ["", "x", &token[1..], &token[..token.len() - 1], &forged, "\"><script>"] {
        let (status, page) = house.ask(Method::POST, path, &format!("token={}", encoded(wrong))).await;
        assert_eq!(status, StatusCode::OK, "{page}");
        assert!(page.contains("role=\"alert\"") && !page.contains("<script"), "{page}");
        let (_, page) = house.ask(Method::GET, &format!("{path}?token={}", encoded(wrong)), "").await;
        assert!(!page.contains("<script"), "{page}");
    }
    assert_eq!(pushers(&house.alice).await, 1);
    let (status, page) = house.ask(Method::POST, &link, "List-Unsubscribe=One-Click").await;
    assert_eq!((status, page.contains("Done.")), (StatusCode::OK, true), "{page}");
    assert_eq!(pushers(&house.alice).await, 0);
    assert!(house.ask(Method::POST, &link, "").await.1.contains("role=\"alert\""));
    house.bob.say(&house.room, "2", "second").await;
    assert!(house.mails(30 * HOUR).await.is_empty());
    // A pusher that is set anew has another link, which the form sends as well.
    house.alice.ok_post(SET, pusher(ADDRESS)).await;
    house.bob.say(&house.room, "3", "third").await;
    let new_link = house.mail(11 * MINUTE).await.link();
    assert_ne!(new_link, link);
    house.ask(Method::POST, path, &format!("token={token}")).await;
    assert_eq!(pushers(&house.alice).await, 1);
    house.ask(Method::POST, path, &new_link.replace(&format!("{path}?"), "")).await;
    assert_eq!(pushers(&house.alice).await, 0);
    house.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn only_addresses_of_the_account_are_mailed_and_only_where_there_is_a_mail_server() {
    let house = House::new().await;
    let refused = async |client: &TestClient, pusher: Value, words: &str| {
        let (status, json) = client.post(SET, pusher).await;
        assert_eq!((status.as_u16(), &json["errcode"]), (400, &json!("M_INVALID_PARAM")), "{json}");
        assert!(json["error"].as_str().unwrap().contains(words), "{json}");
    };
    refused(&house.bob, pusher(ADDRESS), "`pushkey`").await;
    refused(&house.alice, pusher("other@example.org"), "GET /account/3pid").await;
    refused(&house.alice, pusher("Alice@example.org"), "`pushkey`").await;
    let mut other_app = pusher(ADDRESS);
    other_app["app_id"] = json!("org.example.app");
    refused(&house.alice, other_app, "`app_id`").await;
    let without = TestServer::new().register("alice").await;
    email(&without.server, add("alice", ADDRESS)).await.unwrap();
    refused(&without, pusher(ADDRESS), "sends no e-mail").await;

    let taken = email(&house.server, add("bob", ADDRESS)).await.unwrap_err();
    assert!(taken.to_string().contains("M_THREEPID_IN_USE"), "{taken}");
    assert_eq!(email(&house.server, add("alice", ADDRESS)).await.unwrap(), [ADDRESS], "she has it already");
    for wrong in ["alice", "a b@example.org", "alice@localhost"] {
        let error = email(&house.server, add("alice", wrong)).await.unwrap_err();
        assert!(error.to_string().contains("M_INVALID_PARAM"), "{error}");
    }
    let error = email(&house.server, remove("bob", ADDRESS)).await.unwrap_err();
    assert!(error.to_string().contains("M_NOT_FOUND"), "{error}");
    let list = EmailCommand::List { name: "alice".to_owned() };
    assert_eq!(email(&house.server, list).await.unwrap(), [ADDRESS]);
    let shown = house.alice.ok_get("/account/3pid").await["threepids"].clone();
    let at = shown[0]["added_at"].as_u64().unwrap();
    assert!(at >= BEGAN_MS, "{shown}");
    assert_eq!(shown, json!([{ "medium": "email", "address": ADDRESS, "validated_at": at, "added_at": at }]));
    assert_eq!(house.bob.ok_get("/account/3pid").await, json!({ "threepids": [] }));
}

#[tokio::test(start_paused = true)]
async fn mails_go_on_after_logging_out_and_end_with_the_address_and_the_account() {
    let house = House::new().await;
    let second = house.alice.on_device("SECOND").await;
    house.alice.ok_post("/logout", json!({})).await;
    house.bob.say(&house.room, "1", "first").await;
    assert!(house.mail(11 * MINUTE).await.text.contains("first"), "nobody is more away than who logged out");
    let shown = second.ok_get("/pushers").await["pushers"][0].clone();
    assert_eq!((&shown["kind"], &shown["data"]["brand"]), (&json!("email"), &json!("Example Chat")));
    house.server.assert_whole();
    assert!(email(&house.server, remove("alice", ADDRESS)).await.unwrap().is_empty());
    assert_eq!(pushers(&second).await, 0);
    house.bob.say(&house.room, "2", "second").await;
    assert!(house.mails(30 * HOUR).await.is_empty());
    email(&house.server, add("alice", ADDRESS)).await.unwrap();
    second.ok_post(SET, pusher(ADDRESS)).await;
    let auth = json!({ "auth": { "type": "m.login.password", "password": "password of alice",
        "identifier": { "type": "m.id.user", "user": second.user_id } } });
    second.ok_post("/account/deactivate", auth).await;
    house.bob.say(&house.room, "3", "third").await;
    assert!(house.mails(30 * HOUR).await.is_empty());
    // Another account may have the address now.
    email(&house.server, add("bob", ADDRESS)).await.unwrap();
    house.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn users_say_when_and_of_what_they_are_mailed() {
    let house = House::new().await;
    let put = async |wishes: Value| house.alice.put(PREFERENCES, wishes).await;
    let defaults = json!({ "enabled": true, "delay_ms": 600_000, "only_highlights": false });
    assert_eq!(house.alice.get(PREFERENCES).await, (StatusCode::OK, defaults.clone()));
    let wishes = json!({ "enabled": true, "delay_ms": 3_600_000, "only_highlights": true });
    assert_eq!(put(wishes.clone()).await, (StatusCode::OK, wishes.clone()));
    assert_eq!(house.alice.get(PREFERENCES).await.1, wishes);
    assert_eq!(house.bob.get(PREFERENCES).await.1, defaults);
    let mention = json!({
        "msgtype": "m.text", "body": "alice!", "m.mentions": { "user_ids": [house.alice.user_id] },
    });
    house.bob.say(&house.room, "1", "of no interest").await;
    house.bob.ok_put(&format!("/rooms/{}/send/m.room.message/2", house.room), mention).await;
    assert!(house.mails(59 * MINUTE).await.is_empty());
    let mail = house.mail(2 * MINUTE).await;
    assert!(mail.text.contains("alice!") && !mail.text.contains("of no interest"), "{}", mail.text);
    assert_eq!(put(json!({ "enabled": false })).await.0, StatusCode::OK);
    house.bob.say(&house.room, "3", "while they are off").await;
    assert!(house.mails(30 * HOUR).await.is_empty());
    assert_eq!(put(json!({})).await, (StatusCode::OK, defaults));
    house.bob.say(&house.room, "4", "while they are on").await;
    let mail = house.mail(11 * MINUTE).await;
    assert!(mail.text.contains("are on") && !mail.text.contains("are off"), "{}", mail.text);
    for (wrong, code) in [
        (json!({ "delay_ms": 59_999 }), "M_INVALID_PARAM"),
        (json!({ "delay_ms": 86_400_001 }), "M_INVALID_PARAM"),
        (json!({ "delay_ms": "1" }), "M_BAD_JSON"),
        (json!({ "enabled": 1 }), "M_BAD_JSON"),
    ] {
        let (status, json) = put(wrong.clone()).await;
        assert_eq!((status.as_u16(), &json["errcode"]), (400, &json!(code)), "{wrong}: {json}");
    }
    // A pusher that is switched off gets none either (MSC3881).
    let mut off = pusher(ADDRESS);
    off["org.matrix.msc3881.enabled"] = json!(false);
    house.alice.ok_post(SET, off).await;
    house.bob.say(&house.room, "5", "off again").await;
    assert!(house.mails(30 * HOUR).await.is_empty());
    house.server.assert_whole();
}

/// A mail server's key, and the file of the authority that vouches for it.
fn keys(name: &str) -> (tokio_rustls::TlsAcceptor, tempfile::NamedTempFile) {
    use std::io::Write;

    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    use tokio_rustls::rustls::{
        ServerConfig,
        crypto::ring,
        pki_types::{PrivateKeyDer, pem::PemObject},
    };
    let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(params.self_signed(&key).unwrap().pem().as_bytes()).unwrap();
    let issuer = Issuer::new(params, key);
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
    let certificate = params.signed_by(&key, &issuer).unwrap();
    let key = PrivateKeyDer::from_pem_slice(key.serialize_pem().as_bytes()).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)
        .unwrap();
    (tokio_rustls::TlsAcceptor::from(Arc::new(config)), file)
}

#[tokio::test(start_paused = true)]
async fn the_password_is_said_only_to_a_mail_server_that_has_proved_its_name() {
    let ((right, right_file), (wrong, wrong_file)) = (keys("mail.example"), keys("other.example"));
    for (tls, is_implicit) in [(EmailTls::Starttls, false), (EmailTls::Tls, true)] {
        for (acceptor, file, is_taken) in [(&right, &right_file, true), (&wrong, &wrong_file, false)] {
            let trusted = file.path().to_owned();
            let house = House::with(|config| {
                config.email.tls = tls;
                (config.email.user, config.email.password) = ("aqueduct".to_owned(), "secret".to_owned());
                config.federation.trusted_ca_file = trusted;
            })
            .await;
            house.office.change(|manners| {
                (manners.tls, manners.is_implicit) = (Some(acceptor.clone()), is_implicit);
            });
            house.bob.say(&house.room, "1", "first").await;
            assert_eq!(house.mails(11 * MINUTE).await.len(), usize::from(is_taken), "{tls:?}");
            let said = house.office.said();
            // That is the user and the password in base64.
            let has_password = said.iter().any(|line| line == "AUTH PLAIN AGFxdWVkdWN0AHNlY3JldA==");
            assert_eq!(has_password, is_taken, "{said:?}");
            let has_mail = said.iter().any(|line| line.starts_with("MAIL"));
            assert_eq!(has_mail, is_taken, "{said:?}");
        }
    }
    // A server that does not offer encryption is told nothing else.
    let house = House::with(|config| config.email.tls = EmailTls::Starttls).await;
    house.bob.say(&house.room, "1", "first").await;
    assert!(house.mails(11 * MINUTE).await.is_empty());
    assert!(house.office.said().iter().all(|line| line.starts_with("EHLO ")));
}

#[tokio::test(flavor = "multi_thread")]
async fn mails_reach_a_mail_server_over_tcp() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = TestServer::real(|config| {
        settings(config);
        config.email.host = "127.0.0.1".to_owned();
        (config.email.port, config.email.delay_s) = (port, 1);
    });
    let office = PostOffice::default();
    let serving = office.clone();
    drop(server.begin(async move {
        while let Ok((wire, _)) = listener.accept().await {
            serving.clone().serve(wire).await;
        }
    }));
    let (alice, bob) = (server.register("alice").await, server.register("bob").await);
    email(&server, add("alice", ADDRESS)).await.unwrap();
    let room = bob.create(json!({ "preset": "public_chat" })).await;
    alice.ok_post(&format!("/join/{room}"), json!({})).await;
    alice.ok_post(SET, pusher(ADDRESS)).await;
    bob.say(&room, "1", "over a socket").await;
    for _ in 0..300 {
        if let Some(mail) = office.take().first() {
            assert!(mail.text.contains("over a socket"), "{}", mail.text);
            return;
        }
        server.server().app().env.sleep(Duration::from_millis(100)).await;
    }
    panic!("no mail came");
}
