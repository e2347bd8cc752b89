//! Maps, programs and links by `bpf(2)`.
//!
//! Each command takes its own part of `union bpf_attr` (`include/uapi/linux/bpf.h`), cut after the
//! last field used: a kernel takes what is missing for zeros.

use core::ptr;
use std::borrow::Cow;
use std::ffi::CString;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::socket::page_size;
use super::{Linux, check, holders, text};
use crate::abi::XDP_PACKET_HEADROOM;
use crate::kernel::{
    Errno, Handle, Insn, LINK_XDP, LinkInfo, MapInfo, MapSpec, Numbered, ProgramHolder, ProgramInfo,
    ProgramSpec, Programs,
};

const BPF_MAP_CREATE: Command = Command(0);
const BPF_MAP_LOOKUP_ELEM: Command = Command(1);
const BPF_MAP_UPDATE_ELEM: Command = Command(2);
const BPF_MAP_DELETE_ELEM: Command = Command(3);
const BPF_PROG_LOAD: Command = Command(5);
const BPF_OBJ_PIN: Command = Command(6);
const BPF_OBJ_GET: Command = Command(7);
const BPF_PROG_TEST_RUN: Command = Command(10);
const BPF_PROG_GET_FD_BY_ID: Command = Command(13);
const BPF_MAP_GET_FD_BY_ID: Command = Command(14);
const BPF_OBJ_GET_INFO_BY_FD: Command = Command(15);
const BPF_LINK_CREATE: Command = Command(28);
const BPF_LINK_GET_FD_BY_ID: Command = Command(30);
const BPF_LINK_GET_NEXT_ID: Command = Command(31);

const BPF_PROG_TYPE_XDP: u32 = 6;
/// Attach type of an XDP program on an interface (5.9).
const BPF_XDP: u32 = 37;
/// Bytes of a name, with a zero byte at the end.
const BPF_OBJ_NAME_LEN: usize = 16;
/// Map types with a value for every processor: 5, 6, 10 and 21.
const PER_CPU_MAPS: [u32; 4] = [5, 6, 10, 21];

/// Flag of a test run: the frames are real, and go where the program sends them (5.18).
pub const BPF_F_TEST_XDP_LIVE_FRAMES: u32 = 1 << 1;

/// Bytes of the verifier's log at the first attempt, and at most.
const LOG_SIZES: core::ops::RangeInclusive<usize> = 64 << 10..=16 << 20;

/// One `enum bpf_cmd`.
#[derive(Clone, Copy)]
struct Command(libc::c_int);

/// A part of `union bpf_attr`.
///
/// # Safety
///
/// The type is `repr(C)` and without padding; all zeros are a value of it.
unsafe trait Attr {}

#[derive(Default)]
#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    map_name: [u8; BPF_OBJ_NAME_LEN],
}
// SAFETY: integers only, all aligned to 4, size 44.
unsafe impl Attr for MapCreate {}

#[derive(Default)]
#[repr(C)]
struct MapElement {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}
// SAFETY: integers only, the gap in front of `key` is a field.
unsafe impl Attr for MapElement {}

#[derive(Default)]
#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; BPF_OBJ_NAME_LEN],
    prog_ifindex: u32,
    expected_attach_type: u32,
}
// SAFETY: integers only, `u64`s at offsets 8, 16 and 32, size 72.
unsafe impl Attr for ProgLoad {}

#[derive(Default)]
#[repr(C)]
struct ObjPin {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}
// SAFETY: integers only, size 16.
unsafe impl Attr for ObjPin {}

#[derive(Default)]
#[repr(C)]
struct ProgTestRun {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    pad: u32,
}
// SAFETY: integers only, `u64`s at offsets 16, 24, 48 and 56, size 80.
unsafe impl Attr for ProgTestRun {}

#[derive(Default)]
#[repr(C)]
struct GetId {
    id: u32,
}
// SAFETY: an integer.
unsafe impl Attr for GetId {}

#[derive(Default)]
#[repr(C)]
struct NextId {
    start_id: u32,
    next_id: u32,
}
// SAFETY: integers only, size 8.
unsafe impl Attr for NextId {}

#[derive(Default)]
#[repr(C)]
struct GetInfo {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}
// SAFETY: integers only, size 16.
unsafe impl Attr for GetInfo {}

#[derive(Default)]
#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
}
// SAFETY: integers only, size 16.
unsafe impl Attr for LinkCreate {}

/// The start of `struct bpf_map_info`.
#[derive(Default)]
#[repr(C)]
struct BpfMapInfo {
    kind: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    name: [u8; BPF_OBJ_NAME_LEN],
}

