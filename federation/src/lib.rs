//! How Matrix servers find, trust and ask one another (the
//! [server-server API](https://spec.matrix.org/v1.19/server-server-api/)). The crate knows no rooms and no storage.
//!
//! From below: [`guard`] says where we may connect to; [`ports`] are the traits through which everything comes in from outside;
//! [`turns`] has those who use one thing do it one after another, and [`joined`] has them share one look-up;
//! [`json`] bounds and keeps what others send; [`backoff`] is a server's health as a value; [`discovery`] finds a server from
//! its name; [`call`] sends one request and bounds all that it may cost; [`keys`] are ours and others'; [`xmatrix`] signs requests and
//! checks who made one; [`client`] sends typed requests; [`web`] asks for pages that others name; [`transport`] is the real network,
//! `testing` a simulated one.

pub mod guard;
pub mod ports;
pub mod turns;
pub mod json;
pub mod backoff;
pub mod joined;
pub mod discovery;
pub mod call;
pub mod keys;
pub mod xmatrix;
pub mod client;
pub mod web;
pub mod transport;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod queue;
