//! Capacities of numbers: at this moment, or followed. A watcher looks at what the numbers show, every so often; while
//! nobody watches, no number does anything for it.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::OwnedSemaphorePermit;

use super::drain::Drain;
use super::error::{ApiError, Reason};
use super::service::Api;
use super::token::{self, TokenKind};
use crate::domain::access::Caller;
use crate::domain::capacity::{Capacity, Health, Limiting, Outlook};
use crate::domain::id::NumberId;
use crate::domain::time::Timestamp;
use crate::number::handle::NumberHandle;

/// Streams that follow capacities at once.
pub const WATCHERS_MAX: usize = 64;
/// Numbers that a request may list.
const LISTED_MAX: usize = 1000;
/// Entries of one step.
const ENTRIES_MAX: usize = 500;
const INTERVAL_DEFAULT: Duration = Duration::from_millis(100);
const INTERVAL_MIN: Duration = Duration::from_millis(50);
const INTERVAL_MAX: Duration = Duration::from_secs(60);
const PROGRESS_DEFAULT: Duration = Duration::from_secs(30);
const PROGRESS_MIN: Duration = Duration::from_secs(1);
const PROGRESS_MAX: Duration = Duration::from_hours(1);
/// How often a stream looks which numbers there are, and whether its key still lives.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What a caller wants to follow.
#[derive(Debug, Default)]
pub struct WatchOrder<'a> {
    /// These numbers; none for all.
    pub numbers: &'a [String],
    /// Where to go on.
    pub cursor: &'a str,
    /// How long changes are gathered.
    pub interval: Option<Duration>,
    /// How often to tell that nothing changed.
    pub progress_interval: Option<Duration>,
    /// The public part of the caller's key: the stream ends with it.
    pub key: String,
}

/// The capacity of a number at a moment.
#[derive(Debug, Clone, Copy)]
pub struct CapacityCard {
    /// Whose.
    pub number: NumberId,
    /// What.
    pub capacity: Capacity,
    /// When.
    pub at: Timestamp,
}

/// One step of a watch.
#[derive(Debug, Default)]
pub struct WatchStep {
    /// What is new or changed.
    pub changed: Vec<CapacityCard>,
    /// What is gone.
    pub removed: Vec<NumberId>,
    /// A snapshot begins.
    pub reset: bool,
    /// Everything has been told.
    pub caught_up: bool,
}

/// Whose capacities are meant.
#[derive(Debug, Clone)]
enum Scope {
    Listed(Vec<NumberId>),
    All(Caller),
}

/// A number that is followed: it looks at what waits as long as this lives.
#[derive(Debug)]
struct Followed(Arc<NumberHandle>);

impl Followed {
    fn begin(handle: Arc<NumberHandle>) -> Self {
        handle.watch_capacity(true);
        if handle.stats().capacity().is_some_and(|basis| basis.waiting > 0) {
            // It shows the answer as well.
            drop(handle.look());
        }
        Self(handle)
    }
}

impl Drop for Followed {
    fn drop(&mut self) {
        self.0.watch_capacity(false);
    }
}

/// An open watch.
#[derive(Debug)]
pub struct CapacityWatch {
    api: Arc<Api>,
    scope: Scope,
    followed: HashMap<NumberId, Followed>,
    /// What was told of each, and by which revision.
    told: HashMap<NumberId, (u64, Capacity)>,
    pending: VecDeque<CapacityCard>,
    removed: Vec<NumberId>,
    reset: bool,
    /// Everything up to this moment is told or pending.
    seen_at: Timestamp,
    caught_up: bool,
    interval: Duration,
    progress: Duration,
    quiet: Duration,
    since_look: Duration,
    drain: Drain,
    key: String,
    _place: OwnedSemaphorePermit,
}