/// The start of `struct bpf_prog_info`.
#[derive(Default)]
#[repr(C)]
struct BpfProgInfo {
    kind: u32,
    id: u32,
    tag: [u8; 8],
    jited_prog_len: u32,
    xlated_prog_len: u32,
    jited_prog_insns: u64,
    xlated_prog_insns: u64,
    load_time: u64,
    created_by_uid: u32,
    nr_map_ids: u32,
    map_ids: u64,
    name: [u8; BPF_OBJ_NAME_LEN],
}

/// The start of `struct bpf_link_info`, as it is for XDP. The union with what other kinds of links
/// tell is aligned to 8 bytes.
#[derive(Default)]
#[repr(C)]
struct BpfLinkInfo {
    kind: u32,
    id: u32,
    prog_id: u32,
    pad: u32,
    ifindex: u32,
}

const _: () = {
    assert!(size_of::<MapCreate>() == 44);
    assert!(size_of::<MapElement>() == 32);
    assert!(size_of::<ProgLoad>() == 72);
    assert!(size_of::<ProgTestRun>() == 80);
    assert!(size_of::<BpfMapInfo>() == 40);
    assert!(core::mem::offset_of!(BpfProgInfo, name) == 64 && size_of::<BpfProgInfo>() == 80);
    assert!(core::mem::offset_of!(BpfLinkInfo, ifindex) == 16);
};

/// `bpf(2)`.
///
/// # Safety
///
/// `attr` is the part of the union that `command` takes; its addresses and lengths speak of memory
/// that is readable, and writable where the command writes.
unsafe fn bpf<A: Attr>(command: Command, attr: &mut A) -> Result<i64, Errno> {
    // SAFETY: as the caller says; the kernel stays within the size given.
    check(unsafe { libc::syscall(libc::SYS_bpf, command.0, ptr::from_mut(attr), size_of::<A>()) })
}

