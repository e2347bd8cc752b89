//! What a port does when its interface changes under it, and what it counts: on the real kernel, in
//! copy mode.
#![cfg(target_os = "linux")]

use std::os::fd::{AsFd as _, AsRawFd as _};
use std::thread;
use std::time::{Duration, Instant};

use xsk::port::{Action, Counts, Event, Monitor, PortStatistics};
use xsk::xdp::AttachMode;
use xsk::{Cause, Device, Packet, Port, Socket, Umem, abi};
use xsk_testbed::{
    Channels, End, Generator, Load, PacketSocket, Testbed, UdpFrame, bed, number, source_ports,
};

const PATIENCE: Duration = Duration::from_secs(20);
const MOMENT: Duration = Duration::from_millis(10);
const MODES: [AttachMode; 2] = [AttachMode::Native, AttachMode::Generic];
const RING: u32 = 128;

/// Tries again until it answers.
#[track_caller]
fn until<R>(what: &str, mut tried: impl FnMut() -> Option<R>) -> R {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = tried() {
            return answer;
        }
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        thread::yield_now();
    }
}

fn device(end: &End) -> Device {
    Device::open(&end.name).unwrap()
}

fn umem(frames: u32) -> Umem {
    Umem::builder().frames(frames).chunk_size(2048).ledger(true).build().unwrap().0
}

fn open(end: &End, umem: &Umem, mode: AttachMode) -> Port {
    Port::builder(&device(end)).umem(umem).ring_size(RING).attach_mode(mode).open().unwrap()
}

#[track_caller]
fn assert_settled(umem: &Umem) {
    let census = umem.census();
    assert_eq!(census.contradiction(), None);
    assert_eq!((census.program, census.dropped, census.forgotten), (0, 0, 0), "{census:?}");
    assert_eq!(census.faults.total(), 0, "{census:?}");
}

/// What is sent to end `a`, numbered on.
struct Peer {
    socket: PacketSocket,
    frame: UdpFrame,
    next: u64,
}

impl Peer {
    fn new(bed: &Testbed) -> Self {
        let frame = UdpFrame::new(bed.b(), bed.a());
        Self { socket: PacketSocket::open(bed.b()).unwrap(), frame, next: 0 }
    }

    fn send(&mut self, count: u64) {
        for _ in 0..count {
            self.socket.send(&self.frame.clone().number(self.next).build().unwrap()).unwrap();
            self.next += 1;
        }
    }

    /// Sends so many, which the port must receive: these, and in this order.
    #[track_caller]
    fn exchange(&mut self, port: &mut Port, count: u64) {
        let mut expected = self.next;
        self.send(count);
        until("packets", || {
            port.wait(Some(MOMENT)).unwrap();
            let take = |packet: &mut Packet| {
                assert_eq!(number(packet), Some(expected));
                expected += 1;
            };
            port.receive(take).unwrap();
            (expected == self.next).then_some(())
        });
    }

    /// Takes so many that the port has sent.
    #[track_caller]
    fn take(&self, count: usize) {
        for n in 0..count {
            assert!(self.socket.recv(PATIENCE).unwrap().is_some(), "only {n} of {count}");
        }
    }
}

/// Gives the port packets to send.
fn give(port: &mut Port, bed: &Testbed, count: usize) {
    let frame = UdpFrame::new(bed.a(), bed.b()).build().unwrap();
    for _ in 0..count {
        port.send_bytes(&frame).unwrap();
    }
}

/// The next event of a port that waits for packets.
#[track_caller]
fn next_event(port: &mut Port) -> Event {
    until("an event", || {
        // That the interface is gone is an event too.
        let _ = port.wait(Some(MOMENT));
        port.event()
    })
}

fn both_up(bed: &Testbed) {
    for end in [bed.a(), bed.b()] {
        end.wait_up().unwrap();
    }
}

// --- the interface changes

