//! CPU time of processes, from /proc. A process that is gone has used nothing.

use std::fs;

/// Linux reports CPU times in hundredths of a second on every architecture (`USER_HZ`).
const MS_PER_TICK: f64 = 10.0;

/// CPU time a process has used so far, in milliseconds; that of its children is not in it.
pub fn process_ms(pid: u32) -> f64 {
    stat(pid).map_or(0.0, |stat| stat.own_ms)
}

/// The same of a process and its children, such as Postgres' backends.
pub fn family_ms(pid: u32) -> f64 {
    process_ms(pid) + children(pid).into_iter().map(process_ms).sum::<f64>()
}

/// The same of a process and everything below it, of what has ended as well.
pub fn tree_ms(pid: u32) -> f64 {
    let own = stat(pid).map_or(0.0, |stat| stat.own_ms + stat.ended_children_ms);
    own + children(pid).into_iter().map(tree_ms).sum::<f64>()
}

/// CPU time that all processes of this machine have used so far, in milliseconds.
pub fn machine_ms() -> f64 {
    busy_ms(&fs::read_to_string("/proc/stat").unwrap_or_default())
}

/// CPU milliseconds used so far by each role: a name, and the processes that it is.
pub fn by_role<N>(roles: impl IntoIterator<Item = (N, Vec<u32>)>) -> Vec<(N, f64)> {
    roles.into_iter().map(|(name, pids)| (name, pids.into_iter().map(family_ms).sum())).collect()
}

/// The processes below this one, children before grandchildren; what ends meanwhile may be among them.
pub fn descendants(pid: u32) -> Vec<u32> {
    let mut found = children(pid);
    let mut next = 0;
    while let Some(pid) = found.get(next).copied() {
        found.extend(children(pid));
        next += 1;
    }
    found
}

struct Stat {
    own_ms: f64,
    ended_children_ms: f64,
}

fn stat(pid: u32) -> Option<Stat> {
    parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// A process's name stands in brackets and may hold anything; fields are counted behind it.
fn parse(stat: &str) -> Option<Stat> {
    let fields: Vec<&str> = stat.rsplit(')').next()?.split_whitespace().collect();
    let ms = |index: usize| Some(fields.get(index)?.parse::<f64>().ok()? * MS_PER_TICK);
    // utime, stime, cutime and cstime are fields 14 to 17 of proc(5); counting begins at 1, and two came before the cut.
    Some(Stat { own_ms: ms(11)? + ms(12)?, ended_children_ms: ms(13)? + ms(14)? })
}

fn children(pid: u32) -> Vec<u32> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let lists = tasks.flatten().filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    lists.flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()).collect()
}

/// All but idle, waiting for disks, and guests, which the first two count already.
fn busy_ms(stat: &str) -> f64 {
    let Some(line) = stat.lines().find_map(|line| line.strip_prefix("cpu ")) else { return 0.0 };
    let ticks: Vec<f64> = line.split_whitespace().filter_map(|field| field.parse().ok()).collect();
    let busy = [0, 1, 2, 5, 6].into_iter().filter_map(|index| ticks.get(index)).sum::<f64>();
    busy * MS_PER_TICK
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn fields_are_counted_behind_the_name() {
        let stat = parse("7 (a b) c) S 1 7 7 0 -1 4194304 9 0 0 0 150 75 20 10 20 0 9 0 3000 1 2 3").unwrap();
        assert_eq!((stat.own_ms, stat.ended_children_ms), (2250.0, 300.0));
        assert!(parse("").is_none());
        assert_eq!(busy_ms("cpu  10 0 20 1000 500 1 2 0 9 9\ncpu0 1 1 1"), 330.0);
    }

    #[test]
    fn descendants_are_children_and_theirs() {
        let mut shell = Command::new("sh").args(["-c", "sh -c 'sleep 60; :' & wait"]).spawn().unwrap();
        let begun = std::time::Instant::now();
        // A shell within the shell, and its sleep.
        let below = loop {
            let below = descendants(shell.id());
            if below.len() == 2 {
                break below;
            }
            assert!(begun.elapsed().as_secs() < 60, "{below:?}");
            std::thread::yield_now();
        };
        assert_eq!(children(below[0]), below[1..]);
        for pid in below.into_iter().rev() {
            Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap();
        }
        shell.wait().unwrap();
        assert!(descendants(u32::MAX).is_empty());
    }

    #[test]
    fn what_a_child_used_is_its_familys_and_then_its_trees() {
        let spin = "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done";
        let mut shell = Command::new("sh").args(["-c", &format!("({spin}); ({spin}); sleep 60")]).spawn().unwrap();
        let begun = std::time::Instant::now();
        // The subshells end; what they used is counted as the shell's ended children.
        while tree_ms(shell.id()) < 100.0 {
            assert!(begun.elapsed().as_secs() < 120, "{} ms", tree_ms(shell.id()));
            std::thread::yield_now();
        }
        assert!(tree_ms(std::process::id()) >= tree_ms(shell.id()));
        let roles = by_role([("shell", vec![shell.id()]), ("gone", vec![u32::MAX])]);
        assert_eq!((roles[1].0, roles[1].1), ("gone", 0.0));
        shell.kill().unwrap();
        shell.wait().unwrap();
        assert!(machine_ms() > 0.0);
    }
}
