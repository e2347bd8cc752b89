//! The command line: what `xsk` takes, and what its help says.
//!
//! Help, shell completions and man pages all come from these definitions.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::Styles;
use clap::builder::styling::AnsiColor;
use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Yellow.on_default().bold())
    .usage(AnsiColor::Yellow.on_default().bold())
    .literal(AnsiColor::Green.on_default())
    .placeholder(AnsiColor::Cyan.on_default());

const EXAMPLES: &str = "\
Examples:
  xsk demo                                  see it work, on devices of its own
  xsk info eth1                             what an interface can do
  xsk rxdrop -i eth1 -q 2                   count and drop what arrives on queue 2
  xsk rxdrop -i eth1 -q all --cpus 2-5      on all queues, in up to four threads on CPUs of their own
  xsk txonly -i eth1 -s 1400 -C 1000000     send a million packets
  xsk l2fwd -i eth1 -d 10 --json            send back what arrives, for 10 seconds
  xsk l2fwd -i eth1 -o eth2                 forward between two interfaces, both ways

Exit status: 0 when all went well (also after Ctrl-C), 1 when something failed, 2 when the command
line is wrong.";

/// Receive, send and forward packets with AF_XDP
///
/// AF_XDP sockets move raw packets between a network interface and a program through shared
/// memory, past the kernel's network stack. `xsk demo` shows what that is like; `rxdrop`, `txonly`
/// and `l2fwd` are the classic sample programs; `info` tells what a machine can do.
#[derive(Debug, Parser)]
#[command(name = "xsk", version, styles = STYLES, after_long_help = EXAMPLES, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Demo(Demo),
    Rxdrop(Rxdrop),
    Txonly(Txonly),
    L2fwd(L2fwd),
    Info(Info),
    Completions(Completions),
    Man(Man),
}

impl Command {
    /// Whether output, and errors with it, are to be JSON.
    pub(crate) fn json(&self) -> bool {
        match self {
            Self::Demo(args) => args.json,
            Self::Rxdrop(args) => args.output.json,
            Self::Txonly(args) => args.output.json,
            Self::L2fwd(args) => args.output.json,
            Self::Info(args) => args.json,
            Self::Completions(_) | Self::Man(_) => false,
        }
    }
}

/// Show AF_XDP at work, on devices of its own
///
/// Makes a private pair of virtual devices, receives, sends and forwards on it at full speed with
/// the real kernel, measures the round-trip time beside that of a UDP socket, and leaves nothing
/// behind. It takes about ten seconds and needs root; without root it runs on a simulated kernel.
#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// Seconds that each part takes
    #[arg(short, long, value_name = "SECONDS", value_parser = positive_seconds, default_value = "1")]
    pub(crate) duration: Duration,

    /// Print one JSON object a part instead of a table
    #[arg(long, help_heading = "Output")]
    pub(crate) json: bool,
}

/// Receive packets and drop them
///
/// Takes what arrives on queues of an interface, counts it and gives its memory back. The network
/// stack doesn't see these packets. An XDP program that sends them here is attached for as long as
/// the command runs; several commands on one interface share it, each with queues of its own.
#[derive(Debug, Args)]
pub(crate) struct Rxdrop {
    #[command(flatten)]
    pub(crate) interface: Interface,
    #[command(flatten)]
    pub(crate) queues: Queues,
    #[command(flatten)]
    pub(crate) attach: Attach,
    #[command(flatten)]
    pub(crate) threads: Threads,
    #[command(flatten)]
    pub(crate) rings: Rings,
    #[command(flatten)]
    pub(crate) output: Output,
}

/// Send UDP packets as fast as the interface takes them
///
/// All packets are the same one, with valid checksums. Several queues share the work evenly. No XDP
/// program is attached, so receiving goes on as before.
#[derive(Debug, Args)]
pub(crate) struct Txonly {
    #[command(flatten)]
    pub(crate) interface: Interface,
    #[command(flatten)]
    pub(crate) queues: Queues,
    /// Attach an XDP program that lets everything pass: igb, ixgbe, i40e and ice send in zero copy
    /// only beside one
    #[arg(long, help_heading = "Interface")]
    pub(crate) attach: bool,
    #[command(flatten)]
    pub(crate) threads: Threads,
    #[command(flatten)]
    pub(crate) rings: Rings,
    #[command(flatten)]
    pub(crate) packets: Packets,
    #[command(flatten)]
    pub(crate) output: Output,
}

