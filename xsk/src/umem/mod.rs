//! The UMEM: the memory that is shared with the kernel, its frames, and who owns each.
//!
//! A [`Umem`] is cut into chunks of one size. Each chunk has one owner at any time: the kernel, a
//! ring on the way to or from it, or the program, which holds it as a [`Frame`] or a [`Packet`].
//! Neither can be copied or made up, so safe code cannot put a frame in two rings, touch one that
//! the kernel owns, or use it after the memory is gone.
//!
//! ```
//! use xsk::umem::Umem;
//!
//! let (umem, mut pool) = Umem::builder().frames(64).chunk_size(2048).build()?;
//! let mut packet = pool.packet(0, 60).expect("64 frames are there");
//! packet[..6].fill(0xff);
//! assert_eq!(umem.census().pools, 63);
//! assert_eq!(umem.census().program, 1);
//! pool.put(packet);
//! assert_eq!(umem.census().pools, 64);
//! # Ok::<(), xsk::Error>(())
//! ```

mod builder;
mod frame;
mod home;
mod ledger;
mod memory;
mod pool;

use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::sync::{Arc, PoisonError, Weak};

use crate::abi::{RingKind, XDP_PACKET_HEADROOM};
use crate::kernel::{Mapping, RawSocket};
use crate::ring::RingMemory;
use crate::sync::{AtomicBool, AtomicU32, AtomicU64, Mutex, MutexGuard};
use ledger::{Book, MAX_PAIRS, States};

pub use builder::UmemBuilder;
pub(crate) use builder::max_headroom;
pub(crate) use frame::{Facts, Wrong};
pub use frame::{Frame, Packet};
pub use memory::PageSize;
pub use pool::Pool;

/// Memory that is shared with the kernel, cut into chunks of one size.
///
/// A `Umem` is a handle; clones are handles to the same memory. The memory is released when the
/// last handle, ring, pool and frame of it is gone, in whichever order they go.
#[derive(Clone)]
pub struct Umem(Arc<Handle>);

/// Counts the handles: when the last is gone, the UMEM ends as soon as its frames allow.
struct Handle {
    core: Arc<Core>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.core.orphaned.store(true, Release);
        home::retire(&self.core);
    }
}

pub(crate) struct Core {
    pub(crate) facts: Facts,
    pub(crate) total: u32,
    headroom: u32,
    pages: (PageSize, PageSize),
    memory: Mapping,
    book: Option<Book>,
    /// Frames at home, in no pool.
    depot: Mutex<Vec<Frame>>,
    /// How many they were last, for who would rather not take the lock for nothing.
    depot_len: AtomicU32,
    /// The lengths of the pools there are.
    pools: Mutex<Vec<Arc<AtomicU32>>>,
    rings: Mutex<Accounts>,
    /// Pairs of FILL and COMPLETION rings, by number; true where in use.
    pairs: Mutex<Vec<bool>>,
    /// Frames that rings which are gone had taken in and not given back, modulo 2^32.
    retired: AtomicU32,
    faults: FaultCounters,
    /// Entries that guards held which were forgotten.
    forgotten: AtomicU32,
    dropped: AtomicU64,
    orphaned: AtomicBool,
    /// Sockets that have this UMEM: one of them lends it to the next.
    pub(crate) members: std::sync::Mutex<Vec<Member>>,
}

/// A bound socket that has the UMEM.
pub(crate) struct Member {
    pub(crate) socket: Weak<dyn RawSocket>,
    pub(crate) kernel: usize,
    pub(crate) ifindex: u32,
    pub(crate) queue: u32,
    pub(crate) zero_copy: bool,
}

/// The depot, locked.
struct Depot<'a> {
    frames: MutexGuard<'a, Vec<Frame>>,
    len: &'a AtomicU32,
}

impl Drop for Depot<'_> {
    fn drop(&mut self) {
        self.len.store(self.frames.len() as u32, Relaxed);
    }
}

impl core::ops::Deref for Depot<'_> {
    type Target = Vec<Frame>;

    fn deref(&self) -> &Vec<Frame> {
        &self.frames
    }
}

impl core::ops::DerefMut for Depot<'_> {
    fn deref_mut(&mut self) -> &mut Vec<Frame> {
        &mut self.frames
    }
}

