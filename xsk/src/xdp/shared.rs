//! The default program of an interface, which all processes on it share, and who keeps a program.

use core::fmt;
use std::os::fd::AsFd;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::{AttachMode, Attachment, Program, Refusal, Steering, XSKMAP, XskMap};
use crate::device::Device;
use crate::error::{Cause, Doing, Error, Result, general};
use crate::kernel::{
    AttachedId, Errno, Handle, Holder, Kernel, LINK_XDP, Numbered, ProgramHolder, ProgramInfo,
};
use crate::socket::Socket;

/// How long a program may be neither there to be joined nor gone. Its last user is leaving then,
/// for which the kernel waits for its lock of all interfaces.
const PATIENCE: Duration = Duration::from_secs(1);
/// Between two looks at it.
const PAUSE: Duration = Duration::from_millis(1);

/// Who keeps a program on an interface, as far as it can be seen.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Owner {
    /// Processes that hold its link: the program is gone with the last of them.
    Processes(Vec<Holder>),
    /// A link that no process holds: it is kept under a name in a BPF file system.
    Kept {
        /// The number of the link.
        link: u32,
    },
    /// Nobody: it was attached without a link, and stays until it is taken off.
    Nobody {
        /// Processes that have the program open all the same, and perhaps mean to take it off.
        open_in: Vec<Holder>,
    },
    /// Others are not shown to this process.
    Unknown,
}

impl Owner {
    /// Who keeps the program of this number on the interface.
    #[cold]
    pub(super) fn of(kernel: &dyn Kernel, ifindex: u32, program: u32) -> Self {
        let link = match find_link(kernel, ifindex, program) {
            Ok(link) => Ok(link.map(|(_, id)| id)),
            Err(errno) => Err(errno),
        };
        let (linked, others): (Vec<_>, Vec<_>) =
            kernel.program_holders(program).into_iter().partition(|holder| match link {
                Ok(Some(link)) => holder.link == Some(link),
                _ => holder.link.is_some(),
            });
        let processes = |holders: Vec<ProgramHolder>| {
            let mut processes: Vec<_> = holders.into_iter().map(|holder| holder.process).collect();
            processes.dedup();
            processes
        };
        match link {
            _ if !linked.is_empty() => Self::Processes(processes(linked)),
            Ok(Some(link)) => Self::Kept { link },
            Ok(None) => Self::Nobody { open_in: processes(others) },
            Err(_) => Self::Unknown,
        }
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |f: &mut fmt::Formatter<'_>, holders: &[Holder]| {
            holders
                .iter()
                .enumerate()
                .try_for_each(|(n, holder)| write!(f, "{}{holder}", if n == 0 { "" } else { ", " }))
        };
        match self {
            Self::Processes(holders) => {
                f.write_str("by ")?;
                list(f, holders)
            }
            Self::Kept { link } => write!(f, "by link {link}, which no process holds"),
            Self::Nobody { open_in } if open_in.is_empty() => f.write_str("without a link"),
            Self::Nobody { open_in } => {
                f.write_str("without a link; open in ")?;
                list(f, open_in)
            }
            Self::Unknown => f.write_str("by whom is not shown to this process"),
        }
    }
}

/// The only link by which the program of this number is on the interface, and its number.
///
/// Interfaces of different network namespaces can have the same index: where a program that is on
/// several of them leaves that open, there is none.
fn find_link(kernel: &dyn Kernel, ifindex: u32, program: u32) -> Result<Option<(Handle, u32)>, Errno> {
    let (mut found, mut after) = (None, 0);
    loop {
        after = match kernel.next_link(after) {
            Ok(id) => id,
            Err(Errno::NOENT) => return Ok(found),
            Err(errno) => return Err(errno),
        };
        let link = match kernel.open_by_id(Numbered::Link, after) {
            Ok(link) => link,
            // It went away meanwhile.
            Err(Errno::NOENT) => continue,
            Err(errno) => return Err(errno),
        };
        let info = kernel.link_info((*link).as_fd())?;
        if (info.kind, info.ifindex, info.program) == (LINK_XDP, ifindex, program)
            && found.replace((link, info.id)).is_some()
        {
            return Ok(None);
        }
    }
}

/// This library's program on an interface, with its map: what the steering takes goes to the socket
/// of the queue where it arrived, the rest to the Linux stack.
///
/// All processes on an interface have one program and one map: see [the module](super#sharing). The
/// program is detached when the last of them has dropped this, or ended.
#[derive(Debug)]
#[must_use = "dropping it detaches the program"]
pub struct DefaultProgram {
    map: XskMap,
    attachment: Attachment,
    joined: bool,
}

