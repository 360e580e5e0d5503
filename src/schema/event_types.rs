//! Names that rows and flows share with the specification: types of events and of account data, types of relations.
//! No other file has a literal of such a name (`tests/tidy.rs`), so that a name is never misspelt and its users are found.

/// State: says what a room is, once and for ever.
pub const CREATE: &str = "m.room.create";
/// State: the membership of a user in a room; the state key is the user id.
pub const MEMBER: &str = "m.room.member";
/// State: says who may do what in the room.
pub const POWER_LEVELS: &str = "m.room.power_levels";
/// State: says how users come into the room.
pub const JOIN_RULES: &str = "m.room.join_rules";
/// State: says who sees what was sent before they came.
pub const HISTORY_VISIBILITY: &str = "m.room.history_visibility";
/// State: for how long the room's messages are kept (MSC1763), by its name, and by the one that it has until the proposal is accepted. The
/// first that is set counts.
pub const RETENTION: [&str; 2] = ["m.room.retention", "org.matrix.msc1763.retention"];
/// State: whether guests may come in.
pub const GUEST_ACCESS: &str = "m.room.guest_access";
/// State: the alias that the room goes by, and its other aliases.
pub const CANONICAL_ALIAS: &str = "m.room.canonical_alias";
/// State: the room's name.
pub const NAME: &str = "m.room.name";
/// State: what the room is about.
pub const TOPIC: &str = "m.room.topic";
/// State: the room's picture.
pub const AVATAR: &str = "m.room.avatar";
/// State: the room is end-to-end encrypted from here on.
pub const ENCRYPTION: &str = "m.room.encryption";
/// State: the servers that may take part.
pub const SERVER_ACL: &str = "m.room.server_acl";
/// State: the server that is asked for its signature before an event is sent; the state key is empty.
pub const POLICY: &str = "m.room.policy";
/// State: a room that a space names as its child; the state key is the room's id.
pub const SPACE_CHILD: &str = "m.space.child";
/// State: another room replaces this one.
pub const TOMBSTONE: &str = "m.room.tombstone";
/// State: an invitation to somebody known by e-mail address or telephone number only.
pub const THIRD_PARTY_INVITE: &str = "m.room.third_party_invite";

/// Derived keys of a room's state begin with this byte, so that no event can set them.
pub const DERIVED: char = '\u{1}';
/// Derived key: a server, present while it has somebody in the room; the state key is the server.
pub const DERIVED_SERVER: &str = "\u{1}server";
/// Derived key: the number of users who are in the room.
pub const DERIVED_JOINED: &str = "\u{1}joined";

/// An event that takes back what another said.
pub const REDACTION: &str = "m.room.redaction";
/// A message that people read.
pub const MESSAGE: &str = "m.room.message";
/// An event that says nothing and only merges the heads of a room.
pub const MERGE: &str = "org.matrix.dummy_event";
/// An event whose content is end-to-end encrypted.
pub const ENCRYPTED: &str = "m.room.encrypted";
/// Message to a device: asks for the key of a session.
pub const ROOM_KEY_REQUEST: &str = "m.room_key_request";

/// Account data: the tags of a room.
pub const TAG: &str = "m.tag";
/// Account data: the rooms that are direct chats, by the other user.
pub const DIRECT: &str = "m.direct";
/// Account data: the users that one does not want to hear of.
pub const IGNORED_USER_LIST: &str = "m.ignored_user_list";
/// Account data: push rules, which the server keeps in a table of their own.
pub const PUSH_RULES: &str = "m.push_rules";
/// Account data: where a user means to go on reading a room.
pub const FULLY_READ: &str = "m.fully_read";
/// Receipt: up to where a user has read, for everybody in the room.
pub const READ: &str = "m.read";
/// Receipt: up to where a user has read, for the user alone.
pub const READ_PRIVATE: &str = "m.read.private";

/// Account data: whom a user lets invite them.
pub const INVITE_PERMISSIONS: &str = "m.invite_permission_config";

/// Ephemeral event: the users who are typing in a room.
pub const TYPING: &str = "m.typing";
/// Ephemeral event: how far users have read.
pub const RECEIPT: &str = "m.receipt";
/// Ephemeral event: whether a user is there.
pub const PRESENCE: &str = "m.presence";

/// Relation: an edit of another event.
pub const REPLACE: &str = "m.replace";
/// Relation: an answer in a thread.
pub const THREAD: &str = "m.thread";
/// Relation: a reaction to another event.
pub const ANNOTATION: &str = "m.annotation";
/// Relation: an event that speaks of another.
pub const REFERENCE: &str = "m.reference";

/// The field beside the content of an event that makes it sticky (MSC4354), by its unstable name.
pub const STICKY: &str = "msc4354_sticky";
