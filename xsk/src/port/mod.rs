//! A device as one thing that receives and sends, with no ring in sight.
//!
//! A [`Port`] has one, several or all queues of an interface. It keeps the kernel supplied with
//! frames to receive into, takes back those that were sent, and wakes the kernel when that is
//! needed and only then.
//!
//! ```no_run
//! use xsk::{Device, Port};
//!
//! fn main() -> xsk::Result<()> {
//!     let mut port = Port::open(&Device::open("eth1")?)?;
//!     loop {
//!         port.wait(None)?;
//!         port.receive(|packet| println!("{} bytes", packet.len()))?;
//!     }
//! }
//! ```
//!
//! # What to do with packets
//!
//! | call | the packets that arrived |
//! |---|---|
//! | [`receive`](Port::receive) | are looked at, each for the length of a call |
//! | [`process`](Port::process) | are sent back out of the queue they came by, dropped or kept, as the [`Action`] says |
//! | [`forward`](Port::forward) | the same, but sent out by another port |
//!
//! One call is one *turn*: it handles up to a batch of packets on each queue and returns how many
//! there were. It never waits: [`wait`](Port::wait) does, when a turn found nothing. A program that
//! never waits has the shortest latency and keeps a processor busy.
//!
//! ```
//! # let sim = xsk_sim::Sim::new();
//! # let device = sim.device("sim0")?;
//! use xsk::port::Action;
//!
//! let mut port = xsk::Port::open(&device)?;
//! # sim.inject("sim0", &[0; 60])?;
//! # sim.inject("sim0", &[1; 60])?;
//! # sim.inject("sim0", &[2; 60])?;
//! let mut kept = Vec::new();
//! port.wait(None)?;
//! # sim.run();
//! let n = port.process(|mut packet| match packet[0] {
//!     0 => Action::Drop(packet),
//!     1 => {
//!         packet[0] = 7;
//!         Action::Send(packet)
//!     }
//!     _ => {
//!         kept.push(packet);
//!         Action::Keep
//!     }
//! })?;
//! # assert_eq!((n, kept.len()), (3, 1));
//! // A packet that was kept is sent later, or its frame is given back.
//! for packet in kept {
//!     port.recycle(packet);
//! }
//! // Packets of one's own: from bytes, or written in place.
//! port.send_bytes(&[9; 60])?;
//! let mut packet = port.packet(60).expect("frames are left");
//! packet.fill(8);
//! port.send(packet)?;
//! port.flush()?; // or wait, or receive: each sends what was given to the port before
//! # sim.run();
//! # assert_eq!(sim.stack("sim1")?.len(), 3);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Which packets, which queues
//!
//! [`Port::open`] takes everything that arrives, so that Linux sees nothing of it: no ARP, no ping, no
//! SSH. A [`Steering`](crate::xdp::Steering) says what is taken, and Linux has the rest:
//!
//! ```no_run
//! # fn main() -> xsk::Result<()> {
//! # let device = xsk::Device::open("eth1")?;
//! use xsk::xdp::Steering;
//! let port = xsk::Port::builder(&device).queues(0..2).steering(Steering::udp_ports([53])).open()?;
//! # Ok(())
//! # }
//! ```
//!
//! # Several interfaces
//!
//! [`Port::open_each`] opens ports that share their memory, between which packets are
//! forwarded without a copy; [`Port::wait_any`] waits for any of several.
//!
//! # Several threads
//!
//! A port is used by one thread. [`Port::split`] makes several ports of it, each with queues of its
//! own. Packets can be sent to other threads and back, through any channel: whoever has a packet at
//! its end sends it by a port or [recycles](Port::recycle) it, on any port of the same memory.
//! A port that has more frames than it needs gives them to the memory's depot, and one that runs
//! short takes them there.
//!
//! ```no_run
//! use xsk::port::Action;
//! use xsk::{Device, Port};
//!
//! fn main() -> xsk::Result<()> {
//!     let port = Port::open(&Device::open("eth1")?)?;
//!     let monitor = port.monitor();
//!     std::thread::scope(|threads| {
//!         for mut worker in port.split(4)? {
//!             threads.spawn(move || -> xsk::Result<()> {
//!                 loop {
//!                     worker.wait(None)?;
//!                     worker.process(Action::Send)?;
//!                 }
//!             });
//!         }
//!         loop {
//!             std::thread::sleep(std::time::Duration::from_secs(1));
//!             println!("{:?}", monitor.statistics()?.total());
//!         }
//!     })
//! }
//! ```
//!
//! # When the interface changes
//!
//! [`Port::event`] tells of it: switched off and on, link lost and back, other queues, removed. A
//! port that is switched off goes on by itself when it is switched on. A program need not ask for
//! events; only that the interface is gone is an error of every call, once the packets that arrived
//! before are taken.
//!
//! # Other programs
//!
//! The program that a port attaches is shared with other processes' ports and sockets: see
//! [sharing](crate::xdp#sharing). Each has queues of its own.

