//! Sends receipts: how far the user has read a room or a thread.

use ruma::{
    api::client::receipt::{create_receipt, create_receipt::v3::ReceiptType},
    events::receipt::ReceiptThread,
};

use crate::{
    api::{Routes, extract::Client},
    error::{Refusal, Result},
    flows::{App, limits::Limit, room::receipts},
    schema::{event_types::READ, receipts::ReceiptKind},
};

pub(crate) fn routes(r: &mut Routes) {
    // Others see a receipt that is public; a client of a suspended user counts by a private one.
    r.client(create_receipt)
        .limit(Limit::Other)
        .suspended_if(|wish| wish.path.get(1).is_none_or(|kind| kind != READ));
}

/// `POST /_matrix/client/v3/rooms/{roomId}/receipt/{receiptType}/{eventId}`
pub(crate) async fn create_receipt(
    app: App,
    client: Client<create_receipt::v3::Request>,
) -> Result<create_receipt::v3::Response> {
    let Client { caller, request, .. } = client;
    let kind = match request.receipt_type {
        ReceiptType::Read => ReceiptKind::Public,
        ReceiptType::ReadPrivate => ReceiptKind::Private,
        ReceiptType::FullyRead if request.thread == ReceiptThread::Unthreaded => {
            receipts::set_fully_read(&app, &caller, request.room_id, &request.event_id).await?;
            return Ok(create_receipt::v3::Response::new());
        }
        ReceiptType::FullyRead => {
            return Err(Refusal::invalid_param(
                "`thread_id` must be absent: `m.fully_read` belongs to no thread.",
            )
            .into());
        }
        _ => {
            return Err(Refusal::invalid_param(
                "The receipt type must be `m.read`, `m.read.private` or `m.fully_read`.",
            )
            .into());
        }
    };
    receipts::send_receipt(&app, &caller, &request.room_id, kind, request.event_id, &request.thread).await?;
    Ok(create_receipt::v3::Response::new())
}
