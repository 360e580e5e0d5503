//! The states around an event: that before it, that after it, and those of the forks that it merges. Whom an event concerns follows
//! from them: a server that had somebody in one of these states has to do with the event.

use crate::{
    ids::RoomNum,
    rooms::{
        event::{self, StoredEvent},
        members, state,
    },
    schema::state::StateRef,
    store::{Fault, Read},
};

/// The states around an event that is part of its room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Around {
    /// The state before the event.
    pub before: StateRef,
    /// The state after the event, as it is without what others say at the same time.
    pub after: StateRef,
    /// The states after the events that this one cites, where they are others than the state before it: those of forks that it
    /// merges. Whoever is in the room by a fork, and not by what the forks resolve to, learns that by this event alone.
    pub forks: Vec<StateRef>,
}

impl Around {
    /// The states around an event of the timeline.
    pub fn of(read: &(impl Read + ?Sized), room: RoomNum, stored: &StoredEvent) -> Result<Self, Fault> {
        let (before, after) = states(read, room, stored)?;
        let prev = &stored.row.header.prev;
        let mut forks = Vec::new();
        if prev.len() > 1 {
            let base = state::canonical(read, room, before)?;
            for cited in prev {
                let Some(cited) = event::find(read, room, *cited)? else { continue };
                let fork = state::canonical(read, room, states(read, room, &cited)?.1)?;
                if fork != base && !forks.contains(&fork) {
                    forks.push(fork);
                }
            }
        }
        Ok(Self { before, after, forks })
    }

    /// Whether a server has somebody in the room in one of these states.
    pub fn has_server(
        &self,
        read: &(impl Read + ?Sized),
        room: RoomNum,
        server: &str,
    ) -> Result<bool, Fault> {
        if members::was_server_joined(read, room, self.before, server)? {
            return Ok(true);
        }
        let others = self.forks.iter().chain(Some(&self.after).filter(|after| **after != self.before));
        for other in others {
            if members::was_server_joined(read, room, *other, server)? {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// The states before and after an event.
fn states(
    read: &(impl Read + ?Sized),
    room: RoomNum,
    stored: &StoredEvent,
) -> Result<(StateRef, StateRef), Fault> {
    let header = &stored.row.header;
    let before = match header.before {
        Some(before) => before,
        None => state::just_below(read, room, stored.order)?,
    };
    let after = match header.after {
        Some(after) => after,
        None if header.state_key.is_none() => before,
        None => StateRef::Main(stored.order),
    };
    Ok((before, after))
}
