//! HTML as a stream of tags and text, which whoever reads a page hears about.
//!
//! There is no tree, so that nothing nests: however deep a page is, and however many attributes a tag has, only one tag is in
//! memory, and of that only what is asked for, cut.

use std::{borrow::Cow, convert::Infallible};

use html5gum::{Emitter, Error, State, Tokenizer};

/// The name of a tag or an attribute is cut to this many bytes; all that are asked for have fewer.
const NAME_BYTES_MAX: usize = 16;
/// The value of an attribute is cut to this many bytes.
const VALUE_BYTES_MAX: usize = 4_096;
/// The text between two tags is cut to this many bytes.
const TEXT_BYTES_MAX: usize = 16_384;

/// Hears of what a page consists, in its order.
pub(super) trait Listener {
    /// The attributes whose values are told. Of those with the same name in one tag the first counts.
    const ATTRIBUTES: &'static [&'static str];

    /// A tag begins something.
    fn begin(&mut self, name: &str, attributes: &Attributes);

    /// A tag ends something.
    fn end(&mut self, name: &str);

    /// All text between two tags, cut.
    fn text(&mut self, text: &str);
}

/// Reads a page to its end.
pub(super) fn read<L: Listener>(html: &str, listener: &mut L) {
    let Ok(()) = Tokenizer::new_with_emitter(html, Reader::new(listener)).finish();
}

/// The attributes of a tag that were asked for.
#[derive(Debug)]
pub(super) struct Attributes {
    names: &'static [&'static str],
    /// The values by their places among the names; none for one that the tag does not have.
    values: Vec<Option<String>>,
}

impl Attributes {
    /// The value of an attribute, which may be empty. None if the tag has no such attribute.
    pub(super) fn find(&self, name: &str) -> Option<&str> {
        let at = self.names.iter().position(|it| *it == name)?;
        self.values.get(at)?.as_deref()
    }

    fn keep(&mut self, name: &Cut<NAME_BYTES_MAX>, value: &Cut<VALUE_BYTES_MAX>) {
        let at = self.names.iter().position(|it| name.is(it));
        if let Some(kept) = at.and_then(|at| self.values.get_mut(at)) {
            kept.get_or_insert_with(|| value.text().into_owned());
        }
    }
}

/// Bytes of which no more than so many are kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Cut<const BYTES_MAX: usize> {
    bytes: Vec<u8>,
    is_cut: bool,
}

impl<const BYTES_MAX: usize> Cut<BYTES_MAX> {
    fn push(&mut self, bytes: &[u8]) {
        let left = BYTES_MAX.saturating_sub(self.bytes.len());
        self.is_cut |= bytes.len() > left;
        self.bytes.extend(bytes.iter().take(left));
    }

    fn clear(&mut self) {
        self.bytes.clear();
        self.is_cut = false;
    }

    fn is(&self, text: &str) -> bool {
        !self.is_cut && self.bytes == text.as_bytes()
    }

    /// The text, without the character within which it was cut.
    fn text(&self) -> Cow<'_, str> {
        match std::str::from_utf8(&self.bytes) {
            Err(error) if error.error_len().is_none() => {
                String::from_utf8_lossy(self.bytes.get(..error.valid_up_to()).unwrap_or_default())
            }
            Ok(_) | Err(_) => String::from_utf8_lossy(&self.bytes),
        }
    }
}

/// Stands between the tokenizer and whoever listens.
struct Reader<'l, L> {
    listener: &'l mut L,
    text: Cut<TEXT_BYTES_MAX>,
    tag: Cut<NAME_BYTES_MAX>,
    is_end: bool,
    is_closed: bool,
    attributes: Attributes,
    attribute: Cut<NAME_BYTES_MAX>,
    value: Cut<VALUE_BYTES_MAX>,
    /// The tag that began last: only its own end ends a text in which tags do not count.
    last_begun: Cut<NAME_BYTES_MAX>,
}

