//! The event stream of one number: read from the log on disk, then waited for. Nothing is pushed: the next step is read
//! when the consumer asks, so a slow one costs no memory, and a reader never misses what the log holds.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::drain::Drain;
use super::error::{ApiError, Reason};
use super::service::Api;
use super::token::{self, TokenKind};
use crate::domain::access::Caller;
use crate::domain::event::{Event, EventBody, EventFilter, EventKind};
use crate::domain::id::{EventSeq, NumberId};
use crate::domain::time::Timestamp;
use crate::number::handle::NumberHandle;
use crate::store::number_store::NumberStore;

/// Events read from disk at once.
const PAGE: usize = 50;
/// Text of events held for a stream, in bytes, beyond the first.
const PAGE_TEXT_MAX: usize = 256 * 1024;
/// How often a stream looks whether its key still lives.
const KEY_CHECK: Duration = Duration::from_secs(10);
/// Most types a filter may name.
const TYPES_MAX: usize = 64;
const PROGRESS_DEFAULT: Duration = Duration::from_secs(30);
const PROGRESS_MIN: Duration = Duration::from_secs(1);
const PROGRESS_MAX: Duration = Duration::from_hours(1);
/// Pause before a number that restarts is looked at again.
const RESTART_PAUSE: Duration = Duration::from_millis(250);
/// Cursors with a meaning of their own.
const FROM_OLDEST: &str = "";
const FROM_NOW: &str = "now";

/// What a caller wants to follow.
#[derive(Debug, Default)]
pub struct StreamOrder<'a> {
    /// The number, as `Api::number` takes it.
    pub number: &'a str,
    /// Only these types; empty for all.
    pub types: &'a [String],
    /// Where to go on; empty for the oldest event, `now` for what happens from now on.
    pub cursor: &'a str,
    /// How often to tell of progress.
    pub progress_interval: Option<Duration>,
    /// The public part of the caller's key: the stream ends with it.
    pub key: String,
}

/// One step of a stream.
#[derive(Debug)]
pub enum Step {
    /// An event that passed the filter.
    Event(Box<Event>),
    /// Only the cursor moved, or nothing happened.
    Progress {
        /// Everything recorded so far was given.
        caught_up: bool,
    },
}

/// An open stream.
#[derive(Debug)]
pub struct EventStream {
    handle: Arc<NumberHandle>,
    filter: EventFilter,
    position: EventSeq,
    /// Whether the position was given out before, so that what follows it must be there.
    expects_next: bool,
    page: VecDeque<Event>,
    news: watch::Receiver<EventSeq>,
    deleted: watch::Receiver<bool>,
    drain: Drain,
    interval: Duration,
    caught_up: bool,
    api: Arc<Api>,
    key: String,
}

/// Why a wait for news ended.
enum Woken {
    News,
    Time,
    End,
}

impl Api {
    /// Opens a stream.
    ///
    /// # Errors
    /// See the contract.
    pub fn events(self: &Arc<Self>, caller: Caller, order: &StreamOrder<'_>) -> Result<EventStream, ApiError> {
        let number = self.number_meant(caller, order.number)?.id;
        let filter = filter_of(order.types)?;
        let interval = order.progress_interval.unwrap_or(PROGRESS_DEFAULT).clamp(PROGRESS_MIN, PROGRESS_MAX);
        let handle = self.handle_of(number)?;
        // Before the log is read, so that nothing falls between the two.
        let (news, deleted) = (handle.watch_events(), handle.watch_deleted());
        let (position, expects_next) = match order.cursor {
            FROM_NOW => {
                // While it starts, the newest event is not known yet.
                self.store_of(number)?;
                (*news.borrow(), true)
            }
            FROM_OLDEST => (EventSeq(0), false),
            cursor => (position_of(number, cursor)?, true),
        };
        Ok(EventStream {
            handle,
            filter,
            position,
            expects_next,
            page: VecDeque::new(),
            news,
            deleted,
            drain: self.drain(),
            interval,
            caught_up: false,
            api: self.clone(),
            key: order.key.clone(),
        })
    }
}

impl EventStream {
    /// The next step; waits for it.
    ///
    /// # Errors
    /// `Draining`, `CursorExpired`, `NumberNotFound` when it was deleted, `Unauthorized` when the key was revoked; the
    /// stream is over then, and the metadata say where to go on.
    pub async fn next(&mut self) -> Result<Step, ApiError> {
        let mut waited = Duration::ZERO;
        loop {
            self.check()?;
            while let Some(event) = self.page.pop_front() {
                self.position = event.id.seq;
                if matches!(event.body, EventBody::Erased(_)) {
                    continue;
                }
                if self.filter.wants(event.kind()) {
                    return Ok(Step::Event(Box::new(event)));
                }
            }
            if self.read_page().await? {
                continue;
            }
            if !self.caught_up {
                self.caught_up = true;
                return Ok(Step::Progress { caught_up: true });
            }
            let pause = KEY_CHECK.min(self.interval.saturating_sub(waited));
            if matches!(self.wait(pause).await, Woken::Time) {
                waited += pause;
                if waited >= self.interval {
                    return Ok(Step::Progress { caught_up: true });
                }
            }
        }
    }

    async fn wait(&mut self, pause: Duration) -> Woken {
        tokio::select! {
            _ = self.news.changed() => Woken::News,
            _ = self.deleted.changed() => Woken::End,
            () = self.drain.begun() => Woken::End,
            () = tokio::time::sleep(pause) => Woken::Time,
        }
    }

