//! The comparison at the end, from outside: what callers were promised and phones did, against what phones show,
//! histories hold, streams and webhooks told, and the sandbox counted.

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use switchboard::api::grpc::proto;
use switchboard::api::grpc::proto::stream_events_response::Step;
use switchboard::api::grpc::proto::{MessageDirection, MessageStatus};
use tokio::time::sleep;

use crate::load::{Record, Shared, Told, described};
use crate::world::{World, neighbour};

/// Violations that have not changed for so long are not going to.
const SETTLED_AFTER: Duration = Duration::from_secs(60);
/// Longest a backlog may take that is still being worked off.
const SETTLED_WITHIN: Duration = Duration::from_secs(600);
/// Differences shown of one list.
const SHOWN: usize = 5;

/// What a run came to.
#[derive(Debug, Default)]
pub struct Verdict {
    pub violations: Vec<String>,
    /// Sends answered with `Ok`, and answers that stayed out.
    pub accepted: usize,
    pub unknown: u64,
    /// Written by phones to our numbers, numbers of ours among each other included.
    pub inbound: usize,
    /// Times a phone got a message again.
    pub wire_repeats: u64,
    pub events: usize,
    pub webhooks_repeated: u64,
    /// Messages whose delivery receipt went missing.
    pub without_receipt: usize,
    /// Rows for messages that could not be decrypted.
    pub undecryptable: usize,
    /// Chats in which a message came late because its sender had to be asked for it again.
    pub late: usize,
    pub stats: serde_json::Value,
}

/// Compares until everything agrees, or nothing changes any more.
pub async fn settle(world: &World, shared: &Shared, record: &Record) -> Verdict {
    let begun = Instant::now();
    let (mut last, mut changed) = (Vec::new(), Instant::now());
    loop {
        let mut verdict = compare(world, shared, record).await;
        if verdict.violations != last {
            (last, changed) = (verdict.violations.clone(), Instant::now());
        }
        if last.is_empty() || changed.elapsed() > SETTLED_AFTER || begun.elapsed() > SETTLED_WITHIN {
            verdict.violations.extend(shared.problems());
            verdict.violations.extend(world.sink.problems());
            return verdict;
        }
        sleep(Duration::from_millis(250)).await;
    }
}

async fn compare(world: &World, shared: &Shared, record: &Record) -> Verdict {
    let mut verdict = Verdict {
        accepted: record.sent.iter().map(|chat| chat.sent.len()).sum(),
        unknown: record.sent.iter().map(|chat| chat.unknown).sum(),
        stats: world.phones.stats().await.unwrap(),
        ..Verdict::default()
    };
    for counter in ["signal_keys_reused", "devices_connected_twice", "backlog_overflows"] {
        if verdict.stats[counter] != 0 {
            verdict.violations.push(format!("the sandbox counts {} {counter}", verdict.stats[counter]));
        }
    }
    phones(world, record, &mut verdict).await;
    for index in 0..world.numbers.len() {
        history(world, record, index, &mut verdict).await;
        events(world, &shared.told(index), index, &mut verdict).await;
    }
    verdict
}

/// Every accepted message is shown once, in the order of acceptance, bytes equal, and nothing else.
async fn phones(world: &World, record: &Record, verdict: &mut Verdict) {
    for chat in &record.sent {
        let from = &world.numbers[chat.number].phone;
        let lines = world.phones.shown(&chat.peer).await.unwrap();
        let lines: Vec<_> =
            lines.iter().filter(|line| line["direction"] == "in" && line["from"] == from.as_str()).collect();
        verdict.wire_repeats +=
            lines.iter().map(|line| line["times_received"].as_u64().unwrap_or(1).saturating_sub(1)).sum::<u64>();
        let shown = lines.iter().map(|line| (word(line, "id"), word(line, "text")));
        let sent = chat.sent.iter().map(|sent| (sent.whatsapp_id.clone(), sent.text.clone()));
        let what = format!("I1-I3: the phone {} shows of number {}", chat.peer, chat.number);
        let (sent, shown) = (sent.collect::<Vec<_>>(), shown.collect::<Vec<_>>());
        // A phone that lost its keys shows what it had to ask for again behind what came meanwhile.
        let forgot = world.forgetful.lock().unwrap().contains(&chat.peer);
        if forgot && sent != shown && sorted(&sent) == sorted(&shown) {
            verdict.late += 1;
            continue;
        }
        differ(&what, &sent, &shown, verdict);
    }
}

