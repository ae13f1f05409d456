//! What an operator does with volumes while no daemon runs: look whether they can be read, and build one anew from what
//! can be. Nothing here deletes a damaged volume.

use std::collections::BTreeSet;
use std::fmt::{self, Display, Formatter};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::disk::{Disk, LOG_FILE, Log, refused, sled_refused, sync_dir};
use super::error::{OpenError, StoreError};
use super::key::Tag;
use super::layout::{META_CACHE_BYTES, StoreSettings, VOLUME_CACHE_BYTES, VOLUMES, lock, size_of};
use super::mender::Room;
use super::meta::Meta;
use super::number_store::{NumberStore, Order};
use super::open::{self, BORN_ROW};
use super::records::{decode, encode};
use super::unit::Unit;
use crate::domain::change::Counters;
use crate::domain::id::NumberId;

/// Rows written per batch.
const BATCH_ROWS: usize = 500;
/// Room that stays free beside a copy.
const SPARE_BYTES: u64 = 64 * 1024 * 1024;
/// A number whose newest rows may be lost counts on from so far behind what is left: no id is given out twice.
const COUNTERS_SKIP: u64 = 1_000_000;
const CHATS_SKIP: u32 = 10_000;
const ENDPOINTS_SKIP: u32 = 100;

/// What a volume holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contents {
    /// Records.
    pub rows: u64,
    /// Their keys and values, in bytes.
    pub bytes: u64,
    /// Numbers that own them.
    pub numbers: BTreeSet<NumberId>,
    /// Somewhere in the middle, rows could not be read.
    pub torn: bool,
}

/// One volume, or `meta`, looked at.
#[derive(Debug)]
pub struct Checked {
    /// Its directory's name; that of a damaged one says so.
    pub name: String,
    /// What its files take, in bytes.
    pub disk_bytes: u64,
    /// What could be read, or why it does not open.
    pub contents: Result<Contents, StoreError>,
}

/// What a rebuild kept, and what not.
#[derive(Debug)]
pub struct Rebuilt {
    /// The volume's files before and after, in bytes.
    pub disk_bytes: (u64, u64),
    /// What is in it now.
    pub kept: Contents,
    /// What had to be left out of a damaged volume; nothing was left out of one that opens.
    pub lost: Option<Lost>,
}

/// What a volume that was rebuilt from damaged files does without. It may be older than what was acknowledged, so nothing
/// is kept that would do harm when it is done again.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Lost {
    /// Numbers that must be linked again: Signal state never goes back in time.
    pub unlinked: usize,
    /// Sends that waited: they may have left, so they are not sent again.
    pub sends: u64,
    /// Webhooks that waited.
    pub deliveries: u64,
    /// Events of the log; every cursor has expired.
    pub events: u64,
}

/// Why nothing was rebuilt.
#[derive(Debug, thiserror::Error)]
pub enum RebuildError {
    /// Not one of the numbers' volumes.
    #[error("no such volume: {0}")]
    NoSuchVolume(String),
    /// The data directory cannot be used.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Reading or writing failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A copy would not fit.
    #[error("a copy needs {needed_mib} MiB free, there are {free_mib}")]
    NoRoom {
        /// Needed.
        needed_mib: u64,
        /// There.
        free_mib: u64,
    },
    /// It is damaged, and nobody said that a loss is accepted.
    #[error(
        "the volume is damaged: {rows} rows of {numbers} numbers can be read, newer ones may be lost; its numbers would \
         have to be linked again, {sends} waiting sends, {deliveries} waiting webhooks and {events} events would go. \
         Nothing was changed. To accept that, give --accept-loss"
    )]
    WouldLose {
        /// Readable rows.
        rows: u64,
        /// Whose.
        numbers: usize,
        /// Waiting sends.
        sends: u64,
        /// Waiting webhooks.
        deliveries: u64,
        /// Events.
        events: u64,
    },
}

