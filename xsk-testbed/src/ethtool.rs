//! The ethtool ioctl: the few requests that the testbed makes.

use std::os::fd::AsRawFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::Error;

const SIOCETHTOOL: libc::c_ulong = 0x8946;
const ETHTOOL_STXCSUM: u32 = 0x17;
const ETHTOOL_SGRO: u32 = 0x2c;
const ETHTOOL_GCHANNELS: u32 = 0x3c;
const ETHTOOL_SCHANNELS: u32 = 0x3d;

/// Queues of an interface, as `ethtool -l` shows them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Channels {
    /// Receive queues in use.
    pub rx: u32,
    /// Transmit queues in use.
    pub tx: u32,
}

/// `struct ethtool_value`.
#[repr(C)]
struct Value {
    cmd: u32,
    data: u32,
}

/// `struct ethtool_channels`.
#[repr(C)]
#[derive(Default)]
struct RawChannels {
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

/// A structure of the ethtool interface: integers only, and the command first.
///
/// # Safety
///
/// The type has the size and layout that the kernel uses for each command it is filled with.
unsafe trait Request {}
// SAFETY: the layout is that of `struct ethtool_value`, which both commands below use.
unsafe impl Request for Value {}
// SAFETY: the layout is that of `struct ethtool_channels`.
unsafe impl Request for RawChannels {}

/// Makes one request about an interface of the calling thread's namespace.
fn request<T: Request>(name: &str, doing: &str, data: &mut T) -> Result<(), Error> {
    let doing = || format!("{doing} of {name}");
    let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
        .map_err(Error::system(doing()))?;
    // SAFETY: `ifreq` is plain data, for which all zeroes is a value.
    let mut ifreq: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero, as the kernel wants it.
    let room = ifreq.ifr_name.len() - 1;
    for (to, from) in ifreq.ifr_name[..room].iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    ifreq.ifr_ifru.ifru_data = std::ptr::from_mut(data).cast();
    // SAFETY: `ifreq` and what it points to are live and exclusively ours for the call, and by
    // `Request` large enough for what the kernel writes.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL as _, &raw mut ifreq) };
    if result < 0 { Err(Error::last_os(doing())) } else { Ok(()) }
}

/// Switches generic receive offload.
pub(crate) fn set_gro(name: &str, on: bool) -> Result<(), Error> {
    request(name, "switching GRO", &mut Value { cmd: ETHTOOL_SGRO, data: on.into() })
}

/// Switches whether senders of the stack leave checksums to the device.
pub(crate) fn set_tx_checksum(name: &str, on: bool) -> Result<(), Error> {
    request(name, "switching TX checksum offload", &mut Value { cmd: ETHTOOL_STXCSUM, data: on.into() })
}

fn raw_channels(name: &str) -> Result<RawChannels, Error> {
    let mut raw = RawChannels { cmd: ETHTOOL_GCHANNELS, ..Default::default() };
    request(name, "reading the queues", &mut raw)?;
    Ok(raw)
}

/// The queues in use.
pub(crate) fn channels(name: &str) -> Result<Channels, Error> {
    let raw = raw_channels(name)?;
    Ok(Channels { rx: raw.rx_count + raw.combined_count, tx: raw.tx_count + raw.combined_count })
}

/// Changes how many queues are in use, of an interface whose queues receive or send, but not both.
pub(crate) fn set_channels(name: &str, channels: Channels) -> Result<(), Error> {
    let raw = raw_channels(name)?;
    let mut raw = RawChannels { cmd: ETHTOOL_SCHANNELS, rx_count: channels.rx, tx_count: channels.tx, ..raw };
    request(name, "changing the queues", &mut raw)
}