fn sorted<T: Ord + Clone>(list: &[T]) -> Vec<T> {
    let mut list = list.to_vec();
    list.sort();
    list
}

fn word(line: &serde_json::Value, name: &str) -> String {
    line[name].as_str().unwrap_or_default().to_owned()
}

/// Every message is in the history once, in order per chat, with the status its receipts say.
async fn history(world: &World, record: &Record, index: usize, verdict: &mut Verdict) {
    let rows = world.history(&world.numbers[index]).await;
    let (mut outbound, mut inbound): (HashMap<String, Vec<_>>, HashMap<String, Vec<_>>) = Default::default();
    for row in &rows {
        let peer = row.peer_phone_number.trim_start_matches('+').to_owned();
        if row.kind == "undecryptable" {
            verdict.undecryptable += 1;
        } else if row.direction() == MessageDirection::Outbound {
            let status = row.status();
            if matches!(status, MessageStatus::Queued | MessageStatus::Failed | MessageStatus::Expired) {
                verdict
                    .violations
                    .push(format!("I1: {} of number {index} ended {status:?} {}", row.id, row.failure_code));
            }
            verdict.without_receipt += usize::from(status == MessageStatus::Sent);
            outbound.entry(peer).or_default().push((row.id.clone(), row.text.clone()));
        } else if row.direction() == MessageDirection::Inbound {
            inbound.entry(peer).or_default().push(row.text.clone());
        }
    }
    verdict.inbound += inbound.values().map(Vec::len).sum::<usize>();
    for chat in record.sent.iter().filter(|chat| chat.number == index) {
        let sent: Vec<_> = chat.sent.iter().map(|sent| (sent.id.clone(), sent.text.clone())).collect();
        let rows = outbound.remove(&chat.peer).unwrap_or_default();
        differ(&format!("I1: the history of number {index} holds to {}", chat.peer), &sent, &rows, verdict);
    }
    let mut expected: Vec<_> = record
        .written
        .iter()
        .filter(|chat| chat.number == index)
        .map(|chat| (chat.from.clone(), chat.written.clone()))
        .collect();
    let to_us = |sender: usize| neighbour(sender, world.numbers.len()) == Some(index);
    let phone = &world.numbers[index].phone;
    for chat in record.sent.iter().filter(|chat| chat.peer == *phone && to_us(chat.number)) {
        let texts = chat.sent.iter().map(|sent| sent.text.clone()).collect();
        expected.push((world.numbers[chat.number].phone.clone(), texts));
    }
    for (peer, texts) in expected {
        let rows = inbound.remove(&peer).unwrap_or_default();
        if texts != rows && sorted(&texts) == sorted(&rows) && verdict.stats["retry_receipts"] != 0 {
            verdict.late += 1;
            continue;
        }
        differ(&format!("I4: the history of number {index} holds from {peer}"), &texts, &rows, verdict);
    }
    for (peer, rows) in outbound
        .into_iter()
        .map(|(peer, rows)| (peer, rows.len()))
        .chain(inbound.into_iter().map(|(peer, rows)| (peer, rows.len())))
    {
        verdict.violations.push(format!("I3: number {index} has {rows} rows with {peer}, who had none with it"));
    }
}

