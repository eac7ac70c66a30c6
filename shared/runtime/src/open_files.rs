//! The process's limit of open files. A connection is a file, and the soft limit of many systems is 1,024.

use reliant_telemetry::chain;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What a process has open beside its connections: pools, logs, listeners.
const OTHER_FILES: usize = 256;

/// Raises the soft limit to the hard one, and says where `connections` do not fit: the listener waits for files then.
pub fn raise(connections: usize) {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })
    {
        tracing::warn!(error = %chain(&error), "the limit of open files could not be raised to the hard limit");
    }
    let now = getrlimit(Resource::Nofile).current;
    if !fits(now, connections) {
        tracing::info!(
            open_files = now,
            connections,
            "fewer files may be open than the configured connections need; raise 'ulimit -Hn' (LimitNOFILE) or lower \
             connections.total"
        );
    }
}

/// `None`: no limit.
fn fits(open_files: Option<u64>, connections: usize) -> bool {
    open_files
        .is_none_or(|files| usize::try_from(files).unwrap_or(usize::MAX) >= connections.saturating_add(OTHER_FILES))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_is_raised_to_the_hard_one() {
        raise(1);
        let limit = getrlimit(Resource::Nofile);
        assert_eq!(limit.current, limit.maximum);
    }

    #[test]
    fn connections_fit_beside_the_other_files() {
        assert!(fits(None, usize::MAX) && fits(Some(1024), 512));
        assert!(!fits(Some(1024), 1000));
    }
}
