//! The loops of `bench/rings` beside the same in C, in turns, over the same memory.

use std::process::ExitCode;

use xsk_bench::loops::{self, User};
use xsk_bench::stats::quartiles;
use xsk_bench::{Bench, Layout, Work, measure};
use xsk_peers::Peer;

const USAGE: &str = "\
usage: rings [rounds]
       rings count <c-rxdrop|c-l2fwd> <off> <batch> <packets>

Without `count`: nanoseconds per packet, and ratios of rounds against C's of the same round.
With it: handles at least that many packets in C, and prints how many, for a profiler.";

/// Packets of a round, and those before it that are not clocked.
const PACKETS: u64 = 200_000;
const WARM_UP: u64 = 8192;

type Step = fn(&mut User, u32) -> u32;

fn extend(work: Work) -> Step {
    match work {
        Work::RxDrop => loops::rxdrop_by_extend,
        Work::L2Fwd => loops::l2fwd_by_extend,
    }
}

fn push(work: Work) -> Step {
    match work {
        Work::RxDrop => loops::rxdrop_by_push,
        Work::L2Fwd => loops::l2fwd_by_push,
    }
}

/// Nanoseconds per packet of C.
fn c(bench: &mut Bench, work: Work, batch: u32) -> f64 {
    let (mut peer, mut kernel) = Peer::new(bench);
    measure(&mut kernel, work, WARM_UP, || peer.step(work, batch));
    let (n, spent) = measure(&mut kernel, work, PACKETS, || peer.step(work, batch));
    spent.as_nanos() as f64 / n as f64
}

/// Nanoseconds per packet of ours.
fn ours(bench: &mut Bench, work: Work, batch: u32, step: Step) -> f64 {
    let (mut user, mut kernel) = bench.user();
    measure(&mut kernel, work, WARM_UP, || step(&mut user, batch));
    let (n, spent) = measure(&mut kernel, work, PACKETS, || step(&mut user, batch));
    std::hint::black_box(user.sum);
    spent.as_nanos() as f64 / n as f64
}

fn count(name: &str, batch: &str, packets: &str) -> Option<()> {
    let work = Work::ALL.into_iter().find(|work| name.strip_prefix("c-") == Some(work.name()))?;
    let batch: u32 = batch.parse().ok().filter(|batch| *batch != 0)?;
    let packets = packets.parse().ok()?;
    let mut bench = Bench::new(false, Layout::Real);
    let (mut peer, mut kernel) = Peer::new(&mut bench);
    let (handled, _) = measure(&mut kernel, work, packets, || peer.step(work, batch));
    println!("{handled}");
    Some(())
}

fn compare(rounds: usize) -> Option<()> {
    const NAMES: [&str; 6] = ["C", "C again", "extend", "extend, ledger", "push", "push, ledger"];
    if rounds == 0 {
        return None;
    }
    println!("{rounds} rounds in turns; ratios are of a round's time to C's in the same round");
    for layout in Layout::ALL {
        let (mut bench, mut ledger) = (Bench::new(false, layout), Bench::new(true, layout));
        for work in Work::ALL {
            for batch in [64, 16, 1] {
                let mut ns = vec![Vec::new(); NAMES.len()];
                for round in 0..rounds {
                    for turn in 0..NAMES.len() {
                        let which = (round + turn) % NAMES.len();
                        ns[which].push(match which {
                            0 | 1 => c(&mut bench, work, batch),
                            2 => ours(&mut bench, work, batch, extend(work)),
                            3 => ours(&mut ledger, work, batch, extend(work)),
                            4 => ours(&mut bench, work, batch, push(work)),
                            _ => ours(&mut ledger, work, batch, push(work)),
                        });
                    }
                }
                println!("\n{} layout, {}, batch {batch}", layout.name(), work.name());
                println!("  {:16} {:>6}  {:>5}  quartiles", "", "ns", "ratio");
                for (name, figures) in NAMES.iter().zip(&ns) {
                    let ratios: Vec<f64> = figures.iter().zip(&ns[0]).map(|(a, b)| a / b).collect();
                    let (time, ratio) = (quartiles(figures), quartiles(&ratios));
                    println!(
                        "  {name:16} {:6.2}  {:5.2}  [{:.2} {:.2}]",
                        time.mid, ratio.mid, ratio.low, ratio.high
                    );
                }
            }
        }
    }
    Some(())
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match arguments[..] {
        [] => compare(15),
        [rounds] => rounds.parse().ok().and_then(compare),
        ["count", name, "off", batch, packets] => count(name, batch, packets),
        _ => None,
    };
    if done.is_none() {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    }
    ExitCode::SUCCESS
}
