//! The rings, raw and typed, with a kernel at their far end: one that works, one that lies, and one
//! on another thread.

#![cfg(not(loom))]

mod common;

use std::collections::{HashSet, VecDeque};
use std::mem::{ManuallyDrop, forget};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{TryRecvError, sync_channel};

use common::{CHUNK, Deadline, Kernel, LENGTH, Rings, assert_all_home, assert_consistent, socket, umem};
use proptest::prelude::*;
use xsk::ring::{Consumer, Producer, RingMemory};
use xsk::{Frame, Packet, Pool, PushError, Umem};

/// Both sides of a raw ring.
fn raw(size: u32, start: u32) -> (Producer<u64>, Consumer<u64>) {
    let memory = RingMemory::allocate(size, start);
    // SAFETY: one value a side, and both follow the protocol.
    unsafe { (Producer::new(memory.clone()), Consumer::new(memory)) }
}

fn push_all(ring: &mut Producer<u64>, values: impl IntoIterator<Item = u64>) {
    let mut slots = ring.reserve(u32::MAX);
    for value in values {
        assert!(slots.push(value));
    }
}

#[test]
fn entries_pass_between_threads_in_order_and_across_the_wrap() {
    let count = if cfg!(miri) { 60 } else { 100_000 };
    let (mut producer, mut consumer) = raw(8, u32::MAX - 20);
    std::thread::scope(|threads| {
        threads.spawn(move || {
            let (mut next, deadline) = (0, Deadline::new());
            while next < count {
                let mut slots = producer.reserve(5);
                while next < count && slots.push(next) {
                    next += 1;
                }
                drop(slots);
                deadline.wait();
            }
        });
        let (mut expected, deadline) = (0, Deadline::new());
        while expected < count {
            for value in consumer.take(3) {
                assert_eq!(value, expected);
                expected += 1;
            }
            deadline.wait();
        }
    });
}

#[test]
fn a_ring_holds_its_size_and_not_one_more() {
    let (mut producer, mut consumer) = raw(4, u32::MAX);
    push_all(&mut producer, 0..4);
    assert_eq!(producer.room(1), 0);
    assert!(!producer.reserve(1).push(4));
    assert_eq!(consumer.memory().filled(), Some(4));
    assert_eq!(consumer.take(u32::MAX).collect::<Vec<_>>(), [0, 1, 2, 3]);
    assert_eq!(consumer.available(), 0);
    assert_eq!(producer.room(4), 4);
}

#[test]
fn an_empty_batch_stores_no_index() {
    let (mut producer, mut consumer) = raw(4, 0);
    // SAFETY: no entry becomes visible before the indices are moved back.
    unsafe {
        producer.memory().set_producer(77);
        producer.memory().set_consumer(77);
    }
    drop(producer.reserve(2));
    drop(consumer.take(2));
    assert_eq!((producer.memory().producer(), producer.memory().consumer()), (77, 77));
}

#[test]
fn what_a_guard_does_not_yield_stays_in_the_ring() {
    let (mut producer, mut consumer) = raw(8, u32::MAX - 2);
    push_all(&mut producer, 0..6);
    let mut entries = consumer.take(5);
    assert_eq!(entries.len(), 5);
    entries.limit(3);
    entries.limit(9);
    assert_eq!((entries.next(), entries.next(), entries.left()), (Some(0), Some(1), 1));
    drop(entries);
    assert_eq!(consumer.take(8).collect::<Vec<_>>(), [2, 3, 4, 5]);
}

#[test]
fn a_forgotten_batch_is_lost_and_its_ring_goes_on() {
    let (mut producer, mut consumer) = raw(4, u32::MAX - 1);
    for round in 0..3 {
        push_all(&mut producer, (0..4).map(|i| 10 * round + i));
        let mut entries = consumer.take(4);
        assert_eq!(entries.next(), Some(10 * round));
        forget(entries);
        assert_eq!(producer.room(1), 0, "released before the guard was known to be gone");
        assert_eq!(consumer.take(4).next(), None, "yielded twice");
        assert_eq!(producer.room(4), 4);

        let mut slots = producer.reserve(4);
        assert!(slots.push(99));
        forget(slots);
        assert_eq!(consumer.take(4).next(), None, "published by a forgotten guard");
    }
}

#[test]
fn an_entry_is_withdrawn_only_while_the_other_side_has_not_taken_it() {
    let (mut producer, mut consumer) = raw(4, u32::MAX);
    push_all(&mut producer, 0..3);
    assert_eq!(consumer.take(1).next(), Some(0));
    // SAFETY: the consumer rests.
    let withdrawn: Vec<_> = std::iter::from_fn(|| unsafe { producer.withdraw() }).collect();
    assert_eq!(withdrawn, [2, 1]);
    push_all(&mut producer, 7..8);
    // The consumer saw entries 1 and 2 published: a withdrawal is for rings that nobody reads yet.
    assert_eq!(producer.memory().filled(), Some(1));
}

