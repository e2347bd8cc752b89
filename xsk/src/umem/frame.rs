//! A frame and a packet: owning pointers into a UMEM, and the checks that make them.

use core::mem::ManuallyDrop;
use core::num::NonZeroU32;
use core::ops::{Deref, DerefMut};
use core::ptr::NonNull;

use super::{home, ledger::Ledger};
use crate::abi::{Descriptor, XDP_PKT_CONTD};

/// The owner of one chunk of a [`Umem`](super::Umem): holding it *is* the right to touch the chunk.
///
/// A frame is one pointer (8 bytes) and cannot be copied. Its UMEM makes it once; it is given up by
/// pushing it to FILL or TX and had back from COMPLETION, or inside the [`Packet`] that RX yields.
///
/// Put a frame that is no longer needed into a [`Pool`](super::Pool). Dropping it is correct as
/// well, and slower: it goes to its UMEM's depot, and is counted as
/// [`dropped`](super::Census::dropped).
#[derive(Debug)]
#[repr(transparent)]
#[must_use = "dropping a frame sends it home by the slow way; put it into a pool"]
pub struct Frame(NonNull<u8>);

// SAFETY: a frame owns its chunk alone, as a `Box` owns its bytes; the memory outlives it.
unsafe impl Send for Frame {}
// SAFETY: a shared frame gives no access to anything.
unsafe impl Sync for Frame {}

impl Frame {
    /// The owner of the chunk that `start` points into.
    ///
    /// # Safety
    ///
    /// `start` points into a live UMEM, and no other owner of its chunk exists: no `Frame`, and not
    /// the kernel.
    #[inline(always)]
    pub(crate) unsafe fn new(start: NonNull<u8>) -> Self {
        Self(start)
    }

    /// Gives the chunk up without sending it home: somebody else owns it from here on.
    #[inline(always)]
    pub(crate) fn into_raw(self) -> NonNull<u8> {
        ManuallyDrop::new(self).0
    }
}

impl Drop for Frame {
    #[inline(always)]
    fn drop(&mut self) {
        home::send(self.0);
    }
}

/// A frame with bytes in it: a received packet, or one to be sent. 16 bytes, as a descriptor.
///
/// A packet derefs to its bytes. Its start and length lie inside its chunk, and it is never empty.
#[derive(Debug)]
#[repr(C)]
#[must_use = "dropping a packet sends its frame home by the slow way; put it into a pool"]
pub struct Packet {
    frame: Frame,
    len: u32,
    /// Bytes from where the frame points to where the packet starts.
    offset: u16,
    /// The descriptor's options.
    options: u16,
}

impl Packet {
    /// # Safety
    ///
    /// `len` bytes at `offset` from the frame's pointer lie inside the frame's chunk, and `len` is not 0.
    #[inline(always)]
    pub(crate) unsafe fn new(frame: Frame, len: u32, offset: u16, options: u16) -> Self {
        Self { frame, len, offset, options }
    }

    /// The frame alone; its bytes stay as they are.
    #[inline(always)]
    pub fn into_frame(self) -> Frame {
        self.frame
    }

    pub(crate) fn frame(&self) -> &Frame {
        &self.frame
    }

    /// Shortens the packet to `len` bytes; a longer `len` changes nothing.
    #[inline]
    pub fn truncate(&mut self, len: NonZeroU32) {
        self.len = self.len.min(len.get());
    }

    /// Takes `n` bytes off the front, as for a header that is done with.
    ///
    /// Returns `false`, and changes nothing, when that would leave no byte.
    #[inline]
    #[must_use]
    pub fn advance(&mut self, n: u16) -> bool {
        let offset = self.offset.checked_add(n);
        match offset {
            Some(offset) if u32::from(n) < self.len => {
                self.offset = offset;
                self.len -= u32::from(n);
                true
            }
            _ => false,
        }
    }

    #[inline(always)]
    pub(crate) fn offset(&self) -> u32 {
        self.offset.into()
    }

    #[inline(always)]
    pub(crate) fn into_parts(self) -> (Frame, u32, u16, u16) {
        (self.frame, self.len, self.offset, self.options)
    }
}

impl Deref for Packet {
    type Target = [u8];

    #[inline(always)]
    fn deref(&self) -> &[u8] {
        // SAFETY: the bytes lie in the chunk, which this packet owns; UMEM memory is initialised
        // from the start, and the kernel stays out of a chunk that the program owns.
        unsafe {
            core::slice::from_raw_parts(self.frame.0.as_ptr().add(self.offset as usize), self.len as usize)
        }
    }
}

impl DerefMut for Packet {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and the packet is borrowed mutably.
        unsafe {
            core::slice::from_raw_parts_mut(
                self.frame.0.as_ptr().add(self.offset as usize),
                self.len as usize,
            )
        }
    }
}

/// What a ring has to know of its UMEM, by value, so that no pointer is chased on the data path.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Facts {
    pub(crate) base: NonNull<u8>,
    /// Bytes of the UMEM.
    pub(crate) size: u64,
    /// Bytes of a chunk minus one; a chunk's size is a power of two.
    pub(crate) mask: u64,
    /// The base where there is no ledger, else 0: what [`is_plainly`](Self::is_plainly) compares.
    plain: usize,
    pub(crate) ledger: Ledger,
}

