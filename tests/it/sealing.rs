//! What a daemon leaves on disk tells nothing without the master key.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use switchboard::api::grpc::proto;
use switchboard::domain::id::NumberId;
use switchboard::store::error::StoreError;
use switchboard::store::key::Tag;
use switchboard::store::layout::{Store, StoreSettings};
use switchboard::store::number_store::{NumberStore, Order};
use switchboard::telemetry::rng::Random;

use crate::harness::{World, until};

const SHOP: &str = "15559000001";
const CUSTOMER: &str = "15559000099";
const TENANT: &str = "Planted Tenant Ltd";
const SENT: &str = "the parcel waits behind the blue door";
/// Half a key, in bytes: of a row that is cut into pieces of this size, each key holds one whole piece.
const PIECE: usize = 16;
const WRITTEN: &str = "I will fetch it on thursday evening";

/// Every file of a directory, the key files aside.
fn files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.ends_with("keys") {
            found.extend(files(&path));
        } else if path.is_file() {
            let bytes = std::fs::read(&path).unwrap();
            found.push((path, bytes));
        }
    }
    found
}

/// Pieces of Signal state as the program sees it: the device's keys, sessions, prekeys.
async fn signal_bytes(number: &NumberStore) -> Vec<Vec<u8>> {
    let device = number.get(Tag::Device, &[]).await.unwrap().expect("linked");
    let mut found: Vec<Vec<u8>> = device.chunks_exact(PIECE).map(<[u8]>::to_vec).collect();
    assert!(found.len() >= 20, "the device row has its keys: {}", found.len());
    for tag in [Tag::Session, Tag::PreKey, Tag::Identity] {
        let rows = number.scan(tag, &[], None, Order::Ascending, 5).await.unwrap();
        assert!(!rows.is_empty(), "{tag:?}");
        found.extend(rows.into_iter().filter(|(_, value)| value.len() >= PIECE).map(|(_, value)| value));
    }
    // What a value begins with may be the same in many.
    found.iter().map(|bytes| bytes[bytes.len() - PIECE..].to_vec()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_data_directory_holds_nothing_in_clear() {
    let mut world = World::new().await;
    let (_, tenant_key, numbers) = world.tenant(TENANT, &[SHOP]).await;
    let shop = numbers[0].clone();
    shop.caller.send_text(CUSTOMER, SENT, "sealed-request").await.unwrap();
    world.webhook(&shop, "message.delivered", |_| true).await;
    world.phones.write(CUSTOMER, SHOP, WRITTEN).await.unwrap();
    world.webhook(&shop, "message.received", |_| true).await;
    let request = proto::CreateWebhookRequest {
        url: world.sink.url("planted-path"),
        events: vec!["*".to_owned()],
        ..proto::CreateWebhookRequest::default()
    };
    let hook = shop.caller.webhooks().create_webhook(request).await.unwrap().into_inner();
    assert_eq!(world.daemon.as_mut().unwrap().terminate(), Some(0));
    let data = world.data();
    let on_disk = files(&data);
    let bytes: usize = on_disk.iter().map(|(_, bytes)| bytes.len()).sum();
    assert!(bytes > 50_000, "there is something to look at: {bytes}");
    let settings = StoreSettings::at(&data, Arc::new(Random::from_system().unwrap()));
    let store = Store::open(&settings).unwrap();
    let id: NumberId = shop.id.parse().unwrap();
    let volume = store.meta().number(id).unwrap().volume;
    let number = store.claim(id, volume).await.unwrap();
    let mut needles: Vec<(String, Vec<u8>)> = [
        ("our phone number", SHOP),
        ("the customer's", CUSTOMER),
        ("the tenant's name", TENANT),
        ("what was sent", SENT),
        ("part of it", &SENT[4..14]),
        ("what was received", WRITTEN),
        ("the number's key", &shop.key),
        ("the tenant's key", &tenant_key),
        ("the request id", "sealed-request"),
        ("the webhook's secret", &hook.secret),
        ("the webhook's url", "planted-path"),
    ]
    .into_iter()
    .map(|(name, text)| (name.to_owned(), text.as_bytes().to_vec()))
    .collect();
    for (index, bytes) in signal_bytes(&number).await.into_iter().enumerate() {
        needles.push((format!("signal key {index}"), bytes));
    }
    store.close();
    for (name, needle) in needles {
        for (path, bytes) in &on_disk {
            let found = bytes.windows(needle.len()).any(|window| window == needle);
            assert!(!found, "{name} lies in clear in {}", path.display());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_number_leaves_no_rows_and_its_phone_number_can_come_back() {
    let mut world = World::new().await;
    let (tenant, _, numbers) = world.tenant(TENANT, &[SHOP]).await;
    let request = proto::DeleteNumberRequest { number: numbers[0].id.clone() };
    tenant.numbers().delete_number(request).await.unwrap();
    let again = tenant.create_number("again", SHOP).await.unwrap();
    assert_ne!(again.id, numbers[0].id);
    let gone = numbers[0].caller.send_text(CUSTOMER, "ghost", "ghost").await.unwrap_err();
    assert_eq!(format!("{:?}", gone.code()), "Unauthenticated");
    until("its records are gone", async || {
        let text = world.metrics().await;
        text.contains("switchboard_erasures_waiting 0").then_some(())
    })
    .await;
    assert_eq!(world.daemon.take().unwrap().terminate(), Some(0));
    let store = Store::open(&StoreSettings::at(&world.data(), Arc::new(Random::from_system().unwrap()))).unwrap();
    let old: NumberId = numbers[0].id.parse().unwrap();
    assert!(store.meta().number(old).is_none() && store.meta().erasures().is_empty());
    for volume in store.report().iter().skip(1).zip(0..).map(|(_, volume)| volume) {
        let refused = store.claim(old, volume).await.unwrap_err();
        assert!(matches!(refused, StoreError::Erased), "its key is destroyed: {refused:?}");
    }
    store.close();
}
