//! A table: typed keys and values under one prefix byte. Four verbs: get, range, put, delete.

use std::{marker::PhantomData, ops::Bound};

use bytes::Bytes;

use crate::store::{
    Batch, Conflict, Direction, Domain, Fault, Read, Write,
    engine::Family,
    guard::Owner,
    key::{Decoder, Encoder, Key, Value},
    range::after_prefix,
};

/// A table. `docs/recipes.md` says how to add one; `src/schema.rs` lists them all.
#[derive(Debug)]
pub struct Table<K, V> {
    /// The first byte of each key; unique over all families.
    pub id: u8,
    /// The column family of its rows.
    pub family: Family,
    /// The name that errors and metrics call it by.
    pub name: &'static str,
    /// The domain whose lock guards it.
    pub domain: Domain,
    /// The module that writes its rows; no other does.
    pub owner: &'static str,
    /// Whether a replica gets its rows.
    pub shipped: bool,
    pub(crate) types: PhantomData<fn() -> (K, V)>,
}

impl<K, V> Table<K, V> {
    /// A table outside the schema, for tests and benchmarks: ids of 240 and above are theirs.
    pub const fn new(
        id: u8,
        family: Family,
        name: &'static str,
        domain: Domain,
        owner: &'static str,
    ) -> Self {
        Self { id, family, name, domain, owner, shipped: false, types: PhantomData }
    }
}

impl<K: Key, V: Value> Table<K, V> {
    /// The bytes of a key, or of a key's leading parts.
    pub(crate) fn key_bytes<P: Key>(&self, key: P::Ref<'_>) -> Encoder {
        let mut to = Encoder { bytes: Vec::with_capacity(32), pending: Vec::new() };
        to.raw(&[self.id]);
        P::encode_key(key, &mut to);
        to
    }

    fn in_table(&self, fault: Fault) -> Fault {
        match fault {
            Fault::Corrupt(why) => Fault::CorruptRow { table: self.name, why },
            other => other,
        }
    }

    /// Reads the row of this key, if there is one.
    pub fn get(&self, read: &(impl Read + ?Sized), key: K::Ref<'_>) -> Result<Option<V>, Fault> {
        let row = read.get_raw(self.family, &self.key_bytes::<K>(key).bytes)?;
        row.map(V::decode).transpose().map_err(|fault| self.in_table(fault))
    }