mod builder;
mod lane;
mod link;
mod statistics;

use core::fmt;
use core::time::Duration;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use crate::device::Device;
use crate::error::{Cause, Doing, Error, Result, general};
use crate::kernel::{Errno, POLLIN, POLLOUT, PollEntry};
use crate::rings::{Packets, PushError, TxRing};
use crate::umem::{Frame, Packet, Pool, Umem};
use crate::xdp::DefaultProgram;

pub use builder::{PortBuilder, Queues};
use lane::Lane;
pub use link::Event;
use link::{Link, News};
pub use statistics::{Counts, Monitor, PortStatistics};

/// Packets that a call handles at most on each queue, unless told otherwise.
const BATCH: u32 = 64;

/// One, several or all queues of an interface, as one thing that receives and sends.
///
/// Dropping a port closes its sockets, and detaches the program if no one else uses it. What was
/// given to it and not yet sent is told to the kernel first; [`drain`](Self::drain) waits for it.
pub struct Port {
    lanes: Vec<Lane>,
    pool: Pool,
    /// Frames that the pool has while nothing is on its way; others may have what is beyond them.
    plenty: usize,
    /// Frames that it may have more before that, or less after.
    slack: usize,
    batch: u32,
    /// The lane that sends next.
    turn: usize,
    shared: Arc<Shared>,
    link: Link,
    /// Queues that come later are taken on.
    grows: bool,
}

/// What the parts of a port that was split have in common.
struct Shared {
    device: Device,
    umem: Umem,
    program: Option<DefaultProgram>,
    monitor: Monitor,
    how: builder::How,
}

/// What becomes of a packet.
#[derive(Debug)]
#[must_use = "it says what becomes of the packet"]
pub enum Action {
    /// It is sent.
    Send(Packet),
    /// It is done with; its frame is used again.
    Drop(Packet),
    /// The program has put it elsewhere, to [send](Port::send) it later or to
    /// [recycle](Port::recycle) it. It holds a frame, of which a port has twice
    /// [`ring_size`](PortBuilder::ring_size) for each queue: with too many kept, packets that arrive
    /// are lost ([`Counts::rx_fill_empty`]).
    Keep,
}

/// What a program returns for a packet: an [`Action`]; or the [`Packet`], where every packet is sent,
/// which is a little faster.
pub trait Outcome: Sized + sealed::Outcome {
    /// Takes packets and gives what is to be sent to TX; returns how many were taken. `bytes` are
    /// those taken and those sent.
    #[doc(hidden)]
    fn carry(
        tx: &mut TxRing,
        packets: Packets<'_>,
        pool: &mut Pool,
        bytes: &mut (u64, u64),
        each: impl FnMut(Packet) -> Self,
    ) -> u32;
}

mod sealed {
    pub trait Outcome {}
    impl Outcome for super::Action {}
    impl Outcome for super::Packet {}
}

impl Outcome for Packet {
    #[inline(always)]
    fn carry(
        tx: &mut TxRing,
        packets: Packets<'_>,
        _: &mut Pool,
        bytes: &mut (u64, u64),
        mut each: impl FnMut(Packet) -> Self,
    ) -> u32 {
        *bytes = (0, 0);
        tx.extend(packets, move |packet| {
            bytes.0 += packet.len() as u64;
            let packet = each(packet);
            bytes.1 += packet.len() as u64;
            packet
        })
    }
}

impl Outcome for Action {
    #[inline(always)]
    fn carry(
        tx: &mut TxRing,
        packets: Packets<'_>,
        pool: &mut Pool,
        bytes: &mut (u64, u64),
        mut each: impl FnMut(Packet) -> Self,
    ) -> u32 {
        *bytes = (0, 0);
        tx.extend_some(packets, move |packet| {
            bytes.0 += packet.len() as u64;
            match each(packet) {
                Self::Send(packet) => {
                    bytes.1 += packet.len() as u64;
                    Some(packet)
                }
                Self::Drop(packet) => {
                    put(pool, packet);
                    None
                }
                Self::Keep => None,
            }
        })
    }
}

/// Puts a packet's frame into the pool. It is not inlined, so that what surrounds it is: as a part of a
/// turn's loop, it would make of every packet a call.
#[inline(never)]
fn put(pool: &mut Pool, packet: Packet) {
    pool.put(packet);
}

/// Why bytes were not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refused {
    /// There is no room in TX, or no frame is free: wait, and try again.
    #[error("no frame, or no room in TX, is free")]
    Full,
    /// A packet is in one frame.
    #[error("a packet of {len} bytes does not fit a frame of {max}")]
    TooLong {
        /// Bytes to be sent.
        len: usize,
        /// Bytes of a frame.
        max: u32,
    },
    /// There are no empty packets.
    #[error("a packet has at least one byte")]
    Empty,
}

