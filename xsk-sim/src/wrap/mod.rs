//! Kernels that are not as they should be: older ones, and broken ones.
//!
//! A [`Wrapper`] stands between a program and any kernel, and is a kernel itself. It changes what
//! it is told to change and nothing else:
//!
//! - a [`Quirk`] makes the kernel one that lacks what a certain release of Linux brought;
//! - [`refuse`](Builder::refuse) and [`answer`](Builder::answer) change what a call is answered,
//!   [`count`](Builder::count) what the counters say;
//! - a [`Fault`], or any function of your own ([`tamper`](Builder::tamper)), changes the entries of
//!   a ring on their way: a frame that completes twice, a packet outside its chunk, an address that
//!   is lost; [`wild_index`](Builder::wild_index) changes the ring's index.
//!
//! ```
//! use xsk::{Device, Socket, Umem};
//! use xsk_sim::{Sim, wrap::{Quirk, Wrapper}};
//!
//! let old = Wrapper::around(Sim::new().kernel()).quirk(Quirk::OldStatistics).build();
//! let device = Device::open_on(old.kernel(), "sim0")?;
//! let (umem, _pool) = Umem::builder().frames(16).build()?;
//! let xsk = Socket::builder(&device).ring_size(16).open(&umem)?;
//! assert_eq!(xsk.socket.statistics()?.rx_ring_full, None);
//! # Ok::<(), xsk::Error>(())
//! ```
//!
//! # Relayed rings
//!
//! A ring whose entries or index are changed is relayed: the program maps memory of the wrapper's,
//! laid out as the kernel's, and the wrapper carries entries between the two. It does so in the
//! calls that a program makes of a bound socket (`send`, `receive`, `poll`), on their way in and
//! on their way out, and in [`Wrapper::pump`]. Between them a relayed ring stands still: whoever
//! waits for the descriptor with `epoll` calls `receive` before looking at RX, and what steps a
//! simulated kernel by hand pumps before and after. An entry leaves the ring that it came from when
//! the other side has taken it, so a full ring is full for both.
//!
//! The wrapped kernel must have flags words (5.4), and a ring must be mapped through the socket that
//! made it; `EOPNOTSUPP` otherwise.

mod relay;

use std::collections::HashMap;
use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use xsk::abi::{
    BindFlags, Descriptor, MMAP_OFFSETS_V1_SIZE, RingKind, SOL_XDP, STATISTICS_V1_SIZE, SockaddrXdp,
    UmemFlags, UmemReg, XDP_MAX_TX_SKB_BUDGET, XDP_MMAP_OFFSETS, XDP_OPTIONS, XDP_PKT_CONTD, XDP_STATISTICS,
    XDP_TX_METADATA, XSK_UNALIGNED_BUF_ADDR_MASK, XSK_UNALIGNED_BUF_OFFSET_SHIFT, XdpStatistics, bytes_of,
    bytes_of_mut,
};
use xsk::kernel::{
    Devices, Errno, Handle, Holder, InterfaceInfo, Kernel, Limits, LinkInfo, MapInfo, MapSpec, Mapping,
    Numbered, POLLIN, PollEntry, ProgramHolder, ProgramInfo, ProgramSpec, Programs, RawSocket, Sockets,
    Watch,
};

use crate::socket::POLLRDNORM;
use relay::{Altered, Relays};

/// `BPF_F_XDP_HAS_FRAGS`.
const HAS_FRAGS: u32 = 1 << 5;

const KINDS: [RingKind; 4] = [RingKind::Fill, RingKind::Rx, RingKind::Tx, RingKind::Completion];

