//! How many files and sockets the process may have open.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What is open besides one socket a number: volumes, webhook requests, callers, and the sockets that overlap while
/// numbers connect again.
const OTHERS: u64 = 768;

/// The numbers on disk would not all get a socket.
#[derive(Debug, thiserror::Error)]
#[error(
    "{numbers} numbers need {needed} open files and {allowed} are allowed: raise the limit (LimitNOFILE=, ulimit -n)"
)]
pub struct TooFewDescriptors {
    numbers: usize,
    needed: u64,
    allowed: u64,
}

/// Raises the limit as far as the system lets us, and says whether that is enough for `numbers`.
///
/// # Errors
/// When it is not.
pub fn ensure(numbers: usize) -> Result<(), TooFewDescriptors> {
    let limit = getrlimit(Resource::Nofile);
    let mut allowed = limit.current;
    if allowed != limit.maximum && setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).is_ok() {
        allowed = limit.maximum;
    }
    enough(numbers, allowed)
}

fn enough(numbers: usize, allowed: Option<u64>) -> Result<(), TooFewDescriptors> {
    let needed = OTHERS.saturating_add(numbers as u64);
    match allowed {
        Some(allowed) if allowed < needed => Err(TooFewDescriptors { numbers, needed, allowed }),
        Some(_) | None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_needs_a_socket_and_the_rest_some_too() {
        assert!(enough(10_000, None).is_ok());
        assert!(enough(10_000, Some(OTHERS + 10_000)).is_ok());
        let error = enough(10_000, Some(1_024)).unwrap_err().to_string();
        assert!(error.contains("10000 numbers need 10768 open files and 1024 are allowed"), "{error}");
    }
}
