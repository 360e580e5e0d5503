//! Events of our own users in rooms that use a policy server, which must sign them before they are part of the room (server-server
//! API, "Asking for a Policy Server signature on an event").
//!
//! A change waits for nobody, so that it only says which event lacks the signature and comes to nothing. The flow asks for the
//! signature outside the room's turn and makes the change again with the event as it was signed. Meanwhile the room may have got
//! other events. Then the signed event does not stand on the newest ones, as if it came from another server, and is placed by the
//! same rules. So a busy room needs no second signature, and nobody waits for a policy server but those whose events it signs.
//!
//! A user who leaves needs nobody's consent: where the policy server does not sign that, it is sent without, and others soft-fail it.

use std::{sync::Arc, time::Duration};

use ruma::{EventId, room_version_rules::RoomVersionRules};

use super::{
    Change,
    received::{Outcome, Received, Step},
};
use crate::{
    error::{Error, Refusal, Result},
    ids::EventNum,
    rooms::{
        build::{Built, Draft, Signer},
        event::{self, StoredEvent},
        members,
        policy_server::{self, PolicyServer},
        resolve::Resolver,
    },
    schema::{
        self,
        event_types::POLICY,
        rooms::{Place, SentBy},
    },
    store::Fault,
};

/// A change whose flow does not ask for signatures is told to come back after this time.
const AGAIN: Duration = Duration::from_secs(5);

/// An event of one of our users that lacks the signature of the room's policy server.
#[derive(Clone, Debug)]
pub struct Unsigned {
    /// The policy server that is to sign it.
    pub(crate) server: PolicyServer,
    /// The rules of the room's version.
    pub(crate) rules: &'static RoomVersionRules,
    /// The draft that the event was built from.
    draft: Draft,
    /// The event, with our signature.
    pub(crate) event: Received,
}

impl Unsigned {
    /// The event with the signature of the policy server.
    pub(crate) fn with(self, event: Received) -> Countersigned {
        Countersigned { draft: self.draft, event }
    }

    /// The event as it is, if it may be sent though the policy server did not sign it.
    pub(crate) fn without(self) -> Option<Countersigned> {
        self.draft.ends_own_part().then_some(Countersigned { draft: self.draft, event: self.event })
    }
}

/// An event of one of our users that was built before the change that adds it, with the signature of a policy server where it needs
/// that.
#[derive(Clone, Debug)]
pub struct Countersigned {
    draft: Draft,
    event: Received,
}

impl Countersigned {
    /// The id that the event has once it is added.
    pub(crate) fn id(&self) -> &EventId {
        self.event.id()
    }

    /// The event with all its signatures.
    pub(crate) fn into_event(self) -> Received {
        self.event
    }
}

/// The signatures of policy servers for the events of a change.
#[derive(Default)]
pub(super) struct Signatures {
    /// The events that were built before, and that the change may add.
    given: Vec<Countersigned>,
    resolver: Option<Arc<Resolver>>,
    /// The first event that lacks the signature.
    lacking: Option<Unsigned>,
    /// Whether the room begins with this change, so that nobody is in it who could ask for signatures.
    pub(super) is_new_room: bool,
}

impl Change {
    /// Finds the policy server of the room as this change leaves it.
    pub(crate) fn policy_server(&mut self) -> Result<Option<PolicyServer>, Fault> {
        let Some(named) = self.state(POLICY, "")? else { return Ok(None) };
        let Some(server) = PolicyServer::of_content(named.parsed.content.get()) else { return Ok(None) };
        // A server that has nobody in the room has not agreed to be asked.
        let is_joined = members::is_server_joined(&self.batch, self.num, server.name().as_str())?;
        Ok(is_joined.then_some(server))
    }

    /// Gives the change events that were built before, and what places them where the room went on meanwhile.
    pub(crate) fn bring_signed(&mut self, given: Vec<Countersigned>, resolver: Arc<Resolver>) {
        self.signatures.given = given;
        self.signatures.resolver = Some(resolver);
    }

    /// Takes the event for which the change came to nothing, because it lacks a signature.
    pub(crate) fn take_unsigned(&mut self) -> Option<Unsigned> {
        self.signatures.lacking.take()
    }

    /// Finds the policy server that must sign an event before it is added.
    pub(super) fn signing_server(&mut self, draft: &Draft) -> Result<Option<PolicyServer>, Fault> {
        // All of a new room becomes visible at once, and other servers get it as the past of the room.
        if self.signatures.is_new_room
            || !policy_server::needs_signature(&draft.event_type, draft.state_key.as_deref())
        {
            return Ok(None);
        }
        self.policy_server()
    }

