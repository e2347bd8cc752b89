//! XDP programs, how they are attached, and the XSKMAP that says which socket gets what.
//!
//! A socket receives nothing by itself: an XDP program on the interface must send packets to it.
//! The default program does the usual: what arrives on a queue goes to that queue's socket, and
//! where there is none, to the Linux stack as if nothing were there.
//!
//! ```
//! use xsk::xdp::{AttachMode, DefaultProgram};
//! # let sim = xsk_sim::Sim::new();
//! # let device = sim.device("sim0")?;
//! let program = DefaultProgram::attach(&device, AttachMode::Best)?;
//! println!("{} program on {}", program.mode(), device.name());
//! # assert_eq!(device.info()?.programs().len(), 1);
//! drop(program); // detaches
//! # assert!(device.info()?.programs().is_empty());
//! # Ok::<(), xsk::Error>(())
//! ```
//!
//! A program is attached by a link: when the last descriptor of the link is closed, also because
//! the process was killed, the program is gone. [`DefaultProgram::keep`] makes it stay.
//!
//! # Steering
//!
//! A [`Steering`] says which packets go to sockets at all; the Linux stack has the rest, so an
//! interface goes on answering ARP, ICMP and all else that the sockets don't want:
//!
//! ```
//! use xsk::xdp::{AttachMode, DefaultProgram, Steering};
//! # let sim = xsk_sim::Sim::new();
//! # let device = sim.device("sim0")?;
//! let echo = Steering::udp_ports([7]);
//! let program = DefaultProgram::attach_with(&device, &echo, AttachMode::Best)?;
//! # assert_eq!(device.info()?.programs()[0].name.as_deref(), Some("xsk_udp_7"));
//! # Ok::<(), xsk::Error>(())
//! ```
//!
//! # Sharing
//!
//! An interface has one program, and several processes may want its queues. They all call
//! [`DefaultProgram::attach_with`] with the same steering: the first attaches the program, the others
//! join it. Joining is opening what is there: the link, the program and the map. From then on nobody
//! is first: each has a share, each enters its own sockets into the one map, and the program is gone
//! when the last of them is, in whatever order they go and however, by `kill -9` too. A process's
//! sockets leave the map with it, and its packets go to the Linux stack again. The map has a slot for
//! every queue that the interface could have, so queues may be added later.
//!
//! A program is the same if the kernel's hash of its instructions is (its tag, which leaves out the
//! map), and its name, and if it has one XSKMAP and no other map. What is there else is told with who
//! keeps it there ([`Owner`]), as far as it can be seen: [`Cause::ProgramPresent`] for somebody
//! else's, [`Cause::OtherRules`] for another steering, [`Cause::OtherMode`] where a mode other than
//! [`AttachMode::Best`] was asked for and another is running.
//!
//! | to | a process needs, beside `CAP_NET_RAW` for its sockets |
//! |---|---|
//! | attach | `CAP_BPF`, `CAP_NET_ADMIN` |
//! | join ([`attach_with`](DefaultProgram::attach_with)) | the same and `CAP_SYS_ADMIN`: Linux opens links, programs and maps by number for nobody else ([`Cause::SharingNeedsCapability`]) |
//! | join one that is kept ([`join_kept`](DefaultProgram::join_kept)) | `CAP_BPF`, `CAP_NET_ADMIN`, and to be allowed to read and write the files that [`keep`](DefaultProgram::keep) made |
//!
//! Those who share a program trust each other: each can replace the sockets of all, and take the
//! program off.

pub mod asm;
mod shared;
mod steering;

use core::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use crate::device::{Device, attached};
use crate::error::{Cause, Doing, Error, Result, general};
use crate::kernel::{
    Errno, Handle, Insn, Kernel, MapSpec, ProgramSpec, XDP_FLAGS_DRV_MODE, XDP_FLAGS_SKB_MODE,
};
use crate::socket::Socket;

