//! Runs the loops: a fixed number of packets to count instructions in, or rounds against the clock.

use std::process::ExitCode;
use std::time::Duration;

use xsk_bench::loops::{self, User};
use xsk_bench::stats::quartiles;
use xsk_bench::turns::{ByPort, OverRings};
use xsk_bench::{Bench, Layout, Work, measure};

const USAGE: &str = "\
usage: xsk-bench count <loop> <ledger> <batch> <packets>
       xsk-bench time [rounds]
       xsk-bench port [rounds]

<loop>    rxdrop-extend, rxdrop-push, l2fwd-extend, l2fwd-push: the ring work alone
          rxdrop-rings, rxdrop-port, l2fwd-rings, l2fwd-port: whole turns
          filter-rings, filter-port: l2fwd with a choice of what is sent
<ledger>  on, off

count  handles at least that many packets, and prints how many: for a profiler.
time   prints nanoseconds per packet for every loop of ring work, batch and layout.
port   runs whole turns over the rings and by Port in turns, and prints their ratio.";

type Step = fn(&mut User, u32) -> u32;

const LOOPS: [(&str, Work, Step); 4] = [
    ("rxdrop-extend", Work::RxDrop, loops::rxdrop_by_extend),
    ("rxdrop-push", Work::RxDrop, loops::rxdrop_by_push),
    ("l2fwd-extend", Work::L2Fwd, loops::l2fwd_by_extend),
    ("l2fwd-push", Work::L2Fwd, loops::l2fwd_by_push),
];

/// A whole turn.
#[derive(Clone, Copy)]
enum Turn {
    Rings(fn(&mut OverRings) -> xsk::Result<u32>),
    Port(fn(&mut ByPort) -> xsk::Result<u32>),
}

const TURNS: [(&str, Work, Turn); 6] = [
    ("rxdrop-rings", Work::RxDrop, Turn::Rings(OverRings::rxdrop)),
    ("rxdrop-port", Work::RxDrop, Turn::Port(ByPort::rxdrop)),
    ("l2fwd-rings", Work::L2Fwd, Turn::Rings(OverRings::l2fwd)),
    ("l2fwd-port", Work::L2Fwd, Turn::Port(ByPort::l2fwd)),
    ("filter-rings", Work::L2Fwd, Turn::Rings(OverRings::l2fwd_by_choice)),
    ("filter-port", Work::L2Fwd, Turn::Port(ByPort::l2fwd_by_choice)),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match arguments[..] {
        ["count", name, ledger, batch, packets] => count(name, ledger, batch, packets),
        ["time"] => time(15),
        ["time", rounds] => rounds.parse().ok().and_then(time),
        ["port"] => port(21),
        ["port", rounds] => rounds.parse().ok().and_then(port),
        _ => None,
    };
    if done.is_none() {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    }
    ExitCode::SUCCESS
}

fn count(name: &str, ledger: &str, batch: &str, packets: &str) -> Option<()> {
    let ledger = match ledger {
        "on" => true,
        "off" => false,
        _ => return None,
    };
    let batch: u32 = batch.parse().ok().filter(|batch| *batch != 0)?;
    let packets = packets.parse().ok()?;
    let mut bench = Bench::new(ledger, Layout::Real);
    let handled = if let Some((_, work, step)) = LOOPS.into_iter().find(|l| l.0 == name) {
        let (mut user, mut kernel) = bench.user();
        let (handled, _) = measure(&mut kernel, work, packets, || step(&mut user, batch));
        std::hint::black_box(user.sum);
        handled
    } else {
        let (_, work, turn) = TURNS.into_iter().find(|t| t.0 == name)?;
        run(&mut bench, work, turn, batch, true, [0, packets]).0
    };
    println!("{handled}");
    Some(())
}

