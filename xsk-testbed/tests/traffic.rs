//! Traffic through the pair, counted to the packet.

use std::time::{Duration, Instant};

use xsk_testbed::{
    End, Error, Generator, Load, PacketSocket, QueueCounter, Sequence, Stream, UdpFrame, bed, number,
    source_ports,
};

/// How long something may take that is expected to happen.
const SOON: Duration = Duration::from_secs(10);

fn numbered(from: &End, to: &End) -> Vec<u8> {
    UdpFrame::new(from, to).number(0).build().unwrap()
}

/// The numbers of the next `count` frames that arrive.
fn receive(socket: &PacketSocket, count: u64) -> Sequence {
    let mut seen = Sequence::new();
    for _ in 0..count {
        let Some(frame) = socket.recv(SOON).unwrap() else { panic!("no more frames: {seen}") };
        seen.feed(number(&frame).expect("a numbered frame"));
    }
    seen
}

#[test]
fn the_wire_is_silent() {
    let Some(bed) = bed(|b| b.queues(2)) else { return };
    let (here, there) = (bed.a().udp(7).unwrap(), bed.b().udp(7).unwrap());
    for socket in [&here, &there] {
        socket.set_read_timeout(Some(SOON)).unwrap();
    }
    for _ in 0..50 {
        here.send_to(b"ping", (bed.b().ipv4, 7)).unwrap();
        let (len, from) = there.recv_from(&mut [0; 8]).unwrap();
        assert_eq!(len, 4);
        there.send_to(b"pong", from).unwrap();
        here.recv(&mut [0; 8]).unwrap();
    }
    // Since they were made: not a solicitation, a report, or an ARP request beside.
    for end in [bed.a(), bed.b()] {
        let counters = end.link().unwrap().counters;
        assert_eq!((counters.rx_packets, counters.tx_packets), (50, 50), "{}", end.name);
        let addresses =
            end.namespace.run(|| std::fs::read_to_string("/proc/thread-self/net/if_inet6")).unwrap();
        assert_eq!(addresses.unwrap_or_default(), "", "no IPv6 address");
    }
}

#[test]
fn a_packet_socket_sees_the_stack_with_whole_checksums() {
    let Some(bed) = bed(|b| b) else { return };
    let watch = PacketSocket::open(bed.a()).unwrap();
    let peer = bed.b().udp(4000).unwrap();
    peer.send_to(b"from the stack", (bed.a().ipv4, 9)).unwrap();

    let frame = watch.recv(SOON).unwrap().expect("a frame");
    let packet = etherparse::SlicedPacket::from_ethernet(&frame).unwrap();
    let Some(etherparse::TransportSlice::Udp(udp)) = packet.transport else { panic!("not UDP: {frame:?}") };
    assert_eq!((udp.source_port(), udp.destination_port()), (4000, 9));
    assert_eq!(udp.payload(), b"from the stack");
    let right =
        udp.to_header().calc_checksum_ipv4_raw(bed.b().ipv4.octets(), bed.a().ipv4.octets(), udp.payload());
    assert_eq!(udp.checksum(), right.unwrap());
}

#[test]
fn tx_checksum_offload_leaves_them_unfinished() {
    let Some(bed) = bed(|b| b.tx_checksum(true)) else { return };
    let watch = PacketSocket::open(bed.a()).unwrap();
    let peer = bed.b().udp(4000).unwrap();
    let checksum_of = |payload: &[u8]| {
        peer.send_to(payload, (bed.a().ipv4, 9)).unwrap();
        let frame = watch.recv(SOON).unwrap().expect("a frame");
        u16::from_be_bytes([frame[40], frame[41]])
    };
    assert_eq!(checksum_of(b"one"), checksum_of(b"two"), "the pseudo header's sum alone");
    bed.b().set_tx_checksum(false).unwrap();
    assert_ne!(checksum_of(b"one"), checksum_of(b"two"));
}

