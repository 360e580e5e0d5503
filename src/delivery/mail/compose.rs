//! Writes a digest as a mail: a text, the same as a page of HTML, and a head that says how to stop such mails (RFC 8058).
//!
//! Whatever others wrote comes here as one line without control characters (`push/digest.rs`), is escaped in HTML, and is encoded in the head by
//! the library. Nothing is loaded from anywhere when a mail is opened, so that nobody learns that it was.

use std::time::{Duration, UNIX_EPOCH};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use lettre::{
    Address, Message,
    message::{
        Mailbox, MultiPart, SinglePart,
        header::{HeaderName, HeaderValue},
    },
};

use sha2::{Digest as _, Sha256};

use crate::push::{
    digest::{Digest, News, RoomNews, What, clean},
    mailboxes,
};

/// The path of the page by which mails are stopped.
const UNSUBSCRIBE: &str = "/_aqueduct/client/v1/unsubscribe";
/// The number of bytes by which a mail is told from all others.
const ID_BYTES: usize = 24;
/// An inviter's name in a subject has at most this many characters, so that the user id that follows is seen.
const INVITER_CHARACTERS_MAX: usize = 30;
/// A subject names what somebody else named with at most this many characters.
const SUBJECT_CHARACTERS_MAX: usize = 60;

/// The part that all mails of this server have in common.
pub(super) struct Letterhead {
    /// The sender of mails.
    pub(super) from: Mailbox,
    /// The name of this server.
    pub(super) server: String,
    /// The URL by which clients reach it, without a slash at its end.
    pub(super) base_url: String,
}

/// A mail that could not be written.
#[derive(Debug)]
pub(super) struct NotWritten(pub(super) String);

/// Writes a digest that is sent at a time, in milliseconds since the epoch: the address to which it goes, and the mail.
pub(super) fn write(
    letterhead: &Letterhead,
    digest: &Digest,
    now_ms: u64,
) -> Result<(Address, Vec<u8>), NotWritten> {
    let wrong = |error: &dyn std::fmt::Display| NotWritten(error.to_string());
    let address: Address = digest.address.parse().map_err(|error| wrong(&error))?;
    let link = link(letterhead, digest);
    let page = Page { letterhead, digest, link: &link };
    let text = page.text();
    let id = id(digest, &text);
    // No text holds these characters, because nobody else knows the secret from which they are made.
    let boundary = format!("part{id}");
    let parts = MultiPart::alternative()
        .boundary(boundary)
        .singlepart(SinglePart::plain(text))
        .singlepart(SinglePart::html(page.html()));
    let raw = |name: &'static str, value: String| {
        // A URL must not be broken over lines, and holds nothing that would have to be encoded.
        HeaderValue::dangerous_new_pre_encoded(HeaderName::new_from_ascii_str(name), value.clone(), value)
    };
    let domain = letterhead.from.email.domain();
    let message = Message::builder()
        .from(letterhead.from.clone())
        .to(Mailbox::new(None, address.clone()))
        .date(UNIX_EPOCH + Duration::from_millis(now_ms))
        .message_id(Some(format!("<{id}@{domain}>")))
        .subject(page.subject())
        .raw_header(raw("List-Unsubscribe", format!("<{link}>")))
        .raw_header(raw("List-Unsubscribe-Post", "List-Unsubscribe=One-Click".to_owned()))
        // Nobody who is away answers such a mail by a program (RFC 3834).
        .raw_header(raw("Auto-Submitted", "auto-generated".to_owned()))
        .multipart(parts)
        .map_err(|error| wrong(&error))?;
    Ok((address, message.formatted()))
}

/// The characters by which a mail is told from all others. A digest that is sent again has the same, so that those who pass it on or read it can
/// drop the second one.
fn id(digest: &Digest, text: &str) -> String {
    let place = digest.known.place.upto.number().to_be_bytes();
    let mut hash = Sha256::new();
    for part in [digest.known.row.secret.as_bytes(), &place, text.as_bytes()] {
        hash.update(u64::try_from(part.len()).unwrap_or(u64::MAX).to_be_bytes());
        hash.update(part);
    }
    let hash: [u8; 32] = hash.finalize().into();
    let (id, _) = hash.split_at(ID_BYTES);
    URL_SAFE_NO_PAD.encode(id)
}

/// The link by which the pusher ends.
fn link(letterhead: &Letterhead, digest: &Digest) -> String {
    let token = mailboxes::token_of(digest.user, &digest.known.row.secret);
    // Neither the URL, which was parsed at the start, nor the token holds what a field of a mail's head cannot.
    let url: String = letterhead.base_url.chars().filter(char::is_ascii_graphic).collect();
    format!("{url}{UNSUBSCRIBE}?token={token}")
}

