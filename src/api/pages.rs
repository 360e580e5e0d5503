//! Pages for people who open an address of this server in a browser. They load nothing from outside.

use http::Method;
use ruma::api::{client::uiaa::AuthType, error::ErrorKind};

use crate::{
    api::{
        Routes,
        extract::{Endpoint, Public},
        policy::{Body, KIB},
        raw::{self, Raw},
        reply::Page,
    },
    delivery::mail::escaped,
    error::{Refusal, Result},
    flows::{
        App,
        account::{
            confirm::{self, Shown},
            pushers,
        },
        limits::Limit,
    },
};

pub(crate) fn routes(r: &mut Routes) {
    r.public(welcome).unlimited();
    r.public(show_stage).unlimited();
    // Each request may be a guess at a token, so that it counts as a registration.
    r.public(take_stage).limit(Limit::Register).body(Body::Raw(4 * KIB));
    r.public(ask_unsubscribe).unlimited();
    r.public(unsubscribe).limit(Limit::Register).body(Body::Raw(4 * KIB));
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

/// A client sends people here for a stage of authentication that it cannot carry out itself
/// (<https://spec.matrix.org/v1.19/client-server-api/#fallback>).
const FALLBACK: &str = "/_matrix/client/v3/auth/{auth_type}/fallback/web";

/// The page that asks for what a stage of authentication needs.
pub(crate) struct ShowStage;

impl Endpoint for ShowStage {
    fn method() -> Method {
        Method::GET
    }

    fn paths() -> Vec<&'static str> {
        vec![FALLBACK]
    }
}

/// The form that such a page sends.
pub(crate) struct TakeStage;

impl Endpoint for TakeStage {
    fn method() -> Method {
        Method::POST
    }

    fn paths() -> Vec<&'static str> {
        vec![FALLBACK]
    }
}

/// The link in each digest that is mailed leads here. Programs of mail only look at it, so that nothing happens before the button is pressed.
const UNSUBSCRIBE: &str = "/_aqueduct/client/v1/unsubscribe";

/// The page that asks whether digests are to stop.
pub(crate) struct AskUnsubscribe;

impl Endpoint for AskUnsubscribe {
    fn method() -> Method {
        Method::GET
    }

    fn paths() -> Vec<&'static str> {
        vec![UNSUBSCRIBE]
    }
}

/// The form that such a page sends, and the request of a program of mail with a button of its own (RFC 8058).
pub(crate) struct Unsubscribe;

impl Endpoint for Unsubscribe {
    fn method() -> Method {
        Method::POST
    }

