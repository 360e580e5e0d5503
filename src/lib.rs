//! Aqueduct, a Matrix homeserver.
//!
//! The modules stand in one line; a module uses only what stands above it here (`tests/tidy.rs` checks this).
//! `docs/architecture.md` walks through the code.

// These hold values that all other modules use, and the doors through which the outside comes in.
pub mod ids;
pub mod json;
pub mod error;
pub mod config;
pub mod env;
pub mod metrics;

// These are plain functions over a snapshot or a batch; none of them waits.
pub mod store;
pub mod schema;
pub mod media;
pub mod accounts;
pub mod rooms;
pub mod encryption;
pub mod push;
pub mod search;

// From here on functions may wait: for others, for news, and for the steps of a use case.
pub mod delivery;
pub mod sync;
pub mod flows;

// This reads HTTP requests and writes the answers.
pub mod api;

// This puts all of it together and runs it.
pub mod server;