#[test]
fn raw_frames_arrive_as_they_were_sent() {
    let Some(bed) = bed(|b| b.mtu(9000)) else { return };
    let (here, there) = (PacketSocket::open(bed.a()).unwrap(), PacketSocket::open(bed.b()).unwrap());
    for bypass in [false, true] {
        here.bypass_qdisc(bypass).unwrap();
        for len in [60, 61, 1514, 9014] {
            let frame = UdpFrame::new(bed.a(), bed.b()).len(len).build().unwrap();
            here.send(&frame).unwrap();
            assert_eq!(there.recv(SOON).unwrap(), Some(frame));
        }
        let tagged = UdpFrame::new(bed.a(), bed.b()).vlan(42).len(100).build().unwrap();
        here.send(&tagged).unwrap();
        assert_eq!(there.recv(SOON).unwrap(), Some(tagged), "with the tag back in its place");
        let v6 = UdpFrame::new(bed.a(), bed.b()).ipv6().len(100).build().unwrap();
        here.send(&v6).unwrap();
        assert_eq!(there.recv(SOON).unwrap(), Some(v6));
    }
    assert_eq!(here.try_recv().unwrap(), None, "a socket does not see what goes out");
    assert_eq!(there.recv(Duration::from_millis(1)).unwrap(), None, "nothing twice");
    assert_eq!(there.drops().unwrap(), 0);
}

#[test]
fn built_udp_reaches_a_plain_socket() {
    let Some(bed) = bed(|b| b) else { return };
    let (raw, plain) = (PacketSocket::open(bed.a()).unwrap(), bed.b().udp(2000).unwrap());
    plain.set_read_timeout(Some(SOON)).unwrap();
    let frame = UdpFrame::new(bed.a(), bed.b()).ports(1000, 2000);
    for frame in [frame.clone(), frame.number(3)] {
        raw.send(&frame.len(80).build().unwrap()).unwrap();
        let mut payload = [0; 64];
        let (len, from) = plain.recv_from(&mut payload).unwrap();
        assert_eq!((len, from), (80 - 42, (bed.a().ipv4, 1000).into()));
    }
}

#[test]
fn frames_are_numbered_whatever_carries_them() {
    let Some(bed) = bed(|b| b) else { return };
    let frame = UdpFrame::new(bed.a(), bed.b()).number(u64::MAX - 1);
    for frame in [frame.clone(), frame.clone().vlan(4095), frame.clone().ipv6(), frame.clone().ipv6().vlan(0)]
    {
        let bytes = frame.len(200).build().unwrap();
        assert_eq!(bytes.len(), 200);
        assert_eq!(number(&bytes), Some(u64::MAX - 1));
        assert_eq!(number(&bytes[..100]), None, "cut short");
    }
    assert_eq!(number(&UdpFrame::new(bed.a(), bed.b()).build().unwrap()), None);
    assert_eq!(number(&[]), None);
    assert!(matches!(frame.clone().len(53).build(), Err(Error::FrameTooShort { len: 53, least: 54 })));
    assert!(matches!(frame.clone().len(70_000).build(), Err(Error::FrameTooLong { most: 65549, .. })));
    assert!(frame.vlan(4096).build().is_err());
}

#[test]
fn generated_frames_arrive_complete_and_in_order() {
    let Some(bed) = bed(|b| b.queues(2).gro(true)) else { return };
    let watch = PacketSocket::open(bed.a()).unwrap();
    let mut generator = Generator::new(bed.b(), numbered(bed.b(), bed.a())).unwrap().to_queue(1).unwrap();

    let mut seen = Sequence::new();
    // Fewer at a time than a veth queue holds, so that none is lost.
    for burst in [1, 2, 64, 65, 200] {
        generator.run(burst).unwrap();
        for _ in 0..burst {
            let frame = watch.recv(SOON).unwrap().expect("a frame");
            let expected = UdpFrame::new(bed.b(), bed.a()).number(seen.expected()).build().unwrap();
            assert_eq!(frame, expected);
            seen.feed(number(&frame).unwrap());
        }
    }
    assert!(seen.is_exactly(332), "{seen}");
    assert_eq!(generator.sent().unwrap(), 332);
    assert_eq!(watch.try_recv().unwrap(), None);
}