/// Send every packet back out where it came in, or forward between two interfaces
///
/// With one interface, every packet goes back out of the queue where it arrived, its source and
/// destination MAC address swapped. With --out, what arrives at either interface leaves by the
/// other, byte for byte as it came unless --dst-mac says otherwise; the packets of a queue keep
/// their order. Packets are sent from the memory that they arrived in.
///
/// The network stack doesn't see these packets. An XDP program that sends them here is attached to
/// each interface for as long as the command runs. A NIC takes in only what is addressed to it, so
/// forwarding for others needs promiscuous mode: ip link set IF promisc on.
#[derive(Debug, Args)]
pub(crate) struct L2fwd {
    #[command(flatten)]
    pub(crate) interface: Interface,

    /// Forward to this interface, and from it back to --interface
    #[arg(short, long, value_name = "IF", help_heading = "Interface", display_order = 0)]
    pub(crate) out: Option<String>,

    /// Queues to use of each interface: 2, 0-3, 0,2-4 or all; `xsk info IF` tells how many there are
    /// [default: 0; with --out all]
    #[arg(
        short,
        long,
        visible_alias = "queue",
        value_name = "LIST",
        help_heading = "Interface",
        display_order = 0
    )]
    pub(crate) queues: Option<List>,

    #[command(flatten)]
    pub(crate) attach: Attach,
    #[command(flatten)]
    pub(crate) addresses: Addresses,
    #[command(flatten)]
    pub(crate) threads: Threads,
    #[command(flatten)]
    pub(crate) rings: Rings,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Interface")]
pub(crate) struct Interface {
    /// Network interface to use
    #[arg(short, long, value_name = "IF")]
    pub(crate) interface: String,

    /// Have the kernel copy every packet; works everywhere [default: zero copy where possible]
    #[arg(long, conflicts_with = "zero_copy")]
    pub(crate) copy: bool,

    /// Have the NIC read and write the packets' memory itself, or fail
    #[arg(long)]
    pub(crate) zero_copy: bool,

    /// Allow an interface that carries the default route or your SSH connection
    ///
    /// A command that receives takes what arrives on its queues away from the network stack, and one
    /// that sends crowds out all others, so such a connection may hang until the command ends.
    #[arg(long)]
    pub(crate) take_all: bool,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Interface")]
pub(crate) struct Queues {
    /// Queues to use: 2, 0-3, 0,2-4 or all; `xsk info IF` tells how many there are [default: 0]
    #[arg(short, long, visible_alias = "queue", value_name = "LIST", display_order = 0)]
    pub(crate) queues: Option<List>,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Interface")]
pub(crate) struct Attach {
    /// Run the XDP program in the driver, or fail [default: there where possible]
    #[arg(long, conflicts_with = "generic")]
    pub(crate) native: bool,

    /// Run the XDP program in the network stack; works everywhere, slower
    #[arg(long)]
    pub(crate) generic: bool,
}

/// Addresses that a forwarder writes.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Addresses")]
pub(crate) struct Addresses {
    /// Make the interface that a packet leaves by its sender: its MAC address becomes the source
    ///
    /// As switches learn where a sender is, this keeps them from learning it wrongly. The destination
    /// stays, unless --dst-mac or --back-dst-mac gives one.
    #[arg(long, requires = "out")]
    pub(crate) rewrite: bool,

    /// Address packets to this MAC address, and from that of the interface they leave by
    ///
    /// As a router does for its next hop. With --out this is for packets that leave there; with one
    /// interface it takes the place of swapping. Nothing else in a packet is changed.
    #[arg(long, value_name = "MAC")]
    pub(crate) dst_mac: Option<Mac>,

    /// The same for packets on their way back, which leave by --interface
    #[arg(long, value_name = "MAC", requires = "out")]
    pub(crate) back_dst_mac: Option<Mac>,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Threads")]
pub(crate) struct Threads {
    /// Threads that share the queues evenly, at most one a queue [default: one a queue, as far as
    /// there are CPUs]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) threads: Option<u32>,

    /// Pin the threads to these CPUs, one after the other: 2, 0-3, 0,2-4 or all
    #[arg(long, value_name = "LIST")]
    pub(crate) cpus: Option<List>,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Rings")]
pub(crate) struct Rings {
    /// Packets that are handled at a time, on each queue
    #[arg(short, long, value_name = "PACKETS", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) batch: u32,

    /// Bytes of a frame, which holds one packet: 2048 or 4096
    #[arg(short, long, value_name = "BYTES", default_value_t = 4096)]
    pub(crate) frame_size: u32,

    /// Frames for each queue in the UMEM, the memory that is shared with the kernel [default: twice
    /// --ring]
    #[arg(long, value_name = "FRAMES")]
    pub(crate) frames: Option<u32>,

