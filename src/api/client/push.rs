//! Push rules and pushers of the caller: reading them, and changing them.

use http::Method;
use ruma::{
    api::client::push::{
        PushRule, delete_pushrule, get_notifications, get_pushers, get_pushrule, get_pushrule_actions,
        get_pushrule_enabled, get_pushrules_all, get_pushrules_global_scope,
        set_pusher::{self, v3::PusherAction},
        set_pushrule, set_pushrule_actions, set_pushrule_enabled,
    },
    push::{AnyPushRuleRef, ConditionalPushRuleInit, RuleKind, Ruleset},
};

use serde_json::json;

use crate::{
    accounts::Caller,
    api::{
        Routes,
        extract::{Client, Endpoint},
        raw::Raw,
        reply::RawJson,
    },
    error::{Refusal, Result},
    flows::{
        App,
        account::{push_rules, pushers as flow},
        limits::Limit,
    },
    ids::Position,
    json::Object,
    push::{
        mailboxes,
        notified::{self, Ask},
        pushers::{self, NewPusher},
        rules,
    },
};

/// A page of notifications has this many where the client does not say.
const PAGE_DEFAULT: usize = 20;
/// A page of notifications has at most this many.
const PAGE_MAX: usize = 100;

pub(crate) fn routes(r: &mut Routes) {
    r.client(get_pushrules_all).limit(Limit::Read);
    r.client(get_pushrules_global_scope).limit(Limit::Read);
    r.client(rules_of_kind).limit(Limit::Read);
    r.client(get_pushrule).limit(Limit::Read);
    r.client(set_pushrule).limit(Limit::Other);
    r.client(delete_pushrule).limit(Limit::Other);
    r.client(get_pushrule_enabled).limit(Limit::Read);
    r.client(set_pushrule_enabled).limit(Limit::Other);
    r.client(get_pushrule_actions).limit(Limit::Read);
    r.client(set_pushrule_actions).limit(Limit::Other);
    r.client(get_no_rules).limit(Limit::Read);
    r.client(set_no_rules).limit(Limit::Other);
    r.client(get_pushers).limit(Limit::Read);
    r.client(set_pusher).limit(Limit::Other);
    r.client(get_notifications).limit(Limit::Read);
}

fn rules_of(app: &App, caller: &Caller) -> Result<Ruleset> {
    Ok(rules::rules_of(&*app.store.snapshot(), caller.user, &caller.user_id)?)
}

/// `GET /_matrix/client/v3/pushrules/`
pub(crate) async fn get_pushrules_all(
    app: App,
    client: Client<get_pushrules_all::v3::Request>,
) -> Result<RawJson> {
    let rules = rules::as_json(&rules_of(&app, &client.caller)?)?;
    Ok(RawJson(json!({ "global": rules }).to_string().into()))
}

/// `GET /_matrix/client/v3/pushrules/global/`
pub(crate) async fn get_pushrules_global_scope(
    app: App,
    client: Client<get_pushrules_global_scope::v3::Request>,
) -> Result<RawJson> {
    Ok(RawJson(rules::as_json(&rules_of(&app, &client.caller)?)?.to_string().into()))
}

endpoint!(
    /// The rules of one kind, which old clients ask for; ruma and the specification do not know this endpoint.
    RulesOfKind, GET,
    "/_matrix/client/v3/pushrules/global/{kind}/"
);

/// `GET /_matrix/client/v3/pushrules/global/{kind}/`
pub(crate) async fn rules_of_kind(app: App, client: Client<Raw<RulesOfKind>>) -> Result<RawJson> {
    let (rules, kind) = (rules_of(&app, &client.caller)?, RuleKind::from(client.request.arg(0)));
    Ok(RawJson(rules::of_kind_as_json(&rules, kind)?.to_string().into()))
}

/// `GET /_matrix/client/v3/pushrules/global/{kind}/{ruleId}`
pub(crate) async fn get_pushrule(
    app: App,
    client: Client<get_pushrule::v3::Request>,
) -> Result<get_pushrule::v3::Response> {
    let rules = rules_of(&app, &client.caller)?;
    let get_pushrule::v3::Request { kind, rule_id, .. } = client.request;
    let rule = rules::require_rule(&rules, kind, &rule_id)?;
    let mut rule = match rule {
        // ruma does not make an answer of such a rule.
        AnyPushRuleRef::PostContent(rule) => PushRule::from(ConditionalPushRuleInit {
            actions: rule.actions.clone(),
            default: rule.default,
            enabled: rule.enabled,
            rule_id: rule.rule_id.clone(),
            conditions: rule.conditions.clone(),
        }),
        rule => PushRule::from(rule),
    };
    rule.rule_id = rule_id;
    Ok(get_pushrule::v3::Response::new(rule))
}

