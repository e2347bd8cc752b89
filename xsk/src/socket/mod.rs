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
//! pool of its own ([`Umem::pool`](crate::Umem::pool)).
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

mod builder;

use core::fmt;
use core::mem::size_of;
use core::time::Duration;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, Weak};

use crate::abi::{self, SOL_XDP, XdpStatistics};
use crate::device::{Device, DeviceInfo};
use crate::error::{Cause, Doing, Error, Result, general};
use crate::kernel::{Errno, POLLERR, POLLIN, POLLOUT, RawSocket};
use crate::rings::{CompletionRing, FillRing, RxRing, TxRing};

pub use builder::{MAX_RING_ENTRIES, SocketBuilder};

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

/// A handle that does not keep the socket open.
#[derive(Clone)]
pub(crate) struct WeakSocket(Weak<Shared>);

impl WeakSocket {
    pub(crate) fn upgrade(&self) -> Option<Socket> {
        self.0.upgrade().map(Socket)
    }
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

/// A socket that only sends. It needs no program, and its FILL ring is nobody's to work.
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
        SocketBuilder::new(device)
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

    pub(crate) fn downgrade(&self) -> WeakSocket {
        WeakSocket(Arc::downgrade(&self.0))
    }

    /// Whether the kernel took the socket off its interface, because that is gone, and is done with
    /// its rings.
    pub(crate) fn is_off(&self) -> bool {
        // The state changes first, and then the kernel waits for whoever is at work on the rings. It
        // holds the socket's lock for all of it, which an option waits for.
        let done = || {
            let answer = self.0.raw.setsockopt(SOL_XDP, abi::XDP_RX_RING, &1u32.to_ne_bytes());
            answer == Err(Errno::BUSY)
        };
        !self.0.raw.is_bound() && done()
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
    /// [`Cause::NoRxRing`] and [`Cause::NoTxRing`] for a ring that the socket lacks;
    /// [`Cause::Deadlock`] on a stepped simulated kernel where nothing could end the wait.
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
                (Errno::ACCESS, Some(max)) => Cause::TxBudget { packets, min: abi::TX_BATCH_SIZE, max },
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
