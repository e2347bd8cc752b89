//! AF_XDP sockets: build one, bind it to a queue, work its rings.
//!
//! ```
//! use xsk::{Socket, Umem};
//! # let sim = xsk_sim::Sim::new();
//! # let device = sim.device("sim0")?;
//! // With a real interface: let device = xsk::Device::open("eth0")?;
//! let (umem, mut pool) = Umem::builder().frames(256).chunk_size(2048).build()?;
//! let mut xsk = Socket::builder(&device).queue(0).open(&umem)?;
//! xsk.fill.refill(&mut pool, 128);
//!
//! let packet = pool.packet(0, 60).expect("frames are left");
//! xsk.tx.reserve(1).push(packet)?;
//! let _sent = xsk.socket.send()?;
//! # sim.run();
//! for frame in xsk.completion.take(64) {
//!     pool.put(frame);
//! }
//! assert_eq!(umem.census().program, 0);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The rings come as fields, to be used together or taken apart: receiving (RX with FILL) and
//! sending (TX with COMPLETION) can go to different threads. [`Socket`] is the handle for all
//! else; its clones can be anywhere.
//!
//! # Several queues
//!
//! A NIC spreads what arrives over its queues, and a socket gets what arrives on its own: to get
//! all, open a socket for each. They can share one UMEM, in which case a packet that came in by one
//! can leave by another; one program serves them all. With a thread for each socket, each takes a
//! pool of its own ([`Umem::pool`]).
//!
//! ```no_run
//! use xsk::xdp::{AttachMode, DefaultProgram};
//! use xsk::{Device, Interest, Socket, Umem};
//!
//! fn main() -> xsk::Result<()> {
//!     let device = Device::open("eth1")?;
//!     let program = DefaultProgram::attach(&device, AttachMode::Best)?;
//!     let queues = device.queues()?;
//!     let (umem, mut pool) = Umem::builder().frames(queues * 2048).build()?;
//!     std::thread::scope(|threads| {
//!         for queue in 0..queues {
//!             let mut xsk =
//!                 Socket::builder(&device).queue(queue).fill_from(&mut pool, 2048).open_rx(&umem)?;
//!             program.insert(&xsk.socket)?;
//!             threads.spawn(move || -> xsk::Result<()> {
//!                 loop {
//!                     xsk.socket.wait(Interest::Rx, None)?;
//!                     xsk.fill.extend(xsk.rx.take(64), |packet| {
//!                         println!("queue {queue}: {} bytes", packet.len());
//!                         packet.into_frame()
//!                     });
//!                 }
//!             });
//!         }
//!         Ok(())
//!     })
//! }
//! ```
//!
//! One thread for several sockets takes from each ring in turn, and waits with `poll` on their
//! descriptors ([`AsFd`]) when all are empty.

use core::fmt;
use core::mem::size_of;
use core::ptr::NonNull;
use core::time::Duration;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::abi::{
    self, AF_XDP, BindFlags, MmapOffsets, RingKind, RingOffset, SOL_XDP, SockaddrXdp, UmemReg, XdpStatistics,
};
use crate::device::{Device, DeviceInfo};
use crate::error::{Cause, Doing, Error, Result, general};
use crate::kernel::{Errno, Mapping, POLLERR, POLLIN, POLLOUT, RawSocket};
use crate::ring::RingMemory;
use crate::rings::{CompletionRing, FillRing, RxRing, TxRing};
use crate::sync::AtomicU32;
use crate::umem::{Member, Pair, Pool, Umem, max_headroom};

/// The most entries that a ring is asked for. The kernel has no limit of its own: it would try to
/// find 16 GiB.
pub const MAX_RING_ENTRIES: u32 = 1 << 20;

/// The least TX budget that the kernel takes, and what it is unless told otherwise.
const MIN_TX_BUDGET: u32 = 32;

/// `SOCK_RAW`.
const SOCK_RAW: i32 = 3;

/// Whether packets are copied between the driver and the UMEM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Mode {
    /// Zero copy where the driver can, else copy.
    #[default]
    Any,
    /// The kernel copies every packet. Works on every interface.
    Copy,
    /// The NIC reads and writes the UMEM itself, or the socket is not made.
    ZeroCopy,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Any => "any",
            Self::Copy => "copy",
            Self::ZeroCopy => "zero-copy",
        })
    }
}

/// A bound AF_XDP socket. Clones are handles to the same socket; it is closed with the last of
/// them and of its rings.
#[derive(Clone)]
pub struct Socket(Arc<Shared>);

struct Shared {
    raw: Arc<dyn RawSocket>,
    device: Device,
    queue: u32,
    zero_copy: bool,
    /// There is an RX ring.
    rx: bool,
    /// Entries of TX, where there is one.
    tx: Option<u32>,
    /// FILL of a socket that only sends: it holds the frames that a driver wanted there.
    _fill: Option<Mutex<FillRing>>,
}