/// How a release of Linux differs from 6.18.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Quirk {
    /// `XDP_STATISTICS` has three counters, 24 bytes; a full RX counts as `rx_dropped` (before 5.9).
    OldStatistics,
    /// `XDP_MMAP_OFFSETS` has no offsets of flags words, 96 bytes (before 5.4).
    OldOffsets,
    /// There is no `XDP_OPTIONS`: `EOPNOTSUPP` (before 5.3).
    NoOptions,
    /// `bind` does not know `XDP_USE_NEED_WAKEUP` and later flags: `EINVAL` (before 5.4). Nor does such
    /// a kernel tell of drivers' features.
    NoNeedWakeup,
    /// Programs are not loaded with `BPF_F_XDP_HAS_FRAGS`: `EINVAL` (before 5.18).
    NoFrags,
    /// There is no `XDP_MAX_TX_SKB_BUDGET`: `ENOPROTOOPT` (before 6.17).
    NoTxBudget,
    /// `send` says 0 when COMPLETION is full, and not `EAGAIN`.
    SilentFullCompletion,
    /// An invalid descriptor in TX is consumed and counted, and never completed (before July 2026).
    InvalidNeverCompleted,
    /// An XSKMAP takes no socket without an RX ring: `ENOBUFS`, before anything else is looked at
    /// (from 7.1).
    MapNeedsRx,
}

/// What a broken kernel does to an entry of a ring.
///
/// On FILL and TX it befalls what the kernel gets, on RX and COMPLETION what the program gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Fault {
    /// The entry comes twice.
    Twice,
    /// The entry never comes.
    Lost,
    /// Its address is behind the UMEM, at the same place in a chunk.
    Outside,
    /// Its address is the highest there is.
    Highest,
    /// Its address is in the next chunk (the first, from the last one).
    Other,
    /// It starts one byte later and ends where it did, if it has bytes to lose.
    Shifted,
    /// It ends one byte behind its chunk. FILL and COMPLETION know no ends: no change there.
    Crossing,
    /// It is empty. FILL and COMPLETION know no lengths: no change there.
    Empty,
}

impl Fault {
    /// Every fault.
    pub const ALL: [Self; 8] = [
        Self::Twice,
        Self::Lost,
        Self::Outside,
        Self::Highest,
        Self::Other,
        Self::Shifted,
        Self::Crossing,
        Self::Empty,
    ];

    /// What becomes of an entry in a UMEM of aligned chunks. Entries of FILL and COMPLETION are
    /// descriptors with nothing but an address.
    pub fn apply(self, mut entry: Descriptor, umem: &UmemReg) -> Vec<Descriptor> {
        let chunk = u64::from(umem.chunk_size);
        match self {
            Self::Twice => return vec![entry, entry],
            Self::Lost => return Vec::new(),
            Self::Outside => entry.addr = umem.len + entry.addr % chunk,
            Self::Highest => entry.addr = u64::MAX,
            Self::Other => entry.addr = (entry.addr + chunk) % umem.len,
            Self::Shifted if entry.len != 1 => {
                entry.addr += 1;
                entry.len = entry.len.saturating_sub(1);
            }
            Self::Shifted => {}
            Self::Crossing => entry.len = (chunk - entry.addr % chunk) as u32 + 1,
            Self::Empty => entry.len = 0,
        }
        vec![entry]
    }
}

/// A call of the contract's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Call {
    /// `socket`.
    Socket,
    /// `setsockopt(XDP_UMEM_REG)`.
    RegisterUmem,
    /// Any other `setsockopt` at `SOL_XDP`, by the option.
    SetOption(i32),
    /// `getsockopt` at `SOL_XDP`, by the option.
    GetOption(i32),
    /// `mmap` of a ring.
    Map,
    /// `bind`.
    Bind,
    /// `sendto`.
    Send,
    /// `recvfrom`.
    Receive,
    /// `poll`.
    Poll,
    /// `BPF_MAP_CREATE`.
    CreateMap,
    /// `BPF_MAP_UPDATE_ELEM`.
    UpdateMap,
    /// `BPF_MAP_DELETE_ELEM`.
    DeleteFromMap,
    /// `BPF_PROG_LOAD`.
    LoadProgram,
    /// `BPF_LINK_CREATE`.
    Attach,
    /// `BPF_OBJ_PIN`.
    Pin,
    /// `BPF_OBJ_GET`.
    OpenPinned,
    /// `BPF_PROG_GET_FD_BY_ID`, `BPF_MAP_GET_FD_BY_ID`, `BPF_LINK_GET_FD_BY_ID`, by what it opens.
    OpenById(Numbered),
    /// `BPF_LINK_GET_NEXT_ID`.
    NextLink,
}