impl Port {
    /// Opens all queues of `device`, to receive all packets.
    ///
    /// # Errors
    ///
    /// As [`PortBuilder::open`].
    pub fn open(device: &Device) -> Result<Self> {
        Self::builder(device).open()
    }

    /// Opens several ports on one memory that is large enough for all, so that packets go from one to
    /// another without a copy.
    ///
    /// # Errors
    ///
    /// As [`PortBuilder::open`]; none is open then.
    pub fn open_each<const N: usize>(builders: [PortBuilder; N]) -> Result<[Self; N]> {
        PortBuilder::open_each(builders)
    }

    /// Begins a port: all queues, all packets, in whichever mode the driver can, unless told
    /// otherwise.
    pub fn builder(device: &Device) -> PortBuilder {
        PortBuilder::new(device)
    }

    fn new(lanes: Vec<Lane>, pool: Pool, shared: Arc<Shared>, link: Link, grows: bool) -> Self {
        let how = shared.how;
        let plenty = lanes.len() * how.spare() as usize;
        let slack = (how.ring / 4).min(2 * how.batch) as usize;
        Self { lanes, pool, plenty, slack, batch: how.batch, turn: 0, shared, link, grows }
    }

    /// The interface.
    pub fn device(&self) -> &Device {
        &self.shared.device
    }

    /// The memory. Its [census](Umem::census) tells where every frame is.
    pub fn umem(&self) -> &Umem {
        &self.shared.umem
    }

    /// The program, unless it was opened without.
    pub fn program(&self) -> Option<&DefaultProgram> {
        self.shared.program.as_ref()
    }

    /// The queues that the port has, in order.
    pub fn queues(&self) -> Vec<u32> {
        self.lanes.iter().map(|lane| lane.socket().queue()).collect()
    }

    /// The sockets of its queues, in their order.
    pub fn sockets(&self) -> impl Iterator<Item = &crate::Socket> {
        self.lanes.iter().map(Lane::socket)
    }

    /// Whether all of its sockets are zero copy.
    pub fn is_zero_copy(&self) -> bool {
        self.sockets().all(crate::Socket::is_zero_copy)
    }

    /// Reads what the port counts, from any thread.
    pub fn monitor(&self) -> Monitor {
        self.shared.monitor.clone()
    }

    /// The next thing that happened to the interface, if any.
    ///
    /// It asks the kernel whether there is news (one system call). Where an interface was switched on
    /// again, or has got more queues, what follows from that is done by the next call of any kind.
    pub fn event(&mut self) -> Option<Event> {
        self.look();
        self.link.next()
    }

