//! The first bytes of one block, for refills: a little in memory, more in a file. A disk that refuses costs the
//! refill, never the call.

use reliant_telemetry::chain;
use std::{
    fs::{File, OpenOptions},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::PathBuf,
};

/// Past that a block goes to its file.
const MEMORY_MAX_BYTES: usize = 64 * 1024;

#[derive(Debug)]
pub struct Kept {
    path: PathBuf,
    memory: Vec<u8>,
    file: Option<File>,
    /// Bytes that can be read back, always a prefix.
    kept: u64,
    /// Bytes that were written in all.
    len: u64,
    failed: bool,
}

impl Kept {
    pub fn new(path: PathBuf) -> Self {
        Self { path, memory: Vec::new(), file: None, kept: 0, len: 0, failed: false }
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn kept(&self) -> u64 {
        self.kept
    }

    /// Keeps at most `room` bytes of the piece. Answers the piece's place.
    pub fn append(&mut self, piece: &[u8], room: u64) -> u64 {
        let at = self.len;
        self.len += piece.len() as u64;
        // What follows a gap is not kept: a prefix has none.
        if self.kept != at || self.failed {
            return at;
        }
        let take = &piece[..piece.len().min(usize::try_from(room).unwrap_or(usize::MAX))];
        if self.file.is_none() && self.memory.len() + take.len() <= MEMORY_MAX_BYTES {
            self.memory.extend_from_slice(take);
        } else if !self.spill() || self.write(take).is_err() {
            return at;
        }
        self.kept += take.len() as u64;
        at
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), ()> {
        let written = self.file.as_ref().map(|f| f.write_all_at(bytes, self.kept));
        match written {
            Some(Ok(())) => Ok(()),
            _ => {
                self.failed = true;
                Err(())
            }
        }
    }

    /// Moves what is in memory to the file.
    fn spill(&mut self) -> bool {
        if self.file.is_some() {
            return true;
        }
        let open = OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(&self.path);
        let moved = open.and_then(|file| file.write_all_at(&self.memory, 0).map(|()| file));
        match moved {
            Ok(file) => {
                self.memory = Vec::new();
                self.file = Some(file);
                true
            }
            Err(error) => {
                tracing::warn!(error = %chain(&error), "tool output cannot be kept on disk");
                self.failed = true;
                false
            }
        }
    }

    /// The call ended: what it wrote outlives the process.
    pub fn flush(&mut self) {
        if self.kept > 0 && !self.failed {
            self.spill();
        }
    }

    pub fn read(&self, from: u64, max: usize) -> Vec<u8> {
        let wanted = (self.kept.saturating_sub(from)).min(max as u64) as usize;
        if wanted == 0 {
            return Vec::new();
        }
        match &self.file {
            None => self.memory[from as usize..from as usize + wanted].to_vec(),
            Some(file) => {
                let mut bytes = vec![0; wanted];
                match file.read_exact_at(&mut bytes, from) {
                    Ok(()) => bytes,
                    Err(_) => Vec::new(),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_is_kept_and_no_more_than_there_is_room() {
        let dir = tempfile::tempdir().unwrap();
        let mut kept = Kept::new(dir.path().join("x"));
        let piece = vec![7; 50_000];
        for round in 0..4 {
            assert_eq!(kept.append(&piece, 120_000u64.saturating_sub(kept.kept())), round * 50_000);
        }
        assert_eq!((kept.len(), kept.kept()), (200_000, 120_000));
        assert_eq!(kept.read(119_990, 100).len(), 10);
        assert!(kept.read(150_000, 100).is_empty());
    }

    #[test]
    fn a_disk_that_refuses_costs_the_refill_alone() {
        let mut kept = Kept::new("/nowhere/at/all".into());
        kept.append(&[1; 1000], u64::MAX);
        kept.append(&[2; 100_000], u64::MAX);
        assert_eq!(kept.append(b"x", u64::MAX), 101_000);
        assert_eq!(kept.read(0, 10), [1; 10]);
    }
}