type Answer = Box<dyn Fn(Result<(), Errno>) -> Result<(), Errno> + Send + Sync>;
type Tamper = Box<dyn FnMut(Descriptor, &UmemReg) -> Vec<Descriptor> + Send>;
type Count = Box<dyn Fn(&mut XdpStatistics) + Send + Sync>;

/// What is different from the wrapped kernel.
#[derive(Default)]
struct Differences {
    quirks: Vec<Quirk>,
    refused: HashMap<Call, Errno>,
    answers: HashMap<Call, Answer>,
    counts: Vec<Count>,
    /// In the order in which they were asked for.
    tampers: Mutex<Vec<(RingKind, Tamper)>>,
    wild: HashMap<RingKind, u32>,
    /// Rings that are relayed.
    relayed: Vec<RingKind>,
}

impl Differences {
    fn has(&self, quirk: Quirk) -> bool {
        self.quirks.contains(&quirk)
    }

    /// Asks the kernel, unless the call is refused, and changes the answer. Where an error becomes
    /// success, `made` is what the call returns; where nothing can be made up, the error stays.
    fn call<T>(
        &self,
        call: Call,
        made: Option<T>,
        ask: impl FnOnce() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        if let Some(errno) = self.refused.get(&call) {
            return Err(*errno);
        }
        let result = ask();
        let Some(answer) = self.answers.get(&call) else { return result };
        answer(result.as_ref().map(drop).map_err(|errno| *errno))?;
        result.or_else(|errno| made.ok_or(errno))
    }
}

/// Makes a [`Wrapper`].
#[must_use = "nothing is wrapped before `build`"]
pub struct Builder {
    kernel: Arc<dyn Kernel>,
    differences: Differences,
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder")
            .field("kernel", &self.kernel)
            .field("quirks", &self.differences.quirks)
            .finish_non_exhaustive()
    }
}

impl Builder {
    /// Makes the kernel an older (or newer) one in one respect.
    pub fn quirk(mut self, quirk: Quirk) -> Self {
        self.differences.quirks.push(quirk);
        match quirk {
            Quirk::NoOptions => self.refuse(Call::GetOption(XDP_OPTIONS), Errno::OPNOTSUPP),
            Quirk::NoTxBudget => self.refuse(Call::SetOption(XDP_MAX_TX_SKB_BUDGET), Errno::NOPROTOOPT),
            Quirk::InvalidNeverCompleted => self.relay(RingKind::Tx),
            _ => self,
        }
    }

    /// Answers a call with an error, and does nothing.
    pub fn refuse(mut self, call: Call, errno: Errno) -> Self {
        self.differences.refused.insert(call, errno);
        self
    }

    /// Has the kernel do a call, and changes its answer.
    ///
    /// Success that comes of an error returns 0 where the call returns a number; where it returns an
    /// object, the error stays.
    pub fn answer(
        mut self,
        call: Call,
        answer: impl Fn(Result<(), Errno>) -> Result<(), Errno> + Send + Sync + 'static,
    ) -> Self {
        self.differences.answers.insert(call, Box::new(answer));
        self
    }

    /// Changes what the counters say.
    pub fn count(mut self, count: impl Fn(&mut XdpStatistics) + Send + Sync + 'static) -> Self {
        self.differences.counts.push(Box::new(count));
        self
    }

    /// Does the same to every entry of a ring.
    ///
    /// # Safety
    ///
    /// As for [`tamper`](Self::tamper).
    pub unsafe fn fault(self, ring: RingKind, fault: Fault) -> Self {
        // SAFETY: as the caller promises.
        unsafe { self.tamper(ring, move |entry, umem| fault.apply(entry, umem)) }
    }