pub(crate) use shared::mode_of;
pub use shared::{DefaultProgram, Owner};
pub use steering::Steering;

/// How a program is attached to an interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AttachMode {
    /// Native where the driver can, else generic.
    #[default]
    Best,
    /// In the driver, before the kernel makes a packet structure of its own (`XDP_FLAGS_DRV_MODE`).
    Native,
    /// In the network stack, on any interface, slower (`XDP_FLAGS_SKB_MODE`).
    Generic,
}

impl fmt::Display for AttachMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Best => "native or generic",
            Self::Native => "native",
            Self::Generic => "generic",
        })
    }
}

/// `BPF_MAP_TYPE_XSKMAP`.
const XSKMAP: u32 = 17;
/// `BPF_NOEXIST`: only into an empty slot.
const NOEXIST: u64 = 1;
/// `BPF_F_XDP_HAS_FRAGS`: the program takes packets of several buffers (5.18).
const HAS_FRAGS: u32 = 1 << 5;
/// The most slots of a map: queues are counted in 16 bits.
const MAX_SLOTS: u32 = 1 << 16;

/// The map of a program's sockets (`BPF_MAP_TYPE_XSKMAP`): the program names a slot, and the packet
/// goes to the socket in it.
///
/// A slot need not have the number of its socket's queue; but the kernel delivers only what
/// arrived on the queue that the socket is bound to. A socket leaves the map when it is closed.
/// Clones are the same map.
#[derive(Clone)]
pub struct XskMap {
    kernel: Arc<dyn Kernel>,
    handle: Arc<Handle>,
    entries: u32,
}

impl XskMap {
    /// A map with a slot for every queue that `device` has or could have.
    ///
    /// # Errors
    ///
    /// As [`with_slots`](Self::with_slots), and [`Cause::InterfaceGone`].
    pub fn new(device: &Device) -> Result<Self> {
        Self::with_slots(device, device.info()?.max_queues().clamp(1, MAX_SLOTS))
    }

    /// A map of `entries` slots, for any use.
    ///
    /// # Errors
    ///
    /// [`Cause::MapSize`], [`Cause::MissingCapability`], [`Cause::OutOfMemory`].
    pub fn with_slots(device: &Device, entries: u32) -> Result<Self> {
        let doing = Doing::MakeMap { entries };
        if entries == 0 || entries > MAX_SLOTS {
            return Err(Error::new(doing, Cause::MapSize { entries, max: MAX_SLOTS }));
        }
        let kernel = device.kernel().clone();
        let spec = MapSpec {
            kind: XSKMAP,
            key_size: 4,
            value_size: 4,
            max_entries: entries,
            flags: 0,
            name: "xsks_map",
        };
        match kernel.create_map(&spec) {
            Ok(handle) => Ok(Self { kernel, handle: Arc::new(handle), entries }),
            Err(errno) => {
                let cause = match errno {
                    Errno::PERM => missing_capability(&*kernel),
                    Errno::NOMEM | Errno::TOOBIG => Cause::OutOfMemory { bytes: u64::from(entries) * 8 },
                    Errno::INVAL => {
                        Cause::KernelTooOld { feature: "the map of AF_XDP sockets (XSKMAP)", since: "4.18" }
                    }
                    errno => general(errno),
                };
                Err(Error::with_errno(doing, cause, errno))
            }
        }
    }

    /// Slots.
    pub fn slots(&self) -> u32 {
        self.entries
    }

    /// Enters a socket at `index`, in place of any other.
    ///
    /// # Errors
    ///
    /// [`Cause::NoSuchSlot`], [`Cause::NeedsRxRing`], [`Cause::OtherKernel`],
    /// [`Cause::MissingCapability`].
    pub fn insert(&self, index: u32, socket: &Socket) -> Result<()> {
        self.update(index, socket, 0)
    }

