//! Templates of events that a user of another server may add to the room, which that server completes and signs.

use ruma::{MilliSecondsSinceUnixEpoch, ServerName, UInt};

use super::Change;
use crate::{
    error::{Error, Refusal, Result},
    json::{JsonText, Object},
    rooms::{
        admit::{self, Verdict},
        build::Draft,
        event::{self, Event},
        reference, require_in,
    },
};

impl Change {
    /// Gives the template of an event on the room's heads, without hashes and signatures. `server` is this one. Refuses an event
    /// that the rules of the room would forbid: 403 `M_FORBIDDEN`.
    pub fn template(&mut self, draft: &Draft, server: &ServerName) -> Result<JsonText> {
        require_in(self.row.resident)?;
        let (before, auth) = self.list_allowing(draft)?;
        let (prev, depth) = (self.list_heads(), self.next_depth());
        let cited = self.row.heads.iter().map(|head| head.event).chain(auth.iter().map(|event| event.event));
        let hashes = reference::list(&self.batch, self.num, &self.row, cited)?;
        let content = draft.raw_content()?;
        let proto = Event {
            // The id is the sender's server's to choose, or follows from fields that only that one fills in. The rules look at
            // the ids of redactions alone.
            id: event::event_id(&[u8::MAX; 32].into(), self.row.version),
            room_id: Some(self.row.id.clone()),
            sender: draft.sender.clone(),
            sent: MilliSecondsSinceUnixEpoch(UInt::new_saturating(draft.sent_ms)),
            event_type: draft.event_type.as_str().into(),
            content,
            state_key: draft.state_key.clone(),
            prev,
            auth: auth.iter().map(|event| event.parsed.id.clone()).collect(),
            redacts: None,
            rejected: false,
        };
        match admit::admit_own(&proto, &self.rules.authorization, &before) {
            Verdict::Accept => {}
            Verdict::Reject(why) | Verdict::SoftFail(why) => {
                return Err(Refusal::forbidden(format!("The room does not allow this: {why}.")).into());
            }
            Verdict::Need { .. } | Verdict::Unknown => {
                return Err(Refusal::forbidden("The room does not allow this.").into());
            }
        }
        let mut template = Object::with_capacity(proto.content.get().len() + 1_024);
        let cited = |ids| {
            reference::cited(ids, self.row.version, &hashes)
                .ok_or_else(|| Error::broken("the hash of an event that is cited is not known"))
        };
        template.json("auth_events", &cited(&proto.auth)?);
        template.json("content", &*proto.content);
        template.number("depth", depth);
        template.text("origin", server.as_str());
        template.number("origin_server_ts", draft.sent_ms);
        template.json("prev_events", &cited(&proto.prev)?);
        template.text("room_id", self.row.id.as_str());
        template.text("sender", draft.sender.as_str());
        if let Some(state_key) = &draft.state_key {
            template.text("state_key", state_key);
        }
        template.text("type", &draft.event_type);
        Ok(template.finish())
    }
}
