//! Chance that can be had again: everything sampled in a campaign comes from its seed.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// SplitMix64: small, even, and the same on every machine.
#[derive(Debug, Clone)]
pub struct Chance(u64);

impl Chance {
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut chance = Self(seed ^ stream.wrapping_mul(0xd605_1ff3_2c9b_56d5));
        chance.next();
        chance
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    pub fn pick<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }

    pub fn between(&mut self, least: u64, most: u64) -> Duration {
        Duration::from_millis(least + self.next() % (most - least + 1))
    }

    pub fn shuffle<T>(&mut self, all: &mut [T]) {
        for at in (1..all.len()).rev() {
            all.swap(at, self.below(at + 1));
        }
    }
}

/// A seed of this moment and this process, short enough to be typed again.
pub fn clock_seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    seed_of(now, std::process::id())
}

fn seed_of(now: Duration, process: u32) -> u64 {
    let nanoseconds = u64::try_from(now.as_nanos()).unwrap_or_default();
    Chance::new(nanoseconds, u64::from(process)).next() >> 32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_differ_by_moment_and_process() {
        let now = Duration::from_secs(1_800_000_000);
        let mut seeds = vec![seed_of(now, 1), seed_of(now, 2), seed_of(now + Duration::from_nanos(1), 1)];
        assert!(seeds.iter().all(|seed| *seed <= u64::from(u32::MAX)));
        seeds.sort_unstable();
        seeds.dedup();
        assert_eq!(seeds.len(), 3);
    }

    #[test]
    fn a_seed_says_it_all() {
        let draw = |seed, stream| {
            let mut chance = Chance::new(seed, stream);
            let mut order: Vec<usize> = (0..20).collect();
            chance.shuffle(&mut order);
            (order, chance.next())
        };
        assert_eq!(draw(7, 1), draw(7, 1));
        assert_ne!(draw(7, 1), draw(7, 2));
        assert_ne!(draw(7, 1), draw(8, 1));
        let mut sorted = draw(7, 1).0;
        sorted.sort_unstable();
        assert_eq!(sorted, (0..20).collect::<Vec<_>>());
    }
}