/// What is known of the program that is on an interface.
enum Look {
    /// It is the one that was to be attached.
    Same(DefaultProgram),
    /// It is another, or one that can't be shared.
    Conflict(Cause),
    /// It is going, or gone.
    Gone,
}

impl DefaultProgram {
    /// As [`attach_with`](Self::attach_with), for every packet.
    ///
    /// # Errors
    ///
    /// As [`attach_with`](Self::attach_with).
    pub fn attach(device: &Device, mode: AttachMode) -> Result<Self> {
        Self::attach_with(device, &Steering::all(), mode)
    }

    /// Attaches a program that does what `steering` says, with a map for all queues that `device` has
    /// or could have; or joins it, where it is there already.
    ///
    /// # Errors
    ///
    /// As [`XskMap::new`], [`Program::steering`] and [`Program::attach`]; and where a program is there
    /// that can't be joined, with who keeps it there: [`Cause::ProgramPresent`] if it is not this
    /// library's, [`Cause::OtherRules`], [`Cause::OtherMode`] if `mode` is not [`AttachMode::Best`],
    /// [`Cause::SharingNeedsCapability`].
    pub fn attach_with(device: &Device, steering: &Steering, mode: AttachMode) -> Result<Self> {
        let map = XskMap::new(device)?;
        let program = Program::steering(&map, steering)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (tried, errno) = match program.try_attach(device, mode) {
                Ok(attachment) => return Ok(Self { map, attachment, joined: false }),
                Err(Refusal::Failed(error)) => return Err(error),
                Err(Refusal::Busy { mode, errno }) => (mode, errno),
            };
            match program.look(device, steering, mode) {
                Look::Same(joined) => return Ok(joined),
                Look::Conflict(cause) => {
                    let doing = Doing::Attach { interface: device.name().into(), mode };
                    return Err(Error::with_errno(doing, cause, errno));
                }
                Look::Gone if Instant::now() < deadline => thread::sleep(PAUSE),
                Look::Gone => return Err(program.occupied(device, tried, errno)),
            }
        }
    }

    /// Whether the program was there already, attached by another process or by this one.
    pub fn is_joined(&self) -> bool {
        self.joined
    }

    /// Sends to `socket` what arrives on its queue.
    ///
    /// # Errors
    ///
    /// As [`XskMap::insert`].
    pub fn insert(&self, socket: &Socket) -> Result<()> {
        self.map.insert(socket.queue(), socket)
    }

    /// The map.
    pub fn map(&self) -> &XskMap {
        &self.map
    }

    /// The attachment.
    pub fn attachment(&self) -> &Attachment {
        &self.attachment
    }

    /// How the program is attached: [`AttachMode::Native`] or [`AttachMode::Generic`].
    pub fn mode(&self) -> AttachMode {
        self.attachment.mode
    }

    /// Keeps the program attached beyond this process: its link as `DIRECTORY/link` and its map as
    /// `DIRECTORY/xsks_map`, in a BPF file system. The directory is made if it is not there.
    ///
    /// Removing the file `link` detaches the program. Sockets leave the map when they are closed
    /// all the same.
    ///
    /// # Errors
    ///
    /// [`Cause::NotBpffs`], [`Cause::PathTaken`], [`Cause::NoDirectory`], [`Cause::DotInName`],
    /// [`Cause::NoAccess`]; nothing is kept then.
    pub fn keep(&self, directory: &Path) -> Result<()> {
        let kernel = &self.map.kernel;
        let made = match std::fs::create_dir(directory) {
            Ok(()) => true,
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => false,
            Err(error) => {
                let errno = Errno::from_io_error(&error).unwrap_or(Errno::INVAL);
                return Err(not_kept(directory, errno));
            }
        };
        let (link, map) = (directory.join("link"), directory.join("xsks_map"));
        let undo = || {
            if made {
                // Only a directory that holds nothing else goes.
                let _ = std::fs::remove_dir(directory);
            }
        };
        kernel.pin(self.attachment.link.as_fd(), &link).map_err(|errno| {
            undo();
            not_kept(directory, errno)
        })?;
        kernel.pin(self.map.handle.as_fd(), &map).map_err(|errno| {
            let _ = std::fs::remove_file(&link);
            undo();
            not_kept(directory, errno)
        })
    }
}

