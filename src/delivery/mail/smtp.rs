//! The conversation with the mail server: one connection for one mail.
//!
//! Connections and TLS are our own: they go through the doors of `env`, trust what the rest of the server trusts, and bound what a mail server
//! may say. Whatever it says before the connection is encrypted is forgotten then, so that nobody on the way can slip in words of theirs.

use std::{
    fmt, io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use federation::transport::Trust;
use lettre::{
    Address,
    message::Mailbox,
    transport::smtp::{
        authentication::{Credentials, Mechanism},
        client::{AsyncSmtpConnection, AsyncTokioStream},
        commands::{Data, Mail, Rcpt},
        extension::ClientId,
    },
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio_rustls::{
    TlsConnector,
    rustls::{ClientConfig, pki_types::ServerName as TlsName},
};

use crate::{
    config::{Config, EmailTls},
    env::{Env, dial::Wire},
    error::{Error, Result},
};

/// A mail server says at most this much over one mail.
const SAID_BYTES_MAX: usize = 64 << 10;
/// A line of an answer has at most this many bytes (RFC 5321, section 4.5.3.1.5, and some more).
const LINE_BYTES_MAX: usize = 2_048;
/// An answer has at most this many lines.
const LINES_MAX: usize = 100;
/// The answer to a whole mail is waited for this long, because the server may look into the mail meanwhile (RFC 5321, section 4.5.3.2.6).
const VERDICT: Duration = Duration::from_secs(600);
/// A farewell is waited for at most this long, because the mail is taken by then.
const FAREWELL: Duration = Duration::from_secs(2);
/// A file of a password has at most this many bytes.
const PASSWORD_BYTES_MAX: usize = 4_096;

/// A mail that was not taken.
#[derive(Debug)]
pub(super) enum NotTaken {
    /// The server was not there, or did not do what every mail needs.
    Server(String),
    /// The server will never take a mail for this address.
    Refused(String),
    /// The server did not take this mail now.
    Later(String),
    /// The server has the whole mail, and did not say whether it takes it.
    Unsure(String),
}

/// The mail server of the settings.
pub(super) struct Smtp {
    env: Env,
    host: String,
    port: u16,
    security: EmailTls,
    tls: Option<(TlsConnector, TlsName<'static>)>,
    credentials: Option<Credentials>,
    hello: ClientId,
    from: Address,
    timeout: Duration,
}

impl Smtp {
    /// Reads the password and the certificate authorities. Errors name the setting.
    pub(super) fn open(config: &Config, env: &Env, from: &Mailbox) -> Result<Self> {
        let settings = &config.email;
        let tls = match settings.tls {
            EmailTls::None => None,
            EmailTls::Starttls | EmailTls::Tls => Some((
                TlsConnector::from(authorities(config)?),
                TlsName::try_from(settings.host.clone())
                    .map_err(|error| Error::broken(format!("email.host can have no certificate: {error}")))?,
            )),
        };
        let credentials = match settings.user.as_str() {
            "" => None,
            user => Some(Credentials::new(user.to_owned(), password(config)?)),
        };
        // The name of this server may have a port, which is no part of a host's name.
        let host = config.server.name.host().to_owned();
        let hello = match host.trim_start_matches('[').trim_end_matches(']').parse() {
            Ok(std::net::IpAddr::V4(address)) => ClientId::Ipv4(address),
            Ok(std::net::IpAddr::V6(address)) => ClientId::Ipv6(address),
            Err(_) => ClientId::Domain(host),
        };
        Ok(Self {
            env: env.clone(),
            host: settings.host.clone(),
            port: settings.port,
            security: settings.tls,
            tls,
            credentials,
            hello,
            from: from.email.clone(),
            timeout: Duration::from_secs(settings.timeout_s),
        })
    }

    /// Has the mail server take a mail. Up to the end of the mail that takes no longer than the settings say; where the answer takes longer than
    /// that, `go_on` is called, and it is waited for.
    pub(super) async fn send(
        &self,
        to: &Address,
        mail: &[u8],
        go_on: impl FnOnce() + Send,
    ) -> std::result::Result<(), NotTaken> {
        let stage = Stage::default();
        let mut talk = std::pin::pin!(self.talk(to, mail, &stage));
        let in_time = tokio::select! {
            biased;
            taken = &mut talk => Some(taken),
            () = self.env.sleep(self.timeout) => None,
        };
        let taken = match in_time {
            Some(taken) => taken,
            None if stage.is_at(Stage::ENDED) => {
                go_on();
                tokio::select! {
                    biased;
                    taken = talk => taken,
                    () = self.env.sleep(VERDICT) => Err(NotTaken::Unsure("no answer came".to_owned())),
                }
            }
            // Once the server has heard of this mail, what goes wrong may be the fault of the mail alone.
            None if stage.is_at(Stage::BEGUN) => Err(NotTaken::Later("it took too long".to_owned())),
            None => Err(NotTaken::Server("it took too long".to_owned())),
        };
        let mut connection = taken?;
        tokio::select! {
            biased;
            _ = connection.quit() => {}
            () = self.env.sleep(FAREWELL) => {}
        }
        Ok(())
    }

    async fn talk(
        &self,
        to: &Address,
        mail: &[u8],
        stage: &Stage,
    ) -> std::result::Result<AsyncSmtpConnection, NotTaken> {
        let of_server = |error: &dyn fmt::Display| NotTaken::Server(error.to_string());
        let wire = self.connect(stage).await.map_err(|error| of_server(&error))?;
        let connection = AsyncSmtpConnection::connect_with_transport(Box::new(wire), &self.hello).await;
        let mut connection = connection.map_err(|error| of_server(&error))?;
        if let Some(credentials) = &self.credentials {
            let mechanisms = [Mechanism::Plain, Mechanism::Login];
            connection.auth(&mechanisms, credentials).await.map_err(|error| of_server(&error))?;
        }
        let sender = connection.command(Mail::new(Some(self.from.clone()), Vec::new())).await;
        sender.map_err(|error| of_server(&error))?;
        stage.reach(Stage::BEGUN);
        connection.command(Rcpt::new(to.clone(), Vec::new())).await.map_err(|error| {
            if error.is_permanent() {
                NotTaken::Refused(error.to_string())
            } else {
                NotTaken::Later(error.to_string())
            }
        })?;
        let later = |error: &dyn fmt::Display| NotTaken::Later(error.to_string());
        connection.command(Data).await.map_err(|error| later(&error))?;
        stage.reach(Stage::DATA);
        connection.message(mail).await.map_err(|error| {
            // A server that says no has not taken it.
            if error.status().is_none() && stage.is_at(Stage::ENDED) {
                NotTaken::Unsure(error.to_string())
            } else {
                later(&error)
            }
        })?;
        Ok(connection)
    }

    /// Connects, and encrypts the connection where the settings say so.
    async fn connect(&self, stage: &Stage) -> io::Result<Bounded> {
        let mut wire = self.env.dial(&self.host, self.port).await?;
        let Some((connector, name)) = &self.tls else { return Ok(Bounded::new(wire, "", stage)) };
        let mut greeting = "";
        if self.security == EmailTls::Starttls {
            self.ask_for_tls(&mut *wire).await?;
            // After the handshake the server does not greet again, which those who speak with it expect.
            greeting = "220 ready\r\n";
        }
        let wire = connector.connect(name.clone(), wire).await?;
        Ok(Bounded::new(Box::new(wire), greeting, stage))
    }

    /// Asks for encryption (RFC 3207). A server that does not offer it is told nothing else.
    async fn ask_for_tls(&self, wire: &mut dyn Wire) -> io::Result<()> {
        let mut said = 0;
        answer(wire, &mut said, "220").await?;
        wire.write_all(format!("EHLO {}\r\n", self.hello).as_bytes()).await?;
        let offered = answer(wire, &mut said, "250").await?;
        if !offered.iter().any(|line| line.trim().eq_ignore_ascii_case("STARTTLS")) {
            return Err(io::Error::other("the mail server does not offer STARTTLS"));
        }
        wire.write_all(b"STARTTLS\r\n").await?;
        answer(wire, &mut said, "220").await?;
        Ok(())
    }
}

/// Reads one answer, byte by byte, so that nothing that comes after it is taken for a part of what is encrypted. Answers the texts of its lines.
async fn answer(wire: &mut dyn Wire, said: &mut usize, code: &str) -> io::Result<Vec<String>> {
    let mut lines = Vec::new();
    loop {
        let mut line = Vec::new();
        while !line.ends_with(b"\n") {
            line.push(wire.read_u8().await?);
            *said += 1;
            if line.len() > LINE_BYTES_MAX || *said > SAID_BYTES_MAX || lines.len() > LINES_MAX {
                return Err(io::Error::other("the mail server says too much"));
            }
        }
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        let rest = line
            .strip_prefix(code)
            .ok_or_else(|| io::Error::other(format!("the mail server says {line:?}")))?;
        lines.push(rest.get(1..).unwrap_or_default().to_owned());
        if !rest.starts_with('-') {
            return Ok(lines);
        }
    }
}

fn authorities(config: &Config) -> Result<Arc<ClientConfig>> {
    let file = &config.federation.trusted_ca_file;
    let files = (!file.as_os_str().is_empty()).then_some(file);
    let trust = Trust::load(files.as_slice()).map_err(|error| Error::broken(error.to_string()))?;
    Ok(trust.without_protocols())
}

fn password(config: &Config) -> Result<String> {
    let file = &config.email.password_file;
    if file.as_os_str().is_empty() {
        return Ok(config.email.password.clone());
    }
    let wrong =
        |why: &dyn fmt::Display| Error::broken(format!("email.password_file: {}: {why}", file.display()));
    let text = std::fs::read_to_string(file).map_err(|error| wrong(&error))?;
    match text.lines().next() {
        Some(line) if !line.is_empty() && line.len() <= PASSWORD_BYTES_MAX => Ok(line.to_owned()),
        _ => Err(wrong(&"expected a password in its first line")),
    }
}

/// How far a conversation has come.
#[derive(Clone, Debug, Default)]
struct Stage(Arc<AtomicU8>);

impl Stage {
    /// The server has heard of the mail.
    const BEGUN: u8 = 1;
    /// The server waits for the mail itself.
    const DATA: u8 = 2;
    /// The server was sent the whole mail.
    const ENDED: u8 = 3;

    fn reach(&self, stage: u8) {
        self.0.fetch_max(stage, Ordering::Relaxed);
    }

    fn is_at(&self, stage: u8) -> bool {
        self.0.load(Ordering::Relaxed) >= stage
    }
}

/// A connection on which the other side may say so much and no more, and that begins with a greeting which it did not say.
#[derive(Debug)]
struct Bounded {
    wire: Box<dyn Wire>,
    greeting: &'static [u8],
    left: usize,
    stage: Stage,
}

impl Bounded {
    fn new(wire: Box<dyn Wire>, greeting: &'static str, stage: &Stage) -> Self {
        Self { wire, greeting: greeting.as_bytes(), left: SAID_BYTES_MAX, stage: stage.clone() }
    }
}

impl AsyncTokioStream for Bounded {
    fn peer_addr(&self) -> io::Result<SocketAddr> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl AsyncRead for Bounded {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        // Nobody reads on before the mail is written to its end.
        if this.stage.is_at(Stage::DATA) {
            this.stage.reach(Stage::ENDED);
        }
        let (now, later) = this.greeting.split_at(this.greeting.len().min(buffer.remaining()));
        if !now.is_empty() {
            buffer.put_slice(now);
            this.greeting = later;
            return Poll::Ready(Ok(()));
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut this.wire).poll_read(cx, buffer))?;
        let read = buffer.filled().len() - before;
        match this.left.checked_sub(read) {
            Some(left) => this.left = left,
            None => return Poll::Ready(Err(io::Error::other("the mail server says too much"))),
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Bounded {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().wire).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().wire).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().wire).poll_shutdown(cx)
    }
}
