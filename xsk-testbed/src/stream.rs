//! Numbered frames to a chosen receive queue, by whatever gets them there.
//!
//! On a veth pair the receive queue is the sender's transmit queue. That of a
//! [`Generator`] is its CPU modulo the queues, so that it reaches as many queues as there are CPUs. The
//! stack, which packet sockets send through, takes one by the flow: which, the kernel alone knows, and
//! [`source_ports`] finds out.

use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use xsk::kernel::linux::{Linux, lookup_map};
use xsk::kernel::{Handle, MapSpec, ProgramSpec, Programs as _, XDP_FLAGS_DRV_MODE};
use xsk::xdp::asm::{self, Alu, Cond, Reg, Width};

use crate::frame::number_offset;
use crate::{End, Error, Generator, Load, PacketSocket, Running, UdpFrame};

const BPF_MAP_TYPE_ARRAY: u32 = 2;
/// The first source port that is tried.
const FIRST_PORT: u16 = 1000;
/// Flows that are tried: enough to find each of a few queues.
const FLOWS: u16 = 1000;
/// How long a frame may take to the other end.
const ARRIVAL: Duration = Duration::from_secs(10);

/// An XDP program that counts packets by their receive queue and drops them, and its map of one `u64`
/// a queue.
#[derive(Debug)]
pub struct QueueCounter {
    program: Handle,
    map: Handle,
    queues: u32,
}

impl QueueCounter {
    /// One for so many queues.
    pub fn new(queues: u32) -> Result<Self, Error> {
        let map = MapSpec {
            kind: BPF_MAP_TYPE_ARRAY,
            key_size: 4,
            value_size: 8,
            max_entries: queues,
            flags: 0,
            name: "by_queue",
        };
        let map = Linux.create_map(&map).map_err(Error::system("making the counter's map"))?;
        let mut instructions = vec![
            asm::load(Width::W, Reg::R1, Reg::R1, asm::XDP_MD_RX_QUEUE_INDEX),
            asm::store(Width::W, Reg::R10, -4, Reg::R1),
            asm::alu(Alu::Mov, Reg::R2, Reg::R10),
            asm::alu_imm(Alu::Add, Reg::R2, -4),
        ];
        instructions.extend(asm::load_map(Reg::R1, map.as_fd().as_raw_fd()));
        instructions.extend([
            asm::call(asm::FN_MAP_LOOKUP_ELEM),
            asm::jump_imm(Cond::Eq, Reg::R0, 0, 2),
            asm::alu_imm(Alu::Mov, Reg::R1, 1),
            asm::fetch_add(Reg::R0, 0, Reg::R1),
            asm::alu_imm(Alu::Mov, Reg::R0, asm::XDP_DROP),
            asm::exit(),
        ]);
        let mut log = String::new();
        let spec = ProgramSpec { instructions: &instructions, flags: 0, name: "by_queue" };
        let program =
            Linux.load_program(&spec, &mut log).map_err(|e| Error::Program { source: e.into(), log })?;
        Ok(Self { program, map, queues })
    }

    /// Counts at an end from now on, until what this returns is dropped. It is a native program.
    pub fn attach(&self, end: &End) -> Result<Handle, Error> {
        end.namespace
            .run(|| Linux.attach(self.program.as_fd(), end.ifindex, XDP_FLAGS_DRV_MODE))?
            .map_err(Error::system(format!("counting on {}", end.name)))
    }

    /// Packets that came on each queue.
    pub fn counts(&self) -> Result<Vec<u64>, Error> {
        let count = |queue: u32| {
            let mut value = [0; 8];
            lookup_map(self.map.as_fd(), &queue.to_ne_bytes(), &mut value)
                .map_err(Error::system("reading the counter"))?;
            Ok(u64::from_ne_bytes(value))
        };
        (0..self.queues).map(count).collect()
    }
}

/// For each queue of `to` a source port: what `from` sends by a packet socket, as a
/// [`UdpFrame`] of that port, arrives on that queue. No program may be attached at `to` yet.
pub fn source_ports(from: &End, to: &End) -> Result<Vec<u16>, Error> {
    let counter = QueueCounter::new(to.queues)?;
    let attached = counter.attach(to)?;
    let socket = PacketSocket::open(from)?;
    let mut found = vec![None; to.queues as usize];
    let mut before = counter.counts()?;
    for port in FIRST_PORT..FIRST_PORT + FLOWS {
        socket.send(&UdpFrame::new(from, to).source_port(port).build()?)?;
        let deadline = Instant::now() + ARRIVAL;
        let queue = loop {
            let now = counter.counts()?;
            if let Some(queue) = before.iter().zip(&now).position(|(before, now)| before != now) {
                before = now;
                break queue;
            }
            if Instant::now() > deadline {
                return Err(Error::NoFlowForQueue { name: to.name.clone() });
            }
            thread::yield_now();
        };
        found[queue].get_or_insert(port);
        if let Some(found) = found.iter().copied().collect() {
            drop(attached);
            return Ok(found);
        }
    }
    Err(Error::NoFlowForQueue { name: to.name.clone() })
}

