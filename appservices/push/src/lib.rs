//! A push gateway: takes the notifications of homeservers and hands them to the services that reach people's devices
//! ([push gateway API](https://spec.matrix.org/v1.19/push-gateway-api/)). The crate knows no rooms and no storage.
//!
//! From below: [`ports`] are the traits through which clock, randomness and figures come in; [`settings`] say which apps there are;
//! `notification` is the bounded request; `text` shortens what does not fit; `outcome` says what became of a device;
//! `lines` bounds who waits for what; `remembered` knows what was delivered and who asked to be left alone; `outbound` sends one
//! request to a guarded address; `keys`, `vapid` and `encryption` are the cryptography; `web`, `fcm` and `apns` speak the protocols
//! of the providers; [`gateway`] puts them together, and [`api`] is the endpoint.

pub mod ports;
pub mod settings;
mod notification;
mod text;
mod outcome;
mod lines;
mod remembered;
mod outbound;
mod keys;
mod vapid;
mod encryption;
mod web;
mod oauth;
mod fcm;
mod apns;
pub mod gateway;
pub mod api;

pub use api::{Caller, NOTIFY_PATH};
pub use gateway::Gateway;
pub use settings::Settings;
