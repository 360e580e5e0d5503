//! JSON as a tree that keeps what the sender wrote, and its canonical form.
//!
//! Documents and request bodies of other servers are signed, so that their exact meaning must survive parsing: numbers
//! are kept as text, whatever their size, and written again by the rules of
//! [canonical JSON](https://spec.matrix.org/v1.19/appendices/#canonical-json). Events of room versions 1 to 5 may hold numbers
//! that canonical JSON does not know; those are written as other servers of the day write them.

use std::{borrow::Cow, collections::BTreeMap};

/// JSON nests at most this deep, here and while it streams in: every level costs stack where it is parsed.
pub const DEPTH_MAX: usize = 128;

/// The largest whole number of canonical JSON; a float that is larger keeps its exponent.
const WHOLE_MAX: f64 = 9_007_199_254_740_991.0;

/// One JSON value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Json {
    /// The word `null`.
    Null,
    /// A truth value.
    Flag(bool),
    /// A number in canonical form, as text: it may be larger than any type of ours.
    Number(Box<str>),
    /// A string without its escapes.
    Text(String),
    /// A list in its order.
    List(Vec<Self>),
    /// An object, sorted by names; of two equal names the last one counts.
    Object(BTreeMap<String, Self>),
}

/// The bytes are no JSON that can be handed on; the text says what was wrong, and never what was in it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not valid JSON: {0}")]
pub struct NotJson(pub(crate) &'static str);

/// A text in canonical JSON. It exists only where [`Json`] wrote it, so it may be put into other JSON as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Canonical(String);

impl Canonical {
    /// The text, which is valid as it stands.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// A text that was put together from canonical pieces, in canonical order.
    pub(crate) fn written(text: String) -> Self {
        debug_assert!(
            // What is put together may nest deeper than what can be parsed.
            Json::parse(text.as_bytes()).map_or(true, |json| json.canonical().0 == text),
            "what was put together is not canonical"
        );
        Self(text)
    }

    /// The canonical form of these bytes. Errors: [`NotJson`].
    pub fn of(bytes: &[u8]) -> Result<Self, NotJson> {
        Ok(Json::parse(bytes)?.canonical())
    }
}

impl From<Canonical> for String {
    fn from(canonical: Canonical) -> Self {
        canonical.0
    }
}

impl Json {
    /// Parses one value, which may stand between blanks. Errors: [`NotJson`], also for more than [`DEPTH_MAX`] levels and for
    /// numbers that nobody can write, such as `1e400`.
    pub fn parse(bytes: &[u8]) -> Result<Self, NotJson> {
        let text = std::str::from_utf8(bytes).map_err(|_| NotJson("it is not UTF-8"))?;
        let mut parser = Parser { rest: text };
        let value = parser.value(0)?;
        parser.skip_blanks();
        if parser.rest.is_empty() { Ok(value) } else { Err(NotJson("something follows the value")) }
    }

    /// A JSON string.
    pub fn text(text: impl Into<String>) -> Self {
        Self::Text(text.into())
    }

    /// A whole number.
    pub fn number(number: u64) -> Self {
        Self::Number(number.to_string().into())
    }

    /// An object of these fields.
    pub fn object<N: Into<String>>(fields: impl IntoIterator<Item = (N, Self)>) -> Self {
        Self::Object(fields.into_iter().map(|(name, value)| (name.into(), value)).collect())
    }

    /// A field of an object; none where this is no object.
    pub fn field(&self, name: &str) -> Option<&Self> {
        self.as_object()?.get(name)
    }

    /// The fields, if this is an object.
    pub const fn as_object(&self) -> Option<&BTreeMap<String, Self>> {
        match self {
            Self::Object(fields) => Some(fields),
            Self::Null | Self::Flag(_) | Self::Number(_) | Self::Text(_) | Self::List(_) => None,
        }
    }

    /// The items, if this is a list.
    pub fn as_list(&self) -> Option<&[Self]> {
        match self {
            Self::List(items) => Some(items),
            Self::Null | Self::Flag(_) | Self::Number(_) | Self::Text(_) | Self::Object(_) => None,
        }
    }

    /// The text, if this is a string.
    pub fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            Self::Null | Self::Flag(_) | Self::Number(_) | Self::List(_) | Self::Object(_) => None,
        }
    }

    /// A moment in milliseconds, if this is a number that can be one: a fraction is cut off, negative numbers are none.
    pub fn as_ms(&self) -> Option<u64> {
        let Self::Number(number) = self else { return None };
        if let Ok(whole) = number.parse() {
            return Some(whole);
        }
        let float: f64 = number.parse().ok()?;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked right before")]
        (0.0..=WHOLE_MAX).contains(&float).then_some(float as u64)
    }

    /// The canonical form.
    pub fn canonical(&self) -> Canonical {
        let mut out = String::new();
        self.write(&mut out);
        Canonical(out)
    }

    /// What a signature of this object covers: everything but `signatures` and `unsigned`
    /// ([signing details](https://spec.matrix.org/v1.19/appendices/#signing-details)).
    pub fn signed_part(&self) -> Canonical {
        let mut out = String::new();
        match self {
            Self::Object(fields) => {
                write_object(&mut out, fields, |name| name != "signatures" && name != "unsigned");
            }
            other => other.write(&mut out),
        }
        Canonical(out)
    }

    fn write(&self, out: &mut String) {
        match self {
            Self::Null => out.push_str("null"),
            Self::Flag(true) => out.push_str("true"),
            Self::Flag(false) => out.push_str("false"),
            Self::Number(number) => out.push_str(number),
            Self::Text(text) => write_text(out, text),
            Self::List(items) => {
                out.push('[');
                for (index, item) in items.iter().enumerate() {
                    if index > 0 {
                        out.push(',');
                    }
                    item.write(out);
                }
                out.push(']');
            }
            Self::Object(fields) => write_object(out, fields, |_| true),
        }
    }
}

