//! Order-preserving encoding of keys, and the bytes of small values: what sorts first as a value sorts first as bytes.
//!
//! Numbers are big-endian. Strings and byte strings end in `00 00`, a zero inside them is written `00 FF`, so that a
//! string sorts below its extensions and a prefix of a composite key is a prefix of its bytes. Pending positions are
//! noted as they are written, so that the store can fill them in when it accepts the batch.

use bytes::Bytes;

use crate::{
    ids::{DeviceNum, EventNum, Order, Position, RoomNum, SideNum, StateKeyNum, UserNum},
    store::{Domain, Fault},
};

/// Bytes under construction, with the places of pending positions in them.
#[derive(Debug, Default)]
pub struct Encoder {
    pub(crate) bytes: Vec<u8>,
    /// The offsets of pending positions (8 bytes each).
    pub(crate) pending: Vec<u32>,
}

impl Encoder {
    /// Appends bytes as they are.
    pub fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Appends a position; a pending one is filled in when the batch is accepted.
    pub fn position(&mut self, position: Position) {
        if position.is_pending() {
            self.pending.push(u32::try_from(self.bytes.len()).unwrap_or(u32::MAX));
        }
        self.raw(&position.number().to_be_bytes());
    }

    /// Appends an unsigned number in as few bytes as it needs (LEB128). For values; it does not keep the order.
    pub fn varint(&mut self, mut number: u64) {
        while number >= 0x80 {
            self.bytes.push((number & 0x7f) as u8 | 0x80);
            number >>= 7;
        }
        self.bytes.push(number as u8);
    }
}

/// The bytes of a key or a value that are still to be read.
#[derive(Debug, Clone, Copy)]
pub struct Decoder<'a>(pub &'a [u8]);

impl<'a> Decoder<'a> {
    /// Takes the next `count` bytes.
    pub fn take(&mut self, count: usize) -> Result<&'a [u8], Fault> {
        let (head, tail) = self.0.split_at_checked(count).ok_or(Fault::Corrupt("a row ends early"))?;
        self.0 = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        self.take(N)?.try_into().map_err(|_| Fault::Corrupt("a row ends early"))
    }

    /// Takes the next byte.
    pub fn byte(&mut self) -> Result<u8, Fault> {
        self.array::<1>().map(|[byte]| byte)
    }

    /// Takes a number that [`Encoder::varint`] wrote.
    pub fn varint(&mut self) -> Result<u64, Fault> {
        let mut number = 0_u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            number |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err(Fault::Corrupt("a number is too long"))
    }

    /// Takes everything that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }
}

