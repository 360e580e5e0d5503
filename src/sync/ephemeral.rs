//! Typing and presence as they are now, in memory. Their changes are numbered within one run of the server. Nothing is left
//! of typing when the server ends; of presence a note keeps what others were told last (`accounts/presence/kept.rs`).

use std::sync::Arc;

use parking_lot::Mutex;

use crate::{
    accounts::presence::{PresenceBoard, elsewhere::Elsewhere},
    env::Env,
    rooms::typing::Typing,
};

/// The ephemeral data of the server: typing and presence. A clone is cheap.
#[derive(Clone)]
pub struct Ephemeral(Arc<Inner>);

struct Inner {
    boot: u32,
    shows_presence: bool,
    board: Mutex<Board>,
}

/// Typing and presence lie under one lock, so that a reader of the number has seen all changes up to it.
#[derive(Debug, Default)]
pub struct Board {
    /// The number of the last change, counted from 1 in each run of the server.
    number: u64,
    /// The users who are typing, by room.
    pub typing: Typing,
    /// The presence of users who were seen in this run of the server, or whom others were told of in the last one.
    pub presence: PresenceBoard,
    /// The presence of users of other servers, as far as those told it in this run of the server.
    pub elsewhere: Elsewhere,
}

impl Board {
    /// The number of the last change.
    pub fn number(&self) -> u64 {
        self.number
    }
}

impl Ephemeral {
    /// Begins with nobody present and nobody typing, under a random id of this run. Unless `shows_presence`, nobody's presence
    /// is told to anybody.
    pub fn new(env: &Env, shows_presence: bool) -> Self {
        let mut boot = [0; 4];
        env.fill_random(&mut boot);
        Self(Arc::new(Inner { boot: u32::from_be_bytes(boot), shows_presence, board: Mutex::default() }))
    }

    /// Whether users are told of the presence of others.
    pub fn shows_presence(&self) -> bool {
        self.0.shows_presence
    }

    /// The id of this run of the server.
    pub fn boot(&self) -> u32 {
        self.0.boot
    }

    /// Makes a change and numbers it. `change` is given the next number, which is used only if it says that something
    /// changed.
    pub fn change<T>(&self, change: impl FnOnce(&mut Board, u64) -> (bool, T)) -> (bool, T) {
        let mut board = self.0.board.lock();
        let next = board.number + 1;
        let (changed, answer) = change(&mut board, next);
        if changed {
            board.number = next;
        }
        (changed, answer)
    }

    /// Changes something of which nobody is told now, so that no number is used.
    pub fn update<T>(&self, update: impl FnOnce(&mut Board) -> T) -> T {
        update(&mut self.0.board.lock())
    }

    /// Reads typing and presence at one moment; the lock is held until `read` returns.
    pub fn read<T>(&self, read: impl FnOnce(&Board) -> T) -> T {
        read(&self.0.board.lock())
    }
}
