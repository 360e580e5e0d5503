//! Reads what a page of HTML says about itself, in the words that it has for that: OpenGraph, Twitter's cards, plain `meta`, and, where it has none of these, its title, its first paragraphs and its images.

use super::{
    tags::{self, Attributes, Listener},
    text::cut,
};

/// A value is cut to this many bytes before it is judged.
const VALUE_BYTES_MAX: usize = 4_096;
/// Look at no more images than this.
const IMAGES_MAX: usize = 16;
/// Paragraphs are read until there are this many bytes of them.
const PARAGRAPHS_BYTES_MAX: usize = 4_096;
/// A paragraph of fewer bytes is a caption or a button.
const PARAGRAPH_BYTES_MIN: usize = 40;
/// Elements that are left out within others that are left out are counted to this depth; deeper ends are taken for those of what is outside.
const LEFT_OUT_MAX: usize = 64;

/// A property that a page states once, in a `meta`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Property {
    /// The title, by `og:title` of OpenGraph.
    OgTitle,
    /// The description, by `og:description` of OpenGraph.
    OgDescription,
    /// The name of the site, by `og:site_name` of OpenGraph.
    OgSiteName,
    /// The type of the thing, by `og:type` of OpenGraph.
    OgType,
    /// The lasting URL, by `og:url` of OpenGraph.
    OgUrl,
    /// The language and country, by `og:locale` of OpenGraph.
    OgLocale,
    /// The URL of an image, by `og:image` of OpenGraph or its longer forms.
    OgImage,
    /// The description of the image, by `og:image:alt` of OpenGraph.
    OgImageAlt,
    /// The title, as Twitter's cards have it.
    TwitterTitle,
    /// The description, as Twitter's cards have it.
    TwitterDescription,
    /// The URL of an image, as Twitter's cards have it.
    TwitterImage,
    /// The description of the image, as Twitter's cards have it.
    TwitterImageAlt,
    /// The description, as HTML has it.
    Description,
    /// The name of the site, as HTML has it.
    ApplicationName,
    /// The URL of an image, by the property `image` of schema.org.
    ItemImage,
}

impl Property {
    fn of(name: &str) -> Option<Self> {
        Some(match name {
            "og:title" => Self::OgTitle,
            "og:description" => Self::OgDescription,
            "og:site_name" => Self::OgSiteName,
            "og:type" => Self::OgType,
            "og:url" => Self::OgUrl,
            "og:locale" => Self::OgLocale,
            "og:image" | "og:image:url" | "og:image:secure_url" => Self::OgImage,
            "og:image:alt" => Self::OgImageAlt,
            "twitter:title" => Self::TwitterTitle,
            "twitter:description" => Self::TwitterDescription,
            "twitter:image" | "twitter:image:src" => Self::TwitterImage,
            "twitter:image:alt" => Self::TwitterImageAlt,
            "description" => Self::Description,
            "application-name" => Self::ApplicationName,
            "image" => Self::ItemImage,
            _ => return None,
        })
    }
}

/// An image that a page shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// The URL as the page has it.
    pub source: String,
    /// The width and the height that the page gives it, in pixels.
    pub size: (Option<u32>, Option<u32>),
}

/// The words of a page about itself: nothing is resolved or cleaned yet.
#[derive(Debug, Default)]
pub struct Page {
    properties: Vec<(Property, String)>,
    /// The URL that others are relative to, if it is not that of the page.
    pub base: Option<String>,
    /// The title in the head.
    pub title: Option<String>,
    /// The first heading of the page.
    pub heading: Option<String>,
    /// The first paragraphs of the page.
    pub paragraphs: String,
    /// Where an oEmbed description of the page is, as JSON.
    pub oembed: Option<String>,
    /// The image that a link names.
    pub linked_image: Option<String>,
    /// The first images in the text.
    pub images: Vec<Image>,
}

impl Page {
    /// Reads a page of HTML.
    pub fn read(html: &str) -> Self {
        let mut reader = Reader::default();
        tags::read(html, &mut reader);
        reader.end_block();
        reader.page
    }

    /// The first value of a property that is not empty.
    pub fn find(&self, property: Property) -> Option<&str> {
        self.properties.iter().find(|(it, _)| *it == property).map(|(_, value)| value.as_str())
    }
}

/// The field of the page to which the text of an element goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Field {
    #[default]
    Nothing,
    Title,
    Heading,
    Paragraph,
}

#[derive(Default)]
struct Reader {
    page: Page,
    /// The elements that are left out and have not ended, outermost first.
    left_out: Vec<String>,
    field: Field,
    /// The text of the element that is being read.
    text: String,
}

/// Whether an element says nothing about what the page is about: what a machine reads, how to go on from here, what is drawn.
fn is_left_out(name: &str) -> bool {
    matches!(
        name,
        "script"
            | "style"
            | "template"
            | "noscript"
            | "svg"
            | "math"
            | "nav"
            | "header"
            | "footer"
            | "aside"
            | "form"
            | "select"
            | "button"
            | "dialog"
            | "object"
            | "audio"
            | "video"
            | "canvas"
            | "iframe"
            | "textarea"
            | "xmp"
            | "noembed"
            | "noframes"
            | "plaintext"
    )
}

