//! JSON of other servers: bounded while it streams in, exact once it is here.

pub mod parts;
pub mod stream;
pub mod tree;

pub use stream::{Answer, Counted, Exceeded, Limits, Memory, NotRead};
pub use tree::{Canonical, Json, NotJson};
