//! What every store behind the seam must do, whatever it is made of. Crashes have a file of their own.

use std::sync::{Arc, Mutex};

use super::home::{Home, claim};
use crate::store::error::StoreError;
use crate::store::key::Tag;
use crate::store::number_store::Order;
use crate::store::unit::{Check, Unit};

fn row(seq: u32) -> Unit {
    let mut unit = Unit::durable();
    unit.put(Tag::Message, seq.to_be_bytes(), seq.to_string());
    unit
}

#[tokio::test]
async fn a_unit_whose_check_fails_leaves_nothing_and_the_store_usable() {
    let home = Home::new("conflict");
    let store = home.open();
    let number = claim(&store, 1).await;
    number.commit(row(1)).await.unwrap();
    for check in [
        Check::Absent { tag: Tag::Message, rest: 1u32.to_be_bytes().to_vec() },
        Check::Present { tag: Tag::Message, rest: 9u32.to_be_bytes().to_vec() },
    ] {
        let mut unit = row(2);
        unit.put(Tag::Session, [7; 3], vec![1; 40_000]).delete(Tag::Message, 1u32.to_be_bytes());
        unit.checks.push(check);
        assert_eq!(number.commit(unit).await, Err(StoreError::Conflict));
    }
    assert_eq!(number.get(Tag::Message, &1u32.to_be_bytes()).await.unwrap().unwrap(), b"1");
    assert_eq!(number.get(Tag::Message, &2u32.to_be_bytes()).await.unwrap(), None);
    assert_eq!(number.get(Tag::Session, &[7; 3]).await.unwrap(), None);
    number.commit(row(2)).await.unwrap();
    store.close();
}

#[tokio::test]
async fn units_of_one_number_are_applied_and_answered_in_order() {
    let home = Home::new("order");
    let store = home.open();
    let number = claim(&store, 1).await;
    let answers = Arc::new(Mutex::new(Vec::new()));
    for seq in 0..300u32 {
        let answers = answers.clone();
        let mut unit = if seq.is_multiple_of(3) { Unit::rides_along() } else { Unit::durable() };
        unit.put(Tag::Counters, [], seq.to_be_bytes());
        number.submit(unit, move |outcome| answers.lock().unwrap().push((seq, outcome)));
    }
    number.commit(Unit::durable()).await.unwrap();
    let expected: Vec<_> = (0..300).map(|seq| (seq, Ok(()))).collect();
    assert_eq!(*answers.lock().unwrap(), expected);
    assert_eq!(number.get(Tag::Counters, &[]).await.unwrap().unwrap(), 299u32.to_be_bytes());
    store.close();
}

#[tokio::test]
async fn an_older_claim_is_fenced_and_writes_nothing() {
    let home = Home::new("epochs");
    let store = home.open();
    let old = claim(&store, 1).await;
    let new = claim(&store, 1).await;
    assert!(new.epoch() > old.epoch());
    assert_eq!(old.commit(row(1)).await, Err(StoreError::Fenced));
    assert!(old.is_poisoned() && !new.is_poisoned());
    assert_eq!(new.get(Tag::Message, &1u32.to_be_bytes()).await.unwrap(), None);
    store.close();
}

#[tokio::test]
async fn pages_show_what_was_there_once_and_in_order_while_others_write() {
    let home = Home::new("pages");
    let store = home.open();
    let (number, other) = (claim(&store, 1).await, claim(&store, 2).await);
    for seq in (0..200u32).step_by(2) {
        number.commit(row(seq)).await.unwrap();
    }
    for order in [Order::Ascending, Order::Descending] {
        let (mut seen, mut from): (Vec<u32>, Option<Vec<u8>>) = (Vec::new(), None);
        loop {
            let page = number.scan(Tag::Message, &[], from.as_deref(), order, 7).await.unwrap();
            // Rows before and after the position appear, and another number's, which is never seen.
            for seq in [1, 101, 199] {
                number.commit(row(seq)).await.unwrap();
                other.commit(row(seq)).await.unwrap();
            }
            let Some((last, _)) = page.last() else { break };
            from = Some(last.clone());
            for (key, value) in page {
                let seq = u32::from_be_bytes(key.try_into().unwrap());
                assert_eq!(value, seq.to_string().into_bytes());
                seen.push(seq);
            }
        }
        let mut sorted = seen.clone();
        sorted.sort_unstable();
        sorted.dedup();
        if order == Order::Descending {
            sorted.reverse();
        }
        assert_eq!(seen, sorted, "in order, each once");
        assert!((0..200).step_by(2).all(|seq| seen.contains(&seq)), "nothing that was there is missing");
    }
    store.close();
}

#[tokio::test]
async fn a_volume_that_opens_empty_is_not_taken_for_a_new_one() {
    let home = Home::new("born");
    let store = home.open();
    claim(&store, 1).await.commit(row(1)).await.unwrap();
    store.close();
    drop(store);
    let volume = home.dir.join("volume-00");
    std::fs::remove_file(volume.join("db")).unwrap();
    for entry in std::fs::read_dir(&volume).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap().to_string_lossy().starts_with("snap.") {
            std::fs::remove_file(path).unwrap();
        }
    }
    let store = home.open();
    let refused = store.claim(crate::domain::id::NumberId(1), 0).await.unwrap_err();
    assert!(matches!(&refused, StoreError::Damaged(_)), "{refused}");
    assert_eq!(store.report().iter().filter(|volume| volume.failure.is_some()).count(), 1, "the others work");
    store.close();
}
