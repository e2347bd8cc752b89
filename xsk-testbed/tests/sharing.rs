//! One XDP program for all processes on an interface, in whatever order they come and go.
#![cfg(target_os = "linux")]

use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use xsk::kernel::{Errno, Numbered};
use xsk::xdp::{AttachMode, DefaultProgram, Owner, Program, Steering, XskMap};
use xsk::{Cause, Device, Interest, Socket, Umem};
use xsk_sim::Sim;
use xsk_sim::wrap::{Call, Wrapper};
use xsk_testbed::{Generator, Testbed, UdpFrame, bed};

const PATIENCE: Duration = Duration::from_secs(10);

/// What another process is to do; absent in an ordinary run.
const ROLE: &str = "XSK_SHARING_ROLE";

/// Polls a condition until it holds.
#[track_caller]
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Another process in the same network namespace, that ends with its test.
struct Other {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Other {
    /// Runs [`other_process`].
    fn spawn(role: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "other_process", "--nocapture", "--test-threads=1"]);
        command.env(ROLE, role).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Self { child, lines }
    }

    /// Waits for a line that it prints.
    #[track_caller]
    fn says(&mut self, word: &str) {
        let mut said = String::new();
        while !said.lines().any(|line| line.ends_with(word)) {
            assert_ne!(self.lines.read_line(&mut said).unwrap(), 0, "it ended without {word:?}: {said}");
        }
    }

    /// Ends it, by its own doing or by `kill -9`.
    fn leave(mut self, killed: bool) {
        if killed {
            self.child.kill().unwrap();
        } else {
            drop(self.child.stdin.take());
        }
        let status = self.child.wait().unwrap();
        assert!(killed || status.success(), "{status}");
    }

    /// Waits for an end that it comes to by itself; with what it said.
    fn end(mut self) -> (ExitStatus, String) {
        let mut said = String::new();
        self.lines.read_to_string(&mut said).unwrap();
        (self.child.wait().unwrap(), said)
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Not a test of its own: the part of another process in the tests below.
#[test]
fn other_process() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let (role, number) = role.split_once(' ').unwrap();
    let number = number.parse().unwrap();
    match role {
        "receive" => receive(number),
        "come-and-go" => come_and_go(number),
        "end" => std::process::exit(number as i32),
        role => panic!("no role is called {role}"),
    }
}

/// Receives on a queue and tells how many packets came, until standard input ends.
fn receive(queue: u32) {
    static LEAVE: AtomicBool = AtomicBool::new(false);
    let device = Device::open("xsk0").unwrap();
    let (umem, mut pool) = Umem::builder().frames(256).build().unwrap();
    let mut xsk = Socket::builder(&device).queue(queue).ring_size(128).open_rx(&umem).unwrap();
    xsk.fill.refill(&mut pool, 128);
    let program = DefaultProgram::attach(&device, AttachMode::Best).unwrap();
    program.insert(&xsk.socket).unwrap();
    println!("{}", if program.is_joined() { "joined" } else { "attached" });
    thread::spawn(|| {
        std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).unwrap();
        LEAVE.store(true, Ordering::Relaxed);
    });
    let mut total = 0;
    while !LEAVE.load(Ordering::Relaxed) {
        xsk.socket.wait(Interest::Rx, Some(Duration::from_millis(10))).unwrap();
        let received = xsk.fill.extend(xsk.rx.take(64), |packet| packet.into_frame());
        if received > 0 {
            total += received;
            println!("received {total}");
        }
    }
}

/// Attaches or joins again and again, for moments; then dies in the middle of it, or ends well.
fn come_and_go(seed: u32) {
    let device = Device::open("xsk0").unwrap();
    let mut random = u64::from(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut below = |bound: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % bound
    };
    thread::sleep(Duration::from_micros(below(10_000)));
    for _ in 0..below(20) + 5 {
        let program = DefaultProgram::attach(&device, AttachMode::Best).unwrap();
        let attached = device.info().unwrap().programs().to_vec();
        assert_eq!((attached.len(), attached[0].mode), (1, Some(program.mode())), "{attached:?}");
        // A share is worth something only in the program that is attached, and its own map.
        let (umem, _pool) = Umem::builder().frames(16).build().unwrap();
        let its = device.kernel().program_info(program.attachment().program().as_fd()).unwrap();
        assert_eq!(its.id, attached[0].id);
        if let Ok(xsk) = Socket::builder(&device)
            .queue(below(4) as u32)
            .ring_size(16)
            .release_timeout(Duration::ZERO)
            .open_rx(&umem)
        {
            program.insert(&xsk.socket).unwrap();
        }
        thread::sleep(Duration::from_micros(below(3000)));
        if below(20) == 0 {
            // SAFETY: a signal to this very process, which needs nothing any more.
            unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        }
    }
}

fn device(bed: &Testbed) -> Device {
    Device::open(&bed.a().name).unwrap()
}

#[test]
fn the_other_process_can_run() {
    // Or else what it is to prove below is never tried.
    let (status, _) = Other::spawn("end 3").end();
    assert_eq!(status.code(), Some(3));
}

