//! The memory that a run works on: four rings as the kernel lays them out, and a UMEM.

use std::alloc::{self, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use xsk::abi::{Descriptor, RingOffset};
use xsk::kernel::Mapping;
use xsk::ring::{RingMemory, Slot};
use xsk::umem::Pair;
use xsk::umem::Pool;
use xsk::{CompletionRing, FillRing, RxRing, TxRing, Umem};

use crate::{CHUNK, FRAMES, Fake, Kernel, RING, User};

/// Where packets start in their chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Where the kernel puts them: 256 bytes into every chunk. With chunks of 4096 bytes, all
    /// starts then share one set of the first-level cache, and that costs more than most else.
    Real,
    /// Spread over 32 cache lines by the chunk's number, so that the cache hides nothing.
    Staggered,
}

impl Layout {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Real, Self::Staggered];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Real => "real",
            Self::Staggered => "staggered",
        }
    }

    pub(crate) fn stagger(self, chunk: u64) -> u64 {
        match self {
            Self::Real => 0,
            Self::Staggered => chunk % 32 * 64,
        }
    }
}

/// Where a ring's fields are on x86-64: `struct xdp_ring` of `net/xdp/xsk_queue.h`.
const CONSUMER: usize = 128;
const FLAGS: usize = 196;
const ENTRIES: usize = 320;

/// The same, as a socket tells it.
pub(crate) const OFFSETS: RingOffset =
    RingOffset { producer: 0, consumer: CONSUMER as u64, desc: ENTRIES as u64, flags: FLAGS as u64 };

/// A ring as a program in C sees it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct RawRing {
    /// The producer's index.
    pub producer: *mut u32,
    /// The consumer's index.
    pub consumer: *mut u32,
    /// The flags.
    pub flags: *mut u32,
    /// The entries.
    pub entries: *mut u8,
}

/// One ring's memory.
#[derive(Debug)]
struct Block {
    base: NonNull<u8>,
    layout: alloc::Layout,
}

// SAFETY: freed once, by its drop; all access is by the ring protocol.
unsafe impl Send for Block {}
// SAFETY: a shared reference does nothing.
unsafe impl Sync for Block {}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated below with this layout.
        unsafe { dealloc(self.base.as_ptr(), self.layout) };
    }
}

fn ring<T: Copy>() -> (RingMemory<T>, RawRing, Mapping) {
    let bytes = ENTRIES + RING as usize * size_of::<T>();
    let layout = alloc::Layout::from_size_align(bytes, 4096).expect("a sane size");
    // SAFETY: not of size 0.
    let base = unsafe { alloc_zeroed(layout) };
    let Some(base) = NonNull::new(base) else { alloc::handle_alloc_error(layout) };
    // SAFETY: inside the block.
    let at = |offset| unsafe { base.add(offset) };
    let raw = RawRing {
        producer: at(0).cast().as_ptr(),
        consumer: at(CONSUMER).cast().as_ptr(),
        flags: at(FLAGS).cast().as_ptr(),
        entries: at(ENTRIES).as_ptr(),
    };
    let word = |offset| at(offset).cast::<AtomicU32>();
    let slots = at(ENTRIES).cast::<Slot<T>>();
    let owner = Arc::new(Block { base, layout });
    // SAFETY: the block is so long, and the owner.
    let mapping = unsafe { Mapping::new(base, bytes, owner.clone()) };
    // SAFETY: fields and slots lie in the block, zeroed and aligned, and the block is the owner.
    let memory = unsafe { RingMemory::new(word(0), word(CONSUMER), word(FLAGS), slots, RING, owner) };
    (memory, raw, mapping)
}

/// The rings of a socket, from neither side.
#[derive(Debug)]
pub(crate) struct Rings {
    pub(crate) fill: RingMemory<u64>,
    pub(crate) rx: RingMemory<Descriptor>,
    pub(crate) tx: RingMemory<Descriptor>,
    pub(crate) completion: RingMemory<u64>,
}

/// Rings and UMEM. Every run starts with [`user`](Self::user), [`lend`](Self::lend) or
/// [`interface`](Self::interface).
#[derive(Debug)]
pub struct Bench {
    umem: Umem,
    rings: Rings,
    /// FILL, RX, TX, COMPLETION.
    raw: [RawRing; 4],
    /// In the same order.
    mappings: [Mapping; 4],
    base: *mut u8,
    layout: Layout,
}

