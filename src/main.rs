//! Arguments, then one command.

use std::process::ExitCode;

use mimalloc::MiMalloc;

/// Flattest memory across mass restarts of the allocators measured.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> ExitCode {
    switchboard::cli::run()
}