#[test]
fn a_port_goes_on_after_its_interface_was_down() {
    for mode in MODES {
        let Some(bed) = bed(|b| b) else { return };
        let umem = umem(512);
        let mut port = open(bed.a(), &umem, mode);
        let mut peer = Peer::new(&bed);
        peer.exchange(&mut port, 20);
        assert_eq!(port.event(), None);
        bed.a().set_up(false).unwrap();
        assert_eq!(next_event(&mut port), Event::Down);
        // What is sent meanwhile waits in TX.
        give(&mut port, &bed, 10);
        assert_eq!(port.flush().unwrap(), 10);
        assert_eq!(port.receive(|_| ()).unwrap(), 0);
        assert!(!port.wait(Some(Duration::from_millis(1))).unwrap());
        assert_eq!(umem.census().tx, 10);

        bed.a().set_up(true).unwrap();
        both_up(&bed);
        assert_eq!(next_event(&mut port), Event::Up);
        assert_eq!(port.drain(PATIENCE).unwrap(), 0);
        peer.take(10);
        peer.exchange(&mut port, 20);
        let total = port.monitor().statistics().unwrap().total();
        assert_eq!((total.rx_packets, total.tx_completed, total.tx_dropped), (40, 10, 0));
        assert_settled(&umem);
    }
}

#[test]
fn a_port_tells_when_the_link_is_lost_and_back() {
    for mode in MODES {
        let Some(bed) = bed(|b| b) else { return };
        let umem = umem(512);
        let mut port = open(bed.a(), &umem, mode);
        let mut peer = Peer::new(&bed);
        peer.exchange(&mut port, 5);
        bed.b().set_up(false).unwrap();
        assert_eq!(next_event(&mut port), Event::LinkLost);
        // What is sent meanwhile is lost, and counted.
        give(&mut port, &bed, 3);
        assert_eq!(port.drain(PATIENCE).unwrap(), 0);
        let total = port.monitor().statistics().unwrap().total();
        assert_eq!((total.tx_packets, total.tx_completed, total.tx_dropped), (3, 3, 3));

        bed.b().set_up(true).unwrap();
        both_up(&bed);
        assert_eq!(next_event(&mut port), Event::LinkBack);
        // The old one was told that its interface was switched off.
        peer.socket = PacketSocket::open(bed.b()).unwrap();
        give(&mut port, &bed, 3);
        assert_eq!(port.drain(PATIENCE).unwrap(), 0);
        peer.take(3);
        peer.exchange(&mut port, 5);
        assert_eq!(port.event(), None);
        assert_eq!(port.monitor().statistics().unwrap().total().tx_dropped, 3);
        assert_settled(&umem);
    }
}

/// Changes the queues of both ends. A veth end with a native program wants no fewer of them for
/// receiving than the other end has for sending, so that the order matters.
fn set_queues(bed: &Testbed, queues: u32, fewer: bool) {
    let ends = if fewer { [bed.b(), bed.a()] } else { [bed.a(), bed.b()] };
    for end in ends {
        end.set_channels(Channels { rx: queues, tx: queues }).unwrap();
    }
}

#[test]
fn new_queues_are_taken_on_and_their_packets_received() {
    const QUEUES: u32 = 4;
    const EACH: u64 = 300;
    let Some(bed) = bed(|b| b.queues(QUEUES)) else { return };
    let sources = source_ports(bed.b(), bed.a()).unwrap();
    set_queues(&bed, 2, true);
    let umem = umem(QUEUES * RING * 2);
    let mut port = open(bed.a(), &umem, AttachMode::Native);
    assert_eq!(port.queues(), [0, 1]);
    set_queues(&bed, QUEUES, false);
    assert_eq!(next_event(&mut port), Event::Queues { was: 2, now: 4, taken: vec![2, 3] });
    assert_eq!(port.queues(), [0, 1, 2, 3]);
    // A veth end runs its program on new queues only once it was switched off and on.
    bed.a().set_up(false).unwrap();
    bed.a().set_up(true).unwrap();
    both_up(&bed);
    let mut peer = Peer::new(&bed);
    for (queue, &source) in (0..).zip(&sources) {
        peer.frame = peer.frame.clone().source_port(source);
        for _ in 0..EACH {
            peer.exchange(&mut port, 1);
        }
        assert_eq!(port.monitor().statistics().unwrap().queue(queue).unwrap().rx_packets, EACH);
    }
    assert_settled(&umem);
}

