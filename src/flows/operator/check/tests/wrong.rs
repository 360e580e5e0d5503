//! Rows that say something wrong, and the list of all kinds of faults that a check can report.

use super::*;
use crate::{
    ids::StateKeyNum,
    schema::{
        accounts::{RegistrationTokenRow, WrittenRow},
        backup::{BackedUpKey, BackupShare},
        email::{AddressRow, MailboxRow},
        encryption::{FallbackRow, OtherCount, OtherDeviceRow, OtherListRow, SignatureRow},
        media::{BlobRow, BlobState, Digest, ItemRow, LinkRow},
        previews::PreviewRow,
        receipts::{ReceiptKey, ReceiptKind},
        relations::{RelatedRow, RelationRow},
        remote::OutsideRow,
        rooms::{RoomRow, UserRoomRow},
        state::{NowRow, StateRef},
    },
    store::{
        Table,
        key::{Encoder, Json, Key, Value},
    },
};

/// The sources of all checks.
const SOURCES: [&str; 19] = [
    include_str!("../../check.rs"),
    include_str!("../../../../store/check.rs"),
    include_str!("../../../../store/check/own.rs"),
    include_str!("../../../../accounts/check.rs"),
    include_str!("../../../../rooms/check.rs"),
    include_str!("../../../../rooms/check/delayed.rs"),
    include_str!("../../../../rooms/check/events.rs"),
    include_str!("../../../../rooms/check/sticky.rs"),
    include_str!("../../../../rooms/relations/check.rs"),
    include_str!("../../../../rooms/state/check.rs"),
    include_str!("../../../../rooms/state/check/staged.rs"),
    include_str!("../../../../encryption/check.rs"),
    include_str!("../../../../encryption/backup/check.rs"),
    include_str!("../../../../push/check.rs"),
    include_str!("../../../../media/check.rs"),
    include_str!("../../../../media/preview/check.rs"),
    include_str!("../../../remote/check.rs"),
    include_str!("../../../../delivery/check.rs"),
    include_str!("../../../../sync/connections/check.rs"),
];

/// These texts of the sources are no faults.
const NO_FAULTS: [&str; 2] = ["a row takes too long to judge beside a running server", "reading rows"];

/// The texts of the sources that say what is wrong, of which no finding has the longest fixed part.
pub(super) fn list_unsaid(said: &[String]) -> Vec<String> {
    let mut unsaid = Vec::new();
    for source in SOURCES {
        let code = source.split("#[cfg(test)]").next().unwrap();
        let code: String = code.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
        for text in code.split('"').skip(1).step_by(2) {
            let fixed = text.split(['{', '}']).step_by(2).max_by_key(|part| part.len()).unwrap();
            let is_fault = fixed.trim().contains(' ') && !NO_FAULTS.contains(&text);
            if is_fault && !said.iter().any(|finding| finding.contains(fixed)) {
                unsaid.push(text.to_owned());
            }
        }
    }
    unsaid
}

/// Puts one wrong row after the other into the store, each of which the check must name, and takes it out again.
pub(super) fn damage_each(fixture: &Fixture, said: &mut Vec<String>) {
    let mut wrong = Wrong { fixture, said };
    wrong.say_of_the_store();
    wrong.say_of_accounts();
    wrong.say_of_encryption();
    wrong.say_of_rooms();
    wrong.say_of_events();
    wrong.say_of_states();
    wrong.say_of_other_servers();
    wrong.say_of_delivery();
    wrong.say_of_connections();
    wrong.say_of_media();
}

struct Wrong<'f> {
    fixture: &'f Fixture,
    /// Everything that the check said.
    said: &'f mut Vec<String>,
}

/// The bytes of a row that say nothing.
fn no_json() -> Bytes {
    Bytes::from_static(b"{")
}

