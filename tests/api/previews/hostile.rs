//! Pages that mean harm: to this server's network, its memory, its time and its disk.

use super::*;

#[tokio::test(start_paused = true)]
async fn no_url_redirect_image_or_description_leads_into_the_operators_network() {
    let scene = Scene::with(|config| {
        // Other servers may be there, which says nothing about pages.
        config.federation.networks_allowed = vec!["10.0.0.0/8".to_owned()];
    })
    .await;
    let inside = scene.host("inside.example", "10.0.0.1", |_| page("<title>secret</title>"));
    for address in ["127.0.0.1:80", "169.254.169.254:80", "[::1]:80", "192.168.0.1:8080"] {
        scene.net.serve(address, &[], |_| async { page("<title>secret</title>") });
    }
    let targets = [
        "http://10.0.0.1/",
        "http://inside.example/",
        "https://inside.example/",
        "http://127.0.0.1/",
        "http://127.1/",
        "http://[::1]/",
        "http://[::ffff:10.0.0.1]/",
        "http://169.254.169.254/latest/",
        "http://192.168.0.1:8080/",
        "http://0xa.0.0.1/",
    ];
    scene.host("a.example", "5.0.0.1", move |path| {
        let (kind, number) = path.trim_start_matches('/').split_once('/').unwrap();
        let to = targets[number.parse::<usize>().unwrap()];
        match kind {
            "redirect" => redirect(to),
            "image" => page(format!("<title>T</title><meta property=og:image content='{to}'>")),
            _ => {
                page(format!("<title>T</title><link rel=alternate type=application/json+oembed href='{to}'>"))
            }
        }
    });
    for (number, target) in targets.into_iter().enumerate() {
        scene.none(target).await;
        scene.none(&format!("http://a.example/redirect/{number}")).await;
        for kind in ["image", "beside"] {
            let told = scene.ok(&format!("http://a.example/{kind}/{number}")).await;
            assert_eq!(told, json!({ "og:title": "T" }), "{kind} {target}");
        }
    }
    let arrived = scene.net.take_arrived();
    assert!(arrived.iter().all(|line| line.contains("@5.0.0.1:")), "{arrived:?}");
    assert_eq!(inside.load(Ordering::Relaxed), 0);
}

#[tokio::test(start_paused = true)]
async fn a_name_that_is_looked_up_anew_for_each_redirect_leads_nowhere_either() {
    let scene = Scene::new().await;
    let net = scene.net.clone();
    // The host is public when it is asked first, and says then that it is inside.
    scene.host("a.example", "5.0.0.1", move |path| match path {
        "/first" => {
            net.resolve("a.example", addresses(&["10.0.0.1"], 0));
            redirect("/second")
        }
        _ => page("<title>secret</title>"),
    });
    scene.net.serve("10.0.0.1:80", &["a.example"], |_| async { page("<title>secret</title>") });
    scene.none("http://a.example/first").await;
    let arrived = scene.net.take_arrived();
    assert_eq!(arrived, ["(no TLS)@5.0.0.1:80 a.example GET /first"]);
}

#[tokio::test(start_paused = true)]
async fn redirects_are_few_and_lead_to_pages_of_the_web() {
    let scene = Scene::new().await;
    let count = scene.host("a.example", "5.0.0.1", |path| match path {
        "/0" => page("<title>T</title>"),
        "/loop" => redirect("/loop"),
        "/file" => redirect("file:///etc/passwd"),
        "/data" => redirect("data:text/html,<title>x</title>"),
        "/port" => redirect("https://a.example:25/"),
        "/nowhere" => bytes(302, &[], ""),
        "/strange" => bytes(302, &[("location", "https://")], ""),
        path => {
            let number: u32 = path[1..].parse().unwrap();
            redirect(&format!("/{}", number - 1))
        }
    });
    assert_eq!(scene.ok("https://a.example/5").await, json!({ "og:title": "T" }));
    assert_eq!(count.swap(0, Ordering::Relaxed), 6);
    scene.none("https://a.example/6").await;
    assert_eq!(count.swap(0, Ordering::Relaxed), 6);
    for path in ["loop", "file", "data", "port", "nowhere", "strange"] {
        scene.none(&format!("https://a.example/{path}")).await;
    }
    assert_eq!(count.load(Ordering::Relaxed), 6 + 5);
}

/// An answer whose body never ends: it gives this piece again and again, after a pause.
fn endless(
    kind: &str,
    begins: &'static [u8],
    piece: usize,
    pause: Duration,
    given: &Arc<AtomicUsize>,
) -> Answered {
    let (piece, given) = (Bytes::from(vec![b'x'; piece]), Arc::clone(given));
    let pieces =
        stream::once(async move { Ok(Bytes::from_static(begins)) }).chain(stream::unfold((), move |()| {
            let (piece, given) = (piece.clone(), Arc::clone(&given));
            async move {
                if !pause.is_zero() {
                    drop(tokio::time::timeout(pause, std::future::pending::<()>()).await);
                }
                given.fetch_add(piece.len(), Ordering::Relaxed);
                Some((Ok(piece), ()))
            }
        }));
    let mut answer = bytes(200, &[("content-type", kind)], "");
    *answer.body_mut() = Body::new(pieces);
    answer
}

