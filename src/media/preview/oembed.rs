//! oEmbed: a description of a page as JSON beside it, which the page names by a link (<https://oembed.com/>).

use serde_json::{Map, Value};

use super::page::Page;

/// A description has at most this many bytes; real ones have a few thousand.
pub const BYTES_MAX: usize = 64 * 1_024;

/// The words of such a description, as they stand there.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Embed {
    /// The title of what the page shows.
    pub title: Option<String>,
    /// The name of who made it.
    pub author: Option<String>,
    /// The name of the site.
    pub site: Option<String>,
    /// The URL of an image of it.
    pub image: Option<String>,
    /// The text of what would be shown in its place.
    pub text: Option<String>,
}

impl Embed {
    /// Reads a description. None for what is none.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let json: Map<String, Value> =
            serde_json::from_slice(bytes.get(..BYTES_MAX).unwrap_or(bytes)).ok()?;
        let text = |name: &str| {
            let text = json.get(name)?.as_str()?.trim();
            (!text.is_empty()).then(|| text.to_owned())
        };
        let kind = text("type");
        // A photo is shown itself; of all else there may be a picture.
        let photo = (kind.as_deref() == Some("photo")).then(|| text("url")).flatten();
        let html = (kind.as_deref() == Some("rich")).then(|| text("html")).flatten();
        let shown = html.map(|html| Page::read(&html).paragraphs);
        Some(Self {
            title: text("title"),
            author: text("author_name"),
            site: text("provider_name"),
            image: photo.or_else(|| text("thumbnail_url")),
            text: shown.filter(|text| !text.is_empty()),
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn descriptions_are_read() {
        let read = |json: Value| Embed::read(json.to_string().as_bytes()).unwrap();
        let some = |text: &str| Some(text.to_owned());
        let video = json!({
            "version": "1.0", "type": "video", "title": " T ", "author_name": "A", "provider_name": "P",
            "thumbnail_url": "https://i.example/t.jpg", "url": "https://i.example/x", "html": "<iframe src=x>", "width": 5,
        });
        let expected = Embed {
            title: some("T"),
            author: some("A"),
            site: some("P"),
            image: some("https://i.example/t.jpg"),
            text: None,
        };
        assert_eq!(read(video), expected);
        let photo = json!({ "type": "photo", "url": "https://i.example/p.jpg", "thumbnail_url": "t" });
        assert_eq!(read(photo).image, some("https://i.example/p.jpg"));
        let said = "<blockquote><p>Some words that somebody has said, at <b>length</b>.</p>&mdash; A</blockquote><script src=x></script>";
        let rich = json!({ "type": "rich", "html": said, "title": 5, "author_name": null });
        let expected =
            Embed { text: some("Some words that somebody has said, at length.\n"), ..Embed::default() };
        assert_eq!(read(rich), expected);
    }

    #[test]
    fn what_is_no_description_is_none() {
        let deep = "[".repeat(10_000);
        let deeper = format!("{{\"title\":{}", "{\"a\":".repeat(10_000));
        let long = format!("{{\"title\":\"{}\"}}", "x".repeat(BYTES_MAX));
        for wrong in ["", "[]", "null", "\"x\"", "{", "<oembed/>", &deep, &deeper, &long] {
            assert_eq!(Embed::read(wrong.as_bytes()), None, "{}", super::super::text::cut(wrong, 50));
        }
    }
}
