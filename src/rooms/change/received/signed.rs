//! Events as other servers send them, until their signatures are checked (server-server API, "Validating hashes and
//! signatures on received events").
//!
//! The bytes that came are written anew as canonical JSON, named by their hash, redacted if their content hash does not
//! fit, and held to the form of the room's version. What remains is to check the signatures, for which the keys of other
//! servers may have to be fetched first.

use std::{borrow::Cow, collections::BTreeMap};

use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use bytes::Bytes;
use ed25519_dalek::{Signature, VerifyingKey};
use federation::json::Json;
use ruma::{
    CanonicalJsonObject, MilliSecondsSinceUnixEpoch, OwnedEventId, OwnedServerName, OwnedUserId, ServerName,
    UserId, room_version_rules::RoomVersionRules,
};
use serde::Deserialize;
use serde_json::value::RawValue;
use sha2::{Digest as _, Sha256};

use super::Received;
use crate::{
    error::Refusal,
    ids::RoomNum,
    json::Object,
    rooms::{
        build::{EVENT_BYTES_MAX, Signer},
        event::{self, Event},
        policy_server, redact, reference, versions,
    },
    schema::{
        event_types::MEMBER,
        rooms::{EventHash, EventRow, RoomRow},
    },
};

/// An event may come with this many bytes more than it may have, because what `unsigned` holds does not count.
const UNSIGNED_BYTES_MAX: usize = 65_536;
/// The last room version whose events may hold numbers that canonical JSON does not have.
const LARGE_NUMBERS_UPTO: u8 = 5;
/// Events whose ids their servers choose are named, before they are believed, as this room version writes ids.
const NAMES_AS_IN: u8 = 4;
/// The signatures of one server are looked at up to this number of keys.
const KEYS_MAX: usize = 16;
/// The signatures of at most this many policy servers are kept with an event.
const POLICY_SERVERS_MAX: usize = 4;

/// Signatures and hashes are base64 without padding; older servers pad them, or leave bits over at the end.
const LENIENT: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

/// An event of another server whose signatures have not been checked yet.
#[derive(Clone, Debug)]
pub struct Signed {
    received: Received,
    /// The bytes that were signed.
    signed: Bytes,
    /// The servers that must have signed the event, each with its signatures by the ids of its keys.
    signatures: Vec<(OwnedServerName, BTreeMap<String, Signature>)>,
}

/// The fields of an event that tell who must have signed it.
#[derive(Deserialize)]
struct Signers<'a> {
    /// An event without them is one that nobody has signed.
    #[serde(borrow, default)]
    signatures: BTreeMap<Cow<'a, str>, BTreeMap<String, &'a RawValue>>,
    #[serde(borrow, default)]
    hashes: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Hashes<'a> {
    #[serde(borrow)]
    sha256: Cow<'a, str>,
}

#[derive(Deserialize)]
struct MemberContent<'a> {
    #[serde(borrow, default)]
    membership: Option<&'a RawValue>,
    #[serde(borrow, default)]
    third_party_invite: Option<&'a RawValue>,
    #[serde(borrow, default)]
    join_authorised_via_users_server: Option<&'a RawValue>,
}

impl Signed {
    /// Reads an event of this room as another server sent it. Errors: 413 `M_TOO_LARGE` for an event that is too large;
    /// 400 `M_BAD_JSON` for one that is not of the form of the room's version, with the field at fault; 403 `M_FORBIDDEN` for one
    /// that a server has not signed that must have.
    pub fn read(num: RoomNum, room: &RoomRow, json: &[u8]) -> Result<Self, Refusal> {
        Self::read_signed_by(num, room, json, None)
    }

