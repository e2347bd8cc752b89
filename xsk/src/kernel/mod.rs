//! The contract: what a kernel must offer for AF_XDP, as three small traits.
//!
//! [`Sockets`] makes AF_XDP sockets, [`Programs`] loads XDP programs and keeps their maps, and
//! [`Devices`] tells of network interfaces. They speak raw ABI values and raw errnos; what went
//! wrong and why is explained above them. [`linux`] implements them with system calls; the crate
//! `xsk-sim` implements them with memory.
//!
//! The traits serve set-up and wake-ups only. The rings are plain shared memory on either side, so
//! no dynamic call is on the data path.
//!
//! These traits belong to the crates of this family, which always have one version. They may
//! change in any release.

use core::any::Any;
use core::fmt::Debug;
use core::ptr::NonNull;
use core::time::Duration;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;

pub use rustix::io::Errno;

use crate::abi::{SockaddrXdp, UmemReg, XdpFeatures};

#[cfg(target_os = "linux")]
pub mod linux;

/// A kernel: everything that the library needs of one.
pub trait Kernel: Sockets + Programs + Devices + Debug {
    /// Which kernel this is, as reports name it: `"linux"` or `"sim"`.
    fn name(&self) -> &'static str;

    /// A number that tells this kernel from every other that is there at the same time: what was
    /// made by one can't be used with another. Values that stand for one kernel have one number;
    /// unless told otherwise, each value is a kernel of its own.
    fn id(&self) -> usize {
        core::ptr::from_ref(self).addr()
    }
}

/// A range of memory, with what keeps it mapped.
///
/// Rings and UMEMs hold their memory through this, so nothing is unmapped while it can be reached.
#[derive(Clone)]
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
    owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: a mapping is an address and a length; reaching through it is unsafe and argued there.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Memory at `base`, kept by `owner`.
    ///
    /// # Safety
    ///
    /// `len` bytes at `base` stay readable and writable for as long as `owner` lives.
    pub unsafe fn new(base: NonNull<u8>, len: usize, owner: Arc<dyn Any + Send + Sync>) -> Self {
        Self { base, len, owner }
    }

    /// Where the memory starts.
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What keeps the memory mapped.
    pub fn owner(&self) -> &Arc<dyn Any + Send + Sync> {
        &self.owner
    }
}

impl Debug for Mapping {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Mapping").field("base", &self.base).field("len", &self.len).finish_non_exhaustive()
    }
}

/// What a process may use, as far as AF_XDP cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a page: the largest chunk.
    pub page_size: usize,
    /// `RLIMIT_MEMLOCK` in bytes; `None` is unlimited.
    pub memlock: Option<u64>,
    /// The process has `CAP_NET_RAW`.
    pub net_raw: bool,
    /// The process has `CAP_NET_ADMIN`.
    pub net_admin: bool,
    /// The process has `CAP_BPF` (or `CAP_SYS_ADMIN`, which contains it).
    pub bpf: bool,
    /// The process has `CAP_IPC_LOCK`: locked memory is not counted.
    pub ipc_lock: bool,
}

/// Makes AF_XDP sockets.
///
/// # Safety
///
/// The sockets hand out ring mappings that safe code reads and writes: see [`RawSocket`].
pub unsafe trait Sockets: Send + Sync {
    /// `socket(AF_XDP, kind, protocol)`, close-on-exec. AF_XDP knows `SOCK_RAW` (3) and protocol 0 only.
    fn socket(&self, kind: i32, protocol: i32) -> Result<Box<dyn RawSocket>, Errno>;

    /// What this process may use.
    fn limits(&self) -> Limits;

    /// `poll` on several descriptors at once: sockets of this kernel, its watches, and any other.
    /// `None` waits for ever. Returns how many entries are ready.
    ///
    /// A kernel that can tell that nothing will ever end the wait answers `EDEADLK`.
    fn poll(&self, entries: &mut [PollEntry<'_>], timeout: Option<Duration>) -> Result<usize, Errno>;

    /// Processes that have AF_XDP sockets in this network namespace, as far as they can be seen.
    fn holders(&self) -> Vec<Holder> {
        Vec::new()
    }
}

/// A process that has AF_XDP sockets open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its number.
    pub pid: u32,
    /// Its name.
    pub name: String,
}

impl core::fmt::Display for Holder {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{} (process {})", self.name, self.pid)
    }
}