/// A socket that receives and sends, with its four rings.
#[derive(Debug)]
pub struct RxTx {
    /// The handle: wake, wait, statistics.
    pub socket: Socket,
    /// Free frames, to receive into.
    pub fill: FillRing,
    /// Received packets.
    pub rx: RxRing,
    /// Packets to send.
    pub tx: TxRing,
    /// Sent frames.
    pub completion: CompletionRing,
}

/// A socket that only receives.
#[derive(Debug)]
pub struct RxOnly {
    /// The handle: wake, wait, statistics.
    pub socket: Socket,
    /// Free frames, to receive into.
    pub fill: FillRing,
    /// Received packets.
    pub rx: RxRing,
}

/// A socket that only sends. It needs no program, and its FILL ring is empty.
#[derive(Debug)]
pub struct TxOnly {
    /// The handle: wake, wait, statistics.
    pub socket: Socket,
    /// Packets to send.
    pub tx: TxRing,
    /// Sent frames.
    pub completion: CompletionRing,
}

/// What became of a [`send`](Socket::send).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "after anything but `Done` something is left in TX"]
pub enum Sent {
    /// The kernel took all that was in TX, or has it under way. Two exceptions show in
    /// [`TxRing::pending`]: in copy mode every kernel stops at an invalid descriptor, and older ones
    /// also where COMPLETION is full, without a word.
    Done,
    /// Something is left in TX: take frames from COMPLETION, and send again. In copy mode a send
    /// transmits 32 packets at most unless the budget was raised.
    Again,
    /// The driver dropped a packet (`EBUSY`): it is completed and lost, and the rest of TX waits
    /// for the next send. veth does so for packets below 14 bytes or above its MTU.
    Dropped,
}

/// What a [`wait`](Socket::wait) found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ready {
    /// RX has packets.
    pub rx: bool,
    /// TX is at most half full.
    pub tx: bool,
}

/// What to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// Packets in RX.
    Rx,
    /// Room in TX.
    Tx,
    /// Either.
    Both,
}

/// A socket's counters, since it was made. What the kernel doesn't count is absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Statistics {
    /// Packets dropped because FILL was empty or they were longer than a frame; before 5.9 also
    /// because RX was full.
    pub rx_dropped: u64,
    /// Packets dropped because RX was full (5.9).
    pub rx_ring_full: Option<u64>,
    /// Packets dropped because FILL was empty (5.9); these are in `rx_dropped` as well.
    pub rx_fill_ring_empty: Option<u64>,
    /// Descriptors in TX that the kernel refused.
    pub tx_invalid: u64,
    /// Times that a send found TX drained (5.9): a sign of an idle sender, not of loss.
    pub tx_ring_empty: Option<u64>,
}