    /// Like [`Self::read`], for an event that another server must have signed, too.
    pub fn read_signed_by(
        num: RoomNum,
        room: &RoomRow,
        json: &[u8],
        also: Option<&ServerName>,
    ) -> Result<Self, Refusal> {
        if json.len() > EVENT_BYTES_MAX + UNSIGNED_BYTES_MAX {
            return Err(Refusal::too_large("The event has more than 65,536 bytes."));
        }
        let rules = versions::find_rules(room.version)
            .ok_or_else(|| Refusal::forbidden("This server does not know the room's version."))?;
        let whole = canonical(json, room.version)?;
        let redacted = redact::redacted(whole.as_bytes(), rules)
            .ok_or_else(|| Refusal::bad_json("The event is not in the form of an event."))?;
        let signers: Signers<'_> = read(&whole)?;
        let is_redacted = signers.hashes.is_some() && !fits_hash(&signers, &whole)?;
        let signed = reference::signed_part(&redacted).map_err(|error| misfit(&error))?;
        let hash: EventHash = Sha256::digest(signed.as_str()).into();
        let kept = if is_redacted { redacted } else { Bytes::copy_from_slice(whole.as_bytes()) };
        let received = Received::check(num, room, hash, kept)?;
        if signers.hashes.is_none() {
            // A signature is made over an event with its hash, so that this event is rightly signed by nobody, like a template of ours that
            // comes back as it was.
            let why = if signers.signatures.is_empty() { "signatures" } else { "hashes" };
            return Err(Refusal::forbidden(format!(
                "`{why}` is missing: nobody has signed the event as it must be."
            )));
        }
        let mut servers = required_servers(received.event(), rules)?;
        if let Some(also) = also.filter(|also| servers.iter().all(|server| server != also)) {
            servers.push(also.to_owned());
        }
        let received = match without_needless(&signers, &servers, &received)? {
            Some(less) => Received::check(num, room, hash, less)?,
            None => received,
        };
        let received = if is_redacted { received.cut() } else { received };
        let signatures = servers.into_iter().map(|server| {
            let by_key = signatures_of(&signers, &server)?;
            Ok((server, by_key))
        });
        let signatures = signatures.collect::<Result<_, Refusal>>()?;
        Ok(Self { received, signed: signed.into(), signatures })
    }

    /// Adds our signature to the event, for servers that need us to sign what they made. Gives the whole event as canonical JSON.
    pub fn cosigned(&self, signer: &Signer) -> Result<Bytes, Refusal> {
        let json = signer.cosign(&self.signed, self.received.json());
        json.ok_or_else(|| Refusal::bad_json("The event is not in the form of an event."))
    }

    /// Lists the keys by which the event says it was signed: server and key id. For each server, one of them must be had
    /// and its signature must be right.
    pub fn keys(&self) -> impl Iterator<Item = (&ServerName, &str)> {
        self.signatures
            .iter()
            .flat_map(|(server, keys)| keys.keys().map(move |key| (&**server, key.as_str())))
    }

    /// The time at which the keys must have been valid, as the event says.
    pub fn sent(&self) -> MilliSecondsSinceUnixEpoch {
        self.received.event().sent
    }

    /// The event, which may be forged as long as its signatures have not been checked.
    pub fn unverified(&self) -> &Event {
        self.received.event()
    }

    /// The name by which the event is told from all others before its signatures are checked: its reference hash, written as an id. It is
    /// the event's id where no server chooses that.
    pub fn name(&self) -> OwnedEventId {
        let event = self.received.event();
        let is_chosen = event.id.server_name().is_some();
        if is_chosen { event::event_id(&self.received.hash().into(), NAMES_AS_IN) } else { event.id.clone() }
    }

    /// The event as canonical JSON, from which it can be read again.
    pub fn json(&self) -> &Bytes {
        self.received.json()
    }

    /// The id of an event that came for a room of this version, whether the rest of it is right or not; none where it cannot
    /// be worked out.
    pub fn find_id(version: u8, json: &[u8]) -> Option<OwnedEventId> {
        let Ok(Json::Object(mut event)) = Json::parse(json) else { return None };
        if event::are_ids_chosen(version) {
            return OwnedEventId::try_from(event.get("event_id")?.as_text()?).ok();
        }
        for name in ["signatures", "unsigned"] {
            event.remove(name);
        }
        let whole = String::from(Json::Object(event).canonical());
        let hash = reference::hash(whole.as_bytes(), versions::find_rules(version)?)?;
        Some(event::event_id(&hash.into(), version))
    }

