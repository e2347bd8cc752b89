//! A source of numbered frames inside the kernel.
//!
//! The kernel's test-run facility can inject frames into the real datapath (`BPF_PROG_TEST_RUN` with
//! live frames, 5.18). An XDP program writes a running number into each and redirects it out of one
//! end; millions a second arrive at the other without a system call each.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use rustix::thread::CpuSet;
use xsk::kernel::linux::{BPF_F_TEST_XDP_LIVE_FRAMES, Linux, lookup_map, test_run};
use xsk::kernel::{Errno, Handle, Insn, MapSpec, ProgramSpec, Programs as _};
use xsk::xdp::asm::{self, Alu, Cond, Reg, Width};

use crate::frame::number_offset;
use crate::{End, Error};

const BPF_MAP_TYPE_ARRAY: u32 = 2;
/// Frames a system call: long enough that its set-up counts for little, and a few milliseconds until
/// a stop is heard.
const CHUNK: u64 = 1 << 14;
/// `VLAN_HLEN` and the Ethernet header: what a frame may have beyond the MTU.
const BEYOND_MTU: usize = 18;

/// Sends numbered frames from one end to the other, made inside the kernel.
///
/// The receiving end takes them only with a native XDP program, or with GRO on
/// ([`Builder::gro`](crate::Builder::gro)); else they vanish, and are counted as sent. Its receive
/// queue is the sending CPU modulo its queues: see [`Self::to_queue`]. The kernel sends 64 at a time
/// and lets the receiver's softirq work in between, but a veth queue holds 256 frames, and what an
/// AF_XDP socket has no room for is dropped: to lose nothing, pace it with [`Load::window`].
///
/// Numbers begin with 0 and go on from run to run.
#[derive(Debug)]
pub struct Generator {
    from: End,
    frame: Vec<u8>,
    cpu: Option<usize>,
    shared: Arc<Program>,
}

/// The program, and the map with the next number.
#[derive(Debug)]
struct Program {
    program: Handle,
    /// An array map of one `u64`.
    next: Handle,
}

impl Program {
    fn next(&self) -> Result<u64, Error> {
        let mut next = [0; size_of::<u64>()];
        lookup_map(self.next.as_fd(), &0u32.to_ne_bytes(), &mut next)
            .map_err(Error::system("reading the generator's number"))?;
        Ok(u64::from_ne_bytes(next))
    }
}

/// How much a generator sends in the background.
#[derive(Clone, Copy, Debug, Default)]
pub struct Load {
    count: Option<u64>,
    window: Option<u64>,
}

impl Load {
    /// As much as it can, until it is stopped.
    pub fn endless() -> Self {
        Self::default()
    }

    /// This many frames.
    pub fn count(count: u64) -> Self {
        Self { count: Some(count), window: None }
    }

    /// Never has more than `frames` on the way: it waits until [`Running::received`] has said that
    /// they came, and goes on when half of them have.
    pub fn window(mut self, frames: u64) -> Self {
        self.window = Some(frames);
        self
    }
}

impl Generator {
    /// A generator of copies of `frame`, a numbered [`UdpFrame`](crate::UdpFrame), out of `from`.
    ///
    /// The kernel takes frames of up to about 3400 bytes. One that is longer than the MTU would
    /// vanish, and is refused here.
    pub fn new(from: &End, frame: Vec<u8>) -> Result<Self, Error> {
        let at = number_offset(&frame).ok_or(Error::NotNumbered)?;
        let most = from.link()?.mtu as usize + BEYOND_MTU;
        if frame.len() > most {
            return Err(Error::FrameTooLong { len: frame.len(), most });
        }
        let map = MapSpec {
            kind: BPF_MAP_TYPE_ARRAY,
            key_size: 4,
            value_size: size_of::<u64>() as u32,
            max_entries: 1,
            flags: 0,
            name: "xsk_generator",
        };
        let next = Linux.create_map(&map).map_err(Error::system("making the generator's map"))?;
        let instructions = &program(&frame[..at], from.ifindex, next.as_fd());
        let mut log = String::new();
        let program = Linux
            .load_program(&ProgramSpec { instructions, flags: 0, name: "xsk_generator" }, &mut log)
            .map_err(|e| Error::Program { source: e.into(), log })?;
        Ok(Self { from: from.clone(), frame, cpu: None, shared: Arc::new(Program { program, next }) })
    }

