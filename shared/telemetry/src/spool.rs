//! Spans that other processes refer to, on disk until the collector has them. A process that is killed leaves its spool
//! behind, and any process with the same directory sends it: so these spans need not leave at once, one request each.
//!
//! A directory per process, locked as long as the process lives. A segment is a file of spans, each behind its length; it
//! goes when all of its spans were sent. What is written is in the page cache, which outlives a process and not a machine.
//! Between a collector's answer and the end of a segment a kill sends spans twice, never not at all.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use opentelemetry_proto::{
    tonic::{
        collector::trace::v1::{ExportTraceServiceRequest, trace_service_client::TraceServiceClient},
        resource::v1::Resource,
        trace::v1::{ResourceSpans, ScopeSpans, Span},
    },
    transform::common::tonic::ResourceAttributesWithSchema,
};
use opentelemetry_sdk::trace::SpanData;
use parking_lot::Mutex;
use prost::Message as _;
use tonic::transport::{Channel, Endpoint};

use crate::{
    chain,
    metrics::{OTLP_ADOPTED, OTLP_LOST},
};

/// A segment takes no more than this.
const SEGMENT_MAX_BYTES: u64 = 1024 * 1024;
/// Segments that wait for the collector at one time.
const SEGMENTS_MAX: usize = 8;
/// Spools of dead processes that are kept while the collector is away; the oldest go first.
const DEAD_MAX: usize = 64;
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// After a collector that did not answer.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// Spans in one request for a dead process.
const REQUEST_SPANS_MAX: usize = 512;
const LOCK: &str = "lock";
const RESOURCE: &str = "resource";
/// A directory with this ending is complete: its lock is held by its process, or by nobody.
const ENDING: &str = "spans";

/// Where one process keeps its own.
#[derive(Debug)]
pub(crate) struct Spool {
    dir: PathBuf,
    _lock: File,
    segments: Mutex<Segments>,
}

#[derive(Debug, Default)]
struct Segments {
    /// The newest one is written to.
    open: BTreeMap<u64, Segment>,
    next: u64,
}

#[derive(Debug)]
struct Segment {
    file: File,
    bytes: u64,
    /// Spans in it that were not sent yet.
    waiting: usize,
}

impl Spool {
    /// Makes this process's directory below `root`.
    pub fn open(root: &Path, resource: &opentelemetry_sdk::Resource) -> io::Result<Self> {
        let private = |path: &Path| DirBuilder::new().recursive(true).mode(0o700).create(path);
        private(root)?;
        forget_the_oldest(root);
        let id = reliant_types::InstanceId::new();
        let unfinished = root.join(format!("{id}.new"));
        private(&unfinished)?;
        let lock = create(&unfinished.join(LOCK))?;
        lock.lock()?;
        let attributes = ResourceAttributesWithSchema::from(resource).attributes.0;
        let resource = Resource { attributes, ..Resource::default() };
        create(&unfinished.join(RESOURCE))?.write_all(&resource.encode_to_vec())?;
        // Whoever may write here may have us send what it likes.
        if fs::metadata(root)?.uid() != fs::metadata(&unfinished)?.uid() {
            let _ = fs::remove_dir_all(&unfinished);
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "the directory is another user's"));
        }
        let dir = root.join(format!("{id}.{ENDING}"));
        fs::rename(&unfinished, &dir)?;
        Ok(Self { dir, _lock: lock, segments: Mutex::default() })
    }

    /// Keeps the span, and names the segment to be told once it was sent. `None`: there is no room, or no disk.
    pub fn keep(&self, span: &SpanData) -> Option<u64> {
        let span = Span::from(span.clone());
        let mut record = Vec::with_capacity(512);
        span.encode_length_delimited(&mut record).ok()?;
        let mut segments = self.segments.lock();
        let number = segments.current(&self.dir)?;
        let segment = segments.open.get_mut(&number)?;
        if segment.bytes + record.len() as u64 > SEGMENT_MAX_BYTES {
            return None;
        }
        segment.file.write_all(&record).ok()?;
        segment.bytes += record.len() as u64;
        segment.waiting += 1;
        Some(number)
    }

    /// What is kept from now on goes into another segment, so that the present one can come to its end.
    pub fn turn_the_page(&self) {
        let mut segments = self.segments.lock();
        let is_used = segments.open.last_key_value().is_some_and(|(_, segment)| segment.bytes > 0);
        if is_used && segments.open.len() < SEGMENTS_MAX {
            segments.begin(&self.dir);
        }
    }

    /// These spans are with the collector, or were given up and counted.
    pub fn done(&self, sent: impl Iterator<Item = u64>) {
        let mut segments = self.segments.lock();
        for number in sent {
            if let Some(segment) = segments.open.get_mut(&number) {
                segment.waiting = segment.waiting.saturating_sub(1);
            }
        }
        let newest = segments.open.last_key_value().map(|(number, _)| *number);
        segments.open.retain(|number, segment| {
            if segment.waiting > 0 {
                return true;
            }
            if Some(*number) == newest {
                if segment.bytes > 0 && segment.file.set_len(0).is_ok() {
                    segment.bytes = 0;
                }
                return true;
            }
            let _ = fs::remove_file(self.dir.join(number.to_string()));
            false
        });
    }

    /// At the end of the process; what was not sent by then is for others to send.
    pub fn close(&self) {
        if self.segments.lock().open.values().all(|segment| segment.waiting == 0) {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

impl Segments {
    fn current(&mut self, dir: &Path) -> Option<u64> {
        if self.open.is_empty() {
            self.begin(dir);
        }
        self.open.last_key_value().map(|(number, _)| *number)
    }

    fn begin(&mut self, dir: &Path) {
        let number = self.next;
        if let Ok(file) = create(&dir.join(number.to_string())) {
            self.next += 1;
            self.open.insert(number, Segment { file, bytes: 0, waiting: 0 });
        }
    }
}

/// For appending, so that a segment cut to nothing is written from its start.
fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create_new(true).mode(0o600).open(path)
}

/// Directories below `root` of whose processes some may be dead, oldest first.
fn others(root: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(root) else { return Vec::new() };
    let mut dirs: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|ending| ending == ENDING))
        .collect();
    // Their names are ids that grow with time.
    dirs.sort();
    dirs
}

