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
use xsk::{Device, Socket, Umem};
use xsk_testbed::{PacketSocket, Testbed, UdpFrame, bed};

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

    /// Waits until the intervals so far add up to `n` of `key`.
    fn wait_for(&self, key: &str, n: u64) {
        let deadline = Instant::now() + SOON;
        let mut sum = 0;
        while sum < n {
            assert!(Instant::now() < deadline, "{sum} of {n} {key}");
            let value = self.next();
            assert_eq!(value["event"], "interval", "{value}");
            sum += value[key].as_u64().unwrap();
        }
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
            (&summary["interface"], &summary["queues"][0]),
            (&bed.a().name.as_str().into(), &0.into())
        );
        assert_eq!(summary["statistics"]["rx_dropped"], 0);
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
    let mut xsk = Xsk::start(&["l2fwd", "-i", &bed.a().name, "-n", "0.1"]);
    for _ in 0..100 {
        peer.send(&frame).unwrap();
    }
    xsk.wait_for("rx_packets", 100);
    xsk.child.kill().unwrap();
    xsk.child.wait().unwrap();
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
