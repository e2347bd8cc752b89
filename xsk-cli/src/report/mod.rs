//! What a sample tells of itself: figures at each interval, what happens to the interface, and a
//! summary, for people or as JSON.

mod text;

use std::io::{self, Write};
use std::time::Duration;

use anstyle::Style;
use serde::Serialize;
use xsk::port::{Counts, Event as Change, Monitor, PortStatistics};
use xsk::umem::Census;
use xsk::xdp::{AttachMode, DefaultProgram};
use xsk::{Port, Umem};

pub(crate) use text::{
    Align, BAD, DIM, GOOD, HEADING, Table, bit_rate, count, packet_rate, queues_in_words, ranges, rate,
};

/// How a program is attached, in one word.
pub(crate) fn attach_name(attach: Option<AttachMode>) -> &'static str {
    match attach {
        Some(AttachMode::Native) => "native",
        Some(AttachMode::Generic) => "generic",
        _ => "none",
    }
}

/// What a port's sockets became, in one word.
fn mode_name(port: &Port) -> &'static str {
    let mut sockets = port.sockets().map(|socket| socket.is_zero_copy());
    match (port.is_zero_copy(), sockets.any(|zero_copy| zero_copy)) {
        (true, _) => "zero-copy",
        (_, true) => "mixed",
        _ => "copy",
    }
}

/// An interface at work.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Side {
    pub(crate) interface: String,
    pub(crate) mode: &'static str,
    pub(crate) attach: &'static str,
    /// The program was there already.
    joined: bool,
    #[serde(skip)]
    queues: Vec<u32>,
    /// Queues that the interface has.
    #[serde(skip)]
    of: u32,
    /// Why the program is not attached natively.
    #[serde(skip)]
    fallback: Option<String>,
}

impl Side {
    /// A port at work on an interface of so many queues, with its program or another.
    fn new(port: &Port, of: u32, program: Option<&DefaultProgram>) -> Self {
        let program = port.program().or(program);
        let fallback = program.and_then(|program| program.attachment().fallback());
        Self {
            interface: port.device().name().into(),
            mode: mode_name(port),
            attach: attach_name(program.map(DefaultProgram::mode)),
            joined: program.is_some_and(DefaultProgram::is_joined),
            queues: port.queues(),
            of,
            fallback: fallback.map(|error| error.cause().to_string()),
        }
    }

    fn place(&self) -> String {
        let queues = queues_in_words(&self.queues);
        if self.queues.len() == self.of as usize { queues } else { format!("{queues} of {}", self.of) }
    }

    fn manner(&self) -> String {
        let program = match (self.attach, self.joined) {
            ("none", _) => "no XDP program".to_owned(),
            (attach, false) => format!("{attach} XDP program"),
            (attach, true) => format!("{attach} XDP program, joined: others use it too"),
        };
        format!("{} mode, {program}", self.mode)
    }
}

/// Which work is done, where and how.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Start {
    pub(crate) command: &'static str,
    pub(crate) kernel: &'static str,
    #[serde(flatten)]
    pub(crate) side: Side,
    /// The other interface of a forwarder.
    #[serde(skip_serializing_if = "Option::is_none")]
    out: Option<Side>,
    threads: usize,
    /// CPUs that they are pinned to.
    #[serde(skip_serializing_if = "Option::is_none")]
    cpus: Option<Vec<u32>>,
}

impl Start {
    /// Work on ports, each with how many queues its interface has; `program` is beside them, if any.
    pub(crate) fn new(
        command: &'static str,
        ports: &[(&Port, u32)],
        program: Option<&DefaultProgram>,
    ) -> Self {
        let mut sides = ports.iter().map(|(port, of)| Side::new(port, *of, program));
        Self {
            command,
            kernel: ports[0].0.device().kernel().name(),
            side: sides.next().expect("there is a port"),
            out: sides.next(),
            threads: 1,
            cpus: None,
        }
    }

    pub(crate) fn in_threads(self, threads: usize, cpus: Option<Vec<u32>>) -> Self {
        Self { threads, cpus, ..self }
    }

