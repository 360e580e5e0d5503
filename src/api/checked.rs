//! The JSON of a request's body, checked in one pass over its bytes before anything is built from it.
//!
//! The pass refuses bytes that are not JSON, bytes after its end, and JSON that a later reader could not take in: deep
//! nesting, numbers too large for a float, halves of characters, more values than anybody needs. It remembers where the
//! fields of the outermost object stand, so that a handler may keep or read one of them without a second pass.

use std::ops::Range;

use bytes::Bytes;
use ruma::api::error::ErrorKind;
use serde::Deserialize;

use crate::{
    api::misfit,
    error::{Refusal, Result},
    json::{JsonText, Object},
};

/// The deepest JSON that is accepted, in levels. Stored JSON is wrapped in a few more levels when it is shown, and
/// readers of JSON commonly stop at 127.
pub(crate) const NESTING_MAX: u32 = 110;

/// A body has at most this many values, because each costs many times its bytes once it is built.
pub(crate) const VALUES_MAX: u32 = 100_000;

/// A number without exponent and with at most this many characters fits a float, so that it need not be parsed.
const PLAIN_DIGITS_MAX: usize = 100;

/// A JSON object whose every byte was checked.
#[derive(Debug, Clone)]
pub struct Checked {
    bytes: Bytes,
    fields: Vec<Field>,
}

/// A field of the outermost object: where its name, quotes included, and its value stand.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Field {
    name: Range<usize>,
    value: Range<usize>,
}

impl Checked {
    /// Makes an object without fields.
    pub(crate) fn empty() -> Self {
        Self { bytes: Bytes::from_static(b"{}"), fields: Vec::new() }
    }

    /// Checks that these bytes are one JSON object. Errors: 400 `M_NOT_JSON`, 400 `M_BAD_JSON`, 413 `M_TOO_LARGE`.
    pub(crate) fn check(bytes: Bytes) -> Result<Self, Refusal> {
        let fields = match std::str::from_utf8(&bytes) {
            Ok(_) => Pass::over(&bytes).map_err(refusal)?,
            Err(_) => return Err(refusal(Flaw::NotJson)),
        };
        Ok(Self { bytes, fields })
    }

    /// The object as it came, without white space around it.
    pub(crate) fn bytes(&self) -> Bytes {
        self.bytes.slice_ref(self.bytes.trim_ascii())
    }

    /// The value of the field of this name as it came. If several have the name, the last one counts.
    pub(crate) fn field(&self, name: &str) -> Option<&str> {
        self.place(name).and_then(|field| self.text(&field.value))
    }

    /// Replaces the value of a field by this JSON text. Without a field of this name, nothing changes.
    pub(crate) fn with_field(self, name: &str, value: &str) -> Result<Self, Refusal> {
        let Some(place) = self.place(name).map(|field| field.value.clone()) else { return Ok(self) };
        let (before, after) = (self.bytes.get(..place.start), self.bytes.get(place.end..));
        let parts = [before.unwrap_or_default(), value.as_bytes(), after.unwrap_or_default()];
        Self::check(parts.concat().into())
    }

    /// Adds an empty list as a field, unless there is a field of this name.
    pub(crate) fn or_list(self, name: &str) -> Result<Self, Refusal> {
        let open = self.bytes.iter().position(|byte| *byte == b'{');
        let (Some(open), None) = (open, self.place(name)) else { return Ok(self) };
        let (before, after) = self.bytes.split_at(open.saturating_add(1));
        let comma = if self.fields.is_empty() { "" } else { "," };
        let mut added = Object::new();
        added.list(name, &[] as &[JsonText; 0]);
        let added = added.finish();
        let field = added.as_str().trim_start_matches('{').trim_end_matches('}');
        Self::check([before, field.as_bytes(), comma.as_bytes(), after].concat().into())
    }

    /// Reads the whole object as a type. Refuses what does not fit: 400 `M_BAD_JSON`, or `M_MISSING_PARAM` if a field
    /// is missing.
    pub(crate) fn read<'a, T: Deserialize<'a>>(&'a self) -> Result<T> {
        serde_json::from_slice(&self.bytes).map_err(|error| misfit::of_body(&error).into())
    }

    fn place(&self, name: &str) -> Option<&Field> {
        self.fields.iter().rev().find(|field| {
            let quoted = self.text(&field.name).unwrap_or_default();
            if quoted.contains('\\') {
                serde_json::from_str::<String>(quoted).is_ok_and(|written| written == name)
            } else {
                quoted.get(1..quoted.len().saturating_sub(1)) == Some(name)
            }
        })
    }

    fn text(&self, place: &Range<usize>) -> Option<&str> {
        self.bytes.get(place.clone()).and_then(|bytes| std::str::from_utf8(bytes).ok())
    }
}

