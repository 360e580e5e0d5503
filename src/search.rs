//! Searches by words that people remember in part.

pub mod people;
