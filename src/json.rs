//! This writes the JSON of answers and events.
//!
//! Answers and events are put together from two things: text, which is escaped here, and JSON that was checked when it came
//! in, which goes in as it is. Nothing is parsed and serialised a second time, and nothing that a person wrote can end a
//! string or an object early. `tests/tidy.rs` forbids writing JSON in any other way.

use std::fmt::Write as _;

use bytes::Bytes;
use serde_json::value::RawValue;

/// One JSON value, serialised (a *JSON text* in the words of RFC 8259). It exists only where a writer of this file or serde
/// made it, so it may be put into other JSON as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JsonText(String);

impl JsonText {
    /// A JSON string that says this text; whatever has to be escaped in it is.
    pub fn string(text: &str) -> Self {
        let mut json = String::with_capacity(text.len() + 2);
        push_string(&mut json, text);
        Self(json)
    }

    /// A JSON list of these values, in their order.
    pub fn list<'a, J: Into<JsonRef<'a>>>(items: impl IntoIterator<Item = J>) -> Self {
        let mut json = String::from("[");
        push_items(&mut json, items);
        Self(json)
    }

    /// A copy of what a row holds: it was checked before it was stored.
    pub fn stored(bytes: &[u8]) -> Self {
        Self(JsonRef::stored(bytes).0.to_owned())
    }

    /// The text of the JSON, which is valid as it stands.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl AsRef<str> for JsonText {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl From<&serde_json::Value> for JsonText {
    fn from(value: &serde_json::Value) -> Self {
        Self(value.to_string())
    }
}

impl From<JsonText> for String {
    fn from(json: JsonText) -> Self {
        json.0
    }
}

impl From<JsonText> for Bytes {
    fn from(json: JsonText) -> Self {
        Self::from(json.0)
    }
}

/// JSON that stands elsewhere and may be put into other JSON as it is.
#[derive(Clone, Copy, Debug)]
pub struct JsonRef<'a>(&'a str);

impl<'a> JsonRef<'a> {
    /// JSON from a row, which was checked before it was stored. Bytes that are no text are read as `null`.
    pub fn stored(bytes: &'a [u8]) -> Self {
        let json = std::str::from_utf8(bytes).unwrap_or("null");
        debug_assert!(
            serde_json::from_str::<&RawValue>(json).is_ok(),
            "a row holds what is not JSON: {json}"
        );
        Self(json)
    }

    /// The text of the JSON, which is valid as it stands.
    pub fn as_str(self) -> &'a str {
        self.0
    }
}

impl<'a> From<&'a JsonText> for JsonRef<'a> {
    fn from(json: &'a JsonText) -> Self {
        Self(&json.0)
    }
}

impl<'a> From<&'a RawValue> for JsonRef<'a> {
    fn from(json: &'a RawValue) -> Self {
        Self(json.get())
    }
}

/// A JSON object that is being written, field by field. Objects inside it are written in place, so that a large answer is not
/// copied once for each of its levels.
#[derive(Debug)]
pub struct Object {
    json: String,
    /// Where the object begins that fields are added to now.
    begin: usize,
}

impl Default for Object {
    fn default() -> Self {
        Self::new()
    }
}

impl Object {
    /// An object without fields.
    pub fn new() -> Self {
        Self { json: String::from("{"), begin: 0 }
    }

    /// An object without fields, with memory for this many bytes.
    pub fn with_capacity(byte_count: usize) -> Self {
        let mut json = String::with_capacity(byte_count);
        json.push('{');
        Self { json, begin: 0 }
    }

    /// Whether it has no fields yet.
    pub fn is_empty(&self) -> bool {
        self.json.len() == self.begin + 1
    }

    /// The number of bytes that it has so far.
    pub fn byte_count(&self) -> usize {
        self.json.len() - self.begin
    }

    fn name(&mut self, name: &str) {
        if !self.is_empty() {
            self.json.push(',');
        }
        push_string(&mut self.json, name);
        self.json.push(':');
    }

