//! The choice among all that a page says about itself: what OpenGraph says comes before Twitter's cards, these before oEmbed, and
//! what the text shows comes last.

use url::Url;

use super::{
    address,
    oembed::Embed,
    page::{Image, Page, Property},
    text::clean,
};
use crate::schema::previews::Told;

/// A title has at most this many characters.
const TITLE_CHARACTERS_MAX: usize = 300;
/// A description has at most this many characters.
const DESCRIPTION_CHARACTERS_MAX: usize = 1_000;
/// The text of a page stands for a description with at most this many characters.
const EXCERPT_CHARACTERS_MAX: usize = 300;
/// The name of a site, a type, a language have at most this many characters.
const WORD_CHARACTERS_MAX: usize = 100;
/// At most this many images are tried, because each is a request.
pub const IMAGES_MAX: usize = 2;
/// An image that a page shows and does not name as its own stands for it if it has at least this many pixels both ways: smaller
/// ones are signs, buttons and counters.
pub const SHOWN_IMAGE_PIXELS_MIN: u32 = 64;

/// An image that may stand for a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The URL of the image.
    pub url: Url,
    /// Whether the page names it as its own, and not only shows it.
    pub is_named: bool,
}

/// A preview of which the image is not fetched yet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Draft {
    /// The text that the preview tells.
    pub told: Told,
    /// The images that may stand for the page, the best first; at most [`IMAGES_MAX`].
    pub images: Vec<Candidate>,
}

/// Where a page says that an oEmbed description of it is, if it leaves out something that such a description may say.
pub fn find_oembed(page: &Page, url: &Url) -> Option<Url> {
    let has = |properties: &[Property]| properties.iter().any(|it| page.find(*it).is_some());
    let is_whole = has(&[Property::OgTitle, Property::TwitterTitle])
        && has(&[Property::OgDescription, Property::TwitterDescription])
        && has(&[Property::OgImage, Property::TwitterImage]);
    let link = page.oembed.as_deref().filter(|_| !is_whole)?;
    address::join(&base(page, url), link)
}

/// Chooses what is told of the page at this URL.
pub fn choose(page: &Page, embed: Option<&Embed>, url: &Url) -> Draft {
    let base = base(page, url);
    let no_embed = Embed::default();
    let embed = embed.unwrap_or(&no_embed);
    let first = |properties: &[Property], others: &[Option<&String>], characters_max: usize| {
        let stated = properties.iter().filter_map(|it| page.find(*it));
        let others = others.iter().filter_map(|it| it.map(String::as_str));
        // A text that is empty once it is clean says nothing.
        stated.chain(others).find_map(|text| clean(text, characters_max))
    };
    let title = first(
        &[Property::OgTitle, Property::TwitterTitle],
        &[embed.title.as_ref(), page.title.as_ref(), page.heading.as_ref(), embed.author.as_ref()],
        TITLE_CHARACTERS_MAX,
    );
    let description = first(
        &[Property::OgDescription, Property::TwitterDescription, Property::Description],
        &[embed.text.as_ref()],
        DESCRIPTION_CHARACTERS_MAX,
    );
    let lasting = page.find(Property::OgUrl).and_then(|it| address::join(&base, it));
    let told = Told {
        title,
        description: description.or_else(|| clean(&page.paragraphs, EXCERPT_CHARACTERS_MAX)),
        site: first(
            &[Property::OgSiteName, Property::ApplicationName],
            &[embed.site.as_ref()],
            WORD_CHARACTERS_MAX,
        ),
        kind: first(&[Property::OgType], &[], WORD_CHARACTERS_MAX),
        url: lasting.map(String::from),
        locale: first(&[Property::OgLocale], &[], WORD_CHARACTERS_MAX),
        image_alt: first(&[Property::OgImageAlt, Property::TwitterImageAlt], &[], TITLE_CHARACTERS_MAX),
    };
    Draft { told, images: images(page, embed, &base) }
}