impl Bench {
    /// New memory.
    ///
    /// # Panics
    ///
    /// When there is none.
    pub fn new(ledger: bool, layout: Layout) -> Self {
        let (umem, mut pool) = Umem::builder()
            .frames(FRAMES)
            .chunk_size(CHUNK)
            .ledger(ledger)
            .build()
            .expect("memory for a few thousand frames");
        let mut base = std::ptr::null_mut();
        let mut frames = Vec::new();
        // Every page exists before the clock runs, and says where it is.
        while let Some(mut packet) = pool.packet(0, CHUNK) {
            packet.fill(0x5a);
            if umem.index_of(&packet) == Some(0) {
                base = packet.as_mut_ptr();
            }
            frames.push(packet.into_frame());
        }
        pool.extend(frames);
        let (fill, raw_fill, map_fill) = ring();
        let (rx, raw_rx, map_rx) = ring();
        let (tx, raw_tx, map_tx) = ring();
        let (completion, raw_completion, map_completion) = ring();
        Self {
            umem,
            rings: Rings { fill, rx, tx, completion },
            raw: [raw_fill, raw_rx, raw_tx, raw_completion],
            mappings: [map_fill, map_rx, map_tx, map_completion],
            base,
            layout,
        }
    }

    pub(crate) fn rings(&self) -> &Rings {
        &self.rings
    }

    pub(crate) fn mappings(&self) -> &[Mapping; 4] {
        &self.mappings
    }

    /// The memory, for sockets of an [`interface`](Self::interface).
    pub fn umem(&self) -> &Umem {
        &self.umem
    }

    pub(crate) fn layout(&self) -> Layout {
        self.layout
    }

    /// Both sides of the rings, all frames in FILL.
    pub fn user(&mut self) -> (User, Kernel) {
        let user = self.start();
        (user, Kernel::new(self))
    }

    /// The kernel's side alone, all frames in FILL, and the rings (FILL, RX, TX, COMPLETION) and
    /// UMEM for a peer that works the program's side by itself.
    ///
    /// The peer is done with them when the bench is used next.
    pub fn lend(&mut self) -> ([RawRing; 4], *mut u8, Kernel) {
        drop(self.start());
        (self.raw, self.base, Kernel::new(self))
    }

    /// A kernel with one interface of one queue, whose socket has these rings; all frames are in the
    /// UMEM's depot. `at_once` says when it sends, as [`Fake`] has it.
    pub fn interface(&mut self, at_once: bool) -> Fake {
        drop(self.reset());
        Fake::new(self, at_once)
    }

    fn start(&mut self) -> User {
        let mut pool = self.reset();
        let Rings { fill, rx, tx, completion } = &self.rings;
        let pair = Pair::new(&self.umem).expect("the only pair");
        // SAFETY: fresh rings of this pair; the kernel or the peer to come keeps the protocol.
        let mut user = unsafe {
            User {
                fill: FillRing::over(fill.clone(), &pair),
                rx: RxRing::over(rx.clone(), &pair),
                tx: TxRing::over(tx.clone(), &pair),
                completion: CompletionRing::over(completion.clone(), &pair),
                sum: 0,
            }
        };
        let filled = user.fill.refill(&mut pool, FRAMES);
        assert_eq!(filled, FRAMES, "FILL has room for all frames");
        user
    }

    /// Empties the rings; the pool has all frames.
    fn reset(&mut self) -> Pool {
        let Rings { fill, rx, tx, completion } = &self.rings;
        // SAFETY: `&mut self`: the user and the kernel of the run before are not at work. Their
        // typed rings may live on, but then `reclaim` finds them, gives nothing back, and the
        // assertion below ends it.
        unsafe {
            self.umem.reclaim();
            for index in [RingMemory::set_producer, RingMemory::set_consumer] {
                index(fill, 0);
                index(completion, 0);
            }
            for index in [RingMemory::set_producer, RingMemory::set_consumer] {
                index(rx, 0);
                index(tx, 0);
            }
        }
        let mut pool = self.umem.pool();
        pool.fetch(FRAMES as usize);
        assert_eq!(pool.len(), FRAMES as usize, "a run before this one is not over");
        pool
    }
}