    /// Entries of each ring, a power of two
    #[arg(long, value_name = "ENTRIES", default_value_t = 2048)]
    pub(crate) ring: u32,

    /// Sleep while there is nothing to do; otherwise each thread keeps a CPU busy, which is faster
    #[arg(long)]
    pub(crate) poll: bool,

    /// Do without the kernel's hints when to wake it
    #[arg(long)]
    pub(crate) no_need_wakeup: bool,

    /// Put the frames on huge pages of 2 MiB, or fail
    #[arg(long)]
    pub(crate) huge_pages: bool,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Packets")]
pub(crate) struct Packets {
    /// Bytes of a packet, from its Ethernet header to its end, without the frame check sequence
    #[arg(short, long, value_name = "BYTES", default_value_t = 64)]
    pub(crate) size: u32,

    /// Stop when this many packets are sent
    #[arg(short = 'C', long, value_name = "PACKETS", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) count: Option<u64>,

    /// Destination MAC address
    #[arg(long, value_name = "MAC", default_value = "02:00:00:00:00:01")]
    pub(crate) dst_mac: Mac,

    /// Source MAC address [default: the interface's own]
    #[arg(long, value_name = "MAC")]
    pub(crate) src_mac: Option<Mac>,

    /// Destination IP address, IPv4 or IPv6
    #[arg(long, value_name = "IP", default_value = "198.18.0.2")]
    pub(crate) dst_ip: IpAddr,

    /// Source IP address, of the same version
    #[arg(long, value_name = "IP", default_value = "198.18.0.1")]
    pub(crate) src_ip: IpAddr,

    /// Destination UDP port
    #[arg(long, value_name = "PORT", default_value_t = 9)]
    pub(crate) dst_port: u16,

    /// Source UDP port
    #[arg(long, value_name = "PORT", default_value_t = 1000)]
    pub(crate) src_port: u16,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Output")]
pub(crate) struct Output {
    /// Stop after this time [default: at Ctrl-C]
    #[arg(short, long, value_name = "SECONDS", value_parser = positive_seconds)]
    pub(crate) duration: Option<Duration>,

    /// Time between two reports; 0 prints the summary alone
    #[arg(short = 'n', long, value_name = "SECONDS", value_parser = seconds, default_value = "1")]
    pub(crate) interval: Duration,

    /// Print JSON, one object a line; the last one is the summary
    #[arg(long)]
    pub(crate) json: bool,
}

/// Show what this machine and its interfaces can do for AF_XDP
///
/// Without an interface: the kernel, this user's rights, and all interfaces in a line each. With
/// one: its queues, its driver's features, and the XDP programs on it. Nothing is changed.
#[derive(Debug, Args)]
pub(crate) struct Info {
    /// Interface to look at
    #[arg(value_name = "IF")]
    pub(crate) interface: Option<String>,

    /// The same, said as to the other commands
    #[arg(short, long = "interface", value_name = "IF", conflicts_with = "interface")]
    pub(crate) i: Option<String>,

    /// Print one JSON object instead of tables
    #[arg(long, help_heading = "Output")]
    pub(crate) json: bool,
}

/// Print a completion script for a shell
///
/// For example: xsk completions bash > /etc/bash_completion.d/xsk
#[derive(Debug, Args)]
pub(crate) struct Completions {
    /// Shell to complete for
    pub(crate) shell: Shell,
}

/// Print the man page
#[derive(Debug, Args)]
pub(crate) struct Man {
    /// Write a page for each subcommand into this directory instead
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
}

/// A MAC address, as `02:00:00:00:00:01`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mac(pub(crate) [u8; 6]);

impl std::str::FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut mac = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut mac {
            // `from_str_radix` takes a sign as well.
            let hex = |part: &&str| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
            let value = parts.next().filter(hex).and_then(|part| u8::from_str_radix(part, 16).ok());
            *byte = value.ok_or("expected six bytes in hexadecimal, as 02:00:00:00:00:01")?;
        }
        match parts.next() {
            None => Ok(Self(mac)),
            Some(_) => Err("a MAC address has six bytes".into()),
        }
    }
}

/// Numbers, as `2`, `0-3`, `0,2-4` or `all`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum List {
    All,
    /// In order, and each once.
    These(Vec<u32>),
}

impl List {
    /// Beyond what the kernel can number, be it queues or CPUs.
    const END: u32 = 1 << 16;