impl Display for Checked {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} MiB on disk, ", self.name, self.disk_bytes >> 20)?;
        match &self.contents {
            Ok(contents) => contents.fmt(f),
            Err(error) => write!(f, "DAMAGED: {error}"),
        }
    }
}

impl Checked {
    /// Whether everything in it can be read.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.contents.as_ref().is_ok_and(|contents| !contents.torn)
    }
}

impl Display for Contents {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { rows, bytes, numbers, torn } = self;
        write!(f, "{rows} rows, {} MiB", bytes >> 20)?;
        if !numbers.is_empty() {
            write!(f, " of {} numbers", numbers.len())?;
        }
        if *torn { write!(f, ", DAMAGED: some rows cannot be read") } else { Ok(()) }
    }
}

impl Display for Rebuilt {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (before, after) = self.disk_bytes;
        write!(f, "{}; {} MiB on disk, {} before", self.kept, after >> 20, before >> 20)?;
        let Some(Lost { unlinked, sends, deliveries, events }) = &self.lost else { return Ok(()) };
        write!(
            f,
            ". Lost: what was written last, as far as the damage goes; {sends} waiting sends (not sent again: they may \
             have left; their history still calls them queued), {deliveries} waiting webhooks, {events} events (cursors \
             have expired). {unlinked} numbers must be linked again. The damaged files are still there"
        )
    }
}

/// A directory that goes away.
struct Scratch(PathBuf);

