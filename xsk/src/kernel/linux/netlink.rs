//! A small netlink client: one request and all of its answers, waited for; or what the kernel tells
//! a group unasked, never waited for.
//!
//! A message is a header of 16 bytes (length, type, flags, sequence number, port) and a body: a
//! structure of the family's, then attributes. An attribute is a header of 4 bytes (length, type)
//! and a payload. Everything is in the machine's byte order and starts at a multiple of 4.
//!
//! Bytes from the kernel are taken apart with every bound checked: what is cut short or does not
//! add up ends the iteration, and never panics.

use core::mem;
use core::ptr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::retry_on_intr;
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, recvfrom, sendto,
    socket_with,
};

use super::{check, text};
use crate::kernel::Errno;

/// Flag of a request: it is one.
const NLM_F_REQUEST: u16 = 0x01;
/// Flag of a request: end the answers with an acknowledgement.
const NLM_F_ACK: u16 = 0x04;
/// Flag of an answer: the table changed while it was read.
const NLM_F_DUMP_INTR: u16 = 0x10;
/// Flags of a request: all there are.
const NLM_F_DUMP: u16 = 0x300;

/// Message type: an error, or with 0 the acknowledgement.
const NLMSG_ERROR: u16 = 2;
/// Message type: the end of a dump.
const NLMSG_DONE: u16 = 3;

/// Bits of an attribute's type that are the type; the other two say nested and byte order.
const NLA_TYPE_MASK: u16 = 0x3fff;

/// Bytes of a message's header; the interface index of `struct ifinfomsg` is 4 bytes further on.
pub(super) const MESSAGE_HEADER: usize = 16;
/// Bytes of an attribute's header.
pub(super) const ATTRIBUTE_HEADER: usize = 4;

// Generic netlink: `include/uapi/linux/genetlink.h`.
const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const CTRL_ATTR_MCAST_GROUPS: u16 = 7;
const CTRL_ATTR_MCAST_GRP_NAME: u16 = 1;
const CTRL_ATTR_MCAST_GRP_ID: u16 = 2;
/// Bytes of `struct genlmsghdr`.
pub(super) const GENLMSGHDR_SIZE: usize = 4;

/// A netlink socket.
#[derive(Debug)]
pub(super) struct Netlink {
    fd: OwnedFd,
    sequence: u32,
}

