//! A registered UMEM: the kernel's checks, and its reach into the program's memory.
//!
//! Bytes are copied in and out through raw pointers. No reference to the memory is ever made: the
//! program holds the frames next to it.

use xsk::abi::{
    Descriptor, UMEM_REG_V1_SIZE, UmemFlags, UmemReg, XDP_PACKET_HEADROOM, XDP_TX_METADATA,
    XDP_UMEM_MIN_CHUNK_SIZE,
};
use xsk::kernel::{Errno, Mapping};

use crate::PAGE_SIZE;

/// What Linux keeps free at the end of a chunk: `skb_shared_info` of 17 fragments on x86-64.
const SKB_TAIL_ROOM: u32 = 320;
/// The smallest frame that Linux leaves of a chunk.
const MIN_FRAME_ROOM: u32 = 128;

/// Memory that a program registered, held for as long as a socket or a pool uses it.
#[derive(Debug)]
pub(crate) struct Umem {
    memory: Mapping,
    /// Where in the mapping the UMEM starts.
    start: usize,
    size: u64,
    chunk_size: u32,
    headroom: u32,
}

impl Umem {
    /// `XDP_UMEM_REG`, without what depends on the socket's state.
    pub(crate) fn register(registration: &UmemReg, optlen: usize, memory: &Mapping) -> Result<Self, Errno> {
        let mut reg = *registration;
        if optlen < size_of::<UmemReg>() {
            debug_assert!(optlen >= UMEM_REG_V1_SIZE, "checked before");
            (reg.flags, reg.tx_metadata_len) = (0, 0);
        }
        let known = UmemFlags::UNALIGNED_CHUNK | UmemFlags::TX_SW_CSUM | UmemFlags::TX_METADATA_LEN;
        let flags = UmemFlags::from_bits_retain(reg.flags);
        let unaligned = flags.contains(UmemFlags::UNALIGNED_CHUNK);
        let chunk = reg.chunk_size;
        if chunk < XDP_UMEM_MIN_CHUNK_SIZE || chunk as usize > PAGE_SIZE {
            return Err(Errno::INVAL);
        }
        if !known.contains(flags) {
            return Err(Errno::INVAL);
        }
        if !unaligned && !chunk.is_power_of_two() {
            return Err(Errno::INVAL);
        }
        if !reg.addr.is_multiple_of(PAGE_SIZE as u64) || reg.addr.checked_add(reg.len).is_none() {
            return Err(Errno::INVAL);
        }
        if reg.len.div_ceil(PAGE_SIZE as u64) > u64::from(u32::MAX) {
            return Err(Errno::INVAL);
        }
        let chunks = reg.len / u64::from(chunk);
        if chunks == 0 || chunks > u64::from(u32::MAX) {
            return Err(Errno::INVAL);
        }
        if !unaligned && !reg.len.is_multiple_of(u64::from(chunk)) {
            return Err(Errno::INVAL);
        }
        if reg.headroom > chunk - XDP_PACKET_HEADROOM - SKB_TAIL_ROOM - MIN_FRAME_ROOM {
            return Err(Errno::INVAL);
        }
        if flags.contains(UmemFlags::TX_METADATA_LEN)
            && (reg.tx_metadata_len >= 256 || !reg.tx_metadata_len.is_multiple_of(8))
        {
            return Err(Errno::INVAL);
        }
        if !flags.is_empty() {
            return Err(Errno::OPNOTSUPP);
        }
        // Linux finds out while it pins the pages.
        let (addr, size) = (usize::try_from(reg.addr), usize::try_from(reg.len));
        let (Ok(addr), Ok(size)) = (addr, size) else { return Err(Errno::FAULT) };
        let start = addr.checked_sub(memory.base().addr().get()).ok_or(Errno::FAULT)?;
        let end = start.checked_add(size).ok_or(Errno::FAULT)?;
        if end > memory.len() {
            return Err(Errno::FAULT);
        }
        Ok(Self { memory: memory.clone(), start, size: reg.len, chunk_size: chunk, headroom: reg.headroom })
    }

    /// The longest packet that a frame holds, in bytes.
    pub(crate) fn frame_room(&self) -> usize {
        (self.chunk_size - self.headroom - XDP_PACKET_HEADROOM) as usize
    }

    /// Where in the UMEM a packet starts that is received into `chunk`.
    pub(crate) fn packet_address(&self, chunk: u64) -> u64 {
        chunk + u64::from(XDP_PACKET_HEADROOM + self.headroom)
    }

    /// The chunk that an entry of FILL names, if it names one.
    pub(crate) fn chunk(&self, addr: u64) -> Option<u64> {
        let chunk = addr & !u64::from(self.chunk_size - 1);
        (chunk < self.size).then_some(chunk)
    }

    /// Whether a descriptor of TX is one that Linux would send.
    ///
    /// One with `XDP_PKT_CONTD` is not, here: multi-buffer is not simulated.
    pub(crate) fn can_send(&self, desc: &Descriptor) -> bool {
        let offset = desc.addr & u64::from(self.chunk_size - 1);
        desc.len != 0
            && offset + u64::from(desc.len) <= u64::from(self.chunk_size)
            && desc.addr < self.size
            && desc.options & !XDP_TX_METADATA == 0
    }

    /// The bytes of a descriptor that [`can_send`](Self::can_send).
    pub(crate) fn read(&self, desc: &Descriptor) -> Vec<u8> {
        let mut bytes = vec![0; desc.len as usize];
        let from = self.at(desc.addr, bytes.len());
        // SAFETY: `at` has checked that the range lies in the mapping, which is readable; the
        // vector is new, so the two don't overlap.
        unsafe { core::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
        bytes
    }

    /// Writes a packet to `addr`.
    pub(crate) fn write(&self, addr: u64, bytes: &[u8]) {
        let to = self.at(addr, bytes.len());
        // SAFETY: `at` has checked that the range lies in the mapping, which is writable. The
        // frame came from FILL, so the program does not touch it now, and `bytes` is a packet in
        // memory of the simulator's.
        unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }

    fn at(&self, addr: u64, len: usize) -> *mut u8 {
        assert!(addr + len as u64 <= self.size, "{len} bytes at {addr} are not in a UMEM of {}", self.size);
        // SAFETY: `addr` is below the size, which `register` has found within the mapping.
        unsafe { self.memory.base().as_ptr().add(self.start + addr as usize) }
    }
}
