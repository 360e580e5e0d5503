//! HTTP in and out, and nothing else: a handler reads the request, reads a snapshot or calls a flow, and shapes the answer.
//! What writes or waits is a flow.
//!
//! The method and the paths of an endpoint come from ruma's metadata; the policy that holds before its handler is
//! called stands beside the handler. [`Routes`] holds all endpoints, and `docs/endpoints.md` lists them.

mod answer;
mod budget;
pub mod checked;
pub mod client;
mod drain;
mod endpoints;
pub mod extract;
pub(crate) mod head;
mod misfit;
mod pages;
mod parameters;
pub mod policy;
pub mod raw;
mod receive;
pub mod reply;
mod routes;
mod serve;
mod server;
mod socket;

pub use routes::{Listed, Routes};
pub use serve::router;

impl Routes {
    /// Every endpoint that this server serves.
    pub fn all() -> Self {
        let mut routes = Self::default();
        client::routes(&mut routes);
        pages::routes(&mut routes);
        server::routes(&mut routes);
        socket::routes(&mut routes);
        routes
    }
}
