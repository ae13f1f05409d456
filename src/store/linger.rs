//! How long the writer of a Db waits for company before it writes a group. A group costs the same for one unit as for
//! sixty, so those of a busy Db begin [`GROUP_SPACING`] apart; whoever comes to an idle one never waits.

use std::time::Duration;

/// From the beginning of one group to that of the next, while that lets units share a group. Measured with 500 messages
/// a second over four Dbs on two cores: 2,200 groups a second become 700, and the 99th percentile of an accept falls to
/// a fifth. Longer spacings cost more than they save.
const GROUP_SPACING: Duration = Duration::from_millis(5);
/// Groups written without a wait, at most, after waits for which nobody came.
const SKIPPED_MAX: u32 = 64;

/// Whether waiting has paid off lately. A lone caller who sends one unit after the other would only lose time.
#[derive(Debug, Default)]
pub(super) struct Linger {
    /// Groups still to be written without a wait.
    skip: u32,
    /// What `skip` was last set to.
    skipped: u32,
}

impl Linger {
    /// How long to wait with a group that could begin now, `since` after the last one began.
    pub(super) fn wait(&mut self, since: Duration) -> Option<Duration> {
        let left = GROUP_SPACING.checked_sub(since).filter(|left| !left.is_zero())?;
        if self.skip > 0 {
            self.skip -= 1;
            return None;
        }
        Some(left)
    }

    /// How many units came during a wait.
    pub(super) fn waited(&mut self, came: usize) {
        self.skipped = if came > 0 { 0 } else { (self.skipped * 2).clamp(1, SKIPPED_MAX) };
        self.skip = self.skipped;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_db_writes_at_once_and_a_busy_one_with_its_spacing() {
        let mut linger = Linger::default();
        assert_eq!(linger.wait(GROUP_SPACING), None);
        assert_eq!(linger.wait(Duration::from_secs(9)), None);
        for _ in 0..100 {
            assert_eq!(linger.wait(Duration::from_millis(1)), Some(Duration::from_millis(4)));
            linger.waited(1);
        }
    }

    #[test]
    fn a_lone_caller_hardly_ever_waits_and_company_is_noticed_again() {
        let mut linger = Linger::default();
        let groups = 10_000;
        let mut waits = 0;
        for _ in 0..groups {
            if linger.wait(Duration::from_millis(1)).is_some() {
                waits += 1;
                linger.waited(0);
            }
        }
        assert!((groups / 65..groups / 50).contains(&waits), "{waits}");
        let until_tried = (0..groups).take_while(|_| linger.wait(Duration::ZERO).is_none()).count();
        assert!(until_tried <= SKIPPED_MAX as usize);
        linger.waited(3);
        assert!(linger.wait(Duration::ZERO).is_some());
    }
}