    fn sides(&self) -> impl Iterator<Item = &Side> {
        [&self.side].into_iter().chain(&self.out)
    }

    fn receives(&self) -> bool {
        self.command != "txonly"
    }

    fn sends(&self) -> bool {
        self.command != "rxdrop"
    }

    /// `, 2 threads on CPUs 0-1`, where that is worth a word.
    fn threads_in_words(&self) -> String {
        let threads = match self.threads {
            1 => "1 thread".into(),
            n => format!("{n} threads"),
        };
        match &self.cpus {
            Some(cpus) => {
                let s = if cpus.len() == 1 { "" } else { "s" };
                format!(", {threads} on CPU{s} {}", ranges(cpus))
            }
            None if self.threads == 1 && self.sides().all(|side| side.queues.len() == 1) => String::new(),
            None => format!(", {threads}"),
        }
    }

    /// Each queue with its interface.
    fn queues<'a>(&'a self) -> impl Iterator<Item = QueueName<'a>> {
        let names = |side: &'a Side| {
            side.queues.iter().map(|queue| QueueName { interface: &side.interface, queue: *queue })
        };
        self.sides().flat_map(names)
    }
}

#[derive(Clone, Debug, Serialize)]
struct QueueName<'a> {
    interface: &'a str,
    queue: u32,
}

/// What was counted until a moment, on each interface.
#[derive(Clone, Debug)]
pub(crate) struct Reading {
    /// Since the beginning.
    at: Duration,
    sides: Vec<PortStatistics>,
}

impl Reading {
    /// At the beginning: nothing.
    pub(crate) fn begin(monitors: &[Monitor]) -> Self {
        Self { at: Duration::ZERO, sides: vec![PortStatistics::default(); monitors.len()] }
    }

    pub(crate) fn take(at: Duration, monitors: &[Monitor]) -> xsk::Result<Self> {
        let sides = monitors.iter().map(Monitor::statistics).collect::<xsk::Result<_>>()?;
        Ok(Self { at, sides })
    }

    fn since(&self, earlier: &Self) -> Self {
        let sides = self.sides.iter().zip(&earlier.sides).map(|(now, then)| now.since(then)).collect();
        Self { at: self.at - earlier.at, sides }
    }

    pub(crate) fn total(&self) -> Counts {
        let mut total = Counts::default();
        for side in &self.sides {
            total += side.total();
        }
        total
    }

    /// Each queue with its interface, and what was counted there.
    fn queues<'a>(&'a self, start: &'a Start) -> impl Iterator<Item = (&'a Side, u32, &'a Counts)> {
        start.sides().zip(&self.sides).flat_map(|(side, statistics)| {
            statistics.queues().iter().map(move |(queue, counts)| (side, *queue, counts))
        })
    }

    fn figures(&self, start: &Start) -> Vec<QueueFigures> {
        let seconds = self.at.as_secs_f64();
        let figures = |(side, queue, counts): (&Side, u32, &Counts)| QueueFigures {
            interface: side.interface.clone(),
            queue,
            traffic: Traffic::new(counts, seconds),
            losses: Losses::from(counts),
        };
        self.queues(start).map(figures).collect()
    }
}

/// Packets that came or went and were lost, for whichever reason.
fn dropped(counts: &Counts) -> u64 {
    counts.rx_lost() + counts.tx_dropped
}

/// Packets given to the kernel whose frames are not back.
fn unfinished(counts: &Counts) -> u64 {
    counts.tx_packets.saturating_sub(counts.tx_completed)
}

/// Packets and bytes, and the rates that they make. Packets count as sent when their frames are back;
/// bytes already when they are given to the kernel.
#[derive(Clone, Copy, Debug, Serialize)]
struct Traffic {
    rx_packets: u64,
    rx_bytes: u64,
    rx_pps: u64,
    tx_packets: u64,
    tx_bytes: u64,
    tx_pps: u64,
}

