//! The sample programs: their loops, and what surrounds each of them.
//!
//! A loop works the rings and nothing else: it makes no system call that the rings don't ask for, and
//! reads no clock. Time, signals and reports belong to a watcher on a thread of its own.

pub(crate) mod l2fwd;
pub(crate) mod rxdrop;
pub(crate) mod txonly;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use xsk::abi::TX_BATCH_SIZE;
use xsk::socket::{Sent, SocketBuilder};
use xsk::umem::{PageSize, Pool};
use xsk::xdp::{AttachMode, DefaultProgram};
use xsk::{Device, Mode, Socket, TxRing, Umem};

use crate::cli::{self, Attach, Interface, Output, Rings};
use crate::failure::Failure;
use crate::guard::{self, Taking};
use crate::packet;
use crate::report::{Interval, Report, Start, Statistics, Summary};
use crate::signals::Stop;

/// How long a loop sleeps at most before it looks whether to go on.
const NAP: Duration = Duration::from_millis(100);
/// How long to wait for packets that are on their way when the work is done.
const DRAIN: Duration = Duration::from_millis(200);
/// How often the watcher looks after a socket when no reports are wanted.
const LOOK: Duration = Duration::from_secs(1);

/// How a loop takes its turns.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Turn {
    /// Packets at a time.
    pub(crate) batch: u32,
    /// Sleep when there is nothing to do.
    pub(crate) poll: bool,
}

/// What a loop has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) rx_packets: u64,
    pub(crate) rx_bytes: u64,
    /// Completed.
    pub(crate) tx_packets: u64,
    pub(crate) tx_bytes: u64,
    /// Of those that were completed, what the driver dropped.
    pub(crate) tx_dropped: u64,
    /// Given to TX and not yet completed when the loop ended.
    pub(crate) tx_unfinished: u64,
}

/// Has the kernel send what is in TX, where it waits for that: always in copy mode.
#[inline(always)]
fn transmit(socket: &Socket, tx: &TxRing, counts: &mut Counts) -> xsk::Result<()> {
    if tx.needs_wakeup() {
        // What is left in TX goes with the next batch.
        counts.tx_dropped += u64::from(socket.send()? == Sent::Dropped);
    }
    Ok(())
}

/// The counts of a loop at work, for the watcher to read. One thread writes them, so they are stored
/// and never added to.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Live {
    rx_packets: AtomicU64,
    rx_bytes: AtomicU64,
    tx_packets: AtomicU64,
    tx_bytes: AtomicU64,
    tx_dropped: AtomicU64,
}

impl Live {
    #[inline(always)]
    fn publish(&self, counts: &Counts) {
        self.rx_packets.store(counts.rx_packets, Ordering::Relaxed);
        self.rx_bytes.store(counts.rx_bytes, Ordering::Relaxed);
        self.tx_packets.store(counts.tx_packets, Ordering::Relaxed);
        self.tx_bytes.store(counts.tx_bytes, Ordering::Relaxed);
        self.tx_dropped.store(counts.tx_dropped, Ordering::Relaxed);
    }

    fn read(&self) -> Counts {
        Counts {
            rx_packets: self.rx_packets.load(Ordering::Relaxed),
            rx_bytes: self.rx_bytes.load(Ordering::Relaxed),
            tx_packets: self.tx_packets.load(Ordering::Relaxed),
            tx_bytes: self.tx_bytes.load(Ordering::Relaxed),
            tx_dropped: self.tx_dropped.load(Ordering::Relaxed),
            tx_unfinished: 0,
        }
    }
}

/// What a loop does once a turn: tells its counts, and asks whether to go on.
struct Pulse<'a> {
    live: &'a Live,
    stop: &'a Stop,
}

impl Pulse<'_> {
    #[inline(always)]
    fn beat(&self, counts: &Counts) -> bool {
        self.live.publish(counts);
        !self.stop.is_asked()
    }
}

/// Everything that a sample needs before its socket.
struct Ground {
    device: Device,
    umem: Umem,
    pool: Pool,
    builder: SocketBuilder<'static>,
}

