//! The ledger: who owns each chunk, two bytes a chunk, to catch a kernel that gives one twice.
//!
//! The type system keeps the program from having one chunk in two places. The ledger checks the
//! other side: that the kernel gives back each chunk once, and only what it was given, on the ring
//! where that belongs. A state is `HELD` while the program owns the chunk (in a pool, the depot or
//! its hands), and names the FILL or TX ring it was pushed to while the kernel does; `LOST` once
//! that ring is gone.
//!
//! No read-modify-write is needed on the data path, because every state has one party that may end it:
//!
//! - `HELD` ends when a batch with the chunk is published, and pushing takes the `Frame`, of which
//!   there is one. (A batch that is forgotten leaks its frames: nobody was lent them.)
//! - The state of a FILL or TX ring ends when the chunk comes out of *that pair's* RX or
//!   COMPLETION ring, of which there is one each, worked by one thread at a time. A chunk that
//!   comes out of any other ring is refused.
//!
//! So a thread that reads its own ring's state knows that the chunk was lent after it was last
//! taken, and that nobody but itself can take it now. The store that lends is a release, the load
//! that takes an acquire: what the pusher wrote into the chunk happened before, even when a broken
//! kernel hands the address over with no ordering of its own.

use core::ptr::NonNull;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::Arc;

use crate::sync::AtomicU16;

/// The program owns the chunk.
pub(crate) const HELD: u16 = 0;

/// The chunk was lent through rings that are gone: no ring can give it back.
const LOST: u16 = u16::MAX;

/// The states that belong to one pair of FILL and COMPLETION rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct States {
    pub(crate) fill: u16,
    pub(crate) tx: u16,
}

/// Pairs that can be told apart.
pub(crate) const MAX_PAIRS: u16 = u16::MAX / 2;

impl States {
    pub(crate) const fn of_pair(pair: u16) -> Self {
        Self { fill: 2 * pair + 1, tx: 2 * pair + 2 }
    }
}

/// The states of a UMEM's chunks, as its owner keeps them.
#[derive(Debug)]
pub(crate) struct Book {
    /// Shared rather than boxed: a box would claim to be the only way to what rings point to.
    states: Arc<[AtomicU16]>,
}

impl Book {
    pub(crate) fn new(chunks: u32) -> Self {
        Self { states: (0..chunks).map(|_| AtomicU16::new(HELD)).collect() }
    }

    /// Chunks that the program owns.
    pub(crate) fn held(&self) -> u32 {
        self.states.iter().filter(|s| s.load(Relaxed) == HELD).count() as u32
    }

    /// The rings of a pair are gone: what they had is lost.
    pub(crate) fn lose(&self, pair: States) {
        for state in self.states.iter() {
            let lent = state.load(Relaxed);
            if lent == pair.fill || lent == pair.tx {
                // The pair's rings, which could end these states, are gone; but their frames may
                // have been reclaimed meanwhile, and lent anew.
                let _ = state.compare_exchange(lent, LOST, Relaxed, Relaxed);
            }
        }
    }

    pub(crate) fn set_held(&self, chunk: u32) {
        self.states[chunk as usize].store(HELD, Release);
    }

    /// The view that rings work with.
    pub(crate) fn ledger(&self) -> Ledger {
        Ledger { states: Some(NonNull::from(&self.states[..]).cast()) }
    }
}

/// A ring's view of the ledger, by value: nothing at all where it is off.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ledger {
    states: Option<NonNull<AtomicU16>>,
}

impl Ledger {
    pub(crate) const OFF: Self = Self { states: None };

    /// Whether there is a ledger.
    #[inline(always)]
    pub(crate) fn is_on(self) -> bool {
        self.states.is_some()
    }

    /// A chunk is given up: it belongs to the ring of `state` from here on.
    ///
    /// # Safety
    ///
    /// The UMEM has the chunk, and lives.
    #[inline(always)]
    pub(crate) unsafe fn give(self, chunk: usize, state: u16) {
        if let Some(states) = self.states {
            // SAFETY: a chunk of the UMEM has a state. The book lives in the UMEM's core.
            unsafe { states.add(chunk).as_ref() }.store(state, Release);
        }
    }

    /// A chunk comes back from the ring of `expect`; `false` when it was not there.
    ///
    /// # Safety
    ///
    /// The UMEM has the chunk, and lives.
    #[inline(always)]
    pub(crate) unsafe fn take(self, chunk: usize, expect: u16) -> bool {
        let Some(states) = self.states else { return true };
        // SAFETY: as above.
        let state = unsafe { states.add(chunk).as_ref() };
        if state.load(Acquire) != expect {
            return false;
        }
        // A plain store: nobody else may end the state `expect` (see above).
        state.store(HELD, Relaxed);
        true
    }
}
