//! The canonical form of a large body, made piece by piece. A tree takes many times the bytes that it was made from, and the
//! body of a request is read before it is known who sent it: so only one part of it is a tree at a time.

use std::{collections::BTreeMap, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{Error as _, MapAccess, SeqAccess, Visitor},
};
use serde_json::value::RawValue;

use super::tree::{Canonical, NotJson, write_text};

/// The outermost object has at most this many fields.
const FIELDS_MAX: usize = 64;
/// A list that is a field of the outermost object has at most this many items.
const ITEMS_MAX: usize = 1_000;
/// A part has at most this many bytes: an item of such a list, or another field.
pub const PART_BYTES_MAX: usize = 1 << 20;

/// The fields of an object, each as it came; of two equal names the last one counts.
struct Fields<'a>(BTreeMap<String, &'a RawValue>);

/// The items of a list, each as it came.
struct Items<'a>(Vec<&'a RawValue>);

struct Bounded;

impl<'de: 'a, 'a> Deserialize<'de> for Fields<'a> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Walk;
        impl<'de> Visitor<'de> for Walk {
            type Value = BTreeMap<String, &'de RawValue>;

            fn expecting(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
                to.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields = BTreeMap::new();
                while let Some((name, value)) = map.next_entry::<String, &RawValue>()? {
                    fields.insert(name, value);
                    if fields.len() > FIELDS_MAX {
                        return Err(A::Error::custom("too many fields"));
                    }
                }
                Ok(fields)
            }
        }
        from.deserialize_map(Walk).map(Self)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Items<'a> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_seq(Bounded).map(Self)
    }
}

impl<'de> Visitor<'de> for Bounded {
    type Value = Vec<&'de RawValue>;

    fn expecting(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = list.next_element::<&RawValue>()? {
            if items.len() >= ITEMS_MAX {
                return Err(A::Error::custom("too many items"));
            }
            items.push(item);
        }
        Ok(items)
    }
}

/// The canonical form of an object whose fields are small, or lists of small items. Errors: [`NotJson`], also for a body
/// that has too many parts, or a part of more than [`PART_BYTES_MAX`].
pub fn canonical(bytes: &[u8]) -> Result<Canonical, NotJson> {
    let Fields(fields) =
        serde_json::from_slice(bytes).map_err(|_| NotJson("a large body is no object of a few fields"))?;
    let mut out = String::with_capacity(bytes.len());
    out.push('{');
    for (at, (name, value)) in fields.into_iter().enumerate() {
        if at > 0 {
            out.push(',');
        }
        write_text(&mut out, &name);
        out.push(':');
        if !value.get().starts_with('[') {
            out.push_str(part(value)?.as_str());
            continue;
        }
        let Items(items) = serde_json::from_str(value.get())
            .map_err(|_| NotJson("a list of a large body has too many items"))?;
        out.push('[');
        for (at, item) in items.into_iter().enumerate() {
            if at > 0 {
                out.push(',');
            }
            out.push_str(part(item)?.as_str());
        }
        out.push(']');
    }
    out.push('}');
    Ok(Canonical::written(out))
}

fn part(part: &RawValue) -> Result<Canonical, NotJson> {
    if part.get().len() > PART_BYTES_MAX {
        return Err(NotJson("a part of it is too large"));
    }
    Canonical::of(part.get().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_in_parts_has_the_form_that_it_has_as_a_whole() {
        for body in [
            "{}",
            r#" { "b" : [ { "z":1, "a":[1e2, -0, "\u00e9\n"] } , 2 ], "a" : null , "b\u0061":{"x":{"y":[]}} } "#,
            r#"{"a":1,"a":[2]}"#,
            r#"{"a":[]}"#,
        ] {
            assert_eq!(canonical(body.as_bytes()), Canonical::of(body.as_bytes()), "{body}");
        }
    }

    #[test]
    fn a_body_of_too_many_or_too_large_parts_is_refused() {
        let list = |count: usize| format!(r#"{{"a":[{}]}}"#, vec!["0"; count].join(","));
        assert!(canonical(list(ITEMS_MAX).as_bytes()).is_ok());
        assert!(canonical(list(ITEMS_MAX + 1).as_bytes()).is_err());
        let fields = |count: usize| {
            let fields: Vec<_> = (0..count).map(|name| format!(r#""{name}":0"#)).collect();
            format!("{{{}}}", fields.join(","))
        };
        assert!(canonical(fields(FIELDS_MAX).as_bytes()).is_ok());
        assert!(canonical(fields(FIELDS_MAX + 1).as_bytes()).is_err());
        let text = |bytes: usize| format!(r#"{{"a":["{}"]}}"#, "x".repeat(bytes));
        assert!(canonical(text(PART_BYTES_MAX - 2).as_bytes()).is_ok());
        assert!(canonical(text(PART_BYTES_MAX).as_bytes()).is_err());
        for wrong in ["[]", "1", "{", r#"{"a":1e400}"#, r#"{"a":["\ud800"]}"#, r#"{"\ud800":1}"#] {
            assert!(canonical(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }
}
