//! Journals that are of another version, another user, or damaged: a clear error, and never a byte overwritten.

use std::path::Path;

use super::{
    super::{JOURNAL_FILE, Journal, JournalError, reset_journal, state::Decision},
    call, header,
};

fn refused(dir: &Path) -> JournalError {
    let path = dir.join(JOURNAL_FILE);
    let before = std::fs::read(&path).unwrap();
    let Err(error) = Journal::open(dir, u64::MAX) else { panic!("it was opened") };
    assert_eq!(std::fs::read(&path).unwrap(), before, "it was written to");
    error
}

#[tokio::test]
async fn a_journal_outlives_its_process() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(dir.path(), u64::MAX).unwrap();
    let incarnation = journal.incarnation();
    journal.dispatch(call(1), header(1, false)).unwrap().1.durable().await.unwrap();
    assert!(matches!(Journal::open(dir.path(), u64::MAX), Err(JournalError::InUse)));
    // What waits is written when it is closed.
    let (_, _ticket) = journal.dispatch(call(2), header(1, false)).unwrap();
    drop(journal);
    let again = Journal::open(dir.path(), u64::MAX).unwrap();
    assert_eq!(again.incarnation(), incarnation);
    assert_eq!(again.running().len(), 2);
    assert_eq!(again.decide(call(1), 1, false, 0), Decision::Attached);
}

#[test]
fn a_newer_journal_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    drop(Journal::open(dir.path(), u64::MAX).unwrap());
    let db = redb::Database::open(dir.path().join(JOURNAL_FILE)).unwrap();
    let txn = db.begin_write().unwrap();
    let meta = redb::TableDefinition::<&str, &[u8]>::new("meta");
    txn.open_table(meta).unwrap().insert("format", 99u32.to_be_bytes().as_slice()).unwrap();
    txn.commit().unwrap();
    drop(db);
    assert!(matches!(refused(dir.path()), JournalError::Newer { found: 99, .. }));
}

#[test]
fn a_damaged_journal_names_the_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(JOURNAL_FILE);
    let incarnation = Journal::open(dir.path(), u64::MAX).unwrap().incarnation();
    let whole = std::fs::read(&path).unwrap();
    for (what, bytes) in [
        ("empty", Vec::new()),
        ("garbage", vec![0xa5; 100_000]),
        ("a text", b"not a journal".to_vec()),
        ("cut in half", whole[..whole.len() / 2].to_vec()),
        ("cut in its header", whole[..100].to_vec()),
    ] {
        std::fs::write(&path, bytes).unwrap();
        let error = refused(dir.path());
        assert!(error.to_string().contains("--reset-journal"), "{what}: {error}");
    }
    let aside = reset_journal(dir.path()).unwrap().unwrap();
    assert_eq!(std::fs::read(aside).unwrap(), &whole[..100]);
    let fresh = Journal::open(dir.path(), u64::MAX).unwrap();
    assert_ne!(fresh.incarnation(), incarnation);
    drop(fresh);
    std::fs::remove_file(&path).unwrap();
    assert_eq!(reset_journal(dir.path()).unwrap(), None);
}

#[test]
fn a_foreign_journal_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    drop(Journal::open(dir.path(), u64::MAX).unwrap());
    // Only root can give a file away.
    if std::os::unix::fs::chown(dir.path().join(JOURNAL_FILE), Some(12_345), None).is_ok() {
        assert!(matches!(refused(dir.path()), JournalError::ForeignOwner { owner: 12_345, .. }));
    }
}

#[test]
fn bits_that_flipped_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(JOURNAL_FILE);
    drop(Journal::open(dir.path(), u64::MAX).unwrap());
    let whole = std::fs::read(&path).unwrap();
    // Not in pages that hold nothing: those may be anything.
    for at in (0..320).step_by(7) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x55;
        std::fs::write(&path, bytes).unwrap();
        // Opened or refused, it never panics.
        let _ = Journal::open(dir.path(), u64::MAX);
    }
}
