//! The client-server API: one file for each module of ruma's client API, named after it.

/// Declares an endpoint that ruma does not know, by its method and its paths.
macro_rules! endpoint {
    ($(#[$doc:meta])* $name:ident, $method:ident, $($path:expr),+) => {
        $(#[$doc])*
        pub(crate) struct $name;

        impl $crate::api::extract::Endpoint for $name {
            fn method() -> http::Method {
                http::Method::$method
            }

            fn paths() -> Vec<&'static str> {
                vec![$($path),+]
            }
        }
    };
}

mod account;
mod admin;
mod alias;
mod authenticated_media;
mod config;
mod context;
mod dehydrated_device;
mod delay;
mod delayed_events;
mod device;
mod directory;
mod discovery;
mod email;
mod filter;
mod key_backup;
mod keys;
mod knock;
mod media;
mod media_links;
mod membership;
mod message;
mod old_sync;
mod openid;
mod presence;
mod profile;
mod push;
mod read_marker;
mod receipt;
mod redact;
mod relations;
mod rendezvous;
mod retention;
mod reporting;
mod room;
mod search;
mod session;
mod shared_secret;
mod space;
mod state;
mod sync;
mod tag;
mod thread_subscriptions;
mod threads;
mod to_device;
mod typing;
mod url_preview;
mod user_directory;
mod wordless;

use crate::api::Routes;

/// Registers every endpoint of the client-server API.
pub(crate) fn routes(r: &mut Routes) {
    account::routes(r);
    admin::routes(r);
    alias::routes(r);
    authenticated_media::routes(r);
    config::routes(r);
    context::routes(r);
    dehydrated_device::routes(r);
    delayed_events::routes(r);
    device::routes(r);
    directory::routes(r);
    discovery::routes(r);
    email::routes(r);
    filter::routes(r);
    key_backup::routes(r);
    keys::routes(r);
    knock::routes(r);
    media::routes(r);
    media_links::routes(r);
    membership::routes(r);
    message::routes(r);
    old_sync::routes(r);
    openid::routes(r);
    presence::routes(r);
    profile::routes(r);
    push::routes(r);
    read_marker::routes(r);
    receipt::routes(r);
    redact::routes(r);
    relations::routes(r);
    rendezvous::routes(r);
    retention::routes(r);
    reporting::routes(r);
    room::routes(r);
    search::routes(r);
    session::routes(r);
    shared_secret::routes(r);
    space::routes(r);
    state::routes(r);
    sync::routes(r);
    tag::routes(r);
    thread_subscriptions::routes(r);
    threads::routes(r);
    to_device::routes(r);
    typing::routes(r);
    url_preview::routes(r);
    user_directory::routes(r);
}
