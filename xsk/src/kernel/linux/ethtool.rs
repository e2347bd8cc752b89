//! What only the ethtool ioctl tells: the driver's name, and the queues in use.

use std::os::fd::{AsRawFd, BorrowedFd};

use super::{check, text};
use crate::kernel::{Channels, Errno};

const SIOCETHTOOL: u32 = 0x8946;
const ETHTOOL_GDRVINFO: u32 = 0x03;
const ETHTOOL_GCHANNELS: u32 = 0x3c;

/// `struct ethtool_drvinfo` of `include/uapi/linux/ethtool.h`.
#[repr(C)]
struct DriverInfo {
    cmd: u32,
    driver: [u8; 32],
    version: [u8; 32],
    fw_version: [u8; 32],
    bus_info: [u8; 32],
    erom_version: [u8; 32],
    reserved2: [u8; 12],
    n_priv_flags: u32,
    n_stats: u32,
    testinfo_len: u32,
    eedump_len: u32,
    regdump_len: u32,
}

/// `struct ethtool_channels`.
#[derive(Default)]
#[repr(C)]
struct EthtoolChannels {
    cmd: u32,
    max_rx: u32,
    max_tx: u32,
    max_other: u32,
    max_combined: u32,
    rx_count: u32,
    tx_count: u32,
    other_count: u32,
    combined_count: u32,
}

const _: () = {
    assert!(size_of::<DriverInfo>() == 196);
    assert!(size_of::<EthtoolChannels>() == 36);
};

/// The name of an interface's driver. `socket` is any socket of its network namespace.
pub(super) fn driver(socket: BorrowedFd<'_>, name: &str) -> Result<String, Errno> {
    let mut info = DriverInfo {
        cmd: ETHTOOL_GDRVINFO,
        driver: [0; 32],
        version: [0; 32],
        fw_version: [0; 32],
        bus_info: [0; 32],
        erom_version: [0; 32],
        reserved2: [0; 12],
        n_priv_flags: 0,
        n_stats: 0,
        testinfo_len: 0,
        eedump_len: 0,
        regdump_len: 0,
    };
    // SAFETY: the structure that the command takes.
    unsafe { ethtool(socket, name, &mut info)? };
    Ok(text(&info.driver))
}

/// The queues of an interface. `socket` is any socket of its network namespace.
pub(super) fn channels(socket: BorrowedFd<'_>, name: &str) -> Result<Channels, Errno> {
    let mut channels = EthtoolChannels { cmd: ETHTOOL_GCHANNELS, ..EthtoolChannels::default() };
    // SAFETY: the structure that the command takes.
    unsafe { ethtool(socket, name, &mut channels)? };
    Ok(Channels { rx: channels.rx_count, tx: channels.tx_count, combined: channels.combined_count })
}

/// `ioctl(SIOCETHTOOL)`.
///
/// # Safety
///
/// `request` starts with a command, is what that command reads and writes, and takes any bytes.
unsafe fn ethtool<T>(socket: BorrowedFd<'_>, name: &str, request: &mut T) -> Result<(), Errno> {
    // SAFETY: integers and addresses, of which zeros are values.
    let mut ifreq: libc::ifreq = unsafe { core::mem::zeroed() };
    // One byte less than there is room for: a zero byte ends the name.
    let room = ifreq.ifr_name.len() - 1;
    let field = ifreq.ifr_name[..room].get_mut(..name.len()).ok_or(Errno::NODEV)?;
    for (to, from) in field.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    ifreq.ifr_ifru.ifru_data = core::ptr::from_mut(request).cast();
    // The type of a request differs from C library to C library.
    // SAFETY: the kernel reads the name and follows the address to `request`, which is as the
    // caller says.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL as _, &mut ifreq) }).map(drop)
}
