//! Real packets through ports: many queues, several threads, two interfaces, two processes. Each
//! packet is checked, and each frame accounted for at the end.
#![cfg(target_os = "linux")]

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use xsk::port::{Action, PortBuilder};
use xsk::xdp::AttachMode;
use xsk::{Device, Packet, Port, Umem};
use xsk_testbed::{
    End, Load, PacketSocket, Pair, Sequence, Stream, Testbed, UdpFrame, bed, number, source_ports,
};

/// How long nothing at all may happen.
const PATIENCE: Duration = Duration::from_secs(20);
/// One wait, so that a thread notices what it is not woken for.
const MOMENT: Duration = Duration::from_millis(20);
const MODES: [AttachMode; 2] = [AttachMode::Native, AttachMode::Generic];
/// Bytes of both hardware addresses.
const MACS: usize = 12;

/// These tests keep all processors busy: they take turns.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Fails when nothing happened for a while.
struct Patience(Instant);

impl Patience {
    fn new() -> Self {
        Self(Instant::now() + PATIENCE)
    }

    #[track_caller]
    fn after(&mut self, happened: bool, what: impl FnOnce() -> String) {
        if happened {
            *self = Self::new();
        } else {
            assert!(Instant::now() < self.0, "nothing happens any more: {}", what());
        }
    }
}

/// What is sent on a queue, and what came of it.
struct Flow {
    port: u16,
    frame: Vec<u8>,
    seen: Sequence,
    untold: u64,
}

impl Flow {
    fn new(from: &End, to: &End, port: u16) -> Self {
        let frame = UdpFrame::new(from, to).source_port(port).len(64).number(0).build().unwrap();
        Self { port, frame, seen: Sequence::new(), untold: 0 }
    }

    /// A flow for each queue that its source port leads to.
    fn each(from: &End, to: &End) -> Vec<Self> {
        source_ports(from, to).unwrap().into_iter().map(|port| Self::new(from, to, port)).collect()
    }

    /// Checks a packet: it must be one of these, altered in nothing but its number.
    #[track_caller]
    fn feed(flows: &mut [Self], packet: &[u8]) {
        let port = u16::from_be_bytes([packet[34], packet[35]]);
        let flow = flows.iter_mut().find(|flow| flow.port == port).expect("a packet of ours");
        let at = flow.frame.len() - 64 + 46;
        assert_eq!(packet[..at], flow.frame[..at]);
        assert_eq!(packet[at + 8..], flow.frame[at + 8..]);
        flow.seen.feed(number(packet).expect("a numbered packet"));
        flow.untold += 1;
    }

    /// Checks the answer to a packet.
    #[track_caller]
    fn feed_answer(flows: &mut [Self], packet: &mut [u8]) {
        swap_macs(packet);
        Self::feed(flows, packet);
    }

    /// Tells the stream what came, now and then.
    fn acknowledge(&mut self, stream: &Stream, least: u64) {
        if self.untold > least {
            stream.received(self.untold).unwrap();
            self.untold = 0;
        }
    }
}

fn swap_macs(packet: &mut [u8]) {
    packet[..MACS].rotate_left(MACS / 2);
}

fn device(end: &End) -> Device {
    Device::open(&end.name).unwrap()
}

/// A UMEM that keeps a ledger.
fn umem(frames: u32) -> Umem {
    Umem::builder().frames(frames).chunk_size(2048).ledger(true).build().unwrap().0
}

/// Every frame is in the port's hands or the kernel's, and none with the program.
#[track_caller]
fn assert_settled(umem: &Umem) {
    let census = umem.census();
    assert_eq!(census.contradiction(), None);
    assert_eq!((census.program, census.dropped, census.forgotten), (0, 0, 0), "{census:?}");
    assert_eq!(census.faults.total(), 0, "{census:?}");
}

/// The same, of frames that no port has any more: what a closed socket had is back or with the kernel.
#[track_caller]
fn assert_home(umem: &Umem) {
    assert_settled(umem);
    let census = umem.census();
    assert_eq!(census.depot + census.retired, census.total, "{census:?}");
}

