//! What went wrong, why, and what to do about it.
//!
//! An [`Error`] says what was being done ([`Doing`]), the cause ([`Cause`], to be matched), and the
//! kernel's own answer where there was one. The kernel says `EINVAL` for twenty reasons; the cause
//! is found afterwards, on the slow path, by holding the facts against what the kernel checks, in
//! the kernel's order.
//!
//! `{}` prints one line. `{:#}` and `{:?}` print the whole explanation with the remedy, so that a
//! program which just returns the error from `main` explains itself.

use core::fmt;
use std::time::Duration;

use crate::abi::RingKind;
use crate::kernel::Errno;
pub use crate::kernel::Holder;
use crate::umem::PageSize;
use crate::xdp::{AttachMode, Owner};

/// A result whose error is [`Error`].
pub type Result<T, E = Error> = core::result::Result<T, E>;

/// A failure, explained.
pub struct Error(Box<Inner>);

struct Inner {
    doing: Doing,
    cause: Cause,
    errno: Option<Errno>,
}

/// What was being done when it failed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Doing {
    /// Making a UMEM.
    MakeUmem {
        /// Frames asked for.
        frames: u32,
        /// Bytes of a chunk.
        chunk_size: u32,
    },
    /// Finding an interface.
    OpenDevice {
        /// Its name, or its index in words.
        name: String,
    },
    /// Asking what an open interface is.
    ReadDevice {
        /// Its name when it was opened.
        name: String,
    },
    /// Making an AF_XDP socket.
    MakeSocket,
    /// Registering a UMEM with a socket.
    RegisterUmem {
        /// Bytes of memory.
        bytes: u64,
    },
    /// Making a ring.
    MakeRing {
        /// Which.
        ring: RingKind,
        /// Entries asked for.
        entries: u32,
    },
    /// Binding a socket.
    Bind {
        /// The interface.
        interface: String,
        /// The queue.
        queue: u32,
    },
    /// Sending what is in TX.
    Send {
        /// The interface.
        interface: String,
        /// The queue.
        queue: u32,
    },
    /// Waking the driver to receive, or waiting.
    Wait {
        /// The interface.
        interface: String,
        /// The queue.
        queue: u32,
    },
    /// Forwarding from one port to another.
    Forward {
        /// The interface that received.
        from: String,
        /// The interface that was to send.
        to: String,
    },
    /// Reading a socket's counters or options.
    ReadSocket,
    /// Changing how many packets a send transmits.
    SetTxBudget {
        /// Packets asked for.
        packets: u32,
    },
    /// Making an XSKMAP.
    MakeMap {
        /// Slots asked for.
        entries: u32,
    },
    /// Entering a socket into an XSKMAP.
    InsertSocket {
        /// The slot.
        index: u32,
    },
    /// Removing a socket from an XSKMAP.
    RemoveSocket {
        /// The slot.
        index: u32,
    },
    /// Loading an XDP program.
    LoadProgram,
    /// Attaching an XDP program.
    Attach {
        /// The interface.
        interface: String,
        /// How.
        mode: AttachMode,
    },
    /// Joining a program that is kept.
    JoinKept {
        /// The directory in a BPF file system.
        path: String,
        /// The interface.
        interface: String,
    },
    /// Keeping a program beyond its process.
    Keep {
        /// The path in a BPF file system.
        path: String,
    },
}

impl fmt::Display for Doing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MakeUmem { frames, chunk_size } => {
                write!(f, "cannot make a UMEM of {frames} frames of {chunk_size} bytes")
            }
            Self::OpenDevice { name } => write!(f, "cannot open interface {name}"),
            Self::ReadDevice { name } => write!(f, "cannot read what interface {name} is"),
            Self::MakeSocket => f.write_str("cannot make an AF_XDP socket"),
            Self::RegisterUmem { bytes } => write!(f, "cannot register a UMEM of {bytes} bytes"),
            Self::MakeRing { ring, entries } => {
                write!(f, "cannot make the {ring} ring, of {entries} entries")
            }
            Self::Bind { interface, queue } => write!(f, "cannot bind to {interface} queue {queue}"),
            Self::Send { interface, queue } => write!(f, "cannot send on {interface} queue {queue}"),
            Self::Wait { interface, queue } => write!(f, "cannot wait for {interface} queue {queue}"),
            Self::Forward { from, to } => write!(f, "cannot forward from {from} to {to}"),
            Self::ReadSocket => f.write_str("cannot read the socket's state"),
            Self::SetTxBudget { packets } => write!(f, "cannot set the TX budget to {packets} packets"),
            Self::MakeMap { entries } => write!(f, "cannot make an XSKMAP of {entries} slots"),
            Self::InsertSocket { index } => {
                write!(f, "cannot enter the socket into slot {index} of the XSKMAP")
            }
            Self::RemoveSocket { index } => write!(f, "cannot clear slot {index} of the XSKMAP"),
            Self::LoadProgram => f.write_str("cannot load the XDP program"),
            Self::Attach { interface, mode } => {
                write!(f, "cannot attach an XDP program to {interface} ({mode})")
            }
            Self::JoinKept { path, interface } => {
                write!(f, "cannot join the program of {interface} that is kept at {path}")
            }
            Self::Keep { path } => write!(f, "cannot keep the program at {path}"),
        }
    }
}

