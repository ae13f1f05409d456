//! One volume: a Db with one tree and its committer. Numbers live in it as key ranges.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::committer::{Committer, CommitterStats, RawOp, Request};
use super::error::StoreError;
use super::open;

pub(super) struct Volume {
    path: PathBuf,
    tree: sled::Tree,
    committer: Committer,
}

impl Volume {
    pub(super) fn open(name: &str, path: &Path, cache_bytes: u64) -> Result<Self, StoreError> {
        let (db, log) = open::open(path, cache_bytes)?;
        let failed = |error: sled::Error| StoreError::Failed(error.to_string());
        let tree = db.open_tree("d").map_err(failed)?;
        db.flush().map_err(failed)?;
        log.sync_data().map_err(|error| StoreError::Failed(error.to_string()))?;
        let committer = Committer::start(name, db, tree.clone(), log)
            .map_err(|error| StoreError::Failed(format!("start committer: {error}")))?;
        Ok(Self { path: path.to_owned(), tree, committer })
    }

    pub(super) fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        let value = self.tree.get(key).map_err(|error| StoreError::Failed(error.to_string()))?;
        Ok(value.map(|value| value.to_vec()))
    }

    /// Records in `[from, to)`, in key order or against it, `limit` at most.
    pub(super) fn scan(
        &self,
        from: &[u8],
        to: &[u8],
        newest_first: bool,
        limit: usize,
    ) -> Result<Vec<(Vec<u8>, Vec<u8>)>, StoreError> {
        let range = self.tree.range(from..to);
        let taken: Vec<_> = if newest_first { range.rev().take(limit).collect() } else { range.take(limit).collect() };
        let mut rows = Vec::with_capacity(taken.len());
        for row in taken {
            let (key, value) = row.map_err(|error| StoreError::Failed(error.to_string()))?;
            rows.push((key.to_vec(), value.to_vec()));
        }
        Ok(rows)
    }

    /// Keys in `[from, to)` without their values, after `skip` of them, `limit` at most.
    pub(super) fn keys(
        &self,
        from: &[u8],
        to: &[u8],
        newest_first: bool,
        skip: usize,
        limit: usize,
    ) -> Result<Vec<Vec<u8>>, StoreError> {
        let range = self.tree.range(from..to);
        let failed = |error: sled::Error| StoreError::Failed(error.to_string());
        let key = |row: sled::Result<(sled::IVec, sled::IVec)>| row.map(|(key, _)| key.to_vec()).map_err(failed);
        if newest_first {
            range.rev().skip(skip).take(limit).map(key).collect()
        } else {
            range.skip(skip).take(limit).map(key).collect()
        }
    }

    pub(super) fn submit(&self, request: Request) {
        self.committer.submit(request);
    }

    /// Writes and waits until it is on disk. Blocks: for opening and for commands, not for the runtime.
    pub(super) fn write_now(&self, ops: Vec<RawOp>) -> Result<(), StoreError> {
        let (answer, done) = std::sync::mpsc::channel();
        let tell = Box::new(move |outcome| drop(answer.send(outcome)));
        self.submit(Request { ops, checks: Vec::new(), bytes: 0, durable: true, done: tell });
        done.recv().unwrap_or(Err(StoreError::Closed))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn is_failed(&self) -> bool {
        self.committer.is_failed()
    }

    pub(super) fn stats(&self) -> Arc<CommitterStats> {
        self.committer.stats.clone()
    }

    pub(super) fn close(&self) {
        self.committer.close();
    }
}
