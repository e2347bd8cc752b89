//! Every interleaving of the lock-free parts, as far as loom explores them. Run with
//! `RUSTFLAGS="--cfg loom" cargo test -p xsk --test loom --release`.

#![cfg(loom)]
#![allow(
    clippy::arc_with_non_send_sync,
    reason = "loom's cells are shared to be watched, as its threads allow"
)]

use std::sync::Arc;

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering::*, fence};
use loom::thread;
use xsk::abi::Descriptor;
use xsk::ring::{Consumer, Producer, RingMemory};
use xsk::umem::{Pair, Umem};
use xsk::{FillRing, Pool, RxRing};

/// Explores with at most `preemptions` switches that no thread asked for.
fn explore(preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

fn raw(size: u32, start: u32) -> (Producer<u64>, Consumer<u64>) {
    let memory = RingMemory::allocate(size, start);
    // SAFETY: one value a side, and both follow the protocol.
    unsafe { (Producer::new(memory.clone()), Consumer::new(memory)) }
}

fn umem(frames: u32, ledger: bool) -> (Umem, Pool) {
    Umem::builder().frames(frames).chunk_size(2048).ledger(ledger).build().unwrap()
}

// --- The rings. Loom watches each slot: it fails when a write could meet another access.

#[test]
fn batches_cross_a_ring_in_order_while_it_wraps() {
    explore(3, || {
        let (mut producer, mut consumer) = raw(2, u32::MAX - 1);
        let pushing = thread::spawn(move || {
            let mut next = 0;
            while next < 4 {
                let mut slots = producer.reserve(2);
                while next < 4 && slots.push(next) {
                    next += 1;
                }
                drop(slots);
                thread::yield_now();
            }
        });
        let mut expected = 0;
        while expected < 4 {
            for value in consumer.take(2) {
                assert_eq!(value, expected);
                expected += 1;
            }
            thread::yield_now();
        }
        pushing.join().unwrap();
    });
}

#[test]
fn slots_of_a_forgotten_guard_are_filled_again_without_a_race() {
    explore(3, || {
        let (mut producer, mut consumer) = raw(1, u32::MAX);
        let pushing = thread::spawn(move || {
            let mut next = 0;
            while next < 2 {
                next += u64::from(producer.reserve(1).push(next));
                thread::yield_now();
            }
        });
        while consumer.available() == 0 {
            thread::yield_now();
        }
        std::mem::forget(consumer.take(1));
        loop {
            match consumer.take(1).next() {
                None => thread::yield_now(),
                Some(value) => break assert_eq!(value, 1),
            }
        }
        pushing.join().unwrap();
    });
}

#[test]
fn a_frame_that_goes_round_takes_its_bytes_with_it() {
    explore(3, || {
        let (umem, mut pool) = umem(1, true);
        let pair = Pair::new(&umem).unwrap();
        let (fill, rx) = (RingMemory::<u64>::allocate(1, u32::MAX), RingMemory::allocate(1, u32::MAX));
        // SAFETY: one value a side, and both follow the protocol.
        let (mut from_fill, mut to_rx, mut fill, mut rx) = unsafe {
            (
                Consumer::new(fill.clone()),
                Producer::new(rx.clone()),
                FillRing::over(fill, &pair),
                RxRing::over(rx, &pair),
            )
        };
        // Stands for the chunk's bytes, where loom can watch them.
        let bytes = Arc::new(UnsafeCell::new(0));
        let kernel = thread::spawn({
            let bytes = bytes.clone();
            move || {
                let mut round = 0;
                while round < 2 {
                    if let Some(addr) = from_fill.take(1).next() {
                        // SAFETY: FILL gave the chunk to this side; loom checks it.
                        bytes.with_mut(|b| unsafe { *b += 1 });
                        assert!(to_rx.reserve(1).push(Descriptor { addr, len: 1, options: 0 }));
                        round += 1;
                    }
                    thread::yield_now();
                }
            }
        });
        for _ in 0..2 {
            while fill.refill(&mut pool, 1) == 0 {
                thread::yield_now();
            }
            let packet = loop {
                match rx.take(1).next() {
                    Some(packet) => break packet,
                    None => thread::yield_now(),
                }
            };
            // SAFETY: RX gave the chunk to this side; loom checks it.
            bytes.with_mut(|b| unsafe { *b *= 10 });
            pool.put(packet);
        }
        kernel.join().unwrap();
        // SAFETY: the other side is gone.
        assert_eq!(bytes.with(|b| unsafe { *b }), 110);
        assert_eq!(umem.census().contradiction(), None);
    });
}

// --- The ledger, with a kernel that lies.

/// What the kernel hands over before it was lent anything: the descriptor of chunk 0, `times` times.
fn lying_rx(pair: &Arc<Pair>, times: u32) -> RxRing {
    let memory = RingMemory::allocate(2, 0);
    // SAFETY: one value a side. What the entries say is checked by the ledger.
    unsafe {
        let mut kernel = Producer::new(memory.clone());
        let mut slots = kernel.reserve(2);
        for _ in 0..times {
            assert!(slots.push(Descriptor { addr: 0, len: 1, options: 0 }));
        }
        drop(slots);
        RxRing::over(memory, pair)
    }
}

#[test]
fn a_chunk_that_is_handed_over_too_early_and_twice_has_one_owner_at_a_time() {
    explore(3, || {
        let (umem, mut pool) = umem(1, true);
        let pair = Pair::new(&umem).unwrap();
        let mut rx = lying_rx(&pair, 2);
        // SAFETY: as for RX; nobody takes from this ring.
        let mut fill = unsafe { FillRing::over(RingMemory::allocate(1, 0), &pair) };
        let bytes = Arc::new(UnsafeCell::new(0));
        let pushing = thread::spawn({
            let bytes = bytes.clone();
            move || {
                let frame = pool.take().unwrap();
                // SAFETY: holding the frame is the right to touch the bytes; loom checks it.
                bytes.with_mut(|b| unsafe { *b = 1 });
                fill.reserve(1).push(frame).unwrap();
                (fill, pool)
            }
        });
        let taken: Vec<_> = rx.take(2).collect();
        assert!(taken.len() <= 1, "one chunk, two owners");
        if !taken.is_empty() {
            // SAFETY: as above. Only the ledger orders this access after the other.
            bytes.with_mut(|b| unsafe {
                assert_eq!(*b, 1);
                *b = 2;
            });
        }
        let back = pushing.join().unwrap();
        assert_eq!(umem.faults().duplicate, 2 - taken.len() as u64);
        drop((taken, back, rx));
    });
}

#[test]
fn two_sockets_that_are_handed_one_chunk_make_one_packet_of_it() {
    explore(2, || {
        let (umem, mut pool) = umem(1, true);
        let (mine, other) = (Pair::new(&umem).unwrap(), Pair::new(&umem).unwrap());
        let (mut rx, mut other_rx) = (lying_rx(&mine, 1), lying_rx(&other, 1));
        // SAFETY: nobody takes from this ring.
        let mut fill = unsafe { FillRing::over(RingMemory::allocate(1, 0), &mine) };
        fill.refill(&mut pool, 1);
        let elsewhere = thread::spawn(move || (other_rx.take(1).count(), other_rx).0);
        let here: Vec<_> = rx.take(1).collect();
        assert_eq!((here.len(), elsewhere.join().unwrap()), (1, 0));
        assert_eq!(umem.faults().duplicate, 1);
    });
}

// --- The depot and the end of the memory.

#[test]
fn pools_on_two_threads_trade_frames_and_each_has_one_owner() {
    explore(2, || {
        let (umem, pool) = umem(2, false);
        drop(pool);
        let bytes = Arc::new([UnsafeCell::new(0), UnsafeCell::new(0)]);
        let trade = |umem: Umem, bytes: Arc<[UnsafeCell<i32>; 2]>| {
            let mut pool = umem.pool();
            pool.fetch(1);
            while let Some(frame) = pool.take() {
                // SAFETY: holding the frame is the right to touch the bytes; loom checks it.
                bytes[umem.index(&frame).unwrap() as usize].with_mut(|b| unsafe { *b += 1 });
                drop(frame);
            }
            pool.fetch(1);
            pool.give(1);
        };
        let other = thread::spawn({
            let (umem, bytes) = (umem.clone(), bytes.clone());
            move || trade(umem, bytes)
        });
        trade(umem.clone(), bytes);
        other.join().unwrap();
        let census = umem.census();
        assert_eq!((census.depot, census.pools, census.contradiction()), (2, 0, None));
    });
}

#[test]
fn the_memory_is_released_once_by_whoever_is_last() {
    explore(3, || {
        let (umem, mut pool) = umem(2, false);
        let memory = Arc::downgrade(umem.memory().owner());
        let (a, b) = (pool.take(), pool.take());
        drop(pool);
        let (first, second) = (thread::spawn(move || drop(a)), thread::spawn(move || drop(umem)));
        assert!(memory.upgrade().is_some());
        drop(b);
        first.join().unwrap();
        second.join().unwrap();
        assert!(memory.upgrade().is_none());
    });
}

// --- need_wakeup. The program publishes a packet, a driver goes to sleep. A lost wake-up is a
// driver that sleeps over an entry while the program believes that it is awake.

/// What the two sides and the wake-up share.
struct Sleeper {
    memory: RingMemory<u64>,
    woken: AtomicBool,
    taken: AtomicU32,
}

fn sleeper() -> (Producer<u64>, Consumer<u64>, Arc<Sleeper>) {
    let memory = RingMemory::allocate(1, u32::MAX);
    // SAFETY: one value a side, and both follow the protocol.
    let (producer, consumer) = unsafe { (Producer::new(memory.clone()), Consumer::new(memory.clone())) };
    let shared = Sleeper { memory, woken: AtomicBool::new(false), taken: AtomicU32::new(0) };
    (producer, consumer, Arc::new(shared))
}

impl Sleeper {
    fn look(&self, ring: &mut Consumer<u64>) -> bool {
        let found = ring.take(1).next().is_some();
        self.taken.fetch_add(found.into(), Relaxed);
        found
    }

    /// A driver that sets the flag, and then looks again behind a fence of its own.
    fn careful_driver(&self, mut ring: Consumer<u64>) {
        if !self.look(&mut ring) {
            self.memory.set_flags(1);
            fence(SeqCst);
            self.look(&mut ring);
        }
    }

    /// A driver as i40e's receive side: the flag is set after the last look, with no fence.
    fn careless_driver(&self, mut ring: Consumer<u64>) {
        if !self.look(&mut ring) {
            self.memory.set_flags(1);
            while !self.woken.load(Acquire) {
                thread::yield_now();
            }
            assert!(self.look(&mut ring), "a wake-up comes after its entry");
        }
    }

    /// Fails when nobody took the entry, and nobody is going to.
    fn assert_not_lost(&self) {
        let taken = self.taken.load(Relaxed) == 1;
        assert!(taken || self.woken.load(Relaxed), "the wake-up was lost");
    }
}

fn flag_then_look(needs_wakeup: impl Fn(&Producer<u64>) -> bool + Send + Sync + 'static) {
    explore(4, move || {
        let (mut producer, consumer, shared) = sleeper();
        let driver = thread::spawn({
            let shared = shared.clone();
            move || shared.careful_driver(consumer)
        });
        assert!(producer.reserve(1).push(1));
        if needs_wakeup(&producer) {
            shared.woken.store(true, Relaxed);
        }
        driver.join().unwrap();
        shared.assert_not_lost();
    });
}

#[test]
fn asking_once_behind_a_fence_is_enough_for_a_driver_that_looks_again() {
    flag_then_look(Producer::needs_wakeup);
}

/// The same without our fence: publishing and asking may be seen the other way round.
#[test]
#[should_panic(expected = "the wake-up was lost")]
fn asking_without_a_fence_loses_the_wake_up() {
    flag_then_look(|producer| producer.memory().flags() & 1 != 0);
}

#[test]
fn asking_again_when_idle_never_loses_a_packet_for_good() {
    explore(3, || {
        let (mut producer, consumer, shared) = sleeper();
        let driver = thread::spawn({
            let shared = shared.clone();
            move || shared.careless_driver(consumer)
        });
        assert!(producer.reserve(1).push(1));
        // Idle iterations, until the ring is empty. Loom fails if this could go on for ever.
        while producer.room(1) == 0 {
            if producer.needs_wakeup() {
                shared.woken.store(true, Release);
            }
            thread::yield_now();
        }
        driver.join().unwrap();
        shared.assert_not_lost();
    });
}

/// Why once is not enough: such a driver falls asleep a moment after it was asked about.
#[test]
#[should_panic(expected = "the wake-up was lost")]
fn asking_once_loses_a_packet_with_a_driver_that_sets_the_flag_last() {
    explore(3, || {
        let (mut producer, mut consumer, shared) = sleeper();
        let driver = thread::spawn({
            let shared = shared.clone();
            move || {
                if !shared.look(&mut consumer) {
                    shared.memory.set_flags(1);
                }
            }
        });
        assert!(producer.reserve(1).push(1));
        if producer.needs_wakeup() {
            shared.woken.store(true, Relaxed);
        }
        driver.join().unwrap();
        shared.assert_not_lost();
    });
}
