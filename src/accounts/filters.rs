//! Filters that clients keep here, so that each `/sync` names one instead of bringing it.
//!
//! Specification: client-server API, "Filtering".

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use ruma::api::client::filter::{Filter, FilterDefinition, RoomEventFilter};
use sha2::{Digest, Sha256};

use crate::{
    error::{Refusal, Result},
    ids::UserNum,
    schema,
    store::{Batch, Direction, Fault, Read},
};

/// A filter has at most this many bytes, because it is parsed again for requests that name it.
pub const FILTER_BYTES_MAX: usize = 64 << 10;
/// A user keeps at most this many filters, because keeping another one reads all that there are.
pub const FILTERS_MAX: usize = 1_000;
/// The filters of a user have at most this many bytes together.
const ALL_BYTES_MAX: usize = 1 << 20;
/// A filter names at most this many types, senders, rooms and fields together: each event is compared with them.
pub const NAMES_MAX: usize = 2_000;
/// At most this many of the types in a filter are patterns, with `*`.
pub const PATTERNS_MAX: usize = 100;

/// The filter with this id, as its JSON.
pub fn find(read: &(impl Read + ?Sized), user: UserNum, id: &str) -> Result<Option<Bytes>, Fault> {
    schema::FILTERS.get(read, (user, id))
}

/// The filter with this id. Errors: 404 `M_NOT_FOUND`.
pub fn require(read: &(impl Read + ?Sized), user: UserNum, id: &str) -> Result<Bytes> {
    find(read, user, id)?.ok_or_else(|| Refusal::not_found("You have no such filter.").into())
}

/// Reads a filter. Errors: 400 `M_BAD_JSON`, 413 for one that costs too much.
pub fn read(json: &[u8]) -> Result<FilterDefinition> {
    let filter: FilterDefinition = serde_json::from_slice(json)
        .map_err(|why| Refusal::bad_json(format!("This is not a filter: {why}.")))?;
    require_cheap(&filter)?;
    Ok(filter)
}

/// The cost of a filter where it is used: each event is compared with all its names and patterns.
#[derive(Default)]
struct Cost {
    names: usize,
    patterns: usize,
}

impl Cost {
    fn add_names<T>(&mut self, names: &[T]) {
        self.names += names.len();
    }

    fn add_types(&mut self, types: &[String]) {
        self.add_names(types);
        self.patterns += types.iter().filter(|event_type| event_type.contains('*')).count();
    }

    fn add_events(&mut self, filter: &RoomEventFilter) {
        self.add_types(filter.types.as_deref().unwrap_or_default());
        self.add_types(&filter.not_types);
        self.add_names(filter.senders.as_deref().unwrap_or_default());
        self.add_names(&filter.not_senders);
        self.add_names(filter.rooms.as_deref().unwrap_or_default());
        self.add_names(&filter.not_rooms);
    }

    fn add_global(&mut self, filter: &Filter) {
        self.add_types(filter.types.as_deref().unwrap_or_default());
        self.add_types(&filter.not_types);
        self.add_names(filter.senders.as_deref().unwrap_or_default());
        self.add_names(&filter.not_senders);
    }

    /// Refuses a filter that costs too much: 413.
    fn require_bounded(&self) -> Result<()> {
        if self.names <= NAMES_MAX && self.patterns <= PATTERNS_MAX {
            return Ok(());
        }
        tracing::debug!(self.names, self.patterns, reason = "cost", "a filter is refused");
        let why = format!(
            "A filter names at most {NAMES_MAX} types, senders, rooms and fields, and {PATTERNS_MAX} types with `*`."
        );
        Err(Refusal::too_large(why).into())
    }
}

/// Refuses (413) a filter that costs too much where it is used.
pub fn require_cheap(filter: &FilterDefinition) -> Result<()> {
    let mut cost = Cost::default();
    cost.add_names(filter.event_fields.as_deref().unwrap_or_default());
    cost.add_global(&filter.presence);
    cost.add_global(&filter.account_data);
    cost.add_names(filter.room.rooms.as_deref().unwrap_or_default());
    cost.add_names(&filter.room.not_rooms);
    let room = &filter.room;
    for section in [&room.account_data, &room.timeline, &room.ephemeral, &room.state] {
        cost.add_events(section);
    }
    cost.require_bounded()
}

