//! What sockets promise beyond moving packets, on the real kernel.
#![cfg(target_os = "linux")]

use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use xsk::socket::{Ready, RxTx};
use xsk::xdp::{AttachMode, DefaultProgram, Program, XskMap};
use xsk::{Device, Interest, Mode, Sent, Socket, Umem};
use xsk_testbed::{PacketSocket, UdpFrame, bed, number};

const PATIENCE: Duration = Duration::from_secs(10);

/// Polls until `done` says so.
fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::yield_now();
    }
}

#[test]
fn receiving_and_sending_go_to_different_threads() {
    let Some(bed) = bed(|b| b) else { return };
    let device = Device::open(&bed.a().name).unwrap();
    let (umem, mut pool) = Umem::builder().frames(256).build().unwrap();
    let RxTx { socket, mut fill, mut rx, mut tx, mut completion } =
        Socket::builder(&device).open(&umem).unwrap();
    let program = DefaultProgram::attach(&device, AttachMode::Best).unwrap();
    program.insert(&socket).unwrap();
    fill.refill(&mut pool, 128);

    const COUNT: u64 = 1000;
    let (give, take) = std::sync::mpsc::sync_channel::<xsk::Packet>(64);
    let sender_socket = socket.clone();
    let receiver = std::thread::spawn(move || {
        let mut seen = 0;
        while seen < COUNT {
            assert_ne!(socket.wait(Interest::Rx, Some(PATIENCE)).unwrap(), Ready::default());
            for packet in rx.take(16) {
                assert_eq!(number(&packet), Some(seen));
                seen += 1;
                give.send(packet).unwrap();
            }
            pool.fetch(64);
            fill.refill(&mut pool, 64);
        }
        (rx, fill)
    });
    let their_umem = umem.clone();
    let sender = std::thread::spawn(move || {
        let mut pool = their_umem.pool();
        for mut packet in take {
            packet[..12].rotate_left(6);
            tx.reserve(1).push(packet).unwrap();
            while sender_socket.send().unwrap() != Sent::Done {}
            completion.drain_into(&mut pool);
            pool.give(usize::MAX);
        }
        until("completions", || {
            completion.drain_into(&mut pool);
            pool.give(usize::MAX);
            their_umem.census().kernel <= 128 && tx.pending() == 0
        });
        (tx, completion)
    });
    let peer = PacketSocket::open(bed.b()).unwrap();
    for n in 0..COUNT {
        peer.send(&UdpFrame::new(bed.b(), bed.a()).len(100).number(n).build().unwrap()).unwrap();
        // Each comes back before the next is sent, so none is dropped for want of room.
        let back = peer.recv(PATIENCE).unwrap().expect("the packet comes back");
        assert_eq!((number(&back), &back[..6]), (Some(n), &bed.b().mac[..]));
    }
    let _rings = (receiver.join().unwrap(), sender.join().unwrap());
    let census = umem.census();
    assert_eq!((census.contradiction(), census.program), (None, 0), "{census:?}");
}

#[test]
fn a_udp_socket_receives_what_is_sent_and_the_stack_gets_what_has_no_socket() {
    let Some(bed) = bed(|b| b) else { return };
    let device = Device::open(&bed.a().name).unwrap();
    let (umem, mut pool) = Umem::builder().frames(16).build().unwrap();
    let mut xsk = Socket::builder(&device).open_tx(&umem).unwrap();
    // A program with an empty map: everything goes on to the Linux stack.
    let _program = DefaultProgram::attach(&device, AttachMode::Best).unwrap();

    let theirs = bed.b().udp(4242).unwrap();
    theirs.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut packet = pool.packet(0, 90).unwrap();
    let frame = UdpFrame::new(bed.a(), bed.b()).ports(999, 4242).len(90).build().unwrap();
    packet.copy_from_slice(&frame);
    xsk.tx.reserve(1).push(packet).unwrap();
    assert_eq!(xsk.socket.send().unwrap(), Sent::Done);
    let mut buffer = [0; 200];
    let (len, from) = theirs.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..len], &frame[42..]);
    assert_eq!(from, SocketAddr::from((bed.a().ipv4, 999)));

    let ours = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 999)).unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    theirs.send_to(b"answer", from).unwrap();
    assert_eq!(ours.recv(&mut buffer).unwrap(), 6);
    until("completion", || xsk.completion.drain_into(&mut pool) == 1);
    assert_eq!(pool.len(), 16);
}