/// Several in a sentence.
pub(crate) fn list<T: fmt::Display>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(", ")
}

/// Why it failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Cause {
    /// The process lacks a capability.
    #[error("the process lacks {capability}")]
    MissingCapability {
        /// Which: `CAP_NET_RAW`, `CAP_NET_ADMIN` or `CAP_BPF`.
        capability: &'static str,
    },
    /// The kernel refuses what the process has the capabilities for.
    #[error("the kernel forbids it, although the process has the capabilities")]
    Forbidden,
    /// The process has as many descriptors open as it may.
    #[error("the process, or the system, has too many files open")]
    TooManyFiles,
    /// The kernel was built without AF_XDP.
    #[error("this kernel has no AF_XDP")]
    NoAfXdp,
    /// The kernel lacks a feature.
    #[error("this kernel lacks {feature}, which came with Linux {since}")]
    KernelTooOld {
        /// What it lacks.
        feature: &'static str,
        /// The first kernel that has it.
        since: &'static str,
    },

    /// A UMEM of no frames.
    #[error("a UMEM needs at least one frame")]
    NoFrames,
    /// The chunk size is out of range.
    #[error("a chunk of {chunk} bytes is out of range: from {min} to {max}")]
    ChunkSize {
        /// Bytes asked for.
        chunk: u32,
        /// The least.
        min: u32,
        /// The most: the page size.
        max: u32,
    },
    /// The chunk size is not a power of two.
    #[error("a chunk of {chunk} bytes is not a power of two")]
    ChunkNotPowerOfTwo {
        /// Bytes asked for.
        chunk: u32,
    },
    /// Too much headroom.
    #[error("a headroom of {headroom} bytes leaves too little of a chunk of {chunk}: {max} is the most")]
    Headroom {
        /// Bytes asked for.
        headroom: u32,
        /// The most, for this chunk size, on kernels of 2026.
        max: u32,
        /// Bytes of a chunk.
        chunk: u32,
    },
    /// More memory than the machine has.
    #[error("{bytes} bytes are more than the machine has ({limit})")]
    UmemTooLarge {
        /// Bytes asked for.
        bytes: u64,
        /// Bytes of memory in the machine.
        limit: u64,
    },
    /// Memory is short.
    #[error("the system has no {}memory to give", match bytes {
        0 => String::new(),
        bytes => format!("{bytes} bytes of "),
    })]
    OutOfMemory {
        /// Bytes asked for; 0 where that is not known.
        bytes: u64,
    },
    /// Too few huge pages are free.
    #[error("fewer than {needed} huge pages of {pages} are free")]
    NoHugePages {
        /// Their size.
        pages: PageSize,
        /// How many are needed.
        needed: u64,
    },
    /// The limit of locked memory.
    #[error("{bytes} bytes would exceed the limit of locked memory ({limit} bytes a user)")]
    LockedMemory {
        /// Bytes to be locked.
        bytes: u64,
        /// `RLIMIT_MEMLOCK`, in bytes.
        limit: u64,
    },
    /// The memory can't be shared with the kernel.
    #[error("the kernel can't pin this memory")]
    MemoryRefused,

    /// A ring's size is not a power of two.
    #[error("{entries} entries are not a power of two")]
    RingNotPowerOfTwo {
        /// Entries asked for.
        entries: u32,
    },
    /// A ring is absurdly large.
    #[error("{entries} entries are too many: {max} is the most")]
    RingTooLarge {
        /// Entries asked for.
        entries: u32,
        /// The most that this library asks a kernel for.
        max: u32,
    },

    /// No such interface.
    #[error("there is no interface {name} in this network namespace")]
    NoSuchInterface {
        /// Its name, or its index in words.
        name: String,
    },
    /// No such queue.
    #[error("the interface has no queue {queue}: it has {queues}, numbered from 0")]
    NoSuchQueue {
        /// The queue asked for.
        queue: u32,
        /// Queues that the interface has.
        queues: u32,
    },
    /// The interface has no transmit queue of that number.
    #[error("the interface receives on queue {queue}, and has no such queue to send")]
    NoTxQueue {
        /// The queue.
        queue: u32,
    },
    /// No queue was named.
    #[error("no queue was named")]
    NoQueues,
    /// Two ports have different memory.
    #[error("the ports have different memory")]
    OtherMemory,
    /// The queue has a socket already.
    #[error("another socket has the queue (tried for {} ms){}", waited.as_millis(), if holders.is_empty() {
        String::new()
    } else {
        format!("; processes with AF_XDP sockets here: {}", list(holders))
    })]
    QueueBusy {
        /// Processes with AF_XDP sockets in this network namespace, as far as they can be seen.
        holders: Vec<Holder>,
        /// How long the queue was tried.
        waited: Duration,
    },
    /// This UMEM has a socket on this queue already.
    #[error("this UMEM already has a socket on this queue")]
    QueueTaken,
    /// The driver has no zero copy.
    #[error("{} has no zero copy", driver.as_deref().map_or("the driver".into(), |d| format!("the driver {d}")))]
    ZeroCopyUnsupported {
        /// The driver's name, where it is known.
        driver: Option<String>,
    },
    /// Packets of the interface's MTU don't fit a frame, as zero copy needs.
    #[error("packets of MTU {mtu} don't fit a frame of {room} bytes, as zero copy needs")]
    ZeroCopyMtu {
        /// The interface's MTU, in bytes.
        mtu: u32,
        /// Bytes of a packet that fit a frame.
        room: u32,
    },
    /// The driver refused zero copy for a reason of its own.
    #[error("the driver{} refused zero copy", driver.as_deref().map(|d| format!(" {d}")).unwrap_or_default())]
    ZeroCopyRefused {
        /// The driver's name, where it is known.
        driver: Option<String>,
    },
    /// A UMEM that is shared has one mode for all of its sockets.
    #[error("the UMEM is shared with a socket in {} mode", if *zero_copy { "zero-copy" } else { "copy" })]
    SharedMode {
        /// The mode of the sockets that have the UMEM.
        zero_copy: bool,
    },
    /// Two things that belong to different kernels can't be used together.
    #[error("{what} belongs to another kernel")]
    OtherKernel {
        /// Which of them, with its article: `the UMEM`, `the socket` or `the interface`.
        what: &'static str,
    },
    /// FILL was to be filled from the pool of another UMEM.
    #[error("the pool belongs to another UMEM")]
    ForeignPool,
    /// The UMEM has as many sockets as it can tell apart.
    #[error("the UMEM has {max} sockets already")]
    TooManySockets {
        /// The most.
        max: u32,
    },
    /// A TX budget that the kernel does not take.
    #[error("a TX budget of {packets} packets is out of range: from {min} to {max}")]
    TxBudget {
        /// Packets asked for.
        packets: u32,
        /// The least.
        min: u32,
        /// The most: the entries of TX.
        max: u32,
    },
    /// The socket only receives.
    #[error("the socket has no TX ring")]
    NoTxRing,
    /// The socket only sends.
    #[error("the socket has no RX ring")]
    NoRxRing,

    /// The driver sends in zero copy only beside an XDP program.
    #[error("{} sends in zero copy only while an XDP program is attached", driver.as_deref().map_or("the driver".into(), |d| format!("the driver {d}")))]
    NeedsProgram {
        /// The driver's name, where it is known.
        driver: Option<String>,
    },

    /// The interface is switched off.
    #[error("the interface is down")]
    InterfaceDown,
    /// The interface is gone.
    #[error("the interface is gone")]
    InterfaceGone,

    /// The map has no such slot.
    #[error("the map has no slot {index}: it has {entries}, numbered from 0")]
    NoSuchSlot {
        /// The slot asked for.
        index: u32,
        /// Slots of the map.
        entries: u32,
    },
    /// The slot has a socket already.
    #[error("slot {index} has a socket already")]
    SlotTaken {
        /// The slot.
        index: u32,
    },
    /// The kernel enters only sockets that can receive (7.1).
    #[error("the socket has no RX ring, and this kernel enters only sockets that can receive")]
    NeedsRxRing,
    /// An XSKMAP of an impossible size.
    #[error("{entries} slots are out of range: from 1 to {max}")]
    MapSize {
        /// Slots asked for.
        entries: u32,
        /// The most that this library asks a kernel for: queues are counted in 16 bits.
        max: u32,
    },
    /// A steering by UDP ports has none, or too many.
    #[error("{runs} runs of UDP ports are out of range: from 1 to {max}")]
    SteeringPorts {
        /// Runs of consecutive ports.
        runs: usize,
        /// The most.
        max: usize,
    },
    /// The verifier refused the program.
    #[error("the kernel's verifier refused the program")]
    Verifier {
        /// What it said.
        log: String,
    },
    /// A program is attached to the interface already.
    #[error("{} is attached already ({mode}), {owner}", match name {
        Some(name) => format!("XDP program {name} (number {id})"),
        None => format!("XDP program {id}"),
    })]
    ProgramPresent {
        /// The kernel's number for it.
        id: u32,
        /// Its name, where the kernel tells it.
        name: Option<String>,
        /// How it is attached.
        mode: AttachMode,
        /// Who keeps it there.
        owner: Owner,
    },
    /// This library's program is attached to the interface already, and steers otherwise.
    #[error(
        "this library's program (number {id}) is attached already ({mode}), {owner}, with other rules: {rules}; asked for: {asked}"
    )]
    OtherRules {
        /// The kernel's number for it.
        id: u32,
        /// How it is attached.
        mode: AttachMode,
        /// What it steers to sockets, as far as its name tells.
        rules: String,
        /// What was asked for, in words of the same kind.
        asked: String,
        /// Who keeps it there.
        owner: Owner,
    },
    /// This library's program is attached to the interface already, in another mode than was asked for.
    #[error("this library's program (number {id}) is attached already in another mode ({mode}), {owner}")]
    OtherMode {
        /// The kernel's number for it.
        id: u32,
        /// How it is attached.
        mode: AttachMode,
        /// Who keeps it there.
        owner: Owner,
    },
    /// A program is attached to the interface already, and the process may not look whether it can
    /// be shared.
    #[error(
        "XDP program {id} is attached already ({mode}), {owner}, and the process lacks CAP_SYS_ADMIN to join it"
    )]
    SharingNeedsCapability {
        /// The kernel's number for it.
        id: u32,
        /// How it is attached.
        mode: AttachMode,
        /// Who keeps it there.
        owner: Owner,
    },
    /// The driver runs no XDP programs.
    #[error("{} runs no XDP programs", driver.as_deref().map_or("the driver".into(), |d| format!("the driver {d}")))]
    NativeUnsupported {
        /// The driver's name, where it is known.
        driver: Option<String>,
    },
    /// The driver refused to run the program for a reason of its own.
    #[error("the driver{} refused to run the program", driver.as_deref().map(|d| format!(" {d}")).unwrap_or_default())]
    NativeRefused {
        /// The driver's name, where it is known.
        driver: Option<String>,
    },
    /// The other end of a veth pair is gone.
    #[error("the other end of the veth pair is gone")]
    PeerGone,
    /// The MTU is too large for a program.
    #[error("the MTU ({mtu}, or that of a veth's peer) is too large for a program in this mode")]
    MtuTooLarge {
        /// The interface's MTU, in bytes. On a veth the peer's is what counts.
        mtu: u32,
    },
    /// The interface has too few receive queues for a program.
    #[error("the interface has {rx_queues} receive queues, fewer than its peer has transmit queues")]
    TooFewQueues {
        /// Receive queues of the interface.
        rx_queues: u32,
    },
    /// The path is not in a BPF file system.
    #[error("the path is not in a BPF file system")]
    NotBpffs,
    /// Something is at the path already.
    #[error("something is at the path already")]
    PathTaken,
    /// The directory in which the path ends is not there.
    #[error("there is no directory for it to be in")]
    NoDirectory,
    /// A name in a BPF file system has no dots.
    #[error("the name {name} has a dot")]
    DotInName {
        /// The last part of the path.
        name: String,
    },
    /// The process may not make or open files at the path.
    #[error("the process may not make or open files there")]
    NoAccess,
    /// The directory does not hold what keeping a program leaves.
    #[error("no program is kept there")]
    NothingKept,
    /// What is kept is not on the interface.
    #[error("the program that is kept there is not on the interface")]
    KeptElsewhere,
    /// In a stepped simulation, nothing could ever end this wait.
    #[error("nothing that could end this wait is left to happen")]
    Deadlock,
    /// The kernel's answer is none of those that are known for this call.
    #[error("the kernel said: {0}")]
    Unexpected(Errno),
}

