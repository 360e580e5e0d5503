//! Jobs are done after a batch for certain: a job is written as a timer in the batch of its cause, and deleted by the batch of
//! its effect. `src/flows/follow_up.rs` carries jobs out.

use bytes::Bytes;
use ruma::{OwnedEventId, OwnedRoomId, OwnedServerName};
use serde::{Deserialize, Serialize};

use crate::{
    ids::{EventNum, RoomNum, UserNum},
    schema::media::Digest,
    store::{
        Fault,
        timer::{Timer, TimerRow},
    },
};

/// A job. To add one: a variant with the next number that no job ever had, its key and content below, and what it does in
/// `flows/follow_up.rs`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Job {
    /// Deletes what no reader of the log needs, a little at a time, for ever.
    TrimLog,
    /// Tells the rooms of a user of a change of the user's: another name, or that the account is gone.
    TellRooms {
        /// The user whose rooms are told.
        user: UserNum,
    },
    /// Carries over what a user has set for a room to the room that replaces it.
    CarryOver {
        /// The user whose settings move.
        user: UserNum,
        /// The number of the new room.
        room: RoomNum,
        /// The ids of the old room and the new one.
        moved: Move,
    },
    /// Forgets what an event said before it was redacted.
    ForgetOriginal {
        /// The room of the event.
        room: RoomNum,
        /// The event that was redacted.
        event: EventNum,
    },
    /// Sweeps what devices of a user left behind that have ended.
    SweepDevices {
        /// The user whose devices have ended.
        user: UserNum,
    },
    /// Forgets which transactions sent what to a room on a day.
    ForgetSent {
        /// The room to which those transactions sent events.
        room: RoomNum,
        /// The day, counted since the epoch.
        day: u32,
    },
    /// Reunites branches of a room that stand apart from its state.
    Reunite {
        /// The room that has such branches.
        room: RoomNum,
    },
    /// Tries the events again that a join left out, because the keys of their servers could not be had.
    TakeLeftOut {
        /// The room that was joined.
        room: RoomNum,
    },
    /// Sweeps a room in which much is kept that nothing needs.
    Sweep {
        /// The room that is swept.
        room: RoomNum,
    },
    /// Sends the events that a user has scheduled, when they are due.
    SendDelayed {
        /// The user who has scheduled them.
        user: UserNum,
    },
    /// Judges sticky events of a room again that were soft-failed, and forgets those that are sticky no more.
    TendSticky {
        /// The room that has such events.
        room: RoomNum,
    },
    /// Fetches the state of a room that was joined without its members.
    CompleteState {
        /// The room of which a part of the state is known.
        room: RoomNum,
    },
    /// Deletes the content of a room's messages whose lifetime is over.
    Expire {
        /// The room of the messages.
        room: RoomNum,
    },
    /// Moves the aliases of a room that was replaced to the room that replaces it, where they are too many for one batch.
    MoveNames {
        /// The room that was replaced.
        from: RoomNum,
        /// The room that replaces it.
        to: RoomNum,
    },
    /// Leaves a room again that a user left while a join of theirs was on its way, once the join comes true.
    LeaveAgain {
        /// The user who has left.
        user: UserNum,
        /// The room, and the joins.
        left: Left,
    },
    /// Finds out what became of a join that was on its way by way of another server when this server ended, and gives it up where it came to
    /// nothing here.
    EndJoin {
        /// The user who was joining.
        user: UserNum,
        /// The room, and the joins.
        left: Left,
    },
    /// Has a user leave a room that was to replace another one, and that nobody named when the work on it ended early.
    AbandonRoom {
        /// The user who made the room.
        user: UserNum,
        /// The room that was made.
        room: RoomNum,
    },
    /// Forgets that others ended an invitation or a knock of a user, which the user was told.
    ForgetEnded {
        /// The room of which the user was told from outside.
        room: RoomNum,
        /// The user who was invited or knocked.
        user: UserNum,
        /// The number of the end in the room.
        number: EventNum,
    },
    /// Removes the object of a blob that nothing refers to.
    TendBlob {
        /// The blob that is tended.
        digest: Digest,
        /// The object is that of this generation.
        generation: u32,
    },
    /// Ends a URI of media to which nobody has uploaded anything.
    EndUnused {
        /// The user who made it.
        user: UserNum,
        /// The media id of the item.
        id: String,
    },
    /// Deletes media that were kept long enough, and what uploads have left that broke off: a little at a time, for ever.
    TendMedia {
        /// The items up to this one were looked at: server and media id. None at the beginning of a round.
        after: Option<(String, String)>,
    },
    /// Deletes all media of a user who was erased.
    ForgetMedia {
        /// The user who was erased.
        user: UserNum,
    },
    /// Forgets a temporary link to media whose time is over.
    EndLink {
        /// The user who made it.
        user: UserNum,
        /// The id of the link.
        id: String,
    },
}