impl Socket {
    /// Begins a socket on `device`: queue 0, rings of 2048, any mode, unless told otherwise.
    pub fn builder(device: &Device) -> SocketBuilder<'static> {
        SocketBuilder {
            device: device.clone(),
            queue: 0,
            rx: 2048,
            tx: 2048,
            fill: 2048,
            completion: 2048,
            mode: Mode::Any,
            need_wakeup: true,
            release_timeout: Duration::from_secs(1),
            fill_from: None,
        }
    }

    /// The interface.
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// The queue.
    pub fn queue(&self) -> u32 {
        self.0.queue
    }

    /// Whether the socket became zero copy (as the kernel says: `XDP_OPTIONS`, 5.3).
    pub fn is_zero_copy(&self) -> bool {
        self.0.zero_copy
    }

    /// The mode that the socket became: [`Mode::Copy`] or [`Mode::ZeroCopy`].
    pub fn mode(&self) -> Mode {
        if self.0.zero_copy { Mode::ZeroCopy } else { Mode::Copy }
    }

    pub(crate) fn raw(&self) -> &dyn RawSocket {
        &*self.0.raw
    }

    /// Has the kernel send what is in TX (`sendto`): in copy mode this is what transmits; in zero
    /// copy it wakes the driver. It never waits.
    ///
    /// # Errors
    ///
    /// [`Cause::InterfaceDown`], [`Cause::InterfaceGone`], [`Cause::NeedsProgram`]. What is in TX
    /// stays there. [`Cause::NoTxRing`] on a socket that only receives.
    #[inline]
    pub fn send(&self) -> Result<Sent> {
        match self.0.raw.send() {
            Ok(()) => Ok(Sent::Done),
            Err(Errno::AGAIN) => Ok(Sent::Again),
            // Memory is short, or there is no TX at all.
            Err(Errno::NOBUFS) if self.0.tx.is_some() => Ok(Sent::Again),
            Err(Errno::BUSY) => Ok(Sent::Dropped),
            Err(errno) => Err(self.gone(self.sending(), errno)),
        }
    }

    /// Has the driver look at FILL (`recvfrom`), when [`FillRing::needs_wakeup`] says so. It never
    /// waits.
    ///
    /// # Errors
    ///
    /// [`Cause::InterfaceDown`], [`Cause::InterfaceGone`].
    #[inline]
    pub fn wake_rx(&self) -> Result<()> {
        match self.0.raw.receive() {
            Ok(()) | Err(Errno::AGAIN | Errno::NOBUFS | Errno::BUSY) => Ok(()),
            Err(errno) => Err(self.gone(self.waiting(), errno)),
        }
    }

    /// Waits until RX has packets or TX has room (`poll`), or `timeout` has passed; `None` waits
    /// without end. The kernel wakes the driver by itself while it waits, for RX as for TX, so
    /// before blocking this is the way.
    ///
    /// A signal ends the wait early, with nothing ready. That the interface is down or gone is told
    /// when nothing became ready in the time; a timeout of zero does not ask.
    ///
    /// # Errors
    ///
    /// [`Cause::InterfaceDown`], [`Cause::InterfaceGone`], [`Cause::NeedsProgram`];
    /// [`Cause::NoTxRing`] for [`Interest::Tx`] of a socket that only receives; [`Cause::Deadlock`]
    /// on a stepped simulated kernel where nothing could end the wait.
    pub fn wait(&self, interest: Interest, timeout: Option<Duration>) -> Result<Ready> {
        let events = match interest {
            // For a ring that is not there the kernel would wait for ever.
            Interest::Rx if !self.0.rx => return Err(Error::new(self.waiting(), Cause::NoRxRing)),
            Interest::Tx if self.0.tx.is_none() => return Err(Error::new(self.waiting(), Cause::NoTxRing)),
            Interest::Rx => POLLIN,
            Interest::Tx => POLLOUT,
            Interest::Both => POLLIN | POLLOUT,
        };
        match self.0.raw.poll(events, timeout) {
            Ok(found) if found & POLLERR != 0 => {
                Err(self.gone(self.waiting(), self.unbound().unwrap_or(Errno::NXIO)))
            }
            Ok(0) if timeout.is_some_and(|timeout| !timeout.is_zero()) => match self.unbound() {
                Some(errno) => Err(self.gone(self.waiting(), errno)),
                None => Ok(Ready::default()),
            },
            Ok(found) => Ok(Ready { rx: found & POLLIN != 0, tx: found & POLLOUT != 0 }),
            Err(Errno::INTR) => Ok(Ready::default()),
            Err(errno) => Err(self.gone(self.waiting(), errno)),
        }
    }

    /// Whether the socket's interface is down or gone, of which `poll` says nothing.
    #[cold]
    fn unbound(&self) -> Option<Errno> {
        // The kernel looks for that before it looks for an RX ring.
        self.0.raw.receive().err().filter(|errno| matches!(*errno, Errno::NETDOWN | Errno::NXIO))
    }

    fn sending(&self) -> Doing {
        Doing::Send { interface: self.0.device.name().into(), queue: self.0.queue }
    }

    fn waiting(&self) -> Doing {
        Doing::Wait { interface: self.0.device.name().into(), queue: self.0.queue }
    }

    #[cold]
    fn gone(&self, doing: Doing, errno: Errno) -> Error {
        let cause = match errno {
            Errno::NETDOWN => Cause::InterfaceDown,
            Errno::INVAL | Errno::NXIO if self.lacks_program() => {
                let driver = self.0.device.info().ok().and_then(|i| i.driver().map(str::to_owned));
                Cause::NeedsProgram { driver }
            }
            Errno::NXIO | Errno::NODEV => Cause::InterfaceGone,
            Errno::NOBUFS if self.0.tx.is_none() => Cause::NoTxRing,
            Errno::DEADLK => Cause::Deadlock,
            errno => general(errno),
        };
        Error::with_errno(doing, cause, errno)
    }

    /// In zero copy, several drivers answer a wake-up without a program so: `EINVAL` or `ENXIO`.
    #[cold]
    fn lacks_program(&self) -> bool {
        let lacks = |info: DeviceInfo| info.is_up() && info.programs().is_empty();
        self.0.zero_copy && self.0.device.info().is_ok_and(lacks)
    }

    /// The socket's counters.
    ///
    /// # Errors
    ///
    /// None that a bound socket is known to meet.
    pub fn statistics(&self) -> Result<Statistics> {
        let mut raw = XdpStatistics::default();
        let len = self
            .0
            .raw
            .getsockopt(SOL_XDP, abi::XDP_STATISTICS, abi::bytes_of_mut(&mut raw))
            .map_err(|errno| Error::with_errno(Doing::ReadSocket, Cause::Unexpected(errno), errno))?;
        let newer = |value| (len >= size_of::<XdpStatistics>()).then_some(value);
        Ok(Statistics {
            rx_dropped: raw.rx_dropped,
            rx_ring_full: newer(raw.rx_ring_full),
            rx_fill_ring_empty: newer(raw.rx_fill_ring_empty_descs),
            tx_invalid: raw.tx_invalid_descs,
            tx_ring_empty: newer(raw.tx_ring_empty_descs),
        })
    }

    /// How many packets one [`send`](Self::send) transmits at most in copy mode (6.17; 32 unless
    /// told otherwise): from 32 to the size of TX.
    ///
    /// # Errors
    ///
    /// [`Cause::NoTxRing`], [`Cause::TxBudget`], [`Cause::KernelTooOld`]; the budget is as it was
    /// then.
    pub fn set_tx_budget(&self, packets: u32) -> Result<()> {
        self.0.raw.setsockopt(SOL_XDP, abi::XDP_MAX_TX_SKB_BUDGET, &packets.to_ne_bytes()).map_err(|errno| {
            let cause = match (errno, self.0.tx) {
                (Errno::NOPROTOOPT, _) => {
                    Cause::KernelTooOld { feature: "the TX budget option", since: "6.17" }
                }
                (Errno::ACCESS, None) => Cause::NoTxRing,
                (Errno::ACCESS, Some(max)) => Cause::TxBudget { packets, min: MIN_TX_BUDGET, max },
                (errno, _) => general(errno),
            };
            Error::with_errno(Doing::SetTxBudget { packets }, cause, errno)
        })
    }
}

