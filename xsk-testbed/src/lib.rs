//! A testbed for AF_XDP: private network namespaces with a veth pair between them, and traffic.
//!
//! A [`Testbed`] is one veth pair whose ends live in namespaces of their own. The thread that makes
//! it is moved next to end `a`, so everything it opens from then on (AF_XDP sockets, programs, plain
//! sockets) is on that side; end `b` is reached through [`Testbed::peer`]. When the testbed is
//! dropped, also by a panic, the thread goes back and nothing remains.
//!
//! Nothing but the test is to be heard on the wire, so that packets can be counted exactly: IPv6 is
//! off, neighbours are known, UDP port [`DISCARD`] swallows what no test reads (the stack answers other
//! unused ports by ICMP). Checksums are complete.
//!
//! | traffic | what it is | when |
//! |---|---|---|
//! | [`PacketSocket`] | raw frames by `AF_PACKET` | a few frames of any shape, and to see what arrives |
//! | [`End::udp`] | a plain UDP socket | whether the stack's own traffic works |
//! | [`Generator`] | numbered frames made inside the kernel | millions of packets, loss and order |
//! | [`Stream`] | numbered frames by either | traffic on each of several queues |
//!
//! Set-up is by netlink and the ethtool ioctl; no program of the system is run.
//!
//! ```
//! // In a test: `None` where there is no privilege, after saying so.
//! let Some(bed) = xsk_testbed::bed(|b| b.queues(2)) else { return };
//! let watch = xsk_testbed::PacketSocket::open(bed.a()).unwrap();
//! let peer = bed.b().udp(0).unwrap();
//! peer.send_to(b"hello", (bed.a().ipv4, xsk_testbed::DISCARD)).unwrap();
//! let frame = watch.recv(std::time::Duration::from_secs(5)).unwrap().expect("a frame");
//! assert!(frame.ends_with(b"hello"));
//! ```
#![cfg(target_os = "linux")]
#![deny(unsafe_code)]

mod bed;
mod error;
#[allow(unsafe_code)]
mod ethtool;
mod frame;
mod generator;
mod link;
#[allow(unsafe_code)]
mod namespace;
#[allow(unsafe_code)]
mod packet;
mod sequence;
mod stream;

use std::io::Write as _;

use rustix::net::{AddressFamily, SocketType};
use rustix::thread::CapabilitySet;

pub use bed::{Builder, DISCARD, End, Pair, Testbed};
pub use error::Error;
pub use ethtool::Channels;
pub use frame::{UdpFrame, number};
pub use generator::{Generator, Load, Running};
pub use link::{Counters, Link};
pub use namespace::Namespace;
pub use packet::PacketSocket;
pub use sequence::Sequence;
pub use stream::{QueueCounter, Stream, source_ports};

/// The environment variable that, when it is `1`, forbids tests to be skipped: see [`can_run`].
pub const REQUIRE: &str = "XSK_REQUIRE_TESTBED";

/// Capabilities that making a testbed and its traffic takes.
const NEEDED: [(CapabilitySet, &str); 4] = [
    (CapabilitySet::NET_ADMIN, "CAP_NET_ADMIN"),
    (CapabilitySet::NET_RAW, "CAP_NET_RAW"),
    (CapabilitySet::SYS_ADMIN, "CAP_SYS_ADMIN"),
    (CapabilitySet::BPF, "CAP_BPF"),
];

/// Whether a testbed can be made here; if not, what is missing.
pub fn available() -> Result<(), String> {
    let held = rustix::thread::capabilities(None).map_err(|e| format!("capabilities: {e}"))?.effective;
    let missing: Vec<_> =
        NEEDED.iter().filter(|(bit, _)| !held.contains(*bit)).map(|(_, name)| *name).collect();
    if !missing.is_empty() {
        return Err(format!("needs root ({})", missing.join(", ")));
    }
    let af_xdp = AddressFamily::from_raw(libc::AF_XDP as u16);
    rustix::net::socket(af_xdp, SocketType::RAW, None)
        .map(drop)
        .map_err(|e| format!("needs a kernel with AF_XDP (CONFIG_XDP_SOCKETS): {e}"))
}

/// Whether a test can have a testbed; if not, it has been said on standard error why.
///
/// # Panics
///
/// Where the environment variable [`REQUIRE`] is `1`, instead of answering no.
pub fn can_run() -> bool {
    let Err(missing) = available() else { return true };
    assert!(std::env::var_os(REQUIRE).is_none_or(|v| v != "1"), "{REQUIRE}=1, but the testbed {missing}");
    // Not `eprintln`, which the test harness hides when a test passes.
    let _ = writeln!(std::io::stderr(), "skipped: {missing}");
    false
}

/// A testbed for a test, or `None` where it is to be skipped: see [`can_run`].
///
/// ```no_run
/// let Some(bed) = xsk_testbed::bed(|b| b.queues(2)) else { return };
/// ```
///
/// # Panics
///
/// As [`can_run`]; and if a testbed should be possible, but its making fails.
pub fn bed(configure: impl FnOnce(Builder) -> Builder) -> Option<Testbed> {
    let build =
        || configure(Testbed::builder()).build().unwrap_or_else(|e| panic!("cannot make the testbed: {e}"));
    can_run().then(build)
}