impl Cause {
    /// Why that is a failure, in a sentence or two.
    pub fn why(&self) -> &'static str {
        match self {
            Self::MissingCapability { capability: "CAP_NET_RAW" } => {
                "Raw packets need it, in the user namespace that owns the network namespace."
            }
            Self::MissingCapability { capability: "CAP_BPF" } => {
                "Loading an XDP program needs it, and so may making its map; it counts only in the initial \
                 user namespace."
            }
            Self::MissingCapability { .. } => {
                "Making an XSKMAP and loading an XDP program need it, in the initial user namespace."
            }
            Self::Forbidden => {
                "The network namespace belongs to another user namespace, or a seccomp filter or \
                 security module (as containers have) is in the way."
            }
            Self::TooManyFiles => "Every socket, map, program and link is a descriptor.",
            Self::NoAfXdp => "It was built without CONFIG_XDP_SOCKETS.",
            Self::KernelTooOld { .. } => "Older kernels refuse the call.",
            Self::NoFrames => "Every packet is in a frame.",
            Self::ChunkSize { .. } => {
                "A received packet and the room that the kernel keeps around it must fit a chunk, and \
                 a chunk must fit a page."
            }
            Self::ChunkNotPowerOfTwo { .. } => "Aligned chunks are found by masking an address.",
            Self::Headroom { .. } => {
                "The kernel keeps 256 bytes in front of a packet and 448 behind it besides."
            }
            Self::UmemTooLarge { .. } => "All of a UMEM is pinned in memory.",
            Self::OutOfMemory { .. } => "All of a UMEM, and every ring, is in memory at all times.",
            Self::NoHugePages { .. } => "Huge pages are set aside by the administrator beforehand.",
            Self::LockedMemory { .. } => {
                "A UMEM is pinned, and all that a user has pinned counts against RLIMIT_MEMLOCK, unless the \
                 process has CAP_IPC_LOCK."
            }
            Self::MemoryRefused => "It is not mapped, read-only, or a shared mapping of a file on disk.",
            Self::RingNotPowerOfTwo { .. } => "An entry's place is its index under a mask.",
            Self::RingTooLarge { .. } => {
                "The kernel would try: each entry takes 8 or 16 bytes of memory that can't be swapped."
            }
            Self::NoSuchInterface { .. } => {
                "Interfaces belong to a network namespace, and this one has no such interface."
            }
            Self::NoSuchQueue { .. } => "A socket is bound to one queue of an interface.",
            Self::QueueBusy { .. } => {
                "A queue has one UMEM at a time. It stays busy while a ring of the other socket is \
                 mapped anywhere, and for some milliseconds after that."
            }
            Self::NoTxQueue { .. } => {
                "A socket sends on the transmit queue of its number; without one the kernel takes packets and never sends them."
            }
            Self::NoQueues => "A port has at least one queue.",
            Self::OtherMemory => "A packet is sent from the memory that it was received into.",
            Self::QueueTaken => {
                "The queue's FILL and COMPLETION rings have one owner, and it is the first socket."
            }
            Self::ZeroCopyUnsupported { .. } => {
                "Zero copy needs a driver that lets the NIC write into the UMEM."
            }
            Self::ZeroCopyMtu { .. } => "The NIC writes whole packets into frames.",
            Self::ZeroCopyRefused { .. } => {
                "Drivers refuse it while the interface is set up in a way that they can't serve."
            }
            Self::SharedMode { .. } => "Sockets that share a UMEM take over the mode of the first.",
            Self::NeedsProgram { .. } => {
                "It sets up the queues that zero copy uses together with the program, also for a socket \
                 that only sends (igb, ixgbe, i40e and ice do)."
            }
            Self::OtherKernel { .. } => {
                "Descriptors, indices and pinned memory mean something to one kernel only."
            }
            Self::ForeignPool => "A socket receives into frames of its own UMEM only.",
            Self::TooManySockets { .. } => "The ledger counts them in 15 bits.",
            Self::TxBudget { .. } => {
                "A send transmits no more than TX holds, and the kernel wants at least 32."
            }
            Self::NoTxRing => "It was made by `open_rx`.",
            Self::NoRxRing => "It was made by `open_tx`.",
            Self::InterfaceDown => "Nothing is sent or received before it is switched on.",
            Self::InterfaceGone => {
                "It was removed, or moved to another network namespace, after it was opened; its sockets \
                 are unbound for good."
            }
            Self::NoSuchSlot { .. } => "An XSKMAP has a fixed number of slots.",
            Self::SlotTaken { .. } => "The program would send its packets to the new socket instead.",
            Self::NeedsRxRing => "The program sends packets to it, which it could not take.",
            Self::MapSize { .. } => "It needs at least one, and memory for all.",
            Self::SteeringPorts { .. } => {
                "A program for no ports would give its sockets nothing, and a program has an end."
            }
            Self::Verifier { .. } => "The kernel runs only programs that it can prove to be safe.",
            Self::ProgramPresent { .. } => "An interface has one XDP program, and one way to run it.",
            Self::OtherRules { .. } => {
                "An interface has one XDP program, which is shared by those who ask for the same. Where the \
                 words are the same, other ports are behind them, or another version of this library."
            }
            Self::OtherMode { .. } => {
                "An interface has one XDP program, and one way to run it for all who share it."
            }
            Self::SharingNeedsCapability { .. } => {
                "Programs, maps and links of others are opened by their numbers, for which the kernel wants \
                 CAP_SYS_ADMIN; CAP_BPF does not do."
            }
            Self::NativeUnsupported { .. } => "Native mode runs the program inside the driver.",
            Self::NativeRefused { .. } => {
                "Drivers refuse it while the interface is set up in a way that they can't serve; dmesg may \
                 say which."
            }
            Self::PeerGone => "A veth runs programs on what its peer sends.",
            Self::MtuTooLarge { .. } => "A native program sees a packet in one buffer of a page.",
            Self::TooFewQueues { .. } => "Each transmit queue of the peer needs a receive queue here.",
            Self::NotBpffs => "Objects outlive their process only under a name in a BPF file system.",
            Self::PathTaken => "A name there stands for one object.",
            Self::NoDirectory => "Only the last part of the path is made.",
            Self::DotInName { .. } => "BPF file systems keep names with dots for themselves.",
            Self::NoAccess => "The owner or mode of the directory, or of the files, does not allow it.",
            Self::NothingKept => {
                "Keeping a program leaves its link, its map and itself under the names link, xsks_map and \
                 program."
            }
            Self::KeptElsewhere => "It was attached to another interface, or taken off.",
            Self::Deadlock => "The simulated kernel is stepped: packets move only when it is told so.",
            Self::Unexpected(_) => "This is an answer that the library doesn't know for this call.",
        }
    }

    /// What to do about it.
    pub fn remedy(&self) -> String {
        match self {
            Self::MissingCapability { capability } => {
                match *capability {
                    "CAP_NET_RAW" => {
                        "run as root, or give the program the capability: setcap cap_net_raw+ep PROGRAM; to receive it \
                         needs more: setcap cap_net_raw,cap_net_admin,cap_bpf+ep PROGRAM"
                    }
                    _ => {
                        "run as root outside of any user namespace, or give the program the capabilities: \
                         setcap cap_net_raw,cap_net_admin,cap_bpf+ep PROGRAM"
                    }
                }
                .into()
            }
            Self::Forbidden => {
                "run it outside of the container or user namespace, or have AF_XDP sockets and bpf(2) \
                 allowed there"
                    .into()
            }
            Self::TooManyFiles => "close some, or raise the limit: ulimit -n".into(),
            Self::NoAfXdp => "use a kernel with CONFIG_XDP_SOCKETS=y, or the simulated one (crate xsk-sim)".into(),
            Self::KernelTooOld { since, .. } => format!("use Linux {since} or later"),
            Self::NoFrames => "ask for at least one; 4096 is usual".into(),
            Self::ChunkSize { .. } | Self::ChunkNotPowerOfTwo { .. } => "use 2048 or 4096".into(),
            Self::Headroom { max, .. } => format!("ask for at most {max} bytes, or use a larger chunk"),
            Self::UmemTooLarge { .. } | Self::OutOfMemory { .. } => "ask for fewer frames or entries".into(),
            Self::NoHugePages { pages: PageSize::Huge1G, needed } => {
                format!("boot with hugepagesz=1G hugepages={needed}, or use ordinary pages")
            }
            Self::NoHugePages { needed, .. } => {
                format!(
                    "set them aside, besides those in use: sysctl -w vm.nr_hugepages={needed}, or use \
                     ordinary pages"
                )
            }
            Self::LockedMemory { bytes, .. } => format!(
                "raise the limit by at least {0} KiB: ulimit -l; or ask for fewer frames; or give the program \
                 cap_ipc_lock beside its other capabilities, which setcap would take away: setcap \
                 cap_net_raw,cap_net_admin,cap_bpf,cap_ipc_lock+ep PROGRAM",
                bytes.div_ceil(1024)
            ),
            Self::MemoryRefused => "let the UMEM map its own memory".into(),
            Self::RingNotPowerOfTwo { entries: 0 } => "use 2048, as is usual".into(),
            Self::RingNotPowerOfTwo { entries } => {
                let below = 1 << entries.ilog2();
                match entries.checked_next_power_of_two() {
                    Some(above) if above != below => format!("use {below} or {above}"),
                    _ => format!("use {below}"),
                }
            }
            Self::RingTooLarge { max, .. } => format!("use at most {max}; 2048 is usual"),
            Self::NoSuchInterface { .. } => "see which there are: ip link; ip netns list shows other namespaces".into(),
            Self::NoSuchQueue { queues, .. } => format!(
                "use queue 0{}; where the driver can have more: ethtool -L INTERFACE combined N, or rx N tx N",
                if *queues > 1 { format!(" to {}", queues - 1) } else { String::new() }
            ),
            Self::QueueBusy { holders, .. } => busy_remedy(holders),
            Self::NoTxQueue { .. } => {
                "send by another queue, or give the interface as many transmit queues: ethtool -L INTERFACE tx N".into()
            }
            Self::NoQueues => "name a queue, or take all".into(),
            Self::OtherMemory => {
                "open both ports on one UMEM: Port::open_each, or PortBuilder::umem".into()
            }
            Self::QueueTaken => "use another queue, or a UMEM of its own".into(),
            Self::ZeroCopyUnsupported { .. } | Self::ZeroCopyRefused { .. } => {
                "let the kernel choose the mode, or ask for copy; xsk info INTERFACE shows what the driver can do".into()
            }
            Self::ZeroCopyMtu { room, .. } => {
                format!("lower the MTU: ip link set INTERFACE mtu {}, or use larger chunks", room.saturating_sub(26))
            }
            Self::SharedMode { .. } => "ask for the same mode, or let it be chosen, or use a UMEM of its own".into(),
            Self::NeedsProgram { .. } => {
                "attach one, such as the default program with an empty map (xsk txonly --attach), or use copy mode".into()
            }
            Self::OtherKernel { .. } => "make everything from devices of one kernel".into(),
            Self::ForeignPool => "fill from a pool of the UMEM that the socket is opened on".into(),
            Self::TooManySockets { .. } => "use another UMEM".into(),
            Self::TxBudget { min, max, .. } if min > max => {
                format!("give the socket a TX ring of at least {min} entries")
            }
            Self::TxBudget { min, max, .. } => format!("use {min} to {max}, or make TX larger"),
            Self::NoTxRing => "make the socket by `open` or `open_tx`".into(),
            Self::NoRxRing => "make the socket by `open` or `open_rx`".into(),
            Self::InterfaceDown => "switch it on: ip link set INTERFACE up".into(),
            Self::InterfaceGone => "open the interface and its sockets again when it is back".into(),
            Self::NoSuchSlot { .. } => "use a lower index, or make the map larger".into(),
            Self::SlotTaken { .. } => "remove the other socket first, or replace it with `insert`".into(),
            Self::NeedsRxRing => "give the socket an RX ring, or leave it out of the map".into(),
            Self::MapSize { .. } => "use as many slots as the interface has queues".into(),
            Self::SteeringPorts { runs: 0, .. } => "name at least one port".into(),
            Self::SteeringPorts { .. } => "let the ports be consecutive, or take all packets".into(),
            Self::Verifier { .. } => "read its log below".into(),
            Self::ProgramPresent { id, mode, owner, .. } => release_remedy(*id, *mode, owner),
            Self::OtherRules { id, mode, owner, .. } => {
                format!("ask for the same packets, or {}", release_remedy(*id, *mode, owner))
            }
            Self::OtherMode { id, mode, owner } => {
                format!("ask for {mode} mode, or the better of both, or {}", release_remedy(*id, *mode, owner))
            }
            Self::SharingNeedsCapability { id, mode, owner } => format!(
                "run as root or give the program the capability: setcap \
                 cap_net_raw,cap_net_admin,cap_bpf,cap_sys_admin+ep PROGRAM; or have the first user keep the \
                 program (DefaultProgram::keep) and join it there (DefaultProgram::join_kept); or enter all \
                 sockets from one process; or {}",
                release_remedy(*id, *mode, owner)
            ),
            Self::NativeUnsupported { .. } | Self::NativeRefused { .. } => {
                "use generic mode, or the better of both".into()
            }
            Self::PeerGone => "make the pair again".into(),
            Self::MtuTooLarge { .. } => {
                "lower the MTU: ip link set INTERFACE mtu 1500 (on a veth, the peer's), or use generic mode".into()
            },
            Self::TooFewQueues { .. } => {
                "give it as many: ethtool -L INTERFACE rx N, or the peer fewer: ethtool -L PEER tx N, or use \
                 generic mode"
                    .into()
            },
            Self::NotBpffs => "mount one: mount -t bpf bpf /sys/fs/bpf, and use a path below it".into(),
            Self::PathTaken => "use another name, or remove the file (which detaches a program kept there)".into(),
            Self::NoDirectory => "make the directory first: mkdir -p".into(),
            Self::DotInName { name } => format!("use a name such as {}", name.replace('.', "_")),
            Self::NoAccess => {
                "run as the owner of the directory and the files in it, or use one of your own".into()
            }
            Self::NothingKept => "have the first user keep it there (DefaultProgram::keep)".into(),
            Self::KeptElsewhere => "use the directory that belongs to the interface; if the program was taken off, remove its files".into(),
            Self::Deadlock => "inject a packet, or send one, before waiting; or wait with a timeout".into(),
            Self::Unexpected(_) => "see what the kernel says: dmesg; and please report it".into(),
        }
    }
}