impl Ground {
    fn prepare(interface: &Interface, rings: &Rings, receives: bool) -> Result<Self, Failure> {
        let device = Device::open(&interface.interface)?;
        if !interface.take_all {
            let taking = match receives {
                true => Taking::Received { queue: interface.queue, queues: device.queues()? },
                false => Taking::Bandwidth,
            };
            guard::check(device.name(), taking)?;
        }
        let umem = Umem::builder().frames(rings.frames).chunk_size(rings.frame_size);
        let umem = if rings.huge_pages { umem.require_pages(PageSize::Huge2M) } else { umem };
        let (umem, pool) = umem.build()?;
        let mode = match (interface.copy, interface.zero_copy) {
            (true, _) => Mode::Copy,
            (_, true) => Mode::ZeroCopy,
            _ => Mode::Any,
        };
        let builder = Socket::builder(&device)
            .queue(interface.queue)
            .ring_size(rings.ring)
            .mode(mode)
            .need_wakeup(!rings.no_need_wakeup);
        Ok(Self { device, umem, pool, builder })
    }
}

fn attach(device: &Device, socket: &Socket, how: &Attach) -> Result<DefaultProgram, Failure> {
    let mode = match (how.native, how.generic) {
        (true, _) => AttachMode::Native,
        (_, true) => AttachMode::Generic,
        _ => AttachMode::Best,
    };
    let program = DefaultProgram::attach(device, mode)?;
    program.insert(socket)?;
    // Tells of an interface that is down, which would otherwise just be silent.
    socket.wake_rx()?;
    Ok(program)
}

/// In copy mode one system call sends 32 packets; with this it sends a batch. Kernels before 6.17 can't,
/// and need a call for each 32.
pub(crate) fn budget_for(socket: &Socket, tx: &TxRing, batch: u32) {
    let _ = socket.set_tx_budget(batch.min(tx.size()).max(TX_BATCH_SIZE));
}

/// `xsk rxdrop`.
pub(crate) fn run_rxdrop(args: &cli::Rxdrop) -> Result<(), Failure> {
    let Ground { device, umem, mut pool, builder } = Ground::prepare(&args.interface, &args.rings, true)?;
    let mut xsk = builder.fill_from(&mut pool, u32::MAX).open_rx(&umem)?;
    let program = attach(&device, &xsk.socket, &args.attach)?;

    let socket = xsk.socket.clone();
    let run = Run::start("rxdrop", &socket, Some(&program), &args.output)?;
    let turn = Turn { batch: args.rings.batch, poll: args.rings.poll };
    let measured =
        run.conduct(|pulse| rxdrop::run(&mut xsk, &mut pool, turn, |counts| pulse.beat(counts)))?;
    run.finish(measured, &umem, Some(program))
}

/// `xsk txonly`.
pub(crate) fn run_txonly(args: &cli::Txonly) -> Result<(), Failure> {
    let Ground { device, umem, mut pool, builder } = Ground::prepare(&args.interface, &args.rings, false)?;
    let info = device.info()?;
    let packet = packet::udp(&args.packets, info.mac(), info.mtu())?;
    if packet.len() > umem.chunk_size() as usize {
        return Err(Failure::new(
            &format!("cannot send packets of {} bytes", packet.len()),
            format!("a frame has {} bytes", umem.chunk_size()),
            "A packet is in one frame.",
            match packet.len() {
                ..=4096 => "use larger frames: -f 4096".into(),
                _ => "use -s 4096 or less, with -f 4096".into(),
            },
        ));
    }
    txonly::prepare(&mut pool, &packet);
    // Before the socket: the driver sets up the queue for both at once.
    let program = args.attach.then(|| DefaultProgram::attach(&device, AttachMode::Best)).transpose()?;
    let mut xsk = builder.open_tx(&umem)?;
    budget_for(&xsk.socket, &xsk.tx, args.rings.batch);

    let socket = xsk.socket.clone();
    let run = Run::start("txonly", &socket, program.as_ref(), &args.output)?;
    let turn = Turn { batch: args.rings.batch, poll: args.rings.poll };
    let work = txonly::Work { len: packet.len() as u32, count: args.packets.count };
    let mut measured =
        run.conduct(|pulse| txonly::run(&mut xsk, &mut pool, turn, work, |counts| pulse.beat(counts)))?;
    if measured.failure.is_none() {
        txonly::drain(&mut xsk, &mut pool, work.len, &mut measured.counts)?;
    }
    run.finish(measured, &umem, program)
}