#[test]
fn drops_are_counted_where_they_happen() {
    let Some(bed) = bed(|b| b) else { return };
    let device = Device::open(&bed.a().name).unwrap();
    let (umem, mut pool) = Umem::builder().frames(64).chunk_size(2048).headroom(1000).build().unwrap();
    let mut xsk = Socket::builder(&device).rx_size(4).open_rx(&umem).unwrap();
    let program = DefaultProgram::attach(&device, AttachMode::Generic).unwrap();
    program.insert(&xsk.socket).unwrap();
    let peer = PacketSocket::open(bed.b()).unwrap();
    let send = |len: usize| {
        peer.send(&UdpFrame::new(bed.b(), bed.a()).len(len).build().unwrap()).unwrap();
    };

    // FILL is empty.
    send(60);
    until("a packet without a frame", || xsk.socket.statistics().unwrap().rx_dropped == 1);
    assert_eq!(xsk.socket.statistics().unwrap().rx_fill_ring_empty, Some(1));

    // Longer than a frame: 2048 - 256 - 1000 bytes are left.
    assert_eq!(umem.max_packet(), 792);
    xsk.fill.refill(&mut pool, 32);
    send(793);
    until("a packet too long", || xsk.socket.statistics().unwrap().rx_dropped == 2);
    send(792);
    until("one that fits", || xsk.rx.available() == 1);
    for packet in xsk.rx.take(1) {
        assert_eq!(packet.len(), 792);
        // The headroom is in front of the packet, for a header to be added.
        let longer = umem.prepend(packet, 1000 + 256).unwrap();
        assert_eq!(longer.len(), 792 + 1256);
        pool.put(umem.prepend(longer, 1).unwrap_err());
    }

    // RX is full.
    for _ in 0..6 {
        send(60);
    }
    until("packets without room in RX", || xsk.socket.statistics().unwrap().rx_ring_full == Some(2));
    let statistics = xsk.socket.statistics().unwrap();
    assert_eq!((statistics.rx_dropped, statistics.tx_invalid), (2, 0));
    let census = umem.census();
    assert_eq!((census.contradiction(), census.program, census.rx), (None, 0, 4), "{census:?}");
}

#[test]
fn each_queue_has_its_socket_on_one_umem() {
    let Some(bed) = bed(|b| b.queues(2).single_namespace(true)) else { return };
    let device = Device::open(&bed.a().name).unwrap();
    assert_eq!(device.queues().unwrap(), 2);
    let (umem, mut pool) = Umem::builder().frames(1024).build().unwrap();
    let program = DefaultProgram::attach(&device, AttachMode::Native).unwrap();
    assert_eq!(program.map().slots(), 2);
    let mut sockets: Vec<_> = (0..2)
        .map(|queue| {
            let mut xsk = Socket::builder(&device).queue(queue).open(&umem).unwrap();
            xsk.fill.refill(&mut pool, 256);
            program.insert(&xsk.socket).unwrap();
            xsk
        })
        .collect();
    for queue in 0..2u32 {
        let frame = UdpFrame::new(bed.b(), bed.a()).number(0).build().unwrap();
        let mut generator = xsk_testbed::Generator::new(bed.b(), frame).unwrap().to_queue(queue).unwrap();
        generator.run(50).unwrap();
        let xsk = &mut sockets[queue as usize];
        let mut seen = 0;
        until("fifty packets", || {
            xsk.fill.extend(xsk.rx.take(64), |packet| {
                assert_eq!(number(&packet), Some(seen));
                seen += 1;
                packet.into_frame()
            });
            seen == 50
        });
        assert_eq!(sockets[1 - queue as usize].rx.available(), 0);
    }
    let census = umem.census();
    assert_eq!((census.contradiction(), census.program), (None, 0), "{census:?}");
}

#[test]
fn a_socket_in_a_foreign_slot_gets_its_own_queue_only() {
    // The map's index need not be the queue; the kernel delivers only what arrived on the queue.
    let Some(bed) = bed(|b| b.queues(2)) else { return };
    let device = Device::open(&bed.a().name).unwrap();
    let (umem, mut pool) = Umem::builder().frames(64).build().unwrap();
    let mut xsk = Socket::builder(&device).queue(1).open_rx(&umem).unwrap();
    xsk.fill.refill(&mut pool, 32);
    let map = XskMap::new(&device).unwrap();
    map.insert(0, &xsk.socket).unwrap();
    let _attached = Program::redirect(&map).unwrap().attach(&device, AttachMode::Generic).unwrap();
    let peer = PacketSocket::open(bed.b()).unwrap();
    // In generic mode everything arrives on queue 0, whose slot has the socket of queue 1.
    for _ in 0..10 {
        peer.send(&UdpFrame::new(bed.b(), bed.a()).build().unwrap()).unwrap();
    }
    // What is passed to the stack shows that all ten were looked at.
    map.remove(0).unwrap();
    let ours = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 5555)).unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    peer.send(&UdpFrame::new(bed.b(), bed.a()).ports(1, 5555).build().unwrap()).unwrap();
    ours.recv(&mut [0; 100]).unwrap();
    assert_eq!(xsk.rx.available(), 0);
    let statistics = xsk.socket.statistics().unwrap();
    assert_eq!((statistics.rx_dropped, statistics.rx_ring_full), (0, Some(0)), "nothing tells of the drops");
}

