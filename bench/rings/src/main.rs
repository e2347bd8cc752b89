//! Runs the loops: a fixed number of packets to count instructions in, or rounds against the clock.

use std::process::ExitCode;

use xsk_bench::loops::{self, User};
use xsk_bench::stats::quartiles;
use xsk_bench::{Bench, Layout, Work, measure};

const USAGE: &str = "\
usage: xsk-bench count <loop> <ledger> <batch> <packets>
       xsk-bench time [rounds]

<loop>    rxdrop-extend, rxdrop-push, l2fwd-extend, l2fwd-push
<ledger>  on, off

count  handles at least that many packets, and prints how many: for a profiler.
time   prints nanoseconds per packet for every loop, batch and layout.";

type Step = fn(&mut User, u32) -> u32;

const LOOPS: [(&str, Work, Step); 4] = [
    ("rxdrop-extend", Work::RxDrop, loops::rxdrop_by_extend),
    ("rxdrop-push", Work::RxDrop, loops::rxdrop_by_push),
    ("l2fwd-extend", Work::L2Fwd, loops::l2fwd_by_extend),
    ("l2fwd-push", Work::L2Fwd, loops::l2fwd_by_push),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match arguments[..] {
        ["count", name, ledger, batch, packets] => count(name, ledger, batch, packets),
        ["time"] => time(15),
        ["time", rounds] => rounds.parse().ok().and_then(time),
        _ => None,
    };
    if done.is_none() {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    }
    ExitCode::SUCCESS
}

fn count(name: &str, ledger: &str, batch: &str, packets: &str) -> Option<()> {
    let (_, work, step) = LOOPS.into_iter().find(|l| l.0 == name)?;
    let ledger = match ledger {
        "on" => true,
        "off" => false,
        _ => return None,
    };
    let batch: u32 = batch.parse().ok().filter(|batch| *batch != 0)?;
    let packets = packets.parse().ok()?;
    let mut bench = Bench::new(ledger, Layout::Real);
    let (mut user, mut kernel) = bench.user();
    let (handled, _) = measure(&mut kernel, work, packets, || step(&mut user, batch));
    std::hint::black_box(user.sum);
    println!("{handled}");
    Some(())
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