#[test]
fn a_queue_that_only_receives_sends_by_another() {
    const EACH: u64 = 300;
    let Some(bed) = bed(|b| b.queues(2)) else { return };
    let sources = source_ports(bed.b(), bed.a()).unwrap();
    bed.a().set_channels(Channels { rx: 2, tx: 1 }).unwrap();
    let umem = umem(512);
    let mut port = open(bed.a(), &umem, AttachMode::Native);
    assert_eq!(port.queues(), [0, 1]);
    let mut peer = Peer::new(&bed);
    for &source in &sources {
        peer.frame = peer.frame.clone().source_port(source);
        for _ in 0..EACH {
            peer.send(1);
            until("a packet", || {
                port.wait(Some(MOMENT)).unwrap();
                (port.process(|packet| packet).unwrap() == 1).then_some(())
            });
            peer.take(1);
        }
    }
    assert_eq!(port.drain(PATIENCE).unwrap(), 0);
    let statistics = port.monitor().statistics().unwrap();
    let [(_, first), (_, second)] = statistics.queues() else { panic!("{statistics:?}") };
    assert_eq!((first.rx_packets, first.tx_completed), (EACH, 2 * EACH));
    assert_eq!((second.rx_packets, second.tx_packets), (EACH, 0));
    let packet = port.packet(60).unwrap();
    let Err(refused) = port.send_on(1, packet) else { panic!("the kernel would never send it") };
    port.recycle(refused.into_inner());
    assert_settled(&umem);
    drop(port);

    // With no other queue the error says why.
    let mut port = Port::builder(&device(bed.a())).queue(1).ring_size(RING).open().unwrap();
    peer.send(1);
    let error = until("an error", || port.process(|packet| packet).err());
    assert_eq!(*error.cause(), Cause::NoTxQueue { queue: 1 });
}

#[test]
fn queues_that_are_not_the_ports_come_and_go() {
    for mode in MODES {
        let Some(bed) = bed(|b| b.queues(4)) else { return };
        let umem = umem(512);
        let builder = Port::builder(&device(bed.a())).queues([0, 1]).umem(&umem);
        let mut port = builder.ring_size(RING).attach_mode(mode).open().unwrap();
        let mut peer = Peer::new(&bed);
        for (was, now) in [(4, 3), (3, 2), (2, 4)] {
            set_queues(&bed, now, now < was);
            assert_eq!(next_event(&mut port), Event::Queues { was, now, taken: vec![] });
            if now == 2 {
                peer.exchange(&mut port, 10);
            }
        }
        assert_eq!(port.queues(), [0, 1]);
        assert_settled(&umem);
    }
}

#[test]
fn a_part_of_a_port_tells_of_new_queues_and_leaves_them() {
    let Some(bed) = bed(|b| b.queues(4)) else { return };
    set_queues(&bed, 2, true);
    let umem = umem(4 * RING);
    let mut parts = open(bed.a(), &umem, AttachMode::Native).split(2).unwrap();
    set_queues(&bed, 4, false);
    for (part, queue) in parts.iter_mut().zip([0, 1]) {
        assert_eq!(next_event(part), Event::Queues { was: 2, now: 4, taken: vec![] });
        assert_eq!(part.queues(), [queue]);
    }
}