/// `bpf(2)` with a command that answers with a new descriptor, which the kernel makes close-on-exec.
///
/// # Safety
///
/// As for [`bpf`].
unsafe fn bpf_fd<A: Attr>(command: Command, attr: &mut A) -> Result<OwnedFd, Errno> {
    // SAFETY: as the caller says.
    let fd = unsafe { bpf(command, attr)? };
    // SAFETY: the kernel just made this descriptor, and nothing else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// An address as `bpf(2)` takes it: 64 bits on every machine.
fn address<T>(pointer: *const T) -> u64 {
    pointer.expose_provenance() as u64
}

fn fd_of(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd() as u32
}

/// A length as `bpf(2)` takes it.
fn len_of<T>(slice: &[T]) -> Result<u32, Errno> {
    u32::try_from(slice.len()).map_err(|_| Errno::TOOBIG)
}

/// An object's name in its field; one without room for the zero byte is `EINVAL`, as in the kernel.
fn name_field(name: &str) -> Result<[u8; BPF_OBJ_NAME_LEN], Errno> {
    let mut field = [0; BPF_OBJ_NAME_LEN];
    field[..BPF_OBJ_NAME_LEN - 1].get_mut(..name.len()).ok_or(Errno::INVAL)?.copy_from_slice(name.as_bytes());
    Ok(field)
}

/// What the kernel tells of an open object: as much of it as `T` has.
///
/// # Safety
///
/// `T` is the start of the `info` structure of this kind of object, with no address in it that is
/// not 0: the kernel writes to those.
unsafe fn info<T: Default>(object: BorrowedFd<'_>) -> Result<T, Errno> {
    let mut info = T::default();
    // SAFETY: as the caller says.
    unsafe { fill_info(object, &mut info)? };
    Ok(info)
}

/// As [`info`], where `info` says what the kernel is to write elsewhere.
///
/// # Safety
///
/// `T` is the start of the `info` structure of this kind of object; the addresses in it that are not
/// 0 have room for as much as the lengths beside them say.
unsafe fn fill_info<T>(object: BorrowedFd<'_>, info: &mut T) -> Result<(), Errno> {
    let mut attr = GetInfo {
        bpf_fd: fd_of(object),
        info_len: size_of::<T>() as u32,
        info: address(ptr::from_mut(info)),
    };
    // SAFETY: the kernel writes at most `info_len` bytes, and integers take any bytes; it writes
    // elsewhere as the caller says.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr).map(drop) }
}

/// Compares a key and a value with what a map takes: the kernel reads and writes as many bytes as
/// the map says, however long the slices are. Wrong sizes are `EINVAL`; maps with a value for every
/// processor, whose values have yet another size, `EOPNOTSUPP`.
fn check_sizes(map: BorrowedFd<'_>, key: &[u8], value: Option<&[u8]>) -> Result<(), Errno> {
    // SAFETY: the start of `struct bpf_map_info`. Of another kind of object it is the start of
    // that one's, all numbers as well, and the kernel then refuses the command that follows.
    let map: BpfMapInfo = unsafe { info(map)? };
    if PER_CPU_MAPS.contains(&map.kind) {
        return Err(Errno::OPNOTSUPP);
    }
    if key.len() != map.key_size as usize || value.is_some_and(|v| v.len() != map.value_size as usize) {
        return Err(Errno::INVAL);
    }
    Ok(())
}

impl Programs for Linux {
    fn create_map(&self, spec: &MapSpec<'_>) -> Result<Handle, Errno> {
        let mut attr = MapCreate {
            map_type: spec.kind,
            key_size: spec.key_size,
            value_size: spec.value_size,
            max_entries: spec.max_entries,
            map_flags: spec.flags,
            map_name: name_field(spec.name)?,
            ..MapCreate::default()
        };
        // SAFETY: there are no addresses in it.
        Ok(Box::new(unsafe { bpf_fd(BPF_MAP_CREATE, &mut attr)? }))
    }

    /// A key or value of another size than the map's is `EINVAL`.
    fn update_map(&self, map: BorrowedFd<'_>, key: &[u8], value: &[u8], flags: u64) -> Result<(), Errno> {
        check_sizes(map, key, Some(value))?;
        let mut attr = MapElement {
            map_fd: fd_of(map),
            key: address(key.as_ptr()),
            value: address(value.as_ptr()),
            flags,
            ..MapElement::default()
        };
        // SAFETY: the slices have the sizes that the kernel reads.
        unsafe { bpf(BPF_MAP_UPDATE_ELEM, &mut attr).map(drop) }
    }

    /// A key of another size than the map's is `EINVAL`.
    fn delete_from_map(&self, map: BorrowedFd<'_>, key: &[u8]) -> Result<(), Errno> {
        check_sizes(map, key, None)?;
        let mut attr = MapElement { map_fd: fd_of(map), key: address(key.as_ptr()), ..MapElement::default() };
        // SAFETY: the key has the size that the kernel reads.
        unsafe { bpf(BPF_MAP_DELETE_ELEM, &mut attr).map(drop) }
    }

    fn load_program(&self, spec: &ProgramSpec<'_>, log: &mut String) -> Result<Handle, Errno> {
        log.clear();
        // Without a log first: writing one makes verifying several times as slow.
        let errno = match load(spec, &mut []) {
            Ok(program) => return Ok(Box::new(program)),
            Err(errno) => errno,
        };
        let mut size = *LOG_SIZES.start();
        loop {
            let mut buffer = vec![0; size];
            match load(spec, &mut buffer) {
                Ok(program) => return Ok(Box::new(program)),
                Err(Errno::NOSPC) if size < *LOG_SIZES.end() => size *= 2,
                Err(_) => {
                    *log = text(&buffer);
                    return Err(errno);
                }
            }
        }
    }

    fn attach(&self, program: BorrowedFd<'_>, ifindex: u32, flags: u32) -> Result<Handle, Errno> {
        let mut attr =
            LinkCreate { prog_fd: fd_of(program), target_ifindex: ifindex, attach_type: BPF_XDP, flags };
        // SAFETY: there are no addresses in it.
        Ok(Box::new(unsafe { bpf_fd(BPF_LINK_CREATE, &mut attr)? }))
    }

    fn pin(&self, object: BorrowedFd<'_>, path: &Path) -> Result<(), Errno> {
        let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::INVAL)?;
        let mut attr = ObjPin { pathname: address(path.as_ptr()), bpf_fd: fd_of(object), file_flags: 0 };
        // SAFETY: the path ends with a zero byte, and lives until after the call.
        unsafe { bpf(BPF_OBJ_PIN, &mut attr).map(drop) }
    }

    fn open_pinned(&self, path: &Path) -> Result<Handle, Errno> {
        let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::INVAL)?;
        let mut attr = ObjPin { pathname: address(path.as_ptr()), ..ObjPin::default() };
        // SAFETY: the path ends with a zero byte, and lives until after the call.
        Ok(Box::new(unsafe { bpf_fd(BPF_OBJ_GET, &mut attr)? }))
    }

    fn open_by_id(&self, kind: Numbered, id: u32) -> Result<Handle, Errno> {
        let command = match kind {
            Numbered::Program => BPF_PROG_GET_FD_BY_ID,
            Numbered::Map => BPF_MAP_GET_FD_BY_ID,
            Numbered::Link => BPF_LINK_GET_FD_BY_ID,
        };
        // SAFETY: there are no addresses in it.
        Ok(Box::new(unsafe { bpf_fd(command, &mut GetId { id })? }))
    }

    fn next_link(&self, after: u32) -> Result<u32, Errno> {
        let mut attr = NextId { start_id: after, next_id: 0 };
        // SAFETY: there are no addresses in it.
        unsafe { bpf(BPF_LINK_GET_NEXT_ID, &mut attr)? };
        Ok(attr.next_id)
    }

    /// What is no XDP program is `EINVAL`.
    fn program_info(&self, program: BorrowedFd<'_>) -> Result<ProgramInfo, Errno> {
        // SAFETY: the start of `struct bpf_prog_info`, with zeros for addresses.
        let BpfProgInfo { kind, id, name, tag, nr_map_ids, .. } = unsafe { info(program)? };
        if kind != BPF_PROG_TYPE_XDP {
            return Err(Errno::INVAL);
        }
        let mut maps = vec![0u32; nr_map_ids as usize];
        if !maps.is_empty() {
            let mut whole =
                BpfProgInfo { nr_map_ids, map_ids: address(maps.as_mut_ptr()), ..BpfProgInfo::default() };
            // SAFETY: as above, but for the address of as many numbers as it says. What else has kind
            // 6, a link of XDP and a map, has no address in these bytes.
            unsafe { fill_info(program, &mut whole)? };
        }
        Ok(ProgramInfo { id, name: text(&name), tag, maps })
    }

    fn map_info(&self, map: BorrowedFd<'_>) -> Result<MapInfo, Errno> {
        // SAFETY: the start of `struct bpf_map_info`, which has no addresses.
        let BpfMapInfo { kind, id, key_size, value_size, max_entries, name, .. } = unsafe { info(map)? };
        Ok(MapInfo { id, kind, key_size, value_size, max_entries, name: text(&name) })
    }

    fn link_info(&self, link: BorrowedFd<'_>) -> Result<LinkInfo, Errno> {
        // SAFETY: the start of `struct bpf_link_info`, with zeros where other kinds have addresses.
        let BpfLinkInfo { kind, id, prog_id, ifindex, .. } = unsafe { info(link)? };
        Ok(LinkInfo { id, kind, program: prog_id, ifindex: if kind == LINK_XDP { ifindex } else { 0 } })
    }

    /// Without privilege, of processes of the same user only.
    fn program_holders(&self, id: u32) -> Vec<ProgramHolder> {
        holders::of_program(id)
    }
}

