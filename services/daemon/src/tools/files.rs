//! What the file tools know of files over calls and chats: which file a call rewrites now, so that no edit undoes
//! another, and how each chat last saw a file, so that a chat does not overwrite what it has not seen.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    ffi::OsString,
    fs::File,
    os::fd::OwnedFd,
    path::Path,
    sync::Arc,
    time::Duration,
};

use parking_lot::{Condvar, Mutex};
use rustix::fs::Stat;
use tokio_util::sync::CancellationToken;

use super::ToolError;
use crate::{confine::Place, roots::Root};

/// Sightings that are kept, over all chats; past that the oldest goes first. A file that is forgotten is as one that was
/// never read.
const SEEN_MAX: usize = 8192;
/// How often a call that waits for a file looks at its cancel.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// A name in a directory, whichever root and path lead there.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct FileKey {
    device: u64,
    directory: u64,
    name: OsString,
}

impl FileKey {
    fn new(dir: &OwnedFd, name: OsString) -> Result<Self, ToolError> {
        let stat =
            rustix::fs::fstat(dir).map_err(|e| ToolError::failed(format!("the directory cannot be looked at: {e}")))?;
        Ok(Self { device: stat.st_dev, directory: stat.st_ino, name })
    }

    pub fn of(place: &Place) -> Result<Self, ToolError> {
        Self::new(&place.dir, place.name.clone())
    }

    /// Of a file that is there.
    pub fn existing(root: &Root, inside: &Path) -> Result<Self, ToolError> {
        let real = root.confine.existing(inside)?;
        let dir = root.confine.open_dir(real.parent().unwrap_or(Path::new("")))?;
        Self::new(&dir, real.file_name().unwrap_or_default().to_owned())
    }
}

/// Tells a file's content from what was there before, as far as can be told without reading it. A change of the
/// permissions alone is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    inode: u64,
    size: i64,
    modified: (i64, i64),
}

impl Stamp {
    pub fn of(stat: &Stat) -> Self {
        Self { inode: stat.st_ino, size: stat.st_size, modified: (stat.st_mtime, stat.st_mtime_nsec as i64) }
    }

    pub fn of_file(file: &File) -> std::io::Result<Self> {
        Ok(Self::of(&rustix::fs::fstat(file)?))
    }
}

type Sighting = (String, FileKey);

#[derive(Debug, Default)]
struct Seen {
    stamps: HashMap<Sighting, (Stamp, u64)>,
    /// By age.
    order: BTreeMap<u64, Sighting>,
    next: u64,
}

impl Seen {
    fn record(&mut self, sighting: Sighting, stamp: Stamp) {
        self.next += 1;
        self.order.insert(self.next, sighting.clone());
        if let Some((_, older)) = self.stamps.insert(sighting, (stamp, self.next)) {
            self.order.remove(&older);
        }
        while self.order.len() > SEEN_MAX
            && let Some((_, oldest)) = self.order.pop_first()
        {
            self.stamps.remove(&oldest);
        }
    }
}

#[derive(Debug, Default)]
pub struct Files {
    busy: Mutex<HashSet<FileKey>>,
    freed: Condvar,
    seen: Mutex<Seen>,
}

/// A file that no other call rewrites meanwhile.
#[derive(Debug)]
pub struct Held<'a> {
    files: &'a Files,
    key: FileKey,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.files.busy.lock().remove(&self.key);
        self.files.freed.notify_all();
    }
}

impl Files {
    /// Waits, off the reactor, until no other call rewrites the file.
    fn hold(&self, key: &FileKey, cancel: &CancellationToken) -> Result<Held<'_>, ToolError> {
        let mut busy = self.busy.lock();
        while busy.contains(key) {
            if cancel.is_cancelled() {
                return Err(ToolError::Cancelled);
            }
            self.freed.wait_for(&mut busy, LOOK_INTERVAL);
        }
        busy.insert(key.clone());
        Ok(Held { files: self, key: key.clone() })
    }

    pub fn of_chat(self: &Arc<Self>, chat: &str) -> ChatFiles {
        ChatFiles { files: self.clone(), chat: chat.to_owned() }
    }
}

/// The files as one chat knows them.
#[derive(Debug)]
pub struct ChatFiles {
    files: Arc<Files>,
    chat: String,
}

impl ChatFiles {
    pub fn hold(&self, key: &FileKey, cancel: &CancellationToken) -> Result<Held<'_>, ToolError> {
        self.files.hold(key, cancel)
    }

    /// The chat has read or written the file as it is now.
    pub fn record(&self, key: FileKey, stamp: Stamp) {
        self.files.seen.lock().record((self.chat.clone(), key), stamp);
    }

    /// How the chat last saw the file; nothing for one that it never read or wrote.
    pub fn last(&self, key: &FileKey) -> Option<Stamp> {
        self.files.seen.lock().stamps.get(&(self.chat.clone(), key.clone())).map(|(stamp, _)| *stamp)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sightings_are_bounded_and_the_oldest_go_first() {
        let files = Arc::new(Files::default());
        let chat = files.of_chat("chat");
        let key = |n: usize| FileKey { device: 1, directory: 2, name: n.to_string().into() };
        let stamp = Stamp { inode: 1, size: 2, modified: (3, 4) };
        for n in 0..2 * SEEN_MAX {
            chat.record(key(n), stamp);
            chat.record(key(0), stamp);
        }
        let seen = files.seen.lock();
        assert_eq!((seen.stamps.len(), seen.order.len()), (SEEN_MAX, SEEN_MAX));
        drop(seen);
        assert!(chat.last(&key(0)).is_some() && chat.last(&key(2 * SEEN_MAX - 1)).is_some());
        assert!(chat.last(&key(1)).is_none() && files.of_chat("other").last(&key(0)).is_none());
    }

    #[test]
    fn a_wait_for_a_file_ends_with_its_call() {
        let files = Files::default();
        let key = FileKey { device: 1, directory: 2, name: "a".into() };
        let cancel = CancellationToken::new();
        let held = files.hold(&key, &cancel).unwrap();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| files.hold(&key, &cancel).map(drop));
            assert!(files.hold(&FileKey { name: "b".into(), ..key.clone() }, &cancel).is_ok());
            cancel.cancel();
            assert!(matches!(waiter.join().unwrap(), Err(ToolError::Cancelled)));
        });
        drop(held);
        assert!(files.hold(&key, &cancel).is_ok());
    }
}
