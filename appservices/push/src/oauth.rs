//! Access tokens of Google for a service account: a signed assertion is exchanged for a token that holds for an hour
//! ([RFC 7523](https://www.rfc-editor.org/rfc/rfc7523.html)).

use std::path::Path;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, header};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde::Deserialize;
use serde_json::json;

use crate::{
    gateway::Shared,
    keys::{self, BadKey},
    outbound::Endpoint,
    outcome::Outcome,
};

/// The token may send messages, and nothing else.
const SCOPE: &str = "https://www.googleapis.com/auth/firebase.messaging";
/// An assertion is valid for an hour, which is the most that Google takes.
const ASSERTION_S: u64 = 3600;
/// A token is not used in its last minutes, so that it does not end on its way.
const MARGIN_S: u64 = 300;
/// A token is used for a day at most, whatever Google says.
const TOKEN_S_MAX: u64 = 24 * 3600;
/// After a failure nobody asks again for this long.
const FAILED_MS: u64 = 5_000;
/// Project ids of Google have 6 to 30 characters; those with a domain before them have more.
const PROJECT_BYTES_MAX: usize = 128;

/// The file that Google gives for a service account, as far as it is needed.
#[derive(Deserialize)]
struct KeyFile {
    client_email: String,
    private_key: String,
    private_key_id: Option<String>,
    project_id: String,
    token_uri: String,
}

/// A service account, and its token.
pub(crate) struct ServiceAccount {
    email: String,
    key: EncodingKey,
    key_id: Option<String>,
    /// The project whose messages it sends.
    pub(crate) project: String,
    token_uri: String,
    token_endpoint: Endpoint,
    state: tokio::sync::Mutex<State>,
}

/// The token, as it was last asked for.
enum State {
    Absent,
    Valid { header: HeaderValue, until_ms: u64 },
    Failed { until_ms: u64 },
}

#[derive(Deserialize)]
struct Granted {
    access_token: String,
    expires_in: u64,
}

impl ServiceAccount {
    /// Reads the key file. Errors: [`BadKey`], which says nothing of what is in it.
    pub(crate) fn load(file: &Path) -> Result<Self, BadKey> {
        let text = keys::read(file)?;
        let read: KeyFile = serde_json::from_str(&text).map_err(|_| {
            BadKey::new(
                file,
                "expected the JSON key of a service account, with client_email, private_key, project_id and token_uri",
            )
        })?;
        let rsa = || BadKey::new(file, "private_key: expected an RSA key in PEM format");
        let key = EncodingKey::from_rsa_pem(read.private_key.as_bytes()).map_err(|_| rsa())?;
        // A key that cannot sign is found at the start.
        jsonwebtoken::encode(&Header::new(Algorithm::RS256), &json!({}), &key).map_err(|_| rsa())?;
        let token_endpoint = Endpoint::parse(&read.token_uri)
            .map_err(|_| BadKey::new(file, "token_uri: expected a URL of the scheme https"))?;
        let is_name = |it: u8| it.is_ascii_alphanumeric() || matches!(it, b'-' | b'.' | b':');
        let project = read.project_id;
        if project.is_empty() || project.len() > PROJECT_BYTES_MAX || !project.bytes().all(is_name) {
            return Err(BadKey::new(file, "project_id: expected the id of a project of Google"));
        }
        Ok(Self {
            email: read.client_email,
            key,
            key_id: read.private_key_id,
            project,
            token_uri: read.token_uri,
            token_endpoint,
            state: tokio::sync::Mutex::new(State::Absent),
        })
    }

    /// The `Authorization` header with a token that is valid, for the app of this number. One asks for it, and all who come meanwhile wait for that. Errors: why
    /// there is none now.
    pub(crate) async fn authorization(&self, shared: &Shared, app: usize) -> Result<HeaderValue, Outcome> {
        const FAILED: Outcome = Outcome::failed("Google gives no token for the service account");
        let mut state = self.state.lock().await;
        let now_ms = shared.ports.clock.now_ms();
        match &*state {
            State::Valid { header, until_ms } if now_ms < *until_ms => return Ok(header.clone()),
            // Where the clock went back, the time is not believed.
            State::Failed { until_ms } if (1..=FAILED_MS).contains(&until_ms.saturating_sub(now_ms)) => {
                return Err(FAILED);
            }
            State::Valid { .. } | State::Failed { .. } | State::Absent => {}
        }
        match self.ask(shared, now_ms).await {
            Ok((header, until_ms)) => {
                *state = State::Valid { header: header.clone(), until_ms };
                Ok(header)
            }
            Err(why) => {
                *state = State::Failed { until_ms: now_ms.saturating_add(FAILED_MS) };
                shared.warn(app, || {
                    tracing::warn!(
                        project = self.project,
                        why,
                        "Google gives no token for the service account"
                    );
                });
                Err(FAILED)
            }
        }
    }

    /// Forgets the token if it is still this one, because it was refused.
    pub(crate) async fn forget(&self, refused: &HeaderValue) {
        let mut state = self.state.lock().await;
        if matches!(&*state, State::Valid { header, .. } if header == refused) {
            *state = State::Absent;
        }
    }

    async fn ask(&self, shared: &Shared, now_ms: u64) -> Result<(HeaderValue, u64), &'static str> {
        let now_s = now_ms / 1000;
        let claims = json!({
            "iss": self.email, "scope": SCOPE, "aud": self.token_uri, "iat": now_s, "exp": now_s + ASSERTION_S,
        });
        let header = Header { kid: self.key_id.clone(), ..Header::new(Algorithm::RS256) };
        let assertion =
            jsonwebtoken::encode(&header, &claims, &self.key).map_err(|_| "the key does not sign")?;
        let form = url::form_urlencoded::Serializer::new(String::new())
            .append_pair("grant_type", "urn:ietf:params:oauth:grant-type:jwt-bearer")
            .append_pair("assertion", &assertion)
            .finish();
        let mut headers = HeaderMap::new();
        let form_type = HeaderValue::from_static("application/x-www-form-urlencoded");
        headers.insert(header::CONTENT_TYPE, form_type);
        let no_answer = |error| match error {
            crate::outbound::NotAnswered::Failed(why) => why,
            crate::outbound::NotAnswered::Forbidden => "the address may not be connected to",
        };
        let found = shared.outbound.find_fixed(&self.token_endpoint).await.map_err(no_answer)?;
        let answer =
            shared.outbound.post(&self.token_endpoint, found, headers, Bytes::from(form), true).await;
        let answer = answer.map_err(no_answer)?;
        if !answer.status.is_success() {
            return Err(
                "the assertion is refused: is the key of the account still valid, and the clock right?",
            );
        }
        let granted: Granted =
            serde_json::from_slice(&answer.body).map_err(|_| "the answer holds no token")?;
        let mut value = HeaderValue::from_str(&format!("Bearer {}", granted.access_token))
            .map_err(|_| "the token cannot stand in a header")?;
        value.set_sensitive(true);
        let used_s = match granted.expires_in.min(TOKEN_S_MAX) {
            short @ ..=600 => short / 2,
            long => long - MARGIN_S,
        };
        Ok((value, now_ms.saturating_add(used_s * 1000)))
    }
}
