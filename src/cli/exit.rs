//! Exit codes, after sysexits.h.

use std::process::ExitCode;

/// Something failed while running.
pub(super) const SOFTWARE: u8 = 70;
/// Something that was needed is not there: a port, the data directory.
pub(super) const UNAVAILABLE: u8 = 69;
/// The configuration is wrong.
pub(super) const CONFIG: u8 = 78;

pub(super) fn code(code: u8) -> ExitCode {
    ExitCode::from(code)
}
