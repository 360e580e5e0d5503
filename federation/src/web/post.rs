//! Requests to URLs that users of ours name for something to be sent there, as those of push gateways are: time and size of the answer are
//! bounded here. How many run at once is for the caller to bound, who knows for whom they run.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header};
use url::Url;

use super::Web;
use crate::{
    json::{Answer, Limits, stream::collect},
    ports::Body,
};

/// Nobody is asked to wait longer than this, whatever the other side says.
const RETRY_AFTER_S_MAX: u64 = 3_600;

/// The bounds of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// The answer begins within this time, with DNS and connecting.
    pub begins: Duration,
    /// The body of the answer comes within this time from then on; what is late is left out.
    pub body: Duration,
    /// The bounds of the answer.
    pub limits: Limits,
}

/// A request that got no answer, in words for whoever looks for the fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NotAnswered(pub String);

/// An answer, whatever its status.
#[derive(Debug)]
pub struct Reply {
    /// The status of the answer.
    pub status: StatusCode,
    /// The other side asks us to wait for this many seconds.
    pub retry_after_s: Option<u64>,
    /// The body; none where it is beyond the bounds, broke off or came too late.
    pub answer: Option<Answer>,
}

impl Web {
    /// Sends JSON to a URL (`POST`), and reads the answer as far as its bounds go. `payer` stands for whoever it is sent for, who holds a
    /// share of the memory for answers. Errors: there was no answer.
    pub async fn post(
        &self,
        url: &str,
        json: Bytes,
        options: Options,
        payer: Option<u64>,
    ) -> Result<Reply, NotAnswered> {
        let late = |_| NotAnswered("it did not answer in time".to_owned());
        let asked = tokio::time::timeout(options.begins, self.send_json(url, json)).await;
        let (head, body) = asked.map_err(late)??.into_parts();
        let retry_after = head.headers.get(header::RETRY_AFTER).and_then(|it| it.to_str().ok());
        let retry_after_s = retry_after.and_then(|it| it.trim().parse::<u64>().ok());
        let memory = self.memory.paid_by(payer);
        let reading = collect(body, options.limits, &memory);
        let answer = tokio::time::timeout(options.body, reading).await.ok().and_then(Result::ok);
        let retry_after_s = retry_after_s.map(|it| it.min(RETRY_AFTER_S_MAX));
        Ok(Reply { status: head.status, retry_after_s, answer })
    }

    async fn send_json(&self, url: &str, json: Bytes) -> Result<Response<Body>, NotAnswered> {
        let url = Url::parse(url).map_err(|_| NotAnswered("the URL cannot be read".to_owned()))?;
        let target = self.hosts.find_url(&url).await.map_err(|why| NotAnswered(why.to_string()))?;
        let path =
            url.query().map_or_else(|| url.path().to_owned(), |query| format!("{}?{query}", url.path()));
        let agent = HeaderValue::from_static(concat!("Aqueduct/", env!("CARGO_PKG_VERSION")));
        let request = Request::post(path)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::ACCEPT, "application/json")
            .header(header::USER_AGENT, agent)
            .header(header::CONTENT_LENGTH, json.len())
            .body(json)
            .map_err(|_| NotAnswered("the URL has a path that cannot be asked for".to_owned()))?;
        let response = self.transport.send(target, request).await;
        response.map_err(|error| NotAnswered(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures_util::{StreamExt, stream};
    use parking_lot::Mutex;

    use super::*;
    use crate::{
        guard::{Guard, parse_network},
        testing::{Arrived, Net, Weather, bytes, json},
    };

    const OPTIONS: Options =
        Options { begins: Duration::from_secs(20), body: Duration::from_secs(10), limits: Limits::DOCUMENT };
    const PATH: &str = "/_matrix/push/v1/notify";

    fn web(net: &Net, allowed: &[&str]) -> Web {
        let allowed = allowed.iter().map(|it| parse_network(it).unwrap()).collect();
        let ports = net.ports();
        Web::new(ports.resolver, ports.transport, Guard::new(allowed), false)
    }

    async fn post(web: &Web, url: &str) -> Result<Reply, NotAnswered> {
        web.post(&format!("{url}{PATH}"), Bytes::from_static(b"{}"), OPTIONS, None).await
    }

    #[tokio::test(start_paused = true)]
    async fn json_goes_to_the_host_of_the_url_and_the_answer_comes_back() {
        let net = Net::new(1);
        net.host("push.example", &["5.0.0.1"]);
        let got: Arc<Mutex<Vec<Arrived>>> = Arc::default();
        let keeps = Arc::clone(&got);
        net.serve("5.0.0.1:8443", &["push.example"], move |arrived| {
            keeps.lock().push(arrived);
            std::future::ready(bytes(429, &[("retry-after", "7")], r#"{"a":1}"#))
        });
        let reply = post(&web(&net, &[]), "https://push.example:8443").await.unwrap();
        assert_eq!((reply.status.as_u16(), reply.retry_after_s), (429, Some(7)));
        assert_eq!(reply.answer.unwrap().bytes().as_ref(), br#"{"a":1}"#);
        let got = got.lock();
        assert_eq!((got[0].host_header.as_str(), got[0].request.uri().path()), ("push.example:8443", PATH));
        assert_eq!(got[0].request.headers()[header::CONTENT_TYPE], "application/json");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_private_is_reached_by_no_way() {
        let net = Net::new(1);
        net.host("inside.example", &["10.0.0.1"]);
        net.serve("10.0.0.1:443", &["inside.example", "10.0.0.1"], |_| std::future::ready(json(200, "{}")));
        net.host("push.example", &["5.0.0.1"]);
        let to_inside = [("location", "https://inside.example/_matrix/push/v1/notify")];
        net.serve("5.0.0.1:443", &["push.example"], move |_| std::future::ready(bytes(307, &to_inside, "")));
        let outside = web(&net, &[]);
        for host in ["inside.example", "10.0.0.1", "[::ffff:10.0.0.1]"] {
            assert!(post(&outside, &format!("https://{host}")).await.is_err(), "{host}");
        }
        let redirected = post(&outside, "https://push.example").await.unwrap();
        assert_eq!(redirected.status.as_u16(), 307, "a redirect is not followed");
        assert_eq!(net.take_arrived().len(), 1);
        assert!(post(&web(&net, &["10.0.0.0/8"]), "https://inside.example").await.is_ok());
        assert!(post(&outside, "ftp://push.example").await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_beyond_its_bounds_is_left_out_and_one_that_does_not_come_is_given_up() {
        let net = Net::new(1);
        net.host("push.example", &["5.0.0.1"]);
        let answers = |body: fn() -> Body| {
            net.serve("5.0.0.1:443", &["push.example"], move |_| {
                std::future::ready(http::Response::new(body()))
            });
        };
        let web = web(&net, &[]);
        answers(|| Body::new(stream::repeat_with(|| Ok(Bytes::from(vec![b' '; 1 << 20])))));
        let reply = post(&web, "https://push.example").await.unwrap();
        assert!(reply.status.is_success() && reply.answer.is_none(), "gigabytes");
        answers(|| Body::from(Bytes::from("[".repeat(10_000) + &"]".repeat(10_000))));
        assert!(post(&web, "https://push.example").await.unwrap().answer.is_none(), "10,000 levels");
        answers(|| Body::new(stream::pending().boxed()));
        assert!(post(&web, "https://push.example").await.unwrap().answer.is_none(), "it never ends");
        net.weather("5.0.0.1:443", Weather::Silent, Duration::ZERO);
        assert!(post(&web, "https://push.example").await.is_err());
    }
}