    fn parse(text: &str) -> Result<Self, (usize, String)> {
        if text == "all" {
            return Ok(Self::All);
        }
        let mut numbers = BTreeSet::new();
        let mut rest = text;
        // Numbers are read where they stand, so that an error can point there.
        let at = |rest: &str| text.len() - rest.len();
        loop {
            let first = Self::number(&mut rest).map_err(|wrong| (at(rest), wrong))?;
            let last = match rest.strip_prefix('-') {
                Some(after) => {
                    rest = after;
                    let place = at(rest);
                    let last = Self::number(&mut rest).map_err(|wrong| (at(rest), wrong))?;
                    if last < first {
                        return Err((place, format!("a range ends with {first} or more")));
                    }
                    last
                }
                None => first,
            };
            numbers.extend(first..=last);
            match rest.strip_prefix(',') {
                Some(after) => rest = after,
                None if rest.is_empty() => return Ok(Self::These(numbers.into_iter().collect())),
                None => return Err((at(rest), "expected a comma, a dash or the end".into())),
            }
        }
    }

    /// Takes a number off the beginning of `rest`, or leaves it.
    fn number(rest: &mut &str) -> Result<u32, String> {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, after) = rest.split_at(digits);
        if number.is_empty() {
            return Err("expected a number".into());
        }
        match number.parse() {
            Ok(number) if number < Self::END => {
                *rest = after;
                Ok(number)
            }
            _ => Err(format!("expected a number below {}", Self::END)),
        }
    }
}

impl std::str::FromStr for List {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::parse(text).map_err(|(at, wrong)| {
            // The place in characters, of which one may have several bytes.
            let before = text[..at].chars().count();
            format!(
                "{wrong}\n\n    {text}\n    {:before$}^ here\n\na list is numbers and ranges, as 2, 0-3 or 0,2-4; or all",
                ""
            )
        })
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "expected a number of seconds, as 10 or 0.5")?;
    // A thousand years are endless, and below what the clock can add.
    match Duration::try_from_secs_f64(seconds) {
        Ok(duration) if seconds <= 3e10 => Ok(duration),
        _ => Err("out of range".into()),
    }
}

fn positive_seconds(text: &str) -> Result<Duration, String> {
    seconds(text).and_then(
        |duration| if duration.is_zero() { Err("must be more than 0".into()) } else { Ok(duration) },
    )
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definitions_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn mac_addresses_have_six_bytes() {
        assert_eq!("02:00:5e:Ff:00:01".parse(), Ok(Mac([2, 0, 0x5e, 0xff, 0, 1])));
        assert_eq!("02-00-5e-ff-00-01".parse(), Ok(Mac([2, 0, 0x5e, 0xff, 0, 1])));
        for wrong in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:01:02",
            "2:0:0:0:0:1",
            "02:00:00:00:00:0g",
            "+2:00:00:00:00:01",
        ] {
            assert!(wrong.parse::<Mac>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_list_is_numbers_and_ranges() {
        let these = |numbers: &[u32]| Ok(List::These(numbers.to_vec()));
        assert_eq!("all".parse(), Ok(List::All));
        assert_eq!("2".parse(), these(&[2]));
        assert_eq!("0-3".parse(), these(&[0, 1, 2, 3]));
        assert_eq!("4,0,2-3,3-4".parse(), these(&[0, 2, 3, 4]));
        assert_eq!("65535-65535".parse(), these(&[65535]));
    }

    #[test]
    fn a_wrong_list_is_answered_with_the_place() {
        for (text, at, wrong) in [
            ("", 0, "expected a number"),
            ("x", 0, "expected a number"),
            ("-1", 0, "expected a number"),
            ("+1", 0, "expected a number"),
            ("0,", 2, "expected a number"),
            ("0-", 2, "expected a number"),
            ("0,,1", 2, "expected a number"),
            ("0-all", 2, "expected a number"),
            ("0 1", 1, "expected a comma, a dash or the end"),
            ("0-1-2", 3, "expected a comma, a dash or the end"),
            ("12,7-3", 5, "a range ends with 7 or more"),
            ("1,65536", 2, "expected a number below 65536"),
            ("99999999999", 0, "expected a number below 65536"),
        ] {
            assert_eq!(List::parse(text), Err((at, wrong.to_owned())), "{text:?}");
        }
        let told = "0,2-é".parse::<List>().unwrap_err();
        assert!(told.contains("\n    0,2-é\n        ^ here\n"), "{told}");
    }

    #[test]
    fn seconds_are_finite_and_may_have_a_fraction() {
        assert_eq!(seconds("0.25"), Ok(Duration::from_millis(250)));
        assert_eq!(seconds("0"), Ok(Duration::ZERO));
        assert!(positive_seconds("0").is_err());
        for wrong in ["-1", "nan", "inf", "1e30", "ten"] {
            assert!(seconds(wrong).is_err(), "{wrong}");
        }
    }
}
