//! URLs of which a preview may be made, and without what is private in them.

use url::{Host, Url};

/// A URL has at most this many bytes, because it is kept and is sent on.
pub const URL_BYTES_MAX: usize = 2_048;

/// Ports above 1023 on which other protocols are spoken, so that a browser does not ask there either
/// ([Fetch, "port blocking"](https://fetch.spec.whatwg.org/#port-blocking)).
const OTHER_PROTOCOLS: [u16; 19] = [
    1719, 1720, 1723, 2049, 3659, 4045, 4190, 5060, 5061, 6000, 6566, 6665, 6666, 6667, 6668, 6669, 6679,
    6697, 10080,
];

/// Reads a URL as a client names it, or as a redirect does. None for one that no page of the web can have.
pub fn parse(text: &str) -> Option<Url> {
    is_short(text).then(|| Url::parse(text).ok())?.and_then(admit)
}

/// Reads a URL as a page at `base` names it: it may be relative.
pub fn join(base: &Url, text: &str) -> Option<Url> {
    is_short(text).then(|| base.join(text).ok())?.and_then(admit)
}

/// The host as lists of hosts have it: an address of IPv6 without its brackets.
pub fn host(url: &Url) -> String {
    match url.host() {
        Some(Host::Domain(name)) => name.to_owned(),
        Some(Host::Ipv4(address)) => address.to_string(),
        Some(Host::Ipv6(address)) => address.to_string(),
        None => String::new(),
    }
}

fn is_short(text: &str) -> bool {
    text.len() <= URL_BYTES_MAX
}

/// Admits what is of the web, on a port where HTTP is spoken. A user's name, a password and the place within the page are taken
/// away: they are nobody's but the user's, and the page is the same without them.
fn admit(mut url: Url) -> Option<Url> {
    if !matches!(url.scheme(), "http" | "https") {
        return None;
    }
    let port = url.port_or_known_default()?;
    if !matches!(port, 80 | 443 | 1024..) || OTHER_PROTOCOLS.contains(&port) {
        return None;
    }
    url.set_username("").ok()?;
    url.set_password(None).ok()?;
    url.set_fragment(None);
    // A dot at the end of a name says that it is whole, as each name is here. Without it no list of hosts is evaded.
    if let Some(Host::Domain(name)) = url.host()
        && name.ends_with('.')
    {
        let whole = name.trim_end_matches('.').to_owned();
        url.set_host(Some(&whole)).ok()?;
    }
    (url.has_host() && is_short(url.as_str())).then_some(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Option<String> {
        parse(text).map(String::from)
    }

    #[test]
    fn what_is_private_in_a_url_is_taken_away() {
        for (text, whole) in [
            ("https://a.example", "https://a.example/"),
            ("HTTP://User:Secret@A.Example:80/x?y=1#part", "http://a.example/x?y=1"),
            ("https://a.example./", "https://a.example/"),
            ("https://bücher.example/ü", "https://xn--bcher-kva.example/%C3%BC"),
            ("http://0x7f.1/", "http://127.0.0.1/"),
            ("  https://a.example/\n", "https://a.example/"),
            ("https://a.example:8443/", "https://a.example:8443/"),
        ] {
            assert_eq!(parsed(text).as_deref(), Some(whole), "{text}");
        }
    }

    #[test]
    fn only_pages_of_the_web_have_previews() {
        for wrong in [
            "",
            "a.example",
            "//a.example/",
            "ftp://a.example/",
            "file:///etc/passwd",
            "data:text/html,x",
            "javascript:alert(1)",
            "mailto:a@b.example",
            "blob:https://a.example/x",
            "https://",
            "https://./",
            "https://a.example:22/",
            "https://a.example:25/",
            "http://a.example:6667/",
            "http://a.example:0/",
            "http://[::1",
            &format!("https://a.example/{}", "x".repeat(URL_BYTES_MAX)),
            // Each of these becomes nine bytes.
            &format!("https://a.example/{}", "\u{20ac}".repeat(URL_BYTES_MAX / 4)),
        ] {
            assert_eq!(parsed(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_page_names_urls_relative_to_its_own() {
        let base = parse("https://a.example/b/c?d").unwrap();
        let joined = |text| join(&base, text).map(String::from);
        assert_eq!(joined("e").as_deref(), Some("https://a.example/b/e"));
        assert_eq!(joined("/e#f").as_deref(), Some("https://a.example/e"));
        assert_eq!(joined("//b.example/e").as_deref(), Some("https://b.example/e"));
        assert_eq!(joined("javascript:alert(1)"), None);
        assert_eq!(joined("data:image/png;base64,AA=="), None);
        assert_eq!(joined("https://a.example:22/"), None);
        assert_eq!(host(&base), "a.example");
        assert_eq!(host(&parse("http://[2a00::1]/").unwrap()), "2a00::1");
    }
}
