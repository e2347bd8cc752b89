//! AF_XDP sockets as the kernel sees them: options, binding, sending, receiving.
//!
//! The order of the checks is the contract: a program that does two things wrong is told of the
//! same one as on Linux.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use xsk::abi::{
    AF_XDP, BindFlags, Descriptor, MMAP_OFFSETS_V1_SIZE, MmapOffsets, RingKind, STATISTICS_V1_SIZE,
    SockaddrXdp, TX_BATCH_SIZE, UMEM_REG_V1_SIZE, UmemReg, XDP_MAX_TX_SKB_BUDGET, XDP_MMAP_OFFSETS,
    XDP_OPTIONS, XDP_RING_NEED_WAKEUP, XDP_RX_RING, XDP_STATISTICS, XDP_TX_METADATA, XDP_TX_RING,
    XDP_UMEM_COMPLETION_RING, XDP_UMEM_FILL_RING, XDP_UMEM_REG, XdpStatistics, bytes_of,
};
use xsk::kernel::{Errno, Mapping, POLLIN, POLLOUT};

use crate::files::{self, Foreign};
use crate::net::Network;
use crate::pool::{Pool, PoolId};
use crate::ring::{Incoming, OFFSETS, Outgoing, Pages};
use crate::state::{Object, State};
use crate::umem::Umem;

/// `POLLRDNORM`: what the kernel tells along with `POLLIN`.
pub(crate) const POLLRDNORM: i16 = 0x040;
/// `POLLWRNORM`: what the kernel tells along with `POLLOUT`.
const POLLWRNORM: i16 = 0x100;

/// Number of a socket, never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SocketId(pub(crate) u64);

/// Where a socket is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Ready,
    Bound {
        device: u32,
        queue: u16,
    },
    /// It was bound, and the device was removed.
    Unbound,
}

/// One socket.
#[derive(Debug)]
pub(crate) struct Socket {
    phase: Phase,
    umem: Option<Arc<Umem>>,
    rx: Option<Outgoing<Descriptor>>,
    tx: Option<Incoming<Descriptor>>,
    /// Until `bind` hands it to the pool.
    fill: Option<Incoming<u64>>,
    /// As above.
    completion: Option<Outgoing<u64>>,
    /// Since `bind`, and until the socket is gone.
    pub(crate) pool: Option<PoolId>,
    tx_budget: u32,
    rx_dropped: u64,
    rx_ring_full: u64,
    tx_invalid: u64,
    tx_ring_empty: u64,
    /// `SO_ERROR`.
    error: Option<Errno>,
    /// `SO_BINDTODEVICE`.
    bound_to: Option<u32>,
    /// The descriptor that programs wait for, until it is closed.
    pub(crate) event: Option<Arc<OwnedFd>>,
    /// The descriptor is readable.
    signalled: bool,
}

impl Socket {
    /// A new socket, with the descriptor that programs wait for.
    pub(crate) fn new(event: Arc<OwnedFd>) -> Self {
        Self {
            phase: Phase::Ready,
            umem: None,
            rx: None,
            tx: None,
            fill: None,
            completion: None,
            pool: None,
            tx_budget: TX_BATCH_SIZE,
            rx_dropped: 0,
            rx_ring_full: 0,
            tx_invalid: 0,
            tx_ring_empty: 0,
            error: None,
            bound_to: None,
            event: Some(event),
            signalled: false,
        }
    }

    /// `XDP_UMEM_REG`.
    pub(crate) fn register_umem(
        &mut self,
        registration: &UmemReg,
        optlen: usize,
        memory: &Mapping,
    ) -> Result<(), Errno> {
        if optlen < UMEM_REG_V1_SIZE {
            return Err(Errno::INVAL);
        }
        if self.phase != Phase::Ready || self.umem.is_some() {
            return Err(Errno::BUSY);
        }
        self.umem = Some(Arc::new(Umem::register(registration, optlen, memory)?));
        Ok(())
    }

