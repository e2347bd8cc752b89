//! One queue of a port: a socket's rings, and the rules by which frames go round.
//!
//! A lane owns as many frames as FILL holds. They are in FILL, with the kernel, or in RX; those
//! that the program took out of RX are *owed* to FILL until it has others for them. So FILL always
//! has room for what is owed, and everything beyond it belongs to the pool.

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};

use super::Outcome;
use crate::error::{Cause, Doing, Error, Result};
use crate::rings::{CompletionRing, FillRing, RxRing, TxRing};
use crate::socket::{RxTx, Sent, Socket, Statistics};
use crate::umem::{Packet, Pool};

/// What a lane has counted, for any thread to read. One thread writes, so nothing is ever added to
/// in memory.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Counters {
    pub(super) rx_packets: AtomicU64,
    pub(super) rx_bytes: AtomicU64,
    pub(super) tx_packets: AtomicU64,
    pub(super) tx_bytes: AtomicU64,
    pub(super) tx_completed: AtomicU64,
    pub(super) tx_dropped: AtomicU64,
    /// What the kernel had counted when the socket was closed.
    pub(super) closed: Mutex<Option<Statistics>>,
}

#[inline(always)]
fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Relaxed) + n, Relaxed);
}

/// The receiving half of a lane.
#[derive(Debug)]
pub(super) struct Ingress {
    socket: Socket,
    fill: FillRing,
    rx: RxRing,
    /// Frames that the lane should have, in FILL, with the kernel, and in RX.
    full: u32,
    /// What had been pushed into FILL, less what had been taken from RX, when it had none.
    empty: u32,
    /// The last turn was to send packets on, and TX had no room.
    blocked: bool,
    zero_copy: bool,
    counters: Arc<Counters>,
}

/// The sending half of a lane.
#[derive(Debug)]
pub(super) struct Egress {
    socket: Socket,
    tx: TxRing,
    completion: CompletionRing,
    /// What had been pushed into TX, less what had been taken from COMPLETION, when nothing was on
    /// its way.
    idle: u32,
    /// What was pushed into TX, as the kernel was told last. Anything else where it has to be told
    /// again.
    told: u32,
    /// The interface has no such transmit queue: the kernel would take packets and never send them.
    mute: bool,
    zero_copy: bool,
    counters: Arc<Counters>,
}

/// A queue.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) ingress: Ingress,
    pub(super) egress: Egress,
}

impl Lane {
    /// A lane over a socket whose FILL was given `filled` frames; it should have `full`. The interface
    /// has `tx_queues`.
    pub(super) fn new(xsk: RxTx, full: u32, filled: u32, tx_queues: u32) -> Self {
        let RxTx { socket, fill, rx, tx, completion } = xsk;
        let zero_copy = socket.is_zero_copy();
        let counters = Arc::<Counters>::default();
        let ingress = Ingress {
            socket: socket.clone(),
            full,
            empty: fill.pushed().wrapping_sub(rx.taken()).wrapping_sub(filled),
            blocked: false,
            fill,
            rx,
            zero_copy,
            counters: counters.clone(),
        };
        let egress = Egress {
            idle: tx.pushed().wrapping_sub(completion.taken()),
            told: tx.pushed(),
            mute: socket.queue() >= tx_queues,
            socket,
            tx,
            completion,
            zero_copy,
            counters,
        };
        Self { ingress, egress }
    }

    pub(super) fn socket(&self) -> &Socket {
        &self.ingress.socket
    }

    pub(super) fn counters(&self) -> &Arc<Counters> {
        &self.ingress.counters
    }

    /// Takes what can be had out of the rings before they are closed: a socket that is closed keeps
    /// what is in them.
    #[allow(unsafe_code)]
    pub(super) fn empty_into(&mut self, pool: &mut Pool) {
        let Self { ingress, egress } = self;
        egress.reclaim(pool);
        while ingress.rx.available() != 0 {
            for packet in ingress.rx.take(u32::MAX) {
                pool.put(packet);
            }
        }
        if ingress.socket.is_off() {
            // SAFETY: the kernel took the socket off its interface, for good, and with that it
            // ended all work on the rings. What it had taken of FILL, and not yet said so, it gives
            // back by no other ring: it says so before it publishes in RX.
            //
            // TX stays as it is: kernels before 6.17 complete packets that they have not said to have
            // taken.
            unsafe { ingress.fill.withdraw_into(pool) };
        }
        let statistics = ingress.socket.statistics().ok();
        *ingress.counters.closed.lock().unwrap_or_else(PoisonError::into_inner) = statistics;
    }

    /// As [`empty_into`](Self::empty_into), for a socket to which no packet ever went, because it was in
    /// no map.
    #[allow(unsafe_code)]
    pub(super) fn undo_into(mut self, pool: &mut Pool) {
        self.empty_into(pool);
        if !self.ingress.zero_copy {
            // SAFETY: in copy mode the kernel looks at FILL for a packet that goes to the socket, and
            // never before.
            unsafe { self.ingress.fill.withdraw_into(pool) };
        }
    }
}

