//! HTTP in and out, and nothing else: a handler reads the request, calls a flow, shapes the answer.
//!
//! Method and paths of an endpoint come from ruma's metadata; [`Routes`] holds them all.

pub mod client;
mod confirmable;
mod endpoints;
pub mod extract;
mod guests;
mod limits;
mod raw;
pub mod reply;
mod routes;
mod unread;

pub use routes::{Routes, router};
