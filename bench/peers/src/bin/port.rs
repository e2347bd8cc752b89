//! l2fwd by `Port`: the counterpart of `socket.c l2fwd`, with the same command line, memory and rings.
//! The last line is JSON.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::{Duration, Instant};

use xsk::{Device, Mode, Port, Umem};

const USAGE: &str = "usage: port l2fwd -i IF [-q QUEUE] [-b BATCH] [-d SECONDS]";

struct Settings {
    interface: String,
    queue: u32,
    batch: u32,
    time: Duration,
}

fn settings() -> Option<Settings> {
    let mut arguments = std::env::args().skip(1);
    arguments.next().filter(|command| command == "l2fwd")?;
    let (mut interface, mut queue, mut batch, mut time) = (None, 0, 64, Duration::from_secs(1));
    while let Some(argument) = arguments.next() {
        let value = arguments.next()?;
        match argument.as_str() {
            "-i" => interface = Some(value),
            "-q" => queue = value.parse().ok()?,
            "-b" => batch = value.parse().ok().filter(|n| *n != 0)?,
            "-d" => time = value.parse().ok().and_then(|s| Duration::try_from_secs_f64(s).ok())?,
            _ => return None,
        }
    }
    Some(Settings { interface: interface?, queue, batch, time })
}

fn swap_macs(packet: &mut [u8]) {
    if let Some(header) = packet.first_chunk_mut::<12>() {
        let [a, b, c, d, e, f, u, v, w, x, y, z] = *header;
        *header = [u, v, w, x, y, z, a, b, c, d, e, f];
    }
}

fn l2fwd(settings: &Settings) -> xsk::Result<()> {
    let device = Device::open(&settings.interface)?;
    let (umem, pool) = Umem::builder().frames(4096).chunk_size(4096).build()?;
    // The port takes its frames where a pool leaves them.
    drop(pool);
    let mut port = Port::builder(&device)
        .umem(&umem)
        .queue(settings.queue)
        .ring_size(2048)
        .batch(settings.batch)
        .mode(Mode::Copy)
        .open()?;
    let over = Arc::new(AtomicBool::new(false));
    let (time, tell) = (settings.time, over.clone());
    thread::spawn(move || {
        thread::sleep(time);
        tell.store(true, Relaxed);
    });
    let (mut packets, mut batches) = (0u64, 0u64);
    let begin = Instant::now();
    while !over.load(Relaxed) {
        let n = port.process(|mut packet| {
            swap_macs(&mut packet);
            packet
        })?;
        packets += u64::from(n);
        batches += u64::from(n != 0);
    }
    let seconds = begin.elapsed().as_secs_f64();
    let pps = packets as f64 / seconds;
    println!(
        r#"{{"command":"l2fwd","packets":{packets},"batches":{batches},"seconds":{seconds:.3},"pps":{pps:.0}}}"#
    );
    Ok(())
}

fn main() -> ExitCode {
    let Some(settings) = settings() else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    match l2fwd(&settings) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