impl AsFd for Socket {
    /// The socket's descriptor, for `poll` and `epoll`. Note that `epoll_wait` wakes neither FILL
    /// nor TX: do so before you wait.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.raw.as_fd()
    }
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Socket")
            .field("interface", &self.0.device.name())
            .field("queue", &self.0.queue)
            .field("mode", &self.mode())
            .finish()
    }
}

/// Makes a socket.
#[derive(Debug)]
#[must_use = "nothing is made before one of the `open` functions"]
pub struct SocketBuilder<'p> {
    device: Device,
    queue: u32,
    rx: u32,
    tx: u32,
    fill: u32,
    completion: u32,
    mode: Mode,
    need_wakeup: bool,
    release_timeout: Duration,
    fill_from: Option<(&'p mut Pool, u32)>,
}

/// A bound socket with the rings that were asked for, before it is given its shape.
struct Bound {
    shared: Shared,
    fill: FillRing,
    rx: Option<RxRing>,
    tx: Option<TxRing>,
    completion: Option<CompletionRing>,
}

/// What the rings of a socket are mapped from.
struct Maps<'a> {
    raw: &'a Arc<dyn RawSocket>,
    offsets: MmapOffsets,
    has_flags: bool,
}

impl<'p> SocketBuilder<'p> {
    /// The queue to bind to (default 0).
    pub fn queue(mut self, queue: u32) -> Self {
        self.queue = queue;
        self
    }

    /// Entries of all four rings, a power of two (default 2048).
    pub fn ring_size(self, entries: u32) -> Self {
        self.rx_size(entries).tx_size(entries).fill_size(entries).completion_size(entries)
    }

    /// Entries of RX.
    pub fn rx_size(mut self, entries: u32) -> Self {
        self.rx = entries;
        self
    }

    /// Entries of TX.
    pub fn tx_size(mut self, entries: u32) -> Self {
        self.tx = entries;
        self
    }

    /// Entries of FILL.
    pub fn fill_size(mut self, entries: u32) -> Self {
        self.fill = entries;
        self
    }

    /// Entries of COMPLETION. At least as many as TX, or sending stalls on it.
    pub fn completion_size(mut self, entries: u32) -> Self {
        self.completion = entries;
        self
    }

    /// Copy, zero copy, or whichever the driver can (the default).
    pub fn mode(mut self, mode: Mode) -> Self {
        self.mode = mode;
        self
    }

    /// Whether the kernel tells when it needs to be woken (5.4; on by default). Without it the
    /// FILL flag is never set and the TX flag always.
    pub fn need_wakeup(mut self, on: bool) -> Self {
        self.need_wakeup = on;
        self
    }

    /// How long to try a queue that is busy (default one second); other sockets that are opened on
    /// the same UMEM wait meanwhile. The kernel releases a queue some
    /// milliseconds after its last socket is closed.
    pub fn release_timeout(mut self, timeout: Duration) -> Self {
        self.release_timeout = timeout;
        self
    }

