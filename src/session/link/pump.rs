//! The only writer of the number's event channel: it keeps the order, waits where the number is slow, and sends
//! `Closed` last of all.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use super::contact::{complete, contact_of};
use super::signals::{Queued, RawReceipt, Signals};
use crate::domain::close::CloseReason;
use crate::session::contract::{NotDurable, SessionEvent};

/// Watches what becomes of placeholders. WhatsApp was already told about these messages, so nobody waits.
#[derive(Default)]
struct Placeholders(JoinSet<()>);

impl Placeholders {
    fn watch(&mut self, durable: oneshot::Receiver<Result<(), NotDurable>>) {
        while self.0.try_join_next().is_some() {}
        self.0.spawn(async move {
            if !matches!(durable.await, Ok(Ok(()))) {
                tracing::warn!("a placeholder did not reach the disk");
            }
        });
    }
}

async fn finished(entry: Queued, signals: &Signals, placeholders: &mut Placeholders) -> Option<SessionEvent> {
    match entry {
        Queued::Event(event) => Some(event),
        Queued::Receipt(receipt) => {
            let RawReceipt { whatsapp_ids, from, also, kind, at } = *receipt;
            let mut from = contact_of([&from].into_iter().chain(&also))?;
            if let Some(client) = signals.client() {
                complete(&client, &mut from).await;
            }
            Some(SessionEvent::Receipt { whatsapp_ids, from, kind, at })
        }
        Queued::Placeholder(mut message) => {
            if let Some(client) = signals.client() {
                complete(&client, &mut message.chat).await;
            }
            let (durable, answer) = oneshot::channel();
            placeholders.watch(answer);
            Some(SessionEvent::Inbound { messages: vec![*message], durable })
        }
    }
}

/// Hands entries on until `last` says why the session ended; then empties the queue and tells that.
/// When the number is gone its session is closed.
pub(super) async fn pump(
    signals: Arc<Signals>,
    mut entries: mpsc::Receiver<Queued>,
    events: mpsc::Sender<SessionEvent>,
    mut last: oneshot::Receiver<CloseReason>,
) {
    let mut placeholders = Placeholders::default();
    let reason = loop {
        let entry = tokio::select! {
            biased;
            reason = &mut last => break reason.unwrap_or(CloseReason::Crashed),
            entry = entries.recv() => entry,
        };
        let Some(entry) = entry else {
            break CloseReason::Crashed;
        };
        if let Some(event) = finished(entry, &signals, &mut placeholders).await
            && events.send(event).await.is_err()
        {
            signals.end(CloseReason::Requested);
        }
    };
    entries.close();
    while let Some(entry) = entries.recv().await {
        if let Some(event) = finished(entry, &signals, &mut placeholders).await {
            let _ = events.send(event).await;
        }
    }
    let _ = events.send(SessionEvent::Closed(reason)).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn closed_is_the_last_event_and_nothing_before_it_is_lost() {
        let (queue, entries) = mpsc::channel(8);
        let (late, _) = mpsc::channel(1);
        let signals = Signals::new(None, queue, late);
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
        let signals = Signals::new(None, queue, late);
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