/// The log is gap-free and says now what streams said then; rungs only climb; webhooks told all of it, in order.
async fn events(world: &World, told: &[Told], index: usize, verdict: &mut Verdict) {
    let log = whole_log(world, index).await;
    verdict.events += log.len();
    if let Some(at) = told.iter().zip(&log).position(|(then, now)| then != now) {
        let (then, now) = (&told[at], &log[at]);
        verdict.violations.push(format!("number {index}: event {} was {then:?} and is {now:?}", at + 1));
    }
    if told.len() != log.len() {
        verdict.violations.push(format!("number {index}: {} events streamed, {} in the log", told.len(), log.len()));
    }
    let mut rungs: HashMap<&str, i32> = HashMap::new();
    for (message, rung) in log.iter().filter_map(|event| event.progress.as_ref()) {
        let before = rungs.insert(message, *rung).unwrap_or(0);
        if before >= *rung {
            verdict.violations.push(format!("I6: number {index}: {message} went from rung {before} to {rung}"));
        }
    }
    webhooks(world, index, &log, verdict);
}

fn webhooks(world: &World, index: usize, log: &[Told], verdict: &mut Verdict) {
    let number = &world.numbers[index].id;
    let delivered = world.sink.delivered(number);
    let known: HashSet<&str> = delivered.iter().map(|delivered| delivered.id.as_str()).collect();
    // What happened before there was a webhook is not its business.
    let missing: Vec<_> =
        log.iter().filter(|event| event.kind != "number.created" && !known.contains(event.id.as_str())).collect();
    if let Some(first) = missing.first() {
        verdict
            .violations
            .push(format!("I5: number {index}: {} events had no webhook, the first: {first:?}", missing.len()));
    }
    let logged: HashSet<&str> = log.iter().map(|event| event.id.as_str()).collect();
    if let Some(stranger) = delivered.iter().find(|delivered| !logged.contains(delivered.id.as_str())) {
        verdict
            .violations
            .push(format!("I5: number {index}: a webhook told of what the log does not hold: {stranger:?}"));
    }
    let mut last: HashMap<&Option<String>, u64> = HashMap::new();
    for delivered in &delivered {
        verdict.webhooks_repeated += u64::from(delivered.times - 1);
        let before = last.insert(&delivered.chat, delivered.sequence).unwrap_or(0);
        if before > delivered.sequence {
            verdict
                .violations
                .push(format!("I5: number {index}: webhook {delivered:?} came after {before} of its chat"));
        }
    }
}

async fn whole_log(world: &World, index: usize) -> Vec<Told> {
    let mut log = Vec::new();
    let events = world.numbers[index].caller.events().stream_events(proto::StreamEventsRequest::default()).await;
    let Ok(stream) = events else { return log };
    let mut stream = stream.into_inner();
    while let Ok(Some(step)) = stream.message().await {
        match step.step {
            Some(Step::Event(event)) => log.push(described(&event)),
            Some(Step::Progress(progress)) if progress.caught_up => break,
            Some(Step::Progress(_)) | None => {}
        }
    }
    log
}

fn differ<T: std::fmt::Debug + PartialEq + Eq + std::hash::Hash>(
    what: &str,
    expected: &[T],
    found: &[T],
    verdict: &mut Verdict,
) {
    if expected == found {
        return;
    }
    let (known, seen): (HashSet<&T>, HashSet<&T>) = (expected.iter().collect(), found.iter().collect());
    let missing: Vec<_> = expected.iter().filter(|item| !seen.contains(item)).collect();
    let strange: Vec<_> = found.iter().filter(|item| !known.contains(item)).collect();
    let mut text = format!("{what} {} of {}", found.len(), expected.len());
    if !missing.is_empty() {
        let _ = write!(text, "; {} missing: {:?}", missing.len(), &missing[..missing.len().min(SHOWN)]);
    }
    if !strange.is_empty() {
        let _ = write!(text, "; {} unexpected: {:?}", strange.len(), &strange[..strange.len().min(SHOWN)]);
    }
    if found.len() != seen.len() {
        let _ = write!(text, "; {} more than once", found.len() - seen.len());
    }
    if missing.is_empty()
        && strange.is_empty()
        && let Some(at) = expected.iter().zip(found).position(|(expected, found)| expected != found)
    {
        let _ = write!(text, "; out of order from {at}: {:?} instead of {:?}", found[at], expected[at]);
    }
    verdict.violations.push(text);
}
