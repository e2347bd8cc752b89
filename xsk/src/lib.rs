//! AF_XDP for Rust: raw packets between a Linux program and a network driver, through memory that
//! both share, with frames that safe code cannot misuse.
//!
//! # How AF_XDP works, in six sentences
//!
//! A **UMEM** is memory shared with the kernel, cut into chunks; each chunk holds one packet.
//! A socket is bound to one queue of an interface, and talks to the kernel through four rings.
//! To receive, the program puts free frames into **FILL**; the kernel writes packets into them and
//! puts them into **RX**. To send, the program puts packets into **TX**; the kernel sends them and
//! returns their frames through **COMPLETION**. An **XDP program** on the interface decides, by a
//! map of sockets called **XSKMAP**, which packets go to which socket; the rest goes on to the
//! Linux stack. In *copy* mode the kernel copies each packet, on any interface; in *zero copy* the
//! NIC reads and writes the UMEM itself.
//!
//! # The shortest real program
//!
//! It sends every packet that arrives back to where it came from.
//!
//! ```no_run
//! use xsk::{Device, Port};
//!
//! fn main() -> xsk::Result<()> {
//!     let mut port = Port::open(&Device::open("eth1")?)?; // all queues, all packets
//!     loop {
//!         port.wait(None)?;
//!         port.process(|mut packet| {
//!             packet[..12].rotate_left(6); // the MAC addresses change places
//!             packet // and out it goes; or an Action: send, drop, keep
//!         })?;
//!     }
//! }
//! ```
//!
//! The same on a simulated kernel, with no privilege and no interface: take the device from the
//! crate `xsk-sim` instead, and nothing else changes, be it one queue or several queues and devices
//! that share a UMEM; zero copy is not simulated. All other examples of this documentation run so.
//!
//! # The map
//!
//! | module | what it knows |
//! |---|---|
//! | [`port`] | a device as one thing that receives and sends, on all its queues: begin here |
//! | [`socket`] | one AF_XDP socket: build, bind, wake, wait, statistics |
//! | [`rings`] | its four rings, typed: frames and packets in, frames and packets out |
//! | [`xdp`] | XDP programs, the XSKMAP, attaching |
//! | [`device`] | interfaces: queues, features, what is attached |
//! | [`umem`] | the memory, its frames, and who owns each |
//! | [`ring`] | single-producer single-consumer rings over shared memory |
//! | [`error`] | what went wrong, why, and what to do |
//! | [`kernel`] | the contract that a kernel fulfils: Linux here, the simulated one in `xsk-sim` |
//! | [`abi`] | the kernel's interface as data |
//!
//! # What is promised
//!
//! - A [`Frame`] or [`Packet`] is the only owner of its bytes. Safe code cannot put a frame into two
//!   rings, give it to a ring of another UMEM, read one that the kernel has, or outlive the memory.
//! - What the kernel hands back is checked before it becomes a frame. See [`umem`] for the ledger,
//!   which also catches a kernel that gives a frame twice.
//! - Where every frame is can be counted at any time: [`Umem::census`].
//! - The data path allocates nothing, takes no lock and makes no system call that it need not. (Frames
//!   that go from one thread's port to another's and stay there come back under a lock, in batches.)
//! - An [`Error`] has a typed cause, and says why and what to do.
//!
//! Linux 5.9 or later is needed to attach the programs (BPF links), and 5.10 to share a UMEM
//! between queues. Receiving needs `CAP_NET_RAW`, `CAP_NET_ADMIN` and `CAP_BPF`; sending alone
//! needs `CAP_NET_RAW`. A UMEM that is larger than the limit of locked memory (often 8 MiB; a UMEM is
//! 16 MiB unless told otherwise) needs `CAP_IPC_LOCK` as well.

#![deny(unsafe_code)]

#[allow(unsafe_code)]
pub mod abi;
pub mod device;
pub mod error;
#[allow(unsafe_code)]
pub mod kernel;
pub mod port;
#[allow(unsafe_code)]
pub mod ring;
pub mod rings;
pub mod socket;
#[allow(unsafe_code)]
mod sync;
#[allow(unsafe_code)]
pub mod umem;
pub mod xdp;

pub use device::Device;
pub use error::{Cause, Error, Result};
pub use port::Port;
pub use rings::{CompletionRing, FillRing, PushError, RxRing, TxRing};
pub use socket::{Interest, Mode, RxOnly, RxTx, Sent, Socket, TxOnly};
pub use umem::{Frame, Packet, Pool, Umem};