impl AsFd for Netlink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Netlink {
    /// A socket of this protocol; `None` is `NETLINK_ROUTE`.
    pub(super) fn open(protocol: Option<Protocol>) -> Result<Self, Errno> {
        let fd = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)?;
        // A port of the kernel's choice. A group's messages pass by a socket without one.
        bind(&fd, &SocketAddrNetlink::new(0, 0))?;
        Ok(Self { fd, sequence: 0 })
    }

    /// A socket of generic netlink, and a family on it; `None` on kernels without the family.
    pub(super) fn generic(family: &str) -> Result<Option<(Self, Family)>, Errno> {
        let find = || {
            let mut socket = Self::open(Some(netlink::GENERIC))?;
            let mut found = None;
            let request = Request::new(GENL_ID_CTRL, &genlmsghdr(CTRL_CMD_GETFAMILY))
                .attribute(CTRL_ATTR_FAMILY_NAME, &[family.as_bytes(), b"\0"].concat());
            socket.get(&request, |_, body| found = parse_family(body))?;
            Ok(found.map(|family| (socket, family)))
        };
        match find() {
            Err(Errno::NOENT | Errno::OPNOTSUPP | Errno::PROTONOSUPPORT) => Ok(None),
            result => result,
        }
    }

    /// Joins a multicast group, of whose messages the socket gets those that `filter` accepts.
    ///
    /// The filter is classic BPF, run by the kernel over the whole message; it sees answers too, so
    /// nothing is to be asked on this socket from here on.
    pub(super) fn join(&self, group: u32, filter: &[libc::sock_filter]) -> Result<(), Errno> {
        // Before the membership, so that nothing comes in past the filter.
        let program = libc::sock_fprog {
            len: u16::try_from(filter.len()).map_err(|_| Errno::INVAL)?,
            filter: filter.as_ptr().cast_mut(),
        };
        // SAFETY: the kernel reads the `len` instructions at `filter`, and checks each.
        unsafe { self.set(libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)? };
        // SAFETY: the option's value is one number.
        unsafe { self.set(libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP, &group) }
    }

    /// Takes the next message off the socket, unread, without waiting: `AGAIN` where there is none,
    /// `NOBUFS` once after messages were lost for want of room.
    pub(super) fn discard(&self) -> Result<(), Errno> {
        recv(&self.fd, &mut [0u8; 0], RecvFlags::DONTWAIT).map(drop)
    }

    /// `setsockopt`.
    ///
    /// # Safety
    ///
    /// `value` is what the option takes, and what it points to is there to be read.
    unsafe fn set<T>(&self, level: i32, name: i32, value: &T) -> Result<(), Errno> {
        let (fd, len) = (self.fd.as_raw_fd(), size_of::<T>() as libc::socklen_t);
        // SAFETY: the kernel reads `len` bytes at `value`, and further only as the caller answers for.
        check(unsafe { libc::setsockopt(fd, level, name, ptr::from_ref(value).cast(), len) }).map(drop)
    }

    /// Asks for one thing: calls `each` with the type and body of every answer.
    pub(super) fn get(&mut self, request: &Request, each: impl FnMut(u16, &[u8])) -> Result<(), Errno> {
        self.ask(request, NLM_F_ACK, each).map(drop)
    }

    /// Asks for all there is. A table that changes while it is read is read again.
    pub(super) fn dump<T>(
        &mut self,
        request: &Request,
        mut each: impl FnMut(u16, &[u8]) -> Option<T>,
    ) -> Result<Vec<T>, Errno> {
        const ATTEMPTS: usize = 8;
        for _ in 0..ATTEMPTS {
            let mut all = Vec::new();
            if self.ask(request, NLM_F_DUMP, |kind, body| all.extend(each(kind, body)))? {
                return Ok(all);
            }
        }
        Err(Errno::AGAIN)
    }

    /// Sends a request and reads its answers to the end. Returns whether they are of one moment.
    fn ask(
        &mut self,
        request: &Request,
        flags: u16,
        mut each: impl FnMut(u16, &[u8]),
    ) -> Result<bool, Errno> {
        self.sequence = self.sequence.wrapping_add(1);
        let message = request.finish(NLM_F_REQUEST | flags, self.sequence);
        let kernel = SocketAddrNetlink::new(0, 0);
        retry_on_intr(|| sendto(&self.fd, &message, SendFlags::empty(), &kernel))?;
        let mut consistent = true;
        loop {
            let datagram = self.receive()?;
            for answer in messages(&datagram).filter(|answer| answer.sequence == self.sequence) {
                consistent &= answer.flags & NLM_F_DUMP_INTR == 0;
                match answer.kind {
                    NLMSG_ERROR | NLMSG_DONE => return outcome(answer.body).map(|()| consistent),
                    kind => each(kind, answer.body),
                }
            }
        }
    }

    /// The next datagram from the kernel, whole.
    fn receive(&self) -> Result<Vec<u8>, Errno> {
        loop {
            // Its size first, so that it is never cut off.
            let peek = RecvFlags::PEEK | RecvFlags::TRUNC;
            let (_, len, _) = retry_on_intr(|| recvfrom(&self.fd, &mut [0u8; 0], peek))?;
            let mut datagram = vec![0; len];
            let (_, _, sender) = retry_on_intr(|| recvfrom(&self.fd, &mut datagram[..], RecvFlags::empty()))?;
            // A process may write to this socket as well; the kernel is port 0.
            let sender = sender.and_then(|sender| SocketAddrNetlink::try_from(sender).ok());
            if sender.is_some_and(|sender| sender.pid() == 0) {
                return Ok(datagram);
            }
        }
    }
}

/// A family of generic netlink, as this kernel numbers it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Family {
    /// The type of its messages.
    pub(super) id: u16,
    /// Its multicast groups, by name.
    groups: Vec<(String, u32)>,
}

impl Family {
    /// The number of a multicast group.
    pub(super) fn group(&self, name: &str) -> Option<u32> {
        self.groups.iter().find(|(group, _)| group == name).map(|&(_, number)| number)
    }
}

/// `struct genlmsghdr`: a command, and version 1 of it.
pub(super) fn genlmsghdr(command: u8) -> [u8; GENLMSGHDR_SIZE] {
    [command, 1, 0, 0]
}

/// The family that `CTRL_CMD_NEWFAMILY` speaks of.
pub(super) fn parse_family(body: &[u8]) -> Option<Family> {
    let (mut id, mut groups) = (None, Vec::new());
    for (kind, payload) in attributes(body.get(GENLMSGHDR_SIZE..)?) {
        match kind {
            CTRL_ATTR_FAMILY_ID => id = u16_at(payload, 0),
            CTRL_ATTR_MCAST_GROUPS => {
                groups = attributes(payload).filter_map(|(_, group)| parse_group(group)).collect();
            }
            _ => {}
        }
    }
    Some(Family { id: id?, groups })
}

