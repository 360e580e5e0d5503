//! A push gateway: takes the notifications of homeservers and hands them to the services that reach people's devices
//! ([push gateway API](https://spec.matrix.org/v1.19/push-gateway-api/)). The crate knows no rooms and no storage.
//!
//! From below: [`ports`] are the traits through which clock, randomness, tasks and figures come in; [`settings`] say which apps there are;
//! `notification` is the bounded request; `text` shortens what does not fit; `outcome` says what became of a device; `payer` says for
//! whom something is done, `shares` is the rule of admission and `lines` waits by it; `kept` is a bounded memory, and `remembered` knows what
//! was delivered, who asked to be left alone, and who had which failures; `outbound` sends one request to a guarded address; `keys`, `vapid` and
//! `encryption` are the cryptography; `web`, `fcm` and `apns` speak the protocols of the providers; `delivery` brings a notification to one
//! device; [`gateway`] puts them together, and [`api`] is the endpoint.
//!
//! # The one rule of admission
//!
//! Anybody may call, nobody proves who they are, and users choose where some deliveries go. So one rule holds for whatever all share and
//! runs out: requests, the memory of their bodies, look-ups, deliveries to an app's provider, to a host and port, to an address, and the
//! processors.
//!
//! - **The payer is the address that calls** (of IPv6 its network of 64 bits), and the homeserver behind it pays for its users. Payers of
//!   one site (an address, or a network of 48 bits) have one share together.
//! - **Nobody takes more than they leave.** A site may hold as much of a thing as it leaves free. Alone it has half, of three each has a quarter,
//!   and the next one finds something free.
//! - **Who holds least comes next.** Where there is nothing, a delivery waits in line, and holds nothing meanwhile. The site comes next that
//!   holds the smallest part of any of the things wanted.
//! - **Who has most gives way** where a line is full, or where a body comes and there is no room for it. A delivery that was sent never
//!   gives way, nor does a request that is worked on.
//! - **Work comes after admission.** Nothing is shortened, written or encrypted before a delivery has its places and nobody has asked to
//!   leave its device, host or app alone; then it is done off the threads that serve requests.
//! - **A failure counts against what failed, by whom.** A host and port that does not answer is left alone by the site that chose it, and by all
//!   only after several sites had the same and nobody an answer. A site that names devices by the thousand which
//!   an operator's provider does not know is slowed down, but for those that were reached before. In memories that are full, the site with most is forgotten first.
//! - **A try that has begun is finished** and remembered when the caller hangs up, and keeps its places and its request's until then. The same
//!   notification for the same device waits for it.
//! - **The homeserver is answered within 15 seconds**, because some wait for no more than 20. A try takes at most ten.

pub mod ports;
pub mod settings;
mod notification;
mod text;
mod outcome;
mod payer;
mod shares;
mod lines;
mod kept;
mod remembered;
mod outbound;
mod keys;
mod vapid;
mod encryption;
mod message;
mod web;
mod oauth;
mod fcm;
mod apns;
mod delivery;
pub mod gateway;
pub mod api;

pub use api::{Caller, NOTIFY_PATH};
pub use gateway::Gateway;
pub use settings::Settings;