/// The user or the room whose job it is. Those of one owner share places, so that nobody's jobs hold up those of others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Owner {
    /// The server itself, which has as many as it has kinds of work. A job that cannot be read counts for it, too.
    Server,
    /// A user of this server.
    User(UserNum),
    /// A room, and all who act in it.
    Room(RoomNum),
}

impl Owner {
    /// The owner of the job of a timer.
    pub fn of(timer: &Timer) -> Self {
        Job::read(timer).map_or(Self::Server, |job| job.owner())
    }
}

/// The two rooms of a replacement: settings move from one to the other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Move {
    /// The room that was replaced.
    pub from: OwnedRoomId,
    /// The room that replaces it.
    pub to: OwnedRoomId,
}

/// A room that a user is not in, or gave up, while joins of theirs are on their way, which may come true yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Left {
    /// The id of the room, of which this server may know nothing yet.
    pub room: OwnedRoomId,
    /// The ids of those joins.
    pub joins: Vec<OwnedEventId>,
    /// The servers that have taken one of them, or may have. They are asked to take the user out again as long as this server is not in
    /// the room itself.
    #[serde(default)]
    pub servers: Vec<OwnedServerName>,
    /// They are waited for until this time: milliseconds since the epoch.
    pub until_ms: u64,
}

/// How far a round through all media is.
#[derive(Deserialize)]
struct Tended {
    after: Option<(String, String)>,
}

impl Job {
    /// The kind of [`Self::LeaveAgain`], whose jobs are found by their user and room.
    pub const LEAVE_AGAIN: u8 = 14;
    /// The kind of [`Self::EndJoin`], whose jobs begin when the server starts.
    pub const END_JOIN: u8 = 18;
    /// The kind of [`Self::CompleteState`], whose jobs begin again when the server starts.
    pub const COMPLETE_STATE: u8 = 9;
    const TAKE_LEFT_OUT: u8 = 10;
    /// The kind of [`Self::TendMedia`], of which one is set as long as the server runs.
    pub const TEND_MEDIA: u8 = 23;

    /// Whether jobs of a kind wait for other servers, which may take very long.
    pub fn waits_for_others(kind: u8) -> bool {
        matches!(kind, Self::COMPLETE_STATE | Self::TAKE_LEFT_OUT)
    }

    /// Whether this version knows the kind of job that has this number.
    pub fn is_known(kind: u8) -> bool {
        (1..=18).contains(&kind) || (21..=25).contains(&kind)
    }

    /// The number of its kind, for ever.
    pub fn kind(&self) -> u8 {
        match self {
            Self::TrimLog => 1,
            Self::TellRooms { .. } => 2,
            Self::CarryOver { .. } => 3,
            Self::ForgetOriginal { .. } => 4,
            Self::SweepDevices { .. } => 5,
            Self::ForgetSent { .. } => 6,
            Self::Reunite { .. } => 7,
            Self::Sweep { .. } => 8,
            Self::CompleteState { .. } => Self::COMPLETE_STATE,
            Self::TakeLeftOut { .. } => Self::TAKE_LEFT_OUT,
            Self::SendDelayed { .. } => 11,
            Self::TendSticky { .. } => 12,
            Self::Expire { .. } => 13,
            Self::MoveNames { .. } => 16,
            Self::LeaveAgain { .. } => Self::LEAVE_AGAIN,
            Self::ForgetEnded { .. } => 15,
            Self::AbandonRoom { .. } => 17,
            Self::EndJoin { .. } => Self::END_JOIN,
            Self::TendBlob { .. } => 21,
            Self::EndUnused { .. } => 22,
            Self::TendMedia { .. } => Self::TEND_MEDIA,
            Self::ForgetMedia { .. } => 24,
            Self::EndLink { .. } => 25,
        }
    }