impl Traffic {
    fn new(counts: &Counts, seconds: f64) -> Self {
        Self {
            rx_packets: counts.rx_packets,
            rx_bytes: counts.rx_bytes,
            rx_pps: rate(counts.rx_packets, seconds).round() as u64,
            tx_packets: counts.tx_completed,
            tx_bytes: counts.tx_bytes,
            tx_pps: rate(counts.tx_completed, seconds).round() as u64,
        }
    }
}

/// Packets that were lost, by reason. What the kernel doesn't count is left out.
#[derive(Clone, Copy, Debug, Serialize)]
struct Losses {
    #[serde(skip_serializing_if = "Option::is_none")]
    rx_ring_full: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rx_fill_empty: Option<u64>,
    rx_too_long: u64,
    tx_invalid: u64,
    tx_dropped: u64,
}

impl From<&Counts> for Losses {
    fn from(counts: &Counts) -> Self {
        let Counts { rx_ring_full, rx_fill_empty, rx_too_long, tx_invalid, tx_dropped, .. } = *counts;
        Self { rx_ring_full, rx_fill_empty, rx_too_long, tx_invalid, tx_dropped }
    }
}

/// What was counted on a queue.
#[derive(Clone, Debug, Serialize)]
struct QueueFigures {
    interface: String,
    queue: u32,
    #[serde(flatten)]
    traffic: Traffic,
    #[serde(flatten)]
    losses: Losses,
}

/// What was lost or is missing, all in all.
#[derive(Clone, Copy, Debug, Serialize)]
struct Statistics {
    #[serde(flatten)]
    losses: Losses,
    /// Packets in TX, or on their way, when the count was closed.
    tx_unfinished: u64,
    /// Entries that the kernel handed back and that were refused.
    faults: u64,
    census: Frames,
}

/// Where every frame of the UMEM is.
#[derive(Clone, Copy, Debug, Serialize)]
struct Frames {
    total: u32,
    pools: u32,
    depot: u32,
    fill: u32,
    tx: u32,
    rx: u32,
    completion: u32,
    kernel: i64,
    retired: u32,
    program: i64,
}

impl From<Census> for Frames {
    fn from(census: Census) -> Self {
        let Census { total, pools, depot, fill, tx, rx, completion, kernel, retired, program, .. } = census;
        Self { total, pools, depot, fill, tx, rx, completion, kernel, retired, program }
    }
}

/// A reason for which packets are lost: how many of the counts, and what to say.
type Reason = (fn(&Counts) -> u64, &'static str);

const REASONS: [Reason; 6] = [
    (
        |counts| counts.rx_fill_empty.unwrap_or(0),
        "packets dropped: no free frame in FILL (a larger --ring may help)",
    ),
    (
        |counts| if counts.rx_ring_full.is_some() { counts.rx_too_long } else { 0 },
        "packets dropped: longer than a frame",
    ),
    // Kernels before 5.9 have one counter for all.
    (
        |counts| if counts.rx_ring_full.is_none() { counts.rx_too_long } else { 0 },
        "packets dropped: no room for them",
    ),
    (|counts| counts.rx_ring_full.unwrap_or(0), "packets dropped: RX was full (a larger --ring may help)"),
    (|counts| counts.tx_dropped, "sent packets dropped by the driver"),
    (|counts| counts.tx_invalid, "descriptors in TX refused by the kernel"),
];

/// What it came to.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Summary {
    #[serde(flatten)]
    pub(crate) start: Start,
    pub(crate) seconds: f64,
    #[serde(flatten)]
    traffic: Traffic,
    statistics: Statistics,
    queues: Vec<QueueFigures>,
    #[serde(skip)]
    reading: Reading,
}

impl Summary {
    /// Of everything that was counted until the end. The memory's rings are still there.
    pub(crate) fn new(start: Start, reading: Reading, umem: &Umem) -> Self {
        let (seconds, total, census) = (reading.at.as_secs_f64(), reading.total(), umem.census());
        Self {
            seconds,
            traffic: Traffic::new(&total, seconds),
            statistics: Statistics {
                losses: Losses::from(&total),
                tx_unfinished: unfinished(&total),
                faults: census.faults.total(),
                census: census.into(),
            },
            queues: reading.figures(&start),
            start,
            reading,
        }
    }