    /// Whether the content hash did not fit, so that only the redacted form is left.
    pub fn is_redacted(&self) -> bool {
        self.received.is_cut()
    }

    /// The event, for who has checked the signatures of the same bytes before and kept only those.
    pub(crate) fn into_verified(self) -> Received {
        self.received
    }

    /// Checks the signatures. `find_key` gives the public key of a server by the key's id, if it was valid when the event
    /// was sent. Refuses an event that some server has not signed that must have: 403 `M_FORBIDDEN`.
    pub fn verify(
        self,
        mut find_key: impl FnMut(&ServerName, &str) -> Option<VerifyingKey>,
    ) -> Result<Received, Refusal> {
        for (server, by_key) in &self.signatures {
            let is_right = by_key.iter().any(|(key_id, signature)| {
                find_key(server, key_id).is_some_and(|key| key.verify_strict(&self.signed, signature).is_ok())
            });
            if !is_right {
                let why = format!(
                    "`signatures` has no signature of {server} that is right and whose key is known."
                );
                return Err(Refusal::forbidden(why));
            }
        }
        Ok(self.received)
    }
}

fn read<'a, T: Deserialize<'a>>(json: &'a str) -> Result<T, Refusal> {
    serde_json::from_str(json).map_err(|error| misfit(&error))
}

fn misfit(error: &dyn std::fmt::Display) -> Refusal {
    Refusal::bad_json(format!("The event is not in the form of an event: {error}."))
}

/// Writes an event as canonical JSON, without `unsigned`, which is nobody's word.
pub(super) fn canonical(json: &[u8], version: u8) -> Result<String, Refusal> {
    let strict = serde_json::from_slice::<CanonicalJsonObject>(json);
    match strict {
        Ok(mut event) => {
            event.remove("unsigned");
            serde_json::to_string(&event).map_err(|error| misfit(&error))
        }
        // Such numbers are written as the servers write them that signed them.
        Err(_) if version <= LARGE_NUMBERS_UPTO => match Json::parse(json) {
            Ok(Json::Object(mut event)) => {
                event.remove("unsigned");
                Ok(Json::Object(event).canonical().into())
            }
            Ok(_) => Err(misfit(&"it is no object")),
            Err(error) => Err(misfit(&error)),
        },
        Err(error) => Err(misfit(&error)),
    }
}

/// Whether the event's content hash is that of its content ("Calculating the content hash for an event").
fn fits_hash(signers: &Signers<'_>, event: &str) -> Result<bool, Refusal> {
    let Some(Ok(hashes)) = signers.hashes.map(|hashes| read::<Hashes<'_>>(hashes.get())) else {
        return Ok(false);
    };
    let hashed =
        reference::without(event, &["signatures", "unsigned", "hashes"]).map_err(|error| misfit(&error))?;
    let right = Sha256::digest(hashed.as_str());
    Ok(LENIENT.decode(hashes.sha256.as_bytes()).is_ok_and(|stated| stated == right.as_slice()))
}

/// Whether a row has no more of an event than its redacted form, though no redaction is known to have left it so, and `whole` is the event
/// with all its content. Events come so from servers that know a redaction which we do not, or that took the content away.
pub(super) fn is_stub_of(row: &EventRow, whole: &[u8], rules: &RoomVersionRules) -> bool {
    // A redacted form is shorter, so that nothing is hashed where an event comes twice.
    if row.is_redacted() || row.json.len() >= whole.len() {
        return false;
    }
    let Ok(kept) = std::str::from_utf8(&row.json) else { return false };
    let fits = |event| read::<Signers<'_>>(event).and_then(|signers| fits_hash(&signers, event));
    if fits(kept).unwrap_or(true) {
        return false;
    }
    // In rooms whose servers choose ids, another event may have the same one.
    let signed = |event: &[u8]| reference::signed_part(event).ok();
    let left = redact::redacted(whole, rules).and_then(|left| signed(&left));
    signed(kept.as_bytes()).is_some_and(|kept| left.is_some_and(|left| left.as_str() == kept.as_str()))
}

