//! What a sample tells of itself: a line at each interval and a summary, for people or as JSON.

use std::io::{self, Write};
use std::time::Duration;

use anstyle::{AnsiColor, Style};
use serde::Serialize;
use xsk::umem::Census;
use xsk::xdp::AttachMode;
use xsk::{Mode, Socket, Umem, socket};

use crate::sample::Counts;

/// Style of headings.
pub(crate) const HEADING: Style = Style::new().bold();
/// Style of what is good.
pub(crate) const GOOD: Style = AnsiColor::Green.on_default();
/// Style of what is not as it should be.
pub(crate) const BAD: Style = AnsiColor::Red.on_default();
/// Style of remarks.
pub(crate) const DIM: Style = Style::new().dimmed();

/// A number with its thousands apart: `1,234,567`.
pub(crate) fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i != 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Packets a second: `1.234 Mpps`.
pub(crate) fn packet_rate(pps: f64) -> String {
    match pps {
        1e9.. => format!("{:.3} Gpps", pps / 1e9),
        1e6.. => format!("{:.3} Mpps", pps / 1e6),
        1e3.. => format!("{:.1} kpps", pps / 1e3),
        _ => format!("{pps:.0} pps"),
    }
}

/// Bits a second: `0.83 Gbit/s`.
pub(crate) fn bit_rate(bps: f64) -> String {
    match bps {
        1e8.. => format!("{:.2} Gbit/s", bps / 1e9),
        1e5.. => format!("{:.2} Mbit/s", bps / 1e6),
        1e3.. => format!("{:.1} kbit/s", bps / 1e3),
        _ => format!("{bps:.0} bit/s"),
    }
}

/// Events per second; 0 where no time has passed.
pub(crate) fn rate(n: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { n as f64 / seconds } else { 0.0 }
}

/// Which way a column is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Align {
    Left,
    Right,
}

/// A table whose columns line up.
#[derive(Debug)]
pub(crate) struct Table {
    align: Vec<Align>,
    rows: Vec<Vec<(Style, String)>>,
}

impl Table {
    pub(crate) fn new(columns: &[(&str, Align)]) -> Self {
        let heading = columns.iter().map(|(name, _)| (HEADING, (*name).to_owned())).collect();
        Self { align: columns.iter().map(|(_, align)| *align).collect(), rows: vec![heading] }
    }

    /// A table without a heading.
    pub(crate) fn plain(align: &[Align]) -> Self {
        Self { align: align.to_vec(), rows: Vec::new() }
    }

    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = (Style, String)>) {
        self.rows.push(cells.into_iter().collect());
    }

    pub(crate) fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|(_, text)| text.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<_> = (0..self.align.len()).map(width).collect();
        for row in &self.rows {
            for (column, (style, text)) in row.iter().enumerate() {
                let padding = " ".repeat(widths[column] - text.chars().count());
                let gap = if column == 0 { "" } else { "  " };
                match self.align[column] {
                    Align::Right => write!(out, "{gap}{padding}{style}{text}{style:#}")?,
                    // Nothing trails a line.
                    Align::Left if column + 1 == row.len() => write!(out, "{gap}{style}{text}{style:#}")?,
                    Align::Left => write!(out, "{gap}{style}{text}{style:#}{padding}")?,
                }
            }
            writeln!(out)?;
        }
        Ok(())
    }
}

/// How a program is attached, in one word.
pub(crate) fn attach_name(attach: Option<AttachMode>) -> &'static str {
    match attach {
        Some(AttachMode::Native) => "native",
        Some(AttachMode::Generic) => "generic",
        _ => "none",
    }
}

/// What a socket became, in one word.
pub(crate) fn mode_name(socket: &Socket) -> &'static str {
    if socket.mode() == Mode::ZeroCopy { "zero-copy" } else { "copy" }
}

/// Which work is done, where and how.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Start {
    pub(crate) command: &'static str,
    pub(crate) kernel: &'static str,
    pub(crate) interface: String,
    pub(crate) queues: Vec<u32>,
    pub(crate) mode: &'static str,
    pub(crate) attach: &'static str,
}

impl Start {
    pub(crate) fn new(command: &'static str, socket: &Socket, attach: Option<AttachMode>) -> Self {
        Self {
            command,
            kernel: socket.device().kernel().name(),
            interface: socket.device().name().into(),
            queues: vec![socket.queue()],
            mode: mode_name(socket),
            attach: attach_name(attach),
        }
    }

    fn receives(&self) -> bool {
        self.command != "txonly"
    }

    fn sends(&self) -> bool {
        self.command != "rxdrop"
    }
}