impl AsRef<[u8]> for Checked {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// The reason why bytes are not taken for a JSON object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flaw {
    NotJson,
    NotAnObject,
    TooDeep,
    TooMany,
    OddValue,
}

fn refusal(flaw: Flaw) -> Refusal {
    match flaw {
        Flaw::NotJson => Refusal::new(ErrorKind::NotJson, "The request's body is not JSON."),
        Flaw::NotAnObject => Refusal::bad_json("The request's body is not an object."),
        Flaw::TooDeep => Refusal::bad_json(format!(
            "The request's body is nested too deeply: more than {NESTING_MAX} levels."
        )),
        Flaw::TooMany => {
            Refusal::too_large(format!("The request's body holds more than {VALUES_MAX} values."))
        }
        Flaw::OddValue => Refusal::bad_json(
            "The request's body holds a number too large for a float, or half of a character.",
        ),
    }
}

/// One pass over JSON, from the first byte to the last.
struct Pass<'a> {
    bytes: &'a [u8],
    at: usize,
    /// One bit for each open level, the innermost lowest: set for an object.
    open: u128,
    depth: u32,
    values: u32,
    /// There is a value that JSON's grammar allows but readers cannot take in.
    is_odd: bool,
    fields: Vec<Field>,
}

impl<'a> Pass<'a> {
    /// Checks these bytes, and says where the fields of the outermost object stand.
    fn over(bytes: &'a [u8]) -> Result<Vec<Field>, Flaw> {
        let mut pass = Self { bytes, at: 0, open: 0, depth: 0, values: 0, is_odd: false, fields: Vec::new() };
        pass.skip_space();
        let is_object = pass.peek() == Some(b'{');
        pass.document()?;
        pass.skip_space();
        match () {
            () if pass.at < bytes.len() => Err(Flaw::NotJson),
            () if pass.is_odd => Err(Flaw::OddValue),
            () if !is_object => Err(Flaw::NotAnObject),
            () => Ok(pass.fields),
        }
    }

    /// Passes over one value with everything in it. Levels are counted and not recursed into, so that deep nesting
    /// costs no stack.
    fn document(&mut self) -> Result<(), Flaw> {
        loop {
            // A value begins at this byte.
            self.values += 1;
            if self.values > VALUES_MAX {
                return Err(Flaw::TooMany);
            }
            let began_level = match self.next()? {
                b'{' => self.enter(true)?,
                b'[' => self.enter(false)?,
                b'"' => self.string().map(|()| false)?,
                b't' => self.word(b"rue")?,
                b'f' => self.word(b"alse")?,
                b'n' => self.word(b"ull")?,
                digit @ (b'-' | b'0'..=b'9') => self.number(digit).map(|()| false)?,
                _ => return Err(Flaw::NotJson),
            };
            if !began_level && !self.goes_on()? {
                return Ok(());
            }
        }
    }

    /// Begins an object or array, up to its first value. True if a value follows; an empty one ends as a value does.
    fn enter(&mut self, is_object: bool) -> Result<bool, Flaw> {
        if self.depth == NESTING_MAX {
            return Err(Flaw::TooDeep);
        }
        self.depth += 1;
        self.open = self.open << 1 | u128::from(is_object);
        self.skip_space();
        let end = if is_object { b'}' } else { b']' };
        if self.peek() == Some(end) {
            self.at += 1;
            self.leave();
            return Ok(false);
        }
        if is_object {
            self.name()?;
        }
        Ok(true)
    }

    fn leave(&mut self) {
        debug_assert!(self.depth > 0, "no level is left that was not entered");
        self.depth -= 1;
        self.open >>= 1;
    }

    /// Goes on after a value to the next one, past the ends of levels. False if the outermost value has ended.
    fn goes_on(&mut self) -> Result<bool, Flaw> {
        loop {
            if self.depth <= 1
                && let Some(field) = self.fields.last_mut().filter(|field| field.value.end == 0)
            {
                field.value.end = self.at;
            }
            if self.depth == 0 {
                return Ok(false);
            }
            let in_object = self.open & 1 == 1;
            self.skip_space();
            match (self.next()?, in_object) {
                (b',', true) => {
                    self.skip_space();
                    self.name()?;
                    return Ok(true);
                }
                (b',', false) => {
                    self.skip_space();
                    return Ok(true);
                }
                (b'}', true) | (b']', false) => self.leave(),
                _ => return Err(Flaw::NotJson),
            }
        }
    }

    /// Passes over the name of a field and the colon after it, up to its value.
    fn name(&mut self) -> Result<(), Flaw> {
        let began = self.at;
        if self.next()? != b'"' {
            return Err(Flaw::NotJson);
        }
        self.string()?;
        let name = began..self.at;
        self.skip_space();
        if self.next()? != b':' {
            return Err(Flaw::NotJson);
        }
        self.skip_space();
        if self.depth == 1 && self.open & 1 == 1 {
            // The end of the value is not known yet. Zero stands for that, because no value ends at the first byte.
            self.fields.push(Field { name, value: self.at..0 });
        }
        Ok(())
    }

