//! A mail server that speaks SMTP (RFC 5321) with STARTTLS and AUTH, and reads the mails that it takes as a program of mail does.

use std::{collections::VecDeque, io, sync::Arc, time::Duration};

use aqueduct::env::{
    Env,
    dial::{Dial, Wire},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use futures_util::{FutureExt, future::BoxFuture};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, duplex};
use tokio_rustls::TlsAcceptor;

/// A mail that was taken.
#[derive(Clone, Debug)]
pub(super) struct Mail {
    /// The addresses of the envelope: sender and recipient.
    pub(super) envelope: (String, String),
    /// The fields of the head, each in one line.
    pub(super) head: Vec<(String, String)>,
    /// The text part of the mail, decoded.
    pub(super) text: String,
    /// The page of HTML, decoded.
    pub(super) html: String,
}

impl Mail {
    pub(super) fn field(&self, name: &str) -> &str {
        let mut found = self.head.iter().filter(|(other, _)| other.eq_ignore_ascii_case(name));
        let (_, value) = found.next().unwrap_or_else(|| panic!("no {name} in {:?}", self.head));
        assert!(found.next().is_none(), "{name} stands twice in {:?}", self.head);
        value
    }

    /// The link by which such mails are stopped, without scheme and host.
    pub(super) fn link(&self) -> String {
        let url = self.field("List-Unsubscribe").trim_matches(['<', '>']);
        url.strip_prefix("http://localhost:8008").unwrap().to_owned()
    }

    /// Reads a mail as it came.
    pub(super) fn read(envelope: (String, String), mail: &str) -> Self {
        let (head, body) = part(mail);
        let of = |name: &str| head.iter().find(|(other, _)| other == name).map(|(_, value)| value.clone());
        let kind = of("Content-Type").unwrap();
        let boundary = kind.split("boundary=").nth(1).unwrap().trim_matches('"').to_owned();
        let parts: Vec<_> = body.split(&format!("--{boundary}")).collect();
        assert_eq!((parts.len(), parts[3].trim()), (4, "--"), "{mail}");
        let decoded = |at: usize, expected: &str| {
            let (head, body) = part(parts[at].trim_start_matches("\r\n"));
            let of =
                |name: &str| head.iter().find(|(other, _)| other == name).map(|(_, value)| value.as_str());
            assert_eq!(of("Content-Type"), Some(expected));
            decode(of("Content-Transfer-Encoding").unwrap(), body.trim_end_matches("\r\n"))
        };
        let text = decoded(1, "text/plain; charset=utf-8");
        let html = decoded(2, "text/html; charset=utf-8");
        Self { envelope, head, text, html }
    }
}

/// The fields of a head, and what follows it.
fn part(text: &str) -> (Vec<(String, String)>, &str) {
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let head = head.replace("\r\n ", " ").replace("\r\n\t", " ");
    let field = |line: &str| {
        let (name, value) = line.split_once(": ").unwrap_or_else(|| panic!("no field: {line:?}"));
        (name.to_owned(), value.to_owned())
    };
    (head.split("\r\n").map(field).collect(), body)
}

fn decode(encoding: &str, body: &str) -> String {
    let decoded = match encoding {
        "7bit" => body.to_owned(),
        "base64" => String::from_utf8(STANDARD.decode(body.replace("\r\n", "")).unwrap()).unwrap(),
        "quoted-printable" => {
            let joined = body.replace("=\r\n", "");
            let (mut bytes, mut rest) = (Vec::new(), joined.as_str());
            while let Some(at) = rest.find('=') {
                bytes.extend_from_slice(&rest.as_bytes()[..at]);
                bytes.push(u8::from_str_radix(&rest[at + 1..at + 3], 16).unwrap());
                rest = &rest[at + 3..];
            }
            bytes.extend_from_slice(rest.as_bytes());
            String::from_utf8(bytes).unwrap()
        }
        other => panic!("{other}: {body}"),
    };
    decoded.replace("\r\n", "\n")
}

