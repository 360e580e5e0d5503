//! How Matrix servers find, trust and ask one another (the
//! [server-server API](https://spec.matrix.org/v1.19/server-server-api/)), without rooms and without storage.

pub mod guard;
pub mod ports;
pub mod json;
pub mod backoff;
pub mod discovery;
mod joined;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod call;
pub mod keys;
pub mod xmatrix;
pub mod client;