/// The cause behind an answer that any call can give.
#[cold]
pub(crate) fn general(errno: Errno) -> Cause {
    match errno {
        Errno::PERM | Errno::ACCESS => Cause::Forbidden,
        Errno::MFILE | Errno::NFILE => Cause::TooManyFiles,
        errno => Cause::Unexpected(errno),
    }
}

/// What to do about a queue that one of `holders` has.
fn busy_remedy(holders: &[Holder]) -> String {
    let (own, others): (Vec<_>, Vec<_>) = holders.iter().partition(|h| h.pid == std::process::id());
    let mut ways = Vec::new();
    if !own.is_empty() {
        ways.push("drop the socket and all of its rings, if this very process has it".to_owned());
    }
    match &others[..] {
        [] if own.is_empty() => ways.push("end the program that has it".to_owned()),
        [] => {}
        others => ways.push(format!("end {}", list(others))),
    }
    format!("{}, or use another queue", ways.join(", or "))
}

/// How an interface gets rid of a program.
fn release_remedy(id: u32, mode: AttachMode, owner: &Owner) -> String {
    let off = format!(
        "ip link set INTERFACE {} off",
        match mode {
            AttachMode::Generic => "xdpgeneric",
            _ => "xdpdrv",
        }
    );
    match owner {
        Owner::Processes(holders) => {
            let (own, others): (Vec<_>, Vec<_>) = holders.iter().partition(|h| h.pid == std::process::id());
            let mut ways = Vec::new();
            if !own.is_empty() {
                ways.push("drop the one that this very process has attached".to_owned());
            }
            if !others.is_empty() {
                ways.push(format!("end {}", list(&others)));
            }
            ways.join(" and ")
        }
        Owner::Kept { link } => format!(
            "remove its file from the BPF file system (bpftool -f link show id {link} names it), or detach \
             it: bpftool link detach id {link}"
        ),
        Owner::Nobody { open_in } if open_in.is_empty() => format!("take it off: {off}"),
        Owner::Nobody { open_in } => {
            format!("end {}, and if that leaves it there, take it off: {off}", list(open_in))
        }
        Owner::Unknown => format!(
            "end the process that attached it (as root, bpftool prog show id {id} and bpftool link show name \
             it); if none is left: {off}"
        ),
    }
}

