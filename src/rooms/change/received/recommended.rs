//! Whether the policy server of the room recommends an event (server-server API, "Validating Policy Server signatures").

use super::{super::Change, Received, Standpoint};
use crate::{
    error::Result,
    rooms::{
        admit::Why,
        event, members,
        policy_server::{self, PolicyServer},
        state::{self, Sketch},
    },
    schema::{
        event_types::{MEMBER, POLICY},
        rooms::Membership,
    },
};

/// The word of the room's policy server on an event.
pub(super) enum Recommendation {
    /// It recommends the event, or there is nobody to ask.
    For,
    /// It does not recommend the event.
    Against(Why),
    /// It is still to be asked.
    Unasked(PolicyServer),
}

impl Change {
    /// Gives the word of the room's policy server on an event that the rules allow. `now` is the room's state, with what is known
    /// of events that are missing before this one; none where the room was joined without its members.
    pub(super) fn recommendation(
        &mut self,
        received: &Received,
        standpoint: &Standpoint,
        now: Option<&Sketch>,
    ) -> Result<Recommendation> {
        let event = received.event();
        let event_type = event.event_type.to_string();
        if !policy_server::needs_signature(&event_type, event.state_key.as_deref()) {
            return Ok(Recommendation::For);
        }
        let server = match now.filter(|_| !standpoint.missing.is_empty()) {
            Some(now) => self.policy_server_at(now)?,
            None => self.policy_server()?,
        };
        let Some(server) = server else { return Ok(Recommendation::For) };
        if server.has_signed(received.json(), self.rules()) {
            return Ok(Recommendation::For);
        }
        Ok(match received.opposed(&server) {
            Some(why) => Recommendation::Against(why.clone()),
            None if !server.has_key() => Recommendation::Against(
                "`m.room.policy` names no key by which its server could have signed the event".to_owned(),
            ),
            None => Recommendation::Unasked(server),
        })
    }

    /// Finds the policy server of a state that is not the room's yet: the room has missed events, and may have got another policy
    /// server by them.
    fn policy_server_at(&mut self, at: &Sketch) -> Result<Option<PolicyServer>> {
        let Some(key) = state::find_key(&self.batch, self.num, POLICY, "")? else { return Ok(None) };
        let Some(named) = at.at(&self.batch, self.num, key)?.event() else { return Ok(None) };
        let named = event::require(&self.batch, self.num, named)?;
        let Some(server) = PolicyServer::of_content(named.row.content()) else { return Ok(None) };
        let name = server.name().as_str();
        if members::is_server_joined(&self.batch, self.num, name)? {
            return Ok(Some(server));
        }
        // Nobody of the server was here when the room was followed last; somebody may have come since.
        let changed = at.changes.iter().map(|(key, _)| *key);
        let names = state::list_key_names(&self.batch, self.num, changed)?;
        for ((_, val), key_name) in at.changes.iter().zip(names) {
            let is_of_server = key_name.is_some_and(|(event_type, user)| {
                event_type == MEMBER && event::server_of(&user) == Some(name)
            });
            if is_of_server
                && let Some(member) = val.event()
                && event::require(&self.batch, self.num, member)?.membership() == Some(Membership::Join)
            {
                return Ok(Some(server));
            }
        }
        Ok(None)
    }
}
