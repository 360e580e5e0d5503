//! User-interactive authentication (<https://spec.matrix.org/v1.19/client-server-api/#user-interactive-authentication-api>):
//! which stages a request asks for, and sessions that remember which of them were passed.
//!
//! Sessions live in memory, so after a restart the user is asked again. A session belongs to one operation of one user, and is
//! refused for any other. From the first passed stage on it also belongs to one request, so that nothing else can be done than
//! was confirmed.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use bytes::Bytes;
use parking_lot::Mutex;
use ruma::{
    OwnedUserId,
    api::{client::uiaa::AuthType, error::ErrorKind},
};
use serde_json::{Value, json};

use crate::{
    env::Env,
    error::{Exception, Refusal},
};

/// At most this many sessions are open, because anybody may begin one; the oldest goes first.
const SESSIONS_MAX: usize = 10_000;
/// At most this many registrations are remembered, because each request that may repeat one looks through them.
const MADE_MAX: usize = 1_000;
/// A session remembers at most this many bytes of a request, because anybody may begin one.
const PARAMETERS_BYTES_MAX: usize = 2 << 10;
/// The id of a session has this many characters.
const SESSION_CHARS: usize = 24;
/// A session lives this long after its last use, in milliseconds.
const SESSION_MS: u64 = 60 * 60 * 1000;

/// An operation is done once any one of these rows of stages was passed, each in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flows(pub Vec<Vec<AuthType>>);

impl Flows {
    /// Flows that ask for this single stage.
    pub fn one(stage: AuthType) -> Self {
        Self(vec![vec![stage]])
    }

    fn are_met(&self, completed: &[AuthType]) -> bool {
        self.0.iter().any(|stages| completed.starts_with(stages))
    }

    /// Whether a stage is the next one of a flow whose stages before it are the completed ones.
    fn go_on_with(&self, completed: &[AuthType], stage: &AuthType) -> bool {
        self.0.iter().any(|stages| {
            let (before, rest) = stages.split_at(completed.len().min(stages.len()));
            before == completed && rest.first() == Some(stage)
        })
    }

    /// Whether the stage is asked for at all.
    pub fn ask_for(&self, stage: &AuthType) -> bool {
        self.0.iter().flatten().any(|asked| asked == stage)
    }
}

/// An operation that wants to be confirmed, and for whom it is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    /// A digest of the method and path, and of the user and device if they are known: a session is good for nothing else.
    pub name: [u8; 32],
    /// A digest of the request without its `auth`; compared once a stage was passed.
    pub request: [u8; 32],
    /// The user who asks, if one is known: it is their password that confirms the request.
    pub user_id: Option<OwnedUserId>,
    /// The request without its `auth`, if the session remembers it for a client that does not send it again.
    pub parameters: Option<Bytes>,
}

#[derive(Clone, Debug)]
struct Session {
    name: [u8; 32],
    /// The flows that were asked for last.
    flows: Flows,
    user_id: Option<OwnedUserId>,
    /// The digest of the request whose stage was passed first.
    request: Option<[u8; 32]>,
    /// The last request of the session without its `auth`, if it is to be remembered.
    parameters: Option<Bytes>,
    completed: Vec<AuthType>,
    /// The registration token that was shown.
    registration_token: Option<String>,
    used_ms: u64,
    serial: u64,
}

impl Session {
    /// Counts a stage that was passed, if it is the next one of a flow. Answers whether it was counted, now or before.
    fn pass(&mut self, passed: Passed) -> bool {
        if self.flows.go_on_with(&self.completed, &passed.stage) {
            self.completed.push(passed.stage);
            self.registration_token = passed.registration_token.or(self.registration_token.take());
            return true;
        }
        let was_counted = self.completed.contains(&passed.stage);
        if !was_counted {
            tracing::debug!(reason = "not the next stage of a flow", "a stage does not count");
        }
        was_counted
    }
}

#[derive(Debug, Default)]
struct Open {
    sessions: BTreeMap<String, Session>,
    /// The ids of the sessions by serial number, so that the oldest is found first.
    ages: BTreeMap<u64, String>,
    last_serial: u64,
    /// The accounts that registrations made, the newest last.
    made: VecDeque<Made>,
}

