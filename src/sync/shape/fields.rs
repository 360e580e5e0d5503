//! Reduces events to some of their fields, for clients that ask for that (`event_fields` of a filter).

use crate::{json::JsonText, rooms::property_path};

/// Gives the event with only these fields, named by paths with dots ([`property_path::split`]).
pub(crate) fn only_fields(event: JsonText, fields: &[String]) -> JsonText {
    let Ok(serde_json::Value::Object(whole)) = serde_json::from_str(event.as_str()) else { return event };
    let mut some = serde_json::Map::new();
    for field in fields {
        copy(&whole, &mut some, &property_path::split(field));
    }
    JsonText::from(&serde_json::Value::Object(some))
}

type Map = serde_json::Map<String, serde_json::Value>;

fn copy(from: &Map, to: &mut Map, path: &[String]) {
    let Some((name, below)) = path.split_first() else { return };
    let Some(value) = from.get(name) else { return };
    if below.is_empty() {
        to.insert(name.clone(), value.clone());
    } else if let Some(inner) = value.as_object() {
        let slot = to.entry(name.clone()).or_insert_with(|| Map::new().into());
        if let Some(slot) = slot.as_object_mut() {
            copy(inner, slot, below);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_fields_asked_for_are_left() {
        let event = br#"{"type":"t","content":{"body":"b","a.b":1,"\\x":3,"c":{"d":2,"e":3}},"sender":"s"}"#;
        let fields: Vec<String> =
            ["type", "content.a\\.b", "content.\\x", "content.c.d", "nothing.here"].map(String::from).into();
        let expected = serde_json::json!({ "type": "t", "content": { "a.b": 1, "\\x": 3, "c": { "d": 2 } } });
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(only_fields(JsonText::stored(event), &fields).as_str())
                .unwrap(),
            expected
        );
    }
}