#[tokio::test(start_paused = true)]
async fn bodies_without_an_end_are_read_to_a_bound() {
    let scene = Scene::new().await;
    let given = Arc::new(AtomicUsize::new(0));
    let gives = Arc::clone(&given);
    let title: &[u8] = b"<title>T</title><p>";
    scene.host("a.example", "5.0.0.1", move |path| match path {
        "/page" => endless("text/html", title, 65_536, Duration::ZERO, &gives),
        "/slow" => endless("text/html", title, 10, Duration::from_secs(1), &gives),
        "/image" => endless("image/png", b"\x89PNG\r\n\x1a\n", 65_536, Duration::ZERO, &gives),
        "/slow-image" => endless("image/png", b"\x89PNG\r\n\x1a\n", 10, Duration::from_secs(1), &gives),
        "/beside" => page("<title>T</title><link rel=alternate type=application/json+oembed href=/o>"),
        "/o" => endless("application/json", b"{\"title\":\"", 65_536, Duration::ZERO, &gives),
        _ => page("<title>T</title><meta property=og:image content=/image>"),
    });
    let ok = async |path: &str| {
        let began = scene.server.server().app().env.uptime();
        let told = scene.ok(&format!("https://a.example/{path}")).await;
        let took = scene.server.server().app().env.uptime() - began;
        assert!(took <= Duration::from_secs(40), "{path}: {took:?}");
        (told, given.swap(0, Ordering::Relaxed))
    };
    let (told, bytes) = ok("page").await;
    assert_eq!(told["og:title"], "T");
    assert!(bytes <= 2 << 20, "{bytes}");
    assert_eq!(ok("slow").await.0["og:title"], "T", "what has come counts");
    for path in ["image", "slow-image"] {
        let (told, bytes) = ok(path).await;
        assert_eq!(told, json!({}));
        assert!(bytes <= 11 << 20, "{bytes}");
    }
    let (told, bytes) = ok("beside").await;
    assert_eq!(told, json!({ "og:title": "T" }));
    assert!(bytes <= 1 << 20, "{bytes}");
    let (told, bytes) = ok("page-with-image").await;
    assert_eq!(told, json!({ "og:title": "T" }));
    assert!(bytes <= 11 << 20, "{bytes}");
    scene.wait(60).await;
    let parts = scene.server.media().join("media/parts");
    let left = std::fs::read_dir(parts).map(Iterator::count).unwrap_or_default();
    assert_eq!(left, 0, "nothing of an image that did not arrive is left");
    scene.server.assert_whole();
}

#[tokio::test(start_paused = true)]
async fn what_is_packed_is_not_unpacked() {
    let scene = Scene::new().await;
    let packed = |kind: &str, coding: &str| {
        bytes(200, &[("content-type", kind), ("content-encoding", coding)], vec![0x1f; 1_000])
    };
    scene.host("a.example", "5.0.0.1", move |path| match path {
        "/gzip" => packed("text/html", "gzip"),
        "/br" => packed("text/html", "identity, br"),
        "/i.png" => packed("image/png", "gzip"),
        "/identity" => {
            bytes(200, &[("content-type", "text/html"), ("content-encoding", "identity")], "<title>T</title>")
        }
        _ => page("<title>T</title><meta property=og:image content=/i.png>"),
    });
    scene.none("https://a.example/gzip").await;
    scene.none("https://a.example/br").await;
    assert_eq!(scene.ok("https://a.example/identity").await, json!({ "og:title": "T" }));
    assert_eq!(scene.ok("https://a.example/page").await, json!({ "og:title": "T" }));
}

