//! People who register, log in and out, while the server crashes.

use std::{cell::RefCell, collections::BTreeMap, rc::Rc};

use http::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::world::{Answer, World};

/// The tokens of an account, as far as answers told of them.
#[derive(Default)]
struct Account {
    /// Tokens that were given out and not taken back.
    tokens: Vec<String>,
    /// Tokens whose logout was acknowledged.
    ended: Vec<String>,
}

/// The accounts whose registration was acknowledged, by name.
#[derive(Default)]
pub(crate) struct Accounts {
    accounts: RefCell<BTreeMap<String, Account>>,
}

/// Registers an account, however often the server goes down meanwhile; answers an access token.
pub(crate) async fn register(world: &World, name: &str) -> String {
    let mut may_exist = false;
    loop {
        let body = json!({ "username": name, "password": name, "auth": { "type": "m.login.dummy" } });
        match world.ask(Method::POST, "/_matrix/client/v3/register", None, body).await {
            Answer::Given(StatusCode::OK, json) => return text(&json, "access_token"),
            Answer::Given(status, json) => {
                // An attempt that was not answered has taken the name: then its password works.
                assert!(may_exist && json["errcode"] == "M_USER_IN_USE", "{name}: {status} {json}");
                return log_in(world, name).await;
            }
            Answer::Lost => may_exist = true,
        }
        world.pause(300).await;
    }
}

pub(crate) async fn log_in(world: &World, name: &str) -> String {
    let body = json!({
        "type": "m.login.password", "password": name, "identifier": { "type": "m.id.user", "user": name },
    });
    let (status, json) = world.insist(Method::POST, "/_matrix/client/v3/login", None, body).await;
    assert_eq!(status, StatusCode::OK, "{name} cannot log in: {json}");
    text(&json, "access_token")
}

pub(crate) fn text(json: &Value, key: &str) -> String {
    json[key].as_str().unwrap_or_else(|| panic!("no {key} in {json}")).to_owned()
}

/// Starts three people who register, log in and log out.
pub(crate) fn begin(world: &Rc<World>, people: &mut JoinSet<()>) -> Rc<Accounts> {
    let accounts = Rc::new(Accounts::default());
    for number in 0..3 {
        let (world, accounts) = (world.clone(), accounts.clone());
        people.spawn_local(async move {
            world.pause(2_000).await;
            let name = format!("person{number}");
            accounts.live(&world, &name).await;
        });
    }
    accounts
}

impl Accounts {
    async fn live(&self, world: &World, name: &str) {
        let token = register(world, name).await;
        world.note(|| format!("{name} is registered"));
        self.accounts.borrow_mut().entry(name.to_owned()).or_default().tokens.push(token);
        while !world.is_ending() {
            world.pause(1_500).await;
            let token = {
                let accounts = self.accounts.borrow();
                accounts[name].tokens.last().cloned()
            };
            match token {
                Some(token) if world.happens(40) => self.log_out(world, name, token).await,
                _ => {
                    let token = log_in(world, name).await;
                    world.note(|| format!("{name} has logged in"));
                    self.accounts.borrow_mut().get_mut(name).unwrap().tokens.push(token);
                }
            }
        }
    }

    async fn log_out(&self, world: &World, name: &str, token: String) {
        self.accounts.borrow_mut().get_mut(name).unwrap().tokens.pop();
        let mut is_retry = false;
        loop {
            match world.ask(Method::POST, "/_matrix/client/v3/logout", Some(&token), json!({})).await {
                Answer::Given(status, json) => {
                    assert!(status == StatusCode::OK || is_retry, "{name} cannot log out: {status} {json}");
                    break;
                }
                Answer::Lost => is_retry = true,
            }
            world.pause(300).await;
        }
        world.note(|| format!("{name} has logged out"));
        self.accounts.borrow_mut().get_mut(name).unwrap().ended.push(token);
    }

    /// Checks that every token that was given out works, and that none that was taken back does.
    pub(crate) async fn check(&self, world: &World) {
        let path = "/_matrix/client/v3/account/whoami";
        let accounts = self.accounts.take();
        assert_eq!(accounts.len(), 3);
        for (name, account) in accounts.iter() {
            for token in &account.tokens {
                let (status, json) = world.insist(Method::GET, path, Some(token), Value::Null).await;
                assert_eq!(status, StatusCode::OK, "a token of {name} is lost: {json}");
            }
            for token in &account.ended {
                let (status, _) = world.insist(Method::GET, path, Some(token), Value::Null).await;
                assert_eq!(status, StatusCode::UNAUTHORIZED, "a token of {name} has come back");
            }
            log_in(world, name).await;
        }
    }
}
