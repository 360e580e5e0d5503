//! Searches by words that people remember in part.

pub mod find;
pub mod follow;
pub mod index;
pub mod people;
pub mod words;
