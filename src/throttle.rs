//! How often something is put back that somebody else keeps changing. Pure.

use std::time::Duration;

/// No pause grows beyond this.
const LONGEST: Duration = Duration::from_secs(300);
/// What holds this long, or twice its pause if that is longer, was not reverted.
const CALM: Duration = Duration::from_secs(60);

/// The repairs of one thing. Times count from any fixed moment.
#[derive(Debug, Clone)]
pub struct Throttle {
    shortest: Duration,
    pause: Duration,
    last: Option<Duration>,
    streak: u32,
}

impl Throttle {
    /// `shortest` is the pause after a first repair; each one in a row doubles it.
    #[must_use]
    pub fn new(shortest: Duration) -> Self {
        Throttle { shortest, pause: shortest, last: None, streak: 0 }
    }

    /// How long to wait before the next repair.
    #[must_use]
    pub fn wait(&self, now: Duration) -> Duration {
        self.last.map_or(Duration::ZERO, |last| (last + self.pause).saturating_sub(now))
    }

    /// Notes a repair, and tells how many there were in a row without calm between them.
    pub fn repaired(&mut self, now: Duration) -> u32 {
        let in_a_row =
            self.last.is_some_and(|last| now.saturating_sub(last) < CALM.max(self.pause * 2));
        if in_a_row {
            self.pause = (self.pause * 2).min(LONGEST).max(self.shortest);
            self.streak += 1;
        } else {
            self.pause = self.shortest;
            self.streak = 1;
        }
        self.last = Some(now);
        self.streak
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn pauses_double_while_somebody_reverts_and_start_anew_after_calm() {
        let mut throttle = Throttle::new(s(3));
        assert_eq!(throttle.wait(s(0)), s(0));
        let mut now = s(0);
        let mut pauses = Vec::new();
        for streak in 1..=9 {
            assert_eq!(throttle.repaired(now), streak);
            let pause = throttle.wait(now);
            pauses.push(pause.as_secs());
            // Reverted at once, repaired as soon as that is allowed.
            now += pause;
            assert_eq!(throttle.wait(now), s(0));
        }
        assert_eq!(pauses, [3, 6, 12, 24, 48, 96, 192, 300, 300]);
        now += s(600);
        assert_eq!(throttle.repaired(now), 1);
        assert_eq!(throttle.wait(now), s(3));
        assert_eq!(throttle.wait(now + s(1)), s(2));
    }

    #[test]
    fn a_change_now_and_then_is_no_fight() {
        let mut throttle = Throttle::new(s(3));
        for hour in 0..5 {
            assert_eq!(throttle.repaired(s(3600 * hour)), 1);
        }
    }
}