fn parse_group(group: &[u8]) -> Option<(String, u32)> {
    let find = |kind| attributes(group).find(|&(found, _)| found == kind).map(|(_, payload)| payload);
    Some((text(find(CTRL_ATTR_MCAST_GRP_NAME)?), u32_at(find(CTRL_ATTR_MCAST_GRP_ID)?, 0)?))
}

/// A request, without its header.
#[derive(Debug)]
pub(super) struct Request {
    kind: u16,
    body: Vec<u8>,
}

impl Request {
    /// A request of this type, with the family's structure as its body so far.
    pub(super) fn new(kind: u16, body: &[u8]) -> Self {
        let mut request = Self { kind, body: body.to_vec() };
        request.align();
        request
    }

    /// Adds an attribute; short ones only.
    pub(super) fn attribute(mut self, kind: u16, payload: &[u8]) -> Self {
        let len = u16::try_from(ATTRIBUTE_HEADER + payload.len()).expect("attributes are at most 64 KiB");
        self.body.extend(len.to_ne_bytes());
        self.body.extend(kind.to_ne_bytes());
        self.body.extend(payload);
        self.align();
        self
    }

    /// The body so far: a structure and its attributes, as an answer has them too.
    #[cfg(test)]
    pub(super) fn into_body(self) -> Vec<u8> {
        self.body
    }

    fn align(&mut self) {
        self.body.resize(self.body.len().next_multiple_of(4), 0);
    }

    fn finish(&self, flags: u16, sequence: u32) -> Vec<u8> {
        let len = MESSAGE_HEADER + self.body.len();
        let mut message = Vec::with_capacity(len);
        message.extend((len as u32).to_ne_bytes());
        message.extend(self.kind.to_ne_bytes());
        message.extend(flags.to_ne_bytes());
        message.extend(sequence.to_ne_bytes());
        message.extend(0u32.to_ne_bytes());
        message.extend(&self.body);
        message
    }
}

/// One message of a datagram.
#[derive(Debug, PartialEq, Eq)]
struct Message<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    body: &'a [u8],
}

/// The messages of a datagram, up to the first that does not fit.
fn messages(mut datagram: &[u8]) -> impl Iterator<Item = Message<'_>> {
    core::iter::from_fn(move || {
        let len = u32_at(datagram, 0)? as usize;
        let message = split(&mut datagram, len)?;
        Some(Message {
            kind: u16_at(message, 4)?,
            flags: u16_at(message, 6)?,
            sequence: u32_at(message, 8)?,
            body: message.get(MESSAGE_HEADER..)?,
        })
    })
}

/// The types and payloads of attributes, up to the first that does not fit.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    core::iter::from_fn(move || {
        let len = u16_at(bytes, 0)? as usize;
        let attribute = split(&mut bytes, len)?;
        Some((u16_at(attribute, 2)? & NLA_TYPE_MASK, attribute.get(ATTRIBUTE_HEADER..)?))
    })
}

/// Takes `len` bytes off the front, and what aligns the rest to 4 bytes, as far as it is there.
fn split<'a>(bytes: &mut &'a [u8], len: usize) -> Option<&'a [u8]> {
    let (front, rest) = mem::take(bytes).split_at_checked(len)?;
    *bytes = rest.get(len.next_multiple_of(4) - len..).unwrap_or_default();
    Some(front)
}

/// What the body of an error or of the end of a dump says: 0, or an errno with a minus.
fn outcome(body: &[u8]) -> Result<(), Errno> {
    match u32_at(body, 0).map(|code| code as i32) {
        // Kernels before 2.6 ended a dump without a code.
        None | Some(0) => Ok(()),
        // The range of errnos in the kernel.
        Some(code @ -4095..=-1) => Err(Errno::from_raw_os_error(-code)),
        Some(_) => Err(Errno::BADMSG),
    }
}

/// A number at `at`, if it is there.
pub(super) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes_at(bytes, at).map(u16::from_ne_bytes)
}

/// A number at `at`, if it is there.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes_at(bytes, at).map(u32::from_ne_bytes)
}

/// A number at `at`, if it is there.
pub(super) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes_at(bytes, at).map(u64::from_ne_bytes)
}

fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_messages() -> Vec<u8> {
        let first = Request::new(16, &[1, 2, 3, 4]).attribute(5, b"abc").attribute(6, &[]);
        let mut datagram = first.finish(0, 7);
        datagram.extend(Request::new(NLMSG_DONE, &0i32.to_ne_bytes()).finish(NLM_F_DUMP_INTR, 7));
        datagram
    }

    #[test]
    fn a_request_reads_back_as_what_it_was_made_of() {
        let datagram = two_messages();
        let read: Vec<_> = messages(&datagram).collect();
        assert_eq!(read.len(), 2);
        assert_eq!((read[0].kind, read[0].flags, read[0].sequence), (16, 0, 7));
        assert_eq!(read[0].body[..4], [1, 2, 3, 4]);
        let attributes: Vec<_> = attributes(&read[0].body[4..]).collect();
        assert_eq!(attributes, [(5, &b"abc"[..]), (6, &b""[..])]);
        assert_eq!((read[1].kind, read[1].flags), (NLMSG_DONE, NLM_F_DUMP_INTR));
        assert_eq!(outcome(read[1].body), Ok(()));
    }

    #[test]
    fn nothing_that_is_cut_off_is_yielded() {
        let datagram = two_messages();
        let whole: Vec<_> = messages(&datagram).collect();
        let first = MESSAGE_HEADER + whole[0].body.len();
        for len in 0..datagram.len() {
            let expected = usize::from(len >= first);
            assert_eq!(messages(&datagram[..len]).count(), expected, "of {len} bytes");
        }
        // "abc" is 7 bytes with its header and one of padding; the last may lack its padding.
        let body = &whole[0].body[4..];
        let counts: Vec<_> = (0..=body.len()).map(|len| attributes(&body[..len]).count()).collect();
        assert_eq!(counts, [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2]);
    }

    #[test]
    fn lengths_that_lie_end_the_iteration() {
        for len in [0u32, 1, 15, u32::MAX - 2, u32::MAX] {
            let mut datagram = two_messages();
            datagram[..4].copy_from_slice(&len.to_ne_bytes());
            assert_eq!(messages(&datagram).count(), 0, "a message of {len} bytes");
        }
        for len in [0u16, 3, u16::MAX] {
            let mut bytes = len.to_ne_bytes().to_vec();
            bytes.extend([0; 40]);
            assert_eq!(attributes(&bytes).count(), 0, "an attribute of {len} bytes");
        }
    }

    #[test]
    fn the_upper_bits_of_a_type_are_not_part_of_it() {
        let nested = Request::new(0, &[]).attribute(0x8000 | 43, &[0; 4]);
        assert_eq!(attributes(&nested.body).next(), Some((43, &[0u8; 4][..])));
    }

    #[test]
    fn a_family_has_a_number_and_groups_by_name() {
        let body = |attributes: &[(u16, &[u8])], structure: &[u8]| {
            let request = Request::new(0, structure);
            attributes.iter().fold(request, |r, (kind, payload)| r.attribute(*kind, payload)).into_body()
        };
        let group = |name: &[u8], id: u32| {
            body(&[(CTRL_ATTR_MCAST_GRP_ID, &id.to_ne_bytes()), (CTRL_ATTR_MCAST_GRP_NAME, name)], &[])
        };
        let nameless = body(&[(CTRL_ATTR_MCAST_GRP_ID, &[9, 0, 0, 0])], &[]);
        let groups = body(&[(1, &group(b"monitor\0", 6)), (2, &nameless), (3, &group(b"b\0", 7))], &[]);
        let header = genlmsghdr(1);
        let name = (CTRL_ATTR_FAMILY_NAME, &b"ethtool\0"[..]);
        let id = (CTRL_ATTR_FAMILY_ID, &21u16.to_ne_bytes()[..]);
        let answer = body(&[name, id, (CTRL_ATTR_MCAST_GROUPS, &groups)], &header);
        let family = parse_family(&answer).unwrap();
        assert_eq!((family.id, family.group("monitor"), family.group("b")), (21, Some(6), Some(7)));
        assert_eq!(family.group("mgmt"), None);
        assert_eq!(parse_family(&body(&[id], &header)), Some(Family { id: 21, groups: Vec::new() }));
        assert_eq!(parse_family(&body(&[name], &header)), None);
        assert_eq!(parse_family(&[]), None);
        // Cut anywhere, it is the family without some of its groups, or none.
        for len in 0..answer.len() {
            assert!(parse_family(&answer[..len]).is_none_or(|cut| cut.id == 21 && cut.groups.is_empty()));
        }
    }

    #[test]
    fn an_error_is_its_errno_and_nonsense_is_not() {
        let outcome = |code: i32| outcome(&code.to_ne_bytes());
        assert_eq!(outcome(0), Ok(()));
        assert_eq!(outcome(-libc::ENODEV), Err(Errno::NODEV));
        assert_eq!(outcome(5), Err(Errno::BADMSG));
        assert_eq!(outcome(i32::MIN), Err(Errno::BADMSG));
        assert_eq!(super::outcome(&[1, 2]), Ok(()));
    }
}