fn write_object(out: &mut String, fields: &BTreeMap<String, Json>, keeps: impl Fn(&str) -> bool) {
    out.push('{');
    let mut is_first = true;
    for (name, value) in fields.iter().filter(|(name, _)| keeps(name)) {
        if !std::mem::take(&mut is_first) {
            out.push(',');
        }
        write_text(out, name);
        out.push(':');
        value.write(out);
    }
    out.push('}');
}

/// Writes a string with the shortest escapes, as the grammar of canonical JSON has it.
pub(crate) fn write_text(out: &mut String, text: &str) {
    use std::fmt::Write as _;
    out.push('"');
    for it in text.chars() {
        match it {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\u{8}' => out.push_str("\\b"),
            '\t' => out.push_str("\\t"),
            '\n' => out.push_str("\\n"),
            '\u{c}' => out.push_str("\\f"),
            '\r' => out.push_str("\\r"),
            it if it < ' ' => {
                // Writing to a string cannot fail.
                let _ = write!(out, "\\u{:04x}", u32::from(it));
            }
            it => out.push(it),
        }
    }
    out.push('"');
}

struct Parser<'t> {
    rest: &'t str,
}

impl<'t> Parser<'t> {
    fn skip_blanks(&mut self) {
        self.rest = self.rest.trim_start_matches([' ', '\t', '\n', '\r']);
    }