    /// `setsockopt` at `SOL_XDP`.
    pub(crate) fn set_option(&mut self, name: i32, value: &[u8]) -> Result<(), Errno> {
        let word = value.first_chunk().map(|word| u32::from_ne_bytes(*word));
        match name {
            XDP_RX_RING | XDP_TX_RING | XDP_UMEM_FILL_RING | XDP_UMEM_COMPLETION_RING => {
                let entries = word.ok_or(Errno::INVAL)?;
                if self.phase != Phase::Ready {
                    return Err(Errno::BUSY);
                }
                self.make_ring(name, entries)
            }
            // The memory comes with `register_umem` alone: here the address leads nowhere.
            XDP_UMEM_REG if value.len() < UMEM_REG_V1_SIZE => Err(Errno::INVAL),
            XDP_UMEM_REG => Err(Errno::FAULT),
            XDP_MAX_TX_SKB_BUDGET => {
                let budget = word.filter(|_| value.len() == 4).ok_or(Errno::INVAL)?;
                let entries = self.tx.as_ref().map(Incoming::size).ok_or(Errno::ACCESS)?;
                if budget < TX_BATCH_SIZE || budget > entries {
                    return Err(Errno::ACCESS);
                }
                self.tx_budget = budget;
                Ok(())
            }
            _ => Err(Errno::NOPROTOOPT),
        }
    }

    fn make_ring(&mut self, option: i32, entries: u32) -> Result<(), Errno> {
        fn fill_in<R>(slot: &mut Option<R>, make: impl FnOnce() -> Result<R, Errno>) -> Result<(), Errno> {
            if slot.is_some() {
                return Err(Errno::INVAL);
            }
            *slot = Some(make()?);
            Ok(())
        }
        match option {
            XDP_RX_RING => fill_in(&mut self.rx, || Outgoing::new(entries)),
            XDP_TX_RING => fill_in(&mut self.tx, || {
                let tx = Incoming::new(entries)?;
                // Copy mode must be woken to send, always.
                tx.memory().set_flags(XDP_RING_NEED_WAKEUP);
                Ok(tx)
            }),
            XDP_UMEM_FILL_RING => fill_in(&mut self.fill, || Incoming::new(entries)),
            _ => fill_in(&mut self.completion, || Outgoing::new(entries)),
        }
    }

    /// `XDP_STATISTICS`.
    fn statistics(&self, pool: Option<&Pool>) -> XdpStatistics {
        XdpStatistics {
            rx_dropped: self.rx_dropped,
            rx_invalid_descs: 0,
            tx_invalid_descs: self.tx_invalid,
            rx_ring_full: self.rx_ring_full,
            rx_fill_ring_empty_descs: pool.map_or(0, |pool| pool.fill_empty),
            tx_ring_empty_descs: self.tx_ring_empty,
        }
    }

    /// The pages of a ring; `fill` and `completion` are the pool's once there is one.
    fn pages<'s>(&'s self, pool: Option<&'s Pool>, offset: u64) -> Option<&'s Arc<Pages>> {
        const RX: u64 = RingKind::Rx.page_offset();
        const TX: u64 = RingKind::Tx.page_offset();
        const FILL: u64 = RingKind::Fill.page_offset();
        const COMPLETION: u64 = RingKind::Completion.page_offset();
        match offset {
            RX => self.rx.as_ref().map(Outgoing::pages),
            TX => self.tx.as_ref().map(Incoming::pages),
            FILL => pool.map(|pool| &pool.fill).or(self.fill.as_ref()).map(Incoming::pages),
            COMPLETION => pool.map(|pool| &pool.completion).or(self.completion.as_ref()).map(Outgoing::pages),
            _ => None,
        }
    }

    /// `SO_ERROR`: the pending error, told once.
    pub(crate) fn take_error(&mut self) -> i32 {
        self.error.take().map_or(0, Errno::raw_os_error)
    }

    /// `SO_BINDTODEVICE`.
    pub(crate) fn bind_to_device(&mut self, index: Option<u32>) {
        self.bound_to = index;
    }

    /// A device was removed.
    pub(crate) fn lose_device(&mut self, index: u32) {
        if matches!(self.phase, Phase::Bound { device, .. } if device == index) {
            self.phase = Phase::Unbound;
            self.error = Some(Errno::NETDOWN);
        }
    }

    /// What sending, receiving and polling check first: where the socket is bound.
    pub(crate) fn bound_to_running(&self, net: &Network) -> Result<(u32, u16), Errno> {
        let Phase::Bound { device, queue } = self.phase else { return Err(Errno::NXIO) };
        match net.devices.get(&device) {
            Some(found) if found.up => Ok((device, queue)),
            _ => Err(Errno::NETDOWN),
        }
    }

