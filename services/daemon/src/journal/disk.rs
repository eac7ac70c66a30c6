//! The journal's file: format, opening, reading, committing. Never overwrites a file it does not understand.

use std::path::{Path, PathBuf};

use prost::Message;
use redb::{
    Builder, Database, Durability, ReadableDatabase, ReadableTable, StorageBackend, Table, TableDefinition,
    WriteTransaction,
};
use reliant_types::{Incarnation, ToolCallId};

use super::{
    JournalError,
    state::{Entry, Header, Phase, State, Tombstone, Write},
    vet::Overlay,
};

/// Raised when an older daemon could misread what a newer one wrote.
const FORMAT: u32 = 1;
const CACHE_BYTES: usize = 8 * 1024 * 1024;

const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
/// A key of `meta`; what it means is said at [`Write::Floor`].
const FLOOR: &str = "floor";
const CALLS: TableDefinition<u128, &[u8]> = TableDefinition::new("calls");
const RESULTS: TableDefinition<u128, &[u8]> = TableDefinition::new("results");
/// Generation, time, whether it ran. The time of a settled call is stored negative.
const TOMBSTONES: TableDefinition<u128, (i64, i64, bool)> = TableDefinition::new("tombstones");

/// A row of `calls`.
#[derive(Clone, PartialEq, Message)]
struct CallRow {
    #[prost(int64, tag = "1")]
    generation: i64,
    #[prost(string, tag = "2")]
    tool: String,
    #[prost(bool, tag = "3")]
    repeatable: bool,
    #[prost(int64, tag = "4")]
    started_ms: i64,
    #[prost(string, tag = "5")]
    chat_id: String,
    #[prost(string, tag = "6")]
    user_id: String,
    #[prost(string, tag = "7")]
    traceparent: String,
    /// 0 running, 1 finished, 2 parked.
    #[prost(uint32, tag = "8")]
    phase: u32,
    #[prost(uint64, tag = "9")]
    bytes: u64,
    #[prost(bool, tag = "10")]
    unknown: bool,
    #[prost(int64, tag = "11")]
    parked_at_ms: i64,
    #[prost(int64, tag = "12")]
    dispatched_ms: i64,
}

impl From<&Entry> for CallRow {
    fn from(entry: &Entry) -> Self {
        let h = entry.header.clone();
        let (phase, bytes, unknown, parked_at_ms) = match entry.phase {
            Phase::Running => (0, 0, false, 0),
            Phase::Finished { bytes, unknown } => (1, bytes, unknown, 0),
            Phase::Parked { bytes, unknown, at_ms } => (2, bytes, unknown, at_ms),
        };
        Self {
            generation: h.generation,
            tool: h.tool,
            repeatable: h.repeatable,
            started_ms: h.started_ms,
            dispatched_ms: h.dispatched_ms,
            chat_id: h.chat_id,
            user_id: h.user_id,
            traceparent: h.traceparent,
            phase,
            bytes,
            unknown,
            parked_at_ms,
        }
    }
}

impl TryFrom<CallRow> for Entry {
    type Error = JournalError;

    fn try_from(row: CallRow) -> Result<Self, JournalError> {
        let phase = match row.phase {
            0 => Phase::Running,
            1 => Phase::Finished { bytes: row.bytes, unknown: row.unknown },
            2 => Phase::Parked { bytes: row.bytes, unknown: row.unknown, at_ms: row.parked_at_ms },
            other => return Err(JournalError::Corrupt(format!("a call is in phase {other}"))),
        };
        let header = Header {
            generation: row.generation,
            tool: row.tool,
            repeatable: row.repeatable,
            started_ms: row.started_ms,
            dispatched_ms: row.dispatched_ms,
            chat_id: row.chat_id,
            user_id: row.user_id,
            traceparent: row.traceparent,
        };
        Ok(Entry { header, phase })
    }
}

/// Where the database comes from. Tests put a faulty backend here.
pub trait Opener: Send + Sync + 'static {
    fn open(&self) -> Result<Database, JournalError>;
}

fn builder() -> Builder {
    let mut builder = Builder::new();
    builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true);
    builder
}

/// Any backend of the store, asked for anew at each opening.
pub struct BackendOpener<F>(pub F);

impl<B: StorageBackend, F: Fn() -> B + Send + Sync + 'static> Opener for BackendOpener<F> {
    fn open(&self) -> Result<Database, JournalError> {
        guarded(|| builder().create_with_backend((self.0)()).map_err(JournalError::from))
    }
}