/// Instructions as this machine's kernel has them: the registers are bit-fields of one byte, which a
/// big-endian machine fills from the upper end.
fn native(instructions: &[Insn]) -> Cow<'_, [Insn]> {
    if cfg!(target_endian = "little") {
        return Cow::Borrowed(instructions);
    }
    instructions.iter().map(|insn| Insn { regs: insn.regs.rotate_left(4), ..*insn }).collect()
}

/// `BPF_PROG_LOAD`, with the verifier's words in `log` if there is room for any.
fn load(spec: &ProgramSpec<'_>, log: &mut [u8]) -> Result<OwnedFd, Errno> {
    /// The licence as the kernel knows the project's own: helpers for GPL programs are allowed.
    const LICENSE: &core::ffi::CStr = c"Dual MIT/GPL";
    /// A signal while the verifier works makes it give up with `EAGAIN`.
    const ATTEMPTS: usize = 5;

    let instructions = native(spec.instructions);
    let mut attr = ProgLoad {
        prog_type: BPF_PROG_TYPE_XDP,
        insn_cnt: len_of(&instructions)?,
        insns: address(instructions.as_ptr()),
        license: address(LICENSE.as_ptr()),
        prog_flags: spec.flags,
        prog_name: name_field(spec.name)?,
        expected_attach_type: BPF_XDP,
        ..ProgLoad::default()
    };
    // The kernel takes a log whole or not at all: an address without a size is EINVAL.
    if !log.is_empty() {
        attr.log_level = 1;
        attr.log_size = len_of(log)?;
        attr.log_buf = address(log.as_mut_ptr());
    }
    let mut result = Err(Errno::AGAIN);
    for _ in 0..ATTEMPTS {
        // SAFETY: instructions and log have the lengths given, the licence ends with a zero byte.
        result = unsafe { bpf_fd(BPF_PROG_LOAD, &mut attr) };
        if !matches!(result, Err(Errno::AGAIN)) {
            break;
        }
    }
    result
}