    /// Puts up to `frames` frames from `pool` into FILL before the socket is bound.
    ///
    /// Fill it this way rather than later: in zero copy a driver takes its first frames when the
    /// queue is started, and filled later it may have to be woken first ([`Socket::wake_rx`]). A
    /// socket that only sends needs none, except that some drivers (ice, i40e) start a zero-copy
    /// queue only where FILL has something.
    pub fn fill_from(self, pool: &'p mut Pool, frames: u32) -> Self {
        Self { fill_from: Some((pool, frames)), ..self }
    }

    /// Makes a socket that receives and sends.
    ///
    /// # Errors
    ///
    /// Of making a socket: [`Cause::MissingCapability`], [`Cause::Forbidden`], [`Cause::NoAfXdp`],
    /// [`Cause::TooManyFiles`]. Of the UMEM: [`Cause::LockedMemory`], [`Cause::Headroom`],
    /// [`Cause::ChunkSize`], [`Cause::OutOfMemory`], [`Cause::OtherKernel`],
    /// [`Cause::TooManySockets`]. Of the rings: [`Cause::RingNotPowerOfTwo`],
    /// [`Cause::RingTooLarge`], [`Cause::OutOfMemory`]. Of binding: [`Cause::InterfaceGone`],
    /// [`Cause::InterfaceDown`], [`Cause::NoSuchQueue`], [`Cause::QueueBusy`],
    /// [`Cause::QueueTaken`], [`Cause::ZeroCopyUnsupported`], [`Cause::ZeroCopyMtu`],
    /// [`Cause::ZeroCopyRefused`], [`Cause::SharedMode`], [`Cause::KernelTooOld`]. Frames that were
    /// to fill FILL are back in their pool then.
    pub fn open(self, umem: &Umem) -> Result<RxTx> {
        match self.bind(umem, true, true)? {
            Bound { shared, fill, rx: Some(rx), tx: Some(tx), completion: Some(completion) } => {
                Ok(RxTx { socket: Socket(Arc::new(shared)), fill, rx, tx, completion })
            }
            _ => unreachable!("all rings were asked for"),
        }
    }

