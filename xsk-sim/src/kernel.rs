//! The contract's traits, spoken by the simulator.

use std::any::Any;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use xsk::abi::{SOL_XDP, SockaddrXdp, UmemReg};
use xsk::kernel::{
    Devices, Errno, Handle, Holder, InterfaceInfo, Kernel, LINK_XDP, Limits, LinkInfo, MapInfo, MapSpec,
    Mapping, Numbered, POLLERR, PollEntry, ProgramHolder, ProgramInfo, ProgramSpec, Programs, RawSocket,
    Sockets, Watch,
};

use crate::bpf::{Program, XskMap};
use crate::files::{self, File, Foreign, WatchFile};
use crate::net::LinkId;
use crate::ring::Pages;
use crate::socket::{Socket, SocketId};
use crate::state::{Object, State};
use crate::{PAGE_SIZE, Sim};

/// `SOCK_RAW`.
const SOCK_RAW: i32 = 3;
/// Level of the options that all sockets have.
const SOL_SOCKET: i32 = 1;
/// `SO_ERROR`.
const SO_ERROR: i32 = 4;
/// `SO_BINDTODEVICE`.
const SO_BINDTODEVICE: i32 = 25;

impl Kernel for Sim {
    fn name(&self) -> &'static str {
        "sim"
    }

    /// Where its state is: all handles of one simulated kernel have the same.
    fn id(&self) -> usize {
        Arc::as_ptr(&self.state).addr()
    }
}

// SAFETY: see `SimSocket`.
unsafe impl Sockets for Sim {
    fn socket(&self, kind: i32, protocol: i32) -> Result<Box<dyn RawSocket>, Errno> {
        if kind != SOCK_RAW {
            return Err(Errno::SOCKTNOSUPPORT);
        }
        if protocol != 0 {
            return Err(Errno::PROTONOSUPPORT);
        }
        let fd = Arc::new(files::open()?);
        let id = self.with(|state| {
            let id = SocketId(state.number());
            state.sockets.insert(id, Socket::new(fd.clone()));
            state.files.insert(fd.as_raw_fd(), Object::Socket(id));
            id
        });
        Ok(Box::new(SimSocket { file: Arc::new(SocketFile { sim: self.clone(), id }), fd }))
    }

    fn limits(&self) -> Limits {
        Limits {
            page_size: PAGE_SIZE,
            memlock: None,
            net_raw: true,
            net_admin: true,
            bpf: true,
            ipc_lock: true,
        }
    }

    fn poll(&self, entries: &mut [PollEntry<'_>], timeout: Option<Duration>) -> Result<usize, Errno> {
        self.wait(entries, timeout)
    }
}

/// What keeps a socket: its descriptor and every mapping of its rings have a share in it.
#[derive(Debug)]
struct SocketFile {
    sim: Sim,
    id: SocketId,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        self.sim.with(|state| state.release_socket(self.id));
    }
}

/// What a program holds of a mapped ring.
struct MappedRing {
    _pages: Arc<Pages>,
    _file: Arc<SocketFile>,
}

/// A socket, as a program holds it.
#[derive(Debug)]
struct SimSocket {
    file: Arc<SocketFile>,
    fd: Arc<OwnedFd>,
}

impl SimSocket {
    fn with<R>(&self, f: impl FnOnce(&mut State, SocketId) -> R) -> R {
        self.file.sim.with(|state| f(state, self.file.id))
    }
}

impl AsFd for SimSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for SimSocket {
    fn drop(&mut self) {
        // The number leaves the table before it is closed, when it could be given out again.
        self.with(|state, _| state.close(self.fd.as_raw_fd()));
    }
}

// SAFETY: a mapping owns the pages of its ring, which the kernel's side reaches through
// `xsk::ring` and its peek alone, under one lock: by the protocol, and with one thread at a time.
// UMEM memory is read for a descriptor of TX before its address goes to COMPLETION, and written
// for a chunk that came from FILL before its descriptor goes to RX.
unsafe impl RawSocket for SimSocket {
    fn register_umem(&self, registration: &UmemReg, optlen: usize, memory: &Mapping) -> Result<(), Errno> {
        self.with(|state, id| state.socket(id).register_umem(registration, optlen, memory))
    }