    fn paths() -> Vec<&'static str> {
        vec![UNSUBSCRIBE]
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

/// `GET /_matrix/client/v3/auth/{auth_type}/fallback/web`
pub(crate) async fn show_stage(_app: App, public: Public<Raw<ShowStage>>) -> Result<Page> {
    let stage = stage(public.request.arg(0))?;
    Ok(match public.request.query("session").filter(|session| !session.is_empty()) {
        Some(session) => form(&stage, &session, ""),
        None => sorry("The address of this page lacks its <code>session</code>. Begin again in your app."),
    })
}

/// `POST /_matrix/client/v3/auth/{auth_type}/fallback/web`
pub(crate) async fn take_stage(app: App, public: Public<Raw<TakeStage>>) -> Result<Page> {
    let stage = stage(public.request.arg(0))?;
    let sent = raw::form(&public.request.bytes);
    let field = |name: &str| sent.iter().find(|(key, _)| key == name).map_or("", |(_, value)| value);
    let session = field("session");
    let shown = match stage {
        AuthType::RegistrationToken => Shown::Token(field("token").trim().to_owned()),
        AuthType::Password => Shown::Password(field("password").to_owned()),
        _ => Shown::Nothing,
    };
    if let Err(refusal) = confirm::pass_on_page(&app, session, shown, public.peer).await? {
        tracing::debug!(reason = refusal.message, "a stage of authentication is failed on its page");
        let said = escaped(&refusal.message);
        // Nothing that is sent helps a session that has ended, so that the form is not shown again.
        return Ok(match refusal.kind {
            ErrorKind::NotFound => sorry(&said),
            _ => form(&stage, session, &format!("<p role=\"alert\">{said}</p>\n")),
        });
    }
    let done = "<p>Thank you. You can close this page and go on in your app.</p>\n\
        <script>\n\
        if (window.onAuthDone) { window.onAuthDone(); }\n\
        else if (window.opener && window.opener.postMessage) { window.opener.postMessage(\"authDone\", \"*\"); }\n\
        </script>";
    Ok(Page { html: page("Authentication", done), has_script: true })
}

/// `GET /_aqueduct/client/v1/unsubscribe`
pub(crate) async fn ask_unsubscribe(_app: App, public: Public<Raw<AskUnsubscribe>>) -> Result<Page> {
    let token = public.request.query("token").unwrap_or_default();
    let (action, token) = (attribute("action", UNSUBSCRIBE), attribute("value", &token));
    let text = format!(
        "<p>Do you want no more mails about what you have not read?</p>\n\
         <form method=\"post\" {action}>\n\
         <input type=\"hidden\" name=\"token\" {token}>\n\
         <p><button>Stop these mails</button></p>\n\
         </form>"
    );
    Ok(Page { html: page("Notifications by e-mail", &text), has_script: false })
}

/// `POST /_aqueduct/client/v1/unsubscribe`
///
/// The token may stand in the query, because programs of mail post to the link as it is.
pub(crate) async fn unsubscribe(app: App, public: Public<Raw<Unsubscribe>>) -> Result<Page> {
    let sent = raw::form(&public.request.bytes);
    let of_form = sent.into_iter().find_map(|(key, value)| (key == "token").then_some(value));
    let token = of_form.or_else(|| public.request.query("token")).unwrap_or_default();
    let is_done = pushers::unsubscribe(&app, token).await?;
    let text = if is_done {
        "<p>Done. No more mails about what you have not read are sent to this address. You can have them again by the settings of your app.</p>"
    } else {
        "<p role=\"alert\">This link has stopped its mails already, or is not complete.</p>"
    };
    Ok(Page { html: page("Notifications by e-mail", text), has_script: false })
}

/// The stage of this name. Errors: 404 `M_NOT_FOUND` for one that this server never asks for.
fn stage(name: &str) -> Result<AuthType> {
    match AuthType::from(name) {
        stage @ (AuthType::RegistrationToken | AuthType::Password | AuthType::Dummy) => Ok(stage),
        _ => Err(Refusal::not_found("This server does not ask for this type of authentication.").into()),
    }
}

/// A page that says why it cannot help. The text is HTML already.
fn sorry(why: &str) -> Page {
    Page { html: page("Authentication", &format!("<p role=\"alert\">{why}</p>")), has_script: false }
}

fn form(stage: &AuthType, session: &str, said: &str) -> Page {
    let action = attribute("action", &FALLBACK.replace("{auth_type}", stage.as_str()));
    let session = attribute("value", session);
    let asks = match stage {
        AuthType::RegistrationToken => {
            "<p><label>Registration token, from whoever runs this server:<br>\n\
             <input name=\"token\" required autofocus autocomplete=\"off\"></label></p>\n"
        }
        AuthType::Password => {
            "<p><label>The password of your account:<br>\n\
             <input name=\"password\" type=\"password\" required autofocus autocomplete=\"current-password\"></label></p>\n"
        }
        _ => "<p>Your app asks you to confirm that you want to go on.</p>\n",
    };
    let text = format!(
        "{said}<form method=\"post\" {action}>\n\
         <input type=\"hidden\" name=\"session\" {session}>\n\
         {asks}<p><button>Go on</button></p>\n\
         </form>"
    );
    Page { html: page("Authentication", &text), has_script: false }
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