/// One AF_XDP socket, raw. Dropping it closes it.
///
/// # Safety
///
/// - A mapping that [`map`](Self::map) returns lives as long as its owner, and is shared with the
///   kernel alone.
/// - The kernel follows the ring protocol: it reads an entry of FILL or TX only after the producer
///   index has passed it and before it moves the consumer index, and the reverse for RX and
///   COMPLETION; indices are published with release and read with acquire.
/// - The kernel touches a byte of a registered UMEM only between the moment its frame was
///   published in FILL or TX and the moment it is published in RX or COMPLETION.
pub unsafe trait RawSocket: AsFd + Send + Sync + Debug {
    /// `setsockopt(SOL_XDP, XDP_UMEM_REG)`, with the first `optlen` bytes of `registration`.
    ///
    /// `memory` is the memory that `registration` speaks of. The kernel keeps hold of it for as
    /// long as it may touch it (Linux pins the pages).
    fn register_umem(&self, registration: &UmemReg, optlen: usize, memory: &Mapping) -> Result<(), Errno>;

    /// `setsockopt`, for every option but `XDP_UMEM_REG`.
    fn setsockopt(&self, level: i32, name: i32, value: &[u8]) -> Result<(), Errno>;

    /// `getsockopt`: the number of bytes that the kernel wrote.
    fn getsockopt(&self, level: i32, name: i32, value: &mut [u8]) -> Result<usize, Errno>;

    /// `mmap` of a ring: `length` bytes at `page_offset`, shared, readable and writable, not
    /// inherited by a fork.
    fn map(&self, page_offset: u64, length: usize) -> Result<Mapping, Errno>;

    /// `bind`.
    fn bind(&self, address: &SockaddrXdp) -> Result<(), Errno>;

    /// `sendto` with `MSG_DONTWAIT` and no payload: transmit what is in TX.
    fn send(&self) -> Result<(), Errno>;

    /// `recvfrom` with `MSG_DONTWAIT` and no payload: have the driver look at FILL.
    fn receive(&self) -> Result<(), Errno>;

    /// Whether the socket is bound to an interface that is there; it is not taken for bound when the
    /// kernel has begun to take it off.
    fn is_bound(&self) -> bool;

    /// `poll` on this socket alone. `None` waits for ever. Returns `revents`.
    ///
    /// Linux says nothing of a socket whose interface goes away or is switched off during the
    /// wait; an implementation ends an endless wait then, with [`POLLERR`].
    ///
    /// A kernel that can tell that nothing will ever end the wait answers `EDEADLK`.
    fn poll(&self, events: i16, timeout: Option<Duration>) -> Result<i16, Errno>;
}

/// One descriptor of a [`poll`](Sockets::poll): `struct pollfd`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct PollEntry<'a> {
    /// What is waited for.
    pub fd: BorrowedFd<'a>,
    /// Which of its events: [`POLLIN`], [`POLLOUT`].
    pub events: i16,
    /// What was found.
    pub revents: i16,
}

/// Readable: RX has packets.
pub const POLLIN: i16 = 0x001;
/// Writable: TX is at most half full.
pub const POLLOUT: i16 = 0x004;
/// An error is pending on the socket.
pub const POLLERR: i16 = 0x008;

/// An open object of the kernel's: a map, a program or a link. Dropping it closes it.
pub trait Object: AsFd + Send + Sync + Debug {}
impl<T: AsFd + Send + Sync + Debug> Object for T {}

/// An open object, owned.
pub type Handle = Box<dyn Object>;

/// `struct bpf_insn`: one eBPF instruction, 8 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Insn {
    /// Operation.
    pub code: u8,
    /// Destination register in the lower four bits, source register in the upper four, on every
    /// machine; the kernel's own structure has them the other way round where it is big-endian.
    pub regs: u8,
    /// Offset, for jumps and memory.
    pub off: i16,
    /// Immediate.
    pub imm: i32,
}

/// A map to be created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapSpec<'a> {
    /// `BPF_MAP_TYPE_*`: 17 is an XSKMAP.
    pub kind: u32,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// Entries.
    pub max_entries: u32,
    /// `BPF_F_*`.
    pub flags: u32,
    /// At most 15 bytes, as tools show it.
    pub name: &'a str,
}

