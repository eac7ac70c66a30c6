//! What a worker keeps of what it has read, within a bound of bytes. What was quiet for longest goes first.

use std::hash::Hash;

use lru::LruCache;

pub struct Kept<K: Hash + Eq, V> {
    entries: LruCache<K, (V, usize)>,
    pub bytes: usize,
    bytes_max: usize,
}

impl<K: Hash + Eq, V> Kept<K, V> {
    pub fn new(bytes_max: usize) -> Self {
        Self { entries: LruCache::unbounded(), bytes: 0, bytes_max }
    }

    pub fn get(&mut self, key: &K) -> Option<&V> {
        self.entries.get(key).map(|(value, _)| value)
    }

    pub fn take(&mut self, key: &K) -> Option<V> {
        let (value, bytes) = self.entries.pop(key)?;
        self.bytes -= bytes;
        Some(value)
    }

    /// In the place of what was kept under this key. What alone is larger than the bound is not kept.
    pub fn put(&mut self, key: K, value: V, bytes: usize) {
        self.bytes += bytes;
        if let Some((_, (_, before))) = self.entries.push(key, (value, bytes)) {
            self.bytes -= before;
        }
        while self.bytes > self.bytes_max {
            let Some((_, (_, oldest))) = self.entries.pop_lru() else { break };
            self.bytes -= oldest;
        }
    }
}