/// The lock of a dead process's directory; while it is held nobody else sends the same.
fn claim(dir: &Path) -> Option<File> {
    let lock = OpenOptions::new().append(true).open(dir.join(LOCK)).ok()?;
    match lock.try_lock() {
        Ok(()) => Some(lock),
        Err(TryLockError::WouldBlock | TryLockError::Error(_)) => None,
    }
}

fn forget_the_oldest(root: &Path) {
    let dirs = others(root);
    let too_many = dirs.len().saturating_sub(DEAD_MAX);
    for dir in dirs.iter().take(too_many) {
        if let Some(_lock) = claim(dir) {
            let (_, spans) = read(dir);
            OTLP_LOST.with_label_values(&["traces"]).inc_by(spans.len() as u64);
            let _ = fs::remove_dir_all(dir);
        }
    }
}

/// What a dead process left. A record that was being written when it died is no record.
fn read(dir: &Path) -> (Resource, Vec<Span>) {
    let bytes = |path: PathBuf, max: u64| {
        let mut bytes = Vec::new();
        let file = File::open(path);
        let _ = file.and_then(|file| file.take(max).read_to_end(&mut bytes));
        bytes
    };
    let resource = Resource::decode(bytes(dir.join(RESOURCE), SEGMENT_MAX_BYTES).as_slice()).unwrap_or_default();
    let names = fs::read_dir(dir).into_iter().flatten().filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut numbers: Vec<u64> = names.filter_map(|name| name.parse().ok()).collect();
    numbers.sort_unstable();
    let mut spans = Vec::new();
    for number in numbers.into_iter().take(SEGMENTS_MAX) {
        let bytes = bytes(dir.join(number.to_string()), SEGMENT_MAX_BYTES);
        let mut rest = bytes.as_slice();
        while !rest.is_empty()
            && let Ok(span) = Span::decode_length_delimited(&mut rest)
        {
            spans.push(span);
        }
    }
    (resource, spans)
}