    /// Makes a socket that only receives.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn open_rx(self, umem: &Umem) -> Result<RxOnly> {
        match self.bind(umem, true, false)? {
            Bound { shared, fill, rx: Some(rx), .. } => {
                Ok(RxOnly { socket: Socket(Arc::new(shared)), fill, rx })
            }
            _ => unreachable!("RX was asked for"),
        }
    }

    /// Makes a socket that only sends. It attaches no program, and FILL stays empty unless
    /// [`fill_from`](Self::fill_from) says otherwise: a driver would take a filled one for the wish
    /// to receive. Frames that are put there stay for as long as the socket lives.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn open_tx(self, umem: &Umem) -> Result<TxOnly> {
        match self.bind(umem, false, true)? {
            Bound { shared, fill, tx: Some(tx), completion: Some(completion), .. } => {
                let shared = Shared { _fill: Some(Mutex::new(fill)), ..shared };
                Ok(TxOnly { socket: Socket(Arc::new(shared)), tx, completion })
            }
            _ => unreachable!("TX was asked for"),
        }
    }

    /// Socket, UMEM, rings, bind: in the order that the kernel wants.
    #[allow(unsafe_code)]
    fn bind(mut self, umem: &Umem, rx: bool, tx: bool) -> Result<Bound> {
        let fill_from = self.fill_from.take();
        let kernel = self.device.kernel();
        let binding = || Doing::Bind { interface: self.device.name().into(), queue: self.queue };
        let sizes = [
            (RingKind::Rx, self.rx, rx),
            (RingKind::Tx, self.tx, tx),
            (RingKind::Fill, self.fill, true),
            (RingKind::Completion, self.completion, true),
        ];
        for (ring, entries, _) in sizes.iter().filter(|s| s.2) {
            check_size(*ring, *entries)?;
        }
        if self.queue > u32::from(u16::MAX) {
            // The kernel would cut it to 16 bits and bind another queue.
            let cause = match self.device.queues() {
                Ok(queues) => Cause::NoSuchQueue { queue: self.queue, queues },
                Err(error) => error.cause().clone(),
            };
            return Err(Error::new(binding(), cause));
        }

        // Held throughout: of two threads, one registers the memory and the other shares it.
        let mut members = lock_members(umem);
        // A socket whose interface is gone is unbound for good, and lends nothing any more; its rings
        // can't be mapped then.
        let is_bound = |socket: Arc<dyn RawSocket>| {
            socket.map(abi::XDP_UMEM_PGOFF_COMPLETION_RING, 1).err() != Some(Errno::BUSY)
        };
        members.retain(|m| m.socket.upgrade().is_some_and(is_bound));
        let here = kernel.id();
        if members.iter().any(|m| m.kernel != here) {
            return Err(Error::new(binding(), Cause::OtherKernel { what: "the UMEM" }));
        }
        if members.iter().any(|m| m.ifindex == self.device.index() && m.queue == self.queue) {
            return Err(Error::new(binding(), Cause::QueueTaken));
        }
        let lender = members.iter().find_map(|m| Some((m.socket.upgrade()?, m.zero_copy)));
        if let Some((_, zero_copy)) = lender
            && matches!((self.mode, zero_copy), (Mode::Copy, true) | (Mode::ZeroCopy, false))
        {
            return Err(Error::new(binding(), Cause::SharedMode { zero_copy }));
        }
        let lender = lender.map(|(socket, _)| socket);

        let raw: Arc<dyn RawSocket> = match kernel.socket(SOCK_RAW, 0) {
            Ok(raw) => raw.into(),
            Err(errno) => {
                let cause = match errno {
                    Errno::PERM if !kernel.limits().net_raw => {
                        Cause::MissingCapability { capability: "CAP_NET_RAW" }
                    }
                    Errno::AFNOSUPPORT => Cause::NoAfXdp,
                    errno => general(errno),
                };
                return Err(Error::with_errno(Doing::MakeSocket, cause, errno));
            }
        };
        if lender.is_none() {
            self.register(umem, &*raw)?;
        }
        for (ring, entries, _) in sizes.iter().filter(|s| s.2) {
            raw.setsockopt(SOL_XDP, ring.option(), &entries.to_ne_bytes()).map_err(|errno| {
                let bytes = u64::from(*entries) * ring.entry_size() as u64;
                let cause = match errno {
                    Errno::NOMEM | Errno::NOBUFS => Cause::OutOfMemory { bytes },
                    errno => general(errno),
                };
                Error::with_errno(Doing::MakeRing { ring: *ring, entries: *entries }, cause, errno)
            })?;
        }
        let (offsets, has_flags) = mmap_offsets(&*raw)?;
        let pair =
            Pair::new(umem).ok_or_else(|| Error::new(binding(), Cause::TooManySockets { max: Pair::MAX }))?;
        let maps = Maps { raw: &raw, offsets, has_flags };
        // SAFETY: fresh rings of a socket that nothing else knows; each is mapped once.
        let (mut fill, rx_ring, tx_ring, completion) = unsafe {
            (
                FillRing::over(maps.ring(RingKind::Fill, self.fill)?, &pair),
                rx.then(|| Ok(RxRing::over(maps.ring(RingKind::Rx, self.rx)?, &pair))).transpose()?,
                tx.then(|| Ok(TxRing::over(maps.ring(RingKind::Tx, self.tx)?, &pair))).transpose()?,
                tx.then(|| {
                    Ok(CompletionRing::over(maps.ring(RingKind::Completion, self.completion)?, &pair))
                })
                .transpose()?,
            )
        };
        let bound = match fill_from {
            None => self.bind_with_patience(&*raw, lender.as_deref()),
            Some((pool, frames)) => {
                fill.refill(pool, frames);
                self.bind_with_patience(&*raw, lender.as_deref()).inspect_err(|_| {
                    // SAFETY: the socket is not bound, so the kernel takes nothing from FILL.
                    unsafe { fill.withdraw_into(pool) };
                })
            }
        };
        if let Err((errno, waited)) = bound {
            // What this socket has mapped would be taken for its rival's.
            drop((fill, rx_ring, tx_ring, completion));
            let cause = self.why_not(errno, lender.as_deref(), waited, umem);
            return Err(Error::with_errno(binding(), cause, errno));
        }
        let zero_copy = self.mode == Mode::ZeroCopy || is_zero_copy(&*raw);
        members.push(Member {
            socket: Arc::downgrade(&raw),
            kernel: here,
            ifindex: self.device.index(),
            queue: self.queue,
            zero_copy,
        });
        let shared = Shared {
            raw,
            device: self.device.clone(),
            queue: self.queue,
            zero_copy,
            rx,
            tx: tx.then_some(self.tx),
            _fill: None,
        };
        Ok(Bound { shared, fill, rx: rx_ring, tx: tx_ring, completion })
    }

    fn register(&self, umem: &Umem, raw: &dyn RawSocket) -> Result<()> {
        let memory = umem.core().memory();
        let registration = UmemReg {
            addr: memory.base().as_ptr().expose_provenance() as u64,
            len: umem.size(),
            chunk_size: umem.chunk_size(),
            headroom: umem.headroom(),
            flags: 0,
            tx_metadata_len: 0,
        };
        raw.register_umem(&registration, size_of::<UmemReg>(), memory).map_err(|errno| {
            let limits = self.device.kernel().limits();
            let chunk = umem.chunk_size();
            let cause = match errno {
                Errno::NOBUFS => {
                    Cause::LockedMemory { bytes: umem.size(), limit: limits.memlock.unwrap_or(0) }
                }
                Errno::NOMEM => Cause::OutOfMemory { bytes: umem.size() },
                Errno::FAULT => Cause::MemoryRefused,
                Errno::INVAL if chunk as usize > limits.page_size => Cause::ChunkSize {
                    chunk,
                    min: abi::XDP_UMEM_MIN_CHUNK_SIZE,
                    max: limits.page_size as u32,
                },
                Errno::INVAL if umem.headroom() > max_headroom(chunk) => {
                    Cause::Headroom { headroom: umem.headroom(), max: max_headroom(chunk), chunk }
                }
                errno => general(errno),
            };
            Error::with_errno(Doing::RegisterUmem { bytes: umem.size() }, cause, errno)
        })
    }

    /// Binds, and tries again for a while where the queue is still being released. Where it fails,
    /// the kernel's answer and how long was tried.
    fn bind_with_patience(
        &self,
        raw: &dyn RawSocket,
        lender: Option<&dyn RawSocket>,
    ) -> Result<(), (Errno, Duration)> {
        let mut flags = BindFlags::empty();
        if lender.is_some() {
            // Everything else is taken over from the lender, and refused if it is said again.
            flags |= BindFlags::SHARED_UMEM;
        } else {
            flags.set(BindFlags::COPY, self.mode == Mode::Copy);
            flags.set(BindFlags::ZEROCOPY, self.mode == Mode::ZeroCopy);
            flags.set(BindFlags::USE_NEED_WAKEUP, self.need_wakeup);
        }
        let address = SockaddrXdp {
            family: AF_XDP,
            flags: flags.bits(),
            ifindex: self.device.index(),
            queue_id: self.queue,
            shared_umem_fd: lender.map_or(0, |l| l.as_fd().as_raw_fd() as u32),
        };
        let start = Instant::now();
        let mut pause = Duration::from_millis(1);
        loop {
            match raw.bind(&address) {
                Ok(()) => return Ok(()),
                Err(Errno::BUSY) if start.elapsed() < self.release_timeout => {
                    std::thread::sleep(pause.min(self.release_timeout.saturating_sub(start.elapsed())));
                    pause = (pause * 2).min(Duration::from_millis(50));
                }
                Err(errno) => return Err((errno, start.elapsed())),
            }
        }
    }

    /// The cause behind the kernel's answer, in the order of its checks.
    #[cold]
    fn why_not(&self, errno: Errno, lender: Option<&dyn RawSocket>, waited: Duration, umem: &Umem) -> Cause {
        match errno {
            Errno::NODEV => return Cause::InterfaceGone,
            Errno::BUSY => return Cause::QueueBusy { holders: self.device.kernel().holders(), waited },
            Errno::NETDOWN => return Cause::InterfaceDown,
            Errno::NOMEM | Errno::NOBUFS => return Cause::OutOfMemory { bytes: umem.size() },
            _ => {}
        }
        let info = match self.device.info() {
            Ok(info) => info,
            Err(error) if *error.cause() == Cause::InterfaceGone => return Cause::InterfaceGone,
            // Nothing is known that would explain the answer.
            Err(_) => return general(errno),
        };
        let driver = info.driver().map(str::to_owned);
        let room = umem.max_packet();
        match errno {
            // What shares a UMEM in zero copy needs it as well, without having asked.
            Errno::OPNOTSUPP if lender.is_some_and(is_zero_copy) => Cause::SharedMode { zero_copy: true },
            Errno::OPNOTSUPP if self.mode == Mode::ZeroCopy => Cause::ZeroCopyUnsupported { driver },
            Errno::INVAL if self.queue >= info.queues() => {
                Cause::NoSuchQueue { queue: self.queue, queues: info.queues() }
            }
            // Kernels that tell of features (6.3) can share.
            Errno::INVAL | Errno::OPNOTSUPP if lender.is_some() && info.xdp_features().is_none() => {
                Cause::KernelTooOld { feature: "a UMEM shared between queues", since: "5.10" }
            }
            // Ethernet header, checksum and two VLAN tags come on top of the MTU.
            Errno::INVAL if self.mode == Mode::ZeroCopy && info.mtu() + 26 > room => {
                Cause::ZeroCopyMtu { mtu: info.mtu(), room }
            }
            _ if self.mode == Mode::ZeroCopy => Cause::ZeroCopyRefused { driver },
            // Kernels that tell of features (6.3) know the flag.
            Errno::INVAL if self.need_wakeup && info.xdp_features().is_none() => {
                Cause::KernelTooOld { feature: "need_wakeup", since: "5.4" }
            }
            errno => general(errno),
        }
    }
}

