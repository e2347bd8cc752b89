//! The kernel's AF_XDP interface as data: constants, structures and limits.
//!
//! Everything here mirrors `include/uapi/linux/if_xdp.h`, with the first kernel that has each item.
//! Nothing here calls anything.

use core::mem::size_of;

/// Address family of AF_XDP sockets (4.18).
pub const AF_XDP: u16 = 44;
/// Level of the AF_XDP socket options (4.18).
pub const SOL_XDP: i32 = 283;

/// Socket option: where the ring's fields are in a mapping (4.18; flags offsets since 5.4).
pub const XDP_MMAP_OFFSETS: i32 = 1;
/// Socket option: size of the RX ring, in descriptors (4.18).
pub const XDP_RX_RING: i32 = 2;
/// Socket option: size of the TX ring, in descriptors (4.18).
pub const XDP_TX_RING: i32 = 3;
/// Socket option: register a UMEM (4.18).
pub const XDP_UMEM_REG: i32 = 4;
/// Socket option: size of the FILL ring, in addresses (4.18).
pub const XDP_UMEM_FILL_RING: i32 = 5;
/// Socket option: size of the COMPLETION ring, in addresses (4.18).
pub const XDP_UMEM_COMPLETION_RING: i32 = 6;
/// Socket option: read the socket's counters (4.18).
pub const XDP_STATISTICS: i32 = 7;
/// Socket option: read what the socket became (5.3).
pub const XDP_OPTIONS: i32 = 8;
/// Socket option: how many packets one send may transmit in copy mode (6.17).
pub const XDP_MAX_TX_SKB_BUDGET: i32 = 9;

/// [`XDP_OPTIONS`]: the socket is in zero-copy mode (5.3).
pub const XDP_OPTIONS_ZEROCOPY: u32 = 1 << 0;

/// Mapping offset of the RX ring.
pub const XDP_PGOFF_RX_RING: u64 = 0;
/// Mapping offset of the TX ring.
pub const XDP_PGOFF_TX_RING: u64 = 0x8000_0000;
/// Mapping offset of the FILL ring.
pub const XDP_UMEM_PGOFF_FILL_RING: u64 = 0x1_0000_0000;
/// Mapping offset of the COMPLETION ring.
pub const XDP_UMEM_PGOFF_COMPLETION_RING: u64 = 0x1_8000_0000;

/// Bit of a ring's flags word: the kernel must be woken (5.4).
pub const XDP_RING_NEED_WAKEUP: u32 = 1 << 0;

/// Bit of a descriptor's options: the packet continues in the next descriptor (6.6).
pub const XDP_PKT_CONTD: u32 = 1 << 0;
/// Bit of a descriptor's options: TX metadata stands in front of the packet (6.8).
pub const XDP_TX_METADATA: u32 = 1 << 1;

/// In unaligned mode the upper bits of an address hold an offset: this many bits below it (5.4).
pub const XSK_UNALIGNED_BUF_OFFSET_SHIFT: u32 = 48;
/// The bits of an address that say where in the UMEM (5.4).
pub const XSK_UNALIGNED_BUF_ADDR_MASK: u64 = (1 << XSK_UNALIGNED_BUF_OFFSET_SHIFT) - 1;

/// Room that the kernel keeps in front of every received packet, in bytes.
pub const XDP_PACKET_HEADROOM: u32 = 256;
/// The smallest chunk that the kernel takes, in bytes. The largest is the page size.
pub const XDP_UMEM_MIN_CHUNK_SIZE: u32 = 2048;
/// Packets that one send transmits in copy mode unless told otherwise, and the least that it can be
/// told.
pub const TX_BATCH_SIZE: u32 = 32;