struct Page<'a> {
    letterhead: &'a Letterhead,
    digest: &'a Digest,
    link: &'a str,
}

impl Page<'_> {
    fn brand(&self) -> &str {
        self.digest.brand.as_deref().unwrap_or(&self.letterhead.server)
    }

    fn subject(&self) -> String {
        let brand = self.brand();
        let subject = match self.digest.rooms.as_slice() {
            [room] if self.digest.further_rooms == 0 => match room.events.as_slice() {
                [news @ News { what: What::Invitation, .. }] => {
                    format!("[{brand}] {} invites you", inviter(news, INVITER_CHARACTERS_MAX))
                }
                _ => format!("[{brand}] News in {}", clean(&title(room), SUBJECT_CHARACTERS_MAX)),
            },
            rooms => format!("[{brand}] News in {} rooms", rooms.len() + self.digest.further_rooms),
        };
        if self.digest.rooms.iter().any(|room| room.highlights) {
            return format!("{subject} that mention you");
        }
        subject
    }

    fn text(&self) -> String {
        let mut text = format!("Hello {},\n\nthis is what you have not read yet.\n", self.digest.user_id);
        for room in &self.digest.rooms {
            text.push_str(&format!("\n{}\n", title(room)));
            if room.further_events > 0 {
                text.push_str(&format!("  {}\n", earlier(room.further_events)));
            }
            for news in &room.events {
                text.push_str(&format!("  {} ({})\n", said(news), time(news.sent_ms)));
            }
            text.push_str(&format!("  {}\n", room_link(room)));
        }
        if self.digest.further_rooms > 0 {
            text.push_str(&format!("\n{}\n", further_rooms(self.digest.further_rooms)));
        }
        text.push_str(&format!(
            "\n-- \nYou get this mail because your account {} has notifications sent to {}.\nTo stop these mails: {}\n",
            self.digest.user_id, self.digest.address, self.link
        ));
        text
    }

    fn html(&self) -> String {
        let mut html = format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<title>{}</title>\n</head>\n<body>\n\
             <p>Hello {},</p>\n<p>this is what you have not read yet.</p>\n",
            escaped(&self.subject()),
            escaped(self.digest.user_id.as_str())
        );
        for room in &self.digest.rooms {
            let to_room = attribute("href", &room_link(room));
            html.push_str(&format!("<h3><a {to_room}>{}</a></h3>\n", escaped(&title(room))));
            if room.further_events > 0 {
                html.push_str(&format!("<p><i>{}</i></p>\n", earlier(room.further_events)));
            }
            html.push_str("<ul>\n");
            for news in &room.events {
                html.push_str(&format!(
                    "<li>{} <small>({})</small></li>\n",
                    said_in_html(news),
                    time(news.sent_ms)
                ));
            }
            html.push_str("</ul>\n");
        }
        if self.digest.further_rooms > 0 {
            html.push_str(&format!("<p>{}</p>\n", further_rooms(self.digest.further_rooms)));
        }
        let stop = attribute("href", self.link);
        html.push_str(&format!(
            "<hr>\n<p><small>You get this mail because your account {} has notifications sent to {}. \
             <a {stop}>Stop these mails</a></small></p>\n</body>\n</html>\n",
            escaped(self.digest.user_id.as_str()),
            escaped(&self.digest.address)
        ));
        html
    }
}

/// The name of a room, or who speaks there.
fn title(room: &RoomNews) -> String {
    match (&room.name, room.events.first()) {
        (Some(name), _) => name.clone(),
        (None, Some(news)) => format!("a conversation with {}", news.sender),
        (None, None) => "a conversation".to_owned(),
    }
}

fn earlier(count: usize) -> String {
    format!("{count} earlier message{}", if count == 1 { "" } else { "s" })
}

fn further_rooms(count: usize) -> String {
    format!("There is news in {count} more room{}.", if count == 1 { "" } else { "s" })
}

fn said(news: &News) -> String {
    let sender = &news.sender;
    match &news.what {
        What::Text(text) => format!("{sender}: {text}"),
        What::Action(text) => format!("* {sender} {text}"),
        What::File(kind) => format!("{sender} sent {} {kind}.", article(kind)),
        What::Encrypted => format!("{sender} sent an encrypted message."),
        What::Invitation => format!("{} invites you.", inviter(news, SUBJECT_CHARACTERS_MAX)),
        What::Other => format!("{sender} did something in the room."),
    }
}

/// The one who invites. Anybody can have any name, and the reader knows nobody by the room, so that the user id stands beside it.
fn inviter(news: &News, characters_max: usize) -> String {
    if news.sender == news.sender_id {
        return news.sender_id.clone();
    }
    format!("{} ({})", clean(&news.sender, characters_max), news.sender_id)
}