/// Whether an element stands within a line, so that it does not end a paragraph.
fn is_within_line(name: &str) -> bool {
    matches!(
        name,
        "a" | "abbr"
            | "b"
            | "bdi"
            | "bdo"
            | "br"
            | "cite"
            | "code"
            | "data"
            | "del"
            | "dfn"
            | "em"
            | "font"
            | "i"
            | "img"
            | "ins"
            | "kbd"
            | "mark"
            | "q"
            | "s"
            | "samp"
            | "small"
            | "span"
            | "strong"
            | "sub"
            | "sup"
            | "time"
            | "u"
            | "var"
            | "wbr"
            | "picture"
            | "source"
    )
}

impl Reader {
    fn end_block(&mut self) {
        let text = std::mem::take(&mut self.text);
        let text = text.trim();
        let page = &mut self.page;
        match std::mem::take(&mut self.field) {
            Field::Nothing => {}
            Field::Title => keep_first(&mut page.title, text),
            Field::Heading => keep_first(&mut page.heading, text),
            Field::Paragraph => {
                let left = PARAGRAPHS_BYTES_MAX.saturating_sub(page.paragraphs.len() + 1);
                if text.len() >= PARAGRAPH_BYTES_MIN && left > 0 {
                    page.paragraphs.push_str(cut(text, left));
                    page.paragraphs.push('\n');
                }
            }
        }
    }

    fn begin_block(&mut self, name: &str) {
        self.end_block();
        self.field = match name {
            "title" => Field::Title,
            "h1" => Field::Heading,
            "p" | "blockquote" | "dd" => Field::Paragraph,
            _ => Field::Nothing,
        };
    }

    fn meta(&mut self, attributes: &Attributes) {
        // Pages confuse `property` with `name`, and `itemprop` says the same in another language.
        let mut names = ["property", "name", "itemprop"].into_iter().filter_map(|it| attributes.find(it));
        let property = names.find_map(|name| Property::of(name.trim().to_ascii_lowercase().as_str()));
        let value = attributes.find("content").map(|value| cut(value, VALUE_BYTES_MAX).trim());
        if let (Some(property), Some(value)) = (property, value.filter(|value| !value.is_empty()))
            && self.page.find(property).is_none()
        {
            self.page.properties.push((property, value.to_owned()));
        }
    }

    fn link(&mut self, attributes: &Attributes) {
        let Some(target) = attributes.find("href") else { return };
        let is = |name: &str, wanted: &str| {
            let mut words = attributes.find(name).unwrap_or_default().split_ascii_whitespace();
            words.any(|word| word.eq_ignore_ascii_case(wanted))
        };
        if is("rel", "image_src") || is("itemprop", "image") {
            keep_first(&mut self.page.linked_image, target);
        }
        if is("rel", "alternate") && is("type", "application/json+oembed") {
            keep_first(&mut self.page.oembed, target);
        }
    }

    fn image(&mut self, attributes: &Attributes) {
        let is_url = |source: &&str| !source.trim().is_empty() && !source.trim_start().starts_with("data:");
        // Pages that load images late have the real one beside a placeholder.
        let source = ["src", "data-src"].into_iter().filter_map(|it| attributes.find(it)).find(is_url);
        let size = |name: &str| attributes.find(name)?.trim().trim_end_matches("px").parse().ok();
        if let Some(source) = source
            && self.page.images.len() < IMAGES_MAX
        {
            let size = (size("width"), size("height"));
            self.page.images.push(Image { source: source.trim().to_owned(), size });
        }
    }
}

fn keep_first(kept: &mut Option<String>, text: &str) {
    if kept.is_none() && !text.trim().is_empty() {
        *kept = Some(cut(text.trim(), VALUE_BYTES_MAX).to_owned());
    }
}