bitflags::bitflags! {
    /// Flags of `bind` ([`SockaddrXdp::flags`]).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct BindFlags: u16 {
        /// Use the UMEM of another socket (4.18 on the same queue, 5.10 across queues and devices).
        const SHARED_UMEM = 1 << 0;
        /// Copy packets, also where the driver could do without (4.18).
        const COPY = 1 << 1;
        /// Zero copy or fail (4.18).
        const ZEROCOPY = 1 << 2;
        /// Keep the rings' need_wakeup flags (5.4).
        const USE_NEED_WAKEUP = 1 << 3;
        /// Packets may span several descriptors (6.6).
        const USE_SG = 1 << 4;
        /// Anything that a caller wishes to try on the kernel.
        const _ = !0;
    }

    /// Flags of a UMEM registration ([`UmemReg::flags`]).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct UmemFlags: u32 {
        /// Chunks of any size, frames at any place (5.4).
        const UNALIGNED_CHUNK = 1 << 0;
        /// The kernel computes requested checksums in software (6.8).
        const TX_SW_CSUM = 1 << 1;
        /// `tx_metadata_len` is valid (6.11).
        const TX_METADATA_LEN = 1 << 2;
        /// Anything that a caller wishes to try on the kernel.
        const _ = !0;
    }

    /// XDP features of a driver, from netlink family `netdev` (6.3).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct XdpFeatures: u64 {
        /// Programs run in the driver (`XDP_PASS`, `XDP_DROP`, `XDP_TX`, `XDP_ABORTED`).
        const BASIC = 1 << 0;
        /// `XDP_REDIRECT` works from this device.
        const REDIRECT = 1 << 1;
        /// Other devices can redirect to this one.
        const NDO_XMIT = 1 << 2;
        /// AF_XDP zero copy.
        const XSK_ZEROCOPY = 1 << 3;
        /// Hardware offload.
        const HW_OFFLOAD = 1 << 4;
        /// Multi-buffer on receive.
        const RX_SG = 1 << 5;
        /// Multi-buffer in redirects to this device.
        const NDO_XMIT_SG = 1 << 6;
        /// Bits of newer kernels.
        const _ = !0;
    }
}

/// One of the four rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RingKind {
    /// Free frames, from the program to the kernel.
    Fill,
    /// Received packets, from the kernel to the program.
    Rx,
    /// Packets to send, from the program to the kernel.
    Tx,
    /// Sent frames, from the kernel back to the program.
    Completion,
}

impl RingKind {
    /// The socket option that sizes this ring.
    pub const fn option(self) -> i32 {
        match self {
            Self::Rx => XDP_RX_RING,
            Self::Tx => XDP_TX_RING,
            Self::Fill => XDP_UMEM_FILL_RING,
            Self::Completion => XDP_UMEM_COMPLETION_RING,
        }
    }

    /// The offset at which this ring is mapped.
    pub const fn page_offset(self) -> u64 {
        match self {
            Self::Rx => XDP_PGOFF_RX_RING,
            Self::Tx => XDP_PGOFF_TX_RING,
            Self::Fill => XDP_UMEM_PGOFF_FILL_RING,
            Self::Completion => XDP_UMEM_PGOFF_COMPLETION_RING,
        }
    }

    /// Bytes of one entry: 16 for descriptors (RX, TX), 8 for addresses (FILL, COMPLETION).
    pub const fn entry_size(self) -> usize {
        match self {
            Self::Rx | Self::Tx => size_of::<Descriptor>(),
            Self::Fill | Self::Completion => size_of::<u64>(),
        }
    }

    /// The ring's name as the kernel's documentation writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rx => "RX",
            Self::Tx => "TX",
            Self::Fill => "FILL",
            Self::Completion => "COMPLETION",
        }
    }
}

impl core::fmt::Display for RingKind {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.name())
    }
}

/// `struct xdp_desc`: one entry of the RX and TX rings, 16 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Descriptor {
    /// Bytes from the start of the UMEM (unaligned mode: an offset in the upper 16 bits).
    pub addr: u64,
    /// Bytes of packet.
    pub len: u32,
    /// [`XDP_PKT_CONTD`], [`XDP_TX_METADATA`].
    pub options: u32,
}

/// `struct sockaddr_xdp`, 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct SockaddrXdp {
    /// [`AF_XDP`].
    pub family: u16,
    /// [`BindFlags`].
    pub flags: u16,
    /// Index of the interface.
    pub ifindex: u32,
    /// The queue. The kernel keeps the lower 16 bits and ignores the rest.
    pub queue_id: u32,
    /// With [`BindFlags::SHARED_UMEM`], a socket that has the UMEM.
    pub shared_umem_fd: u32,
}