fn lock_members(umem: &Umem) -> MutexGuard<'_, Vec<Member>> {
    umem.core().members.lock().unwrap_or_else(PoisonError::into_inner)
}

fn check_size(ring: RingKind, entries: u32) -> Result<()> {
    let doing = Doing::MakeRing { ring, entries };
    if !entries.is_power_of_two() {
        return Err(Error::new(doing, Cause::RingNotPowerOfTwo { entries }));
    }
    if entries > MAX_RING_ENTRIES {
        return Err(Error::new(doing, Cause::RingTooLarge { entries, max: MAX_RING_ENTRIES }));
    }
    Ok(())
}

/// Where the rings' fields are, and whether the kernel has flags words (5.4).
fn mmap_offsets(raw: &dyn RawSocket) -> Result<(MmapOffsets, bool)> {
    let failed = |errno| Error::with_errno(Doing::ReadSocket, Cause::Unexpected(errno), errno);
    let mut offsets = MmapOffsets::default();
    let len =
        raw.getsockopt(SOL_XDP, abi::XDP_MMAP_OFFSETS, abi::bytes_of_mut(&mut offsets)).map_err(failed)?;
    if len >= size_of::<MmapOffsets>() {
        return Ok((offsets, true));
    }
    if len != abi::MMAP_OFFSETS_V1_SIZE {
        return Err(failed(Errno::INVAL));
    }
    // The old form: three words a ring.
    let bytes = abi::bytes_of(&offsets);
    let word = |i: usize| u64::from_ne_bytes(bytes[i * 8..][..8].try_into().unwrap_or_default());
    let ring = |i| RingOffset { producer: word(i), consumer: word(i + 1), desc: word(i + 2), flags: 0 };
    Ok((MmapOffsets { rx: ring(0), tx: ring(3), fr: ring(6), cr: ring(9) }, false))
}

