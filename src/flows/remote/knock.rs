//! Users of ours knock at rooms that this server is not in (server-server API, "Knocking upon a room").

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::{
    error::Result,
    flows::{
        App,
        remote::{
            ask::{ANSWERS, at_fault, failed},
            attempts::Attempt,
            candidates::Candidates,
            hand_over::put,
            invite::{check_state, shown},
            leave, outside,
            template::{self, Wanted},
        },
    },
    rooms::{self, change::outside::Told},
    schema::rooms::{Membership, Resident, RoomRow},
};

/// Keep at most this many of the events that tell which room it is.
const STATE_MAX: usize = 100;

/// The events that tell which room it is.
#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    knock_room_state: Vec<Box<RawValue>>,
}

/// Knocks at a room by way of other servers, and withdraws that at once where the user has left meanwhile. Errors: [`Error::Refused`](crate::error::Error::Refused) with the reason that a server
/// gave; [`Error::Remote`](crate::error::Error::Remote) where none could help.
pub(crate) async fn knock(
    app: &App,
    attempt: &Attempt,
    wanted: &Wanted,
    mut candidates: Candidates,
) -> Result<()> {
    let wish = attempt.wish();
    loop {
        wish.require()?;
        let asked = candidates.first(app, |server| async move { template::ask(app, &server, wanted).await });
        let Some((server, template)) = wish.unless_left(asked).await.flatten() else {
            wish.require()?;
            return Err(candidates.into_error());
        };
        let event = match template.sign(app, &server, wanted) {
            Ok(event) => event,
            Err(why) => {
                candidates.failed(&server, why);
                continue;
            }
        };
        let (room_id, id) = (wanted.room_id.as_str(), event.id().as_str());
        let sent = put(app, &server, &["v1", "send_knock", room_id, id], event.json(), ANSWERS).await;
        let answer = sent.map_err(|failure| failed(&server, failure)).and_then(|reply| {
            let answer: Answer = serde_json::from_slice(reply.answer.bytes()).map_err(|error| {
                at_fault(&server, format!("its answer to a knock makes no sense: {error}"))
            })?;
            Ok(answer)
        });
        let mut state = match answer {
            Ok(answer) => answer.knock_room_state,
            Err(why) => {
                candidates.failed(&server, why);
                continue;
            }
        };
        state.truncate(STATE_MAX);
        let row = RoomRow::new(wanted.room_id.clone(), template.version, Resident::Knocked);
        let mut told = match check_state(app, &row, &state).await {
            Ok(Some(whole)) => whole,
            Ok(None) => state.iter().filter_map(|event| shown(event)).collect(),
            // The knock is with the room by now, so that what is wrong is left out.
            Err(why) => {
                tracing::debug!(%server, %why, "what was told of a room is not believed");
                Vec::new()
            }
        };
        let event = String::from_utf8_lossy(event.json()).into_owned();
        told.extend(RawValue::from_string(event.clone()).ok().and_then(|event| shown(&event)));
        let sender = wanted.user_id.to_string();
        let (membership, version, via) = (Membership::Knock, template.version, server.to_string());
        let told = Told { membership, version, via, sender, event, state: told };
        let settling = wish.settle_anyway();
        outside::set(app, (wanted.room_id.clone(), version), &server, attempt.user(), told).await?;
        drop(settling);
        if wish.has_left() {
            let num = rooms::find_room(&*app.store.snapshot(), &wanted.room_id)?;
            if let Some(num) = num {
                leave::leave(app, attempt.user(), num, None).await?;
            }
        }
        return wish.require();
    }
}