/// `PUT /_matrix/client/v3/pushrules/global/{kind}/{ruleId}`
pub(crate) async fn set_pushrule(
    app: App,
    client: Client<Raw<set_pushrule::v3::Request>>,
) -> Result<set_pushrule::v3::Response> {
    let mut raw = client.request;
    if matches!(raw.arg(0), "override" | "underride" | "postcontent") {
        // A rule without conditions always matches, which ruma does not read.
        raw.body = raw.body.or_list("conditions")?;
    }
    if let [kind, id] = raw.path.as_mut_slice()
        && kind == RuleKind::Room.as_str()
    {
        *id = rules::stored_id(&RuleKind::Room, id).into_owned();
    }
    let set_pushrule::v3::Request { rule, before, after, .. } = raw.read()?;
    let insert = move |rules: &mut Ruleset| rules::insert(rules, rule, after.as_deref(), before.as_deref());
    push_rules::change(&app, &client.caller, insert).await?;
    Ok(set_pushrule::v3::Response::new())
}

/// `DELETE /_matrix/client/v3/pushrules/global/{kind}/{ruleId}`
pub(crate) async fn delete_pushrule(
    app: App,
    client: Client<delete_pushrule::v3::Request>,
) -> Result<delete_pushrule::v3::Response> {
    let delete_pushrule::v3::Request { kind, rule_id, .. } = client.request;
    push_rules::change(&app, &client.caller, move |rules| rules::remove(rules, kind, &rule_id)).await?;
    Ok(delete_pushrule::v3::Response::new())
}

/// `GET /_matrix/client/v3/pushrules/global/{kind}/{ruleId}/enabled`
pub(crate) async fn get_pushrule_enabled(
    app: App,
    client: Client<get_pushrule_enabled::v3::Request>,
) -> Result<get_pushrule_enabled::v3::Response> {
    let rules = rules_of(&app, &client.caller)?;
    let rule = rules::require_rule(&rules, client.request.kind, &client.request.rule_id)?;
    Ok(get_pushrule_enabled::v3::Response::new(rule.enabled()))
}

/// `PUT /_matrix/client/v3/pushrules/global/{kind}/{ruleId}/enabled`
pub(crate) async fn set_pushrule_enabled(
    app: App,
    client: Client<set_pushrule_enabled::v3::Request>,
) -> Result<set_pushrule_enabled::v3::Response> {
    let set_pushrule_enabled::v3::Request { kind, rule_id, enabled, .. } = client.request;
    let set = move |rules: &mut Ruleset| rules::set_enabled(rules, kind, &rule_id, enabled);
    push_rules::change(&app, &client.caller, set).await?;
    Ok(set_pushrule_enabled::v3::Response::new())
}

/// `GET /_matrix/client/v3/pushrules/global/{kind}/{ruleId}/actions`
pub(crate) async fn get_pushrule_actions(
    app: App,
    client: Client<get_pushrule_actions::v3::Request>,
) -> Result<get_pushrule_actions::v3::Response> {
    let rules = rules_of(&app, &client.caller)?;
    let rule = rules::require_rule(&rules, client.request.kind, &client.request.rule_id)?;
    Ok(get_pushrule_actions::v3::Response::new(rule.actions().to_vec()))
}

/// `PUT /_matrix/client/v3/pushrules/global/{kind}/{ruleId}/actions`
pub(crate) async fn set_pushrule_actions(
    app: App,
    client: Client<set_pushrule_actions::v3::Request>,
) -> Result<set_pushrule_actions::v3::Response> {
    let set_pushrule_actions::v3::Request { kind, rule_id, actions, .. } = client.request;
    let set = move |rules: &mut Ruleset| rules::set_actions(rules, kind, &rule_id, actions);
    push_rules::change(&app, &client.caller, set).await?;
    Ok(set_pushrule_actions::v3::Response::new())
}

/// The paths of rules that are not there: of other scopes than `global`, which once was a parameter of the path, and
/// other parts of a rule than those that have an endpoint.
const NO_RULES: [&str; 4] = [
    "/_matrix/client/v3/pushrules/{scope}/",
    "/_matrix/client/v3/pushrules/{scope}/{kind}/",
    "/_matrix/client/v3/pushrules/{scope}/{kind}/{rule_id}",
    "/_matrix/client/v3/pushrules/{scope}/{kind}/{rule_id}/{part}",
];