#[test]
fn removal_in_mid_traffic_brings_all_frames_home_and_the_umem_serves_another_device() {
    for mode in MODES {
        for waits in [true, false] {
            let Some(bed) = bed(|b| b.queues(2).gro(mode == AttachMode::Generic)) else { return };
            let beside = Testbed::builder().queues(2).beside(&bed).unwrap();
            let umem = umem(2 * 2 * RING);
            let port = open(bed.a(), &umem, mode);
            let monitor = port.monitor();
            let frame = UdpFrame::new(bed.b(), bed.a()).number(0).build().unwrap();
            let running = Generator::new(bed.b(), frame).unwrap().start(Load::endless()).unwrap();
            let work = |mut worker: Port| {
                let deadline = Instant::now() + PATIENCE;
                let error = loop {
                    assert!(Instant::now() < deadline, "nobody noticed");
                    let turn = worker.process(|packet| packet);
                    let waited =
                        if waits && matches!(turn, Ok(0)) { worker.wait(None).map(drop) } else { Ok(()) };
                    if let Some(error) = turn.err().or(waited.err()) {
                        break error;
                    }
                };
                assert_eq!(*error.cause(), Cause::InterfaceGone, "{error}");
                assert_eq!(std::iter::from_fn(|| worker.event()).last(), Some(Event::Removed));
                // And so says every call.
                let errors =
                    [worker.receive(|_| ()).err(), worker.flush().err(), worker.wait(None).map(|_| 0).err()];
                for error in errors {
                    assert_eq!(*error.unwrap().cause(), Cause::InterfaceGone);
                }
                worker
            };
            let work = &work;
            thread::scope(|scope| {
                let threads: Vec<_> =
                    port.split(2).unwrap().into_iter().map(|part| scope.spawn(move || work(part))).collect();
                until("traffic", || {
                    (monitor.statistics().unwrap().total().tx_completed > 1000).then_some(())
                });
                bed.a().delete().unwrap();
                for thread in threads {
                    thread.join().unwrap();
                }
            });
            drop(running);
            assert!(monitor.statistics().unwrap().total().rx_packets > 1000, "also when the port is gone");
            assert_settled(&umem);
            let census = umem.census();
            // All but what was in TX, at most: a kernel may have sent it and not said so.
            assert_eq!(census.depot + census.retired, census.total, "{mode:?} {waits}: {census:?}");
            assert!(census.retired <= 2 * RING, "{mode:?} {waits}: {census:?}");

            let mut port = open(beside.a(), &umem, mode);
            let socket = PacketSocket::open(beside.b()).unwrap();
            let frame = UdpFrame::new(beside.b(), beside.a()).number(0).build().unwrap();
            for _ in 0..3 * RING {
                socket.send(&frame).unwrap();
                until("a packet of the other device", || {
                    port.wait(Some(MOMENT)).unwrap();
                    (port.process(|packet| packet).unwrap() == 1).then_some(())
                });
            }
            assert_eq!(port.drain(PATIENCE).unwrap(), 0);
            for _ in 0..3 * RING {
                assert_eq!(socket.recv(PATIENCE).unwrap().as_deref(), Some(&frame[..]));
            }
            assert_settled(&umem);
        }
    }
}

#[test]
fn a_port_that_never_waits_notices_removal_without_traffic() {
    for mode in MODES {
        let Some(bed) = bed(|b| b) else { return };
        let umem = umem(512);
        let mut port = open(bed.a(), &umem, mode);
        Peer::new(&bed).exchange(&mut port, 5);
        give(&mut port, &bed, 5);
        bed.a().delete().unwrap();
        let error = until("an error", || port.receive(|_| ()).err());
        assert_eq!(*error.cause(), Cause::InterfaceGone);
        assert_eq!(port.event(), Some(Event::Removed));
        drop(port);
        let census = umem.census();
        assert_eq!(
            (census.contradiction(), census.depot + census.retired),
            (None, census.total),
            "{census:?}"
        );
        assert!(census.retired <= 5, "what was in TX stays with the kernel: {census:?}");
    }
}

#[test]
fn what_arrived_before_removal_is_still_taken() {
    for mode in MODES {
        let Some(bed) = bed(|b| b) else { return };
        let umem = umem(512);
        let mut port = open(bed.a(), &umem, mode);
        Peer::new(&bed).send(20);
        until("packets in RX", || (umem.census().rx == 20).then_some(()));
        bed.a().delete().unwrap();
        assert_eq!(next_event(&mut port), Event::Removed);
        let mut kept = Vec::new();
        let n = port.process(|packet| {
            kept.push(packet);
            Action::Keep
        });
        assert_eq!(n.unwrap(), 20);
        assert!(kept.iter().map(|packet| number(packet).unwrap()).eq(0..20));
        assert_eq!(*port.receive(|_| ()).unwrap_err().cause(), Cause::InterfaceGone);
        kept.into_iter().for_each(|packet| port.recycle(packet));
        drop(port);
        let census = umem.census();
        assert_eq!((census.contradiction(), census.depot), (None, census.total), "{census:?}");
    }
}

// --- what is counted

/// What was counted since last asked.
struct Deltas {
    monitor: Monitor,
    before: PortStatistics,
}

impl Deltas {
    fn of(port: &Port) -> Self {
        let monitor = port.monitor();
        let before = monitor.statistics().unwrap();
        Self { monitor, before }
    }

    /// Read from another thread.
    fn next(&mut self) -> Counts {
        let monitor = &self.monitor;
        let now = thread::scope(|scope| scope.spawn(|| monitor.statistics().unwrap()).join().unwrap());
        let delta = now.since(&self.before);
        self.before = now;
        delta.total()
    }

