//! Requests that succeed, and those that fail by anyone's fault.

use std::time::Duration;

use futures_util::{future::ready, stream};

use super::*;
use crate::{
    guard::Guard,
    testing::{Net, Weather, bytes, json},
};

fn caller(net: &Net) -> Caller {
    let ports = net.ports();
    let discovery = Discovery::new(ports.clone(), Guard::default(), false);
    Caller::new(ports, discovery, ServerList::new(&[], &["denied.example"]))
}

async fn ask(net: &Net, name: &str) -> Result<Reply, Failure> {
    let request = Request::get("/_matrix/federation/v1/version").body(Bytes::new()).unwrap();
    caller(net).call(name.try_into().unwrap(), request, Options::default()).await
}

/// A server `a.example:1` that answers this.
fn answering(status: u16, headers: &'static [(&'static str, &'static str)], body: &'static str) -> Net {
    let net = Net::new(1);
    net.host("a.example", &["5.0.0.1"]);
    net.serve("5.0.0.1:1", &["a.example"], move |_| ready(bytes(status, headers, body)));
    net
}

#[tokio::test(start_paused = true)]
async fn an_answer_is_handed_on_with_its_headers() {
    let net = answering(200, &[("content-type", "application/json")], r#"{"server":{}}"#);
    let reply = ask(&net, "a.example:1").await.unwrap();
    assert_eq!(reply.answer.bytes(), r#"{"server":{}}"#);
    assert_eq!(reply.headers["content-type"], "application/json");
    assert_eq!(net.take_arrived(), ["a.example@5.0.0.1:1 a.example:1 GET /_matrix/federation/v1/version"]);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_denied_is_not_looked_up() {
    let net = Net::new(1);
    net.host("denied.example", &["5.0.0.1"]);
    let failure = ask(&net, "denied.example:1").await.unwrap_err();
    assert!(matches!(failure, Failure::NotAllowed { .. }) && !failure.is_temporary());
    assert!(net.take_looked_up().is_empty());
}

#[tokio::test(start_paused = true)]
async fn failures_say_who_is_at_fault() {
    let net = answering(200, &[], "{}");
    assert!(matches!(ask(&net, "none.example:1").await, Err(Failure::NotFound(_))));
    net.weather("5.0.0.1:1", Weather::Refuses, Duration::ZERO);
    assert!(matches!(ask(&net, "a.example:1").await, Err(Failure::Unreachable(NotSent::Unreachable(_)))));
    net.weather("5.0.0.1:1", Weather::LosesAnswers, Duration::ZERO);
    assert!(matches!(ask(&net, "a.example:1").await, Err(Failure::Unreachable(NotSent::Broken(_)))));
    net.weather("5.0.0.1:1", Weather::Silent, Duration::ZERO);
    assert!(matches!(ask(&net, "a.example:1").await, Err(Failure::TimedOut)));
    net.serve_json("5.0.0.1:1", &["b.example"], "{}");
    assert!(matches!(ask(&net, "a.example:1").await, Err(Failure::Unreachable(NotSent::Certificate(_)))));
    assert!(matches!(ask(&answering(302, &[], ""), "a.example:1").await, Err(Failure::Nonsense(_))));
}

#[tokio::test(start_paused = true)]
async fn a_refusal_is_cut_and_cleared() {
    let long: &'static str = Box::leak(
        format!(
            r#"{{"errcode":"M_{}","error":"a\u001b[31m{}","retry_after_ms":1e400}}"#,
            "X".repeat(500),
            "b".repeat(500)
        )
        .into_boxed_str(),
    );
    let Err(Failure::Refused { errcode, body, .. }) = ask(&answering(403, &[], long), "a.example:1").await
    else {
        panic!("it refused");
    };
    assert_eq!((errcode, body.len()), (None, 0), "1e400 is no JSON that can be handed on");
    let long: &'static str = Box::leak(long.replace("1e400", "\"x\"").into_boxed_str());
    let Err(failure) = ask(&answering(403, &[("retry-after", "99999999999999")], long), "a.example:1").await
    else {
        panic!("it refused");
    };
    assert!(!failure.to_string().contains('\u{1b}') && failure.to_string().len() < 500);
    let Failure::Refused { errcode, message, retry_after_ms, .. } = failure else { panic!("it refused") };
    assert_eq!(errcode.unwrap().len(), ERRCODE_CHARACTERS_MAX);
    assert_eq!(message.len(), MESSAGE_CHARACTERS_MAX);
    assert_eq!(retry_after_ms, Some(RETRY_AFTER_MS_MAX));
}

#[tokio::test(start_paused = true)]
async fn a_refusal_without_sense_is_still_one() {
    for body in ["", "<html>", "[]", r#"{"errcode":5,"error":[]}"#, "\u{0}"] {
        let failure =
            ask(&answering(502, &[("retry-after", "soon")], body), "a.example:1").await.unwrap_err();
        assert!(failure.is_temporary());
        let Failure::Refused { status, errcode, message, retry_after_ms, .. } = failure else {
            panic!("{body}")
        };
        assert_eq!((status.as_u16(), errcode, message.as_str(), retry_after_ms), (502, None, "", None));
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_without_end_is_given_up_in_bytes_and_in_time() {
    let net = answering(200, &[], "");
    net.serve("5.0.0.1:1", &["a.example"], |_| {
        let pieces = stream::repeat_with(|| Ok::<_, NotSent>(vec![b'x'; 1 << 16].into()));
        ready(Response::new(Body::new(pieces)))
    });
    assert!(matches!(ask(&net, "a.example:1").await, Err(Failure::Nonsense(_))));
    net.serve("5.0.0.1:1", &["a.example"], |_| {
        // A byte every ten seconds never stalls; the time for all of it ends.
        let pieces = stream::unfold((), async |()| {
            let pause = Duration::from_secs(10);
            tokio::time::timeout(pause, std::future::pending::<()>()).await.unwrap_err();
            Some((Ok(Bytes::from_static(b"x")), ()))
        });
        ready(Response::new(Body::new(pieces)))
    });
    assert_eq!(ask(&net, "a.example:1").await.unwrap_err(), Failure::TimedOut);
    net.serve("5.0.0.1:1", &["a.example"], |_| ready(json(200, "[".repeat(200))));
    assert!(matches!(ask(&net, "a.example:1").await, Err(Failure::Nonsense(_))));
}

#[tokio::test(start_paused = true)]
async fn a_request_that_waits_for_a_place_too_long_blames_nobody() {
    let net = answering(200, &[], "{}");
    net.weather("5.0.0.1:1", Weather::Silent, Duration::ZERO);
    let caller = caller(&net);
    let asking = (0..20).map(|_| {
        let request = Request::get("/").body(Bytes::new()).unwrap();
        let options = Options { begins: Duration::from_secs(90), ..Options::default() };
        caller.call("a.example:1".try_into().unwrap(), request, options)
    });
    let failures: Vec<_> =
        futures_util::future::join_all(asking).await.into_iter().map(Result::unwrap_err).collect();
    assert_eq!(failures.iter().filter(|it| **it == Failure::TimedOut).count(), 8);
    assert_eq!(failures.iter().filter(|it| **it == Failure::Busy).count(), 12);
}
