//! Every table of Matrix on one page: key, value, meaning, owner, domain, whether replicas get it.
//!
//! Ids are for ever: a table that goes leaves its id unused. Each value begins with the version of its layout. The store's own
//! tables (the log, cursors, timers) are on the page `store/tables.rs`.

pub mod push;
pub mod remote;
pub mod reports;
pub mod receipts;
pub mod relations;
pub mod accounts;
pub mod backup;
pub mod delayed;
pub mod email;
mod encoding;
pub mod encryption;
pub mod event_types;
pub mod events;
pub mod jobs;
pub mod marked;
pub mod media;
pub mod previews;
pub mod rooms;
pub mod state;
pub mod sync;

use bytes::Bytes;
use federation::ports::StoredDocument;

use crate::{
    ids::{DeviceNum, EventNum, Order, Position, RoomNum, SideNum, StateKeyNum, UserNum},
    schema::{
        marked::Marked,
        relations::{InThread, RelatedRow, RelationKind, RelationRow},
        remote::{InboundEventRow, InboundLineRow, InboundMessageRow, InboundTransactionRow},
        rooms::{
            AliasRow, AsideCount, AsideRow, EventKey, EventRow, Membership, Place, RedactionWaitingRow,
            RetentionRow, RoomRow, UserRoomRow,
        },
        state::{HoleRow, LeftOutRow, LogRow, NowRow, PurgeRow, SideRow, StageRow, StateKeyRow, StateValue},
    },
    store::{
        self,
        key::Json,
        tables::{TableInfo, tables},
    },
};