    /// What was lost, why, and of several queues where.
    fn losses(&self) -> impl Iterator<Item = String> {
        let total = self.reading.total();
        let unfinished: Reason = (unfinished, "packets still on their way when the count was closed");
        let of_queues = REASONS.into_iter().chain([unfinished]).filter_map(move |(of, what)| {
            let n = of(&total);
            let there = self.reading.queues(&self.start).filter(|(_, _, counts)| of(counts) != 0);
            let there: Vec<_> = there
                .map(|(side, queue, counts)| {
                    format!("{}: {}", name(&self.start, side, queue), count(of(counts)))
                })
                .collect();
            let place =
                if self.queues.len() > 1 { format!(" [queue {}]", there.join(", ")) } else { String::new() };
            (n != 0).then(|| format!("{} {what}{place}", count(n)))
        });
        let faults = self.statistics.faults;
        let refused = || {
            format!("{} entries from the kernel refused: they are no frames of this program", count(faults))
        };
        of_queues.chain((faults != 0).then(refused))
    }
}

/// A queue in a table.
fn name(start: &Start, side: &Side, queue: u32) -> String {
    if start.out.is_none() { queue.to_string() } else { format!("{} {queue}", side.interface) }
}

/// An object on a line, with what it is.
#[derive(Debug, Serialize)]
pub(crate) struct Event<T> {
    pub(crate) event: &'static str,
    #[serde(flatten)]
    pub(crate) value: T,
}

/// Writes an object on a line of standard output.
pub(crate) fn json_line(value: &impl Serialize) -> io::Result<()> {
    writeln!(anstream::stdout(), "{}", serde_json::to_string(value)?)
}

/// Writes reports to standard output.
#[derive(Debug)]
pub(crate) struct Report {
    json: bool,
    /// Lines at intervals follow, below a heading.
    intervals: bool,
    start: Start,
    /// Each queue has a line, in a column of this width, and all together another.
    queues: Option<usize>,
}

/// Widths of the columns of interval lines.
const TIME: usize = 9;
const PACKETS: usize = 15;
const RATE: usize = 13;
const DROPPED: usize = 12;

impl Report {
    pub(crate) fn new(start: Start, json: bool, intervals: bool) -> Self {
        let names: Vec<_> = start
            .sides()
            .flat_map(|side| side.queues.iter().map(|queue| name(&start, side, *queue).len()))
            .collect();
        // "queue", "total".
        let width = names.iter().copied().max().unwrap_or(0).max(5) + 2;
        let queues = (names.len() > 1).then_some(width);
        Self { json, intervals, start, queues }
    }

