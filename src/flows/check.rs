//! `db check`: every row is read, and every owner asked what must hold of its own.

use ruma::ServerName;

use crate::{
    accounts, encryption,
    ids::UserNum,
    push, rooms,
    store::{
        Fault, Store,
        backup::Progress,
        check::{self, Report, RowCheck},
        schema,
        timer::TimerKind,
    },
};

/// Reads everything and says what is wrong, while a server goes on beside it. Errors: only what stops it from reading on.
pub fn check(store: &Store, progress: &mut dyn FnMut(Progress)) -> Result<Report, Fault> {
    check::check(store, &checks, progress)
}

/// What all owners know of their tables.
fn checks() -> Vec<RowCheck> {
    let mut all = check::checks();
    all.extend(accounts::check::checks());
    all.extend(rooms::check::checks());
    all.extend(encryption::check::checks());
    all.extend(push::check::checks());
    all.push(RowCheck::of(&schema::TIMER, |read, (_, kind, key), _, doubts| {
        if *kind == TimerKind::TellRooms as u8 {
            let user = <[u8; 8]>::try_from(key.as_slice()).map(|bytes| UserNum(u64::from_be_bytes(bytes)));
            let there = user.ok().map(|user| schema::USERS.contains(read, user)).transpose()?;
            doubts.unless(there == Some(true), "the user it is about is not there");
        }
        let names_two = [TimerKind::CarryOver, TimerKind::ForgetOriginal].map(|kind| kind as u8);
        doubts.unless(!names_two.contains(kind) || key.len() == 16, "it does not say what it is about");
        Ok(())
    }));
    all.push(RowCheck::of(&schema::SERVER_FACTS, |_, name, fact, doubts| {
        let is_name = name != "server_name" || <&ServerName>::try_from(fact.as_str()).is_ok();
        doubts.unless(is_name, "this is the name of no server");
        Ok(())
    }));
    all
}

#[cfg(test)]
mod tests;