/// A file of our own user.
pub struct FileOpener(pub PathBuf);

impl Opener for FileOpener {
    fn open(&self) -> Result<Database, JournalError> {
        let path = &self.0;
        match std::fs::symlink_metadata(path) {
            Ok(meta) => check_owner(path, &meta)?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => create(path)?,
            Err(e) => return Err(unreadable(path, &e)),
        }
        allowed(path)?;
        refuse_newer(path)?;
        guarded(|| builder().open(path).map_err(JournalError::from))
    }
}

/// What the user may not do to the file is said as that, not as a disk that is full.
fn allowed(path: &Path) -> Result<(), JournalError> {
    let opened = std::fs::OpenOptions::new().read(true).write(true).open(path);
    opened.map(drop).map_err(|e| unreadable(path, &e))
}

fn unreadable(path: &Path, error: &std::io::Error) -> JournalError {
    JournalError::Unreadable { path: path.to_owned(), reason: error.to_string() }
}

fn check_owner(path: &Path, meta: &std::fs::Metadata) -> Result<(), JournalError> {
    use std::os::unix::fs::MetadataExt;
    let uid = rustix::process::geteuid().as_raw();
    if !meta.is_file() {
        return Err(JournalError::Corrupt(format!("{} is not a file", path.display())));
    }
    if meta.uid() != uid {
        return Err(JournalError::ForeignOwner { path: path.to_owned(), owner: meta.uid(), uid });
    }
    if meta.len() == 0 {
        return Err(JournalError::Corrupt("the file is empty".into()));
    }
    Ok(())
}

/// Looks at the file, and at its format, without writing a byte.
fn refuse_newer(path: &Path) -> Result<(), JournalError> {
    guarded(|| match builder().open_read_only(path) {
        Ok(db) => match db.begin_read()?.open_table(META) {
            Ok(meta) => check_format(&meta),
            Err(_) => Ok(()),
        },
        // Not closed in order: the opening that follows writes, so it is tried beside the file first.
        Err(redb::DatabaseError::RepairAborted) => {
            let tried = builder().create_with_backend(Overlay::of(path)?)?;
            check_format(&tried.begin_read()?.open_table(META)?)
        }
        Err(e) => Err(e.into()),
    })
}

/// The store may panic over a damaged file; that is an error like any other.
fn guarded<T>(open: impl FnOnce() -> Result<T, JournalError>) -> Result<T, JournalError> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(open))
        .unwrap_or_else(|_| Err(JournalError::Corrupt("its pages do not fit together".into())))
}

/// A new journal appears whole or not at all.
fn create(path: &Path) -> Result<(), JournalError> {
    use std::os::unix::fs::OpenOptionsExt;
    let fresh = path.with_extension("new");
    match std::fs::remove_file(&fresh) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e.into()),
        _ => {}
    }
    std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&fresh)?;
    let db = builder().create(&fresh)?;
    initialise(&db)?;
    drop(db);
    std::fs::rename(&fresh, path)?;
    if let Some(parent) = path.parent() {
        std::fs::File::open(parent)?.sync_all()?;
    }
    Ok(())
}

fn initialise(db: &Database) -> Result<(), JournalError> {
    let txn = db.begin_write()?;
    {
        let mut meta = txn.open_table(META)?;
        meta.insert("format", FORMAT.to_be_bytes().as_slice())?;
        meta.insert("incarnation", Incarnation(uuid::Uuid::new_v4()).0.as_bytes().as_slice())?;
        txn.open_table(CALLS)?;
        txn.open_table(RESULTS)?;
        txn.open_table(TOMBSTONES)?;
    }
    txn.commit()?;
    Ok(())
}

fn check_format(meta: &impl ReadableTable<&'static str, &'static [u8]>) -> Result<(), JournalError> {
    let format = meta.get("format")?.and_then(|v| v.value().try_into().ok()).map(u32::from_be_bytes);
    match format {
        Some(FORMAT) => Ok(()),
        Some(found) if found > FORMAT => Err(JournalError::Newer { found, known: FORMAT }),
        Some(found) => Err(JournalError::Corrupt(format!("format {found} was never written"))),
        None => Err(JournalError::Corrupt("it names no format".into())),
    }
}

pub struct Disk {
    db: Database,
}