/// `struct xdp_umem_reg`, 32 bytes (24 before 6.8, without the last two fields).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct UmemReg {
    /// Start of the memory, page-aligned.
    pub addr: u64,
    /// Bytes of memory.
    pub len: u64,
    /// Bytes of a chunk.
    pub chunk_size: u32,
    /// Bytes that the kernel leaves free in front of a received packet, besides its own 256.
    pub headroom: u32,
    /// [`UmemFlags`].
    pub flags: u32,
    /// Bytes of metadata in front of every packet to send.
    pub tx_metadata_len: u32,
}

/// Size of [`UmemReg`] as kernels before 6.8 know it, in bytes.
pub const UMEM_REG_V1_SIZE: usize = 24;

/// `struct xdp_ring_offset`: where a ring's fields are in its mapping, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct RingOffset {
    /// The producer's index.
    pub producer: u64,
    /// The consumer's index.
    pub consumer: u64,
    /// The entries.
    pub desc: u64,
    /// The flags word (5.4).
    pub flags: u64,
}

/// `struct xdp_mmap_offsets`, 128 bytes (96 before 5.4, without the flags).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct MmapOffsets {
    /// RX ring.
    pub rx: RingOffset,
    /// TX ring.
    pub tx: RingOffset,
    /// FILL ring.
    pub fr: RingOffset,
    /// COMPLETION ring.
    pub cr: RingOffset,
}

/// Size of [`MmapOffsets`] as kernels before 5.4 answer it, in bytes.
pub const MMAP_OFFSETS_V1_SIZE: usize = 96;

/// `struct xdp_statistics`, 48 bytes (24 before 5.9: the first three).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct XdpStatistics {
    /// Packets dropped: FILL empty, packet longer than a frame.
    pub rx_dropped: u64,
    /// Always 0: the kernel reads it from the RX ring, which has no invalid descriptors.
    pub rx_invalid_descs: u64,
    /// Descriptors in TX that the kernel refused.
    pub tx_invalid_descs: u64,
    /// Packets dropped because RX was full (5.9).
    pub rx_ring_full: u64,
    /// Packets dropped because FILL was empty (5.9).
    pub rx_fill_ring_empty_descs: u64,
    /// Times that a send drained TX (5.9).
    pub tx_ring_empty_descs: u64,
}

/// Size of [`XdpStatistics`] as kernels before 5.9 answer it, in bytes.
pub const STATISTICS_V1_SIZE: usize = 24;

/// A structure of the ABI as the bytes that a system call takes.
///
/// # Safety
///
/// The type is `repr(C)`, has no padding, and any bytes are a valid value of it.
pub unsafe trait Plain: Copy + Default {}

// SAFETY: integers only, sizes add up without padding.
unsafe impl Plain for UmemReg {}
// SAFETY: as above.
unsafe impl Plain for MmapOffsets {}
// SAFETY: as above.
unsafe impl Plain for XdpStatistics {}
// SAFETY: as above.
unsafe impl Plain for u32 {}

/// The bytes of a plain value.
pub fn bytes_of<T: Plain>(value: &T) -> &[u8] {
    // SAFETY: `T` is plain: every byte of it is initialised.
    unsafe { core::slice::from_raw_parts((value as *const T).cast(), size_of::<T>()) }
}

/// The bytes of a plain value, to be written.
pub fn bytes_of_mut<T: Plain>(value: &mut T) -> &mut [u8] {
    // SAFETY: `T` is plain: any bytes are a valid value.
    unsafe { core::slice::from_raw_parts_mut((value as *mut T).cast(), size_of::<T>()) }
}

const _: () = {
    assert!(size_of::<Descriptor>() == 16);
    assert!(size_of::<SockaddrXdp>() == 16);
    assert!(size_of::<UmemReg>() == 32);
    assert!(size_of::<RingOffset>() == 32);
    assert!(size_of::<MmapOffsets>() == 128);
    assert!(size_of::<XdpStatistics>() == 48);
};
