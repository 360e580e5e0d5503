//! The gate that each event of our own users passes before it is built.
//!
//! The authorization rules of a room leave much open that the specification asks of a server for its own users: guests
//! enter only where guests may, nobody vouches for themselves, an alias that a room calls its own names that room. Each
//! event of ours, by whichever endpoint and flow, becomes [`Approved`] here before it can be added to a room:
//! `Change::add` is not visible outside `rooms`.

use ruma::{CanonicalJsonObject, OwnedRoomAliasId, OwnedUserId, ServerName, UserId, api::error::ErrorKind};
use serde::{Deserialize, de::DeserializeOwned};

use crate::{
    accounts::{Caller, invites, users},
    error::{Error, Refusal, Result},
    ids::{RoomNum, UserNum},
    rooms::{
        self, aliases,
        build::{Built, Draft, Signer},
        change::{
            Change, Txn,
            countersigned::{Countersigned, Unsigned},
        },
        event::{self, StoredEvent},
        membership::Act,
        relations,
        visibility::Sight,
        vouch::{self, AUTHORISED_VIA, Admission},
    },
    schema::event_types::{
        CANONICAL_ALIAS, CREATE, GUEST_ACCESS, MEMBER, POWER_LEVELS, REDACTION, TOMBSTONE,
    },
    schema::rooms::Membership,
    store::{Fault, Read},
};

/// The user of ours in whose name an event is built.
#[derive(Clone, Debug)]
pub struct Author {
    /// The number of the author's account.
    pub user: UserNum,
    /// The author's user id, which becomes the event's sender.
    pub user_id: OwnedUserId,
    /// Whether the author is a guest, who may do less than other users.
    pub is_guest: bool,
    /// Whether the author asks for the event and is suspended: they leave, and take back what they said, and do nothing else.
    pub is_suspended: bool,
    /// Aliases that name the room though no row says so, so that it may call them its own: the one that a new room gets with the
    /// batch by which it is accepted, and those of other servers, which were asked.
    pub names: Vec<OwnedRoomAliasId>,
}

impl From<&Caller> for Author {
    fn from(caller: &Caller) -> Self {
        Self {
            user: caller.user,
            user_id: caller.user_id.clone(),
            is_guest: caller.is_guest,
            is_suspended: caller.is_suspended,
            names: Vec::new(),
        }
    }
}

impl Author {
    /// Gives the author behind an account, for events that the server makes in a user's name without being asked.
    pub fn of(read: &(impl Read + ?Sized), user: UserNum) -> Result<Self> {
        let row = users::require(read, user)?;
        Ok(Self {
            user,
            user_id: row.user_id,
            is_guest: row.is_guest,
            is_suspended: false,
            names: Vec::new(),
        })
    }
}

/// An event that this server is willing to build. The authorization rules of the room judge it when it is added.
#[derive(Debug)]
pub struct Approved(Draft);

impl Approved {
    /// The draft that will be built, completed with the fields that only the server may set.
    pub fn draft(&self) -> &Draft {
        &self.0
    }

    /// Finds the current event of the same key, if the author has set exactly this before: setting it again changes
    /// nothing.
    pub fn find_same(&self, change: &mut Change) -> Result<Option<ruma::OwnedEventId>> {
        // A sticky event that says the same makes it stick for longer.
        if self.0.sticky_ms.is_some() {
            return Ok(None);
        }
        let Some(state_key) = self.0.state_key.as_deref() else { return Ok(None) };
        let Some(current) = change.state(&self.0.event_type, state_key)? else { return Ok(None) };
        let is_same = current.parsed.sender == self.0.sender
            && current.parsed.content.get() == self.0.raw_content()?.get()
            && change.membership(self.0.sender.as_str())? == Membership::Join;
        Ok(is_same.then(|| current.parsed.id.clone()))
    }

    /// Builds the event and has it judged by the rules of the room, and writes nothing: others must sign it first, the room's policy
    /// server among them, where it uses one. Errors: 403
    /// `M_FORBIDDEN` for an event that the rules forbid; 413.
    pub fn build(self, change: &mut Change, signer: &Signer) -> Result<(Built, Option<Unsigned>)> {
        let built = change.build_only(signer, &self.0)?;
        let unsigned = change.lacking(&self.0, &built)?;
        Ok((built, unsigned))
    }

    /// Builds the event for a change that is made later, and says whether the room's policy server must sign it first. Errors: as for
    /// [`Self::build`].
    pub fn build_ahead(
        self,
        change: &mut Change,
        signer: &Signer,
    ) -> Result<(Countersigned, Option<Unsigned>)> {
        change.build_ahead(signer, &self.0)
    }

