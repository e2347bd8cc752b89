//! What a port does when its interface changes under it, and what it counts: on the real kernel, in
//! copy mode.
#![cfg(target_os = "linux")]

use std::os::fd::AsFd as _;
use std::thread;
use std::time::{Duration, Instant};

use xsk::port::{Counts, Event, Monitor, Queues};
use xsk::xdp::AttachMode;
use xsk::{Cause, Device, Packet, Port, Umem};
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
        give(&mut port, &bed, 3);
        assert_eq!(port.drain(PATIENCE).unwrap(), 0);
        peer.take(3);
        peer.exchange(&mut port, 5);
        assert_eq!(port.event(), None);
        assert_eq!(port.monitor().statistics().unwrap().total().tx_dropped, 3);
        assert_settled(&umem);
    }
}

#[test]
fn new_queues_are_taken_on_and_their_packets_received() {
    const QUEUES: u32 = 4;
    let Some(bed) = bed(|b| b.queues(QUEUES)) else { return };
    let ports = source_ports(bed.b(), bed.a()).unwrap();
    for end in [bed.b(), bed.a()] {
        end.set_channels(Channels { rx: 2, tx: 2 }).unwrap();
    }
    let umem = umem(QUEUES * RING * 2);
    let mut port = open(bed.a(), &umem, AttachMode::Native);
    let mut chosen = Port::builder(&device(bed.a())).queues(Queues::All).umem(&umem).ring_size(RING);
    assert_eq!(port.queues(), [0, 1]);
    for end in [bed.a(), bed.b()] {
        end.set_channels(Channels { rx: QUEUES, tx: QUEUES }).unwrap();
    }
    // Rising receive and transmit queues are one change.
    assert_eq!(next_event(&mut port), Event::Queues { was: 2, now: 4, taken: vec![2, 3] });
    assert_eq!(port.queues(), [0, 1, 2, 3]);
    let peer = PacketSocket::open(bed.b()).unwrap();
    for (queue, &source) in (0..).zip(&ports) {
        let frame = UdpFrame::new(bed.b(), bed.a()).source_port(source).number(0).build().unwrap();
        (0..300).for_each(|_| {
            peer.send(&frame).unwrap();
            until("a packet", || {
                port.wait(Some(MOMENT)).unwrap();
                (port.receive(|packet| assert_eq!(packet[..], frame[..])).unwrap() == 1).then_some(())
            });
        });
        assert_eq!(port.monitor().statistics().unwrap().queue(queue).unwrap().rx_packets, 300);
    }
    assert_settled(&umem);
    drop(port);

    // Somebody else's queues are left to them.
    chosen = chosen.queues([0, 1]);
    let mut port = chosen.open().unwrap();
    for (channels, was) in [(3, 4), (2, 3), (4, 2)] {
        for end in [bed.b(), bed.a()] {
            let order = if channels > was { [bed.a(), bed.b()] } else { [bed.b(), bed.a()] };
            let _ = end;
            for end in order {
                end.set_channels(Channels { rx: channels, tx: channels }).unwrap();
            }
        }
        assert_eq!(next_event(&mut port), Event::Queues { was, now: channels, taken: vec![] });
        Peer::new(&bed).exchange_on(&mut port, &ports[..2]);
    }
    assert_eq!(port.queues(), [0, 1]);
    drop(port);
    assert_settled(&umem);
}

impl Peer {
    /// Sends from each of these ports, and lets `port` receive it.
    #[track_caller]
    fn exchange_on(&mut self, port: &mut Port, _: &[u16]) {
        self.exchange(port, 1);
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
            assert_eq!((census.depot, census.retired), (census.total, 0), "{mode:?} {waits}: {census:?}");

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
        assert_eq!((census.contradiction(), census.depot), (None, census.total), "{census:?}");
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
            xsk::port::Action::Keep
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
    before: xsk::port::PortStatistics,
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
}