    /// Whether the next character that is no blank is this one, which is then behind us.
    fn takes(&mut self, it: char) -> bool {
        self.skip_blanks();
        match self.rest.strip_prefix(it) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn word(&mut self, word: &str, value: Json) -> Result<Json, NotJson> {
        self.rest = self.rest.strip_prefix(word).ok_or(NotJson("a value is none"))?;
        Ok(value)
    }

    fn value(&mut self, depth: usize) -> Result<Json, NotJson> {
        self.skip_blanks();
        match self.rest.as_bytes().first() {
            Some(b'{' | b'[') if depth >= DEPTH_MAX => Err(NotJson("it nests too deep")),
            Some(b'{') => self.object(depth),
            Some(b'[') => self.list(depth),
            Some(b'"') => Ok(Json::Text(self.string()?)),
            Some(b't') => self.word("true", Json::Flag(true)),
            Some(b'f') => self.word("false", Json::Flag(false)),
            Some(b'n') => self.word("null", Json::Null),
            Some(b'-' | b'0'..=b'9') => self.number(),
            Some(_) => Err(NotJson("a value is none")),
            None => Err(NotJson("it ends too early")),
        }
    }

    fn object(&mut self, depth: usize) -> Result<Json, NotJson> {
        let mut fields = BTreeMap::new();
        self.takes('{');
        if self.takes('}') {
            return Ok(Json::Object(fields));
        }
        loop {
            self.skip_blanks();
            let name = self.string()?;
            if !self.takes(':') {
                return Err(NotJson("a name has no value"));
            }
            fields.insert(name, self.value(depth + 1)?);
            if self.takes('}') {
                return Ok(Json::Object(fields));
            }
            if !self.takes(',') {
                return Err(NotJson("an object does not end"));
            }
        }
    }

    fn list(&mut self, depth: usize) -> Result<Json, NotJson> {
        let mut items = Vec::new();
        self.takes('[');
        if self.takes(']') {
            return Ok(Json::List(items));
        }
        loop {
            items.push(self.value(depth + 1)?);
            if self.takes(']') {
                return Ok(Json::List(items));
            }
            if !self.takes(',') {
                return Err(NotJson("a list does not end"));
            }
        }
    }

    fn string(&mut self) -> Result<String, NotJson> {
        let inside = self.rest.strip_prefix('"').ok_or(NotJson("a name is no string"))?;
        let end = string_end(inside.as_bytes()).ok_or(NotJson("a string does not end"))?;
        let (text, rest) = inside.split_at_checked(end).ok_or(NotJson("a string does not end"))?;
        self.rest = rest.strip_prefix('"').ok_or(NotJson("a string does not end"))?;
        if text.contains('\\') {
            // The escapes of JSON have one reader; this gives it the string with its quotes.
            let quoted = format!("\"{text}\"");
            return serde_json::from_str(&quoted).map_err(|_| NotJson("a string has a wrong escape"));
        }
        if text.bytes().any(|it| it < b' ') {
            return Err(NotJson("a string holds a control character"));
        }
        Ok(text.to_owned())
    }

    fn number(&mut self) -> Result<Json, NotJson> {
        let is_part = |it: char| it.is_ascii_digit() || matches!(it, '-' | '+' | '.' | 'e' | 'E');
        let end = self.rest.find(|it| !is_part(it)).unwrap_or(self.rest.len());
        let (number, rest) = self.rest.split_at_checked(end).ok_or(NotJson("a number is none"))?;
        self.rest = rest;
        if !is_number(number) {
            return Err(NotJson("a number is none"));
        }
        Ok(Json::Number(canonical_number(number)?.into()))
    }
}

/// The place of the quote that ends a string whose first quote is behind us.
fn string_end(bytes: &[u8]) -> Option<usize> {
    let mut is_escaped = false;
    bytes.iter().position(|byte| {
        if std::mem::take(&mut is_escaped) {
            return false;
        }
        is_escaped = *byte == b'\\';
        *byte == b'"'
    })
}

/// Whether this follows the grammar of JSON: `[ "-" ] int [ frac ] [ exp ]`.
fn is_number(text: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|it| it.is_ascii_digit());
    let unsigned = text.strip_prefix('-').unwrap_or(text);
    let (mantissa, exponent) = match unsigned.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, Some(exponent)),
        None => (unsigned, None),
    };
    let (whole, fraction) = match mantissa.split_once('.') {
        Some((whole, fraction)) => (whole, Some(fraction)),
        None => (mantissa, None),
    };
    digits(whole)
        && (whole == "0" || !whole.starts_with('0'))
        && fraction.is_none_or(digits)
        && exponent.is_none_or(|it| digits(it.strip_prefix(['+', '-']).unwrap_or(it)))
}

