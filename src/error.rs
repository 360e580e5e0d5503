//! The ways in which something goes wrong, by who is at fault. `api/reply.rs` is the one place that turns these into HTTP and logs them.

use std::{fmt, time::Duration};

use ruma::api::error::{ErrorKind, LimitExceededErrorData, RetryAfter};

/// The result of everything that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Says who is at fault, because that decides what is answered and what is logged.
#[derive(Debug)]
pub enum Error {
    /// The caller is at fault, and the refusal is answered as it is.
    Refused(Box<Refusal>),
    /// Another server is at fault: it answered wrongly or not at all.
    Remote {
        /// The name of the server that is at fault.
        server: String,
        /// A sentence for the log on what that server did.
        cause: String,
    },
    /// Nobody is at fault: there is no room now, and the caller may try again later.
    Busy {
        /// The time to wait before it makes sense to try again.
        retry_after: Duration,
    },
    /// We ourselves are at fault: it is answered as 500 without details, and logged with its cause.
    Broken(Cause),
}

/// Why a request is refused: Matrix's error code and a sentence for a person.
#[derive(Debug, Clone)]
pub struct Refusal {
    /// Matrix's error code, with the fields that belong to it.
    pub kind: ErrorKind,
    /// A sentence for a person, which names the field and what to do. It holds no secret.
    pub message: String,
    /// The reason for another status of the answer; without one the code decides the status.
    pub exception: Option<Exception>,
    /// The whole JSON body of the answer, in place of `errcode` and `error`, where they do not say enough: user-interactive
    /// authentication answers 401 with flows.
    pub body: Option<serde_json::Value>,
}

/// Why a refusal has another status than its code usually has. `src/api/reply.rs` knows which.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exception {
    /// 409, because somebody else has the thing already.
    Taken,
    /// 405, because the endpoint exists, but not with this method.
    WrongMethod,
    /// 403, because nobody may do it as things stand, whatever is wrong with the request besides.
    Forbidden,
    /// 400, because a parameter is at fault where the code speaks of the whole request.
    Parameter,
    /// 401, because user-interactive authentication is not complete.
    Interactive,
    /// 414, because the path and the query of the request are too long.
    LongUri,
    /// 431, because the header fields of the request are too large.
    LargeFields,
    /// 415, because the body of the request has a coding that this server does not read.
    ContentCoding,
    /// 501, because the body of the request is transferred in a coding that this server does not read.
    TransferCoding,
    /// 408, because the client did not go on sending its request.
    TimedOut,
    /// 426, because the request is not the handshake of a WebSocket.
    NoWebSocket,
    /// 502, because another server is at fault.
    Remote,
    /// 500, because this server is at fault.
    Broken,
}

impl Refusal {
    /// A refusal with this code and sentence; the status follows from the code.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), exception: None, body: None }
    }

    /// Answers the refusal with another status than its code usually has.
    #[must_use]
    pub fn exception(mut self, exception: Exception) -> Self {
        self.exception = Some(exception);
        self
    }

    /// A refusal with status 403 and code `M_FORBIDDEN`: the caller may not do this.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Forbidden, message)
    }

    /// A refusal with status 404 and code `M_NOT_FOUND`: there is no such thing, or the caller may not know of it.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::NotFound, message)
    }

    /// A refusal with status 400 and code `M_INVALID_PARAM`: a parameter has a value that it cannot have.
    pub fn invalid_param(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidParam, message)
    }

    /// A refusal with status 400 and code `M_BAD_JSON`: the body is JSON, but not of the shape that the endpoint takes.
    pub fn bad_json(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::BadJson, message)
    }

    /// A refusal with status 400 and code `M_MISSING_PARAM`: a parameter that the endpoint needs is not there.
    pub fn missing_param(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::MissingParam, message)
    }

    /// A refusal with status 400 and code `M_INVALID_SIGNATURE`: something is not signed by the key by which it should be.
    pub fn invalid_signature(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidParam, message).code("M_INVALID_SIGNATURE")
    }

    /// The code with which it is answered.
    pub fn errcode(&self) -> String {
        let code = self.body.as_ref().and_then(|body| body.get("errcode")?.as_str());
        code.map_or_else(|| self.kind.errcode().to_string(), str::to_owned)
    }

    /// Answers the refusal with a code that ruma does not know; the status follows from the kind.
    #[must_use]
    pub fn code(mut self, code: &str) -> Self {
        self.body = Some(serde_json::json!({ "errcode": code, "error": self.message }));
        self
    }

    /// A refusal with status 404 and code `M_UNRECOGNIZED`: this server has no such endpoint.
    pub fn unrecognized(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unrecognized, message)
    }

    /// A refusal with status 429 and code `M_LIMIT_EXCEEDED`: the caller asks too often and may ask again after this time.
    pub fn too_fast(retry_after: Duration) -> Self {
        Self::new(limit_exceeded(retry_after), "Too many requests. Try again later.")
    }

    /// A refusal with status 413 and code `M_TOO_LARGE`: the request, or the event made from it, is too large.
    pub fn too_large(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::TooLarge, message)
    }
}

/// The code `M_LIMIT_EXCEEDED`, with the time to wait.
pub fn limit_exceeded(retry_after: Duration) -> ErrorKind {
    let mut data = LimitExceededErrorData::new();
    data.retry_after = Some(RetryAfter::Delay(retry_after));
    ErrorKind::LimitExceeded(data)
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(Box::new(refusal))
    }
}

/// A fault of our own, with what led to it.
pub struct Cause(Box<dyn std::error::Error + Send + Sync>);

impl Cause {
    /// A fault that is described by a sentence.
    pub fn new(message: impl Into<String>) -> Self {
        Self(message.into().into())
    }
}

impl fmt::Debug for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(cause) = source {
            write!(f, ": {cause}")?;
            source = cause.source();
        }
        Ok(())
    }
}

impl Error {
    /// A fault of our own that is described by a sentence.
    pub fn broken(message: impl Into<String>) -> Self {
        Self::Broken(Cause::new(message))
    }

    /// The refusal, if the caller is at fault.
    pub fn refusal(&self) -> Option<&Refusal> {
        match self {
            Self::Refused(refusal) => Some(refusal),
            _ => None,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(refusal) => write!(f, "{}: {}", refusal.kind.errcode(), refusal.message),
            Self::Remote { server, cause } => write!(f, "{server}: {cause}"),
            Self::Busy { retry_after } => write!(f, "busy, try again in {} ms", retry_after.as_millis()),
            Self::Broken(cause) => write!(f, "{cause}"),
        }
    }
}

impl std::error::Error for Error {}

macro_rules! broken_by {
    ($($source:ty),* $(,)?) => {$(
        impl From<$source> for Error {
            fn from(source: $source) -> Self {
                Self::Broken(Cause(source.into()))
            }
        }
    )*};
}

broken_by!(std::io::Error);
