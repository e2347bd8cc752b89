//! Makes a UMEM: checks what is asked, maps the memory, and makes each chunk's first owner.

use core::ptr::NonNull;
use std::sync::Arc;

use super::frame::{Facts, Frame};
use super::ledger::{Book, Ledger};
use super::memory::{self, PageSize};
use super::{Core, FaultCounters, Handle, Pool, Umem, home};
use crate::abi::{XDP_PACKET_HEADROOM, XDP_UMEM_MIN_CHUNK_SIZE};
use crate::error::{Cause, Doing, Error};
use crate::kernel::Mapping;
use crate::sync::{AtomicBool, AtomicU32, AtomicU64, Mutex};

/// Makes a [`Umem`].
#[derive(Clone, Debug)]
#[must_use = "nothing is made before `build`"]
pub struct UmemBuilder {
    frames: u32,
    chunk_size: u32,
    headroom: u32,
    pages: PageSize,
    require_pages: bool,
    ledger: bool,
}

impl Default for UmemBuilder {
    fn default() -> Self {
        Self {
            frames: 4096,
            chunk_size: 4096,
            headroom: 0,
            pages: PageSize::Ordinary,
            require_pages: false,
            ledger: cfg!(debug_assertions),
        }
    }
}

impl UmemBuilder {
    /// How many frames (default 4096).
    pub fn frames(mut self, frames: u32) -> Self {
        self.frames = frames;
        self
    }

    /// Bytes of a chunk: a power of two from 2048 to the page size (default 4096).
    ///
    /// A received packet starts 256 bytes into its chunk, and further by the headroom.
    pub fn chunk_size(mut self, bytes: u32) -> Self {
        self.chunk_size = bytes;
        self
    }

    /// Bytes that the kernel leaves free in front of each received packet, besides its own 256
    /// (default 0).
    ///
    /// Kernels of 2026 also keep 448 bytes behind the packet free: 1344 is the most for chunks of
    /// 2048 bytes, 3392 for 4096.
    pub fn headroom(mut self, bytes: u32) -> Self {
        self.headroom = bytes;
        self
    }

    /// Pages to hold the memory, where the system has them free; else ordinary ones.
    ///
    /// [`Umem::pages`] tells what it became.
    pub fn pages(mut self, pages: PageSize) -> Self {
        self.pages = pages;
        self.require_pages = false;
        self
    }

    /// Pages that must hold the memory, or nothing is made.
    pub fn require_pages(mut self, pages: PageSize) -> Self {
        self.pages = pages;
        self.require_pages = true;
        self
    }

    /// Whether to keep the ledger: two bytes a chunk that catch a kernel or driver that gives a
    /// frame twice, or one that it was never lent.
    ///
    /// On by default with debug assertions, off without: it costs about a nanosecond a packet.
    pub fn ledger(mut self, on: bool) -> Self {
        self.ledger = on;
        self
    }

