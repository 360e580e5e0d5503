//! What a user is told of: push rules and the unread counts that follow from them.

pub mod rules;
