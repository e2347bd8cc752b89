//! Raw frames by `AF_PACKET`.

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use crate::{End, Error};

/// Enough for what a test leaves unread; the memory is used only as frames come.
const RECEIVE_BUFFER: libc::c_int = 64 << 20;
/// Where in a frame its VLAN tag is: after the two addresses.
const TAG_AT: usize = 12;
/// Bytes of a VLAN tag.
const TAG_LEN: usize = 4;

/// A socket that sees each frame which an end hands to the stack, and sends frames as they are.
///
/// It sees what arrives, not what is sent from its own end. Frames that an XDP program takes away
/// do not come this far.
#[derive(Debug)]
pub struct PacketSocket {
    fd: OwnedFd,
    name: String,
}

impl PacketSocket {
    /// Opens one on an end. From then on no frame is missed.
    pub fn open(end: &End) -> Result<Self, Error> {
        let doing = || format!("opening a packet socket on {}", end.name);
        end.namespace.run(|| {
            // SAFETY: no pointers. Protocol 0 receives nothing until `bind` names interface and
            // protocol together, so nothing of another interface gets in.
            let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
            if fd < 0 {
                return Err(Error::last_os(doing()));
            }
            // SAFETY: `fd` was just opened and is owned by nobody else.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            let socket = Self { fd, name: end.name.clone() };
            socket.set(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, RECEIVE_BUFFER)?;
            socket.set(libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, 1)?;
            socket.set(libc::SOL_PACKET, libc::PACKET_AUXDATA, 1)?;

            // SAFETY: `sockaddr_ll` is plain data, for which all zeroes is a value.
            let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
            address.sll_ifindex = end.ifindex as i32;
            let len = size_of_val(&address) as libc::socklen_t;
            // SAFETY: `address` is live for the call and `len` is its size.
            let result = unsafe { libc::bind(socket.fd.as_raw_fd(), (&raw const address).cast(), len) };
            if result < 0 { Err(Error::last_os(doing())) } else { Ok(socket) }
        })?
    }

    fn set(&self, level: libc::c_int, option: libc::c_int, value: libc::c_int) -> Result<(), Error> {
        let len = size_of_val(&value) as libc::socklen_t;
        // SAFETY: `value` is live for the call and `len` is its size.
        let result =
            unsafe { libc::setsockopt(self.fd.as_raw_fd(), level, option, (&raw const value).cast(), len) };
        if result < 0 {
            Err(Error::last_os(format!("packet socket option {option} on {}", self.name)))
        } else {
            Ok(())
        }
    }

    /// Sends past the queueing discipline, straight to the driver. The transmit queue, which on a
    /// veth is the receive queue at the other end, is then the sending CPU modulo the queues.
    pub fn bypass_qdisc(&self, bypass: bool) -> Result<(), Error> {
        self.set(libc::SOL_PACKET, libc::PACKET_QDISC_BYPASS, bypass.into())
    }

    /// Sends a frame, Ethernet header first.
    pub fn send(&self, frame: &[u8]) -> Result<(), Error> {
        rustix::net::send(&self.fd, frame, rustix::net::SendFlags::empty())
            .map(drop)
            .map_err(Error::system(format!("sending {} bytes on {}", frame.len(), self.name)))
    }

    /// The next frame, or `None` if none came within `timeout`.
    pub fn recv(&self, timeout: Duration) -> Result<Option<Vec<u8>>, Error> {
        let deadline = Instant::now().checked_add(timeout);
        loop {
            if let Some(frame) = self.try_recv()? {
                return Ok(Some(frame));
            }
            let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Ok(None);
            }
            // What can't be said as a `timespec` is forever.
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            match rustix::event::poll(&mut [PollFd::new(&self.fd, PollFlags::IN)], left.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return Err(Error::system(format!("waiting for a frame on {}", self.name))(e)),
            }
        }
    }

    /// The next frame that has arrived, if one has.
    pub fn try_recv(&self) -> Result<Option<Vec<u8>>, Error> {
        use rustix::net::RecvFlags;
        let doing = || format!("receiving on {}", self.name);
        let peek = RecvFlags::PEEK | RecvFlags::TRUNC | RecvFlags::DONTWAIT;
        let len = match rustix::net::recv(&self.fd, &mut [0u8; 0][..], peek) {
            Ok((_, len)) => len,
            Err(Errno::AGAIN) => return Ok(None),
            Err(e) => return Err(Error::system(doing())(e)),
        };
        // With room for a tag that is to be put back.
        let mut frame = Vec::with_capacity(len + TAG_LEN);
        frame.resize(len, 0u8);
        let mut vector = libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: frame.len() };
        // Of `u64`, so that the headers in it are aligned.
        let mut control = [0u64; 16];
        // SAFETY: `msghdr` is plain data, for which all zeroes is a value.
        let mut message: libc::msghdr = unsafe { mem::zeroed() };
        message.msg_iov = &raw mut vector;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control) as _;
        // SAFETY: `message` points to live buffers with their sizes.
        let received = unsafe { libc::recvmsg(self.fd.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
        if received < 0 {
            return match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
                e => Err(Error::system(doing())(e)),
            };
        }
        frame.truncate(received as usize);
        if let Some(tag) = stripped_tag(&message) {
            frame.splice(TAG_AT..TAG_AT, tag);
        }
        Ok(Some(frame))
    }

    /// Frames that were lost because they were not read in time, since the last call.
    pub fn drops(&self) -> Result<u32, Error> {
        // SAFETY: `tpacket_stats` is plain data, for which all zeroes is a value.
        let mut stats: libc::tpacket_stats = unsafe { mem::zeroed() };
        let mut len = size_of_val(&stats) as libc::socklen_t;
        // SAFETY: `stats` is live for the call and `len` is its size.
        let result = unsafe {
            libc::getsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut stats).cast(),
                &raw mut len,
            )
        };
        if result < 0 {
            return Err(Error::last_os(format!("reading the drops on {}", self.name)));
        }
        Ok(stats.tp_drops)
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The bytes of the VLAN tag, which the stack takes out of a frame before packet sockets see it, and
/// tells beside it.
fn stripped_tag(message: &libc::msghdr) -> Option<[u8; TAG_LEN]> {
    // SAFETY: `recvmsg` has filled in `message`, whose control buffer is still live.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(message) };
    while !header.is_null() {
        // SAFETY: not null, so it is a whole header in the control buffer.
        let kind = unsafe { ((*header).cmsg_level, (*header).cmsg_type) };
        if kind == (libc::SOL_PACKET, libc::PACKET_AUXDATA) {
            // SAFETY: data of this kind is a `tpacket_auxdata`, at an address that needn't fit it.
            let aux = unsafe { libc::CMSG_DATA(header).cast::<libc::tpacket_auxdata>().read_unaligned() };
            let [[p0, p1], [t0, t1]] = [aux.tp_vlan_tpid.to_be_bytes(), aux.tp_vlan_tci.to_be_bytes()];
            return (aux.tp_status & libc::TP_STATUS_VLAN_VALID != 0).then_some([p0, p1, t0, t1]);
        }
        // SAFETY: as for the first.
        header = unsafe { libc::CMSG_NXTHDR(message, header) };
    }
    None
}