/// Lists the servers that must have signed an event. `event` is the form of it that is kept: where the content hash was wrong,
/// anybody may have written what redaction takes away, so that it excuses nobody from signing.
fn required_servers(event: &Event, rules: &RoomVersionRules) -> Result<Vec<OwnedServerName>, Refusal> {
    let member = if event.event_type.to_string() == MEMBER && event.state_key.is_some() {
        read::<MemberContent<'_>>(event.content.get()).ok()
    } else {
        None
    };
    let is = |membership: &str| {
        let stated = member.as_ref().and_then(|member| member.membership);
        stated.and_then(|stated| serde_json::from_str::<Cow<'_, str>>(stated.get()).ok()).as_deref()
            == Some(membership)
    };
    let mut servers = Vec::with_capacity(2);
    // An identity server made such an invitation, in the name of the inviter.
    let is_of_third_party =
        is("invite") && member.as_ref().is_some_and(|member| member.third_party_invite.is_some());
    if !is_of_third_party {
        servers.push(event.sender.server_name().to_owned());
    }
    if rules.signatures.check_event_id_server {
        let server = event.id.server_name().map(ToOwned::to_owned);
        servers.push(server.ok_or_else(|| Refusal::bad_json("`event_id` names no server."))?);
    }
    if rules.signatures.check_join_authorised_via_users_server
        && is("join")
        && let Some(by) = member.as_ref().and_then(|member| member.join_authorised_via_users_server)
    {
        let by: OwnedUserId = serde_json::from_str(by.get())
            .map_err(|_| Refusal::bad_json("`join_authorised_via_users_server` is not the id of a user."))?;
        servers.push(by.server_name().to_owned());
    }
    servers.sort();
    servers.dedup();
    Ok(servers)
}

/// Leaves out signatures that nobody needs, of which whoever passes an event on may add as many as they like: kept are those of servers that must
/// have signed it, of its sender's server and the one that it is about, and a few of policy servers. `None` where there are no others.
fn without_needless(
    signers: &Signers<'_>,
    required: &[OwnedServerName],
    received: &Received,
) -> Result<Option<Bytes>, Refusal> {
    let event = received.event();
    let about = event.state_key.as_deref().and_then(|key| <&UserId>::try_from(key).ok());
    let concerned = [Some(event.sender.server_name()), about.map(UserId::server_name)];
    let is_kept = |server: &str| {
        required.iter().any(|it| it == server) || concerned.iter().flatten().any(|it| it.as_str() == server)
    };
    // Nearly all events have no others, and nothing is written for those.
    if signers.signatures.iter().all(|(server, by_key)| is_kept(server) && by_key.len() <= KEYS_MAX) {
        return Ok(None);
    }
    let mut policies = 0;
    let mut count = 0;
    let mut kept = Object::with_capacity(received.json().len());
    for (server, by_key) in &signers.signatures {
        let mut of_server = Object::with_capacity(256);
        let mut left = KEYS_MAX;
        for (key_id, signature) in by_key {
            let is_policy = key_id == policy_server::KEY_ID && policies < POLICY_SERVERS_MAX;
            let is_needed = (is_kept(server) && left > 0) || is_policy;
            count += usize::from(!is_needed);
            if is_needed {
                left = left.saturating_sub(1);
                policies += usize::from(is_policy);
                of_server.json(key_id, *signature);
            }
        }
        if left < KEYS_MAX {
            kept.json(server, &of_server.finish());
        }
    }
    if count == 0 {
        return Ok(None);
    }
    let fields: BTreeMap<Cow<'_, str>, &RawValue> =
        serde_json::from_slice(received.json()).map_err(|error| misfit(&error))?;
    let mut whole = Object::with_capacity(received.json().len());
    let kept = kept.finish();
    for (field, value) in fields {
        if field == "signatures" { whole.json(&field, &kept) } else { whole.json(&field, value) }
    }
    Ok(Some(Bytes::copy_from_slice(whole.finish().as_str().as_bytes())))
}

/// Gives the signatures of one server, by the ids of its keys. What is no signature by ed25519 is left out, because keys of
/// other kinds may come, and so is the signature of a policy server beside others: no server publishes the key of that one.
fn signatures_of(signers: &Signers<'_>, server: &ServerName) -> Result<BTreeMap<String, Signature>, Refusal> {
    let of_server = signers.signatures.get(server.as_str());
    let read = |(key_id, signature): (&String, &&RawValue)| {
        let signature: Cow<'_, str> = serde_json::from_str(signature.get()).ok()?;
        let signature = LENIENT.decode(signature.as_bytes()).ok()?;
        Some((key_id.clone(), Signature::from_slice(&signature).ok()?))
    };
    let is_ed25519 = |key_id: &str| key_id.starts_with("ed25519:");
    let of_keys = || of_server.into_iter().flatten().filter(|(key_id, _)| is_ed25519(key_id));
    let is_alone = of_keys().count() == 1;
    let signatures: BTreeMap<_, _> = of_keys()
        .filter(|(key_id, _)| is_alone || *key_id != policy_server::KEY_ID)
        .filter_map(read)
        .take(KEYS_MAX)
        .collect();
    if signatures.is_empty() {
        return Err(Refusal::forbidden(format!("`signatures` has no signature of {server}.")));
    }
    Ok(signatures)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use ruma::{OwnedEventId, RoomId, signatures::Ed25519KeyPair};
    use serde_json::{Value, json};

    use super::*;
    use crate::{
        ids::Order,
        rooms::{
            build::{
                Draft, Setting, Signer, build,
                tests::{a_key, an_id, hashes},
            },
            event::event_id,
            tip::tests::row,
        },
    };

    const NUM: RoomNum = RoomNum(1);
    const SERVER: &str = "b.example";

    fn room(version: u8) -> RoomRow {
        let id = if version >= 12 { "!aHashOfSomeLength" } else { "!room:a.example" };
        RoomRow { id: RoomId::parse(id).unwrap(), version, ..row(Order::MIN) }
    }

    fn public(key: &Arc<Ed25519KeyPair>) -> VerifyingKey {
        VerifyingKey::from_bytes(&key.public_key()).unwrap()
    }

    fn find_key(server: &ServerName, key_id: &str) -> Option<VerifyingKey> {
        (server == SERVER && key_id == "ed25519:k").then(|| public(&a_key()))
    }

    /// An event that its sender's server built.
    fn built(
        version: u8,
        event_type: &str,
        state_key: Option<&str>,
        content: Value,
    ) -> (OwnedEventId, Value) {
        let draft = Draft {
            sender: "@bob:b.example".try_into().unwrap(),
            event_type: event_type.to_owned(),
            state_key: state_key.map(str::to_owned),
            content: serde_json::from_value(content).unwrap(),
            redacts: None,
            sent_ms: 1_700_000_000_000,
            sticky_ms: None,
        };
        let room = room(version);
        let (prev, auth) = ([an_id(2, version)], [an_id(3, version)]);
        let hashes = hashes(&[&prev, &auth]);
        let rules = versions::find_rules(version).unwrap();
        let setting =
            Setting { room_id: Some(&room.id), rules, prev: &prev, auth: &auth, hashes: &hashes, depth: 5 };
        let signer = Signer::new(SERVER.try_into().unwrap(), a_key());
        let built = build(&signer, &draft, &setting, version).unwrap();
        (built.event.id, serde_json::from_slice(&built.json).unwrap())
    }

    fn message(version: u8) -> (OwnedEventId, Value) {
        built(version, "m.room.message", None, json!({ "body": "h\u{e9} \u{2028} \"", "n": 7 }))
    }

    fn come(version: u8, event: &Value) -> Result<Signed, Refusal> {
        Signed::read(NUM, &room(version), event.to_string().as_bytes())
    }

    #[test]
    fn what_another_server_built_is_named_and_verified_as_there() {
        for version in versions::LOWEST..=versions::HIGHEST {
            let (id, mut event) = message(version);
            event["unsigned"] = json!({ "age": 4, "odd": 1.5 });
            event["unsigned"].as_object_mut().unwrap().remove(if version > 5 { "odd" } else { "age" });
            let signed = come(version, &event).unwrap();
            assert!(!signed.is_redacted());
            assert_eq!(
                signed.keys().collect::<Vec<_>>(),
                [(<&ServerName>::try_from(SERVER).unwrap(), "ed25519:k")]
            );
            let received = signed.verify(find_key).unwrap();
            assert_eq!(received.id(), id, "{version}");
            let kept: Value = serde_json::from_slice(received.json()).unwrap();
            event.as_object_mut().unwrap().remove("unsigned");
            assert_eq!(kept, event);
        }
    }

    #[test]
    fn events_that_another_server_made_in_versions_1_and_2_are_read_verified_and_built_alike() {
        // Made by Synapse 1.163.2: `tests/interop/first_versions.py`.
        #[derive(Deserialize)]
        struct Made {
            version: u8,
            reference_hash: String,
            event: Value,
        }
        for line in include_str!("signed/by_another_server.jsonl").lines() {
            let Made { version, reference_hash, mut event } = serde_json::from_str(line).unwrap();
            let keys = ["a.example", "b.example", "c.example"];
            let key_of = |server: &ServerName, key_id: &str| {
                let number = keys.iter().position(|known| server == *known)?;
                let seed = [number as u8 + 1; 32];
                (key_id == "ed25519:k").then(|| ed25519_dalek::SigningKey::from_bytes(&seed).verifying_key())
            };
            let signed = come(version, &event).unwrap();
            assert!(!signed.is_redacted(), "{line}");
            assert_eq!(signed.unverified().id.as_str(), event["event_id"]);
            assert!(signed.clone().verify(|_, _| None).is_err());
            let received = signed.verify(key_of).unwrap();
            assert_eq!(reference::encode(&received.hash()), reference_hash);
            let key = received.key(NUM);
            assert_eq!(event_id(&key, version), *received.id());
            // Nothing of it can be changed, and no other id can be given to it.
            event["event_id"] = json!("$other:a.example");
            assert!(come(version, &event).unwrap().verify(key_of).is_err());
            event["event_id"] = json!("$other:c.example");
            assert!(come(version, &event).is_err(), "the server in the id has not signed it");
        }
    }

    #[test]
    fn the_key_of_a_policy_server_is_not_looked_for_among_those_that_servers_publish() {
        let (_, mut event) = message(11);
        let own = event["signatures"][SERVER]["ed25519:k"].clone();
        event["signatures"][SERVER][policy_server::KEY_ID] = own.clone();
        event["signatures"]["p.example"] = json!({ policy_server::KEY_ID: own });
        let signed = come(11, &event).unwrap();
        let keys: Vec<_> = signed.keys().map(|(server, id)| (server.as_str(), id)).collect();
        assert_eq!(keys, [(SERVER, "ed25519:k")]);
        let received = signed.verify(find_key).unwrap();
        let kept: Value = serde_json::from_slice(received.json()).unwrap();
        assert_eq!(kept["signatures"], event["signatures"], "what others need is handed on");
        // A server may have given its own key that name.
        event["signatures"][SERVER].as_object_mut().unwrap().remove("ed25519:k");
        assert_eq!(come(11, &event).unwrap().keys().count(), 1);
    }

    #[test]
    fn what_was_changed_on_the_way_is_redacted_or_refused() {
        let (id, event) = message(11);
        let mut changed = event.clone();
        changed["content"]["body"] = json!("forged");
        let signed = come(11, &changed).unwrap();
        assert!(signed.is_redacted());
        let received = signed.verify(find_key).unwrap();
        assert_eq!(received.id(), id, "the id is that of the redacted form");
        assert!(!std::str::from_utf8(received.json()).unwrap().contains("forged"));

        for (field, value) in [("depth", json!(6)), ("origin_server_ts", json!(1)), ("type", json!("x"))] {
            let mut changed = event.clone();
            changed[field] = value;
            assert!(come(11, &changed).unwrap().verify(find_key).is_err(), "{field}");
        }
        let other = |_: &ServerName, _: &str| None;
        assert!(come(11, &event).unwrap().verify(other).is_err(), "a key that nobody knows verifies nothing");
    }

    #[test]
    fn signatures_of_all_servers_concerned_are_asked_for() {
        let join = json!({ "membership": "join", "join_authorised_via_users_server": "@carol:c.example" });
        for version in [7, 8, 11] {
            let (_, event) = built(version, MEMBER, Some("@bob:b.example"), join.clone());
            let signed = come(version, &event);
            assert_eq!(signed.is_err(), version >= 8, "the server that lets somebody in must have signed");
            let mut both = event.clone();
            both["signatures"]["c.example"] = json!({ "ed25519:z": both["signatures"][SERVER]["ed25519:k"] });
            let servers =
                |signed: &Signed| signed.keys().map(|(server, _)| server.to_string()).collect::<Vec<_>>();
            let signed = come(version, &both).unwrap();
            assert_eq!(servers(&signed).len(), if version >= 8 { 2 } else { 1 });
            let same_key = |_: &ServerName, _: &str| Some(public(&a_key()));
            assert!(signed.clone().verify(same_key).is_ok());
            assert_eq!(signed.verify(find_key).is_ok(), version < 8, "each server has keys of its own");
        }
        let invite = json!({ "membership": "invite", "third_party_invite": { "signed": {} } });
        let (_, mut event) = built(11, MEMBER, Some("@carol:c.example"), invite);
        event["signatures"] = json!({});
        assert!(
            come(11, &event).unwrap().verify(|_, _| None).is_ok(),
            "the rules judge the identity server's signature"
        );
    }

    #[test]
    fn signatures_that_nobody_needs_are_left_out() {
        let (id, mut event) = built(11, MEMBER, Some("@bob:b.example"), json!({ "membership": "leave" }));
        let before = Signed::read(NUM, &room(11), event.to_string().as_bytes()).unwrap();
        for number in 0..100 {
            event["signatures"]["b.example"][format!("ed25519:x{number}")] = json!("AA");
            event["signatures"][format!("p{number}.example")] =
                json!({ (policy_server::KEY_ID): "AA", "ed25519:a": "AA" });
        }
        let signed = Signed::read(NUM, &room(11), event.to_string().as_bytes()).unwrap();
        assert_eq!((signed.unverified().id.clone(), signed.is_redacted()), (id, false));
        let kept: Value = serde_json::from_slice(signed.json()).unwrap();
        let kept = kept["signatures"].as_object().unwrap();
        assert_eq!(kept.len(), 1 + POLICY_SERVERS_MAX);
        assert_eq!(kept["b.example"].as_object().unwrap().len(), KEYS_MAX);
        assert_eq!(kept["p0.example"], json!({ (policy_server::KEY_ID): "AA" }));
        assert!(signed.verify(find_key).is_ok(), "the right one is the first of them");
        assert!(before.json().len() < 1_000);
    }

    #[test]
    fn what_redaction_takes_away_excuses_nobody_from_signing() {
        // Up to room version 10 a redacted invitation says nothing of a third party.
        for version in versions::LOWEST..=10 {
            let (_, mut event) =
                built(version, MEMBER, Some("@carol:c.example"), json!({ "membership": "invite" }));
            event["content"]["third_party_invite"] = json!({ "signed": {} });
            let signed = come(version, &event).unwrap();
            assert!(signed.is_redacted());
            assert!(
                signed.keys().any(|(server, _)| server == SERVER),
                "{version}: the sender's server signs"
            );
            event["signatures"] = json!({});
            assert!(come(version, &event).is_err(), "{version}: nobody signed it");
        }
        // Whom a redacted join does not name any more need not have signed it.
        let join = json!({ "membership": "join" });
        let (_, mut event) = built(8, MEMBER, Some("@bob:b.example"), join);
        event["content"]["join_authorised_via_users_server"] = json!("@carol:c.example");
        assert!(come(8, &event).unwrap().verify(find_key).is_ok());
    }

    #[test]
    fn one_right_signature_of_a_server_is_enough() {
        let (_, mut event) = message(11);
        let wrong = LENIENT.encode([1; 64]);
        let right = event["signatures"][SERVER]["ed25519:k"].clone();
        event["signatures"][SERVER] = json!({
            "ed25519:a": wrong, "ed25519:b": 7, "ed25519:c": "no base64 ", "curve:k": "x", "ed25519:k": right,
        });
        assert!(come(11, &event).unwrap().verify(find_key).is_ok());
        event["signatures"][SERVER].as_object_mut().unwrap().remove("ed25519:k");
        assert!(come(11, &event).unwrap().verify(find_key).is_err());
        for none in [json!({}), json!({ SERVER: {} }), json!({ SERVER: { "ed25519:k": "short" } })] {
            event["signatures"] = none;
            assert!(come(11, &event).is_err());
        }
    }

    #[test]
    fn numbers_that_canonical_json_lacks_come_in_up_to_version_5() {
        // The hash and the signature of such an event are made over its own text, which serde would write otherwise.
        for (version, comes) in [(3, true), (5, true), (6, false), (12, false)] {
            let (_, event) = message(version);
            let text = event.to_string().replace("\"n\":7", "\"n\":1.50,\"m\":99999999999999999999");
            let signed = Signed::read(NUM, &room(version), text.as_bytes());
            assert_eq!(signed.is_ok(), comes, "{version}");
            let Ok(signed) = signed else { continue };
            assert!(signed.is_redacted(), "its hash is another one");
            assert!(signed.verify(find_key).is_ok());
        }
        let (_, mut event) = message(5);
        event.as_object_mut().unwrap().remove("hashes");
        let text = event.to_string().replace("\"n\":7", "\"n\":1.50,\"m\":99999999999999999999");
        let hashed = canonical(text.as_bytes(), 5).unwrap();
        assert!(hashed.contains("\"m\":99999999999999999999,\"n\":1.5"), "{hashed}");
        let hash = Sha256::digest(reference::without(&hashed, &["signatures"]).unwrap().as_str());
        let with = format!(
            "{{\"hashes\":{{\"sha256\":\"{}\"}},{}",
            LENIENT.encode(hash),
            text.strip_prefix('{').unwrap()
        );
        assert!(!Signed::read(NUM, &room(5), with.as_bytes()).unwrap().is_redacted());
    }

    #[test]
    fn an_event_without_its_hash_or_without_signatures_is_one_that_nobody_has_signed() {
        for version in [1, 5, 11, 12] {
            let (_, event) = message(version);
            for gone in [&["hashes"][..], &["signatures"], &["hashes", "signatures"]] {
                let mut event = event.clone();
                gone.iter().for_each(|field| drop(event.as_object_mut().unwrap().remove(*field)));
                let why = come(version, &event).err().unwrap();
                assert_eq!(
                    why.kind,
                    ruma::api::error::ErrorKind::Forbidden,
                    "{version} {gone:?}: {}",
                    why.message
                );
            }
        }
    }

    #[test]
    fn odd_bytes_are_refused() {
        let deep = format!("{{\"content\":{}1{}}}", "[".repeat(20_000), "]".repeat(20_000));
        let (_, event) = message(11);
        let long =
            format!("{{\"x\":\"{}\",{}", "y".repeat(140_000), event.to_string().strip_prefix('{').unwrap());
        for odd in [
            "",
            "{",
            "[]",
            "null",
            "{}",
            "{\"signatures\":1}",
            "{\"a\":1e400}",
            "{\"a\":\"\\ud800\"}",
            &deep,
            &long,
        ] {
            for version in [3, 5, 6, 12] {
                assert!(Signed::read(NUM, &room(version), odd.as_bytes()).is_err(), "{version}");
            }
        }
        let mut event = event;
        event["hashes"] = json!("none");
        assert!(come(11, &event).unwrap().is_redacted());
    }
}
