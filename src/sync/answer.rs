//! Answers are spliced: the JSON of events goes in as it is, and nothing is parsed or serialised twice.

use std::fmt::Write as _;

/// A JSON object being written.
#[derive(Debug)]
pub(crate) struct Object(String);

impl Object {
    pub(crate) fn new() -> Self {
        Self(String::from("{"))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.len() == 1
    }

    /// How many bytes it has so far.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    fn name(&mut self, name: &str) {
        if !self.is_empty() {
            self.0.push(',');
        }
        push_text(&mut self.0, name);
        self.0.push(':');
    }

    /// A field whose value is JSON already.
    pub(crate) fn raw(&mut self, name: &str, json: &str) {
        self.name(name);
        self.0.push_str(json);
    }

    /// A field whose value is a string.
    pub(crate) fn text(&mut self, name: &str, text: &str) {
        self.name(name);
        push_text(&mut self.0, text);
    }

    pub(crate) fn number(&mut self, name: &str, number: u64) {
        self.name(name);
        let _ = write!(self.0, "{number}");
    }

    pub(crate) fn flag(&mut self, name: &str, flag: bool) {
        self.raw(name, if flag { "true" } else { "false" });
    }

    /// A field whose value is a list of JSON values.
    pub(crate) fn list<S: AsRef<str>>(&mut self, name: &str, items: impl IntoIterator<Item = S>) {
        self.name(name);
        self.0.push('[');
        for (at, item) in items.into_iter().enumerate() {
            if at > 0 {
                self.0.push(',');
            }
            self.0.push_str(item.as_ref());
        }
        self.0.push(']');
    }

    /// A field whose value is a list of strings.
    pub(crate) fn texts<S: AsRef<str>>(&mut self, name: &str, items: impl IntoIterator<Item = S>) {
        self.list(name, items.into_iter().map(|item| text(item.as_ref())));
    }

    /// A field `{"events": [..]}`.
    pub(crate) fn events<S: AsRef<str>>(&mut self, name: &str, events: impl IntoIterator<Item = S>) {
        let mut list = Self::new();
        list.list("events", events);
        self.raw(name, &list.finish());
    }

    pub(crate) fn finish(mut self) -> String {
        self.0.push('}');
        self.0
    }
}

/// An event that is only type and content.
pub(crate) fn plain_event(kind: &str, content: &str) -> String {
    let mut event = Object::new();
    event.text("type", kind);
    event.raw("content", content);
    event.finish()
}

/// A string as JSON.
pub(crate) fn text(text: &str) -> String {
    let mut json = String::with_capacity(text.len() + 2);
    push_text(&mut json, text);
    json
}

fn push_text(json: &mut String, text: &str) {
    let plain = |byte: u8| byte >= 0x20 && byte != b'"' && byte != b'\\';
    if text.bytes().all(plain) {
        json.push('"');
        json.push_str(text);
        json.push('"');
    } else {
        let _ = write!(json, "{}", serde_json::Value::from(text));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn objects_are_json() {
        let mut object = Object::new();
        assert!(object.is_empty());
        object.text("a\"b", "c\nd");
        object.number("n", 7);
        object.flag("f", false);
        object.texts("t", ["x", "y\\"]);
        object.events("e", [plain_event("k", "{}")]);
        let value: serde_json::Value = serde_json::from_str(&object.finish()).unwrap();
        let expected = serde_json::json!({
            "a\"b": "c\nd", "n": 7, "f": false, "t": ["x", "y\\"],
            "e": { "events": [{ "type": "k", "content": {} }] },
        });
        assert_eq!(value, expected);
        assert_eq!(Object::new().finish(), "{}");
    }

    proptest! {
        #[test]
        fn any_string_comes_back(string: String) {
            prop_assert_eq!(serde_json::from_str::<String>(&text(&string)).unwrap(), string);
        }
    }
}