    /// Adds an event that this policy server must sign, if the change was given it with the signature. Otherwise says which event
    /// lacks it, as [`Error::Busy`].
    pub(super) fn add_signed(
        &mut self,
        server: PolicyServer,
        signer: &Signer,
        draft: &Draft,
        sent_by: Option<SentBy>,
    ) -> Result<StoredEvent> {
        if !server.has_key() && draft.ends_own_part() {
            let (built, auth) = self.build(signer, draft)?;
            return self.write(draft, built, &auth, sent_by);
        }
        require_key(&server)?;
        while let Some(given) = self.take_given(draft) {
            // The room may have got another policy server, or another key for it, while this one was asked.
            if !server.has_signed(given.event.json(), self.rules()) && !draft.ends_own_part() {
                continue;
            }
            if let Some(stored) = self.add_given(signer, given, sent_by.clone(), draft.sent_ms)? {
                return Ok(stored);
            }
        }
        let built = self.build_only(signer, draft)?;
        self.signatures.lacking = Some(self.unsigned(server, draft, &built)?);
        Err(Error::Busy { retry_after: AGAIN })
    }

    /// Takes an event that the change was given and that says the same as a draft.
    pub(super) fn take_given(&mut self, draft: &Draft) -> Option<Countersigned> {
        let at = self.signatures.given.iter().position(|given| given.draft.says_same(draft))?;
        Some(self.signatures.given.remove(at))
    }

    /// Adds an event that was built before this change. `None` where it takes long to find out what the room was when it was built.
    pub(super) fn add_given(
        &mut self,
        signer: &Signer,
        given: Countersigned,
        sent_by: Option<SentBy>,
        now_ms: u64,
    ) -> Result<Option<StoredEvent>> {
        let Countersigned { draft, event } = given;
        let (built, auth) = self.build(signer, &draft)?;
        if built.hash == event.hash() {
            let built = Built { json: event.json().clone(), ..built };
            return self.write(&draft, built, &auth, sent_by).map(Some);
        }
        // The room has got other events meanwhile.
        self.place(event.sent_by(sent_by), now_ms)
    }

    /// Builds an event that a later change is to add, has it judged by the rules of the room, and writes nothing. Says
    /// whether the room's policy server must sign it first.
    pub(in crate::rooms) fn build_ahead(
        &mut self,
        signer: &Signer,
        draft: &Draft,
    ) -> Result<(Countersigned, Option<Unsigned>)> {
        let built = self.build_only(signer, draft)?;
        let unsigned = self.lacking(draft, &built)?;
        let event = Received::check(self.num, &self.row, built.hash, built.json)?;
        Ok((Countersigned { draft: draft.clone(), event }, unsigned))
    }

    /// Says which signature an event lacks that this change has built and does not add.
    pub(in crate::rooms) fn lacking(&mut self, draft: &Draft, built: &Built) -> Result<Option<Unsigned>> {
        let Some(server) = self.signing_server(draft)? else { return Ok(None) };
        require_key(&server)?;
        self.unsigned(server, draft, built).map(Some)
    }

    fn unsigned(&self, server: PolicyServer, draft: &Draft, built: &Built) -> Result<Unsigned> {
        let event = Received::check(self.num, &self.row, built.hash, built.json.clone())?;
        Ok(Unsigned { server, rules: self.rules(), draft: draft.clone(), event })
    }

    /// Places a signed event where it was built. `None` where it takes long to find out the state there: it is built anew then.
    fn place(&mut self, event: Received, now_ms: u64) -> Result<Option<StoredEvent>> {
        let Some(resolver) = self.signatures.resolver.clone() else { return Ok(None) };
        match self.receive(&event, None, &*resolver, now_ms)? {
            Step::Done(Outcome::Accepted(stored)) => Ok(Some(*stored)),
            Step::Done(Outcome::Aside(_, why)) => {
                Err(Refusal::forbidden(format!("The room does not allow this any more: {why}.")).into())
            }
            // The policy server has the whole event, and may have sent it around before we did.
            Step::Done(Outcome::Known(known)) => self.known(known, event.sender_device()).map(Some),
            Step::Done(Outcome::Outlier(_) | Outcome::Need { .. } | Outcome::Unknown | Outcome::Held)
            | Step::Resolve(..)
            | Step::EndTurn(_)
            | Step::Unsigned(..) => Ok(None),
        }
    }
}

impl Change {
    /// Gives an event of our own that came back from elsewhere before it was placed here.
    fn known(&mut self, known: EventNum, sent_by: Option<SentBy>) -> Result<StoredEvent> {
        let mut stored = event::require(&self.batch, self.num, known)?;
        if !matches!(schema::PLACE.get(&self.batch, (self.num, known))?, Some(Place::Timeline(_))) {
            return Err(Refusal::forbidden("The room does not allow this any more.").into());
        }
        if sent_by.is_some() {
            stored.row.header.sent_by = sent_by;
            self.replace_event(&stored);
        }
        Ok(stored)
    }
}

/// Refuses every event where the room names no key by which its policy server could sign.
fn require_key(server: &PolicyServer) -> Result<(), Refusal> {
    if server.has_key() {
        return Ok(());
    }
    let name = server.name();
    Err(Refusal::forbidden(format!(
        "The room's policy server {name} cannot sign events, because `m.room.policy` does not name its key: set that anew."
    )))
}
