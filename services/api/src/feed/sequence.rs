//! Puts numbered events into order. What comes out is contiguous and each number once, whatever order, loss or
//! duplication there was on the way in. [`Window`] keeps the newest for those who join or resume.

use std::collections::{BTreeMap, VecDeque};

/// Events that wait behind a gap. Past it the newest are dropped: the log has them.
const PENDING_MAX: usize = 1024;

/// The order of one log. Pure: it never asks; [`Sequencer::has_gap`] says that the log must be read.
#[derive(Debug)]
pub struct Sequencer<E> {
    last: i64,
    pending: BTreeMap<i64, E>,
    /// Something past `last` is known to exist and was not kept.
    behind: bool,
}

impl<E> Sequencer<E> {
    /// Events after `last` come out.
    pub fn new(last: i64) -> Self {
        Self { last, pending: BTreeMap::new(), behind: false }
    }

    /// The last number that came out.
    pub fn last(&self) -> i64 {
        self.last
    }

    /// An event came; those that are in order now are handed to `out`.
    pub fn push(&mut self, seq: i64, event: E, mut out: impl FnMut(E)) {
        if seq <= self.last {
            return;
        }
        if seq > self.last + 1 {
            self.pending.insert(seq, event);
            if self.pending.len() > PENDING_MAX {
                self.pending.pop_last();
                self.behind = true;
            }
            return;
        }
        self.last = seq;
        self.pending.remove(&seq);
        out(event);
        while let Some(entry) = self.pending.first_entry()
            && *entry.key() <= self.last + 1
        {
            let (seq, event) = entry.remove_entry();
            if seq == self.last + 1 {
                self.last = seq;
                out(event);
            }
        }
    }

    /// The log is known to reach `seq`.
    pub fn reaches(&mut self, seq: i64) {
        self.behind |= seq > self.last;
    }

    /// Something between `last` and what is known is missing.
    pub fn has_gap(&self) -> bool {
        self.behind || !self.pending.is_empty()
    }

    /// The log was read to its end as it was then.
    pub fn read_to_end(&mut self) {
        self.behind = false;
    }

    /// Hints past a gap that the log itself does not fill were never committed.
    pub fn drop_pending(&mut self) {
        self.pending.clear();
        self.behind = false;
    }
}

/// The newest entries of a log, contiguous, bounded by count and bytes.
#[derive(Debug)]
pub struct Window<T> {
    /// The number before the first entry.
    base: i64,
    entries: VecDeque<(T, usize)>,
    bytes: usize,
    max_entries: usize,
    max_bytes: usize,
}

impl<T: Clone> Window<T> {
    pub fn new(base: i64, max_entries: usize, max_bytes: usize) -> Self {
        Self { base, entries: VecDeque::new(), bytes: 0, max_entries, max_bytes }
    }

    /// The number of the newest entry, or of the base when there is none.
    pub fn last(&self) -> i64 {
        self.base + self.entries.len() as i64
    }

    /// The entry after [`Window::last`].
    pub fn push(&mut self, entry: T, bytes: usize) {
        self.bytes += bytes;
        self.entries.push_back((entry, bytes));
        while self.entries.len() > self.max_entries || (self.bytes > self.max_bytes && self.entries.len() > 1) {
            if let Some((_, bytes)) = self.entries.pop_front() {
                self.bytes -= bytes;
                self.base += 1;
            }
        }
    }

    /// Puts older entries before the first, newest first, as long as there is room.
    pub fn extend_back(&mut self, older: impl Iterator<Item = (T, usize)>) {
        for (entry, bytes) in older {
            if self.entries.len() >= self.max_entries || self.bytes + bytes > self.max_bytes || self.base == 0 {
                return;
            }
            self.bytes += bytes;
            self.base -= 1;
            self.entries.push_front((entry, bytes));
        }
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Forgets all entries; what comes later is kept again.
    pub fn clear(&mut self) {
        self.base = self.last();
        self.entries = VecDeque::new();
        self.bytes = 0;
    }

    /// The number before the first entry: whoever is at it or later can be served from here.
    pub fn base(&self) -> i64 {
        self.base
    }

    /// All entries after `seq`, if they are all here.
    pub fn after(&self, seq: i64) -> Option<impl Iterator<Item = &T>> {
        (self.base..=self.last())
            .contains(&seq)
            .then(|| self.entries.iter().skip((seq - self.base) as usize).map(|(entry, _)| entry))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_forgets_the_oldest_and_knows_what_it_has() {
        let mut window = Window::new(10, 3, 100);
        for seq in 11..=15 {
            window.push(seq, 10);
        }
        assert_eq!((window.base(), window.last()), (12, 15));
        assert_eq!(window.after(13).unwrap().copied().collect::<Vec<_>>(), [14, 15]);
        assert_eq!(window.after(15).unwrap().count(), 0);
        assert!(window.after(11).is_none() && window.after(16).is_none());
        window.push(16, 1000);
        assert_eq!(window.after(15).unwrap().copied().collect::<Vec<_>>(), [16], "an oversized entry stays alone");
        window.clear();
        assert_eq!((window.base(), window.last(), window.bytes()), (16, 16, 0));
        window.push(17, 10);
        assert_eq!(window.after(16).unwrap().copied().collect::<Vec<_>>(), [17]);
    }

    #[test]
    fn older_entries_are_put_in_front_while_there_is_room() {
        let mut window = Window::new(5, 4, 100);
        window.push(6, 10);
        window.extend_back([5, 4, 3, 2].into_iter().map(|seq| (seq, 10)));
        assert_eq!(window.after(2).unwrap().copied().collect::<Vec<_>>(), [3, 4, 5, 6]);
    }

    #[test]
    fn hints_behind_a_gap_wait_and_duplicates_vanish() {
        let mut line = Sequencer::new(0);
        let mut out = Vec::new();
        for seq in [2, 3, 2, 1, 1, 3, 5] {
            line.push(seq, seq, |event| out.push(event));
        }
        assert_eq!(out, [1, 2, 3]);
        assert!(line.has_gap());
        line.push(4, 4, |event| out.push(event));
        assert_eq!((out.as_slice(), line.has_gap()), ([1, 2, 3, 4, 5].as_slice(), false));
    }
}