/// `xsk l2fwd`.
pub(crate) fn run_l2fwd(args: &cli::L2fwd) -> Result<(), Failure> {
    let Ground { device, umem, mut pool, builder } = Ground::prepare(&args.interface, &args.rings, true)?;
    let mut xsk = builder.fill_from(&mut pool, u32::MAX).open(&umem)?;
    budget_for(&xsk.socket, &xsk.tx, args.rings.batch);
    let program = attach(&device, &xsk.socket, &args.attach)?;

    let socket = xsk.socket.clone();
    let run = Run::start("l2fwd", &socket, Some(&program), &args.output)?;
    let turn = Turn { batch: args.rings.batch, poll: args.rings.poll };
    let mut measured = run.conduct(|pulse| {
        l2fwd::run(&mut xsk, &mut pool, turn, l2fwd::swap_macs, |counts| pulse.beat(counts))
    })?;
    if measured.failure.is_none() {
        l2fwd::drain(&mut xsk, &mut pool, &mut measured.counts)?;
    }
    run.finish(measured, &umem, Some(program))
}

/// A sample at work: who it is, when it ends, and where it reports.
struct Run<'a> {
    start: Start,
    socket: &'a Socket,
    output: &'a Output,
    report: Report,
    stop: Stop,
}

/// What came of a loop.
struct Measured {
    counts: Counts,
    seconds: f64,
    /// Why it ended before it was told to.
    failure: Option<Failure>,
}

impl<'a> Run<'a> {
    /// Says what is about to begin. Signals are heard from here on.
    fn start(
        command: &'static str,
        socket: &'a Socket,
        program: Option<&DefaultProgram>,
        output: &'a Output,
    ) -> Result<Self, Failure> {
        let stop = Stop::listen()?;
        let start = Start::new(command, socket, program.map(DefaultProgram::mode));
        let report = Report::new(output.json, !output.interval.is_zero());
        report.start(&start, program.and_then(|program| program.attachment().fallback()))?;
        Ok(Self { start, socket, output, report, stop })
    }

