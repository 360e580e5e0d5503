//! Finding what somebody remembers only in part.

pub mod people;