    /// Adds a field whose value is JSON already.
    pub fn json<'a>(&mut self, name: &str, json: impl Into<JsonRef<'a>>) {
        self.name(name);
        self.json.push_str(json.into().0);
    }

    /// Adds a field whose value is a string.
    pub fn text(&mut self, name: &str, text: &str) {
        self.name(name);
        push_string(&mut self.json, text);
    }

    /// Adds a field whose value is a number.
    pub fn number(&mut self, name: &str, number: u64) {
        self.name(name);
        let _ = write!(self.json, "{number}");
    }

    /// Adds a field that is true or false.
    pub fn flag(&mut self, name: &str, flag: bool) {
        self.name(name);
        self.json.push_str(if flag { "true" } else { "false" });
    }

    /// Adds a field whose value is a list of JSON values.
    pub fn list<'a, J: Into<JsonRef<'a>>>(&mut self, name: &str, items: impl IntoIterator<Item = J>) {
        self.name(name);
        self.json.push('[');
        push_items(&mut self.json, items);
    }

    /// Adds a field whose value is a list of strings.
    pub fn texts<S: AsRef<str>>(&mut self, name: &str, items: impl IntoIterator<Item = S>) {
        self.name(name);
        self.json.push('[');
        for (at, item) in items.into_iter().enumerate() {
            if at > 0 {
                self.json.push(',');
            }
            push_string(&mut self.json, item.as_ref());
        }
        self.json.push(']');
    }

    /// Adds a field whose value is an object that `write` writes.
    pub fn object<T>(&mut self, name: &str, write: impl FnOnce(&mut Self) -> T) -> T {
        self.name(name);
        self.inside(write)
    }

    /// Adds a field whose value is a list that `write` writes.
    pub fn list_with<T>(&mut self, name: &str, write: impl FnOnce(&mut List<'_>) -> T) -> T {
        self.name(name);
        self.json.push('[');
        let begin = self.json.len();
        let written = write(&mut List { around: self, begin });
        self.json.push(']');
        written
    }

    fn inside<T>(&mut self, write: impl FnOnce(&mut Self) -> T) -> T {
        let outer = std::mem::replace(&mut self.begin, self.json.len());
        self.json.push('{');
        let written = write(self);
        self.json.push('}');
        self.begin = outer;
        written
    }

    /// Adds a last field and ends the object. The field's value is JSON that stands elsewhere in pieces, which are not copied. The
    /// pieces that are given back are the JSON of the object together.
    pub fn finish_around(mut self, name: &str, value: Vec<Bytes>) -> Vec<Bytes> {
        debug_assert_eq!(self.begin, 0, "only the outermost object is finished");
        self.name(name);
        let mut pieces = vec![Bytes::from(self.json)];
        pieces.extend(value);
        pieces.push(Bytes::from_static(b"}"));
        pieces
    }

    /// Ends the object and gives its JSON.
    pub fn finish(mut self) -> JsonText {
        debug_assert_eq!(self.begin, 0, "only the outermost object is finished");
        self.json.push('}');
        JsonText(self.json)
    }
}

/// A list inside an object that is being written, item by item.
#[derive(Debug)]
pub struct List<'a> {
    around: &'a mut Object,
    /// Where its first item begins.
    begin: usize,
}

impl List<'_> {
    fn begin_item(&mut self) {
        // No item is empty, so a list that has some is longer than at its beginning.
        if self.around.json.len() > self.begin {
            self.around.json.push(',');
        }
    }

    /// Adds an item that is JSON already.
    pub fn json<'j>(&mut self, json: impl Into<JsonRef<'j>>) {
        self.begin_item();
        self.around.json.push_str(json.into().0);
    }

    /// Adds an item that is an object, which `write` writes.
    pub fn object<T>(&mut self, write: impl FnOnce(&mut Object) -> T) -> T {
        self.begin_item();
        self.around.inside(write)
    }
}

/// A JSON list or object that is written piece by piece, because it may be larger than what is held in memory at a time. What
/// is added stands in the list or object that was opened last.
#[derive(Debug)]
pub struct Pieces {
    json: String,
    /// The ends of the lists and objects that are open, the innermost last.
    ends: Vec<char>,
    /// Whether the innermost of them is empty so far.
    is_empty: bool,
}

impl Pieces {
    /// A list without items.
    pub fn list() -> Self {
        Self { json: String::from("["), ends: vec![']'], is_empty: true }
    }

    /// An object without fields.
    pub fn object() -> Self {
        Self { json: String::from("{"), ends: vec!['}'], is_empty: true }
    }

    fn separate(&mut self) {
        debug_assert!(!self.ends.is_empty(), "nothing is added after the end");
        if !std::mem::replace(&mut self.is_empty, false) {
            self.json.push(',');
        }
    }

    fn name(&mut self, name: &str) {
        debug_assert_eq!(self.ends.last(), Some(&'}'), "only an object has fields");
        self.separate();
        push_string(&mut self.json, name);
        self.json.push(':');
    }

    /// Adds an item to a list.
    pub fn item<'a>(&mut self, json: impl Into<JsonRef<'a>>) {
        debug_assert_eq!(self.ends.last(), Some(&']'), "only a list has items");
        self.separate();
        self.json.push_str(json.into().0);
    }

    /// Adds an object to a list, and opens it.
    pub fn open_item(&mut self) {
        debug_assert_eq!(self.ends.last(), Some(&']'), "only a list has items");
        self.separate();
        self.json.push('{');
        self.ends.push('}');
        self.is_empty = true;
    }

    /// Adds a field to an object, whose value is JSON already.
    pub fn field<'a>(&mut self, name: &str, json: impl Into<JsonRef<'a>>) {
        self.name(name);
        self.json.push_str(json.into().0);
    }

    /// Adds a field to an object, and opens a list as its value.
    pub fn open_list(&mut self, name: &str) {
        self.name(name);
        self.json.push('[');
        self.ends.push(']');
        self.is_empty = true;
    }

    /// Adds a field to an object, and opens an object as its value.
    pub fn open_object(&mut self, name: &str) {
        self.name(name);
        self.json.push('{');
        self.ends.push('}');
        self.is_empty = true;
    }

    /// Ends the list or object that was opened last.
    pub fn close(&mut self) {
        debug_assert!(!self.ends.is_empty(), "what is open is closed once");
        self.json.extend(self.ends.pop());
        self.is_empty = false;
    }

    /// The number of bytes that were written since the last piece was taken.
    pub fn byte_count(&self) -> usize {
        self.json.len()
    }

    /// Takes what was written since the last piece. The pieces together are the JSON.
    pub fn take(&mut self) -> Bytes {
        std::mem::take(&mut self.json).into()
    }

    /// Ends everything that is open, and takes the last piece.
    pub fn finish(&mut self) -> Bytes {
        while !self.ends.is_empty() {
            self.close();
        }
        self.take()
    }
}