#[test]
fn wild_indices_give_no_entries_and_no_room() {
    for start in [0, u32::MAX - 1] {
        let (mut producer, mut consumer) = raw(4, start);
        push_all(&mut producer, [1]);
        for wild in [start.wrapping_sub(1), start.wrapping_add(5), start.wrapping_add(1 << 31)] {
            // SAFETY: neither is believed, which is what is tested.
            unsafe {
                producer.memory().set_producer(wild);
                producer.memory().set_consumer(start.wrapping_add(2).max(start ^ (1 << 31)));
            }
            assert_eq!(consumer.take(4).left(), 0);
            assert!(producer.room(4) <= 4);
        }
        // SAFETY: the indices as they were.
        unsafe {
            producer.memory().set_producer(start.wrapping_add(1));
            producer.memory().set_consumer(start);
        }
        assert_eq!(consumer.take(4).collect::<Vec<_>>(), [1]);
    }
    let memory = RingMemory::<u64>::allocate(4, 0);
    // SAFETY: no entry is published.
    unsafe { memory.set_consumer(3) };
    // SAFETY: one value a side; the other is what is wrong here.
    assert_eq!(unsafe { Producer::new(memory) }.room(4), 0);
}

/// Takes what was received and sends it back; returns how many packets.
fn forward(rings: &mut Rings, pool: &mut Pool) -> u32 {
    rings.completion.drain_into(pool);
    rings.fill.refill(pool, u32::MAX);
    let mut packets = rings.rx.take(4);
    let mut slots = rings.tx.reserve(packets.left());
    packets.limit(slots.room());
    let mut forwarded = 0;
    for mut packet in packets {
        assert_eq!(packet.len(), LENGTH as usize);
        assert!(packet.iter().all(|b| *b == packet[0]));
        packet[0] ^= 0x80;
        slots.push(packet).unwrap();
        forwarded += 1;
    }
    forwarded
}

#[test]
fn packets_are_forwarded_with_the_kernel_on_another_thread() {
    let total = if cfg!(miri) { 24 } else { 20_000 };
    for ledger in [true, false] {
        let (umem, mut pool) = umem(6, ledger);
        let (mut rings, mut kernel) = socket(&umem, 8, u32::MAX - 10);
        let stop = AtomicBool::new(false);
        let (mut forwarded, deadline) = (0, Deadline::new());
        let kernel = std::thread::scope(|threads| {
            let worker = threads.spawn(|| {
                while !stop.load(Relaxed) {
                    kernel.step(3);
                    std::thread::yield_now();
                }
                kernel
            });
            while forwarded < total {
                forwarded += forward(&mut rings, &mut pool);
                let _ = (rings.fill.needs_wakeup(), rings.tx.needs_wakeup());
                deadline.wait();
            }
            stop.store(true, Relaxed);
            worker.join().unwrap()
        });
        assert_consistent(&umem);
        let census = umem.census();
        assert_eq!((census.program, census.kernel, census.dropped), (0, 0, 0));
        // What was sent went out once each; the rest waits in TX.
        assert_eq!(kernel.sent.values().sum::<u32>() + census.tx, forwarded);
    }
}

#[test]
fn a_packet_received_by_one_socket_is_sent_by_another_on_another_thread() {
    let total = if cfg!(miri) { 20 } else { 5_000 };
    let (umem, mut pool) = umem(6, true);
    let (mut a, mut kernel_a) = socket(&umem, 4, u32::MAX - 3);
    let (mut b, mut kernel_b) = socket(&umem, 4, 7);
    let (to_b, from_a) = sync_channel::<Packet>(4);
    std::thread::scope(|threads| {
        let mut other_pool = umem.pool();
        threads.spawn(move || {
            let (mut sent, deadline) = (0, Deadline::new());
            loop {
                kernel_b.step(4);
                b.completion.drain_into(&mut other_pool);
                other_pool.give(usize::MAX);
                match from_a.try_recv() {
                    Ok(mut packet) => {
                        packet[0] = 9;
                        match b.tx.reserve(1).push(packet) {
                            Ok(()) => sent += 1,
                            Err(refused) => other_pool.put(refused.into_inner()),
                        }
                    }
                    Err(TryRecvError::Empty) => deadline.wait(),
                    Err(TryRecvError::Disconnected) => break,
                }
            }
            kernel_b.step(4);
            b.completion.drain_into(&mut other_pool);
            assert!(sent > 0);
            assert_eq!(kernel_b.sent.get(&9), Some(&sent));
        });
        let (mut received, deadline) = (0, Deadline::new());
        while received < total {
            pool.fetch(4);
            a.fill.refill(&mut pool, u32::MAX);
            kernel_a.step(4);
            for packet in a.rx.take(4) {
                received += 1;
                to_b.send(packet).unwrap();
            }
            deadline.wait();
        }
        drop(to_b);
    });
    assert_consistent(&umem);
    assert_eq!(umem.census().program, 0);
    drop(a);
    assert_eq!(pool.len() as u32 + umem.census().depot + umem.census().retired, 6);
}

/// Six frames, four of them received and waiting in RX.
fn received_four(ledger: bool) -> (Umem, Pool, Rings, Kernel) {
    let (umem, mut pool) = umem(6, ledger);
    let (mut rings, mut kernel) = socket(&umem, 8, u32::MAX - 2);
    assert_eq!(rings.fill.refill(&mut pool, 4), 4);
    assert_eq!(kernel.receive(8), 4);
    (umem, pool, rings, kernel)
}