    /// Lets `tamper` say what becomes of each entry of a ring: which entries come in its place, if
    /// any. Entries of FILL and COMPLETION are descriptors with nothing but an address.
    ///
    /// It is called under a lock, and must not call the wrapper.
    ///
    /// # Safety
    ///
    /// The kernel breaks its promises to safe code ([`RawSocket`]) where a chunk comes that is not
    /// the kernel's to give, or where it is made to touch one that the program has. Whoever runs a
    /// program on it knows that the program's checks catch that (the ledger), or that nothing
    /// touches the bytes of a chunk that has two owners.
    pub unsafe fn tamper(
        mut self,
        ring: RingKind,
        tamper: impl FnMut(Descriptor, &UmemReg) -> Vec<Descriptor> + Send + 'static,
    ) -> Self {
        let tampers = self.differences.tampers.get_mut().unwrap_or_else(PoisonError::into_inner);
        tampers.push((ring, Box::new(tamper)));
        self.relay(ring)
    }

    /// After every time that entries were carried, the kernel's index of a ring is `ahead` of what
    /// it should be, until the next call: the producer's of RX and COMPLETION, the consumer's of
    /// FILL and TX.
    ///
    /// # Safety
    ///
    /// As for [`tamper`](Self::tamper): with an index that is ahead by less than the ring holds, the
    /// program meets old entries.
    pub unsafe fn wild_index(mut self, ring: RingKind, ahead: u32) -> Self {
        self.differences.wild.insert(ring, ahead);
        self.relay(ring)
    }

    fn relay(mut self, ring: RingKind) -> Self {
        if !self.differences.relayed.contains(&ring) {
            self.differences.relayed.push(ring);
        }
        self
    }

    /// The wrapper.
    pub fn build(self) -> Wrapper {
        let Self { kernel, differences } = self;
        Wrapper(Arc::new(Wrapped { kernel, differences: Arc::new(differences), sockets: Arc::default() }))
    }
}

/// A kernel around a kernel. Clones are the same.
#[derive(Clone, Debug)]
pub struct Wrapper(Arc<Wrapped>);

impl Wrapper {
    /// Begins a wrapper around `kernel`, which differs in nothing yet.
    pub fn around(kernel: Arc<dyn Kernel>) -> Builder {
        Builder { kernel, differences: Differences::default() }
    }

    /// The kernel, as `xsk` takes it.
    pub fn kernel(&self) -> Arc<dyn Kernel> {
        self.0.clone()
    }

    /// Carries entries, in both directions, on all relayed rings of bound sockets.
    pub fn pump(&self) {
        for socket in self.0.sockets.all() {
            socket.carry_in();
            socket.carry_out();
        }
    }
}

/// The sockets that are open.
#[derive(Default)]
struct Open(Mutex<Vec<Weak<Shared>>>);

impl Open {
    fn add(&self, socket: &Arc<Shared>) {
        let mut sockets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        sockets.retain(|socket| socket.strong_count() > 0);
        sockets.push(Arc::downgrade(socket));
    }

    fn all(&self) -> Vec<Arc<Shared>> {
        let sockets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        sockets.iter().filter_map(Weak::upgrade).collect()
    }

    /// The socket of a descriptor.
    fn of(&self, fd: RawFd) -> Option<Arc<Shared>> {
        self.all().into_iter().find(|socket| socket.raw.as_fd().as_raw_fd() == fd)
    }
}

struct Wrapped {
    kernel: Arc<dyn Kernel>,
    differences: Arc<Differences>,
    sockets: Arc<Open>,
}

impl fmt::Debug for Wrapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wrapper")
            .field("kernel", &self.kernel)
            .field("quirks", &self.differences.quirks)
            .field("relayed", &self.differences.relayed)
            .finish_non_exhaustive()
    }
}

impl Kernel for Wrapped {
    fn name(&self) -> &'static str {
        self.kernel.name()
    }

    fn id(&self) -> usize {
        self.kernel.id()
    }
}