/// What the socket became; kernels before 5.3 can't say, and nearly all of their drivers copy.
fn is_zero_copy(raw: &dyn RawSocket) -> bool {
    let mut flags = 0u32;
    let len = raw.getsockopt(SOL_XDP, abi::XDP_OPTIONS, abi::bytes_of_mut(&mut flags));
    len == Ok(4) && flags & abi::XDP_OPTIONS_ZEROCOPY != 0
}

/// A ring's mapping, and the flags word of kernels that have none.
struct RingOwner {
    _mapping: Mapping,
    flags: AtomicU32,
    /// The socket lives as long as any of its rings.
    _socket: Arc<dyn RawSocket>,
}

impl Maps<'_> {
    /// Maps a ring.
    #[allow(unsafe_code)]
    fn ring<T: Copy>(&self, kind: RingKind, entries: u32) -> Result<RingMemory<T>> {
        let failed = |errno| {
            let cause = match errno {
                Errno::BUSY => Cause::InterfaceGone,
                Errno::NOMEM | Errno::AGAIN => {
                    Cause::OutOfMemory { bytes: u64::from(entries) * kind.entry_size() as u64 }
                }
                errno => general(errno),
            };
            Error::with_errno(Doing::MakeRing { ring: kind, entries }, cause, errno)
        };
        let at = match kind {
            RingKind::Rx => self.offsets.rx,
            RingKind::Tx => self.offsets.tx,
            RingKind::Fill => self.offsets.fr,
            RingKind::Completion => self.offsets.cr,
        };
        let bytes = entries as usize * size_of::<T>();
        let len = usize::try_from(at.desc)
            .ok()
            .and_then(|start| start.checked_add(bytes))
            .ok_or_else(|| failed(Errno::INVAL))?;
        let mapping = self.raw.map(kind.page_offset(), len).map_err(failed)?;
        let fits = |offset: u64, bytes: usize, align: usize| {
            let end = usize::try_from(offset).ok().and_then(|offset| offset.checked_add(bytes));
            end.is_some_and(|end| end <= mapping.len())
                && (mapping.base().addr().get() + offset as usize).is_multiple_of(align)
        };
        if !(fits(at.producer, 4, 4)
            && fits(at.consumer, 4, 4)
            && fits(at.flags, 4, 4)
            && fits(at.desc, bytes, align_of::<T>()))
        {
            return Err(failed(Errno::INVAL));
        }
        // Before 5.4 a send was always needed, and FILL never asked.
        let flags = u32::from(kind == RingKind::Tx);
        let base = mapping.base();
        let owner = Arc::new(RingOwner {
            _mapping: mapping,
            flags: AtomicU32::new(flags),
            _socket: self.raw.clone(),
        });
        // SAFETY: all fields are inside the mapping and aligned, as checked above; a mapping is
        // zeroed by the kernel, and `owner` keeps it.
        unsafe {
            let field = |offset: u64| base.add(offset as usize);
            let flags = if self.has_flags { field(at.flags).cast() } else { NonNull::from(&owner.flags) };
            Ok(RingMemory::new(
                field(at.producer).cast(),
                field(at.consumer).cast(),
                flags,
                field(at.desc).cast(),
                entries,
                owner,
            ))
        }
    }
}