/// The accounts of the rings, for the census.
#[derive(Default)]
struct Accounts {
    /// The rings there are.
    open: Vec<Account>,
    /// By pair: what rings that are gone took in and did not give back, while another ring of the
    /// pair is there to give it back.
    closed: Vec<(u16, u32)>,
}

/// What a ring has taken in or given back.
struct Account {
    id: usize,
    pair: u16,
    kind: RingKind,
    /// The shared indices.
    view: Box<dyn RingView>,
    /// Where the program's side stood at first.
    start: u32,
    /// Entries that were taken out of the ring and never became a frame.
    refused: Arc<AtomicU32>,
}

/// The indices of a ring of any entry.
trait RingView: Send + Sync {
    fn producer(&self) -> u32;
    fn consumer(&self) -> u32;
    fn filled(&self) -> Option<u32>;
}

impl<T: Copy + Send> RingView for RingMemory<T> {
    fn producer(&self) -> u32 {
        RingMemory::producer(self)
    }
    fn consumer(&self) -> u32 {
        RingMemory::consumer(self)
    }
    fn filled(&self) -> Option<u32> {
        RingMemory::filled(self)
    }
}

impl Account {
    /// Frames that went into this ring (FILL, TX), less those that came out of it (RX, COMPLETION),
    /// when the program's side stands at `index`; modulo 2^32.
    fn lent(&self, index: u32) -> u32 {
        let passed = index.wrapping_sub(self.start);
        match self.kind {
            RingKind::Fill | RingKind::Tx => passed,
            RingKind::Rx | RingKind::Completion => self.refused.load(Relaxed).wrapping_sub(passed),
        }
    }

    /// The program's side, as published.
    fn index(&self) -> u32 {
        match self.kind {
            RingKind::Fill | RingKind::Tx => self.view.producer(),
            RingKind::Rx | RingKind::Completion => self.view.consumer(),
        }
    }

    /// Entries in the ring. Of one whose indices contradict each other the program takes nothing,
    /// so it counts as empty.
    fn inside(&self) -> u32 {
        self.view.filled().unwrap_or(0)
    }
}

/// What was wrong with an entry that the kernel handed back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Fault {
    /// It points outside the UMEM or its chunk.
    Outside,
    /// The chunk was not the kernel's to give: it had given it already, or never had it.
    Duplicate,
}

#[derive(Default)]
struct FaultCounters {
    outside: AtomicU64,
    duplicate: AtomicU64,
    last: AtomicU64,
}

/// Entries that the kernel handed back and that were refused. All zero with a kernel that works.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Faults {
    /// Entries that point outside the UMEM or their chunk.
    pub outside: u64,
    /// Chunks given twice, or never lent; found by the ledger alone.
    pub duplicate: u64,
    /// The address of the last one, as the kernel wrote it.
    pub last_address: u64,
}

impl Faults {
    /// Entries refused, of either kind.
    pub fn total(&self) -> u64 {
        self.outside + self.duplicate
    }
}

/// Where every chunk of a UMEM is, in frames.
///
/// Rings are counted as published, so a census is exact when no batch is open and the kernel is at
/// rest, and close to it at any other time. A guard that is forgotten leaves its batch open until
/// the next one of its ring; frames that are lost with it count as the program's for ever.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Census {
    /// Chunks of the UMEM.
    pub total: u32,
    /// In pools.
    pub pools: u32,
    /// At home, in no pool.
    pub depot: u32,
    /// In FILL rings, not yet taken by the kernel.
    pub fill: u32,
    /// In TX rings, not yet taken by the kernel.
    pub tx: u32,
    /// In RX rings, not yet taken by the program.
    pub rx: u32,
    /// In COMPLETION rings, not yet taken by the program.
    pub completion: u32,
    /// In the kernel's hands, between two rings. Negative when a kernel gave back more than it had
    /// taken: until the program has looked at it, where the ledger is on.
    pub kernel: i64,
    /// Left with the kernel by sockets that are gone.
    pub retired: u32,
    /// In the program's hands, as frames and packets: what is not elsewhere.
    pub program: i64,
    /// Frames that the ledger says the program owns: pools + depot + program, less those that were
    /// lost with a forgotten guard of RX or COMPLETION.
    pub ledger_held: Option<u32>,
    /// Entries of RX and COMPLETION in guards that were forgotten: so many frames at most are lost.
    pub forgotten: u32,
    /// Frames and packets that were dropped instead of being put into a pool, since the start.
    pub dropped: u64,
    /// What the kernel handed back and was refused.
    pub faults: Faults,
}