/// A random number generator that is the same each time.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

// --- ten million

const QUEUES: u32 = 4;
/// Entries of a ring; more than a stream's window.
const RING: u32 = 8192;
const WINDOW: u64 = 4096;

/// Packets for each queue: more for those that the generator reaches.
fn plan(streams_by_generator: impl Fn(u32) -> bool) -> Vec<u64> {
    let generated = (0..QUEUES).filter(|&queue| streams_by_generator(queue)).count() as u64;
    let others = u64::from(QUEUES) - generated;
    let scale = if cfg!(debug_assertions) { 20 } else { 1 };
    let each_other = if generated == 0 { 2_500_000 } else { 500_000 };
    let each_generated = (10_000_000 - others * each_other) / generated.max(1);
    (0..QUEUES).map(|q| if streams_by_generator(q) { each_generated } else { each_other } / scale).collect()
}

/// Which queues a generator reaches from the processors there are.
fn is_generated(bed: &Testbed, queue: u32) -> bool {
    let frame = UdpFrame::new(bed.b(), bed.a()).number(0).build().unwrap();
    xsk_testbed::Generator::new(bed.b(), frame).unwrap().to_queue(queue).is_ok()
}

/// Begins to send so much to each queue.
fn start(from: &End, flows: &[Flow], plan: &[u64]) -> Vec<Stream> {
    let start = |(queue, (flow, &count)): (u32, (&Flow, &u64))| {
        let load = Load::count(count).window(WINDOW);
        Stream::start(from, flow.frame.clone(), queue, load).unwrap()
    };
    (0..).zip(flows.iter().zip(plan)).map(start).collect()
}

