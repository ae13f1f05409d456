//! Conformance of the backend to the library's storage contracts, on a real store in a temporary directory.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use whatsapp_rust::bytes::Bytes;
use whatsapp_rust::wacore::appstate::processor::AppStateMutationMAC;
use whatsapp_rust::wacore::store::Device;
use whatsapp_rust::wacore::store::traits::{
    AppStateSyncKey, AppSyncStore, DeviceInfo, DeviceListRecord, DeviceStore, LidPnMappingEntry, MsgSecretEntry,
    MsgSecretStore, PendingInboundKey, PendingInboundRow, ProtocolStore, SignalStore, TcTokenEntry,
};

use super::super::repeats::Asked;
use super::{LinkBackend, forget_device, is_linked, provision, put, seconds_key};
use crate::domain::id::{NumberId, TenantId};
use crate::domain::phone::Phone;
use crate::domain::time::Timestamp;
use crate::store::key::Tag;
use crate::store::layout::{Store, StoreSettings};
use crate::store::meta::{NumberKind, NumberRecord};
use crate::store::number_store::{NumberStore, Order};
use crate::store::unit::Durability;
use crate::telemetry::rng::Random;

/// A store in a directory of its own, removed at the end.
struct Home {
    dir: PathBuf,
    store: Store,
    number: NumberStore,
    failures: Arc<AtomicU32>,
    losses: Arc<AtomicU32>,
}

