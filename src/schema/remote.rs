//! Rows about other servers: what came from them and waits, and what is to be told to them.
