//! Opening a Db so that a crash during an earlier open, or a damaged checkpoint, does not become a crash loop.

use std::fs::{self, File};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use super::error::StoreError;

/// sled's file cannot be larger than this per record without side files; see `chunk`.
const SEGMENT_BYTES: usize = 2 * 1024 * 1024;

fn config(path: &Path, cache_bytes: u64) -> sled::Config {
    sled::Config::new()
        .path(path)
        .segment_size(SEGMENT_BYTES)
        .cache_capacity(cache_bytes)
        .mode(sled::Mode::HighThroughput)
        // The only caller of sled's segment clean-up is its periodic flusher.
        .flush_every_ms(Some(500))
}

fn checkpoints(path: &Path, unfinished_only: bool) -> std::io::Result<Vec<std::path::PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("snap.") && (!unfinished_only || name.ends_with(".generating")) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

fn remove_checkpoints(path: &Path, unfinished_only: bool) -> std::io::Result<()> {
    for file in checkpoints(path, unfinished_only)? {
        fs::remove_file(file)?;
    }
    Ok(())
}

fn copy_aside(path: &Path) -> std::io::Result<()> {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".damaged");
    let aside = Path::new(&aside);
    fs::create_dir_all(aside)?;
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            fs::copy(entry.path(), aside.join(entry.file_name()))?;
        }
    }
    Ok(())
}

fn try_open(path: &Path, cache_bytes: u64) -> Result<sled::Db, String> {
    // sled panics on some damaged logs; a panic here must cost one volume, not the process.
    match catch_unwind(AssertUnwindSafe(|| config(path, cache_bytes).open())) {
        Ok(Ok(db)) => Ok(db),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("the log is damaged (panic while opening)".to_owned()),
    }
}

fn sync_new_files(path: &Path) -> std::io::Result<()> {
    for name in ["conf", "db"] {
        File::open(path.join(name))?.sync_all()?;
    }
    File::open(path)?.sync_all()?;
    if let Some(parent) = path.parent() {
        File::open(parent)?.sync_all()?;
    }
    Ok(())
}

/// Opens or creates the Db at `path` and a handle for syncing its log.
///
/// # Errors
/// `Failed` when it cannot be opened, also not without its checkpoints; the damaged files were copied beside it.
pub(super) fn open(path: &Path, cache_bytes: u64) -> Result<(sled::Db, File), StoreError> {
    let failed = |step: &str, error: &dyn std::fmt::Display| StoreError::Failed(format!("{step}: {error}"));
    fs::create_dir_all(path).map_err(|error| failed("create directory", &error))?;
    remove_checkpoints(path, true).map_err(|error| failed("remove unfinished checkpoint", &error))?;
    let db = match try_open(path, cache_bytes) {
        Ok(db) => db,
        Err(first) => {
            tracing::error!(error = %first, "volume does not open, trying without its checkpoints");
            copy_aside(path).map_err(|error| failed("copy aside", &error))?;
            remove_checkpoints(path, false).map_err(|error| failed("remove checkpoints", &error))?;
            try_open(path, cache_bytes).map_err(StoreError::Failed)?
        }
    };
    sync_new_files(path).map_err(|error| failed("sync", &error))?;
    let log = File::open(path.join("db")).map_err(|error| failed("open log", &error))?;
    Ok((db, log))
}