impl Census {
    /// What contradicts itself, if anything: with a kernel that works, nothing.
    pub fn contradiction(&self) -> Option<String> {
        if self.program < 0 {
            return Some(format!("{} frames more than there are chunks: {self:?}", -self.program));
        }
        if self.kernel < 0 {
            return Some(format!(
                "the kernel gave back {} frames that it had not taken: {self:?}",
                -self.kernel
            ));
        }
        let held = i64::from(self.pools) + i64::from(self.depot) + self.program;
        match self.ledger_held {
            Some(ledger) if !(0..=i64::from(self.forgotten)).contains(&(held - i64::from(ledger))) => {
                Some(format!("the ledger has {ledger} frames with the program, the census {held}: {self:?}"))
            }
            _ => None,
        }
    }
}

impl Umem {
    /// Begins a UMEM: 4096 frames of 4096 bytes unless told otherwise.
    pub fn builder() -> UmemBuilder {
        UmemBuilder::default()
    }

    /// Whether both are handles to the same memory.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    pub(crate) fn core(&self) -> &Core {
        &self.0.core
    }

    /// Chunks.
    pub fn frames(&self) -> u32 {
        self.core().total
    }

    /// Bytes of a chunk.
    pub fn chunk_size(&self) -> u32 {
        self.core().facts.chunk() as u32
    }

    /// Bytes that the kernel leaves free in front of each received packet, besides its own 256.
    pub fn headroom(&self) -> u32 {
        self.core().headroom
    }

    /// Bytes of memory.
    pub fn size(&self) -> u64 {
        self.core().facts.size
    }

    /// The memory: what a kernel registers. Reaching into it is unsafe, as its frames own it.
    pub fn memory(&self) -> &Mapping {
        self.core().memory()
    }

    /// The pages that were asked for.
    pub fn pages_asked(&self) -> PageSize {
        self.core().pages.0
    }

    /// The pages that hold the memory.
    pub fn pages(&self) -> PageSize {
        self.core().pages.1
    }

    /// Whether the ledger is on: see [`UmemBuilder::ledger`].
    pub fn has_ledger(&self) -> bool {
        self.core().book.is_some()
    }

    /// The longest packet that a frame receives, in bytes.
    pub fn max_packet(&self) -> u32 {
        self.chunk_size() - XDP_PACKET_HEADROOM - self.headroom()
    }

    /// An empty pool of this UMEM, for another thread.
    pub fn pool(&self) -> Pool {
        Pool::new(self.clone())
    }

    /// The number of the chunk that a frame owns, 0 to [`frames`](Self::frames) less one; `None` for
    /// another UMEM's frame.
    ///
    /// It stays the same while the frame goes through TX and COMPLETION, so it tells which packet
    /// was sent: keep what belongs to a packet in a table by this number.
    pub fn index(&self, frame: &Frame) -> Option<u32> {
        let facts = &self.core().facts;
        facts.offset(frame).map(|offset| (offset / facts.chunk()) as u32)
    }

    /// The number of the chunk that a packet is in; see [`index`](Self::index).
    pub fn index_of(&self, packet: &Packet) -> Option<u32> {
        self.index(packet.frame())
    }

    /// A frame as a packet of `len` bytes that starts `headroom` bytes into its chunk.
    ///
    /// The bytes are whatever the chunk holds: a frame that was sent still holds its packet.
    ///
    /// # Errors
    ///
    /// The frame back, when `len` is 0, the packet does not fit the chunk, or the frame is another
    /// UMEM's.
    #[inline]
    pub fn packet(&self, frame: Frame, headroom: u16, len: u32) -> Result<Packet, Frame> {
        let facts = &self.core().facts;
        let Some(offset) = facts.offset(&frame) else { return Err(frame) };
        if len == 0 || u64::from(headroom) + u64::from(len) > facts.chunk() {
            return Err(frame);
        }
        let start = offset - offset % facts.chunk() + u64::from(headroom);
        let _ = frame.into_raw();
        // SAFETY: inside the chunk that `frame` owned; the length was checked.
        Ok(unsafe { Packet::new(Frame::new(facts.base.add(start as usize)), len, 0, 0) })
    }

    /// Makes room for `n` bytes in front of a packet, as for a header.
    ///
    /// # Errors
    ///
    /// The packet as it was, when its chunk has less room in front of it, or is another UMEM's.
    #[inline]
    pub fn prepend(&self, packet: Packet, n: u16) -> Result<Packet, Packet> {
        let facts = &self.core().facts;
        let Some(at) = facts.offset(packet.frame()) else { return Err(packet) };
        let (frame, len, offset, options) = packet.into_parts();
        let front = at % facts.chunk() + u64::from(offset);
        if u64::from(n) > front {
            // SAFETY: as it was.
            return Err(unsafe { Packet::new(frame, len, offset, options) });
        }
        let start = at + u64::from(offset) - u64::from(n);
        let _ = frame.into_raw();
        // SAFETY: it starts no earlier than its chunk, and ends where it ended.
        Ok(unsafe { Packet::new(Frame::new(facts.base.add(start as usize)), len + u32::from(n), 0, options) })
    }

    /// Makes a packet longer by `n` bytes at its end, which are whatever the chunk holds there.
    ///
    /// # Errors
    ///
    /// The packet as it was, when its chunk has less room behind it, or is another UMEM's.
    #[inline]
    pub fn append(&self, packet: Packet, n: u32) -> Result<Packet, Packet> {
        match self.room(&packet) {
            Some((_, behind)) if n <= behind => {
                let (frame, len, offset, options) = packet.into_parts();
                // SAFETY: it starts where it started, and ends in its chunk.
                Ok(unsafe { Packet::new(frame, len + n, offset, options) })
            }
            _ => Err(packet),
        }
    }

    /// Bytes of its chunk in front of a packet and behind it; `None` for another UMEM's.
    #[inline]
    pub fn room(&self, packet: &Packet) -> Option<(u32, u32)> {
        let facts = &self.core().facts;
        let at = facts.offset(packet.frame())?;
        let front = (at % facts.chunk()) as u32 + packet.offset();
        Some((front, facts.chunk() as u32 - front - packet.len() as u32))
    }

    /// Counts where every chunk is.
    pub fn census(&self) -> Census {
        self.core().census()
    }

    /// What the kernel handed back and was refused.
    pub fn faults(&self) -> Faults {
        self.core().faults.read()
    }

    /// Frames that sockets which are gone never gave back become frames again, at home in the depot.
    ///
    /// A socket that closes keeps what it had in FILL, TX or in flight, and a kernel may lose a
    /// frame for good (those before July 2026 never complete an invalid descriptor). This takes
    /// them back. Returns how many came home: 0 while any ring or pool of this UMEM still exists,
    /// or a frame is in the program's hands, because then it can't be told which are lost; and 0
    /// when a kernel gave a frame back twice with the ledger off.
    ///
    /// # Safety
    ///
    /// The kernel has released every socket that had this UMEM, and will not write to it any more.
    /// A queue that can be bound again has been released.
    pub unsafe fn reclaim(&self) -> u32 {
        let core = self.core();
        let (rings, pools) = (core.rings.lock(), core.pools());
        let rings = rings.unwrap_or_else(PoisonError::into_inner);
        let mut depot = core.depot();
        let retired = core.retired.load(Acquire);
        if !rings.open.is_empty()
            || !pools.is_empty()
            || depot.len() as u64 + u64::from(retired) != core.total.into()
        {
            return 0;
        }
        let chunk = core.facts.chunk();
        let mut at_home = vec![false; core.total as usize];
        for frame in depot.iter() {
            if let Some(offset) = core.facts.offset(frame) {
                at_home[(offset / chunk) as usize] = true;
            }
        }
        if at_home.iter().filter(|home| !**home).count() != retired as usize {
            // A kernel gave one back twice, and no ledger noticed.
            return 0;
        }
        for (number, _) in at_home.iter().enumerate().filter(|(_, home)| !**home) {
            if let Some(book) = &core.book {
                book.set_held(number as u32);
            }
            // SAFETY: no frame of this chunk is at home, in a pool, in a ring or with the program,
            // and the kernel is done with it, as the caller promises.
            depot.push(unsafe { Frame::new(core.facts.base.add(number * chunk as usize)) });
        }
        core.retired.store(0, Release);
        retired
    }
}

