//! A thread's own frames, last in first out.

use core::mem::MaybeUninit;
use core::sync::atomic::Ordering::Relaxed;
use std::sync::Arc;

use crate::sync::AtomicU32;

use super::{Facts, Fault, Frame, Packet, Umem};

/// A store of free frames that one thread owns.
///
/// The frame put in last is taken first: its bytes are the likeliest to be in the cache. Threads
/// trade frames in batches through their UMEM's depot: [`give`](Self::give) and
/// [`fetch`](Self::fetch). Dropping a pool gives all of its frames.
pub struct Pool {
    /// Room for every frame of the UMEM; the first `len` are initialised.
    frames: Box<[MaybeUninit<Frame>]>,
    /// The number of frames: written by this pool alone, read by the census.
    len: Arc<AtomicU32>,
    facts: Facts,
    umem: Umem,
}

impl Pool {
    pub(super) fn new(umem: Umem) -> Self {
        let total = umem.core().total as usize;
        let len = Arc::new(AtomicU32::new(0));
        umem.core().pools().push(len.clone());
        Self {
            frames: (0..total).map(|_| MaybeUninit::uninit()).collect(),
            len,
            facts: umem.core().facts,
            umem,
        }
    }

    /// Frames in this pool.
    #[inline(always)]
    pub fn len(&self) -> usize {
        self.len.load(Relaxed) as usize
    }

    /// Whether there is no frame in this pool.
    #[inline(always)]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The UMEM whose frames these are.
    pub fn umem(&self) -> &Umem {
        &self.umem
    }

    /// Puts a frame, or a packet's frame, into the pool.
    ///
    /// Another UMEM's frame is sent to its own home instead.
    #[inline(always)]
    pub fn put(&mut self, frame: impl Into<Frame>) {
        let frame = frame.into();
        let len = self.len();
        if len >= self.frames.len() || self.facts.offset(&frame).is_none() {
            return self.misplaced(frame);
        }
        // SAFETY: `len` is below the length of the slice.
        unsafe { self.frames.get_unchecked_mut(len) }.write(frame);
        self.len.store(len as u32 + 1, Relaxed);
    }

    #[cold]
    #[inline(never)]
    fn misplaced(&mut self, frame: Frame) {
        if self.facts.offset(&frame).is_some() {
            // More frames than chunks: a kernel gave one twice with the ledger off.
            self.umem.core().fault(Fault::Duplicate, 0);
            let _ = frame.into_raw();
        }
        // Else it is another UMEM's, and dropping it sends it home.
    }

    /// Takes the frame that was put in last.
    #[inline(always)]
    pub fn take(&mut self) -> Option<Frame> {
        let len = self.len().checked_sub(1)?;
        self.len.store(len as u32, Relaxed);
        // SAFETY: the first `len + 1` were initialised, and this one is no longer counted.
        Some(unsafe { self.frames.get_unchecked(len).assume_init_read() })
    }

    /// Takes a frame as a packet of `len` bytes behind `headroom` bytes of room.
    ///
    /// The bytes are whatever the chunk held before. `None` when the pool is empty or the packet
    /// does not fit a chunk.
    #[inline]
    pub fn packet(&mut self, headroom: u16, len: u32) -> Option<Packet> {
        let frame = self.take()?;
        match self.umem.packet(frame, headroom, len) {
            Ok(packet) => Some(packet),
            Err(frame) => {
                self.put(frame);
                None
            }
        }
    }

    /// Fetches up to `n` frames from the depot; returns how many there were.
    pub fn fetch(&mut self, n: usize) -> usize {
        if self.umem.core().depot_len.load(Relaxed) == 0 {
            return 0;
        }
        let umem = self.umem.clone();
        let mut depot = umem.core().depot();
        let n = n.min(depot.len());
        let at = depot.len() - n;
        for frame in depot.drain(at..) {
            self.put(frame);
        }
        n
    }

    /// Gives up to `n` frames to the depot; returns how many there were.
    pub fn give(&mut self, n: usize) -> usize {
        let umem = self.umem.clone();
        let mut depot = umem.core().depot();
        let n = n.min(self.len());
        for _ in 0..n {
            depot.extend(self.take());
        }
        n
    }
}

impl core::fmt::Debug for Pool {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Pool").field("len", &self.len()).finish_non_exhaustive()
    }
}

impl Extend<Frame> for Pool {
    #[inline]
    fn extend<I: IntoIterator<Item = Frame>>(&mut self, frames: I) {
        for frame in frames {
            self.put(frame);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.give(usize::MAX);
        self.umem.core().pools().retain(|len| !Arc::ptr_eq(len, &self.len));
    }
}

impl From<Packet> for Frame {
    #[inline(always)]
    fn from(packet: Packet) -> Self {
        packet.into_frame()
    }
}