#[test]
fn a_forgotten_guard_loses_frames_and_doubles_none() {
    let (umem, mut pool, mut rings, mut kernel) = received_four(true);
    let mut packets = rings.rx.take(2);
    let mut seen = vec![packets.next().unwrap()];
    forget(packets);
    seen.extend(rings.rx.take(8));
    let chunks: HashSet<_> = seen.iter().map(|p| umem.index_of(p).unwrap()).collect();
    assert_eq!((seen.len(), chunks.len()), (3, 3), "one of four is lost");
    assert_consistent(&umem);
    assert_eq!(umem.census().forgotten, 2);
    assert_eq!(umem.census().program, 4);

    let mut slots = rings.tx.reserve(3);
    slots.push(seen.pop().unwrap()).unwrap();
    forget(slots);
    assert_consistent(&umem);
    let mut slots = rings.tx.reserve(3);
    slots.push(seen.pop().unwrap()).unwrap();
    slots.push(seen.pop().unwrap()).unwrap();
    drop(slots);
    assert_eq!(kernel.send(8), 2, "the forgotten batch was published");
    let mut frames = rings.completion.take(2);
    pool.put(frames.next().unwrap());
    forget(frames);
    assert_eq!(rings.completion.take(8).count(), 0);
    assert_consistent(&umem);

    let mut slots = rings.fill.reserve(1);
    slots.push(pool.take().unwrap()).unwrap();
    forget(slots);
    assert_eq!(kernel.fill.available(), 0);
    assert_consistent(&umem);
    let census = umem.census();
    assert_eq!((census.program, census.pools, census.kernel), (4, 2, 0), "four are lost");

    // The memory stays: lost frames can't be told from ones in use.
    let memory = std::sync::Arc::downgrade(umem.memory().owner());
    drop((rings, kernel, pool));
    // SAFETY: the rings are gone, and the kernel with them.
    assert_eq!(unsafe { umem.reclaim() }, 0);
    drop(umem);
    assert!(memory.upgrade().is_some());
}

#[test]
fn a_forgotten_ring_keeps_the_memory() {
    let (umem, pool, rings, kernel) = received_four(true);
    let Rings { rx, fill, tx, completion } = rings;
    let mut rx = ManuallyDrop::new(rx);
    let memory = std::sync::Arc::downgrade(umem.memory().owner());
    drop((fill, tx, completion, pool, kernel));
    assert_consistent(&umem);
    // SAFETY: the kernel is gone.
    assert_eq!(unsafe { umem.reclaim() }, 0);
    drop(umem);
    assert!(memory.upgrade().is_some());
    // SAFETY: once, and it is not used again.
    unsafe { ManuallyDrop::drop(&mut rx) };
    assert!(memory.upgrade().is_none());
}

#[test]
fn a_frame_of_another_umem_is_refused_and_goes_home() {
    let (umem, mut pool, mut rings, mut kernel) = received_four(true);
    let (other, mut other_pool) = common::umem(2, true);

    let frame = other_pool.take().unwrap();
    let refused = match rings.fill.reserve(1).push(frame) {
        Err(PushError::Foreign(frame)) => frame,
        wrong => panic!("{wrong:?}"),
    };
    assert_eq!((umem.index(&refused), other.index(&refused)), (None, Some(0)));
    pool.put(refused);
    assert_eq!((pool.len(), other.census().depot), (2, 1));

    let packet = other_pool.packet(0, 60).unwrap();
    let refused = match rings.tx.reserve(1).push(packet) {
        Err(PushError::Foreign(packet)) => packet,
        wrong => panic!("{wrong:?}"),
    };
    assert_eq!(refused.len(), 60);
    other_pool.put(refused);

    // A pool of another UMEM refills nothing and keeps its frames.
    assert_eq!(rings.fill.refill(&mut other_pool, 1), 0);
    assert_eq!(other_pool.len(), 1);
    // Frames of another UMEM that come out of a closure, too.
    let mut foreign = other_pool.take();
    let taken = rings.fill.extend(rings.rx.take(2), |packet| match foreign.take() {
        Some(frame) => {
            pool.put(packet);
            frame
        }
        None => packet.into_frame(),
    });
    assert_eq!((taken, kernel.fill.available()), (2, 1));
    let mut foreign = {
        assert_eq!(other_pool.fetch(9), 2);
        other_pool.packet(0, 1)
    };
    let taken = rings.tx.extend(rings.rx.take(2), |packet| {
        let Some(foreign) = foreign.take() else { return packet };
        pool.put(packet);
        foreign
    });
    assert_eq!((taken, kernel.tx.available()), (2, 1));
    kernel.step(8);
    // A pool of another UMEM takes nothing out of COMPLETION either; the frame finds its way.
    assert_eq!(rings.completion.drain_into(&mut other_pool), 1);
    assert_consistent(&umem);
    assert_all_home(&other);
}

