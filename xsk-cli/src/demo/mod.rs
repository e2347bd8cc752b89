//! `xsk demo`: everything at work, on devices of its own.
//!
//! With privileges the parts run on the real kernel, on a veth pair in private network namespaces;
//! without, on the simulated kernel. Neither leaves anything behind, however it ends: namespaces,
//! devices and programs are held by this process alone.

mod linux;
mod sim;

use std::io::{self, Write};
use std::thread;
use std::time::{Duration, Instant};

use anstyle::Style;
use indicatif::ProgressBar;
use serde::Serialize;
use xsk::umem::{Census, Pool};
use xsk::{Device, Port, Umem};

use crate::cli;
use crate::failure::Failure;
use crate::report::{
    Align, BAD, DIM, Event, GOOD, HEADING, Reading, Start, Summary, Table, count, json_line, packet_rate,
    rate,
};
use crate::sample::{DRAIN, l2fwd, rxdrop, txonly};

/// Frames of each part's UMEM.
const FRAMES: u32 = 4096;
/// Bytes of a frame.
const CHUNK: u32 = 2048;
/// Packets that are sent at a time.
const BATCH: u32 = 64;
/// Whoever has nothing to do sleeps: the demo is to come out right on a machine of one processor, and on a
/// busy one, where spinning would keep the other side from its work.
const POLL: bool = true;
/// Bytes of the packets that are received, sent and forwarded.
const PACKET: usize = 64;
/// How long the kernel may take to come to rest when a part is over.
const REST: Duration = Duration::from_secs(2);

/// Where the parts run.
trait Stage {
    fn rxdrop(&self, time: Duration) -> Result<Part, Failure>;
    fn txonly(&self, time: Duration) -> Result<Part, Failure>;
    fn l2fwd(&self, time: Duration) -> Result<Part, Failure>;
    fn latency(&self, time: Duration) -> Result<Part, Failure>;
}

/// One of a stage's acts.
type Act = fn(&dyn Stage, Duration) -> Result<Part, Failure>;

/// The parts, and what is being done meanwhile.
const PARTS: [(&str, Act); 4] = [
    ("receiving", |stage, time| stage.rxdrop(time)),
    ("sending", |stage, time| stage.txonly(time)),
    ("forwarding", |stage, time| stage.l2fwd(time)),
    ("measuring round trips", |stage, time| stage.latency(time)),
];

/// What came of a part.
#[derive(Debug, Serialize)]
struct Part {
    #[serde(flatten)]
    summary: Summary,
    ok: bool,
    result: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    latency: Option<Latency>,
    /// Received, or sent where none are received.
    #[serde(skip)]
    packets: u64,
}

/// A loop that is over, its rings at rest.
struct Done {
    summary: Summary,
    received: u64,
    sent: u64,
    /// What is wrong with where the frames are, if anything.
    misplaced: Option<String>,
}

impl Done {
    /// What came of a loop that worked for so long. Nothing is on its way any more.
    fn new(command: &'static str, port: &mut Port, time: Duration) -> Result<Self, Failure> {
        port.drain(DRAIN)?;
        let start = Start::new(command, &[(port, port.device().queues()?)], None);
        let misplaced = misplaced(&at_rest(port.umem()));
        let reading = Reading::take(time, &[port.monitor()])?;
        let total = reading.total();
        let summary = Summary::new(start, reading, port.umem());
        Ok(Self { summary, received: total.rx_packets, sent: total.tx_completed, misplaced })
    }

    /// A part with this result, if no frame is missing.
    fn into_part(self, result: (bool, String)) -> Part {
        let Self { summary, received, sent, misplaced } = self;
        let (ok, result) = misplaced.map_or(result, |misplaced| (false, misplaced));
        Part { summary, ok, result, latency: None, packets: received.max(sent) }
    }

    fn into_latency(self, af_xdp: RoundTrips, udp: Option<RoundTrips>) -> Part {
        let mut part = self.into_part((af_xdp.count != 0, af_xdp.in_words()));
        part.latency = Some(Latency { af_xdp, udp });
        part
    }
}

