//! The UMEM: who owns each chunk, the bounds of a packet, pools, and the end of the memory.

#![cfg(not(loom))]

mod common;

use std::any::Any;
use std::collections::HashSet;
use std::mem::{ManuallyDrop, forget};
use std::num::NonZeroU32;
use std::sync::{Arc, Barrier, Weak};

use common::{CHUNK, LENGTH, Rings, assert_all_home, assert_consistent, socket, umem};
use xsk::abi::XDP_PACKET_HEADROOM;
use xsk::umem::{Pair, Umem};
use xsk::{Cause, Frame, Packet, Pool};

/// Tells whether a UMEM's memory is still there.
fn watch(umem: &Umem) -> Weak<dyn Any + Send + Sync> {
    Arc::downgrade(umem.memory().owner())
}

#[test]
fn every_chunk_is_handed_out_once_and_in_order() {
    let (umem, mut pool) = umem(5, true);
    let frames: Vec<Frame> = std::iter::from_fn(|| pool.take()).collect();
    assert_eq!(frames.iter().map(|f| umem.index(f).unwrap()).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    assert_eq!((umem.frames(), umem.chunk_size(), umem.size()), (5, CHUNK, 5 * u64::from(CHUNK)));
    assert_eq!((umem.census().program, umem.census().ledger_held), (5, Some(5)));
    pool.extend(frames);
    assert_eq!(pool.len(), 5);
    assert_all_home(&umem);
}

#[test]
fn the_frame_put_in_last_is_taken_first() {
    let (umem, mut pool) = umem(3, true);
    let (a, b) = (pool.take().unwrap(), pool.take().unwrap());
    pool.put(a);
    pool.put(b);
    let next: Vec<_> = std::iter::from_fn(|| pool.take()).map(|f| umem.index(&f)).collect();
    assert_eq!(next, [Some(1), Some(0), Some(2)]);
}

#[test]
fn a_packet_keeps_to_its_chunk() {
    let (umem, mut pool) = umem(2, true);
    let chunk = CHUNK as u16;
    for (headroom, len) in [(0, 0), (0, CHUNK + 1), (1, CHUNK), (chunk, 1), (u16::MAX, u32::MAX)] {
        assert!(pool.packet(headroom, len).is_none(), "{headroom} + {len}");
    }
    assert_eq!(pool.len(), 2);
    for (headroom, len) in [(0, CHUNK), (chunk - 1, 1), (256, CHUNK - 256)] {
        let mut packet = pool.packet(headroom, len).unwrap();
        packet.fill(7);
        assert_eq!(packet.len(), len as usize);
        pool.put(packet);
    }
    assert!(umem.packet(pool.take().unwrap(), 0, 0).is_err());
    assert_eq!(umem.census().depot, 1, "the refused frame came back and was dropped");
}

#[test]
fn a_packet_grows_and_shrinks_within_its_chunk() {
    let (umem, mut pool) = umem(2, true);
    let _first = pool.take().unwrap();
    let mut packet = pool.packet(100, 60).unwrap();
    packet.iter_mut().enumerate().for_each(|(i, b)| *b = i as u8);

    assert!(!packet.advance(60), "no byte would be left");
    assert!(packet.advance(59));
    assert_eq!(&packet[..], [59]);
    assert!(!packet.advance(1) && packet.advance(0));

    let mut packet = umem.prepend(packet, 49).unwrap();
    assert_eq!((packet.len(), packet[0], packet[49]), (50, 10, 59));
    packet.truncate(NonZeroU32::new(51).unwrap());
    assert_eq!(packet.len(), 50);
    packet.truncate(NonZeroU32::MIN);
    assert_eq!(&packet[..], [10]);

    let packet = umem.prepend(packet, 111).expect_err("there are 110 bytes in front");
    assert_eq!(&packet[..], [10]);
    let mut packet = umem.prepend(packet, 110).unwrap();
    packet.fill(1);
    assert_eq!((packet.len(), umem.index_of(&packet)), (111, Some(1)));
    let packet = umem.prepend(packet, 1).expect_err("it starts where its chunk does");

    // The chunk holds 2048 bytes, of which the packet has the first 111.
    assert_eq!(umem.room(&packet), Some((0, 1937)));
    let packet = umem.append(packet, 1938).expect_err("there are 1937 bytes behind");
    assert_eq!(packet.len(), 111);
    let mut packet = umem.append(packet, 1937).unwrap();
    assert_eq!((packet.len(), packet[110], umem.room(&packet)), (2048, 1, Some((0, 0))));
    assert!(packet.advance(48));
    assert_eq!(umem.room(&packet), Some((48, 0)));
    packet.fill(2);
    pool.put(packet);
}

#[test]
fn a_frame_keeps_its_number_through_sending() {
    let (umem, mut pool) = umem(4, true);
    let (mut rings, mut kernel) = socket(&umem, 4, u32::MAX);
    let mut packet = pool.packet(200, 40).unwrap();
    assert!(packet.advance(14));
    packet[0] = 77;
    let number = umem.index_of(&packet);
    rings.tx.reserve(1).push(packet).unwrap();
    kernel.send(1);
    let frame = rings.completion.take(1).next().unwrap();
    assert_eq!((umem.index(&frame), kernel.sent.get(&77)), (number, Some(&1)));
    // It still holds the packet that was sent.
    let packet = umem.packet(frame, 214, 1).unwrap();
    assert_eq!(&packet[..], [77]);
    pool.put(packet);
}

#[test]
fn another_umems_frame_is_no_packet_here() {
    let ((umem_a, mut a), (umem_b, mut b)) = (umem(1, true), umem(1, true));
    let frame = umem_a.packet(b.take().unwrap(), 0, 1).unwrap_err();
    let packet = umem_b.packet(frame, 9, 1).unwrap();
    let packet = umem_a.prepend(packet, 1).unwrap_err();
    assert_eq!(umem_a.index_of(&packet), None);
    // Each pool's frames go home, wherever they are put.
    a.put(packet);
    b.put(a.take().unwrap());
    assert_eq!((a.len(), b.len()), (0, 0));
    assert_eq!((umem_a.census().depot, umem_b.census().depot), (1, 1));
    assert_all_home(&umem_a);
    assert_all_home(&umem_b);
}

#[test]
fn a_dropped_frame_goes_to_the_depot_and_is_counted() {
    let (umem, mut pool) = umem(4, true);
    drop(pool.take());
    drop(pool.packet(0, 60));
    let census = umem.census();
    assert_eq!((census.dropped, census.depot, census.pools), (2, 2, 2));
    assert_eq!((pool.fetch(1), pool.fetch(9), pool.fetch(1)), (1, 1, 0));
    assert_eq!((pool.give(3), pool.len(), umem.census().depot), (3, 1, 3));
    drop(pool);
    assert_eq!((umem.census().depot, umem.census().pools), (4, 0));
    let mut pool = umem.pool();
    assert!(pool.is_empty() && pool.take().is_none());
    assert_eq!(pool.fetch(usize::MAX), 4);
    assert_all_home(&umem);
}

#[test]
fn threads_trade_frames_through_the_depot() {
    let rounds = if cfg!(miri) { 15 } else { 2_000 };
    let (umem, pool) = umem(16, true);
    drop(pool);
    std::thread::scope(|threads| {
        for thread in 0..3u8 {
            let mut pool = umem.pool();
            threads.spawn(move || {
                for round in 0..rounds {
                    pool.fetch(4);
                    let mut packets: Vec<Packet> = std::iter::from_fn(|| pool.packet(0, 8)).collect();
                    packets.iter_mut().for_each(|packet| packet.fill(thread));
                    assert!(packets.iter().all(|packet| packet.iter().all(|b| *b == thread)));
                    if round % 2 == 0 {
                        pool.extend(packets.into_iter().map(Packet::into_frame));
                        pool.give(usize::MAX);
                    }
                }
            });
        }
    });
    assert_all_home(&umem);
    assert_eq!(umem.census().depot, 16);
}

#[test]
fn a_packet_outlives_rings_pool_and_umem() {
    for ledger in [true, false] {
        let (umem, mut pool) = umem(4, ledger);
        let (mut rings, mut kernel) = socket(&umem, 4, 3);
        rings.fill.refill(&mut pool, 2);
        kernel.receive(2);
        let mut packet = rings.rx.take(1).next().unwrap();
        let memory = watch(&umem);
        drop((rings, kernel, pool, umem));
        assert!(packet.iter().all(|b| *b == 1));
        packet.fill(9);
        let (sender, receiver) = std::sync::mpsc::channel::<Packet>();
        sender.send(packet).unwrap();
        assert!(memory.upgrade().is_some());
        std::thread::spawn(move || assert_eq!(receiver.recv().unwrap()[..], [9; LENGTH as usize]))
            .join()
            .unwrap();
        assert!(memory.upgrade().is_none(), "the last packet releases the memory");
    }
}

#[test]
fn the_memory_goes_with_the_last_owner_in_whichever_order() {
    type Owner = Box<dyn Any>;
    // All orders of five owners; under Miri some of them.
    let orders: usize = if cfg!(miri) { 6 } else { 120 };
    for order in 0..orders {
        let (umem, mut pool) = umem(4, true);
        let (mut rings, mut kernel) = socket(&umem, 4, u32::MAX);
        rings.fill.refill(&mut pool, 3);
        kernel.receive(2);
        let packet = rings.rx.take(1).next().unwrap();
        let memory = watch(&umem);
        drop(kernel);
        let Rings { fill, rx, tx, completion } = rings;
        let mut owners: Vec<Owner> = vec![
            Box::new(umem),
            Box::new(pool),
            Box::new(packet),
            Box::new((fill, completion)),
            Box::new((rx, tx)),
        ];
        let mut number = if cfg!(miri) { order * 19 } else { order };
        while !owners.is_empty() {
            assert!(memory.upgrade().is_some(), "released early in order {order}");
            let next = number % owners.len();
            number /= owners.len();
            drop(owners.swap_remove(next));
        }
        assert!(memory.upgrade().is_none(), "kept for nothing in order {order}");
    }
}

#[test]
fn two_threads_that_drop_the_last_owners_release_the_memory_once() {
    for _ in 0..if cfg!(miri) { 5 } else { 500 } {
        let (umem, mut pool) = umem(3, true);
        let memory = watch(&umem);
        let frames = [pool.take().unwrap(), pool.take().unwrap()];
        drop(pool);
        let start = Barrier::new(3);
        std::thread::scope(|threads| {
            for frame in frames {
                threads.spawn(|| {
                    start.wait();
                    drop(frame);
                });
            }
            threads.spawn(|| {
                start.wait();
                drop(umem);
            });
        });
        assert!(memory.upgrade().is_none());
    }
}

#[test]
fn a_forgotten_frame_keeps_the_memory() {
    let (umem, mut pool) = umem(2, true);
    forget(pool.take());
    assert_consistent(&umem);
    assert_eq!(umem.census().program, 1);
    let memory = watch(&umem);
    drop((umem, pool));
    assert!(memory.upgrade().is_some());
}

#[test]
fn a_forgotten_pool_keeps_its_frames_and_the_memory() {
    let (umem, pool) = umem(2, true);
    let memory = watch(&umem);
    let mut pool = ManuallyDrop::new(pool);
    assert_all_home(&umem);
    // SAFETY: no kernel had this UMEM.
    assert_eq!(unsafe { umem.reclaim() }, 0);
    drop(umem);
    assert!(memory.upgrade().is_some());
    // SAFETY: once, and it is not used again.
    unsafe { ManuallyDrop::drop(&mut pool) };
    assert!(memory.upgrade().is_none());
}

#[test]
fn the_census_follows_rings_that_go_one_by_one() {
    let (umem, mut pool) = umem(6, true);
    let (mut rings, mut kernel) = socket(&umem, 4, u32::MAX - 1);
    rings.fill.refill(&mut pool, 4);
    kernel.receive(3);
    rings.tx.reserve(1).push(pool.packet(0, 60).unwrap()).unwrap();
    kernel.send(1);
    let Rings { fill, mut rx, tx, completion } = rings;

    drop((fill, tx));
    assert_consistent(&umem);
    let census = umem.census();
    // What waits in a FILL ring that is gone is the kernel's, as long as RX may yield it.
    assert_eq!((census.rx, census.completion, census.kernel, census.retired), (3, 1, 1, 0));
    rx.take(2).for_each(|packet| pool.put(packet));
    drop(completion);
    assert_consistent(&umem);
    assert_eq!((umem.census().rx, umem.census().kernel, umem.census().retired), (1, 2, 0));
    drop(rx);
    assert_consistent(&umem);
    let census = umem.census();
    assert_eq!((census.pools, census.retired, census.kernel, census.program), (3, 3, 0, 0));
}

#[test]
fn frames_of_a_socket_that_is_gone_are_reclaimed() {
    for ledger in [true, false] {
        let (umem, mut pool) = umem(6, ledger);
        let (mut rings, mut kernel) = socket(&umem, 4, u32::MAX - 1);
        rings.fill.refill(&mut pool, 4);
        kernel.receive(2);
        let packet = rings.rx.take(1).next().unwrap();
        // SAFETY: nothing is reclaimed while a ring, a pool or a packet is there; and from where
        // it is, the kernel is gone.
        unsafe {
            assert_eq!(umem.reclaim(), 0, "there are rings");
            drop((rings, kernel));
            assert_eq!(umem.reclaim(), 0, "there is a pool");
            drop(pool);
            assert_eq!((umem.census().retired, umem.census().program), (3, 1));
            assert_eq!(umem.reclaim(), 0, "there is a packet");
            drop(packet);
            assert_eq!((umem.reclaim(), umem.reclaim()), (3, 0));
        }
        assert_all_home(&umem);
        let mut pool = umem.pool();
        assert_eq!(pool.fetch(9), 6);
        let chunks: HashSet<_> =
            std::iter::from_fn(|| pool.take()).map(|frame| umem.index(&frame).unwrap()).collect();
        assert_eq!(chunks.len(), 6, "each chunk once");
        pool.fetch(9);
        // And they work again.
        let (mut rings, mut kernel) = socket(&umem, 4, 0);
        assert_eq!(rings.fill.refill(&mut pool, 4), 4);
        assert_eq!(kernel.receive(4), 4);
        assert_eq!(rings.rx.take(4).map(|packet| pool.put(packet)).count(), 4);
        assert_all_home(&umem);
    }
}

#[test]
fn pairs_are_told_apart_and_numbers_are_used_again() {
    let (umem, mut pool) = umem(4, true);
    let first = Pair::new(&umem).unwrap();
    for _ in 0..3 {
        let (mut rings, mut kernel) = socket(&umem, 4, 0);
        rings.fill.refill(&mut pool, 1);
        kernel.receive(1);
        let packet = rings.rx.take(1).next().unwrap();
        pool.put(packet);
    }
    assert_eq!(first.umem().frames(), 4);
    assert_all_home(&umem);
}

#[test]
fn what_no_kernel_takes_is_refused_with_its_reason() {
    let build = |frames, chunk, headroom| {
        Umem::builder().frames(frames).chunk_size(chunk).headroom(headroom).build().map(|_| ())
    };
    let cause = |frames, chunk, headroom| build(frames, chunk, headroom).unwrap_err().cause().clone();
    assert!(matches!(cause(0, 2048, 0), Cause::NoFrames));
    assert!(matches!(cause(1, 1024, 0), Cause::ChunkSize { chunk: 1024, min: 2048, .. }));
    assert!(matches!(cause(1, 1 << 20, 0), Cause::ChunkSize { .. }));
    assert!(matches!(cause(1, 3000, 0), Cause::ChunkNotPowerOfTwo { chunk: 3000 }));
    let most = 2048 - XDP_PACKET_HEADROOM - 1;
    assert!(build(1, 2048, most).is_ok());
    assert!(matches!(cause(1, 2048, most + 1), Cause::Headroom { max: 1344, .. }));
    assert!(matches!(cause(1, 2048, u32::MAX), Cause::Headroom { .. }));
    if !cfg!(miri) {
        assert!(matches!(cause(u32::MAX, 4096, 0), Cause::UmemTooLarge { .. } | Cause::OutOfMemory { .. }));
    }
}

#[test]
fn memory_of_a_umem_is_zeroed_and_apart_from_every_other() {
    let mut umems: Vec<(Umem, Pool)> = (0..4).map(|_| umem(2, false)).collect();
    for (number, (_, pool)) in umems.iter_mut().enumerate() {
        let mut packet = pool.packet(0, CHUNK).unwrap();
        assert!(packet.iter().all(|b| *b == 0));
        packet.fill(number as u8 + 1);
        pool.put(packet);
    }
    for (number, (umem, pool)) in umems.iter_mut().enumerate() {
        let packet = pool.packet(0, CHUNK).unwrap();
        assert!(packet.iter().all(|b| *b == number as u8 + 1));
        assert_eq!((umem.max_packet(), umem.has_ledger()), (CHUNK - 256, false));
    }
}