impl Scratch {
    /// An empty place beside the volume, whatever an interrupted run left there.
    fn beside(volume: &Path, suffix: &str) -> Result<Self, StoreError> {
        let place = open::beside(volume, suffix);
        if place.exists() {
            fs::remove_dir_all(&place).map_err(|error| refused(&error))?;
        }
        Ok(Self(place))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn names() -> impl Iterator<Item = String> {
    std::iter::once("meta".to_owned()).chain((0..VOLUMES).map(|index| format!("volume-{index:02}")))
}

fn ensure_room(disk: &dyn Disk, dir: &Path, bytes: u64) -> Result<(), RebuildError> {
    let free = disk.space(dir).map_err(|error| refused(&error))?.free;
    let needed = bytes + SPARE_BYTES;
    if free < needed {
        return Err(RebuildError::NoRoom { needed_mib: needed >> 20, free_mib: free >> 20 });
    }
    Ok(())
}

/// Looks at every volume, also at those that were set aside. Works on copies, one after the other: opening writes.
///
/// # Errors
/// When a daemon holds the directory, it cannot be read, or there is no room for a copy.
pub fn check(settings: &StoreSettings) -> Result<Vec<Checked>, RebuildError> {
    let _lock = lock(&settings.dir)?;
    let mut found = Vec::new();
    for name in names() {
        let path = settings.dir.join(&name);
        let places = [path.exists().then(|| path.clone()), open::newest_set_aside(&path)];
        for place in places.into_iter().flatten() {
            let disk_bytes = size_of(&place);
            let copy = copied(settings, &place)?;
            let mut contents = opened_as_it_is(&copy.0).and_then(|source| source.contents());
            if let (Ok(contents), "meta") = (&mut contents, name.as_str()) {
                // Its keys begin otherwise.
                contents.numbers.clear();
            }
            let shown = place.file_name().map_or(name.clone(), |name| name.to_string_lossy().into_owned());
            found.push(Checked { name: shown, disk_bytes, contents });
        }
    }
    Ok(found)
}

fn copied(settings: &StoreSettings, place: &Path) -> Result<Scratch, RebuildError> {
    ensure_room(settings.disk.as_ref(), &settings.dir, size_of(place))?;
    let copy = Scratch::beside(place, ".copy")?;
    open::copy_files(place, &copy.0).map_err(|error| refused(&error))?;
    Ok(copy)
}

impl Contents {
    fn add(&mut self, key: &[u8], value: &[u8]) {
        if key == BORN_ROW {
            return;
        }
        self.rows += 1;
        self.bytes += (key.len() + value.len()) as u64;
        if let Some(id) = key.first_chunk() {
            self.numbers.insert(NumberId(u64::from_be_bytes(*id)));
        }
    }
}

/// A Db opened to be read to its end.
struct Source {
    // Dropped before the Db: the order of the fields is the order of their ends.
    tree: sled::Tree,
    _db: sled::Db,
}

fn opened_as_it_is(path: &Path) -> Result<Source, StoreError> {
    let (db, tree) = open::try_open(path, VOLUME_CACHE_BYTES)?;
    let source = Source { tree, _db: db };
    if open::lost_its_birth(path, &source.tree)? { Err(open::opens_empty()) } else { Ok(source) }
}

impl Source {
    /// Gives every row that can be read; true when some in the middle cannot.
    fn each(&self, mut row: impl FnMut(&[u8], &[u8]) -> Result<(), StoreError>) -> Result<bool, StoreError> {
        let mut from = Vec::new();
        let forward = self.run(self.tree.iter(), |key, value| {
            from = key.to_vec();
            row(key, value)
        })?;
        if forward {
            return Ok(false);
        }
        from.push(0);
        self.run(self.tree.range(from..).rev(), row)?;
        Ok(true)
    }

    fn contents(&self) -> Result<Contents, StoreError> {
        let mut contents = Contents::default();
        contents.torn = self.each(|key, value| {
            contents.add(key, value);
            Ok(())
        })?;
        Ok(contents)
    }

    /// True when it came to the end.
    fn run(
        &self,
        mut rows: impl Iterator<Item = sled::Result<(sled::IVec, sled::IVec)>>,
        mut row: impl FnMut(&[u8], &[u8]) -> Result<(), StoreError>,
    ) -> Result<bool, StoreError> {
        loop {
            // sled panics on some pages that it cannot read.
            match catch_unwind(AssertUnwindSafe(|| rows.next())) {
                Ok(Some(Ok((key, value)))) => row(&key, &value)?,
                Ok(None) => return Ok(true),
                Ok(Some(Err(_))) | Err(_) => return Ok(false),
            }
        }
    }
}

/// Builds a volume anew: one that opens only loses the room it wastes; one that was set aside keeps what can be read of it
/// and may be kept, if `accept_loss` says so. The damaged files stay where they are.
///
/// # Errors
/// See [`RebuildError`]; the volume is as it was then.
pub async fn rebuild(settings: &StoreSettings, name: &str, accept_loss: bool) -> Result<Rebuilt, RebuildError> {
    if !names().skip(1).any(|volume| volume == name) {
        return Err(RebuildError::NoSuchVolume(name.to_owned()));
    }
    let _lock = lock(&settings.dir)?;
    let path = settings.dir.join(name);
    match open::open(&path, VOLUME_CACHE_BYTES, settings.disk.as_ref()) {
        Ok((db, tree, _log)) => compact(settings.disk.as_ref(), &path, &Source { tree, _db: db }),
        Err(StoreError::Damaged(_)) => salvage(settings, &path, accept_loss).await,
        Err(error) => Err(error.into()),
    }
}

/// A log below this is never copied at a start.
pub(super) const TRIM_LOG_BYTES: u64 = 128 * 1024 * 1024;
/// A log so many times as large as what lives in it is copied; while it is cleaned well, sled's takes 3 to 5 times as much.
const TRIM_RATIO: u64 = 6;
/// Beside the log: how long it was when it was last looked at and found lean.
const LEAN_FILE: &str = "lean";

/// Copies a volume whose log has grown far beyond what lives in it, before it is opened for good: sled cleans only a log
/// that is open for a while, so lives that end soon after each start would fill the disk. A log that was found lean is
/// looked at again when it has doubled. A crash on the way leaves the volume as it was.
///
/// # Errors
/// When it does not open, cannot be read whole, or there is no room for the copy; it is as it was then.
pub(super) fn trim(
    path: &Path,
    cache_bytes: u64,
    disk: &dyn Disk,
    floor: u64,
) -> Result<Option<Rebuilt>, RebuildError> {
    let log_bytes = fs::metadata(path.join(LOG_FILE)).map_or(0, |log| log.len());
    let lean = fs::read_to_string(path.join(LEAN_FILE)).ok().and_then(|text| text.parse().ok()).unwrap_or(0u64);
    if log_bytes < floor.max(lean.saturating_mul(2)) {
        return Ok(None);
    }
    let (db, tree, _log) = open::open(path, cache_bytes, disk)?;
    let source = Source { tree, _db: db };
    if log_bytes < source.contents()?.bytes.saturating_mul(TRIM_RATIO) {
        fs::write(path.join(LEAN_FILE), log_bytes.to_string()).map_err(|error| refused(&error))?;
        return Ok(None);
    }
    compact(disk, path, &source).map(Some)
}

fn compact(disk: &dyn Disk, path: &Path, source: &Source) -> Result<Rebuilt, RebuildError> {
    let before = size_of(path);
    ensure_room(disk, path.parent().unwrap_or(path), before)?;
    let fresh = Scratch::beside(path, ".new")?;
    let mut writer = Writer::at(disk, &fresh.0)?;
    if source.each(|key, value| writer.add(key, value))? {
        return Err(StoreError::Failed("a row cannot be read: nothing was changed".to_owned()).into());
    }
    let kept = writer.finish()?;
    open::exchange(path, &fresh.0).map_err(|error| refused(&error))?;
    Ok(Rebuilt { disk_bytes: (before, size_of(path)), kept, lost: None })
}

async fn salvage(settings: &StoreSettings, path: &Path, accept_loss: bool) -> Result<Rebuilt, RebuildError> {
    let aside = open::newest_set_aside(path).ok_or_else(|| RebuildError::NoSuchVolume(path.display().to_string()))?;
    let before = size_of(&aside);
    ensure_room(settings.disk.as_ref(), &settings.dir, before * 2)?;
    let readable = readable(settings, &aside)?;
    let fresh = Scratch::beside(path, ".new")?;
    let mut writer = Writer::at(settings.disk.as_ref(), &fresh.0)?;
    let mut lost = Lost::default();
    let mut torn = false;
    if let Some((_copy, source)) = &readable {
        torn = source.each(|key, value| if lost.leaves_out(key) { Ok(()) } else { writer.add(key, value) })?;
    }
    let mut kept = writer.finish()?;
    kept.torn = torn;
    if !accept_loss {
        let (Lost { sends, deliveries, events, .. }, Contents { rows, ref numbers, .. }) = (lost, kept);
        return Err(RebuildError::WouldLose { rows, numbers: numbers.len(), sends, deliveries, events });
    }
    lost.unlinked = skip_counters(settings, path, &fresh.0).await?;
    fs::rename(&fresh.0, path).and_then(|()| sync_dir(&settings.dir)).map_err(|error| refused(&error))?;
    Ok(Rebuilt { disk_bytes: (before, size_of(path)), kept, lost: Some(lost) })
}

/// What opens of damaged files, if anything does. Sled is given copies: it writes to what it opens.
fn readable(settings: &StoreSettings, aside: &Path) -> Result<Option<(Scratch, Source)>, RebuildError> {
    let io = |error| RebuildError::from(refused(&error));
    // sled writes its configuration anew, and reads the whole log again, as far as it can, where there is no checkpoint.
    for (without_config, without_checkpoint) in [(false, false), (true, false), (true, true)] {
        let copy = copied(settings, aside)?;
        if without_config {
            open::remove_config(&copy.0).map_err(io)?;
        }
        if without_checkpoint {
            open::remove_checkpoints(&copy.0, false).map_err(io)?;
        }
        if let Ok(source) = opened_as_it_is(&copy.0) {
            return Ok(Some((copy, source)));
        }
    }
    Ok(None)
}

impl Lost {
    /// Whether a record of a damaged volume must not be kept; counts it.
    fn leaves_out(&mut self, key: &[u8]) -> bool {
        let Some(tag) = key.get(8) else { return false };
        let tag = if *tag == Tag::Chunk as u8 { key.get(9).unwrap_or(tag) } else { tag };
        let signal = Tag::Device as u8..=Tag::MessageSecret as u8;
        let is = |wanted: Tag| *tag == wanted as u8;
        if key[8] == *tag {
            self.sends += u64::from(is(Tag::Outbox));
            self.deliveries += u64::from(is(Tag::Delivery));
            self.events += u64::from(is(Tag::Event));
        }
        let again = [Tag::Outbox, Tag::OutboxBody, Tag::Delivery, Tag::Event, Tag::Life];
        signal.contains(tag) || again.into_iter().any(is)
    }
}

/// Writes rows into a new Db.
struct Writer {
    tree: sled::Tree,
    db: sled::Db,
    log: Box<dyn Log>,
    batch: sled::Batch,
    waiting: usize,
    written: Contents,
}

impl Writer {
    fn at(disk: &dyn Disk, path: &Path) -> Result<Self, StoreError> {
        let (db, tree, log) = open::open(path, VOLUME_CACHE_BYTES, disk)?;
        Ok(Self { tree, db, log, batch: sled::Batch::default(), waiting: 0, written: Contents::default() })
    }

    fn add(&mut self, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        self.written.add(key, value);
        self.batch.insert(key, value);
        self.waiting += 1;
        if self.waiting == BATCH_ROWS { self.write() } else { Ok(()) }
    }

    fn write(&mut self) -> Result<(), StoreError> {
        self.waiting = 0;
        self.tree.apply_batch(std::mem::take(&mut self.batch)).map_err(|error| sled_refused(&error))
    }

    /// Makes everything durable, reads it again, and closes the Db.
    fn finish(mut self) -> Result<Contents, StoreError> {
        self.write()?;
        self.db.flush().map_err(|error| sled_refused(&error))?;
        self.log.sync().map_err(|error| refused(&error))?;
        let read = Source { tree: self.tree, _db: self.db }.contents()?;
        if read != self.written {
            return Err(StoreError::Failed("what was written reads differently".to_owned()));
        }
        Ok(read)
    }
}

/// Numbers count on far behind what is left of them, and their event log begins there. Gives how many there are.
async fn skip_counters(settings: &StoreSettings, path: &Path, fresh: &Path) -> Result<usize, RebuildError> {
    let meta_volume = Arc::new(settings.volume("meta", META_CACHE_BYTES));
    let meta = Meta::open(meta_volume.clone(), &settings.master_key_file, &settings.random)?;
    let name = fresh.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let volume = settings.volume(&name, VOLUME_CACHE_BYTES);
    let index = names().skip(1).position(|name| path.ends_with(name));
    let numbers = meta.numbers(None);
    let mut count = 0;
    for number in numbers.iter().filter(|number| Some(usize::from(number.volume)) == index) {
        let store =
            NumberStore::claim(number.id, meta.keys_for(number.id)?, volume.db()?, Arc::new(Room::default())).await?;
        let stored = store.get(Tag::Counters, &[]).await?;
        let mut counters: Counters = stored.map(|bytes| decode(&bytes)).transpose()?.unwrap_or_default();
        let newest = store.keys(Tag::Message, &[], None, Order::Descending, (0, 1)).await?;
        let newest = newest.first().and_then(|key| key.first_chunk()).map_or(0, |seq| u64::from_be_bytes(*seq));
        counters.message = counters.message.max(newest) + COUNTERS_SKIP;
        counters.event += COUNTERS_SKIP;
        counters.event_floor = counters.event;
        counters.chat += CHATS_SKIP;
        counters.endpoint += ENDPOINTS_SKIP;
        let mut unit = Unit::durable();
        unit.put(Tag::Counters, [], encode(&counters));
        store.commit(unit).await?;
        count += 1;
    }
    volume.close();
    meta_volume.close();
    Ok(count)
}
