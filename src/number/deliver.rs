//! One webhook attempt, as an owned task: read the event, make the body, POST, report.

use std::sync::Arc;

use ractor::ActorRef;

use super::environment::Environment;
use super::message::{Inner, NumberMessage};
use crate::domain::budget::Class;
use crate::domain::delivery::{AttemptEnd, Dispatch};
use crate::domain::endpoint::Endpoint;
use crate::domain::event::{EventBody, EventKind};
use crate::domain::phone::Phone;
use crate::domain::webhook::Answer;
use crate::store::number_store::NumberStore;
use crate::telemetry::failpoint::{self, Failpoint};
use crate::telemetry::metrics;
use crate::webhook::client::{Delivery, Report};
use crate::webhook::payload;
use crate::webhook::signature::Secret;

pub(super) struct DeliveryTask {
    pub(super) actor: ActorRef<NumberMessage>,
    pub(super) environment: Arc<Environment>,
    pub(super) store: NumberStore,
    pub(super) own: Phone,
    pub(super) endpoint: Endpoint,
    pub(super) outgoing: Dispatch,
}

impl DeliveryTask {
    pub(super) async fn run(self) {
        let (kind, report) = self.report().await;
        let end = AttemptEnd {
            endpoint: self.endpoint.ordinal,
            sequence: self.outgoing.row.sequence,
            answer: report.answer,
            duration_ms: u64::try_from(report.elapsed.as_millis()).unwrap_or(u64::MAX),
            excerpt: report.excerpt,
            kind,
            jitter: self.environment.random.share(),
        };
        let _ = self.actor.cast(Inner::Attempted(end).into());
    }

    async fn report(&self) -> (Option<EventKind>, Report) {
        let class = if self.outgoing.background { Class::Background } else { Class::Live };
        let room = &self.environment.webhook_room;
        let Some(_permit) = room.take(self.store.number(), self.endpoint.ordinal, class) else {
            metrics::webhook_crowded(class.name());
            return (None, Report::not_sent(Answer::Crowded));
        };
        let (kind, report) = match self.attempt().await {
            Some((kind, report)) => (Some(kind), report),
            // Nothing will ever make this delivery possible.
            None => (None, Report::not_sent(Answer::Unreadable)),
        };
        metrics::webhook_attempt(report.answer.outcome(), report.elapsed);
        (kind, report)
    }

    async fn attempt(&self) -> Option<(EventKind, Report)> {
        let event = self.store.event(self.outgoing.row.event).await.ok()??;
        if matches!(event.body, EventBody::Erased(_)) {
            // It told of a contact that was erased: there is nothing to tell any more.
            return None;
        }
        let body = payload::body(&event, &self.own, &self.outgoing).ok()?;
        let now = self.environment.clock.now();
        let secrets = self.endpoint.signing_secrets(now).iter();
        let secrets: Vec<Secret> = secrets.filter_map(|secret| Secret::parse(secret).ok()).collect();
        let delivery = Delivery {
            url: &self.endpoint.url,
            secrets: &secrets,
            event: event.id,
            marks: payload::marks(&self.outgoing),
            body,
            now,
        };
        failpoint::reach(Failpoint::WebhookBeforeRequest);
        let report = self.environment.webhooks.deliver(delivery).await;
        failpoint::reach(Failpoint::WebhookAfterAnswer);
        Some((event.kind(), report))
    }
}