/// The manners of a mail server.
#[derive(Clone, Default)]
pub(super) struct Manners {
    /// Nobody takes any connections there.
    pub(super) is_down: bool,
    /// The verb after which it says nothing any more; `""` for the greeting, `"."` for the end of a mail.
    pub(super) hangs_at: Option<&'static str>,
    /// The answer to each recipient in place of that it is right.
    pub(super) recipient: Option<&'static str>,
    /// The only recipient who gets that answer; `""` for each.
    pub(super) only: &'static str,
    /// Says whether it takes a mail after so many seconds.
    pub(super) decides_after_s: u64,
    /// The answer to a mail in place of that it is taken.
    pub(super) data: Option<&'static str>,
    /// The key by which it encrypts connections.
    pub(super) tls: Option<TlsAcceptor>,
    /// Connections are encrypted from the first byte on, and not by `STARTTLS`.
    pub(super) is_implicit: bool,
    /// It says endlessly much in answer to `EHLO`.
    pub(super) babbles: bool,
}

#[derive(Default)]
struct Office {
    env: Option<Env>,
    manners: Manners,
    mails: VecDeque<Mail>,
    said: Vec<String>,
    open: usize,
    /// Is called once a mail is taken and before that is said.
    on_mail: Option<Box<dyn Fn() + Send>>,
}

/// A mail server in memory, at whichever host. Cheap to clone.
#[derive(Clone, Default)]
pub(super) struct PostOffice(Arc<Mutex<Office>>);

impl PostOffice {
    /// Has its tasks run in these doors.
    pub(super) fn run_in(&self, env: &Env) {
        let mut office = self.0.lock();
        // Connections of a server that was killed ended with it.
        (office.env, office.open) = (Some(env.clone()), 0);
    }

    pub(super) fn change(&self, change: impl FnOnce(&mut Manners)) {
        change(&mut self.0.lock().manners);
    }

    /// Has this be done when a mail is taken, before that is said.
    pub(super) fn on_mail(&self, on_mail: impl Fn() + Send + 'static) {
        self.0.lock().on_mail = Some(Box::new(on_mail));
    }

    /// The mails that were taken since this was last asked.
    pub(super) fn take(&self) -> Vec<Mail> {
        self.0.lock().mails.drain(..).collect()
    }