/// Refuses (413) a filter of events that costs too much where it is used.
pub fn require_cheap_events(filter: &RoomEventFilter) -> Result<()> {
    let mut cost = Cost::default();
    cost.add_events(filter);
    cost.require_bounded()
}

/// Keeps a filter and answers its id, which is a digest of the filter, so that the same filter is kept once. The caller
/// holds the user's lock. Errors: 400 for JSON that is no filter, 413 for a filter that is too large or costs too much, or
/// if the user keeps too many.
pub fn put(batch: &mut Batch, user: UserNum, json: Bytes) -> Result<String> {
    if json.len() > FILTER_BYTES_MAX {
        return Err(Refusal::too_large("A filter has at most 64 KiB.").into());
    }
    read(&json)?;
    let digest = Sha256::digest(&json);
    let id: String = URL_SAFE_NO_PAD.encode(digest).chars().take(16).collect();
    if find(batch, user, &id)?.is_none() {
        let (mut count, mut bytes) = (1, json.len());
        for row in schema::FILTERS.prefix::<(UserNum,)>(batch, (user,), Direction::Up)? {
            count += 1;
            bytes += row?.1.len();
            if count > FILTERS_MAX || bytes > ALL_BYTES_MAX {
                tracing::debug!(%user, reason = "quota", "a filter is refused");
                let why = "You keep at most 1,000 filters of 1 MiB together here; put a filter into `filter` of /sync.";
                return Err(Refusal::too_large(why).into());
            }
        }
        schema::FILTERS.put(batch, (user, id.as_str()), &json);
    }
    Ok(id)
}

/// Deletes all filters of a user, for an account that ends.
pub fn delete_all(batch: &mut Batch, user: UserNum) {
    schema::FILTERS.delete_prefix::<(UserNum,)>(batch, (user,));
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::store::{Durability, Engine, Guard, Store, engine::Memory};

    #[test]
    fn filters_of_a_user_are_bounded_in_number_and_in_bytes() {
        let store = Store::open(Engine::Memory(Memory::default()), Durability::Fsync).unwrap();
        let mut batch = store.batch(&Guard::alone());
        let mut keep = |user: u64, text: String| {
            put(&mut batch, UserNum(user), json!({ "org.example": text }).to_string().into()).is_ok()
        };
        assert!((0..16).all(|number| keep(1, format!("{number:060000}"))));
        assert!((16..18).any(|number| !keep(1, format!("{number:060000}"))), "1 MiB is enough");
        assert!(keep(1, format!("{:060000}", 3)), "one that is kept is kept");
        assert!((0..FILTERS_MAX).all(|number| keep(2, number.to_string())));
        assert!(!keep(2, "one more".to_owned()));
    }

    #[test]
    fn a_filter_that_costs_too_much_is_refused() {
        let names = |count: usize| (0..count).map(|number| format!("m.type{number}")).collect::<Vec<_>>();
        let patterns = |count: usize| (0..count).map(|number| format!("*a{number}*")).collect::<Vec<_>>();
        let is_kept = |filter: serde_json::Value| read(filter.to_string().as_bytes()).is_ok();
        assert!(is_kept(json!({ "room": { "timeline": { "types": names(NAMES_MAX) } } })));
        assert!(!is_kept(
            json!({ "room": { "timeline": { "types": names(NAMES_MAX) } }, "event_fields": ["a"] })
        ));
        assert!(is_kept(json!({ "room": { "state": { "not_types": patterns(PATTERNS_MAX) } } })));
        let two = json!({ "types": patterns(PATTERNS_MAX / 2 + 1) });
        assert!(!is_kept(json!({ "room": { "state": two, "timeline": two } })));
        assert!(!is_kept(json!({ "presence": { "types": patterns(PATTERNS_MAX + 1) } })));
    }
}