    /// The descriptor by which the port hears of its interface, readable when [`event`](Self::event)
    /// has news: for a program's own `poll` or reactor, beside those of its [`sockets`](Self::sockets).
    ///
    /// A reactor that is built on `epoll` wakes no driver: before it sleeps, a
    /// [`wait`](Self::wait) with a timeout of zero does what is to be done.
    pub fn link_fd(&self) -> BorrowedFd<'_> {
        self.link.watched().fd
    }

    /// One turn: shows the packets that arrived to `each`; their frames are used again. Returns how
    /// many there were.
    ///
    /// # Errors
    ///
    /// [`Cause::InterfaceGone`], when nothing is left of what arrived before that.
    #[inline]
    pub fn receive(&mut self, each: impl FnMut(&mut Packet)) -> Result<u32> {
        // One queue is a case of its own: with no loop around it, what `each` counts is in registers.
        if let [lane] = &mut self.lanes[..] {
            let taken = receive_on(lane, &mut self.pool, &mut self.link, self.batch, each)?;
            return self.after(taken);
        }
        self.receive_on_all(each)
    }

    #[inline(never)]
    fn receive_on_all(&mut self, mut each: impl FnMut(&mut Packet)) -> Result<u32> {
        let mut all = 0;
        for lane in &mut self.lanes {
            all += receive_on(lane, &mut self.pool, &mut self.link, self.batch, &mut each)?;
        }
        self.after(all)
    }

    /// One turn: what arrived is sent back out of the queue that it came by, dropped or kept, as
    /// `each` says. Returns how many packets there were.
    ///
    /// What TX has no room for waits in RX for the next turn.
    ///
    /// # Errors
    ///
    /// As [`receive`](Self::receive); [`Cause::NeedsProgram`].
    #[inline]
    pub fn process<O: Outcome>(&mut self, each: impl FnMut(Packet) -> O) -> Result<u32> {
        if let [lane] = &mut self.lanes[..] {
            let Lane { ingress, egress } = lane;
            let taken = process_on(ingress, egress, &mut self.pool, &mut self.link, self.batch, each)?;
            return self.after(taken);
        }
        self.process_on_all(each)
    }

    #[inline(never)]
    fn process_on_all<O: Outcome>(&mut self, mut each: impl FnMut(Packet) -> O) -> Result<u32> {
        let mut all = 0;
        let senders = self.senders();
        for place in 0..self.lanes.len() {
            // Queues that only receive are behind those that send as well, and share their sockets.
            let (before, rest) = self.lanes.split_at_mut(place);
            let Some(lane) = rest.first_mut() else { break };
            let by = if place >= senders { place.checked_rem(senders) } else { None };
            let egress = match by.and_then(|by| before.get_mut(by)) {
                Some(other) => &mut other.egress,
                None => &mut lane.egress,
            };
            let (pool, link) = (&mut self.pool, &mut self.link);
            all += process_on(&mut lane.ingress, egress, pool, link, self.batch, &mut each)?;
        }
        self.after(all)
    }

    /// One turn: what arrived is sent out by the port `out`, dropped or kept, as `each` says. Returns
    /// how many packets there were.
    ///
    /// A packet leaves by the queue of `out` that has the same place as the queue it came by, so that
    /// the packets of a flow keep their order. What TX has no room for waits in RX for the next turn.
    ///
    /// # Errors
    ///
    /// As [`process`](Self::process), for either port; [`Cause::OtherMemory`], when `out` has another
    /// UMEM.
    #[inline]
    pub fn forward<O: Outcome>(&mut self, out: &mut Self, mut each: impl FnMut(Packet) -> O) -> Result<u32> {
        if !self.shared.umem.is(&out.shared.umem) {
            return Err(self.other_memory(out));
        }
        let mut all = 0;
        out.look_for_up();
        let ways = out.senders().max(1);
        for (place, lane) in self.lanes.iter_mut().enumerate() {
            let ingress = &mut lane.ingress;
            let way = if place < ways { place } else { place % ways };
            let egress = &mut out.lanes[way].egress;
            let taken = lane::forward(ingress, egress, &mut self.pool, self.batch, &mut each);
            all += taken;
            // Each interface answers for its own half: one may be down or gone and the other not.
            if let Err(error) = after_sending(egress, &mut self.pool, taken, out.link.is_up()) {
                out.link.absorb(error)?;
            }
            if let Err(error) = after_taking(ingress, &mut self.pool, taken, self.link.is_up()) {
                self.link.absorb(error)?;
            }
            // What this port was given to send itself.
            if lane.egress.in_flight() != 0
                && let Err(error) = serve(lane, &mut self.pool, taken, self.link.is_up())
            {
                self.link.absorb(error)?;
            }
        }
        if all == 0 {
            out.rest()?;
        } else {
            out.check_gone()?;
        }
        self.after(all)
    }

    #[cold]
    fn other_memory(&self, out: &Self) -> Error {
        let (from, to) = (self.device().name().into(), out.device().name().into());
        Error::new(Doing::Forward { from, to }, Cause::OtherMemory)
    }

    /// How many queues can send. As queues are in order, they are the first.
    fn senders(&self) -> usize {
        self.lanes.iter().take_while(|lane| !lane.egress.is_mute()).count()
    }

    fn check_gone(&self) -> Result<()> {
        if self.link.is_gone() { Err(self.gone()) } else { Ok(()) }
    }

    #[cold]
    fn gone(&self) -> Error {
        self.link.gone(self.lanes.first().map_or(0, |lane| lane.socket().queue()))
    }

    /// The end of a turn that took `all` packets.
    #[inline(always)]
    fn after(&mut self, all: u32) -> Result<u32> {
        self.share();
        if all == 0 { self.rest() } else { Ok(all) }
    }

    /// The end of a turn without a packet.
    #[inline]
    fn rest(&mut self) -> Result<u32> {
        if self.link.is_time() {
            self.look();
        }
        self.check_gone().map(|()| 0)
    }

    /// Whether an interface that was switched off is on again: who only sends makes no idle turns in
    /// which that would be found out.
    #[inline(always)]
    fn look_for_up(&mut self) {
        if !self.link.is_up() {
            self.look();
        }
    }

    /// Looks after the interface; whether something happened.
    #[inline(never)]
    fn look(&mut self) -> bool {
        let news = self.link.look();
        self.follow(news)
    }

    /// Does what follows from a change of the interface.
    fn follow(&mut self, news: News) -> bool {
        if news.back {
            self.lanes.iter_mut().for_each(|lane| lane.egress.tell_again());
        }
        if let Some((was, now)) = news.queues {
            let taken = if self.grows { self.take_on(now) } else { Vec::new() };
            self.link.tell(Event::Queues { was, now, taken });
        }
        news.any
    }

    /// Takes on the queues that the interface has got; those that can't be are left.
    fn take_on(&mut self, now: u32) -> Vec<u32> {
        let have = self.queues();
        let Shared { device, umem, program, monitor, how } = &*self.shared;
        let mut taken = Vec::new();
        let new: Vec<_> = (0..now).filter(|queue| !have.contains(queue)).collect();
        let Ok(tx_queues) = device.info().map(|info| info.tx_queues()) else { return taken };
        self.pool.fetch(new.len() * how.share() as usize);
        let Some(full) = how.later(self.pool.len(), new.len().max(1)) else { return taken };
        for queue in new {
            let Ok(lane) = how.open(device, queue, tx_queues, full, umem, &mut self.pool) else { continue };
            if program.as_ref().is_some_and(|program| program.insert(lane.socket()).is_err()) {
                lane.undo_into(&mut self.pool);
                continue;
            }
            monitor.add(&lane);
            self.lanes.push(lane);
            taken.push(queue);
        }
        self.lanes.sort_by_key(|lane| lane.socket().queue());
        self.plenty = self.lanes.len() * how.spare() as usize;
        taken
    }

    /// A free frame as a packet of `len` bytes, to be written and sent. The bytes are whatever the
    /// frame held before. `None` when no frame is free, or `len` does not fit one.
    pub fn packet(&mut self, len: u32) -> Option<Packet> {
        if self.pool.is_empty() {
            self.find_frames();
        }
        self.pool.packet(0, len)
    }

    /// Frames that can be had without waiting, where the pool has none.
    #[cold]
    fn find_frames(&mut self) {
        for lane in &mut self.lanes {
            lane.egress.reclaim(&mut self.pool);
        }
        if self.pool.is_empty() {
            self.pool.fetch(self.batch as usize);
        }
    }

    /// Takes back the frame of a packet that was kept, of this port or another of the same memory.
    #[inline]
    pub fn recycle(&mut self, frame: impl Into<Frame>) {
        self.pool.put(frame);
        self.share();
    }

    /// Gives others what the pool has more than it should. Every call that takes back sent frames ends
    /// with this: they may have come from a port that lacks them. Some packets one way or the other
    /// are no reason to take the depot's lock.
    #[inline(always)]
    fn share(&mut self) {
        let slack = self.slack;
        if self.pool.len() > self.plenty + slack {
            self.pool.give(self.pool.len() - self.plenty + slack);
        }
    }

    /// Sends a packet, with the next [`flush`](Self::flush), turn or wait; by one queue until that is
    /// full, then by the next.
    ///
    /// # Errors
    ///
    /// The packet back: [`PushError::Full`] when there is no room in TX, [`PushError::Foreign`] when
    /// it is of another memory.
    #[inline]
    pub fn send(&mut self, packet: Packet) -> core::result::Result<(), PushError<Packet>> {
        let lanes = self.lanes.len();
        if lanes == 0 {
            return Err(PushError::Full(packet));
        }
        for place in (self.turn..lanes).chain(0..self.turn) {
            if self.lanes[place].egress.room() != 0 {
                self.turn = place;
                return self.lanes[place].egress.push(packet);
            }
        }
        Err(PushError::Full(packet))
    }

    /// As [`send`](Self::send), by the queue of that number: packets of one flow keep their order on one
    /// queue.
    ///
    /// # Errors
    ///
    /// As [`send`](Self::send); the packet is refused as for a full TX where the port does not have the
    /// queue, or the interface does not send on it.
    pub fn send_on(&mut self, queue: u32, packet: Packet) -> core::result::Result<(), PushError<Packet>> {
        match self.lanes.iter_mut().find(|lane| lane.socket().queue() == queue) {
            Some(lane) => lane.egress.push(packet),
            None => Err(PushError::Full(packet)),
        }
    }

    /// Sends a copy of `bytes` as a packet, with the next [`flush`](Self::flush), turn or wait.
    ///
    /// # Errors
    ///
    /// [`Refused`].
    pub fn send_bytes(&mut self, bytes: &[u8]) -> core::result::Result<(), Refused> {
        let max = self.shared.umem.chunk_size();
        let len = bytes.len();
        if len == 0 {
            return Err(Refused::Empty);
        }
        if len > max as usize {
            return Err(Refused::TooLong { len, max });
        }
        let mut packet = self.packet(len as u32).ok_or(Refused::Full)?;
        packet.copy_from_slice(bytes);
        self.send(packet).map_err(|refused| {
            self.pool.put(refused.into_inner());
            Refused::Full
        })
    }

    /// Sends up to `n` packets, which `make` makes of free frames, and tells the kernel; returns how
    /// many: fewer where frames or room in TX ran out, or where `make` gave a frame back.
    ///
    /// [`Umem::packet`] makes a packet of a frame. The frames of packets that were sent come again,
    /// with the bytes that they had.
    ///
    /// # Errors
    ///
    /// As [`flush`](Self::flush).
    #[inline]
    pub fn generate(
        &mut self,
        n: u32,
        mut make: impl FnMut(&Umem, Frame) -> core::result::Result<Packet, Frame>,
    ) -> Result<u32> {
        self.look_for_up();
        let lanes = self.lanes.len();
        let mut made = 0;
        // A call begins where the last one did not get to, so that all queues have their turn.
        for place in (self.turn..lanes).chain(0..self.turn) {
            let egress = &mut self.lanes[place].egress;
            if egress.in_flight() != 0 {
                egress.reclaim(&mut self.pool);
            }
            if self.pool.is_empty() {
                self.pool.fetch(self.batch as usize);
            }
            if egress.is_mute() {
                continue;
            }
            let umem = &self.shared.umem;
            let mut ended = false;
            made += egress
                .generate(n - made, &mut self.pool, |frame| make(umem, frame).inspect_err(|_| ended = true));
            if self.link.is_up()
                && egress.in_flight() != 0
                && let Err(error) = egress.kick()
            {
                self.link.absorb(error)?;
            }
            if made == n || ended {
                self.turn = (place + 1) % lanes;
                break;
            }
        }
        self.share();
        self.check_gone()?;
        Ok(made)
    }

    /// Tells the kernel of what was given to the port to send, and takes back what was sent; returns
    /// how many packets are still on their way.
    ///
    /// In copy mode a call sends a batch on each queue, and the rest waits for the next.
    ///
    /// # Errors
    ///
    /// [`Cause::NeedsProgram`], [`Cause::InterfaceGone`].
    pub fn flush(&mut self) -> Result<u32> {
        self.look_for_up();
        let mut left = 0;
        for lane in &mut self.lanes {
            if self.link.is_up()
                && let Err(error) = lane.egress.settle(&mut self.pool)
            {
                self.link.absorb(error)?;
            }
            // In copy mode most of it is back already.
            lane.egress.reclaim(&mut self.pool);
            left += lane.egress.in_flight();
        }
        self.share();
        self.check_gone()?;
        Ok(left)
    }

    /// Flushes until everything is sent, or `timeout` has passed; returns how many packets are still
    /// on their way.
    ///
    /// # Errors
    ///
    /// As [`flush`](Self::flush).
    pub fn drain(&mut self, timeout: Duration) -> Result<u32> {
        /// No event tells of a completion.
        const LOOK: Duration = Duration::from_micros(50);
        let deadline = Instant::now().checked_add(timeout);
        loop {
            let left = self.flush()?;
            if left == 0 || deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Ok(left);
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Waits until packets have arrived, something happened to the interface, or `timeout` has passed
    /// (`None` waits without end). Returns whether there are packets. What was given to the port
    /// before is sent first.
    ///
    /// A signal ends the wait early. Nothing that another thread does ends it, but for packets: a thread
    /// that must end on request waits with a timeout.
    ///
    /// # Errors
    ///
    /// [`Cause::InterfaceGone`], [`Cause::NeedsProgram`]; [`Cause::Deadlock`] on a stepped simulated
    /// kernel where nothing could end the wait.
    pub fn wait(&mut self, timeout: Option<Duration>) -> Result<bool> {
        Self::wait_any(&mut [self], timeout)
    }

    /// [`wait`](Self::wait) for any of several ports of one kernel.
    ///
    /// # Errors
    ///
    /// As [`wait`](Self::wait).
    pub fn wait_any(ports: &mut [&mut Self], timeout: Option<Duration>) -> Result<bool> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        if let [first, others @ ..] = &*ports
            && let Some(other) =
                others.iter().find(|it| it.device().kernel().id() != first.device().kernel().id())
        {
            let doing = Doing::Wait { interface: other.device().name().into(), queue: 0 };
            return Err(Error::new(doing, Cause::OtherKernel { what: "the interface" }));
        }
        loop {
            let mut before = Before::default();
            for port in ports.iter_mut() {
                port.prepare(&mut before)?;
            }
            if before.arrived {
                return Ok(true);
            }
            let left = match deadline {
                Some(deadline) => Some(deadline.saturating_duration_since(Instant::now())),
                None => timeout,
            };
            if before.blocked {
                // There are packets, for which TX has no room: some moments, and they are tried again.
                poll(ports, 0, Some(left.map_or(MOMENT, |left| left.min(MOMENT))))?;
                return Ok(true);
            }
            let slice = match before.unsettled {
                true => Some(left.map_or(SHORT, |left| left.min(SHORT))),
                false => left,
            };
            let found = poll(ports, POLLIN, slice)?;
            let mut happened = false;
            for port in ports.iter_mut().filter(|_| found.watched) {
                happened |= port.look();
            }
            if found.sockets {
                return Ok(true);
            }
            if happened || found.interrupted || left == Some(Duration::ZERO) {
                // What arrived before the interface went away is not told by the kernel.
                return Ok(ports.iter_mut().any(|port| port.has_packets()));
            }
            if slice == left && !found.watched {
                return Ok(false);
            }
        }
    }

    /// Waits until a packet can be sent: there is room in TX, and a frame is free. Returns whether
    /// that is so, as [`wait`](Self::wait) does.
    ///
    /// # Errors
    ///
    /// As [`wait`](Self::wait).
    pub fn wait_to_send(&mut self, timeout: Option<Duration>) -> Result<bool> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            self.flush()?;
            if self.pool.is_empty() {
                self.pool.fetch(self.batch as usize);
            }
            let frames = !self.pool.is_empty();
            if frames && self.lanes.iter_mut().any(|lane| lane.egress.room() != 0) {
                return Ok(true);
            }
            let left = match deadline {
                Some(deadline) => Some(deadline.saturating_duration_since(Instant::now())),
                None => timeout,
            };
            if left == Some(Duration::ZERO) {
                return Ok(false);
            }
            // For room in TX the kernel wakes; no event tells when a frame comes back.
            let events = if frames { POLLOUT } else { 0 };
            let slice = if frames && self.link.is_up() { LONG } else { SHORT / 10 };
            let found = poll(&[&mut *self], events, Some(left.map_or(slice, |left| left.min(slice))))?;
            let happened = found.watched && self.look();
            if happened || found.interrupted {
                return Ok(false);
            }
        }
    }

    fn has_packets(&mut self) -> bool {
        self.lanes.iter_mut().any(|lane| lane.ingress.available() != 0)
    }

    /// Everything that must not be left undone before a wait: FILL is filled, what is in TX is told to
    /// the kernel. Adds to `found` what is so then.
    fn prepare(&mut self, found: &mut Before) -> Result<()> {
        self.look_for_up();
        let up = self.link.is_up();
        let mut has = false;
        for lane in &mut self.lanes {
            let Lane { ingress, egress } = lane;
            let mut settle = || {
                if egress.in_flight() != 0 && up {
                    egress.settle_all(&mut self.pool)?;
                }
                if up { ingress.settle(&mut self.pool) } else { Ok(()) }
            };
            if let Err(error) = settle() {
                self.link.absorb(error)?;
            }
            if ingress.available() != 0 {
                has = true;
                found.arrived |= !ingress.is_blocked();
                found.blocked |= ingress.is_blocked();
            }
            found.unsettled |=
                ingress.is_starving() || (up && (egress.is_unsent() || ingress.is_unattended()));
        }
        self.share();
        if has { Ok(()) } else { self.check_gone() }
    }

    /// Makes up to `parts` ports of this one, for as many threads. Queues are dealt in turn: of four in
    /// two parts, 0 and 2, 1 and 3. There is at least one port, and none without a queue. The program
    /// stays for as long as any of them.
    ///
    /// Queues that the interface gets later are nobody's then.
    ///
    /// # Errors
    ///
    /// [`Cause::TooManyFiles`], and what else watching the interface may meet; the port is closed then.
    pub fn split(mut self, parts: usize) -> Result<Vec<Self>> {
        let parts = parts.clamp(1, self.lanes.len().max(1));
        let mut links = Vec::with_capacity(parts);
        for _ in 0..parts {
            links.push(Link::watch(&self.shared.device, self.lanes.first().map(Lane::socket))?);
        }
        if let Some(first) = links.first_mut() {
            first.take_over(&mut self.link);
        }
        let mut divided: Vec<Vec<Lane>> = (0..parts).map(|_| Vec::new()).collect();
        for (place, lane) in core::mem::take(&mut self.lanes).into_iter().enumerate() {
            divided[place % parts].push(lane);
        }
        let frames = self.pool.len();
        self.pool.give(frames);
        let ports = divided.into_iter().zip(links).map(|(lanes, link)| {
            let mut pool = self.shared.umem.pool();
            pool.fetch(frames / parts);
            // Nobody but one of them could take on a queue that comes later, and which is no matter
            // of theirs.
            Self::new(lanes, pool, self.shared.clone(), link, false)
        });
        Ok(ports.collect())
    }
}