    /// Enters a socket at `index`, which must be empty (or hold this very socket).
    ///
    /// # Errors
    ///
    /// As [`insert`](Self::insert), and [`Cause::SlotTaken`].
    pub fn insert_new(&self, index: u32, socket: &Socket) -> Result<()> {
        self.update(index, socket, NOEXIST)
    }

    fn update(&self, index: u32, socket: &Socket, flags: u64) -> Result<()> {
        if socket.device().kernel().id() != self.kernel.id() {
            let cause = Cause::OtherKernel { what: "the socket" };
            return Err(Error::new(Doing::InsertSocket { index }, cause));
        }
        let value = socket.raw().as_fd().as_raw_fd().to_ne_bytes();
        let map = self.handle.as_fd();
        self.kernel.update_map(map, &index.to_ne_bytes(), &value, flags).map_err(|errno| {
            let cause = match errno {
                Errno::TOOBIG => Cause::NoSuchSlot { index, entries: self.entries },
                Errno::EXIST => Cause::SlotTaken { index },
                Errno::NOBUFS => Cause::NeedsRxRing,
                Errno::PERM => missing_capability(&*self.kernel),
                errno => general(errno),
            };
            Error::with_errno(Doing::InsertSocket { index }, cause, errno)
        })
    }

    /// Empties the slot at `index`, if it is not empty already.
    ///
    /// # Errors
    ///
    /// [`Cause::NoSuchSlot`], [`Cause::MissingCapability`].
    pub fn remove(&self, index: u32) -> Result<()> {
        match self.kernel.delete_from_map(self.handle.as_fd(), &index.to_ne_bytes()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => {
                let cause = match errno {
                    Errno::INVAL | Errno::TOOBIG => Cause::NoSuchSlot { index, entries: self.entries },
                    Errno::PERM => missing_capability(&*self.kernel),
                    errno => general(errno),
                };
                Err(Error::with_errno(Doing::RemoveSocket { index }, cause, errno))
            }
        }
    }
}

impl fmt::Debug for XskMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("XskMap").field("slots", &self.entries).finish_non_exhaustive()
    }
}

/// Why a program was not attached.
enum Refusal {
    /// The interface has a program.
    Busy { mode: AttachMode, errno: Errno },
    /// Anything else, explained.
    Failed(Error),
}

/// A loaded XDP program. Clones are the same program.
#[derive(Clone)]
pub struct Program {
    kernel: Arc<dyn Kernel>,
    handle: Arc<Handle>,
    frags: bool,
}

impl Program {
    /// The default program over `map`: to the socket in the slot of the queue where a packet
    /// arrived, else to the Linux stack.
    ///
    /// # Errors
    ///
    /// [`Cause::MissingCapability`], [`Cause::Verifier`], [`Cause::OutOfMemory`].
    pub fn redirect(map: &XskMap) -> Result<Self> {
        Self::steering(map, &Steering::all())
    }

    /// A program over `map`: what `steering` takes goes to the socket in the slot of the queue where
    /// it arrived; the rest, and what finds no socket there, to the Linux stack.
    ///
    /// # Errors
    ///
    /// As [`redirect`](Self::redirect), and [`Cause::SteeringPorts`].
    pub fn steering(map: &XskMap, steering: &Steering) -> Result<Self> {
        let instructions = steering.instructions(map.handle.as_fd().as_raw_fd())?;
        Self::load(&map.kernel, &steering.program_name(), &instructions)
    }