// SAFETY: see `Socket`.
unsafe impl Sockets for Wrapped {
    fn socket(&self, kind: i32, protocol: i32) -> Result<Box<dyn RawSocket>, Errno> {
        let raw = self.differences.call(Call::Socket, None, || self.kernel.socket(kind, protocol))?;
        let shared = Arc::new(Shared {
            raw,
            differences: self.differences.clone(),
            sockets: self.sockets.clone(),
            state: Mutex::default(),
        });
        self.sockets.add(&shared);
        Ok(Box::new(Socket(shared)))
    }

    fn limits(&self) -> Limits {
        self.kernel.limits()
    }

    fn poll(&self, entries: &mut [PollEntry<'_>], timeout: Option<Duration>) -> Result<usize, Errno> {
        let sockets: Vec<_> = entries.iter().map(|entry| self.sockets.of(entry.fd.as_raw_fd())).collect();
        let open = || sockets.iter().flatten();
        self.differences.call(Call::Poll, Some(0), || {
            let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
            let mut left = timeout;
            loop {
                open().for_each(|socket| socket.carry_in());
                let found = self.kernel.poll(entries, left);
                open().for_each(|socket| socket.carry_out());
                let found = found?;
                for (entry, socket) in entries.iter_mut().zip(&sockets) {
                    if let Some(socket) = socket {
                        entry.revents = socket.without_lost(entry.revents);
                    }
                }
                let ready = entries.iter().filter(|entry| entry.revents != 0).count();
                if found == 0 || ready > 0 {
                    return Ok(ready);
                }
                left = deadline.map(|end| end.saturating_duration_since(Instant::now()));
            }
        })
    }

    fn holders(&self) -> Vec<Holder> {
        self.kernel.holders()
    }
}

/// What a wrapped socket is made of. Its handle owns it; the wrapper knows of it.
struct Shared {
    raw: Box<dyn RawSocket>,
    differences: Arc<Differences>,
    sockets: Arc<Open>,
    state: Mutex<SocketState>,
}

#[derive(Default)]
struct SocketState {
    /// The rings that this socket made, by their entries.
    entries: HashMap<RingKind, u32>,
    umem: Option<UmemReg>,
    /// Nothing is carried before: until then a program may take back what it put into a ring.
    bound: bool,
    relays: Relays,
    /// Descriptors of TX that were consumed as invalid here.
    tx_invalid: u64,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, SocketState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Carries what the program gave to the kernel, and tells the kernel what the program took.
    fn carry_in(&self) {
        let state = &mut *self.state();
        if state.bound {
            self.carry(state, RingKind::Fill);
            self.carry(state, RingKind::Tx);
            state.relays.settle();
        }
    }

    /// Carries what the kernel gave to the program, and tells the program what the kernel took.
    fn carry_out(&self) {
        let state = &mut *self.state();
        if state.bound {
            self.carry(state, RingKind::Rx);
            self.carry(state, RingKind::Completion);
            state.relays.settle();
            for (ring, ahead) in &self.differences.wild {
                state.relays.go_wild(*ring, *ahead);
            }
        }
    }

    fn carry(&self, state: &mut SocketState, ring: RingKind) {
        let SocketState { relays, umem, tx_invalid, .. } = state;
        let alter = |entry| self.alter(ring, entry, umem.as_ref());
        let invalid = match ring {
            RingKind::Fill => relays.fill.as_mut().map(|relay| relay.carry(alter)),
            RingKind::Rx => relays.rx.as_mut().map(|relay| relay.carry(alter)),
            RingKind::Tx => relays.tx.as_mut().map(|relay| relay.carry(alter)),
            RingKind::Completion => relays.completion.as_mut().map(|relay| relay.carry(alter)),
        };
        *tx_invalid += u64::from(invalid.unwrap_or(0));
    }

    /// What becomes of an entry on its way.
    fn alter(&self, ring: RingKind, entry: Descriptor, umem: Option<&UmemReg>) -> Vec<Altered> {
        let Some(umem) = umem else { return vec![Altered::Entry(entry)] };
        let mut entries = vec![entry];
        let mut tampers = self.differences.tampers.lock().unwrap_or_else(PoisonError::into_inner);
        for (_, tamper) in tampers.iter_mut().filter(|(of, _)| *of == ring) {
            entries = entries.into_iter().flat_map(|entry| tamper(entry, umem)).collect();
        }
        let drops = ring == RingKind::Tx && self.differences.has(Quirk::InvalidNeverCompleted);
        let judge =
            |entry| if drops && !is_valid(&entry, umem) { Altered::Invalid } else { Altered::Entry(entry) };
        entries.into_iter().map(judge).collect()
    }