/// Writes the items of a list, and its end.
fn push_items<'a, J: Into<JsonRef<'a>>>(json: &mut String, items: impl IntoIterator<Item = J>) {
    for (at, item) in items.into_iter().enumerate() {
        if at > 0 {
            json.push(',');
        }
        json.push_str(item.into().0);
    }
    json.push(']');
}

/// Writes a string as canonical JSON does: only what must be escaped is.
fn push_string(json: &mut String, text: &str) {
    let is_plain = |byte: u8| byte >= 0x20 && byte != b'"' && byte != b'\\';
    if text.bytes().all(is_plain) {
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
        object.list("l", [&JsonText::string("\u{2028}"), &JsonText::list([JsonRef::stored(b"{}")])]);
        object.json("j", JsonRef::stored(br#"{"k":1}"#));
        let value: serde_json::Value = serde_json::from_str(object.finish().as_str()).unwrap();
        let expected = serde_json::json!({
            "a\"b": "c\nd", "n": 7, "f": false, "t": ["x", "y\\"], "l": ["\u{2028}", [{}]], "j": { "k": 1 },
        });
        assert_eq!(value, expected);
        assert_eq!(Object::new().finish().as_str(), "{}");
        let mut around = Object::new();
        around.number("n", 1);
        let pieces = around.finish_around("v", vec![Bytes::from_static(b"[1,"), Bytes::from_static(b"2]")]);
        assert_eq!(pieces.concat(), br#"{"n":1,"v":[1,2]}"#);
    }

    #[test]
    fn objects_and_lists_are_written_inside_others() {
        let mut object = Object::new();
        object.object("empty", |inner| assert!(inner.is_empty()));
        assert!(!object.is_empty());
        object.object("o", |inner| {
            inner.object("p", |inner| inner.number("n", 1));
            inner.list_with("l", |_| ());
            inner.text("t", "u");
        });
        object.list_with("l", |list| {
            list.json(&JsonText::string("a"));
            list.object(|item| item.flag("f", true));
            list.object(|item| item.list_with("m", |list| list.object(|_| ())));
        });
        object.number("n", 2);
        let value: serde_json::Value = serde_json::from_str(object.finish().as_str()).unwrap();
        let expected = serde_json::json!({
            "empty": {}, "o": { "p": { "n": 1 }, "l": [], "t": "u" }, "l": ["a", { "f": true }, { "m": [{}] }], "n": 2,
        });
        assert_eq!(value, expected);
    }

    #[test]
    fn pieces_are_json_however_they_are_taken() {
        let value = JsonText::string("v");
        let mut pieces = Pieces::object();
        pieces.field("failures", &JsonText::from(&serde_json::json!({})));
        pieces.open_object("keys");
        pieces.open_object("@a\"b");
        let mut whole = Vec::from(pieces.take());
        assert_eq!(pieces.byte_count(), 0);
        pieces.field("D", &value);
        assert_eq!(pieces.byte_count(), r#""D":"v""#.len());
        whole.extend(pieces.take());
        pieces.field("E", &value);
        pieces.close();
        pieces.open_list("@c");
        pieces.item(&value);
        whole.extend(pieces.take());
        pieces.item(&value);
        pieces.close();
        pieces.open_object("@d");
        whole.extend(pieces.finish());
        let value: serde_json::Value = serde_json::from_slice(&whole).unwrap();
        let keys = serde_json::json!({ "@a\"b": { "D": "v", "E": "v" }, "@c": ["v", "v"], "@d": {} });
        assert_eq!(value, serde_json::json!({ "failures": {}, "keys": keys }));
        let mut list = Pieces::list();
        list.item(&JsonText::string("v"));
        assert_eq!(list.finish(), r#"["v"]"#);
        assert_eq!((Pieces::list().finish(), Pieces::object().finish()), ("[]".into(), "{}".into()));
        let mut listed = Pieces::list();
        listed.item(&JsonText::string("v"));
        listed.open_item();
        listed.field("E", &JsonText::string("v"));
        assert_eq!(listed.finish(), r#"["v",{"E":"v"}]"#);
    }

    proptest! {
        #[test]
        fn any_string_comes_back(string: String) {
            let json = JsonText::string(&string);
            prop_assert_eq!(serde_json::from_str::<String>(json.as_str()).unwrap(), string);
        }
    }
}