    /// Builds the event, has it judged by the rules of the room and writes it into the change. Errors: 403
    /// `M_FORBIDDEN` for an event that the rules forbid; 413 as soon as the change is larger than one batch, so that
    /// nobody has more work done than is accepted. (A new room is written out in parts before that.)
    pub fn add(self, change: &mut Change, signer: &Signer) -> Result<StoredEvent> {
        let stored = change.add(signer, &self.0, None)?;
        change.batch.check_size()?;
        Ok(stored)
    }

    /// Like [`Self::add`], for an event that a client sends with a transaction id.
    pub fn add_once(self, change: &mut Change, signer: &Signer, txn: &Txn) -> Result<StoredEvent> {
        change.add_once(signer, &self.0, txn)
    }
}

/// Judges an event that one of our users wants to add to a room, and completes it with the fields that only the server
/// may set.
///
/// Errors: 403 `M_FORBIDDEN`, `M_GUEST_ACCESS_FORBIDDEN`, `M_INVITE_BLOCKED`; 404 for an invited user or a redacted
/// event that does not exist; 400 `M_BAD_JSON`, `M_BAD_ALIAS`, `M_INVALID_PARAM` for an event that its type does not
/// allow.
pub fn approve(
    change: &mut Change,
    server: &ServerName,
    author: &Author,
    mut draft: Draft,
) -> Result<Approved> {
    debug_assert_eq!(draft.sender, author.user_id, "an event is built in its author's name");
    debug_assert_eq!(author.user_id.server_name(), server, "only our own users have events built here");
    let judged = require_type(&draft).and_then(|()| require_standing(author, &mut draft));
    let judged = judged.and_then(|()| require_another_room(change, &draft));
    let judged = judged.and_then(|()| require_in_room(change, author, &draft));
    let judged = judged.and_then(|()| match &draft.state_key {
        Some(_) => judge_state(change, server, author, &mut draft),
        None => judge_message(change, author, &draft),
    });
    if let Err(Error::Refused(why)) = &judged {
        let (room, user, event_type) = (change.num, author.user, &draft.event_type);
        tracing::debug!(%room, %user, event_type, reason = why.message, "an event of one of our users is refused by policy");
    }
    judged.map(|()| Approved(draft))
}

fn require_type(draft: &Draft) -> Result<()> {
    if draft.event_type.is_empty() {
        return Err(Refusal::bad_json("The type of the event is empty; name one.").into());
    }
    Ok(())
}

/// Refuses a tombstone that names its own room: 400 `M_BAD_JSON`. Clients that follow it would come back for ever.
fn require_another_room(change: &Change, draft: &Draft) -> Result<()> {
    let named = draft.content.get("replacement_room").and_then(|room| room.as_str());
    if draft.event_type == TOMBSTONE && named == Some(change.row.id.as_str()) {
        return Err(Refusal::bad_json("A room cannot be replaced by itself.").into());
    }
    Ok(())
}

/// Refuses what a suspended author may not do (client-server API, "Account suspension"): 403 `M_USER_SUSPENDED`. Whatever they may do says
/// nothing besides: a reason is text that others read. [`require_own_words`] judges which events they redact.
fn require_standing(author: &Author, draft: &mut Draft) -> Result<()> {
    if !author.is_suspended {
        return Ok(());
    }
    if draft.event_type == REDACTION && draft.redacts.is_some() {
        // In the room versions that have `redacts` in the content, it comes there as the event is built.
        draft.content.clear();
        return Ok(());
    }
    if moves_oneself(author, draft)?
        && event::membership_of(draft.raw_content()?.get()) == Some(Membership::Leave)
    {
        draft.content.retain(|field, _| field == "membership");
        return Ok(());
    }
    Err(users::suspended().into())
}

/// Refuses a suspended author a redaction that takes back nothing of what they said: of another's event, of one that is redacted, and of a
/// redaction, so that no chain of redactions goes on for ever.
fn require_own_words(author: &Author, target: &StoredEvent) -> Result<()> {
    let row = &target.row;
    let takes_back =
        row.sender() == author.user_id.as_str() && !row.is_redacted() && row.event_type() != REDACTION;
    if !author.is_suspended || takes_back { Ok(()) } else { Err(users::suspended().into()) }
}