impl core::fmt::Debug for Umem {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Umem")
            .field("frames", &self.frames())
            .field("chunk_size", &self.chunk_size())
            .field("headroom", &self.headroom())
            .field("pages", &self.pages())
            .field("ledger", &self.has_ledger())
            .finish()
    }
}

impl Core {
    fn depot(&self) -> Depot<'_> {
        let frames = self.depot.lock().unwrap_or_else(PoisonError::into_inner);
        Depot { frames, len: &self.depot_len }
    }

    fn pools(&self) -> MutexGuard<'_, Vec<Arc<AtomicU32>>> {
        self.pools.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The memory, for its registration with a kernel.
    pub(crate) fn memory(&self) -> &Mapping {
        &self.memory
    }

    /// Takes a dropped frame into the depot.
    fn take_home(&self, frame: Frame) {
        self.dropped.fetch_add(1, Relaxed);
        let mut depot = self.depot();
        if depot.len() < self.total as usize {
            depot.push(frame);
        } else {
            drop(depot);
            self.fault(Fault::Duplicate, 0);
            let _ = frame.into_raw();
        }
    }

    /// No handle is left, and no frame is anywhere but at home or lost with a ring that is gone.
    fn is_finished(&self) -> bool {
        self.orphaned.load(Acquire)
            && (self.depot().len() as u32).wrapping_add(self.retired.load(Acquire)) == self.total
    }

    #[cold]
    #[inline(never)]
    pub(crate) fn fault(&self, fault: Fault, address: u64) {
        let counter = match fault {
            Fault::Outside => &self.faults.outside,
            Fault::Duplicate => &self.faults.duplicate,
        };
        counter.fetch_add(1, Relaxed);
        self.faults.last.store(address, Relaxed);
    }

    fn census(&self) -> Census {
        let rings = self.rings.lock().unwrap_or_else(PoisonError::into_inner);
        let inside = |kind| {
            rings.open.iter().filter(|a| a.kind == kind).map(Account::inside).fold(0, u32::wrapping_add)
        };
        let (fill, tx) = (inside(RingKind::Fill), inside(RingKind::Tx));
        let (rx, completion) = (inside(RingKind::Rx), inside(RingKind::Completion));
        // In the kernel's hands in any way, modulo 2^32; a small negative number if it gave too much.
        let open = rings.open.iter().map(|account| account.lent(account.index()));
        let lent = open.chain(rings.closed.iter().map(|c| c.1)).fold(0, u32::wrapping_add);
        drop(rings);
        let lent = i64::from(lent as i32);
        let in_rings = i64::from(fill) + i64::from(tx) + i64::from(rx) + i64::from(completion);
        let pools = self.pools().iter().map(|len| len.load(Relaxed)).sum::<u32>();
        let depot = self.depot().len() as u32;
        let retired = self.retired.load(Relaxed);
        Census {
            total: self.total,
            pools,
            depot,
            fill,
            tx,
            rx,
            completion,
            kernel: lent - in_rings,
            retired,
            program: i64::from(self.total)
                - i64::from(pools)
                - i64::from(depot)
                - i64::from(retired as i32)
                - lent,
            ledger_held: self.book.as_ref().map(Book::held),
            forgotten: self.forgotten.load(Relaxed),
            dropped: self.dropped.load(Relaxed),
            faults: self.faults.read(),
        }
    }

    /// Enters a ring into the accounts; the number takes it out again.
    fn open_account<T: Copy + Send + 'static>(
        &self,
        pair: u16,
        kind: RingKind,
        memory: &RingMemory<T>,
        start: u32,
        refused: Arc<AtomicU32>,
    ) -> usize {
        let mut rings = self.rings.lock().unwrap_or_else(PoisonError::into_inner);
        let id = rings.open.iter().map(|a| a.id + 1).max().unwrap_or(0);
        rings.open.push(Account { id, pair, kind, view: Box::new(memory.clone()), start, refused });
        id
    }

    /// Takes a ring out of the accounts. With the last of its pair, what the pair's rings took in
    /// and never gave back is retired.
    fn close_account(&self, id: usize, index: u32) {
        let mut rings = self.rings.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(at) = rings.open.iter().position(|a| a.id == id) else { return };
        let account = rings.open.swap_remove(at);
        let (pair, mut lent) = (account.pair, account.lent(index));
        if let Some(at) = rings.closed.iter().position(|c| c.0 == pair) {
            lent = lent.wrapping_add(rings.closed.swap_remove(at).1);
        }
        if rings.open.iter().any(|a| a.pair == pair) {
            rings.closed.push((pair, lent));
        } else {
            self.retired.fetch_add(lent, AcqRel);
        }
    }
}

