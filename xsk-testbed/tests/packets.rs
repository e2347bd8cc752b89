//! Real packets through real AF_XDP sockets, checked against peers that are not ours.
#![cfg(target_os = "linux")]

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use xsk::socket::{RxOnly, RxTx};
use xsk::xdp::{AttachMode, DefaultProgram};
use xsk::{Device, Interest, Mode, Sent, Socket, Umem};
use xsk_testbed::{Generator, Load, PacketSocket, Sequence, Testbed, UdpFrame, bed, number};

const PATIENCE: Duration = Duration::from_secs(10);

/// The generator takes a whole processor: tests that use it take turns.
static GENERATOR: Mutex<()> = Mutex::new(());

/// Everything that a test needs on end `a`.
struct Setup {
    umem: Umem,
    xsk: RxTx,
    program: DefaultProgram,
}

fn setup(bed: &Testbed, attach: AttachMode) -> Setup {
    let device = Device::open(&bed.a().name).unwrap();
    let (umem, mut pool) = Umem::builder().frames(4096).chunk_size(2048).ledger(true).build().unwrap();
    let mut xsk = Socket::builder(&device).mode(Mode::Copy).open(&umem).unwrap();
    assert_eq!(xsk.fill.refill(&mut pool, 2048), 2048);
    let program = DefaultProgram::attach(&device, attach).unwrap();
    assert_eq!(program.mode(), attach);
    program.insert(&xsk.socket).unwrap();
    Setup { umem, xsk, program }
}

/// Nothing is lost, and the program holds no frame.
fn assert_settled(umem: &Umem) {
    let census = umem.census();
    assert_eq!(census.contradiction(), None);
    assert_eq!(census.program, 0, "{census:?}");
    assert_eq!(census.faults.total(), 0, "{census:?}");
}

#[test]
fn every_length_arrives_once_in_order_unaltered_native() {
    receives_every_length(AttachMode::Native);
}

#[test]
fn every_length_arrives_once_in_order_unaltered_generic() {
    receives_every_length(AttachMode::Generic);
}

fn receives_every_length(attach: AttachMode) {
    let Some(bed) = bed(|b| b) else { return };
    let Setup { umem, mut xsk, program: _program } = setup(&bed, attach);
    let peer = PacketSocket::open(bed.b()).unwrap();
    for len in 60..=1514usize {
        let mut sent = UdpFrame::new(bed.b(), bed.a()).len(len).build().unwrap();
        for (i, byte) in sent.iter_mut().enumerate().skip(42) {
            *byte = (i * 7 + len) as u8;
        }
        peer.send(&sent).unwrap();
        let deadline = Instant::now() + PATIENCE;
        let mut seen = 0;
        while seen == 0 {
            assert!(Instant::now() < deadline, "the packet of {len} bytes did not arrive");
            xsk.socket.wait(Interest::Rx, Some(Duration::from_secs(1))).unwrap();
            let packets = xsk.rx.take(8);
            seen += xsk.fill.extend(packets, |packet| {
                assert_eq!(&packet[..], &sent[..], "{len} bytes");
                packet.into_frame()
            });
        }
        assert_eq!(seen, 1);
    }
    assert_settled(&umem);
}

#[test]
fn every_length_is_sent_unaltered() {
    let Some(bed) = bed(|b| b) else { return };
    let device = Device::open(&bed.a().name).unwrap();
    let (umem, mut pool) = Umem::builder().frames(64).build().unwrap();
    let mut xsk = Socket::builder(&device).open_tx(&umem).unwrap();
    assert!(device.info().unwrap().programs().is_empty(), "sending needs no program");
    let peer = PacketSocket::open(bed.b()).unwrap();
    for len in 60..=1514u32 {
        let mut packet = pool.packet(0, len).unwrap();
        for (i, byte) in packet.iter_mut().enumerate() {
            *byte = (i as u32 * 5 + len) as u8;
        }
        packet[..6].copy_from_slice(&bed.b().mac);
        packet[6..12].copy_from_slice(&bed.a().mac);
        packet[12..14].copy_from_slice(&[0x88, 0xb5]);
        let expected = packet.to_vec();
        let number = umem.index_of(&packet).unwrap();
        xsk.tx.reserve(1).push(packet).unwrap();
        assert_eq!(xsk.socket.send().unwrap(), Sent::Done);
        assert_eq!(peer.recv(PATIENCE).unwrap().as_deref(), Some(&expected[..]), "{len} bytes");
        let deadline = Instant::now() + PATIENCE;
        while xsk.completion.available() == 0 {
            assert!(Instant::now() < deadline, "the packet of {len} bytes was not completed");
        }
        for frame in xsk.completion.take(1) {
            assert_eq!(umem.index(&frame), Some(number), "the frame that was sent comes back");
            pool.put(frame);
        }
    }
    assert_settled(&umem);
    assert_eq!(pool.len(), 64);
}