/// How long to wait for what no event tells of: frames, or that the kernel takes what is in TX or FILL.
const SHORT: Duration = Duration::from_millis(1);
/// How long to wait for room in TX, where packets wait for it.
const MOMENT: Duration = Duration::from_micros(50);
/// How long to wait for an event that may be missed.
const LONG: Duration = Duration::from_millis(100);

/// A lane's part of a [`receive`](Port::receive).
#[inline(always)]
fn receive_on(
    lane: &mut Lane,
    pool: &mut Pool,
    link: &mut Link,
    batch: u32,
    each: impl FnMut(&mut Packet),
) -> Result<u32> {
    let taken = lane.ingress.receive(batch, each);
    let quiet = lane.ingress.is_settled() && lane.egress.in_flight() == 0;
    if !quiet && let Err(error) = serve(lane, pool, taken, link.is_up()) {
        link.absorb(error)?;
    }
    Ok(taken)
}

/// A lane's part of a [`process`](Port::process).
#[inline(always)]
fn process_on<O: Outcome>(
    ingress: &mut lane::Ingress,
    egress: &mut lane::Egress,
    pool: &mut Pool,
    link: &mut Link,
    batch: u32,
    each: impl FnMut(Packet) -> O,
) -> Result<u32> {
    let taken = lane::forward(ingress, egress, pool, batch, each);
    let up = link.is_up();
    let done = after_sending(egress, pool, taken, up).and_then(|()| after_taking(ingress, pool, taken, up));
    if let Err(error) = done {
        link.absorb(error)?;
    }
    Ok(taken)
}