    /// Sends from this CPU.
    pub fn on_cpu(mut self, cpu: usize) -> Self {
        self.cpu = Some(cpu);
        self
    }

    /// Sends from a CPU from which frames arrive at this receive queue.
    pub fn to_queue(self, queue: u32) -> Result<Self, Error> {
        let queues = self.from.queues;
        let usable =
            rustix::thread::sched_getaffinity(None).map_err(Error::system("listing the usable CPUs"))?;
        let leads_there =
            |cpu: &usize| usable.is_set(*cpu) && *cpu as u64 % u64::from(queues) == u64::from(queue);
        match (0..CpuSet::MAX_CPU).find(leads_there) {
            Some(cpu) => Ok(self.on_cpu(cpu)),
            None => Err(Error::NoCpuForQueue { queue, queues }),
        }
    }

    /// Frames sent so far, which is the next number.
    pub fn sent(&self) -> Result<u64, Error> {
        self.shared.next()
    }

    /// Sends `count` frames, and returns when they are sent.
    pub fn run(&mut self, count: u64) -> Result<(), Error> {
        let this = &*self;
        this.from.namespace.run(|| {
            this.pin()?;
            this.send(count, || false)
        })?
    }

    /// Sends in the background, on a thread of its own.
    pub fn start(self, load: Load) -> Result<Running, Error> {
        let first = self.sent()?;
        let control = Arc::new(Control::default());
        let program = self.shared.clone();
        let theirs = control.clone();
        let thread = thread::Builder::new()
            .name("xsk-generator".into())
            .spawn(move || {
                let generator = self;
                generator.from.namespace.enter()?;
                generator.pin()?;
                generator.work(load, &theirs)?;
                Ok(generator)
            })
            .map_err(Error::system("starting the generator's thread"))?;
        Ok(Running { control, program, first, thread: Some(thread) })
    }

    /// Moves the calling thread to the generator's CPU.
    fn pin(&self) -> Result<(), Error> {
        let Some(cpu) = self.cpu else { return Ok(()) };
        let mut set = CpuSet::new();
        if cpu < CpuSet::MAX_CPU {
            set.set(cpu);
        }
        rustix::thread::sched_setaffinity(None, &set)
            .map_err(Error::system(format!("moving the generator to CPU {cpu}")))
    }

    /// Sends until the load is done or a stop is asked for.
    fn work(&self, load: Load, control: &Control) -> Result<(), Error> {
        let count = load.count.unwrap_or(u64::MAX);
        let stop = || control.stop.load(Ordering::Relaxed);
        let mut sent = 0;
        while sent < count && !stop() {
            let on_the_way =
                |window| sent.saturating_sub(control.received.load(Ordering::Relaxed)).min(window);
            let room = load.window.map_or(CHUNK, |window| window - on_the_way(window));
            if room == 0 {
                // `received` and `stop` unpark; one that came since the check above is remembered.
                thread::park();
                continue;
            }
            let burst = room.min(count - sent).min(CHUNK);
            self.send(burst, stop)?;
            sent += burst;
        }
        Ok(())
    }

    /// Sends `count` frames from the calling thread, unless `stop` says so before.
    fn send(&self, count: u64, stop: impl Fn() -> bool) -> Result<(), Error> {
        let end = self.sent()? + count;
        let mut left = count;
        while left > 0 && !stop() {
            let program = self.shared.program.as_fd();
            match test_run(program, &self.frame, None, left.min(CHUNK) as u32, BPF_F_TEST_XDP_LIVE_FRAMES, 0)
            {
                Ok(_) => {}
                // A signal: how many were sent, the map knows.
                Err(Errno::INTR) => {}
                Err(e) => {
                    let doing = format!("generating frames of {} bytes", self.frame.len());
                    return Err(Error::system(doing)(e));
                }
            }
            left = end - self.sent()?;
        }
        Ok(())
    }
}