/// Receives and drops for as long as `go_on` says, which is told how many packets there were.
fn receive(device: &Device, mut go_on: impl FnMut(u64) -> bool) -> Result<Done, Failure> {
    let (umem, _) = umem()?;
    let mut port = Port::builder(device).umem(&umem).open()?;
    let begin = Instant::now();
    rxdrop::run(&mut port, POLL, |_, received| go_on(received))?;
    Done::new("rxdrop", &mut port, begin.elapsed())
}

/// Sends `packet` for as long as `go_on` says, which is told how many were given to the kernel.
fn send(device: &Device, packet: &[u8], mut go_on: impl FnMut(u64) -> bool) -> Result<Done, Failure> {
    let (umem, mut pool) = umem()?;
    txonly::prepare(&mut pool, packet);
    drop(pool);
    let mut port = Port::builder(device).umem(&umem).send_only().open()?;
    let work = txonly::Work { len: packet.len() as u32, count: None, batch: BATCH };
    let begin = Instant::now();
    txonly::run(&mut port, POLL, work, |_, given| go_on(given))?;
    Done::new("txonly", &mut port, begin.elapsed())
}

/// Sends back what arrives, changed by `rewrite`, for as long as `go_on` says, which is told how many
/// packets there were.
fn forward(
    device: &Device,
    command: &'static str,
    rewrite: impl FnMut(&mut [u8]),
    mut go_on: impl FnMut(u64) -> bool,
) -> Result<Done, Failure> {
    let (umem, _) = umem()?;
    let mut port = Port::builder(device).umem(&umem).open()?;
    let begin = Instant::now();
    l2fwd::run(&mut port, POLL, rewrite, |_, forwarded| go_on(forwarded))?;
    Done::new(command, &mut port, begin.elapsed())
}

/// Round-trip times, seen by the peer's UDP socket.
#[derive(Clone, Copy, Debug, Serialize)]
struct Latency {
    /// The answers come from an AF_XDP socket.
    af_xdp: RoundTrips,
    /// The answers come from a UDP socket; absent where there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    udp: Option<RoundTrips>,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct RoundTrips {
    count: u64,
    p50_us: f64,
    p99_us: f64,
}

impl RoundTrips {
    fn new(mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        let at = |percent: usize| {
            let time = times.get((times.len() * percent / 100).min(times.len().saturating_sub(1)));
            time.map_or(0.0, |time| (time.as_secs_f64() * 1e8).round() / 100.0)
        };
        Self { count: times.len() as u64, p50_us: at(50), p99_us: at(99) }
    }

    fn in_words(&self) -> String {
        format!("half within {:.1} µs, 99 % within {:.1} µs", self.p50_us, self.p99_us)
    }
}

/// `xsk demo`.
pub(crate) fn run(args: &cli::Demo) -> Result<(), Failure> {
    let stage = match xsk_testbed::available() {
        Ok(()) => linux::Veth::new().map_err(|error| error.to_string()),
        Err(missing) => Err(missing),
    };
    let (stage, place): (Box<dyn Stage>, _) = match stage {
        Ok(veth) => {
            let place = format!(
                "Linux {}, on a private veth pair. Zero copy needs a NIC; here the kernel copies.",
                rustix::system::uname().release().to_string_lossy()
            );
            (Box::new(veth), place)
        }
        Err(why) => {
            let place =
                format!("The simulated kernel, not Linux: the real one {why}. Its rates are not Linux's.");
            (Box::new(sim::Wire::default()), place)
        }
    };
    if !args.json {
        writeln!(anstream::stdout(), "{HEADING}AF_XDP at work{HEADING:#}\n{place}\n")?;
    }
    let mut parts = Vec::new();
    for (doing, part) in PARTS {
        let spinner = if args.json { ProgressBar::hidden() } else { ProgressBar::new_spinner() };
        spinner.set_message(doing);
        spinner.enable_steady_tick(Duration::from_millis(100));
        let part = part(&*stage, args.duration);
        spinner.finish_and_clear();
        let part = part?;
        if args.json {
            json_line(&Event { event: "summary", value: &part })?;
        }
        parts.push(part);
    }
    if !args.json {
        print(&parts)?;
    }
    if parts.iter().all(|part| part.ok) {
        return Ok(());
    }
    let bad: Vec<_> = parts.iter().filter(|part| !part.ok).map(|part| part.summary.start.command).collect();
    Err(Failure::new(
        "the demo did not come out right",
        format!("see the result of: {}", bad.join(", ")),
        "On devices of its own nothing should be lost.",
        "run it again while the machine is less busy; if it stays so, please report it".into(),
    ))
}