/// The counts at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Interval {
    /// Since the beginning.
    at: Duration,
    counts: Counts,
    dropped: u64,
}

impl Interval {
    pub(crate) fn at(at: Duration, counts: Counts, statistics: socket::Statistics) -> Self {
        let dropped = statistics.rx_dropped + statistics.rx_ring_full.unwrap_or(0) + counts.tx_dropped;
        Self { at, counts, dropped }
    }
}

/// Packets and bytes, and the rates that they make.
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
            tx_packets: counts.tx_packets,
            tx_bytes: counts.tx_bytes,
            tx_pps: rate(counts.tx_packets, seconds).round() as u64,
        }
    }
}

/// The counters of a socket and its UMEM. What the kernel doesn't count is left out.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Statistics {
    rx_dropped: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    rx_ring_full: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rx_fill_ring_empty: Option<u64>,
    tx_invalid: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    tx_ring_empty: Option<u64>,
    /// Completed packets that the driver dropped.
    tx_dropped: u64,
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

impl Statistics {
    pub(crate) fn new(socket: socket::Statistics, counts: &Counts, umem: &Umem) -> Self {
        let census = umem.census();
        Self {
            rx_dropped: socket.rx_dropped,
            rx_ring_full: socket.rx_ring_full,
            rx_fill_ring_empty: socket.rx_fill_ring_empty,
            tx_invalid: socket.tx_invalid,
            tx_ring_empty: socket.tx_ring_empty,
            tx_dropped: counts.tx_dropped,
            tx_unfinished: counts.tx_unfinished,
            faults: census.faults.total(),
            census: census.into(),
        }
    }

    /// What was lost, and why.
    fn losses(&self) -> impl Iterator<Item = (u64, &'static str)> {
        let empty = self.rx_fill_ring_empty.unwrap_or(0).min(self.rx_dropped);
        let long = match self.rx_fill_ring_empty {
            Some(_) => "packets dropped: longer than a frame",
            None => "packets dropped: no room for them",
        };
        [
            (
                empty,
                "packets dropped: no free frame in FILL (a larger --ring, with as many --frames, may help)",
            ),
            (self.rx_dropped - empty, long),
            (self.rx_ring_full.unwrap_or(0), "packets dropped: RX was full (a larger --ring may help)"),
            (self.tx_dropped, "sent packets dropped by the driver"),
            (self.tx_invalid, "descriptors in TX refused by the kernel"),
            (self.tx_unfinished, "packets still on their way when the count was closed"),
            (self.faults, "entries from the kernel refused: they are no frames of this program"),
        ]
        .into_iter()
        .filter(|(n, _)| *n != 0)
    }
}

/// What it came to.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Summary {
    #[serde(flatten)]
    pub(crate) start: Start,
    pub(crate) seconds: f64,
    #[serde(flatten)]
    traffic: Traffic,
    pub(crate) statistics: Statistics,
}

impl Summary {
    pub(crate) fn new(start: Start, seconds: f64, counts: &Counts, statistics: Statistics) -> Self {
        Self { start, seconds, traffic: Traffic::new(counts, seconds), statistics }
    }
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
}

/// Widths of the columns of interval lines.
const TIME: usize = 9;
const PACKETS: usize = 15;
const RATE: usize = 13;
const DROPPED: usize = 12;

impl Report {
    pub(crate) fn new(json: bool, intervals: bool) -> Self {
        Self { json, intervals }
    }

    /// Says what begins, and what stands above the interval lines.
    pub(crate) fn start(&self, start: &Start, fallback: Option<&xsk::Error>) -> io::Result<()> {
        if self.json {
            return json_line(&Event { event: "start", value: start });
        }
        let Start { command, interface, mode, attach, .. } = start;
        let queue = start.queues.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        let mut out = anstream::stdout().lock();
        let program = match *attach {
            "none" => "no XDP program".into(),
            attach => format!("{attach} XDP program"),
        };
        writeln!(out, "{HEADING}{command}{HEADING:#} on {interface} queue {queue}: {mode} mode, {program}")?;
        if let Some(error) = fallback {
            writeln!(out, "{DIM}not native: {}{DIM:#}", error.cause())?;
        }
        if !self.intervals {
            return out.flush();
        }
        write!(out, "{HEADING}{:>TIME$}", "time")?;
        for (there, name) in [(start.receives(), "received"), (start.sends(), "sent")] {
            if there {
                write!(out, "{name:>PACKETS$}{:>RATE$}{:>RATE$}", "rate", "bit rate")?;
            }
        }
        writeln!(out, "{:>DROPPED$}{HEADING:#}", "dropped")?;
        out.flush()
    }