    /// Says what begins, and what stands above the interval lines. `hint` says that there are more
    /// queues.
    pub(crate) fn start(&self, hint: bool) -> io::Result<()> {
        let start = &self.start;
        if self.json {
            #[derive(Serialize)]
            struct Line<'a> {
                #[serde(flatten)]
                start: &'a Start,
                queues: Vec<QueueName<'a>>,
            }
            return json_line(&Event {
                event: "start",
                value: Line { start, queues: start.queues().collect() },
            });
        }
        let Start { command, side, out, .. } = start;
        let threads = start.threads_in_words();
        let mut text = anstream::stdout().lock();
        match out {
            None => {
                let (place, manner) = (side.place(), side.manner());
                let interface = &side.interface;
                writeln!(text, "{HEADING}{command}{HEADING:#} on {interface} {place}{threads}: {manner}")?;
            }
            Some(other) => {
                let (here, there) = (&side.interface, &other.interface);
                writeln!(text, "{HEADING}{command}{HEADING:#} between {here} and {there}{threads}")?;
                let mut table = Table::plain(&[Align::Left; 3]);
                for side in start.sides() {
                    let cells = [format!("  {}", side.interface), side.place(), side.manner()];
                    table.row(cells.map(|cell| (Style::new(), cell)));
                }
                table.write(&mut text)?;
            }
        }
        for side in start.sides() {
            if let Some(why) = &side.fallback {
                writeln!(text, "{DIM}not native on {}: {why}{DIM:#}", side.interface)?;
            }
            if hint && side.queues.len() < side.of as usize {
                let Side { interface, of, .. } = side;
                writeln!(text, "{DIM}{interface} has {of} queues: --queues all takes them all{DIM:#}")?;
            }
        }
        if !self.intervals {
            return text.flush();
        }
        write!(text, "{HEADING}{:>TIME$}", "time")?;
        if let Some(width) = self.queues {
            write!(text, "{:>width$}", "queue")?;
        }
        for (there, name) in [(start.receives(), "received"), (start.sends(), "sent")] {
            if there {
                write!(text, "{name:>PACKETS$}{:>RATE$}{:>RATE$}", "rate", "bit rate")?;
            }
        }
        writeln!(text, "{:>DROPPED$}{HEADING:#}", "dropped")?;
        text.flush()
    }

    /// What happened between two moments.
    pub(crate) fn interval(&self, last: &Reading, now: &Reading) -> io::Result<()> {
        let (start, passed) = (&self.start, now.since(last));
        let (seconds, total) = (passed.at.as_secs_f64(), passed.total());
        if self.json {
            #[derive(Serialize)]
            struct Line<'a> {
                command: &'a str,
                seconds: f64,
                interval: f64,
                #[serde(flatten)]
                traffic: Traffic,
                dropped: u64,
                #[serde(flatten)]
                losses: Losses,
                queues: Vec<QueueFigures>,
            }
            let value = Line {
                command: start.command,
                seconds: now.at.as_secs_f64(),
                interval: seconds,
                traffic: Traffic::new(&total, seconds),
                dropped: dropped(&total),
                losses: Losses::from(&total),
                queues: passed.figures(start),
            };
            return json_line(&Event { event: "interval", value });
        }
        let mut out = anstream::stdout().lock();
        let mut time = format!("{:.1} s", now.at.as_secs_f64());
        if self.queues.is_some() {
            for (side, queue, counts) in passed.queues(start) {
                let time = std::mem::take(&mut time);
                self.line(&mut out, &time, &name(start, side, queue), Style::new(), counts, seconds)?;
            }
            self.line(&mut out, "", "total", HEADING, &total, seconds)?;
        } else {
            self.line(&mut out, &time, "", Style::new(), &total, seconds)?;
        }
        out.flush()
    }

    fn line(
        &self,
        out: &mut impl Write,
        time: &str,
        queue: &str,
        style: Style,
        counts: &Counts,
        seconds: f64,
    ) -> io::Result<()> {
        write!(out, "{style}{time:>TIME$}")?;
        if let Some(width) = self.queues {
            write!(out, "{queue:>width$}")?;
        }
        for (there, packets, bytes) in [
            (self.start.receives(), counts.rx_packets, counts.rx_bytes),
            (self.start.sends(), counts.tx_completed, counts.tx_bytes),
        ] {
            if there {
                let [packets, pps, bps] = cells(packets, bytes, seconds);
                write!(out, "{packets:>PACKETS$}{pps:>RATE$}{bps:>RATE$}")?;
            }
        }
        let lost = dropped(counts);
        let bad = if lost == 0 { style } else { BAD };
        writeln!(out, "{style:#}{bad}{:>DROPPED$}{bad:#}", count(lost))
    }

    /// What happened to an interface of those at work.
    pub(crate) fn change(&self, at: Duration, place: usize, change: &Change) -> io::Result<()> {
        let Some(side) = self.start.sides().nth(place) else { return Ok(()) };
        if self.json {
            #[derive(Serialize)]
            struct Line<'a> {
                command: &'a str,
                seconds: f64,
                interface: &'a str,
                change: &'static str,
                #[serde(skip_serializing_if = "Option::is_none")]
                waited: Option<f64>,
                #[serde(skip_serializing_if = "Option::is_none")]
                was: Option<u32>,
                #[serde(skip_serializing_if = "Option::is_none")]
                now: Option<u32>,
                #[serde(skip_serializing_if = "Option::is_none")]
                taken: Option<&'a [u32]>,
            }
            let (waited, queues) = match change {
                Change::LinkReset { waited } | Change::LinkStillDown { waited } => (Some(waited), None),
                Change::Queues { was, now, taken } => (None, Some((*was, *now, taken))),
                _ => (None, None),
            };
            let value = Line {
                command: self.start.command,
                seconds: at.as_secs_f64(),
                interface: &side.interface,
                change: change_name(change),
                waited: waited.map(Duration::as_secs_f64),
                was: queues.map(|(was, ..)| was),
                now: queues.map(|(_, now, _)| now),
                taken: queues.map(|(.., taken)| taken.as_slice()),
            };
            return json_line(&Event { event: "link", value });
        }
        let good = matches!(change, Change::Up | Change::LinkBack | Change::LinkReset { .. });
        let style = if good { GOOD } else { BAD };
        let text = change_in_words(&side.interface, change);
        let mut out = anstream::stdout().lock();
        writeln!(out, "{:>TIME$}  {style}{text}{style:#}", format!("{:.1} s", at.as_secs_f64()))?;
        out.flush()
    }

    /// What it came to.
    pub(crate) fn summary(&self, summary: &Summary) -> io::Result<()> {
        if self.json {
            return json_line(&Event { event: "summary", value: summary });
        }
        let Summary { start, seconds, reading, .. } = summary;
        let mut out = anstream::stdout().lock();
        writeln!(out, "\n{HEADING}{}{HEADING:#} ran for {seconds:.1} s", start.command)?;
        if self.queues.is_some() {
            self.table(reading).write(&mut out)?;
        } else {
            let total = reading.total();
            let mut table = Table::plain(&[Align::Left, Align::Right, Align::Right, Align::Right]);
            for (there, name, packets, bytes) in [
                (start.receives(), "received", total.rx_packets, total.rx_bytes),
                (start.sends(), "sent", total.tx_completed, total.tx_bytes),
            ] {
                if there {
                    let [packets, pps, bps] = cells(packets, bytes, *seconds);
                    let cells = [format!("  {name}"), format!("{packets} packets"), pps, bps];
                    table.row(cells.map(|cell| (Style::new(), cell)));
                }
            }
            table.write(&mut out)?;
        }
        for loss in summary.losses() {
            writeln!(out, "  {BAD}{loss}{BAD:#}")?;
        }
        out.flush()
    }

    /// Each queue and all together.
    fn table(&self, reading: &Reading) -> Table {
        let start = &self.start;
        let mut columns = vec![("  queue", Align::Left)];
        for (there, name) in [(start.receives(), "received"), (start.sends(), "sent")] {
            if there {
                columns.extend([(name, Align::Right), ("rate", Align::Right), ("bit rate", Align::Right)]);
            }
        }
        columns.push(("dropped", Align::Right));
        let mut table = Table::new(&columns);
        let seconds = reading.at.as_secs_f64();
        let total = reading.total();
        let queues = reading
            .queues(start)
            .map(|(side, queue, counts)| (name(start, side, queue), counts, Style::new()));
        for (name, counts, style) in queues.chain([("total".to_owned(), &total, HEADING)]) {
            let mut row = vec![(style, format!("  {name}"))];
            for (there, packets, bytes) in [
                (start.receives(), counts.rx_packets, counts.rx_bytes),
                (start.sends(), counts.tx_completed, counts.tx_bytes),
            ] {
                if there {
                    row.extend(cells(packets, bytes, seconds).map(|cell| (style, cell)));
                }
            }
            let lost = dropped(counts);
            row.push((if lost == 0 { style } else { BAD }, count(lost)));
            table.row(row);
        }
        table
    }
}