#[tokio::test(start_paused = true)]
async fn hosts_that_hang_hold_up_whoever_asked_for_them_and_nobody_else() {
    let scene = Scene::new().await;
    scene.host("a.example", "5.0.0.1", |_| page("<title>T</title>"));
    scene.host("hangs.example", "5.0.0.2", |_| page(""));
    for port in [80, 443] {
        scene.net.weather(&format!("5.0.0.2:{port}"), Weather::Silent, Duration::ZERO);
    }
    scene.net.weather("5.0.0.1:443", Weather::Fair, Duration::from_millis(100));
    let env = scene.server.server().app().env.clone();
    let began = env.uptime();
    scene.none("https://hangs.example/alone").await;
    assert!(env.uptime() - began <= Duration::from_secs(20), "{:?}", env.uptime() - began);
    // One user has as many pages hang as they can.
    let asking: Vec<_> = (0..200)
        .map(|number| {
            let alice = scene.alice.clone();
            scene
                .server
                .begin(async move { alice.get(&path(&format!("https://hangs.example/{number}"))).await })
        })
        .collect();
    scene.wait(1).await;
    let bob = scene.server.register("bob").await;
    let began = env.uptime();
    // Both are behind one address, which holds its own share.
    let request = |number: usize| {
        let token = format!("Bearer {}", bob.token.as_ref().unwrap());
        let url = path(&format!("https://a.example/{number}"));
        Request::get(url).header(header::AUTHORIZATION, token).body(Sent::empty()).unwrap()
    };
    for number in 0..5 {
        let response = scene.server.send_from([192, 0, 2, 77], request(number)).await;
        assert_eq!(response.status(), StatusCode::OK);
    }
    assert!(env.uptime() - began <= Duration::from_secs(3), "{:?}", env.uptime() - began);
    let mut statuses = std::collections::BTreeMap::new();
    for asked in asking {
        *statuses.entry(asked.await.unwrap().0.as_u16()).or_insert(0) += 1;
    }
    assert_eq!(statuses.values().sum::<usize>(), 200);
    assert!(statuses.keys().all(|status| [404, 429].contains(status)), "{statuses:?}");
    assert!(statuses.contains_key(&404), "{statuses:?}");
}

#[tokio::test(start_paused = true)]
async fn hosts_that_are_not_there_or_lie_about_themselves_have_no_preview_and_nothing_is_said_of_why() {
    let scene = Scene::new().await;
    scene.host("refuses.example", "5.0.0.1", |_| page("<title>T</title>"));
    scene.host("breaks.example", "5.0.0.2", |_| page("<title>T</title>"));
    scene.net.host("wrong.example", &["5.0.0.2"]);
    scene.net.host("inside.example", &["10.0.0.1"]);
    scene.net.weather("5.0.0.1:443", Weather::Refuses, Duration::ZERO);
    scene.net.weather("5.0.0.2:443", Weather::LosesAnswers, Duration::ZERO);
    let mut answers = Vec::new();
    for host in ["refuses", "breaks", "wrong", "inside", "unknown"] {
        let (status, json) = scene.preview(&format!("https://{host}.example/")).await;
        assert_eq!(status, StatusCode::NOT_FOUND, "{host}");
        answers.push(json);
    }
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
}

#[tokio::test(start_paused = true)]
async fn hostile_markup_is_told_as_text_and_costs_little() {
    let scene = Scene::new().await;
    scene.host("a.example", "5.0.0.1", |path| match path {
        "/nested" => page(format!("<title>T</title>{}", "<div>".repeat(2 << 20))),
        "/attributes" => {
            let mut html = String::from("<title>T</title><p");
            (0..150_000).for_each(|number| html.push_str(&format!(" a{number}")));
            page(html)
        }
        "/signs" => page("<title>\u{202e}a\u{0}b&#x1b;[31m&lt;script&gt;\u{2066}</title><meta property=og:url content=javascript:x>"),
        "/images" => page("<title>T</title><meta property=og:image content='data:image/png;base64,AAAA'><meta name=twitter:image content='javascript:x'>"),
        "/long" => page(format!("<meta property=og:title content='{0}'><meta property=og:description content='{0}'>", "é".repeat(200_000))),
        _ => bytes(200, &[("content-type", "text/html; charset=utf-16")], &b"<title>T</title>\xff"[..]),
    });
    for path in ["nested", "attributes", "images", "lie"] {
        let told = scene.ok(&format!("https://a.example/{path}")).await;
        assert_eq!(told, json!({ "og:title": "T" }), "{path}");
    }
    assert_eq!(scene.ok("https://a.example/signs").await, json!({ "og:title": "a\u{fffd}b[31m<script>" }));
    let told = scene.ok("https://a.example/long").await;
    assert_eq!(told["og:title"].as_str().unwrap().chars().count(), 300);
    let length = told["og:description"].as_str().unwrap().chars().count();
    assert!(length <= 1_000, "{length}");
}

#[tokio::test(start_paused = true)]
async fn a_server_without_room_for_media_makes_previews_without_images() {
    let scene = Scene::with(|config| config.media.server_bytes_max = aqueduct::config::Size::kib(1)).await;
    scene.host("a.example", "5.0.0.1", |path| match path {
        "/i.png" => bytes(200, &[("content-type", "image/png")], png(100, 100, 5_000)),
        _ => page("<title>T</title><meta property=og:image content=/i.png>"),
    });
    assert_eq!(scene.ok("https://a.example/").await, json!({ "og:title": "T" }));
    scene.server.assert_whole();
}