impl<'l, L: Listener> Reader<'l, L> {
    fn new(listener: &'l mut L) -> Self {
        Self {
            listener,
            text: Cut::default(),
            tag: Cut::default(),
            is_end: false,
            is_closed: false,
            attributes: Attributes { names: L::ATTRIBUTES, values: vec![None; L::ATTRIBUTES.len()] },
            attribute: Cut::default(),
            value: Cut::default(),
            last_begun: Cut::default(),
        }
    }

    fn begin_tag(&mut self, is_end: bool) {
        self.tag.clear();
        (self.is_end, self.is_closed) = (is_end, false);
        self.attributes.values.fill(None);
        self.attribute.clear();
        self.value.clear();
    }

    fn tell_text(&mut self) {
        if !self.text.bytes.is_empty() {
            self.listener.text(&self.text.text());
            self.text.clear();
        }
    }

    fn keep_attribute(&mut self) {
        if !self.attribute.bytes.is_empty() {
            self.attributes.keep(&self.attribute, &self.value);
        }
        self.attribute.clear();
        self.value.clear();
    }
}

impl<L: Listener> Emitter for Reader<'_, L> {
    type Token = Infallible;

    fn set_last_start_tag(&mut self, name: Option<&[u8]>) {
        self.last_begun.clear();
        self.last_begun.push(name.unwrap_or_default());
    }

    fn emit_eof(&mut self) {
        self.tell_text();
    }

    fn emit_error(&mut self, _: Error) {}

    fn should_emit_errors(&mut self) -> bool {
        false
    }

    fn pop_token(&mut self) -> Option<Infallible> {
        None
    }

    fn emit_string(&mut self, text: &[u8]) {
        self.text.push(text);
    }

    fn init_start_tag(&mut self) {
        self.begin_tag(false);
    }

    fn init_end_tag(&mut self) {
        self.begin_tag(true);
    }

    fn emit_current_tag(&mut self) -> Option<State> {
        self.keep_attribute();
        self.tell_text();
        let name = self.tag.text();
        if self.is_end {
            self.listener.end(&name);
            return None;
        }
        self.listener.begin(&name, &self.attributes);
        // Drawings and formulas alone have tags that end themselves.
        if self.is_closed && matches!(&*name, "svg" | "math") {
            self.listener.end(&name);
        }
        // In these, tags do not count until their end. What stands in `noscript` is read, because no script runs here.
        let state = match &*name {
            "title" | "textarea" => Some(State::RcData),
            "script" => Some(State::ScriptData),
            "style" | "xmp" | "iframe" | "noembed" | "noframes" => Some(State::RawText),
            "plaintext" => Some(State::PlainText),
            _ => None,
        };
        self.last_begun.clone_from(&self.tag);
        state
    }

    fn set_self_closing(&mut self) {
        self.is_closed = true;
    }

    fn push_tag_name(&mut self, name: &[u8]) {
        self.tag.push(name);
    }

    fn init_attribute(&mut self) {
        self.keep_attribute();
    }

    fn push_attribute_name(&mut self, name: &[u8]) {
        self.attribute.push(name);
    }

    fn push_attribute_value(&mut self, value: &[u8]) {
        self.value.push(value);
    }

    fn current_is_appropriate_end_tag_token(&mut self) -> bool {
        self.is_end && !self.tag.is_cut && !self.tag.bytes.is_empty() && self.tag == self.last_begun
    }

    // Comments and declarations say nothing about a page.
    fn init_comment(&mut self) {}
    fn push_comment(&mut self, _: &[u8]) {}
    fn emit_current_comment(&mut self) {}
    fn init_doctype(&mut self) {}
    fn push_doctype_name(&mut self, _: &[u8]) {}
    fn emit_current_doctype(&mut self) {}
    fn set_force_quirks(&mut self) {}
    fn set_doctype_public_identifier(&mut self, _: &[u8]) {}
    fn set_doctype_system_identifier(&mut self, _: &[u8]) {}
    fn push_doctype_public_identifier(&mut self, _: &[u8]) {}
    fn push_doctype_system_identifier(&mut self, _: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes down what it hears.
    #[derive(Default)]
    struct Notes(Vec<String>);

    impl Listener for Notes {
        const ATTRIBUTES: &'static [&'static str] = &["name", "content"];

        fn begin(&mut self, name: &str, attributes: &Attributes) {
            let told = |name: &str| attributes.find(name).map(|value| format!(" {name}={value}"));
            let told: String = ["name", "content", "href"].into_iter().filter_map(told).collect();
            self.0.push(format!("<{name}{told}>"));
        }

        fn end(&mut self, name: &str) {
            self.0.push(format!("</{name}>"));
        }

        fn text(&mut self, text: &str) {
            self.0.push(text.to_owned());
        }
    }

    fn heard(html: &str) -> String {
        let mut notes = Notes::default();
        read(html, &mut notes);
        notes.0.join("|")
    }

    #[test]
    fn tags_attributes_and_text_are_told_as_a_browser_reads_them() {
        for (html, expected) in [
            ("<P NAME=a content='b &amp; c' href=d>x</P>", "<p name=a content=b & c>|x|</p>"),
            ("<a name=1 name=2 content>", "<a name=1 content=>"),
            ("a &lt;b&gt; &#x41;&eacute;&notanentity; &#0;", "a <b> Aé¬anentity; \u{fffd}"),
            ("<title>a <b> c</title>d", "<title>|a <b> c|</title>|d"),
            ("<script>if (a<b) { '</p>' }</script>e", "<script>|if (a<b) { '</p>' }|</script>|e"),
            ("<style><p></style><p>", "<style>|<p>|</style>|<p>"),
            ("<noscript><p>x</noscript>", "<noscript>|<p>|x|</noscript>"),
            ("<!-- <p> --><!doctype html><p>", "<p>"),
            ("<svg/>x<p/>y", "<svg>|</svg>|x|<p>|y"),
            ("a<!-- x -->b", "ab"),
            ("<p", ""),
            ("<p name=\"", ""),
            ("</title x=y>", "</title>"),
            ("<title>never ends <p>", "<title>|never ends <p>"),
            ("\u{0}<\u{0}>é漢", "\u{0}<\u{0}>é漢"),
        ] {
            assert_eq!(heard(html), expected, "{html:?}");
        }
    }

    #[test]
    fn names_values_and_texts_are_cut() {
        let long = "é".repeat(100_000);
        let told = heard(&format!("<{long} name=x><p name={long} content=y>{long}</{long}>"));
        assert!(told.len() < 40_000, "{}", told.len());
        assert!(told.contains("content=y>"), "what follows a long value counts");
        assert!(!told.contains('\u{fffd}'), "nothing is cut within a character");
        // A name that was cut is not the name that it begins with.
        assert_eq!(heard("<script><scripttttttttttttttttttttttttt></script>x").matches('x').count(), 1);
    }

    #[test]
    fn what_would_blow_up_a_tree_costs_what_its_bytes_cost() {
        read(&"<div>".repeat(2 << 20), &mut Silence);
        for piece in [
            "<b><i>",
            "<table><tr>",
            "<a href=",
            "<svg><desc>",
            "&amp",
            "<!--",
            "</x>",
            "<p x",
            "\"'<",
            "&#x",
        ] {
            read(&piece.repeat((1 << 20) / piece.len()), &mut Silence);
        }
        // Very many attributes of one tag, each with another name.
        let mut html = String::from("<p");
        for number in 0..500_000 {
            html.push_str(&format!(" a{number}=b"));
        }
        read(&html, &mut Silence);
    }

    struct Silence;

    impl Listener for Silence {
        const ATTRIBUTES: &'static [&'static str] = &["name"];
        fn begin(&mut self, _: &str, _: &Attributes) {}
        fn end(&mut self, _: &str) {}
        fn text(&mut self, _: &str) {}
    }
}