    /// The program's mapping of a ring that is relayed.
    fn map_relayed(&self, ring: RingKind, length: usize) -> Result<Mapping, Errno> {
        // What is wrong with the call, the kernel finds.
        drop(self.raw.map(ring.page_offset(), length)?);
        let state = &mut *self.state();
        let entries = *state.entries.get(&ring).ok_or(Errno::OPNOTSUPP)?;
        state.relays.map(&*self.raw, ring, entries, length)
    }

    /// What `poll` found, without the packets that the kernel put into RX and that were lost on
    /// their way: whoever waits for packets goes on waiting.
    fn without_lost(&self, revents: i16) -> i16 {
        let lost = revents & POLLIN != 0 && self.state().relays.rx.as_ref().is_some_and(|rx| rx.is_empty());
        if lost { revents & !(POLLIN | POLLRDNORM) } else { revents }
    }

    /// Whether the program has left no room in COMPLETION.
    fn completion_is_full(&self) -> bool {
        let entries = self.state().entries.get(&RingKind::Completion).copied();
        entries.is_some_and(|entries| {
            relay::ring_of_kernel::<u64>(&*self.raw, RingKind::Completion, entries)
                .is_ok_and(|ring| ring.filled() == Some(entries))
        })
    }
}

/// Whether Linux would send a descriptor.
fn is_valid(desc: &Descriptor, umem: &UmemReg) -> bool {
    let flags = UmemFlags::from_bits_retain(umem.flags);
    let metadata =
        if flags.contains(UmemFlags::TX_METADATA_LEN) { u64::from(umem.tx_metadata_len) } else { 0 };
    let (chunk, len) = (u64::from(umem.chunk_size), u64::from(desc.len) + metadata);
    let in_place = if flags.contains(UmemFlags::UNALIGNED_CHUNK) {
        let base = desc.addr & XSK_UNALIGNED_BUF_ADDR_MASK;
        let start = (base + (desc.addr >> XSK_UNALIGNED_BUF_OFFSET_SHIFT)).checked_sub(metadata);
        len <= chunk && start.is_some_and(|start| start < umem.len && start + len <= umem.len)
    } else {
        let start = desc.addr.checked_sub(metadata);
        start.is_some_and(|start| start < umem.len && start % chunk + len <= chunk)
    };
    desc.len != 0 && in_place && desc.options & !(XDP_PKT_CONTD | XDP_TX_METADATA) == 0
}

/// A socket, as a program holds it.
struct Socket(Arc<Shared>);

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Wrapped").field(&self.0.raw).finish()
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.raw.as_fd()
    }
}

// SAFETY: rings that are not relayed are the wrapped kernel's. The memory of a relayed one is owned
// by its mapping, and the wrapper works its side through `xsk::ring`, by the protocol and under the
// socket's lock. It touches no memory of a UMEM. That entries are the ones that the other side gave
// is the promise of whoever asked for a change of them, which is unsafe.
unsafe impl RawSocket for Socket {
    fn register_umem(&self, registration: &UmemReg, optlen: usize, memory: &Mapping) -> Result<(), Errno> {
        let shared = &*self.0;
        shared.differences.call(Call::RegisterUmem, Some(()), || {
            shared.raw.register_umem(registration, optlen, memory)?;
            let mut known = *registration;
            if optlen < size_of::<UmemReg>() {
                (known.flags, known.tx_metadata_len) = (0, 0);
            }
            shared.state().umem = Some(known);
            Ok(())
        })
    }