#[test]
fn ten_million_received_packets_each_checked() {
    let _turn = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(bed) = bed(|b| b.single_namespace(true)) else { return };
    let packets = if cfg!(debug_assertions) { 1_000_000 } else { 10_000_000 };
    let Setup { umem, mut xsk, program: _program } = setup(&bed, AttachMode::Native);
    let frame = UdpFrame::new(bed.b(), bed.a()).len(64).number(0).build().unwrap();
    let running = Generator::new(bed.b(), frame.clone()).unwrap().start(Load::endless()).unwrap();
    let mut sequence = Sequence::new();
    let mut deadline = Instant::now() + PATIENCE;
    while sequence.total() < packets {
        let taken = xsk.rx.take(64);
        let n = xsk.fill.extend(taken, |packet| {
            assert_eq!(packet[..42], frame[..42]);
            sequence.feed(number(&packet).expect("a numbered packet"));
            packet.into_frame()
        });
        if n > 0 {
            deadline = Instant::now() + PATIENCE;
        } else {
            xsk.socket.wait(Interest::Rx, Some(Duration::from_millis(100))).unwrap();
        }
        assert!(
            Instant::now() < deadline,
            "only {} packets arrived, {} were sent: {sequence:?} {:?} {:?}",
            sequence.total(),
            running.sent().unwrap(),
            xsk.socket.statistics(),
            umem.census(),
        );
    }
    running.stop().unwrap();
    assert_eq!(sequence.duplicates(), 0);
    assert_eq!(sequence.late(), 0);
    assert_settled(&umem);
}

#[test]
fn a_paced_million_arrives_without_any_loss() {
    let _turn = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(bed) = bed(|b| b.single_namespace(true)) else { return };
    let Setup { umem, mut xsk, program: _program } = setup(&bed, AttachMode::Native);
    let frame = UdpFrame::new(bed.b(), bed.a()).len(64).number(0).build().unwrap();
    let count = 1_000_000;
    let running = Generator::new(bed.b(), frame).unwrap().start(Load::count(count).window(128)).unwrap();
    let mut sequence = Sequence::new();
    let mut deadline = Instant::now() + PATIENCE;
    while sequence.total() < count {
        let n = xsk.fill.extend(xsk.rx.take(64), |packet| {
            sequence.feed(number(&packet).expect("a numbered packet"));
            packet.into_frame()
        });
        if n > 0 {
            running.received(u64::from(n)).unwrap();
            deadline = Instant::now() + PATIENCE;
        } else {
            xsk.socket.wait(Interest::Rx, Some(Duration::from_millis(100))).unwrap();
        }
        assert!(
            Instant::now() < deadline,
            "only {} packets arrived, {} were sent: {sequence:?} {:?} {:?}",
            sequence.total(),
            running.sent().unwrap(),
            xsk.socket.statistics(),
            umem.census(),
        );
    }
    running.wait().unwrap();
    assert!(sequence.is_exactly(count), "{sequence:?}");
    let statistics = xsk.socket.statistics().unwrap();
    assert_eq!((statistics.rx_dropped, statistics.rx_ring_full), (0, Some(0)));
    assert_settled(&umem);
}

#[test]
fn a_queue_is_free_again_after_close_and_rebinding_waits_for_it() {
    let Some(bed) = bed(|b| b) else { return };
    let device = Device::open(&bed.a().name).unwrap();
    for _ in 0..10 {
        let (umem, mut pool) = Umem::builder().frames(64).build().unwrap();
        let RxOnly { mut fill, .. } = Socket::builder(&device).open_rx(&umem).unwrap();
        assert_eq!(fill.refill(&mut pool, 32), 32);
    }
}
