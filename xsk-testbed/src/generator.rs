//! A source of numbered frames inside the kernel.
//!
//! The kernel's test-run facility can inject frames into the real datapath (`BPF_PROG_TEST_RUN` with
//! live frames, 5.18). An XDP program writes a running number into each and redirects it out of one
//! end; millions a second arrive at the other without a system call each.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use rustix::thread::CpuSet;
use xsk::kernel::linux::{BPF_F_TEST_XDP_LIVE_FRAMES, Linux, lookup_map, test_run};
use xsk::kernel::{Errno, Handle, Insn, MapSpec, ProgramSpec, Programs as _};
use xsk::xdp::asm::{self, Alu, Cond, Reg, Width};

use crate::frame::number_offset;
use crate::{End, Error};

const BPF_MAP_TYPE_ARRAY: u32 = 2;
/// Runs of the program a system call. Ending a call takes the kernel up to 25 ms, which should count
/// for little; but a thread that is to stop does so between two calls.
const CHUNK: u64 = 1 << 20;
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

/// The program, and what it shares with us: array maps of one `u64`, since only the value of such a
/// map has an address that a program can be given.
#[derive(Debug)]
struct Program {
    program: Handle,
    /// The next number.
    next: Handle,
    /// The first number that is not to be sent. The program drops frames from there on, so that the
    /// limit can be moved while a system call lasts.
    limit: Handle,
}

/// The only key of the maps.
const KEY: [u8; 4] = [0; 4];

impl Program {
    fn next(&self) -> Result<u64, Error> {
        let mut next = [0; size_of::<u64>()];
        lookup_map(self.next.as_fd(), &KEY, &mut next)
            .map_err(Error::system("reading the generator's number"))?;
        Ok(u64::from_ne_bytes(next))
    }

    fn set_limit(&self, limit: u64) -> Result<(), Error> {
        Linux
            .update_map(self.limit.as_fd(), &KEY, &limit.to_ne_bytes(), 0)
            .map_err(Error::system("limiting the generator"))
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
    /// they came. A short wait is spent spinning on the sending CPU.
    pub fn window(mut self, frames: u64) -> Self {
        self.window = Some(frames);
        self
    }

    /// Whether all is sent when this many frames are.
    pub(crate) fn is_done(self, sent: u64) -> bool {
        self.count.is_some_and(|count| sent >= count)
    }

    /// The first number that may not be sent yet.
    pub(crate) fn limit(self, first: u64, received: u64) -> u64 {
        let window = self.window.map_or(u64::MAX, |window| received.saturating_add(window));
        first.saturating_add(window.min(self.count.unwrap_or(u64::MAX)))
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
            key_size: KEY.len() as u32,
            value_size: size_of::<u64>() as u32,
            max_entries: 1,
            flags: 0,
            name: "xsk_generator",
        };
        let make = || Linux.create_map(&map).map_err(Error::system("making the generator's maps"));
        let (next, limit) = (make()?, make()?);
        let instructions = &program(&frame[..at], from.ifindex, next.as_fd(), limit.as_fd());
        let mut log = String::new();
        let program = Linux
            .load_program(&ProgramSpec { instructions, flags: 0, name: "xsk_generator" }, &mut log)
            .map_err(|e| Error::Program { source: e.into(), log })?;
        Ok(Self { from: from.clone(), frame, cpu: None, shared: Arc::new(Program { program, next, limit }) })
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
    ///
    /// From 64 frames on the kernel takes about 25 ms to clean up after each call, so many bursts are
    /// better one [`Load::window`].
    pub fn run(&mut self, count: u64) -> Result<(), Error> {
        let this = &*self;
        this.from.namespace.run(|| {
            this.pin()?;
            let end = this.sent()? + count;
            this.shared.set_limit(end)?;
            // More than once only if the load is large, or a signal came.
            loop {
                match end - this.sent()? {
                    0 => return Ok(()),
                    left => this.inject(left)?,
                }
            }
        })?
    }

    /// Sends in the background, on a thread of its own.
    pub fn start(self, load: Load) -> Result<Running, Error> {
        let first = self.sent()?;
        let limit = load.limit(first, 0);
        self.shared.set_limit(limit)?;
        let control = Arc::new(Control { stop: AtomicBool::new(false), limit: AtomicU64::new(limit) });
        let program = self.shared.clone();
        let theirs = control.clone();
        let thread = thread::Builder::new()
            .name("xsk-generator".into())
            .spawn(move || {
                self.from.namespace.enter()?;
                self.pin()?;
                self.work(load, first, &theirs)?;
                Ok(self)
            })
            .map_err(Error::system("starting the generator's thread"))?;
        Ok(Running { control, program, load, first, received: Mutex::new(0), thread: Some(thread) })
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
    fn work(&self, load: Load, first: u64, control: &Control) -> Result<(), Error> {
        let end = load.count.map_or(u64::MAX, |count| first.saturating_add(count));
        loop {
            let next = self.sent()?;
            if next >= end || control.stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            if next >= control.limit.load(Ordering::Relaxed) {
                // The window is used up, and stayed so for a while. `received` and `stop` unpark; one
                // that came since the check above is remembered.
                thread::park();
                continue;
            }
            // With a window some runs of the program send nothing: they wait for the limit to move.
            self.inject(if load.window.is_some() { CHUNK } else { end - next })?;
        }
    }

    /// Runs the program from the calling thread, this many times or as many as a system call may.
    /// After a signal it was less; what was sent is known by the number.
    fn inject(&self, times: u64) -> Result<(), Error> {
        let times = times.min(CHUNK) as u32;
        match test_run(self.shared.program.as_fd(), &self.frame, None, times, BPF_F_TEST_XDP_LIVE_FRAMES, 0) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(e) => Err(Error::system(format!("generating frames of {} bytes", self.frame.len()))(e)),
        }
    }
}

/// The program: below the limit it writes headers and number, and redirects; else it drops.
///
/// The kernel uses a frame's memory again as the receiver left it, so an echo, for example, would
/// come back with its addresses swapped. Hence the headers are written anew each time.
fn program(headers: &[u8], ifindex: u32, next: BorrowedFd<'_>, limit: BorrowedFd<'_>) -> Vec<Insn> {
    const DATA: Reg = Reg::R2;
    const DATA_END: Reg = Reg::R3;
    const SCRATCH: Reg = Reg::R4;
    const NEXT: Reg = Reg::R5;
    const NUMBER: Reg = Reg::R6;
    const LIMIT: Reg = Reg::R7;

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
    ];
    insns.extend(asm::load_map_value(NEXT, next.as_raw_fd(), 0));
    insns.push(asm::load(Width::Dw, NUMBER, NEXT, 0));
    insns.extend(asm::load_map_value(LIMIT, limit.as_raw_fd(), 0));
    insns.push(asm::load(Width::Dw, LIMIT, LIMIT, 0));
    // The two jumps go past the work. No frame is too short, but the verifier must see it.
    let past = work.len() as i16;
    insns.extend([
        asm::jump(Cond::Ge, NUMBER, LIMIT, past + 3),
        asm::alu(Alu::Mov, SCRATCH, DATA),
        asm::alu_imm(Alu::Add, SCRATCH, (headers.len() + size_of::<u64>()) as i32),
        asm::jump(Cond::Gt, SCRATCH, DATA_END, past),
    ]);
    insns.extend(work);
    insns.extend([asm::alu_imm(Alu::Mov, Reg::R0, asm::XDP_DROP), asm::exit()]);
    insns
}