    /// Passes over the rest of a string after its first quote.
    fn string(&mut self) -> Result<(), Flaw> {
        loop {
            match self.next()? {
                b'"' => return Ok(()),
                b'\\' => self.escape()?,
                0..=0x1f => return Err(Flaw::NotJson),
                _ => {}
            }
        }
    }

    /// Passes over the rest of an escape after its backslash. The two halves of a character are valid only side by
    /// side.
    fn escape(&mut self) -> Result<(), Flaw> {
        match self.next()? {
            b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => Ok(()),
            b'u' => {
                let unit = self.unit()?;
                let is_second_half = |unit: u32| (0xdc00..0xe000).contains(&unit);
                if (0xd800..0xdc00).contains(&unit) {
                    let follows = self.bytes.get(self.at..self.at + 2) == Some(br"\u");
                    if !follows {
                        self.is_odd = true;
                        return Ok(());
                    }
                    self.at += 2;
                    let second = self.unit()?;
                    self.is_odd |= !is_second_half(second);
                } else {
                    self.is_odd |= is_second_half(unit);
                }
                Ok(())
            }
            _ => Err(Flaw::NotJson),
        }
    }

    /// Reads the four hexadecimal digits of an escape.
    fn unit(&mut self) -> Result<u32, Flaw> {
        let mut unit = 0;
        for _ in 0..4 {
            let digit = char::from(self.next()?).to_digit(16).ok_or(Flaw::NotJson)?;
            unit = unit << 4 | digit;
        }
        Ok(unit)
    }

    /// Passes over the rest of a number after its first byte.
    fn number(&mut self, first: u8) -> Result<(), Flaw> {
        let began = self.at - 1;
        let first = if first == b'-' { self.next()? } else { first };
        match first {
            b'0' => {}
            b'1'..=b'9' => self.skip_digits(),
            _ => return Err(Flaw::NotJson),
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.require_digits()?;
        }
        let has_exponent = matches!(self.peek(), Some(b'e' | b'E'));
        if has_exponent {
            self.at += 1;
            if matches!(self.peek(), Some(b'+' | b'-')) {
                self.at += 1;
            }
            self.require_digits()?;
        }
        if has_exponent || self.at - began > PLAIN_DIGITS_MAX {
            let text = self.bytes.get(began..self.at).and_then(|text| std::str::from_utf8(text).ok());
            let number = text.and_then(|text| text.parse::<f64>().ok());
            self.is_odd |= !number.is_some_and(f64::is_finite);
        }
        Ok(())
    }

    fn require_digits(&mut self) -> Result<(), Flaw> {
        let began = self.at;
        self.skip_digits();
        if self.at > began { Ok(()) } else { Err(Flaw::NotJson) }
    }

    fn skip_digits(&mut self) {
        while self.peek().is_some_and(|byte| byte.is_ascii_digit()) {
            self.at += 1;
        }
    }

    /// Passes over the rest of a word such as `true`. Always false, because no level begins with it.
    fn word(&mut self, rest: &[u8]) -> Result<bool, Flaw> {
        let end = self.at + rest.len();
        if self.bytes.get(self.at..end) != Some(rest) {
            return Err(Flaw::NotJson);
        }
        self.at = end;
        Ok(false)
    }

