//! Shortens texts so that a message fits into what its provider takes.

use serde_json::{Map, Value};

/// This stands where something was cut off.
const ELLIPSIS: &str = "…";
/// These fields of a content are what people read, so that they come before all others.
const FIRST: [&str; 3] = ["msgtype", "membership", "body"];

/// The text in at most this many bytes, cut between characters, with an ellipsis where something is left out.
pub(crate) fn shorten(text: &str, bytes_max: usize) -> String {
    if text.len() <= bytes_max {
        return text.to_owned();
    }
    let Some(room) = bytes_max.checked_sub(ELLIPSIS.len()) else { return String::new() };
    let end = (0..=room).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    let mut short = text.get(..end).unwrap_or_default().to_owned();
    short.push_str(ELLIPSIS);
    short
}

/// The bytes of an object as JSON.
pub(crate) fn size(object: &Map<String, Value>) -> usize {
    serde_json::to_vec(object).map_or(usize::MAX, |it| it.len())
}

/// Makes an object small enough. Of its `content` as many fields stay as there is room for, those that people read and the short ones
/// first, and a text that does not fit is shortened; then texts of its own are, except for those that are `kept`. False where it does
/// not fit even so. It takes a time that grows with the bytes of the object alone, because others write it.
pub(crate) fn fit(object: &mut Map<String, Value>, bytes_max: usize, kept: &[&str]) -> bool {
    if size(object) <= bytes_max {
        return true;
    }
    let content = match object.remove("content") {
        Some(Value::Object(content)) => content,
        Some(_) | None => Map::new(),
    };
    for bytes in [512, 128, 32] {
        if size(object) <= bytes_max {
            break;
        }
        for (_, value) in object.iter_mut().filter(|(key, _)| !kept.contains(&key.as_str())) {
            if let Value::String(text) = value {
                *text = shorten(text, bytes);
            }
        }
    }
    let Some(room) = bytes_max.checked_sub(size(object)) else { return false };
    let short = choose(content, room.saturating_sub(r#","content":{}"#.len()));
    if !short.is_empty() {
        object.insert("content".to_owned(), Value::Object(short));
    }
    true
}

/// Those fields that fit together into so many bytes of JSON.
fn choose(fields: Map<String, Value>, bytes_max: usize) -> Map<String, Value> {
    let written = |value: &Value| serde_json::to_vec(value).map_or(usize::MAX, |it| it.len());
    let mut sized: Vec<_> = fields.into_iter().map(|(key, value)| (written(&value), key, value)).collect();
    sized.sort_by_key(|(bytes, key, _)| (!FIRST.contains(&key.as_str()), *bytes));
    let (mut chosen, mut room) = (Map::new(), bytes_max);
    for (bytes, key, value) in sized {
        // The quotes, colon and comma of a field.
        let around = written(&Value::from(key.as_str())).saturating_add(2);
        let Some(left) = room.checked_sub(around) else { continue };
        if bytes <= left {
            room = left - bytes;
            chosen.insert(key, value);
        } else if let Value::String(text) = value
            && let Some(short) = shorten_written(&text, left)
        {
            room = left.saturating_sub(written(&short));
            chosen.insert(key, short);
        }
    }
    chosen
}

/// The text in at most this many bytes of JSON, where escapes take more than the text. None where too little would be left.
fn shorten_written(text: &str, bytes_max: usize) -> Option<Value> {
    /// Less of a text than this says nothing to anybody.
    const LEAST_BYTES: usize = 32;
    let mut bytes = bytes_max.checked_sub(2)?;
    while bytes >= LEAST_BYTES {
        let short = Value::from(shorten(text, bytes));
        if serde_json::to_vec(&short).is_ok_and(|it| it.len() <= bytes_max) {
            return Some(short);
        }
        bytes /= 2;
    }
    None
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn texts_are_cut_between_characters() {
        assert_eq!(shorten("äöü", 6), "äöü");
        assert_eq!(shorten("äöüß", 6), "ä…");
        assert_eq!(shorten("abcdef", 5), "ab…");
        assert_eq!(shorten("abcdef", 2), "");
    }

    #[test]
    fn an_object_loses_what_is_long_and_keeps_what_it_must() {
        let object = json!({
            "event_id": "$x", "sender_display_name": "n".repeat(3000),
            "content": { "msgtype": "m.text", "body": "b".repeat(5000), "odd": { "list": vec![1; 2000] } },
        });
        let Value::Object(mut object) = object else { panic!("no object") };
        assert!(fit(&mut object, 3900, &["event_id"]));
        assert!(size(&object) <= 3900);
        assert_eq!(object["event_id"], "$x");
        assert!(object["content"]["body"].as_str().unwrap().ends_with('…'));
        assert!(object["content"].get("odd").is_none());
        assert!(fit(&mut object, 300, &["event_id"]));
        assert_eq!(object["event_id"], "$x");
        let Value::Object(mut hopeless) = json!({ "own": "x".repeat(100) }) else { panic!("no object") };
        assert!(!fit(&mut hopeless, 50, &["own"]));
    }
}
