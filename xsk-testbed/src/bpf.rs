//! The four commands of `bpf(2)` that the generator needs.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use xsk::kernel::Insn;

const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_TEST_RUN: libc::c_long = 10;

const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_PROG_TYPE_XDP: u32 = 6;
/// Frames are injected into the real datapath instead of being thrown away (5.18).
const BPF_F_TEST_XDP_LIVE_FRAMES: u32 = 1 << 1;

/// The part of `union bpf_attr` that one command reads.
///
/// # Safety
///
/// The type is laid out as the kernel's for that command, without padding, and its pointers are to
/// memory that is live, and as large as its sizes say, during the call.
unsafe trait Attr {
    const COMMAND: libc::c_long;
}

#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

#[repr(C)]
struct MapLookup {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
}

#[repr(C)]
#[derive(Default)]
struct TestRun {
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

// SAFETY: no pointers; the layout is the kernel's.
unsafe impl Attr for MapCreate {
    const COMMAND: libc::c_long = BPF_MAP_CREATE;
}
// SAFETY: made in `lookup_u64` only, from live buffers of the map's key and value size.
unsafe impl Attr for MapLookup {
    const COMMAND: libc::c_long = BPF_MAP_LOOKUP_ELEM;
}
// SAFETY: made in `load_xdp` only, from live buffers and their lengths.
unsafe impl Attr for ProgLoad {
    const COMMAND: libc::c_long = BPF_PROG_LOAD;
}
// SAFETY: made in `send_live` only, from a live buffer and its length.
unsafe impl Attr for TestRun {
    const COMMAND: libc::c_long = BPF_PROG_TEST_RUN;
}

fn bpf<A: Attr>(attr: &mut A) -> io::Result<libc::c_long> {
    // SAFETY: the kernel reads and writes within `attr`, whose size it is told, and what it points
    // to, which by `Attr` is valid for the call.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, A::COMMAND, std::ptr::from_mut(attr), size_of::<A>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// As [`bpf`], for a command that answers with a new descriptor.
fn bpf_fd<A: Attr>(attr: &mut A) -> io::Result<OwnedFd> {
    let fd = bpf(attr)?;
    // SAFETY: the command succeeded, so this is a descriptor that nobody else owns yet. BPF
    // descriptors are close-on-exec from the start.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as _) })
}

/// An array map of one `u64`.
pub(crate) fn create_u64() -> io::Result<OwnedFd> {
    bpf_fd(&mut MapCreate { map_type: BPF_MAP_TYPE_ARRAY, key_size: 4, value_size: 8, max_entries: 1 })
}

/// The value of a map made by [`create_u64`].
pub(crate) fn lookup_u64(map: BorrowedFd<'_>) -> io::Result<u64> {
    let key = 0u32;
    let mut value = 0u64;
    bpf(&mut MapLookup {
        map_fd: map.as_raw_fd() as u32,
        pad: 0,
        key: (&raw const key) as u64,
        value: (&raw mut value) as u64,
        flags: 0,
    })?;
    Ok(value)
}

/// Loads an XDP program. On refusal, also what the verifier said.
pub(crate) fn load_xdp(insns: &[Insn]) -> Result<OwnedFd, (io::Error, String)> {
    let mut attr = ProgLoad {
        prog_type: BPF_PROG_TYPE_XDP,
        insn_cnt: insns.len() as u32,
        insns: insns.as_ptr() as u64,
        license: c"Dual MIT/GPL".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
    };
    bpf_fd(&mut attr).map_err(|error| {
        // Once more for the log, which would only cost time where all is well.
        let mut log = vec![0u8; 1 << 16];
        (attr.log_level, attr.log_size, attr.log_buf) = (1, log.len() as u32, log.as_mut_ptr() as u64);
        let error = bpf_fd(&mut attr).err().unwrap_or(error);
        let end = log.iter().position(|&b| b == 0).unwrap_or(log.len());
        (error, String::from_utf8_lossy(&log[..end]).into_owned())
    })
}

/// Runs an XDP program over `count` packets that begin as `frame`, on the calling thread's CPU and
/// in its network namespace; where the program sends them, they go.
///
/// `EINTR` if a signal came meanwhile: some were sent.
pub(crate) fn send_live(program: BorrowedFd<'_>, frame: &[u8], count: u32) -> io::Result<()> {
    bpf(&mut TestRun {
        prog_fd: program.as_raw_fd() as u32,
        data_size_in: frame.len() as u32,
        data_in: frame.as_ptr() as u64,
        repeat: count,
        flags: BPF_F_TEST_XDP_LIVE_FRAMES,
        ..TestRun::default()
    })
    .map(drop)
}