    fn setsockopt(&self, level: i32, name: i32, value: &[u8]) -> Result<(), Errno> {
        let shared = &*self.0;
        if level != SOL_XDP {
            return shared.raw.setsockopt(level, name, value);
        }
        shared.differences.call(Call::SetOption(name), Some(()), || {
            shared.raw.setsockopt(level, name, value)?;
            if let (Some(ring), Some(entries)) =
                (KINDS.into_iter().find(|ring| ring.option() == name), value.first_chunk())
            {
                shared.state().entries.insert(ring, u32::from_ne_bytes(*entries));
            }
            Ok(())
        })
    }

    fn getsockopt(&self, level: i32, name: i32, value: &mut [u8]) -> Result<usize, Errno> {
        let Shared { raw, differences, .. } = &*self.0;
        if level != SOL_XDP {
            return raw.getsockopt(level, name, value);
        }
        differences.call(Call::GetOption(name), Some(0), || match name {
            XDP_STATISTICS => {
                let old = differences.has(Quirk::OldStatistics);
                let mut statistics = XdpStatistics::default();
                let most = if old { STATISTICS_V1_SIZE } else { size_of::<XdpStatistics>() };
                let most = most.min(value.len());
                let known = raw.getsockopt(level, name, &mut bytes_of_mut(&mut statistics)[..most])?;
                statistics.tx_invalid_descs += self.0.state().tx_invalid;
                differences.counts.iter().for_each(|count| count(&mut statistics));
                value[..known].copy_from_slice(&bytes_of(&statistics)[..known]);
                Ok(known)
            }
            XDP_MMAP_OFFSETS => {
                let old = differences.has(Quirk::OldOffsets);
                let most = if old { MMAP_OFFSETS_V1_SIZE.min(value.len()) } else { value.len() };
                raw.getsockopt(level, name, &mut value[..most])
            }
            _ => raw.getsockopt(level, name, value),
        })
    }

    fn map(&self, page_offset: u64, length: usize) -> Result<Mapping, Errno> {
        let shared = &*self.0;
        let relayed = shared.differences.relayed.iter().find(|ring| ring.page_offset() == page_offset);
        shared.differences.call(Call::Map, None, || match relayed {
            Some(ring) => shared.map_relayed(*ring, length),
            None => shared.raw.map(page_offset, length),
        })
    }

    fn bind(&self, address: &SockaddrXdp) -> Result<(), Errno> {
        let shared = &*self.0;
        let flags = BindFlags::from_bits_retain(address.flags);
        shared.differences.call(Call::Bind, Some(()), || {
            let newer = BindFlags::USE_NEED_WAKEUP | BindFlags::USE_SG;
            if shared.differences.has(Quirk::NoNeedWakeup) && flags.intersects(newer) {
                return Err(Errno::INVAL);
            }
            shared.raw.bind(address)?;
            if flags.contains(BindFlags::SHARED_UMEM) {
                let lender = shared.sockets.of(address.shared_umem_fd as RawFd);
                let umem = lender.and_then(|lender| lender.state().umem);
                shared.state().umem = umem;
            }
            shared.state().bound = true;
            Ok(())
        })
    }

    fn send(&self) -> Result<(), Errno> {
        let shared = &*self.0;
        shared.differences.call(Call::Send, Some(()), || {
            shared.carry_in();
            let mut sent = shared.raw.send();
            if sent == Err(Errno::AGAIN)
                && shared.differences.has(Quirk::SilentFullCompletion)
                && shared.completion_is_full()
            {
                sent = Ok(());
            }
            shared.carry_out();
            sent
        })
    }

    fn is_bound(&self) -> bool {
        self.0.raw.is_bound()
    }

    fn receive(&self) -> Result<(), Errno> {
        let shared = &*self.0;
        shared.differences.call(Call::Receive, Some(()), || {
            shared.carry_in();
            let received = shared.raw.receive();
            shared.carry_out();
            received
        })
    }

    fn poll(&self, events: i16, timeout: Option<Duration>) -> Result<i16, Errno> {
        let shared = &*self.0;
        shared.differences.call(Call::Poll, Some(0), || {
            let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
            let mut left = timeout;
            loop {
                shared.carry_in();
                let found = shared.raw.poll(events, left);
                shared.carry_out();
                let found = found?;
                let ready = shared.without_lost(found);
                if found == 0 || ready != 0 {
                    return Ok(ready);
                }
                left = deadline.map(|end| end.saturating_duration_since(Instant::now()));
            }
        })
    }
}

