//! Rooms: events, their order, the state they add up to, and who may see them.

pub mod graph;
pub mod resolve;
pub mod state;
