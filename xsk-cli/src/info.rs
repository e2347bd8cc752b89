//! `xsk info`: what the machine, the kernel, this user and the interfaces can do.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::mem::size_of;

use anstyle::Style;
use serde::Serialize;
use xsk::Device;
use xsk::abi::{
    MmapOffsets, SOL_XDP, XDP_MAX_TX_SKB_BUDGET, XDP_MMAP_OFFSETS, XDP_OPTIONS, XDP_STATISTICS, XdpFeatures,
    XdpStatistics,
};
use xsk::device::DeviceInfo;
use xsk::kernel::linux::Linux;
use xsk::kernel::{Errno, Kernel, Limits, RawSocket};

use crate::cli;
use crate::failure::Failure;
use crate::guard::{self, Use};
use crate::report::{Align, BAD, DIM, GOOD, HEADING, Table, attach_name, json_line};

/// `SOCK_RAW`.
const SOCK_RAW: i32 = 3;

/// `xsk info`.
pub(crate) fn run(args: &cli::Info) -> Result<(), Failure> {
    let kernel = Linux::kernel();
    match args.interface.as_ref().or(args.i.as_ref()) {
        Some(name) => {
            let interface = Interface::new(&Device::open(name)?.info()?);
            if args.json {
                json_line(&interface)?;
            } else {
                interface.print(&mut anstream::stdout().lock())?;
            }
        }
        None => {
            let machine = Machine::new(&*kernel);
            let interfaces = all_interfaces(&*kernel)?;
            if args.json {
                #[derive(Serialize)]
                struct All {
                    #[serde(flatten)]
                    machine: Machine,
                    interfaces: Vec<Interface>,
                }
                json_line(&All { machine, interfaces })?;
            } else {
                let mut out = anstream::stdout().lock();
                machine.print(&mut out)?;
                print_interfaces(&interfaces, &mut out)?;
            }
        }
    }
    Ok(())
}

/// All interfaces. One that goes away meanwhile is left out.
fn all_interfaces(kernel: &dyn Kernel) -> Result<Vec<Interface>, Failure> {
    let indices = kernel.interfaces().map_err(|errno| {
        let remedy = "see what the kernel says: dmesg".to_owned();
        Failure::new("cannot list the interfaces", errno.to_string(), "Netlink tells them.", remedy)
    })?;
    let names = indices.into_iter().filter_map(|index| Some(kernel.interface(index).ok()?.name));
    let devices = names.filter_map(|name| Device::open(&name).ok()?.info().ok());
    Ok(devices.map(|info| Interface::new(&info)).collect())
}

/// The machine, its kernel, and what this user may do.
#[derive(Debug, Serialize)]
struct Machine {
    kernel: String,
    architecture: String,
    cpus: usize,
    page_size: usize,
    huge_pages_free: Option<u64>,
    huge_page_size: Option<u64>,
    /// Bytes of locked memory; absent where there is no limit.
    memlock: Option<u64>,
    /// Absent where it can't be told without `CAP_NET_RAW`.
    af_xdp: Option<bool>,
    bpf_jit: Option<bool>,
    capabilities: Vec<&'static str>,
    can_send: bool,
    can_receive: bool,
    features: Vec<Feature>,
    /// Processes that have AF_XDP sockets in this network namespace.
    holders: Vec<Holder>,
}

/// Something that came with a later kernel.
#[derive(Debug, Serialize)]
struct Feature {
    name: &'static str,
    since: &'static str,
    available: bool,
}

#[derive(Debug, Serialize)]
struct Holder {
    pid: u32,
    name: String,
}

