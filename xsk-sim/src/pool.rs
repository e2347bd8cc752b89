//! A pool: what a queue of a device has when a socket is bound to it.

use std::sync::Arc;

use crate::ring::{Incoming, Outgoing};
use crate::umem::Umem;

/// Number of a pool, never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PoolId(pub(crate) u64);

/// The frames of one queue: a UMEM, FILL and COMPLETION.
#[derive(Debug)]
pub(crate) struct Pool {
    pub(crate) device: u32,
    pub(crate) queue: u16,
    pub(crate) umem: Arc<Umem>,
    pub(crate) fill: Incoming<u64>,
    pub(crate) completion: Outgoing<u64>,
    /// A chunk that came from FILL and for which RX had no room.
    pub(crate) parked: Option<u64>,
    /// Times that FILL was found empty.
    pub(crate) fill_empty: u64,
}

impl Pool {
    /// A chunk to receive into: the parked one, else the next of FILL that lies in the UMEM.
    ///
    /// Entries that don't are skipped; no counter of the kernel's tells of them.
    pub(crate) fn take_chunk(&mut self) -> Option<u64> {
        if let Some(chunk) = self.parked.take() {
            return Some(chunk);
        }
        while let Some(addr) = self.fill.next() {
            if let Some(chunk) = self.umem.chunk(addr) {
                return Some(chunk);
            }
        }
        self.fill_empty += 1;
        None
    }
}