impl Ingress {
    /// Packets that wait in RX, as far as is known.
    #[inline(always)]
    pub(super) fn available(&mut self) -> u32 {
        self.rx.available()
    }

    /// Shows up to `batch` packets to `each`; their frames go straight back to FILL.
    #[inline(always)]
    pub(super) fn receive(&mut self, batch: u32, mut each: impl FnMut(&mut Packet)) -> u32 {
        let mut bytes = 0;
        let counted = &mut bytes;
        // `each` is moved, here and on: then what it counts in is told to nobody, and stays in a
        // register.
        //
        // There is room for all, but for a moment in which the kernel has published the packets and
        // not yet the frames that it took for them; the rest waits in RX until then.
        let taken = self.fill.extend(self.rx.take(batch), move |mut packet| {
            *counted += packet.len() as u64;
            each(&mut packet);
            packet.into_frame()
        });
        self.blocked = false;
        let counters = &*self.counters;
        add(&counters.rx_packets, taken.into());
        add(&counters.rx_bytes, bytes);
        taken
    }

    /// Whether the last turn was to send packets on, and had no room in TX for any.
    pub(super) fn is_blocked(&self) -> bool {
        self.blocked
    }

    /// Frames that FILL should be given. Derived from the rings, so that it is true whatever became of
    /// a batch: entries refused, another memory's packet put in a packet's place, a panic.
    #[inline(always)]
    fn owed(&self) -> u32 {
        let has = self.fill.pushed().wrapping_sub(self.rx.taken()).wrapping_sub(self.empty);
        self.full.saturating_sub(has)
    }

    /// Whether FILL has much less than it should.
    #[inline(always)]
    pub(super) fn is_short(&self) -> bool {
        self.owed() > self.full / 4
    }

    /// Whether FILL has so little that packets may be lost for want of frames.
    pub(super) fn is_starving(&self) -> bool {
        self.owed() > self.full / 4 * 3
    }

    /// Whether FILL holds all frames of the lane, so that a zero-copy driver has none to receive into:
    /// it is about to take some, or falls asleep just now and missed that there are any.
    pub(super) fn is_unattended(&mut self) -> bool {
        let missing = self.fill.size() - self.full;
        self.zero_copy
            && self.owed() < self.full
            && self.fill.room() - missing.min(self.fill.room()) == self.owed()
    }

    /// Gives FILL what it is owed, as far as the pool and the depot have it.
    #[inline(never)]
    pub(super) fn top_up(&mut self, pool: &mut Pool) {
        let owed = self.owed();
        let lacking = (owed as usize).saturating_sub(pool.len());
        if lacking != 0 {
            pool.fetch(lacking);
        }
        self.fill.refill(pool, owed);
    }

    /// Whether [`settle`](Self::settle) has something to do.
    #[inline(always)]
    pub(super) fn is_settled(&self) -> bool {
        self.owed() == 0 && !self.zero_copy
    }

    /// With nothing to receive: fills FILL, and wakes the driver if it waits for that.
    ///
    /// In copy mode nobody waits for FILL: the kernel looks at it for every packet.
    pub(super) fn settle(&mut self, pool: &mut Pool) -> Result<()> {
        if self.owed() != 0 {
            self.top_up(pool);
        }
        self.wake()
    }

    /// Wakes the driver where it waits for frames in FILL.
    #[inline(always)]
    pub(super) fn wake(&self) -> Result<()> {
        if self.zero_copy && self.fill.needs_wakeup() { self.socket.wake_rx() } else { Ok(()) }
    }
}

impl Egress {
    /// Packets given to TX whose frames are not back.
    #[inline(always)]
    pub(super) fn in_flight(&self) -> u32 {
        self.tx.pushed().wrapping_sub(self.completion.taken()).wrapping_sub(self.idle)
    }

    /// Whether the kernel must be told of something in TX.
    #[inline(always)]
    pub(super) fn is_unsent(&self) -> bool {
        self.told != self.tx.pushed()
    }

    /// Whether the kernel has to be asked whether it must be woken.
    #[inline(always)]
    pub(super) fn is_to_be_told(&self) -> bool {
        self.is_unsent() || (self.zero_copy && self.in_flight() != 0)
    }

    /// Packets that TX has room for.
    #[inline(always)]
    pub(super) fn room(&mut self) -> u32 {
        if self.mute { 0 } else { self.tx.room() }
    }

    /// Whether the interface has a transmit queue for this.
    pub(super) fn is_mute(&self) -> bool {
        self.mute
    }

    /// What is in TX is told to the kernel once more: its interface is back.
    pub(super) fn tell_again(&mut self) {
        if self.in_flight() != 0 {
            self.told = self.tx.pushed().wrapping_sub(1);
        }
    }

    /// Puts one packet into TX.
    #[inline]
    pub(super) fn push(&mut self, packet: Packet) -> core::result::Result<(), crate::PushError<Packet>> {
        if self.mute {
            return Err(crate::PushError::Full(packet));
        }
        let bytes = packet.len() as u64;
        self.tx.reserve(1).push(packet)?;
        self.pushed(1, bytes);
        Ok(())
    }

