//! The server-server API: one file for each module of ruma's federation API, named after it.

mod device;
mod discovery;
mod event;
mod membership;
mod openid;
mod invite;
mod keys;
mod media;
mod query;
mod rooms;
mod thirdparty;
mod transactions;

use crate::api::Routes;

/// Registers every endpoint of the server-server API.
pub(crate) fn routes(r: &mut Routes) {
    device::routes(r);
    discovery::routes(r);
    event::routes(r);
    membership::routes(r);
    openid::routes(r);
    invite::routes(r);
    keys::routes(r);
    media::routes(r);
    query::routes(r);
    rooms::routes(r);
    thirdparty::routes(r);
    transactions::routes(r);
}
