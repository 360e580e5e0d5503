//! Lists the threads of a room, by their roots.

use ruma::api::client::threads::get_threads::{self, v1::IncludeThreads};

use crate::{
    api::{Routes, extract::Client, reply::RawJson},
    error::Result,
    flows::{
        App,
        limits::Limit,
        room::look::{self, ThreadsWanted},
    },
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(get_threads).limit(Limit::Read);
}

/// A client that asks for no number of threads gets at most this many.
const THREADS_DEFAULT: u64 = 20;

/// `GET /_matrix/client/v1/rooms/{roomId}/threads`
pub(crate) async fn get_threads(app: App, client: Client<get_threads::v1::Request>) -> Result<RawJson> {
    let request = client.request;
    let wanted = ThreadsWanted {
        from: request.from,
        limit: request.limit.map_or(THREADS_DEFAULT, Into::into),
        only_own: request.include == IncludeThreads::Participated,
    };
    look::threads(&app, &client.caller, &request.room_id, wanted).await.map(RawJson)
}