/// Refuses an author who is not in the room. The authorization rules let some events pass before they look at the sender's
/// membership (`m.room.aliases` in room versions 1 to 5, an invitation that bears a third party's token), so that they
/// do not keep strangers out. Only the create event and somebody's own way in or out come from outside a room.
fn require_in_room(change: &mut Change, author: &Author, draft: &Draft) -> Result<()> {
    let begins_room = draft.event_type == CREATE && change.row.heads.is_empty();
    if begins_room
        || moves_oneself(author, draft)?
        || change.membership(author.user_id.as_str())? == Membership::Join
    {
        return Ok(());
    }
    Err(Refusal::forbidden("You are not in this room.").into())
}

/// Whether an event lets its author join, knock or leave.
fn moves_oneself(author: &Author, draft: &Draft) -> Result<bool> {
    if draft.event_type != MEMBER || draft.state_key.as_deref() != Some(author.user_id.as_str()) {
        return Ok(false);
    }
    let membership = event::membership_of(draft.raw_content()?.get());
    // An event without a membership is refused later, with a reason that helps its author.
    Ok(!matches!(membership, Some(Membership::Invite | Membership::Ban)))
}

/// Judges an event that is no state. An event that the author may not see is as good as one that is not there, so that no
/// answer tells whether it is.
fn judge_message(change: &mut Change, author: &Author, draft: &Draft) -> Result<()> {
    if author.is_guest && draft.event_type == REDACTION {
        return Err(no_guests("Guests cannot redact events.").into());
    }
    if draft.event_type == REDACTION && draft.redacts.is_none() {
        return Err(Refusal::bad_json("`redacts` is missing; it names the event to redact.").into());
    }
    if let Some(target) = &draft.redacts {
        let mut sight = Sight::of(&change.batch, change.num, author.user, &author.user_id)?;
        match sight.find(&change.batch, target)? {
            Some(seen) => {
                require_own_words(author, &seen)?;
                change.require_may_redact(&draft.sender, &seen)?;
            }
            None => {
                change.require_may_redact_unseen(&draft.sender, target)?;
                if author.is_suspended {
                    return Err(users::suspended().into());
                }
            }
        }
    }
    relations::check(&change.batch, change.num, author.user, draft)
}

fn judge_state(change: &mut Change, server: &ServerName, author: &Author, draft: &mut Draft) -> Result<()> {
    match draft.event_type.as_str() {
        CREATE if !change.row.heads.is_empty() => {
            Err(Refusal::bad_json("`m.room.create` can only be sent when the room is created.").into())
        }
        REDACTION => {
            Err(Refusal::bad_json("`m.room.redaction` cannot be sent as state; use `/redact`.").into())
        }
        MEMBER => judge_member(change, server, author, draft),
        POWER_LEVELS => Ok(change.power()?.check_levels(&draft.content)?),
        CANONICAL_ALIAS => {
            let old = change.state(&draft.event_type, draft.state_key.as_deref().unwrap_or_default())?;
            let old = old.as_ref().map(|event| event.parsed.content.get());
            aliases::check_canonical(&change.batch, change.num, &draft.content, old, &author.names)
        }
        _ => Ok(()),
    }
}

fn judge_member(change: &mut Change, server: &ServerName, author: &Author, draft: &mut Draft) -> Result<()> {
    let odd = |why: &str| Error::from(Refusal::bad_json(why));
    let target = draft.state_key.as_deref().and_then(|user| OwnedUserId::try_from(user).ok());
    let target = target.ok_or_else(|| odd("The state key of a member event must be a user id."))?;
    let content = draft.raw_content()?;
    let membership = event::membership_of(content.get())
        .ok_or_else(|| odd("`membership` is not one of join, leave, invite, knock and ban."))?;
    draft.content.remove(AUTHORISED_VIA);
    let is_own = target == author.user_id;
    if author.is_guest && !(is_own && matches!(membership, Membership::Join | Membership::Leave)) {
        return Err(no_guests("Guests can only join and leave rooms.").into());
    }
    match membership {
        Membership::Join if is_own => judge_join(change, server, author, &mut draft.content),
        Membership::Invite => judge_invite(&change.batch, server, author, &target),
        Membership::Knock if is_own => require_live(&change.batch, author.user),
        Membership::Leave if !is_own => judge_removal(change, &target),
        // The authorization rules judge all other acts, such as those on somebody else's membership.
        Membership::Join | Membership::Knock | Membership::Leave | Membership::Ban => Ok(()),
    }
}

