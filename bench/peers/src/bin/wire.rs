//! Whole programs on a veth pair of their own: `xsk`, or one by `Port`, beside the program in C, in turns.

use std::ffi::{OsStr, OsString};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use xsk::kernel::linux::Linux;
use xsk::kernel::{Insn, ProgramSpec, Programs, XDP_FLAGS_DRV_MODE};
use xsk_bench::stats::{interval, quartiles};
use xsk_peers::C_PROGRAM;
use xsk_testbed::{Generator, Load, Testbed, UdpFrame};

const USAGE: &str = "\
usage: wire [--xsk PATH] [--pairs N] [--seconds S] [--batch N] [SCENARIO...]

--xsk      the program to measure (default: target/release/xsk at the root)
--pairs    runs of each program (default 15, which is also the least that tells something)
--seconds  length of a run (default 1)
--batch    packets handled at a time (default 64)

Scenarios (default: all but the last):
  rx-apart     rxdrop, the kernel-side generator on another CPU
  rx-together  rxdrop, the generator on the same CPU
  tx           txonly, into an XDP program that drops at the other end
  l2fwd        l2fwd by `Port` (the program `port` beside this one), the generator on another CPU and
               an XDP program that drops what comes back
  calls        no comparison: the system calls of `port` in a run of l2fwd, as strace counts them

Needs root and two CPUs. Everything happens in network namespaces that are gone afterwards.";

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// CPUs of the generator and of the programs.
const GENERATOR: usize = 0;
const PROGRAM: usize = 1;

struct Settings {
    xsk: OsString,
    pairs: usize,
    seconds: f64,
    batch: u32,
    scenarios: Vec<Scenario>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scenario {
    RxApart,
    RxTogether,
    Tx,
    L2fwd,
    Calls,
}

impl Scenario {
    const ALL: [Self; 5] = [Self::RxApart, Self::RxTogether, Self::Tx, Self::L2fwd, Self::Calls];

    fn name(self) -> &'static str {
        match self {
            Self::RxApart => "rx-apart",
            Self::RxTogether => "rx-together",
            Self::Tx => "tx",
            Self::L2fwd => "l2fwd",
            Self::Calls => "calls",
        }
    }

    fn command(self) -> &'static str {
        match self {
            Self::RxApart | Self::RxTogether => "rxdrop",
            Self::Tx => "txonly",
            Self::L2fwd | Self::Calls => "l2fwd",
        }
    }

    /// What is compared with C.
    fn ours(self) -> Program {
        if self.command() == "l2fwd" { Program::Port } else { Program::Xsk }
    }
}

fn settings() -> Option<Settings> {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/release/xsk");
    let mut settings =
        Settings { xsk: root.into(), pairs: 15, seconds: 1.0, batch: 64, scenarios: Vec::new() };
    let mut arguments = std::env::args_os().skip(1);
    while let Some(argument) = arguments.next() {
        let argument = argument.into_string().ok()?;
        let mut number = || arguments.next()?.into_string().ok();
        match argument.as_str() {
            "--xsk" => settings.xsk = arguments.next()?,
            "--pairs" => settings.pairs = number()?.parse().ok().filter(|n| *n > 0)?,
            "--seconds" => settings.seconds = number()?.parse().ok().filter(|s| *s > 0.0)?,
            "--batch" => settings.batch = number()?.parse().ok().filter(|n| *n > 0)?,
            name => settings.scenarios.push(Scenario::ALL.into_iter().find(|s| s.name() == name)?),
        }
    }
    if settings.scenarios.is_empty() {
        settings.scenarios = Scenario::ALL.into_iter().filter(|s| *s != Scenario::Calls).collect();
    }
    Some(settings)
}

/// Which program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Program {
    Xsk,
    Port,
    C,
}

impl Program {
    fn name(self) -> &'static str {
        match self {
            Self::Xsk => "xsk",
            Self::Port => "Port",
            Self::C => "C",
        }
    }
}

