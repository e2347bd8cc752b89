//! The command on the real kernel, inside a testbed: a child process is born into the network namespace
//! of the thread that starts it.

use std::io::{BufRead, BufReader, Read};
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use serde_json::Value;
use xsk::kernel::linux::Linux;
use xsk::kernel::{Handle, ProgramSpec, Programs as _, XDP_FLAGS_DRV_MODE};
use xsk::xdp::asm::{self, Alu, Reg};
use xsk::{Device, Socket, Umem};
use xsk_testbed::{Channels, End, Generator, PacketSocket, Testbed, UdpFrame, bed};

/// How long something may take that is expected to happen.
const SOON: Duration = Duration::from_secs(20);

/// A running `xsk … --json`. Dropping it kills it.
struct Xsk {
    child: Child,
    lines: Receiver<Value>,
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xsk"));
    command.args(arguments).env_remove("SSH_CONNECTION");
    command
}

impl Xsk {
    /// Starts one and waits until it is at work.
    fn start(arguments: &[&str]) -> Self {
        let xsk = Self::spawn(arguments);
        let start = xsk.next();
        assert_eq!(start["event"], "start", "{start}");
        xsk
    }

    fn spawn(arguments: &[&str]) -> Self {
        let mut child = command(arguments).arg("--json").stdout(Stdio::piped()).spawn().unwrap();
        let stdout = child.stdout.take().unwrap();
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"));
                if sender.send(value).is_err() {
                    break;
                }
            }
        });
        Self { child, lines }
    }

    fn next(&self) -> Value {
        match self.lines.recv_timeout(SOON) {
            Ok(value) => value,
            Err(RecvTimeoutError::Timeout) => panic!("no output for {SOON:?}"),
            Err(RecvTimeoutError::Disconnected) => panic!("it ended without saying so"),
        }
    }

    /// Waits until the intervals from now on add up to `n` of `key`.
    #[track_caller]
    fn wait_for(&self, key: &str, n: u64) {
        let deadline = Instant::now() + SOON;
        let mut sum = 0;
        while sum < n {
            assert!(Instant::now() < deadline, "{sum} of {n} {key}");
            let value = self.next();
            match value["event"].as_str() {
                Some("interval") => sum += value[key].as_u64().unwrap(),
                // A link takes a moment to be there.
                Some("link") => {}
                _ => panic!("{value}"),
            }
        }
    }

    /// Waits until it tells of a change of an interface.
    #[track_caller]
    fn wait_for_change(&self, interface: &str, change: &str) -> Value {
        let deadline = Instant::now() + SOON;
        loop {
            assert!(Instant::now() < deadline, "no {change} of {interface}");
            let value = self.next();
            if value["event"] == "link" && value["change"] == change {
                assert_eq!(value["interface"], interface, "{value}");
                return value;
            }
            assert!(value["event"] == "interval" || value["event"] == "link", "{value}");
        }
    }

    /// Its working threads, by name, and the CPUs that each may run on.
    fn threads(&self) -> Vec<(String, String)> {
        let read = |path: std::path::PathBuf| std::fs::read_to_string(path).unwrap_or_default();
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let thread = |task: std::io::Result<std::fs::DirEntry>| {
            let task = task.unwrap().path();
            let name = read(task.join("comm")).trim().to_owned();
            let status = read(task.join("status"));
            let cpus = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
            name.starts_with("xsk-").then(|| (name, cpus.trim().to_owned()))
        };
        let mut threads: Vec<_> = tasks.filter_map(thread).collect();
        threads.sort();
        threads
    }

    /// Waits until it has so many working threads that may run on the CPUs that they should.
    #[track_caller]
    fn wait_for_threads(&self, n: usize, on: impl Fn(&str) -> bool) {
        let deadline = Instant::now() + SOON;
        loop {
            let threads = self.threads();
            if threads.len() == n && threads.iter().all(|(_, cpus)| on(cpus)) {
                return;
            }
            assert!(Instant::now() < deadline, "{threads:?}");
            thread::yield_now();
        }
    }

    /// `kill -9`.
    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn signal(&self, signal: libc::c_int) {
        // SAFETY: no pointers; the child was not waited for, so the number is still its own.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, signal) }, 0);
    }

    /// What it says last, and its exit status.
    fn finish(mut self) -> (Value, Option<i32>) {
        let mut last = Value::Null;
        loop {
            match self.lines.recv_timeout(SOON) {
                Ok(value) => last = value,
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => panic!("it does not end"),
            }
        }
        (last, self.child.wait().unwrap().code())
    }

    /// Ctrl-C, and the summary.
    fn interrupt(self) -> Value {
        self.signal(libc::SIGINT);
        let (summary, status) = self.finish();
        assert_eq!(summary["event"], "summary", "{summary}");
        assert_eq!(status, Some(0));
        summary
    }
}