    fn skip_space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn next(&mut self) -> Result<u8, Flaw> {
        let byte = self.peek().ok_or(Flaw::NotJson)?;
        self.at += 1;
        Ok(byte)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn flaw(json: &str) -> Option<Flaw> {
        Pass::over(json.as_bytes()).err()
    }

    #[test]
    fn whatever_is_not_one_object_that_can_be_read_is_refused() {
        let nested =
            |levels: usize| format!("{{\"a\":{}{}}}", "[".repeat(levels - 1), "]".repeat(levels - 1));
        for (json, expected) in [
            ("{}", None),
            (" \r\n\t{ } ", None),
            (r#"{"a":1,"b":[true,false,null,"x",{"c":{}}],"d":-0.5e+3}"#, None),
            (r#"{"a":"\ud83d\ude00 \\ud800 \u00e9","b":1e9}"#, None),
            ("", Some(Flaw::NotJson)),
            (" ", Some(Flaw::NotJson)),
            ("{", Some(Flaw::NotJson)),
            (r#"{"a":1}}"#, Some(Flaw::NotJson)),
            ("{}x", Some(Flaw::NotJson)),
            ("{} {}", Some(Flaw::NotJson)),
            (r#"{"a":1,}"#, Some(Flaw::NotJson)),
            (r#"{,"a":1}"#, Some(Flaw::NotJson)),
            (r#"{"a" 1}"#, Some(Flaw::NotJson)),
            (r#"{a:1}"#, Some(Flaw::NotJson)),
            (r#"{"a":[1,]}"#, Some(Flaw::NotJson)),
            (r#"{"a":[1}]"#, Some(Flaw::NotJson)),
            (r#"{"a":01}"#, Some(Flaw::NotJson)),
            (r#"{"a":1.}"#, Some(Flaw::NotJson)),
            (r#"{"a":+1}"#, Some(Flaw::NotJson)),
            (r#"{"a":.5}"#, Some(Flaw::NotJson)),
            (r#"{"a":1e}"#, Some(Flaw::NotJson)),
            (r#"{"a":-}"#, Some(Flaw::NotJson)),
            (r#"{"a":tru}"#, Some(Flaw::NotJson)),
            (r#"{"a":nullx}"#, Some(Flaw::NotJson)),
            ("{\"a\":\"\n\"}", Some(Flaw::NotJson)),
            (r#"{"a":"\x"}"#, Some(Flaw::NotJson)),
            (r#"{"a":"\u12"}"#, Some(Flaw::NotJson)),
            (r#"{"a":"\ud800""#, Some(Flaw::NotJson)),
            ("[1e9", Some(Flaw::NotJson)),
            ("[1e9]", Some(Flaw::NotAnObject)),
            ("7", Some(Flaw::NotAnObject)),
            ("\"text\"", Some(Flaw::NotAnObject)),
            (r#"{"a":-1e999}"#, Some(Flaw::OddValue)),
            (r#"{"a":"\ud800"}"#, Some(Flaw::OddValue)),
            (r#"{"a":"\ud800\u0041"}"#, Some(Flaw::OddValue)),
            (r#"{"a":["\udc00\ud800"]}"#, Some(Flaw::OddValue)),
            (&format!("{{\"a\":{}}}", "9".repeat(400)), Some(Flaw::OddValue)),
            (&format!("{{\"a\":{}}}", "9".repeat(200)), None),
            (&nested(NESTING_MAX as usize), None),
            (&nested(NESTING_MAX as usize + 1), Some(Flaw::TooDeep)),
            (&nested(100_000), Some(Flaw::TooDeep)),
            (&format!("{{\"a\":[{}1]}}", "[],".repeat(VALUES_MAX as usize)), Some(Flaw::TooMany)),
        ] {
            let shown: String = json.chars().take(60).collect();
            assert_eq!(flaw(json), expected, "{shown}");
        }
        assert!(Checked::check(Bytes::from_static(b"{\"\xff\":1}")).is_err());
    }

    #[test]
    fn fields_are_found_as_they_came() {
        let json = Checked::check(Bytes::from_static(
            br#" {"a": [1, {"b": 2}] ,"b":"x","a\u0062":{"a":0} , "b" : 3.50 , "e":{}} "#,
        ))
        .unwrap();
        assert_eq!(json.field("a"), Some(r#"[1, {"b": 2}]"#));
        assert_eq!(json.field("b"), Some("3.50"));
        assert_eq!(json.field("ab"), Some(r#"{"a":0}"#));
        assert_eq!(json.field("e"), Some("{}"));
        assert_eq!(json.field("c"), None);
        assert!(json.bytes().starts_with(b"{") && json.bytes().ends_with(b"}"));
        let json = json.with_field("ab", r#"{"new":[]}"#).unwrap();
        assert_eq!(json.field("ab"), Some(r#"{"new":[]}"#));
        assert_eq!(json.field("e"), Some("{}"));
        assert_eq!(json.clone().with_field("none", "1").unwrap().bytes(), json.bytes());
        assert_eq!(Checked::empty().field("a"), None);
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            "\\PC{0,12}".prop_map(Value::from),
            "[\"\\\\\u{0}-\u{20}\u{2028}]{0,6}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 30, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::hash_map("\\PC{0,6}|[\"\\\\]{1,3}", inner, 0..5)
                    .prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn the_pass_agrees_with_a_parser(value in value(), cut in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let text = value.to_string();
            prop_assert_eq!(flaw(&text).is_none(), value.is_object());
            if let Value::Object(fields) = &value {
                let json = Checked::check(text.clone().into()).unwrap();
                for (name, value) in fields {
                    prop_assert_eq!(json.field(name).unwrap(), value.to_string());
                }
            }
            // One byte is replaced, and the pass must still agree with the parser.
            let mut bytes = text.into_bytes();
            let at = cut.index(bytes.len());
            bytes[at] = byte;
            let is_object = serde_json::from_slice::<Value>(&bytes).is_ok_and(|value| value.is_object());
            prop_assert_eq!(Checked::check(bytes.into()).is_ok(), is_object);
        }
    }
}