fn images(page: &Page, embed: &Embed, base: &Url) -> Vec<Candidate> {
    let stated = [Property::OgImage, Property::TwitterImage].into_iter().filter_map(|it| page.find(it));
    let linked = [embed.image.as_deref(), page.linked_image.as_deref(), page.find(Property::ItemImage)];
    let named = stated.chain(linked.into_iter().flatten()).map(|source| (source, true));
    let shown = page.images.iter().filter(|image| may_stand_for_page(image));
    let shown = shown.map(|image| (image.source.as_str(), false));
    let mut images: Vec<Candidate> = Vec::new();
    for (source, is_named) in named.chain(shown) {
        let Some(url) = address::join(base, source.trim()) else { continue };
        // Where the page names its image, nothing else that it shows stands for it.
        let is_better = images.first().is_some_and(|first| first.is_named && !is_named);
        if images.len() == IMAGES_MAX || is_better {
            break;
        }
        if images.iter().all(|it| it.url != url) {
            images.push(Candidate { url, is_named });
        }
    }
    images
}

fn may_stand_for_page(image: &Image) -> bool {
    let is_large = |side: Option<u32>| side.is_none_or(|pixels| pixels >= SHOWN_IMAGE_PIXELS_MIN);
    // Drawings are signs of the page, and are not shown by clients.
    let path = image.source.split(['?', '#']).next().unwrap_or_default();
    is_large(image.size.0) && is_large(image.size.1) && !path.to_ascii_lowercase().ends_with(".svg")
}