impl Home {
    async fn open(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("switchboard-backend-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        let store = Store::open(&StoreSettings::at(&dir, Arc::new(Random::seeded(7)))).unwrap();
        let record = NumberRecord {
            id: NumberId(1),
            tenant: TenantId(1),
            name: name.to_owned(),
            phone: Phone::parse("15550000001").unwrap(),
            kind: NumberKind::Linked,
            volume: 0,
            created_at: Timestamp(1),
            retention: crate::domain::retention::Retention::default(),
            proxy: None,
            orders: crate::domain::orders::SendingOrders::default(),
        };
        store.meta().create_number(record, Vec::new()).await.unwrap();
        let number = store.claim(NumberId(1), 0).await.unwrap();
        Self { dir, store, number, failures: Arc::default(), losses: Arc::default() }
    }

    fn backend(&self) -> Arc<LinkBackend> {
        let (failures, losses) = (self.failures.clone(), self.losses.clone());
        LinkBackend::new(
            self.number.clone(),
            Box::new(move || {
                failures.fetch_add(1, Ordering::SeqCst);
            }),
            Box::new(move |_| {
                losses.fetch_add(1, Ordering::SeqCst);
            }),
        )
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        self.store.close();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn name(text: &str) -> Arc<str> {
    Arc::from(text)
}

#[tokio::test]
async fn signal_state_round_trips_and_is_found_by_user() {
    let home = Home::open("signal").await;
    let backend = home.backend();
    let sessions = vec![
        (name("551199@s.whatsapp.net.0"), Bytes::from_static(b"zero")),
        (name("551199:4@s.whatsapp.net.0"), Bytes::from(vec![7; 40_000])),
        (name("77@lid.0"), Bytes::from_static(b"lid")),
    ];
    backend.put_sessions_batch(&sessions).await.unwrap();
    for (address, record) in &sessions {
        assert_eq!(backend.get_session(address).await.unwrap().as_ref(), Some(record));
        assert!(backend.has_session(address).await.unwrap());
    }
    assert!(backend.has_signal_state_for_user("551199").await.unwrap());
    assert!(!backend.has_signal_state_for_user("5511").await.unwrap(), "no prefix of a user is another");
    backend.delete_session("77@lid.0").await.unwrap();
    assert!(!backend.has_signal_state_for_user("77").await.unwrap());
    backend.put_identities_batch(&[(name("77@lid.0"), [3; 32])]).await.unwrap();
    assert_eq!(backend.load_identity("77@lid.0").await.unwrap(), Some([3; 32]));
    assert!(backend.has_signal_state_for_user("77").await.unwrap());
    backend.delete_identity("77@lid.0").await.unwrap();
    assert_eq!(backend.load_identity("77@lid.0").await.unwrap(), None);

    let sender_keys = [(name("g@g.us:551199"), Bytes::from_static(b"sk"))];
    backend.put_sender_keys_batch(&sender_keys).await.unwrap();
    assert_eq!(backend.get_sender_key("g@g.us:551199").await.unwrap().as_deref(), Some(&b"sk"[..]));
    backend.delete_sender_key("g@g.us:551199").await.unwrap();
    assert_eq!(backend.get_sender_key("g@g.us:551199").await.unwrap(), None);
}

#[tokio::test]
async fn a_consumed_prekey_stays_away() {
    let home = Home::open("prekeys").await;
    let backend = home.backend();
    assert_eq!(backend.get_max_prekey_id().await.unwrap(), 0);
    let keys: Vec<(u32, Bytes)> = (1..=300).map(|id| (id, Bytes::from(vec![1; 70]))).collect();
    backend.store_prekeys_batch(&keys, false).await.unwrap();
    assert_eq!(backend.get_max_prekey_id().await.unwrap(), 300);
    backend.remove_prekey(300).await.unwrap();
    backend.mark_prekeys_uploaded(&[299, 300]).await.unwrap();
    assert!(backend.load_prekey(300).await.unwrap().is_none());
    assert_eq!(backend.load_prekeys_batch(&[1, 299, 300]).await.unwrap().len(), 2);
    backend.store_signed_prekey(5, b"five").await.unwrap();
    assert_eq!(backend.load_all_signed_prekeys().await.unwrap(), vec![(5, b"five".to_vec())]);
    backend.remove_signed_prekey(5).await.unwrap();
    assert!(backend.load_signed_prekey(5).await.unwrap().is_none());
}

#[tokio::test]
async fn app_state_clears_all_macs_of_one_collection() {
    let home = Home::open("app-state").await;
    let backend = home.backend();
    let key = AppStateSyncKey { key_data: vec![1, 2], fingerprint: vec![3], timestamp: 9 };
    backend.set_sync_key(b"id", key).await.unwrap();
    assert_eq!(backend.get_latest_sync_key_id().await.unwrap().as_deref(), Some(&b"id"[..]));
    assert_eq!(backend.get_sync_key(b"id").await.unwrap().unwrap().key_data, vec![1, 2]);

    let mac = |index: u16| AppStateMutationMAC {
        index_mac: [index.to_be_bytes().as_slice(), &[0; 30]].concat(),
        value_mac: vec![4; 32],
    };
    let macs: Vec<AppStateMutationMAC> = (0..2500).map(mac).collect();
    backend.put_mutation_macs("regular", 1, &macs).await.unwrap();
    backend.put_mutation_macs("critical", 1, &macs[..1]).await.unwrap();
    backend.delete_mutation_macs("regular", &[macs[0].index_mac.clone()]).await.unwrap();
    assert!(backend.get_mutation_mac("regular", &macs[0].index_mac).await.unwrap().is_none());
    let one: [u8; 32] = macs[1].index_mac.clone().try_into().unwrap();
    assert_eq!(backend.get_mutation_macs("regular", &[one, [9; 32]]).await.unwrap().len(), 1);
    backend.clear_mutation_macs("regular").await.unwrap();
    assert!(backend.get_mutation_mac("regular", &macs[2400].index_mac).await.unwrap().is_none());
    assert!(backend.get_mutation_mac("critical", &macs[0].index_mac).await.unwrap().is_some());

    let mut state = backend.get_version("regular").await.unwrap();
    assert_eq!(state.version, 0);
    state.version = 12;
    backend.set_version("regular", state).await.unwrap();
    assert_eq!(backend.get_version("regular").await.unwrap().version, 12);
}

fn mapping(lid: &str, phone: &str) -> LidPnMappingEntry {
    LidPnMappingEntry {
        lid: lid.to_owned(),
        phone_number: phone.to_owned(),
        created_at: 1,
        updated_at: 1,
        learning_source: "usync".to_owned(),
    }
}

#[tokio::test]
async fn lid_mappings_follow_a_changed_phone() {
    let home = Home::open("lid").await;
    let backend = home.backend();
    backend.put_lid_mappings(&[mapping("7", "551100001"), mapping("8", "551100002")]).await.unwrap();
    backend.put_lid_mapping(&mapping("7", "551100009")).await.unwrap();
    assert!(backend.get_pn_mapping("551100001").await.unwrap().is_none());
    assert_eq!(backend.get_pn_mapping("551100009").await.unwrap().unwrap().lid, "7");
    assert_eq!(backend.get_lid_mapping("8").await.unwrap().unwrap().phone_number, "551100002");
    let mut all: Vec<String> = backend.get_all_lid_mappings().await.unwrap().into_iter().map(|m| m.lid).collect();
    all.sort();
    assert_eq!(all, ["7", "8"]);
}

#[tokio::test]
async fn protocol_caches_round_trip() {
    let home = Home::open("protocol").await;
    let backend = home.backend();
    backend.set_sender_key_status("g1@g.us", &[("1:2@lid", true), ("2@lid", false)]).await.unwrap();
    backend.set_sender_key_status("g2@g.us", &[("2@lid", true)]).await.unwrap();
    assert_eq!(backend.get_sender_key_devices("g1@g.us").await.unwrap().len(), 2);
    backend.delete_sender_key_device_rows(&["2@lid"]).await.unwrap();
    assert_eq!(backend.get_sender_key_devices("g1@g.us").await.unwrap(), vec![("1:2@lid".to_owned(), true)]);
    assert!(backend.get_sender_key_devices("g2@g.us").await.unwrap().is_empty());
    backend.clear_sender_key_devices("g1@g.us").await.unwrap();
    backend.clear_all_sender_key_devices().await.unwrap();
    assert!(backend.get_sender_key_devices("g1@g.us").await.unwrap().is_empty());

    backend.save_base_key("a", "m", b"key").await.unwrap();
    assert!(backend.has_same_base_key("a", "m", b"key").await.unwrap());
    assert!(!backend.has_same_base_key("a", "m", b"other").await.unwrap());
    backend.delete_base_key("a", "m").await.unwrap();
    assert!(!backend.has_same_base_key("a", "m", b"key").await.unwrap());

    let record = DeviceListRecord {
        user: "551199".to_owned(),
        devices: vec![DeviceInfo::new(0, None), DeviceInfo::new(3, Some(2))],
        timestamp: 5,
        phash: None,
        raw_id: Some(1),
    };
    assert!(!backend.knows_devices_of("551199").await);
    backend.update_device_lists(vec![record]).await.unwrap();
    assert!(backend.knows_devices_of("551199").await);
    assert_eq!(backend.get_devices("551199").await.unwrap().unwrap().devices.len(), 2);
    backend.delete_devices("551199").await.unwrap();
    assert!(backend.get_devices("551199").await.unwrap().is_none());

    backend.put_group_metadata("g", b"blob").await.unwrap();
    assert_eq!(backend.get_group_metadata("g").await.unwrap().as_deref(), Some(&b"blob"[..]));
    backend.delete_group_metadata("g").await.unwrap();
    assert!(backend.get_group_metadata("g").await.unwrap().is_none());
}

#[tokio::test]
async fn tokens_merge_whoever_writes_first() {
    let home = Home::open("tokens").await;
    let backend = home.backend();
    backend.touch_tc_token_sender_timestamp("a@lid", 50).await.unwrap();
    backend.store_received_tc_token("a@lid", b"new", 40).await.unwrap();
    backend.touch_tc_token_sender_timestamp("a@lid", 30).await.unwrap();
    backend.store_received_tc_token("a@lid", b"stale", 39).await.unwrap();
    let entry = backend.get_tc_token("a@lid").await.unwrap().unwrap();
    assert_eq!((entry.token.as_slice(), entry.sender_timestamp), (&b"new"[..], Some(50)));

    let mut writers = tokio::task::JoinSet::new();
    for at in 0..40i64 {
        let backend = backend.clone();
        writers.spawn(async move {
            if at % 2 == 0 {
                backend.touch_tc_token_sender_timestamp("b@lid", at).await.unwrap();
            } else {
                backend.store_received_tc_token("b@lid", b"token", at).await.unwrap();
            }
        });
    }
    writers.join_all().await;
    let entry = backend.get_tc_token("b@lid").await.unwrap().unwrap();
    assert_eq!((entry.token_timestamp, entry.sender_timestamp), (39, Some(38)));

    let plain = TcTokenEntry { token: b"x".to_vec(), token_timestamp: 1, sender_timestamp: None };
    backend.put_tc_token("old@lid", &plain).await.unwrap();
    assert_eq!(backend.delete_expired_tc_tokens(10, 10).await.unwrap(), 1);
    let mut left = backend.get_all_tc_token_jids().await.unwrap();
    left.sort();
    assert_eq!(left, ["a@lid", "b@lid"]);
    backend.delete_tc_token("a@lid").await.unwrap();
    assert!(backend.get_tc_token("a@lid").await.unwrap().is_none());
}

#[tokio::test]
async fn a_sent_message_is_there_for_every_device_that_asks() {
    let home = Home::open("sent").await;
    let backend = home.backend();
    backend.store_sent_message("c", "m1", &vec![5; 50_000]).await.unwrap();
    let mut takers = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let backend = backend.clone();
        takers.spawn(async move { backend.take_sent_message("c", "m1").await.unwrap() });
    }
    let taken = takers.join_all().await;
    assert_eq!(taken.iter().flatten().count(), 8);

    backend.store_sent_message("c", "m2", b"two").await.unwrap();
    let now = whatsapp_rust::wacore::time::now_secs();
    assert_eq!(backend.delete_expired_sent_messages(now - 60).await.unwrap(), 0);
    assert_eq!(backend.delete_expired_sent_messages(now + 60).await.unwrap(), 2);
    assert!(backend.take_sent_message("c", "m2").await.unwrap().is_none());
    let left = home.number.scan(Tag::SentMessage, &[], None, Order::Ascending, 10).await.unwrap();
    assert!(left.is_empty(), "neither rows nor index entries stay behind");
}

#[tokio::test]
async fn a_request_for_a_repeat_stays_until_it_is_confirmed() {
    let home = Home::open("asked").await;
    let backend = home.backend();
    let asked = Asked {
        device: "5511987654321:7@s.whatsapp.net".to_owned(),
        recipient: None,
        whatsapp_id: "3EB0".to_owned(),
        count: 1,
        at: 1_770_000_000,
        answers: 0,
    };
    backend.note_asked(&asked).await.unwrap();
    let again = Asked { count: 2, ..asked };
    backend.note_asked(&again).await.unwrap();
    assert_eq!(backend.asked().await.unwrap(), std::slice::from_ref(&again), "one row for a device and a message");
    backend.forget_asked("5511987654321:8@s.whatsapp.net", "3EB0").await.unwrap();
    assert_eq!(backend.asked().await.unwrap().len(), 1, "another device says nothing of this one");
    backend.forget_asked(&again.device, "3EB0").await.unwrap();
    assert!(backend.asked().await.unwrap().is_empty());
}

#[tokio::test]
async fn pending_messages_are_kept_per_chat_sender_and_id() {
    let home = Home::open("pending").await;
    let backend = home.backend();
    let big = vec![1u8; 300_000];
    let rows: Vec<PendingInboundRow<'_>> = ["a", "b", "c", "d", "e"]
        .into_iter()
        .map(|id| PendingInboundRow { chat: "c", sender: "s", id, message: &big })
        .collect();
    backend.store_pending_inbound_batch(&rows).await.unwrap();
    assert_eq!(backend.get_pending_inbound("c", "s", "e").await.unwrap().unwrap().len(), big.len());
    assert!(backend.get_pending_inbound("c", "other", "e").await.unwrap().is_none());
    let keys: Vec<PendingInboundKey<'_>> =
        ["a", "b", "c", "d"].into_iter().map(|id| PendingInboundKey { chat: "c", sender: "s", id }).collect();
    backend.delete_pending_inbound_batch(&keys).await.unwrap();
    let now = whatsapp_rust::wacore::time::now_secs();
    let old = |id: &str| {
        let key = home.number.hashed("pending", ["c", "s", id].join("\0").as_bytes());
        put(Tag::PendingInbound, key.to_vec(), seconds_key(now - 3600).to_vec())
    };
    backend.commit_rows(vec![old("x"), old("y")], Durability::RidesAlong).await.unwrap();
    assert_eq!(backend.delete_expired_pending_inbound(now + 60).await.unwrap(), 0, "they may come again");
    assert_eq!(backend.drained().await.unwrap(), 2, "what is left of an earlier connection");
    assert_eq!(backend.delete_expired_pending_inbound(now - 60).await.unwrap(), 0);
    assert_eq!(backend.delete_expired_pending_inbound(now + 60).await.unwrap(), 1);
}

#[tokio::test]
async fn a_message_without_copy_and_mark_is_lost_and_not_known() {
    let home = Home::open("lost").await;
    let backend = home.backend();
    let (chat, group) = ("5511987654321@s.whatsapp.net", "1-2@g.us");
    backend.store_pending_inbound(chat, chat, "taken-in", b"m").await.unwrap();
    backend.delete_pending_inbound(chat, chat, "taken-in").await.unwrap();
    assert_eq!(backend.get_pending_inbound(chat, chat, "taken-in").await.unwrap(), None, "known");
    assert_eq!(backend.get_pending_inbound(group, chat, "lost").await.unwrap(), None, "not for the history");
    assert_eq!(home.losses.load(Ordering::SeqCst), 0);
    assert!(backend.get_pending_inbound(chat, chat, "lost").await.is_err(), "must not be acknowledged");
    assert_eq!(home.losses.load(Ordering::SeqCst), 1);
    assert_eq!(home.failures.load(Ordering::SeqCst), 0, "the store is fine");

    let ids: Vec<_> = (0..4200).map(|id| id.to_string()).collect();
    let keys: Vec<_> = ids.iter().map(|id| PendingInboundKey { chat, sender: chat, id }).collect();
    backend.delete_pending_inbound_batch(&keys).await.unwrap();
    let marks = home.number.keys(Tag::PendingInbound, &[], None, Order::Ascending, (0, 10_000)).await.unwrap();
    assert_eq!(marks.len(), 4096, "no more marks than that");
}

#[tokio::test]
async fn secrets_never_shorten_their_life() {
    let home = Home::open("secrets").await;
    let backend = home.backend();
    let entry = |id: &str, expires_at, message_ts| MsgSecretEntry {
        chat: name("c"),
        sender: name("s"),
        msg_id: name(id),
        secret: [8; 32],
        expires_at,
        message_ts,
    };
    let batch = vec![entry("m", 100, 50), entry("m", 80, 0), entry("n", 0, 1)];
    assert_eq!(backend.put_msg_secrets(batch).await.unwrap(), 3);
    backend.put_msg_secrets(vec![entry("n", 70, 0)]).await.unwrap();
    assert_eq!(backend.get_msg_secret_with_ts("c", "s", "m").await.unwrap(), Some((vec![8; 32], 50)));
    assert_eq!(backend.delete_expired_msg_secrets(99).await.unwrap(), 0);
    assert_eq!(backend.delete_expired_msg_secrets(100).await.unwrap(), 1);
    assert!(backend.get_msg_secret("c", "s", "m").await.unwrap().is_none());
    assert!(backend.get_msg_secret("c", "s", "n").await.unwrap().is_some(), "kept for ever");
}

fn linked(phone: &str) -> Device {
    let mut device = Device::new();
    device.pn = Some(format!("{phone}:3@s.whatsapp.net").parse().unwrap());
    device
}

#[tokio::test]
async fn a_device_row_can_be_provisioned_and_forgotten() {
    let home = Home::open("device").await;
    let backend = home.backend();
    assert!(!backend.exists().await.unwrap());
    let unlinked = serde_json::to_string(&Device::new()).unwrap();
    assert!(provision(&home.number, &unlinked).await.is_err());
    assert!(provision(&home.number, "{}").await.is_err());

    backend.put_session("old@lid.0", b"of an earlier link").await.unwrap();
    let row = serde_json::to_string(&linked("5511999990001")).unwrap();
    let phone = provision(&home.number, &row).await.unwrap();
    assert_eq!(phone, Phone::parse("5511999990001").unwrap());
    assert!(is_linked(&home.number).await);
    assert!(backend.get_session("old@lid.0").await.unwrap().is_none());
    assert!(provision(&home.number, &row).await.is_err(), "a link is never overwritten");
    assert_eq!(backend.load().await.unwrap().unwrap().pn.unwrap().user, "5511999990001");

    backend.store_prekey(1, b"key", false).await.unwrap();
    backend.store_sent_message("c", "m", b"body").await.unwrap();
    forget_device(&home.number).await.unwrap();
    assert!(!is_linked(&home.number).await);
    assert_eq!(backend.get_max_prekey_id().await.unwrap(), 0);
}

#[tokio::test]
async fn after_poison_or_seal_nothing_is_written() {
    let home = Home::open("poison").await;
    let sealed = home.backend();
    sealed.seal();
    assert!(sealed.put_session("a@lid.0", b"x").await.is_err());
    assert_eq!(home.failures.load(Ordering::SeqCst), 0, "sealing is no failure");

    let backend = home.backend();
    backend.put_session("a@lid.0", b"before").await.unwrap();
    home.number.poison();
    assert!(backend.put_session("a@lid.0", b"after").await.is_err());
    assert!(backend.store_pending_inbound("c", "s", "i", b"m").await.is_err());
    assert!(backend.save(&linked("5511999990001")).await.is_err());
    assert_eq!(backend.get_session("a@lid.0").await.unwrap().as_deref(), Some(&b"before"[..]));
    assert!(home.failures.load(Ordering::SeqCst) >= 3);
}

#[tokio::test]
async fn no_name_stands_in_a_key() {
    let home = Home::open("names").await;
    let backend = home.backend();
    let phone = "5511987654321";
    backend.put_session(&format!("{phone}:1@s.whatsapp.net.0"), b"s").await.unwrap();
    backend.put_lid_mapping(&mapping("7", phone)).await.unwrap();
    backend.store_sent_message(phone, phone, b"m").await.unwrap();
    backend.store_pending_inbound(phone, phone, phone, b"m").await.unwrap();
    for tag in [Tag::Session, Tag::ProtocolCache, Tag::SentMessage, Tag::PendingInbound] {
        for (key, _) in home.number.scan(tag, &[], None, Order::Ascending, 10).await.unwrap() {
            let text = String::from_utf8_lossy(&key).into_owned();
            assert!(!text.contains(phone), "{tag:?}");
        }
    }
}