    /// What happened between two moments.
    pub(crate) fn interval(&self, start: &Start, last: &Interval, now: &Interval) -> io::Result<()> {
        let seconds = (now.at - last.at).as_secs_f64();
        let counts = Counts {
            rx_packets: now.counts.rx_packets - last.counts.rx_packets,
            rx_bytes: now.counts.rx_bytes - last.counts.rx_bytes,
            tx_packets: now.counts.tx_packets - last.counts.tx_packets,
            tx_bytes: now.counts.tx_bytes - last.counts.tx_bytes,
            ..Counts::default()
        };
        let dropped = now.dropped - last.dropped;
        if self.json {
            #[derive(Serialize)]
            struct Line<'a> {
                command: &'a str,
                seconds: f64,
                interval: f64,
                #[serde(flatten)]
                traffic: Traffic,
                dropped: u64,
            }
            let value = Line {
                command: start.command,
                seconds: now.at.as_secs_f64(),
                interval: seconds,
                traffic: Traffic::new(&counts, seconds),
                dropped,
            };
            return json_line(&Event { event: "interval", value });
        }
        let mut out = anstream::stdout().lock();
        write!(out, "{:>TIME$}", format!("{:.1} s", now.at.as_secs_f64()))?;
        for (there, packets, bytes) in [
            (start.receives(), counts.rx_packets, counts.rx_bytes),
            (start.sends(), counts.tx_packets, counts.tx_bytes),
        ] {
            if there {
                let (pps, bps) = (rate(packets, seconds), rate(bytes * 8, seconds));
                write!(
                    out,
                    "{:>PACKETS$}{:>RATE$}{:>RATE$}",
                    count(packets),
                    packet_rate(pps),
                    bit_rate(bps)
                )?;
            }
        }
        let style = if dropped == 0 { Style::new() } else { BAD };
        writeln!(out, "{style}{:>DROPPED$}{style:#}", count(dropped))?;
        out.flush()
    }

    /// What it came to.
    pub(crate) fn summary(&self, summary: &Summary) -> io::Result<()> {
        if self.json {
            return json_line(&Event { event: "summary", value: summary });
        }
        let Summary { start, seconds, traffic, statistics } = summary;
        let mut out = anstream::stdout().lock();
        writeln!(out, "\n{HEADING}{}{HEADING:#} ran for {seconds:.1} s", start.command)?;
        let mut table = Table::plain(&[Align::Left, Align::Right, Align::Right, Align::Right]);
        for (there, name, packets, bytes) in [
            (start.receives(), "received", traffic.rx_packets, traffic.rx_bytes),
            (start.sends(), "sent", traffic.tx_packets, traffic.tx_bytes),
        ] {
            if there {
                table.row(
                    [
                        format!("  {name}"),
                        format!("{} packets", count(packets)),
                        packet_rate(rate(packets, *seconds)),
                        bit_rate(rate(bytes * 8, *seconds)),
                    ]
                    .map(|cell| (Style::new(), cell)),
                );
            }
        }
        table.write(&mut out)?;
        for (n, what) in statistics.losses() {
            writeln!(out, "  {BAD}{} {what}{BAD:#}", count(n))?;
        }
        out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_their_thousands_apart() {
        for (n, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (1234567, "1,234,567")] {
            assert_eq!(count(n), text);
        }
    }

    #[test]
    fn rates_have_the_unit_that_reads_well() {
        for (pps, text) in
            [(0.0, "0 pps"), (999.4, "999 pps"), (12_345.0, "12.3 kpps"), (1_234_000.0, "1.234 Mpps")]
        {
            assert_eq!(packet_rate(pps), text);
        }
        for (bps, text) in
            [(480.0, "480 bit/s"), (64_000.0, "64.0 kbit/s"), (2.5e6, "2.50 Mbit/s"), (8.3e8, "0.83 Gbit/s")]
        {
            assert_eq!(bit_rate(bps), text);
        }
        assert_eq!(rate(5, 0.0), 0.0);
    }

    #[test]
    fn columns_line_up_and_nothing_trails() {
        let mut table =
            Table::new(&[("part", Align::Left), ("packets", Align::Right), ("result", Align::Left)]);
        for (part, packets, result) in [("rxdrop", "1,000", "ok"), ("tx", "20", "lost")] {
            table.row([part, packets, result].map(|cell| (Style::new(), cell.to_owned())));
        }
        let mut out = anstream::StripStream::new(Vec::new());
        table.write(&mut out).unwrap();
        let text = String::from_utf8(out.into_inner()).unwrap();
        assert_eq!(text, "part    packets  result\nrxdrop    1,000  ok\ntx           20  lost\n");
    }
}
