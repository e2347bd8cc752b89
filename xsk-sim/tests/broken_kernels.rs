//! The library on kernels that break their promises: what types cannot catch.
//!
//! With the ledger no frame is ever there twice. Without it the library trusts the kernel with that,
//! and still no packet leaves its chunk. The two hold in release builds as in debug builds.

mod wrapped;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use wrapped::*;
use xsk::abi::{Descriptor, RingKind, UmemReg};
use xsk_sim::wrap::{Builder, Fault};

const RINGS: [RingKind; 4] = [RingKind::Fill, RingKind::Rx, RingKind::Tx, RingKind::Completion];

/// What the library counts of a fault that befalls every entry of a ring.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Counted {
    Nothing,
    Outside,
    /// With the ledger only.
    Duplicate,
}

fn counted(ring: RingKind, fault: Fault) -> Counted {
    match (ring, fault) {
        // The kernel skips what is not in the UMEM.
        (RingKind::Fill, Fault::Outside | Fault::Highest) => Counted::Nothing,
        (_, Fault::Outside | Fault::Highest) => Counted::Outside,
        (RingKind::Rx, Fault::Crossing | Fault::Empty) => Counted::Outside,
        (_, Fault::Twice | Fault::Other) => Counted::Duplicate,
        // It is lost, still the same frame, or an invalid descriptor that is given back as it came.
        _ => Counted::Nothing,
    }
}

/// Every ring of a kernel where one goes wrong gets used: packets in and out, a few times over.
fn use_all_rings(bed: &mut Bed) -> Vec<Held> {
    let mut held = Vec::new();
    for _ in 0..3 {
        bed.xsk.fill.refill(&mut bed.pool, 3);
        bed.transmit(2);
        (0..3).for_each(|_| bed.inject());
        held.extend(bed.take_all());
    }
    held
}

#[test]
fn with_the_ledger_no_frame_is_there_twice_and_every_fault_is_counted() {
    for (ring, fault) in RINGS.into_iter().flat_map(|ring| Fault::ALL.map(|fault| (ring, fault))) {
        // SAFETY: the ledger is on.
        let mut bed = Bed::new(|wrapper| unsafe { wrapper.fault(ring, fault) }, true);
        let held = use_all_rings(&mut bed);
        let what = format!("{fault:?} in {ring}");
        bed.assert_inside(&held);
        let census = bed.assert_unique(&held);
        assert_eq!(census.contradiction(), None, "{what}");
        let faults = bed.umem.faults();
        let found = match (faults.outside > 0, faults.duplicate > 0) {
            (false, false) => Counted::Nothing,
            (true, false) => Counted::Outside,
            (false, true) => Counted::Duplicate,
            (true, true) => panic!("{what}: {faults:?}"),
        };
        assert_eq!(found, counted(ring, fault), "{what}: {faults:?}");
        // Each frame that did not come back is known to be with the kernel, and can be had again.
        let elsewhere = census.kernel + i64::from(census.fill) + i64::from(census.tx);
        assert_eq!(elsewhere, i64::from(FRAMES - census.pools - census.depot) - held.len() as i64, "{what}");
        bed.put(held);
        bed.close(Vec::new());
    }
}

#[test]
fn without_the_ledger_no_packet_leaves_its_chunk() {
    for (ring, fault) in RINGS.into_iter().flat_map(|ring| Fault::ALL.map(|fault| (ring, fault))) {
        // SAFETY: nothing here writes to a frame that was had from the kernel, or reads its bytes.
        let mut bed = Bed::new(|wrapper| unsafe { wrapper.fault(ring, fault) }, false);
        let held = use_all_rings(&mut bed);
        let what = format!("{fault:?} in {ring}");
        bed.assert_inside(&held);
        let (faults, census) = (bed.umem.faults(), bed.umem.census());
        let outside = counted(ring, fault) == Counted::Outside;
        assert_eq!((faults.outside > 0, faults.duplicate), (outside, 0), "{what}: {faults:?}");
        assert_eq!(census.ledger_held, None);
        // Numbers alone can tell that more came back than was lent, but not that the wrong one did.
        // In FILL and TX it is the kernel that is told twice; what it was told, it gives back.
        let contradiction = census.contradiction();
        if fault == Fault::Twice {
            let told = contradiction.unwrap_or_else(|| panic!("{what}: {census:?}"));
            let more = format!("the kernel gave back {} frames that it had not taken", -census.kernel);
            assert!(census.kernel < 0 && told.starts_with(&more), "{what}: {told}");
        } else {
            assert_eq!(contradiction, None, "{what}");
        }
        drop((held, bed));
    }
}