#[test]
fn generated_frames_arrive_on_the_chosen_queue_of_a_native_program() {
    const QUEUES: u32 = 4;
    let Some(bed) = bed(|b| b.queues(QUEUES)) else { return };
    let counter = QueueCounter::new(QUEUES).unwrap();
    let _attached = counter.attach(bed.a()).unwrap();
    let counts = || counter.counts().unwrap();
    let mut expected = vec![0; QUEUES as usize];
    for queue in 0..QUEUES {
        let generator = Generator::new(bed.b(), numbered(bed.b(), bed.a())).unwrap();
        let mut generator = match generator.to_queue(queue) {
            Ok(generator) => generator,
            Err(Error::NoCpuForQueue { .. }) => continue,
            Err(e) => panic!("{e}"),
        };
        generator.run(200).unwrap();
        expected[queue as usize] = 200;
        let deadline = Instant::now() + SOON;
        while counts() != expected {
            assert!(Instant::now() < deadline, "{:?} instead of {expected:?}", counts());
            std::thread::yield_now();
        }
    }
    assert!(expected.contains(&200), "each CPU leads to some queue");
}

#[test]
fn a_windowed_generator_loses_nothing() {
    const COUNT: u64 = 20_000;
    let Some(bed) = bed(|b| b.gro(true)) else { return };
    let watch = PacketSocket::open(bed.a()).unwrap();
    let generator = Generator::new(bed.b(), numbered(bed.b(), bed.a())).unwrap();
    let running = generator.start(Load::count(COUNT).window(128)).unwrap();
    let mut seen = Sequence::new();
    while seen.total() < COUNT {
        let frame = watch.recv(SOON).unwrap().unwrap_or_else(|| panic!("stalled: {seen}"));
        seen.feed(number(&frame).unwrap());
        assert!(running.sent().unwrap() <= seen.total() + 128);
        running.received(1).unwrap();
    }
    assert!(seen.is_exactly(COUNT), "{seen}");
    assert_eq!(running.wait().unwrap().sent().unwrap(), COUNT);
}

#[test]
fn an_endless_generator_runs_until_it_is_stopped() {
    let Some(bed) = bed(|b| b.gro(true)) else { return };
    let generator = Generator::new(bed.b(), numbered(bed.b(), bed.a())).unwrap().on_cpu(0);
    let running = generator.start(Load::endless()).unwrap();
    let deadline = Instant::now() + SOON;
    while running.sent().unwrap() < 100_000 {
        assert!(!running.is_finished() && Instant::now() < deadline);
        std::thread::yield_now();
    }
    let mut generator = running.stop().unwrap();
    let sent = generator.sent().unwrap();
    assert!(sent >= 100_000);

    // It counts on where it was.
    let watch = PacketSocket::open(bed.a()).unwrap();
    generator.run(10).unwrap();
    let mut seen = Sequence::starting_at(sent);
    seen.extend((0..10).map(|_| number(&watch.recv(SOON).unwrap().expect("a frame")).unwrap()));
    assert!(seen.is_exactly(10), "{seen}");

    // A dropped one stops too: its namespace handle is the last but the testbed's.
    drop(generator.start(Load::endless().window(1)).unwrap());
}

#[test]
fn two_generators_count_apart() {
    let Some(bed) = bed(|b| b.gro(true).single_namespace(true)) else { return };
    let (at_a, at_b) = (PacketSocket::open(bed.a()).unwrap(), PacketSocket::open(bed.b()).unwrap());
    Generator::new(bed.a(), numbered(bed.a(), bed.b())).unwrap().run(50).unwrap();
    Generator::new(bed.b(), numbered(bed.b(), bed.a())).unwrap().run(60).unwrap();
    assert!(receive(&at_b, 50).is_exactly(50));
    assert!(receive(&at_a, 60).is_exactly(60));
    assert_eq!((at_a.try_recv().unwrap(), at_b.try_recv().unwrap()), (None, None));
}