impl Drop for Xsk {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn programs(bed: &Testbed) -> usize {
    Device::open(&bed.a().name).unwrap().info().unwrap().programs().len()
}

/// All frames of the summary's census are somewhere, and none is lost.
fn assert_conserved(summary: &Value) {
    let census = &summary["statistics"]["census"];
    let sum: i64 = ["pools", "depot", "fill", "tx", "rx", "completion", "kernel", "retired"]
        .iter()
        .map(|key| census[key].as_i64().unwrap())
        .sum();
    assert_eq!(Some(sum), census["total"].as_i64(), "{summary}");
    assert_eq!(census["program"], 0, "{summary}");
    assert_eq!(summary["statistics"]["faults"], 0);
}

#[test]
fn rxdrop_receives_exactly_what_was_sent() {
    let Some(bed) = bed(|b| b) else { return };
    let peer = PacketSocket::open(bed.b()).unwrap();
    for more in [&[][..], &["--poll"], &["--generic"], &["--native", "--copy", "--no-need-wakeup", "-b", "7"]]
    {
        let xsk = Xsk::start(&[&["rxdrop", "-i", &bed.a().name, "-n", "0.1"], more].concat());
        let mut bytes = 0;
        for len in 60..560 {
            let frame = UdpFrame::new(bed.b(), bed.a()).len(len).build().unwrap();
            peer.send(&frame).unwrap();
            bytes += len;
        }
        xsk.wait_for("rx_packets", 500);
        assert_eq!(programs(&bed), 1);
        let summary = xsk.interrupt();
        assert_eq!(summary["rx_packets"], 500, "{more:?}: {summary}");
        assert_eq!(summary["rx_bytes"], bytes);
        assert_eq!((&summary["mode"], &summary["kernel"]), (&"copy".into(), &"linux".into()));
        let attach = if more.contains(&"--generic") { "generic" } else { "native" };
        assert_eq!(summary["attach"], attach);
        assert_eq!(
            (&summary["interface"], &summary["queues"][0]["queue"], &summary["joined"]),
            (&bed.a().name.as_str().into(), &0.into(), &false.into())
        );
        for loss in ["rx_ring_full", "rx_fill_empty", "rx_too_long"] {
            assert_eq!(summary["statistics"][loss], 0, "{loss}");
        }
        assert_conserved(&summary);
        assert_eq!(programs(&bed), 0, "detached");
    }
}

#[test]
fn txonly_sends_that_many_packets_with_valid_checksums() {
    let Some(bed) = bed(|b| b) else { return };
    for (more, len) in [
        (&[][..], 64),
        (&["--poll", "-s", "1400"], 1400),
        (&["--src-ip", "fd00::1", "--dst-ip", "fd00::2", "-b", "100"], 64),
    ] {
        let watch = PacketSocket::open(bed.b()).unwrap();
        let xsk = Xsk::start(
            &[&["txonly", "-i", &bed.a().name, "-C", "1000", "--dst-mac", "02:00:00:00:00:77"], more]
                .concat(),
        );
        for n in 0..1000 {
            let frame = watch.recv(SOON).unwrap().unwrap_or_else(|| panic!("{n} of 1000 packets"));
            assert_eq!(frame.len(), len);
            assert_eq!(
                frame[..12],
                [
                    2,
                    0,
                    0,
                    0,
                    0,
                    0x77,
                    bed.a().mac[0],
                    bed.a().mac[1],
                    bed.a().mac[2],
                    bed.a().mac[3],
                    bed.a().mac[4],
                    bed.a().mac[5]
                ]
            );
            if n % 100 == 0 {
                assert_checksums(&frame);
            }
        }
        let (summary, status) = xsk.finish();
        assert_eq!(status, Some(0));
        assert_eq!((&summary["tx_packets"], &summary["attach"]), (&1000.into(), &"none".into()), "{summary}");
        assert_eq!(summary["tx_bytes"], 1000 * len);
        assert_conserved(&summary);
        assert_eq!(watch.try_recv().unwrap(), None, "not one more");
    }
}

fn assert_checksums(frame: &[u8]) {
    let packet = SlicedPacket::from_ethernet(frame).unwrap();
    let Some(TransportSlice::Udp(udp)) = &packet.transport else { panic!("no UDP") };
    let header = udp.to_header();
    let expected = match packet.net.as_ref().unwrap() {
        NetSlice::Ipv4(ip) => {
            let ip = ip.header().to_header();
            assert_eq!(ip.header_checksum, ip.calc_header_checksum());
            header.calc_checksum_ipv4(&ip, udp.payload()).unwrap()
        }
        NetSlice::Ipv6(ip) => header.calc_checksum_ipv6(&ip.header().to_header(), udp.payload()).unwrap(),
        other => panic!("{other:?}"),
    };
    assert_eq!(header.checksum, expected);
}

#[test]
fn l2fwd_sends_packets_back_with_swapped_addresses() {
    let Some(bed) = bed(|b| b) else { return };
    let peer = PacketSocket::open(bed.b()).unwrap();
    for more in [&[][..], &["--poll", "-f", "2048", "--frames", "512", "--ring", "256"]] {
        let xsk = Xsk::start(&[&["l2fwd", "-i", &bed.a().name, "-n", "0.1"], more].concat());
        let mut bytes = 0;
        for n in 0..300 {
            let frame = UdpFrame::new(bed.b(), bed.a()).len(60 + n).build().unwrap();
            peer.send(&frame).unwrap();
            let back = peer.recv(SOON).unwrap().expect("the packet comes back");
            assert_eq!((&back[..6], &back[6..12], &back[12..]), (&frame[6..12], &frame[..6], &frame[12..]));
            bytes += frame.len();
        }
        let summary = xsk.interrupt();
        for (key, expected) in
            [("rx_packets", 300), ("tx_packets", 300), ("rx_bytes", bytes), ("tx_bytes", bytes)]
        {
            assert_eq!(summary[key], expected, "{key}: {summary}");
        }
        assert_eq!(summary["statistics"]["tx_unfinished"], 0);
        assert_conserved(&summary);
        assert_eq!(programs(&bed), 0, "detached");
    }
}

#[test]
fn a_sender_attaches_a_program_only_when_asked() {
    let Some(bed) = bed(|b| b) else { return };
    for (attach, expected) in [(false, "none"), (true, "native")] {
        let mut arguments = vec!["txonly", "-i", &bed.a().name, "-n", "0.1"];
        arguments.extend(attach.then_some("--attach"));
        let xsk = Xsk::start(&arguments);
        xsk.wait_for("tx_packets", 100);
        assert_eq!(programs(&bed), usize::from(attach));
        let summary = xsk.interrupt();
        assert_eq!(summary["attach"], expected, "{summary}");
        assert_eq!(programs(&bed), 0);
    }
}

#[test]
fn a_duration_ends_it_with_a_summary() {
    let Some(bed) = bed(|b| b) else { return };
    let (summary, status) = Xsk::start(&["rxdrop", "-i", &bed.a().name, "-d", "0.3", "-n", "0"]).finish();
    assert_eq!((&summary["event"], status), (&"summary".into(), Some(0)));
    assert!((0.3..5.0).contains(&summary["seconds"].as_f64().unwrap()), "{summary}");
}

#[test]
fn sigterm_ends_it_as_ctrl_c_does() {
    let Some(bed) = bed(|b| b) else { return };
    let xsk = Xsk::start(&["rxdrop", "-i", &bed.a().name, "--poll"]);
    xsk.signal(libc::SIGTERM);
    let (summary, status) = xsk.finish();
    assert_eq!((&summary["event"], status), (&"summary".into(), Some(0)));
    assert_eq!(programs(&bed), 0);
}

#[test]
fn kill_9_leaves_no_program_and_a_free_queue() {
    let Some(bed) = bed(|b| b) else { return };
    let peer = PacketSocket::open(bed.b()).unwrap();
    let frame = UdpFrame::new(bed.b(), bed.a()).build().unwrap();
    let xsk = Xsk::start(&["l2fwd", "-i", &bed.a().name, "-n", "0.1"]);
    for _ in 0..100 {
        peer.send(&frame).unwrap();
    }
    xsk.wait_for("rx_packets", 100);
    xsk.kill();
    // The kernel lets go of the link and the queue some milliseconds later.
    let deadline = Instant::now() + SOON;
    while programs(&bed) != 0 {
        assert!(Instant::now() < deadline, "the program is still attached");
        thread::yield_now();
    }
    let (umem, _pool) = Umem::builder().frames(64).build().unwrap();
    let device = Device::open(&bed.a().name).unwrap();
    Socket::builder(&device).release_timeout(SOON).open(&umem).unwrap();
}

#[test]
fn a_second_one_on_the_same_queue_is_told_who_has_it() {
    let Some(bed) = bed(|b| b) else { return };
    let first = Xsk::start(&["rxdrop", "-i", &bed.a().name]);
    let (error, status) = Xsk::spawn(&["rxdrop", "-i", &bed.a().name]).finish();
    assert_eq!(status, Some(1));
    assert_eq!(error["event"], "error");
    for key in ["doing", "cause", "why", "remedy"] {
        assert!(error[key].as_str().is_some_and(|text| !text.is_empty()), "{key}: {error}");
    }
    assert_eq!(error["errno"], libc::EBUSY);
    let who = format!("process {}", first.child.id());
    assert!(error["cause"].as_str().unwrap().contains(&who), "{who}: {error}");

    // And in words, on standard error.
    let output = command(&["rxdrop", "-i", &bed.a().name]).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(1), &b""[..]));
    assert!(
        text.starts_with("error: cannot bind to")
            && text.contains("\n   why: ")
            && text.contains("\n    do: ")
    );
    assert!(text.contains(&who) && !text.contains('\x1b'), "{text}");
    first.interrupt();
}