/// An account that a registration made.
#[derive(Debug)]
struct Made {
    session: String,
    /// A digest of the request that made it.
    request: [u8; 32],
    user_id: OwnedUserId,
    at_ms: u64,
}

/// The open sessions, which clones of this share.
#[derive(Clone, Debug, Default)]
pub struct Sessions(Arc<Mutex<Open>>);

/// The answer to a request: done, or more stages are needed.
#[derive(Debug)]
pub enum Progress {
    /// All stages of one of the flows were passed.
    Done {
        /// The registration token that was shown, if one was.
        registration_token: Option<String>,
        /// The session that led here, if this server had given it to the client before.
        session: Option<String>,
    },
    /// Further stages are needed; this is the 401 to answer.
    More(Refusal),
}

/// A stage that was just passed.
#[derive(Clone, Debug)]
pub struct Passed {
    /// The stage that was passed.
    pub stage: AuthType,
    /// The registration token, if the stage asked for one.
    pub registration_token: Option<String>,
}

impl Sessions {
    /// Continues a request that may belong to `session`, after it has passed a stage or none. A session that is not known, or
    /// that belongs to another request, is replaced by a new one. Errors: 403 for a session of another operation.
    pub fn advance(
        &self,
        env: &Env,
        operation: &Operation,
        flows: &Flows,
        session: Option<&str>,
        passed: Option<Passed>,
    ) -> Result<Progress, Refusal> {
        let mut open = self.0.lock();
        let (id, mut state) = open.find_or_begin(env, operation, flows, session)?;
        if passed.is_some() || !state.completed.is_empty() {
            // A stage that was passed on a page belongs to the first request that brings the session back.
            state.request.get_or_insert(operation.request);
        }
        if let Some(passed) = passed {
            state.pass(passed);
        }
        if flows.are_met(&state.completed) {
            open.remove(&id);
            // A session that the client made up was replaced by a new one.
            let session = session.is_some_and(|asked| asked == id).then_some(id);
            return Ok(Progress::Done { registration_token: state.registration_token, session });
        }
        let refusal = ask(flows, &state.completed, &id, None);
        open.put(id, state);
        Ok(Progress::More(refusal))
    }

    /// The last request of a session of this operation, without its `auth`; `None` if there is no such session, or the request
    /// was not remembered.
    pub fn parameters_of(&self, env: &Env, session: &str, name: [u8; 32]) -> Option<Bytes> {
        let open = self.0.lock();
        let known = open.sessions.get(session).filter(|known| known.used_ms + SESSION_MS > env.now_ms());
        known.filter(|known| known.name == name).and_then(|known| known.parameters.clone())
    }

    /// Notes that a registration made an account with this session, for a client that loses the answer. The session is one that
    /// [`Progress::Done`] names: whoever made one up could else find the account of somebody who made up the same.
    pub fn note_made(&self, env: &Env, session: String, request: [u8; 32], user_id: OwnedUserId) {
        debug_assert_eq!(session.len(), SESSION_CHARS, "a session that was given out is noted");
        let made = Made { session, request, user_id, at_ms: env.now_ms() };
        let mut open = self.0.lock();
        if open.made.len() >= MADE_MAX {
            open.made.pop_front();
        }
        open.made.push_back(made);
    }

    /// Finds the account that the same request made with a session of late.
    pub fn find_made(&self, env: &Env, session: &str, request: [u8; 32]) -> Option<OwnedUserId> {
        let (open, now_ms) = (self.0.lock(), env.now_ms());
        let is_it = |made: &&Made| {
            made.session == session && made.request == request && made.at_ms + SESSION_MS > now_ms
        };
        open.made.iter().rev().find(is_it).map(|made| made.user_id.clone())
    }

    /// The user for whom a session was begun; `None` if there is no such session, or if it is nobody's.
    pub fn user_of(&self, env: &Env, session: &str) -> Option<OwnedUserId> {
        let open = self.0.lock();
        let known = open.sessions.get(session).filter(|known| known.used_ms + SESSION_MS > env.now_ms());
        known.and_then(|known| known.user_id.clone())
    }