#[test]
fn a_generator_refuses_what_would_vanish() {
    let Some(bed) = bed(|b| b.queues(3)) else { return };
    let plain = UdpFrame::new(bed.a(), bed.b()).build().unwrap();
    assert!(matches!(Generator::new(bed.a(), plain), Err(Error::NotNumbered)));
    let long = UdpFrame::new(bed.a(), bed.b()).number(0).len(1519).build().unwrap();
    assert!(matches!(Generator::new(bed.a(), long), Err(Error::FrameTooLong { len: 1519, most: 1518 })));
    let fits = || Generator::new(bed.a(), numbered(bed.a(), bed.b())).unwrap();
    assert!(matches!(fits().to_queue(3), Err(Error::NoCpuForQueue { queue: 3, queues: 3 })));
    assert!(fits().on_cpu(1 << 20).run(1).is_err());
}

#[test]
fn frames_of_every_size_can_be_generated_up_to_the_kernels_limit() {
    let Some(bed) = bed(|b| b.mtu(9000).gro(true)) else { return };
    let watch = PacketSocket::open(bed.a()).unwrap();
    for len in [60, 128, 1514, 3300] {
        let frame = UdpFrame::new(bed.b(), bed.a()).number(0).len(len).build().unwrap();
        Generator::new(bed.b(), frame.clone()).unwrap().run(1).unwrap();
        assert_eq!(watch.recv(SOON).unwrap(), Some(frame));
    }
    let frame = UdpFrame::new(bed.b(), bed.a()).number(0).len(4000).build().unwrap();
    let error = Generator::new(bed.b(), frame).unwrap().run(1).unwrap_err().to_string();
    assert!(error.starts_with("generating frames of 4000 bytes: Invalid argument"), "{error}");
}

#[test]
fn a_stream_reaches_each_queue_and_loses_nothing() {
    const QUEUES: u32 = 4;
    const COUNT: u64 = 5000;
    let Some(bed) = bed(|b| b.queues(QUEUES)) else { return };
    let ports = source_ports(bed.b(), bed.a()).unwrap();
    let counter = QueueCounter::new(QUEUES).unwrap();
    let _attached = counter.attach(bed.a()).unwrap();
    let mut generated = 0;
    for (queue, &port) in (0..QUEUES).zip(&ports) {
        let frame = UdpFrame::new(bed.b(), bed.a()).source_port(port).number(0).build().unwrap();
        let stream = Stream::start(bed.b(), frame, queue, Load::count(COUNT).window(64)).unwrap();
        generated += u32::from(stream.is_generated());
        let (mut seen, deadline) = (0, Instant::now() + SOON);
        while seen < COUNT {
            let now = counter.counts().unwrap()[queue as usize];
            assert!(stream.sent().unwrap() <= seen + 64 && Instant::now() < deadline);
            stream.received(now - seen).unwrap();
            seen = now;
        }
        assert_eq!(stream.stop().unwrap(), COUNT);
    }
    assert_eq!(counter.counts().unwrap(), [COUNT; QUEUES as usize]);
    assert!(generated > 0, "each CPU leads to some queue");
}

#[test]
fn a_pair_beside_the_testbed_is_another_interface_of_its_thread() {
    let Some(bed) = bed(|b| b) else { return };
    let [second, third] = [(), ()].map(|()| xsk_testbed::Testbed::builder().queues(2).beside(&bed).unwrap());
    for pair in [&second, &third] {
        assert_eq!(pair.a().namespace.id().unwrap(), bed.a().namespace.id().unwrap());
        let watch = PacketSocket::open(pair.a()).unwrap();
        let frame = numbered(pair.b(), pair.a());
        PacketSocket::open(pair.b()).unwrap().send(&frame).unwrap();
        assert_eq!(watch.recv(SOON).unwrap(), Some(frame));
    }
    assert_ne!(second.a().ifindex, third.a().ifindex);
    assert_eq!(bed.a().link().unwrap().counters.rx_packets, 0);
}
