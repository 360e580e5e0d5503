//! What a user is told of: push rules and the unread counts that follow from them.

pub mod evaluate;
pub mod rules;
pub mod unread;

pub use unread::Push;