    /// Notes that a stage was passed on a page in the browser. The session must be open already, begun by the client's own
    /// request. Errors: 404 `M_NOT_FOUND` if there is no such session, 403 if another stage comes first.
    pub fn pass_on_page(&self, env: &Env, session: &str, passed: Passed) -> Result<(), Refusal> {
        let mut open = self.0.lock();
        let now_ms = env.now_ms();
        let known = open.sessions.get_mut(session).filter(|known| known.used_ms + SESSION_MS > now_ms);
        let Some(known) = known else {
            return Err(Refusal::not_found("This session has ended. Begin again in your app."));
        };
        known.used_ms = now_ms;
        if known.pass(passed) {
            return Ok(());
        }
        Err(Refusal::forbidden(
            "Another step comes before this one. Go on in your app, and come back here afterwards.",
        ))
    }

    /// The 401 for a stage that was failed. It says why, and names the flows again so that the client can go on. For a session
    /// of another operation it is 403.
    pub fn fail(
        &self,
        env: &Env,
        operation: &Operation,
        flows: &Flows,
        session: Option<&str>,
        why: &Refusal,
    ) -> Refusal {
        let mut open = self.0.lock();
        let (id, state) = match open.find_or_begin(env, operation, flows, session) {
            Ok(found) => found,
            Err(refusal) => return refusal,
        };
        let refusal = ask(flows, &state.completed, &id, Some(why));
        open.put(id, state);
        refusal
    }
}

impl Open {
    /// The session of this id with its state, or a new one if it is not known or belongs to another request.
    fn find_or_begin(
        &mut self,
        env: &Env,
        operation: &Operation,
        flows: &Flows,
        session: Option<&str>,
    ) -> Result<(String, Session), Refusal> {
        let now_ms = env.now_ms();
        let known = match session {
            Some(id) => self.find(id, operation, now_ms)?.map(|known| (id.to_owned(), known)),
            None => None,
        };
        let (id, mut state) =
            known.unwrap_or_else(|| (env.random_string(SESSION_CHARS), self.begin(operation, flows, now_ms)));
        state.flows = flows.clone();
        let parameters = operation.parameters.as_ref();
        state.parameters = parameters.filter(|json| json.len() <= PARAMETERS_BYTES_MAX).cloned();
        Ok((id, state))
    }

    fn find(&mut self, id: &str, operation: &Operation, now_ms: u64) -> Result<Option<Session>, Refusal> {
        let Some(session) = self.sessions.get_mut(id) else { return Ok(None) };
        if session.used_ms + SESSION_MS <= now_ms {
            self.remove(id);
            return Ok(None);
        }
        if session.name != operation.name {
            tracing::debug!(reason = "another operation", "a session of authentication is refused");
            let why = "`auth.session` belongs to another operation. Send the request without `auth` first.";
            return Err(Refusal::forbidden(why));
        }
        if session.request.is_some_and(|request| request != operation.request) {
            return Ok(None);
        }
        session.used_ms = now_ms;
        Ok(Some(session.clone()))
    }

    fn begin(&mut self, operation: &Operation, flows: &Flows, now_ms: u64) -> Session {
        self.last_serial += 1;
        Session {
            name: operation.name,
            flows: flows.clone(),
            user_id: operation.user_id.clone(),
            request: None,
            parameters: None,
            completed: Vec::new(),
            registration_token: None,
            used_ms: now_ms,
            serial: self.last_serial,
        }
    }

    fn put(&mut self, id: String, session: Session) {
        self.ages.insert(session.serial, id.clone());
        self.sessions.insert(id, session);
        while self.sessions.len() > SESSIONS_MAX
            && let Some((_, oldest)) = self.ages.pop_first()
        {
            self.sessions.remove(&oldest);
        }
    }

    fn remove(&mut self, id: &str) {
        if let Some(session) = self.sessions.remove(id) {
            self.ages.remove(&session.serial);
        }
    }
}

