//! Numbers, rates and tables for people to read.

use std::io::{self, Write};

use anstyle::{AnsiColor, Style};

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

/// Numbers as ranges: `0-3,7`.
pub(crate) fn ranges(numbers: &[u32]) -> String {
    let mut text = String::new();
    let mut rest = numbers;
    while let [first, ..] = rest {
        let run = rest.iter().zip(u64::from(*first)..).take_while(|(it, n)| u64::from(**it) == *n).count();
        if !text.is_empty() {
            text.push(',');
        }
        text += &first.to_string();
        if run > 1 {
            text += &format!("-{}", rest[run - 1]);
        }
        rest = &rest[run..];
    }
    text
}

/// `queue 2`, `queues 0-3`.
pub(crate) fn queues_in_words(queues: &[u32]) -> String {
    format!("{} {}", if queues.len() == 1 { "queue" } else { "queues" }, ranges(queues))
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
    fn numbers_are_told_as_ranges() {
        for (numbers, text) in [
            (&[][..], ""),
            (&[3], "3"),
            (&[0, 1], "0-1"),
            (&[0, 1, 2, 5, 7, 8], "0-2,5,7-8"),
            (&[u32::MAX - 1, u32::MAX], "4294967294-4294967295"),
        ] {
            assert_eq!(ranges(numbers), text);
        }
        assert_eq!(
            (queues_in_words(&[2]), queues_in_words(&[0, 1])),
            ("queue 2".into(), "queues 0-1".into())
        );
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