impl FaultCounters {
    fn read(&self) -> Faults {
        Faults {
            outside: self.outside.load(Relaxed),
            duplicate: self.duplicate.load(Relaxed),
            last_address: self.last.load(Relaxed),
        }
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        // Frames at home end with their memory.
        for frame in self.depot.get_mut().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _ = frame.into_raw();
        }
    }
}

impl core::fmt::Debug for Core {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Core").field("census", &self.census()).finish_non_exhaustive()
    }
}

/// One FILL and COMPLETION ring of a UMEM, and the RX and TX rings that go with them.
///
/// The ledger tells pairs apart: a chunk that was lent through one pair can come back through that
/// pair only.
#[derive(Debug)]
pub struct Pair {
    umem: Umem,
    number: u16,
}

impl Pair {
    /// The most pairs of a UMEM.
    pub const MAX: u32 = MAX_PAIRS as u32;

    /// The next pair of `umem`; `None` when it has [`MAX`](Self::MAX) already.
    pub fn new(umem: &Umem) -> Option<Arc<Self>> {
        let mut pairs = umem.core().pairs.lock().unwrap_or_else(PoisonError::into_inner);
        let number = pairs.iter().position(|used| !used).unwrap_or(pairs.len());
        if number >= MAX_PAIRS as usize {
            return None;
        }
        if number == pairs.len() {
            pairs.push(true);
        } else {
            pairs[number] = true;
        }
        Some(Arc::new(Self { umem: umem.clone(), number: number as u16 }))
    }