impl Listener for Reader {
    const ATTRIBUTES: &'static [&'static str] = &[
        "property", "name", "itemprop", "content", "rel", "href", "type", "src", "data-src", "width",
        "height",
    ];

    fn begin(&mut self, name: &str, attributes: &Attributes) {
        match name {
            "meta" => return self.meta(attributes),
            "link" => return self.link(attributes),
            "base" => {
                if let Some(base) = attributes.find("href") {
                    keep_first(&mut self.page.base, base);
                }
                return;
            }
            _ => {}
        }
        if is_left_out(name) {
            self.end_block();
            if self.left_out.len() < LEFT_OUT_MAX {
                self.left_out.push(name.to_owned());
            }
            return;
        }
        if !self.left_out.is_empty() {
            return;
        }
        if name == "img" {
            self.image(attributes);
        }
        if is_within_line(name) {
            if name == "br" {
                self.text(" ");
            }
            return;
        }
        self.begin_block(name);
    }

    fn end(&mut self, name: &str) {
        if is_left_out(name) {
            // An element ends what was left open within it.
            if let Some(at) = self.left_out.iter().rposition(|it| it == name) {
                self.left_out.truncate(at);
            }
        } else if self.left_out.is_empty() && !is_within_line(name) {
            self.end_block();
        }
    }

    fn text(&mut self, text: &str) {
        if self.left_out.is_empty() && self.field != Field::Nothing {
            let left = VALUE_BYTES_MAX.saturating_sub(self.text.len());
            self.text.push_str(cut(text, left));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn properties_are_found_wherever_they_stand_and_the_first_counts() {
        let page = Page::read(
            r#"<!doctype html><html><head><meta property="og:title" content="A &amp; B">
            <META NAME='OG:Description' CONTENT=' text '><meta property="og:title" content="second">
            <meta name="twitter:image:src" content="/t.png"><meta itemprop=image content=i.png>
            <meta property="og:site_name" content=""><meta property="og:site_name" content="Site">
            <meta property="og:video" content="v"><meta content="x"><meta property="og:type">
            </head><body><p><meta name=description content=body><meta property="og:locale" content=de_DE>"#,
        );
        for (property, value) in [
            (Property::OgTitle, Some("A & B")),
            (Property::OgDescription, Some("text")),
            (Property::TwitterImage, Some("/t.png")),
            (Property::ItemImage, Some("i.png")),
            (Property::OgSiteName, Some("Site")),
            (Property::OgType, None),
            (Property::Description, Some("body")),
            (Property::OgLocale, Some("de_DE")),
            (Property::OgImage, None),
        ] {
            assert_eq!(page.find(property), value, "{property:?}");
        }
        assert_eq!(page.properties.len(), 7);
    }

    #[test]
    fn links_name_the_base_an_image_and_oembed() {
        let page = Page::read(
            r#"<base target=x><base href="/b/"><base href="/c/"><link rel=stylesheet href=a>
            <link rel="image_src other" href="i.png"><link rel=alternate type="text/xml+oembed" href=x>
            <link rel="ALTERNATE" type="application/json+oembed" href="/o?a&amp;b"><link rel=alternate>"#,
        );
        assert_eq!(page.base.as_deref(), Some("/b/"));
        assert_eq!(page.linked_image.as_deref(), Some("i.png"));
        assert_eq!(page.oembed.as_deref(), Some("/o?a&b"));
    }

    #[test]
    fn a_page_without_properties_has_its_title_and_first_paragraphs() {
        let long = "This paragraph is long enough to say what the page is about.";
        let page = Page::read(&format!(
            "<svg><title>icon</title></svg><title> The\n title </title><title>no</title><header><h1>Site</h1></header>
            <nav><p>{long} nav</p></nav><h1>The <b>heading</b></h1><p>Short.</p><div>{long} div</div>
            <p>{long}<br>One <a href=x>link</a>.<p>{long} two<script>{long}</script><aside><p>{long} aside</aside>
            <style>p {{ x: {long} }}</style></p><footer>{long} footer"
        ));
        assert_eq!(page.title.as_deref(), Some("The\n title"));
        assert_eq!(page.heading.as_deref(), Some("The heading"));
        assert_eq!(page.paragraphs, format!("{long} One link.\n{long} two\n"));
    }

    #[test]
    fn images_are_listed_with_the_sizes_that_they_are_given() {
        let page = Page::read(
            "<img><img src=''><img src='data:image/gif;base64,x' data-src=late.png width=300px>
            <img src=' a.png ' width=10 height=-1><noscript><img src=pixel.png></noscript><header><img src=logo.png></header>",
        );
        let image = |source: &str, size| Image { source: source.to_owned(), size };
        assert_eq!(page.images, [image("late.png", (Some(300), None)), image("a.png", (Some(10), None))]);
        assert_eq!(Page::read(&"<img src=x>".repeat(1_000)).images.len(), IMAGES_MAX);
    }

    #[test]
    fn what_a_page_leaves_open_or_ends_twice_does_no_harm() {
        let long = "This paragraph is long enough to say what the page is about.";
        // The end of the outer element ends the inner ones.
        let page = Page::read(&format!("<nav><nav><form></nav></nav></nav></form><p>{long}"));
        assert_eq!(page.paragraphs, format!("{long}\n"));
        let page = Page::read(&format!("{}{}<p>{long}", "<nav>".repeat(100_000), "</nav>".repeat(100_000)));
        assert_eq!(page.paragraphs, format!("{long}\n"));
    }

    #[test]
    fn however_large_a_page_is_little_of_it_is_kept() {
        let html = format!(
            "<title>{0}</title><meta property=og:title content='{0}'><h1>{0}</h1>{1}",
            "é".repeat(1 << 20),
            format!("<p>{}", "word ".repeat(200)).repeat(1_000)
        );
        let page = Page::read(&html);
        assert!(
            page.title.unwrap().len() <= VALUE_BYTES_MAX && page.heading.unwrap().len() <= VALUE_BYTES_MAX
        );
        assert!(page.paragraphs.len() <= PARAGRAPHS_BYTES_MAX, "{}", page.paragraphs.len());
        let kept: usize = page.properties.iter().map(|(_, value)| value.len()).sum();
        assert!(kept <= VALUE_BYTES_MAX);
        Page::read(&"<div>".repeat(2 << 20));
    }
}