/// A program to be loaded.
#[derive(Clone, Copy, Debug)]
pub struct ProgramSpec<'a> {
    /// The instructions. A map stands in them as its descriptor (`BPF_PSEUDO_MAP_FD`).
    pub instructions: &'a [Insn],
    /// `BPF_F_*`: `BPF_F_XDP_HAS_FRAGS` is `1 << 5` (5.18).
    pub flags: u32,
    /// At most 15 bytes, as tools show it.
    pub name: &'a str,
}

/// What the kernel tells of a loaded program (`struct bpf_prog_info`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProgramInfo {
    /// The kernel's number for it.
    pub id: u32,
    /// Its name, at most 15 bytes.
    pub name: String,
    /// The kernel's hash of its instructions, in which the descriptors of maps are blanked: the same
    /// program over another map has the same tag.
    pub tag: [u8; 8],
    /// The numbers of its maps.
    pub maps: Vec<u32>,
}

/// What the kernel tells of a map (`struct bpf_map_info`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapInfo {
    /// The kernel's number for it.
    pub id: u32,
    /// `BPF_MAP_TYPE_*`.
    pub kind: u32,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// Entries.
    pub max_entries: u32,
    /// Its name, at most 15 bytes.
    pub name: String,
}

/// What the kernel tells of a link (`struct bpf_link_info`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkInfo {
    /// The kernel's number for it.
    pub id: u32,
    /// `BPF_LINK_TYPE_*`: 6 is XDP.
    pub kind: u32,
    /// The number of its program.
    pub program: u32,
    /// The interface that an XDP program is on, in the network namespace of that interface; 0 when
    /// the link was detached, and of links of other kinds.
    pub ifindex: u32,
}

/// `BPF_LINK_TYPE_XDP`.
pub const LINK_XDP: u32 = 6;

/// What has a number and can be opened by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Numbered {
    /// A program.
    Program,
    /// A map.
    Map,
    /// A link.
    Link,
}

/// A process that has a program open, or a link of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProgramHolder {
    /// The process.
    pub process: Holder,
    /// The number of the link that it has open; `None` where it has the program itself.
    pub link: Option<u32>,
}

