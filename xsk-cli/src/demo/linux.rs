//! The demo's parts on the real kernel: a veth pair in private network namespaces.
//!
//! This thread is next to end `a`, where the loops work. Packets come from the other end, and go there.

use std::io;
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use xsk::Device;
use xsk::kernel::linux::Linux;
use xsk::kernel::{Handle, ProgramSpec, Programs as _, XDP_FLAGS_DRV_MODE};
use xsk::xdp::asm::{self, Alu, Reg};
use xsk_testbed::{Generator, Load, Running, Testbed, UdpFrame};

use super::{PACKET, Part, REST, RoundTrips, Stage, all_arrived, forward, receive, send, until};
use crate::failure::Failure;
use crate::sample::l2fwd;

/// Packets of the generator that may be on the way at a time: as many as a veth queue holds, so that none
/// is lost however late their turn comes.
const WINDOW: u64 = 128;
/// The generator is told of this many received packets at a time: telling takes a system call.
const TELL: u64 = WINDOW / 4;
/// The port that answers.
const ECHO: u16 = 7;
/// Round trips before the measured ones.
const WARM_UP: u64 = 200;
/// Round trips that are measured even if they take longer than they should.
const ENOUGH: usize = 1000;
/// How often the UDP server looks whether it is still needed.
const LOOK: Duration = Duration::from_millis(50);
/// How long an answer may take before it counts as lost.
const ANSWER: Duration = Duration::from_secs(1);

/// Two devices of this process's own.
#[derive(Debug)]
pub(super) struct Veth(Testbed);

fn system(doing: &'static str) -> impl FnOnce(io::Error) -> Failure {
    move |error| {
        let remedy = "see what the kernel says: dmesg".to_owned();
        Failure::new(doing, error.to_string(), "It is an ordinary socket on a private device.", remedy)
    }
}

impl Veth {
    pub(super) fn new() -> Result<Self, xsk_testbed::Error> {
        Ok(Self(Testbed::builder().build()?))
    }

    fn device(&self) -> Result<Device, Failure> {
        Ok(Device::open(&self.0.a().name)?)
    }

    /// A source of packets to this end.
    fn generator(&self) -> Result<Generator, Failure> {
        let (here, there) = (self.0.a(), self.0.b());
        let frame = UdpFrame::new(there, here).len(PACKET).number(0).build()?;
        Ok(Generator::new(there, frame)?)
    }

    /// A program at the other end that drops what arrives, as fast as can be, for as long as the handle
    /// lives.
    fn drop_at_peer(&self) -> Result<Handle, Failure> {
        let instructions = [asm::alu_imm(Alu::Mov, Reg::R0, asm::XDP_DROP), asm::exit()];
        let spec = ProgramSpec { instructions: &instructions, flags: 0, name: "xsk_demo_drop" };
        let index = self.0.b().ifindex;
        let attached = self.0.peer(|| {
            let program = Linux.load_program(&spec, &mut String::new())?;
            Linux.attach(program.as_fd(), index, XDP_FLAGS_DRV_MODE)
        })?;
        attached.map_err(|errno| system("cannot attach a program to the other device")(errno.into()))
    }

    /// Packets that the other end has received so far.
    fn arrived(&self) -> Result<u64, Failure> {
        Ok(self.0.b().link()?.counters.rx_packets)
    }

    /// Packets that the other end has received since it had `before`, once they are `expected` or no
    /// more come.
    fn arrived_since(&self, before: u64, expected: u64) -> Result<u64, Failure> {
        let deadline = Instant::now() + REST;
        loop {
            let arrived = self.arrived()? - before;
            if arrived >= expected || Instant::now() > deadline {
                return Ok(arrived);
            }
            thread::yield_now();
        }
    }
}

/// A generator that works for some time, and whose packets are counted back.
enum Source {
    /// It starts with the first turn of the loop, when there is somebody to receive.
    Ready {
        generator: Generator,
        time: Duration,
    },
    Running {
        generator: Running,
        told: u64,
        deadline: Instant,
    },
    /// It has sent so much, and the rest should be back before the deadline.
    Stopped {
        sent: u64,
        deadline: Instant,
    },
    Failed(Failure),
}

impl Source {
    /// Whether to go on, when `back` of its packets are back: until the time is over, and then until all
    /// are.
    fn go_on(&mut self, back: u64) -> bool {
        match self {
            Self::Running { generator, told, deadline } => {
                if back - *told >= TELL {
                    if let Err(error) = generator.received(back - *told) {
                        *self = Self::Failed(error.into());
                        return false;
                    }
                    *told = back;
                }
                if Instant::now() >= *deadline || generator.is_finished() {
                    self.advance(|source| source.stop());
                }
                true
            }
            Self::Stopped { sent, deadline } => back < *sent && Instant::now() < *deadline,
            Self::Ready { .. } => {
                self.advance(|source| source.start());
                true
            }
            Self::Failed(_) => false,
        }
    }

    fn advance(&mut self, step: impl FnOnce(Self) -> Result<Self, xsk_testbed::Error>) {
        let idle = Self::Stopped { sent: 0, deadline: Instant::now() };
        *self = step(std::mem::replace(self, idle)).unwrap_or_else(|error| Self::Failed(error.into()));
    }

    fn start(self) -> Result<Self, xsk_testbed::Error> {
        let Self::Ready { generator, time } = self else { return Ok(self) };
        let generator = generator.start(Load::endless().window(WINDOW))?;
        Ok(Self::Running { generator, told: 0, deadline: Instant::now() + time })
    }