#[test]
fn a_full_batch_gives_back_what_it_has_no_room_for() {
    let (umem, mut pool) = umem(6, true);
    let (mut rings, mut kernel) = socket(&umem, 2, u32::MAX);
    assert_eq!(rings.fill.refill(&mut pool, 9), 2);
    assert!(matches!(rings.fill.reserve(1).push(pool.take().unwrap()), Err(PushError::Full(_))));
    let mut slots = rings.tx.reserve(9);
    assert_eq!(slots.room(), 2);
    for _ in 0..2 {
        pool.fetch(1);
        slots.push(pool.packet(0, 20).unwrap()).unwrap();
    }
    let refused = slots.push(pool.packet(0, 33).unwrap()).unwrap_err();
    assert_eq!(refused.to_string(), "no room is left in the batch");
    pool.put(refused.into_inner());
    drop(slots);
    assert_eq!(rings.tx.pending(), 2);
    kernel.step(9);
    assert_eq!(rings.tx.pending(), 0);
    assert_eq!(rings.completion.drain_into(&mut pool), 2);
    rings.rx.take(9).for_each(|packet| pool.put(packet));
    assert_all_home(&umem);
}

#[test]
fn extend_moves_as_much_as_there_is_room_for() {
    let (umem, mut pool, mut rings, mut kernel) = received_four(true);
    let (mut small, mut small_kernel) = socket(&umem, 2, 0);
    // RX to the TX of a smaller socket: two fit, two stay.
    let mut bytes = vec![];
    let taken = small.tx.extend(rings.rx.take(8), |packet| {
        bytes.push(packet[0]);
        packet
    });
    assert_eq!((taken, bytes), (2, vec![1, 2]));
    assert_eq!(rings.rx.available(), 2);
    assert_eq!(small_kernel.send(8), 2);
    // COMPLETION to FILL, across pairs.
    assert_eq!(rings.fill.extend_frames(small.completion.take(8)), 2);
    assert_eq!(rings.fill.extend(rings.rx.take(8), Packet::into_frame), 2);
    assert_eq!(kernel.receive(8), 4);
    rings.rx.take(8).for_each(|packet| pool.put(packet));
    assert_all_home(&umem);
}

#[test]
fn a_panic_while_packets_move_leaves_every_frame_in_one_place() {
    let (umem, _pool, mut rings, mut kernel) = received_four(true);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let mut seen = 0;
        rings.tx.extend(rings.rx.take(4), |packet| {
            seen += 1;
            assert!(seen < 3, "as it is meant to");
            packet
        })
    }));
    assert!(result.is_err());
    assert_eq!(kernel.send(8), 2);
    assert_consistent(&umem);
    let census = umem.census();
    assert_eq!((census.rx, census.completion, census.depot, census.program), (1, 2, 1, 0));
}

#[test]
fn a_duplicate_never_becomes_a_frame_where_there_is_a_ledger() {
    let (umem, mut pool, mut rings, mut kernel) = received_four(true);
    let addr = 256;
    // In the kernel's hands, in RX: the first claim is the true one.
    kernel.claim_received(addr, LENGTH);
    let packets: Vec<_> = rings.rx.take(8).collect();
    assert_eq!((packets.len(), umem.faults().duplicate), (4, 1));
    // With the program.
    kernel.claim_received(addr, LENGTH);
    kernel.claim_sent(addr);
    assert_eq!((rings.rx.take(8).count(), rings.completion.take(8).count()), (0, 0));
    // In the pool: chunk 5 was never lent.
    kernel.claim_received(5 * u64::from(CHUNK), 1);
    kernel.claim_sent(5 * u64::from(CHUNK));
    assert_eq!((rings.rx.take(8).count(), rings.completion.take(8).count()), (0, 0));
    // Lent through TX, but handed over in RX; then sent twice.
    let mut slots = rings.tx.reserve(4);
    packets.into_iter().for_each(|packet| slots.push(packet).unwrap());
    drop(slots);
    kernel.claim_received(addr, LENGTH);
    assert_eq!(rings.rx.take(8).count(), 0);
    assert_eq!(kernel.send(3), 3);
    kernel.claim_sent(addr);
    assert_eq!(kernel.send(1), 1);
    assert_eq!(rings.completion.drain_into(&mut pool), 4);
    // Lent through another socket.
    let (mut other, mut other_kernel) = socket(&umem, 8, 0);
    other.fill.refill(&mut pool, 6);
    kernel.claim_received(addr, LENGTH);
    assert_eq!(rings.rx.take(8).count(), 0);
    assert_eq!(other_kernel.receive(8), 6);
    other.rx.take(8).for_each(|packet| pool.put(packet));

    let faults = umem.faults();
    assert_eq!((faults.duplicate, faults.outside, faults.last_address), (8, 0, addr));
    assert_eq!(umem.census().contradiction(), None, "what was refused is accounted for");
    assert_eq!(pool.len(), 6);
}

/// Descriptors that reach outside their chunk, or the UMEM of six.
const OUTSIDE: [(u64, u32); 9] = [
    (0, 0),
    (0, CHUNK + 1),
    (0, u32::MAX),
    (CHUNK as u64 - 1, 2),
    (256, CHUNK - 255),
    (6 * CHUNK as u64, 1),
    (6 * CHUNK as u64 - 1, 2),
    (u64::MAX, 1),
    (1 << 48, 64),
];