/// Packets, their rate and their bit rate.
fn cells(packets: u64, bytes: u64, seconds: f64) -> [String; 3] {
    [count(packets), packet_rate(rate(packets, seconds)), bit_rate(rate(bytes * 8, seconds))]
}

fn change_name(change: &Change) -> &'static str {
    match change {
        Change::LinkReset { .. } => "link-reset",
        Change::LinkStillDown { .. } => "link-still-down",
        Change::Down => "down",
        Change::Up => "up",
        Change::LinkLost => "link-lost",
        Change::LinkBack => "link-back",
        Change::Queues { .. } => "queues",
        Change::Removed => "removed",
        _ => "other",
    }
}

fn change_in_words(interface: &str, change: &Change) -> String {
    match change {
        Change::LinkReset { waited } => {
            format!(
                "{interface}: its driver reset the link, which was back after {:.1} s",
                waited.as_secs_f64()
            )
        }
        Change::LinkStillDown { waited } => format!(
            "{interface}: its driver reset the link, which is not back after {:.1} s; going on when it is",
            waited.as_secs_f64()
        ),
        Change::Down => {
            format!("{interface} is switched off; going on when it is on: ip link set {interface} up")
        }
        Change::Up => format!("{interface} is switched on again"),
        Change::LinkLost => format!("{interface} has no link; going on when it has"),
        Change::LinkBack => format!("{interface} has its link back"),
        Change::Queues { was, now, taken } if taken.is_empty() => {
            format!("{interface} has {now} queues instead of {was}; those in use stay the same")
        }
        Change::Queues { was, now, taken } => {
            format!("{interface} has {now} queues instead of {was}; now in use as well: {}", ranges(taken))
        }
        Change::Removed => format!("{interface} is gone"),
        other => format!("{interface}: {other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use xsk_sim::Sim;

    use super::*;

    /// A summary of two queues, of which the second got more packets than it has frames.
    fn overrun() -> Summary {
        let sim = Sim::builder().queues(2).build().unwrap();
        let port = Port::builder(&sim.device("sim0").unwrap()).ring_size(16).open().unwrap();
        for _ in 0..20 {
            sim.inject_on("sim0", 1, &[0; 60]).unwrap();
        }
        sim.run();
        let start = Start::new("rxdrop", &[(&port, 2)], None);
        let reading = Reading::take(Duration::from_secs(1), &[port.monitor()]).unwrap();
        Summary::new(start, reading, port.umem())
    }

    #[test]
    fn a_loss_is_told_with_its_queue() {
        let losses: Vec<_> = overrun().losses().collect();
        let [loss] = &losses[..] else { panic!("{losses:?}") };
        assert!(loss.starts_with("4 packets dropped: ") && loss.ends_with(" [queue 1: 4]"), "{loss}");
    }

    #[test]
    fn each_queue_has_a_row_and_what_was_lost_is_red() {
        let summary = overrun();
        let report = Report::new(summary.start.clone(), false, true);
        let mut out = Vec::new();
        report.table(&summary.reading).write(&mut out).unwrap();
        let coloured = String::from_utf8(out).unwrap();
        assert_eq!(coloured.matches(&format!("{BAD}4{BAD:#}")).count(), 2, "{coloured}");
        let mut plain = anstream::StripStream::new(Vec::new());
        write!(plain, "{coloured}").unwrap();
        assert_eq!(
            String::from_utf8(plain.into_inner()).unwrap(),
            "  queue  received   rate  bit rate  dropped\n\
             \x20 0             0  0 pps   0 bit/s        0\n\
             \x20 1             0  0 pps   0 bit/s        4\n\
             \x20 total         0  0 pps   0 bit/s        4\n"
        );
    }

    #[test]
    fn changes_are_told_with_what_follows() {
        let queues = |taken: &[u32]| Change::Queues { was: 2, now: 4, taken: taken.into() };
        for (change, name, words) in [
            (Change::Down, "down", "ip link set eth1 up"),
            (Change::Removed, "removed", "eth1 is gone"),
            (Change::LinkReset { waited: Duration::from_millis(2100) }, "link-reset", "after 2.1 s"),
            (queues(&[]), "queues", "4 queues instead of 2; those in use stay the same"),
            (queues(&[2, 3]), "queues", "now in use as well: 2-3"),
        ] {
            assert_eq!(change_name(&change), name);
            assert!(change_in_words("eth1", &change).contains(words), "{change:?}");
        }
    }
}