    /// Makes the UMEM, with all of its frames in one pool.
    ///
    /// # Errors
    ///
    /// [`Cause::NoFrames`], [`Cause::ChunkSize`], [`Cause::ChunkNotPowerOfTwo`],
    /// [`Cause::Headroom`], [`Cause::UmemTooLarge`], [`Cause::OutOfMemory`], and
    /// [`Cause::NoHugePages`] where pages are required.
    pub fn build(self) -> Result<(Umem, Pool), Error> {
        let doing = Doing::MakeUmem { frames: self.frames, chunk_size: self.chunk_size };
        self.check().map_err(|cause| Error::new(doing.clone(), cause))?;
        let bytes = u64::from(self.frames) * u64::from(self.chunk_size);
        // No memory that pointers can walk is larger than `isize` counts.
        let limit = memory::installed().min(isize::MAX as u64);
        let len = match usize::try_from(bytes) {
            Ok(len) if bytes <= limit => len,
            _ => return Err(Error::new(doing, Cause::UmemTooLarge { bytes, limit })),
        };
        let ordinary = || {
            // The kernel would promise it, and kill processes to keep the promise when it is pinned.
            if memory::available().is_some_and(|available| bytes > available) {
                return Err(Error::new(doing.clone(), Cause::OutOfMemory { bytes }));
            }
            memory::allocate(len, PageSize::Ordinary)
                .map(|memory| (memory, PageSize::Ordinary))
                .map_err(|errno| Error::with_errno(doing.clone(), Cause::OutOfMemory { bytes }, errno))
        };
        let (memory, got) = match self.pages {
            PageSize::Ordinary => ordinary()?,
            pages => match memory::allocate(len, pages) {
                Ok(memory) => (memory, pages),
                Err(_) if !self.require_pages => ordinary()?,
                Err(errno) => {
                    let needed = bytes.div_ceil(pages.bytes() as u64);
                    return Err(Error::with_errno(doing, Cause::NoHugePages { pages, needed }, errno));
                }
            },
        };
        // SAFETY: the memory was just made, zeroed, for this UMEM alone.
        Ok(unsafe { self.over(memory, got) })
    }

    fn check(&self) -> Result<(), Cause> {
        let max = rustix::param::page_size() as u32;
        let chunk = self.chunk_size;
        if self.frames == 0 {
            return Err(Cause::NoFrames);
        }
        if !(XDP_UMEM_MIN_CHUNK_SIZE..=max).contains(&chunk) {
            return Err(Cause::ChunkSize { chunk, min: XDP_UMEM_MIN_CHUNK_SIZE, max });
        }
        if !chunk.is_power_of_two() {
            return Err(Cause::ChunkNotPowerOfTwo { chunk });
        }
        // What no kernel takes; newer ones take less, which is told when the UMEM is registered.
        if self.headroom >= chunk - XDP_PACKET_HEADROOM {
            let max = max_headroom(chunk);
            return Err(Cause::Headroom { headroom: self.headroom, max, chunk });
        }
        Ok(())
    }

    /// # Safety
    ///
    /// `memory` is initialised, has room for all chunks, and is used by nothing else.
    unsafe fn over(self, memory: Mapping, got: PageSize) -> (Umem, Pool) {
        let base: NonNull<u8> = memory.base();
        let book = self.ledger.then(|| Book::new(self.frames));
        let size = u64::from(self.frames) * u64::from(self.chunk_size);
        let ledger = book.as_ref().map_or(Ledger::OFF, Book::ledger);
        let facts = Facts::new(base, size, self.chunk_size, ledger);
        let core = Arc::new(Core {
            facts,
            total: self.frames,
            headroom: self.headroom,
            pages: (self.pages, got),
            memory,
            book,
            depot: Mutex::new(Vec::with_capacity(self.frames as usize)),
            depot_len: AtomicU32::new(0),
            pools: Mutex::default(),
            rings: Mutex::default(),
            pairs: Mutex::default(),
            retired: AtomicU32::new(0),
            faults: FaultCounters::default(),
            forgotten: AtomicU32::new(0),
            dropped: AtomicU64::new(0),
            orphaned: AtomicBool::new(false),
            members: std::sync::Mutex::default(),
        });
        home::enter(&core);
        let umem = Umem(Arc::new(Handle { core }));
        let mut pool = umem.pool();
        for number in (0..self.frames as usize).rev() {
            // SAFETY: inside the memory, and this chunk's first owner.
            pool.put(unsafe { Frame::new(base.add(number * self.chunk_size as usize)) });
        }
        (umem, pool)
    }
}

/// The most headroom that kernels of 2026 take, in bytes: they keep room behind the packet for the
/// kernel's own packet structure and for 128 bytes more.
pub(crate) const fn max_headroom(chunk: u32) -> u32 {
    chunk - XDP_PACKET_HEADROOM - 320 - 128
}