/// Numbered frames that are on their way to one receive queue, in the background. Dropping it stops it.
#[derive(Debug)]
pub struct Stream(Source);

#[derive(Debug)]
enum Source {
    Generator(Running),
    PacketSocket(Sending),
}

impl Stream {
    /// Starts a stream of copies of `frame`, a numbered [`UdpFrame`], to a receive queue of the other
    /// end: by a [`Generator`] if a CPU leads there, else by a packet socket, whose frames get there
    /// if their source port is that of [`source_ports`].
    pub fn start(from: &End, frame: Vec<u8>, queue: u32, load: Load) -> Result<Self, Error> {
        match Generator::new(from, frame.clone())?.to_queue(queue) {
            Ok(generator) => Ok(Self(Source::Generator(generator.start(load)?))),
            Err(Error::NoCpuForQueue { .. }) => Self::by_packet_socket(from, frame, load),
            Err(e) => Err(e),
        }
    }

    /// Starts a stream by a packet socket.
    pub fn by_packet_socket(from: &End, frame: Vec<u8>, load: Load) -> Result<Self, Error> {
        Ok(Self(Source::PacketSocket(Sending::start(from, frame, load)?)))
    }

    /// Whether the frames are made by a [`Generator`].
    pub fn is_generated(&self) -> bool {
        matches!(self.0, Source::Generator(_))
    }

    /// Frames sent so far.
    pub fn sent(&self) -> Result<u64, Error> {
        match &self.0 {
            Source::Generator(running) => running.sent(),
            Source::PacketSocket(sending) => Ok(sending.pace.sent.load(Ordering::Relaxed)),
        }
    }

    /// Tells that `frames` more were received, or are known to be lost, so that a windowed load goes
    /// on.
    pub fn received(&self, frames: u64) -> Result<(), Error> {
        match &self.0 {
            Source::Generator(running) => running.received(frames),
            Source::PacketSocket(sending) => {
                sending.pace.received.fetch_add(frames, Ordering::Relaxed);
                sending.unpark();
                Ok(())
            }
        }
    }

    /// Stops it, or waits until all of a counted load is sent if that is soon; returns how many were
    /// sent.
    pub fn stop(self) -> Result<u64, Error> {
        match self.0 {
            Source::Generator(running) => running.stop()?.sent(),
            Source::PacketSocket(mut sending) => sending.stop(),
        }
    }
}

/// What the thread of a packet socket and its owner tell each other.
#[derive(Debug, Default)]
struct Pace {
    sent: AtomicU64,
    received: AtomicU64,
    stop: AtomicBool,
}

/// A packet socket that sends, on a thread of its own.
#[derive(Debug)]
struct Sending {
    pace: Arc<Pace>,
    /// There until it is joined.
    thread: Option<JoinHandle<Result<(), Error>>>,
}

impl Sending {
    fn start(from: &End, mut frame: Vec<u8>, load: Load) -> Result<Self, Error> {
        let at = number_offset(&frame).ok_or(Error::NotNumbered)?;
        let socket = PacketSocket::open(from)?;
        let pace = Arc::<Pace>::default();
        let theirs = pace.clone();
        let work = move || {
            let mut next = 0u64;
            while !theirs.stop.load(Ordering::Relaxed) && !load.is_done(next) {
                if next >= load.limit(0, theirs.received.load(Ordering::Relaxed)) {
                    thread::park();
                    continue;
                }
                frame[at..at + size_of::<u64>()].copy_from_slice(&next.to_be_bytes());
                socket.send(&frame)?;
                next += 1;
                theirs.sent.store(next, Ordering::Relaxed);
            }
            Ok(())
        };
        let thread = thread::Builder::new()
            .name("xsk-stream".into())
            .spawn(work)
            .map_err(Error::system("starting the stream's thread"))?;
        Ok(Self { pace, thread: Some(thread) })
    }

    fn unpark(&self) {
        if let Some(thread) = &self.thread {
            // Unparking orders what was stored before it.
            thread.thread().unpark();
        }
    }

    fn stop(&mut self) -> Result<u64, Error> {
        self.pace.stop.store(true, Ordering::Relaxed);
        self.unpark();
        let result = self.thread.take().map(JoinHandle::join);
        result.unwrap_or(Ok(Ok(()))).unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok(self.pace.sent.load(Ordering::Relaxed))
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        if self.thread.is_some() {
            // What it failed with, nobody asked for.
            let _ = self.stop();
        }
    }
}