/// Loads XDP programs, attaches them, keeps their maps.
pub trait Programs: Send + Sync {
    /// `BPF_MAP_CREATE`.
    fn create_map(&self, spec: &MapSpec<'_>) -> Result<Handle, Errno>;

    /// `BPF_MAP_UPDATE_ELEM`. The value of an XSKMAP is a socket's descriptor, 4 bytes.
    fn update_map(&self, map: BorrowedFd<'_>, key: &[u8], value: &[u8], flags: u64) -> Result<(), Errno>;

    /// `BPF_MAP_DELETE_ELEM`.
    fn delete_from_map(&self, map: BorrowedFd<'_>, key: &[u8]) -> Result<(), Errno>;

    /// `BPF_PROG_LOAD` of an XDP program. On refusal `log` has what the verifier said.
    fn load_program(&self, spec: &ProgramSpec<'_>, log: &mut String) -> Result<Handle, Errno>;

    /// `BPF_LINK_CREATE`: attach a program to an interface. `flags` are `XDP_FLAGS_*`.
    fn attach(&self, program: BorrowedFd<'_>, ifindex: u32, flags: u32) -> Result<Handle, Errno>;

    /// `BPF_OBJ_PIN`: let an object outlive its descriptors under a name in a BPF file system.
    fn pin(&self, object: BorrowedFd<'_>, path: &Path) -> Result<(), Errno>;

    /// `BPF_OBJ_GET`: opens what was pinned under a name in a BPF file system.
    fn open_pinned(&self, path: &Path) -> Result<Handle, Errno>;

    /// `BPF_PROG_GET_FD_BY_ID`, `BPF_MAP_GET_FD_BY_ID`, `BPF_LINK_GET_FD_BY_ID`: opens what others
    /// made, by its number. `ENOENT` when it is gone, `EAGAIN` while a link is being made, `EPERM`
    /// without `CAP_SYS_ADMIN`.
    fn open_by_id(&self, kind: Numbered, id: u32) -> Result<Handle, Errno>;

    /// `BPF_LINK_GET_NEXT_ID`: the lowest number of a link above `after`, whatever the kind and the
    /// network namespace. `ENOENT` when there is none, `EPERM` without `CAP_SYS_ADMIN`.
    fn next_link(&self, after: u32) -> Result<u32, Errno>;

    /// `BPF_OBJ_GET_INFO_BY_FD` of a program.
    fn program_info(&self, program: BorrowedFd<'_>) -> Result<ProgramInfo, Errno>;

    /// `BPF_OBJ_GET_INFO_BY_FD` of a map.
    fn map_info(&self, map: BorrowedFd<'_>) -> Result<MapInfo, Errno>;

    /// `BPF_OBJ_GET_INFO_BY_FD` of a link.
    fn link_info(&self, link: BorrowedFd<'_>) -> Result<LinkInfo, Errno>;

    /// Processes that have the program of this number open, or a link of it, as far as they can be
    /// seen.
    fn program_holders(&self, id: u32) -> Vec<ProgramHolder>;
}

/// `XDP_FLAGS_SKB_MODE`: generic mode.
pub const XDP_FLAGS_SKB_MODE: u32 = 1 << 1;
/// `XDP_FLAGS_DRV_MODE`: native mode.
pub const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;

/// Queues of a device, as `ethtool -l` shows them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Channels {
    /// Queues that only receive.
    pub rx: u32,
    /// Queues that only send.
    pub tx: u32,
    /// Queues that do both.
    pub combined: u32,
}

/// An XDP program that is attached to an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttachedId {
    /// `XDP_ATTACHED_*`: 1 native, 2 generic, 3 offloaded.
    pub mode: u8,
    /// The program's number.
    pub id: u32,
}

/// What a driver declares in netlink family `netdev` (6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DriverFeatures {
    /// What XDP can do on it.
    pub xdp: XdpFeatures,
    /// Segments of a packet in zero copy (6.6).
    pub zc_max_segs: Option<u32>,
    /// Bits of `NETDEV_A_DEV_XDP_RX_METADATA_FEATURES` (6.3).
    pub rx_metadata: Option<u64>,
    /// Bits of `NETDEV_A_DEV_XSK_FEATURES` (6.8).
    pub xsk: Option<u64>,
}

/// What the kernel tells of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InterfaceInfo {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// `IFF_*`.
    pub flags: u32,
    /// The largest packet without its Ethernet header, in bytes.
    pub mtu: u32,
    /// The hardware address; `None` where it has none of six bytes.
    pub mac: Option<[u8; 6]>,
    /// The driver's name.
    pub driver: Option<String>,
    /// Queues, where the driver tells.
    pub channels: Option<Channels>,
    /// Receive queues in use; with `channels` absent, those that were allocated.
    pub rx_queues: u32,
    /// Transmit queues in use; with `channels` absent, those that were allocated.
    pub tx_queues: u32,
    /// Queues that were allocated, the more of the two kinds: no more can ever be in use.
    pub max_queues: u32,
    /// What the driver declares; `None` on kernels that don't tell.
    pub features: Option<DriverFeatures>,
    /// Programs that are attached.
    pub attached: Vec<AttachedId>,
}

/// `IFF_UP`: the interface is switched on.
pub const IFF_UP: u32 = 1 << 0;
/// `IFF_LOOPBACK`.
pub const IFF_LOOPBACK: u32 = 1 << 3;
/// `IFF_RUNNING`: the link is there.
pub const IFF_RUNNING: u32 = 1 << 6;
/// `IFF_LOWER_UP`: the driver has a carrier. [`IFF_RUNNING`] follows it, up to a second later.
pub const IFF_LOWER_UP: u32 = 1 << 16;

/// Tells of network interfaces.
pub trait Devices: Send + Sync {
    /// The index of an interface by its name.
    fn index_of(&self, name: &str) -> Result<u32, Errno>;

    /// What there is to know of an interface.
    fn interface(&self, index: u32) -> Result<InterfaceInfo, Errno>;

    /// All interfaces, by index.
    fn interfaces(&self) -> Result<Vec<u32>, Errno>;

    /// Watches an interface from here on; one that is not there is `ENODEV`.
    fn watch(&self, index: u32) -> Result<Box<dyn Watch>, Errno>;
}

/// Tells that something about an interface changed: it was switched on or off, its link came or
/// went, it was removed or renamed, its MTU or queues changed, a program was attached or detached.
///
/// Linux says nothing of a program that comes or goes with a BPF link: whoever must know of that
/// looks at the [interface](Devices::interface) from time to time.
///
/// The descriptor is readable ([`POLLIN`]) from a change until it is [taken](Self::take).
pub trait Watch: AsFd + Send + Sync + Debug {
    /// Whether something may have changed since this was last asked. It never waits.
    fn take(&self) -> bool;
}