/// Judges a join by the user who joins, and lets the server vouch for them where the room admits members of other
/// rooms.
fn judge_join(
    change: &mut Change,
    server: &ServerName,
    author: &Author,
    content: &mut CanonicalJsonObject,
) -> Result<()> {
    let was = change.membership(author.user_id.as_str())?;
    if was == Membership::Join {
        // A user who is in the room already needs nobody to vouch for them.
        return Ok(());
    }
    require_live(&change.batch, author.user)?;
    if author.is_guest && !guests_may_join(change)? {
        return Err(no_guests("Guests may not join this room.").into());
    }
    if was != Membership::Invite
        && let Admission::Vouched(voucher) = vouch::judge(change, server, &author.user_id)?
    {
        content.insert(AUTHORISED_VIA.to_owned(), voucher.as_str().into());
    }
    Ok(())
}

/// Judges the end of somebody else's membership: there must be one, or a ban to take back.
fn judge_removal(change: &mut Change, target: &UserId) -> Result<()> {
    let was = change.membership(target.as_str())?;
    let act = if was == Membership::Ban { Act::Unban } else { Act::Kick };
    act.outcome(was)?;
    Ok(())
}

/// Refuses to let an account into a room that was deactivated while its request was under way: nobody would take it out
/// again.
pub(crate) fn require_live(read: &(impl Read + ?Sized), user: UserNum) -> Result<()> {
    if users::require(read, user)?.is_deactivated {
        return Err(Refusal::forbidden("The account has been deactivated.").into());
    }
    Ok(())
}

/// Refuses those of our users who may not come into a room of which we know nothing: guests, who may only come into rooms that
/// say so, and accounts that were deactivated.
pub fn require_may_go_elsewhere(read: &(impl Read + ?Sized), author: &Author) -> Result<()> {
    if author.is_guest {
        return Err(no_guests("Guests may only come into rooms that this server is in.").into());
    }
    require_live(read, author.user)
}

/// Judges an invitation of a user of another server, which that server must sign before it is part of the room. Errors: 403
/// `M_FORBIDDEN`, `M_GUEST_ACCESS_FORBIDDEN`.
pub fn approve_invite_elsewhere(change: &mut Change, author: &Author, mut draft: Draft) -> Result<Approved> {
    debug_assert_eq!(draft.sender, author.user_id, "an event is built in its author's name");
    require_in_room(change, author, &draft)?;
    if author.is_guest {
        return Err(no_guests("Guests can only join and leave rooms.").into());
    }
    draft.content.remove(AUTHORISED_VIA);
    Ok(Approved(draft))
}

/// Judges an invitation of a user of ours. Those of others go to their servers before they are part of the room
/// ([`approve_invite_elsewhere`]).
fn judge_invite(
    read: &(impl Read + ?Sized),
    server: &ServerName,
    author: &Author,
    target: &UserId,
) -> Result<()> {
    if target.server_name() != server {
        let why = "Users of other servers are invited by `/invite` or by `invite` of a new room.";
        return Err(Refusal::forbidden(why).into());
    }
    require_reachable(read, server, target)?;
    invites::check(read, target, &author.user_id)
}

/// Refuses to invite a user of ours who does not exist, because an account that is made later would not be told (404), and an
/// account that was deactivated (403). The servers of others judge their own users.
pub fn require_reachable(read: &(impl Read + ?Sized), server: &ServerName, user: &UserId) -> Result<()> {
    if user.server_name() != server {
        return Ok(());
    }
    require_live(read, users::require_num(read, user)?)
}

/// Refuses a guest with 403 `M_GUEST_ACCESS_FORBIDDEN`.
fn no_guests(why: &str) -> Refusal {
    Refusal::new(ErrorKind::GuestAccessForbidden, why)
}

fn state_content<T: DeserializeOwned>(change: &mut Change, event_type: &str) -> Result<Option<T>, Fault> {
    let event = change.state(event_type, "")?;
    Ok(event.and_then(|event| serde_json::from_str(event.parsed.content.get()).ok()))
}

#[derive(Deserialize)]
struct GuestAccess {
    guest_access: String,
}

impl GuestAccess {
    fn is_open(&self) -> bool {
        self.guest_access == "can_join"
    }
}

/// Whether guests may join the room, with the events that the change has added: only where the room says so.
pub fn guests_may_join(change: &mut Change) -> Result<bool, Fault> {
    let access = state_content::<GuestAccess>(change, GUEST_ACCESS)?;
    Ok(access.is_some_and(|access| access.is_open()))
}

/// Whether guests may join the room as it is now.
pub fn is_open_to_guests(read: &(impl Read + ?Sized), room: RoomNum) -> Result<bool, Fault> {
    let access = rooms::find_state(read, room, GUEST_ACCESS, "")?
        .and_then(|event| serde_json::from_str::<GuestAccess>(event.row.content()).ok());
    Ok(access.is_some_and(|access| access.is_open()))
}
