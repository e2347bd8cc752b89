//! Packets between two sockets: contents, addresses, counters, and what becomes of the rest.

mod common;

use std::os::fd::AsFd;
use std::time::Duration;

use common::*;
use rustix::event::{PollFd, PollFlags, poll};
use xsk::abi::{
    BindFlags, Descriptor, SOL_XDP, XDP_MAX_TX_SKB_BUDGET, XDP_PKT_CONTD, XDP_STATISTICS, XDP_TX_METADATA,
    XdpStatistics,
};
use xsk::kernel::{Errno, Kernel, POLLIN, POLLOUT};
use xsk_sim::Sim;

#[test]
fn packets_arrive_in_order_at_their_place_in_the_chunk() {
    for headroom in [0, 64] {
        let sim = Sim::new();
        let kernel = sim.kernel();
        let mut a = Port::open(&*kernel, "sim0", Config::default());
        let mut b = Port::open(&*kernel, "sim1", Config { headroom, ..Config::default() });
        let _steered = steer(&*kernel, "sim1", &*b.socket);
        // An address within a chunk stands for the chunk.
        b.refill([0x1064, 0x3000, 0x2fff]);
        let packets: Vec<_> = (0..3).map(|i| packet(i, 60 + usize::from(i) * 700)).collect();
        for (i, packet) in packets.iter().enumerate() {
            a.queue_packet(i as u64 * 4096 + 17, packet);
        }
        assert_eq!(a.socket.send(), Ok(()));
        assert_eq!(a.completed(), [17, 4096 + 17, 8192 + 17], "as they were submitted");
        assert!(b.received().is_empty(), "they are on the wire");
        assert_eq!(sim.run(), 3);

        let received = b.received();
        let places: Vec<_> = received.iter().map(|(desc, _)| (desc.addr, desc.options)).collect();
        let start = 256 + u64::from(headroom);
        assert_eq!(places, [0x1000, 0x3000, 0x2000].map(|chunk| (chunk + start, 0)));
        assert!(received.iter().map(|(_, bytes)| bytes).eq(&packets));
        assert_eq!(b.fill.memory().filled(), Some(0));
        assert_eq!(b.statistics(), XdpStatistics::default());
        assert_eq!(a.statistics(), XdpStatistics { tx_ring_empty_descs: 1, ..XdpStatistics::default() });
    }
}

#[test]
fn both_directions_work_over_the_wrap_of_every_ring() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let config = Config { fill: 2, completion: 2, rx: 2, tx: 2, ..Config::default() };
    let mut ports = [Port::open(&*kernel, "sim0", config), Port::open(&*kernel, "sim1", config)];
    let _steered = [steer(&*kernel, "sim0", &*ports[0].socket), steer(&*kernel, "sim1", &*ports[1].socket)];
    for round in 0..20u8 {
        let [from, to] = [usize::from(round % 2), usize::from((round + 1) % 2)];
        ports[to].refill([4096]);
        ports[from].queue_packet(0, &packet(round, 100));
        assert_eq!(ports[from].socket.send(), Ok(()));
        assert_eq!(ports[to].socket.poll(POLLIN, None), Ok(POLLIN));
        let [(desc, bytes)] = &ports[to].received()[..] else { panic!("one packet") };
        assert_eq!((desc.addr, bytes), (4096 + 256, &packet(round, 100)));
        assert_eq!(ports[from].completed(), [0]);
    }
}

#[test]
fn without_fill_packets_are_dropped_and_counted_twice() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let mut port = Port::open(&*kernel, "sim0", Config::default());
    let _steered = steer(&*kernel, "sim0", &*port.socket);
    port.refill([0]);
    for seed in 0..3 {
        sim.inject("sim0", &packet(seed, 60)).unwrap();
    }
    sim.run();
    assert_eq!(port.received().len(), 1);
    let wanted = XdpStatistics { rx_dropped: 2, rx_fill_ring_empty_descs: 2, ..XdpStatistics::default() };
    assert_eq!(port.statistics(), wanted);
}

