//! The default program of an interface, which all processes on it share, and who keeps a program.

use core::fmt;
use core::ops::RangeInclusive;
use std::os::fd::AsFd;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::{AttachMode, Attachment, Program, Refusal, Steering, XSKMAP, XskMap};
use crate::device::Device;
use crate::error::{Cause, Doing, Error, Result, general, list};
use crate::kernel::{
    AttachedId, Errno, Handle, Holder, Kernel, LINK_XDP, Numbered, ProgramHolder, ProgramInfo,
};
use crate::socket::Socket;

/// How long one program may be neither there to be joined nor gone. Its first user is coming or its
/// last one leaving then, and the kernel waits for its lock of all interfaces.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often it is looked at in that time, at least: with many waiting for that lock, each look takes long.
const LOOKS: u32 = 20;
/// How long all of them may be, where users come and go all the time.
const LIMIT: Duration = Duration::from_secs(20);
/// Between two looks, at first and at most.
const PAUSES: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_millis(32);

/// The names under which a program is kept.
const LINK: &str = "link";
/// The map's name is that of the map itself, by which others know it.
const MAP: &str = "xsks_map";
const PROGRAM: &str = "program";

/// Who keeps a program on an interface, as far as it can be seen.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Owner {
    /// Processes that hold its link: the program is gone with the last of them.
    Processes(Vec<Holder>),
    /// A link that no process is seen to hold: it is kept under a name in a BPF file system.
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
        let link = find_link(kernel, ifindex, program).map(|link| link.map(|(_, id)| id));
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
        match self {
            Self::Processes(holders) => write!(f, "by {}", list(holders)),
            Self::Kept { link } => write!(f, "by link {link}, which no process that is seen holds"),
            Self::Nobody { open_in } if open_in.is_empty() => f.write_str("without a link"),
            Self::Nobody { open_in } => write!(f, "without a link; open in {}", list(open_in)),
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
            // It went away meanwhile, or is being made.
            Err(Errno::NOENT | Errno::AGAIN) => continue,
            Err(errno) => return Err(errno),
        };
        // Links of some other kinds can't always tell what they are.
        let Ok(info) = kernel.link_info((*link).as_fd()) else { continue };
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
    /// It is coming, going or gone; with its number, if it was still there.
    Elusive(Option<u32>),
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
        let start = Instant::now();
        let (mut elusive, mut since, mut looks) = (None, start, 0);
        let mut pause = *PAUSES.start();
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
                Look::Elusive(id) => {
                    let now = Instant::now();
                    if id != elusive {
                        (elusive, since, looks) = (id, now, 0);
                    }
                    looks += 1;
                    if (now - since > PATIENCE && looks > LOOKS) || now - start > LIMIT {
                        return Err(program.occupied(device, tried, errno));
                    }
                }
            }
            thread::sleep(pause);
            pause = (pause * 2).min(*PAUSES.end());
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

    /// Keeps the program attached beyond this process, in a BPF file system: its link as
    /// `DIRECTORY/link`, its map as `DIRECTORY/xsks_map`, and itself as `DIRECTORY/program`. The
    /// directory is made if it is not there.
    ///
    /// Removing the file `link` detaches the program, when no process has a share in it. Sockets leave
    /// the map when they are closed all the same.
    ///
    /// # Errors
    ///
    /// [`Cause::NotBpffs`], [`Cause::PathTaken`], [`Cause::NoDirectory`], [`Cause::DotInName`],
    /// [`Cause::NoAccess`]; nothing is kept then.
    pub fn keep(&self, directory: &Path) -> Result<()> {
        let made = match std::fs::create_dir(directory) {
            Ok(()) => true,
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => false,
            Err(error) => {
                let errno = Errno::from_io_error(&error).unwrap_or(Errno::INVAL);
                return Err(not_kept(directory, errno));
            }
        };
        let objects = [
            (LINK, self.attachment.link.as_fd()),
            (MAP, self.map.handle.as_fd()),
            (PROGRAM, self.attachment.program.as_fd()),
        ];
        for (n, (name, object)) in objects.iter().enumerate() {
            if let Err(errno) = self.map.kernel.pin(*object, &directory.join(name)) {
                for (name, _) in &objects[..n] {
                    let _ = std::fs::remove_file(directory.join(name));
                }
                if made {
                    // Only a directory that holds nothing else goes.
                    let _ = std::fs::remove_dir(directory);
                }
                return Err(not_kept(directory, errno));
            }
        }
        Ok(())
    }

    /// Joins the program that is kept in `directory` (see [`keep`](Self::keep)), in whatever mode it
    /// runs. Unlike [`attach_with`](Self::attach_with) this does not need `CAP_SYS_ADMIN`, but the right
    /// to read and write the files.
    ///
    /// # Errors
    ///
    /// As [`XskMap::new`] and [`Program::steering`]; [`Cause::NothingKept`], [`Cause::KeptElsewhere`],
    /// [`Cause::NoAccess`], [`Cause::OtherRules`].
    pub fn join_kept(device: &Device, steering: &Steering, directory: &Path) -> Result<Self> {
        // A twin, to compare with: its map is another in any case.
        let twin = Program::steering(&XskMap::with_slots(device, 1)?, steering)?;
        twin.try_join_kept(device, steering, directory).map_err(|(cause, errno)| {
            let path = directory.display().to_string();
            let doing = Doing::JoinKept { path, interface: device.name().into() };
            match errno {
                Some(errno) => Error::with_errno(doing, cause, errno),
                None => Error::new(doing, cause),
            }
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
        let Some(present) = present else { return Look::Elusive(None) };
        match self.try_join(device, steering, mode, present) {
            Ok(look) => look,
            // What was there a moment ago has no number any more.
            Err(Errno::NOENT) => Look::Elusive(Some(present.id)),
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
        let (id, mode) = (present.id, mode_of(&present));
        let handle = kernel.open_by_id(Numbered::Program, id)?;
        let there = kernel.program_info((*handle).as_fd())?;
        let map = only_map(kernel, &there)?;
        let owner = || Owner::of(kernel, device.index(), id);
        let ours = Steering::rules_of(&there.name).is_some();
        let (true, Some((map, entries)), Some(mode)) = (ours, map, mode) else {
            drop(handle);
            let name = Some(there.name).filter(|name| !name.is_empty());
            let mode = mode.unwrap_or(AttachMode::Native);
            return Ok(Look::Conflict(Cause::ProgramPresent { id, name, mode, owner: owner() }));
        };
        let own = kernel.program_info(self.as_fd())?;
        if (&there.name, there.tag) != (&own.name, own.tag) {
            drop(handle);
            return Ok(Look::Conflict(other_rules(&there, &own, steering, mode, owner())));
        }
        if asked != AttachMode::Best && asked != mode {
            drop(handle);
            return Ok(Look::Conflict(Cause::OtherMode { id, mode, owner: owner() }));
        }
        let Some((link, _)) = find_link(kernel, device.index(), id)? else {
            return Ok(Look::Elusive(Some(id)));
        };
        Ok(Look::Same(self.share(link, mode, (map, entries), handle)))
    }

    /// Takes a share in the program that is kept in `directory`, if it is the same as this one but for
    /// its map, and on the interface.
    fn try_join_kept(
        &self,
        device: &Device,
        steering: &Steering,
        directory: &Path,
    ) -> Result<DefaultProgram, (Cause, Option<Errno>)> {
        let kernel = &*self.kernel;
        let refused = |errno| {
            let cause = match errno {
                Errno::ACCESS | Errno::PERM if is_bpffs(directory) => Cause::NoAccess,
                // What is no object of BPF can't be opened, what is no program has no program's info.
                Errno::NOENT
                | Errno::NOTDIR
                | Errno::ACCESS
                | Errno::PERM
                | Errno::INVAL
                | Errno::OPNOTSUPP => Cause::NothingKept,
                errno => general(errno),
            };
            (cause, Some(errno))
        };
        let open = |name| kernel.open_pinned(&directory.join(name)).map_err(refused);
        let (link, map, program) = (open(LINK)?, open(MAP)?, open(PROGRAM)?);
        let there = kernel.program_info((*program).as_fd()).map_err(refused)?;
        let its_map = kernel.map_info((*map).as_fd()).map_err(refused)?;
        let its_link = kernel.link_info((*link).as_fd()).map_err(refused)?;
        if its_map.kind != XSKMAP
            || there.maps != [its_map.id]
            || (its_link.kind, its_link.program) != (LINK_XDP, there.id)
        {
            return Err((Cause::NothingKept, None));
        }
        let attached = match kernel.interface(device.index()) {
            Ok(info) => info.attached.into_iter().find(|program| program.id == there.id),
            Err(errno @ (Errno::NODEV | Errno::NXIO)) => return Err((Cause::InterfaceGone, Some(errno))),
            Err(errno) => return Err((general(errno), Some(errno))),
        };
        let mode = attached.as_ref().and_then(mode_of);
        let Some(mode) = mode.filter(|_| its_link.ifindex == device.index()) else {
            return Err((Cause::KeptElsewhere, None));
        };
        let own = kernel.program_info(self.as_fd()).map_err(|errno| (general(errno), Some(errno)))?;
        if (&there.name, there.tag) != (&own.name, own.tag) {
            drop((link, program));
            let owner = Owner::of(kernel, device.index(), there.id);
            return Err((other_rules(&there, &own, steering, mode, owner), None));
        }
        Ok(self.share(link, mode, (map, its_map.max_entries), program))
    }

    /// A share in a program that is the same as this one but for its map.
    fn share(
        &self,
        link: Handle,
        mode: AttachMode,
        (map, entries): (Handle, u32),
        program: Handle,
    ) -> DefaultProgram {
        let map = XskMap { kernel: self.kernel.clone(), handle: map.into(), entries };
        let program = Self { kernel: self.kernel.clone(), handle: program.into(), frags: self.frags };
        let attachment = Attachment { link, mode, fallback: None, program };
        DefaultProgram { map, attachment, joined: true }
    }
}

/// What to say of a program whose rules are not those that were asked for.
#[cold]
fn other_rules(
    there: &ProgramInfo,
    own: &ProgramInfo,
    steering: &Steering,
    mode: AttachMode,
    owner: Owner,
) -> Cause {
    let rules = Steering::rules_of(&there.name).unwrap_or_else(|| format!("unknown ({})", there.name));
    // In the words that a name tells, as those of the other are.
    let asked = Steering::rules_of(&own.name).unwrap_or_else(|| steering.to_string());
    Cause::OtherRules { id: there.id, mode, rules, asked, owner }
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