    /// RX got a packet: wakes whoever waits, also for an edge.
    fn signal(&mut self) {
        if let Some(event) = &self.event {
            files::signal(event);
            self.signalled = true;
        }
    }

    /// Lets the descriptor say no more that RX has packets when the program took them all.
    pub(crate) fn settle(&mut self) {
        let empty = self.rx.as_ref().is_none_or(Outgoing::is_empty);
        if let Some(event) = self.event.as_ref().filter(|_| self.signalled && empty) {
            files::clear(event);
            self.signalled = false;
        }
    }
}

/// Writes an answer of `getsockopt`, or as much of it as there is room for.
fn answer(value: &mut [u8], bytes: &[u8]) -> usize {
    let len = bytes.len().min(value.len());
    value[..len].copy_from_slice(&bytes[..len]);
    len
}

impl State {
    /// The pool of a socket.
    fn pool_of(&self, socket: &Socket) -> Option<&Pool> {
        socket.pool.and_then(|pool| self.pools.get(&pool))
    }

    /// `getsockopt` at `SOL_XDP`.
    pub(crate) fn option(&self, id: SocketId, name: i32, value: &mut [u8]) -> Result<usize, Errno> {
        let socket = &self.sockets[&id];
        let room = value.len();
        match name {
            XDP_STATISTICS if room < STATISTICS_V1_SIZE => Err(Errno::INVAL),
            XDP_STATISTICS => {
                let mut statistics = socket.statistics(self.pool_of(socket));
                let known = if room < size_of::<XdpStatistics>() {
                    statistics.rx_dropped += statistics.rx_ring_full;
                    STATISTICS_V1_SIZE
                } else {
                    size_of::<XdpStatistics>()
                };
                Ok(answer(value, &bytes_of(&statistics)[..known]))
            }
            XDP_MMAP_OFFSETS if room < MMAP_OFFSETS_V1_SIZE => Err(Errno::INVAL),
            XDP_MMAP_OFFSETS if room < size_of::<MmapOffsets>() => {
                let rings = [OFFSETS.rx, OFFSETS.tx, OFFSETS.fr, OFFSETS.cr];
                let words = rings.iter().flat_map(|ring| [ring.producer, ring.consumer, ring.desc]);
                Ok(answer(value, &words.flat_map(u64::to_ne_bytes).collect::<Vec<_>>()))
            }
            XDP_MMAP_OFFSETS => Ok(answer(value, bytes_of(&OFFSETS))),
            XDP_OPTIONS if room < size_of::<u32>() => Err(Errno::INVAL),
            // No flag: it is never zero copy.
            XDP_OPTIONS => Ok(answer(value, bytes_of(&0u32))),
            _ => Err(Errno::OPNOTSUPP),
        }
    }

    /// `mmap`: the pages of a ring that are to be mapped.
    pub(crate) fn ring_pages(&self, id: SocketId, offset: u64, length: usize) -> Result<Arc<Pages>, Errno> {
        let socket = &self.sockets[&id];
        if length == 0 {
            return Err(Errno::INVAL);
        }
        if socket.phase == Phase::Unbound {
            return Err(Errno::BUSY);
        }
        let pages = socket.pages(self.pool_of(socket), offset).ok_or(Errno::INVAL)?;
        // The pages are whole, so a length fits as it is or rounded up to pages.
        if length > pages.len() {
            return Err(Errno::INVAL);
        }
        Ok(pages.clone())
    }