#[test]
fn ten_million_packets_are_received_on_four_queues_by_two_workers() {
    let _turn = turn();
    let Some(bed) = bed(|b| b.queues(QUEUES).single_namespace(true)) else { return };
    let flows = Flow::each(bed.b(), bed.a());
    let plan = plan(|queue| is_generated(&bed, queue));
    let umem = umem(QUEUES * RING * 2);
    let port = Port::builder(&device(bed.a())).umem(&umem).ring_size(RING).open().unwrap();
    assert_eq!(port.queues(), [0, 1, 2, 3]);
    let monitor = port.monitor();
    let workers = port.split(2).unwrap();
    assert_eq!(workers.iter().map(Port::queues).collect::<Vec<_>>(), [[0, 2], [1, 3]]);

    let streams = start(bed.b(), &flows, &plan);
    let (a, b) = (bed.a(), bed.b());
    let work = |mut worker: Port| {
        let mut flows: Vec<Flow> = flows.iter().map(|flow| Flow::new(b, a, flow.port)).collect();
        let queues = worker.queues();
        let total: u64 = queues.iter().map(|&queue| plan[queue as usize]).sum();
        let (mut received, mut patience) = (0, Patience::new());
        while received < total {
            let n = worker.receive(|packet| Flow::feed(&mut flows, packet)).unwrap();
            received += u64::from(n);
            for &queue in &queues {
                let least = if n == 0 { 0 } else { WINDOW / 4 };
                flows[queue as usize].acknowledge(&streams[queue as usize], least);
            }
            if n == 0 {
                worker.wait(Some(MOMENT)).unwrap();
            }
            patience.after(n != 0, || format!("{received} of {total}, {:?}", monitor.statistics()));
        }
        for (queue, flow) in (0..).zip(&flows) {
            let expected = if queues.contains(&queue) { plan[queue as usize] } else { 0 };
            assert!(flow.seen.is_exactly(expected), "queue {queue}: {}", flow.seen);
        }
        worker
    };
    let work = &work;
    let workers: Vec<Port> = thread::scope(|scope| {
        let threads: Vec<_> = workers.into_iter().map(|worker| scope.spawn(move || work(worker))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let statistics = monitor.statistics().unwrap();
    for (queue, &count) in (0..).zip(&plan) {
        let counts = statistics.queue(queue).unwrap();
        assert_eq!((counts.rx_packets, counts.rx_bytes), (count, count * 64), "queue {queue}");
    }
    assert_eq!(statistics.total().rx_lost(), 0, "{statistics:?}");
    assert_settled(&umem);
    drop(workers);
    assert_home(&umem);
}

#[test]
fn ten_million_packets_are_sent_back_on_four_queues_by_two_workers() {
    let _turn = turn();
    let Some(bed) = bed(|b| b.queues(QUEUES)) else { return };
    let mut flows = Flow::each(bed.b(), bed.a());
    let plan = plan(|queue| is_generated(&bed, queue));
    let umem = umem(QUEUES * RING * 2);
    let port = Port::builder(&device(bed.a())).umem(&umem).ring_size(RING).open().unwrap();
    let monitor = port.monitor();
    let done = AtomicBool::new(false);
    let work = |mut worker: Port| {
        while !done.load(Ordering::Relaxed) {
            let n = worker
                .process(|mut packet| {
                    swap_macs(&mut packet);
                    packet
                })
                .unwrap();
            if n == 0 {
                worker.wait(Some(MOMENT)).unwrap();
            }
        }
        assert_eq!(worker.drain(PATIENCE).unwrap(), 0);
        worker
    };
    let work = &work;
    let (ended, workers) = thread::scope(|scope| {
        let threads: Vec<_> =
            port.split(2).unwrap().into_iter().map(|worker| scope.spawn(move || work(worker))).collect();
        let there = bed.b();
        let ended = scope.spawn(|| {
            there.namespace.enter().unwrap();
            let mut far = Port::builder(&device(there)).ring_size(RING).open().unwrap();
            let streams = start(there, &flows, &plan);
            let total: u64 = plan.iter().sum();
            let (mut answered, mut patience) = (0, Patience::new());
            while answered < total {
                let n = far.receive(|packet| Flow::feed_answer(&mut flows, packet)).unwrap();
                answered += u64::from(n);
                for (flow, stream) in flows.iter_mut().zip(&streams) {
                    flow.acknowledge(stream, if n == 0 { 0 } else { WINDOW / 4 });
                }
                if n == 0 {
                    far.wait(Some(MOMENT)).unwrap();
                }
                patience.after(n != 0, || {
                    let (near, far) = (monitor.statistics(), far.monitor().statistics());
                    format!("{answered} of {total}\n{near:?}\n{far:?}")
                });
            }
            far
        });
        let ended = ended.join();
        done.store(true, Ordering::Relaxed);
        let workers: Vec<Port> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        (ended, workers)
    });
    let far = ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic));

    let (near, back) = (monitor.statistics().unwrap(), far.monitor().statistics().unwrap());
    for ((queue, &count), flow) in (0..).zip(&plan).zip(&flows) {
        assert!(flow.seen.is_exactly(count), "queue {queue}: {}", flow.seen);
        let counts = near.queue(queue).unwrap();
        let sent = (counts.rx_packets, counts.tx_packets, counts.tx_completed, counts.tx_bytes);
        assert_eq!(sent, (count, count, count, count * 64), "queue {queue}");
        assert_eq!(back.queue(queue).unwrap().rx_packets, count, "by the queue that it came by");
    }
    let total = near.total();
    assert_eq!((total.rx_lost(), total.tx_dropped, total.tx_invalid), (0, 0, 0), "{near:?}");
    assert_eq!(back.total().rx_lost(), 0, "{back:?}");
    assert_settled(&umem);
    drop(workers);
    assert_home(&umem);
    assert_settled(far.umem());
}

// --- packets that are kept

/// One end of the wire that no port has: what arrives there, and whether it is what it should be.
struct FarEnd {
    socket: PacketSocket,
    answers: Vec<(u64, Vec<u8>)>,
}

impl FarEnd {
    fn watch(end: &End) -> Self {
        Self { socket: PacketSocket::open(end).unwrap(), answers: Vec::new() }
    }

    /// Takes what has arrived; returns how much.
    fn take(&mut self) -> usize {
        let before = self.answers.len();
        while let Some(frame) = self.socket.try_recv().unwrap() {
            self.answers.push((number(&frame).expect("a numbered frame"), frame));
        }
        self.answers.len() - before
    }

    /// Takes until so many have arrived.
    #[track_caller]
    fn take_all(&mut self, count: usize) {
        let mut patience = Patience::new();
        while self.answers.len() < count {
            let n = self.take();
            patience.after(n != 0, || format!("{} of {count} answers", self.answers.len()));
        }
        assert_eq!(self.socket.drops().unwrap(), 0);
    }

    fn numbers(&self) -> BTreeSet<u64> {
        self.answers.iter().map(|(number, _)| *number).collect()
    }
}

/// A testbed whose end `a` receives what a generator sends, by a program of either mode.
fn bed_for(mode: AttachMode, queues: u32) -> Option<Testbed> {
    bed(|b| b.queues(queues).gro(mode == AttachMode::Generic))
}

#[test]
fn packets_are_kept_for_a_random_time_and_then_sent_or_recycled() {
    const COUNT: u64 = 50_000;
    let _turn = turn();
    for mode in MODES {
        let Some(bed) = bed_for(mode, 1) else { return };
        let umem = umem(2048);
        let mut port =
            Port::builder(&device(bed.a())).umem(&umem).ring_size(512).attach_mode(mode).open().unwrap();
        assert_eq!(port.program().unwrap().mode(), mode);
        let mut flows = [Flow::new(bed.b(), bed.a(), 1000)];
        let mut far = FarEnd::watch(bed.b());
        let load = Load::count(COUNT).window(128);
        let stream = Stream::start(bed.b(), flows[0].frame.clone(), 0, load).unwrap();

        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let mut kept: Vec<Packet> = Vec::new();
        let mut expected = BTreeSet::new();
        let mut patience = Patience::new();
        while flows[0].seen.total() < COUNT || !kept.is_empty() {
            let n = port
                .process(|mut packet| {
                    Flow::feed(&mut flows, &packet);
                    swap_macs(&mut packet);
                    match random.below(4) {
                        0 => Action::Drop(packet),
                        1 => {
                            expected.insert(number(&packet).unwrap());
                            Action::Send(packet)
                        }
                        _ => {
                            kept.push(packet);
                            Action::Keep
                        }
                    }
                })
                .unwrap();
            // As many go as come, on average, in any order.
            let done = flows[0].seen.total() == COUNT;
            for _ in 0..random.below(64) {
                if kept.is_empty() || (kept.len() < 400 && !done) {
                    break;
                }
                let packet = kept.swap_remove(random.below(kept.len() as u64) as usize);
                if random.below(2) == 0 {
                    port.recycle(packet);
                    continue;
                }
                let number = number(&packet).unwrap();
                match port.send(packet) {
                    Ok(()) => assert!(expected.insert(number)),
                    Err(refused) => kept.push(refused.into_inner()),
                }
            }
            let census = umem.census();
            assert!(census.program <= kept.len() as i64 + 1, "{census:?}");
            if n == 0 {
                port.wait(Some(if kept.is_empty() { MOMENT } else { Duration::ZERO })).unwrap();
            }
            far.take();
            flows[0].acknowledge(&stream, if n == 0 { 0 } else { 32 });
            patience
                .after(n != 0, || format!("{} {:?} {census:?}", flows[0].seen, port.monitor().statistics()));
        }
        assert_eq!(port.drain(PATIENCE).unwrap(), 0);
        far.take_all(expected.len());
        assert!(flows[0].seen.is_exactly(COUNT), "{}", flows[0].seen);
        assert!(far.numbers() == expected && far.answers.len() == expected.len());
        for (number, frame) in &mut far.answers {
            Flow::feed_answer(&mut flows, frame);
            assert!(expected.contains(number));
        }
        assert_eq!(port.monitor().statistics().unwrap().total().rx_lost(), 0);
        assert_settled(&umem);
        drop(port);
        assert_home(&umem);
    }
}

// --- other threads

/// What a thread writes into a packet, at its end.
const SIGNATURE: [u8; 4] = *b"seen";

fn sign(packet: &mut [u8]) {
    let at = packet.len() - SIGNATURE.len();
    packet[at..].copy_from_slice(&SIGNATURE);
}

/// Checks that all packets were answered, each once and signed.
#[track_caller]
fn assert_signed(far: &mut FarEnd, flow: &Flow, count: u64) {
    far.take_all(count as usize);
    assert_eq!(far.answers.len() as u64, count);
    assert!(far.numbers().into_iter().eq(0..count));
    let at = flow.frame.len() - SIGNATURE.len();
    for (_, frame) in &mut far.answers {
        assert_eq!(frame[at..], SIGNATURE);
        swap_macs(frame);
        assert_eq!(frame[..46], flow.frame[..46]);
    }
}

#[test]
fn packets_go_to_another_thread_and_come_back_or_leave_by_its_own_part() {
    const COUNT: u64 = 50_000;
    let _turn = turn();
    for mode in MODES {
        let Some(bed) = bed_for(mode, 2) else { return };
        let umem = umem(4096);
        let port =
            Port::builder(&device(bed.a())).umem(&umem).ring_size(512).attach_mode(mode).open().unwrap();
        let monitor = port.monitor();
        let mut parts = port.split(2).unwrap();
        let (mut other, mut here) = (parts.pop().unwrap(), parts.pop().unwrap());
        let flow = Flow::new(bed.b(), bed.a(), 1000);
        let mut far = FarEnd::watch(bed.b());
        let load = Load::count(COUNT).window(128);
        let stream = Stream::start(bed.b(), flow.frame.clone(), 0, load).unwrap();

        let (there, packets) = mpsc::channel::<Packet>();
        let (back, returned) = mpsc::channel::<Packet>();
        thread::scope(|scope| {
            let other = scope.spawn(move || {
                let mut random = Random(42);
                for mut packet in packets {
                    sign(&mut packet);
                    if random.below(2) == 0 {
                        back.send(packet).unwrap();
                        continue;
                    }
                    let mut packet = Some(packet);
                    while let Some(refused) = packet.take() {
                        packet = other.send(refused).err().map(|refused| refused.into_inner());
                        other.flush().unwrap();
                    }
                }
                assert_eq!(other.drain(PATIENCE).unwrap(), 0);
                other
            });
            let (mut received, mut patience) = (0, Patience::new());
            let mut forwarded = 0;
            while received < COUNT || forwarded != 0 {
                let mut lent = 0;
                let n = here
                    .process(|mut packet| {
                        swap_macs(&mut packet);
                        there.send(packet).unwrap();
                        lent += 1;
                        Action::Keep
                    })
                    .unwrap();
                received += u64::from(n);
                forwarded += lent;
                while let Ok(packet) = returned.try_recv() {
                    here.send(packet).unwrap();
                }
                // What the other has sent shows at the far end alone.
                let answers = far.take() as u64;
                forwarded -= answers;
                stream.received(answers).unwrap();
                if n == 0 && answers == 0 {
                    here.wait(Some(Duration::from_millis(1))).unwrap();
                }
                patience.after(n != 0 || answers != 0, || {
                    format!("{received} and {forwarded} open, {:?} {:?}", monitor.statistics(), umem.census())
                });
            }
            drop(there);
            let mut other = other.join().unwrap();
            for port in [&mut here, &mut other] {
                assert_eq!(port.drain(PATIENCE).unwrap(), 0);
            }
        });
        assert_signed(&mut far, &flow, COUNT);
        assert_eq!(monitor.statistics().unwrap().total().rx_lost(), 0);
        assert_settled(&umem);
        drop(here);
        assert_home(&umem);
    }
}

/// How the thread that frames go to, and never come back from, uses its port.
#[derive(Clone, Copy, Debug)]
enum Use {
    SendAndFlush,
    SendAndWait,
    RecycleAlone,
}

#[test]
fn frames_that_go_one_way_only_come_back_through_the_depot() {
    // Many times as many as there are frames.
    const COUNT: u64 = 60_000;
    let _turn = turn();
    for mode in MODES {
        for how in [Use::SendAndFlush, Use::SendAndWait, Use::RecycleAlone] {
            let Some(bed) = bed_for(mode, 2) else { return };
            let umem = umem(1024);
            let port =
                Port::builder(&device(bed.a())).umem(&umem).ring_size(256).attach_mode(mode).open().unwrap();
            let monitor = port.monitor();
            let mut parts = port.split(2).unwrap();
            let (mut other, mut here) = (parts.pop().unwrap(), parts.pop().unwrap());
            let flow = Flow::new(bed.b(), bed.a(), 1000);
            let mut far = FarEnd::watch(bed.b());
            let load = Load::count(COUNT).window(128);
            let stream = Stream::start(bed.b(), flow.frame.clone(), 0, load).unwrap();
            let (there, packets) = mpsc::channel::<Packet>();
            let (stream, umem) = (&stream, &umem);
            thread::scope(|scope| {
                let other = scope.spawn(move || {
                    for mut packet in packets {
                        sign(&mut packet);
                        if matches!(how, Use::RecycleAlone) {
                            other.recycle(packet);
                        } else {
                            let mut packet = Some(packet);
                            while let Some(refused) = packet.take() {
                                packet = other.send(refused).err().map(|refused| refused.into_inner());
                                match how {
                                    Use::SendAndWait => drop(other.wait(Some(Duration::ZERO)).unwrap()),
                                    _ => drop(other.flush().unwrap()),
                                }
                            }
                        }
                        stream.received(1).unwrap();
                    }
                    assert_eq!(other.drain(PATIENCE).unwrap(), 0);
                });
                let (mut received, mut patience) = (0, Patience::new());
                while received < COUNT {
                    let n = here
                        .process(|mut packet| {
                            swap_macs(&mut packet);
                            there.send(packet).unwrap();
                            Action::Keep
                        })
                        .unwrap();
                    received += u64::from(n);
                    far.take();
                    if n == 0 {
                        here.wait(Some(Duration::from_millis(1))).unwrap();
                    }
                    patience.after(n != 0, || {
                        format!("{how:?} {mode:?} {received} {:?} {:?}", monitor.statistics(), umem.census())
                    });
                }
                drop(there);
                other.join().unwrap();
            });
            if !matches!(how, Use::RecycleAlone) {
                assert_signed(&mut far, &flow, COUNT);
            }
            let total = monitor.statistics().unwrap().total();
            assert_eq!((total.rx_packets, total.rx_lost()), (COUNT, 0), "{how:?} {mode:?}");
            assert_settled(umem);
            drop(here);
            assert_home(umem);
        }
    }
}

// --- two interfaces

/// A builder of a port with small rings.
fn builder(end: &End, mode: AttachMode) -> PortBuilder {
    Port::builder(&device(end)).ring_size(512).attach_mode(mode)
}

/// So many flows that each queue has some of them, in all likelihood.
const PORTS: std::ops::Range<u16> = 1000..1008;

/// Sends `count` packets of each flow to each end `a` and takes what comes out at the other's end `b`,
/// while `forward` is run.
fn cross(bed: &Testbed, second: &Pair, count: u64, mut forward: impl FnMut()) {
    let far = [bed.b(), second.b()];
    let near = [bed.a(), second.a()];
    let mut flows: Vec<Vec<Flow>> = far
        .iter()
        .zip(&near)
        .map(|(from, to)| PORTS.map(|port| Flow::new(from, to, port)).collect())
        .collect();
    let watches = far.map(|end| PacketSocket::open(end).unwrap());
    let streams: Vec<Vec<Stream>> = far
        .iter()
        .zip(&flows)
        .map(|(from, flows)| {
            let start = |flow: &Flow| {
                let load = Load::count(count).window(16);
                Stream::by_packet_socket(from, flow.frame.clone(), load).unwrap()
            };
            flows.iter().map(start).collect()
        })
        .collect();
    let all = 2 * PORTS.len() as u64 * count;
    let (mut total, mut patience) = (0, Patience::new());
    while total < all {
        forward();
        let before = total;
        for (side, watch) in watches.iter().enumerate() {
            // What comes out here went in at the other side.
            let (flows, streams) = (&mut flows[1 - side], &streams[1 - side]);
            while let Some(frame) = watch.try_recv().unwrap() {
                Flow::feed(flows, &frame);
                total += 1;
            }
            for (flow, stream) in flows.iter_mut().zip(streams) {
                flow.acknowledge(stream, 0);
            }
        }
        patience.after(total != before, || format!("{total} of {all}"));
    }
    for flow in flows.iter().flatten() {
        assert!(flow.seen.is_exactly(count), "{}", flow.seen);
    }
    for watch in &watches {
        assert_eq!(watch.drops().unwrap(), 0);
    }
}

/// A turn both ways; returns how many packets there were.
fn turn_both_ways(left: &mut Port, right: &mut Port) -> u32 {
    left.forward(right, Action::Send).unwrap() + right.forward(left, |packet| packet).unwrap()
}

#[test]
fn packets_cross_between_two_interfaces_both_ways_at_once() {
    const COUNT: u64 = 1000;
    let _turn = turn();
    for mode in MODES {
        let Some(bed) = bed(|b| b.queues(2)) else { return };
        let second = Testbed::builder().queues(2).beside(&bed).unwrap();
        let both = [builder(bed.a(), mode), builder(second.a(), mode)];
        let [mut left, mut right] = Port::open_each(both).unwrap();
        let umem = left.umem().clone();
        let monitors = [left.monitor(), right.monitor()];

        // In one thread.
        cross(&bed, &second, COUNT, || {
            if turn_both_ways(&mut left, &mut right) == 0 {
                Port::wait_any(&mut [&mut left, &mut right], Some(Duration::from_millis(1))).unwrap();
            }
        });
        for port in [&mut left, &mut right] {
            assert_eq!(port.drain(PATIENCE).unwrap(), 0);
        }
        assert_settled(&umem);

        // A worker for each pair of queues.
        let pairs: Vec<_> = left.split(2).unwrap().into_iter().zip(right.split(2).unwrap()).collect();
        let done = AtomicBool::new(false);
        let work = |(mut left, mut right): (Port, Port)| {
            assert_eq!(left.queues(), right.queues());
            while !done.load(Ordering::Relaxed) {
                if turn_both_ways(&mut left, &mut right) == 0 {
                    Port::wait_any(&mut [&mut left, &mut right], Some(MOMENT)).unwrap();
                }
            }
            for port in [&mut left, &mut right] {
                assert_eq!(port.drain(PATIENCE).unwrap(), 0);
            }
            (left, right)
        };
        let work = &work;
        let pairs: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = pairs.into_iter().map(|pair| scope.spawn(move || work(pair))).collect();
            let stop = StopOnDrop(&done);
            cross(&bed, &second, COUNT, thread::yield_now);
            drop(stop);
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let count = 2 * PORTS.len() as u64 * COUNT;
        let both = monitors.map(|monitor| monitor.statistics().unwrap());
        for statistics in &both {
            let total = statistics.total();
            assert_eq!((total.rx_packets, total.tx_packets, total.tx_completed), (count, count, count));
            assert_eq!((total.rx_lost(), total.tx_dropped), (0, 0));
        }
        // In generic mode a veth has queue 0 alone. In native mode a hash with a random key decides, so
        // that one of the two may have all packets on one queue.
        let spread = both.iter().any(|it| it.queues().iter().all(|(_, counts)| counts.rx_packets != 0));
        assert_eq!(spread, mode == AttachMode::Native, "{mode:?}: {both:?}");
        assert_settled(&umem);
        drop(pairs);
        assert_home(&umem);
    }
}

/// Ends what looks at it, also when a check fails.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

// --- two processes

/// The queues that another process is to have, with commas; absent in an ordinary run.
const ROLE: &str = "XSK_PORT_QUEUES";

/// Not a test of its own: another process, that receives on its queues and tells of each how many
/// packets came.
#[test]
fn other_process() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let queues: Vec<u32> = role.split(',').map(|queue| queue.parse().unwrap()).collect();
    let device = Device::open("xsk0").unwrap();
    let mut port = Port::builder(&device).queues(queues.clone()).ring_size(512).open().unwrap();
    let program = port.program().unwrap();
    println!("{} {:?}", if program.is_joined() { "joined" } else { "attached" }, port.queues());
    let mut told = vec![0; queues.len()];
    loop {
        port.wait(None).unwrap();
        while port.receive(|packet| assert!(number(packet).is_some())).unwrap() != 0 {}
        let statistics = port.monitor().statistics().unwrap();
        for (queue, told) in queues.iter().zip(&mut told) {
            let now = statistics.queue(*queue).unwrap().rx_packets;
            if std::mem::replace(told, now) != now {
                println!("queue {queue}: {now}");
            }
        }
    }
}

