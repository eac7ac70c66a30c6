//! A noisy neighbour on the same machine: a process of its own that takes CPU, memory or the disk for a while and lets go.
//!
//! Bounded in each of them and in time. It ends when its standard input ends, so that it never outlives the campaign,
//! however that one ends. The program is `reliant-chaos stressor …`; [`Stressor`] starts it.

use std::{
    fs::File,
    hint::black_box,
    io::{Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use tokio::time::sleep;

/// The first argument of the program.
pub const ARGUMENT: &str = "stressor";

/// None stays for longer.
const LASTING_MAX: Duration = Duration::from_secs(10 * 60);
/// Above the mesh, so that it really gets its share. Where that is not allowed it competes as an equal.
const NICE: i32 = -10;
/// Of the memory that is available when it begins.
const MEMORY_SHARE_MAX: f64 = 0.4;
const MEMORY_MAX_BYTES: u64 = 8 << 30;
/// With less than this share of what was available left, it takes no more.
const MEMORY_LEFT_MIN: f64 = 0.5;
const MEMORY_CHUNK_BYTES: usize = 16 << 20;
const PAGE_BYTES: usize = 4096;
/// The file that is written over and over, per writer.
const DISK_FILE_BYTES: u64 = 64 << 20;
const DISK_BIG_WRITE_BYTES: usize = 1 << 20;
/// May be written before it is due, so that two big writers are always at it.
const DISK_AHEAD_BYTES: u64 = 4 << 20;
/// How long one that was told to end may take.
const END_PATIENCE: Duration = Duration::from_secs(10);
/// A share of the cores is held over each of these, so that a moment without CPU is not made up for later.
const CPU_WINDOW: Duration = Duration::from_millis(500);

/// What it takes.
#[derive(Debug, Clone, PartialEq)]
pub enum Stressor {
    /// This share of all cores.
    Cpu { share: f64 },
    /// This share of the memory that is available, at most 0.4 of it.
    Memory { share: f64 },
    /// Writes and syncs in this directory, at most so many bytes.
    Disk { dir: PathBuf, bytes_max: u64 },
}

/// A stressor at work. Dropped, it is killed.
#[derive(Debug)]
pub struct StressorProcess {
    child: Child,
}

impl Stressor {
    fn arguments(&self, lasting: Duration) -> Vec<String> {
        let what = match self {
            Self::Cpu { share } => vec!["cpu".to_owned(), share.to_string()],
            Self::Memory { share } => vec!["memory".to_owned(), share.to_string()],
            Self::Disk { dir, bytes_max } => {
                vec!["disk".to_owned(), dir.display().to_string(), bytes_max.to_string()]
            }
        };
        let mut all = vec![ARGUMENT.to_owned(), lasting.as_millis().to_string()];
        all.extend(what);
        all
    }

    fn parse(arguments: &[String]) -> Result<(Duration, Self)> {
        let [lasting, what @ ..] = arguments else { bail!("a stressor needs to know how long, what and how much") };
        let lasting = Duration::from_millis(lasting.parse().context("milliseconds")?).min(LASTING_MAX);
        let share = |text: &str| -> Result<f64> {
            let share: f64 = text.parse().context("a share")?;
            ensure!((0.0..=1.0).contains(&share), "a share is between 0 and 1");
            Ok(share)
        };
        let stressor = match what {
            [what, text] if what == "cpu" => Self::Cpu { share: share(text)? },
            [what, text] if what == "memory" => Self::Memory { share: share(text)?.min(MEMORY_SHARE_MAX) },
            [what, dir, bytes] if what == "disk" => {
                Self::Disk { dir: dir.into(), bytes_max: bytes.parse().context("bytes")? }
            }
            other => bail!("there is no stressor {other:?}"),
        };
        Ok((lasting, stressor))
    }

    /// Starts it; it makes a session, and so a process group, of its own.
    pub fn start(&self, lasting: Duration) -> Result<StressorProcess> {
        let program = program()?;
        let mut command = Command::new(&program);
        command.args(self.arguments(lasting)).stdin(Stdio::piped()).stdout(Stdio::piped());
        let child = command.spawn().with_context(|| format!("{} could not be started", program.display()))?;
        Ok(StressorProcess { child })
    }
}

/// This program, or the one that was built beside the test.
fn program() -> Result<PathBuf> {
    const NAME: &str = "reliant-chaos";
    let own = std::env::current_exe()?;
    let found = own.ancestors().skip(1).map(|dir| dir.join(NAME)).find(|path| path.is_file());
    found.with_context(|| format!("no {NAME} near {}; build the workspace first", own.display()))
}

impl StressorProcess {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Lets it end, and returns what it took, by its own account.
    pub async fn finish(mut self) -> Result<Value> {
        drop(self.child.stdin.take());
        let deadline = tokio::time::Instant::now() + END_PATIENCE;
        while self.child.try_wait()?.is_none() {
            ensure!(tokio::time::Instant::now() < deadline, "the stressor did not let go");
            sleep(Duration::from_millis(20)).await;
        }
        let mut text = String::new();
        if let Some(mut output) = self.child.stdout.take() {
            output.read_to_string(&mut text)?;
        }
        serde_json::from_str(&text).with_context(|| format!("the stressor ended with {text:?}"))
    }
}

impl Drop for StressorProcess {
    fn drop(&mut self) {
        // Both fail where it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The program: takes what it is told to until its time is over or its standard input ends, then says what it took.
#[expect(clippy::print_stdout, reason = "its report is its output")]
pub fn run(arguments: &[String]) -> Result<()> {
    let (lasting, stressor) = Stressor::parse(arguments)?;
    // Refused to a process that leads a group already, which is as good.
    let _ = rustix::process::setsid();
    let stop = Arc::new(AtomicBool::new(false));
    let (sender, ended) = mpsc::channel();
    std::thread::spawn(move || {
        // Nothing is ever written to it: it ends with whoever holds its other end.
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        let _ = sender.send(());
    });
    let stopping = stop.clone();
    std::thread::spawn(move || {
        let _ = ended.recv_timeout(lasting);
        stopping.store(true, Ordering::Relaxed);
    });
    let took = match stressor {
        Stressor::Cpu { share } => take_cpu(share, &stop),
        Stressor::Memory { share } => take_memory(share, &stop),
        Stressor::Disk { dir, bytes_max } => take_disk(&dir, bytes_max, lasting, &stop),
    }?;
    println!("{took}");
    Ok(())
}

fn take_cpu(share: f64, stop: &Arc<AtomicBool>) -> Result<Value> {
    let preferred = rustix::process::setpriority_process(None, NICE).is_ok();
    // Where the kernel divides CPU by sessions first, ours must go before theirs. Elsewhere there is no such file.
    let _ = std::fs::write("/proc/self/autogroup", NICE.to_string());
    let cores = std::thread::available_parallelism()?.get();
    let begun = Instant::now();
    let spinning: Vec<_> = (0..cores)
        .map(|_| {
            let stop = stop.clone();
            std::thread::spawn(move || spin(share, &stop))
        })
        .collect();
    let mut used = Duration::ZERO;
    for thread in spinning {
        used += thread.join().unwrap_or_default();
    }
    let seconds = begun.elapsed().as_secs_f64();
    let cores_taken = used.as_secs_f64() / seconds.max(0.001);
    Ok(json!({ "seconds": seconds, "cores": cores, "cores_taken": cores_taken, "preferred": preferred }))
}

/// Works while this thread has had less than its share of a window, else sleeps.
fn spin(share: f64, stop: &AtomicBool) -> Duration {
    let mut number = 1_u64;
    while !stop.load(Ordering::Relaxed) {
        let (begun, before) = (Instant::now(), thread_cpu());
        while begun.elapsed() < CPU_WINDOW && !stop.load(Ordering::Relaxed) {
            if thread_cpu().saturating_sub(before).as_secs_f64() >= begun.elapsed().as_secs_f64() * share {
                idle(Duration::from_millis(1));
                continue;
            }
            for _ in 0..2000 {
                number = black_box(number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
            }
        }
    }
    thread_cpu()
}

#[expect(clippy::disallowed_methods, reason = "a stressor's threads run no tasks")]
fn idle(time: Duration) {
    std::thread::sleep(time);
}

/// What this thread has used so far.
fn thread_cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or_default(), u32::try_from(time.tv_nsec).unwrap_or_default())
}

fn take_memory(share: f64, stop: &AtomicBool) -> Result<Value> {
    // Should the kernel look for somebody to kill, it is this one. Where there is no such file, there is no such killer.
    let _ = std::fs::write("/proc/self/oom_score_adj", "1000");
    let available = available_bytes().context("this machine does not say how much memory is available")?;
    let wanted = ((available as f64 * share) as u64).min(MEMORY_MAX_BYTES);
    let left_min = (available as f64 * MEMORY_LEFT_MIN) as u64;
    let mut chunks: Vec<Vec<u8>> = Vec::new();
    let mut round = 1_u8;
    let taken = |chunks: &Vec<Vec<u8>>| (chunks.len() * MEMORY_CHUNK_BYTES) as u64;
    while !stop.load(Ordering::Relaxed) {
        let roomy = available_bytes().is_some_and(|left| left > left_min + MEMORY_CHUNK_BYTES as u64);
        if roomy && taken(&chunks) + (MEMORY_CHUNK_BYTES as u64) <= wanted {
            let mut chunk = vec![0; MEMORY_CHUNK_BYTES];
            touch(&mut chunk, round);
            chunks.push(chunk);
            continue;
        }
        // Kept in use, so that it is not what the kernel moves out first.
        round = round.wrapping_add(1);
        for chunk in &mut chunks {
            touch(chunk, round);
            idle(Duration::from_millis(10));
            if stop.load(Ordering::Relaxed) {
                break;
            }
        }
        idle(Duration::from_millis(100));
    }
    Ok(json!({ "bytes_taken": taken(&chunks), "bytes_available_before": available }))
}

fn touch(chunk: &mut [u8], value: u8) {
    for page in chunk.chunks_mut(PAGE_BYTES) {
        page[0] = value;
    }
    black_box(chunk);
}

/// What may still be taken without pushing others out: of the machine, or of the group that this process is in.
fn available_bytes() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let machine = mem_available(&meminfo)?;
    let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let groups = [
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ];
    // A group without a limit says "max", or a number beyond any machine's.
    let left = groups.iter().filter_map(|(limit, usage)| Some(number(limit)?.saturating_sub(number(usage)?)));
    Some(left.chain([machine]).min().unwrap_or(machine))
}

fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

/// Files that are removed with this value.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn take_disk(dir: &Path, bytes_max: u64, lasting: Duration, stop: &Arc<AtomicBool>) -> Result<Value> {
    let budget = Arc::new(Budget { begun: Instant::now(), lasting, bytes_max, written: AtomicU64::new(0) });
    // Small writes keep the file system's journal busy, big ones the device.
    let sizes = [PAGE_BYTES, PAGE_BYTES, DISK_BIG_WRITE_BYTES, DISK_BIG_WRITE_BYTES];
    let writing: Vec<_> = sizes
        .into_iter()
        .enumerate()
        .map(|(number, size)| {
            let path = dir.join(format!("stressor-{}-{number}.tmp", std::process::id()));
            let (budget, stop) = (budget.clone(), stop.clone());
            std::thread::spawn(move || write_and_sync(&path, size, &budget, &stop))
        })
        .collect();
    let mut all: Vec<Duration> = Vec::new();
    for thread in writing {
        all.extend(thread.join().map_err(|_| anyhow::anyhow!("a writer panicked"))??);
    }
    all.sort();
    let ms = |share: usize| {
        let at = all.len().saturating_sub(1) * share / 100;
        all.get(at).copied().unwrap_or_default().as_secs_f64() * 1000.0
    };
    let bytes_written = budget.written.load(Ordering::Relaxed);
    Ok(json!({
        "writes": all.len(), "bytes_written": bytes_written, "sync_ms_median": ms(50), "sync_ms_max": ms(100),
    }))
}

/// Bytes that may be written, spread over the time, so that the disk is slow to the end.
struct Budget {
    begun: Instant,
    lasting: Duration,
    bytes_max: u64,
    written: AtomicU64,
}

enum Spend {
    Now,
    Later,
    Never,
}

impl Budget {
    fn spend(&self, bytes: u64) -> Spend {
        let written = self.written.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let passed = self.begun.elapsed().as_secs_f64() / self.lasting.as_secs_f64().max(0.001);
        let due = (self.bytes_max as f64 * passed.min(1.0)) as u64 + DISK_AHEAD_BYTES;
        if written <= self.bytes_max.min(due) {
            return Spend::Now;
        }
        self.written.fetch_sub(bytes, Ordering::Relaxed);
        if written > self.bytes_max { Spend::Never } else { Spend::Later }
    }
}

/// Until it is stopped or all that may be is written; how long each write with its sync took.
fn write_and_sync(path: &Path, size: usize, budget: &Budget, stop: &AtomicBool) -> Result<Vec<Duration>> {
    const KEPT_MAX: usize = 200_000;
    let scratch = Scratch(path.to_owned());
    let mut file = File::create(&scratch.0).with_context(|| format!("{} could not be made", scratch.0.display()))?;
    let mut took = Vec::new();
    let (mut block, mut at) = (vec![0_u8; size], 0_u64);
    while !stop.load(Ordering::Relaxed) {
        match budget.spend(size as u64) {
            Spend::Now => {}
            Spend::Later => {
                idle(Duration::from_millis(5));
                continue;
            }
            Spend::Never => break,
        }
        let begun = Instant::now();
        let next = block[0].wrapping_add(1);
        block.fill(next);
        file.seek(SeekFrom::Start(at))?;
        file.write_all(&block)?;
        file.sync_data()?;
        at = (at + size as u64) % DISK_FILE_BYTES;
        if took.len() < KEPT_MAX {
            took.push(begun.elapsed());
        }
    }
    Ok(took)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_say_what_was_meant_and_no_more_than_it_may() {
        let minute = Duration::from_secs(60);
        let told =
            |stressor: &Stressor, lasting| Stressor::parse(&stressor.arguments(lasting)[1..]).expect("arguments");
        for stressor in [
            Stressor::Cpu { share: 0.75 },
            Stressor::Memory { share: 0.3 },
            Stressor::Disk { dir: "/tmp/a b".into(), bytes_max: 7 },
        ] {
            assert_eq!(told(&stressor, minute), (minute, stressor.clone()));
        }
        let greedy = told(&Stressor::Memory { share: 0.9 }, 60 * minute);
        assert_eq!(greedy, (LASTING_MAX, Stressor::Memory { share: MEMORY_SHARE_MAX }));
        for bad in [&["1", "cpu", "2"][..], &["1", "cpu"], &["x", "cpu", "0.5"], &["1", "fire", "0.5"], &[]] {
            let bad: Vec<String> = bad.iter().map(|&text| text.to_owned()).collect();
            assert!(Stressor::parse(&bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn available_memory_is_read() {
        let meminfo = "MemTotal:       24684084 kB\nMemFree: 1 kB\nMemAvailable:   23197924 kB\nBuffers: 2 kB\n";
        assert_eq!(mem_available(meminfo), Some(23_197_924 * 1024));
        assert_eq!(mem_available("MemFree: 1 kB\n"), None);
    }

    #[test]
    fn a_disk_stressor_writes_no_more_than_it_may_and_leaves_nothing() {
        let dir = std::env::temp_dir().join(format!("reliant-stressor-{}", uuid::Uuid::now_v7()));
        std::fs::create_dir_all(&dir).expect("dir");
        let bytes_max = 3 * DISK_BIG_WRITE_BYTES as u64;
        let lasting = Duration::from_millis(1);
        let took = take_disk(&dir, bytes_max, lasting, &Arc::new(AtomicBool::new(false))).expect("it writes");
        let written = took["bytes_written"].as_u64().expect("bytes");
        assert!(written > 0 && written <= bytes_max, "{took}");
        assert_eq!(std::fs::read_dir(&dir).expect("dir").count(), 0);
        std::fs::remove_dir(&dir).expect("remove");
    }

    #[test]
    fn what_may_be_written_is_spread_over_the_time() {
        let budget = |lasting| {
            let begun = Instant::now() - Duration::from_secs(1);
            Budget { begun, lasting, bytes_max: 1 << 30, written: AtomicU64::new(0) }
        };
        let slow = budget(Duration::from_secs(1_000_000));
        assert!(matches!(slow.spend(DISK_AHEAD_BYTES), Spend::Now));
        assert!(matches!(slow.spend(DISK_AHEAD_BYTES), Spend::Later));
        let over = budget(Duration::from_millis(1));
        assert!(matches!(over.spend(1 << 30), Spend::Now));
        assert!(matches!(over.spend(1), Spend::Never));
    }

    #[test]
    fn a_cpu_stressor_keeps_to_its_share() {
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = stop.clone();
        let spinning = std::thread::spawn(move || spin(0.3, &stopping));
        let begun = Instant::now();
        idle(Duration::from_millis(1500));
        stop.store(true, Ordering::Relaxed);
        let used = spinning.join().expect("it ends");
        // How little it gets is up to the machine; how much is up to it.
        assert!(used.as_secs_f64() <= begun.elapsed().as_secs_f64() * 0.3 + 0.2, "{used:?}");
    }
}