fn said_in_html(news: &News) -> String {
    let sender = escaped(&news.sender);
    match &news.what {
        What::Text(text) => format!("<b>{sender}</b>: {}", escaped(text)),
        What::Action(text) => format!("<b>{sender}</b> {}", escaped(text)),
        What::File(_) | What::Encrypted | What::Invitation | What::Other => escaped(&said(news)),
    }
}

fn article(kind: &str) -> &'static str {
    if kind.starts_with(['a', 'i']) { "an" } else { "a" }
}

fn time(ms: u64) -> String {
    // A time that no calendar has is that of another server's clock.
    let latest_ms = 253_402_300_799_000;
    httpdate::fmt_http_date(UNIX_EPOCH + Duration::from_millis(ms.min(latest_ms)))
}

/// A link that opens a room in the user's app.
fn room_link(room: &RoomNews) -> String {
    let is_safe = |it: u8| it.is_ascii_alphanumeric() || b"-._~".contains(&it);
    let id = room.room_id.bytes();
    let id: String =
        id.map(|it| if is_safe(it) { char::from(it).to_string() } else { format!("%{it:02X}") }).collect();
    format!("https://matrix.to/#/{id}")
}

/// Writes an attribute of an element. Its value may be any text.
fn attribute(name: &str, value: &str) -> String {
    [name, "=\"", &escaped(value), "\""].concat()
}

/// Escapes text for HTML, so that it can also stand between quotes.
pub(crate) fn escaped(text: &str) -> String {
    let mut html = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => html.push_str("&amp;"),
            '<' => html.push_str("&lt;"),
            '>' => html.push_str("&gt;"),
            '"' => html.push_str("&quot;"),
            '\'' => html.push_str("&#39;"),
            other => html.push(other),
        }
    }
    html
}

#[cfg(test)]
mod tests {
    use ruma::owned_user_id;
    use serde_json::json;

    use super::*;
    use crate::{
        ids::{DeviceNum, Position, UserNum},
        push::mailboxes::Standing,
        schema::{
            email::MailboxRow,
            push::{PusherPlace, PusherRow},
        },
    };

    fn letterhead() -> Letterhead {
        Letterhead {
            from: "Example <noreply@example.org>".parse().unwrap(),
            server: "x.example".to_owned(),
            base_url: "https://matrix.example.org".to_owned(),
        }
    }

    fn room(name: Option<&str>, news: &[(&str, What)]) -> RoomNews {
        let events = news.iter().map(|(sender, what)| News {
            sender: (*sender).to_owned(),
            sender_id: "@bob:x.example".to_owned(),
            sent_ms: 0,
            what: what.clone(),
        });
        RoomNews {
            room_id: "!r\"<:x.example".to_owned(),
            name: name.map(str::to_owned),
            events: events.collect(),
            further_events: 0,
            highlights: false,
        }
    }

    fn digest(rooms: Vec<RoomNews>) -> Digest {
        let place = PusherPlace { upto: Position::ZERO, is_behind: false, badge: None };
        let standing =
            Standing { place, row: MailboxRow { secret: "S".repeat(43), ..MailboxRow::default() } };
        let pusher = json!({ "kind": "email" });
        Digest {
            user: UserNum(1),
            user_id: owned_user_id!("@alice:x.example"),
            address: "alice@example.org".to_owned(),
            brand: None,
            rooms,
            further_rooms: 0,
            pusher: PusherRow { device: DeviceNum(1), pusher, is_enabled: true, set_ms: 0, has_place: true },
            known: standing.clone(),
            next: standing,
        }
    }

    fn written(digest: &Digest) -> String {
        let (address, mail) = write(&letterhead(), digest, 1_767_225_600_000).unwrap();
        assert_eq!(address.to_string(), "alice@example.org");
        String::from_utf8(mail).unwrap()
    }

    /// The fields of the head, with folded lines in one.
    fn head(mail: &str) -> Vec<(String, String)> {
        let (head, _) = mail.split_once("\r\n\r\n").unwrap();
        let head = head.replace("\r\n ", " ");
        head.split("\r\n")
            .map(|line| line.split_once(": ").unwrap())
            .map(|(name, value)| (name.into(), value.into()))
            .collect()
    }

