//! The server that lets us in names who is in the room, and is gone then.

use super::*;

/// Bob has joined a room in which elsie is, too, by the word of a server that names these servers and is gone then. The state comes from
/// `b.example`, which leaves out whom this says, and from `c.example`, if that has it.
async fn a_room_by_the_word_of_one_who_is_gone(
    room: Elsewhere,
    named: Value,
    left_out: Option<&'static str>,
    c_has_it: bool,
) -> Scene {
    let net = Net::new(1);
    let names = named.clone();
    let gone: Tamper = Arc::new(move |asked, mut honest| {
        if asked == "send_join" {
            honest["servers_in_room"] = names.clone();
        }
        // It is not there any more when it is asked for the state.
        if asked.starts_with("state") { answer(502, "{}") } else { answer(200, honest.to_string()) }
    });
    let asked = room.serve(&net, gone);
    let id = left_out.map(|user| room.state[&("m.room.member".to_owned(), user.to_owned())].id.to_string());
    let others: Tamper = Arc::new(move |asked, mut honest| {
        if asked == "state_ids" {
            let ids = honest["pdu_ids"].as_array_mut().unwrap();
            ids.retain(|it| id.as_deref() != it.as_str());
        }
        answer(200, honest.to_string())
    });
    let rooms = std::slice::from_ref(&room);
    Elsewhere::serve_as(rooms, &net, ("b.example", "5.9.0.2", 8), others);
    if c_has_it {
        let honest: Tamper = Arc::new(|_, honest| answer(200, honest.to_string()));
        Elsewhere::serve_as(rooms, &net, ("c.example", "5.9.0.3", 11), honest);
    }
    let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
    let server = TestServer::start(doors(&net), store, |config| {
        config.federation.allow = vec!["*.example".to_owned()];
    });
    let bob = server.register("bob").await;
    let peer = Peer::unheard("a.example", 9);
    let is_open = Arc::new(AtomicBool::new(true));
    let mut scene = Scene { room, server, bob, net, peer, is_open, asked, sent: 0 };
    scene.bob.ok_post(&format!("/join/{}?via=a.example", scene.id()), json!({})).await;
    scene.note_join().await;
    scene
}

impl Scene {
    /// A user of another server says something in the room, which that server tells us.
    async fn say_of(&mut self, server: &str, key: u8, user: &str) {
        let signer = Signer::new(server.try_into().unwrap(), key_pair(key, "k").unwrap().into());
        let own = std::mem::replace(&mut self.room.signer, signer);
        let said = self.room.add_by(user, "m.room.message", None, json!({ "body": "here I am" }));
        self.room.signer = own;
        let (status, told) =
            Peer::unheard(server, key).transact(&self.server, "say", &[said.json], &[]).await;
        assert_eq!((status, &told["pdus"][said.id.as_str()]), (StatusCode::OK, &json!({})), "{told}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_names_others_who_are_not_there_and_is_gone_holds_up_no_state() {
    let few = vec!["a.example".to_owned(), "b.example".to_owned(), "ghost.example".to_owned()];
    let many: Vec<_> =
        few.iter().cloned().chain((0..2_000).map(|number| format!("a-{number:04}.example"))).collect();
    for named in [few, many] {
        let mut scene =
            a_room_by_the_word_of_one_who_is_gone(a_room_with_elsie(), json!(named), None, false).await;
        // Who speaks is found among any number of others who were made up.
        scene.say_of("b.example", 8, "@elsie:b.example").await;
        scene.pause(60).await;
        assert_eq!(scene.state().await, scene.expected());
        scene.server.assert_whole();
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_of_which_a_state_has_nobody_is_asked_for_its_own() {
    let mut room = a_room_with_elsie();
    let of_c = Signer::new("c.example".try_into().unwrap(), key_pair(11, "k").unwrap().into());
    let own = std::mem::replace(&mut room.signer, of_c);
    room.add_by(FRANK, "m.room.member", Some(FRANK), json!({ "membership": "join" }));
    room.signer = own;
    let named = json!(["b.example", "c.example"]);
    let scene = a_room_by_the_word_of_one_who_is_gone(room, named, Some(FRANK), true).await;
    scene.pause(5).await;
    assert_eq!(scene.state().await, scene.expected(), "the one that was left out says that it is there");
    scene.server.assert_whole();
}