#[test]
fn a_descriptor_outside_its_chunk_never_becomes_a_packet() {
    for ledger in [true, false] {
        let (umem, mut pool, mut rings, mut kernel) = received_four(ledger);
        rings.rx.take(8).for_each(|packet| pool.put(packet));
        for (addr, len) in OUTSIDE {
            kernel.claim_received(addr, len);
            assert_eq!(rings.rx.take(8).count(), 0, "{addr:#x} + {len}");
        }
        for addr in [6 * u64::from(CHUNK), u64::MAX, 1 << 48] {
            kernel.claim_sent(addr);
            assert_eq!(rings.completion.take(8).count(), 0, "{addr:#x}");
            assert_eq!(umem.faults().last_address, addr);
        }
        assert_eq!((umem.faults().outside, umem.faults().duplicate), (12, 0));
        assert_eq!(umem.census().contradiction(), None);
        assert_eq!(pool.len(), 6);
    }
}

#[test]
fn a_packet_may_fill_its_chunk_to_the_last_byte() {
    let (umem, mut pool) = umem(2, true);
    let (mut rings, mut kernel) = socket(&umem, 4, 0);
    rings.fill.refill(&mut pool, 2);
    assert_eq!(kernel.fill.take(2).count(), 2);
    kernel.claim_received(0, CHUNK);
    kernel.claim_received(2 * u64::from(CHUNK) - 1, 1);
    let mut packets: Vec<_> = rings.rx.take(4).collect();
    packets.iter_mut().for_each(|packet| packet.fill(0xee));
    assert_eq!(packets.iter().map(|p| p.len()).collect::<Vec<_>>(), [CHUNK as usize, 1]);
    packets.into_iter().for_each(|packet| pool.put(packet));
    assert_all_home(&umem);
}

#[test]
fn without_a_ledger_a_duplicate_shows_in_the_census_and_nothing_panics() {
    let (umem, mut pool, mut rings, mut kernel) = received_four(false);
    for _ in 0..3 {
        kernel.claim_received(256, LENGTH);
    }
    let packets: Vec<_> = rings.rx.take(8).collect();
    assert_eq!(packets.len(), 7);
    assert!(umem.census().contradiction().unwrap().contains("had not taken"));
    // More frames than chunks: the pool and the depot take as many as there are chunks.
    packets.into_iter().for_each(|packet| pool.put(packet));
    assert_eq!((pool.len(), umem.faults().duplicate), (6, 3));
    kernel.claim_sent(0);
    drop(rings.completion.take(1).next());
    assert_eq!(umem.census().depot, 1);
    // The end of it all is quiet as well.
    drop((rings, kernel, pool, umem));
}

#[test]
fn a_kernel_with_wild_indices_gets_and_gives_no_frame() {
    for ledger in [true, false] {
        let (umem, mut pool, mut rings, kernel) = received_four(ledger);
        for wild in [9, 1 << 30, 1 << 31, u32::MAX - 3] {
            let (rx, fill) = (kernel.rx.index(), kernel.fill.index());
            let (tx, completion) = (kernel.tx.index(), kernel.completion.index());
            // SAFETY: no entry that is made visible is believed, which is what is tested.
            unsafe {
                kernel.rx.memory().set_producer(rx.wrapping_add(wild));
                kernel.completion.memory().set_producer(completion.wrapping_add(wild));
                kernel.fill.memory().set_consumer(fill.wrapping_add(wild));
                kernel.tx.memory().set_consumer(tx.wrapping_add(wild));
            }
            assert_eq!((rings.rx.take(8).count(), rings.completion.take(8).count()), (0, 0));
            assert!(rings.fill.room() <= 8 && rings.tx.room() <= 8);
            assert!(rings.tx.pending() <= 8);
            let _ = umem.census().contradiction();
            // SAFETY: the indices as they were.
            unsafe {
                kernel.rx.memory().set_producer(rx);
                kernel.completion.memory().set_producer(completion);
                kernel.fill.memory().set_consumer(fill);
                kernel.tx.memory().set_consumer(tx);
            }
        }
        // Entries that were announced and never written are empty, hence refused.
        let rx = kernel.rx.index();
        // SAFETY: as above.
        unsafe { kernel.rx.memory().set_producer(rx.wrapping_add(3)) };
        assert_eq!(rings.rx.take(8).map(|packet| pool.put(packet)).count(), 4);
        assert_eq!(rings.rx.take(8).count(), 0);
        assert_eq!(umem.faults().outside, 3);
        assert_eq!(pool.len(), 6);
        assert_eq!(umem.census().contradiction(), None);
    }
}

#[test]
fn a_flag_of_the_kernel_is_seen_on_fill_and_tx() {
    let (umem, _pool) = umem(1, false);
    let (rings, kernel) = socket(&umem, 2, 0);
    assert!(!rings.fill.needs_wakeup() && !rings.tx.needs_wakeup());
    kernel.fill.memory().set_flags(1);
    assert!(rings.fill.needs_wakeup() && !rings.tx.needs_wakeup());
    kernel.tx.memory().set_flags(3);
    assert!(rings.tx.needs_wakeup());
}

