//! What is signed is verified, what is changed is not, and no header makes us panic.

use std::time::Duration;

use futures_util::{FutureExt, future::ready};
use http::HeaderValue;
use proptest::prelude::*;
use ruma::ServerName;

use super::*;
use crate::{
    call::Caller,
    discovery::Discovery,
    guard::{Guard, ServerList},
    testing::{BEGAN_MS, Net, json, own_keys},
};

fn server(name: &str) -> &ServerName {
    name.try_into().unwrap()
}

/// A server `us.example:1`, in a network in which `a.example:1` publishes its key 1.
fn ring(net: &Net, denied: &[&str]) -> Ring {
    net.host("a.example", &["5.0.0.1"]);
    let theirs = own_keys("a.example:1", 1, "1").unwrap();
    net.serve("5.0.0.1:1", &["a.example"], move |_| ready(json(200, theirs.document(BEGAN_MS).to_string())));
    let ports = net.ports();
    let discovery = Discovery::new(ports.clone(), Guard::default(), false);
    let caller = Caller::new(ports, discovery, ServerList::new(&[], denied));
    Ring::new(caller, own_keys("us.example:1", 9, "us").unwrap(), Vec::new())
}

const URI: &str = "/_matrix/federation/v1/send/1?a=%20b";

fn signed(content: Option<&Canonical>) -> Signed<'_> {
    Signed { method: "PUT", uri: URI, content }
}

fn read(header: &HeaderValue) -> Credentials {
    header::parse([header.as_bytes()]).unwrap().unwrap()
}

/// A request of `a.example:1` to us, signed with this key.
fn header(seed: u8, version: &str, content: Option<&Canonical>) -> HeaderValue {
    let theirs = own_keys("a.example:1", seed, version).unwrap();
    sign(&theirs, server("us.example:1"), signed(content)).unwrap()
}

async fn judge(credentials: &Credentials, request: Signed<'_>) -> Result<OwnedServerName, Refusal> {
    verify(&ring(&Net::new(1), &[]), credentials, request).await
}

