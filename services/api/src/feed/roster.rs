//! The viewers of one feed. A viewer either takes what comes, waits to be admitted, or lags: its queue was full, and it
//! catches up from where it was once it has room. Nobody is ever waited for.

use std::collections::HashMap;

use super::{
    state::Cursor,
    table::ended,
    viewer::{Item, Offer, Topic, Viewer},
};

enum Place {
    Live,
    Waiting(Cursor),
    Lagged(Cursor),
}

struct Seat {
    viewer: Viewer,
    place: Place,
}

pub struct Roster {
    topic: Topic,
    seats: HashMap<u64, Seat>,
}

impl Roster {
    pub fn new(topic: Topic) -> Self {
        Self { topic, seats: HashMap::new() }
    }

    pub fn join(&mut self, viewer: Viewer, cursor: Cursor) {
        // The only place where the map grows is where those who left are cleared out.
        self.seats.retain(|_, seat| !seat.viewer.is_gone());
        self.seats.insert(viewer.id, Seat { viewer, place: Place::Waiting(cursor) });
    }

    /// True if a lagged viewer waits to be admitted now.
    pub fn resume(&mut self, id: u64) -> bool {
        let Some(seat) = self.seats.get_mut(&id) else { return false };
        if let Place::Lagged(cursor) = &mut seat.place {
            seat.place = Place::Waiting(std::mem::take(cursor));
            return true;
        }
        false
    }

    pub fn len(&self) -> usize {
        self.seats.len()
    }

    /// To all that take what comes. `before` says where a viewer is that cannot take it.
    pub fn send(&mut self, item: &Item, deltas: i64, before: impl Fn() -> Cursor) {
        let mut cursor: Option<Cursor> = None;
        let topic = self.topic;
        self.seats.retain(|_, seat| {
            match seat.place {
                Place::Live => match seat.viewer.offer(item.clone()) {
                    Offer::Taken => {}
                    Offer::Full => {
                        seat.place = Place::Lagged(cursor.get_or_insert_with(&before).clone());
                        seat.viewer.lag(topic, deltas);
                    }
                    Offer::Gone => return false,
                },
                Place::Lagged(_) => seat.viewer.dropped(deltas),
                Place::Waiting(_) => {}
            }
            true
        });
    }

    /// Those who wait, each with its place.
    pub fn waiting(&self) -> Vec<(u64, Cursor)> {
        let waits = |(id, seat): (&u64, &Seat)| match &seat.place {
            Place::Waiting(cursor) => Some((*id, cursor.clone())),
            Place::Live | Place::Lagged(_) => None,
        };
        self.seats.iter().filter_map(waits).collect()
    }

    pub fn waiting_mut(&mut self) -> impl Iterator<Item = &mut Cursor> {
        self.seats.values_mut().filter_map(|seat| match &mut seat.place {
            Place::Waiting(cursor) => Some(cursor),
            Place::Live | Place::Lagged(_) => None,
        })
    }

    /// Admits a viewer with what it lacks; from now on it takes what comes.
    pub fn admit(&mut self, id: u64, item: Item) {
        let Some(seat) = self.seats.get_mut(&id) else { return };
        let Place::Waiting(cursor) = &mut seat.place else { return };
        let cursor = std::mem::take(cursor);
        seat.place = match seat.viewer.offer(item) {
            Offer::Taken => Place::Live,
            Offer::Full => {
                seat.viewer.lag(self.topic, 0);
                Place::Lagged(cursor)
            }
            Offer::Gone => {
                self.seats.remove(&id);
                return;
            }
        };
    }

    /// Brings a waiting viewer nearer; it waits on, from `cursor`.
    pub fn advance(&mut self, id: u64, item: Item, cursor: Cursor) {
        let Some(seat) = self.seats.get_mut(&id) else { return };
        let Place::Waiting(before) = &mut seat.place else { return };
        match seat.viewer.offer(item) {
            Offer::Taken => *before = cursor,
            Offer::Full => {
                let before = std::mem::take(before);
                seat.viewer.lag(self.topic, 0);
                seat.place = Place::Lagged(before);
            }
            Offer::Gone => {
                self.seats.remove(&id);
            }
        }
    }

    /// Everybody starts anew with a snapshot.
    pub fn restart(&mut self) {
        for seat in self.seats.values_mut() {
            let cursor = Cursor { after: -1, greet: true, ..Cursor::default() };
            seat.place = match seat.place {
                Place::Live | Place::Waiting(_) => Place::Waiting(cursor),
                Place::Lagged(_) => Place::Lagged(cursor),
            };
        }
    }
}

impl Drop for Roster {
    /// A feed's task that ended otherwise than by its last viewer's leaving must not leave viewers in silence.
    fn drop(&mut self) {
        for seat in self.seats.values() {
            seat.viewer.fail(ended());
        }
    }
}
