//! One webhook attempt, as an owned task: read the event, make the body, POST, report.

use std::sync::Arc;

use ractor::ActorRef;

use super::environment::Environment;
use super::message::{Inner, NumberMessage};
use crate::domain::change::AttemptRecord;
use crate::domain::delivery::{Attempted, DeliveryRow, Endpoint};
use crate::domain::phone::Phone;
use crate::domain::webhook::{Answer, Verdict, verdict};
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
    pub(super) row: DeliveryRow,
}

impl DeliveryTask {
    pub(super) async fn run(self) {
        let Some(report) = self.attempt().await else {
            // The event is not readable: nothing will ever make this delivery possible.
            self.report(Attempted::Dead, Answer::Refused, 0);
            return;
        };
        let attempt = u32::from(self.row.attempts) + 1;
        let attempted = match verdict(report.answer, attempt, self.environment.random.share()) {
            Verdict::Delivered => Attempted::Delivered,
            Verdict::Retry(pause) => Attempted::Again(pause),
            Verdict::Disable => Attempted::EndpointGone,
            Verdict::DeadLetter => Attempted::Dead,
        };
        metrics::webhook_attempt(report.answer.outcome(), report.elapsed);
        if matches!(attempted, Attempted::Dead | Attempted::EndpointGone) {
            metrics::webhook_dead_letter();
        }
        self.report(attempted, report.answer, u64::try_from(report.elapsed.as_millis()).unwrap_or(u64::MAX));
    }

    async fn attempt(&self) -> Option<Report> {
        let event = self.store.event(self.row.event).await.ok()??;
        let body = payload::body(&event, &self.own).ok()?;
        let secrets: Vec<Secret> =
            self.endpoint.secrets.iter().filter_map(|secret| Secret::parse(secret).ok()).collect();
        let now = self.environment.clock.now();
        let delivery = Delivery { url: &self.endpoint.url, secrets: &secrets, event: event.id, body, now };
        failpoint::reach(Failpoint::WebhookBeforeRequest);
        let report = self.environment.webhooks.deliver(delivery).await;
        failpoint::reach(Failpoint::WebhookAfterAnswer);
        Some(report)
    }

    fn report(&self, attempted: Attempted, answer: Answer, duration_ms: u64) {
        let status = match answer {
            Answer::Status { code, .. } => Some(code),
            Answer::Silence | Answer::Refused => None,
        };
        let record = AttemptRecord {
            endpoint: self.endpoint.ordinal,
            event: self.row.event,
            attempt: self.row.attempts.saturating_add(1),
            at: self.environment.clock.now(),
            status,
            outcome: answer.outcome().to_owned(),
            duration_ms,
        };
        let _ = self.actor.cast(Inner::Attempted(record, attempted).into());
    }
}