/// What the generator's thread must know between two system calls.
#[derive(Debug)]
struct Control {
    stop: AtomicBool,
    limit: AtomicU64,
}

/// A generator at work in the background. Dropping it stops it.
#[derive(Debug)]
pub struct Running {
    control: Arc<Control>,
    program: Arc<Program>,
    load: Load,
    first: u64,
    received: Mutex<u64>,
    /// There until it is joined.
    thread: Option<JoinHandle<Result<Generator, Error>>>,
}

impl Running {
    /// Frames sent since the start.
    pub fn sent(&self) -> Result<u64, Error> {
        Ok(self.program.next()? - self.first)
    }

    /// Tells that `frames` more were received, or are known to be lost, so that a windowed load goes on.
    pub fn received(&self, frames: u64) -> Result<(), Error> {
        // Locked until the limit is set, so that a lower one never comes last.
        let mut received = self.received.lock().unwrap_or_else(PoisonError::into_inner);
        *received = received.saturating_add(frames);
        self.set_limit(self.load.limit(self.first, *received))
    }

    /// Whether it has nothing more to do: all was sent, or it failed.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits until all of a counted load is sent.
    pub fn wait(mut self) -> Result<Generator, Error> {
        self.join()
    }

    /// Stops it: nothing is sent any more when this returns.
    pub fn stop(mut self) -> Result<Generator, Error> {
        self.ask_to_stop()?;
        self.join()
    }

    fn ask_to_stop(&self) -> Result<(), Error> {
        self.control.stop.store(true, Ordering::Relaxed);
        // The system call that runs now does the rest of its work in vain, which is fast.
        self.set_limit(0)
    }

    fn set_limit(&self, limit: u64) -> Result<(), Error> {
        self.control.limit.store(limit, Ordering::Relaxed);
        let result = self.program.set_limit(limit);
        if let Some(thread) = &self.thread {
            // Unparking orders what was stored before it.
            thread.thread().unpark();
        }
        result
    }

    fn join(&mut self) -> Result<Generator, Error> {
        let thread = self.thread.take().expect("taken here alone, by callers that consume the value");
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.thread.is_some() {
            // What either failed with, nobody asked for.
            let _ = self.ask_to_stop();
            drop(self.thread.take().map(JoinHandle::join));
        }
    }
}