#[test]
fn the_mode_is_what_it_became_and_frags_are_taken_where_the_kernel_can() {
    let Some(bed) = bed(|b| b) else { return };
    let device = Device::open(&bed.a().name).unwrap();
    let (umem, _pool) = Umem::builder().frames(16).build().unwrap();
    let xsk = Socket::builder(&device).open(&umem).unwrap();
    // veth has no zero copy, so any mode becomes copy.
    assert!(!xsk.socket.is_zero_copy());
    assert_eq!(xsk.socket.mode(), Mode::Copy);
    let info = device.info().unwrap();
    assert_eq!((info.driver(), info.zero_copy()), (Some("veth"), Some(false)));
    assert_eq!((info.mtu(), info.mac(), info.is_up()), (1500, Some(bed.a().mac), true));
    let program = DefaultProgram::attach(&device, AttachMode::Best).unwrap();
    assert_eq!(program.mode(), AttachMode::Native);
    assert!(program.attachment().program().has_frags());
    let attached = device.info().unwrap().programs().to_vec();
    assert_eq!(attached.len(), 1);
    assert_eq!(attached[0].name.as_deref(), Some("xsk_redirect"));
    assert_eq!(attached[0].mode, Some(AttachMode::Native));
    drop(program);
    until("the program is gone", || device.info().unwrap().programs().is_empty());
}

#[test]
fn waiting_ends_with_a_packet_or_with_its_timeout() {
    let Some(bed) = bed(|b| b) else { return };
    let device = Device::open(&bed.a().name).unwrap();
    let (umem, mut pool) = Umem::builder().frames(16).build().unwrap();
    let mut xsk = Socket::builder(&device).open(&umem).unwrap();
    xsk.fill.refill(&mut pool, 8);
    let program = DefaultProgram::attach(&device, AttachMode::Best).unwrap();
    program.insert(&xsk.socket).unwrap();
    let start = Instant::now();
    assert_eq!(xsk.socket.wait(Interest::Rx, Some(Duration::from_millis(30))).unwrap(), Ready::default());
    assert!(start.elapsed() >= Duration::from_millis(30));
    // An empty TX ring has room at once.
    assert_eq!(xsk.socket.wait(Interest::Tx, None).unwrap(), Ready { rx: false, tx: true });
    let socket = xsk.socket.clone();
    let waiter = std::thread::spawn(move || socket.wait(Interest::Rx, None).unwrap());
    PacketSocket::open(bed.b()).unwrap().send(&UdpFrame::new(bed.b(), bed.a()).build().unwrap()).unwrap();
    assert_eq!(waiter.join().unwrap(), Ready { rx: true, tx: false });
    // The descriptor works with any poll of the caller's own.
    let mut fds = [rustix::event::PollFd::from_borrowed_fd(xsk.socket.as_fd(), rustix::event::PollFlags::IN)];
    assert_eq!(rustix::event::poll(&mut fds, None).unwrap(), 1);
}

#[test]
fn a_sender_with_a_filled_ring_gets_its_frames_back_when_binding_fails() {
    let Some(bed) = bed(|b| b) else { return };
    let device = Device::open(&bed.a().name).unwrap();
    let (umem, mut pool) = Umem::builder().frames(64).build().unwrap();
    Socket::builder(&device).queue(7).fill_from(&mut pool, 32).open_tx(&umem).unwrap_err();
    assert_eq!(pool.len(), 64);
    assert_eq!(umem.census().retired, 0);
    let xsk = Socket::builder(&device).fill_from(&mut pool, 32).open_tx(&umem).unwrap();
    assert_eq!((pool.len(), umem.census().fill), (32, 32));
    drop(xsk);
    assert_eq!((umem.census().fill, umem.census().retired), (0, 32));
    assert_eq!(umem.census().contradiction(), None);
}
