//! The Linux kernel, by system calls.
//!
//! [`Linux`] implements the contract of [`kernel`](super) with the real thing:
//!
//! - `socket`: AF_XDP sockets, their options and ring mappings;
//! - `bpf`: maps, programs and links, by `bpf(2)`;
//! - `device`: interfaces, by rtnetlink and the generic netlink family `netdev`, over the small
//!   client in `netlink`;
//! - `watch`: changes of an interface, as netlink tells them;
//! - `ethtool`: what only the ethtool ioctl tells;
//! - `holders`: which processes have AF_XDP sockets, or a program.
//!
//! Everything happens in the network namespace of the calling thread: a socket stays in the one it
//! was made in, and an interface index means what it means there. Nothing is cached, so one value
//! serves threads in different namespaces.

use std::io;
use std::sync::Arc;

use super::{Errno, Kernel};

mod bpf;
mod device;
mod ethtool;
mod holders;
mod netlink;
mod socket;
mod watch;

pub use bpf::{BPF_F_TEST_XDP_LIVE_FRAMES, TestRun, XdpMd, lookup_map, test_run};

/// The Linux kernel that this process runs on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Linux;

impl Linux {
    /// The running kernel, as the library's upper floors take it.
    pub fn kernel() -> Arc<dyn Kernel> {
        Arc::new(Self)
    }
}

impl Kernel for Linux {
    fn name(&self) -> &'static str {
        "linux"
    }

    /// 0, where nothing else can be: there is one Linux kernel.
    fn id(&self) -> usize {
        0
    }
}

/// What a call of the C library returned, or the errno that it left.
///
/// To be called right after the call, before anything else can change errno.
fn check(result: impl Into<i64>) -> Result<i64, Errno> {
    match result.into() {
        -1 => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)),
        result => Ok(result),
    }
}

/// A text in a buffer, up to its zero byte.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_ends_at_its_zero_byte_or_with_the_buffer() {
        assert_eq!(text(b"veth\0\0junk"), "veth");
        assert_eq!(text(b"full"), "full");
        assert_eq!(text(b"\xff\0"), "\u{fffd}");
        assert_eq!(text(b""), "");
    }

    #[test]
    fn a_failed_call_is_its_errno() {
        // SAFETY: the call takes no pointers.
        assert_eq!(check(unsafe { libc::close(-1) }), Err(Errno::BADF));
        assert_eq!(check(7), Ok(7));
    }
}