    /// `bind`.
    pub(crate) fn bind(&mut self, id: SocketId, address: &SockaddrXdp) -> Result<(), Errno> {
        let socket = &self.sockets[&id];
        let flags = BindFlags::from_bits_retain(address.flags);
        let mode = BindFlags::COPY | BindFlags::ZEROCOPY;
        let known = mode | BindFlags::SHARED_UMEM | BindFlags::USE_NEED_WAKEUP | BindFlags::USE_SG;
        if address.family != AF_XDP || !known.contains(flags) {
            return Err(Errno::INVAL);
        }
        if socket.bound_to.is_some_and(|index| index != address.ifindex) {
            return Err(Errno::INVAL);
        }
        if socket.phase != Phase::Ready {
            return Err(Errno::BUSY);
        }
        if !self.net.devices.contains_key(&address.ifindex) {
            return Err(Errno::NODEV);
        }
        if socket.rx.is_none() && socket.tx.is_none() {
            return Err(Errno::INVAL);
        }
        if flags.contains(BindFlags::SHARED_UMEM) {
            return self.bind_shared(id, address, flags);
        }
        if socket.umem.is_none() || socket.fill.is_none() || socket.completion.is_none() {
            return Err(Errno::INVAL);
        }
        if flags.contains(mode) {
            return Err(Errno::INVAL);
        }
        // The kernel keeps the lower 16 bits.
        let queue = address.queue_id as u16;
        self.free_queue(address.ifindex, queue)?;
        if flags.intersects(BindFlags::ZEROCOPY | BindFlags::USE_SG) {
            return Err(Errno::OPNOTSUPP);
        }
        self.assign(id, address.ifindex, queue);
        Ok(())
    }

    /// `bind` with the UMEM of another socket: on the same queue with that socket's FILL and
    /// COMPLETION as well, elsewhere with its own.
    fn bind_shared(&mut self, id: SocketId, address: &SockaddrXdp, flags: BindFlags) -> Result<(), Errno> {
        let socket = &self.sockets[&id];
        let own = flags - BindFlags::SHARED_UMEM;
        if !own.is_empty() || socket.umem.is_some() {
            return Err(Errno::INVAL);
        }
        let fd = address.shared_umem_fd as i32;
        let owner = match self.files.get(&fd) {
            Some(Object::Socket(owner)) => &self.sockets[owner],
            None if Foreign::of(fd) == Foreign::Socket => return Err(Errno::NOPROTOOPT),
            _ => return Err(Errno::NOTSOCK),
        };
        let Phase::Bound { device, queue } = owner.phase else { return Err(Errno::BADF) };
        let (fill, completion) = (socket.fill.is_some(), socket.completion.is_some());
        let (umem, pool) = (owner.umem.clone(), owner.pool);
        // Here all 32 bits count.
        if (device, u32::from(queue)) == (address.ifindex, address.queue_id) {
            if fill || completion {
                return Err(Errno::INVAL);
            }
            let socket = self.socket(id);
            (socket.umem, socket.pool) = (umem, pool);
            socket.phase = Phase::Bound { device, queue };
        } else {
            if !fill || !completion {
                return Err(Errno::INVAL);
            }
            let queue = address.queue_id as u16;
            self.free_queue(address.ifindex, queue)?;
            self.socket(id).umem = umem;
            self.assign(id, address.ifindex, queue);
        }
        Ok(())
    }

    /// Whether a pool can be put on a queue.
    fn free_queue(&mut self, device: u32, queue: u16) -> Result<(), Errno> {
        match self.net.devices[&device].queues.get(usize::from(queue)) {
            None => Err(Errno::INVAL),
            Some(queue) if queue.pool.is_some() => {
                // The release of a queue comes with time, and whoever tries again expects it.
                self.release_pools();
                Err(Errno::BUSY)
            }
            Some(_) => Ok(()),
        }
    }

    /// Makes the pool of a socket that has all that it takes.
    fn assign(&mut self, id: SocketId, device: u32, queue: u16) {
        let pool = PoolId(self.number());
        let socket = self.socket(id);
        if let (Some(umem), Some(fill), Some(completion)) =
            (socket.umem.clone(), socket.fill.take(), socket.completion.take())
        {
            socket.phase = Phase::Bound { device, queue };
            socket.pool = Some(pool);
            let made = Pool { device, queue, umem, fill, completion, parked: None, fill_empty: 0 };
            self.pools.insert(pool, made);
            if let Some(device) = self.net.devices.get_mut(&device) {
                device.queues[usize::from(queue)].pool = Some(pool);
                device.reset();
            }
        }
    }

    /// `sendto`.
    pub(crate) fn send(&mut self, id: SocketId) -> Result<(), Errno> {
        let socket = &self.sockets[&id];
        let (device, queue) = socket.bound_to_running(&self.net)?;
        if socket.tx.is_none() {
            return Err(Errno::NOBUFS);
        }
        self.transmit(id, device, queue)
    }