fn config() -> ProptestConfig {
    ProptestConfig {
        cases: if cfg!(miri) { 3 } else { 300 },
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

#[derive(Clone, Debug)]
enum RawStep {
    Reserve { n: u32, push: u32, forget: bool },
    Take { n: u32, limit: Option<u32>, next: u32, forget: bool },
}

fn raw_step() -> impl Strategy<Value = RawStep> {
    let forget = prop::bool::weighted(0.15);
    prop_oneof![
        (0u32..10, 0u32..10, forget).prop_map(|(n, push, forget)| RawStep::Reserve { n, push, forget }),
        (0u32..10, prop::option::of(0u32..10), 0u32..10, forget)
            .prop_map(|(n, limit, next, forget)| RawStep::Take { n, limit, next, forget }),
    ]
}

proptest! {
    #![proptest_config(config())]

    /// The model: a queue, how much of it the consumer has seen, and how many slots a forgotten
    /// guard holds until the next one.
    #[test]
    fn a_ring_is_a_queue(
        start in prop_oneof![any::<u32>(), u32::MAX - 20..=u32::MAX],
        log in 0u32..4,
        steps in prop::collection::vec(raw_step(), 0..if cfg!(miri) { 20 } else { 60 }),
    ) {
        let size = 1 << log;
        let (mut producer, mut consumer) = raw(size, start);
        let (mut queue, mut seen, mut held) = (VecDeque::new(), 0, 0);
        let mut value = 0;
        for step in steps {
            match step {
                RawStep::Reserve { n, push, forget: lose } => {
                    let room = n.min(size - queue.len() as u32 - held);
                    let mut slots = producer.reserve(n);
                    prop_assert_eq!(slots.room(), room);
                    for i in 0..push {
                        prop_assert_eq!(slots.push(value), i < room);
                        if i < room && !lose {
                            queue.push_back(value);
                        }
                        value += 1;
                    }
                    if lose { forget(slots) }
                }
                RawStep::Take { n, limit, next, forget: lose } => {
                    held = 0;
                    if seen == 0 {
                        seen = queue.len() as u32;
                    }
                    let taken = n.min(seen);
                    let mut entries = consumer.take(n);
                    prop_assert_eq!(entries.left(), taken);
                    let mut left = taken;
                    if let Some(limit) = limit {
                        entries.limit(limit);
                        left = left.min(limit);
                    }
                    let yielded = left.min(next);
                    for i in 0..yielded {
                        prop_assert_eq!(entries.next(), Some(queue[i as usize]));
                    }
                    if next > left {
                        prop_assert_eq!(entries.next(), None);
                    }
                    let gone = if lose { taken } else { yielded };
                    if lose {
                        forget(entries);
                        held = taken;
                    }
                    queue.drain(..gone as usize);
                    seen -= gone;
                }
            }
            prop_assert_eq!(producer.memory().filled(), Some(queue.len() as u32 + held));
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// From the pool to FILL.
    Fill {
        push: u32,
        forget: bool,
    },
    /// From the pool, as packets, to TX.
    Send {
        push: u32,
        forget: bool,
    },
    /// From RX to the program's hands.
    Receive {
        n: u32,
        limit: u32,
        next: u32,
        forget: bool,
    },
    /// From COMPLETION to the program's hands.
    Complete {
        n: u32,
        limit: u32,
        next: u32,
        forget: bool,
    },
    /// From RX to TX.
    Forward {
        n: u32,
    },
    /// From COMPLETION to FILL.
    Recycle {
        n: u32,
    },
    /// From FILL into the kernel, and from there to RX.
    KernelTakes {
        n: u32,
    },
    KernelGives {
        n: u32,
    },
    /// From TX to COMPLETION.
    KernelSends {
        n: u32,
    },
    /// From the program's hands.
    Put,
    Drop,
    /// Pool and depot.
    Give {
        n: usize,
    },
    Fetch {
        n: usize,
    },
    /// The kernel hands over a chunk that it does not have, or none.
    Lie {
        addr: u64,
        sent: bool,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let forget = || prop::bool::weighted(0.05);
    let n = || 0u32..6;
    prop_oneof![
        3 => (n(), forget()).prop_map(|(push, forget)| Step::Fill { push, forget }),
        3 => (n(), forget()).prop_map(|(push, forget)| Step::Send { push, forget }),
        3 => (n(), n(), n(), forget())
            .prop_map(|(n, limit, next, forget)| Step::Receive { n, limit, next, forget }),
        3 => (n(), n(), n(), forget())
            .prop_map(|(n, limit, next, forget)| Step::Complete { n, limit, next, forget }),
        2 => n().prop_map(|n| Step::Forward { n }),
        2 => n().prop_map(|n| Step::Recycle { n }),
        3 => n().prop_map(|n| Step::KernelTakes { n }),
        3 => n().prop_map(|n| Step::KernelGives { n }),
        3 => n().prop_map(|n| Step::KernelSends { n }),
        2 => Just(Step::Put),
        1 => Just(Step::Drop),
        1 => (0usize..4).prop_map(|n| Step::Give { n }),
        2 => (0usize..4).prop_map(|n| Step::Fetch { n }),
        1 => (0u64..20, any::<bool>()).prop_map(|(chunk, sent)| Step::Lie {
            addr: chunk * u64::from(CHUNK) / 2,
            sent,
        }),
    ]
}

const FRAMES: u32 = 8;
const SIZE: u32 = 4;

/// Where each chunk of a UMEM is, by the oracle.
#[derive(Debug, Default)]
struct Model {
    pool: Vec<u32>,
    depot: Vec<u32>,
    fill: VecDeque<u32>,
    kernel: VecDeque<u32>,
    tx: VecDeque<u32>,
    rx: Taken,
    completion: Taken,
    hand: Vec<u32>,
    lost: Vec<u32>,
    refused: u64,
    dropped: u64,
}

/// RX or COMPLETION.
#[derive(Debug, Default)]
struct Taken {
    queue: VecDeque<u32>,
    /// Entries that the consumer knows of.
    seen: u32,
    /// Entries of a guard that was forgotten, whose slots are released by the next.
    held: u32,
    forgotten: u32,
}

impl Taken {
    /// What comes out of a guard of `n`, limited to `limit`, that is asked `next` times. The rest
    /// of a guard that is forgotten goes to `lost`.
    fn take(&mut self, n: u32, limit: u32, next: u32, lost: Option<&mut Vec<u32>>) -> Vec<u32> {
        self.forgotten += std::mem::take(&mut self.held);
        if self.seen == 0 {
            self.seen = self.queue.len() as u32;
        }
        let taken = n.min(self.seen);
        let yielded = taken.min(limit).min(next);
        let out = self.queue.drain(..yielded as usize).collect();
        if let Some(lost) = lost {
            lost.extend(self.queue.drain(..(taken - yielded) as usize));
            self.held = taken;
            self.seen -= taken;
        } else {
            self.seen -= yielded;
        }
        out
    }

    /// Slots that the other side may fill.
    fn room(&self) -> u32 {
        SIZE - self.queue.len() as u32 - self.held
    }
}

/// Takes from a typed ring as [`Taken::take`] does.
macro_rules! take {
    ($ring:expr, $n:expr, $limit:expr, $next:expr, $forget:expr) => {{
        let mut guard = $ring.take($n);
        guard.limit($limit);
        let out: Vec<Frame> = guard.by_ref().take($next as usize).map(Frame::from).collect();
        if $forget {
            forget(guard);
        }
        out
    }};
}

/// A UMEM, a socket and a kernel, and where the oracle says that their frames are.
struct World {
    umem: Umem,
    pool: Pool,
    rings: Rings,
    kernel: Kernel,
    hand: Vec<Frame>,
    model: Model,
}

impl World {
    fn new(start: u32) -> Self {
        let (umem, pool) = umem(FRAMES, true);
        let (rings, kernel) = socket(&umem, SIZE, start);
        let model = Model { pool: (0..FRAMES).rev().collect(), ..Model::default() };
        Self { umem, pool, rings, kernel, hand: vec![], model }
    }

    fn step(&mut self, step: Step) {
        let Self { umem, pool, rings, kernel, hand, model } = self;
        match step {
            Step::Fill { push, forget: lose } => {
                let mut slots = rings.fill.reserve(push);
                assert_eq!(slots.room(), push.min(SIZE - model.fill.len() as u32));
                while slots.room() > 0 {
                    let Some(frame) = pool.take() else { break };
                    assert_eq!(umem.index(&frame), model.pool.last().copied());
                    slots.push(frame).unwrap();
                    let chunk = model.pool.pop().unwrap();
                    if lose { model.lost.push(chunk) } else { model.fill.push_back(chunk) }
                }
                if lose {
                    forget(slots);
                }
            }
            Step::Send { push, forget: lose } => {
                let mut slots = rings.tx.reserve(push);
                assert_eq!(slots.room(), push.min(SIZE - model.tx.len() as u32));
                while slots.room() > 0 {
                    let Some(packet) = pool.packet(3, 60) else { break };
                    slots.push(packet).unwrap();
                    let chunk = model.pool.pop().unwrap();
                    if lose { model.lost.push(chunk) } else { model.tx.push_back(chunk) }
                }
                if lose {
                    forget(slots);
                }
            }
            Step::Receive { n, limit, next, forget: lose } => {
                hand.extend(take!(rings.rx, n, limit, next, lose));
                model.hand.extend(model.rx.take(n, limit, next, lose.then_some(&mut model.lost)));
            }
            Step::Complete { n, limit, next, forget: lose } => {
                hand.extend(take!(rings.completion, n, limit, next, lose));
                let lost = lose.then_some(&mut model.lost);
                model.hand.extend(model.completion.take(n, limit, next, lost));
            }
            Step::Forward { n } => {
                let moved = rings.tx.extend(rings.rx.take(n), |packet| packet);
                let room = SIZE - model.tx.len() as u32;
                let out = model.rx.take(n, room, u32::MAX, None);
                assert_eq!(moved as usize, out.len());
                model.tx.extend(out);
            }
            Step::Recycle { n } => {
                let moved = rings.fill.extend_frames(rings.completion.take(n));
                let room = SIZE - model.fill.len() as u32;
                let out = model.completion.take(n, room, u32::MAX, None);
                assert_eq!(moved as usize, out.len());
                model.fill.extend(out);
            }
            Step::KernelTakes { n } => {
                let taken: Vec<u64> = kernel.fill.take(n.min(model.fill.len() as u32)).collect();
                for addr in taken {
                    let chunk = (addr / u64::from(CHUNK)) as u32;
                    assert_eq!(model.fill.pop_front(), Some(chunk));
                    model.kernel.push_back(chunk);
                }
            }
            Step::KernelGives { n } => {
                for _ in 0..n.min(model.rx.room()).min(model.kernel.len() as u32) {
                    let chunk = model.kernel.pop_front().unwrap();
                    kernel.claim_received(u64::from(chunk * CHUNK) + 256, LENGTH);
                    model.rx.queue.push_back(chunk);
                }
            }
            Step::KernelSends { n } => {
                for _ in 0..kernel.send(n.min(model.completion.room())) {
                    model.completion.queue.push_back(model.tx.pop_front().unwrap());
                }
            }
            Step::Put => {
                if let Some(frame) = hand.pop() {
                    pool.put(frame);
                    model.pool.push(model.hand.pop().unwrap());
                }
            }
            Step::Drop => {
                if let Some(frame) = hand.pop() {
                    drop(frame);
                    model.depot.push(model.hand.pop().unwrap());
                    model.dropped += 1;
                }
            }
            Step::Give { n } => {
                let n = n.min(model.pool.len());
                assert_eq!(pool.give(n), n);
                model.depot.extend(model.pool.drain(model.pool.len() - n..).rev());
            }
            Step::Fetch { n } => {
                let n = n.min(model.depot.len());
                assert_eq!(pool.fetch(n), n);
                model.pool.extend(model.depot.drain(model.depot.len() - n..));
            }
            Step::Lie { addr, sent } => {
                let chunk = (addr / u64::from(CHUNK)) as u32;
                let ring = if sent { &mut model.completion } else { &mut model.rx };
                let lent = model.fill.iter().chain(&model.kernel).chain(&model.tx).chain(&model.lost);
                if !ring.queue.is_empty() || ring.held > 0 || lent.into_iter().any(|c| *c == chunk) {
                    return;
                }
                if sent && !model.rx.queue.contains(&chunk) {
                    kernel.claim_sent(addr);
                    assert_eq!(rings.completion.take(1).count(), 0);
                } else if !sent && !model.completion.queue.contains(&chunk) {
                    kernel.claim_received(addr, LENGTH);
                    assert_eq!(rings.rx.take(1).count(), 0);
                } else {
                    return;
                }
                model.refused += 1;
            }
        }
    }

    /// Compares the census with the oracle.
    fn check(&self) {
        let Self { umem, hand, model, .. } = self;
        let chunks: Vec<_> = hand.iter().map(|frame| umem.index(frame).unwrap()).collect();
        assert_eq!(chunks, model.hand);
        let census = umem.census();
        let len = |ring: &Taken| ring.queue.len() as u32 + ring.held;
        let held = model.rx.held + model.completion.held;
        let program = (model.hand.len() + model.lost.len()) as i64;
        assert_eq!(
            [census.pools, census.depot, census.fill, census.tx, census.rx, census.completion],
            [
                model.pool.len() as u32,
                model.depot.len() as u32,
                model.fill.len() as u32,
                model.tx.len() as u32,
                len(&model.rx),
                len(&model.completion),
            ]
        );
        assert_eq!((census.kernel, census.retired), (model.kernel.len() as i64, 0));
        // Until its slots are released, the entries of a forgotten guard still count as the ring's.
        assert_eq!(census.program, program - i64::from(held));
        assert_eq!((census.faults.total(), census.dropped), (model.refused, model.dropped));
        assert_eq!(census.forgotten, model.rx.forgotten + model.completion.forgotten);
        if held == 0 {
            assert_eq!(census.contradiction(), None);
        }
    }

    /// Ends the world: with no frame lost, the memory goes with the last owner.
    fn end(self) {
        let Self { umem, pool, rings, kernel, hand, model } = self;
        let memory = std::sync::Arc::downgrade(umem.memory().owner());
        drop((rings, pool, umem, kernel));
        let all_gone = model.lost.is_empty() && model.rx.forgotten + model.completion.forgotten == 0;
        if !hand.is_empty() {
            assert!(memory.upgrade().is_some());
        }
        drop(hand);
        let held = model.rx.held + model.completion.held;
        if all_gone && held == 0 {
            assert!(memory.upgrade().is_none());
        } else if !model.lost.is_empty() {
            assert!(memory.upgrade().is_some());
        }
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn every_chunk_is_where_the_oracle_says(
        start in prop_oneof![any::<u32>(), u32::MAX - 9..=u32::MAX],
        steps in prop::collection::vec(step(), 0..if cfg!(miri) { 16 } else { 80 }),
    ) {
        let mut world = World::new(start);
        for step in steps {
            world.step(step);
            world.check();
        }
        world.end();
    }
}
