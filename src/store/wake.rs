//! Says whom a batch wakes when it is published. It is data in the batch, so that every node that publishes the batch can
//! wake its own.

use std::sync::Arc;

use crate::ids::{RoomNum, UserNum};

/// One thing to do when a batch is published. It says what happened, and each part of the server knows what follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wake {
    /// Something is new for the polls of these users; their numbers rise.
    Users(Arc<[UserNum]>),
    /// Something is new for the polls of those who share a room with this user: devices or keys changed. Who they are is
    /// found when the batch is published, from those who wait then.
    Sharing {
        /// The user whose devices or keys changed.
        user: UserNum,
    },
    /// Something is new for the polls of those who are joined to one of these rooms: devices or keys of a user of another server
    /// changed, who is in them.
    InRooms {
        /// The rooms whose members are told.
        rooms: Arc<[RoomNum]>,
    },
    /// A user of this server came into a room: its members may be shown how present the user is.
    Joined {
        /// The room that was joined.
        room: RoomNum,
        /// The user who joined it.
        user: UserNum,
    },
    /// A user is no longer in a room: nobody is shown that they type there.
    Left {
        /// The room that was left.
        room: RoomNum,
        /// The user, who may be of another server.
        user_id: String,
    },
    /// A room came into the public directory, left it, or has another place in it.
    Listed {
        /// The room whose entry has changed.
        room: RoomNum,
    },
    /// Devices of a user ended: nobody is shown that the user types on them, and their sockets and
    /// polls end.
    Ended {
        /// The user whose devices ended.
        user: UserNum,
        /// The id of that user.
        user_id: String,
    },
    /// An account was locked: its sockets and polls end.
    Locked {
        /// The user whose account was locked.
        user: UserNum,
    },
    /// A timer was set, so the worker of timers looks anew. The store does this itself.
    Timers,
}

impl Wake {
    /// Wakes the polls of these users, in any order and however often they are named.
    pub fn users(mut users: Vec<UserNum>) -> Self {
        users.sort_unstable();
        users.dedup();
        Self::Users(users.into())
    }
}
