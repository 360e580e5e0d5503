//! What is told once and kept nowhere: who is typing, who is there. Changes are counted within one run of the server.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::{accounts::presence::PresenceBoard, env::Env, rooms::typing::Typing};

/// What is ephemeral. Cheap to clone.
#[derive(Clone)]
pub struct Ephemeral(Arc<Inner>);

struct Inner {
    boot: u32,
    board: Mutex<Board>,
}

/// Everything ephemeral, under one lock: whoever reads a number has all changes up to it.
#[derive(Debug, Default)]
pub struct Board {
    /// Of the last change.
    number: u64,
    /// Who is typing.
    pub typing: Typing,
    /// Who is there.
    pub presence: PresenceBoard,
}

impl Board {
    /// The number of the last change.
    pub fn number(&self) -> u64 {
        self.number
    }
}

impl Ephemeral {
    /// Nobody is there, nobody types. This run gets an id.
    pub fn new(env: &Env) -> Self {
        let mut boot = [0; 4];
        env.fill_random(&mut boot);
        Self(Arc::new(Inner { boot: u32::from_be_bytes(boot), board: Mutex::default() }))
    }

    /// The id of this run of the server.
    pub fn boot(&self) -> u32 {
        self.0.boot
    }

    /// Changes something; `change` gets the number that the change has if it is one, and says whether it is.
    pub fn change<T>(&self, change: impl FnOnce(&mut Board, u64) -> (bool, T)) -> (bool, T) {
        let mut board = self.0.board.lock();
        let next = board.number + 1;
        let (changed, answer) = change(&mut board, next);
        if changed {
            board.number = next;
        }
        (changed, answer)
    }

    /// Changes something that nobody is told of yet.
    pub fn update<T>(&self, update: impl FnOnce(&mut Board) -> T) -> T {
        update(&mut self.0.board.lock())
    }

    /// Reads.
    pub fn read<T>(&self, read: impl FnOnce(&Board) -> T) -> T {
        read(&self.0.board.lock())
    }
}