    fn setsockopt(&self, level: i32, name: i32, value: &[u8]) -> Result<(), Errno> {
        self.with(|state, id| match (level, name) {
            (SOL_XDP, _) => state.socket(id).set_option(name, value),
            (SOL_SOCKET, SO_BINDTODEVICE) => {
                let name = value.split(|&byte| byte == 0).next().unwrap_or_default();
                let index = if name.is_empty() {
                    None
                } else {
                    let name = str::from_utf8(name).map_err(|_| Errno::NODEV)?;
                    Some(state.net.index_of(name)?)
                };
                state.socket(id).bind_to_device(index);
                Ok(())
            }
            _ => Err(Errno::NOPROTOOPT),
        })
    }

    fn getsockopt(&self, level: i32, name: i32, value: &mut [u8]) -> Result<usize, Errno> {
        self.with(|state, id| match (level, name) {
            (SOL_XDP, _) => state.option(id, name, value),
            (SOL_SOCKET, SO_ERROR) => {
                let error = state.socket(id).take_error().to_ne_bytes();
                let len = error.len().min(value.len());
                value[..len].copy_from_slice(&error[..len]);
                Ok(len)
            }
            _ => Err(Errno::NOPROTOOPT),
        })
    }

    fn map(&self, page_offset: u64, length: usize) -> Result<Mapping, Errno> {
        let pages = self.with(|state, id| state.ring_pages(id, page_offset, length))?;
        let base = pages.base();
        let owner: Arc<dyn Any + Send + Sync> =
            Arc::new(MappedRing { _pages: pages, _file: self.file.clone() });
        // SAFETY: the owner has a share in the pages, which have at least `length` bytes.
        Ok(unsafe { Mapping::new(base, length, owner) })
    }

    fn bind(&self, address: &SockaddrXdp) -> Result<(), Errno> {
        self.with(|state, id| state.bind(id, address))
    }

    fn send(&self) -> Result<(), Errno> {
        self.with(|state, id| {
            state.socket(id).settle();
            state.send(id)
        })
    }

    fn receive(&self) -> Result<(), Errno> {
        self.with(|state, id| {
            state.socket(id).settle();
            state.receive(id)
        })
    }

    fn is_bound(&self) -> bool {
        self.with(|state, id| state.sockets[&id].bound_to_running(&state.net) != Err(Errno::NXIO))
    }

    fn poll(&self, events: i16, timeout: Option<Duration>) -> Result<i16, Errno> {
        let mut entries = [PollEntry { fd: self.as_fd(), events, revents: 0 }];
        match self.file.sim.wait(&mut entries, timeout) {
            Ok(_) => Ok(entries[0].revents),
            // Of a socket that is not bound, or whose device is down, this is what ends the wait.
            Err(Errno::DEADLK) if self.with(|state, id| state.is_silent(id)) => Ok(POLLERR),
            Err(errno) => Err(errno),
        }
    }
}

impl Sim {
    /// Puts an object into the table, and makes the handle of it.
    fn open(&self, make: impl FnOnce(&mut State) -> Result<Object, Errno>) -> Result<Handle, Errno> {
        let fd = files::open()?;
        self.with(|state| {
            let object = make(state)?;
            state.files.insert(fd.as_raw_fd(), object);
            Ok::<_, Errno>(())
        })?;
        Ok(Box::new(File::new(fd, self.clone())))
    }
}

impl Programs for Sim {
    fn create_map(&self, spec: &MapSpec<'_>) -> Result<Handle, Errno> {
        self.open(|state| {
            let map = Arc::new(XskMap::new(state.number() as u32, spec)?);
            state.maps.push(Arc::downgrade(&map));
            Ok(Object::Map(map))
        })
    }

    fn update_map(&self, map: BorrowedFd<'_>, key: &[u8], value: &[u8], flags: u64) -> Result<(), Errno> {
        self.with(|state| {
            let map = state.map(map.as_raw_fd())?;
            map.update(key, value, flags, |fd| match state.files.get(&fd) {
                Some(Object::Socket(id)) => Ok(*id),
                Some(_) => Err(Errno::NOTSOCK),
                None => Err(match Foreign::of(fd) {
                    Foreign::Closed => Errno::BADF,
                    Foreign::Socket => Errno::OPNOTSUPP,
                    Foreign::Other => Errno::NOTSOCK,
                }),
            })
        })
    }

    fn delete_from_map(&self, map: BorrowedFd<'_>, key: &[u8]) -> Result<(), Errno> {
        self.with(|state| state.map(map.as_raw_fd())?.delete(key))
    }