    /// Waits until so many packets were lost; with all that was counted meanwhile.
    #[track_caller]
    fn lost(&mut self, expected: u64) -> Counts {
        let mut all = Counts::default();
        until("losses", || {
            all += self.next();
            (all.rx_lost() >= expected).then_some(())
        });
        assert_eq!(all.rx_lost(), expected, "{all:?}");
        all
    }
}

#[test]
fn a_program_that_is_too_slow_or_keeps_too_much_is_told_how_many_packets_it_lost() {
    for mode in MODES {
        let Some(bed) = bed(|b| b) else { return };
        let umem = umem(RING);
        let mut port = open(bed.a(), &umem, mode);
        let mut deltas = Deltas::of(&port);
        let mut peer = Peer::new(&bed);
        // Too slow: all frames of FILL are in RX.
        peer.send(u64::from(RING) + 50);
        let counts = deltas.lost(50);
        assert_eq!((counts.rx_fill_empty, counts.rx_ring_full, counts.rx_too_long), (Some(50), Some(0), 0));
        let mut kept = Vec::new();
        let mut keep = |packet| {
            kept.push(packet);
            Action::Keep
        };
        while port.process(&mut keep).unwrap() != 0 {}
        let counts = deltas.next();
        assert_eq!((counts.rx_packets, counts.rx_bytes), (RING.into(), u64::from(RING) * 60));
        assert_eq!(counts.rx_lost(), 0, "told once");
        // Kept too much: nothing is left to fill FILL with.
        peer.send(30);
        assert_eq!(deltas.lost(30).rx_fill_empty, Some(30));
        assert_eq!(port.process(&mut keep).unwrap(), 0);
        assert!(kept.iter().map(|packet| number(packet).unwrap()).eq(0..RING.into()));
        kept.into_iter().for_each(|packet| port.recycle(packet));
        assert!(!port.wait(Some(Duration::ZERO)).unwrap());
        peer.exchange(&mut port, 10);
        let counts = deltas.next();
        assert_eq!((counts.rx_packets, counts.rx_lost()), (10, 0));
        assert_settled(&umem);
    }
}

#[test]
fn packets_that_are_too_long_for_a_frame_are_counted() {
    for mode in MODES {
        let Some(bed) = bed(|b| b) else { return };
        let umem = umem(512);
        let mut port = open(bed.a(), &umem, mode);
        let mut deltas = Deltas::of(&port);
        let mut peer = Peer::new(&bed);
        for end in [bed.a(), bed.b()] {
            end.set_mtu(3000).unwrap();
        }
        let most = umem.max_packet() as usize;
        peer.frame = peer.frame.clone().len(most);
        peer.exchange(&mut port, 3);
        assert_eq!(deltas.next().rx_bytes, 3 * most as u64);
        for len in [most + 1, 2500] {
            peer.frame = peer.frame.clone().len(len);
            peer.send(3);
            let counts = deltas.lost(3);
            assert_eq!((counts.rx_too_long, counts.rx_fill_empty), (3, Some(0)), "{len} bytes");
        }
        assert_settled(&umem);
    }
}

#[test]
fn packets_that_the_driver_drops_are_counted() {
    let Some(bed) = bed(|b| b) else { return };
    let umem = umem(512);
    let mut port = open(bed.a(), &umem, AttachMode::Native);
    let mut deltas = Deltas::of(&port);
    let good = UdpFrame::new(bed.a(), bed.b()).build().unwrap();
    let long = UdpFrame::new(bed.a(), bed.b()).len(1519).build().unwrap();
    for frame in [&good, &long, &good, &long] {
        port.send_bytes(frame).unwrap();
    }
    assert_eq!(port.drain(PATIENCE).unwrap(), 0);
    let counts = deltas.next();
    assert_eq!((counts.tx_packets, counts.tx_completed, counts.tx_dropped), (4, 4, 2));
    assert_eq!(counts.tx_bytes, 2 * (60 + 1519));
    assert_eq!(deltas.next().tx_dropped, 0, "told once");
    assert_settled(&umem);
}