/// A part of a key, or a whole key.
pub trait Key: Sized {
    /// The key as a caller has it: borrowed where that saves a copy.
    type Ref<'a>: Copy;
    /// The domain whose number a key begins with: of a room, or of a user. A batch may then write the rows of those rooms or
    /// users only whose locks its guard holds.
    const LEADS: Option<Domain> = None;
    /// Appends the bytes of the key.
    fn encode_key(key: Self::Ref<'_>, to: &mut Encoder);
    /// Reads the key back.
    fn decode_key(from: &mut Decoder<'_>) -> Result<Self, Fault>;
}

macro_rules! integer_keys {
    ($($name:ty),*) => {$(
        impl Key for $name {
            type Ref<'a> = Self;
            fn encode_key(key: Self, to: &mut Encoder) {
                to.raw(&key.to_be_bytes());
            }
            fn decode_key(from: &mut Decoder<'_>) -> Result<Self, Fault> {
                from.array().map(Self::from_be_bytes)
            }
        }
    )*};
}

integer_keys!(u8, u16, u32, u64);

impl Key for i32 {
    type Ref<'a> = Self;
    fn encode_key(key: Self, to: &mut Encoder) {
        to.raw(&(key.cast_unsigned() ^ (1 << 31)).to_be_bytes());
    }
    fn decode_key(from: &mut Decoder<'_>) -> Result<Self, Fault> {
        from.array().map(|bytes| (u32::from_be_bytes(bytes) ^ (1 << 31)).cast_signed())
    }
}

macro_rules! number_keys {
    ($($name:ident($inner:ty) $leads:expr),*) => {$(
        impl Key for $name {
            type Ref<'a> = Self;
            const LEADS: Option<Domain> = $leads;
            fn encode_key(key: Self, to: &mut Encoder) {
                <$inner>::encode_key(key.0, to);
            }
            fn decode_key(from: &mut Decoder<'_>) -> Result<Self, Fault> {
                Key::decode_key(from).map(Self)
            }
        }
    )*};
}

number_keys!(
    RoomNum(u64) Some(Domain::Room),
    UserNum(u64) Some(Domain::User),
    DeviceNum(u32) None,
    StateKeyNum(u32) None,
    SideNum(u32) None
);

impl Key for EventNum {
    type Ref<'a> = Self;
    /// An event number takes five bytes, because it stays below 2^40.
    fn encode_key(key: Self, to: &mut Encoder) {
        let [_, _, _, tail @ ..] = key.0.to_be_bytes();
        to.raw(&tail);
    }
    fn decode_key(from: &mut Decoder<'_>) -> Result<Self, Fault> {
        let [a, b, c, d, e] = from.array::<5>()?;
        Ok(Self(u64::from_be_bytes([0, 0, 0, a, b, c, d, e])))
    }
}

impl Key for Position {
    type Ref<'a> = Self;
    fn encode_key(key: Self, to: &mut Encoder) {
        to.position(key);
    }
    fn decode_key(from: &mut Decoder<'_>) -> Result<Self, Fault> {
        from.array().map(|bytes| Self::from_bits(u64::from_be_bytes(bytes)))
    }
}

impl Key for Order {
    type Ref<'a> = Self;
    fn encode_key(key: Self, to: &mut Encoder) {
        to.position(key.anchor);
        i32::encode_key(key.minor, to);
    }
    fn decode_key(from: &mut Decoder<'_>) -> Result<Self, Fault> {
        Ok(Self { anchor: Key::decode_key(from)?, minor: Key::decode_key(from)? })
    }
}

impl<const N: usize> Key for [u8; N] {
    type Ref<'a> = &'a [u8; N];
    fn encode_key(key: &[u8; N], to: &mut Encoder) {
        to.raw(key);
    }
    fn decode_key(from: &mut Decoder<'_>) -> Result<Self, Fault> {
        from.array()
    }
}

fn encode_terminated(bytes: &[u8], to: &mut Encoder) {
    let mut rest = bytes;
    while let Some(at) = rest.iter().position(|byte| *byte == 0) {
        let (head, tail) = rest.split_at(at);
        to.raw(head);
        to.raw(&[0, 0xff]);
        rest = tail.get(1..).unwrap_or_default();
    }
    to.raw(rest);
    to.raw(&[0, 0]);
}

fn decode_terminated(from: &mut Decoder<'_>) -> Result<Vec<u8>, Fault> {
    let mut bytes = Vec::new();
    loop {
        match from.byte()? {
            0 => match from.byte()? {
                0 => return Ok(bytes),
                0xff => bytes.push(0),
                _ => return Err(Fault::Corrupt("a string in a key ends wrongly")),
            },
            byte => bytes.push(byte),
        }
    }
}

impl Key for String {
    type Ref<'a> = &'a str;
    fn encode_key(key: &str, to: &mut Encoder) {
        encode_terminated(key.as_bytes(), to);
    }
    fn decode_key(from: &mut Decoder<'_>) -> Result<Self, Fault> {
        Self::from_utf8(decode_terminated(from)?)
            .map_err(|_| Fault::Corrupt("a string in a key is not UTF-8"))
    }
}

impl Key for Vec<u8> {
    type Ref<'a> = &'a [u8];
    fn encode_key(key: &[u8], to: &mut Encoder) {
        encode_terminated(key, to);
    }
    fn decode_key(from: &mut Decoder<'_>) -> Result<Self, Fault> {
        decode_terminated(from)
    }
}

macro_rules! tuple_keys {
    ($(($($name:ident $field:tt),*);)*) => {$(
        impl<$($name: Key),*> Key for ($($name,)*) {
            type Ref<'a> = ($($name::Ref<'a>,)*);
            const LEADS: Option<Domain> = A::LEADS;
            fn encode_key(key: Self::Ref<'_>, to: &mut Encoder) {
                $($name::encode_key(key.$field, to);)*
            }
            fn decode_key(from: &mut Decoder<'_>) -> Result<Self, Fault> {
                Ok(($($name::decode_key(from)?,)*))
            }
        }
    )*};
}

tuple_keys! {
    (A 0);
    (A 0, B 1);
    (A 0, B 1, C 2);
    (A 0, B 1, C 2, D 3);
    (A 0, B 1, C 2, D 3, E 4);
    (A 0, B 1, C 2, D 3, E 4, F 5);
}

/// The empty key: as leading parts of a key it selects a whole table.
impl Key for () {
    type Ref<'a> = ();
    fn encode_key((): (), _to: &mut Encoder) {}
    fn decode_key(_from: &mut Decoder<'_>) -> Result<Self, Fault> {
        Ok(())
    }
}

/// A value of a row. It begins with the version of its layout: an old one is read, the newest is written.
pub trait Value: Sized {
    /// Appends the bytes of the value.
    fn encode(&self, to: &mut Encoder);
    /// Reads the value back.
    fn decode(bytes: Bytes) -> Result<Self, Fault>;
}

/// A value that is one key part, with a layout version before it.
macro_rules! key_values {
    ($($name:ty),*) => {$(
        impl Value for $name {
            fn encode(&self, to: &mut Encoder) {
                to.raw(&[1]);
                <Self as Key>::encode_key(*self, to);
            }
            fn decode(bytes: Bytes) -> Result<Self, Fault> {
                let mut from = Decoder(&bytes);
                expect_layout(&mut from, 1)?;
                Key::decode_key(&mut from)
            }
        }
    )*};
}

