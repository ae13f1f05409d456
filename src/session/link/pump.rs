//! The only writer of the number's event channel: it keeps the order, waits where the number is slow, and sends
//! `Closed` last of all.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use super::contact::{complete, contact_of};
use super::signals::{Queued, RawReceipt, Signals};
use crate::domain::close::CloseReason;
use crate::session::contract::{NotDurable, SessionEvent};
use crate::telemetry::failpoint::{self, Failpoint};

/// Watches what becomes of entries that the pump does not wait for.
#[derive(Default)]
struct Watched(JoinSet<()>);

impl Watched {
    fn watch(&mut self, what: Kind, signals: &Arc<Signals>) -> oneshot::Sender<Result<(), NotDurable>> {
        while self.0.try_join_next().is_some() {}
        let (durable, answer) = oneshot::channel();
        let signals = signals.clone();
        self.0.spawn(async move {
            let durable = matches!(answer.await, Ok(Ok(())));
            match (what, durable) {
                (Kind::Receipt, true) => signals.receipt_durable(),
                (Kind::Receipt, false) => signals.receipt_lost(),
                (Kind::Placeholder, true) => {}
                // WhatsApp was already told about this message: there is nobody to ask for it again.
                (Kind::Placeholder, false) => tracing::warn!("a placeholder did not reach the disk"),
            }
        });
        durable
    }
}

enum Kind {
    Receipt,
    Placeholder,
}

async fn finished(entry: Queued, signals: &Arc<Signals>, watched: &mut Watched) -> Option<Box<SessionEvent>> {
    match entry {
        Queued::Event(event) => Some(event),
        Queued::Receipt(receipt) => {
            let RawReceipt { whatsapp_ids, from, also, kind, at } = *receipt;
            let Some(mut from) = contact_of([&from].into_iter().chain(&also)) else {
                signals.receipt_durable();
                return None;
            };
            if let Some(client) = signals.client() {
                complete(&client, &mut from).await;
            }
            let durable = watched.watch(Kind::Receipt, signals);
            Some(Box::new(SessionEvent::Receipt { whatsapp_ids, from, kind, at, durable }))
        }
        Queued::Asked(asked) => {
            // One after the other, so that the oldest request is the first to be durable.
            failpoint::reach(Failpoint::RepeatAsked);
            match signals.backend() {
                Some(backend) if backend.note_asked(&asked).await.is_ok() => {
                    failpoint::reach(Failpoint::RepeatNoted);
                    signals.asked_durable();
                }
                _ => signals.receipt_lost(),
            }
            None
        }
        Queued::Confirmed(name) => {
            if let Some(backend) = signals.backend() {
                // A row that stays costs one more answer on the next connection.
                let _ = backend.forget_asked(&name.0, &name.1).await;
            }
            None
        }
        Queued::Placeholder(mut message) => {
            if let Some(client) = signals.client() {
                complete(&client, &mut message.chat).await;
            }
            let durable = watched.watch(Kind::Placeholder, signals);
            Some(Box::new(SessionEvent::Inbound { messages: vec![*message], durable }))
        }
    }
}

/// Hands entries on until `last` says why the session ended; then empties the queue and tells that.
/// When the number is gone its session is closed.
pub(super) async fn pump(
    signals: Arc<Signals>,
    mut entries: mpsc::Receiver<Queued>,
    events: mpsc::Sender<Box<SessionEvent>>,
    mut last: oneshot::Receiver<CloseReason>,
) {
    let mut watched = Watched::default();
    let reason = loop {
        let entry = tokio::select! {
            biased;
            reason = &mut last => break reason.unwrap_or(CloseReason::Crashed),
            entry = entries.recv() => entry,
        };
        let Some(entry) = entry else {
            break CloseReason::Crashed;
        };
        if let Some(event) = finished(entry, &signals, &mut watched).await
            && events.send(event).await.is_err()
        {
            signals.end(CloseReason::Requested);
        }
    };
    entries.close();
    while let Some(entry) = entries.recv().await {
        if let Some(event) = finished(entry, &signals, &mut watched).await {
            let _ = events.send(event).await;
        }
    }
    let _ = events.send(Box::new(SessionEvent::Closed(reason))).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::lifecycle::LinkBy;

    #[tokio::test]
    async fn closed_is_the_last_event_and_nothing_before_it_is_lost() {
        let (queue, entries) = mpsc::channel(8);
        let (late, _) = mpsc::channel(1);
        let signals = Signals::new(None, LinkBy::QrCode, queue, late);
        let (events, mut told) = mpsc::channel(16);
        let (finish, last) = oneshot::channel();
        for _ in 0..5 {
            signals.tell(SessionEvent::Alive);
        }
        finish.send(CloseReason::Recycled).unwrap();
        pump(signals.clone(), entries, events, last).await;
        signals.tell(SessionEvent::Alive);
        let mut names = Vec::new();
        while let Some(event) = told.recv().await {
            names.push(format!("{event:?}"));
        }
        assert_eq!(names.len(), 6);
        assert_eq!(names[5], "Closed(Recycled)");
    }

    #[tokio::test]
    async fn a_number_that_is_gone_closes_its_session() {
        let (queue, entries) = mpsc::channel(8);
        let (late, _) = mpsc::channel(1);
        let signals = Signals::new(None, LinkBy::QrCode, queue, late);
        let (events, told) = mpsc::channel(16);
        drop(told);
        let (finish, last) = oneshot::channel();
        signals.tell(SessionEvent::Alive);
        let pumping = tokio::spawn(pump(signals.clone(), entries, events, last));
        signals.woken().await;
        assert_eq!(signals.ending(crate::session::link::stanza::Certainty::EndNow), Some(CloseReason::Requested));
        finish.send(CloseReason::Requested).unwrap();
        pumping.await.unwrap();
    }
}