    /// Puts up to `n` packets into TX that `make` makes of the pool's frames; ends at the first frame
    /// that it gives back.
    #[inline]
    pub(super) fn generate(
        &mut self,
        n: u32,
        pool: &mut Pool,
        mut make: impl FnMut(crate::Frame) -> core::result::Result<Packet, crate::Frame>,
    ) -> u32 {
        let mut slots = self.tx.reserve(n.min(pool.len() as u32));
        let (mut made, mut bytes) = (0, 0);
        while slots.room() != 0
            && let Some(frame) = pool.take()
        {
            let packet = match make(frame) {
                Ok(packet) => packet,
                Err(frame) => {
                    pool.put(frame);
                    break;
                }
            };
            let len = packet.len() as u64;
            if let Err(refused) = slots.push(packet) {
                pool.put(refused.into_inner());
                break;
            }
            made += 1;
            bytes += len;
        }
        drop(slots);
        self.pushed(made, bytes);
        made
    }

    #[inline(always)]
    fn pushed(&mut self, n: u32, bytes: u64) {
        let counters = &*self.counters;
        add(&counters.tx_packets, n.into());
        add(&counters.tx_bytes, bytes);
    }

    #[inline(always)]
    fn completed(&mut self, n: u32) {
        add(&self.counters.tx_completed, n.into());
    }

    /// Takes all sent frames into the pool; returns how many.
    #[inline(never)]
    pub(super) fn reclaim(&mut self, pool: &mut Pool) -> u32 {
        let mut all = 0;
        while self.completion.available() != 0 {
            let taken = self.completion.drain_into(pool);
            self.completed(taken);
            all += taken;
        }
        all
    }

    /// Has the kernel send what is in TX, where it waits for that: always in copy mode, where the
    /// call is what transmits.
    #[inline]
    pub(super) fn kick(&mut self) -> Result<()> {
        if self.mute {
            return self.no_queue();
        }
        let pushed = self.tx.pushed();
        if self.zero_copy && !self.tx.needs_wakeup() {
            // The driver is awake, or falls asleep just now: whoever finds nothing to do asks again.
            self.told = pushed;
            return Ok(());
        }
        let sent = self.socket.send()?;
        if sent == Sent::Dropped {
            add(&self.counters.tx_dropped, 1);
        }
        // In copy mode the kernel stops early, with a word or without, and must be told again.
        let all = self.zero_copy || (sent != Sent::Again && self.tx.pending() == 0);
        self.told = if all { pushed } else { pushed.wrapping_sub(1) };
        Ok(())
    }

    #[cold]
    fn no_queue(&self) -> Result<()> {
        let queue = self.socket.queue();
        let doing = Doing::Send { interface: self.socket.device().name().into(), queue };
        Err(Error::new(doing, Cause::NoTxQueue { queue }))
    }

    /// With nothing else to do: has the kernel look again where it must, and takes frames back.
    pub(super) fn settle(&mut self, pool: &mut Pool) -> Result<()> {
        self.reclaim(pool);
        if self.is_to_be_told() { self.kick() } else { Ok(()) }
    }

    /// [`settle`](Self::settle), until the kernel has taken all that it takes now: in copy mode a call
    /// sends a batch.
    pub(super) fn settle_all(&mut self, pool: &mut Pool) -> Result<()> {
        loop {
            let before = self.tx.pending();
            self.settle(pool)?;
            if !self.is_unsent() || self.tx.pending() >= before {
                return Ok(());
            }
        }
    }
}

/// Takes up to `batch` packets from `ingress`, and sends what becomes of them through `egress`. The
/// frames of what was sent before go straight back to FILL.
#[inline(always)]
pub(super) fn forward<O: Outcome>(
    ingress: &mut Ingress,
    egress: &mut Egress,
    pool: &mut Pool,
    batch: u32,
    each: impl FnMut(Packet) -> O,
) -> u32 {
    let mut back = 0;
    if egress.in_flight() != 0 {
        let owed = ingress.owed();
        back = ingress.fill.extend_frames(egress.completion.take(owed.min(batch)));
        egress.completed(back);
        if (back == 0 || back == owed) && egress.in_flight() != 0 {
            // More than FILL is owed.
            egress.reclaim(pool);
        }
    }
    let before = egress.tx.pushed();
    let mut bytes = (0, 0);
    let taken = O::carry(&mut egress.tx, ingress.rx.take(batch), pool, &mut bytes, each);
    let counters = &*ingress.counters;
    add(&counters.rx_packets, taken.into());
    add(&counters.rx_bytes, bytes.0);
    egress.pushed(egress.tx.pushed().wrapping_sub(before), bytes.1);
    ingress.blocked = taken == 0 && egress.tx.room() == 0;
    if taken > back && ingress.is_short() {
        ingress.top_up(pool);
    }
    taken
}