/// The URL that those in the page are relative to.
fn base(page: &Page, url: &Url) -> Url {
    page.base.as_deref().and_then(|base| address::join(url, base)).unwrap_or_else(|| url.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drafted(html: &str, embed: Option<&Embed>) -> Draft {
        choose(&Page::read(html), embed, &address::parse("https://a.example/b/c").unwrap())
    }

    fn told(html: &str) -> Told {
        drafted(html, None).told
    }

    fn images(html: &str) -> Vec<(String, bool)> {
        let images = drafted(html, None).images.into_iter();
        images.map(|image| (image.url.into(), image.is_named)).collect()
    }

    const LONG: &str = "This paragraph is long enough to say what the page is about.";

    #[test]
    fn what_a_page_states_comes_before_what_it_shows() {
        let all = format!(
            "<meta property=og:title content=OG><meta name=twitter:title content=TW><title>T</title><h1>H</h1>
             <meta property=og:description content=ogd><meta name=twitter:description content=twd>
             <meta name=description content=d><p>{LONG}</p><meta property=og:url content=/lasting>
             <meta property=og:type content=article><meta property=og:locale content=de_DE><meta name=application-name content=App>"
        );
        let some = |text: &str| Some(text.to_owned());
        let expected = Told {
            title: some("OG"),
            description: some("ogd"),
            site: some("App"),
            kind: some("article"),
            url: some("https://a.example/lasting"),
            locale: some("de_DE"),
            image_alt: None,
        };
        assert_eq!(told(&all), expected);
        assert_eq!(told("<meta name=twitter:title content=TW><title>T</title>").title, some("TW"));
        assert_eq!(told("<title>T</title><h1>H</h1>").title, some("T"));
        assert_eq!(told("<h1>H</h1>").title, some("H"));
        assert_eq!(told("<meta name=description content=d><p>{LONG}").description, some("d"));
        assert_eq!(told(&format!("<p>{LONG}")).description, some(LONG));
        assert_eq!(told(""), Told::default());
        // A text that says nothing once it is clean is passed over.
        assert_eq!(told("<meta property=og:title content='\u{202e} &#1;'><title>T</title>").title, some("T"));
    }

    #[test]
    fn texts_are_clean_and_bounded() {
        let long = "é ".repeat(5_000);
        let html = format!(
            "<meta property=og:title content='a&#10;b\u{7}{long}'><meta property=og:description content='{long}'>
             <meta property=og:site_name content='{long}'><meta property=og:url content='javascript:alert(1)'>
             <meta property=og:type content='{long}'><meta property=og:locale content='{long}'>"
        );
        let told = told(&html);
        assert!(told.title.as_ref().unwrap().starts_with("a bé é"), "{told:?}");
        assert_eq!(told.url, None);
        let counts = [&told.title, &told.description, &told.site, &told.kind, &told.locale]
            .map(|it| it.as_ref().unwrap().chars().count());
        assert!(
            counts.iter().zip([300, 1_000, 100, 100, 100]).all(|(count, max)| *count <= max),
            "{counts:?}"
        );
        assert!(told.title.unwrap().chars().all(|it| !it.is_control()));
    }

    #[test]
    fn images_are_urls_of_the_web_and_the_named_ones_come_first() {
        let of = |url: &str, is_named| (url.to_owned(), is_named);
        for (html, expected) in [
            ("<meta property=og:image content=i.png><img src=x.png>", vec![of("https://a.example/b/i.png", true)]),
            (
                "<base href=//b.example/d/><meta property=og:image content=i.png><meta name=twitter:image content=/t.png>",
                vec![of("https://b.example/d/i.png", true), of("https://b.example/t.png", true)],
            ),
            ("<base href=javascript:x><link rel=image_src href=l.png>", vec![of("https://a.example/b/l.png", true)]),
            ("<base href=data:,x><img src=a.png>", vec![of("https://a.example/b/a.png", false)]),
            ("<meta property=og:image content=data:image/png;base64,AA><img src=x.png>", vec![of("https://a.example/b/x.png", false)]),
            ("<meta property=og:image content=javascript:x>", vec![]),
            ("<meta property=og:image content='http://i.example:22/'>", vec![]),
            (
                "<img src=1.png width=1><img src=sign.SVG?x><img src=2.png height=20><img src=3.png width=300 height=200>
                 <img src=3.png><img src=4.png><img src=5.png>",
                vec![of("https://a.example/b/3.png", false), of("https://a.example/b/4.png", false)],
            ),
        ] {
            assert_eq!(images(html), expected, "{html}");
        }
    }

    #[test]
    fn an_oembed_description_fills_what_the_page_leaves_out() {
        let some = |text: &str| Some(text.to_owned());
        let embed = Embed {
            title: some("ET"),
            author: some("EA"),
            site: some("ES"),
            image: some("https://i.example/e.png"),
            text: some("E text"),
        };
        let draft = drafted("<title>T</title><meta property=og:site_name content=S>", Some(&embed));
        assert_eq!((draft.told.title, draft.told.site), (some("ET"), some("S")));
        assert_eq!(draft.told.description, some("E text"));
        assert_eq!(draft.images[0].url.as_str(), "https://i.example/e.png");
        let only = Embed { author: some("EA"), ..Embed::default() };
        assert_eq!(drafted("", Some(&only)).told.title, some("EA"));
    }

    #[test]
    fn an_oembed_description_is_asked_for_only_where_something_is_missing() {
        let url = address::parse("https://a.example/b/c").unwrap();
        let find = |html: &str| find_oembed(&Page::read(html), &url).map(String::from);
        let link = "<link rel=alternate type=application/json+oembed href='/o?url=x'>";
        let stated = "<meta property=og:title content=x><meta property=og:description content=x>";
        assert_eq!(find(link).as_deref(), Some("https://a.example/o?url=x"));
        assert_eq!(find(&format!("{link}{stated}")).as_deref(), Some("https://a.example/o?url=x"));
        assert_eq!(find(&format!("{link}{stated}<meta property=og:image content=x>")), None);
        assert_eq!(find("<link rel=alternate type=application/json+oembed href='file:///etc/passwd'>"), None);
    }
}
