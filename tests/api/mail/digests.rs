//! The parts of digests that others try to bend: what is looked for, what is told of it, how often, and to whom.

use super::*;

async fn invite(house: &House, room: &str, more: Value) {
    let mut body = more;
    body["user_id"] = json!(house.alice.user_id);
    house.bob.ok_post(&format!("/rooms/{room}/invite"), body).await;
}

#[tokio::test(start_paused = true)]
async fn nobody_takes_away_the_pusher_of_an_address_that_they_know() {
    let house = House::new().await;
    let taking = json!({
        "pushkey": ADDRESS, "kind": "http", "app_id": "m.email", "app_display_name": "E", "device_display_name": "D",
        "lang": "en", "data": { "url": "https://push.example/_matrix/push/v1/notify" },
    });
    let (status, json) = house.bob.post(SET, taking).await;
    assert_eq!((status.as_u16(), &json["errcode"]), (400, &json!("M_INVALID_PARAM")), "{json}");
    assert!(json["error"].as_str().unwrap().contains("`app_id`"), "{json}");
    assert_eq!(pushers(&house.alice).await, 1);
    house.bob.say(&house.room, "1", "first").await;
    assert!(house.mail(11 * MINUTE).await.text.contains("first"));
}

#[tokio::test(start_paused = true)]
async fn a_message_behind_many_that_notify_of_nothing_is_told() {
    let house = House::new().await;
    let other = house.room_of(json!({ "name": "Other" })).await;
    house.bob.say(&house.room, "1", "behind the notices").await;
    for number in 0..600 {
        let notice = json!({ "msgtype": "m.notice", "body": "of no interest" });
        house.bob.ok_put(&format!("/rooms/{}/send/m.room.message/n{number}", house.room), notice).await;
    }
    house.bob.say(&other, "1", "in a later room").await;
    let mail = house.mail(15 * MINUTE).await;
    for text in ["behind the notices", "in a later room"] {
        assert!(mail.text.contains(text), "{text} is not in {}", mail.text);
    }
    // A long search takes nothing from those that follow it.
    let last = house.bob.say(&other, "2", "afterwards").await;
    read(&house.alice, &other, &last).await;
    house.bob.say(&other, "3", "and then").await;
    assert!(house.mail(15 * MINUTE).await.text.contains("and then"));
    assert!(house.mails(30 * HOUR).await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn rooms_full_of_large_events_hide_no_later_room() {
    let house = House::new().await;
    let bulk = house.room_of(json!({ "name": "Bulk" })).await;
    let later = house.room_of(json!({ "name": "Later" })).await;
    house.bob.say(&later, "1", "not to be missed").await;
    let large = "y".repeat(60_000);
    for room in [&house.room, &bulk] {
        for number in 0..95 {
            let path = format!("/rooms/{room}/send/org.example.large/{number}");
            house.bob.ok_put(&path, json!({ "x": large })).await;
        }
        house.bob.say(room, "hi", "hi").await;
    }
    let mail = house.mail(15 * MINUTE).await;
    assert!(mail.text.contains("not to be missed") && mail.text.contains("hi"), "{}", mail.text);
    assert_eq!(mail.field("Subject"), "[Example Chat] News in 3 rooms");
}

#[tokio::test(start_paused = true)]
async fn an_invitation_that_was_repeated_is_told() {
    let house = House::new().await;
    let one = house.bob.create(json!({ "name": "Room one" })).await;
    let two = house.bob.create(json!({ "name": "Room two" })).await;
    invite(&house, &one, json!({})).await;
    invite(&house, &two, json!({})).await;
    invite(&house, &one, json!({ "reason": "please" })).await;
    let mail = house.mail(11 * MINUTE).await;
    assert!(mail.text.contains("Room one") && mail.text.contains("Room two"), "{}", mail.text);
    assert!(house.mails(30 * HOUR).await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_mail_tells_the_newest_text_of_a_message() {
    let house = House::new().await;
    let said = house.bob.say(&house.room, "1", "my password is hunter2").await;
    let edit = json!({
        "msgtype": "m.text", "body": "* (removed)", "m.new_content": { "msgtype": "m.text", "body": "(removed)" },
        "m.relates_to": { "rel_type": "m.replace", "event_id": said },
    });
    house.bob.ok_put(&format!("/rooms/{}/send/m.room.message/2", house.room), edit).await;
    let mail = house.mail(11 * MINUTE).await;
    assert!(mail.text.contains("bob: (removed)"), "{}", mail.text);
    assert!(!mail.text.contains("hunter2") && !mail.html.contains("hunter2"), "{}", mail.text);
}

#[tokio::test(start_paused = true)]
async fn invitations_have_mails_sent_ever_more_seldom_and_make_no_other_room_wait() {
    let house = House::new().await;
    house.bob.say(&house.room, "1", "message 1.").await;
    house.mail(11 * MINUTE).await;
    let mut count = 0;
    for number in 0..6 {
        let room = house.bob.create(json!({ "name": format!("Buy {number}") })).await;
        invite(&house, &room, json!({})).await;
        count += house.mails(11 * MINUTE).await.len();
    }
    assert!((1..=3).contains(&count), "{count} mails in 66 minutes");
    // The room was mailed once, so that it has waited its ten minutes.
    house.bob.say(&house.room, "2", "message 2.").await;
    let mail = house.mail(11 * MINUTE).await;
    assert!(mail.text.contains("message 2."), "{}", mail.text);
}

#[tokio::test(start_paused = true)]
async fn tokens_are_not_guessed_without_end() {
    let house = House::with(|config| {
        (config.limits.rate_limits, config.limits.register.burst) = (true, 10);
    })
    .await;
    let token = format!("{}{}", "A".repeat(11), "B".repeat(43));
    let path = format!("/_aqueduct/client/v1/unsubscribe?token={token}");
    let mut refused = 0;
    for _ in 0..30 {
        let (status, _) = house.ask(Method::POST, &path, "").await;
        refused += usize::from(status == StatusCode::TOO_MANY_REQUESTS);
    }
    assert!(refused >= 10, "{refused}");
}

#[tokio::test(start_paused = true)]
async fn a_mail_server_that_refuses_everybody_ends_no_pusher() {
    let house = House::new().await;
    email(&house.server, add("bob", "bob@example.org")).await.unwrap();
    house.bob.ok_post(SET, pusher("bob@example.org")).await;
    house.office.change(|manners| manners.recipient = Some("554 5.7.1 Relay access denied"));
    house.bob.say(&house.room, "1", "of bob").await;
    house.alice.say(&house.room, "1", "of alice").await;
    for _ in 0..5 {
        assert!(house.mails(20 * HOUR).await.is_empty());
        house.bob.say(&house.room, "2", "of bob").await;
    }
    assert_eq!((pushers(&house.alice).await, pushers(&house.bob).await), (1, 1));
    house.office.change(|manners| manners.recipient = None);
    house.bob.say(&house.room, "3", "once it is mended").await;
    let mails = house.mails(8 * HOUR).await;
    assert!(mails.iter().any(|mail| mail.text.contains("once it is mended")), "{mails:?}");
}

#[tokio::test(start_paused = true)]
async fn a_mail_server_that_takes_its_time_gets_a_mail_once_and_holds_up_no_other() {
    let house = House::new().await;
    email(&house.server, add("bob", "bob@example.org")).await.unwrap();
    house.bob.ok_post(SET, pusher("bob@example.org")).await;
    house.office.change(|manners| manners.decides_after_s = 8 * MINUTE);
    house.bob.say(&house.room, "1", "of bob").await;
    house.pause(5).await;
    let other = house.room_of(json!({ "name": "Other" })).await;
    house.alice.say(&other, "1", "of alice").await;
    let mails = house.mails(14 * MINUTE).await;
    let to: Vec<_> = mails.iter().map(|mail| mail.envelope.1.as_str()).collect();
    assert_eq!(to, [ADDRESS, "bob@example.org"], "the second did not wait for the answer to the first");
    house.bob.say(&house.room, "2", "meanwhile").await;
    let mail = house.mail(30 * MINUTE).await;
    assert!(mail.text.contains("meanwhile") && !mail.text.contains("of bob"), "{}", mail.text);
    assert!(house.mails(30 * HOUR).await.is_empty());
    house.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn a_mail_whose_fate_nobody_knows_is_repeated_once_and_is_the_same_mail() {
    let house = House::new().await;
    house.office.change(|manners| manners.hangs_at = Some("."));
    house.bob.say(&house.room, "1", "first").await;
    let mails = house.mails(30 * HOUR).await;
    assert_eq!(mails.len(), 2, "{mails:?}");
    assert_eq!(mails[0].field("Message-ID"), mails[1].field("Message-ID"));
    assert_eq!(mails[0].text, mails[1].text);
    house.office.change(|manners| manners.hangs_at = None);
    house.bob.say(&house.room, "2", "second").await;
    let mail = house.mail(30 * HOUR).await;
    assert!(mail.text.contains("second") && !mail.text.contains("first"), "{}", mail.text);
    assert_ne!(mail.field("Message-ID"), mails[0].field("Message-ID"));
    house.server.assert_whole();
}