    fn stop(self) -> Result<Self, xsk_testbed::Error> {
        let Self::Running { generator, .. } = self else { return Ok(self) };
        Ok(Self::Stopped { sent: generator.stop()?.sent()?, deadline: Instant::now() + REST })
    }

    /// What it sent.
    fn sent(self) -> Result<u64, Failure> {
        match self {
            Self::Stopped { sent, .. } => Ok(sent),
            Self::Failed(failure) => Err(failure),
            Self::Ready { .. } | Self::Running { .. } => Ok(0),
        }
    }
}

impl Stage for Veth {
    fn rxdrop(&self, time: Duration) -> Result<Part, Failure> {
        let device = self.device()?;
        let mut source = Source::Ready { generator: self.generator()?, time };
        let done = receive(&device, |received| source.go_on(received))?;
        let (sent, received) = (source.sent()?, done.received);
        Ok(done.into_part(all_arrived(sent, received, "received")))
    }

    fn txonly(&self, time: Duration) -> Result<Part, Failure> {
        let _drop = self.drop_at_peer()?;
        let before = self.arrived()?;
        let packet = UdpFrame::new(self.0.a(), self.0.b()).len(PACKET).build()?;
        let done = send(&self.device()?, &packet, until(Instant::now() + time))?;
        let sent = done.sent;
        let arrived = self.arrived_since(before, sent)?;
        Ok(done.into_part(all_arrived(sent, arrived, "arrived")))
    }

    fn l2fwd(&self, time: Duration) -> Result<Part, Failure> {
        let _drop = self.drop_at_peer()?;
        let before = self.arrived()?;
        let device = self.device()?;
        let mut source = Source::Ready { generator: self.generator()?, time };
        let done = forward(&device, "l2fwd", l2fwd::swap_macs, |forwarded| source.go_on(forwarded))?;
        let sent = source.sent()?;
        let arrived = self.arrived_since(before, sent)?;
        Ok(done.into_part(all_arrived(sent, arrived, "came back")))
    }

    fn latency(&self, time: Duration) -> Result<Part, Failure> {
        let udp = self.udp_round_trips(time / 2)?;
        let device = self.device()?;
        let client = self.client()?;
        let over = AtomicBool::new(false);
        let (done, times) = thread::scope(|scope| {
            let ask = || {
                let _over = OnDrop(|| over.store(true, Ordering::Relaxed));
                ping_pong(&client, time / 2)
            };
            let mut asking = None;
            let done = forward(&device, "latency", l2fwd::reflect, |_| {
                // Not before there is somebody to answer.
                asking.get_or_insert_with(|| scope.spawn(ask));
                !over.load(Ordering::Relaxed)
            })?;
            let times =
                asking.map(|asking| asking.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            Ok::<_, Failure>((done, times.unwrap_or_else(|| Ok(RoundTrips::new(Vec::new())))))
        })?;
        let times = times.map_err(system("cannot measure round trips through AF_XDP"))?;
        Ok(done.into_latency(times, Some(udp)))
    }
}

impl Veth {
    /// A UDP socket at the other end that asks this end's echo port.
    fn client(&self) -> Result<UdpSocket, Failure> {
        let client = self.0.b().udp(0)?;
        let connected =
            client.connect((self.0.a().ipv4, ECHO)).and_then(|()| client.set_read_timeout(Some(ANSWER)));
        connected.map_err(system("cannot prepare a UDP socket"))?;
        Ok(client)
    }

    /// Round trips whose answers come from a UDP socket at this end.
    fn udp_round_trips(&self, time: Duration) -> Result<RoundTrips, Failure> {
        let server = self.0.a().udp(ECHO)?;
        server.set_read_timeout(Some(LOOK)).map_err(system("cannot prepare a UDP socket"))?;
        let client = self.client()?;
        let over = AtomicBool::new(false);
        let times = thread::scope(|scope| {
            scope.spawn(|| {
                let mut buffer = [0; PACKET];
                while !over.load(Ordering::Relaxed) {
                    // What can't be answered is missed by who asked.
                    if let Ok((len, from)) = server.recv_from(&mut buffer) {
                        let _ = server.send_to(&buffer[..len], from);
                    }
                }
            });
            let _over = OnDrop(|| over.store(true, Ordering::Relaxed));
            ping_pong(&client, time)
        });
        times.map_err(system("cannot measure round trips through UDP sockets"))
    }
}

/// Does something at the end of a scope, also when it panics.
struct OnDrop<F: Fn()>(F);

impl<F: Fn()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// Sends and waits for the answer, again and again, for some time and a least number of times.
fn ping_pong(client: &UdpSocket, time: Duration) -> io::Result<RoundTrips> {
    let mut times = Vec::with_capacity(1 << 17);
    let begin = Instant::now();
    for number in 0u64.. {
        let asked = Instant::now();
        let limit = if times.len() < ENOUGH { time.max(REST) } else { time };
        if asked - begin >= limit {
            break;
        }
        client.send(&number.to_be_bytes())?;
        let mut answer = [0; PACKET];
        // An answer that came too late for its question is not this one's.
        while client.recv(&mut answer)? != 8 || answer[..8] != number.to_be_bytes() {}
        if number >= WARM_UP {
            times.push(asked.elapsed());
        }
    }
    Ok(RoundTrips::new(times))
}
