//! Pages for people who open an address of this server in a browser. They load nothing from outside.

use http::Method;
use ruma::api::client::uiaa::AuthType;

use crate::{
    accounts::{interactive::Passed, registration},
    api::{
        Routes,
        extract::{Endpoint, Public},
        policy::{Body, KIB},
        raw::{self, Raw},
        reply::Page,
    },
    error::Result,
    flows::{App, limits::Limit},
};

pub(crate) fn routes(r: &mut Routes) {
    r.public(welcome).unlimited();
    r.public(ask_for_token).unlimited();
    // Each request is a guess at a token, so that it counts as a registration.
    r.public(take_token).limit(Limit::Register).body(Body::Raw(4 * KIB));
}

/// The page at the server's own address.
pub(crate) struct Welcome;

impl Endpoint for Welcome {
    fn method() -> Method {
        Method::GET
    }

    fn paths() -> Vec<&'static str> {
        vec!["/"]
    }
}

/// A client sends people who must show a registration token here, if it cannot ask for the token itself
/// (<https://spec.matrix.org/v1.19/client-server-api/#fallback>).
const FALLBACK: &str = "/_matrix/client/v3/auth/m.login.registration_token/fallback/web";

/// The page that asks for a registration token.
pub(crate) struct AskForToken;

impl Endpoint for AskForToken {
    fn method() -> Method {
        Method::GET
    }

    fn paths() -> Vec<&'static str> {
        vec![FALLBACK]
    }
}

/// The form that the page for a registration token sends.
pub(crate) struct TakeToken;

impl Endpoint for TakeToken {
    fn method() -> Method {
        Method::POST
    }

    fn paths() -> Vec<&'static str> {
        vec![FALLBACK]
    }
}

/// `GET /`
pub(crate) async fn welcome(app: App, _public: Public<Raw<Welcome>>) -> Result<Page> {
    let name = escaped(app.config.server.name.as_str());
    let url = escaped(&app.config.server.public_base_url);
    let text = format!(
        "<p>This is the Matrix homeserver of <b>{name}</b>. It runs Aqueduct.</p>\n\
         <p>To use it, open a Matrix app and log in with an account of <code>{name}</code>, such as \
         <code>@alice:{name}</code>. If the app asks for the address of the homeserver, it is <code>{url}</code>.</p>"
    );
    Ok(Page { html: page(&name, &text), has_script: false })
}

/// `GET /_matrix/client/v3/auth/m.login.registration_token/fallback/web`
pub(crate) async fn ask_for_token(_app: App, public: Public<Raw<AskForToken>>) -> Result<Page> {
    Ok(form(&public.request.query("session").unwrap_or_default(), ""))
}

/// `POST /_matrix/client/v3/auth/m.login.registration_token/fallback/web`
pub(crate) async fn take_token(app: App, public: Public<Raw<TakeToken>>) -> Result<Page> {
    let sent = raw::form(&public.request.bytes);
    let field = |name: &str| sent.iter().find(|(key, _)| key == name).map_or("", |(_, value)| value);
    let (session, token) = (field("session"), field("token").trim());
    let snapshot = app.store.snapshot();
    if !registration::is_valid(&*snapshot, &app.accounts, token, app.env.now_ms())? {
        tracing::debug!(reason = "the registration token is not valid", "refused");
        return Ok(form(session, "<p role=\"alert\">This registration token is not valid.</p>\n"));
    }
    let shown = Passed { stage: AuthType::RegistrationToken, registration_token: Some(token.to_owned()) };
    if let Err(refusal) = app.accounts.sessions().pass_on_page(&app.env, session, shown) {
        return Ok(form(session, &format!("<p role=\"alert\">{}</p>\n", escaped(&refusal.message))));
    }
    let done = "<p>Thank you. You can close this page and go on in your app.</p>\n\
        <script>\n\
        if (window.onAuthDone) { window.onAuthDone(); }\n\
        else if (window.opener && window.opener.postMessage) { window.opener.postMessage(\"authDone\", \"*\"); }\n\
        </script>";
    Ok(Page { html: page("Registration", done), has_script: true })
}

fn form(session: &str, said: &str) -> Page {
    let (action, session) = (attribute("action", FALLBACK), attribute("value", session));
    let text = format!(
        "{said}<form method=\"post\" {action}>\n\
         <input type=\"hidden\" name=\"session\" {session}>\n\
         <p><label>Registration token, from whoever runs this server:<br>\n\
         <input name=\"token\" required autofocus autocomplete=\"off\"></label></p>\n\
         <p><button>Go on</button></p>\n\
         </form>"
    );
    Page { html: page("Registration", &text), has_script: false }
}

/// Writes an attribute of an element. Its value may be any text.
fn attribute(name: &str, value: &str) -> String {
    [name, "=\"", &escaped(value), "\""].concat()
}

/// Writes a whole page. Title and text are HTML already.
fn page(title: &str, text: &str) -> String {
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n<title>{title}</title>\n\
         <style>body {{ font: 1rem/1.5 sans-serif; max-width: 36rem; margin: 4rem auto; padding: 0 1rem }}</style>\n\
         </head>\n<body>\n{text}\n</body>\n</html>\n"
    )
}

/// Escapes text for HTML, so that it can also stand between quotes.
fn escaped(text: &str) -> String {
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