/// What else is to be done for a lane in a turn that took `taken` packets without sending them on.
#[inline(never)]
fn serve(lane: &mut Lane, pool: &mut Pool, taken: u32, up: bool) -> Result<()> {
    let Lane { ingress, egress } = lane;
    if egress.in_flight() != 0 {
        egress.reclaim(pool);
        if up && egress.is_to_be_told() {
            egress.kick()?;
        }
    }
    if taken != 0 {
        if ingress.is_short() {
            ingress.top_up(pool);
        }
        return if up { ingress.wake() } else { Ok(()) };
    }
    if up { idle(ingress, egress, pool) } else { Ok(()) }
}

/// What else is to be done where the packets of a turn were sent, of which `taken` came.
#[inline(always)]
fn after_sending(egress: &mut lane::Egress, pool: &mut Pool, taken: u32, up: bool) -> Result<()> {
    if !up {
        return Ok(());
    }
    if egress.is_unsent() {
        egress.kick()?;
    }
    if taken == 0 && egress.in_flight() != 0 { egress.settle(pool) } else { Ok(()) }
}

/// What else is to be done where the `taken` packets of a turn came from.
#[inline(always)]
fn after_taking(ingress: &mut lane::Ingress, pool: &mut Pool, taken: u32, up: bool) -> Result<()> {
    if !up {
        return Ok(());
    }
    if taken != 0 {
        return ingress.wake();
    }
    if ingress.is_settled() { Ok(()) } else { ingress.settle(pool) }
}