impl Api {
    fn scope_of(&self, caller: Caller, numbers: &[String]) -> Result<Scope, ApiError> {
        if numbers.len() > LISTED_MAX {
            return Err(ApiError::field("numbers", format!("must have at most {LISTED_MAX} entries")));
        }
        match (caller, numbers) {
            (Caller::Tenant(_), []) => Ok(Scope::All(caller)),
            (_, []) => Ok(Scope::Listed(vec![self.number_meant(caller, "")?.id])),
            (_, named) => {
                let ids = named.iter().map(|named| Ok(self.number_meant(caller, named)?.id));
                Ok(Scope::Listed(ids.collect::<Result<_, ApiError>>()?))
            }
        }
    }

    fn handles_of(&self, scope: &Scope) -> Vec<Arc<NumberHandle>> {
        let directory = self.parts.fleet.directory();
        match scope {
            Scope::Listed(ids) => ids.iter().filter_map(|id| directory.get(*id)).collect(),
            Scope::All(Caller::Tenant(tenant)) => {
                let all = self.parts.store.meta().numbers(Some(*tenant));
                all.iter().filter_map(|record| directory.get(record.id)).collect()
            }
            Scope::All(_) => Vec::new(),
        }
    }

    /// The capacities at this moment.
    ///
    /// # Errors
    /// See the contract.
    pub async fn capacities(&self, caller: Caller, numbers: &[String]) -> Result<Vec<CapacityCard>, ApiError> {
        let handles = self.handles_of(&self.scope_of(caller, numbers)?);
        let mut cards = Vec::with_capacity(handles.len());
        for handle in handles {
            if handle.stats().capacity().is_some_and(|basis| basis.waiting > 0)
                && let Some(looked) = handle.look()
            {
                // One that just ends shows what it last did.
                let _ = looked.await;
            }
            cards.push(card_of(&handle, self.parts.clock.now()));
        }
        Ok(cards)
    }

    /// Opens a watch.
    ///
    /// # Errors
    /// See the contract.
    pub fn watch_capacity(self: &Arc<Self>, caller: Caller, order: &WatchOrder<'_>) -> Result<CapacityWatch, ApiError> {
        let scope = self.scope_of(caller, order.numbers)?;
        let cursor = match order.cursor {
            "" => None,
            cursor => Some(token::decode(TokenKind::Capacity, cursor).ok_or(Reason::CursorInvalid)?),
        };
        let place = self.capacity_watchers.clone().try_acquire_owned().map_err(|_| Reason::TooManyWatchers)?;
        let mut watch = CapacityWatch {
            api: self.clone(),
            scope,
            followed: HashMap::new(),
            told: HashMap::new(),
            pending: VecDeque::new(),
            removed: Vec::new(),
            reset: true,
            seen_at: Timestamp(0),
            caught_up: false,
            interval: order.interval.unwrap_or(INTERVAL_DEFAULT).clamp(INTERVAL_MIN, INTERVAL_MAX),
            progress: order.progress_interval.unwrap_or(PROGRESS_DEFAULT).clamp(PROGRESS_MIN, PROGRESS_MAX),
            quiet: Duration::ZERO,
            since_look: Duration::ZERO,
            drain: self.drain(),
            key: order.key.clone(),
            _place: place,
        };
        watch.follow();
        watch.removed.clear();
        if let Some([mark, seen_at]) = cursor
            && mark == watch.mark()
        {
            watch.resume(Timestamp(seen_at));
        }
        Ok(watch)
    }
}

impl CapacityWatch {
    /// The next step; waits for it.
    ///
    /// # Errors
    /// `Draining`, or `Unauthorized` when the key was revoked; the stream is over then, and the metadata say where to go on.
    pub async fn next(&mut self) -> Result<WatchStep, ApiError> {
        loop {
            self.check()?;
            if self.pending.is_empty() && self.removed.is_empty() {
                self.look();
            }
            let reset = std::mem::take(&mut self.reset);
            if reset || !self.pending.is_empty() || !self.removed.is_empty() {
                let most = self.pending.len().min(ENTRIES_MAX);
                let changed = self.pending.drain(..most).collect();
                let removed = std::mem::take(&mut self.removed);
                self.quiet = Duration::ZERO;
                self.caught_up = self.pending.is_empty();
                return Ok(WatchStep { changed, removed, reset, caught_up: self.caught_up });
            }
            if !self.caught_up || self.quiet >= self.progress {
                self.caught_up = true;
                self.quiet = Duration::ZERO;
                return Ok(WatchStep { caught_up: true, ..WatchStep::default() });
            }
            tokio::select! {
                () = self.drain.begun() => {}
                () = tokio::time::sleep(self.interval) => {}
            }
            self.quiet += self.interval;
            self.since_look += self.interval;
            if self.since_look >= LOOK_EVERY {
                self.since_look = Duration::ZERO;
                self.follow();
            }
        }
    }

