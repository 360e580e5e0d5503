//! The request of a client to `/sync`, checked and ready for use.

use ruma::api::client::filter::FilterDefinition;

use crate::{
    accounts::Caller,
    error::Refusal,
    sync::{
        SyncToken,
        filter::{Filter, Relations},
    },
};

/// A client's request to `/sync`.
#[derive(Clone, Debug)]
pub struct Ask {
    /// The user who asks, and the device they ask with.
    pub caller: Caller,
    /// Where the client stands: its token, settled ([`Polls::settle`](crate::sync::Polls::settle)). None if it begins.
    pub since: Option<SyncToken>,
    /// The filter says which news the client wants.
    pub(crate) filter: Filter,
    /// The client wants the whole state of each room, whether it changed or not.
    pub full_state: bool,
    /// The client wants the state as it is after the timeline (MSC4222).
    pub use_state_after: bool,
    /// The client asked for that by the name of before version 1.16, and looks for it under that name.
    pub is_unstable_state_after: bool,
}

impl Ask {
    /// Makes a request for what this filter lets through. Refuses a filter that costs too much: 400 `M_INVALID_PARAM`.
    pub fn new(caller: Caller, since: Option<SyncToken>, filter: &FilterDefinition) -> Result<Self, Refusal> {
        let filter = Filter::new(filter)?;
        Ok(Self {
            caller,
            since,
            filter,
            full_state: false,
            use_state_after: false,
            is_unstable_state_after: false,
        })
    }

    /// Takes what the filter says of relations. Refuses what costs too much: 400 `M_INVALID_PARAM`.
    pub fn relate(&mut self, relations: Relations) -> Result<(), Refusal> {
        self.filter.relate(relations)
    }
}