/// Gives the calling thread's namespace a default route through an interface.
fn add_default_route(interface: &str, gateway: Ipv4Addr) {
    let address = |ip: Ipv4Addr| {
        // SAFETY: plain data, for which all zeroes is a value.
        let mut address: libc::sockaddr_in = unsafe { std::mem::zeroed() };
        address.sin_family = libc::AF_INET as u16;
        address.sin_addr.s_addr = u32::from(ip).to_be();
        // SAFETY: both are plain data of 16 bytes.
        unsafe { std::mem::transmute::<libc::sockaddr_in, libc::sockaddr>(address) }
    };
    let name = std::ffi::CString::new(interface).unwrap();
    // SAFETY: as above.
    let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
    route.rt_dst = address(Ipv4Addr::UNSPECIFIED);
    route.rt_genmask = address(Ipv4Addr::UNSPECIFIED);
    route.rt_gateway = address(gateway);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    route.rt_dev = name.as_ptr().cast_mut();
    let socket = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    // SAFETY: the route and the name that it points to are live for the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCADDRT, &raw const route) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn an_interface_that_is_needed_is_refused_unless_it_is_meant() {
    let Some(bed) = bed(|b| b) else { return };
    let name = &bed.a().name;
    let refused = |what: &str, mut command: Command| {
        let output = command.output().unwrap();
        let error: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((output.status.code(), &error["event"]), (Some(1), &"error".into()));
        assert!(error["cause"].as_str().unwrap().contains(what), "{what}: {error}");
        assert!(error["remedy"].as_str().unwrap().contains("--take-all"), "{error}");
    };
    for sample in ["rxdrop", "txonly", "l2fwd"] {
        let mut ssh = command(&[sample, "-i", name, "--json"]);
        ssh.env("SSH_CONNECTION", format!("198.51.100.7 50022 {} 22", bed.a().ipv4));
        refused("your SSH connection", ssh);
    }
    add_default_route(name, bed.b().ipv4);
    for sample in ["rxdrop", "txonly", "l2fwd"] {
        refused("the default route", command(&[sample, "-i", name, "--json"]));
        let (summary, status) = Xsk::start(&[sample, "-i", name, "--take-all", "-d", "0.1"]).finish();
        assert_eq!((&summary["event"], status), (&"summary".into(), Some(0)));
    }
    let info = command(&["info", name, "--json"]).output().unwrap();
    let info: Value = serde_json::from_slice(&info.stdout).unwrap();
    assert_eq!(info["carries"][0], "default route");
}

