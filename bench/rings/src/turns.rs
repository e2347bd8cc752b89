//! Whole turns of two programs, over the rings and by [`Port`]: what `loops` leaves out is here, the
//! counting of packets and bytes for others to read, the wake-ups, and what is done when there is
//! nothing to do.
//!
//! Every function is one turn, is compiled as one function, and has a name of its own, so that
//! instructions can be counted in it alone.

use std::hint::spin_loop;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use xsk::port::Action;
use xsk::socket::{RxTx, Sent};
use xsk::umem::Pool;
use xsk::{Packet, Port, Result, Socket};

use crate::loops::{head, swap_macs};
use crate::{Bench, Fake, RING};

/// What a program has counted, for another thread to read. One thread writes, so it is stored and
/// never added to.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Counters {
    rx_packets: AtomicU64,
    rx_bytes: AtomicU64,
    tx_packets: AtomicU64,
    tx_bytes: AtomicU64,
    tx_dropped: AtomicU64,
}

/// A program over the rings of a socket.
#[derive(Debug)]
pub struct OverRings {
    xsk: RxTx,
    pool: Pool,
    batch: u32,
    /// Packets given to TX, and those of them that are completed.
    pushed: u64,
    completed: u64,
    rx_packets: u64,
    rx_bytes: u64,
    tx_bytes: u64,
    dropped: u64,
    counters: Arc<Counters>,
    /// What was read of the packets.
    pub sum: u64,
}

impl OverRings {
    /// Opens a socket.
    ///
    /// # Panics
    ///
    /// When there is no memory.
    pub fn new(bench: &Bench, fake: &Fake, batch: u32) -> Self {
        let mut pool = bench.umem().pool();
        pool.fetch(usize::MAX);
        let xsk = Socket::builder(&fake.device())
            .ring_size(RING)
            .fill_from(&mut pool, RING)
            .open(bench.umem())
            .expect("the fake kernel refuses nothing");
        Self {
            xsk,
            pool,
            batch,
            pushed: 0,
            completed: 0,
            rx_packets: 0,
            rx_bytes: 0,
            tx_bytes: 0,
            dropped: 0,
            counters: Arc::default(),
            sum: 0,
        }
    }

    /// One turn of rxdrop.
    #[inline(never)]
    pub fn rxdrop(&mut self) -> Result<u32> {
        let xsk = &mut self.xsk;
        let (mut bytes, mut sum) = (0, self.sum);
        let taken = xsk.fill.extend(xsk.rx.take(self.batch), |packet| {
            bytes += packet.len() as u64;
            sum = sum.wrapping_add(head(&packet));
            packet.into_frame()
        });
        self.sum = sum;
        self.rx_packets += u64::from(taken);
        self.rx_bytes += bytes;
        self.counters.rx_packets.store(self.rx_packets, Relaxed);
        self.counters.rx_bytes.store(self.rx_bytes, Relaxed);
        if taken == 0 { self.rest() } else { Ok(taken) }
    }

    /// One turn of l2fwd, in which every packet is sent.
    #[inline(never)]
    pub fn l2fwd(&mut self) -> Result<u32> {
        let completed = self.reclaim();
        let mut bytes = 0;
        let taken = self.xsk.tx.extend(self.xsk.rx.take(self.batch), |mut packet: Packet| {
            bytes += packet.len() as u64;
            swap_macs(&mut packet);
            packet
        });
        self.tx_bytes += bytes;
        self.after_forward(completed, taken, taken, bytes)
    }

    /// One turn of l2fwd, which drops packets without a whole Ethernet header.
    #[inline(never)]
    pub fn l2fwd_by_choice(&mut self) -> Result<u32> {
        let completed = self.reclaim();
        let (mut bytes, mut sent, mut sent_bytes) = (0, 0, 0);
        let taken = self.xsk.tx.extend_some(self.xsk.rx.take(self.batch), |mut packet: Packet| {
            bytes += packet.len() as u64;
            if packet.len() < 14 {
                self.pool.put(packet);
                return None;
            }
            swap_macs(&mut packet);
            sent += 1;
            sent_bytes += packet.len() as u64;
            Some(packet)
        });
        self.tx_bytes += sent_bytes;
        self.after_forward(completed, taken, sent, bytes)
    }

    #[inline(always)]
    fn reclaim(&mut self) -> u32 {
        let completed = self.xsk.fill.extend_frames(self.xsk.completion.take(self.batch));
        self.completed += u64::from(completed);
        completed
    }

    #[inline(always)]
    fn after_forward(&mut self, completed: u32, taken: u32, sent: u32, bytes: u64) -> Result<u32> {
        self.pushed += u64::from(sent);
        self.rx_packets += u64::from(taken);
        self.rx_bytes += bytes;
        // No fence before the flag is read, as a port needs none in copy mode: there it never changes.
        if self.pushed != self.completed && self.xsk.socket.send()? == Sent::Dropped {
            self.dropped += 1;
        }
        self.counters.rx_packets.store(self.rx_packets, Relaxed);
        self.counters.rx_bytes.store(self.rx_bytes, Relaxed);
        self.counters.tx_packets.store(self.completed, Relaxed);
        self.counters.tx_bytes.store(self.tx_bytes, Relaxed);
        self.counters.tx_dropped.store(self.dropped, Relaxed);
        if taken == 0 && completed == 0 { self.rest() } else { Ok(taken) }
    }

    /// The end of a turn without work.
    #[inline(never)]
    fn rest(&mut self) -> Result<u32> {
        let xsk = &mut self.xsk;
        self.completed += u64::from(xsk.completion.drain_into(&mut self.pool));
        xsk.fill.refill(&mut self.pool, self.batch);
        if xsk.fill.needs_wakeup() {
            xsk.socket.wake_rx()?;
        } else {
            spin_loop();
        }
        Ok(0)
    }
}

/// The same programs by [`Port`].
#[derive(Debug)]
pub struct ByPort {
    port: Port,
    /// What was read of the packets.
    pub sum: u64,
}

impl ByPort {
    /// Opens a port.
    ///
    /// # Panics
    ///
    /// When there is no memory.
    pub fn new(bench: &Bench, fake: &Fake, batch: u32) -> Self {
        let port = Port::builder(&fake.device())
            .umem(bench.umem())
            .ring_size(RING)
            .batch(batch)
            .no_program()
            .open()
            .expect("the fake kernel refuses nothing");
        Self { port, sum: 0 }
    }

    /// One turn of rxdrop.
    #[inline(never)]
    pub fn rxdrop(&mut self) -> Result<u32> {
        let mut sum = self.sum;
        let taken = self.port.receive(|packet| sum = sum.wrapping_add(head(packet)));
        self.sum = sum;
        taken
    }

    /// One turn of l2fwd, in which every packet is sent.
    #[inline(never)]
    pub fn l2fwd(&mut self) -> Result<u32> {
        self.port.process(|mut packet| {
            swap_macs(&mut packet);
            packet
        })
    }

    /// One turn of l2fwd, which drops packets without a whole Ethernet header.
    #[inline(never)]
    pub fn l2fwd_by_choice(&mut self) -> Result<u32> {
        self.port.process(|mut packet| {
            if packet.len() < 14 {
                return Action::Drop(packet);
            }
            swap_macs(&mut packet);
            Action::Send(packet)
        })
    }
}