    /// Runs a loop on this thread and the watcher on another, until the end is asked for or the loop has
    /// nothing left to do.
    fn conduct(&self, work: impl FnOnce(&Pulse<'_>) -> xsk::Result<Counts>) -> Result<Measured, Failure> {
        let live = Live::default();
        let begin = Instant::now();
        thread::scope(|scope| {
            let watcher = thread::Builder::new().name("xsk-watcher".into()).spawn_scoped(scope, || {
                let watched = self.watch(&live, begin);
                // Whatever it was, nobody would end the loop after this.
                self.stop.ask();
                watched
            })?;
            let result = work(&Pulse { live: &live, stop: &self.stop });
            let seconds = begin.elapsed().as_secs_f64();
            self.stop.ask();
            let watched = watcher.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            let (counts, failure) = match result {
                Ok(counts) => (counts, watched.err()),
                Err(error) => (live.read(), Some(error.into())),
            };
            Ok(Measured { counts, seconds, failure })
        })
    }

    /// Reports, looks after the socket, and asks for the end when the time is over.
    fn watch(&self, live: &Live, begin: Instant) -> Result<(), Failure> {
        let reports = !self.output.interval.is_zero();
        let interval = if reports { self.output.interval } else { LOOK };
        let mut last = Interval::default();
        let mut next = interval;
        loop {
            let now = begin.elapsed();
            if self.stop.is_asked() || self.output.duration.is_some_and(|end| now >= end) {
                return Ok(());
            }
            if now >= next {
                // A loop that only looks at RX makes no call that would tell that the interface is gone.
                self.socket.wake_rx()?;
                if reports {
                    let counts = live.read();
                    let current = Interval::at(now, counts, self.socket.statistics()?);
                    self.report.interval(&self.start, &last, &current)?;
                    last = current;
                }
                // One that was missed is not made up for.
                while next <= now {
                    next += interval;
                }
            }
            let until = self.output.duration.map_or(next, |end| next.min(end));
            self.stop.wait(until.saturating_sub(begin.elapsed()))?;
        }
    }

    /// Detaches the program and prints the summary.
    fn finish(self, measured: Measured, umem: &Umem, program: Option<DefaultProgram>) -> Result<(), Failure> {
        drop(program);
        let Measured { counts, seconds, failure } = measured;
        let statistics = Statistics::new(self.socket.statistics()?, &counts, umem);
        let summary = Summary::new(self.start, seconds, &counts, statistics);
        match (failure, self.report.summary(&summary)) {
            (Some(failure), _) => Err(failure),
            (None, written) => written.map_err(|error: io::Error| error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use xsk_sim::Sim;

    use super::*;

    const PACKET: [u8; 60] = [0; 60];
    const TURN: Turn = Turn { batch: 8, poll: false };

    /// A UMEM with more frames than FILL holds, and a device that sends queue 0 to whoever enters.
    fn ground(sim: &Sim) -> (Device, Umem, Pool, DefaultProgram) {
        let device = sim.device("sim0").unwrap();
        let (umem, pool) = Umem::builder().frames(64).build().unwrap();
        let program = DefaultProgram::attach(&device, AttachMode::Best).unwrap();
        (device, umem, pool, program)
    }

    fn arrive(sim: &Sim, n: usize) {
        for _ in 0..n {
            sim.inject("sim0", &PACKET).unwrap();
        }
        sim.run();
    }

    #[test]
    fn rxdrop_goes_on_when_fill_is_full() {
        let sim = Sim::new();
        let (device, umem, mut pool, program) = ground(&sim);
        let mut xsk = Socket::builder(&device).ring_size(16).open_rx(&umem).unwrap();
        program.insert(&xsk.socket).unwrap();
        xsk.fill.refill(&mut pool, 16);
        arrive(&sim, 12);
        // The frames that were taken from FILL are replaced before they are back.
        assert_eq!(xsk.fill.refill(&mut pool, 16), 12);
        let counts = rxdrop::run(&mut xsk, &mut pool, TURN, |counts| counts.rx_packets < 12).unwrap();
        assert_eq!((counts.rx_packets, counts.rx_bytes), (12, 12 * 60));
        assert_eq!((umem.census().program, umem.census().dropped), (0, 0));
    }

    #[test]
    fn l2fwd_goes_on_when_fill_is_full() {
        let sim = Sim::new();
        let (device, umem, mut pool, program) = ground(&sim);
        let mut xsk = Socket::builder(&device).ring_size(16).open(&umem).unwrap();
        program.insert(&xsk.socket).unwrap();
        xsk.fill.refill(&mut pool, 16);
        let mut sent = 0;
        let counts = l2fwd::run(&mut xsk, &mut pool, TURN, l2fwd::swap_macs, |counts| {
            if sent < 200 {
                arrive(&sim, 5);
                sent += 5;
            }
            counts.tx_packets < 200
        })
        .unwrap();
        assert_eq!((counts.rx_packets, counts.tx_packets, counts.tx_unfinished), (200, 200, 0));
        sim.run();
        assert_eq!(sim.stack("sim1").unwrap().len(), 200);
        assert_eq!((umem.census().program, umem.census().dropped), (0, 0));
    }

    #[test]
    fn txonly_sends_the_count_and_not_one_more() {
        let sim = Sim::new();
        let (device, umem, mut pool, _program) = ground(&sim);
        let packet: Vec<u8> = (0..60).collect();
        txonly::prepare(&mut pool, &packet);
        let mut xsk = Socket::builder(&device).ring_size(16).open_tx(&umem).unwrap();
        let work = txonly::Work { len: 60, count: Some(1001) };
        let counts = txonly::run(&mut xsk, &mut pool, TURN, work, |_| true).unwrap();
        assert_eq!((counts.tx_packets, counts.tx_bytes, counts.tx_unfinished), (1001, 1001 * 60, 0));
        sim.run();
        let arrived = sim.stack("sim1").unwrap();
        assert_eq!(arrived.len(), 1001);
        assert!(arrived.iter().all(|it| *it == packet));
        assert_eq!(umem.census().pools, 64);
    }
}