/// Runs a program to its end, under `tracer` if any; what it says at the end.
fn run(
    program: Program,
    settings: &Settings,
    scenario: Scenario,
    interface: &str,
    tracer: &[&OsStr],
) -> Result<serde_json::Value> {
    let mut command = Command::new("taskset");
    command.args(["-c", &PROGRAM.to_string()]).args(tracer);
    match program {
        Program::Xsk => command.arg(&settings.xsk),
        Program::Port => command.arg(std::env::current_exe()?.with_file_name("port")),
        // One program on the interface: no dispatcher for many, which needs a BPF file system.
        Program::C => command.arg(C_PROGRAM).env("LIBXDP_SKIP_DISPATCHER", "1"),
    };
    command.arg(scenario.command()).args(["-i", interface, "-q", "0"]);
    command.args(["-b", &settings.batch.to_string(), "-d", &settings.seconds.to_string()]);
    if program == Program::Xsk {
        command.args(["--copy", "--json", "-n", "0"]);
    }
    command.stdin(Stdio::null());
    let deadline = Instant::now() + Duration::from_secs(10);
    let output = loop {
        let output = command.output()?;
        if output.status.success() {
            break output;
        }
        let said = String::from_utf8_lossy(&output.stderr);
        // The kernel releases a queue a moment after the process that had it has ended.
        if !said.contains("busy") || Instant::now() > deadline {
            return Err(format!("{command:?} failed: {}", said.trim()).into());
        }
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().last().unwrap_or_default();
    Ok(serde_json::from_str(line)?)
}

/// Packets per second of a run, by the program's own count.
fn rate(program: Program, settings: &Settings, scenario: Scenario, interface: &str) -> Result<f64> {
    let summary = run(program, settings, scenario, interface, &[])?;
    let key = match (program, scenario) {
        (Program::C | Program::Port, _) => "pps",
        (Program::Xsk, Scenario::Tx) => "tx_pps",
        (Program::Xsk, _) => "rx_pps",
    };
    match summary[key].as_f64() {
        Some(pps) if pps > 0.0 => Ok(pps),
        _ => Err(format!("no packet at all, or no {key}: {summary}").into()),
    }
}

/// Runs the program by `Port` under strace.
fn count_calls(settings: &Settings, scenario: Scenario, interface: &str) -> Result<()> {
    let table = std::env::temp_dir().join(format!("xsk-calls-{}", std::process::id()));
    let options = ["strace", "-f", "-c", "-U", "calls,name", "-o"].map(OsStr::new);
    let tracer: Vec<&OsStr> = options.into_iter().chain([table.as_os_str()]).collect();
    let ran = run(Program::Port, settings, scenario, interface, &tracer);
    let calls = std::fs::read_to_string(&table);
    // It may never have been made.
    let _ = std::fs::remove_file(&table);
    let (summary, calls) = (ran?, calls?);
    let (mut sends, mut others) = (0u64, 0u64);
    for line in calls.lines() {
        let mut words = line.split_whitespace();
        let (Some(Ok(n)), Some(name)) = (words.next().map(str::parse::<u64>), words.next()) else { continue };
        match name {
            "sendto" => sends += n,
            "total" => {}
            _ => others += n,
        }
    }
    let number = |key: &str| summary[key].as_u64().ok_or_else(|| format!("no {key}: {summary}"));
    let (packets, batches) = (number("packets")?, number("batches")?);
    println!("calls: {packets} packets in {batches} batches");
    println!("  sendto         {sends}, {:.3} a batch", sends as f64 / batches as f64);
    println!("  all others     {others}, from start to end");
    Ok(())
}

/// Attaches a program that drops everything to the far end, for as long as the value lives.
fn drop_at_peer(bed: &Testbed) -> Result<impl Sized> {
    let insn = |code, imm| Insn { code, regs: 0, off: 0, imm };
    // r0 = XDP_DROP; exit
    let instructions = &[insn(0xb7, 1), insn(0x95, 0)];
    let ifindex = bed.b().ifindex;
    let link = bed.peer(move || {
        let mut log = String::new();
        let spec = ProgramSpec { instructions, flags: 0, name: "bench_drop" };
        let program = Linux.load_program(&spec, &mut log)?;
        Linux.attach(program.as_fd(), ifindex, XDP_FLAGS_DRV_MODE)
    })??;
    Ok(link)
}

fn report(name: &str, ratios: &[f64]) {
    let q = quartiles(ratios);
    let bounds = match interval(ratios) {
        Some((low, high)) => format!("95 % interval {low:.3} to {high:.3}"),
        None => "too few runs for an interval".to_owned(),
    };
    println!("  {name:14} median ratio {:.3}, {bounds}", q.mid);
}

fn measure(settings: &Settings, scenario: Scenario) -> Result<()> {
    let bed = Testbed::builder().build()?;
    let interface = bed.a().name.as_str();
    let mut held: (Option<_>, Option<_>) = (None, None);
    if !matches!(scenario, Scenario::RxApart | Scenario::RxTogether) {
        held.0 = Some(drop_at_peer(&bed)?);
    }
    if scenario != Scenario::Tx {
        let frame = UdpFrame::new(bed.b(), bed.a()).len(64).number(0).build()?;
        let cpu = if scenario == Scenario::RxTogether { PROGRAM } else { GENERATOR };
        held.1 = Some(Generator::new(bed.b(), frame)?.on_cpu(cpu).start(Load::endless())?);
    }
    if scenario == Scenario::Calls {
        return count_calls(settings, scenario, interface);
    }
    let ours = scenario.ours();
    // The first run of each is not counted: it finds everything cold.
    rate(Program::C, settings, scenario, interface)?;
    rate(ours, settings, scenario, interface)?;
    let mut pps: [Vec<f64>; 3] = Default::default();
    for round in 0..settings.pairs {
        for turn in 0..3 {
            let which = (round + turn) % 3;
            let program = if which == 1 { ours } else { Program::C };
            pps[which].push(rate(program, settings, scenario, interface)?);
        }
    }
    if let Some(generator) = held.1 {
        generator.stop()?;
    }
    let ratios = |which: usize| -> Vec<f64> { pps[which].iter().zip(&pps[0]).map(|(a, b)| a / b).collect() };
    println!("{}: {} runs of each in turns, {} s", scenario.name(), settings.pairs, settings.seconds);
    for (name, figures) in ["C", ours.name(), "C again"].iter().zip(&pps) {
        let q = quartiles(figures);
        println!("  {name:14} {:9.0} pps [{:.0} {:.0}]", q.mid, q.low, q.high);
    }
    report(&format!("{} to C", ours.name()), &ratios(1));
    report("C to itself", &ratios(2));
    Ok(())
}

fn main() -> ExitCode {
    let Some(settings) = settings() else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    for scenario in &settings.scenarios {
        if let Err(error) = measure(&settings, *scenario) {
            eprintln!("{}: {error}", scenario.name());
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
