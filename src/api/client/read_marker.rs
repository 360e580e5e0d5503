//! Sets the read marker of a room, and receipts together with it.

use std::collections::BTreeMap;

use ruma::{api::client::read_marker::set_read_marker, events::receipt::ReceiptThread};
use serde::de::IgnoredAny;

use crate::{
    api::{Routes, extract::Client, policy::Wish},
    error::Result,
    flows::{
        App,
        limits::Limit,
        room::{self, receipts as flow},
    },
    schema::event_types::READ,
    schema::receipts::ReceiptKind,
};

pub(crate) fn routes(r: &mut Routes) {
    r.client(set_read_marker).limit(Limit::Other).suspended_if(tells_nobody);
}

/// Whether a request sets nothing that others see: a public receipt.
fn tells_nobody(wish: &Wish<'_>) -> bool {
    let fields = serde_json::from_slice::<BTreeMap<String, IgnoredAny>>(wish.body);
    fields.is_ok_and(|fields| !fields.contains_key(READ))
}

/// `POST /_matrix/client/v3/rooms/{roomId}/read_markers`
pub(crate) async fn set_read_marker(
    app: App,
    client: Client<set_read_marker::v3::Request>,
) -> Result<set_read_marker::v3::Response> {
    let Client { caller, request, .. } = client;
    let room_id = &request.room_id;
    room::require_in_room(&app, &caller, room_id)?;
    if let Some(event) = request.fully_read {
        flow::set_fully_read(&app, &caller, room_id.clone(), &event).await?;
    }
    let receipts =
        [(ReceiptKind::Public, request.read_receipt), (ReceiptKind::Private, request.private_read_receipt)];
    for (kind, event) in receipts {
        if let Some(event) = event {
            flow::send_receipt(&app, &caller, room_id, kind, event, &ReceiptThread::Unthreaded).await?;
        }
    }
    Ok(set_read_marker::v3::Response::new())
}
