//! The gateway over its router: against servers that speak the providers' protocols over real TLS, and in a simulated network against those
//! that fail, lie and hang.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::disallowed_methods,
    reason = "what is not as expected fails the test; these tests are about the real world behind the doors"
)]

mod world;

mod apns;
mod bounds;
mod fcm;
mod hostile;
mod shares;
mod tries;
mod unified_push;
mod web_push;
