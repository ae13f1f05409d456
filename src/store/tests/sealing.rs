//! What lies on disk is sealed, belongs to its number and its key, and is gone with the data key.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use super::home::{Home, claim, on_disk, record, unlocked};
use crate::domain::id::NumberId;
use crate::store::committer::RawOp;
use crate::store::error::{OpenError, StoreError};
use crate::store::key::{Tag, full_key};
use crate::store::layout::Store;
use crate::store::master::{MasterKeyError, MasterKeys};
use crate::store::unit::Unit;

const BODY: &[u8] = b"meet me behind the greenhouse at nine";

#[tokio::test]
async fn nothing_of_a_number_lies_on_disk_in_clear() {
    let home = Home::new("clear");
    let store = home.open();
    let number = claim(&store, 5).await;
    let mut unit = Unit::durable();
    unit.put(Tag::Message, [1], BODY).put(Tag::Session, [2], BODY.repeat(2_000)).put(Tag::ChatMessage, [3], []);
    number.commit(unit).await.unwrap();
    assert_eq!(number.get(Tag::Message, &[1]).await.unwrap().unwrap(), BODY);
    assert_eq!(number.get(Tag::Session, &[2]).await.unwrap().unwrap(), BODY.repeat(2_000), "cut and put together");
    assert_eq!(number.get(Tag::ChatMessage, &[3]).await.unwrap().unwrap(), b"");
    store.close();
    drop((number, store));
    for needle in [BODY, b"planted name", b"15550000005", &BODY[..8]] {
        assert_eq!(on_disk(&home.dir, needle), None, "{:?}", String::from_utf8_lossy(needle));
    }
    let store = home.open();
    assert_eq!(store.meta().number(NumberId(5)).unwrap().name, "planted name 5", "read back after a restart");
    let number = claim(&store, 5).await;
    assert_eq!(number.get(Tag::Session, &[2]).await.unwrap().unwrap(), BODY.repeat(2_000));
    store.close();
}

#[tokio::test]
async fn a_value_cannot_be_moved_to_another_key_or_number() {
    let home = Home::new("moved");
    let store = home.open();
    for id in [1, 2] {
        let mut unit = Unit::durable();
        unit.put(Tag::Message, [1], BODY).put(Tag::Message, [2], b"other").put(Tag::Session, [1], BODY.repeat(1_000));
        claim(&store, id).await.commit(unit).await.unwrap();
    }
    store.close();
    drop(store);
    let volume = home.settings.volume("volume-00", 1 << 20);
    let (one, two) = (NumberId(1), NumberId(2));
    let stored = |number, tag, rest: &[u8]| volume.db().unwrap().get(&full_key(number, tag, rest)).unwrap().unwrap();
    let piece = [Tag::Session as u8, 1, 0, 0];
    volume
        .write_now(vec![
            RawOp::Put(full_key(one, Tag::Message, &[2]), stored(one, Tag::Message, &[1])),
            RawOp::Put(full_key(two, Tag::Message, &[1]), stored(one, Tag::Message, &[1])),
            RawOp::Put(full_key(two, Tag::Chunk, &piece), stored(one, Tag::Chunk, &piece)),
        ])
        .unwrap();
    volume.close();
    drop(volume);
    let store = home.open();
    let (first, second) = (claim(&store, 1).await, claim(&store, 2).await);
    assert_eq!(first.get(Tag::Message, &[1]).await.unwrap().unwrap(), BODY, "its own place");
    for moved in [
        first.get(Tag::Message, &[2]).await,
        second.get(Tag::Message, &[1]).await,
        second.get(Tag::Session, &[1]).await,
    ] {
        assert!(matches!(moved, Err(StoreError::Corrupt(_))), "{moved:?}");
    }
    store.close();
}

