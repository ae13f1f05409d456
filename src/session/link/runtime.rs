//! The library's tasks, owned: counted, given the session's span, their panics caught and told, and ended for
//! good when the session is over. The library alone would leave them running behind an abandoned client.

use std::future::{Future, poll_fn};
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::Poll;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::FutureExt;
use tokio::sync::Notify;
use tokio::task::{Id, JoinSet, try_id};
use tracing::Instrument;
use whatsapp_rust::wacore::runtime::{AbortHandle, Runtime};

type Task = Pin<Box<dyn Future<Output = ()> + Send + 'static>>;

/// Runs and owns the tasks of one session.
pub(super) struct LinkRuntime {
    /// `None` once the session is over: what is spawned then is dropped.
    tasks: Mutex<Option<JoinSet<()>>>,
    live: Arc<Live>,
    span: tracing::Span,
    on_panic: Arc<dyn Fn() + Send + Sync>,
}

#[derive(Default)]
struct Live {
    count: AtomicUsize,
    changed: Notify,
    halted: OnceLock<Id>,
}

struct Counted(Arc<Live>);

impl Counted {
    fn new(live: &Arc<Live>) -> Self {
        live.count.fetch_add(1, Ordering::AcqRel);
        Self(live.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.count.fetch_sub(1, Ordering::AcqRel);
        self.0.changed.notify_waiters();
    }
}

impl LinkRuntime {
    pub(super) fn new(span: tracing::Span, on_panic: Arc<dyn Fn() + Send + Sync>) -> Arc<Self> {
        Arc::new(Self { tasks: Mutex::new(Some(JoinSet::new())), live: Arc::default(), span, on_panic })
    }

    fn start(&self, task: Task) -> Option<tokio::task::AbortHandle> {
        let counted = Counted::new(&self.live);
        let on_panic = self.on_panic.clone();
        let guarded = async move {
            let mut task = task;
            let until_halted = poll_fn(|context| match counted.0.halted.get() {
                Some(halted) if try_id() == Some(*halted) => Poll::Ready(()),
                _ => task.as_mut().poll(context),
            });
            if AssertUnwindSafe(until_halted).catch_unwind().await.is_err() {
                on_panic();
            }
        };
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        let tasks = tasks.as_mut()?;
        while tasks.try_join_next().is_some() {}
        Some(tasks.spawn(guarded.instrument(self.span.clone())))
    }

    /// Tasks that have not ended.
    pub(super) fn live(&self) -> usize {
        self.live.count.load(Ordering::Acquire)
    }

    /// Waits until all tasks ended by themselves; false when some did not in time.
    pub(super) async fn idle(&self, patience: Duration) -> bool {
        let ended = async {
            loop {
                let changed = self.live.changed.notified();
                if self.live() == 0 {
                    return;
                }
                changed.await;
            }
        };
        tokio::time::timeout(patience, ended).await.is_ok()
    }

    /// Ends one task of the library where it would go on next. Once per session.
    pub(super) fn halt(&self, task: Id) {
        let _ = self.live.halted.set(task);
    }

    /// Aborts what is left and drops whatever is spawned from now on.
    pub(super) fn close(&self) {
        let tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(tasks);
    }
}

#[async_trait]
impl Runtime for LinkRuntime {
    fn spawn(&self, future: Task) -> AbortHandle {
        match self.start(future) {
            Some(handle) => AbortHandle::new(move || handle.abort()),
            None => AbortHandle::noop(),
        }
    }

    fn spawn_detached(&self, future: Task) {
        self.start(future);
    }

    fn sleep(&self, duration: Duration) -> Task {
        Box::pin(tokio::time::sleep(duration))
    }

    fn spawn_blocking(&self, work: Box<dyn FnOnce() + Send + 'static>) -> Task {
        let counted = Counted::new(&self.live);
        let on_panic = self.on_panic.clone();
        let span = self.span.clone();
        let job = tokio::task::spawn_blocking(move || {
            let _counted = counted;
            if std::panic::catch_unwind(AssertUnwindSafe(|| span.in_scope(work))).is_err() {
                on_panic();
            }
        });
        Box::pin(async move {
            let _ = job.await;
        })
    }

    fn yield_now(&self) -> Option<Task> {
        // The other workers of the runtime run meanwhile.
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    fn runtime() -> (Arc<LinkRuntime>, Arc<AtomicBool>) {
        let panicked = Arc::new(AtomicBool::new(false));
        let flag = panicked.clone();
        let on_panic = Arc::new(move || flag.store(true, Ordering::SeqCst));
        (LinkRuntime::new(tracing::Span::none(), on_panic), panicked)
    }

    #[tokio::test]
    async fn counts_tasks_and_tells_panics() {
        let (runtime, panicked) = runtime();
        runtime.spawn_detached(Box::pin(async {}));
        runtime.spawn(Box::pin(async { panic!("expected by this test") })).detach();
        assert!(runtime.idle(Duration::from_secs(5)).await);
        assert!(panicked.load(Ordering::SeqCst));
        assert_eq!(runtime.live(), 0);
    }

    #[tokio::test]
    async fn a_halted_task_goes_no_further_and_others_do() {
        let (runtime, panicked) = runtime();
        let (told, mut steps) = tokio::sync::mpsc::unbounded_channel();
        let release = tokio::sync::watch::Sender::new(());
        for _ in 0..2 {
            let (told, mut go_on) = (told.clone(), release.subscribe());
            runtime.spawn_detached(Box::pin(async move {
                told.send(try_id()).unwrap();
                go_on.changed().await.unwrap();
                told.send(try_id()).unwrap();
            }));
        }
        let (halted, other) = (steps.recv().await.unwrap().unwrap(), steps.recv().await.unwrap());
        runtime.halt(halted);
        release.send_replace(());
        assert!(runtime.idle(Duration::from_secs(5)).await);
        assert_eq!(steps.recv().await.unwrap(), other);
        assert!(steps.try_recv().is_err(), "the halted one went on");
        assert!(!panicked.load(Ordering::SeqCst));
    }

    #[tokio::test]
    async fn closing_ends_what_does_not_end() {
        let (runtime, _) = runtime();
        runtime.spawn_detached(Box::pin(std::future::pending()));
        assert!(!runtime.idle(Duration::from_millis(10)).await);
        runtime.close();
        assert!(runtime.idle(Duration::from_secs(5)).await);
        runtime.spawn_detached(Box::pin(std::future::pending()));
        assert_eq!(runtime.live(), 0, "a closed session starts nothing");
    }
}
