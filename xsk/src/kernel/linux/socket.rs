//! AF_XDP sockets by system calls.

use core::mem::offset_of;
use core::ptr::{self, NonNull};
use core::time::Duration;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use rustix::process::{Resource, getrlimit};
use rustix::thread::{CapabilitySet, capabilities};

use super::{Linux, check};
use crate::abi::{AF_XDP, SOL_XDP, SockaddrXdp, UmemReg, XDP_UMEM_REG, bytes_of};
use crate::kernel::{Errno, Holder, Limits, Mapping, POLLERR, PollEntry, RawSocket, Sockets};

// SAFETY: the sockets are the kernel's own; see `RawSocket for Socket`.
unsafe impl Sockets for Linux {
    fn socket(&self, kind: i32, protocol: i32) -> Result<Box<dyn RawSocket>, Errno> {
        // SAFETY: the call takes no pointers.
        let fd = check(unsafe { libc::socket(i32::from(AF_XDP), kind | libc::SOCK_CLOEXEC, protocol) })?;
        // SAFETY: the kernel just made this descriptor, and nothing else knows of it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as RawFd) };
        Ok(Box::new(Socket { fd }))
    }

    /// Capabilities are those of the calling thread, as far as they count: the kernel asks for
    /// `CAP_BPF` and `CAP_IPC_LOCK` in the initial user namespace, and a thread in another one
    /// has them in name only.
    fn limits(&self) -> Limits {
        let held = capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.effective);
        let initial = in_initial_user_namespace();
        Limits {
            page_size: page_size(),
            memlock: getrlimit(Resource::Memlock).current,
            net_raw: held.contains(CapabilitySet::NET_RAW),
            net_admin: held.contains(CapabilitySet::NET_ADMIN),
            bpf: initial && held.intersects(CapabilitySet::BPF | CapabilitySet::SYS_ADMIN),
            ipc_lock: initial && held.contains(CapabilitySet::IPC_LOCK),
        }
    }

    /// A signal ends the wait with `EINTR`, whatever is left of the timeout.
    fn poll(&self, entries: &mut [PollEntry<'_>], timeout: Option<Duration>) -> Result<usize, Errno> {
        // A timeout beyond what the kernel can count is for ever as well.
        let timeout = timeout.and_then(|timeout| {
            let tv_sec = timeout.as_secs().try_into().ok()?;
            Some(libc::timespec { tv_sec, tv_nsec: timeout.subsec_nanos() as _ })
        });
        let timeout = timeout.as_ref().map_or(ptr::null(), ptr::from_ref);
        let fds = entries.as_mut_ptr().cast::<libc::pollfd>();
        // SAFETY: an entry has the layout of `struct pollfd`, which is asserted below; the kernel
        // writes `revents` alone. The timeout is null or lives on.
        let ready = unsafe { libc::ppoll(fds, entries.len() as libc::nfds_t, timeout, ptr::null()) };
        check(ready).map(|ready| ready as usize)
    }

    fn holders(&self) -> Vec<Holder> {
        super::holders::find()
    }
}