#[test]
fn a_full_rx_parks_one_chunk_and_counts_the_rest() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let mut port = Port::open(&*kernel, "sim0", Config { rx: 2, ..Config::default() });
    let _steered = steer(&*kernel, "sim0", &*port.socket);
    port.refill([0, 4096, 8192, 12288]);
    let inject = |seed| sim.inject("sim0", &packet(seed, 60)).unwrap();
    (0..5).for_each(inject);
    sim.run();
    assert_eq!(port.fill.memory().filled(), Some(1), "FILL is one ahead");
    let wanted = XdpStatistics { rx_ring_full: 3, ..XdpStatistics::default() };
    assert_eq!(port.statistics(), wanted);
    let mut old = [0; 24];
    assert_eq!(port.socket.getsockopt(SOL_XDP, XDP_STATISTICS, &mut old), Ok(24));
    assert_eq!(old[..8], 3u64.to_ne_bytes(), "the older form has them as dropped");

    assert_eq!(port.received().len(), 2);
    inject(9);
    sim.run();
    let [(desc, bytes)] = &port.received()[..] else { panic!("one packet") };
    assert_eq!((desc.addr, bytes), (8192 + 256, &packet(9, 60)), "in the parked chunk");
    assert_eq!(port.fill.memory().filled(), Some(1));
}

#[test]
fn a_packet_longer_than_the_frame_is_dropped_and_takes_no_chunk() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let config = Config { chunk: 2048, headroom: 1344, ..Config::default() };
    let mut port = Port::open(&*kernel, "sim0", config);
    let _steered = steer(&*kernel, "sim0", &*port.socket);
    port.refill([0]);
    sim.inject("sim0", &packet(1, 449)).unwrap();
    sim.inject("sim0", &packet(2, 448)).unwrap();
    sim.run();
    assert_eq!(port.statistics(), XdpStatistics { rx_dropped: 1, ..XdpStatistics::default() });
    let [(desc, bytes)] = &port.received()[..] else { panic!("one packet") };
    assert_eq!((desc.addr, bytes), (256 + 1344, &packet(2, 448)));
}

#[test]
fn bad_fill_entries_are_skipped_and_not_counted() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let mut port = Port::open(&*kernel, "sim0", Config::default());
    let _steered = steer(&*kernel, "sim0", &*port.socket);
    port.refill([16 * 4096, u64::MAX, 15 * 4096]);
    sim.inject("sim0", &packet(1, 60)).unwrap();
    sim.run();
    assert_eq!(port.received()[0].0.addr, 15 * 4096 + 256);
    assert_eq!(port.statistics(), XdpStatistics::default());
}

#[test]
fn a_full_completion_ring_keeps_what_is_in_tx() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let mut port = Port::open(&*kernel, "sim0", Config { completion: 2, ..Config::default() });
    port.queue(0, 60, 0);
    port.queue(4096, 60, 0);
    port.queue(8192, 0, 0);
    assert_eq!(port.socket.send(), Err(Errno::AGAIN));
    assert_eq!(port.tx.memory().filled(), Some(1));
    assert_eq!(port.statistics(), XdpStatistics::default(), "the invalid one is not looked at yet");
    assert_eq!(port.completed(), [0, 4096]);
    assert_eq!(port.socket.send(), Ok(()));
    assert_eq!(port.completed(), [8192]);
    assert_eq!(port.statistics(), XdpStatistics { tx_invalid_descs: 1, ..XdpStatistics::default() });
}

#[test]
fn an_invalid_descriptor_ends_the_batch_without_an_error() {
    let end = 16 * 4096;
    let rows = [
        ("empty", 0, 0, 0),
        ("crosses its chunk", 2048, 2049, 0),
        ("longer than a chunk", 0, 4097, 0),
        ("length that wraps", 4095, u32::MAX, 0),
        ("behind the UMEM", end, 60, 0),
        ("garbage", u64::MAX, 60, 0),
        ("unknown option", 0, 60, 4),
        ("multi-buffer, which is not simulated", 0, 60, XDP_PKT_CONTD),
    ];
    for (what, addr, len, options) in rows {
        let sim = Sim::new();
        let kernel = sim.kernel();
        let mut port = Port::open(&*kernel, "sim0", Config::default());
        port.queue(0, 60, 0);
        port.queue(addr, len, options);
        port.queue(2048, 60, 0);
        assert_eq!(port.socket.send(), Ok(()), "{what}");
        assert_eq!(port.completed(), [0, addr], "{what}");
        let after = XdpStatistics { tx_invalid_descs: 1, ..XdpStatistics::default() };
        assert_eq!(port.statistics(), after, "{what}");
        assert_eq!(port.socket.send(), Ok(()), "{what}");
        assert_eq!(port.completed(), [2048], "{what}");
        assert_eq!(port.statistics(), XdpStatistics { tx_ring_empty_descs: 1, ..after }, "{what}");
        sim.run();
        assert_eq!(sim.stack("sim1").unwrap().len(), 2, "{what}");
    }
}