impl Disk {
    pub fn open(opener: &dyn Opener) -> Result<(Self, Incarnation), JournalError> {
        let db = opener.open()?;
        // Only a backend of a test comes here empty; a file was made whole.
        if db.begin_read()?.list_tables()?.next().is_none() {
            initialise(&db)?;
        }
        let incarnation = {
            let meta = db.begin_read()?.open_table(META)?;
            check_format(&meta)?;
            let bytes = meta.get("incarnation")?.and_then(|v| v.value().try_into().ok());
            Incarnation(uuid::Uuid::from_bytes(
                bytes.ok_or_else(|| JournalError::Corrupt("it names no incarnation".into()))?,
            ))
        };
        Ok((Self { db }, incarnation))
    }

    pub fn load(&self, max_bytes: u64) -> Result<State, JournalError> {
        let mut state = State::new(max_bytes);
        let txn = self.db.begin_read()?;
        for row in txn.open_table(CALLS)?.iter()? {
            let (key, value) = row?;
            let row = CallRow::decode(value.value()).map_err(|e| JournalError::Corrupt(format!("a call: {e}")))?;
            state.apply(&Write::Entry(id(key.value()), row.try_into()?));
        }
        for row in txn.open_table(TOMBSTONES)?.iter()? {
            let (key, value) = row?;
            let (generation, at, ran) = value.value();
            let tombstone = Tombstone { generation, at_ms: at.saturating_abs(), ran, settled: at < 0 };
            state.apply(&Write::Tombstone(id(key.value()), tombstone));
        }
        let meta = txn.open_table(META)?;
        if let Some(floor) = meta.get(FLOOR)?.and_then(|v| v.value().try_into().ok()) {
            state.apply(&Write::Floor(i64::from_be_bytes(floor)));
        }
        Ok(state)
    }

    pub fn result(&self, call: ToolCallId) -> Result<Option<Vec<u8>>, JournalError> {
        let table = self.db.begin_read()?.open_table(RESULTS)?;
        Ok(table.get(call.0.as_u128())?.map(|v| v.value().to_vec()))
    }

    /// One transaction, one sync.
    pub fn commit<'a>(&self, writes: impl Iterator<Item = &'a Write>) -> Result<(), JournalError> {
        let mut txn = self.db.begin_write()?;
        txn.set_durability(Durability::Immediate).map_err(|e| JournalError::Io(e.to_string()))?;
        {
            let mut calls = txn.open_table(CALLS)?;
            // An opened table costs the commit even when nothing was written to it.
            let (mut results, mut tombstones) = (None, None);
            for write in writes {
                match write {
                    Write::Entry(id, entry) => {
                        calls.insert(id.0.as_u128(), CallRow::from(entry).encode_to_vec().as_slice())?;
                    }
                    Write::Result(id, bytes) => {
                        opened(&txn, RESULTS, &mut results)?.insert(id.0.as_u128(), bytes.as_slice())?;
                    }
                    Write::Forget(id) => {
                        calls.remove(id.0.as_u128())?;
                        opened(&txn, RESULTS, &mut results)?.remove(id.0.as_u128())?;
                    }
                    Write::Tombstone(id, t) => {
                        opened(&txn, TOMBSTONES, &mut tombstones)?.insert(
                            id.0.as_u128(),
                            (t.generation, if t.settled { -t.at_ms } else { t.at_ms }, t.ran),
                        )?;
                    }
                    Write::Floor(at_ms) => {
                        txn.open_table(META)?.insert(FLOOR, at_ms.to_be_bytes().as_slice())?;
                    }
                    Write::DropTombstone(id) => {
                        opened(&txn, TOMBSTONES, &mut tombstones)?.remove(id.0.as_u128())?;
                    }
                }
            }
        }
        txn.commit()?;
        Ok(())
    }
}

fn opened<'a, 'txn, V: redb::Value + 'static>(
    txn: &'txn WriteTransaction,
    definition: TableDefinition<'static, u128, V>,
    table: &'a mut Option<Table<'txn, u128, V>>,
) -> Result<&'a mut Table<'txn, u128, V>, JournalError> {
    if table.is_none() {
        *table = Some(txn.open_table(definition)?);
    }
    Ok(table.as_mut().expect("it was just opened"))
}

fn id(key: u128) -> ToolCallId {
    ToolCallId(uuid::Uuid::from_u128(key))
}
