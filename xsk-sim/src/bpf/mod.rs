//! eBPF as XDP uses it: the XSKMAP, programs, and what runs them.
//!
//! `decode` turns instructions into operations and refuses what no kernel would load; `run`
//! executes them. This is not the verifier: whether a program reads only what it has checked, or
//! ends, is found out packet by packet, and a program that breaks the rules aborts.

mod decode;
mod run;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use xsk::kernel::{Errno, Insn, MapInfo, MapSpec, ProgramInfo, ProgramSpec};
use xsk::xdp::asm::BPF_PSEUDO_MAP_FD;

use crate::socket::SocketId;
use decode::{Op, decode};

pub(crate) use run::Context;

/// `BPF_MAP_TYPE_XSKMAP`.
const XSKMAP: u32 = 17;

const BPF_F_NUMA_NODE: u32 = 1 << 2;
const BPF_F_RDONLY: u32 = 1 << 3;
const BPF_F_WRONLY: u32 = 1 << 4;

const BPF_F_XDP_HAS_FRAGS: u32 = 1 << 5;

const BPF_NOEXIST: u64 = 1;
const BPF_EXIST: u64 = 2;

/// Checks a name as `bpf_obj_name_cpy` does.
fn check_name(name: &str) -> Result<(), Errno> {
    let fits = name.len() < 16;
    let plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'.');
    if fits && plain { Ok(()) } else { Err(Errno::INVAL) }
}

/// A map from numbers to sockets.
#[derive(Debug)]
pub(crate) struct XskMap {
    id: u32,
    name: String,
    max_entries: u32,
    read_only: bool,
    /// Locked for moments only, and under the kernel's own lock.
    entries: Mutex<BTreeMap<u32, SocketId>>,
}

impl XskMap {
    /// `BPF_MAP_CREATE`. Maps of other kinds are not simulated: `EINVAL`, as from a kernel that
    /// was built without them.
    pub(crate) fn new(id: u32, spec: &MapSpec<'_>) -> Result<Self, Errno> {
        let known = BPF_F_NUMA_NODE | BPF_F_RDONLY | BPF_F_WRONLY;
        let both = BPF_F_RDONLY | BPF_F_WRONLY;
        if spec.kind != XSKMAP
            || spec.key_size != 4
            || spec.value_size != 4
            || spec.max_entries == 0
            || spec.flags & !known != 0
            || spec.flags & both == both
        {
            return Err(Errno::INVAL);
        }
        check_name(spec.name)?;
        Ok(Self {
            id,
            name: spec.name.to_owned(),
            max_entries: spec.max_entries,
            read_only: spec.flags & BPF_F_RDONLY != 0,
            entries: Mutex::new(BTreeMap::new()),
        })
    }

    /// The kernel's number for it.
    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    /// `BPF_OBJ_GET_INFO_BY_FD`.
    pub(crate) fn info(&self) -> MapInfo {
        MapInfo {
            id: self.id,
            kind: XSKMAP,
            key_size: 4,
            value_size: 4,
            max_entries: self.max_entries,
            name: self.name.clone(),
        }
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<u32, SocketId>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The socket under a key.
    pub(crate) fn get(&self, key: u32) -> Option<SocketId> {
        self.entries().get(&key).copied()
    }

    /// `BPF_MAP_UPDATE_ELEM`; `socket` finds the socket of a descriptor.
    pub(crate) fn update(
        &self,
        key: &[u8],
        value: &[u8],
        flags: u64,
        socket: impl FnOnce(i32) -> Result<SocketId, Errno>,
    ) -> Result<(), Errno> {
        if self.read_only {
            return Err(Errno::PERM);
        }
        let key = word(key)?;
        let fd = word(value)?;
        if flags > BPF_EXIST {
            return Err(Errno::INVAL);
        }
        if key >= self.max_entries {
            return Err(Errno::TOOBIG);
        }
        let socket = socket(fd as i32)?;
        let mut entries = self.entries();
        match entries.get(&key) {
            Some(&present) if present == socket => return Ok(()),
            Some(_) if flags == BPF_NOEXIST => return Err(Errno::EXIST),
            None if flags == BPF_EXIST => return Err(Errno::NOENT),
            _ => {}
        }
        entries.insert(key, socket);
        Ok(())
    }

    /// `BPF_MAP_DELETE_ELEM`.
    pub(crate) fn delete(&self, key: &[u8]) -> Result<(), Errno> {
        if self.read_only {
            return Err(Errno::PERM);
        }
        let key = word(key)?;
        if key >= self.max_entries {
            return Err(Errno::INVAL);
        }
        self.entries().remove(&key);
        Ok(())
    }

    /// Takes a socket out, wherever it stands: it was closed.
    pub(crate) fn forget(&self, socket: SocketId) {
        self.entries().retain(|_, present| *present != socket);
    }
}

/// The first four bytes; the kernel reads as many as the map's keys and values have.
fn word(bytes: &[u8]) -> Result<u32, Errno> {
    bytes.first_chunk().map(|word| u32::from_ne_bytes(*word)).ok_or(Errno::FAULT)
}

/// A hash of a program without its maps' descriptors, as the kernel's tag is; of another kind (FNV-1a).
fn tag(instructions: &[Insn]) -> [u8; 8] {
    let mut tag = 0xcbf2_9ce4_8422_2325_u64;
    for insn in instructions {
        let of_map = insn.code == 0x18 && insn.regs >> 4 == BPF_PSEUDO_MAP_FD;
        let (off, imm) = (insn.off.to_le_bytes(), if of_map { 0 } else { insn.imm }.to_le_bytes());
        for byte in [insn.code, insn.regs].into_iter().chain(off).chain(imm) {
            tag = (tag ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    tag.to_le_bytes()
}

/// A loaded program.
#[derive(Debug)]
pub(crate) struct Program {
    id: u32,
    name: String,
    tag: [u8; 8],
    ops: Vec<Op>,
    maps: Vec<Arc<XskMap>>,
}

impl Program {
    /// `BPF_PROG_LOAD`; `map` finds the map of a descriptor.
    pub(crate) fn load(
        id: u32,
        spec: &ProgramSpec<'_>,
        map: impl FnMut(i32) -> Result<Arc<XskMap>, Errno>,
        log: &mut String,
    ) -> Result<Self, Errno> {
        if spec.flags & !BPF_F_XDP_HAS_FRAGS != 0 {
            return Err(Errno::INVAL);
        }
        check_name(spec.name)?;
        let (ops, maps) = decode(spec.instructions, map, log)?;
        Ok(Self { id, name: spec.name.to_owned(), tag: tag(spec.instructions), ops, maps })
    }

    /// The kernel's number for it.
    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    /// `BPF_OBJ_GET_INFO_BY_FD`.
    pub(crate) fn info(&self) -> ProgramInfo {
        ProgramInfo {
            id: self.id,
            name: self.name.clone(),
            tag: self.tag,
            maps: self.maps.iter().map(|map| map.id).collect(),
        }
    }
}