#[test]
fn descriptors_at_the_edge_are_valid() {
    let sim = Sim::builder().mtu(3502).build().unwrap();
    let kernel = sim.kernel();
    let mut port = Port::open(&*kernel, "sim0", Config { chunk: 2048, ..Config::default() });
    for (addr, len) in [(0, 2048), (2048 + 1988, 60), (15 * 2048, 2048)] {
        port.queue(addr, len, 0);
    }
    assert_eq!(port.socket.send(), Ok(()));
    sim.run();
    let lengths: Vec<_> = sim.stack("sim1").unwrap().iter().map(Vec::len).collect();
    assert_eq!(lengths, [2048, 60, 2048]);
}

#[test]
fn metadata_that_the_umem_lacks_blocks_tx() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let mut port = Port::open(&*kernel, "sim0", Config::default());
    port.queue(0, 60, XDP_TX_METADATA);
    port.queue(4096, 60, 0);
    assert_eq!([port.socket.send(), port.socket.send()], [Err(Errno::INVAL); 2]);
    assert_eq!(port.tx.memory().filled(), Some(2));
    assert_eq!(port.completed(), []);
}

#[test]
fn one_send_transmits_as_many_as_the_budget() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let config = Config { tx: 128, completion: 128, ..Config::default() };
    let mut port = Port::open(&*kernel, "sim0", config);
    let fill_up = |port: &mut Port, n| (0..n).for_each(|_| port.queue(0, 60, 0));
    fill_up(&mut port, 33);
    assert_eq!(port.socket.send(), Err(Errno::AGAIN));
    assert_eq!(port.completed().len(), 32);
    assert_eq!(port.statistics().tx_ring_empty_descs, 0, "it was not drained");
    assert_eq!(port.socket.send(), Ok(()));
    assert_eq!(port.statistics().tx_ring_empty_descs, 1);

    // An invalid descriptor is found before the budget is.
    fill_up(&mut port, 32);
    port.queue(0, 0, 0);
    assert_eq!(port.socket.send(), Ok(()));
    assert_eq!(port.statistics().tx_invalid_descs, 1);

    set(&*port.socket, XDP_MAX_TX_SKB_BUDGET, 64).unwrap();
    port.completed();
    fill_up(&mut port, 65);
    assert_eq!(port.socket.send(), Err(Errno::AGAIN));
    assert_eq!(port.completed().len(), 64);
}

#[test]
fn what_the_device_drops_is_completed_and_told() {
    for (len, wanted) in [(13, Err(Errno::BUSY)), (14, Ok(())), (1518, Ok(())), (1519, Err(Errno::BUSY))] {
        let sim = Sim::new();
        let kernel = sim.kernel();
        let capture = sim.capture("sim0").unwrap();
        let mut port = Port::open(&*kernel, "sim0", Config::default());
        port.queue(0, len, 0);
        port.queue(4096, 60, 0);
        assert_eq!(port.socket.send(), wanted, "{len} bytes");
        let done = if wanted.is_ok() { 2 } else { 1 };
        assert_eq!(port.completed().len(), done, "{len} bytes");
        assert_eq!(capture.take().len(), if wanted.is_ok() { 2 } else { 0 }, "{len} bytes");
    }
}

#[test]
fn a_device_that_is_down_neither_sends_nor_receives() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let mut a = Port::open(&*kernel, "sim0", Config::default());
    let mut b = Port::open(&*kernel, "sim1", Config::default());
    let _steered = steer(&*kernel, "sim1", &*b.socket);
    b.refill([0]);
    a.queue(0, 60, 0);
    sim.set_up("sim0", false).unwrap();
    assert_eq!(a.socket.send(), Err(Errno::NETDOWN));
    assert_eq!(a.socket.poll(POLLOUT, Some(Duration::ZERO)), Ok(0));
    assert_eq!(a.tx.memory().filled(), Some(1), "kept");

    sim.set_up("sim0", true).unwrap();
    sim.set_up("sim1", false).unwrap();
    assert_eq!(a.socket.send(), Err(Errno::BUSY), "no carrier");
    assert_eq!(a.completed(), [0]);

    sim.set_up("sim1", true).unwrap();
    a.queue(0, 60, 0);
    assert_eq!(a.socket.send(), Ok(()));
    sim.set_up("sim1", false).unwrap();
    sim.run();
    sim.set_up("sim1", true).unwrap();
    sim.run();
    assert!(b.received().is_empty(), "it arrived at a device that was down");
    assert_eq!(b.statistics(), XdpStatistics::default());
}

