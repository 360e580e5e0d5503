//! Servers whose states never come, and what they hold up of others.

use super::*;

/// Our server, the server `a.example` of a room, and rooms of it into which other servers let our users: those give no state, or as this
/// makes it of their names.
async fn among_traps(
    honest: &Elsewhere,
    traps: Vec<Elsewhere>,
    names: &[String],
    state_ids: Option<Value>,
) -> (TestServer, Arc<AtomicUsize>) {
    let net = Net::new(1);
    let (tries, create) = (AtomicUsize::new(0), honest.events[0].id.to_string());
    let rooms: Vec<Elsewhere> = std::iter::once(honest).chain(&traps).cloned().collect();
    Elsewhere::serve_all(
        &rooms,
        &net,
        Arc::new(move |asked, honest| {
            // The state before our join and the one before what it cites.
            let is_honest =
                honest["pdu_ids"].as_array().is_some_and(|ids| ids.iter().any(|id| *id == create));
            if asked == "state_ids" && is_honest && tries.fetch_add(1, Ordering::Relaxed) < 2 {
                return answer(404, r#"{"errcode":"M_NOT_FOUND","error":"not now"}"#);
            }
            answer(200, honest.to_string())
        }),
    );
    let open = Arc::new(AtomicUsize::new(0));
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    names.iter().for_each(|name| net.host(name, &["6.6.6.6"]));
    let counts = Arc::clone(&open);
    net.serve("6.6.6.6:8448", &names, move |arrived| {
        let uri = arrived.request.uri().clone();
        let body: Value = serde_json::from_slice(arrived.request.body()).unwrap_or(Value::Null);
        let parts: Vec<String> = uri
            .path()
            .split('/')
            .map(|it| it.replace("%21", "!").replace("%3A", ":").replace("%40", "@"))
            .collect();
        let part = |at: usize| parts.get(at).map(String::as_str).unwrap_or_default();
        let room = traps.iter().find(|room| room.room_id == part(5)).unwrap_or(&traps[0]);
        let told = match part(4) {
            "make_join" => Some(room.template(part(6), "join")),
            "send_join" => Some(room.answer_without_members(&body)),
            "state_ids" => state_ids.clone(),
            _ => None,
        };
        if part(4).starts_with("state") {
            counts.fetch_add(1, Ordering::Relaxed);
        }
        async move {
            match told {
                Some(told) => answer(200, told.to_string()),
                None => std::future::pending().await,
            }
        }
    });
    let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
    let server = TestServer::start(doors(&net), store, |config| {
        let names = names.iter().map(|name| (*name).to_owned());
        config.federation.allow = names.chain(["a.example".to_owned()]).collect();
    });
    (server, open)
}

#[tokio::test(start_paused = true)]
async fn rooms_whose_servers_never_give_their_states_hold_up_no_job_of_others() {
    let trap = |number: usize| {
        let mut room = Elsewhere::of_id(10, &format!("!trap{number}:a.example"));
        room.omits = true;
        room
    };
    let names: Vec<String> = (0..9).map(|number| format!("s{number}.example")).collect();
    let (server, open) = among_traps(&a_room(11), (0..72).map(trap).collect(), &names, None).await;
    let (mallory, bob) = (server.register("mallory").await, server.register("bob").await);
    for first in (0..72).step_by(12) {
        let join = |number: usize| {
            let path =
                format!("/join/{}?via=s{}.example", encoded(&format!("!trap{number}:a.example")), number % 9);
            let mallory = &mallory;
            async move { mallory.ok_post(&path, json!({})).await }
        };
        futures_util::future::join_all((first..first + 12).map(join)).await;
    }
    let app = server.server().app();
    assert_eq!(open.load(Ordering::Relaxed), 3, "one user has a share of what waits for other servers");
    let room = encoded("!room:a.example");
    bob.ok_post(&format!("/join/{room}?via=a.example"), json!({})).await;
    let began = app.env.uptime();
    let members = bob.ok_get(&format!("/rooms/{room}/members")).await;
    assert_eq!(members["chunk"].as_array().unwrap().len(), 4, "{members}");
    assert!(app.env.uptime() - began < Duration::from_secs(30), "{:?}", app.env.uptime() - began);
    // Other jobs are done meanwhile, and those of the traps come again and again.
    app.env.sleep(Duration::from_secs(1_000)).await;
    assert!(open.load(Ordering::Relaxed) > 16, "{open:?}");
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn rooms_of_many_users_whose_states_never_come_hold_up_no_new_one() {
    let trap = |number: usize| {
        let mut room = Elsewhere::of_id(10, &format!("!trap{number}:a.example"));
        room.omits = true;
        room
    };
    let names: Vec<String> = (0..96).map(|number| format!("s{number}.example")).collect();
    let (server, open) = among_traps(&a_room(11), (0..96).map(trap).collect(), &names, None).await;
    let mut mallories = Vec::new();
    for number in 0..8 {
        mallories.push(server.register(&format!("mallory{number}")).await);
    }
    let bob = server.register("bob").await;
    for first in (0..96).step_by(16) {
        let join = |number: usize| {
            let room = encoded(&format!("!trap{number}:a.example"));
            let (path, mallory) = (format!("/join/{room}?via=s{number}.example"), &mallories[number % 8]);
            async move { mallory.ok_post(&path, json!({})).await }
        };
        futures_util::future::join_all((first..first + 16).map(join)).await;
    }
    let app = server.server().app();
    app.env.sleep(Duration::from_secs(20)).await;
    assert!(open.load(Ordering::Relaxed) >= 64, "all places are taken, or were: {open:?}");
    let room = encoded("!room:a.example");
    bob.ok_post(&format!("/join/{room}?via=a.example"), json!({})).await;
    // The honest server gives the state at the second try.
    let began = app.env.uptime();
    let members = bob.ok_get(&format!("/rooms/{room}/members")).await;
    assert_eq!(members["chunk"].as_array().unwrap().len(), 4, "{members}");
    assert!(app.env.uptime() - began < Duration::from_secs(30), "{:?}", app.env.uptime() - began);
    server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn large_states_that_never_come_hold_up_no_state_that_came() {
    let mut honest = a_room(11);
    for number in 0..2_001 {
        let user = format!("@u{number}:a.example");
        honest.add_by(&user, "m.room.member", Some(&user), json!({ "membership": "join" }));
    }
    let trap = |number: usize| {
        let mut room = Elsewhere::of_id(10, &format!("!trap{number}:a.example"));
        room.omits = true;
        room
    };
    let names: Vec<String> = (0..8).map(|number| format!("s{number}.example")).collect();
    let ids: Vec<String> = (0..2_100).map(|number| format!("${number:043}")).collect();
    let state_ids = json!({ "pdu_ids": ids, "auth_chain_ids": [] });
    let (server, _open) = among_traps(&honest, (0..8).map(trap).collect(), &names, Some(state_ids)).await;
    let (mallory, bob) = (server.register("mallory").await, server.register("bob").await);
    for number in 0..8 {
        let path = format!("/join/{}?via=s{number}.example", encoded(&format!("!trap{number}:a.example")));
        mallory.ok_post(&path, json!({})).await;
    }
    let room = encoded("!room:a.example");
    bob.ok_post(&format!("/join/{room}?via=a.example"), json!({})).await;
    let members = bob.ok_get(&format!("/rooms/{room}/members")).await;
    assert_eq!(members["chunk"].as_array().unwrap().len(), 2_005);
}

#[tokio::test(start_paused = true)]
async fn a_user_whose_requests_wait_for_a_state_leaves_room_for_those_of_others() {
    let scene = Scene::of(a_room(11)).await;
    let carol = scene.server.register("carol").await;
    carol.ok_post(&format!("/join/{}", scene.id()), json!({})).await;
    let path = format!("/_matrix/client/v3/rooms/{}/members", scene.id());
    let of_bob = futures_util::future::join_all((0..1_000).map(|_| scene.bob.get(&path)));
    let of_carol = async {
        scene.pause(1).await;
        let request = http::Request::get(&path)
            .header("authorization", format!("Bearer {}", carol.token.as_deref().unwrap()));
        let request = request.body(axum::body::Body::empty()).unwrap();
        scene.server.send_from([192, 0, 2, 2], request).await.status()
    };
    let opens = async {
        scene.pause(2).await;
        scene.open().await;
    };
    let (of_bob, of_carol, ()) = tokio::join!(of_bob, of_carol, opens);
    assert_eq!(of_carol, StatusCode::OK);
    let with = |status: StatusCode| of_bob.iter().filter(|(of_one, _)| *of_one == status).count();
    assert_eq!((with(StatusCode::OK), with(StatusCode::TOO_MANY_REQUESTS)), (62, 938));
}