#[test]
fn each_process_receives_on_its_queue_whoever_leaves_and_however() {
    let Some(bed) = bed(|b| b.queues(2).single_namespace(true)) else { return };
    let device = device(&bed);
    let ids = || device.info().unwrap().programs().iter().map(|p| p.id).collect::<Vec<_>>();
    let send = |queue: u32| {
        let frame = UdpFrame::new(bed.b(), bed.a()).number(0).build().unwrap();
        Generator::new(bed.b(), frame).unwrap().to_queue(queue).unwrap().run(20).unwrap();
    };
    for (first_leaves, killed) in [(true, false), (true, true), (false, false), (false, true)] {
        let mut first = Other::spawn("receive 0");
        first.says("attached");
        let program = ids();
        assert_eq!(program.len(), 1);
        let mut second = Other::spawn("receive 1");
        second.says("joined");
        for (queue, process) in (0..).zip([&mut first, &mut second]) {
            send(queue);
            process.says("received 20");
        }

        let (leaver, mut stayer, queue) = if first_leaves { (first, second, 1) } else { (second, first, 0) };
        leaver.leave(killed);
        assert_eq!(ids(), program, "the program stays with the other");
        send(queue);
        stayer.says("received 40");

        // The queue that was left is free for the next.
        let mut third = Other::spawn(&format!("receive {}", 1 - queue));
        third.says("joined");
        send(1 - queue);
        third.says("received 20");

        stayer.leave(killed);
        assert_eq!(ids(), program);
        third.leave(killed);
        eventually("the program is gone with its last user", || ids().is_empty());
    }
}

#[test]
fn processes_that_come_and_go_at_random_leave_nothing_and_never_fail() {
    let Some(bed) = bed(|b| b.queues(4)) else { return };
    let device = device(&bed);
    let mut killed = 0;
    for round in 0..3 {
        let others: Vec<_> =
            (0..20).map(|n| Other::spawn(&format!("come-and-go {}", round * 20 + n + 1))).collect();
        for other in others {
            let (status, said) = other.end();
            let by_kill = status.signal() == Some(libc::SIGKILL);
            assert!(by_kill || status.success(), "{status}: {said}");
            killed += usize::from(by_kill);
        }
        eventually("the program is gone", || device.info().unwrap().programs().is_empty());
    }
    assert!((1..60).contains(&killed), "{killed} of 60 were killed");
}

#[test]
fn threads_of_one_process_share_as_processes_do() {
    let Some(bed) = bed(|b| b) else { return };
    let device = device(&bed);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..50 {
                    let program = DefaultProgram::attach(&device, AttachMode::Native).unwrap();
                    assert_eq!(program.mode(), AttachMode::Native);
                }
            });
        }
    });
    assert!(device.info().unwrap().programs().is_empty());
}

#[test]
fn only_what_is_steered_to_the_sockets_reaches_them() {
    let Some(bed) = bed(|b| b) else { return };
    let device = device(&bed);
    let (umem, mut pool) = Umem::builder().frames(64).build().unwrap();
    let mut xsk = Socket::builder(&device).fill_from(&mut pool, 32).open_rx(&umem).unwrap();
    let steering = Steering::udp_ports([4242]);
    let first = DefaultProgram::attach_with(&device, &steering, AttachMode::Best).unwrap();
    let second = DefaultProgram::attach_with(&device, &steering, AttachMode::Best).unwrap();
    assert_eq!((first.is_joined(), second.is_joined()), (false, true));
    let name = device.info().unwrap().programs()[0].name.clone();
    assert_eq!(name.as_deref(), Some("xsk_udp_4242"));
    // What one of them enters, the program sees, whoever attached it.
    second.insert(&xsk.socket).unwrap();
    drop(first);

    let theirs = bed.b().udp(0).unwrap();
    let ours = std::net::UdpSocket::bind((bed.a().ipv4, 5555)).unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    theirs.send_to(b"to the socket", (bed.a().ipv4, 4242)).unwrap();
    theirs.send_to(b"to the stack", (bed.a().ipv4, 5555)).unwrap();
    let mut buffer = [0; 64];
    let len = ours.recv(&mut buffer).unwrap();
    assert_eq!(&buffer[..len], b"to the stack");
    assert!(xsk.socket.wait(Interest::Rx, Some(PATIENCE)).unwrap().rx);
    let received: Vec<_> = xsk.rx.take(8).map(|packet| packet[42..].to_vec()).collect();
    assert_eq!(received, [b"to the socket"]);
}

// --- the simulated kernel

