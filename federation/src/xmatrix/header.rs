//! Reading `Authorization` headers of the scheme `X-Matrix`
//! ([request authentication](https://spec.matrix.org/v1.19/server-server-api/#request-authentication), and RFC 9110, sections
//! 5.6 and 11.4).
//!
//! Values may be quoted or not, in any order, with blanks around commas and equal signs, among parameters that nobody
//! knows. What is unquoted may hold any visible character but commas and quotes, since old servers leave quotes out around colons and
//! signatures.

use ruma::{OwnedServerName, OwnedServerSigningKeyId};

/// All headers together have at most this many bytes.
const BYTES_MAX: usize = 8192;
/// A request is signed with at most this many keys: each may cost a look-up.
const SIGNATURES_MAX: usize = 8;
/// A header has at most this many parameters.
const PARAMETERS_MAX: usize = 32;

/// Who says that they made a request, and how they prove it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// The server that says so.
    pub origin: OwnedServerName,
    /// The server that it means to ask; servers of old do not say.
    pub destination: Option<String>,
    /// Its signatures in base64, each with the id of the key. There is at least one.
    pub signatures: Vec<(OwnedServerSigningKeyId, String)>,
}

/// A header that makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(&'static str);

/// Reads the values of all `Authorization` headers of a request. None where no header is of this scheme.
/// Errors: [`Malformed`], also where headers name different servers.
pub fn parse<'h>(values: impl IntoIterator<Item = &'h [u8]>) -> Result<Option<Credentials>, Malformed> {
    let mut credentials: Option<Credentials> = None;
    let mut bytes = 0;
    for value in values {
        bytes += value.len();
        if bytes > BYTES_MAX {
            return Err(Malformed("it is too long"));
        }
        let Some(parameters) = of_scheme(value) else { continue };
        let text = std::str::from_utf8(parameters).map_err(|_| Malformed("it is not UTF-8"))?;
        let one = parse_one(text)?;
        match &mut credentials {
            None => credentials = Some(one),
            Some(all) if all.origin != one.origin || all.destination != one.destination => {
                return Err(Malformed("its headers name different servers"));
            }
            Some(all) if all.signatures.len() < SIGNATURES_MAX => all.signatures.extend(one.signatures),
            Some(_) => return Err(Malformed("it has too many signatures")),
        }
    }
    Ok(credentials)
}

/// What follows the scheme, if it is ours. The names of schemes have no case.
fn of_scheme(value: &[u8]) -> Option<&[u8]> {
    let (scheme, rest) = value.trim_ascii_start().split_at_checked("X-Matrix".len())?;
    let is_ours =
        scheme.eq_ignore_ascii_case(b"X-Matrix") && rest.first().is_none_or(u8::is_ascii_whitespace);
    is_ours.then_some(rest)
}

#[derive(Default)]
struct Parameters {
    origin: Option<String>,
    destination: Option<String>,
    key: Option<String>,
    sig: Option<String>,
}

fn parse_one(text: &str) -> Result<Credentials, Malformed> {
    let mut parameters = Parameters::default();
    let mut rest = text;
    for _ in 0..PARAMETERS_MAX {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        if rest.is_empty() {
            return finish(parameters);
        }
        let (name, after) = rest.split_once('=').ok_or(Malformed("a parameter has no value"))?;
        let (value, after) = take_value(after.trim_start_matches([' ', '\t']))?;
        rest = after.trim_start_matches([' ', '\t']);
        if !rest.is_empty() && !rest.starts_with(',') {
            return Err(Malformed("something follows a value"));
        }
        let name = name.trim_end_matches([' ', '\t']);
        if name.is_empty() || !name.bytes().all(is_token) {
            return Err(Malformed("the name of a parameter is none"));
        }
        let place = match name.to_ascii_lowercase().as_str() {
            "origin" => &mut parameters.origin,
            "destination" => &mut parameters.destination,
            "key" => &mut parameters.key,
            // The specification's text calls it `signature`, all its examples and all servers `sig`.
            "sig" | "signature" => &mut parameters.sig,
            _ => continue,
        };
        if place.replace(value).is_some() {
            return Err(Malformed("a parameter is there twice"));
        }
    }
    Err(Malformed("it has too many parameters"))
}

fn finish(parameters: Parameters) -> Result<Credentials, Malformed> {
    let origin = parameters.origin.ok_or(Malformed("origin is missing"))?;
    let origin = OwnedServerName::try_from(origin).map_err(|_| Malformed("origin is not a server's name"))?;
    let key = parameters.key.ok_or(Malformed("key is missing"))?;
    let key = Some(key).filter(|it| it.is_ascii() && it.len() <= 255);
    let key = key.and_then(|it| OwnedServerSigningKeyId::try_from(it).ok());
    let key = key.ok_or(Malformed("key is not the id of a key"))?;
    let sig = parameters.sig.ok_or(Malformed("sig is missing"))?;
    Ok(Credentials { origin, destination: parameters.destination, signatures: vec![(key, sig)] })
}

/// Takes a value, and answers what follows it.
fn take_value(text: &str) -> Result<(String, &str), Malformed> {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', ' ', '\t']).unwrap_or(text.len());
        let (value, rest) = text.split_at_checked(end).ok_or(Malformed("a value is none"))?;
        if value.is_empty() || !value.bytes().all(|it| it.is_ascii_graphic() && it != b'"' && it != b'\\') {
            return Err(Malformed("a value is none"));
        }
        return Ok((value.to_owned(), rest));
    };
    let mut value = String::new();
    let mut characters = quoted.chars();
    while let Some(it) = characters.next() {
        match it {
            '"' => return Ok((value, characters.as_str())),
            '\\' => value.push(characters.next().ok_or(Malformed("a quoted value does not end"))?),
            it if it.is_control() && it != '\t' => {
                return Err(Malformed("a value holds a control character"));
            }
            it => value.push(it),
        }
    }
    Err(Malformed("a quoted value does not end"))
}

/// The characters of a token (RFC 9110, section 5.6.2).
const fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric()
        || matches!(
            byte,
            b'!' | b'#'
                | b'$'
                | b'%'
                | b'&'
                | b'\''
                | b'*'
                | b'+'
                | b'-'
                | b'.'
                | b'^'
                | b'_'
                | b'`'
                | b'|'
                | b'~'
        )
}
