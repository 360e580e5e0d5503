//! Users of ours refuse invitations to rooms that this server is not in, and withdraw their knocks at such rooms (server-server
//! API, "Leaving Rooms (Rejecting Invites)"). Where no other server helps, the invitation is gone here all the same.

use std::time::Duration;

use ruma::{OwnedServerName, ServerName};

use crate::{
    accounts::users,
    error::Result,
    flows::{
        App,
        remote::{
            ask::{ANSWERS, failed},
            candidates::{Candidates, candidates, server_of},
            hand_over::{is_unknown, put},
            outside,
            template::{self, Template, Wanted},
        },
    },
    ids::{RoomNum, UserNum},
    rooms::{
        self,
        change::outside::{self as told_outside, Told},
        members,
        membership::without_profile,
    },
    schema::{remote::OutsideRow, rooms::Membership},
};

/// Other servers get this time to take part in it.
const TAKES_MAX: Duration = Duration::from_secs(20);

/// Ends what the user is to a room from outside. Gives `false` where they are nothing to it from outside.
pub(crate) async fn leave(app: &App, user: UserNum, room: RoomNum, reason: Option<&str>) -> Result<bool> {
    let snapshot = app.store.snapshot();
    let row = members::find(&*snapshot, user, room)?;
    let told = row.map(|row| told_outside::find(&*snapshot, room, user, &row)).transpose()?.flatten();
    let (Some(row), Some(told)) = (row, told) else { return Ok(false) };
    if !matches!(row.membership, Membership::Invite | Membership::Knock) {
        return Ok(true);
    }
    let known = rooms::require_row(&*snapshot, room)?;
    let user_id = users::require(&*snapshot, user)?.user_id;
    drop(snapshot);
    let content = without_profile("leave", reason);
    let wanted = Wanted {
        room_id: known.id.clone(),
        user_id: user_id.clone(),
        membership: Membership::Leave,
        content,
    };
    let version = told.shown.version_or(known.version);
    let mut asked = vec![candidates(app, &known.id, servers_of(&told))?.unbidden()];
    // A server that only claims to be in the room takes the refusal and tells nobody. So whoever else invited them hears it, too.
    for other in &told.others {
        asked.push(Candidates::of(app, server_of(&other.sender)));
    }
    let mut event = None;
    let ask_all = async {
        for asked in asked {
            let left = ask_in_turn(app, &wanted, asked).await;
            event = event.take().or(left);
        }
    };
    tokio::select! {
        biased;
        () = ask_all => {}
        () = app.env.sleep(TAKES_MAX) => {}
    }
    // The user's clients are told by an event, also where nobody else hears of it.
    let event = event.or_else(|| {
        let alone = Template::after(version, &told.shown.event)?;
        let event = alone.sign(app, &app.config.server.name, &wanted).ok()?;
        Some(String::from_utf8_lossy(event.json()).into_owned())
    });
    let told = Told {
        membership: Membership::Leave,
        version,
        via: app.config.server.name.to_string(),
        sender: user_id.to_string(),
        event: event.unwrap_or_default(),
        state: Vec::new(),
    };
    outside::set(app, (known.id, known.version), &app.config.server.name, user, told).await?;
    Ok(true)
}

/// The servers that know the room, as far as what was told of it says: those of whoever invited the user, then others.
pub(crate) fn servers_of(told: &OutsideRow) -> Vec<OwnedServerName> {
    let standing = told_outside::list_standing(told);
    let inviters = standing.iter().flat_map(|it| server_of(&it.sender));
    let via = standing.iter().filter_map(|it| it.via.as_str().try_into().ok());
    let senders = standing.iter().flat_map(|it| told_outside::list_senders(&it.state));
    inviters.chain(via).chain(senders.filter_map(|sender| server_of(&sender))).collect()
}

/// Has a server take the user out of the room. Gives the event; `None` where none does.
async fn ask_in_turn(app: &App, wanted: &Wanted, mut candidates: Candidates) -> Option<String> {
    loop {
        let asked = candidates.first(app, |server| async move { template::ask(app, &server, wanted).await });
        let Some((server, template)) = asked.await else {
            let why = candidates.into_error();
            tracing::info!(room = %wanted.room_id, user = %wanted.user_id, %why, "an invitation ends here alone");
            return None;
        };
        match send(app, &server, wanted, &template).await {
            Ok(event) => return Some(event),
            Err(why) => candidates.failed(&server, why),
        }
    }
}

/// Signs the event by which a user leaves, and has the server that gave its template take it. Gives the event.
pub(super) async fn send(
    app: &App,
    server: &ServerName,
    wanted: &Wanted,
    template: &Template,
) -> Result<String> {
    let event = template.sign(app, server, wanted)?;
    let (room_id, id) = (wanted.room_id.as_str(), event.id().as_str());
    let mut sent = put(app, server, &["v2", "send_leave", room_id, id], event.json(), ANSWERS).await;
    if sent.as_ref().is_err_and(is_unknown) {
        sent = put(app, server, &["v1", "send_leave", room_id, id], event.json(), ANSWERS).await;
    }
    sent.map_err(|failure| failed(server, failure))?;
    Ok(String::from_utf8_lossy(event.json()).into_owned())
}