    /// Loads a program from its instructions, for packets of several buffers where the kernel can
    /// (5.18), and else for those of one.
    fn load(kernel: &Arc<dyn Kernel>, name: &str, instructions: &[Insn]) -> Result<Self> {
        let mut log = String::new();
        for flags in [HAS_FRAGS, 0] {
            log.clear();
            match kernel.load_program(&ProgramSpec { instructions, flags, name }, &mut log) {
                Ok(handle) => {
                    return Ok(Self { kernel: kernel.clone(), handle: Arc::new(handle), frags: flags != 0 });
                }
                // A kernel that doesn't know the flag says so before it looks at the program.
                Err(Errno::INVAL) if flags != 0 => continue,
                Err(errno) => {
                    let cause = match errno {
                        Errno::PERM if log.is_empty() => missing_capability(&**kernel),
                        Errno::NOMEM => Cause::OutOfMemory { bytes: size_of_val(instructions) as u64 },
                        // Anything with words of the verifier is its refusal.
                        _ if !log.is_empty() => Cause::Verifier { log },
                        errno => general(errno),
                    };
                    return Err(Error::with_errno(Doing::LoadProgram, cause, errno));
                }
            }
        }
        unreachable!("the second attempt returns")
    }

    /// Whether the program takes packets of several buffers.
    pub fn has_frags(&self) -> bool {
        self.frags
    }

    /// Attaches the program to an interface, until the [`Attachment`] is dropped.
    ///
    /// # Errors
    ///
    /// [`Cause::ProgramPresent`] with the program that holds the interface,
    /// [`Cause::NativeUnsupported`], [`Cause::NativeRefused`], [`Cause::MtuTooLarge`],
    /// [`Cause::TooFewQueues`], [`Cause::PeerGone`], [`Cause::InterfaceGone`],
    /// [`Cause::MissingCapability`], [`Cause::OtherKernel`], [`Cause::OutOfMemory`],
    /// [`Cause::KernelTooOld`].
    pub fn attach(&self, device: &Device, mode: AttachMode) -> Result<Attachment> {
        self.try_attach(device, mode).map_err(|refusal| match refusal {
            Refusal::Busy { mode, errno } => self.occupied(device, mode, errno),
            Refusal::Failed(error) => error,
        })
    }

    /// As [`attach`](Self::attach), but an interface that has a program already is not looked into.
    fn try_attach(&self, device: &Device, mode: AttachMode) -> Result<Attachment, Refusal> {
        if device.kernel().id() != self.kernel.id() {
            let doing = Doing::Attach { interface: device.name().into(), mode };
            return Err(Refusal::Failed(Error::new(doing, Cause::OtherKernel { what: "the interface" })));
        }
        match mode {
            AttachMode::Native => self.attach_as(device, mode, XDP_FLAGS_DRV_MODE),
            AttachMode::Generic => self.attach_as(device, mode, XDP_FLAGS_SKB_MODE),
            AttachMode::Best => match self.try_attach(device, AttachMode::Native) {
                Err(Refusal::Failed(error)) if error.cause().is_about_native_mode() => {
                    let mut attachment = self.try_attach(device, AttachMode::Generic)?;
                    attachment.fallback = Some(Arc::new(error));
                    Ok(attachment)
                }
                result => result,
            },
        }
    }

    fn attach_as(&self, device: &Device, mode: AttachMode, flags: u32) -> Result<Attachment, Refusal> {
        match self.kernel.attach(self.handle.as_fd(), device.index(), flags) {
            Ok(link) => Ok(Attachment { link, mode, fallback: None, program: self.clone() }),
            Err(errno @ (Errno::BUSY | Errno::EXIST)) => Err(Refusal::Busy { mode, errno }),
            Err(errno) => {
                let doing = Doing::Attach { interface: device.name().into(), mode };
                Err(Refusal::Failed(Error::with_errno(doing, self.why_not(device, mode, errno), errno)))
            }
        }
    }

    /// What to say where the kernel answered that the interface has a program.
    #[cold]
    fn occupied(&self, device: &Device, mode: AttachMode, errno: Errno) -> Error {
        let cause = match self.kernel.interface(device.index()) {
            Ok(info) => match attached(&*self.kernel, &info).into_iter().next() {
                Some(program) => Cause::ProgramPresent {
                    id: program.id,
                    name: program.name,
                    mode: program.mode.unwrap_or(AttachMode::Native),
                    owner: Owner::of(&*self.kernel, device.index(), program.id),
                },
                None => Cause::Unexpected(errno),
            },
            Err(Errno::NODEV | Errno::NXIO) => Cause::InterfaceGone,
            Err(_) => general(errno),
        };
        Error::with_errno(Doing::Attach { interface: device.name().into(), mode }, cause, errno)
    }