/// Sends what dead processes left below `root`, for as long as this process lives.
pub(crate) async fn adopt(root: PathBuf, endpoint: Endpoint) {
    let mut client = TraceServiceClient::new(endpoint.connect_lazy());
    loop {
        let found = {
            let root = root.clone();
            tokio::task::spawn_blocking(move || others(&root).into_iter().find_map(|dir| Some((claim(&dir)?, dir))))
        };
        let Ok(Some((lock, dir))) = found.await else {
            tokio::time::sleep(LOOK_INTERVAL).await;
            continue;
        };
        if let Err(error) = send(&mut client, &dir).await {
            tracing::debug!(target: "reliant_telemetry", error = %chain(&error), "spans of a process that died wait for the collector");
            drop(lock);
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }
}

async fn send(client: &mut TraceServiceClient<Channel>, dir: &Path) -> Result<(), tonic::Status> {
    let (resource, spans) = read(dir);
    for spans in spans.chunks(REQUEST_SPANS_MAX) {
        let scope_spans = vec![ScopeSpans { spans: spans.to_vec(), ..ScopeSpans::default() }];
        let resource_spans =
            vec![ResourceSpans { resource: Some(resource.clone()), scope_spans, ..ResourceSpans::default() }];
        client.export(ExportTraceServiceRequest { resource_spans }).await?;
    }
    OTLP_ADOPTED.with_label_values(&["traces"]).inc_by(spans.len() as u64);
    let _ = fs::remove_dir_all(dir);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry::trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
    use opentelemetry_proto::tonic::collector::trace::v1::{
        ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    };
    use std::{sync::Arc, time::SystemTime};

    fn span(id: u64) -> SpanData {
        SpanData {
            span_context: SpanContext::new(
                TraceId::from(1u128),
                SpanId::from(id),
                TraceFlags::SAMPLED,
                false,
                TraceState::default(),
            ),
            parent_span_id: SpanId::INVALID,
            parent_span_is_remote: false,
            span_kind: SpanKind::Producer,
            name: "tool.dispatch".into(),
            start_time: SystemTime::now(),
            end_time: SystemTime::now(),
            attributes: Vec::new(),
            dropped_attributes_count: 0,
            events: Default::default(),
            links: Default::default(),
            status: Status::Unset,
            instrumentation_scope: Default::default(),
        }
    }

    fn open(root: &Path) -> Spool {
        let service = opentelemetry::KeyValue::new("service.instance.id", "the dead one");
        Spool::open(root, &opentelemetry_sdk::Resource::builder_empty().with_attribute(service).build()).unwrap()
    }

    fn ids(dir: &Path) -> Vec<u64> {
        let id = |span: &Span| u64::from_be_bytes(span.span_id.as_slice().try_into().unwrap());
        read(dir).1.iter().map(id).collect()
    }

    #[test]
    fn a_segment_goes_when_all_of_its_spans_were_sent() {
        let root = tempfile::tempdir().unwrap();
        let spool = open(root.path());
        let first = spool.keep(&span(1)).unwrap();
        assert_eq!(spool.keep(&span(2)), Some(first));
        spool.turn_the_page();
        let second = spool.keep(&span(3)).unwrap();
        assert_ne!(first, second);
        spool.done([first].into_iter());
        assert_eq!(ids(&spool.dir), [1, 2, 3], "the second is still on its way");
        spool.done([first].into_iter());
        assert_eq!(ids(&spool.dir), [3]);
        spool.done([second].into_iter());
        assert!(ids(&spool.dir).is_empty());
        assert_eq!(spool.keep(&span(4)), Some(second), "an empty one is written from its start");
        assert_eq!(ids(&spool.dir), [4]);
        assert!(claim(&spool.dir).is_none(), "it lives");
        spool.done([second].into_iter());
        spool.close();
        assert!(others(root.path()).is_empty());
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let root = tempfile::tempdir().unwrap();
        let spool = open(root.path());
        let mut kept = 0;
        for id in 0..300_000 {
            kept += usize::from(spool.keep(&span(id + 1)).is_some());
            if id % 1000 == 0 {
                spool.turn_the_page();
            }
        }
        assert!(kept > 10_000 && kept < 300_000, "{kept}");
        let bytes: u64 = fs::read_dir(&spool.dir).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).sum();
        assert!(bytes <= (SEGMENTS_MAX as u64 + 1) * SEGMENT_MAX_BYTES, "{bytes}");
        drop(spool);
        for _ in 0..DEAD_MAX + 10 {
            drop(open(root.path()));
        }
        assert!(others(root.path()).len() <= DEAD_MAX + 1);
    }

    #[test]
    fn a_record_that_was_being_written_is_no_record() {
        let root = tempfile::tempdir().unwrap();
        let spool = open(root.path());
        let segment = spool.keep(&span(1)).unwrap();
        let one = spool.segments.lock().open[&segment].bytes;
        spool.keep(&span(2)).unwrap();
        let path = spool.dir.join(segment.to_string());
        let whole = fs::read(&path).unwrap();
        for cut in 0..=whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let expected: &[u64] = match cut as u64 {
                cut if cut < one => &[],
                _ if cut < whole.len() => &[1],
                _ => &[1, 2],
            };
            assert_eq!(ids(&spool.dir), expected, "cut at {cut}");
        }
    }

    #[derive(Clone, Default)]
    struct Collector(Arc<Mutex<Vec<ResourceSpans>>>);

    #[tonic::async_trait]
    impl TraceService for Collector {
        async fn export(
            &self,
            request: tonic::Request<ExportTraceServiceRequest>,
        ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
            self.0.lock().extend(request.into_inner().resource_spans);
            Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
        }
    }

    #[tokio::test]
    async fn what_a_dead_process_left_is_sent_once_by_another_and_what_a_living_one_has_is_not() {
        let root = tempfile::tempdir().unwrap();
        let (dead, living) = (open(root.path()), open(root.path()));
        for id in 1..=REQUEST_SPANS_MAX as u64 + 1 {
            dead.keep(&span(id)).unwrap();
        }
        living.keep(&span(100_000)).unwrap();
        // As a kill does: its lock goes with it, its files stay.
        drop(dead);
        let collector = Collector::default();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = Endpoint::from_shared(format!("http://{}", listener.local_addr().unwrap())).unwrap();
        let two = [adopt(root.path().into(), endpoint.clone()), adopt(root.path().into(), endpoint)].map(tokio::spawn);
        let server = tonic::transport::Server::builder().add_service(TraceServiceServer::new(collector.clone()));
        tokio::spawn(server.serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(listener)));
        let gone = async {
            while others(root.path()).len() > 1 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), gone).await.expect("the dead one's spool goes");
        for task in two {
            task.abort();
        }
        let sent = collector.0.lock();
        assert!(sent.iter().all(|spans| spans.resource.as_ref().unwrap().attributes.len() == 1), "in its own name");
        let spans = sent.iter().flat_map(|spans| &spans.scope_spans[0].spans).count();
        assert_eq!(spans, REQUEST_SPANS_MAX + 1);
    }
}