#[test]
fn the_text_that_is_signed_is_the_specifications() {
    let body = content(br#" {"b": 1, "a": "\u00e9"} "#).unwrap().unwrap();
    let with = signed(Some(&body)).text(server("o.example"), server("d.example"));
    let expected = r#"{"content":{"a":"é","b":1},"destination":"d.example","method":"PUT","origin":"o.example","uri":"/_matrix/federation/v1/send/1?a=%20b"}"#;
    assert_eq!(with.as_str(), expected);
    assert_eq!(Canonical::of(expected.as_bytes()).unwrap(), with);
    assert!(!signed(None).text(server("o.example"), server("d.example")).as_str().contains("content"));
    assert!(content(b"{").is_err());
    let deep = content(("[".repeat(128) + &"]".repeat(128)).as_bytes()).unwrap();
    assert!(signed(deep.as_ref()).text(server("o.example"), server("d.example")).as_str().len() > 256);
    assert_eq!(content(b""), Ok(None));
}

#[test]
fn our_header_is_as_old_servers_read_it_and_as_ruma_does() {
    let header = header(1, "1", None);
    let text = header.to_str().unwrap();
    let start = r#"X-Matrix origin="a.example:1",destination="us.example:1",key="ed25519:1",sig=""#;
    assert!(text.starts_with(start), "{text}");
    let theirs = ruma::api::federation::authentication::XMatrix::parse(text).unwrap();
    assert_eq!((theirs.origin.as_str(), theirs.key.as_str()), ("a.example:1", "ed25519:1"));
}

#[tokio::test(start_paused = true)]
async fn what_is_signed_is_verified() {
    let body = content(br#"{"pdus":[1.5,12345678901234567890]}"#).unwrap().unwrap();
    for content in [None, Some(&body)] {
        let credentials = read(&header(1, "1", content));
        assert_eq!(judge(&credentials, signed(content)).await.unwrap(), "a.example:1");
        let old = Credentials { destination: None, ..credentials };
        assert_eq!(judge(&old, signed(content)).await.unwrap(), "a.example:1");
    }
}

#[tokio::test(start_paused = true)]
async fn each_way_to_be_refused_is_told_apart() {
    let good = read(&header(1, "1", None));
    let request = signed(None);
    let other = Credentials { destination: Some("other.example".to_owned()), ..good.clone() };
    assert_eq!(judge(&other, request).await, Err(Refusal::WrongDestination("other.example".to_owned())));
    let bad = Err(Refusal::BadSignature(server("a.example:1").to_owned()));
    let body = content(b"{}").unwrap().unwrap();
    for changed in [
        Signed { method: "POST", ..request },
        Signed { uri: "/_matrix/federation/v1/send/2", ..request },
        signed(Some(&body)),
    ] {
        assert_eq!(judge(&good, changed).await, bad);
    }
    assert_eq!(judge(&read(&header(2, "1", None)), request).await, bad, "another key under this id");
    let unknown = judge(&read(&header(2, "2", None)), request).await;
    assert!(matches!(unknown, Err(Refusal::UnknownKey(KeyFailure::Unknown { .. }))), "{unknown:?}");
    let origin = server("none.example:1").to_owned();
    let nobody = judge(&Credentials { origin, ..good.clone() }, request).await;
    assert!(matches!(nobody, Err(Refusal::UnknownKey(KeyFailure::Unavailable { .. }))), "{nobody:?}");
    let denied = verify(&ring(&Net::new(1), &["a.example"]), &good, request).await;
    assert!(matches!(denied, Err(Refusal::NotAllowed(_))));
}

#[tokio::test(start_paused = true)]
async fn a_key_that_is_not_valid_any_more_proves_nothing() {
    let net = Net::new(1);
    let ring = ring(&net, &[]);
    let credentials = read(&header(1, "1", None));
    assert!(verify(&ring, &credentials, signed(None)).await.is_ok());
    tokio::time::advance(Duration::from_secs(8 * 24 * 3600)).await;
    // The server still publishes the document of a week ago.
    let late = verify(&ring, &credentials, signed(None)).await;
    assert!(matches!(late, Err(Refusal::UnknownKey(KeyFailure::NotValid { .. }))), "{late:?}");
}

#[tokio::test(start_paused = true)]
async fn one_of_several_keys_is_enough() {
    let (first, second) = (header(2, "unknown", None), header(1, "1", None));
    let credentials = header::parse([first.as_bytes(), b"Bearer x", second.as_bytes()]).unwrap().unwrap();
    assert_eq!(credentials.signatures.len(), 2);
    let mut wrong = credentials.clone();
    wrong.signatures[0].0 = wrong.signatures[1].0.clone();
    assert_eq!(judge(&wrong, signed(None)).await.unwrap(), "a.example:1");
    wrong.signatures[1].0 = "ed25519:unknown".try_into().unwrap();
    assert!(matches!(judge(&wrong, signed(None)).await, Err(Refusal::BadSignature(_))));
    assert_eq!(judge(&credentials, signed(None)).await.unwrap(), "a.example:1");
}

fn parse(value: &str) -> Result<Option<Credentials>, Malformed> {
    header::parse([value.as_bytes()])
}

#[test]
fn headers_are_read_as_liberally_as_the_specification_asks() {
    let expected =
        parse(r#"X-Matrix origin="a.example:1",destination="b.example",key="ed25519:1",sig="Ab+/""#).unwrap();
    assert!(expected.is_some());
    for same in [
        r#"X-Matrix origin=a.example:1,destination=b.example,key=ed25519:1,sig=Ab+/"#,
        r#"x-matrix    sig="Ab+/"  ,	key="ed25519:1" , origin="a.example:1",	destination="b.example" "#,
        r#"X-Matrix ORIGIN="a.example:1",Destination="b.example",KEY="ed25519:1",Sig="Ab+/",more="x,y=\"z\"",x=1"#,
        r#"X-Matrix origin="\a\.example:1",destination="b.exampl\e",key="ed25519:1",sig="Ab\+/""#,
        r#"X-Matrix ,, origin = "a.example:1" ,, destination= "b.example", key ="ed25519:1",signature="Ab+/",,"#,
        "X-Matrix\torigin=\"a.example:1\",destination=\"b.example\",key=\"ed25519:1\",sig=\"Ab+/\"",
    ] {
        assert_eq!(parse(same), Ok(expected.clone()), "{same}");
    }
    let padded = parse("X-Matrix origin=a.example,key=ed25519:1,sig=Ab==").unwrap().unwrap();
    assert_eq!((padded.destination, padded.signatures[0].1.as_str()), (None, "Ab=="));
}

#[test]
fn headers_of_other_schemes_are_none_and_those_without_sense_are_refused() {
    for none in ["", "Bearer abc", "X-Matrixorigin=a", "Basic X-Matrix", "X-Matri"] {
        assert_eq!(parse(none), Ok(None), "{none}");
    }
    let good = "origin=a.example,key=ed25519:1,sig=x";
    assert!(parse(&format!("X-Matrix {good}")).is_ok());
    for wrong in [
        "X-Matrix",
        "X-Matrix ",
        "X-Matrix origin",
        "X-Matrix =a",
        "X-Matrix origin=",
        "X-Matrix origin=\"a",
        "X-Matrix origin=a.example",
        "X-Matrix origin=a.example,key=ed25519:1",
        "X-Matrix key=ed25519:1,sig=x",
        "X-Matrix origin=a_b,key=ed25519:1,sig=x",
        "X-Matrix origin=a.example,key=1,sig=x",
        "X-Matrix origin=a.example,key=ed25519:a-b,sig=x",
        "X-Matrix origin=a.example,key=ed25519:\u{e9},sig=x",
        "X-Matrix origin=a.example,key=\"ed25519:\u{e9}\",sig=x",
        "X-Matrix origin=a.example key=ed25519:1,sig=x",
        "X-Matrix origin=\"a.example\"x,key=ed25519:1,sig=x",
        "X-Matrix or igin=a.example,key=ed25519:1,sig=x",
        "X-Matrix origin=a\"b,key=ed25519:1,sig=x",
        "X-Matrix origin=\"a.exa\u{7}mple\",key=ed25519:1,sig=x",
        "X-Matrix sig=\"a\\",
        &format!("X-Matrix {good},{good}"),
        &format!("X-Matrix {good},sig=y"),
        &format!("X-Matrix {good},signature=y"),
        &format!("X-Matrix {}{good}", "x=1,".repeat(40)),
        &format!("X-Matrix {good},x={}", "x".repeat(8192)),
    ] {
        assert!(parse(wrong).is_err(), "{wrong}");
    }
    assert!(header::parse([&b"X-Matrix origin=\xff,key=ed25519:1,sig=x"[..]]).is_err());
    let one = format!("X-Matrix {good}");
    let several = |values: &[&str]| header::parse(values.iter().map(|it| it.as_bytes()));
    assert_eq!(several(&[&one, &one]).unwrap().unwrap().signatures.len(), 2);
    assert!(several(&[&one, &one.replace("a.example", "b.example")]).is_err());
    assert!(several(&[&one, &format!("{one},destination=b.example")]).is_err());
    assert!(several(&[one.as_str(); 9]).is_err());
    assert!(several(&["Bearer x", &one]).unwrap().is_some());
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let mut value = b"X-Matrix ".to_vec();
        value.extend(bytes);
        let _ = header::parse([&value[..]]);
    }

    #[test]
    fn nothing_that_looks_like_a_header_makes_the_reader_panic(
        values in proptest::collection::vec(r#"(X-Matrix|x-matrix|Bearer)?[ \t]*((origin|destination|key|sig|x)?[ =]{0,2}["\\]?[a-z0-9:.+/\\" ]{0,12}"?[, \t]{0,2}){0,8}"#, 0..4),
    ) {
        if let Ok(Some(credentials)) = header::parse(values.iter().map(|it| it.as_bytes())) {
            prop_assert!(!credentials.signatures.is_empty());
        }
    }

    #[test]
    fn whatever_is_quoted_comes_out_as_it_went_in(origin in "[a-z.]{1,20}", destination in "[ -~]{0,40}") {
        let quoted: String = destination.chars().flat_map(|it| ['\\', it]).collect();
        let header = format!("X-Matrix destination=\"{quoted}\",sig=x,origin={origin},key=ed25519:1");
        let credentials = parse(&header).unwrap().unwrap();
        prop_assert_eq!(credentials.origin.as_str(), origin);
        prop_assert_eq!(credentials.destination.unwrap(), destination);
    }

    #[test]
    fn a_changed_byte_of_header_or_request_is_refused(at in any::<prop::sample::Index>(), flip in 1_u8..128, part in 0..3) {
        let body = br#"{"a":"b"}"#.to_vec();
        let canonical = content(&body).unwrap().unwrap();
        let header = header(1, "1", Some(&canonical)).as_bytes().to_vec();
        let change = |bytes: &[u8]| {
            let mut bytes = bytes.to_vec();
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            bytes
        };
        let (mut changed_header, mut changed_body, mut uri) = (header.clone(), body.clone(), URI.to_owned());
        match part {
            0 => changed_header = change(&header),
            1 => changed_body = change(&body),
            _ => match String::from_utf8(change(URI.as_bytes())) {
                Ok(changed) => uri = changed,
                Err(_) => return Ok(()),
            },
        }
        let Ok(changed_content) = content(&changed_body) else { return Ok(()) };
        let original = header::parse([&header[..]]).unwrap().unwrap();
        let Ok(Some(credentials)) = header::parse([&changed_header[..]]) else { return Ok(()) };
        let same = changed_content.as_ref() == Some(&canonical) && uri == URI && same_meaning(&original, &credentials);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let request = Signed { method: "PUT", uri: &uri, content: changed_content.as_ref() };
        let verdict = runtime.block_on(judge(&credentials, request).boxed_local());
        prop_assert_eq!(verdict.is_ok(), same, "{:?}", verdict);
    }
}

/// Whether headers say the same: the name of the destination may be left out, and the last bits of base64 mean nothing.
fn same_meaning(a: &Credentials, b: &Credentials) -> bool {
    let bytes = |it: &Credentials| {
        ruma::serde::Base64::<ruma::serde::base64::Standard>::parse(&it.signatures[0].1)
            .map(|it| it.into_inner())
    };
    let destination = b.destination.is_none() || a.destination == b.destination;
    let key = a.signatures[0].0 == b.signatures[0].0;
    a.origin == b.origin && key && destination && matches!((bytes(a), bytes(b)), (Ok(a), Ok(b)) if a == b)
}