// id NAME(key => value) in Family, Domain of "owner" [, local];
tables! {
    /// The facts of this server by name: `server_name`, `signing_key` (version and seed, base64).
    9 SERVER_FACTS(String => String) in Log, Server of "server::identity";

    // --- rooms: 10-29 ---
    /// A room: its version, its heads, and the numbers that it gives next.
    10 ROOM(RoomNum => RoomRow) in State, Room of "rooms::change";
    /// The number of the room with this id.
    11 ROOM_ID(String => RoomNum) in Index, Room of "rooms::change";
    /// A room's visible events, live and back-filled.
    12 TIMELINE((RoomNum, Order) => EventRow) in Events, Room of "rooms::change";
    /// The place where the event of this number is kept.
    13 PLACE((RoomNum, EventNum) => Place) in Index, Room of "rooms::change";
    /// The room and the number of the event that has this name.
    14 EVENT_ID(EventKey => (RoomNum, EventNum)) in Index, Room of "rooms::change";
    /// The relation of one of our users to a room; it follows from the member event alone.
    15 USER_ROOM((UserNum, RoomNum) => Marked<UserRoomRow>) in Index, Room of "rooms::members";
    /// Our users who are joined or invited to a room, or knock.
    16 ROOM_USER((RoomNum, UserNum) => Marked<Membership>) in Index, Room of "rooms::members";
    /// The event that a device made, by (room, day, user, device, endpoint, transaction id).
    29 SENT((RoomNum, u32, UserNum, DeviceNum, String, String) => EventNum) in Index, Room of "rooms::change";
    /// The room that an alias names.
    19 ALIAS(String => Json<AliasRow>) in Index, Server of "rooms::aliases";
    /// The aliases of a room.
    20 ROOM_ALIAS((RoomNum, String) => ()) in Index, Server of "rooms::aliases";
    /// A room that the public directory lists.
    21 PUBLISHED(RoomNum => ()) in Index, Server of "rooms::directory";
    /// The event that a thread grows from, by the order of the thread's newest event.
    22 THREAD((RoomNum, Order) => EventNum) in Index, Room of "rooms::relations";
    /// A room's events that clients do not see: rejected, soft-failed.
    24 ASIDE((RoomNum, EventNum) => AsideRow) in Events, Room of "rooms::change";
    /// How many events a room keeps aside.
    153 ASIDE_COUNT(RoomNum => AsideCount) in Index, Room of "rooms::change";

    /// Events that refer to the event of this number, by kind and by their order.
    25 RELATION((RoomNum, EventNum, RelationKind, Order) => RelationRow) in Index, Room of "rooms::relations";
    /// The bundle of an event: its newest edit, its thread, how many refer to it.
    26 RELATED((RoomNum, EventNum) => RelatedRow) in Index, Room of "rooms::relations";
    /// How many events of the thread that grows from an event a user sent.
    27 THREAD_SENDER((RoomNum, EventNum, String) => u64) in Index, Room of "rooms::relations";
    /// The annotation that a user made; the last part is a hash of (user, event type, annotation key).
    28 ANNOTATED((RoomNum, EventNum, [u8; 16]) => EventNum) in Index, Room of "rooms::relations";

    // --- room state: 30-49 (the layout is explained in rooms/state.rs) ---
    /// The type and state key behind a number.
    30 STATE_KEY((RoomNum, StateKeyNum) => StateKeyRow) in Index, Room of "rooms::state";
    /// Room, type, state key: the number.
    31 STATE_KEY_NUM((RoomNum, String, String) => StateKeyNum) in Index, Room of "rooms::state";
    /// The current value of a state key; a key without a row is absent.
    32 STATE_NOW((RoomNum, StateKeyNum) => NowRow) in State, Room of "rooms::state";
    /// The value of a key just before it changed at this order.
    33 STATE_UNDO((RoomNum, StateKeyNum, Order) => StateValue) in State, Room of "rooms::state";
    /// The changes at an order, with the values before.
    34 STATE_LOG((RoomNum, Order) => LogRow) in State, Room of "rooms::state";
    /// The state of a fork, as a difference to another state.
    35 SIDE((RoomNum, SideNum) => SideRow) in State, Room of "rooms::state";
    /// State events that name this one among their auth events.
    36 AUTH_CHILD((RoomNum, EventNum, EventNum) => ()) in State, Room of "rooms::graph";
    /// A hole: events are missing in the room below this order.
    37 HOLE((RoomNum, Order) => HoleRow) in State, Room of "rooms::state";
    /// A step of a room that is larger than a batch, while its parts are being written.
    38 STAGE(RoomNum => StageRow) in State, Room of "rooms::state";
    /// A purge of a room's old states that is under way.
    39 PURGE(RoomNum => PurgeRow) in State, Room of "rooms::state";

    // --- accounts: 50-79 ---

    /// An account, with everything about it that each request asks.
    50 USERS(UserNum => accounts::UserRow) in Accounts, User of "accounts::users";
    /// The account that a localpart of this server names. A deactivated account keeps its name.
    51 USER_NAMES(String => UserNum) in Accounts, Server of "accounts::users";
    /// The hash of an account's password, as a PHC string; no row, no password.
    52 PASSWORDS(UserNum => String) in Accounts, User of "accounts::passwords";
    /// A device of a user, by its id.
    53 DEVICES((UserNum, String) => Json<accounts::DeviceRow>) in Accounts, User of "accounts::devices";
    /// An access token, by its SHA-256.
    54 ACCESS_TOKENS([u8; 32] => accounts::AccessTokenRow) in Accounts, User of "accounts::tokens";
    /// A refresh token, by its SHA-256.
    55 REFRESH_TOKENS([u8; 32] => Json<accounts::RefreshTokenRow>) in Accounts, User of "accounts::tokens";
    /// The tokens of a device: kind (0 access, 1 refresh) and hash.
    56 DEVICE_TOKENS((UserNum, DeviceNum, u8, [u8; 32]) => ()) in Accounts, User of "accounts::tokens";
    /// When and from where a device was last seen. It is written by notes, so a power cut may take it back.
    57 DEVICE_SEEN((UserNum, DeviceNum) => Json<accounts::SeenRow>) in Notes, User of "accounts::devices";
    /// The presence of a user that others were told last. It is written by notes, so a power cut may take it back.
    65 PRESENCE(UserNum => Json<accounts::PresenceRow>) in Notes, User of "accounts::presence";
    /// A token with which one may register.
    58 REGISTRATION_TOKENS(String => Json<accounts::RegistrationTokenRow>) in Accounts, Server of "accounts::registration";
    /// A field of a local user's profile: its JSON value.
    59 PROFILES((UserNum, String) => Bytes) in Accounts, User of "accounts::profiles";
    /// Account data: room id ("" is global) and type.
    60 ACCOUNT_DATA((UserNum, String, String) => accounts::WrittenRow) in Accounts, User of "accounts::account_data";
    /// The account data that was written at a position: room id and type. It counts only while the row still says that position.
    61 ACCOUNT_DATA_LOG((UserNum, Position) => Json<accounts::AccountDataKey>) in Accounts, User of "accounts::account_data";
    /// A filter that a user uploaded, by its id.
    62 FILTERS((UserNum, String) => Bytes) in Accounts, User of "accounts::filters";
    /// A user who asked to be erased. Events that they wrote are shown redacted to everybody who was not in the room then.
    63 ERASED_USERS(String => ()) in Accounts, User of "accounts::users";
    /// How much account data a user has. Without a row it is counted when the user next writes some.
    64 ACCOUNT_DATA_SIZE(UserNum => accounts::DataSize) in Accounts, User of "accounts::account_data";

    /// A report that a user made to those who run this server, by the name of what is reported.
    66 REPORTS((UserNum, String) => Json<reports::ReportRow>) in Accounts, User of "accounts::reports";

    // --- encryption: 80-99 ---

    /// A message that waits for a device: its JSON, sender and type within.
    80 INBOX((UserNum, DeviceNum, Position) => Bytes) in Queues, User of "encryption::inbox";
    /// The position up to which a device has confirmed its inbox, and what still waits in it.
    81 INBOX_STATE((UserNum, DeviceNum) => encryption::InboxState) in Queues, User of "encryption::inbox";
    /// How far a to-device request of a device was carried out: event type and transaction id.
    82 TO_DEVICE_TXNS((UserNum, DeviceNum, String, String) => encryption::SendProgress) in Queues, User of "encryption::to_device";
    /// When the device list of a user (of any server) last changed.
    83 DEVICE_CHANGED(String => Position) in Crypto, User of "encryption::device_lists";
    /// The user whose device list changed at a position. It counts only while DEVICE_CHANGED still says that position.
    84 DEVICE_LOG(Position => String) in Crypto, User of "encryption::device_lists";
    /// The signed identity keys of a device, as it uploaded them.
    85 DEVICE_KEYS((UserNum, DeviceNum) => Bytes) in Crypto, User of "encryption::keys";
    /// A one-time key that nobody has claimed: algorithm, when it was uploaded, key id.
    86 ONE_TIME_KEYS((UserNum, DeviceNum, String, Position, String) => Bytes) in Crypto, User of "encryption::keys";
    /// The key of an algorithm that is given when no one-time key is left.
    87 FALLBACK_KEYS((UserNum, DeviceNum, String) => Json<encryption::FallbackRow>) in Crypto, User of "encryption::keys";
    /// The counts of what is left of a device's keys.
    88 KEY_COUNTS((UserNum, DeviceNum) => Json<encryption::KeyCounts>) in Crypto, User of "encryption::keys";
    /// When a to-device request was first carried out: milliseconds since the epoch, type, transaction id.
    89 TO_DEVICE_TXN_LOG((UserNum, DeviceNum, u64, String, String) => ()) in Queues, User of "encryption::to_device";
    /// The messages of one sender, or of another server by its name after a colon, that wait for a device.
    90 INBOX_SHARE((UserNum, DeviceNum, String) => encryption::InboxShare) in Queues, User of "encryption::inbox";
    /// The messages of an inbox that are requests for room keys: they make room when it is full.
    91 INBOX_KEY_REQUEST((UserNum, DeviceNum, Position) => ()) in Queues, User of "encryption::inbox";
    /// A one-time key that was given, under the key that its row in ONE_TIME_KEYS had: the digest by which it is known again.
    92 GIVEN_KEYS((UserNum, DeviceNum, String, Position, String) => Bytes) in Crypto, User of "encryption::keys";
    /// The messages of an inbox that came from another server, by server: how many bytes each has.
    93 INBOX_OF_SERVER((UserNum, DeviceNum, String, Position) => u64) in Queues, User of "encryption::inbox";
    /// The device list of a user of another server, as it is kept here: server and user id.
    94 OTHER_LIST((String, String) => Json<encryption::OtherListRow>) in Crypto, User of "encryption::elsewhere";
    /// A device of a kept list: the user's id and the device's.
    95 OTHER_DEVICE((String, String) => Json<encryption::OtherDeviceRow>) in Crypto, User of "encryption::elsewhere";
    /// How much is kept of the device lists of a server.
    96 OTHER_COUNT(String => encryption::OtherCount) in Crypto, User of "encryption::elsewhere";
    /// The device that changed when the device list of a user of ours changed at a position: one of the last changes.
    97 DEVICE_STEP((UserNum, Position) => encryption::DeviceStepRow) in Crypto, User of "encryption::device_lists";

    // --- key backups, dehydrated devices: 215-220 ---

    /// A version of a user's backup of room keys, without the keys.
    215 BACKUP((UserNum, u64) => Json<backup::BackupRow>) in Crypto, User of "encryption::backup";
    /// How much a version of a backup holds, and its etag.
    216 BACKUP_STATE((UserNum, u64) => backup::BackupState) in Crypto, User of "encryption::backup";
    /// How much a version of a backup holds of a room.
    217 BACKUP_ROOM((UserNum, u64, String) => backup::BackupShare) in Crypto, User of "encryption::backup";
    /// A key of a version of a backup: room id and session id.
    218 BACKUP_KEY((UserNum, u64, String, String) => backup::BackedUpKey) in Crypto, User of "encryption::backup";
    /// The number that the last version of a user's backup was given.
    219 BACKUP_LAST(UserNum => u64) in Crypto, User of "encryption::backup";

    /// The dehydrated device of a user (MSC3814), with the data by which a client uses it.
    220 DEHYDRATED(UserNum => Json<accounts::DehydratedRow>) in Accounts, User of "accounts::dehydrated";

    // --- cross-signing: 205-209 ---

    /// A key with which a user of ours signs keys, by its usage (1 master, 2 self-signing, 3 user-signing).
    205 CROSS_SIGNING_KEYS((UserNum, u8) => Bytes) in Crypto, User of "encryption::cross_signing";
    /// The signature of a user's self-signing key over the identity keys of a device of the user.
    206 DEVICE_SIGNED((UserNum, DeviceNum) => Json<encryption::SignatureRow>) in Crypto, User of "encryption::cross_signing";
    /// The signature of a device over the master key of its user.
    207 MASTER_SIGNED((UserNum, DeviceNum) => Json<encryption::SignatureRow>) in Crypto, User of "encryption::cross_signing";
    /// The signature of a user's user-signing key over the master key of another user; under the user's own id, that the user-signing key
    /// changed. The user alone is told.
    208 SIGNED_USERS((UserNum, String) => accounts::WrittenRow) in Crypto, User of "encryption::cross_signing";
    /// The user whose row in SIGNED_USERS was written at a position.
    209 SIGNED_USERS_LOG((UserNum, Position) => String) in Crypto, User of "encryption::cross_signing";

    // --- push: 100-109 ---

    /// The push rules of a user who has changed them.
    100 PUSH_RULES(UserNum => accounts::WrittenRow) in Accounts, User of "push::rules";
    /// How much has notified, by class of rules, up to and including an event; a row for each event that notifies a class.
    101 UNREAD((RoomNum, push::Lane, Order) => push::Totals) in Index, Room of "push::unread";
    /// The last event of a thread that has a row in UNREAD.
    102 UNREAD_THREAD((RoomNum, push::Lane) => Order) in Index, Room of "push::unread";
    /// The threads with news: the last rows of threads in UNREAD_THREAD, by their order.
    103 UNREAD_THREAD_LOG((RoomNum, Order) => push::Lane) in Index, Room of "push::unread";
    /// The outcome of an event for the counts of a user whom it concerns in person: it mentions or invites them.
    104 UNREAD_OWN((RoomNum, UserNum, Order) => push::OwnOutcome) in Index, Room of "push::unread";
    /// Events that counted as unread and were redacted, so that their outcome is taken back.
    105 UNREAD_REDACTED((RoomNum, Order) => push::RedactedOutcome) in Index, Room of "push::unread";

    /// The last event that a user sent in a lane: what stands there up to it is read.
    108 UNREAD_SENT((RoomNum, UserNum, push::Lane) => Order) in Index, Room of "push::unread";

    /// A pusher of a user, by app id and pushkey.
    106 PUSHERS((UserNum, String, String) => Json<push::PusherRow>) in Accounts, User of "push::pushers";
    /// The users who have a pusher of this app id and pushkey.
    107 PUSHER_OWNERS((String, String, UserNum) => ()) in Accounts, User of "push::pushers";
    /// How far a pusher has come, by user, app id and pushkey. The pusher's own row says whether there is one. Whoever moves it expects the
    /// row that they read.
    109 PUSHER_PLACES((UserNum, String, String) => push::PusherPlace) in Notes, Store of "push::places";

    // --- sync and notes: 110-129 ---

    /// How far a user has read a room: user id, kind, thread ("" the whole room, "main", or the root's id).
    110 RECEIPTS((RoomNum, String, receipts::ReceiptKind, String) => receipts::ReceiptRow) in Index, Room of "rooms::receipts";
    /// The public receipt of a room that was stored at a position. It counts only while the receipt still says that position.
    111 RECEIPT_LOG((RoomNum, Position) => Json<receipts::ReceiptKey>) in Index, Room of "rooms::receipts";
    /// The private receipt of a user in a room that was stored at a position. It counts only while the receipt still says that
    /// position. The rows of each user stand apart, so that looking for one's own reads nobody else's.
    112 PRIVATE_RECEIPT_LOG((RoomNum, String, Position) => Json<receipts::ReceiptKey>) in Index, Room of "rooms::receipts";

    /// A connection of sliding sync, by the id that its client gives it. It is written by notes, so a crash may take it back.
    113 SYNC_CONNECTION((UserNum, DeviceNum, String) => Json<sync::ConnectionRow>) in Notes, User of "sync::connections";
    /// A share of the rooms that a connection was told, by the connection's number. It is written by notes.
    114 SYNC_CONNECTION_ROOMS((UserNum, DeviceNum, u64, u8) => sync::ConnectionRooms) in Notes, User of "sync::connections";

    // --- rooms, more of them: 150-169 ---

    /// Redactions of an event that is not here yet: room, the event's id, the redaction.
    150 REDACTION_WAITING((RoomNum, EventKey, EventNum) => RedactionWaitingRow) in Index, Room of "rooms::change";
    /// The JSON of an event before it was redacted, for moderators, until a timer deletes it.
    151 REDACTED_ORIGINAL((RoomNum, EventNum) => Bytes) in Events, Room of "rooms::redact";
    /// The state event that the redaction at this place of the timeline redacted, so that clients whom the redaction is not shown to
    /// can be told.
    155 REDACTED_STATE((RoomNum, Order) => EventNum) in Index, Room of "rooms::redact";
    /// How many users of a server are in a room now.
    152 SERVER_MEMBERS((RoomNum, String) => Marked<u64>) in Index, Room of "rooms::members";
    /// The thread in which an event stands, by itself or by what it refers to; events of the main timeline have no row.
    154 IN_THREAD((RoomNum, EventNum) => InThread) in Index, Room of "rooms::relations";
    /// An event that refers to one which is not here: the name of that, and the event.
    156 RELATION_WAITING((RoomNum, rooms::EventKey, EventNum) => ()) in Index, Room of "rooms::relations";
    /// An event of the state that a join brought, or one that allows such an event, which could not be believed then: room, type,
    /// state key, number.
    157 LEFT_OUT((RoomNum, String, String, u64) => LeftOutRow) in Queues, Room of "rooms::change";

    /// How far the messages of a room whose lifetime is over have been dealt with.
    158 RETENTION(RoomNum => RetentionRow) in Index, Room of "rooms::change";

    // --- other servers: 170-189 ---

    /// A signing key of another server, by its id. It is written by notes, because it can be fetched again.
    170 SERVER_KEYS((String, String) => Json<remote::ServerKeyRow>) in Notes, Store of "flows::remote", local;
    /// The newest document in which another server published its keys, for those who ask us as a notary.
    171 SERVER_DOCUMENTS(String => Json<StoredDocument>) in Notes, Store of "flows::remote", local;
    /// The tokens by which a user shows other services who they are.
    176 OPENID_TOKENS(UserNum => Json<accounts::OpenIdRow>) in Accounts, User of "accounts::openid";
    /// The last transactions of another server, each in one of a few rows that are used in turn.
    172 INBOUND_TRANSACTION((String, u8) => Json<InboundTransactionRow>) in Queues, Store of "flows::remote";
    /// An event of another server that could not be judged yet, by the order in which it came.
    173 INBOUND_EVENT((RoomNum, u64) => InboundEventRow) in Queues, Store of "flows::remote";
    /// A message between devices that another server sent, by the id that it gave it.
    174 INBOUND_MESSAGE((String, String) => InboundMessageRow) in Queues, Store of "flows::remote";
    /// The messages that are remembered of a server, of strangers together, and the servers whose transactions are: the oldest go.
    179 INBOUND_LINE((String, u64) => Json<InboundLineRow>) in Queues, Store of "flows::remote";

    // --- delivery to other servers ---

    /// The first event of a room that a server was not told, where it missed some: one row a room, however much it missed.
    181 BEHIND((String, RoomNum) => Position) in Queues, Store of "delivery::servers::marks";
    /// The first change of the device list of a user of ours that a server was not told, where it missed some: one row a user.
    185 DEVICES_BEHIND((String, UserNum) => Position) in Queues, Store of "delivery::servers::marks";
    /// A server that does not answer: since when, and when it is tried again. It is written by notes.
    182 DESTINATION(String => Json<remote::DestinationRow>) in Notes, Store of "delivery::servers::marks";
    /// A signing key of this server beside the one in use: it signs from the next start on, or has ended.
    184 SIGNING_KEYS(String => Json<remote::SigningKeyRow>) in Log, Server of "flows::operator::signing_keys";
    /// A message of one of our users for devices of another server, until that server has taken it.
    183 OUTBOX((String, Position) => remote::OutboxRow) in Queues, Store of "delivery::servers::outbox";
    /// The membership of a user of ours in a room that this server is not in, as it was told: an invitation, a knock, or the end of either.
    178 OUTSIDE((RoomNum, UserNum) => Json<remote::OutsideRow>) in State, Room of "rooms::change";
    /// The servers whose users have invited a user of ours to a room from outside: these rows are counted.
    180 INVITED((UserNum, String, RoomNum) => ()) in Index, Room of "rooms::change";

    // --- what users have the server do for them: 190-199 ---

    /// The standing of a user towards a thread, by its room and root, once they subscribed to it.
    196 SUBSCRIPTION((UserNum, RoomNum, EventNum) => accounts::WrittenRow) in Accounts, User of "accounts::subscriptions";
    /// The thread to which a user became something else at a position. It counts only while the row still says that position.
    197 SUBSCRIPTION_LOG((UserNum, Position) => (RoomNum, EventNum)) in Accounts, User of "accounts::subscriptions";
    /// The number of threads to which a user is something.
    198 SUBSCRIPTION_COUNT(UserNum => u64) in Accounts, User of "accounts::subscriptions";

    /// An event that a user has scheduled, by its id, until some time after it was sent or came to nothing.
    190 DELAYED((UserNum, String) => Json<delayed::DelayedRow>) in Queues, User of "rooms::delayed";
    /// The delayed events of a user that wait, by the time at which they are due or tried again.
    191 DELAYED_DUE((UserNum, u64, String) => delayed::DueRow) in Queues, User of "rooms::delayed";
    /// The delayed events of a user that have ended, by the time of that.
    192 DELAYED_ENDED((UserNum, u64, String) => ()) in Queues, User of "rooms::delayed";
    /// When the timer of a user for the delayed events is due, while one is set.
    199 DELAYED_TIMER(UserNum => u64) in Queues, User of "rooms::delayed";
    /// A sticky event of a room, by the position at which it became part of the timeline, until some time after it ceased to be sticky.
    193 STICKY((RoomNum, Position) => rooms::StickyRow) in Index, Room of "rooms::sticky";
    /// The sticky events of a room by their sender.
    194 STICKY_SENDER((RoomNum, String, Position) => ()) in Index, Room of "rooms::sticky";
    /// A sticky event that is soft-failed, by its sender: until when it is sticky.
    195 STICKY_ASIDE((RoomNum, String, EventNum) => u64) in Index, Room of "rooms::sticky";

    // --- media: 221-229 ---

    /// A blob by the SHA-256 of its bytes: they are stored once, however many items have them.
    221 MEDIA_BLOB([u8; 32] => Json<media::BlobRow>) in Index, Server of "media::objects";
    /// An item or a thumbnail that has the bytes of a blob: server and media id, and the kind of thumbnail or nothing.
    222 MEDIA_REF(([u8; 32], String, String, String) => ()) in Index, Server of "media::objects";
    /// The number and the bytes of all blobs.
    223 MEDIA_TOTAL(() => Json<media::TotalRow>) in Index, Server of "media::objects";
    /// An item by server and media id, of this server or fetched from another.
    224 MEDIA_ITEM((String, String) => Json<media::ItemRow>) in Index, Server of "media::items";
    /// The items of a user by the time at which they were made.
    225 MEDIA_OF_USER((UserNum, u64, String) => ()) in Accounts, User of "media::items";
    /// How much media a user has.
    226 MEDIA_USED(UserNum => Json<media::UsedRow>) in Accounts, User of "media::items";
    /// When an item was last given to somebody, by server and media id. It is written by notes, an hour apart.
    227 MEDIA_SEEN((String, String) => u64) in Notes, Store of "media::items", local;
    /// A thumbnail of an item: server, media id, and the kind of thumbnail.
    228 MEDIA_THUMBNAIL((String, String, String) => Json<media::ThumbnailRow>) in Index, Server of "media::items";

    // --- previews of URLs: 230-231 ---

    /// The outcome of asking for a page of the web, by the SHA-256 of its URL and the time at which it was asked, in milliseconds
    /// since the epoch.
    230 URL_PREVIEW(([u8; 32], u64) => Json<previews::PreviewRow>) in Notes, Server of "media::preview::rows", local;

    // --- temporary links: 232-233 ---

    /// A temporary link to an item of media, by the SHA-256 of its token.
    232 MEDIA_LINK([u8; 32] => Json<media::LinkRow>) in Accounts, User of "media::links";
    /// The links of a user by their ids: the SHA-256 of the token.
    233 MEDIA_LINK_OF_USER((UserNum, String) => Json<media::Digest>) in Accounts, User of "media::links";

    // --- media that was made smaller: 234-236 ---

    /// The file as its user has uploaded it, by server and media id of the item, which has a smaller one.
    234 MEDIA_ORIGINAL((String, String) => Json<media::ContentRow>) in Index, Server of "media::items";
    // --- e-mail: 240-244 ---

    /// An e-mail address of an account, in its canonical form.
    240 EMAILS((UserNum, String) => Json<email::AddressRow>) in Accounts, User of "accounts::emails";
    /// The account that has an e-mail address.
    241 EMAIL_OWNERS(String => UserNum) in Accounts, Server of "accounts::emails";
    /// A user's wishes for digests by e-mail.
    242 EMAIL_PREFERENCES(UserNum => Json<email::PreferencesRow>) in Accounts, User of "push::mailboxes";
    /// The state of a pusher of kind `email`, by user, app id and pushkey. The pusher's own row says whether there is one. Whoever moves
    /// it expects the row that they read.
    243 MAILBOXES((UserNum, String, String) => Json<email::MailboxRow>) in Notes, Store of "push::mailboxes";
}