/// The program: writes headers and number, and redirects.
///
/// The kernel uses a frame's memory again as the receiver left it, so an echo, for example, would
/// come back with its addresses swapped. Hence the headers are written anew each time.
fn program(headers: &[u8], ifindex: u32, next: BorrowedFd<'_>) -> Vec<Insn> {
    const DATA: Reg = Reg::R2;
    const DATA_END: Reg = Reg::R3;
    const SCRATCH: Reg = Reg::R4;
    const NEXT: Reg = Reg::R5;
    const NUMBER: Reg = Reg::R6;

    let at = headers.len();
    let mut work = Vec::new();
    let mut words = headers.chunks_exact(4);
    let mut offset = 0;
    for word in &mut words {
        let imm = i32::from_ne_bytes([word[0], word[1], word[2], word[3]]);
        work.push(asm::store_imm(Width::W, DATA, offset, imm));
        offset += 4;
    }
    for &byte in words.remainder() {
        work.push(asm::store_imm(Width::B, DATA, offset, byte.into()));
        offset += 1;
    }
    // A load and a store do: one generator runs on one CPU at a time.
    work.extend(asm::load_map_value(NEXT, next.as_raw_fd(), 0));
    work.push(asm::load(Width::Dw, NUMBER, NEXT, 0));
    work.push(asm::alu(Alu::Mov, SCRATCH, NUMBER));
    work.push(asm::alu_imm(Alu::Add, SCRATCH, 1));
    work.push(asm::store(Width::Dw, NEXT, 0, SCRATCH));
    work.push(asm::to_be(NUMBER, 64));
    work.push(asm::store(Width::Dw, DATA, offset, NUMBER));
    work.push(asm::alu_imm(Alu::Mov, Reg::R1, ifindex as i32));
    work.push(asm::alu_imm(Alu::Mov, Reg::R2, 0));
    work.push(asm::call(asm::FN_REDIRECT));
    work.push(asm::exit());

    let mut insns = vec![
        asm::load(Width::W, DATA, Reg::R1, asm::XDP_MD_DATA),
        asm::load(Width::W, DATA_END, Reg::R1, asm::XDP_MD_DATA_END),
        asm::alu(Alu::Mov, SCRATCH, DATA),
        asm::alu_imm(Alu::Add, SCRATCH, (at + size_of::<u64>()) as i32),
        asm::jump(Cond::Gt, SCRATCH, DATA_END, work.len() as i16),
    ];
    insns.extend(work);
    // Never reached, but the verifier must see that no frame is too short.
    insns.extend([asm::alu_imm(Alu::Mov, Reg::R0, asm::XDP_DROP), asm::exit()]);
    insns
}

#[derive(Debug, Default)]
struct Control {
    stop: AtomicBool,
    received: AtomicU64,
}

/// A generator at work in the background. Dropping it stops it.
#[derive(Debug)]
pub struct Running {
    control: Arc<Control>,
    program: Arc<Program>,
    first: u64,
    /// There until it is joined.
    thread: Option<JoinHandle<Result<Generator, Error>>>,
}

impl Running {
    /// Frames sent since the start.
    pub fn sent(&self) -> Result<u64, Error> {
        Ok(self.program.next()? - self.first)
    }

    /// Tells that `frames` more were received, or are known to be lost, so that a windowed load goes on.
    pub fn received(&self, frames: u64) {
        self.control.received.fetch_add(frames, Ordering::Relaxed);
        self.wake();
    }

    /// Whether it has nothing more to do: all was sent, or it failed.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits until all of a counted load is sent.
    pub fn wait(mut self) -> Result<Generator, Error> {
        self.join()
    }

    /// Stops it, within milliseconds.
    pub fn stop(mut self) -> Result<Generator, Error> {
        self.ask_to_stop();
        self.join()
    }

    fn ask_to_stop(&self) {
        self.control.stop.store(true, Ordering::Relaxed);
        self.wake();
    }

    fn wake(&self) {
        if let Some(thread) = &self.thread {
            // Unparking orders what was stored before it.
            thread.thread().unpark();
        }
    }

    fn join(&mut self) -> Result<Generator, Error> {
        let thread = self.thread.take().expect("taken here alone, by callers that consume the value");
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.ask_to_stop();
            // What it failed with, nobody asked for.
            drop(self.thread.take().map(JoinHandle::join));
        }
    }
}