#[test]
fn packets_that_the_kernel_finds_invalid_are_counted_and_the_others_sent() {
    let Some(bed) = bed(|b| b) else { return };
    let umem = umem(512);
    let mut port = open(bed.a(), &umem, AttachMode::Native);
    let mut deltas = Deltas::of(&port);
    let monitor = port.monitor();
    let peer = PacketSocket::open(bed.b()).unwrap();
    give(&mut port, &bed, 5);
    // A port sends nothing invalid, so what it gave to TX is spoilt behind its back.
    let socket = port.sockets().next().unwrap();
    for place in [1, 3] {
        spoil_descriptor(socket, place);
    }
    assert_eq!(port.drain(PATIENCE).unwrap(), 0);
    for _ in 0..3 {
        assert!(peer.recv(PATIENCE).unwrap().is_some());
    }
    let counts = deltas.next();
    assert_eq!((counts.tx_packets, counts.tx_completed, counts.tx_invalid), (5, 5, 2));
    assert_eq!((counts.tx_dropped, counts.rx_packets), (0, 0));
    assert_settled(&umem);
    // What the kernel counted at last is known when the socket is closed.
    let last = monitor.statistics().unwrap();
    drop(port);
    assert_eq!(monitor.statistics().unwrap(), last);
}

/// Makes the descriptor at this place in TX one of an empty packet, which the kernel refuses.
fn spoil_descriptor(socket: &Socket, place: usize) {
    /// In the kernel's `struct xdp_mmap_offsets`, in words: where TX's descriptors begin.
    const TX_DESCRIPTORS: usize = 6;
    const DESCRIPTOR: usize = 16;
    const LEN_AT: usize = 8;
    let fd = socket.as_fd().as_raw_fd();
    let mut offsets = [0u64; 16];
    let mut size = size_of_val(&offsets) as libc::socklen_t;
    let buffer = offsets.as_mut_ptr().cast();
    // SAFETY: the buffer is live for the call and `size` is its size.
    let result = unsafe { libc::getsockopt(fd, libc::SOL_XDP, abi::XDP_MMAP_OFFSETS, buffer, &raw mut size) };
    assert_eq!(result, 0);
    let first = offsets[TX_DESCRIPTORS] as usize;
    let length = first + RING as usize * DESCRIPTOR;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let offset = abi::XDP_PGOFF_TX_RING as libc::off_t;
    // SAFETY: a new mapping, at an address of the kernel's choice.
    let ring = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_SHARED, fd, offset) };
    assert_ne!(ring, libc::MAP_FAILED);
    // SAFETY: inside the mapping, and nobody reads the descriptor now: the kernel was not told of it
    // yet, and the port never reads what it gave to TX.
    unsafe {
        ring.cast::<u8>().add(first + place * DESCRIPTOR + LEN_AT).cast::<u32>().write_volatile(0);
        libc::munmap(ring, length);
    }
}

#[test]
fn a_monitor_reads_each_queue_after_a_split_and_after_the_port_is_gone() {
    const QUEUES: u32 = 4;
    let Some(bed) = bed(|b| b.queues(QUEUES)) else { return };
    let sources = source_ports(bed.b(), bed.a()).unwrap();
    let umem = umem(QUEUES * RING * 2);
    let port = open(bed.a(), &umem, AttachMode::Native);
    let monitor = port.monitor();
    let begin = monitor.statistics().unwrap();
    let parts = port.split(2).unwrap();
    let peer = PacketSocket::open(bed.b()).unwrap();
    // More than there are frames for, on each queue by another number: so many are lost.
    for (queue, &source) in (0..).zip(&sources) {
        let frame = UdpFrame::new(bed.b(), bed.a()).source_port(source).build().unwrap();
        (0..RING + queue).for_each(|_| peer.send(&frame).unwrap());
    }
    until("losses", || (monitor.statistics().unwrap().total().rx_lost() == 6).then_some(()));
    thread::scope(|scope| {
        for mut part in parts {
            scope.spawn(move || {
                let mut received = 0;
                until("packets", || {
                    received += part.receive(|_| ()).unwrap();
                    (received == 2 * RING).then_some(())
                });
            });
        }
    });
    // All parts are closed by now.
    let end = monitor.clone().statistics().unwrap();
    assert_eq!(end.queues().len(), QUEUES as usize);
    for queue in 0..QUEUES {
        let counts = end.queue(queue).unwrap();
        assert_eq!(counts.rx_packets, u64::from(RING));
        assert_eq!(counts.rx_fill_empty, Some(queue.into()));
    }
    assert_eq!(end.since(&begin).total(), end.total());
    assert_eq!(end.since(&end).total().rx_packets, 0);
    assert_settled(&umem);
}
