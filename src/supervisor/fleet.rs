//! The way to the supervisor for everybody above it: boot, add, remove, reset, drain.

use std::sync::Arc;
use std::time::Duration;

use ractor::{Actor, ActorRef};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::directory::Directory;
use super::eraser::Eraser;
use super::root::{Root, RootMessage};
use super::shard::Member;
use crate::domain::id::{EventSeq, NumberId};
use crate::number::environment::Environment;
use crate::number::handle::NumberHandle;
use crate::store::error::StoreError;
use crate::store::meta::NumberRecord;

/// How long a new number may take to answer before its creator is told to look again later.
const START_PATIENCE: Duration = Duration::from_secs(10);
/// How long the last socket of a removed number may take to go.
const SOCKET_PATIENCE: Duration = Duration::from_secs(20);

/// A change of the fleet failed.
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    /// There is no such number.
    #[error("no such number")]
    NotFound,
    /// The supervisor is going down.
    #[error("the supervisor is going down")]
    GoingDown,
    /// The disk refused.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// All numbers of the process.
#[derive(Debug, Clone)]
pub struct Fleet {
    environment: Arc<Environment>,
    directory: Arc<Directory>,
    root: ActorRef<RootMessage>,
    eraser: Arc<Eraser>,
}

impl Fleet {
    /// Starts the supervisor and every number on disk. Returns as soon as the directory is complete; connecting
    /// goes on behind. The second value ends when the root does.
    ///
    /// # Errors
    /// When the supervisor itself does not start.
    pub async fn start(environment: Arc<Environment>) -> Result<(Self, JoinHandle<()>), ractor::SpawnErr> {
        let directory = Arc::new(Directory::default());
        let root = Root { environment: environment.clone(), directory: directory.clone() };
        let (root, ended) = Actor::spawn(None, root, ()).await?;
        let eraser = Arc::new(Eraser::start(environment.store.clone()));
        let fleet = Self { environment, directory, root, eraser };
        fleet.boot().await;
        Ok((fleet, ended))
    }

    async fn boot(&self) {
        let meta = self.environment.store.meta().clone();
        let mut members = Vec::new();
        for record in meta.numbers(None) {
            members.push(self.member(&record));
        }
        tracing::info!(numbers = members.len(), "fleet booted");
        let _ = self.root.cast(RootMessage::Ensure(members));
    }

    fn member(&self, record: &NumberRecord) -> Member {
        let now = self.environment.clock.now();
        let handle = Arc::new(NumberHandle::new(record.id, record.tenant, record.phone.clone(), now));
        self.directory.insert(handle.clone());
        Member { handle, volume: record.volume }
    }

    /// The numbers.
    #[must_use]
    pub fn directory(&self) -> &Arc<Directory> {
        &self.directory
    }

    /// Starts the actor of a number that was just recorded; returns when it answers, or after 10 s.
    pub async fn add(&self, record: &NumberRecord) -> Arc<NumberHandle> {
        let member = self.member(record);
        let handle = member.handle.clone();
        let mut events = handle.watch_events();
        let _ = self.root.cast(RootMessage::Ensure(vec![member]));
        // Its first event says that it exists.
        let created = events.wait_for(|seq| *seq > EventSeq(0));
        let _ = tokio::time::timeout(START_PATIENCE, created).await;
        handle
    }

    /// Deletes a number. Its data key is destroyed first: from then on nothing of it can be read, whatever happens.
    /// Then it stops, and its records are removed behind.
    ///
    /// # Errors
    /// See [`FleetError`].
    pub async fn remove(&self, id: NumberId) -> Result<(), FleetError> {
        let meta = self.environment.store.meta();
        if meta.number(id).is_none() {
            return Err(FleetError::NotFound);
        }
        meta.begin_erasure(id).await?;
        if let Some(handle) = self.directory.get(id) {
            handle.delete();
        }
        let (done, stopped) = oneshot::channel();
        self.root.cast(RootMessage::Remove(id, done)).map_err(|_| FleetError::GoingDown)?;
        stopped.await.map_err(|_| FleetError::GoingDown)?;
        self.eraser.wake();
        if let Some(handle) = self.directory.get(id) {
            let gone = tokio::time::timeout(SOCKET_PATIENCE, handle.slot().clone().acquire_owned()).await;
            if gone.is_err() {
                tracing::warn!(number = %id, "the last socket of a deleted number does not go away");
            }
        }
        self.directory.remove(id);
        Ok(())
    }

    /// Ends a quarantine and forgets its crashes.
    pub fn reset(&self, id: NumberId) {
        let _ = self.root.cast(RootMessage::Reset(id));
    }

    /// A round trip through the root and every shard.
    pub async fn ping(&self) -> bool {
        let (reply, answer) = oneshot::channel();
        self.root.cast(RootMessage::Ping(reply)).is_ok() && answer.await.is_ok()
    }

    /// Lets every number finish what waits for an answer and close politely; kills what is left at the deadline.
    pub async fn drain(&self, deadline: Duration) {
        let (done, drained) = oneshot::channel();
        if self.root.cast(RootMessage::Drain { deadline, done }).is_ok() {
            let _ = tokio::time::timeout(deadline + Duration::from_secs(2), drained).await;
        }
        self.root.stop(None);
    }
}
