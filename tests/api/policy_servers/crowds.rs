//! Many accounts whose rooms have silent policy servers, beside somebody else.

use super::*;

/// The number of accounts whose rooms have silent policy servers: far more than there are places for jobs of one kind.
const ACCOUNTS: u8 = 64;

impl Guarded {
    /// Somebody registers who has a room with a policy server of its own, which never answers.
    async fn register_with_silent_server(&self, number: u8) -> (TestClient, String) {
        let (name, address) = (format!("g{number}.example"), format!("5.0.1.{number}"));
        let peer = Peer::new(&self.scene.net, &name, &address, 10 + number);
        let user = self.scene.server.register(&format!("u{number}")).await;
        let room = user.create(json!({ "preset": "public_chat", "room_version": VERSION })).await;
        let watcher = Remote {
            user: format!("@watcher:{name}").as_str().try_into().unwrap(),
            ..Remote::new(self.scene.server.server().app(), &room)
        };
        let content = json!({ "membership": "join" });
        let (id, join) =
            peer.event(&watcher, "m.room.member", Some(watcher.user.as_str()), content, &watcher.heads());
        let (_, answer) = peer.transact(&self.scene.server, "join", &[join], &[]).await;
        assert_eq!(answer["pdus"][id.as_str()], json!({}), "{answer}");
        let mut content = policy(1);
        content["via"] = json!(name);
        user.ok_put(&format!("/rooms/{}/state/m.room.policy", encoded(&room)), content).await;
        self.scene.net.weather(&format!("{address}:8448"), Weather::Silent, Duration::ZERO);
        (user, room)
    }
}

/// Schedules an event, which is due after this time.
async fn schedule(user: &TestClient, room: &str, delay_ms: u64) {
    let path = format!("/rooms/{}/send/m.test/later?org.matrix.msc4140.delay={delay_ms}", encoded(room));
    user.ok_put(&path, json!({ "body": "later" })).await;
}

/// Whether the scheduled event was sent.
async fn is_sent(user: &TestClient, room: &str) -> bool {
    let page = user.ok_get(&format!("/rooms/{}/messages?dir=b", encoded(room))).await;
    page["chunk"].as_array().unwrap().iter().any(|event| event["type"] == "m.test")
}

#[tokio::test(start_paused = true)]
async fn accounts_whose_policy_servers_are_silent_hold_up_no_job_of_others() {
    let it = Guarded::new().await;
    let other = it.alice().create(json!({ "preset": "public_chat" })).await;
    let mut greedy = Vec::new();
    for number in 0..ACCOUNTS {
        greedy.push(it.register_with_silent_server(number).await);
    }
    it.pass(Duration::from_secs(60)).await;
    let now_ms = || it.alice().server.server().app().env.now_ms();
    let began_ms = now_ms();
    let due_ms = |ms: u64| began_ms + ms - now_ms();
    for (user, room) in &greedy {
        schedule(user, room, due_ms(20_000)).await;
    }
    schedule(it.alice(), &other, due_ms(21_500)).await;
    let carol = it.scene.server.register("carol").await;
    carol.ok_post(&format!("/join/{}", encoded(&it.scene.room)), json!({})).await;
    schedule(&carol, &it.scene.room, due_ms(21_500)).await;
    it.pass(Duration::from_millis(due_ms(21_400))).await;
    assert!(!is_sent(it.alice(), &other).await && !is_sent(&carol, &it.scene.room).await);
    it.pass(Duration::from_millis(2_500)).await;
    assert!(is_sent(it.alice(), &other).await, "a room without a policy server");
    it.pass(Duration::from_secs(2)).await;
    assert!(is_sent(&carol, &it.scene.room).await, "a room whose policy server answers");
    for (user, room) in &greedy {
        assert!(!is_sent(user, room).await);
    }
    it.scene.server.assert_whole();
}