key_values!(u32, u64, RoomNum, UserNum, EventNum, StateKeyNum, Position, Order);
key_values!((RoomNum, EventNum), (UserNum, u64), (RoomNum, Order));

/// Reads the version of the layout; fails unless it is the one known.
pub fn expect_layout(from: &mut Decoder<'_>, known: u8) -> Result<(), Fault> {
    if from.byte()? == known { Ok(()) } else { Err(Fault::Corrupt("a row has an unknown layout")) }
}

/// Reads the version of the layout, for rows that have had several: from 1 up to the newest one.
pub fn layout_upto(from: &mut Decoder<'_>, newest: u8) -> Result<u8, Fault> {
    let layout = from.byte()?;
    if (1..=newest).contains(&layout) {
        Ok(layout)
    } else {
        Err(Fault::Corrupt("a row has an unknown layout"))
    }
}

/// A row that says only that it is there.
impl Value for () {
    fn encode(&self, _to: &mut Encoder) {}
    fn decode(_bytes: Bytes) -> Result<Self, Fault> {
        Ok(())
    }
}

impl Value for String {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1]);
        to.raw(self.as_bytes());
    }
    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        Self::from_utf8(from.rest().to_vec()).map_err(|_| Fault::Corrupt("a value is not UTF-8"))
    }
}

impl Value for Bytes {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1]);
        to.raw(self);
    }
    fn decode(mut bytes: Bytes) -> Result<Self, Fault> {
        expect_layout(&mut Decoder(&bytes), 1)?;
        Ok(bytes.split_off(1))
    }
}

/// A row in JSON, for what is read seldom and grows fields over time (`#[serde(default)]` reads old rows).
/// It must not hold pending positions: those belong into keys and binary values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Json<T>(pub T);

impl<T: serde::Serialize + serde::de::DeserializeOwned> Value for Json<T> {
    fn encode(&self, to: &mut Encoder) {
        to.raw(&[1]);
        // Writing into a Vec cannot fail, and our rows have string keys only; were it to, decoding says so.
        if serde_json::to_writer(&mut to.bytes, &self.0).is_err() {
            to.bytes.clear();
        }
    }
    fn decode(bytes: Bytes) -> Result<Self, Fault> {
        let mut from = Decoder(&bytes);
        expect_layout(&mut from, 1)?;
        serde_json::from_slice(from.rest())
            .map(Self)
            .map_err(|_| Fault::Corrupt("a row is not the JSON it should be"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encoded<K: Key>(key: K::Ref<'_>) -> Vec<u8> {
        let mut to = Encoder::default();
        K::encode_key(key, &mut to);
        to.bytes
    }

    proptest! {
        #[test]
        fn strings_keep_their_order_and_come_back(a in "[\0a-c]{0,6}", b in "[\0a-c]{0,6}", x: u32, y: u32) {
            let (p, q) = (encoded::<(String, u32)>((&a, x)), encoded::<(String, u32)>((&b, y)));
            prop_assert_eq!(p.cmp(&q), (&a, x).cmp(&(&b, y)));
            prop_assert_eq!(<(String, u32)>::decode_key(&mut Decoder(&p)).unwrap(), (a, x));
        }

        #[test]
        fn orders_keep_their_order_and_come_back(a: u32, i: i32, b: u32, j: i32) {
            let order = |a: u32, i| Order { anchor: Position::new(a.into()).unwrap(), minor: i };
            let (p, q) = (encoded::<Order>(order(a, i)), encoded::<Order>(order(b, j)));
            prop_assert_eq!(p.cmp(&q), order(a, i).cmp(&order(b, j)));
            prop_assert_eq!(Order::decode_key(&mut Decoder(&p)).unwrap(), order(a, i));
        }

        #[test]
        fn event_numbers_keep_their_order_and_come_back(a in 0_u64..1 << 40, b in 0_u64..1 << 40) {
            let (p, q) = (encoded::<EventNum>(EventNum(a)), encoded::<EventNum>(EventNum(b)));
            prop_assert_eq!(p.cmp(&q), a.cmp(&b));
            prop_assert_eq!(EventNum::decode_key(&mut Decoder(&p)).unwrap(), EventNum(a));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = <(String, Order, EventNum)>::decode_key(&mut Decoder(&bytes));
            let _ = Json::<Vec<String>>::decode(Bytes::from(bytes.clone()));
            let _ = Decoder(&bytes).varint();
        }

        #[test]
        fn a_layout_is_known_from_the_first_to_the_newest(layout: u8, newest in 1_u8..=4) {
            let read = layout_upto(&mut Decoder(&[layout]), newest);
            prop_assert_eq!(read.is_ok(), layout >= 1 && layout <= newest);
            prop_assert!(read.is_err() || read == Ok(layout));
        }

        #[test]
        fn varints_come_back(number: u64) {
            let mut to = Encoder::default();
            to.varint(number);
            prop_assert_eq!(Decoder(&to.bytes).varint().unwrap(), number);
        }
    }
}
