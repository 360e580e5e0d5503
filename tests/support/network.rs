//! A network in memory, with other servers in it that sign what they ask.

use std::sync::Arc;

use aqueduct::{
    env::{Env, Network},
    rooms::build::Signer,
};
use federation::{
    keys::OwnKeys,
    testing::{Net, key_pair, own_keys},
    xmatrix::{self, Signed},
};
use http::{Method, Request, StatusCode, header};
use http_body_util::BodyExt;
use ruma::OwnedEventId;
use serde_json::{Value, json};

use super::{BEGAN_MS, TestServer, encoded, remote::Remote};

/// The doors of a server in this network.
pub(crate) fn doors(net: &Net) -> Env {
    let door = Arc::new(net.clone());
    Env::simulated(1, BEGAN_MS).in_network(Network {
        resolver: door.clone(),
        transport: door.clone(),
        web: door,
    })
}

/// Another server, which publishes its keys and signs its requests.
pub(crate) struct Peer {
    pub(crate) own: Arc<OwnKeys>,
    signer: Signer,
}

impl Peer {
    /// A server of this name at this address of the network, with a key made from the number.
    pub(crate) fn new(net: &Net, name: &str, address: &str, seed: u8) -> Self {
        let peer = Self::unheard(name, seed);
        net.host(name, &[address]);
        net.serve_json(&format!("{address}:8448"), &[name], &peer.own.document(BEGAN_MS));
        peer
    }

    /// A server with a key made from the number, which nobody can find.
    pub(crate) fn unheard(name: &str, seed: u8) -> Self {
        let own = own_keys(name, seed, "k").unwrap();
        let signer = Signer::new(name.try_into().unwrap(), Arc::new(key_pair(seed, "k").unwrap()));
        Self { own, signer }
    }

    /// An event of one of its users on these events, signed with its own key: the id, and the event as it sends it.
    pub(crate) fn event(
        &self,
        of: &Remote,
        kind: &str,
        state_key: Option<&str>,
        content: Value,
        prev: &[OwnedEventId],
    ) -> (OwnedEventId, Value) {
        let built = of.build(&self.signer, kind, state_key, content, prev);
        (built.event.id, serde_json::from_slice(&built.json).unwrap())
    }

    /// Sends a transaction to the server under test.
    pub(crate) async fn transact(
        &self,
        server: &TestServer,
        txn: &str,
        pdus: &[Value],
        edus: &[Value],
    ) -> (StatusCode, Value) {
        let body = json!({
            "origin": self.own.server(), "origin_server_ts": BEGAN_MS, "pdus": pdus, "edus": edus,
        });
        let uri = format!("/_matrix/federation/v1/send/{}", encoded(txn));
        self.ask(server, Method::PUT, &uri, Some(&body)).await
    }

    /// The request with this server's signature.
    pub(crate) fn signed(
        &self,
        to: &str,
        method: Method,
        uri: &str,
        body: Option<&Value>,
    ) -> Request<axum::body::Body> {
        let body = body.map(Value::to_string).unwrap_or_default();
        let content = xmatrix::content(body.as_bytes()).unwrap();
        let signed = Signed { method: method.as_str(), uri, content: content.as_ref() };
        let signature = xmatrix::sign(&self.own, to.try_into().unwrap(), signed).unwrap();
        let request = Request::builder().method(method).uri(uri).header(header::AUTHORIZATION, signature);
        request.body(body.into()).unwrap()
    }

    /// Asks the server under test.
    pub(crate) async fn ask(
        &self,
        server: &TestServer,
        method: Method,
        uri: &str,
        body: Option<&Value>,
    ) -> (StatusCode, Value) {
        answer(server, self.signed("test.example", method, uri, body)).await
    }
}

/// The status and the JSON that a request is answered with.
pub(crate) async fn answer(server: &TestServer, request: Request<axum::body::Body>) -> (StatusCode, Value) {
    let response = server.send(request).await;
    let status = response.status();
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    (status, serde_json::from_slice(&bytes).unwrap())
}