#[test]
fn an_interface_that_vanishes_is_told() {
    let Some(bed) = bed(|b| b) else { return };
    let xsk = Xsk::start(&["rxdrop", "-i", &bed.a().name, "-n", "0.1"]);
    bed.a().delete().unwrap();
    xsk.wait_for_change(&bed.a().name, "removed");
    let (error, status) = xsk.finish();
    assert_eq!((&error["event"], status), (&"error".into(), Some(1)), "{error}");
    assert!(error["cause"].as_str().unwrap().contains("the interface"), "{error}");
}

#[test]
fn the_end_of_a_pipe_is_no_failure() {
    let Some(bed) = bed(|b| b) else { return };
    let mut child = command(&["rxdrop", "-i", &bed.a().name, "-n", "0.05"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    stdout.read_line(&mut String::new()).unwrap();
    drop(stdout);
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!((child.wait().unwrap().code(), said.as_str()), (Some(0), ""));
    assert_eq!(programs(&bed), 0);
}

#[test]
fn the_demo_comes_out_right_on_this_kernel() {
    let Some(bed) = bed(|b| b) else { return };
    // Its own testbed is made from inside this one.
    let output = command(&["demo", "--json", "-d", "0.2"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let parts: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let commands: Vec<_> = parts.iter().map(|part| part["command"].as_str().unwrap()).collect();
    assert_eq!(commands, ["rxdrop", "txonly", "l2fwd", "latency"]);
    for part in &parts {
        assert_eq!((&part["event"], &part["kernel"]), (&"summary".into(), &"linux".into()));
        assert_conserved(part);
    }
    assert!(parts[3]["latency"]["udp"]["p50_us"].as_f64().unwrap() > 0.0);
    drop(bed);
}

/// Has packets arrive on a queue of end `a`.
fn send_to_queue(bed: &Testbed, queue: u32, n: u64) {
    let frame = UdpFrame::new(bed.b(), bed.a()).number(0).build().unwrap();
    Generator::new(bed.b(), frame).unwrap().to_queue(queue).unwrap().run(n).unwrap();
}

/// The figures of a key, by queue.
fn by_queue(summary: &Value, key: &str) -> Vec<(u64, u64)> {
    let queues = summary["queues"].as_array().unwrap();
    queues.iter().map(|queue| (queue["queue"].as_u64().unwrap(), queue[key].as_u64().unwrap())).collect()
}

#[test]
fn rxdrop_counts_each_of_its_queues() {
    let Some(bed) = bed(|b| b.queues(2)) else { return };
    for (more, queues, threads) in [
        (&["--queues", "0,1", "--threads", "2"][..], &[0, 1][..], 2),
        (&["-q", "all", "--threads", "1"], &[0, 1], 1),
        (&["--queues", "0-1", "--threads", "5", "--poll"], &[0, 1], 2),
        (&["--queue", "1"], &[1], 1),
    ] {
        let xsk = Xsk::start(&[&["rxdrop", "-i", &bed.a().name, "-n", "0.1"], more].concat());
        xsk.wait_for_threads(threads, |_| true);
        let mut expected = Vec::new();
        for &queue in queues {
            send_to_queue(&bed, queue, 20 + u64::from(queue));
            expected.push((u64::from(queue), 20 + u64::from(queue)));
        }
        let sum = expected.iter().map(|(_, n)| n).sum();
        xsk.wait_for("rx_packets", sum);
        let summary = xsk.interrupt();
        assert_eq!(by_queue(&summary, "rx_packets"), expected, "{summary}");
        assert_eq!(summary["rx_packets"], sum);
        assert_conserved(&summary);
    }
}

#[test]
fn threads_are_pinned_one_after_the_other() {
    let Some(bed) = bed(|b| b.queues(3)) else { return };
    let name = &bed.a().name;
    let all = ["rxdrop", "-i", name, "-q", "all", "--cpus", "all", "--threads", "3", "--poll"];
    let xsk = Xsk::start(&all);
    xsk.wait_for_threads(3, |cpu| cpu.parse::<u32>().is_ok());
    let [(_, first), (_, second), (_, third)] = &xsk.threads()[..] else { panic!("three threads") };
    let cpus = thread::available_parallelism().unwrap().get();
    // One after the other, and from the beginning again.
    assert!(cpus < 2 || first != second);
    assert!(cpus != 2 || first == third);
    let (last, summary) = (second.clone(), xsk.interrupt());
    assert_eq!(summary["threads"], 3);

    let xsk = Xsk::start(&["rxdrop", "-i", name, "-q", "all", "--cpus", &last, "--threads", "2", "--poll"]);
    xsk.wait_for_threads(2, |cpu| cpu == last);
    assert_eq!(xsk.interrupt()["cpus"][0], last.parse::<u32>().unwrap());
    let (error, status) = Xsk::spawn(&["rxdrop", "-i", name, "--cpus", "9999"]).finish();
    assert_eq!(status, Some(1));
    assert!(error["remedy"].as_str().unwrap().contains("--cpus "), "{error}");
}

#[test]
fn txonly_sends_the_count_over_several_queues() {
    let Some(bed) = bed(|b| b.queues(3)) else { return };
    for more in
        [&["-q", "all"][..], &["-q", "0-2", "--threads", "1", "--poll"], &["-q", "0-2", "--threads", "2"]]
    {
        let watch = PacketSocket::open(bed.b()).unwrap();
        let xsk = Xsk::start(&[&["txonly", "-i", &bed.a().name, "-C", "1001", "-b", "16"], more].concat());
        for n in 0..1001 {
            let frame = watch.recv(SOON).unwrap().unwrap_or_else(|| panic!("{n} of 1001 packets"));
            assert_eq!(frame.len(), 64);
        }
        let (summary, status) = xsk.finish();
        assert_eq!((&summary["tx_packets"], status), (&1001.into(), Some(0)), "{summary}");
        assert_eq!(
            (&summary["tx_bytes"], &summary["statistics"]["tx_unfinished"]),
            (&(1001 * 64).into(), &0.into())
        );
        let queues = by_queue(&summary, "tx_packets");
        assert!(queues.len() == 3 && queues.iter().all(|(_, n)| *n > 300), "{summary}");
        assert_conserved(&summary);
        assert_eq!(watch.try_recv().unwrap(), None, "not one more");
    }
}

/// A second pair of interfaces beside end `a`: one for the command, and its other end. Both are in the
/// namespace of `a` and go with it.
fn second_pair(bed: &Testbed, queues: u32) -> [End; 2] {
    use rtnetlink::packet_route::link::{InfoData, InfoVeth, LinkAttribute};
    use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkVeth};

    let end = |name: &str, last: u8| {
        let mut end = bed.a().clone();
        end.name = name.into();
        end.mac = [2, 0, 0, 0, 0xee, last];
        end.queues = queues;
        end
    };
    let ends = [end("xsk2", 1), end("xsk3", 2)];
    let attributes = |end: &End| {
        [
            LinkAttribute::Address(end.mac.to_vec()),
            LinkAttribute::NumRxQueues(queues),
            LinkAttribute::NumTxQueues(queues),
        ]
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().unwrap();
        tokio::spawn(connection);
        let [here, there] = &ends;
        let mut peer = LinkMessageBuilder::<LinkUnspec>::new().name(there.name.clone());
        for attribute in attributes(there) {
            peer = peer.append_extra_attribute(attribute);
        }
        let mut pair = LinkVeth::new(&here.name, &there.name);
        for attribute in attributes(here) {
            pair = pair.append_extra_attribute(attribute);
        }
        let pair = pair.set_info_data(InfoData::Veth(InfoVeth::Peer(peer.build())));
        handle.link().add(pair.build()).execute().await.unwrap();
        for end in &ends {
            let up = LinkUnspec::new_with_name(&end.name).up().build();
            handle.link().set(up).execute().await.unwrap();
        }
    });
    ends.map(|mut end| {
        end.ifindex = end.wait_up().unwrap().index;
        end
    })
}

/// Sends frames from one end and expects each at the other, as `becomes` says.
#[track_caller]
fn assert_crosses(from: &PacketSocket, to: &PacketSocket, first: u8, becomes: impl Fn(&mut Vec<u8>)) {
    for n in 0..200usize {
        let mut frame: Vec<u8> = (0..60 + n).map(|i| (i as u8).wrapping_mul(7).wrapping_add(first)).collect();
        frame[12..14].copy_from_slice(&[0x88, 0xb5]);
        from.send(&frame).unwrap();
        let arrived = to.recv(SOON).unwrap().unwrap_or_else(|| panic!("frame {n} does not arrive"));
        becomes(&mut frame);
        assert_eq!(arrived, frame, "frame {n}");
    }
}

#[test]
fn l2fwd_forwards_between_two_interfaces_both_ways() {
    let Some(bed) = bed(|b| b.queues(2)) else { return };
    let [inner, outer] = second_pair(&bed, 3);
    let (left, right) = (PacketSocket::open(bed.b()).unwrap(), PacketSocket::open(&outer).unwrap());
    let mac = "02:00:00:00:00:99";
    for (more, there, back) in [
        (&[][..], None, None),
        (&["--poll", "--threads", "1", "-q", "all"], None, None),
        (&["--dst-mac", mac], Some(inner.mac), None),
        (&["--dst-mac", mac, "--back-dst-mac", mac], Some(inner.mac), Some(bed.a().mac)),
        (&["--rewrite"], Some(inner.mac), Some(bed.a().mac)),
        (&["--rewrite", "--dst-mac", mac], Some(inner.mac), Some(bed.a().mac)),
    ] {
        let both = ["l2fwd", "-i", &bed.a().name, "-o", &inner.name, "-n", "0.1"];
        let xsk = Xsk::start(&[&both[..], more].concat());
        assert_eq!(Device::open(&inner.name).unwrap().info().unwrap().programs().len(), 1);
        let readdressed = |own: Option<[u8; 6]>, option: &str| {
            let has_next_hop = more.contains(&option);
            move |frame: &mut Vec<u8>| {
                if let Some(own) = own {
                    frame[6..12].copy_from_slice(&own);
                }
                if has_next_hop {
                    frame[..6].copy_from_slice(&[2, 0, 0, 0, 0, 0x99]);
                }
            }
        };
        assert_crosses(&left, &right, 2, readdressed(there, "--dst-mac"));
        assert_crosses(&right, &left, 4, readdressed(back, "--back-dst-mac"));
        let summary = xsk.interrupt();
        assert_eq!((&summary["rx_packets"], &summary["tx_packets"]), (&400.into(), &400.into()), "{summary}");
        assert_eq!(summary["statistics"]["tx_unfinished"], 0);
        let of = |interface: &str, key: &str| -> u64 {
            let queues = summary["queues"].as_array().unwrap().iter();
            queues.filter(|it| it["interface"] == interface).map(|it| it[key].as_u64().unwrap()).sum()
        };
        for name in [&bed.a().name, &inner.name] {
            assert_eq!((of(name, "rx_packets"), of(name, "tx_packets")), (200, 200), "{summary}");
        }
        assert_eq!(summary["out"]["interface"], inner.name.as_str());
        assert_conserved(&summary);
        assert_eq!(programs(&bed), 0, "detached");
        assert_eq!((left.try_recv().unwrap(), right.try_recv().unwrap()), (None, None), "not one more");
    }

    let (error, status) = Xsk::spawn(&["l2fwd", "-i", &inner.name, "-o", &inner.name]).finish();
    assert_eq!(status, Some(1));
    assert!(error["cause"].as_str().unwrap().contains("the same interface"), "{error}");

    // Either interface may be one that the machine needs.
    add_default_route(&bed.a().name, bed.b().ipv4);
    for [i, o] in [[&bed.a().name, &inner.name], [&inner.name, &bed.a().name]] {
        let (error, status) = Xsk::spawn(&["l2fwd", "-i", i, "-o", o]).finish();
        assert_eq!(status, Some(1));
        let cause = error["cause"].as_str().unwrap();
        assert!(cause.contains(&format!("{} carries the default route", bed.a().name)), "{error}");
        assert!(cause.contains("(on all of its 2 queues)") && !cause.contains(&inner.name), "{error}");
    }
}

#[test]
fn switching_off_and_on_does_not_end_it() {
    let Some(bed) = bed(|b| b) else { return };
    let name = &bed.a().name;
    for more in [&["rxdrop"][..], &["rxdrop", "--poll"], &["l2fwd"], &["l2fwd", "--poll"]] {
        let peer = PacketSocket::open(bed.b()).unwrap();
        let frame = UdpFrame::new(bed.b(), bed.a()).build().unwrap();
        let xsk = Xsk::start(&[more, &["-i", name, "-n", "0.1"]].concat());
        peer.send(&frame).unwrap();
        xsk.wait_for("rx_packets", 1);
        bed.a().set_up(false).unwrap();
        xsk.wait_for_change(name, "down");
        bed.a().set_up(true).unwrap();
        xsk.wait_for_change(name, "up");
        bed.a().wait_up().unwrap();
        bed.b().wait_up().unwrap();
        peer.send(&frame).unwrap();
        xsk.wait_for("rx_packets", 1);
        if more[0] == "l2fwd" {
            for _ in 0..2 {
                peer.recv(SOON).unwrap().expect("it comes back");
            }
        }
        let summary = xsk.interrupt();
        assert_eq!(summary["rx_packets"], 2, "{more:?}: {summary}");
        assert_conserved(&summary);
    }
}

#[test]
fn a_sender_goes_on_when_its_interface_is_on_again_and_tells_what_is_unfinished() {
    let Some(bed) = bed(|b| b.queues(2)) else { return };
    let name = &bed.a().name;
    for more in [&["--threads", "1"][..], &["--threads", "2", "--poll"]] {
        let xsk = Xsk::start(&[&["txonly", "-i", name, "-q", "all", "-n", "0.1"], more].concat());
        xsk.wait_for("tx_packets", 1);
        bed.a().set_up(false).unwrap();
        xsk.wait_for_change(name, "down");
        // An interval in which nothing is sent.
        let deadline = Instant::now() + SOON;
        while xsk.next()["tx_packets"] != 0 {
            assert!(Instant::now() < deadline, "it sends on an interface that is off");
        }
        bed.a().set_up(true).unwrap();
        xsk.wait_for_change(name, "up");
        bed.a().wait_up().unwrap();
        xsk.wait_for("tx_packets", 10_000);
        bed.a().set_up(false).unwrap();
        xsk.wait_for_change(name, "down");
        let summary = xsk.interrupt();
        assert!(summary["statistics"]["tx_unfinished"].as_u64().unwrap() > 0, "{summary}");
        assert_conserved(&summary);
        bed.a().set_up(true).unwrap();
        bed.a().wait_up().unwrap();
    }
}

#[test]
fn an_interface_that_is_off_at_the_beginning_is_waited_for() {
    let Some(bed) = bed(|b| b) else { return };
    bed.a().set_up(false).unwrap();
    let xsk = Xsk::start(&["rxdrop", "-i", &bed.a().name, "-n", "0.1"]);
    xsk.wait_for_change(&bed.a().name, "down");
    bed.a().set_up(true).unwrap();
    xsk.wait_for_change(&bed.a().name, "up");
    bed.a().wait_up().unwrap();
    bed.b().wait_up().unwrap();
    let peer = PacketSocket::open(bed.b()).unwrap();
    peer.send(&UdpFrame::new(bed.b(), bed.a()).build().unwrap()).unwrap();
    xsk.wait_for("rx_packets", 1);
    xsk.interrupt();
}

#[test]
fn queues_that_come_later_are_taken_on() {
    let Some(bed) = bed(|b| b.queues(2)) else { return };
    let set = |end: &End, queues| end.set_channels(Channels { rx: queues, tx: queues }).unwrap();
    // The other end never sends on more queues than this one has.
    set(bed.b(), 1);
    set(bed.a(), 1);
    let xsk = Xsk::start(&["rxdrop", "-i", &bed.a().name, "-q", "all", "-n", "0.1"]);
    set(bed.a(), 2);
    let change = xsk.wait_for_change(&bed.a().name, "queues");
    assert_eq!((&change["was"], &change["now"], &change["taken"][0]), (&1.into(), &2.into(), &1.into()));
    // veth runs the program on queues that it had when it was switched on.
    bed.a().set_up(false).unwrap();
    xsk.wait_for_change(&bed.a().name, "down");
    bed.a().set_up(true).unwrap();
    xsk.wait_for_change(&bed.a().name, "up");
    set(bed.b(), 2);
    bed.a().wait_up().unwrap();
    bed.b().wait_up().unwrap();
    let peer = PacketSocket::open(bed.b()).unwrap();
    for port in 1000..1064 {
        // Flows that are spread over the queues.
        peer.send(&UdpFrame::new(bed.b(), bed.a()).ports(port, 9).build().unwrap()).unwrap();
    }
    xsk.wait_for("rx_packets", 64);
    let queues = by_queue(&xsk.interrupt(), "rx_packets");
    let [(0, first), (1, second)] = queues[..] else { panic!("{queues:?}") };
    assert!(first + second == 64 && second > 0, "{queues:?}");
}

#[test]
fn several_processes_share_an_interface_in_any_order() {
    let Some(bed) = bed(|b| b.queues(2)) else { return };
    let start = |queue: &str| {
        let xsk = Xsk::spawn(&["rxdrop", "-i", &bed.a().name, "-q", queue, "-n", "0.1"]);
        let start = xsk.next();
        assert_eq!(start["event"], "start", "{start}");
        (xsk, start["joined"].as_bool().unwrap())
    };
    for (order, first_leaves, killed) in [
        (["0", "1"], true, false),
        (["1", "0"], true, true),
        (["0", "1"], false, true),
        (["1", "0"], false, false),
    ] {
        let (first, joined) = start(order[0]);
        assert!(!joined);
        let (second, joined) = start(order[1]);
        assert!(joined, "{order:?}");
        assert_eq!(programs(&bed), 1);
        let number = |queue: &str| queue.parse().unwrap();
        for (xsk, queue) in [(&first, order[0]), (&second, order[1])] {
            send_to_queue(&bed, number(queue), 10);
            xsk.wait_for("rx_packets", 10);
        }
        let (leaves, stays) = if first_leaves { (first, second) } else { (second, first) };
        let (left, stayed) = if first_leaves { (order[0], order[1]) } else { (order[1], order[0]) };
        if killed {
            leaves.kill();
        } else {
            assert_eq!(leaves.interrupt()["rx_packets"], 10);
        }
        send_to_queue(&bed, number(stayed), 10);
        stays.wait_for("rx_packets", 10);
        // Its place is free for the next.
        let (next, joined) = start(left);
        assert!(joined);
        send_to_queue(&bed, number(left), 10);
        next.wait_for("rx_packets", 10);
        assert_eq!(stays.interrupt()["rx_packets"], 20);
        next.interrupt();
        assert_eq!(programs(&bed), 0, "gone with the last one");
    }
}

/// Attaches a program that drops everything, of this test's own.
fn foreign_program(ifindex: u32) -> Handle {
    let instructions = [asm::alu_imm(Alu::Mov, Reg::R0, asm::XDP_DROP), asm::exit()];
    let spec = ProgramSpec { instructions: &instructions, flags: 0, name: "somebody_elses" };
    let program = Linux.load_program(&spec, &mut String::new()).unwrap();
    Linux.attach(program.as_fd(), ifindex, XDP_FLAGS_DRV_MODE).unwrap()
}

#[test]
fn another_program_on_the_interface_is_named_with_its_owner() {
    let Some(bed) = bed(|b| b) else { return };
    let link = foreign_program(bed.a().ifindex);
    for sample in ["rxdrop", "l2fwd"] {
        let (error, status) = Xsk::spawn(&[sample, "-i", &bed.a().name]).finish();
        assert_eq!((&error["event"], status), (&"error".into(), Some(1)), "{error}");
        let cause = error["cause"].as_str().unwrap();
        let owner = format!("process {}", std::process::id());
        assert!(cause.contains("somebody_elses") && cause.contains(&owner), "{cause}");
    }
    drop(link);
    Xsk::start(&["rxdrop", "-i", &bed.a().name]).interrupt();
}

/// What a command says in words until it ends.
fn in_words(arguments: &[&str]) -> String {
    let output = command(arguments).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn tables_line_up_and_the_beginning_tells_of_queues_and_programs() {
    let Some(bed) = bed(|b| b.queues(2)) else { return };
    let name = &bed.a().name;
    let text = in_words(&["rxdrop", "-i", name, "-d", "0.25", "-n", "0.1"]);
    assert!(
        text.starts_with(&format!("rxdrop on {name} queue 0 of 2: copy mode, native XDP program\n")),
        "{text}"
    );
    assert!(text.contains(&format!("{name} has 2 queues: --queues all takes them all")), "{text}");

    let other = Xsk::start(&["rxdrop", "-i", name, "-q", "1"]);
    let text = in_words(&["rxdrop", "-i", name, "-q", "0", "-d", "0.1", "-n", "0"]);
    assert!(text.contains("native XDP program, joined: others use it too\n"), "{text}");
    other.interrupt();

    for (arguments, first) in [
        (
            &["rxdrop", "-i", name, "-q", "all", "--threads", "2"][..],
            "rxdrop on xsk0 queues 0-1, 2 threads: copy",
        ),
        (&["txonly", "-i", name, "-q", "all", "--threads", "1"], "txonly on xsk0 queues 0-1, 1 thread: copy"),
    ] {
        let text = in_words(&[arguments, &["-d", "0.35", "-n", "0.1"]].concat());
        assert!(text.starts_with(first), "{text}");
        let (intervals, summary) = text.split_once("\n\n").unwrap();
        let table: Vec<_> = intervals.lines().skip(1).collect();
        // A heading, and for each interval two queues and the total.
        assert!(table.len() > 3 && table.len() % 3 == 1, "{text}");
        assert!(table.iter().all(|line| line.len() == table[0].len()), "{text}");
        assert!(table[3].contains("total"), "{text}");
        let table: Vec<_> = summary.lines().skip(1).take(4).collect();
        assert!(table.iter().all(|line| line.len() == table[0].len()), "{text}");
        assert!(table[0].starts_with("  queue") && table[3].starts_with("  total"), "{text}");
    }
}
