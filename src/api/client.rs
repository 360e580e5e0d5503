//! The client-server API: one file a section of the specification.

mod account;
mod account_data;
mod devices;
mod discovery;
mod filter;
mod keys;
mod login;
mod logout;
mod people;
mod profile;
mod register;
mod shared_secret;
mod create_room;
mod directory;
mod membership;
mod room_events;
mod send;
mod tags;
mod third_party;
mod to_device;
mod typing;
mod sync;
mod receipts;
mod push_rules;
mod pushers;
mod presence;

use crate::api::Routes;

/// Every endpoint of the client-server API.
pub(crate) fn routes(r: &mut Routes) {
    account::routes(r);
    account_data::routes(r);
    devices::routes(r);
    discovery::routes(r);
    filter::routes(r);
    keys::routes(r);
    login::routes(r);
    logout::routes(r);
    people::routes(r);
    profile::routes(r);
    register::routes(r);
    shared_secret::routes(r);
    create_room::routes(r);
    directory::routes(r);
    membership::routes(r);
    room_events::routes(r);
    send::routes(r);
    tags::routes(r);
    third_party::routes(r);
    to_device::routes(r);
    typing::routes(r);
    sync::routes(r);
    receipts::routes(r);
    push_rules::routes(r);
    pushers::routes(r);
    presence::routes(r);
}