    /// The lines that it was told since this was last asked, without mails.
    pub(super) fn said(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().said)
    }

    /// Serves one connection to its end.
    pub(super) async fn serve(self, wire: impl AsyncRead + AsyncWrite + Send + Unpin) {
        let Manners { tls, is_implicit, .. } = self.0.lock().manners.clone();
        {
            let mut office = self.0.lock();
            office.open += 1;
            assert_eq!(office.open, 1, "one connection at a time");
        }
        match tls {
            Some(tls) if is_implicit => {
                if let Ok(wire) = tls.accept(wire).await {
                    drop(self.converse(wire, true, false).await);
                }
            }
            Some(tls) => {
                if let Ok(Some(wire)) = self.converse(wire, false, true).await
                    && let Ok(wire) = tls.accept(wire).await
                {
                    // The one who begins anew greets with `EHLO`, and waits for no greeting.
                    drop(self.go_on(wire, true, false).await);
                }
            }
            None => drop(self.converse(wire, false, false).await),
        }
        self.0.lock().open -= 1;
    }

    /// Greets and converses. Answers the connection where it is to be encrypted.
    async fn converse<W: AsyncRead + AsyncWrite + Unpin>(
        &self,
        mut wire: W,
        is_encrypted: bool,
        offers_tls: bool,
    ) -> io::Result<Option<W>> {
        self.may_hang("").await;
        wire.write_all(b"220 mail.example ESMTP\r\n").await?;
        self.go_on(wire, is_encrypted, offers_tls).await
    }

    async fn go_on<W: AsyncRead + AsyncWrite + Unpin>(
        &self,
        mut wire: W,
        is_encrypted: bool,
        offers_tls: bool,
    ) -> io::Result<Option<W>> {
        let (mut from, mut to) = (String::new(), String::new());
        loop {
            let line = read_line(&mut wire).await?;
            self.0.lock().said.push(line.clone());
            let verb = line.split([' ', ':']).next().unwrap().to_ascii_uppercase();
            self.may_hang(&verb).await;
            let manners = self.0.lock().manners.clone();
            let answer = match verb.as_str() {
                "EHLO" if manners.babbles => loop {
                    wire.write_all(b"250-a line of an answer without an end\r\n").await?;
                },
                "EHLO" => {
                    let tls = if offers_tls { "250-STARTTLS\r\n" } else { "" };
                    let auth = if is_encrypted { "250-AUTH PLAIN LOGIN\r\n" } else { "" };
                    format!("250-mail.example\r\n{tls}{auth}250 8BITMIME")
                }
                "STARTTLS" if offers_tls => {
                    wire.write_all(b"220 go\r\n").await?;
                    return Ok(Some(wire));
                }
                "AUTH" if is_encrypted => "235 welcome".to_owned(),
                "MAIL" => {
                    from = address(&line);
                    "250 ok".to_owned()
                }
                "RCPT" => {
                    to = address(&line);
                    let is_meant = manners.only.is_empty() || manners.only == to;
                    manners.recipient.filter(|_| is_meant).unwrap_or("250 ok").to_owned()
                }
                "DATA" => {
                    wire.write_all(b"354 go\r\n").await?;
                    let mail = read_mail(&mut wire).await?;
                    if manners.data.is_none() {
                        let mut office = self.0.lock();
                        office.mails.push_back(Mail::read((from.clone(), to.clone()), &mail));
                        if let Some(on_mail) = &office.on_mail {
                            on_mail();
                        }
                    }
                    self.may_hang(".").await;
                    self.decide(manners.decides_after_s).await;
                    manners.data.unwrap_or("250 taken").to_owned()
                }
                "QUIT" => {
                    wire.write_all(b"221 bye\r\n").await?;
                    return Ok(None);
                }
                _ => "502 unknown".to_owned(),
            };
            wire.write_all(answer.as_bytes()).await?;
            wire.write_all(b"\r\n").await?;
        }
    }

    /// Takes its time for a mail. Others may connect meanwhile.
    async fn decide(&self, after_s: u64) {
        if after_s == 0 {
            return;
        }
        let env = {
            let mut office = self.0.lock();
            office.open -= 1;
            office.env.clone().unwrap()
        };
        env.sleep(Duration::from_secs(after_s)).await;
        self.0.lock().open += 1;
    }

    async fn may_hang(&self, at: &str) {
        let hangs = self.0.lock().manners.hangs_at == Some(at);
        if hangs {
            self.0.lock().open -= 1;
            futures_util::future::pending::<()>().await;
        }
    }
}

impl Dial for PostOffice {
    fn dial<'a>(&'a self, host: &'a str, port: u16) -> BoxFuture<'a, io::Result<Box<dyn Wire>>> {
        assert_eq!((host, port), ("mail.example", 587));
        let (env, is_down) = {
            let office = self.0.lock();
            (office.env.clone().unwrap(), office.manners.is_down)
        };
        if is_down {
            return std::future::ready(Err(io::ErrorKind::ConnectionRefused.into())).boxed();
        }
        let (ours, theirs) = duplex(1 << 16);
        env.spawn(self.clone().serve(theirs));
        let wire: Box<dyn Wire> = Box::new(ours);
        std::future::ready(Ok(wire)).boxed()
    }
}

fn address(line: &str) -> String {
    line.split(['<', '>']).nth(1).unwrap().to_owned()
}

async fn read_line(wire: &mut (impl AsyncRead + Unpin)) -> io::Result<String> {
    let mut line = Vec::new();
    while !line.ends_with(b"\r\n") {
        line.push(wire.read_u8().await?);
        assert!(line.len() <= 1_000, "a line is too long: {}", String::from_utf8_lossy(&line));
    }
    line.truncate(line.len() - 2);
    Ok(String::from_utf8(line).unwrap())
}

/// Reads a mail up to the line with a dot alone.
async fn read_mail(wire: &mut (impl AsyncRead + Unpin)) -> io::Result<String> {
    let mut mail = String::new();
    loop {
        let line = read_line(wire).await?;
        if line == "." {
            return Ok(mail);
        }
        mail.push_str(line.strip_prefix('.').unwrap_or(&line));
        mail.push_str("\r\n");
    }
}