    #[test]
    fn a_mail_says_who_sends_it_and_how_to_stop_it() {
        let mail = written(&digest(vec![room(Some("Room"), &[("Bob", What::Text("hello".to_owned()))])]));
        let head = head(&mail);
        let field =
            |name: &str| head.iter().find(|(other, _)| other == name).map(|(_, value)| value.as_str());
        assert_eq!(field("Subject"), Some("[x.example] News in Room"));
        assert_eq!(field("To"), Some("alice@example.org"));
        assert!(field("Message-ID").unwrap().ends_with("@example.org>"), "{head:?}");
        assert_eq!(field("Date"), Some("Thu, 01 Jan 2026 00:00:00 +0000"));
        let token = mailboxes::token_of(UserNum(1), &"S".repeat(43));
        let link = format!("<https://matrix.example.org/_aqueduct/client/v1/unsubscribe?token={token}>");
        assert_eq!(field("List-Unsubscribe"), Some(link.as_str()));
        assert_eq!(field("List-Unsubscribe-Post"), Some("List-Unsubscribe=One-Click"));
        assert!(field("Content-Type").unwrap().starts_with("multipart/alternative"), "{head:?}");
        for part in ["text/plain; charset=utf-8", "text/html; charset=utf-8"] {
            assert!(mail.contains(part), "{part} in {mail}");
        }
        assert!(mail.is_ascii() && mail.lines().all(|line| line.len() < 998), "{mail}");
    }

    #[test]
    fn a_digest_that_is_sent_again_is_the_same_mail_and_another_is_not() {
        let of = |digest: &Digest, now_ms: u64| {
            let (_, mail) = write(&letterhead(), digest, now_ms).unwrap();
            let head = head(&String::from_utf8(mail).unwrap());
            head.into_iter().find(|(name, _)| name == "Message-ID").unwrap().1
        };
        let first = digest(vec![room(Some("Room"), &[("Bob", What::Text("hello".to_owned()))])]);
        assert_eq!(of(&first, 1), of(&first, 1_000_000_000));
        let more = digest(vec![room(Some("Room"), &[("Bob", What::Text("hello again".to_owned()))])]);
        let mut later = first.clone();
        later.known.place.upto = Position::new(7).unwrap();
        let mut other = first.clone();
        other.known.row.secret = "T".repeat(43);
        for different in [more, later, other] {
            assert_ne!(of(&first, 1), of(&different, 1));
        }
    }

    #[test]
    fn names_end_neither_a_field_nor_an_element() {
        let evil = "x\r\nBcc: eve@x.example\r\n\r\n<img src=\"https://evil.example/\">&'";
        let names = clean(evil, 100);
        let mut digest = digest(vec![room(Some(&names), &[(&names, What::Text(names.clone()))])]);
        digest.brand = Some(clean("\u{e4} <\n>", 100));
        let mail = written(&digest);
        let names: Vec<_> = head(&mail).into_iter().map(|(name, _)| name).collect();
        assert!(!names.iter().any(|name| name == "Bcc"), "{names:?}");
        let page = Page { letterhead: &letterhead(), digest: &digest, link: "https://x/?a=1&b=\"" };
        let html = page.html();
        assert!(!html.contains("<img") && !html.contains("evil.example/\">"), "{html}");
        assert!(html.contains("&lt;img src=&quot;https://evil.example/&quot;&gt;&amp;&#39;"), "{html}");
        assert!(html.contains("a=1&amp;b=&quot;"), "{html}");
        assert!(html.contains("https://matrix.to/#/%21r%22%3C%3Ax.example"), "{html}");
        assert!(!page.text().contains("\nBcc:"), "{}", page.text());
    }

    #[test]
    fn each_kind_of_news_has_its_words_and_content_is_told_of_messages_alone() {
        let say = |what: What| {
            let (sender, sender_id) = ("Bob".to_owned(), "@bob:x.example".to_owned());
            said(&News { sender, sender_id, sent_ms: 0, what })
        };
        let words = [
            (What::Action("waves".to_owned()), "* Bob waves"),
            (What::File("image"), "Bob sent an image."),
            (What::File("file"), "Bob sent a file."),
            (What::Encrypted, "Bob sent an encrypted message."),
            (What::Invitation, "Bob (@bob:x.example) invites you."),
            (What::Other, "Bob did something in the room."),
        ];
        for (what, expected) in words {
            assert_eq!(say(what), expected);
        }
        let invited = digest(vec![room(None, &[("Bob", What::Invitation)])]);
        let page = Page { letterhead: &letterhead(), digest: &invited, link: "" };
        assert_eq!(page.subject(), "[x.example] Bob (@bob:x.example) invites you");
        let mut many = digest(vec![room(None, &[("Bob", What::Other)]), room(Some("b"), &[])]);
        many.further_rooms = 3;
        many.rooms[0].highlights = true;
        many.rooms[0].further_events = 1;
        let page = Page { letterhead: &letterhead(), digest: &many, link: "" };
        assert_eq!(page.subject(), "[x.example] News in 5 rooms that mention you");
        assert!(page.text().contains("1 earlier message\n") && page.text().contains("in 3 more rooms."));
        assert!(page.text().contains("a conversation with Bob"));
        assert_eq!(time(u64::MAX), "Fri, 31 Dec 9999 23:59:59 GMT");
    }
}