impl Machine {
    fn new(kernel: &dyn Kernel) -> Self {
        let uname = rustix::system::uname();
        let limits = kernel.limits();
        let Limits { page_size, net_raw, net_admin, bpf, ipc_lock, .. } = limits;
        let socket = kernel.socket(SOCK_RAW, 0);
        let af_xdp = match &socket {
            Ok(_) => Some(true),
            Err(Errno::AFNOSUPPORT) => Some(false),
            Err(_) => None,
        };
        let capabilities = [
            (net_raw, "CAP_NET_RAW"),
            (net_admin, "CAP_NET_ADMIN"),
            (bpf, "CAP_BPF"),
            (ipc_lock, "CAP_IPC_LOCK"),
        ];
        let can_send = socket.is_ok();
        Self {
            kernel: uname.release().to_string_lossy().into(),
            architecture: uname.machine().to_string_lossy().into(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            page_size,
            huge_pages_free: meminfo("HugePages_Free:"),
            huge_page_size: meminfo("Hugepagesize:").map(|kib| kib << 10),
            memlock: if ipc_lock { None } else { limits.memlock },
            af_xdp,
            bpf_jit: fs::read_to_string("/proc/sys/net/core/bpf_jit_enable").ok().map(|on| on.trim() != "0"),
            capabilities: capabilities.iter().filter(|(has, _)| *has).map(|(_, name)| *name).collect(),
            can_send,
            can_receive: can_send && net_admin && bpf,
            features: socket.map(|socket| features(&*socket)).unwrap_or_default(),
            holders: kernel.holders().into_iter().map(|it| Holder { pid: it.pid, name: it.name }).collect(),
        }
    }

    fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let lacking = |needed: &[&'static str]| {
            let missing: Vec<_> =
                needed.iter().filter(|name| !self.capabilities.contains(name)).copied().collect();
            match (self.af_xdp, missing.as_slice()) {
                (Some(false), _) => (BAD, "no: the kernel was built without CONFIG_XDP_SOCKETS".into()),
                (_, []) => (GOOD, "yes".into()),
                (_, missing) => (BAD, format!("no: needs {}", missing.join(", "))),
            }
        };
        let plain = |text: String| (Style::new(), text);
        let huge = match (self.huge_pages_free, self.huge_page_size) {
            (Some(free), Some(size)) => format!("{free} of {} free", bytes(size)),
            _ => "none".into(),
        };
        section(
            out,
            "Machine",
            [
                ("kernel", plain(format!("Linux {}", self.kernel))),
                ("processors", plain(format!("{} ({})", self.cpus, self.architecture))),
                ("pages", plain(bytes(self.page_size as u64))),
                ("huge pages", plain(huge)),
                (
                    "BPF compiler",
                    match self.bpf_jit {
                        Some(true) => (GOOD, "on".into()),
                        Some(false) => {
                            (BAD, "off: programs are interpreted; sysctl -w net.core.bpf_jit_enable=1".into())
                        }
                        None => plain("unknown".into()),
                    },
                ),
            ],
        )?;
        section(
            out,
            "This user",
            [
                ("can send", lacking(&["CAP_NET_RAW"])),
                ("can receive", lacking(&["CAP_NET_RAW", "CAP_NET_ADMIN", "CAP_BPF"])),
                ("locked memory", plain(self.memlock.map_or("no limit".into(), bytes))),
            ],
        )?;
        section(
            out,
            "AF_XDP features",
            self.features.iter().map(|feature| {
                let answer = if feature.available {
                    (GOOD, "yes".into())
                } else {
                    (BAD, format!("no: since Linux {}", feature.since))
                };
                (feature.name, answer)
            }),
        )?;
        let holders =
            self.holders.iter().map(|it| format!("{} (process {})", it.name, it.pid)).collect::<Vec<_>>();
        if !holders.is_empty() {
            section(out, "AF_XDP sockets", [("held by", plain(holders.join(", ")))])?;
        }
        Ok(())
    }
}

/// What the kernel's AF_XDP can do, by asking it. Kernels of distributions are often ahead of their
/// number.
fn features(socket: &dyn RawSocket) -> Vec<Feature> {
    let mut buffer = [0; 256];
    let mut answer = |option, len: usize| socket.getsockopt(SOL_XDP, option, &mut buffer[..len]);
    let flags = answer(XDP_MMAP_OFFSETS, size_of::<MmapOffsets>()) == Ok(size_of::<MmapOffsets>());
    let counters = answer(XDP_STATISTICS, size_of::<XdpStatistics>()) == Ok(size_of::<XdpStatistics>());
    let options = answer(XDP_OPTIONS, size_of::<u32>()).is_ok();
    // 0 is out of range, so nothing is set; but who doesn't know the option says so first.
    let budget = socket.setsockopt(SOL_XDP, XDP_MAX_TX_SKB_BUDGET, &0u32.to_ne_bytes());
    let feature = |name, since, available| Feature { name, since, available };
    vec![
        feature("tells its mode", "5.3", options),
        feature("need_wakeup", "5.4", flags),
        feature("ring counters", "5.9", counters),
        feature("TX budget", "6.17", budget != Err(Errno::NOPROTOOPT)),
    ]
}