    /// `recvfrom`. In copy mode there is no driver to be woken.
    pub(crate) fn receive(&mut self, id: SocketId) -> Result<(), Errno> {
        let socket = &self.sockets[&id];
        socket.bound_to_running(&self.net)?;
        if socket.rx.is_none() { Err(Errno::NOBUFS) } else { Ok(()) }
    }

    /// Copies packets out of TX and onto the wire (`__xsk_generic_xmit`).
    fn transmit(&mut self, id: SocketId, device: u32, queue: u16) -> Result<(), Errno> {
        let Some(socket) = self.sockets.get_mut(&id) else { return Ok(()) };
        let pool = socket.pool.and_then(|pool| self.pools.get_mut(&pool));
        let (Some(pool), Some(tx)) = (pool, socket.tx.as_mut()) else { return Ok(()) };
        let mut budget = socket.tx_budget;
        while let Some(desc) = tx.peek() {
            if !pool.completion.has_room() {
                return Err(Errno::AGAIN);
            }
            if !pool.umem.can_send(&desc) {
                // It is given back as it came, and ends the batch without an error.
                socket.tx_invalid += 1;
                tx.next();
                pool.completion.push(desc.addr);
                return Ok(());
            }
            if budget == 0 {
                return Err(Errno::AGAIN);
            }
            budget -= 1;
            if desc.options & XDP_TX_METADATA != 0 {
                // No UMEM here has metadata. The descriptor stays, and blocks those behind it.
                return Err(Errno::INVAL);
            }
            let packet = pool.umem.read(&desc);
            tx.next();
            pool.completion.push(desc.addr);
            if !self.net.send(device, queue, packet) {
                return Err(Errno::BUSY);
            }
        }
        socket.tx_ring_empty += 1;
        Ok(())
    }

    /// One look of `poll`: what the socket is ready for, and whether looking changed anything.
    ///
    /// As on Linux in copy mode, a look transmits. The `first` one does so always, later ones only
    /// when TX has something: on Linux the process would have slept meanwhile.
    pub(crate) fn look(&mut self, id: SocketId, first: bool) -> (i16, bool) {
        let Ok((device, queue)) = self.sockets[&id].bound_to_running(&self.net) else { return (0, false) };
        let tx = |state: &Self| state.sockets[&id].tx.as_ref().map(|tx| (tx.taken(), tx.waiting()));
        let before = tx(self);
        if before.is_some_and(|(_, waiting)| first || waiting > 0) {
            // What went wrong is told to those who send.
            let _ = self.transmit(id, device, queue);
        }
        let after = tx(self);
        let socket = self.socket(id);
        let mut ready = 0;
        if socket.rx.as_ref().is_some_and(|rx| !rx.is_empty()) {
            ready |= POLLIN | POLLRDNORM;
        }
        if socket.tx.as_ref().is_some_and(|tx| tx.waiting() <= tx.size() / 2) {
            ready |= POLLOUT | POLLWRNORM;
        }
        let progress = before.map(|(taken, _)| taken) != after.map(|(taken, _)| taken);
        (ready, progress)
    }

    /// A program sent a packet to a socket (`xsk_rcv`).
    pub(crate) fn deliver(&mut self, id: SocketId, device: u32, queue: u16, packet: &[u8]) {
        let Some(socket) = self.sockets.get_mut(&id) else { return };
        if socket.phase != (Phase::Bound { device, queue }) {
            return;
        }
        let pool = socket.pool.and_then(|pool| self.pools.get_mut(&pool));
        let (Some(pool), Some(rx)) = (pool, socket.rx.as_mut()) else { return };
        if packet.len() > pool.umem.frame_room() {
            socket.rx_dropped += 1;
            return;
        }
        let Some(chunk) = pool.take_chunk() else {
            socket.rx_dropped += 1;
            return;
        };
        if !rx.has_room() {
            socket.rx_ring_full += 1;
            pool.parked = Some(chunk);
            return;
        }
        let addr = pool.umem.packet_address(chunk);
        pool.umem.write(addr, packet);
        rx.push(Descriptor { addr, len: packet.len() as u32, options: 0 });
        socket.signal();
    }
}
