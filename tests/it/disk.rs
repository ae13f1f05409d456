//! A disk that is full, for a daemon that is busy: nothing is acknowledged that is not on disk, callers and operators are
//! told, and it goes on by itself when there is room again.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use switchboard::api::grpc::proto::{self, NumberState};
use switchboard::demo::client::OwnedNumber;
use switchboard::demo::phones::{Phones, call};
use switchboard::telemetry::failpoint::SYNC_FAULT_FILE;

use crate::harness::{World, until};

const SHOPS: [&str; 2] = ["15558000001", "15558000002"];
const CUSTOMER: &str = "15558000099";
/// Any write of sled's beyond this fails: the log is longer.
const NO_ROOM: u64 = 64 * 1024;

/// Sends numbered texts, each until it is accepted, and counts what the refusals say.
struct Load {
    stop: Arc<AtomicBool>,
    accepted: Arc<AtomicUsize>,
    refused: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<(Vec<String>, HashSet<String>)>,
}

fn reason_of(status: &tonic::Status) -> String {
    use tonic_types::StatusExt as _;
    let details = status.get_error_details();
    let reason = details.error_info().map(|info| info.reason.clone()).unwrap_or_default();
    if reason == "DISK_FULL" {
        assert_eq!(status.code(), tonic::Code::ResourceExhausted);
        assert!(details.retry_info().is_some(), "it says when to come again");
    }
    reason
}