    /// Whether the stream may go on.
    fn check(&self) -> Result<(), ApiError> {
        let meta = self.api.parts.store.meta();
        let end = if self.drain.has_begun() {
            Reason::Draining
        } else if *self.deleted.borrow() || meta.number(self.handle.id()).is_none() {
            Reason::NumberNotFound
        } else if meta.key(&self.key).is_none_or(|key| key.expires_at.is_some_and(|end| end <= self.now())) {
            Reason::Unauthorized
        } else {
            return Ok(());
        };
        Err(ApiError::from(end).with("cursor", self.cursor()))
    }

    fn now(&self) -> Timestamp {
        self.api.parts.clock.now()
    }

    /// The position after the last step.
    #[must_use]
    pub fn cursor(&self) -> String {
        token::encode(TokenKind::Events, [self.handle.id().0, self.position.0])
    }

    /// Whether there is more to do before waiting for news.
    async fn read_page(&mut self) -> Result<bool, ApiError> {
        // The log may hold events that are not synced yet; they are not given out.
        let durable = *self.news.borrow_and_update();
        if self.position >= durable {
            return Ok(false);
        }
        let Ok(store) = self.handle.store() else {
            // It restarts; its log is on disk and comes back with it.
            tokio::time::sleep(RESTART_PAUSE).await;
            return Ok(true);
        };
        let begins_after = self.log_begins_after(&store, durable).await?;
        if self.position < begins_after {
            self.position = begins_after;
            if self.expects_next {
                return Err(ApiError::from(Reason::CursorExpired).with("oldest_cursor", self.cursor()));
            }
            return Ok(true);
        }
        let mut page = VecDeque::new();
        let (mut expected, mut text) = (self.position.0 + 1, 0);
        for event in store.events(self.position, PAGE).await? {
            // Whatever removes events moves the beginning of the log first: a gap is looked at again.
            if event.id.seq > durable || event.id.seq.0 != expected || text > PAGE_TEXT_MAX {
                break;
            }
            expected += 1;
            text += text_of(&event);
            page.push_back(event);
        }
        self.expects_next |= !page.is_empty();
        if page.is_empty() {
            // What was there a moment ago is being removed; what replaces it is known in a moment.
            tokio::time::sleep(RESTART_PAUSE).await;
        }
        self.page = page;
        Ok(true)
    }

    /// The last event that may not be given out any more: removed, or older than what the number shows.
    async fn log_begins_after(&self, store: &NumberStore, durable: EventSeq) -> Result<EventSeq, ApiError> {
        let record = self.api.parts.store.meta().number(self.handle.id()).ok_or(Reason::NumberNotFound)?;
        let oldest = record.retention.streamed_from(self.now());
        let mut after = self.position.max(self.handle.event_floor());
        // Nearly always the next event may be given out.
        let mut limit = 1;
        loop {
            let events = store.events(after, limit).await?;
            let Some(first) = events.first().filter(|event| event.id.seq <= durable) else { return Ok(after) };
            if first.at >= oldest {
                // A hole before it: what lay there is gone.
                return Ok(EventSeq(first.id.seq.0 - 1));
            }
            let aged = events.iter().take_while(|event| event.at < oldest && event.id.seq <= durable);
            after = aged.last().map_or(after, |event| event.id.seq);
            limit = PAGE;
        }
    }
}

fn text_of(event: &Event) -> usize {
    match &event.body {
        EventBody::Received(body) => body.text.len(),
        EventBody::Outbound(_)
        | EventBody::NumberCreated
        | EventBody::NumberConnected
        | EventBody::NumberDisconnected { .. }
        | EventBody::NumberDegraded { .. }
        | EventBody::NumberRecovered
        | EventBody::WebhookDisabled { .. }
        | EventBody::Erased(_) => 0,
    }
}

fn position_of(number: NumberId, cursor: &str) -> Result<EventSeq, ApiError> {
    match token::decode(TokenKind::Events, cursor) {
        Some([of, seq]) if of == number.0 => Ok(EventSeq(seq)),
        _ => Err(Reason::CursorInvalid.into()),
    }
}

fn filter_of(types: &[String]) -> Result<EventFilter, ApiError> {
    if types.is_empty() {
        return Ok(EventFilter::All);
    }
    if types.len() > TYPES_MAX {
        return Err(ApiError::field("types", format!("must have at most {TYPES_MAX} entries")));
    }
    EventFilter::parse(types.iter().map(String::as_str)).map_err(|_| {
        let known: Vec<_> = EventKind::ALL.iter().map(|kind| kind.name()).collect();
        ApiError::field("types", format!("must be among {}", known.join(", ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_belongs_to_its_number() {
        let cursor = token::encode(TokenKind::Events, [7, 42]);
        assert_eq!(position_of(NumberId(7), &cursor), Ok(EventSeq(42)));
        assert_eq!(position_of(NumberId(8), &cursor).unwrap_err().reason, Reason::CursorInvalid);
        assert_eq!(position_of(NumberId(7), "junk").unwrap_err().reason, Reason::CursorInvalid);
    }

    #[test]
    fn no_types_are_all_types_and_a_typo_is_named() {
        assert_eq!(filter_of(&[]).unwrap(), EventFilter::All);
        let some = filter_of(&["message.sent".to_owned()]).unwrap();
        assert!(some.wants(EventKind::MessageSent) && !some.wants(EventKind::MessageRead));
        let error = filter_of(&["message.snet".to_owned()]).unwrap_err();
        assert_eq!(error.violations[0].field, "types");
    }
}
