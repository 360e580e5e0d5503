//! The ways in which something goes wrong, by who is at fault. `api/reply.rs` is the one place that turns these into HTTP and logs them.

use std::{fmt, time::Duration};

use ruma::api::error::{ErrorKind, LimitExceededErrorData, RetryAfter};

/// The result of everything that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Who is at fault.
#[derive(Debug)]
pub enum Error {
    /// The caller: answered as it is.
    Refused(Box<Refusal>),
    /// Another server, which answered wrongly or not at all.
    Remote {
        /// The server's name.
        server: String,
        /// The log says this of what the server did.
        cause: String,
    },
    /// Nobody: try again later.
    Busy {
        /// When it makes sense to try again.
        retry_after: Duration,
    },
    /// We ourselves: answered as 500 without details, and logged with its cause.
    Broken(Cause),
}

/// Why a request is refused: Matrix's error code and a sentence for a person.
#[derive(Debug, Clone)]
pub struct Refusal {
    /// Matrix's error code, with the fields that belong to it.
    pub kind: ErrorKind,
    /// A sentence for a person. Holds no secret.
    pub message: String,
    /// Where the code alone does not decide the status of the answer.
    pub exception: Option<Exception>,
    /// Where set, the whole JSON body of the answer, in place of `errcode` and `error` (user-interactive
    /// authentication answers 401 with flows).
    pub body: Option<serde_json::Value>,
}

/// Why a refusal has another status than its code usually has. `src/api/reply.rs` knows which.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exception {
    /// Somebody else has it already.
    Taken,
    /// The thing exists, but not by this method.
    WrongMethod,
    /// Nobody may do it as things stand, whatever is wrong with it besides.
    Forbidden,
    /// A parameter is at fault, where the code speaks of the whole request.
    Parameter,
    /// User-interactive authentication is not complete.
    Interactive,
    /// The client did not go on.
    TimedOut,
    /// Another server is at fault.
    Remote,
    /// This server is at fault.
    Broken,
}

impl Refusal {
    /// A refusal with this code and sentence; the status follows from the code.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), exception: None, body: None }
    }

    /// With another status than its code usually has.
    #[must_use]
    pub fn exception(mut self, exception: Exception) -> Self {
        self.exception = Some(exception);
        self
    }

    /// 403 `M_FORBIDDEN`.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Forbidden, message)
    }

    /// 404 `M_NOT_FOUND`.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::NotFound, message)
    }

    /// 400 `M_INVALID_PARAM`.
    pub fn invalid_param(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidParam, message)
    }

    /// 400 `M_BAD_JSON`.
    pub fn bad_json(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::BadJson, message)
    }

    /// 400 `M_MISSING_PARAM`.
    pub fn missing_param(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::MissingParam, message)
    }

    /// 404 `M_UNRECOGNIZED`.
    pub fn unrecognized(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unrecognized, message)
    }

    /// 429 `M_LIMIT_EXCEEDED`.
    pub fn too_fast(retry_after: Duration) -> Self {
        Self::new(limit_exceeded(retry_after), "Too many requests. Try again later.")
    }

    /// 413 `M_TOO_LARGE`.
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