impl Programs for Wrapped {
    fn create_map(&self, spec: &MapSpec<'_>) -> Result<Handle, Errno> {
        self.differences.call(Call::CreateMap, None, || self.kernel.create_map(spec))
    }

    fn update_map(&self, map: BorrowedFd<'_>, key: &[u8], value: &[u8], flags: u64) -> Result<(), Errno> {
        self.differences.call(Call::UpdateMap, Some(()), || {
            if let (true, Some(fd)) = (self.differences.has(Quirk::MapNeedsRx), value.first_chunk()) {
                let socket = self.sockets.of(i32::from_ne_bytes(*fd));
                if socket.is_some_and(|socket| !socket.state().entries.contains_key(&RingKind::Rx)) {
                    return Err(Errno::NOBUFS);
                }
            }
            self.kernel.update_map(map, key, value, flags)
        })
    }

    fn delete_from_map(&self, map: BorrowedFd<'_>, key: &[u8]) -> Result<(), Errno> {
        self.differences.call(Call::DeleteFromMap, Some(()), || self.kernel.delete_from_map(map, key))
    }

    fn load_program(&self, spec: &ProgramSpec<'_>, log: &mut String) -> Result<Handle, Errno> {
        self.differences.call(Call::LoadProgram, None, || {
            if self.differences.has(Quirk::NoFrags) && spec.flags & HAS_FRAGS != 0 {
                return Err(Errno::INVAL);
            }
            self.kernel.load_program(spec, log)
        })
    }

    fn attach(&self, program: BorrowedFd<'_>, ifindex: u32, flags: u32) -> Result<Handle, Errno> {
        self.differences.call(Call::Attach, None, || self.kernel.attach(program, ifindex, flags))
    }

    fn pin(&self, object: BorrowedFd<'_>, path: &Path) -> Result<(), Errno> {
        self.differences.call(Call::Pin, Some(()), || self.kernel.pin(object, path))
    }

    fn open_pinned(&self, path: &Path) -> Result<Handle, Errno> {
        self.differences.call(Call::OpenPinned, None, || self.kernel.open_pinned(path))
    }

    fn open_by_id(&self, kind: Numbered, id: u32) -> Result<Handle, Errno> {
        self.differences.call(Call::OpenById(kind), None, || self.kernel.open_by_id(kind, id))
    }

    fn next_link(&self, after: u32) -> Result<u32, Errno> {
        self.differences.call(Call::NextLink, Some(0), || self.kernel.next_link(after))
    }

    fn program_info(&self, program: BorrowedFd<'_>) -> Result<ProgramInfo, Errno> {
        self.kernel.program_info(program)
    }

    fn map_info(&self, map: BorrowedFd<'_>) -> Result<MapInfo, Errno> {
        self.kernel.map_info(map)
    }

    fn link_info(&self, link: BorrowedFd<'_>) -> Result<LinkInfo, Errno> {
        self.kernel.link_info(link)
    }

    fn program_holders(&self, id: u32) -> Vec<ProgramHolder> {
        self.kernel.program_holders(id)
    }
}

impl Devices for Wrapped {
    fn index_of(&self, name: &str) -> Result<u32, Errno> {
        self.kernel.index_of(name)
    }

    fn interface(&self, index: u32) -> Result<InterfaceInfo, Errno> {
        let info = self.kernel.interface(index)?;
        // Drivers tell of their features from 6.3 on, long after 5.4.
        let features = info.features.filter(|_| !self.differences.has(Quirk::NoNeedWakeup));
        Ok(InterfaceInfo { features, ..info })
    }

    fn interfaces(&self) -> Result<Vec<u32>, Errno> {
        self.kernel.interfaces()
    }

    fn watch(&self, index: u32) -> Result<Box<dyn Watch>, Errno> {
        self.kernel.watch(index)
    }
}