/// A number of `/proc/meminfo`.
fn meminfo(key: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(key))?;
    value.split_whitespace().next()?.parse().ok()
}

fn bytes(n: u64) -> String {
    match n {
        n if n >= 1 << 30 && n.is_multiple_of(1 << 30) => format!("{} GiB", n >> 30),
        n if n >= 1 << 20 && n.is_multiple_of(1 << 20) => format!("{} MiB", n >> 20),
        n if n >= 1 << 10 && n.is_multiple_of(1 << 10) => format!("{} KiB", n >> 10),
        n => format!("{n} bytes"),
    }
}

/// An interface.
#[derive(Debug, Serialize)]
struct Interface {
    interface: String,
    index: u32,
    driver: Option<String>,
    mac: Option<String>,
    up: bool,
    running: bool,
    mtu: u32,
    queues: u32,
    rx_queues: u32,
    tx_queues: u32,
    combined_queues: Option<u32>,
    /// Whether programs run in the driver; absent where the kernel doesn't tell.
    native: Option<bool>,
    zero_copy: Option<bool>,
    zero_copy_segments: Option<u32>,
    xdp_features: Option<Vec<String>>,
    rx_metadata: Option<Vec<&'static str>>,
    tx_metadata: Option<Vec<&'static str>>,
    programs: Vec<Program>,
    carries: Vec<&'static str>,
}

#[derive(Debug, Serialize)]
struct Program {
    id: u32,
    name: Option<String>,
    mode: &'static str,
}

impl Interface {
    fn new(info: &DeviceInfo) -> Self {
        let driver = info.raw().features;
        let carries: BTreeSet<Use> = guard::uses_of(info.name());
        Self {
            interface: info.name().into(),
            index: info.index(),
            driver: info.driver().map(str::to_owned),
            mac: info.mac().map(|mac| mac.map(|byte| format!("{byte:02x}")).join(":")),
            up: info.is_up(),
            running: info.is_running(),
            mtu: info.mtu(),
            queues: info.queues(),
            rx_queues: info.rx_queues(),
            tx_queues: info.tx_queues(),
            combined_queues: info.combined_queues(),
            native: info.xdp_features().map(|it| it.contains(XdpFeatures::BASIC | XdpFeatures::REDIRECT)),
            zero_copy: info.zero_copy(),
            zero_copy_segments: info.zero_copy_segments(),
            xdp_features: info.xdp_features().map(|features| {
                features.iter_names().map(|(name, _)| name.to_lowercase().replace('_', "-")).collect()
            }),
            rx_metadata: driver
                .and_then(|it| it.rx_metadata)
                .map(|bits| names(bits, &["timestamp", "hash", "VLAN tag"])),
            tx_metadata: driver
                .and_then(|it| it.xsk)
                .map(|bits| names(bits, &["timestamp", "checksum", "launch time"])),
            programs: info
                .programs()
                .iter()
                .map(|it| Program {
                    id: it.id,
                    name: it.name.clone(),
                    mode: it.mode.map_or("offloaded", |mode| attach_name(Some(mode))),
                })
                .collect(),
            carries: carries.into_iter().map(Use::label).collect(),
        }
    }

    fn state(&self) -> (Style, String) {
        match (self.up, self.running) {
            (true, true) => (GOOD, "up".into()),
            (true, false) => (BAD, "no link".into()),
            (false, _) => (BAD, "down".into()),
        }
    }

    /// Its programs, in a table's cell.
    fn programs(&self) -> String {
        let program = |it: &Program| match &it.name {
            Some(name) => format!("{name} (number {}, {})", it.id, it.mode),
            None => format!("number {} ({})", it.id, it.mode),
        };
        self.programs.iter().map(program).collect::<Vec<_>>().join(", ")
    }

    fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let plain = |text: String| (Style::new(), text);
        let list = |items: &Option<Vec<&'static str>>| match items.as_deref() {
            None => (DIM, "unknown: the kernel doesn't tell".into()),
            Some([]) => plain("none".into()),
            Some(items) => plain(items.join(", ")),
        };
        let or_none = |text: String| if text.is_empty() { plain("none".into()) } else { plain(text) };
        section(
            out,
            &format!("Interface {}", self.interface),
            [
                ("index", plain(self.index.to_string())),
                ("driver", plain(self.driver.clone().unwrap_or_else(|| "unknown".into()))),
                ("state", self.state()),
                ("MAC address", or_none(self.mac.clone().unwrap_or_default())),
                ("MTU", plain(format!("{} bytes", self.mtu))),
                ("carries", or_none(self.carries.join(", "))),
            ],
        )?;
        let numbered = match self.queues {
            0 | 1 => String::new(),
            queues => format!(", numbered 0 to {}", queues - 1),
        };
        section(
            out,
            "Queues",
            [
                ("to bind to", plain(format!("{}{numbered}", self.queues))),
                ("receiving", plain(self.rx_queues.to_string())),
                ("sending", plain(self.tx_queues.to_string())),
            ],
        )?;
        let answer = |known: Option<bool>| match known {
            Some(true) => (GOOD, "yes".into()),
            Some(false) => plain("no".into()),
            None => (DIM, "unknown: the kernel doesn't tell".into()),
        };
        let zero_copy = match (self.zero_copy, self.zero_copy_segments) {
            (Some(true), Some(segments)) if segments > 1 => {
                (GOOD, format!("yes, packets of up to {segments} frames"))
            }
            (known, _) => answer(known),
        };
        section(
            out,
            "XDP",
            [
                ("native", answer(self.native)),
                ("generic", (GOOD, "yes".into())),
                ("zero copy", zero_copy),
                (
                    "driver features",
                    match &self.xdp_features {
                        Some(features) => or_none(features.join(", ")),
                        None => (DIM, "unknown: the kernel doesn't tell".into()),
                    },
                ),
                ("RX metadata", list(&self.rx_metadata)),
                ("TX metadata", list(&self.tx_metadata)),
                ("programs", or_none(self.programs())),
            ],
        )
    }
}

/// The names of the bits that are set.
fn names(bits: u64, names: &[&'static str]) -> Vec<&'static str> {
    names.iter().enumerate().filter(|(bit, _)| bits >> bit & 1 != 0).map(|(_, name)| *name).collect()
}

fn print_interfaces(interfaces: &[Interface], out: &mut impl Write) -> io::Result<()> {
    let columns =
        ["interface", "driver", "state", "MTU", "queues", "native", "zero copy", "carries", "programs"];
    let right = ["MTU", "queues"];
    let mut table = Table::new(
        &columns.map(|name| (name, if right.contains(&name) { Align::Right } else { Align::Left })),
    );
    let answer = |known: Option<bool>| match known {
        Some(true) => (GOOD, "yes".to_owned()),
        Some(false) => (Style::new(), "no".to_owned()),
        None => (DIM, "?".to_owned()),
    };
    let or_dash = |text: String| if text.is_empty() { (DIM, "-".to_owned()) } else { (Style::new(), text) };
    for it in interfaces {
        table.row([
            (HEADING, it.interface.clone()),
            or_dash(it.driver.clone().unwrap_or_default()),
            it.state(),
            (Style::new(), it.mtu.to_string()),
            (Style::new(), it.queues.to_string()),
            answer(it.native),
            answer(it.zero_copy),
            or_dash(it.carries.join(", ")),
            or_dash(it.programs()),
        ]);
    }
    table.write(out)
}

/// A heading, and lines of a name and what there is to say.
fn section<'a>(
    out: &mut impl Write,
    heading: &str,
    lines: impl IntoIterator<Item = (&'a str, (Style, String))>,
) -> io::Result<()> {
    let mut table = Table::plain(&[Align::Left, Align::Left]);
    for (name, value) in lines {
        table.row([(Style::new(), format!("  {name}")), value]);
    }
    writeln!(out, "{HEADING}{heading}{HEADING:#}")?;
    table.write(out)?;
    writeln!(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_the_largest_unit_that_divides_them() {
        for (n, text) in
            [(4096, "4 KiB"), (2 << 20, "2 MiB"), (3 << 30, "3 GiB"), (8_388_609, "8388609 bytes")]
        {
            assert_eq!(bytes(n), text);
        }
    }

    #[test]
    fn bits_have_names() {
        assert_eq!(names(0b101, &["timestamp", "hash", "VLAN tag"]), ["timestamp", "VLAN tag"]);
        assert!(names(0b1000, &["timestamp"]).is_empty());
    }
}
