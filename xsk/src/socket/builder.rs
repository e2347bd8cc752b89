//! Makes a socket: UMEM, rings, FILL, bind, in the order that the kernel wants, and finds the cause
//! where it refuses.

use core::mem::size_of;
use core::ptr::NonNull;
use core::time::Duration;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::{Mode, RxOnly, RxTx, Shared, Socket, TxOnly};
use crate::abi::{self, AF_XDP, BindFlags, MmapOffsets, RingKind, RingOffset, SOL_XDP, SockaddrXdp, UmemReg};
use crate::device::Device;
use crate::error::{Cause, Doing, Error, Result, general};
use crate::kernel::{Errno, Mapping, RawSocket};
use crate::ring::RingMemory;
use crate::rings::{CompletionRing, FillRing, RxRing, TxRing};
use crate::sync::AtomicU32;
use crate::umem::{Member, Pair, Pool, Umem, max_headroom};

/// The most entries that a ring is asked for. The kernel has no limit of its own: it would try to
/// find 16 GiB.
pub const MAX_RING_ENTRIES: u32 = 1 << 20;

/// `SOCK_RAW`.
const SOCK_RAW: i32 = 3;

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

impl SocketBuilder<'static> {
    pub(super) fn new(device: &Device) -> Self {
        Self {
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
    /// the same UMEM wait meanwhile. The kernel releases a queue some milliseconds after its last
    /// socket is closed.
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
    /// [`Cause::ForeignPool`], [`Cause::TooManySockets`]. Of the rings: [`Cause::RingNotPowerOfTwo`],
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
        if fill_from.as_ref().is_some_and(|(pool, _)| !pool.umem().is(umem)) {
            return Err(Error::new(binding(), Cause::ForeignPool));
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
        // A socket whose interface is gone is unbound for good, and lends nothing any more.
        members.retain(|m| m.socket.upgrade().is_some_and(|socket| socket.is_bound()));
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