fn ask(flows: &Flows, completed: &[AuthType], session: &str, failed: Option<&Refusal>) -> Refusal {
    let rows: Vec<Value> = flows
        .0
        .iter()
        .map(|stages| json!({ "stages": stages.iter().map(AuthType::as_str).collect::<Vec<_>>() }))
        .collect();
    let completed: Vec<&str> = completed.iter().map(AuthType::as_str).collect();
    let mut body = json!({ "flows": rows, "params": {}, "session": session, "completed": completed });
    let (kind, message) = match failed {
        Some(refusal) => (refusal.kind.clone(), refusal.message.clone()),
        None => (ErrorKind::Unauthorized, "Authentication is needed.".to_owned()),
    };
    if let (Some(failed), Some(object)) = (failed, body.as_object_mut()) {
        object.insert("errcode".to_owned(), failed.kind.errcode().as_str().into());
        object.insert("error".to_owned(), failed.message.as_str().into());
    }
    Refusal { kind, message, exception: Some(Exception::Interactive), body: Some(body) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REGISTER: u8 = 1;
    const DELETE: u8 = 2;
    const OTHER: u8 = 3;

    fn operation(name: u8, request: u8) -> Operation {
        Operation { name: [name; 32], request: [request; 32], user_id: None, parameters: None }
    }

    fn passed(stage: AuthType) -> Option<Passed> {
        Some(Passed { stage, registration_token: None })
    }

    fn session_of(progress: Result<Progress, Refusal>) -> String {
        let Ok(Progress::More(refusal)) = progress else { panic!("done too early") };
        refusal.body.unwrap()["session"].as_str().unwrap().to_owned()
    }

    fn two() -> Flows {
        Flows(vec![vec![AuthType::RegistrationToken, AuthType::Dummy]])
    }

    #[test]
    fn stages_add_up_until_a_row_is_complete() {
        let (env, sessions, flows) = (Env::simulated(1, 0), Sessions::default(), two());
        let it = operation(REGISTER, 1);
        let id = session_of(sessions.advance(&env, &it, &flows, None, None));
        // The stages of a flow must come in its order.
        for stage in
            [AuthType::Dummy, AuthType::Password, AuthType::RegistrationToken, AuthType::RegistrationToken]
        {
            assert_eq!(id, session_of(sessions.advance(&env, &it, &flows, Some(&id), passed(stage))));
        }
        let done = sessions.advance(&env, &it, &flows, Some(&id), passed(AuthType::Dummy));
        assert!(matches!(done, Ok(Progress::Done { .. })));
        // A session that has led to the end of its operation cannot be used again.
        assert_ne!(id, session_of(sessions.advance(&env, &it, &flows, Some(&id), None)));
    }

    #[test]
    fn a_stage_passed_in_the_first_request_needs_no_session() {
        let (env, sessions) = (Env::simulated(1, 0), Sessions::default());
        let flows = Flows::one(AuthType::Dummy);
        let done = sessions.advance(&env, &operation(REGISTER, 1), &flows, None, passed(AuthType::Dummy));
        assert!(matches!(done, Ok(Progress::Done { .. })));
        let made_up = Some("made up");
        let done = sessions.advance(&env, &operation(REGISTER, 1), &flows, made_up, passed(AuthType::Dummy));
        assert!(matches!(done, Ok(Progress::Done { session: None, .. })), "only the server names sessions");
    }

    #[test]
    fn what_was_confirmed_for_one_request_or_operation_does_not_count_for_another() {
        let (env, sessions, flows) = (Env::simulated(1, 0), Sessions::default(), two());
        let it = operation(DELETE, 1);
        let id = session_of(sessions.advance(&env, &it, &flows, None, passed(AuthType::RegistrationToken)));
        let next = || passed(AuthType::Dummy);
        let other = operation(DELETE, 2);
        assert_ne!(id, session_of(sessions.advance(&env, &other, &flows, Some(&id), next())));
        let other = operation(OTHER, 1);
        let refusal = sessions.advance(&env, &other, &flows, Some(&id), next()).unwrap_err();
        assert_eq!(refusal.kind, ErrorKind::Forbidden);
        let refusal = sessions.fail(&env, &other, &flows, Some(&id), &Refusal::not_found("wrong"));
        assert_eq!((refusal.kind, refusal.body), (ErrorKind::Forbidden, None));
        let done = sessions.advance(&env, &it, &flows, Some(&id), next());
        assert!(matches!(done, Ok(Progress::Done { .. })), "the session is still good for its own");
    }

    #[test]
    fn a_session_remembers_its_last_request_if_it_is_small() {
        let (env, sessions, flows) = (Env::simulated(1, 0), Sessions::default(), two());
        let with =
            |bytes: usize| Operation { parameters: Some(vec![b'x'; bytes].into()), ..operation(REGISTER, 1) };
        let (small, large) = (with(PARAMETERS_BYTES_MAX), with(PARAMETERS_BYTES_MAX + 1));
        let id = session_of(sessions.advance(&env, &with(1), &flows, None, None));
        assert_eq!(id, session_of(sessions.advance(&env, &small, &flows, Some(&id), None)));
        assert_eq!(sessions.parameters_of(&env, &id, small.name), small.parameters);
        assert_eq!(sessions.parameters_of(&env, &id, [OTHER; 32]), None);
        assert_eq!(sessions.parameters_of(&env, "none", small.name), None);
        assert_eq!(id, session_of(sessions.advance(&env, &large, &flows, Some(&id), None)));
        assert_eq!(sessions.parameters_of(&env, &id, small.name), None);
    }

    #[test]
    fn a_stage_passed_on_a_page_counts_for_the_request_that_comes_back_first() {
        let (env, sessions, flows) = (Env::simulated(1, 0), Sessions::default(), two());
        let it = operation(REGISTER, 1);
        let id = session_of(sessions.advance(&env, &it, &flows, None, None));
        let shown =
            Passed { stage: AuthType::RegistrationToken, registration_token: Some("token".to_owned()) };
        assert!(sessions.pass_on_page(&env, "unknown", shown.clone()).is_err());
        sessions.pass_on_page(&env, &id, shown).unwrap();
        assert_eq!(id, session_of(sessions.advance(&env, &it, &flows, Some(&id), None)));
        let other = sessions.advance(&env, &operation(REGISTER, 2), &flows, Some(&id), None);
        assert_ne!(id, session_of(other));
        let done = sessions.advance(&env, &it, &flows, Some(&id), passed(AuthType::Dummy));
        let Ok(Progress::Done { registration_token, session }) = done else { panic!("not done") };
        assert_eq!((registration_token.as_deref(), session), (Some("token"), Some(id)));
    }

    #[test]
    fn stages_passed_on_pages_count_in_the_order_of_the_flow() {
        let (env, sessions, flows) = (Env::simulated(1, 0), Sessions::default(), two());
        let it = operation(REGISTER, 1);
        let id = session_of(sessions.advance(&env, &it, &flows, None, None));
        let pass = |stage| sessions.pass_on_page(&env, &id, passed(stage).unwrap());
        let refusal = pass(AuthType::Dummy).unwrap_err();
        assert_eq!(refusal.kind, ErrorKind::Forbidden);
        pass(AuthType::RegistrationToken).unwrap();
        // A page that is sent twice is no fault of the person.
        pass(AuthType::RegistrationToken).unwrap();
        pass(AuthType::Dummy).unwrap();
        let done = sessions.advance(&env, &it, &flows, Some(&id), None);
        assert!(matches!(done, Ok(Progress::Done { .. })));
    }

    #[tokio::test(start_paused = true)]
    async fn sessions_end_after_an_hour() {
        let (env, sessions, flows) = (Env::simulated(1, 0), Sessions::default(), two());
        let it = operation(REGISTER, 1);
        let id = session_of(sessions.advance(&env, &it, &flows, None, passed(AuthType::Dummy)));
        env.sleep(std::time::Duration::from_millis(SESSION_MS)).await;
        assert_ne!(id, session_of(sessions.advance(&env, &it, &flows, Some(&id), None)));
    }

    #[test]
    fn sessions_are_bounded() {
        let (env, sessions, flows) = (Env::simulated(1, 0), Sessions::default(), two());
        for _ in 0..SESSIONS_MAX + 10 {
            drop(sessions.advance(&env, &operation(REGISTER, 1), &flows, None, None));
        }
        assert_eq!(sessions.0.lock().sessions.len(), SESSIONS_MAX);
        assert_eq!(sessions.0.lock().ages.len(), SESSIONS_MAX);
    }
}
