//! Memory that the feeds of a replica share. One user gets at most half of it, so that nobody's daemon takes it all.

use std::{
    collections::HashMap,
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
    },
};

use parking_lot::Mutex;
use reliant_telemetry::sampled;
use reliant_types::UserId;

#[derive(Debug)]
pub struct Budget {
    used: AtomicUsize,
    max: usize,
    /// Charged as well.
    replica: Option<Arc<Budget>>,
    owners: Mutex<HashMap<UserId, Weak<Budget>>>,
}

impl Budget {
    /// A replica's, shown in the metrics as the queue `name`, in bytes.
    pub fn new(name: &'static str, max: usize) -> Arc<Self> {
        let budget = Arc::new(Self { used: AtomicUsize::new(0), max, replica: None, owners: Mutex::default() });
        let weak = Arc::downgrade(&budget);
        sampled::watch(name, max, move || weak.upgrade().map(|budget| budget.used.load(Ordering::Relaxed)));
        budget
    }

    /// The share of one user.
    pub fn of(self: &Arc<Self>, user: UserId) -> Arc<Budget> {
        let mut owners = self.owners.lock();
        if let Some(share) = owners.get(&user).and_then(Weak::upgrade) {
            return share;
        }
        // Bounded by the users who are followed; the others are cleared out when the map would grow.
        if owners.len() == owners.capacity() {
            owners.retain(|_, share| share.strong_count() > 0);
        }
        let share = Arc::new(Self {
            used: AtomicUsize::new(0),
            max: self.max / 2,
            replica: Some(self.clone()),
            owners: Mutex::default(),
        });
        owners.insert(user, Arc::downgrade(&share));
        share
    }

    pub fn take(&self, bytes: usize) -> bool {
        let used = self.used.fetch_add(bytes, Ordering::Relaxed);
        let fits = used.saturating_add(bytes) <= self.max && self.replica.as_ref().is_none_or(|all| all.take(bytes));
        if !fits {
            self.used.fetch_sub(bytes, Ordering::Relaxed);
        }
        fits
    }

    pub fn give_back(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
        if let Some(all) = &self.replica {
            all.give_back(bytes);
        }
    }

    #[cfg(test)]
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }
}

/// What one holder takes of a budget, given back when it is dropped.
#[derive(Debug)]
pub struct Charge {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Charge {
    /// `None`: the budget has not so much left.
    pub fn new(budget: Arc<Budget>, bytes: usize) -> Option<Self> {
        budget.take(bytes).then(|| Self { budget, bytes })
    }

    /// Charges `bytes` in place of what was charged before. False: there is not so much left, and nothing has changed.
    pub fn set(&mut self, bytes: usize) -> bool {
        if bytes > self.bytes && !self.budget.take(bytes - self.bytes) {
            return false;
        }
        self.budget.give_back(self.bytes.saturating_sub(bytes));
        self.bytes = bytes;
        true
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.budget.give_back(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_user_takes_half_and_the_replica_counts_all() {
        let all = Budget::new("test_budget", 100);
        let (one, two, three) = (all.of(UserId::new()), all.of(UserId::new()), all.of(UserId::new()));
        assert!(one.take(50) && !one.take(1));
        assert!(two.take(40) && !three.take(11), "the replica is full");
        assert_eq!((one.used(), three.used(), all.used()), (50, 0, 90));
        one.give_back(50);
        assert!(three.take(11));
        assert_eq!(all.used(), 51);
    }

    #[test]
    fn a_charge_follows_what_is_held_and_is_given_back() {
        let all = Budget::new("test_budget", 100);
        let mut charge = Charge::new(all.clone(), 20).unwrap();
        assert!(charge.set(90) && !charge.set(101) && all.used() == 90);
        assert!(Charge::new(all.clone(), 11).is_none());
        assert!(charge.set(30) && all.used() == 30);
        drop(charge);
        assert_eq!(all.used(), 0);
    }

    #[test]
    fn a_users_chats_share_one_budget_and_users_that_left_are_forgotten() {
        let (all, user) = (Budget::new("test_budget", 100), UserId::new());
        let held = all.of(user);
        assert!(Arc::ptr_eq(&held, &all.of(user)));
        for _ in 0..10_000 {
            all.of(UserId::new());
        }
        assert!(all.owners.lock().len() < 100);
    }
}