    /// The name of its kind, in `/metrics` and in the log.
    pub fn name(&self) -> &'static str {
        match self {
            Self::TrimLog => "trim_log",
            Self::TellRooms { .. } => "tell_rooms",
            Self::CarryOver { .. } => "carry_over",
            Self::ForgetOriginal { .. } => "forget_original",
            Self::SweepDevices { .. } => "sweep_devices",
            Self::ForgetSent { .. } => "forget_sent",
            Self::Reunite { .. } => "reunite",
            Self::Sweep { .. } => "sweep",
            Self::CompleteState { .. } => "complete_state",
            Self::TakeLeftOut { .. } => "take_left_out",
            Self::Expire { .. } => "expire",
            Self::MoveNames { .. } => "move_names",
            Self::SendDelayed { .. } => "send_delayed",
            Self::TendSticky { .. } => "tend_sticky",
            Self::LeaveAgain { .. } => "leave_again",
            Self::ForgetEnded { .. } => "forget_ended",
            Self::AbandonRoom { .. } => "abandon_room",
            Self::EndJoin { .. } => "end_join",
            Self::TendBlob { .. } => "tend_blob",
            Self::EndUnused { .. } => "end_unused",
            Self::TendMedia { .. } => "tend_media",
            Self::ForgetMedia { .. } => "forget_media",
            Self::EndLink { .. } => "end_link",
        }
    }

    /// Says to the operator what stays undone if it is never carried out.
    pub fn undone(&self) -> String {
        match self {
            Self::TrimLog => "entries of the log that no reader needs stay in the store".to_owned(),
            Self::TellRooms { user } => {
                format!("rooms of user {user} show an old name or an account that has ended")
            }
            Self::CarryOver { user, moved, .. } => format!(
                "settings of user {user} for the room {} are not carried over to {}, which replaces it",
                moved.from, moved.to
            ),
            Self::ForgetOriginal { room, event } => {
                format!("the original of the redacted event {event} in room {room} stays in the store")
            }
            Self::SweepDevices { user } => {
                format!("rows of devices of user {user} that have ended stay in the store")
            }
            Self::ForgetSent { room, day } => {
                format!("transaction ids of day {day} in room {room} stay in the store")
            }
            Self::Reunite { room } => {
                format!(
                    "branches of room {room} stand apart from its state until the next event of such a branch"
                )
            }
            Self::TakeLeftOut { room } => {
                format!("the state of room {room} lacks events that could not be checked when it was joined")
            }
            Self::SendDelayed { user } => {
                format!("events that user {user} has scheduled wait until the user schedules another one")
            }
            Self::TendSticky { room } => {
                format!("rows of sticky events stay in room {room} until its next such event")
            }
            Self::Sweep { room } => {
                format!("events, states and keys that nothing needs stay in room {room} until its next event")
            }
            Self::CompleteState { room } => format!("of the state of room {room} only a part is known"),
            Self::ForgetEnded { room, user, .. } => {
                format!("it stays in the store that user {user} was invited to room {room}")
            }
            Self::AbandonRoom { user, room } => {
                format!("user {user} stays in room {room}, which was to replace another one and does not")
            }
            Self::LeaveAgain { user, left } => {
                format!("user {user} stays in the room {} if a join comes true that they gave up", left.room)
            }
            Self::EndJoin { user, left } => {
                format!(
                    "others may see user {user} in the room {}, which the user did not come into",
                    left.room
                )
            }
            Self::Expire { room } => {
                format!("messages of room {room} whose lifetime is over stay in the store, and are shown")
            }
            Self::MoveNames { from, to } => {
                format!("aliases of room {from} still name it and not room {to}, which replaces it")
            }
            Self::TendBlob { digest, .. } => {
                format!("the object {digest} of the media directory stays there, though nothing needs it")
            }
            Self::EndUnused { user, id } => {
                format!("the media id {id} of user {user} waits for an upload for ever")
            }
            Self::TendMedia { .. } => "media stay that were kept long enough".to_owned(),
            Self::ForgetMedia { user } => format!("files of user {user}, who was erased, stay"),
            Self::EndLink { user, id } => {
                format!("the link {id} of user {user}, whose time is over, stays in the store")
            }
        }
    }

    /// The user or the room whose job it is.
    fn owner(&self) -> Owner {
        match self {
            Self::TrimLog | Self::TendBlob { .. } | Self::TendMedia { .. } => Owner::Server,
            Self::EndUnused { user, .. }
            | Self::EndLink { user, .. }
            | Self::ForgetMedia { user }
            | Self::TellRooms { user }
            | Self::CarryOver { user, .. }
            | Self::SweepDevices { user }
            | Self::SendDelayed { user }
            | Self::AbandonRoom { user, .. }
            | Self::EndJoin { user, .. }
            | Self::LeaveAgain { user, .. } => Owner::User(*user),
            Self::ForgetOriginal { room, .. }
            | Self::ForgetSent { room, .. }
            | Self::Reunite { room }
            | Self::TakeLeftOut { room }
            | Self::Sweep { room }
            | Self::TendSticky { room }
            | Self::CompleteState { room }
            | Self::ForgetEnded { room, .. }
            | Self::Expire { room }
            | Self::MoveNames { from: room, .. } => Owner::Room(*room),
        }
    }

    /// Whether it is never given up: it sets its own timer again for ever, a room is of little use without it, or its user counts on
    /// what is left of it.
    pub fn recurs(&self) -> bool {
        match self {
            Self::TrimLog
            | Self::CompleteState { .. }
            | Self::SendDelayed { .. }
            | Self::TendBlob { .. }
            | Self::TendMedia { .. }
            | Self::ForgetMedia { .. }
            | Self::Expire { .. } => true,
            Self::EndUnused { .. }
            | Self::EndLink { .. }
            | Self::TellRooms { .. }
            | Self::CarryOver { .. }
            | Self::ForgetOriginal { .. }
            | Self::SweepDevices { .. }
            | Self::ForgetSent { .. }
            | Self::Reunite { .. }
            | Self::Sweep { .. }
            | Self::TendSticky { .. }
            | Self::MoveNames { .. }
            | Self::TakeLeftOut { .. }
            | Self::AbandonRoom { .. }
            | Self::ForgetEnded { .. }
            | Self::EndJoin { .. }
            | Self::LeaveAgain { .. } => false,
        }
    }

    /// The timer that carries it out at this time, in milliseconds since the epoch.
    pub fn timer(&self, due_ms: u64) -> Timer {
        let (key, content) = match self {
            Self::TrimLog => (Vec::new(), Bytes::new()),
            Self::TellRooms { user }
            | Self::SweepDevices { user }
            | Self::ForgetMedia { user }
            | Self::SendDelayed { user } => (user.0.to_be_bytes().to_vec(), Bytes::new()),
            Self::CarryOver { user, room, moved } => {
                let content = serde_json::json!({ "from": moved.from, "to": moved.to }).to_string();
                (two(user.0, room.0), content.into())
            }
            Self::LeaveAgain { user, left } | Self::EndJoin { user, left } => {
                let content = serde_json::json!({ "room": left.room, "joins": left.joins, "servers": left.servers, "until_ms": left.until_ms });
                let key = [user.0.to_be_bytes().as_slice(), left.room.as_bytes()].concat();
                (key, content.to_string().into())
            }
            Self::TendBlob { digest, generation } => {
                ([digest.0.as_slice(), &generation.to_be_bytes()].concat(), Bytes::new())
            }
            Self::EndUnused { user, id } | Self::EndLink { user, id } => {
                ([user.0.to_be_bytes().as_slice(), id.as_bytes()].concat(), Bytes::new())
            }
            Self::TendMedia { after } => {
                (Vec::new(), serde_json::json!({ "after": after }).to_string().into())
            }
            Self::ForgetEnded { room, user, number } => {
                ([two(room.0, user.0), number.0.to_be_bytes().to_vec()].concat(), Bytes::new())
            }
            Self::ForgetOriginal { room, event } => (two(room.0, event.0), Bytes::new()),
            Self::ForgetSent { room, day } => (two(room.0, u64::from(*day)), Bytes::new()),
            Self::MoveNames { from, to } => (two(from.0, to.0), Bytes::new()),
            Self::AbandonRoom { user, room } => (two(user.0, room.0), Bytes::new()),
            Self::Reunite { room }
            | Self::Sweep { room }
            | Self::CompleteState { room }
            | Self::Expire { room }
            | Self::TendSticky { room }
            | Self::TakeLeftOut { room } => (room.0.to_be_bytes().to_vec(), Bytes::new()),
        };
        Timer { due_ms, kind: self.kind(), key, row: TimerRow { tries: 0, content } }
    }

    /// The job of a timer. Errors: [`Fault::Corrupt`], also for a kind that this version does not know.
    pub fn read(timer: &Timer) -> Result<Self, Fault> {
        let number = |at: usize| {
            let bytes = timer.key.get(at..at + 8).and_then(|bytes| <[u8; 8]>::try_from(bytes).ok());
            bytes.map(u64::from_be_bytes).ok_or(Fault::Corrupt("the key of a job ends early"))
        };
        match timer.kind {
            1 => Ok(Self::TrimLog),
            2 => Ok(Self::TellRooms { user: UserNum(number(0)?) }),
            3 => {
                let moved = serde_json::from_slice(&timer.row.content);
                let moved = moved.map_err(|_| Fault::Corrupt("a job does not name two rooms"))?;
                Ok(Self::CarryOver { user: UserNum(number(0)?), room: RoomNum(number(8)?), moved })
            }
            4 => Ok(Self::ForgetOriginal { room: RoomNum(number(0)?), event: EventNum(number(8)?) }),
            5 => Ok(Self::SweepDevices { user: UserNum(number(0)?) }),
            6 => {
                let day = u32::try_from(number(8)?)
                    .map_err(|_| Fault::Corrupt("a day in the key of a job is too large"))?;
                Ok(Self::ForgetSent { room: RoomNum(number(0)?), day })
            }
            7 => Ok(Self::Reunite { room: RoomNum(number(0)?) }),
            8 => Ok(Self::Sweep { room: RoomNum(number(0)?) }),
            9 => Ok(Self::CompleteState { room: RoomNum(number(0)?) }),
            10 => Ok(Self::TakeLeftOut { room: RoomNum(number(0)?) }),
            11 => Ok(Self::SendDelayed { user: UserNum(number(0)?) }),
            12 => Ok(Self::TendSticky { room: RoomNum(number(0)?) }),
            13 => Ok(Self::Expire { room: RoomNum(number(0)?) }),
            16 => Ok(Self::MoveNames { from: RoomNum(number(0)?), to: RoomNum(number(8)?) }),
            14 => {
                let left = serde_json::from_slice(&timer.row.content);
                let left = left.map_err(|_| Fault::Corrupt("a job does not name a room that was left"))?;
                Ok(Self::LeaveAgain { user: UserNum(number(0)?), left })
            }
            15 => Ok(Self::ForgetEnded {
                room: RoomNum(number(0)?),
                user: UserNum(number(8)?),
                number: EventNum(number(16)?),
            }),
            18 => {
                let left = serde_json::from_slice(&timer.row.content);
                let left = left.map_err(|_| Fault::Corrupt("a job does not name a room that was joined"))?;
                Ok(Self::EndJoin { user: UserNum(number(0)?), left })
            }
            17 => Ok(Self::AbandonRoom { user: UserNum(number(0)?), room: RoomNum(number(8)?) }),
            21 => {
                let parts = timer.key.split_first_chunk::<32>();
                let parts = parts.and_then(|(digest, rest)| Some((*digest, rest.try_into().ok()?)));
                let (digest, generation) = parts.ok_or(Fault::Corrupt("a job does not name a blob"))?;
                Ok(Self::TendBlob { digest: Digest(digest), generation: u32::from_be_bytes(generation) })
            }
            22 => {
                let id = timer.key.get(8..).and_then(|id| String::from_utf8(id.to_vec()).ok());
                let id = id.ok_or(Fault::Corrupt("a job does not name an item of media"))?;
                Ok(Self::EndUnused { user: UserNum(number(0)?), id })
            }
            23 => {
                let progress = serde_json::from_slice::<Tended>(&timer.row.content);
                let progress = progress.map_err(|_| Fault::Corrupt("a job does not say how far it is"))?;
                Ok(Self::TendMedia { after: progress.after })
            }
            24 => Ok(Self::ForgetMedia { user: UserNum(number(0)?) }),
            25 => {
                let id = timer.key.get(8..).and_then(|id| String::from_utf8(id.to_vec()).ok());
                let id = id.ok_or(Fault::Corrupt("a job does not name a link"))?;
                Ok(Self::EndLink { user: UserNum(number(0)?), id })
            }
            _ => Err(Fault::Corrupt("a job is of an unknown kind")),
        }
    }
}