    /// Whether the stream may go on.
    fn check(&self) -> Result<(), ApiError> {
        let meta = self.api.parts.store.meta();
        let now = self.api.parts.clock.now();
        let end = if self.drain.has_begun() {
            Reason::Draining
        } else if meta.key(&self.key).is_none_or(|key| key.expires_at.is_some_and(|end| end <= now)) {
            Reason::Unauthorized
        } else {
            return Ok(());
        };
        Err(ApiError::from(end).with("cursor", self.cursor()))
    }

    /// Where to go on after the last step.
    #[must_use]
    pub fn cursor(&self) -> String {
        match self.caught_up {
            true => token::encode(TokenKind::Capacity, [self.mark(), self.seen_at.0]),
            false => String::new(),
        }
    }

    /// Tells this life of the daemon and this set of numbers from others.
    fn mark(&self) -> u64 {
        let numbers = self.followed.keys().fold(0u64, |mark, id| mark.wrapping_add(id.0.wrapping_mul(id.0 | 1)));
        numbers ^ self.api.life
    }

    /// Looks which numbers there are.
    fn follow(&mut self) {
        let handles = self.api.handles_of(&self.scope);
        let mut gone = std::mem::take(&mut self.followed);
        for handle in handles {
            let id = handle.id();
            let followed = gone.remove(&id).unwrap_or_else(|| Followed::begin(handle));
            self.followed.insert(id, followed);
        }
        for id in gone.into_keys() {
            self.told.remove(&id);
            self.removed.push(id);
        }
    }

    /// Goes on where an earlier watch was: what has not changed since is known to the client.
    fn resume(&mut self, seen_at: Timestamp) {
        self.reset = false;
        for (id, followed) in &self.followed {
            let handle = &followed.0;
            let unchanged = handle.stats().capacity().is_some_and(|basis| basis.changed_at < seen_at);
            if unchanged {
                self.told.insert(*id, (revision_of(handle), card_of(handle, seen_at).capacity));
            }
        }
    }

    fn look(&mut self) {
        self.seen_at = self.api.parts.clock.now();
        for (id, followed) in &self.followed {
            let revision = revision_of(&followed.0);
            let card = card_of(&followed.0, self.seen_at);
            // Also what came back to what it was: whoever reckons with the last word must hear that it holds again.
            let news = |(known, told): &(u64, Capacity)| *known != revision || card.capacity.is_news_after(told);
            if self.told.get(id).is_none_or(news) {
                self.told.insert(*id, (revision, card.capacity));
                self.pending.push_back(card);
            }
        }
    }
}

fn revision_of(handle: &NumberHandle) -> u64 {
    handle.stats().capacity().map_or(0, |basis| basis.revision)
}

/// What a number shows; one that has not started, or is not running, could send nothing.
fn card_of(handle: &NumberHandle, at: Timestamp) -> CapacityCard {
    let state = handle.view_state();
    let shown = handle.stats().capacity().filter(|basis| basis.state == state);
    let capacity = shown.map(|basis| basis.at(at)).unwrap_or_else(|| {
        let outlook = Outlook { at: None, limiting: Limiting::Disconnected };
        Capacity {
            state,
            health: if state.next_attempt().is_some() { Health::Recovering } else { Health::Down },
            since: handle.view().since,
            available_now: 0,
            sustainable_rate: 0.0,
            queue_depth: handle.stats().outbox.depth(),
            new_recipients_left: None,
            outlook,
            outlook_new: outlook,
        }
    });
    CapacityCard { number: handle.id(), capacity, at }
}