#[test]
fn a_socket_of_another_device_gets_nothing_and_counts_nothing() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let mut other = Port::open(&*kernel, "sim1", Config::default());
    other.refill([0]);
    let unbound = Port::unbound(&*kernel, Config::default());
    for socket in [&other.socket, &unbound.socket] {
        let _steered = steer(&*kernel, "sim0", &**socket);
        sim.inject("sim0", &packet(1, 60)).unwrap();
        sim.run();
        assert_eq!(sim.stack("sim0").unwrap(), [[0u8; 0]; 0], "a fallback does not help");
        assert_eq!(statistics(&**socket), XdpStatistics::default());
    }
    assert!(other.received().is_empty());
}

#[test]
fn a_socket_without_rx_in_the_map_gets_nothing() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let memory = pages(4096);
    let socket = socket(&*kernel);
    socket.register_umem(&registration(&memory), 32, &memory).unwrap();
    for kind in [xsk::abi::XDP_TX_RING, xsk::abi::XDP_UMEM_FILL_RING, xsk::abi::XDP_UMEM_COMPLETION_RING] {
        set(&*socket, kind, 16).unwrap();
    }
    socket.bind(&address(1, 0, BindFlags::empty())).unwrap();
    let _steered = steer(&*kernel, "sim0", &*socket);
    sim.inject("sim0", &packet(1, 60)).unwrap();
    sim.run();
    assert_eq!(statistics(&*socket), XdpStatistics::default());
    assert!(sim.stack("sim0").unwrap().is_empty());
}

#[test]
fn poll_transmits_and_waits_for_what_it_is_asked() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let config = Config { tx: 64, completion: 64, ..Config::default() };
    let mut a = Port::open(&*kernel, "sim0", config);
    let mut b = Port::open(&*kernel, "sim1", Config::default());
    let _steered = steer(&*kernel, "sim1", &*b.socket);
    b.refill([0]);
    a.queue_packet(0, &packet(7, 60));
    // The receiver's wait does not send for the sender.
    assert_eq!(b.socket.poll(POLLIN, None), Err(Errno::DEADLK));
    assert_eq!(a.socket.poll(POLLIN, Some(Duration::ZERO)), Ok(0));
    assert_eq!(a.completed(), [0], "poll has sent it");
    assert_eq!(b.socket.poll(POLLIN | POLLOUT, None), Ok(POLLIN | POLLOUT));
    assert_eq!(b.received()[0].1, packet(7, 60));

    // More than one budget is sent by a wait for room that has to go on.
    for _ in 0..64 {
        a.queue(0, 60, 0);
    }
    assert_eq!(a.socket.poll(POLLOUT, None), Ok(POLLOUT));
    assert_eq!(a.tx.memory().filled(), Some(32), "at most half full is writable");
    for _ in 0..32 {
        a.queue(0, 60, 0);
    }
    assert_eq!(a.socket.poll(POLLOUT, None), Ok(POLLOUT));
    // Now COMPLETION is full, and nothing will ever empty TX.
    for _ in 0..32 {
        a.queue(0, 60, 0);
    }
    assert_eq!(a.socket.poll(POLLOUT, None), Err(Errno::DEADLK));
    assert_eq!(a.completed().len(), 64);
    assert_eq!(a.socket.poll(POLLOUT, None), Ok(POLLOUT));
}

#[test]
fn each_kick_that_drains_tx_is_counted_once() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let port = Port::open(&*kernel, "sim0", Config::default());
    let drained = || port.statistics().tx_ring_empty_descs;
    assert_eq!(port.socket.send(), Ok(()));
    assert_eq!(drained(), 1, "also when there was nothing");
    sim.inject("sim1", &packet(0, 60)).unwrap();
    sim.inject("sim1", &packet(1, 60)).unwrap();
    assert_eq!(port.socket.poll(POLLIN, Some(Duration::ZERO)), Ok(0));
    assert_eq!(drained(), 2, "a wait kicks once");
}

/// Whether the socket's descriptor is readable, by a real `poll(2)`.
fn readable(port: &Port) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(port.socket.as_fd(), PollFlags::IN)];
    poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
}