fn two(a: u64, b: u64) -> Vec<u8> {
    [a.to_be_bytes(), b.to_be_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_are_read_back_from_their_timers() {
        let moved = Move { from: "!old:s".try_into().unwrap(), to: "!new:s".try_into().unwrap() };
        let (room, joins) = ("!new:s".try_into().unwrap(), vec!["$join".try_into().unwrap()]);
        let left =
            Left { room, joins, servers: vec!["x.example".try_into().unwrap()], until_ms: 1_767_225_600_000 };
        let jobs = [
            Job::TrimLog,
            Job::TellRooms { user: UserNum(7) },
            Job::CarryOver { user: UserNum(7), room: RoomNum(9), moved },
            Job::ForgetOriginal { room: RoomNum(9), event: EventNum(1) },
            Job::SweepDevices { user: UserNum(7) },
            Job::ForgetSent { room: RoomNum(9), day: 20_000 },
            Job::Reunite { room: RoomNum(9) },
            Job::Sweep { room: RoomNum(9) },
            Job::CompleteState { room: RoomNum(9) },
            Job::TakeLeftOut { room: RoomNum(9) },
            Job::Expire { room: RoomNum(9) },
            Job::SendDelayed { user: UserNum(7) },
            Job::TendSticky { room: RoomNum(9) },
            Job::MoveNames { from: RoomNum(9), to: RoomNum(11) },
            Job::LeaveAgain { user: UserNum(7), left: left.clone() },
            Job::EndJoin { user: UserNum(7), left },
            Job::ForgetEnded { room: RoomNum(9), user: UserNum(7), number: EventNum(1) },
            Job::AbandonRoom { user: UserNum(7), room: RoomNum(9) },
            Job::TendBlob { digest: Digest([7; 32]), generation: 9 },
            Job::EndUnused { user: UserNum(7), id: "an_id".to_owned() },
            Job::ForgetMedia { user: UserNum(7) },
            Job::EndLink { user: UserNum(7), id: "an_id".to_owned() },
            Job::TendMedia { after: None },
            Job::TendMedia { after: Some(("other.example".to_owned(), "an_id".to_owned())) },
        ];
        let mut kinds = Vec::new();
        for job in jobs {
            assert_eq!(Job::read(&job.timer(5)).unwrap(), job);
            kinds.push(job.kind());
        }
        for kind in 0..=u8::MAX {
            assert_eq!(Job::is_known(kind), kinds.contains(&kind), "kind {kind}");
        }
        // Earlier versions wrote the job like this.
        let content = Bytes::from_static(br#"{"user":7,"from":"!old:s","to":"!new:s"}"#);
        let old = Timer { due_ms: 1, kind: 3, key: two(7, 9), row: TimerRow { tries: 0, content } };
        assert!(matches!(Job::read(&old).unwrap(), Job::CarryOver { user: UserNum(7), .. }));
        let torn = Timer { key: vec![1], ..old };
        assert!(Job::read(&torn).is_err());
    }
}