fn print(parts: &[Part]) -> io::Result<()> {
    let mut table = Table::new(&[
        ("part", Align::Left),
        ("mode", Align::Left),
        ("attach", Align::Left),
        ("packets", Align::Right),
        ("rate", Align::Right),
        ("result", Align::Left),
    ]);
    let plain = |text: &str| (Style::new(), text.to_owned());
    for part in parts {
        let Start { command, side, .. } = &part.summary.start;
        let style = if part.ok { GOOD } else { BAD };
        let (packets, pps) = match part.latency {
            Some(latency) => (latency.af_xdp.count, String::new()),
            None => (part.packets, packet_rate(rate(part.packets, part.summary.seconds))),
        };
        table.row([
            plain(command),
            plain(side.mode),
            plain(side.attach),
            plain(&count(packets)),
            plain(&pps),
            (style, part.result.clone()),
        ]);
        if let Some(udp) = part.latency.and_then(|latency| latency.udp) {
            let cells = ["", "UDP socket", "", &count(udp.count), "", &udp.in_words()].map(plain);
            table.row(cells);
        }
    }
    let mut out = anstream::stdout().lock();
    table.write(&mut out)?;
    if parts.iter().all(|part| part.ok) {
        let frames = parts.len() as u64 * u64::from(FRAMES);
        writeln!(out, "\n{GOOD}Every one of {} frames is accounted for.{GOOD:#}", count(frames))?;
        writeln!(out, "{DIM}Next: xsk info shows what this machine's interfaces can do.{DIM:#}")?;
    }
    out.flush()
}

/// A UMEM as all parts use it.
fn umem() -> Result<(Umem, Pool), Failure> {
    Ok(Umem::builder().frames(FRAMES).chunk_size(CHUNK).build()?)
}

/// A loop's `go_on` that ends at a time.
fn until(deadline: Instant) -> impl FnMut(u64) -> bool {
    move |_| Instant::now() < deadline
}

/// A census with nothing in the kernel's hands between two rings, or the last one before giving up.
fn at_rest(umem: &Umem) -> Census {
    let deadline = Instant::now() + REST;
    loop {
        let census = umem.census();
        if census.kernel == 0 || Instant::now() > deadline {
            return census;
        }
        thread::yield_now();
    }
}

/// What is wrong with a census that was taken at rest, if anything.
fn misplaced(census: &Census) -> Option<String> {
    let rings = census.fill + census.tx + census.rx + census.completion;
    let known = census.pools + census.depot + census.retired + rings;
    census.contradiction().or_else(|| {
        let faults = census.faults.total();
        (known != census.total || faults != 0)
            .then(|| format!("{known} of {} frames accounted for, {faults} entries refused", census.total))
    })
}

/// The result of a part in which all `sent` packets should have `arrived`.
fn all_arrived(sent: u64, arrived: u64, done: &str) -> (bool, String) {
    if sent == arrived && sent != 0 {
        (true, format!("every packet {done}"))
    } else {
        (false, format!("{} of {} packets {done}", count(arrived), count(sent)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_of_round_trips() {
        let times = (1..=1000).rev().map(Duration::from_micros).collect();
        let RoundTrips { count, p50_us, p99_us } = RoundTrips::new(times);
        assert_eq!((count, p50_us, p99_us), (1000, 501.0, 991.0));
        assert_eq!(RoundTrips::new(Vec::new()).p99_us, 0.0);
    }

    #[test]
    fn all_parts_come_out_right_on_the_simulated_kernel() {
        let stage = sim::Wire::default();
        let time = Duration::from_millis(50);
        for part in [stage.rxdrop(time), stage.txonly(time), stage.l2fwd(time), stage.latency(time)] {
            let part = part.unwrap();
            assert!(part.ok, "{}: {}", part.summary.start.command, part.result);
            assert_eq!(part.summary.start.kernel, "sim");
        }
    }
}
