//! Rooms: events, their order, the state they add up to, and who may see them.

pub mod state;
