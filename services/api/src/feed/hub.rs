//! All feeds of this replica, and the door through which viewers come to them.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt as _, TryStreamExt as _};
use parking_lot::Mutex;
use reliant_runtime::{Drain, TaskKind};
use reliant_telemetry::{
    metrics::{self, GaugeGuard},
    sampled,
};
use reliant_types::{ChatId, Code, Failure, UserId, limits};

use super::{
    chat_feed::{self, Deps},
    state::Cursor,
    table::{Command, Table},
    user_feed,
    viewer::{self, Topic, ViewerStream},
};

/// Chats of one viewer whose state is read at one time.
const JOINS_AT_ONCE: usize = 16;
const TRY_AGAIN: Duration = Duration::from_secs(5);

/// Where a viewer stands in one log.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// Below 0: a snapshot and what follows.
    pub after: i64,
    /// 0: not known.
    pub log_epoch: i64,
}

pub struct Hub {
    pub(super) deps: Arc<Deps>,
    pub(super) chats: Arc<Table<(UserId, ChatId)>>,
    pub(super) users: Arc<Table<UserId>>,
    drain: Drain,
    next: AtomicU64,
    open: Arc<Open>,
}

/// Open streams, by user.
struct Open {
    streams: Mutex<(usize, HashMap<UserId, usize>)>,
    max: usize,
    user_max: usize,
}

/// Counts one stream for as long as it lives.
pub struct Ticket {
    user: UserId,
    open: Arc<Open>,
    _gauge: GaugeGuard,
}

impl Hub {
    pub fn new(deps: Deps, max_streams: usize, max_user_streams: usize, drain: Drain) -> Self {
        let open = Arc::new(Open { streams: Mutex::default(), max: max_streams, user_max: max_user_streams });
        let (all, users) = (Arc::downgrade(&open), Arc::downgrade(&open));
        sampled::watch("streams", max_streams, move || all.upgrade().map(|open| open.streams.lock().0));
        sampled::watch("user_streams", max_user_streams, move || {
            users.upgrade().map(|open| open.streams.lock().1.values().copied().max().unwrap_or_default())
        });
        Self { deps: Arc::new(deps), chats: Table::new(), users: Table::new(), drain, next: AtomicU64::new(1), open }
    }

    /// Counts a stream of `user` from its beginning: also one whose request never arrives.
    pub fn enter(&self, user: UserId) -> Result<Ticket, Failure> {
        if self.drain.is_draining() {
            return Err(viewer::draining());
        }
        Open::enter(&self.open, user)
    }

    /// A stream of the user's feed and these chats. `NOT_FOUND` if one of them is not the user's.
    pub async fn subscribe(
        &self,
        ticket: Ticket,
        feed: Option<Place>,
        chats: Vec<(ChatId, Place)>,
    ) -> Result<ViewerStream, Failure> {
        let (user, id) = (ticket.user, self.next.fetch_add(1, Ordering::Relaxed));
        let (viewer, mut stream) = viewer::viewer(id, limits::VIEWER_QUEUE_MAX, self.drain.token(), Box::new(ticket));
        // All leases first: a chat that is not the user's is refused before anything is sent.
        let leases: Vec<_> = futures::stream::iter(chats)
            .map(|(chat, place)| async move {
                let lease = self.chats.lease((user, chat), |station, commands| {
                    self.start("chat feed", station, |station| chat_feed::run(station, commands, self.deps.clone()));
                });
                Ok::<_, Failure>((chat, place, lease.await?))
            })
            .buffered(JOINS_AT_ONCE)
            .try_collect()
            .await?;
        for (chat, place, lease) in leases {
            lease.send(Command::Join { viewer: viewer.clone(), cursor: cursor(place) }).await?;
            stream.follow(Topic::Chat(chat), lease);
        }
        if let Some(place) = feed {
            let lease = self.users.lease(user, |station, commands| {
                self.start("user feed", station, |station| user_feed::run(station, commands, self.deps.clone()));
            });
            let lease = lease.await?;
            lease.send(Command::Join { viewer, cursor: cursor(place) }).await?;
            stream.follow(Topic::User, lease);
        }
        Ok(stream)
    }

    /// A feed that fails ends its viewers' streams, which begin anew; the process goes on.
    fn start<K, F>(
        &self,
        name: &'static str,
        station: super::table::Station<K>,
        run: impl FnOnce(super::table::Station<K>) -> F,
    ) where
        K: Copy + Eq + Hash,
        F: Future<Output = ()> + Send + 'static,
    {
        self.drain.spawn(TaskKind::Helper(name), run(station));
    }
}

fn cursor(place: Place) -> Cursor {
    Cursor { after: place.after, log_epoch: place.log_epoch, greet: true, ..Cursor::default() }
}

impl Open {
    fn enter(open: &Arc<Open>, user: UserId) -> Result<Ticket, Failure> {
        let mut streams = open.streams.lock();
        let (all, users) = &mut *streams;
        if *all >= open.max {
            sampled::refused("streams");
            return Err(Failure::new(
                Code::QueueFull,
                "this server has as many update streams as it can serve; try again",
            )
            .retry_after(TRY_AGAIN));
        }
        let own = users.entry(user).or_default();
        if *own >= open.user_max {
            sampled::refused("user_streams");
            let message = format!("you have {own} update streams open, the most that one user may have; close some");
            return Err(Failure::new(Code::QueueFull, message).retry_after(TRY_AGAIN));
        }
        *all += 1;
        *own += 1;
        Ok(Ticket { user, open: open.clone(), _gauge: metrics::in_flight(&metrics::VIEWERS) })
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut streams = self.open.streams.lock();
        streams.0 -= 1;
        if let std::collections::hash_map::Entry::Occupied(mut own) = streams.1.entry(self.user) {
            *own.get_mut() -= 1;
            if *own.get() == 0 {
                own.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_counted_per_user_and_given_back() {
        let open = Arc::new(Open { streams: Mutex::default(), max: 3, user_max: 2 });
        let (one, two) = (UserId::new(), UserId::new());
        let first = Open::enter(&open, one).unwrap();
        let _second = Open::enter(&open, one).unwrap();
        let refused = Open::enter(&open, one).err().unwrap();
        assert_eq!((refused.code, refused.retry_after), (Code::QueueFull, Some(TRY_AGAIN)));
        let third = Open::enter(&open, two).unwrap();
        assert!(Open::enter(&open, two).is_err(), "the replica is full");
        drop((first, third));
        assert_eq!(open.streams.lock().1.len(), 1);
        assert!(Open::enter(&open, two).is_ok());
    }
}