/// A whole number stays as it is. What is written with an exponent and is whole becomes whole, as in the examples of the
/// specification; other floats are written in the shortest form that reads back as the same.
fn canonical_number(text: &str) -> Result<Cow<'_, str>, NotJson> {
    if text == "-0" {
        return Ok("0".into());
    }
    if !text.contains(['.', 'e', 'E']) {
        return Ok(text.into());
    }
    let float: f64 = text.parse().map_err(|_| NotJson("a number is none"))?;
    if !float.is_finite() {
        return Err(NotJson("a number is too large"));
    }
    if !text.contains('.') && float.fract() == 0.0 && float.abs() <= WHOLE_MAX {
        // Adding zero makes a negative zero a positive one.
        return Ok(format!("{:.0}", float + 0.0).into());
    }
    let scientific = format!("{float:e}");
    let exponent = scientific.split_once('e').and_then(|(_, it)| it.parse().ok()).unwrap_or(0_i32);
    if float == 0.0 || (-4..16).contains(&exponent) {
        return Ok(format!("{float:?}").into());
    }
    let (mantissa, _) = scientific.split_once('e').unwrap_or((&scientific, ""));
    let sign = if exponent < 0 { '-' } else { '+' };
    Ok(format!("{mantissa}e{sign}{:02}", exponent.unsigned_abs()).into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn canonical(text: &str) -> String {
        Canonical::of(text.as_bytes()).unwrap().into()
    }

    #[test]
    fn the_examples_of_the_specification_come_out_as_it_says() {
        for (from, to) in [
            ("{}", "{}"),
            (" { \"one\": 1,\n \"two\": \"Two\" } ", r#"{"one":1,"two":"Two"}"#),
            (r#"{"b": "2", "a": "1"}"#, r#"{"a":"1","b":"2"}"#),
            (r#"{"a": "日本語"}"#, r#"{"a":"日本語"}"#),
            (r#"{"本": 2, "日": 1}"#, r#"{"日":1,"本":2}"#),
            (r#"{"a": "\u65E5"}"#, r#"{"a":"日"}"#),
            (r#"{"a": null}"#, r#"{"a":null}"#),
            (r#"{"a": -0, "b": 1e10}"#, r#"{"a":0,"b":10000000000}"#),
            (r#"["\u0007\u001F\b\/\u007f"]"#, "[\"\\u0007\\u001f\\b/\u{7f}\"]"),
        ] {
            assert_eq!(canonical(from), to, "{from}");
        }
    }

    #[test]
    fn numbers_keep_what_their_sender_meant() {
        for (from, to) in [
            ("123456789012345678901234567890", "123456789012345678901234567890"),
            ("-9007199254740993", "-9007199254740993"),
            ("1.50", "1.5"),
            ("1.0", "1.0"),
            ("1.5e300", "1.5e+300"),
            ("1e-7", "1e-07"),
            ("0.00001", "1e-05"),
            ("123456789.125", "123456789.125"),
            ("-0.0", "-0.0"),
            ("0e5", "0"),
        ] {
            assert_eq!(canonical(from), to, "{from}");
        }
        for wrong in ["1e400", "-1e999", "01", "1.", ".5", "+1", "-", "1e", "1e+", "--1", "0x1", "NaN"] {
            assert!(Json::parse(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn moments_are_read_from_any_number_that_can_be_one() {
        let ms = |text: &str| Json::parse(text.as_bytes()).unwrap().as_ms();
        assert_eq!(ms("1052262000000"), Some(1_052_262_000_000));
        assert_eq!(ms("1.5e3"), Some(1500));
        assert_eq!(ms("18446744073709551615"), Some(u64::MAX));
        for none in ["-1", "1e30", "\"5\"", "null", "[1]", "99999999999999999999"] {
            assert_eq!(ms(none), None, "{none}");
        }
    }

    #[test]
    fn what_is_not_json_is_refused() {
        let wrong = [
            "",
            "{",
            "[1",
            "[1,]",
            "{\"a\"}",
            "{\"a\":}",
            "{a:1}",
            "tru",
            "\"a",
            "\"\\x\"",
            "\"\\ud800\"",
            "\"\n\"",
            "1 2",
            "{\"a\":1,}",
            "[1}",
            "\u{feff}{}",
            "'a'",
        ];
        for text in wrong {
            assert!(Json::parse(text.as_bytes()).is_err(), "{text}");
        }
        assert!(Json::parse(b"\"\xff\"").is_err());
        let nested = |levels: usize| "[".repeat(levels) + &"]".repeat(levels);
        assert!(Json::parse(nested(DEPTH_MAX).as_bytes()).is_ok());
        assert!(Json::parse(nested(DEPTH_MAX + 1).as_bytes()).is_err());
    }

    #[test]
    fn a_signature_covers_neither_signatures_nor_unsigned() {
        let json =
            Json::parse(br#"{"unsigned":{"age":1},"b":{"signatures":1},"signatures":{},"a":[]}"#).unwrap();
        assert_eq!(json.signed_part().as_str(), r#"{"a":[],"b":{"signatures":1}}"#);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Json::parse(&bytes);
        }

        #[test]
        fn no_text_of_json_characters_makes_it_panic(text in r#"[\[\]{}",:0-9eE.+\-\\utrfalsn ]{0,80}"#) {
            if let Ok(json) = Json::parse(text.as_bytes()) {
                let written = json.canonical();
                prop_assert_eq!(Json::parse(written.as_str().as_bytes()).unwrap().canonical(), written);
            }
        }

        #[test]
        fn it_agrees_with_another_writer_of_canonical_json(text in ".{0,40}", number in -(1_i64 << 53) + 1..1 << 53) {
            let value = serde_json::json!({ text.clone(): [number, text, null, true], "b": { "é": {} } });
            let theirs = ruma::canonical_json::try_from_json_map(value.as_object().unwrap().clone()).unwrap();
            prop_assert_eq!(canonical(&value.to_string()), serde_json::to_string(&theirs).unwrap());
        }
    }
}