    fn load_program(&self, spec: &ProgramSpec<'_>, log: &mut String) -> Result<Handle, Errno> {
        self.open(|state| {
            let id = state.number() as u32;
            let map = |fd| match state.map(fd) {
                Err(_) if !state.files.contains_key(&fd) && Foreign::of(fd) == Foreign::Closed => {
                    Err(Errno::BADF)
                }
                found => found,
            };
            let program = Arc::new(Program::load(id, spec, map, log)?);
            state.programs.insert(id, Arc::downgrade(&program));
            Ok(Object::Program(program))
        })
    }

    fn attach(&self, program: BorrowedFd<'_>, ifindex: u32, flags: u32) -> Result<Handle, Errno> {
        self.open(|state| {
            let Some(Object::Program(program)) = state.files.get(&program.as_raw_fd()).cloned() else {
                return Err(Errno::INVAL);
            };
            let link = LinkId(state.number());
            let device = state.net.devices.get_mut(&ifindex).ok_or(Errno::INVAL)?;
            device.attach(link, program.clone(), flags)?;
            Ok(Object::Link(link, program))
        })
    }

    /// Always `EOPNOTSUPP`: there is no BPF file system to pin to.
    fn pin(&self, _object: BorrowedFd<'_>, _path: &Path) -> Result<(), Errno> {
        Err(Errno::OPNOTSUPP)
    }

    /// Always `EOPNOTSUPP`, as [`pin`](Self::pin).
    fn open_pinned(&self, _path: &Path) -> Result<Handle, Errno> {
        Err(Errno::OPNOTSUPP)
    }

    fn open_by_id(&self, kind: Numbered, id: u32) -> Result<Handle, Errno> {
        self.open(|state| state.numbered(kind, id).ok_or(Errno::NOENT))
    }

    fn next_link(&self, after: u32) -> Result<u32, Errno> {
        self.with(|state| {
            let links = state.files.values().filter_map(|object| match object {
                Object::Link(link, _) => Some(link.id()),
                _ => None,
            });
            links.filter(|&id| id > after).min().ok_or(Errno::NOENT)
        })
    }

    fn program_info(&self, program: BorrowedFd<'_>) -> Result<ProgramInfo, Errno> {
        self.with(|state| match state.files.get(&program.as_raw_fd()) {
            Some(Object::Program(program)) => Ok(program.info()),
            _ => Err(Errno::INVAL),
        })
    }

    fn map_info(&self, map: BorrowedFd<'_>) -> Result<MapInfo, Errno> {
        self.with(|state| state.map(map.as_raw_fd()).map(|map| map.info()))
    }

    fn link_info(&self, link: BorrowedFd<'_>) -> Result<LinkInfo, Errno> {
        self.with(|state| {
            let Some(Object::Link(link, program)) = state.files.get(&link.as_raw_fd()) else {
                return Err(Errno::INVAL);
            };
            let device = state.net.devices.iter().find(|(_, device)| device.has(*link));
            let ifindex = device.map_or(0, |(&index, _)| index);
            Ok(LinkInfo { id: link.id(), kind: LINK_XDP, program: program.id(), ifindex })
        })
    }

    /// This process, once for each link and for the program.
    fn program_holders(&self, id: u32) -> Vec<ProgramHolder> {
        let name = std::env::current_exe().ok();
        let name = name.as_deref().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
        let process = Holder { pid: std::process::id(), name: name.into_owned() };
        let mut links: Vec<_> = self.with(|state| {
            let open = |object: &Object| match object {
                Object::Link(link, program) if program.id() == id => Some(Some(link.id())),
                Object::Program(program) if program.id() == id => Some(None),
                _ => None,
            };
            state.files.values().filter_map(open).collect()
        });
        links.sort_unstable();
        links.dedup();
        links.into_iter().map(|link| ProgramHolder { process: process.clone(), link }).collect()
    }
}

impl Devices for Sim {
    fn index_of(&self, name: &str) -> Result<u32, Errno> {
        self.with(|state| state.net.index_of(name))
    }

    fn interface(&self, index: u32) -> Result<InterfaceInfo, Errno> {
        self.with(|state| state.net.describe(index))
    }

    fn interfaces(&self) -> Result<Vec<u32>, Errno> {
        self.with(|state| Ok(state.net.devices.keys().copied().collect()))
    }

    fn watch(&self, index: u32) -> Result<Box<dyn Watch>, Errno> {
        Ok(Box::new(WatchFile::new(self.clone(), index)?))
    }
}