impl Program {
    /// Looks at the program that is on the interface where this one was refused.
    fn look(&self, device: &Device, steering: &Steering, mode: AttachMode) -> Look {
        let kernel = &*self.kernel;
        let present = match kernel.interface(device.index()) {
            // One that runs on the NIC itself is in nobody's way, if there is any other.
            Ok(info) => info.attached.into_iter().min_by_key(|program| mode_of(program).is_none()),
            Err(Errno::NODEV | Errno::NXIO) => return Look::Conflict(Cause::InterfaceGone),
            Err(errno) => return Look::Conflict(general(errno)),
        };
        let Some(present) = present else { return Look::Gone };
        match self.try_join(device, steering, mode, present) {
            Ok(look) => look,
            // What was there a moment ago has no number any more.
            Err(Errno::NOENT) => Look::Gone,
            Err(Errno::PERM) => Look::Conflict(Cause::SharingNeedsCapability {
                id: present.id,
                mode: mode_of(&present).unwrap_or(AttachMode::Native),
                owner: Owner::of(kernel, device.index(), present.id),
            }),
            Err(errno) => Look::Conflict(general(errno)),
        }
    }

    /// Takes a share in the program that is `present` on the interface, if it is the same as this one
    /// but for its map.
    fn try_join(
        &self,
        device: &Device,
        steering: &Steering,
        asked: AttachMode,
        present: AttachedId,
    ) -> Result<Look, Errno> {
        let kernel = &*self.kernel;
        let AttachedId { id, .. } = present;
        let mode = mode_of(&present);
        let handle = kernel.open_by_id(Numbered::Program, id)?;
        let there = kernel.program_info((*handle).as_fd())?;
        let map = only_map(kernel, &there)?;
        let owner = || Owner::of(kernel, device.index(), id);
        let (Some(rules), Some((map, entries)), Some(mode)) = (Steering::rules_of(&there.name), map, mode)
        else {
            drop(handle);
            let name = Some(there.name).filter(|name| !name.is_empty());
            let mode = mode.unwrap_or(AttachMode::Native);
            return Ok(Look::Conflict(Cause::ProgramPresent { id, name, mode, owner: owner() }));
        };
        let own = kernel.program_info(self.as_fd())?;
        if (&there.name, there.tag) != (&own.name, own.tag) {
            drop(handle);
            // In the words that a name tells, as those of the other are.
            let asked = Steering::rules_of(&own.name).unwrap_or_else(|| steering.to_string());
            return Ok(Look::Conflict(Cause::OtherRules { id, mode, rules, asked, owner: owner() }));
        }
        if asked != AttachMode::Best && asked != mode {
            drop(handle);
            return Ok(Look::Conflict(Cause::OtherMode { id, mode, owner: owner() }));
        }
        let Some((link, _)) = find_link(kernel, device.index(), id)? else { return Ok(Look::Gone) };
        let map = XskMap { kernel: self.kernel.clone(), handle: map.into(), entries };
        let program = Self { kernel: self.kernel.clone(), handle: handle.into(), frags: self.frags };
        let attachment = Attachment { link, mode, fallback: None, program };
        Ok(Look::Same(DefaultProgram { map, attachment, joined: true }))
    }
}

/// How a program is attached; `None` where it runs on the NIC itself.
pub(crate) fn mode_of(attached: &AttachedId) -> Option<AttachMode> {
    match attached.mode {
        1 => Some(AttachMode::Native),
        2 => Some(AttachMode::Generic),
        _ => None,
    }
}

/// The map of a program that has no other, and its slots, if it is one of sockets.
fn only_map(kernel: &dyn Kernel, program: &ProgramInfo) -> Result<Option<(Handle, u32)>, Errno> {
    let [id] = program.maps[..] else { return Ok(None) };
    let map = kernel.open_by_id(Numbered::Map, id)?;
    let info = kernel.map_info((*map).as_fd())?;
    Ok((info.kind == XSKMAP).then_some((map, info.max_entries)))
}

#[cold]
fn not_kept(path: &Path, errno: Errno) -> Error {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let parent = path.parent().unwrap_or(path);
    let cause = match errno {
        Errno::EXIST => Cause::PathTaken,
        Errno::NOENT | Errno::NOTDIR => Cause::NoDirectory,
        Errno::PERM if name.contains('.') && is_bpffs(parent) => Cause::DotInName { name },
        Errno::PERM | Errno::INVAL | Errno::ROFS | Errno::OPNOTSUPP => Cause::NotBpffs,
        Errno::ACCESS => Cause::NoAccess,
        errno => general(errno),
    };
    Error::with_errno(Doing::Keep { path: path.display().to_string() }, cause, errno)
}

/// Whether a directory is in a BPF file system.
#[cfg(target_os = "linux")]
fn is_bpffs(directory: &Path) -> bool {
    /// `BPF_FS_MAGIC` of `include/uapi/linux/magic.h`.
    const MAGIC: u32 = 0xcafe_4a11;
    rustix::fs::statfs(directory).is_ok_and(|stat| stat.f_type as u32 == MAGIC)
}

/// Whether a directory is in a BPF file system, which other systems don't have.
#[cfg(not(target_os = "linux"))]
fn is_bpffs(_: &Path) -> bool {
    false
}