    /// The rows of these keys, in their order; cheaper than one `get` after the other.
    pub fn get_many<'k>(
        &self,
        read: &(impl Read + ?Sized),
        keys: impl IntoIterator<Item = K::Ref<'k>>,
    ) -> Result<Vec<Option<V>>, Fault> {
        let keys: Vec<_> = keys.into_iter().map(|key| self.key_bytes::<K>(key).bytes).collect();
        let rows = read.get_many_raw(self.family, &keys)?;
        rows.into_iter()
            .map(|row| row.map(V::decode).transpose().map_err(|fault| self.in_table(fault)))
            .collect()
    }

    /// Whether there is a row of this key.
    pub fn contains(&self, read: &(impl Read + ?Sized), key: K::Ref<'_>) -> Result<bool, Fault> {
        Ok(read.get_raw(self.family, &self.key_bytes::<K>(key).bytes)?.is_some())
    }

    /// The rows whose keys begin with these leading parts (a tuple of the first parts of `K`, or `()` for all).
    pub fn prefix<'r, P: Key>(
        &'r self,
        read: &'r (impl Read + ?Sized),
        prefix: P::Ref<'_>,
        direction: Direction,
    ) -> Result<impl Iterator<Item = Result<(K, V), Fault>> + 'r, Fault> {
        let low = self.key_bytes::<P>(prefix).bytes;
        let high = after_prefix(&low);
        self.rows(read, low, high, direction)
    }

    /// The rows between two keys, or leading parts of keys. The bounds are of one type `P`: for example
    /// `(RoomNum, Order)` in a table whose keys go on after the order. An excluded or included bound that is a prefix
    /// covers all keys that begin with it.
    pub fn range<'r, P: Key>(
        &'r self,
        read: &'r (impl Read + ?Sized),
        low: Bound<P::Ref<'_>>,
        high: Bound<P::Ref<'_>>,
        direction: Direction,
    ) -> Result<impl Iterator<Item = Result<(K, V), Fault>> + 'r, Fault> {
        let (low, high) = self.between::<P>(low, high);
        self.rows(read, low, high, direction)
    }

    /// The rows between two keys, the highest first, of a range that is mostly empty: to learn that costs less from below.
    pub fn range_mostly_empty<'r, P: Key>(
        &'r self,
        read: &'r (impl Read + ?Sized),
        low: Bound<P::Ref<'_>>,
        high: Bound<P::Ref<'_>>,
    ) -> Result<impl Iterator<Item = Result<(K, V), Fault>> + 'r, Fault> {
        let (low, high) = self.between::<P>(low, high);
        let first = read.range_raw(self.family, low.clone(), high.clone(), Direction::Up)?.next();
        let has_rows = first.transpose()?.is_some();
        let rows = has_rows.then(|| self.rows(read, low, high, Direction::Down)).transpose()?;
        Ok(rows.into_iter().flatten())
    }

    /// The first row of each of these ranges, in their order; cheaper than one `range` after the other, the more so
    /// when they rise.
    pub fn first_of_many<'k, P: Key>(
        &self,
        read: &(impl Read + ?Sized),
        ranges: impl IntoIterator<Item = (Bound<P::Ref<'k>>, Bound<P::Ref<'k>>)>,
    ) -> Result<Vec<Option<(K, V)>>, Fault> {
        let ranges: Vec<_> = ranges.into_iter().map(|(low, high)| self.between::<P>(low, high)).collect();
        let rows = read.first_of_many_raw(self.family, &ranges)?;
        let decode = |(key, value): (Bytes, Bytes)| self.decode(&key, value);
        rows.into_iter()
            .map(|row| row.map(decode).transpose().map_err(|fault| self.in_table(fault)))
            .collect()
    }

    fn between<P: Key>(&self, low: Bound<P::Ref<'_>>, high: Bound<P::Ref<'_>>) -> (Vec<u8>, Vec<u8>) {
        let low = match low {
            Bound::Included(key) => self.key_bytes::<P>(key).bytes,
            Bound::Excluded(key) => after_prefix(&self.key_bytes::<P>(key).bytes),
            Bound::Unbounded => vec![self.id],
        };
        let high = match high {
            Bound::Included(key) => after_prefix(&self.key_bytes::<P>(key).bytes),
            Bound::Excluded(key) => self.key_bytes::<P>(key).bytes,
            Bound::Unbounded => after_prefix(&[self.id]),
        };
        (low, high)
    }

    fn rows<'r>(
        &'r self,
        read: &'r (impl Read + ?Sized),
        low: Vec<u8>,
        high: Vec<u8>,
        direction: Direction,
    ) -> Result<impl Iterator<Item = Result<(K, V), Fault>> + 'r, Fault> {
        let rows = read.range_raw(self.family, low, high, direction)?;
        Ok(rows.map(|row| {
            let (key, value) = row?;
            self.decode(&key, value).map_err(|fault| self.in_table(fault))
        }))
    }

    /// The key and the value of a row.
    pub(crate) fn decode(&self, key: &[u8], value: Bytes) -> Result<(K, V), Fault> {
        let mut from = Decoder(key);
        from.byte()?;
        Ok((K::decode_key(&mut from)?, V::decode(value)?))
    }

    /// Whether the bytes of a row are what they should be.
    pub(crate) fn check_row(&self, key: &[u8], value: Bytes) -> Result<(), Fault> {
        let mut from = Decoder(key);
        let decode = |from: &mut Decoder<'_>| {
            from.byte()?;
            K::decode_key(from)?;
            V::decode(value)
        };
        decode(&mut from).map_err(|fault| self.in_table(fault))?;
        if from.0.is_empty() { Ok(()) } else { Err(self.in_table(Fault::Corrupt("a key is too long"))) }
    }

    /// The rooms or users whose rows have keys with these leading parts.
    fn owner<P: Key>(&self, key: &Encoder) -> Owner {
        if K::LEADS != Some(self.domain) {
            return Owner::Unnamed;
        }
        let number = key.bytes.get(1..9).and_then(|number| <[u8; 8]>::try_from(number).ok());
        match number {
            Some(number) if P::LEADS == K::LEADS => Owner::One(u64::from_be_bytes(number)),
            _ => Owner::All,
        }
    }

    /// The bytes of a key, or of leading parts, which the guard of what is written covers.
    fn guarded<P: Key>(&self, to: &mut impl Write, key: P::Ref<'_>) -> Encoder {
        let key = self.key_bytes::<P>(key);
        to.writes().require_guard(self.name, self.domain, self.owner::<P>(&key));
        key
    }

    /// Writes a row of this key.
    pub fn put(&self, to: &mut impl Write, key: K::Ref<'_>, value: &V) {
        let mut bytes = Encoder::default();
        value.encode(&mut bytes);
        let key = self.guarded::<K>(to, key);
        to.writes().put_raw(self.family, key, bytes);
    }

    /// Deletes the row; nothing happens when there is none.
    pub fn delete(&self, to: &mut impl Write, key: K::Ref<'_>) {
        let key = self.guarded::<K>(to, key);
        to.writes().delete_raw(self.family, key);
    }

    /// Deletes all rows whose keys begin with these leading parts, those put before included: a million cost one row of the
    /// batch. Readers of the batch and of what is accepted see it at once.
    pub fn delete_prefix<P: Key>(&self, to: &mut impl Write, prefix: P::Ref<'_>) {
        let low = self.guarded::<P>(to, prefix).bytes;
        let high = after_prefix(&low);
        to.writes().delete_between(self.family, low, high);
    }

    /// Deletes all rows below a key, or leading parts of one, within a prefix that it begins with.
    pub fn delete_below<P: Key, Q: Key>(&self, to: &mut impl Write, prefix: P::Ref<'_>, below: Q::Ref<'_>) {
        let low = self.guarded::<P>(to, prefix).bytes;
        let high = self.key_bytes::<Q>(below).bytes;
        to.writes().delete_between(self.family, low, high);
    }

    /// Lets the batch be accepted only if there is no such row, in the store or in a batch accepted before it.
    pub fn expect_absent(&self, batch: &mut Batch, key: K::Ref<'_>) {
        let key = self.guarded::<K>(batch, key);
        batch.expect_raw(self.family, key, None, self.name);
    }

    /// Lets the batch be accepted only if the row is exactly this one.
    pub fn expect_value(&self, batch: &mut Batch, key: K::Ref<'_>, value: &V) {
        let mut to = Encoder::default();
        value.encode(&mut to);
        let key = self.guarded::<K>(batch, key);
        batch.expect_raw(self.family, key, Some(to.bytes.into()), self.name);
    }

    /// Reads the row, and lets the batch be accepted only if it is still the same, byte for byte and in whatever layout.
    pub fn expect_as_read(&self, batch: &mut Batch, key: K::Ref<'_>) -> Result<Option<V>, Fault> {
        let key = self.guarded::<K>(batch, key);
        let row = batch.get_raw(self.family, &key.bytes)?;
        batch.expect_raw(self.family, key, row.clone(), self.name);
        row.map(V::decode).transpose().map_err(|fault| self.in_table(fault))
    }

    /// The row that a [`Conflict`] on this table found in the way.
    pub fn conflicting(&self, conflict: &Conflict) -> Option<V> {
        if conflict.table == self.name {
            conflict.found.clone().and_then(|row| V::decode(row).ok())
        } else {
            None
        }
    }
}