/// Runs whole turns over so many packets to warm up, and so many that are measured.
fn run(
    bench: &mut Bench,
    work: Work,
    turn: Turn,
    batch: u32,
    at_once: bool,
    [warm_up, packets]: [u64; 2],
) -> (u64, Duration) {
    const REFUSED: &str = "the fake kernel refuses nothing";
    let mut fake = bench.interface(at_once);
    match turn {
        Turn::Rings(turn) => {
            let mut program = OverRings::new(bench, &fake, batch);
            measure(&mut fake, work, warm_up, || turn(&mut program).expect(REFUSED));
            let measured = measure(&mut fake, work, packets, || turn(&mut program).expect(REFUSED));
            std::hint::black_box(program.sum);
            measured
        }
        Turn::Port(turn) => {
            let mut program = ByPort::new(bench, &fake, batch);
            measure(&mut fake, work, warm_up, || turn(&mut program).expect(REFUSED));
            let measured = measure(&mut fake, work, packets, || turn(&mut program).expect(REFUSED));
            std::hint::black_box(program.sum);
            measured
        }
    }
}

fn time(rounds: usize) -> Option<()> {
    if rounds == 0 {
        return None;
    }
    println!("ns per packet: median of {rounds} rounds, and quartiles\n");
    println!("{:9}  {:13}  {:6}  {:>5}  {:>6}", "layout", "loop", "ledger", "batch", "ns");
    for layout in Layout::ALL {
        for (name, work, step) in LOOPS {
            for ledger in [false, true] {
                let mut bench = Bench::new(ledger, layout);
                for batch in [64, 16, 1] {
                    let mut ns = Vec::new();
                    for _ in 0..rounds {
                        let (mut user, mut kernel) = bench.user();
                        measure(&mut kernel, work, 8192, || step(&mut user, batch));
                        let (n, spent) = measure(&mut kernel, work, 100_000, || step(&mut user, batch));
                        std::hint::black_box(user.sum);
                        ns.push(spent.as_nanos() as f64 / n as f64);
                    }
                    let q = quartiles(&ns);
                    let ledger = if ledger { "on" } else { "off" };
                    println!(
                        "{:9}  {name:13}  {ledger:6}  {batch:>5}  {:6.2}  [{:.2} {:.2}]",
                        layout.name(),
                        q.mid,
                        q.low,
                        q.high
                    );
                }
            }
        }
    }
    Some(())
}

fn port(rounds: usize) -> Option<()> {
    if rounds == 0 {
        return None;
    }
    println!(
        "{rounds} rounds in turns; ratios are of a round's time to that over the rings in the same round"
    );
    for layout in Layout::ALL {
        let mut bench = Bench::new(false, layout);
        for program in ["rxdrop", "l2fwd", "filter"] {
            let mut rows: Vec<_> = TURNS.into_iter().filter(|turn| turn.0.starts_with(program)).collect();
            // What is compared with, once more: it says what differences mean nothing.
            rows.push(("rings again", rows[0].1, rows[0].2));
            for batch in [64, 16, 1] {
                let mut ns = vec![Vec::new(); rows.len()];
                for round in 0..rounds {
                    for turn in 0..rows.len() {
                        let which = (round + turn) % rows.len();
                        let (_, work, turn) = rows[which];
                        let (n, spent) = run(&mut bench, work, turn, batch, false, [8192, 200_000]);
                        ns[which].push(spent.as_nanos() as f64 / n as f64);
                    }
                }
                println!("\n{} layout, {program}, batch {batch}", layout.name());
                println!("  {:13} {:>6}  {:>6}  quartiles", "", "ns", "ratio");
                for ((name, ..), figures) in rows.iter().zip(&ns) {
                    let ratios: Vec<f64> = figures.iter().zip(&ns[0]).map(|(a, b)| a / b).collect();
                    let (time, ratio) = (quartiles(figures), quartiles(&ratios));
                    println!(
                        "  {name:13} {:6.2}  {:6.3}  [{:.3} {:.3}]",
                        time.mid, ratio.mid, ratio.low, ratio.high
                    );
                }
            }
        }
    }
    Some(())
}
