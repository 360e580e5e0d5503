//! Aqueduct, a Matrix homeserver.
//!
//! The modules stand in one line; a module uses only what stands above it here (`tests/tidy.rs` checks this).
//! `docs/architecture.md` walks through the house.

// Values and doors.
pub mod ids;
pub mod json;
pub mod error;
pub mod config;
pub mod env;
pub mod metrics;

// Plain functions over a snapshot or a batch.
pub mod store;
pub mod schema;
pub mod accounts;
pub mod rooms;
pub mod encryption;
pub mod push;
pub mod search;

// Async begins here: waiting, and use cases.
pub mod sync;
pub mod flows;

// HTTP in and out.
pub mod api;

// All of it together.
pub mod server;
