//! HTTP in and out, and nothing else: a handler reads the request, calls a flow, shapes the answer.
//!
//! Method and paths of an endpoint come from ruma's metadata; what holds before its handler is called stands beside the
//! handler. [`Routes`] holds them all, `docs/endpoints.md` prints them.

mod answer;
mod budget;
pub mod checked;
pub mod client;
mod drain;
mod endpoints;
pub mod extract;
mod pages;
pub mod policy;
pub mod raw;
mod receive;
pub mod reply;
mod routes;
mod serve;

pub use routes::{Listed, Routes};
pub use serve::router;
