//! Kept outputs go by age, by number and by size, the oldest first.

use reliant_telemetry::chain;
use std::{
    path::Path,
    time::{Duration, SystemTime},
};

const FILES_MAX: usize = 20_000;
const AGE_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

pub fn trim(dir: &Path, max_bytes: u64) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    let mut files: Vec<_> = entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let meta = entry.metadata().ok().filter(|m| m.is_file())?;
            Some((meta.modified().unwrap_or(SystemTime::UNIX_EPOCH), meta.len(), entry.path()))
        })
        .collect();
    files.sort_by_key(|(modified, ..)| std::cmp::Reverse(*modified));
    let mut total = 0;
    for (index, (modified, len, path)) in files.into_iter().enumerate() {
        total += len;
        let old = modified.elapsed().is_ok_and(|age| age > AGE_MAX);
        if (old || index >= FILES_MAX || total > max_bytes)
            && let Err(error) = std::fs::remove_file(&path)
        {
            tracing::debug!(error = %chain(&error), "a kept output cannot be removed");
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_oldest_goes_first() {
        let dir = tempfile::tempdir().unwrap();
        let now = std::time::SystemTime::now();
        for (name, age) in [("old", 20), ("new", 10), ("ancient", 60 * 24 * 3600)] {
            let path = dir.path().join(name);
            std::fs::write(&path, [0; 600]).unwrap();
            let file = std::fs::File::options().write(true).open(&path).unwrap();
            file.set_modified(now - std::time::Duration::from_secs(age)).unwrap();
        }
        super::trim(dir.path(), 1000);
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["new"]);
    }
}
