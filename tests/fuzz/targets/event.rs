//! The gate through which events of other servers come: whatever the bytes, it answers, and what it lets in is in the one form
//! that an event has.

#![no_main]

use aqueduct::{
    ids::RoomNum,
    rooms::{change::Signed, versions},
    schema::rooms::{Resident, RoomRow},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, &[u8])| {
    let (choice, json) = input;
    let version = versions::LOWEST + choice % (versions::HIGHEST - versions::LOWEST + 1);
    // The id in the seeds is one that rooms of every version may have.
    let Ok(id) = "!AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA".try_into() else { return };
    let room = RoomRow::new(id, version, Resident::No);
    let Ok(signed) = Signed::read(RoomNum(1), &room, json) else { return };
    let id = signed.unverified().id.clone();
    assert!(signed.json().len() <= 65_536, "an event is larger than events may be");
    assert_eq!(Signed::find_id(version, json).as_ref(), Some(&id), "an event has two ids");
    let again = Signed::read(RoomNum(1), &room, signed.json()).unwrap_or_else(|why| {
        panic!("an event is refused the second time: {}", why.message);
    });
    assert_eq!(again.json(), signed.json(), "an event changes when it is read again");
    assert_eq!(again.unverified().id, id);
    // An invitation by way of a third party need not be signed by its sender's server (server-server API, "Validating hashes and
    // signatures on received events"). Everything else is believed by keys alone.
    let by_third_party = signed.unverified().content.get().contains("third_party_invite");
    assert!(by_third_party || signed.verify(|_, _| None).is_err(), "an event without a key counts as signed");
});
