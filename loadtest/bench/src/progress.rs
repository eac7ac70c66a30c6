//! What is being done now, printed when it begins and again each half minute.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{task::JoinHandle, time::Instant};

const EVERY: Duration = Duration::from_secs(30);

/// Prints until it is dropped.
pub struct Progress {
    now: Arc<Mutex<(String, Instant)>>,
    printing: JoinHandle<()>,
}

impl Progress {
    pub fn start(what: &str) -> Self {
        let now = Arc::new(Mutex::new((String::new(), Instant::now())));
        let seen = now.clone();
        let printing = tokio::spawn(async move {
            loop {
                tokio::time::sleep(EVERY).await;
                let (what, began) = seen.lock().unwrap_or_else(PoisonError::into_inner).clone();
                // What began within the interval was printed then.
                if began.elapsed() >= EVERY {
                    print(&format!("{what}, for {:.0} s now", began.elapsed().as_secs_f64()));
                }
            }
        });
        let progress = Self { now, printing };
        progress.set(what);
        progress
    }

    pub fn set(&self, what: &str) {
        print(what);
        *self.now.lock().unwrap_or_else(PoisonError::into_inner) = (what.to_owned(), Instant::now());
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.printing.abort();
    }
}

#[expect(clippy::print_stdout, reason = "whoever waits for the table sees that it goes on")]
fn print(what: &str) {
    println!("  … {what}");
}
