//! One look at a page for all who ask for it at the same time.
//!
//! A look that runs is shared by all. One that still waits for its place is shared by those alone who pay for it: whoever has many
//! waiting must not hold up what others ask for once.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;
use tokio::sync::watch;
use url::Url;

use super::make;
use crate::{
    env::payer::{self, Payer, Payers},
    error::{Error, Result},
    flows::{
        App,
        lanes::{NoPlace, Pace},
    },
    ids::UserNum,
    media::preview::rows,
    schema::previews::PreviewRow,
};

/// Those who find no place are told to try again after this time.
const AGAIN: std::time::Duration = std::time::Duration::from_secs(5);

/// The looks that are under way.
#[derive(Default)]
pub(super) struct UnderWay(Mutex<Looks>);

#[derive(Default)]
struct Looks {
    /// Those that run, by their URLs.
    running: BTreeMap<Digest, Told>,
    /// Those that wait for a place, also by who pays for them.
    waiting: BTreeMap<(Digest, Payer), Told>,
}

type Digest = [u8; 32];
type Told = watch::Receiver<Option<Outcome>>;
type Tell = watch::Sender<Option<Outcome>>;

/// The outcome of one look.
#[derive(Clone, Debug)]
enum Outcome {
    Made(Arc<PreviewRow>),
    /// There was no place for it.
    Busy,
    /// This server is at fault.
    Broken(String),
}

/// Looks at a page, or joins a look at it that is under way. Errors: [`Error::Busy`], or a fault of our own.
pub(super) async fn make(app: &App, user: UserNum, url: &Url) -> Result<Arc<PreviewRow>> {
    let payers = payer::current();
    let (told, begins) = join(app, rows::digest(url), payers);
    if let Some((tell, in_line)) = begins {
        let look = Look { app: app.clone(), payers, url: url.clone(), user };
        // The look goes on when whoever has begun it hangs up: others may have joined it.
        app.env.spawn(look.run(in_line, tell));
    }
    match wait(app, told).await {
        Some(Outcome::Made(row)) => Ok(row),
        Some(Outcome::Busy) => Err(Error::Busy { retry_after: AGAIN }),
        Some(Outcome::Broken(why)) => Err(Error::broken(why)),
        None => Err(app.broke_off("a preview")),
    }
}

/// Joins a look that is under way, or takes the place of one that is to begin.
fn join(app: &App, digest: Digest, payers: Payers) -> (Told, Option<(Tell, InLine)>) {
    let waits_at = (digest, payers.first());
    let mut looks = app.previews.0.under_way.0.lock();
    if let Some(told) = looks.running.get(&digest).or_else(|| looks.waiting.get(&waits_at)) {
        return (told.clone(), None);
    }
    let (tell, told) = watch::channel(None);
    looks.waiting.insert(waits_at, told.clone());
    (told, Some((tell, InLine { app: app.clone(), waits_at })))
}

/// Waits for the outcome. None where the server stops.
async fn wait(app: &App, mut told: Told) -> Option<Outcome> {
    tokio::select! {
        biased;
        outcome = told.wait_for(Option::is_some) => outcome.ok()?.clone(),
        () = app.stopping.cancelled() => None,
    }
}

/// A look that waits for its place. Dropping this takes it away.
struct InLine {
    app: App,
    waits_at: (Digest, Payer),
}

impl Drop for InLine {
    fn drop(&mut self) {
        self.app.previews.0.under_way.0.lock().waiting.remove(&self.waits_at);
    }
}

impl InLine {
    /// Has the look run, unless another one of the same page does.
    fn begin(self, told: Told) -> Begun {
        let digest = self.waits_at.0;
        let mut looks = self.app.previews.0.under_way.0.lock();
        if let Some(other) = looks.running.get(&digest) {
            return Begun::Follows(other.clone());
        }
        looks.running.insert(digest, told);
        Begun::Runs(Running { app: self.app.clone(), digest })
    }
}

/// The outcome of a look once it has its place.
enum Begun {
    /// It runs, for all who ask from now on.
    Runs(Running),
    /// Another one runs already, and gives its outcome.
    Follows(Told),
}

/// A look that runs. Dropping this takes it away.
struct Running {
    app: App,
    digest: Digest,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.app.previews.0.under_way.0.lock().running.remove(&self.digest);
    }
}

struct Look {
    app: App,
    payers: Payers,
    url: Url,
    user: UserNum,
}

impl Look {
    async fn run(self, in_line: InLine, tell: Tell) {
        let told = tell.subscribe();
        let work = async {
            match in_line.begin(told) {
                Begun::Follows(other) => Err(other),
                Begun::Runs(running) => Ok((self.outcome().await, running)),
            }
        };
        let lanes = &self.app.previews.0.lanes;
        let (outcome, _running) = match lanes.run(&self.app.env, (self.payers, Pace::Unknown), work).await {
            Ok(Ok((outcome, running))) => (Some(outcome), Some(running)),
            // The place is free again while it waits for the other one.
            Ok(Err(other)) => (wait(&self.app, other).await, None),
            Err(NoPlace::Full | NoPlace::GaveWay) => (Some(Outcome::Busy), None),
        };
        if outcome.is_some() {
            tell.send_replace(outcome);
        }
    }

    async fn outcome(&self) -> Outcome {
        match make::make(&self.app, self.user, &self.url).await {
            Ok(row) => Outcome::Made(Arc::new(row)),
            Err(Error::Busy { .. }) => Outcome::Busy,
            Err(error) => Outcome::Broken(error.to_string()),
        }
    }
}