    /// The UMEM.
    pub fn umem(&self) -> &Umem {
        &self.umem
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        let core = self.umem.core();
        // What the pair's rings never gave back must not come out of the next pair of this number.
        if let Some(book) = &core.book {
            book.lose(States::of_pair(self.number));
        }
        let mut pairs = core.pairs.lock().unwrap_or_else(PoisonError::into_inner);
        pairs[self.number as usize] = false;
    }
}

/// A ring's entry in its UMEM's accounts. [`close`](Self::close) settles what the ring never gave
/// back.
///
/// It holds the UMEM, so a ring that is forgotten keeps the memory.
#[derive(Debug)]
pub(crate) struct Ledgered {
    pub(crate) pair: Arc<Pair>,
    /// The ledger's state of the chunks that are lent through the ring: to FILL, or to TX.
    pub(crate) state: u16,
    pub(crate) refused: Arc<AtomicU32>,
    id: usize,
}

impl Ledgered {
    pub(crate) fn open<T: Copy + Send + 'static>(
        pair: &Arc<Pair>,
        kind: RingKind,
        memory: &RingMemory<T>,
        start: u32,
    ) -> Self {
        let refused = Arc::new(AtomicU32::new(0));
        let id = pair.umem.core().open_account(pair.number, kind, memory, start, refused.clone());
        let states = States::of_pair(pair.number);
        let state = match kind {
            RingKind::Fill | RingKind::Rx => states.fill,
            RingKind::Tx | RingKind::Completion => states.tx,
        };
        Self { pair: pair.clone(), state, refused, id }
    }

    /// Takes the ring out of the accounts, when the program's side stands at `index`.
    pub(crate) fn close(&self, index: u32) {
        self.pair.umem.core().close_account(self.id, index);
    }

    /// What there is to know of the UMEM.
    pub(crate) fn facts(&self) -> Facts {
        self.pair.umem.core().facts
    }

    /// Counts the entries of a guard that was forgotten.
    #[cold]
    #[inline(never)]
    pub(crate) fn count_forgotten(&self, lost: u32) {
        self.pair.umem.core().forgotten.fetch_add(lost, Relaxed);
    }

    /// An entry came out of the ring and is none: count it, so that the sums stay true.
    #[cold]
    #[inline(never)]
    pub(crate) fn refuse(&self, wrong: Wrong, address: u64) {
        self.refused.fetch_add(1, Relaxed);
        let fault = match wrong {
            Wrong::Outside => Fault::Outside,
            Wrong::NotTheirs => Fault::Duplicate,
        };
        self.pair.umem.core().fault(fault, address);
    }
}