    /// The cause behind the kernel's answer, in the order of its checks.
    #[cold]
    fn why_not(&self, device: &Device, mode: AttachMode, errno: Errno) -> Cause {
        let info = match self.kernel.interface(device.index()) {
            Ok(info) => info,
            Err(Errno::NODEV | Errno::NXIO) => return Cause::InterfaceGone,
            // Nothing is known that would explain the answer.
            Err(_) => return general(errno),
        };
        match errno {
            Errno::PERM => missing_capability(&*self.kernel),
            Errno::OPNOTSUPP if mode == AttachMode::Native => {
                Cause::NativeUnsupported { driver: info.driver }
            }
            Errno::NOTCONN => Cause::PeerGone,
            Errno::RANGE => Cause::MtuTooLarge { mtu: info.mtu },
            Errno::NOSPC => Cause::TooFewQueues { rx_queues: info.rx_queues },
            Errno::NOMEM => Cause::OutOfMemory { bytes: 0 },
            // So do drivers answer to an MTU of more than a page.
            Errno::INVAL if mode == AttachMode::Native && info.mtu > 3000 => {
                Cause::MtuTooLarge { mtu: info.mtu }
            }
            // Who tells of features (6.3) has links, so the driver said so.
            Errno::INVAL if mode == AttachMode::Native && info.features.is_some() => {
                Cause::NativeRefused { driver: info.driver }
            }
            // Before 5.9 the command or the type is unknown.
            Errno::INVAL if info.features.is_none() => {
                Cause::KernelTooOld { feature: "BPF links for XDP", since: "5.9" }
            }
            errno => general(errno),
        }
    }
}

/// The program's descriptor, for what the kernel can do with it beside attaching it.
impl AsFd for Program {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.handle.as_fd()
    }
}

impl fmt::Debug for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Program").field("frags", &self.frags).finish_non_exhaustive()
    }
}

impl Cause {
    /// Whether generic mode may do where native mode did not.
    fn is_about_native_mode(&self) -> bool {
        matches!(
            self,
            Self::NativeUnsupported { .. }
                | Self::NativeRefused { .. }
                | Self::MtuTooLarge { .. }
                | Self::TooFewQueues { .. }
                | Self::PeerGone
        )
    }
}

fn missing_capability(kernel: &dyn Kernel) -> Cause {
    let limits = kernel.limits();
    let capability = match (limits.bpf, limits.net_admin) {
        (false, _) => "CAP_BPF",
        (true, false) => "CAP_NET_ADMIN",
        // Everything is there that could be asked for.
        (true, true) => return Cause::Forbidden,
    };
    Cause::MissingCapability { capability }
}

/// A share in a program on an interface. Dropping the last one detaches the program.
#[must_use = "dropping it detaches the program"]
pub struct Attachment {
    link: Handle,
    mode: AttachMode,
    fallback: Option<Arc<Error>>,
    program: Program,
}

impl Attachment {
    /// How the program is attached: [`AttachMode::Native`] or [`AttachMode::Generic`].
    pub fn mode(&self) -> AttachMode {
        self.mode
    }

    /// Why native mode was not possible, when [`AttachMode::Best`] became generic; `None` where the
    /// program was attached by somebody else.
    pub fn fallback(&self) -> Option<&Error> {
        self.fallback.as_deref()
    }

    /// The program.
    pub fn program(&self) -> &Program {
        &self.program
    }
}

impl fmt::Debug for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attachment").field("mode", &self.mode).finish_non_exhaustive()
    }
}