#[test]
fn a_second_completion_is_refused_when_the_frame_is_under_way_again() {
    let again = Arc::new(AtomicU64::new(u64::MAX));
    let stale = again.clone();
    let repeat = move |entry: Descriptor, _: &UmemReg| {
        let stale = stale.swap(u64::MAX, Relaxed);
        // An old address comes first, if one was left to be repeated.
        let old = (stale != u64::MAX).then_some(Descriptor { addr: stale, ..entry });
        old.into_iter().chain([entry]).collect()
    };
    // SAFETY: the ledger is on.
    let mut bed = Bed::new(|wrapper| unsafe { wrapper.tamper(RingKind::Completion, repeat) }, true);
    bed.transmit(1);
    let held = bed.take();
    assert_eq!(held.len(), 1);
    let sent = u64::from(held[0].index(&bed.umem)) * u64::from(CHUNK);

    // The frame is in FILL now: nothing may come out of COMPLETION with it.
    bed.put(held);
    assert_eq!(bed.xsk.fill.refill(&mut bed.pool, 1), 1);
    again.store(sent, Relaxed);
    bed.transmit(1);
    let held = bed.take();
    assert_eq!(held.len(), 1);
    assert_ne!(u64::from(held[0].index(&bed.umem)) * u64::from(CHUNK), sent);
    let faults = bed.umem.faults();
    assert_eq!((faults.duplicate, faults.outside, faults.last_address), (1, 0, sent));
    assert_eq!(bed.assert_unique(&held).contradiction(), None);
    bed.inject();
    assert_eq!(bed.xsk.rx.available(), 1, "it receives as if nothing had been");
    bed.close(held);
}

#[test]
fn what_comes_back_before_it_is_taken_is_told_as_a_contradiction() {
    // SAFETY: the ledger is on.
    let mut bed = Bed::new(|wrapper| unsafe { wrapper.fault(RingKind::Completion, Fault::Twice) }, true);
    bed.transmit(1);
    let census = bed.umem.census();
    assert_eq!((census.completion, census.kernel), (2, -1));
    assert!(census.contradiction().unwrap().starts_with("the kernel gave back 1 frame"));
    let held = bed.take();
    assert_eq!(held.len(), 1);
    let census = bed.assert_unique(&held);
    assert_eq!((census.completion, census.kernel, census.contradiction()), (0, 0, None));
}

#[test]
fn a_chunk_that_a_closed_socket_had_does_not_come_out_of_the_next_one() {
    for ring in [RingKind::Rx, RingKind::Completion] {
        let old = Arc::new(AtomicU64::new(u64::MAX));
        let stale = old.clone();
        let replace = move |mut entry: Descriptor, _: &UmemReg| {
            if stale.load(Relaxed) != u64::MAX {
                entry.addr = stale.load(Relaxed);
            }
            vec![entry]
        };
        // SAFETY: the ledger is on.
        let mut bed =
            Bed::with(|wrapper| unsafe { wrapper.tamper(ring, replace) }, true, |xsk| xsk.tx_size(1));
        // One frame is lost in FILL and one in TX, where the ring of COMPLETION is not looked at.
        assert_eq!(bed.xsk.fill.refill(&mut bed.pool, 1), 1);
        let packet = bed.pool.packet(0, 60).unwrap();
        let index = match ring {
            RingKind::Completion => bed.umem.index_of(&packet).unwrap(),
            _ => 0,
        };
        bed.xsk.tx.reserve(1).push(packet).unwrap();
        old.store(u64::from(index) * u64::from(CHUNK), Relaxed);
        let mut bed = bed.reopen(false);
        assert_eq!(bed.umem.census().retired, 2);

        bed.xsk.fill.refill(&mut bed.pool, 1);
        bed.inject();
        bed.transmit(1);
        let held = bed.take_all();
        assert_eq!(held.len(), 1, "the other ring works");
        assert_eq!(bed.umem.faults().duplicate, 1);
        assert_eq!(bed.assert_unique(&held).contradiction(), None);
        bed.close(held);
    }
}

/// Indices that are ahead by less than a ring of 16 holds, by all of it, and by more.
const AHEAD: [u32; 7] = [1, 8, 15, 16, 17, 1 << 31, u32::MAX];