/// Another process that has a port, and ends with its test.
struct Other {
    child: Child,
    lines: BufReader<ChildStdout>,
    said: String,
}

impl Other {
    fn spawn(queues: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "other_process", "--nocapture", "--test-threads=1"]);
        command.env(ROLE, queues).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Self { child, lines, said: String::new() }
    }

    /// Waits for a line that it prints.
    #[track_caller]
    fn says(&mut self, line: &str) {
        while !self.said.lines().any(|said| said.ends_with(line)) {
            let n = self.lines.read_line(&mut self.said).unwrap();
            assert_ne!(n, 0, "it ended without {line:?}: {}", self.said);
        }
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn two_processes_have_two_queues_each_and_one_goes_on_when_the_other_is_killed() {
    const BURST: u64 = 100;
    let _turn = turn();
    for first_dies in [true, false] {
        let Some(bed) = bed(|b| b.queues(QUEUES)) else { return };
        let flows = Flow::each(bed.b(), bed.a());
        let programs = || device(bed.a()).info().unwrap().programs().iter().map(|p| p.id).collect::<Vec<_>>();
        let peer = PacketSocket::open(bed.b()).unwrap();
        let send = |queue: u32| (0..BURST).for_each(|_| peer.send(&flows[queue as usize].frame).unwrap());

        let mut first = Other::spawn("0,1");
        first.says("attached [0, 1]");
        let program = programs();
        let mut second = Other::spawn("2,3");
        second.says("joined [2, 3]");
        for queue in 0..QUEUES {
            send(queue);
            let process = if queue < 2 { &mut first } else { &mut second };
            process.says(&format!("queue {queue}: {BURST}"));
        }

        let (dead, alive, theirs, left) = if first_dies {
            (&mut first, &mut second, [2, 3], "0,1")
        } else {
            (&mut second, &mut first, [0, 1], "2,3")
        };
        dead.kill();
        assert_eq!(programs(), program, "the program stays with the other");
        for queue in theirs {
            send(queue);
            alive.says(&format!("queue {queue}: {}", 2 * BURST));
        }
        // The queues that were left are free for the next.
        let mut third = Other::spawn(left);
        third.says(&format!("joined [{}]", left.replace(',', ", ")));
        for queue in (0..QUEUES).filter(|queue| !theirs.contains(queue)) {
            send(queue);
            third.says(&format!("queue {queue}: {BURST}"));
        }
        alive.kill();
        third.kill();
        let mut patience = Patience::new();
        while !programs().is_empty() {
            patience.after(false, || "the program should go with its last user".into());
            thread::yield_now();
        }
    }
}