#[test]
#[cfg_attr(miri, ignore = "needs poll(2)")]
fn the_descriptor_is_readable_while_rx_has_packets() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let mut port = Port::open(&*kernel, "sim0", Config::default());
    let _steered = steer(&*kernel, "sim0", &*port.socket);
    port.refill([0, 4096]);
    assert!(!readable(&port));
    sim.inject("sim0", &packet(0, 60)).unwrap();
    assert!(!readable(&port));
    sim.run();
    assert!(readable(&port));
    assert_eq!(port.socket.receive(), Ok(()));
    assert!(readable(&port), "nothing was taken");
    assert_eq!(port.received().len(), 1);
    assert_eq!(port.socket.receive(), Ok(()));
    assert!(!readable(&port));
    sim.inject("sim0", &packet(0, 60)).unwrap();
    assert!(sim.step());
    assert!(readable(&port));
    port.received();
    assert!(!sim.step(), "a step notices as well");
    assert!(!readable(&port));
}

#[test]
fn what_leaves_a_device_can_be_captured() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let mut port = Port::open(&*kernel, "sim0", Config::default());
    port.queue_packet(0, &packet(1, 60));
    port.socket.send().unwrap();
    let (here, there) = (sim.capture("sim0").unwrap(), sim.capture("sim1").unwrap());
    port.queue_packet(0, &packet(2, 60));
    port.socket.send().unwrap();
    assert_eq!(here.take(), [packet(2, 60)], "since the capture began");
    assert!(here.take().is_empty());
    assert!(there.take().is_empty());
    assert_eq!(sim.capture("eth0").err(), Some(Errno::NODEV));
}

#[test]
fn only_packets_that_fit_the_wire_can_be_injected() {
    let sim = Sim::new();
    for (len, wanted) in
        [(13, Err(Errno::MSGSIZE)), (14, Ok(())), (1518, Ok(())), (1519, Err(Errno::MSGSIZE))]
    {
        assert_eq!(sim.inject("sim0", &packet(0, len)), wanted, "{len} bytes");
    }
    assert_eq!(sim.inject("eth0", &packet(0, 60)), Err(Errno::NODEV));
    assert_eq!(sim.run(), 2);
}

#[test]
fn absurd_indices_show_the_kernel_nothing() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let mut port = Port::open(&*kernel, "sim0", Config::default());
    let _steered = steer(&*kernel, "sim0", &*port.socket);
    // SAFETY: the kernel's side refuses to read beyond the size of a ring.
    unsafe {
        port.tx.memory().set_producer(1000);
        port.fill.memory().set_producer(1000);
    }
    assert_eq!(port.socket.send(), Ok(()));
    assert_eq!(port.socket.poll(POLLOUT, Some(Duration::ZERO)), Ok(0), "TX looks full");
    sim.inject("sim0", &packet(0, 60)).unwrap();
    sim.run();
    assert!(port.received().is_empty());
    assert!(port.completed().is_empty());
}

#[test]
fn sockets_can_be_driven_from_several_threads() {
    const PACKETS: u32 = 50;
    let sim = Sim::new();
    let kernel = sim.kernel();
    let mut a = Port::open(&*kernel, "sim0", Config::default());
    let mut b = Port::open(&*kernel, "sim1", Config { fill: 64, rx: 64, ..Config::default() });
    let _steered = steer(&*kernel, "sim1", &*b.socket);
    b.refill((0..PACKETS).map(|i| u64::from(i % 16) * 4096));
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for seed in 0..PACKETS {
                a.queue_packet(0, &packet(seed as u8, 60));
                assert_eq!(a.socket.send(), Ok(()));
                assert_eq!(a.completed(), [0]);
            }
        });
        let mut seen = 0;
        while seen < PACKETS {
            // Each packet is looked at only by its descriptor: frames are used again here.
            if b.socket.poll(POLLIN, Some(Duration::ZERO)) == Ok(POLLIN) {
                let taken: Vec<Descriptor> = b.rx.take(u32::MAX).collect();
                assert!(taken.iter().all(|desc| desc.len == 60));
                seen += taken.len() as u32;
            } else {
                std::thread::yield_now();
            }
        }
    });
    assert_eq!(b.statistics().rx_dropped, 0);
}

#[test]
fn a_simulator_outlives_its_handle() {
    let kernel: std::sync::Arc<dyn Kernel> = {
        let sim = Sim::new();
        sim.kernel()
    };
    let mut port = Port::open(&*kernel, "sim0", Config::default());
    drop(kernel);
    port.queue(0, 60, 0);
    assert_eq!(port.socket.send(), Ok(()));
    assert_eq!(port.completed(), [0]);
}