impl Load {
    fn begin(number: OwnedNumber) -> Self {
        let (stop, accepted) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let refused = Arc::<AtomicUsize>::default();
        let (stopped, counted, refusals) = (stop.clone(), accepted.clone(), refused.clone());
        let task = tokio::spawn(async move {
            let (mut texts, mut reasons) = (Vec::new(), HashSet::new());
            for index in 0.. {
                let text = format!("{} line {index}", number.phone);
                while let Err(status) = number.caller.send_text(CUSTOMER, &text, &text).await {
                    reasons.insert(reason_of(&status));
                    refusals.fetch_add(1, Ordering::SeqCst);
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                texts.push(text);
                counted.fetch_add(1, Ordering::SeqCst);
                if stopped.load(Ordering::SeqCst) {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            (texts, reasons)
        });
        Self { stop, accepted, refused, task }
    }
}

/// What a phone wrote, told by the number's history.
async fn received(number: &OwnedNumber) -> Vec<String> {
    let mut texts = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = proto::ListMessagesRequest { page_size: 100, page_token, ..Default::default() };
        let page = number.caller.messages().list_messages(request).await.unwrap().into_inner();
        texts.extend(page.messages.into_iter().map(|message| message.text).filter(|text| text.starts_with("question")));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return texts;
        }
    }
}

async fn write(phones: &Phones, asked: &mut usize, count: usize) {
    for _ in 0..count {
        for shop in SHOPS {
            phones.write(CUSTOMER, shop, &format!("question {asked}")).await.unwrap();
        }
        *asked += 1;
    }
}

async fn settled(world: &World, numbers: &[OwnedNumber], texts: &[String], asked: usize) {
    until("everything accepted is shown", async || {
        let shown = world.phones.shown(CUSTOMER).await.unwrap();
        let lines: HashSet<_> = shown.iter().filter_map(|message| message["text"].as_str()).collect();
        texts.iter().all(|text| lines.contains(text.as_str())).then_some(())
    })
    .await;
    let shown = world.phones.shown(CUSTOMER).await.unwrap();
    for shop in SHOPS {
        let lines: Vec<_> = shown.iter().filter_map(|message| message["text"].as_str()).collect();
        let lines: Vec<_> = lines.into_iter().filter(|line| line.starts_with(shop)).collect();
        let expected: Vec<_> = texts.iter().filter(|text| text.starts_with(shop)).collect();
        assert_eq!(lines, expected, "each once, in order");
    }
    let stats = world.phones.stats().await.unwrap();
    for number in numbers {
        let mut all = until("every question is in the history", async || {
            let texts = received(number).await;
            (texts.len() >= asked).then_some(texts)
        })
        .await;
        let mut expected: Vec<_> = (0..asked).rev().map(|index| format!("question {index}")).collect();
        if stats["retry_receipts"] != 0 {
            // What had to be asked for again stands behind what came meanwhile.
            all.sort();
            expected.sort();
        }
        assert_eq!(all, expected, "each once");
    }
    assert_eq!(stats["signal_keys_reused"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_told_and_left_behind_without_a_loss() {
    let world = World::new().await;
    let (tenant, _, numbers) = world.tenant("disk", &SHOPS).await;
    let loads: Vec<_> = numbers.iter().map(|number| Load::begin(number.clone())).collect();
    let accepted = || loads.iter().map(|load| load.accepted.load(Ordering::SeqCst)).collect::<Vec<_>>();
    let mut asked = 0;
    write(&world.phones, &mut asked, 5).await;
    until("both numbers are busy", async || accepted().iter().all(|count| *count >= 20).then_some(())).await;

    world.daemon.as_ref().unwrap().limit_files(Some(NO_ROOM));
    write(&world.phones, &mut asked, 5).await;
    for number in &numbers {
        let seen = until("the number says why", async || {
            let seen = world.number(&tenant, &number.id).await;
            (seen.reason == "DISK_FULL").then_some(seen)
        })
        .await;
        assert_ne!(seen.state(), NumberState::Online);
    }
    let request = proto::CreateWebhookRequest {
        url: world.sink.url(&numbers[0].id),
        events: vec!["*".to_owned()],
        ..proto::CreateWebhookRequest::default()
    };
    let refused = numbers[0].caller.webhooks().create_webhook(request).await.unwrap_err();
    assert_eq!(reason_of(&refused), "DISK_FULL", "not only sends say why");
    let refused = numbers[0].caller.messages().list_messages(proto::ListMessagesRequest::default()).await.unwrap_err();
    assert_eq!(reason_of(&refused), "DISK_FULL", "reads as well");
    until("sends are refused", async || loads.iter().all(|load| load.refused.load(Ordering::SeqCst) > 0).then_some(()))
        .await;
    write(&world.phones, &mut asked, 5).await;
    let metrics = world.metrics().await;
    assert!(
        metrics.lines().any(|line| line.starts_with("switchboard_store_open{") && line.ends_with(" 0")),
        "{metrics}"
    );
    let ready = call(world.admin(), "GET", "/readyz", &[], "").await.unwrap_or_else(|error| error.to_string());
    assert!(ready.contains("the disk is full"), "{ready}");
    let stuck = accepted();
    let refused = || loads.iter().map(|load| load.refused.load(Ordering::SeqCst)).collect::<Vec<_>>();
    let before = refused();
    until("many more are refused", async || {
        refused().iter().zip(&before).all(|(now, then)| *now >= then + 20).then_some(())
    })
    .await;
    assert_eq!(accepted(), stuck, "nothing is accepted meanwhile");

    world.daemon.as_ref().unwrap().limit_files(None);
    let room_again = Instant::now();
    for number in &numbers {
        world.until_connected(&tenant, &number.id).await;
    }
    let took = room_again.elapsed();
    println!("online again {took:?} after there was room again");
    assert!(took < Duration::from_secs(30), "{took:?}");
    until("both numbers are busy again", async || {
        accepted().iter().zip(&stuck).all(|(now, then)| *now >= then + 20).then_some(())
    })
    .await;
    write(&world.phones, &mut asked, 5).await;
    let mut texts = Vec::new();
    for load in loads {
        load.stop.store(true, Ordering::SeqCst);
        let (sent, reasons) = load.task.await.unwrap();
        assert!(reasons.contains("DISK_FULL"), "{reasons:?}");
        // The last one while it reads its records again.
        let typed = ["DISK_FULL", "STORE_FAILED", "NUMBER_UNAVAILABLE"];
        assert!(reasons.iter().all(|reason| typed.contains(&reason.as_str())), "{reasons:?}");
        texts.extend(sent);
    }
    settled(&world, &numbers, &texts, asked).await;
    for number in &numbers {
        let restarts = world.metric("switchboard_number_restarts_total", &number.id).await;
        assert!(restarts == 0.0, "a full disk is no crash: {restarts}");
    }
    let metrics = world.metrics().await;
    assert!(!metrics.lines().any(|line| line.starts_with("switchboard_store_open{") && line.ends_with(" 0")));
}

/// Volumes that the metrics call shut.
async fn volumes_failed(world: &World) -> Vec<String> {
    let metrics = world.metrics().await;
    let shut = metrics.lines().filter(|line| line.starts_with("switchboard_store_open{") && line.ends_with(" 0"));
    shut.filter_map(|line| line.split('"').nth(1)).map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_fails_to_sync_loses_nothing_and_is_left_behind_without_a_restart() {
    let world = World::new().await;
    let (tenant, _, numbers) = world.tenant("disk", &SHOPS).await;
    let loads: Vec<_> = numbers.iter().map(|number| Load::begin(number.clone())).collect();
    let accepted = |load: &Load| load.accepted.load(Ordering::SeqCst);
    let mut asked = 0;
    write(&world.phones, &mut asked, 3).await;
    until("both numbers are busy", async || loads.iter().all(|load| accepted(load) >= 10).then_some(())).await;

    // The first number of a new daemon lives in the first volume, the second one elsewhere.
    let fault = world.data().join("volume-00").join(SYNC_FAULT_FILE);
    std::fs::write(&fault, []).unwrap();
    let seen = until("the number says why", async || {
        let seen = world.number(&tenant, &numbers[0].id).await;
        (seen.reason == "STORE_FAILED").then_some(seen)
    })
    .await;
    assert_ne!(seen.state(), NumberState::Online);
    until("sends are refused", async || (loads[0].refused.load(Ordering::SeqCst) > 0).then_some(())).await;
    until("the metrics say so", async || (volumes_failed(&world).await == ["volume-00"]).then_some(())).await;
    let (stuck, other) = (accepted(&loads[0]), accepted(&loads[1]));
    write(&world.phones, &mut asked, 3).await;
    until("the other volume's number goes on", async || (accepted(&loads[1]) >= other + 20).then_some(())).await;
    assert_eq!(world.number(&tenant, &numbers[1].id).await.state(), NumberState::Online);
    assert_eq!(accepted(&loads[0]), stuck, "nothing is accepted meanwhile");

    std::fs::remove_file(&fault).unwrap();
    world.until_connected(&tenant, &numbers[0].id).await;
    until("it is busy again", async || (accepted(&loads[0]) >= stuck + 10).then_some(())).await;
    write(&world.phones, &mut asked, 3).await;
    let mut texts = Vec::new();
    for load in loads {
        load.stop.store(true, Ordering::SeqCst);
        let (sent, reasons) = load.task.await.unwrap();
        assert!(
            reasons.iter().all(|reason| ["STORE_FAILED", "NUMBER_UNAVAILABLE"].contains(&reason.as_str())),
            "{reasons:?}"
        );
        texts.extend(sent);
    }
    settled(&world, &numbers, &texts, asked).await;
    for number in &numbers {
        let restarts = world.metric("switchboard_number_restarts_total", &number.id).await;
        assert!(restarts == 0.0, "a broken disk is no crash: {restarts}");
    }
    assert_eq!(volumes_failed(&world).await, Vec::<String>::new());
}

/// Runs `switchboard storage …` on the data of a daemon that is down.
fn storage(world: &World, arguments: &[&str]) -> (Option<i32>, String) {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_switchboard"));
    command.arg("storage").args(arguments).env("SWITCHBOARD__DATA__DIR", world.data());
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    println!("storage {arguments:?}: {:?}\n{said}", output.status.code());
    (output.status.code(), said)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_volume_is_set_aside_and_its_numbers_go_on_after_a_rebuild() {
    let mut world = World::new().await;
    let (_, tenant_key, numbers) = world.tenant("damage", &SHOPS).await;
    for number in &numbers {
        number.caller.send_text(CUSTOMER, &format!("from {}", number.phone), "first").await.unwrap();
        world.webhook(number, "message.delivered", |_| true).await;
    }
    assert_eq!(world.daemon.as_mut().unwrap().terminate(), Some(0));
    assert_eq!(storage(&world, &["check"]).0, Some(0));
    std::fs::write(world.data().join("volume-00/conf"), "not a configuration").unwrap();

    world.start_again();
    let tenant = world.caller(&tenant_key).await;
    until("the number says why", async || {
        (world.number(&tenant, &numbers[0].id).await.reason == "STORE_FAILED").then_some(())
    })
    .await;
    world.until_connected(&tenant, &numbers[1].id).await;
    let broken = world.caller(&numbers[0].key).await;
    let refused = broken.send_text(CUSTOMER, "now", "now").await.unwrap_err();
    assert_eq!(reason_of(&refused), "STORE_FAILED");
    let refused = broken.messages().list_messages(proto::ListMessagesRequest::default()).await.unwrap_err();
    assert_eq!(reason_of(&refused), "STORE_FAILED", "no empty history");
    assert_eq!(volumes_failed(&world).await, ["volume-00"]);
    assert_eq!(world.daemon.as_mut().unwrap().terminate(), Some(0));

    let (status, said) = storage(&world, &["check"]);
    assert!(status == Some(69) && said.contains("volume-00.damaged") && said.contains("DAMAGED"), "{said}");
    let (status, said) = storage(&world, &["rebuild", "volume-00"]);
    assert!(status == Some(69) && said.contains("--accept-loss"), "{said}");
    let (status, said) = storage(&world, &["rebuild", "volume-00", "--accept-loss"]);
    assert!(status == Some(0) && said.contains("1 numbers must be linked again"), "{said}");
    assert!(world.data().join("volume-00.damaged").exists(), "nothing is deleted");

    world.start_again();
    let tenant = world.caller(&tenant_key).await;
    let mut number = numbers[0].clone();
    number.caller = world.caller(&number.key).await;
    world.until_state(&tenant, &number.id, NumberState::Unlinked).await;
    world.link(&tenant, &number).await;
    let sent = number.caller.send_text(CUSTOMER, "here again", "again").await.unwrap();
    world.webhook(&number, "message.delivered", |hook| hook.body.to_string().contains(&sent.id)).await;
    let page =
        number.caller.messages().list_messages(proto::ListMessagesRequest::default()).await.unwrap().into_inner();
    let texts: Vec<_> = page.messages.iter().map(|message| message.text.as_str()).collect();
    assert_eq!(texts, ["here again", &format!("from {}", number.phone)], "the history is still there");
    assert_eq!(world.phones.stats().await.unwrap()["signal_keys_reused"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn below_the_low_water_mark_sends_are_refused_and_the_rest_goes_on() {
    // No file system has a terabyte more than it has.
    let world = World::with(&[("STORE__LOW_WATER_MIB", "1048576")]).await;
    let (_, _, numbers) = world.tenant("disk", &SHOPS[..1]).await;
    let refused = numbers[0].caller.send_text(CUSTOMER, "too late", "too-late").await.unwrap_err();
    assert_eq!(reason_of(&refused), "DISK_FULL");
    world.phones.write(CUSTOMER, SHOPS[0], "still there?").await.unwrap();
    world.webhook(&numbers[0], "message.received", |hook| hook.body["data"]["content"] == "still there?").await;
    assert!(world.metrics().await.contains("switchboard_store_low_space 1"));
}
