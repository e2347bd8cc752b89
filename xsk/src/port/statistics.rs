//! What a port has counted: per queue and in total, since the start or since an earlier look.

use core::fmt;
use core::ops::AddAssign;
use core::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};

use super::lane::{Counters, Lane};
use crate::error::Result;
use crate::socket::{Statistics, WeakSocket};

/// What was counted on a queue, in packets unless it says bytes.
///
/// What the kernel in use does not count is absent, or contained in another counter as said there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counts {
    /// Packets received.
    pub rx_packets: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// Packets given to the kernel to send.
    pub tx_packets: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Of those, the ones whose frames are back.
    pub tx_completed: u64,
    /// Of those, what the driver dropped: the link was lost, or the length did not suit it.
    pub tx_dropped: u64,
    /// Packets that arrived and found RX full (Linux 5.9; before that they are in `rx_too_long`). A
    /// port gives FILL no more frames than RX has room for, so that FILL runs empty first.
    pub rx_ring_full: Option<u64>,
    /// Packets that arrived and found FILL empty: the program was too slow to take packets out of RX,
    /// or kept too many (Linux 5.9; before that they are in `rx_too_long`). Absent in zero copy, where
    /// the NIC drops what it has no frame for, and the kernel counts how often its driver looked.
    pub rx_fill_empty: Option<u64>,
    /// Packets that arrived and were longer than a frame.
    pub rx_too_long: u64,
    /// Packets that the kernel refused to send as invalid.
    pub tx_invalid: u64,
}

impl Counts {
    fn new(counters: &Counters, kernel: Statistics, zero_copy: bool) -> Self {
        // In zero copy the kernel counts how often the driver asked in vain.
        let fill_empty = kernel.rx_fill_ring_empty.filter(|_| !zero_copy);
        Self {
            rx_packets: counters.rx_packets.load(Relaxed),
            rx_bytes: counters.rx_bytes.load(Relaxed),
            tx_packets: counters.tx_packets.load(Relaxed),
            tx_bytes: counters.tx_bytes.load(Relaxed),
            tx_completed: counters.tx_completed.load(Relaxed),
            tx_dropped: counters.tx_dropped.load(Relaxed),
            rx_ring_full: kernel.rx_ring_full,
            rx_fill_empty: fill_empty,
            rx_too_long: kernel.rx_dropped.saturating_sub(fill_empty.unwrap_or(0)),
            tx_invalid: kernel.tx_invalid,
        }
    }

    /// Packets that arrived at the queue for its socket and were lost, for whichever reason.
    pub fn rx_lost(&self) -> u64 {
        self.rx_ring_full.unwrap_or(0) + self.rx_fill_empty.unwrap_or(0) + self.rx_too_long
    }

    /// What was counted since `earlier`.
    pub fn since(&self, earlier: &Self) -> Self {
        let optional = |now: Option<u64>, then: Option<u64>| now.map(|n| n.saturating_sub(then.unwrap_or(0)));
        Self {
            rx_packets: self.rx_packets.saturating_sub(earlier.rx_packets),
            rx_bytes: self.rx_bytes.saturating_sub(earlier.rx_bytes),
            tx_packets: self.tx_packets.saturating_sub(earlier.tx_packets),
            tx_bytes: self.tx_bytes.saturating_sub(earlier.tx_bytes),
            tx_completed: self.tx_completed.saturating_sub(earlier.tx_completed),
            tx_dropped: self.tx_dropped.saturating_sub(earlier.tx_dropped),
            rx_ring_full: optional(self.rx_ring_full, earlier.rx_ring_full),
            rx_fill_empty: optional(self.rx_fill_empty, earlier.rx_fill_empty),
            rx_too_long: self.rx_too_long.saturating_sub(earlier.rx_too_long),
            tx_invalid: self.tx_invalid.saturating_sub(earlier.tx_invalid),
        }
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        let optional = |a: Option<u64>, b: Option<u64>| match (a, b) {
            (None, None) => None,
            (a, b) => Some(a.unwrap_or(0) + b.unwrap_or(0)),
        };
        self.rx_packets += other.rx_packets;
        self.rx_bytes += other.rx_bytes;
        self.tx_packets += other.tx_packets;
        self.tx_bytes += other.tx_bytes;
        self.tx_completed += other.tx_completed;
        self.tx_dropped += other.tx_dropped;
        self.rx_ring_full = optional(self.rx_ring_full, other.rx_ring_full);
        self.rx_fill_empty = optional(self.rx_fill_empty, other.rx_fill_empty);
        self.rx_too_long += other.rx_too_long;
        self.tx_invalid += other.tx_invalid;
    }
}

/// What was counted on all queues of a port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortStatistics {
    queues: Vec<(u32, Counts)>,
}

impl PortStatistics {
    /// Each queue with what was counted there, by number.
    pub fn queues(&self) -> &[(u32, Counts)] {
        &self.queues
    }

    /// What was counted on a queue.
    pub fn queue(&self, queue: u32) -> Option<&Counts> {
        self.queues.iter().find(|(number, _)| *number == queue).map(|(_, counts)| counts)
    }

    /// All queues together.
    pub fn total(&self) -> Counts {
        let mut total = Counts::default();
        for (_, counts) in &self.queues {
            total += *counts;
        }
        total
    }

    /// What was counted since `earlier`, on each queue that is there now.
    pub fn since(&self, earlier: &Self) -> Self {
        let since = |(queue, now): &(u32, Counts)| match earlier.queue(*queue) {
            Some(then) => (*queue, now.since(then)),
            None => (*queue, *now),
        };
        Self { queues: self.queues.iter().map(since).collect() }
    }
}

/// Reads what a port counts, from any thread, and also after the port was split or is gone.
///
/// A monitor holds nothing open: neither the port's sockets nor its program.
#[derive(Clone)]
pub struct Monitor(Arc<Mutex<Vec<Watched>>>);

struct Watched {
    queue: u32,
    counters: Arc<Counters>,
    socket: WeakSocket,
    zero_copy: bool,
}

impl Monitor {
    pub(super) fn new() -> Self {
        Self(Arc::default())
    }

    pub(super) fn add(&self, lane: &Lane) {
        let socket = lane.socket();
        let watched = Watched {
            queue: socket.queue(),
            counters: lane.counters().clone(),
            socket: socket.downgrade(),
            zero_copy: socket.is_zero_copy(),
        };
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.push(watched);
        all.sort_by_key(|watched| watched.queue);
    }

    /// What was counted since the port was opened. The counts of the kernel and those of the port are
    /// read one after the other, so under traffic they are of slightly different moments.
    ///
    /// # Errors
    ///
    /// As [`Socket::statistics`](crate::Socket::statistics).
    pub fn statistics(&self) -> Result<PortStatistics> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let read = |watched: &Watched| {
            let kernel = match watched.socket.upgrade() {
                Some(socket) => socket.statistics()?,
                None => {
                    let closed = watched.counters.closed.lock().unwrap_or_else(PoisonError::into_inner);
                    closed.unwrap_or_default()
                }
            };
            Ok((watched.queue, Counts::new(&watched.counters, kernel, watched.zero_copy)))
        };
        Ok(PortStatistics { queues: all.iter().map(read).collect::<Result<_>>()? })
    }
}

impl fmt::Debug for Monitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Monitor").finish_non_exhaustive()
    }
}