#[test]
fn a_wild_index_shows_no_frame_twice() {
    for (ring, ahead) in RINGS.into_iter().flat_map(|ring| AHEAD.map(|ahead| (ring, ahead))) {
        // SAFETY: the ledger is on, and nobody else works on these rings.
        let mut bed = Bed::new(|wrapper| unsafe { wrapper.wild_index(ring, ahead) }, true);
        for round in 0..40 {
            let held = use_all_rings(&mut bed);
            let what = format!("{ring} ahead by {ahead}, round {round}");
            assert!(!held.is_empty(), "{what}");
            bed.assert_inside(&held);
            assert_eq!(bed.assert_unique(&held).contradiction(), None, "{what}");
            bed.put(held);
        }
        bed.close(Vec::new());
    }
}

#[test]
fn an_index_that_no_ring_can_have_shows_nothing_and_hides_nothing_for_good() {
    for (ledger, ahead) in [17, 1 << 31, u32::MAX].into_iter().flat_map(|a| [(true, a), (false, a)]) {
        let wrap = |wrapper: Builder| {
            // SAFETY: such an index shows no entry at all.
            unsafe { wrapper.wild_index(RingKind::Rx, ahead).wild_index(RingKind::Completion, ahead) }
        };
        let mut bed = Bed::new(wrap, ledger);
        bed.xsk.fill.refill(&mut bed.pool, 2);
        bed.transmit(1);
        bed.wrapper.pump();
        bed.sim.inject("sim0", &PACKET).unwrap();
        bed.sim.run();
        bed.wrapper.pump();
        assert_eq!(bed.xsk.rx.available(), 0, "{ahead}");
        assert_eq!(bed.umem.census().contradiction(), None, "{ahead}");
        let held = bed.take_all();
        assert_eq!(held.len(), 2, "{ahead}");
        let census = bed.assert_unique(&held);
        assert_eq!((census.contradiction(), census.faults.total()), (None, 0), "{ahead}");
        bed.close(held);
    }
}

#[test]
fn a_wild_index_shows_no_bytes_outside_a_chunk_without_the_ledger() {
    for (ring, ahead) in RINGS.into_iter().flat_map(|ring| AHEAD.map(|ahead| (ring, ahead))) {
        // SAFETY: nothing here writes to a frame that was had from the kernel, or reads its bytes.
        let mut bed = Bed::new(|wrapper| unsafe { wrapper.wild_index(ring, ahead) }, false);
        let held = use_all_rings(&mut bed);
        bed.assert_inside(&held);
        let contradicts = bed.umem.census().contradiction().is_some();
        let stale = matches!(ring, RingKind::Rx | RingKind::Completion) && ahead <= 16;
        assert!(!contradicts || stale, "{ring} ahead by {ahead}: {:?}", bed.umem.census());
    }
}

#[test]
fn frames_that_are_there_twice_without_the_ledger_end_without_harm() {
    for ring in [RingKind::Rx, RingKind::Completion] {
        // SAFETY: nothing here touches the bytes of a frame that was had from the kernel.
        let mut bed = Bed::new(|wrapper| unsafe { wrapper.fault(ring, Fault::Twice) }, false);
        let held = use_all_rings(&mut bed);
        // More frames than a pool or the depot has room for: what is too much is counted.
        let (half, umem) = (held.len() / 2, bed.umem.clone());
        for (i, held) in held.into_iter().enumerate() {
            if i < half { bed.pool.extend([held.into()]) } else { drop(held) }
        }
        drop(bed);
        // SAFETY: the kernel is gone.
        assert_eq!(unsafe { umem.reclaim() }, 0, "it can't be told which frames are lost");
        umem.census();
    }
}

#[test]
fn nothing_is_reclaimed_where_one_frame_is_there_twice_and_another_lost() {
    let mut seen = 0;
    let tamper = move |entry: Descriptor, _: &UmemReg| {
        seen += 1;
        if seen == 1 { vec![entry, entry] } else { Vec::new() }
    };
    // SAFETY: nothing here touches the bytes of a frame that was had from the kernel.
    let mut bed = Bed::new(|wrapper| unsafe { wrapper.tamper(RingKind::Completion, tamper) }, false);
    bed.transmit(2);
    let held = bed.take_all();
    assert_eq!(held.len(), 2);
    assert_eq!(held[0].index(&bed.umem), held[1].index(&bed.umem));
    let umem = bed.umem.clone();
    drop((bed, held));
    assert_eq!(umem.census().contradiction(), None, "the numbers add up");
    // SAFETY: the kernel is gone.
    assert_eq!(unsafe { umem.reclaim() }, 0);
    assert_eq!(umem.census().depot, FRAMES, "no frame was made of the lost one");
}

/// A small generator of random numbers (xorshift64*).
struct Random(u64);

