//! A state directory that is not as the daemon left it: a sentence with the way out, an exit code, and no byte overwritten.

use std::os::unix::fs::PermissionsExt as _;

use anyhow::Result;
use reliant_harness::reliant_binary;

use super::{Start, ended};

/// Starts, and expects it to be refused with these words.
async fn refused(start: &Start, words: &[&str]) -> Result<()> {
    let path = start.state_dir.join("journal.redb");
    let before = std::fs::read(&path).ok();
    let ended = start.ends().await?;
    let sentence = ended.sentence();
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(words.iter().all(|word| sentence.contains(word)), "{words:?} are not in: {sentence}");
    assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
    assert_eq!(std::fs::read(&path).ok(), before, "it was written to");
    Ok(())
}

/// A journal as a daemon leaves it that is killed.
async fn journal(start: &Start) -> Result<Vec<u8>> {
    let path = start.state_dir.join("journal.redb");
    let mut child = start.spawn()?;
    super::eventually("a journal", super::PATIENCE, || async { Ok(path.exists().then_some(())) }).await?;
    child.kill().await?;
    ended(child).await?;
    Ok(std::fs::read(path)?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_journal_that_cannot_be_used_is_refused_and_kept() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut start = Start::new(&reliant_binary()?, dir.path())?;
    let path = start.state_dir.join("journal.redb");
    let whole = journal(&start).await?;
    assert!(whole.len() > 4096);
    for bytes in
        [b"this is a text, and no journal".to_vec(), Vec::new(), vec![0xa5; 200_000], whole[..whole.len() / 2].into()]
    {
        std::fs::write(&path, bytes)?;
        refused(&start, &["damaged", "--reset-journal", "outcome unknown"]).await?;
    }
    std::fs::remove_file(&path)?;
    std::fs::create_dir(&path)?;
    refused(&start, &["damaged", "not a file"]).await?;
    std::fs::remove_dir(&path)?;

    // Of a newer version.
    std::fs::write(&path, &whole)?;
    let database = redb::Database::open(&path)?;
    let write = database.begin_write()?;
    let meta = redb::TableDefinition::<&str, &[u8]>::new("meta");
    write.open_table(meta)?.insert("format", 7u32.to_be_bytes().as_slice())?;
    write.commit()?;
    drop(database);
    refused(&start, &["newer reliant", "format 7", "--reset-journal"]).await?;

    // The way out works, and says where the old one went.
    start.more = vec!["--reset-journal".into()];
    let newer = std::fs::read(&path)?;
    let mut child = start.spawn()?;
    super::eventually("a fresh journal", super::PATIENCE, || async {
        Ok(std::fs::read(&path).is_ok_and(|bytes| bytes != newer).then_some(()))
    })
    .await?;
    child.kill().await?;
    assert!(ended(child).await?.stdout.contains("put aside"));
    let aside = std::fs::read_dir(&start.state_dir)?.filter_map(|entry| Some(entry.ok()?.path()));
    let aside: Vec<_> = aside.filter(|path| path.to_string_lossy().ends_with(".old.redb")).collect();
    assert_eq!(aside.len(), 1, "{aside:?}");
    assert_eq!(std::fs::read(&aside[0])?, newer, "the old one is kept as it was");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_journal_of_somebody_else_is_refused_and_kept() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut start = Start::new(&reliant_binary()?, dir.path())?;
    let path = start.state_dir.join("journal.redb");
    journal(&start).await?;
    // Root may read everything; whoever is inside the namespace may not.
    start.unprivileged = true;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o000))?;
    refused(&start, &["cannot be opened", "Permission denied", "state_dir"]).await?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o400))?;
    refused(&start, &["cannot be opened", "Permission denied", "state_dir"]).await?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    start.unprivileged = false;
    // Only root can give a file away; the journal's own test covers the sentence elsewhere too.
    if std::os::unix::fs::chown(&path, Some(12_345), None).is_ok() {
        refused(&start, &["belongs to user id 12345", "state_dir"]).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_daemon_of_one_state_directory_is_refused() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let start = Start::new(&reliant_binary()?, dir.path())?;
    let mut first = start.spawn()?;
    let journal = start.state_dir.join("journal.redb");
    super::eventually("the first one's journal", super::PATIENCE, || async { Ok(journal.exists().then_some(())) })
        .await?;
    let second = start.ends().await?;
    assert_eq!(second.code, Some(1), "{}", second.stderr);
    let pid = first.id().unwrap_or_default().to_string();
    assert!(second.sentence().contains("runs already") && second.sentence().contains(&pid), "{}", second.stderr);
    assert!(first.try_wait()?.is_none(), "the first one goes on");
    Ok(())
}