impl Wrong<'_> {
    fn say_of_media(&mut self) {
        use BlobState::{Live, Pending, Removing};
        let is = |row: &BlobRow, state| row.state == state;
        self.change(&schema::MEDIA_BLOB, "its state does not fit what refers to it", |_, Json(row)| {
            is(&row, Live).then_some(Json(BlobRow { state: Removing, ..row }))
        });
        self.change(&schema::MEDIA_BLOB, "its state does not fit its timer", |_, Json(row)| {
            is(&row, Pending).then_some(Json(BlobRow { due_ms: None, ..row }))
        });
        self.change(&schema::MEDIA_BLOB, "its timer is gone", |_, Json(row)| {
            is(&row, Pending).then_some(Json(BlobRow { due_ms: Some(1), ..row }))
        });
        self.change(&schema::MEDIA_ITEM, "it neither has bytes nor waits for some", |_, Json(row)| {
            Some(Json(ItemRow { content: None, expires_ms: None, ..row }))
        });
        self.change(&schema::MEDIA_ITEM, "it is the image of a preview", |_, Json(row)| {
            row.by.is_some().then_some(Json(ItemRow { is_preview: true, ..row }))
        });
        self.change(&schema::URL_PREVIEW, "it is of another URL", |_, Json(row)| {
            Some(Json(PreviewRow { url: "https://b.example/".to_owned(), ..row }))
        });
        self.change(&schema::URL_PREVIEW, "it is told for another time", |_, Json(row)| {
            Some(Json(PreviewRow { until_ms: row.until_ms + 1, ..row }))
        });
        self.change(&schema::URL_PREVIEW, "its image is no item of media", |_, Json(row)| {
            Some(Json(PreviewRow { told: None, ..row }))
        });
        self.change(&schema::MEDIA_LINK, "the user of the link does not list it", |_, Json(row)| {
            Some(Json(LinkRow { id: "other".to_owned(), ..row }))
        });
        self.change(&schema::MEDIA_LINK, "the timer of the link is gone", |_, Json(row)| {
            Some(Json(LinkRow { expires_ms: row.expires_ms + 1, ..row }))
        });
        self.change(&schema::MEDIA_LINK_OF_USER, "there is no such link of the user", |_, _| {
            Some(Json(Digest([9; 32])))
        });
        let item = rows(self.fixture, &schema::MEDIA_ITEM).next().unwrap().2;
        self.add(&schema::MEDIA_ITEM, "this is no media id", ("check.example", "../x"), &item);
    }

    /// Makes changes behind the store's back, and takes them back after the check has said this of this table.
    fn check(&mut self, table: &str, expected: &str, changes: Vec<Change>) {
        let snapshot = self.fixture.store().snapshot();
        let mut undo = Vec::new();
        for change in changes {
            let Change::Row(family, key, _) = &change else { panic!("rows are changed one by one") };
            undo.push(Change::Row(*family, key.clone(), snapshot.get_raw(*family, key).unwrap()));
            self.fixture.damage(change);
        }
        let findings = self.fixture.findings();
        let is_it = |finding: &&String| finding.starts_with(table) && finding.contains(expected);
        assert!(findings.iter().any(|finding| is_it(&finding)), "{table}, {expected}: {findings:?}");
        self.said.extend(findings);
        undo.into_iter().for_each(|change| self.fixture.damage(change));
    }

    /// Adds a row under a key that has none.
    fn add<K: Key, V: Value>(&mut self, table: &Table<K, V>, expected: &str, key: K::Ref<'_>, row: &V) {
        let row = put(table, table.key_bytes::<K>(key).bytes.into(), row);
        self.check(table.name, expected, vec![row]);
    }

    /// Changes the first row of a table for which `wrong` gives another.
    fn change<K: Key, V: Value>(
        &mut self,
        table: &Table<K, V>,
        expected: &str,
        wrong: impl Fn(&K, V) -> Option<V>,
    ) {
        let change = rows(self.fixture, table).find_map(|(bytes, key, row)| Some((bytes, wrong(&key, row)?)));
        let (key, row) = change.unwrap_or_else(|| panic!("no row of {} can be {expected}", table.name));
        self.check(table.name, expected, vec![put(table, key, &row)]);
    }

    fn say_of_other_servers(&mut self) {
        self.change(&schema::INBOUND_TRANSACTION, "belongs into another row", |_, Json(row)| {
            Some(Json(InboundTransactionRow { number: row.number + 1, ..row }))
        });
        self.change(&schema::INBOUND_LINE, "it stands in the line of another server", |_, Json(row)| {
            Some(Json(InboundLineRow { origin: "c.example".to_owned(), ..row }))
        });
        self.change(&schema::INBOUND_TRANSACTION, "its answer is not JSON", |_, Json(row)| {
            Some(Json(InboundTransactionRow { answer: "{".to_owned(), ..row }))
        });
        self.change(&schema::INBOUND_EVENT, "the event that waits is not JSON", |_, row| {
            Some(InboundEventRow { json: no_json(), ..row })
        });
        self.change(&schema::INBOUND_EVENT, "it came from no server", |_, row| {
            Some(InboundEventRow { origin: "no name!".to_owned(), ..row })
        });
        let waits = rows(self.fixture, &schema::INBOUND_EVENT).next().unwrap().2;
        self.add(&schema::INBOUND_EVENT, "for which it waits does not exist", (RoomNum(99), 1), &waits);
    }

    fn say_of_delivery(&mut self) {
        let (room, at) = (rows(self.fixture, &schema::ROOM).next().unwrap().1, Position::new(3).unwrap());
        self.add(&schema::BEHIND, "its name is no name of a server", ("no name!", room), &at);
        self.add(&schema::BEHIND, "misses events of does not exist", ("b.example", RoomNum(99)), &at);
        let user = UserNum(99);
        self.add(&schema::DEVICES_BEHIND, "misses changes of does not exist", ("b.example", user), &at);
        self.change(&schema::DESTINATION, "it has not failed", |_, Json(mut row)| {
            row.failing.failures = 0;
            Some(Json(row))
        });
        let Json(key) = rows(self.fixture, &schema::SIGNING_KEYS).next().unwrap().2;
        self.add(&schema::SIGNING_KEYS, "is that of no signing key", "x", &Json(key));
        self.change(&schema::SIGNING_KEYS, "it neither waits nor has ended", |_, Json(mut row)| {
            row.expired_ms = None;
            Some(Json(row))
        });
        self.change(&schema::OUTBOX, "the news is not JSON", |_, mut row| {
            row.json = no_json();
            Some(row)
        });
        let message = rows(self.fixture, &schema::OUTBOX).next().unwrap().2;
        let elsewhere = rows(self.fixture, &store::tables::LOG)
            .find_map(|(_, at, entry)| matches!(entry, store::LogEntry::Event { .. }).then_some(at));
        let key = ("b.example", elsewhere.unwrap());
        self.add(&schema::OUTBOX, "that something else happened there", key, &message);
    }

    fn say_of_connections(&mut self) {
        self.change(&schema::SYNC_CONNECTION, "its next step is not a later one", |_, Json(mut row)| {
            row.next = Some(row.base);
            Some(Json(row))
        });
        let rooms = &schema::SYNC_CONNECTION_ROOMS;
        self.change(rooms, "belongs into another part", |_, mut row| {
            row.rooms.first_mut()?.0.0 += 1;
            Some(row)
        });
        self.change(rooms, "its rooms do not rise", |_, mut row| {
            row.rooms.push(row.rooms.first()?.clone());
            Some(row)
        });
        self.change(rooms, "was told are none of the connection", |_, mut row| {
            row.rooms.first_mut()?.1.last_mut()?.0 += 1;
            Some(row)
        });
    }

    fn say_of_the_store(&mut self) {
        let nothing = Some(Bytes::new());
        let stray = Change::Row(Family::Index, Bytes::from_static(&[249, 0]), nothing);
        self.check("family index", "has a row of no table", vec![stray]);
        self.change(&schema::SERVER_FACTS, "the name of no server", |name, _| {
            (name == "server_name").then(|| "no name!".to_owned())
        });
        self.change(&store::tables::HEAD, "is impossible in this store", |name, _| {
            (name == "layout").then_some(99)
        });
        let begins = Position::first_of_incarnation(1);
        self.add(&store::tables::INCARNATION, "which is one of its own positions", 1, &begins);
        let table = &store::tables::INCARNATION;
        let first = Change::Row(table.family, table.key_bytes::<u16>(0).bytes.into(), None);
        let second = put(table, table.key_bytes::<u16>(1).bytes.into(), &Position::ZERO);
        self.check(table.name, "the store has no earlier incarnation", vec![first, second]);
        let aside = rows(self.fixture, &schema::ASIDE).next().unwrap().1.1;
        self.change(&store::tables::LOG, "is not in its timeline", |_, entry| match entry {
            LogEntry::Event { room, .. } => Some(LogEntry::Event { room, event: aside }),
            _ => None,
        });
    }

    fn say_of_accounts(&mut self) {
        self.add(&schema::ERASED_USERS, "this is no user id", "nobody", &());
        self.change(&schema::PROFILES, "it is not JSON", |_, _| Some(no_json()));
        self.change(&schema::OPENID_TOKENS, "it holds too many tokens", |_, Json(mut row)| {
            let token = row.tokens.pop().unwrap();
            row.tokens = vec![token; 1 + crate::accounts::openid::TOKENS_MAX];
            Some(Json(row))
        });
        self.change(&schema::REPORTS, "it is about something else than its name says", |_, Json(mut row)| {
            row.subject =
                crate::schema::reports::Subject::User { user_id: "@carol:b.example".try_into().unwrap() };
            Some(Json(row))
        });
        self.change(&schema::FILTERS, "it is not JSON", |_, _| Some(no_json()));
        self.change(&schema::ACCOUNT_DATA, "it is not JSON", |_, row| {
            Some(WrittenRow { content: no_json(), ..row })
        });
        self.change(&schema::PUSH_RULES, "they are not push rules", |_, row| {
            Some(WrittenRow { content: Bytes::from_static(b"7"), ..row })
        });
        self.change(
            &schema::DEHYDRATED,
            "the data of the dehydrated device is not JSON",
            |_, Json(mut row)| {
                row.device_data = "{".to_owned();
                Some(Json(row))
            },
        );
        let address = AddressRow { validated_ms: 1, added_ms: 1 };
        let key = (UserNum(1), "Alice@example.org");
        let why = "it is no e-mail address in its canonical form";
        self.add(&schema::EMAILS, why, key, &Json(address));
        self.change(&schema::MAILBOXES, "its link has no secret", |_, Json(row)| {
            Some(Json(MailboxRow { secret: String::new(), ..row }))
        });
        self.change(&schema::REGISTRATION_TOKENS, "it was used too often", |_, Json(row)| {
            Some(Json(RegistrationTokenRow { uses_max: Some(1), uses: 2, ..row }))
        });
    }

    fn say_of_encryption(&mut self) {
        self.change(&schema::INBOX, "it is not JSON", |_, _| Some(no_json()));
        self.change(&schema::DEVICE_KEYS, "they are not JSON", |_, _| Some(no_json()));
        self.change(
            &schema::DEVICE_STEP,
            "comes before the change that it follows",
            |(_, position), mut row| {
                row.prev = Some(*position);
                Some(row)
            },
        );
        let Json(list) = rows(self.fixture, &schema::OTHER_LIST).next().unwrap().2;
        self.add(
            &schema::OTHER_LIST,
            "not of its server",
            ("c.example", "@dan:b.example"),
            &Json(list.clone()),
        );
        self.add(
            &schema::OTHER_LIST,
            "not counted for its server",
            ("c.example", "@dan:c.example"),
            &Json(list),
        );
        self.change(&schema::OTHER_LIST, "are said to be kept", |_, Json(row)| {
            Some(Json(OtherListRow { bytes: row.bytes + 1, ..row }))
        });
        self.change(&schema::OTHER_DEVICE, "its keys are not JSON", |_, Json(row)| {
            Some(Json(OtherDeviceRow { keys: "{".to_owned(), ..row }))
        });
        let Json(device) = rows(self.fixture, &schema::OTHER_DEVICE).next().unwrap().2;
        self.add(&schema::OTHER_DEVICE, "no list for it", ("@dan:c.example", "DEV"), &Json(device));
        self.change(&schema::OTHER_COUNT, "is said to be kept of a server", |_, count| {
            Some(OtherCount { users: count.users + 1, ..count })
        });
        self.change(&schema::ONE_TIME_KEYS, "it is not JSON", |_, _| Some(no_json()));
        self.change(&schema::FALLBACK_KEYS, "it is not JSON", |_, Json(row)| {
            Some(Json(FallbackRow { key: "{".to_owned(), ..row }))
        });
        let (_, (user, device, algorithm, position, id), key) =
            rows(self.fixture, &schema::ONE_TIME_KEYS).next().unwrap();
        self.change(&schema::CROSS_SIGNING_KEYS, "it is no key with which one can sign", |_, _| {
            Some(Bytes::from_static(b"{}"))
        });
        self.change(&schema::DEVICE_SIGNED, "its user has another self-signing key", |_, Json(row)| {
            Some(Json(SignatureRow { key_id: "ed25519:other".to_owned(), ..row }))
        });
        let given = (user, device, algorithm.as_str(), position, id.as_str());
        self.add(&schema::GIVEN_KEYS, "it is still to be given", given, &key);
        self.say_of_backups();
    }

    fn say_of_backups(&mut self) {
        self.change(&schema::BACKUP_LAST, "a version has a higher number", |_, _| Some(0));
        self.change(&schema::BACKUP, "the data of the version is not JSON", |_, Json(mut row)| {
            row.auth_data = "{".to_owned();
            Some(Json(row))
        });
        self.change(&schema::BACKUP_ROOM, "a room without keys", |_, share| {
            Some(BackupShare { keys: 0, ..share })
        });
        self.change(&schema::BACKUP_KEY, "the key is not JSON", |_, key| {
            Some(BackedUpKey { session_data: no_json(), ..key })
        });
    }

    fn say_of_rooms(&mut self) {
        self.change(&schema::ROOM, "it has no heads", |_, row| Some(RoomRow { heads: Vec::new(), ..row }));
        self.change(&schema::SERVER_MEMBERS, "a server without members has no such row", |_, _| {
            Some(0.into())
        });
        self.change(&schema::USER_ROOM, "the membership comes from event", |_, row| {
            let now = UserRoomRow { event: EventNum(0), ..row.now? };
            Some(now.into())
        });
        self.change(&schema::OUTSIDE, "the room has not given out its number", |_, Json(row)| {
            Some(Json(OutsideRow { number: 7, ..row }))
        });
        let (_, (outside, _), Json(told)) = rows(self.fixture, &schema::OUTSIDE).next().unwrap();
        let key = schema::PLACE.key_bytes::<(RoomNum, EventNum)>((outside, EventNum(told.number)));
        let place = put(&schema::PLACE, key.bytes.into(), &Place::Outlier);
        self.check("OUTSIDE", "an event of the room has its number", vec![place]);
        self.change(&schema::USER_ROOM, "nobody is in a room, or banned from it", |(_, room), row| {
            let membership = crate::schema::rooms::Membership::Join;
            (*room == outside).then_some(UserRoomRow { membership, ..row.now? }.into())
        });
        let (_, (room, ..), receipt) = rows(self.fixture, &schema::RECEIPTS).next().unwrap();
        let key = (room, "nobody", ReceiptKind::Public, "");
        self.add(&schema::RECEIPTS, "the id of its user is not valid", key, &receipt);
        self.change(&schema::RECEIPT_LOG, "it is of a private receipt", |_, Json(key)| {
            Some(Json(ReceiptKey { kind: ReceiptKind::Private, ..key }))
        });
        self.change(&schema::PRIVATE_RECEIPT_LOG, "it is of a public receipt", |_, Json(key)| {
            Some(Json(ReceiptKey { kind: ReceiptKind::Public, ..key }))
        });
    }

    fn say_of_events(&mut self) {
        self.change(&schema::TIMELINE, "its fields are not at the places", |_, mut row| {
            row.header.spans.redacts.length += 1;
            Some(row)
        });
        for (before, after, expected) in [
            ("\"m.room.message\"", "\"m.room.massage\"", "its bytes are not those of the event of its id"),
            ("in thread", "on thread", "its content is not the one that it was sent with"),
            ("\"depth\":", "\"depth\":1.", "it is not canonical JSON"),
        ] {
            self.change(&schema::TIMELINE, expected, |_, mut row| {
                let json = String::from_utf8(row.json.to_vec()).unwrap();
                row.json = json.contains(before).then(|| json.replace(before, after).into())?;
                Some(row)
            });
        }
        self.change(&schema::REDACTED_ORIGINAL, "it is not an event", |_, _| Some(no_json()));
        self.change(&schema::RELATION, "of another kind than its key says", |_, row| {
            Some(RelationRow { rel_type: "other".to_owned(), ..row })
        });
        self.change(&schema::RELATION, "is not at that order", |_, row| {
            Some(RelationRow { event: EventNum(0), ..row })
        });
        self.change(&schema::RELATED, "its newest edit does not refer to it", |_, row| {
            Some(RelatedRow { edit: Some(EventNum(0)), ..row })
        });
    }

    fn say_of_states(&mut self) {
        self.change(&schema::STATE_NOW, "its value is absent, for which there is no row", |_, _| {
            Some(StateValue::Absent.into())
        });
        let order = Order { anchor: Position::ZERO, minor: 7 };
        self.change(&schema::STATE_NOW, "the value before the step that wrote it is not kept", |_, row| {
            Some(NowRow { staged_at: Some(order), ..row })
        });
        let sides: Vec<_> = rows(self.fixture, &schema::SIDE).map(|(_, (_, side), _)| side).collect();
        let entry = |key| (StateKeyNum(key), StateValue::Absent);
        self.change(&schema::SIDE, "it stands on too many other side states", |_, row| {
            Some(SideRow::new(row.base, 200, row.iter()))
        });
        self.change(&schema::SIDE, "it stands on a newer side state", |(_, side), row| {
            (*side == sides[0]).then(|| SideRow::new(StateRef::Side(sides[1]), row.depth, row.iter()))
        });
        self.change(&schema::SIDE, "its depth is not above", |(_, side), row| {
            (*side == sides[1]).then(|| SideRow::new(row.base, 1, row.iter()))
        });
        self.change(&schema::SIDE, "its keys are out of order", |_, row| {
            Some(SideRow::new(row.base, row.depth, [entry(1), entry(0)]))
        });
    }
}

fn put<K: Key, V: Value>(table: &Table<K, V>, key: Bytes, row: &V) -> Change {
    let mut value = Encoder::default();
    row.encode(&mut value);
    Change::Row(table.family, key, Some(value.bytes.into()))
}

/// The rows of a table, each with the bytes of its key.
fn rows<K: Key, V: Value>(fixture: &Fixture, table: &Table<K, V>) -> impl Iterator<Item = (Bytes, K, V)> {
    let snapshot = fixture.store().snapshot();
    let rows = snapshot.range_raw(table.family, vec![table.id], vec![table.id + 1], Direction::Up).unwrap();
    let rows = rows.map(|row| {
        let (key, value) = row.unwrap();
        let (decoded, row) = table.decode(&key, value).unwrap();
        (key, decoded, row)
    });
    rows.collect::<Vec<_>>().into_iter()
}