#[test]
fn the_simulated_program_lives_until_its_last_user_is_gone() {
    let sim = Sim::new();
    let device = sim.device("sim0").unwrap();
    let attached = || device.info().unwrap().programs().len();
    let first = DefaultProgram::attach(&device, AttachMode::Generic).unwrap();
    let second = DefaultProgram::attach(&device, AttachMode::Best).unwrap();
    let third = DefaultProgram::attach(&device, AttachMode::Generic).unwrap();
    let joined = [&first, &second, &third].map(DefaultProgram::is_joined);
    assert_eq!((joined, attached()), ([false, true, true], 1));
    assert_eq!(second.mode(), AttachMode::Generic);
    let on_the_other = DefaultProgram::attach(&sim.device("sim1").unwrap(), AttachMode::Best).unwrap();
    assert!(!on_the_other.is_joined(), "each interface has a program of its own");

    let (umem, mut pool) = Umem::builder().frames(16).build().unwrap();
    let mut xsk = Socket::builder(&device).ring_size(16).fill_from(&mut pool, 8).open_rx(&umem).unwrap();
    second.insert(&xsk.socket).unwrap();
    drop((first, second));
    assert_eq!(attached(), 1);
    sim.inject("sim0", &[7; 60]).unwrap();
    sim.run();
    assert_eq!(xsk.rx.take(8).map(|packet| packet.len()).collect::<Vec<_>>(), [60]);
    drop(third);
    assert_eq!(attached(), 0);
    assert!(!DefaultProgram::attach(&device, AttachMode::Best).unwrap().is_joined());
}

#[test]
fn what_can_not_be_shared_on_the_simulated_kernel_is_told() {
    let sim = Sim::new();
    let device = sim.device("sim0").unwrap();
    let attach = |steering: &Steering, mode| DefaultProgram::attach_with(&device, steering, mode);
    let (all, dns) = (Steering::all(), Steering::udp_ports([53]));
    let is_this = |owner: &Owner| matches!(owner, Owner::Processes(processes) if processes.len() == 1 && processes[0].pid == std::process::id());

    let first = attach(&dns, AttachMode::Native).unwrap();
    let error = attach(&all, AttachMode::Best).unwrap_err();
    let Cause::OtherRules { mode: AttachMode::Native, rules, asked, owner, .. } = error.cause() else {
        panic!("{error}")
    };
    assert_eq!((&rules[..], &asked[..], is_this(owner)), ("udp dst port 53", "all packets", true));
    let error = attach(&dns, AttachMode::Generic).unwrap_err();
    assert!(
        matches!(error.cause(), Cause::OtherMode { mode: AttachMode::Native, owner, .. } if is_this(owner))
    );
    drop(first);

    // One that merely has the name is somebody else's.
    let kernel = sim.kernel();
    let pass = [
        xsk::xdp::asm::alu_imm(xsk::xdp::asm::Alu::Mov, xsk::xdp::asm::Reg::R0, xsk::xdp::asm::XDP_PASS),
        xsk::xdp::asm::exit(),
    ];
    let spec = xsk::kernel::ProgramSpec { instructions: &pass, flags: 0, name: "xsk_redirect" };
    let foreign = kernel.load_program(&spec, &mut String::new()).unwrap();
    let link = kernel.attach((*foreign).as_fd(), device.index(), 0).unwrap();
    let error = attach(&all, AttachMode::Best).unwrap_err();
    let Cause::ProgramPresent { name, owner, .. } = error.cause() else { panic!("{error}") };
    assert_eq!(
        (name.as_deref(), is_this(owner), error.errno()),
        (Some("xsk_redirect"), true, Some(Errno::BUSY))
    );
    drop(link);
    drop(attach(&all, AttachMode::Best).unwrap());
}

#[test]
fn a_program_can_be_joined_only_by_who_may_open_it() {
    let sim = Sim::new();
    let _first = DefaultProgram::attach(&sim.device("sim0").unwrap(), AttachMode::Best).unwrap();
    let opening = [Numbered::Program, Numbered::Map, Numbered::Link].map(Call::OpenById);
    for call in opening.into_iter().chain([Call::NextLink]) {
        let kernel = Wrapper::around(sim.kernel()).refuse(call, Errno::PERM).build();
        let device = Device::open_on(kernel.kernel(), "sim0").unwrap();
        let error = DefaultProgram::attach(&device, AttachMode::Best).unwrap_err();
        let Cause::SharingNeedsCapability { mode: AttachMode::Native, owner: Owner::Processes(_), .. } =
            error.cause()
        else {
            panic!("{call:?}: {error}")
        };
        assert!(
            error.remedy().contains("cap_sys_admin") && error.remedy().contains("join_kept"),
            "{error:#}"
        );
    }
}

#[test]
fn a_program_that_is_neither_there_to_be_joined_nor_gone_is_told_in_the_end() {
    let sim = Sim::new();
    let device = sim.device("sim0").unwrap();
    let map = XskMap::new(&device).unwrap();
    let _attached = Program::redirect(&map).unwrap().attach(&device, AttachMode::Best).unwrap();
    let no_links = Wrapper::around(sim.kernel()).refuse(Call::NextLink, Errno::NOENT).build();
    let device = Device::open_on(no_links.kernel(), "sim0").unwrap();
    let error = DefaultProgram::attach(&device, AttachMode::Best).unwrap_err();
    assert!(matches!(error.cause(), Cause::ProgramPresent { owner: Owner::Processes(_), .. }), "{error}");
}