// SAFETY: facts are numbers and addresses; reaching through them is argued where it is done.
unsafe impl Send for Facts {}
// SAFETY: as above.
unsafe impl Sync for Facts {}

/// Why an entry that the kernel handed back is not what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wrong {
    /// Outside the UMEM or its chunk.
    Outside,
    /// The chunk was not the kernel's to give; only the ledger can tell.
    NotTheirs,
}

impl Facts {
    /// Bytes of a chunk.
    #[inline(always)]
    pub(crate) fn chunk(&self) -> u64 {
        self.mask + 1
    }

    /// Facts of `size` bytes at `base`.
    pub(crate) fn new(base: NonNull<u8>, size: u64, chunk: u32, ledger: Ledger) -> Self {
        let plain = if ledger.is_on() { 0 } else { base.as_ptr().addr() };
        Self { base, size, mask: u64::from(chunk) - 1, plain, ledger }
    }

    /// Whether `other` are facts of the same UMEM, and it has no ledger: one comparison, because
    /// live UMEMs are disjoint.
    #[inline(always)]
    pub(crate) fn is_plainly(&self, other: &Self) -> bool {
        self.plain == other.base.as_ptr().addr()
    }

    /// Where `frame` points, in bytes from the start of this UMEM; `None` for another UMEM's.
    ///
    /// Live UMEMs are disjoint ranges of memory, so the range says whose a frame is. This is the
    /// check that stays in release builds: one subtraction and one comparison.
    #[inline(always)]
    pub(crate) fn offset(&self, frame: &Frame) -> Option<u64> {
        let offset = (frame.0.as_ptr().addr() as u64).wrapping_sub(self.base.as_ptr().addr() as u64);
        (offset < self.size).then_some(offset)
    }

    /// The number of the chunk at `addr`.
    #[inline(always)]
    fn number(&self, addr: u64) -> usize {
        (addr >> self.chunk().trailing_zeros()) as usize
    }

    /// Enters the chunk at `addr` into the ledger as lent to the ring of `state`.
    ///
    /// # Safety
    ///
    /// `addr` is below the size, and the UMEM lives.
    #[inline(always)]
    pub(crate) unsafe fn lend(&self, addr: u64, state: u16) {
        // SAFETY: below the size, so a chunk of the UMEM.
        unsafe { self.ledger.give(self.number(addr), state) };
    }

    /// The packet that a descriptor of RX speaks of, had back from the ring of `expect`. `LEDGER` is
    /// `false` where the ledger is known to be off.
    ///
    /// # Safety
    ///
    /// The kernel has just handed this descriptor over on a ring of this UMEM, which lives.
    #[inline(always)]
    pub(crate) unsafe fn packet<const LEDGER: bool>(
        &self,
        d: Descriptor,
        expect: u16,
    ) -> Result<Packet, Wrong> {
        // In aligned mode an address lies below the size; above it there is nothing to be had. The
        // first and the last byte lie in one chunk when they differ in a chunk's bits alone. An
        // empty packet ends 2^32 - 1 bytes behind its start, and so in no chunk.
        let last = d.addr.wrapping_add(u64::from(d.len.wrapping_sub(1)));
        if d.addr >= self.size || d.addr ^ last > self.mask {
            return Err(Wrong::Outside);
        }
        // SAFETY: below the size, so a chunk of the UMEM.
        if LEDGER && !unsafe { self.ledger.take(self.number(d.addr), expect) } {
            return Err(Wrong::NotTheirs);
        }
        // SAFETY: inside the UMEM. That nobody else owns the chunk is the kernel's promise, and
        // checked by the ledger where it is on.
        let frame = Frame(unsafe { self.base.add(d.addr as usize) });
        // Bits that a received packet can't have end here: forwarded to TX, one would block it.
        Ok(Packet { frame, len: d.len, offset: 0, options: (d.options & XDP_PKT_CONTD) as u16 })
    }

    /// The frame that an address from COMPLETION speaks of, had back from the ring of `expect`;
    /// `LEDGER` as for a packet.
    ///
    /// # Safety
    ///
    /// The kernel has just handed this address over on a ring of this UMEM, which lives.
    #[inline(always)]
    pub(crate) unsafe fn frame<const LEDGER: bool>(&self, addr: u64, expect: u16) -> Result<Frame, Wrong> {
        if addr >= self.size {
            return Err(Wrong::Outside);
        }
        // SAFETY: below the size, so a chunk of the UMEM.
        if LEDGER && !unsafe { self.ledger.take(self.number(addr), expect) } {
            return Err(Wrong::NotTheirs);
        }
        // SAFETY: as for a packet.
        Ok(Frame(unsafe { self.base.add(addr as usize) }))
    }
}

#[cfg(target_pointer_width = "64")]
const _: () = {
    assert!(size_of::<Frame>() == 8 && size_of::<Option<Frame>>() == 8);
    assert!(size_of::<Packet>() == 16 && size_of::<Option<Packet>>() == 16);
};