/// A lane without packets, whose interface is up.
#[inline(never)]
fn idle(ingress: &mut lane::Ingress, egress: &mut lane::Egress, pool: &mut Pool) -> Result<()> {
    if egress.in_flight() != 0 {
        egress.settle(pool)?;
    }
    if ingress.is_settled() { Ok(()) } else { ingress.settle(pool) }
}

/// What is so before a wait.
#[derive(Clone, Copy, Default)]
struct Before {
    /// There are packets.
    arrived: bool,
    /// There are packets that the last turn had no room for in TX.
    blocked: bool,
    /// Something is left to do of which no event will tell.
    unsettled: bool,
}

/// What a poll found.
#[derive(Clone, Copy, Default)]
struct Found {
    sockets: bool,
    watched: bool,
    interrupted: bool,
}

/// Waits for any socket of `ports`, and for news of their links.
fn poll(ports: &[&mut Port], events: i16, timeout: Option<Duration>) -> Result<Found> {
    /// Descriptors for which nothing is allocated.
    const FEW: usize = 16;
    let Some(first) = ports.first() else { return Ok(Found::default()) };
    let watches = ports.iter().map(|port| port.link.watched());
    let sockets = ports.iter().flat_map(|port| port.sockets());
    let mut all = watches.chain(sockets.map(|socket| PollEntry { fd: socket.as_fd(), events, revents: 0 }));
    let count = ports.iter().map(|port| 1 + port.lanes.len()).sum();
    let (mut few, mut many) = ([first.link.watched(); FEW], Vec::new());
    let entries: &mut [PollEntry<'_>] = if count <= FEW {
        for (place, entry) in few.iter_mut().zip(&mut all) {
            *place = entry;
        }
        &mut few[..count]
    } else {
        many.extend(all);
        &mut many
    };
    match first.device().kernel().poll(entries, timeout) {
        Ok(_) => {
            let (watches, sockets) = entries.split_at(ports.len());
            let ready = |entries: &[PollEntry<'_>]| entries.iter().any(|entry| entry.revents != 0);
            Ok(Found { sockets: ready(sockets), watched: ready(watches), interrupted: false })
        }
        Err(Errno::INTR) => Ok(Found { interrupted: true, ..Found::default() }),
        Err(errno) => {
            let queue = first.lanes.first().map_or(0, |lane| lane.socket().queue());
            let doing = Doing::Wait { interface: first.device().name().into(), queue };
            let cause = match errno {
                Errno::DEADLK => Cause::Deadlock,
                errno => general(errno),
            };
            Err(Error::with_errno(doing, cause, errno))
        }
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        let up = self.link.is_up() && !self.link.is_gone();
        for lane in &mut self.lanes {
            if up && lane.egress.is_unsent() {
                // Whatever it says, the port is closed.
                let _ = lane.egress.kick();
            }
            lane.empty_into(&mut self.pool);
        }
    }
}

impl fmt::Debug for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Port")
            .field("interface", &self.device().name())
            .field("queues", &self.queues())
            .field("zero_copy", &self.is_zero_copy())
            .finish_non_exhaustive()
    }
}
