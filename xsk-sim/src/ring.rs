//! The kernel's side of a ring, and its memory as a program maps it.
//!
//! The memory is laid out as Linux lays it out on x86: each word on a cache line pair of its own,
//! the flags after the consumer's index, the entries after that.

use core::ptr::NonNull;
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::sync::Arc;

use xsk::abi::{Descriptor, MmapOffsets, RingOffset};
use xsk::kernel::Errno;
use xsk::ring::{Consumer, Producer, RingMemory};

use crate::PAGE_SIZE;

const PRODUCER: usize = 0;
const CONSUMER: usize = 128;
const FLAGS: usize = 196;
const ENTRIES: usize = 320;

/// The largest ring that is made, in entries. Linux has no such limit but its memory.
const MAX_ENTRIES: u32 = 1 << 24;

/// What `XDP_MMAP_OFFSETS` tells.
pub(crate) const OFFSETS: MmapOffsets = {
    let ring = RingOffset {
        producer: PRODUCER as u64,
        consumer: CONSUMER as u64,
        desc: ENTRIES as u64,
        flags: FLAGS as u64,
    };
    MmapOffsets { rx: ring, tx: ring, fr: ring, cr: ring }
};

/// The pages of one ring, shared by the kernel and everyone who mapped them.
#[derive(Debug)]
pub(crate) struct Pages {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: an allocation and its layout; the memory is reached through the ring protocol only.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Pages {
    /// At least `bytes`, zeroed.
    pub(crate) fn allocate(bytes: usize) -> Result<Self, Errno> {
        let layout = Layout::from_size_align(bytes.next_multiple_of(PAGE_SIZE), PAGE_SIZE)
            .map_err(|_| Errno::NOMEM)?;
        // SAFETY: the layout is not empty: a ring has a header.
        let base = unsafe { alloc_zeroed(layout) };
        Ok(Self { base: NonNull::new(base).ok_or(Errno::NOMEM)?, layout })
    }

    /// Where they start.
    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Bytes, a multiple of the page size.
    pub(crate) fn len(&self) -> usize {
        self.layout.size()
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and nobody holds the pages any more.
        unsafe { dealloc(self.base.as_ptr(), self.layout) }
    }
}

/// What a ring holds: plain old data, for which zeroed memory is a value.
pub(crate) trait Entry: Copy {}
impl Entry for Descriptor {}
impl Entry for u64 {}

fn allocate<T: Entry>(entries: u32) -> Result<(Arc<Pages>, RingMemory<T>), Errno> {
    if !entries.is_power_of_two() {
        return Err(Errno::INVAL);
    }
    if entries > MAX_ENTRIES {
        return Err(Errno::NOMEM);
    }
    let pages = Arc::new(Pages::allocate(ENTRIES + entries as usize * size_of::<T>())?);
    let base = pages.base;
    // SAFETY: the fields lie within the pages, apart from each other and aligned; the pages are
    // zeroed, which is a value of each of them, and live as long as the owner.
    let memory = unsafe {
        RingMemory::new(
            base.add(PRODUCER).cast(),
            base.add(CONSUMER).cast(),
            base.add(FLAGS).cast(),
            base.add(ENTRIES).cast(),
            entries,
            pages.clone(),
        )
    };
    Ok((pages, memory))
}

/// A ring that the program fills and the kernel empties: FILL or TX.
#[derive(Debug)]
pub(crate) struct Incoming<T> {
    consumer: Consumer<T>,
    pages: Arc<Pages>,
}

impl<T: Entry> Incoming<T> {
    /// A ring of its own; `EINVAL` for a size that is not a power of two.
    pub(crate) fn new(entries: u32) -> Result<Self, Errno> {
        let (pages, memory) = allocate(entries)?;
        // SAFETY: the ring is new, so this is the only consumer. A program that maps the ring
        // promises to work the producer's side by the protocol.
        Ok(Self { consumer: unsafe { Consumer::new(memory) }, pages })
    }

    /// The next entry, which stays in the ring.
    pub(crate) fn peek(&mut self) -> Option<T> {
        if self.consumer.available() == 0 {
            return None;
        }
        let slot = (self.consumer.index() & (self.size() - 1)) as usize;
        // SAFETY: under the mask it is one of the ring's slots, all of which hold a value. The
        // producer has published it, and does not write it again before it is consumed.
        Some(unsafe { self.pages.base.add(ENTRIES).cast::<T>().add(slot).read() })
    }

    /// Takes the next entry.
    pub(crate) fn next(&mut self) -> Option<T> {
        self.consumer.take(1).next()
    }

    /// Entries that the program has published and the kernel not taken; the ring's size or more
    /// when the program's index is absurd.
    pub(crate) fn waiting(&self) -> u32 {
        self.memory().filled().unwrap_or(u32::MAX)
    }

    /// How many entries were ever taken, modulo 2^32.
    pub(crate) fn taken(&self) -> u32 {
        self.consumer.index()
    }

    /// Entries.
    pub(crate) fn size(&self) -> u32 {
        self.memory().size()
    }

    /// The shared words.
    pub(crate) fn memory(&self) -> &RingMemory<T> {
        self.consumer.memory()
    }

    /// What a program maps.
    pub(crate) fn pages(&self) -> &Arc<Pages> {
        &self.pages
    }
}

/// A ring that the kernel fills and the program empties: RX or COMPLETION.
#[derive(Debug)]
pub(crate) struct Outgoing<T> {
    producer: Producer<T>,
    pages: Arc<Pages>,
}

impl<T: Entry> Outgoing<T> {
    /// A ring of its own; `EINVAL` for a size that is not a power of two.
    pub(crate) fn new(entries: u32) -> Result<Self, Errno> {
        let (pages, memory) = allocate(entries)?;
        // SAFETY: the ring is new, so this is the only producer. A program that maps the ring
        // promises to work the consumer's side by the protocol.
        Ok(Self { producer: unsafe { Producer::new(memory) }, pages })
    }

    /// Whether another entry fits.
    pub(crate) fn has_room(&mut self) -> bool {
        self.producer.room(1) > 0
    }

    /// Publishes an entry; `false` when the ring is full.
    pub(crate) fn push(&mut self, entry: T) -> bool {
        self.producer.reserve(1).push(entry)
    }

    /// Whether the program has taken everything.
    pub(crate) fn is_empty(&self) -> bool {
        self.producer.memory().filled() == Some(0)
    }

    /// What a program maps.
    pub(crate) fn pages(&self) -> &Arc<Pages> {
        &self.pages
    }
}
