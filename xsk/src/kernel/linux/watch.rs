//! Watching an interface, by what netlink tells unasked.
//!
//! A watch listens in two places: rtnetlink's group `RTNLGRP_LINK` has an interface switched on or
//! off, its link, its removal, name, MTU and most else; the group `monitor` of the generic netlink
//! family `ethtool` has its queues (5.7). Both speak of every interface of the namespace, so a filter
//! on each socket keeps out what is about others: the kernel drops that before it is queued, and
//! however much happens there, a watch is not woken, has nothing to read and loses nothing.
//!
//! What comes in is not looked at: that there is something says all that a [`Watch`] promises.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll;

use super::netlink::{ATTRIBUTE_HEADER, GENLMSGHDR_SIZE, MESSAGE_HEADER, Netlink};
use crate::kernel::{Errno, Watch};

/// `include/uapi/linux/rtnetlink.h`.
const RTNLGRP_LINK: u32 = 1;
/// `ETHTOOL_A_*_HEADER`: the number is the same in all messages of the family.
const ETHTOOL_A_HEADER: u32 = 1;
const ETHTOOL_A_HEADER_DEV_INDEX: u32 = 1;

/// A watch over one interface.
#[derive(Debug)]
pub(super) struct LinkWatch {
    /// Readable when a socket is.
    epoll: OwnedFd,
    sockets: Vec<Netlink>,
}

impl LinkWatch {
    pub(super) fn open(index: u32) -> Result<Self, Errno> {
        let route = Netlink::open(None)?;
        route.join(RTNLGRP_LINK, &links(index))?;
        let mut sockets = vec![route];
        // Older kernels tell nobody of queues.
        if let Some((ethtool, family)) = Netlink::generic("ethtool")?
            && let Some(group) = family.group("monitor")
        {
            ethtool.join(group, &ethtool_messages(index))?;
            sockets.push(ethtool);
        }
        // One descriptor for both, as a program's own `poll` wants it.
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for socket in &sockets {
            epoll::add(&epoll, socket, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        }
        Ok(Self { epoll, sockets })
    }
}

impl AsFd for LinkWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

impl Watch for LinkWatch {
    fn take(&self) -> bool {
        // Every socket is to be emptied, hence no short cut at the first that says yes.
        self.sockets.iter().fold(false, |changed, socket| empty(socket) | changed)
    }
}

/// Empties a socket: whether there was something, or something was lost.
fn empty(socket: &Netlink) -> bool {
    /// More than its buffer holds, unless messages come as fast as they are taken: then the rest
    /// stays for the next time.
    const MOST: usize = 256;
    for taken in 0..MOST {
        match socket.discard() {
            Ok(()) | Err(Errno::NOBUFS) => {}
            Err(Errno::AGAIN) => return taken > 0,
            // Nothing else is known to happen; an error says nothing about there being no change.
            Err(_) => return true,
        }
    }
    true
}

// Classic BPF: `include/uapi/linux/bpf_common.h` and `filter.h`.
const LD_WORD_AT: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const LD_WORD_AT_X: u16 = 0x40; // BPF_LD | BPF_W | BPF_IND
const LD_NUMBER: u16 = 0x00; // BPF_LD | BPF_IMM
const LDX_NUMBER: u16 = 0x01; // BPF_LDX | BPF_IMM
const A_TO_X: u16 = 0x07; // BPF_MISC | BPF_TAX
const IF_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K
/// Loads from here on are the kernel's extensions: where the attribute X is, from offset A on, as
/// an offset in A, or 0.
const SKF_AD_NLATTR: u32 = (-0x1000i32 + 12) as u32;
/// The same inside the attribute at offset A.
const SKF_AD_NLATTR_NEST: u32 = (-0x1000i32 + 16) as u32;
const ACCEPT: libc::sock_filter = op(RETURN, u32::MAX);
const DROP: libc::sock_filter = op(RETURN, 0);

const fn op(code: u16, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt: 0, jf: 0, k }
}

/// Skips `jt` or `jf` instructions.
const fn if_equal(k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter { code: IF_EQUAL, jt, jf, k }
}

/// A number of the machine's byte order, as a filter loads it: the most significant byte first.
fn loaded(number: u32) -> u32 {
    number.to_be()
}

/// Accepts messages about one interface, of those that start with `struct ifinfomsg`.
fn links(index: u32) -> [libc::sock_filter; 4] {
    // A load beyond the end of a message drops it.
    [op(LD_WORD_AT, MESSAGE_HEADER as u32 + 4), if_equal(loaded(index), 0, 1), ACCEPT, DROP]
}

/// Accepts messages about one interface, of those of family `ethtool`.
fn ethtool_messages(index: u32) -> [libc::sock_filter; 12] {
    [
        op(LD_NUMBER, (MESSAGE_HEADER + GENLMSGHDR_SIZE) as u32),
        op(LDX_NUMBER, ETHTOOL_A_HEADER),
        op(LD_WORD_AT, SKF_AD_NLATTR),
        if_equal(0, 7, 0),
        op(LDX_NUMBER, ETHTOOL_A_HEADER_DEV_INDEX),
        op(LD_WORD_AT, SKF_AD_NLATTR_NEST),
        if_equal(0, 4, 0),
        op(A_TO_X, 0),
        op(LD_WORD_AT_X, ATTRIBUTE_HEADER as u32),
        if_equal(loaded(index), 0, 1),
        ACCEPT,
        DROP,
    ]
}
