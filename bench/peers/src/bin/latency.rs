//! Round trips of a UDP echo over a veth pair: answered by a `Port`, and by a UDP socket.

use std::io;
use std::net::UdpSocket;
use std::process::ExitCode;
use std::sync::Barrier;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_setaffinity};
use xsk::xdp::Steering;
use xsk::{Device, Port};
use xsk_bench::stats::quartiles;
use xsk_testbed::Testbed;

const USAGE: &str = "\
usage: latency [--runs N] [--seconds S]

--runs     runs of each kind, in turns (default 11)
--seconds  length of a run (default 0.5)

Needs root and two CPUs: one asks, the other answers. Everything happens in network namespaces that
are gone afterwards.";

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// CPUs of the two ends.
const ASKS: usize = 0;
const ANSWERS: usize = 1;
/// The port that answers.
const ECHO: u16 = 7;
/// Round trips before the measured ones.
const WARM_UP: u64 = 500;
/// How often a sleeping answerer looks whether it is still needed.
const LOOK: Duration = Duration::from_millis(50);
/// How long an answer may take before it counts as lost.
const ANSWER: Duration = Duration::from_secs(1);

/// Who answers.
#[derive(Clone, Copy, Debug)]
enum Kind {
    PortBusy,
    PortWait,
    UdpBusy,
    UdpWait,
}

impl Kind {
    const ALL: [Self; 4] = [Self::PortBusy, Self::UdpBusy, Self::PortWait, Self::UdpWait];

    fn name(self) -> &'static str {
        match self {
            Self::PortBusy => "Port, never waits",
            Self::PortWait => "Port, waits",
            Self::UdpBusy => "UDP socket, never waits",
            Self::UdpWait => "UDP socket, waits",
        }
    }
}

/// Keeps the calling thread on a CPU.
fn stay_on(cpu: usize) -> io::Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu);
    Ok(sched_setaffinity(None, &cpus)?)
}

/// Turns a UDP packet over IPv4 into its own answer. The checksums stay valid: they are sums of the
/// same words.
fn reflect(packet: &mut [u8]) {
    if let Some(headers) = packet.first_chunk_mut::<42>() {
        headers[..12].rotate_left(6);
        headers[26..34].rotate_left(4);
        headers[34..38].rotate_left(2);
    }
}

fn answer_by_port(device: &Device, waits: bool, ready: &Barrier, over: &AtomicBool) -> Result<()> {
    let opened = Port::builder(device).steering(Steering::udp_ports([ECHO])).open();
    ready.wait();
    let mut port = opened?;
    while !over.load(Relaxed) {
        if waits {
            port.wait(Some(LOOK))?;
        }
        port.process(|mut packet| {
            reflect(&mut packet);
            packet
        })?;
    }
    Ok(())
}

fn answer_by_udp(server: &UdpSocket, waits: bool, ready: &Barrier, over: &AtomicBool) -> Result<()> {
    let prepared = if waits { server.set_read_timeout(Some(LOOK)) } else { server.set_nonblocking(true) };
    ready.wait();
    prepared?;
    let mut buffer = [0; 64];
    while !over.load(Relaxed) {
        // What can't be answered is missed by who asked.
        if let Ok((len, from)) = server.recv_from(&mut buffer) {
            let _ = server.send_to(&buffer[..len], from);
        }
    }
    Ok(())
}

/// Asks and waits for the answer, again and again: the round trips, in microseconds.
fn ask(client: &UdpSocket, time: Duration) -> io::Result<Vec<f64>> {
    let mut times = Vec::with_capacity(1 << 17);
    let begin = Instant::now();
    for number in 0u64.. {
        let asked = Instant::now();
        if asked - begin >= time {
            break;
        }
        client.send(&number.to_be_bytes())?;
        let mut answer = [0; 64];
        // An answer that came too late for its question is not this one's.
        while client.recv(&mut answer)? != 8 || answer[..8] != number.to_be_bytes() {}
        if number >= WARM_UP {
            times.push(asked.elapsed().as_secs_f64() * 1e6);
        }
    }
    Ok(times)
}

/// The 50th and the 99th percentile of one run.
fn run(bed: &Testbed, kind: Kind, time: Duration) -> Result<[f64; 2]> {
    let device = Device::open(&bed.a().name)?;
    let client = bed.b().udp(0)?;
    client.connect((bed.a().ipv4, ECHO))?;
    client.set_read_timeout(Some(ANSWER))?;
    let server = match kind {
        Kind::UdpBusy | Kind::UdpWait => Some(bed.a().udp(ECHO)?),
        Kind::PortBusy | Kind::PortWait => None,
    };
    let (ready, over) = (Barrier::new(2), AtomicBool::new(false));
    let mut times = thread::scope(|scope| {
        let answering = scope.spawn(|| {
            let pinned = stay_on(ANSWERS);
            let done = match (kind, &server) {
                (Kind::PortBusy | Kind::PortWait, _) | (_, None) => {
                    answer_by_port(&device, matches!(kind, Kind::PortWait), &ready, &over)
                }
                (_, Some(server)) => answer_by_udp(server, matches!(kind, Kind::UdpWait), &ready, &over),
            };
            pinned.map_err(Into::into).and(done)
        });
        ready.wait();
        let times = ask(&client, time);
        over.store(true, Relaxed);
        let answered = answering.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        answered.and(times.map_err(Into::into))
    })?;
    times.sort_by(f64::total_cmp);
    let at = |percent: usize| {
        times.get(times.len() * percent / 100).copied().ok_or("a run is too short to tell anything")
    };
    Ok([at(50)?, at(99)?])
}

fn measure(runs: usize, time: Duration) -> Result<()> {
    let bed = Testbed::builder().build()?;
    stay_on(ASKS)?;
    let mut figures = [const { (Vec::new(), Vec::new()) }; Kind::ALL.len()];
    for round in 0..runs {
        for turn in 0..Kind::ALL.len() {
            let which = (round + turn) % Kind::ALL.len();
            let [p50, p99] = run(&bed, Kind::ALL[which], time)?;
            figures[which].0.push(p50);
            figures[which].1.push(p99);
        }
    }
    println!("round trips in µs: median of {runs} runs of {time:?} in turns, and quartiles");
    println!("  {:24} {:>6}  {:15} {:>6}", "answered by", "p50", "", "p99");
    for (kind, (p50, p99)) in Kind::ALL.iter().zip(&figures) {
        let (p50, p99) = (quartiles(p50), quartiles(p99));
        println!(
            "  {:24} {:6.1}  {:15} {:6.1}  {}",
            kind.name(),
            p50.mid,
            format!("[{:.1} {:.1}]", p50.low, p50.high),
            p99.mid,
            format_args!("[{:.1} {:.1}]", p99.low, p99.high)
        );
    }
    Ok(())
}

fn settings() -> Option<(usize, Duration)> {
    let (mut runs, mut time) = (11, Duration::from_millis(500));
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let value = arguments.next()?;
        match argument.as_str() {
            "--runs" => runs = value.parse().ok().filter(|n| *n > 0)?,
            "--seconds" => time = value.parse().ok().and_then(|s| Duration::try_from_secs_f64(s).ok())?,
            _ => return None,
        }
    }
    Some((runs, time))
}

fn main() -> ExitCode {
    let Some((runs, time)) = settings() else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    match measure(runs, time) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