#[tokio::test]
async fn a_deleted_number_cannot_be_read_from_the_moment_it_is_deleted() {
    let home = Home::new("erased");
    let store = home.open();
    let number = claim(&store, 1).await;
    for part in 0..3u8 {
        let mut unit = Unit::durable();
        for row in 0..250u8 {
            unit.put(Tag::Message, [part, row], BODY);
        }
        number.commit(unit).await.unwrap();
    }
    store.meta().begin_erasure(NumberId(1)).await.unwrap();
    assert!(store.meta().number(NumberId(1)).is_none());
    assert_eq!(store.claim(NumberId(1), 0).await.unwrap_err(), StoreError::Erased);
    // A crash before the records are gone.
    store.close();
    drop((number, store));
    let store = home.open();
    assert_eq!(store.claim(NumberId(1), 0).await.unwrap_err(), StoreError::Erased);
    let erasures = store.meta().erasures();
    assert_eq!(erasures.len(), 1);
    // The phone number is free at once, also while the old records are still there.
    store
        .meta()
        .create_number(crate::store::meta::NumberRecord { id: NumberId(2), ..record(1) }, Vec::new())
        .await
        .unwrap();
    store.erase(erasures[0]).await.unwrap();
    assert!(store.meta().erasures().is_empty());
    store.close();
    drop(store);
    let volume = home.settings.volume("volume-00", 1 << 20);
    let (from, to) = (1u64.to_be_bytes(), 2u64.to_be_bytes());
    assert!(volume.db().unwrap().scan(&from, &to, false, 10).unwrap().is_empty(), "no row is left");
    volume.close();
}

#[tokio::test]
async fn who_still_writes_while_a_number_is_erased_is_fenced_off() {
    let home = Home::new("fenced");
    let store = home.open();
    let number = claim(&store, 1).await;
    store.meta().begin_erasure(NumberId(1)).await.unwrap();
    store.erase(store.meta().erasures()[0]).await.unwrap();
    let mut unit = Unit::durable();
    unit.put(Tag::Message, [1], BODY);
    assert_eq!(number.commit(unit).await, Err(StoreError::Fenced));
    store.close();
}

#[tokio::test]
async fn the_master_key_is_changed_without_touching_a_value() {
    let home = Home::new("rotate");
    let (settings, file) = (&home.settings, &home.settings.master_key_file);
    let store = home.open();
    let mut unit = Unit::durable();
    unit.put(Tag::Message, [1], BODY);
    claim(&store, 1).await.commit(unit).await.unwrap();
    store.close();
    drop(store);
    let first = MasterKeys::load(file).unwrap().newest_id();
    let second = MasterKeys::rotate(file, &settings.random).unwrap();
    assert_ne!(first, second);
    let refused = unlocked(|| Store::drop_older_masters(settings)).unwrap_err();
    assert!(matches!(refused, OpenError::MasterKey(MasterKeyError::StillUsed { wrapped: 2 })), "{refused}");
    let store = home.open();
    store.close();
    drop(store);
    assert_eq!(unlocked(|| Store::drop_older_masters(settings)).unwrap(), 1);
    assert!(!fs::read_to_string(file).unwrap().contains(&first));
    let store = home.open();
    let number = claim(&store, 1).await;
    assert_eq!(number.get(Tag::Message, &[1]).await.unwrap().unwrap(), BODY);
    store.close();
}

#[tokio::test]
async fn without_its_master_key_a_directory_does_not_open_and_gets_no_new_one() {
    let home = Home::new("missing");
    let file = &home.settings.master_key_file;
    let store = home.open();
    claim(&store, 1).await;
    store.close();
    drop(store);
    let kept = fs::read_to_string(file).unwrap();
    fs::remove_file(file).unwrap();
    let error = home.try_open().unwrap_err();
    assert!(matches!(error, OpenError::MasterKey(MasterKeyError::Missing { .. })), "{error}");
    assert!(!file.exists());
    MasterKeys::load_or_create(file, &home.settings.random).unwrap();
    let error = home.try_open().unwrap_err();
    assert!(matches!(error, OpenError::MasterKey(MasterKeyError::NotOurs { .. })), "{error}");
    fs::write(file, kept).unwrap();
    fs::set_permissions(file, fs::Permissions::from_mode(0o604)).unwrap();
    let error = home.try_open().unwrap_err();
    assert!(matches!(error, OpenError::MasterKey(MasterKeyError::Permissions { .. })), "{error}");
    fs::set_permissions(file, fs::Permissions::from_mode(0o600)).unwrap();
    home.open().close();
}

#[test]
fn a_directory_of_another_format_is_refused_by_its_number() {
    for (settings, found) in [(r#"{"schema":1,"secret":[]}"#, 1), (r#"{"format":3,"new":{}}"#, 3)] {
        let home = Home::new(&format!("format-{found}"));
        let meta = home.settings.volume("meta", 1 << 20);
        meta.write_now(vec![RawOp::Put(b"S".to_vec(), settings.as_bytes().to_vec())]).unwrap();
        meta.close();
        drop(meta);
        let error = home.try_open().unwrap_err();
        assert!(matches!(error, OpenError::Format { found: of, supported: 2, .. } if of == found), "{error}");
        assert!(!home.settings.master_key_file.exists(), "nothing is made beside data that is not understood");
    }
}