impl Random {
    fn below(&mut self, n: u32) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % u64::from(n)) as u32
    }
}

/// Tells the seed of a test that fails.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the seed was {}", self.0);
        }
    }
}

/// One entry in eight meets a fault, on every ring; indices run wild where the seed says so.
fn at_random(mut wrapper: Builder, seed: u64) -> Builder {
    for (i, ring) in (0u64..).zip(RINGS) {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(i) | 1);
        let tamper = move |entry: Descriptor, umem: &UmemReg| match random.below(8) {
            0 => {
                let fault = Fault::ALL[random.below(Fault::ALL.len() as u32) as usize];
                fault.apply(entry, umem)
            }
            _ => vec![entry],
        };
        // SAFETY: the ledger is on, and one thread works on it all.
        wrapper = unsafe { wrapper.tamper(ring, tamper) };
        if seed >> i & 3 == 3 {
            let ahead = AHEAD[(seed / 16 + i) as usize % AHEAD.len()];
            // SAFETY: as above.
            wrapper = unsafe { wrapper.wild_index(ring, ahead) };
        }
    }
    wrapper
}

#[test]
fn random_traffic_over_random_faults_keeps_every_frame_single() {
    let (mut received, mut faults) = (0, 0);
    let seeds = match std::env::var("XSK_SEED").map(|seed| seed.parse()) {
        Ok(seed) => vec![seed.expect("XSK_SEED is a number")],
        Err(_) => (1..=32).collect(),
    };
    for seed in seeds {
        let _told = Seed(seed);
        let of_seed = random_traffic(seed);
        received += of_seed.0;
        faults += of_seed.1;
    }
    assert!(received > 100 && faults > 100, "{received} packets, {faults} faults: too few to tell");
}

/// Tells how many packets were received and faults found.
fn random_traffic(seed: u64) -> (usize, u64) {
    let mut random = Random(seed.wrapping_mul(0xd134_2543_de82_ef95) | 1);
    let mut bed = Bed::with(|wrapper| at_random(wrapper, seed), true, |xsk| xsk.ring_size(8));
    let mut held: Vec<Held> = Vec::new();
    let mut received = 0;
    for _ in 0..400 {
        match random.below(12) {
            0 | 1 => {
                bed.xsk.fill.refill(&mut bed.pool, random.below(6));
            }
            2 | 3 => (0..random.below(4)).for_each(|_| bed.inject()),
            4 => {
                bed.transmit(random.below(6));
            }
            5 => bed.xsk.socket.wake_rx().unwrap(),
            6 | 7 => {
                let taken = bed.xsk.rx.take(random.below(6)).map(Held::Packet);
                let before = held.len();
                held.extend(taken);
                received += held.len() - before;
                held.extend(bed.xsk.completion.take(random.below(6)).map(Held::Frame));
            }
            8 => {
                let some = held.split_off(held.len() - held.len().min(random.below(6) as usize));
                bed.put(some);
            }
            9 => {
                // Straight from ring to ring.
                bed.xsk.fill.extend_frames(bed.xsk.completion.take(random.below(4)));
                bed.xsk.tx.extend(bed.xsk.rx.take(random.below(4)), |packet| packet);
                let _ = bed.xsk.socket.send().unwrap();
            }
            10 => {
                // The slow way home, and back.
                drop(held.pop());
                bed.pool.fetch(random.below(3) as usize);
            }
            _ if random.below(4) == 0 => {
                // Another socket. What the last one lost is lost, or reclaimed when nothing is held.
                let reclaim = random.below(4) > 0;
                if reclaim {
                    bed.put(std::mem::take(&mut held));
                }
                bed = bed.reopen(reclaim);
            }
            _ => held.extend(bed.take_all()),
        }
        check(&mut bed, &held);
    }
    held.extend(bed.take_all());
    let faults = bed.umem.faults().total();
    bed.close(held);
    (received, faults)
}

fn check(bed: &mut Bed, held: &[Held]) {
    bed.assert_inside(held);
    let census = bed.assert_unique(held);
    // What is in RX and COMPLETION has not been judged yet, and a kernel that uses an entry twice
    // gives a frame back that is still in FILL or TX. Nothing else is ever contradicted.
    if let Some(told) = census.contradiction() {
        let rings = census.fill + census.tx + census.rx + census.completion;
        assert!(census.kernel < 0 && rings > 0 && told.starts_with("the kernel gave back"), "{told}");
    }
    let obtainable = i64::from(census.pools) + i64::from(census.depot) + census.program;
    assert!(obtainable <= i64::from(FRAMES), "{census:?}");
}
