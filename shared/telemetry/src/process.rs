//! The `process_*` metrics that Prometheus' clients agree on, read from /proc at each scrape. CPU seconds keep their
//! fraction: the `prometheus` crate's own collector cuts it off, so that an idle role seems to use nothing for minutes.

use std::{collections::HashMap, fs, path::Path};

use prometheus::{
    Counter, Gauge, Opts,
    core::{Collector, Desc},
    proto::MetricFamily,
};

/// Linux reports CPU times in hundredths of a second on every architecture (`USER_HZ`).
const TICKS_PER_SECOND: f64 = 100.0;
/// Sizes in a `status` file are in KiB.
const STATUS_KIB: f64 = 1024.0;

pub struct ProcessCollector {
    cpu: Counter,
    gauges: Vec<(Gauge, Read)>,
}

/// A gauge's value, where /proc has it.
type Read = fn(&Reading) -> Option<f64>;

/// What /proc says of a process at one moment.
#[derive(Debug, Default)]
struct Reading {
    cpu_seconds: Option<f64>,
    start_seconds: Option<f64>,
    open_fds: Option<f64>,
    max_fds: Option<f64>,
    status: HashMap<String, f64>,
}

impl ProcessCollector {
    pub fn for_self() -> prometheus::Result<Self> {
        let gauge = |name: &str, help: &str| Gauge::with_opts(Opts::new(name, help));
        let gauges: [(Gauge, Read); 6] = [
            (gauge("process_start_time_seconds", "Start of the process, in Unix seconds")?, |now| now.start_seconds),
            (gauge("process_open_fds", "Open file descriptors")?, |now| now.open_fds),
            (gauge("process_max_fds", "File descriptors the process may open")?, |now| now.max_fds),
            (gauge("process_threads", "Threads of the process")?, |now| now.status.get("Threads").copied()),
            (gauge("process_resident_memory_bytes", "Resident memory in bytes")?, |now| now.kib("VmRSS")),
            (gauge("process_virtual_memory_bytes", "Virtual memory in bytes")?, |now| now.kib("VmSize")),
        ];
        let cpu = Counter::new("process_cpu_seconds_total", "User and system CPU time in seconds")?;
        Ok(Self { cpu, gauges: gauges.into() })
    }
}

impl Collector for ProcessCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.cpu.desc().into_iter().chain(self.gauges.iter().flat_map(|(gauge, _)| gauge.desc())).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let now = Reading::of(Path::new("/proc/self"));
        // Two scrapes at once may both find the same growth; only growth beyond what is counted is added.
        if let Some(grown) = now.cpu_seconds.map(|seconds| seconds - self.cpu.get()).filter(|grown| *grown > 0.0) {
            self.cpu.inc_by(grown);
        }
        let mut families = self.cpu.collect();
        for (gauge, read) in &self.gauges {
            if let Some(value) = read(&now) {
                gauge.set(value);
                families.extend(gauge.collect());
            }
        }
        families
    }
}

impl Reading {
    /// A file that cannot be read leaves its values out.
    fn of(dir: &Path) -> Self {
        let read = |name: &str| fs::read_to_string(dir.join(name)).unwrap_or_default();
        let boot = fs::read_to_string("/proc/stat").ok().and_then(|stat| boot_seconds(&stat));
        let mut reading = Self {
            open_fds: fs::read_dir(dir.join("fd")).ok().map(|fds| fds.count() as f64),
            max_fds: max_fds(&read("limits")),
            status: status(&read("status")),
            ..Self::default()
        };
        if let Some((cpu, started)) = times(&read("stat")) {
            reading.cpu_seconds = Some(cpu);
            reading.start_seconds = boot.map(|boot| boot + started);
        }
        reading
    }

    fn kib(&self, name: &str) -> Option<f64> {
        self.status.get(name).map(|kib| kib * STATUS_KIB)
    }
}

/// CPU seconds, and seconds from the machine's start to the process's, of a `stat` file. A process's name stands in
/// brackets and may hold anything; fields are counted behind it.
fn times(stat: &str) -> Option<(f64, f64)> {
    let fields: Vec<&str> = stat.rsplit(')').next()?.split_whitespace().collect();
    // Fields 14, 15 and 22 of proc(5); three came before the cut, and counting begins at 1.
    let seconds = |index: usize| Some(fields.get(index)?.parse::<f64>().ok()? / TICKS_PER_SECOND);
    Some((seconds(11)? + seconds(12)?, seconds(19)?))
}

fn boot_seconds(stat: &str) -> Option<f64> {
    stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

/// None where there is no limit.
fn max_fds(limits: &str) -> Option<f64> {
    limits.lines().find_map(|line| line.strip_prefix("Max open files"))?.split_whitespace().next()?.parse().ok()
}

/// The lines of a `status` file that begin with a number.
fn status(text: &str) -> HashMap<String, f64> {
    let line = |line: &str| {
        let (name, rest) = line.split_once(':')?;
        Some((name.to_owned(), rest.split_whitespace().next()?.parse().ok()?))
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stat_line_is_read_behind_any_name() {
        let line = "42 (a) b) c) S 1 42 42 0 -1 4194304 9 0 0 0 150 75 0 0 20 0 9 0 3000 1 2 3";
        assert_eq!(times(line), Some((2.25, 30.0)));
        assert_eq!(times("42 (short) S 1"), None);
        assert_eq!(times(""), None);
    }

    #[test]
    fn limits_and_status_are_read() {
        assert_eq!(
            max_fds("Max open files            1024                 4096                 files\n"),
            Some(1024.0)
        );
        assert_eq!(max_fds("Max open files            unlimited            unlimited            files\n"), None);
        let status = status("Name:\tx\nVmRSS:\t  12 kB\nThreads:\t3\n");
        assert_eq!((status.get("VmRSS"), status.get("Threads"), status.get("Name")), (Some(&12.0), Some(&3.0), None));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_process_is_measured_with_fractions_and_never_backwards() {
        let collector = ProcessCollector::for_self().unwrap();
        let cpu = || {
            let families = collector.collect();
            assert_eq!(families.len(), 7, "each file of /proc was read");
            families[0].get_metric()[0].get_counter().get_value()
        };
        let first = cpu();
        let begun = std::time::Instant::now();
        // Long enough for a tick, however busy the machine is: it ends by CPU time and not by the clock.
        let mut last = first;
        while last - first < 0.02 {
            assert!(begun.elapsed().as_secs() < 60, "no CPU time was counted");
            let now = cpu();
            assert!(now >= last);
            last = now;
        }
        assert!(last - first < 1.0, "a tick is a hundredth of a second, not {}", last - first);
    }
}
