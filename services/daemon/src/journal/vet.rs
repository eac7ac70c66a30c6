//! A look at a file that an earlier process did not close in order. Opening such a file repairs it, which writes; so the
//! repair is tried on a view whose changes stay in memory, and the file itself is opened only if that went well.

use std::{collections::HashMap, fs::File, io, os::unix::fs::FileExt as _, path::Path};

use parking_lot::Mutex;
use redb::StorageBackend;

const PAGE_BYTES: u64 = 4096;

#[derive(Debug)]
pub struct Overlay {
    file: File,
    changed: Mutex<Changed>,
}

#[derive(Debug)]
struct Changed {
    len: u64,
    /// What of the file still counts; behind it all is zero.
    from_file: u64,
    pages: HashMap<u64, Vec<u8>>,
}

impl Overlay {
    pub fn of(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let len = file.metadata()?.len();
        Ok(Self { file, changed: Mutex::new(Changed { len, from_file: len, pages: HashMap::new() }) })
    }

    /// A page of the file as it was.
    fn original(&self, page: u64, from_file: u64) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; PAGE_BYTES as usize];
        let begin = page * PAGE_BYTES;
        let there = from_file.saturating_sub(begin).min(PAGE_BYTES) as usize;
        self.file.read_exact_at(&mut bytes[..there], begin)?;
        Ok(bytes)
    }
}

/// The pages of a range: which one, where in it, and where in the range.
fn pages(offset: u64, len: usize) -> impl Iterator<Item = (u64, std::ops::Range<usize>, std::ops::Range<usize>)> {
    let end = offset + len as u64;
    (offset / PAGE_BYTES..end.div_ceil(PAGE_BYTES)).map(move |page| {
        let begin = page * PAGE_BYTES;
        let (from, to) = (begin.max(offset), (begin + PAGE_BYTES).min(end));
        ((page), (from - begin) as usize..(to - begin) as usize, (from - offset) as usize..(to - offset) as usize)
    })
}

impl StorageBackend for Overlay {
    fn len(&self) -> io::Result<u64> {
        Ok(self.changed.lock().len)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let changed = self.changed.lock();
        if offset + out.len() as u64 > changed.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for (page, inside, place) in pages(offset, out.len()) {
            match changed.pages.get(&page) {
                Some(bytes) => out[place].copy_from_slice(&bytes[inside]),
                None => out[place].copy_from_slice(&self.original(page, changed.from_file)?[inside]),
            }
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut changed = self.changed.lock();
        changed.len = len;
        changed.from_file = changed.from_file.min(len);
        changed.pages.retain(|page, _| page * PAGE_BYTES < len);
        if let Some(last) = changed.pages.get_mut(&(len / PAGE_BYTES)) {
            last[(len % PAGE_BYTES) as usize..].fill(0);
        }
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut changed = self.changed.lock();
        changed.len = changed.len.max(offset + data.len() as u64);
        for (page, inside, place) in pages(offset, data.len()) {
            if !changed.pages.contains_key(&page) {
                let original = self.original(page, changed.from_file)?;
                changed.pages.insert(page, original);
            }
            if let Some(bytes) = changed.pages.get_mut(&page) {
                bytes[inside].copy_from_slice(&data[place]);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_seen_and_the_file_stays() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let before: Vec<u8> = (0..10_000u32).map(|n| n as u8).collect();
        std::fs::write(file.path(), &before).unwrap();
        let view = Overlay::of(file.path()).unwrap();
        let mut expected = before.clone();
        let check = |view: &Overlay, expected: &[u8]| {
            let mut seen = vec![0; expected.len()];
            view.read(0, &mut seen).unwrap();
            assert_eq!(view.len().unwrap(), expected.len() as u64);
            assert!(seen == expected);
        };
        check(&view, &expected);
        for (at, len) in [(0, 10), (4090, 20), (5000, 5000), (9_999, 1)] {
            view.write(at, &vec![7; len]).unwrap();
            expected[at as usize..at as usize + len].fill(7);
            check(&view, &expected);
        }
        for len in [20_000, 4100, 4096, 9000] {
            view.set_len(len).unwrap();
            expected.resize(len as usize, 0);
            check(&view, &expected);
        }
        assert!(view.read(8999, &mut [0; 2]).is_err());
        assert_eq!(std::fs::read(file.path()).unwrap(), before);
    }
}