const _: () = {
    assert!(size_of::<PollEntry<'_>>() == size_of::<libc::pollfd>());
    assert!(align_of::<PollEntry<'_>>() == align_of::<libc::pollfd>());
    assert!(offset_of!(PollEntry<'_>, fd) == offset_of!(libc::pollfd, fd));
    assert!(offset_of!(PollEntry<'_>, events) == offset_of!(libc::pollfd, events));
    assert!(offset_of!(PollEntry<'_>, revents) == offset_of!(libc::pollfd, revents));
};

/// Bytes of a page.
pub(super) fn page_size() -> usize {
    // SAFETY: the call takes no pointers.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).expect("Linux always knows its page size")
}

/// Whether the calling thread is in the initial user namespace; without `/proc`, it is taken to be.
fn in_initial_user_namespace() -> bool {
    /// `PROC_USER_INIT_INO`: its inode, the same on every Linux since 3.8.
    const INITIAL: u64 = 0xEFFF_FFFD;
    rustix::fs::stat("/proc/thread-self/ns/user").map_or(true, |stat| stat.st_ino == INITIAL)
}

/// An AF_XDP socket of the Linux kernel.
#[derive(Debug)]
struct Socket {
    fd: OwnedFd,
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Socket {
    fn set(&self, level: i32, name: i32, value: &[u8]) -> Result<(), Errno> {
        let len = libc::socklen_t::try_from(value.len()).map_err(|_| Errno::INVAL)?;
        // SAFETY: the kernel reads at most `len` bytes at `value`.
        let result =
            unsafe { libc::setsockopt(self.fd.as_raw_fd(), level, name, value.as_ptr().cast(), len) };
        check(result).map(drop)
    }
}

// SAFETY: a ring mapping is unmapped by its owner alone, and outlives the descriptor: it holds the
// kernel's socket. The kernel is the other side of the rings and of the UMEM and keeps their
// protocol; it writes to a UMEM only inside the registered range, which `register_umem` holds
// against the memory that it was given.
unsafe impl RawSocket for Socket {
    /// A registration beyond `memory` is `EFAULT`, before the kernel sees it: the kernel would let
    /// packets be written to any memory of the process. One that starts inside a page or wraps
    /// around the address space is the kernel's to refuse.
    fn register_umem(&self, registration: &UmemReg, optlen: usize, memory: &Mapping) -> Result<(), Errno> {
        let start = memory.base().as_ptr().expose_provenance() as u64;
        let end = start + memory.len() as u64;
        if let Some(last) = registration.addr.checked_add(registration.len)
            && registration.addr.is_multiple_of(page_size() as u64)
            && (registration.addr < start || last > end)
        {
            return Err(Errno::FAULT);
        }
        if i32::try_from(optlen).is_err() {
            return Err(Errno::INVAL);
        }
        // A newer kernel may read more than this structure has: zeros follow it, which is what
        // absent fields are.
        let mut value = bytes_of(registration).to_vec();
        value.resize(optlen, 0);
        self.set(SOL_XDP, XDP_UMEM_REG, &value)
    }

    /// `XDP_UMEM_REG` is `EINVAL` here: nothing would tie the addresses in it to memory.
    fn setsockopt(&self, level: i32, name: i32, value: &[u8]) -> Result<(), Errno> {
        if (level, name) == (SOL_XDP, XDP_UMEM_REG) {
            return Err(Errno::INVAL);
        }
        self.set(level, name, value)
    }

    fn getsockopt(&self, level: i32, name: i32, value: &mut [u8]) -> Result<usize, Errno> {
        let mut len = libc::socklen_t::try_from(value.len()).map_err(|_| Errno::INVAL)?;
        // SAFETY: the kernel writes at most `len` bytes at `value`, and how many to `len`.
        let result = unsafe {
            libc::getsockopt(self.fd.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &mut len)
        };
        check(result)?;
        Ok(len as usize)
    }

    /// The mapping holds the kernel's socket, and with it the queue, until it is unmapped, also
    /// when the descriptor is long closed.
    fn map(&self, page_offset: u64, length: usize) -> Result<Mapping, Errno> {
        let flags = MapFlags::SHARED | MapFlags::POPULATE;
        // SAFETY: a new mapping at a place of the kernel's choice replaces nothing.
        let base = unsafe {
            mmap(ptr::null_mut(), length, ProtFlags::READ | ProtFlags::WRITE, flags, &self.fd, page_offset)?
        };
        let base = NonNull::new(base.cast()).expect("mmap never answers with address 0 unless asked to");
        let owner = Arc::new(Mapped { base, len: length });
        // A forked child that merely inherited the mapping would keep the queue busy.
        // SAFETY: these are the pages mapped above; the advice changes no byte of them.
        unsafe { madvise(base.as_ptr().cast(), length, Advice::LinuxDontFork)? };
        // SAFETY: mapped readable and writable until `owner` is dropped.
        Ok(unsafe { Mapping::new(base, length, owner) })
    }

    fn bind(&self, address: &SockaddrXdp) -> Result<(), Errno> {
        let len = size_of::<SockaddrXdp>() as libc::socklen_t;
        // SAFETY: the kernel reads `len` bytes at `address`, and its family says how.
        let result = unsafe { libc::bind(self.fd.as_raw_fd(), ptr::from_ref(address).cast(), len) };
        check(result).map(drop)
    }

    fn send(&self) -> Result<(), Errno> {
        send(&self.fd, &[], SendFlags::DONTWAIT).map(drop)
    }

    fn receive(&self) -> Result<(), Errno> {
        recv(&self.fd, &mut [0u8; 0], RecvFlags::DONTWAIT).map(drop)
    }

    /// By a `sendto` that would wait, which no AF_XDP socket does (`EOPNOTSUPP`): before the kernel
    /// says so it has looked whether the socket is bound, and nothing else happens.
    fn is_bound(&self) -> bool {
        send(&self.fd, &[], SendFlags::empty()) != Err(Errno::NXIO)
    }

    /// A signal ends the wait with `EINTR`, whatever is left of the timeout, so that a program's
    /// handler for Ctrl-C has its say.
    fn poll(&self, events: i16, timeout: Option<Duration>) -> Result<i16, Errno> {
        /// How often an endless wait looks whether its interface is still there.
        const LOOK: Duration = Duration::from_millis(500);
        let endless = timeout.is_none();
        // A timeout beyond what the kernel can count, 2^63 s, is for ever as well.
        let timeout = Timespec::try_from(timeout.unwrap_or(LOOK)).ok();
        loop {
            // The bits are signed or not by rustix's backend.
            let mut fds = [PollFd::new(&self.fd, PollFlags::from_bits_retain(events as _))];
            let ready = poll(&mut fds, timeout.as_ref())?;
            if ready == 0 && endless {
                // The kernel answers neither way while the interface is down or gone, and never
                // will; an empty call does.
                if let Err(Errno::NETDOWN | Errno::NXIO) = self.receive() {
                    return Ok(POLLERR);
                }
                continue;
            }
            return Ok(fds[0].revents().bits() as i16);
        }
    }
}

/// The owner of a ring mapping.
struct Mapped {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: an address and a length; any thread may unmap.
unsafe impl Send for Mapped {}
// SAFETY: as above; nothing is reached through a shared reference.
unsafe impl Sync for Mapped {}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: mapped with these values, and whoever reaches through the mapping keeps this
        // owner, which is being dropped.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok(), "munmap of a ring: {unmapped:?}");
    }
}