/// Lists all tables, those of the store included.
pub fn all() -> impl Iterator<Item = &'static TableInfo> {
    store::tables::TABLES.iter().chain(TABLES)
}

/// Encodes a value and decodes it again, as a row of the store is.
#[cfg(test)]
pub(crate) fn round_trip<V: store::key::Value>(value: &V) -> V {
    let mut to = store::key::Encoder::default();
    value.encode(&mut to);
    V::decode(to.bytes.into()).unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_ids_are_unique() {
        let mut ids: Vec<_> = all().map(|table| table.id).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), all().count());
    }

    #[test]
    fn every_table_stands_in_the_document_of_the_store() {
        let document = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/store.md");
        let document = std::fs::read_to_string(document).unwrap();
        let row = |line: &str| {
            let mut cells = line.split('|').map(str::trim).skip(1);
            let id = cells.next()?.parse::<u8>().ok()?;
            Some((id, cells.next()?.trim_matches('`').to_owned(), cells.next()?.to_owned()))
        };
        let mut written: Vec<_> = document.lines().filter_map(row).collect();
        let mut tables: Vec<_> =
            all().map(|table| (table.id, table.name.to_owned(), format!("{:?}", table.domain))).collect();
        written.sort();
        tables.sort();
        assert_eq!(written, tables, "docs/store.md has a line for each table, with its id, name and domain");
    }
}