/// Reading rules that are not there.
pub(crate) struct GetNoRules;

impl Endpoint for GetNoRules {
    fn method() -> Method {
        Method::GET
    }

    fn paths() -> Vec<&'static str> {
        NO_RULES.to_vec()
    }
}

/// Setting rules that are not there.
pub(crate) struct SetNoRules;

impl Endpoint for SetNoRules {
    fn method() -> Method {
        Method::PUT
    }

    fn paths() -> Vec<&'static str> {
        NO_RULES.to_vec()
    }
}

fn no_rules<E>(request: &Raw<E>) -> Result<RawJson> {
    let why = match request.arg(0) {
        "global" => "A rule has no such part; `actions` and `enabled` can be asked for.",
        _ => "The only scope of push rules is `global`.",
    };
    Err(Refusal::invalid_param(why).into())
}

/// `GET /_matrix/client/v3/pushrules/{scope}/`
pub(crate) async fn get_no_rules(_app: App, client: Client<Raw<GetNoRules>>) -> Result<RawJson> {
    no_rules(&client.request)
}

/// `PUT /_matrix/client/v3/pushrules/{scope}/`
pub(crate) async fn set_no_rules(_app: App, client: Client<Raw<SetNoRules>>) -> Result<RawJson> {
    no_rules(&client.request)
}

/// `GET /_matrix/client/v3/pushers`
pub(crate) async fn get_pushers(app: App, client: Client<get_pushers::v3::Request>) -> Result<RawJson> {
    let pushers = pushers::list_shown(&*app.store.snapshot(), client.caller.user)?;
    Ok(RawJson(json!({ "pushers": pushers }).to_string().into()))
}

/// `POST /_matrix/client/v3/pushers/set`
pub(crate) async fn set_pusher(
    app: App,
    client: Client<Raw<set_pusher::v3::Request>>,
) -> Result<set_pusher::v3::Response> {
    // Ruma would take a body without `kind` for one that deletes the pusher.
    if client.request.body.field("kind").is_none() {
        return Err(Refusal::missing_param("`kind` is missing; it is null to delete a pusher.").into());
    }
    let is_enabled = match client.request.body.field(pushers::ENABLED) {
        None | Some("true") => true,
        Some("false") => false,
        Some(_) => {
            let why = format!("`{}` must be true or false.", pushers::ENABLED);
            return Err(Refusal::bad_json(why).into());
        }
    };
    match client.request.read()?.action {
        PusherAction::Post(data) => {
            let now_ms = app.env.now_ms();
            let secret = mailboxes::make_secret(&app.env);
            let new = NewPusher { pusher: data.pusher, append: data.append, is_enabled, now_ms, secret };
            flow::set(&app, &client.caller, new).await?;
        }
        PusherAction::Delete(ids) => flow::delete(&app, &client.caller, ids).await?,
        _ => return Err(Refusal::invalid_param("`kind` must be `http`, or null to delete a pusher.").into()),
    }
    Ok(set_pusher::v3::Response::new())
}

/// `GET /_matrix/client/v3/notifications`
pub(crate) async fn get_notifications(
    app: App,
    client: Client<get_notifications::v3::Request>,
) -> Result<RawJson> {
    let get_notifications::v3::Request { from, limit, only, .. } = client.request;
    let parse = |from: &String| from.parse().ok().and_then(Position::new);
    let before = match &from {
        Some(from) => {
            let why = "`from` is not the `next_token` of an earlier page; leave it out to begin anew.";
            Some(parse(from).ok_or_else(|| Refusal::invalid_param(why))?)
        }
        None => None,
    };
    let only_highlights = match only.as_deref() {
        None | Some("") => false,
        Some("highlight") => true,
        Some(_) => return Err(Refusal::invalid_param("`only` must be `highlight`, or left out.").into()),
    };
    let limit = limit.map_or(PAGE_DEFAULT, |limit| usize::try_from(u64::from(limit)).unwrap_or(usize::MAX));
    let limit = limit.clamp(1, PAGE_MAX);
    let ask = Ask { before, limit, only_highlights, now_ms: app.env.now_ms() };
    let (owned, caller) = (app.clone(), client.caller);
    let list = move || Ok(notified::list(&*owned.store.snapshot(), &owned.push, &caller, ask)?);
    let page = app.env.blocking(list).await?;
    let mut answer = Object::with_capacity(4_096);
    if let Some(next) = page.next {
        answer.text("next_token", &next.number().to_string());
    }
    answer.list("notifications", &page.notifications);
    Ok(RawJson(answer.finish().into()))
}
