//! State events of which only the redacted form came. Any server can take the content away of an event that it passes on, and the
//! signatures of what is left still fit: a list of servers that admits nobody, a room without a name or without encryption. So others are
//! asked before such an event counts, its sender's server first. Where nobody has more, it counts as it came, as the specification
//! says ("Checks performed on receipt of a PDU"), until it comes whole.

use std::time::Duration;

use ruma::{OwnedServerName, api::federation::event::get_event};

use super::Fetch;
use crate::{
    error::Result,
    flows::remote::verify::Ask,
    rooms::change::Received,
    schema::event_types::{CREATE, HISTORY_VISIBILITY, JOIN_RULES, MEMBER, POWER_LEVELS},
};

/// Ask others for at most this many events whose content one server did not give.
const ASKED_MAX: usize = 10;
/// Ask at most this many servers for one of them.
const SERVERS_MAX: usize = 3;
/// An answer with the whole of an event takes at most this long.
const TAKES_MAX: Duration = Duration::from_secs(5);
/// The types of which redaction leaves what a room goes by.
const KEPT: [&str; 5] = [CREATE, MEMBER, POWER_LEVELS, JOIN_RULES, HISTORY_VISIBILITY];

impl Fetch<'_> {
    /// Asks for the contents of those of these state events that came without them, and puts the whole events in their places.
    pub(super) async fn bring_contents(&mut self, received: &mut [Received]) -> Result<()> {
        for event in received.iter_mut().filter(|event| lacks_content(event)) {
            if self.asked_whole >= ASKED_MAX {
                break;
            }
            self.asked_whole += 1;
            if let Some(whole) = self.ask_for_whole(event).await? {
                *event = whole;
            }
        }
        Ok(())
    }

    async fn ask_for_whole(&mut self, event: &Received) -> Result<Option<Received>> {
        let own: OwnedServerName = event.event().sender.server_name().to_owned();
        let us = self.app.config.server.name.clone();
        let others = self.servers.iter().filter(|server| **server != own).cloned();
        let servers: Vec<_> =
            std::iter::once(own.clone()).chain(others).filter(|server| *server != us).collect();
        for server in servers.into_iter().take(SERVERS_MAX) {
            let Some(left) = self.budget.take(self.app) else { break };
            let left = left.min(TAKES_MAX);
            let request = get_event::v1::Request::new(event.id().to_owned());
            match self.app.remote.client.send(&server, request, Self::options(left)).await {
                Ok(answer) => {
                    let came = self.check_by(vec![answer.pdu], Ask::Servers).await?;
                    let whole = came.into_iter().find(|came| came.id() == event.id() && !came.is_cut());
                    if whole.is_some() {
                        return Ok(whole);
                    }
                }
                Err(failure) => self.note(&server, "the content of an event", &failure),
            }
        }
        Ok(None)
    }
}

/// Whether an event is state whose content counts, and came without it.
fn lacks_content(event: &Received) -> bool {
    let parsed = event.event();
    event.is_cut() && parsed.state_key.is_some() && !KEPT.contains(&parsed.event_type.to_string().as_str())
}