impl Error {
    #[cold]
    pub(crate) fn new(doing: Doing, cause: Cause) -> Self {
        Self(Box::new(Inner { doing, cause, errno: None }))
    }

    #[cold]
    pub(crate) fn with_errno(doing: Doing, cause: Cause, errno: Errno) -> Self {
        Self(Box::new(Inner { doing, cause, errno: Some(errno) }))
    }

    /// What was being done.
    pub fn doing(&self) -> &Doing {
        &self.0.doing
    }

    /// Why it failed.
    pub fn cause(&self) -> &Cause {
        &self.0.cause
    }

    /// What the kernel answered; `None` where the failure was found before it was asked.
    pub fn errno(&self) -> Option<Errno> {
        self.0.errno
    }

    /// What to do about it.
    pub fn remedy(&self) -> String {
        let remedy = self.0.cause.remedy();
        match &self.0.doing {
            Doing::Bind { interface, .. }
            | Doing::Send { interface, .. }
            | Doing::Wait { interface, .. }
            | Doing::Attach { interface, .. }
            | Doing::JoinKept { interface, .. } => remedy.replace("INTERFACE", interface),
            _ => remedy,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.0.doing, self.0.cause)?;
        if !f.alternate() {
            return Ok(());
        }
        write!(f, "\n   why: {}\n    do: {}", self.0.cause.why(), self.remedy())?;
        if let Some(errno) = self.0.errno {
            write!(f, "\nkernel: {errno}")?;
        }
        if let Cause::Verifier { log } = &self.0.cause {
            write!(f, "\n{log}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:#}")
    }
}

impl core::error::Error for Error {}

impl From<Error> for std::io::Error {
    fn from(error: Error) -> Self {
        let kind = match (&error.0.cause, error.0.errno) {
            (
                Cause::MissingCapability { .. }
                | Cause::SharingNeedsCapability { .. }
                | Cause::Forbidden
                | Cause::NoAccess,
                _,
            ) => std::io::ErrorKind::PermissionDenied,
            (Cause::NoSuchInterface { .. } | Cause::NoDirectory | Cause::NothingKept, _) => {
                std::io::ErrorKind::NotFound
            }
            (
                Cause::QueueBusy { .. }
                | Cause::ProgramPresent { .. }
                | Cause::OtherRules { .. }
                | Cause::OtherMode { .. },
                _,
            ) => std::io::ErrorKind::AddrInUse,
            (_, Some(errno)) => std::io::Error::from(errno).kind(),
            _ => std::io::ErrorKind::InvalidInput,
        };
        Self::new(kind, error)
    }
}