/// `BPF_MAP_LOOKUP_ELEM`: copies the value of `key` to `value`.
///
/// An XSKMAP cannot be read (`EOPNOTSUPP`); neither are maps with a value for every processor read
/// here. A key or value of another size than the map's is `EINVAL`, a key that is not there `ENOENT`.
pub fn lookup_map(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> Result<(), Errno> {
    check_sizes(map, key, Some(value))?;
    let mut attr = MapElement {
        map_fd: fd_of(map),
        key: address(key.as_ptr()),
        value: address(value.as_mut_ptr()),
        ..MapElement::default()
    };
    // SAFETY: the slices have the sizes that the kernel reads and writes.
    unsafe { bpf(BPF_MAP_LOOKUP_ELEM, &mut attr).map(drop) }
}

/// `struct xdp_md`: what an XDP program sees of a packet, given to [`test_run`] as its context.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct XdpMd {
    /// Where the packet starts: bytes of metadata in front of it.
    pub data: u32,
    /// Where it ends: bytes of metadata and packet together.
    pub data_end: u32,
    /// Where the metadata starts: 0.
    pub data_meta: u32,
    /// The interface that the packet came in by, in the calling thread's network namespace; 0 is
    /// the loopback interface.
    pub ingress_ifindex: u32,
    /// The queue that it came in by; one of that interface's.
    pub rx_queue_index: u32,
    /// 0: the kernel allows it in programs of a device map only.
    pub egress_ifindex: u32,
}

/// What a test run yielded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TestRun {
    /// The program's verdict at the last repetition, `XDP_*`; 0 with live frames.
    pub retval: u32,
    /// Nanoseconds that one repetition took, on average.
    pub duration_ns: u32,
    /// The packet as the program left it; empty with live frames.
    pub data_out: Vec<u8>,
}

/// `BPF_PROG_TEST_RUN`: runs an XDP program on `data`, `repeat` times (0 is once).
///
/// With [`BPF_F_TEST_XDP_LIVE_FRAMES`] (5.18) in `flags` the frames are real: passed ones enter the
/// Linux stack, redirected ones go out, `batch_size` of them at a time (0 is 64; at most 256). This
/// is the fastest source of packets that Linux has. Without it only the verdict and the changed
/// packet are reported, and `batch_size` is 0.
///
/// With a context, the metadata that its offsets speak of stands in front of the packet in `data`.
///
/// A signal ends it with `EINTR`.
pub fn test_run(
    program: BorrowedFd<'_>,
    data: &[u8],
    context: Option<&XdpMd>,
    repeat: u32,
    flags: u32,
    batch_size: u32,
) -> Result<TestRun, Errno> {
    let live = flags & BPF_F_TEST_XDP_LIVE_FRAMES != 0;
    // A program can move the packet's start into the headroom and its end to that of the last page.
    let room = if live { 0 } else { data.len() + XDP_PACKET_HEADROOM as usize + page_size() };
    let mut out = vec![0; room];
    let mut attr = ProgTestRun {
        prog_fd: fd_of(program),
        data_size_in: len_of(data)?,
        data_in: address(data.as_ptr()),
        repeat,
        flags,
        batch_size,
        ..ProgTestRun::default()
    };
    if !live {
        attr.data_size_out = len_of(&out)?;
        attr.data_out = address(out.as_mut_ptr());
    }
    if let Some(context) = context {
        attr.ctx_size_in = size_of::<XdpMd>() as u32;
        attr.ctx_in = address(ptr::from_ref(context));
    }
    // SAFETY: the packet, the room for its copy and the context have the lengths given.
    unsafe { bpf(BPF_PROG_TEST_RUN, &mut attr)? };
    // The kernel tells the packet's size in either mode; it was copied without live frames only.
    out.truncate(attr.data_size_out as usize);
    Ok(TestRun { retval: attr.retval, duration_ns: attr.duration, data_out: out })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_room_for_fifteen_bytes() {
        assert_eq!(name_field("").unwrap(), [0; 16]);
        assert_eq!(&name_field("fifteen_letters").unwrap(), b"fifteen_letters\0");
        assert_eq!(name_field("sixteen_letters_"), Err(Errno::INVAL));
    }
}
