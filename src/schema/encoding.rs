//! Encodings that several rows share: byte strings, small numbers, and references to states.

use crate::{
    ids::{Order, SideNum},
    schema::state::StateRef,
    store::{
        Fault,
        key::{Decoder, Encoder, Key},
    },
};

pub(super) fn encode_bytes(bytes: &[u8], to: &mut Encoder) {
    to.varint(bytes.len() as u64);
    to.raw(bytes);
}

pub(super) fn decode_bytes<'a>(from: &mut Decoder<'a>) -> Result<&'a [u8], Fault> {
    let length = usize::try_from(from.varint()?).map_err(|_| Fault::Corrupt("a length is too large"))?;
    from.take(length)
}

pub(super) fn decode_string(from: &mut Decoder<'_>) -> Result<String, Fault> {
    String::from_utf8(decode_bytes(from)?.to_vec()).map_err(|_| Fault::Corrupt("a string is not UTF-8"))
}

pub(super) fn decode_u32(from: &mut Decoder<'_>) -> Result<u32, Fault> {
    u32::try_from(from.varint()?).map_err(|_| Fault::Corrupt("a number is too large"))
}

/// Appends a reference to a state as rows of events and of rooms hold it: 13 bytes for a place on the main line, and few for a
/// side state of a small number. A row of a side state holds its base in another form, that of [`StateRef::encode`].
pub(super) fn encode_ref(state: StateRef, to: &mut Encoder) {
    match state {
        StateRef::Main(order) => {
            to.raw(&[1]);
            Order::encode_key(order, to);
        }
        StateRef::Side(side) => {
            to.raw(&[2]);
            to.varint(side.0.into());
        }
    }
}

/// Reads a reference that [`encode_ref`] wrote.
pub(super) fn decode_ref(from: &mut Decoder<'_>) -> Result<StateRef, Fault> {
    match from.byte()? {
        1 => Key::decode_key(from).map(StateRef::Main),
        2 => decode_u32(from).map(|side| StateRef::Side(SideNum(side))),
        _ => Err(Fault::Corrupt("a state reference is of an unknown kind")),
    }
}
