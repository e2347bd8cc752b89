//! A raw AF_XDP program: sockets and rings through the contract's traits, and nothing between.
#![allow(dead_code, unreachable_pub, reason = "each test file uses a part of this module")]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;

use xsk::abi::{
    AF_XDP, BindFlags, Descriptor, MmapOffsets, RingKind, SOL_XDP, SockaddrXdp, UmemReg, XDP_MMAP_OFFSETS,
    XDP_STATISTICS, XdpStatistics, bytes_of_mut,
};
use xsk::kernel::{Errno, Handle, Insn, Kernel, MapSpec, Mapping, ProgramSpec, RawSocket};
use xsk::ring::{Consumer, Producer, RingMemory};
use xsk::xdp::asm::{self, Reg, Width};

pub const SOCK_RAW: i32 = 3;
pub const XSKMAP: u32 = 17;

struct Pages {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: an allocation and its layout.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `pages`.
        unsafe { dealloc(self.base.as_ptr(), self.layout) }
    }
}

/// Page-aligned, zeroed memory.
pub fn pages(bytes: usize) -> Mapping {
    let layout = Layout::from_size_align(bytes, 4096).expect("a size that fits memory");
    // SAFETY: no test asks for 0 bytes.
    let base = NonNull::new(unsafe { alloc_zeroed(layout) }).expect("memory");
    // SAFETY: the owner frees the memory, and nobody else does.
    unsafe { Mapping::new(base, bytes, Arc::new(Pages { base, layout })) }
}

/// A registration of all of `memory` in chunks of 4096 bytes.
pub fn registration(memory: &Mapping) -> UmemReg {
    UmemReg {
        addr: memory.base().as_ptr().addr() as u64,
        len: memory.len() as u64,
        chunk_size: 4096,
        ..UmemReg::default()
    }
}

pub fn socket(kernel: &dyn Kernel) -> Box<dyn RawSocket> {
    kernel.socket(SOCK_RAW, 0).expect("an AF_XDP socket")
}

pub fn set(socket: &dyn RawSocket, name: i32, value: u32) -> Result<(), Errno> {
    socket.setsockopt(SOL_XDP, name, &value.to_ne_bytes())
}

/// The address that binds to a queue.
pub fn address(ifindex: u32, queue_id: u32, flags: BindFlags) -> SockaddrXdp {
    SockaddrXdp { family: AF_XDP, flags: flags.bits(), ifindex, queue_id, shared_umem_fd: 0 }
}

pub fn statistics(socket: &dyn RawSocket) -> XdpStatistics {
    let mut statistics = XdpStatistics::default();
    let known = socket.getsockopt(SOL_XDP, XDP_STATISTICS, bytes_of_mut(&mut statistics));
    assert_eq!(known, Ok(48));
    statistics
}

/// Maps a ring by the offsets that the kernel tells.
pub fn map_ring<T: Copy>(socket: &dyn RawSocket, kind: RingKind, entries: u32) -> RingMemory<T> {
    let mut all = MmapOffsets::default();
    assert_eq!(socket.getsockopt(SOL_XDP, XDP_MMAP_OFFSETS, bytes_of_mut(&mut all)), Ok(128));
    let at = match kind {
        RingKind::Fill => all.fr,
        RingKind::Rx => all.rx,
        RingKind::Tx => all.tx,
        RingKind::Completion => all.cr,
    };
    let length = at.desc as usize + entries as usize * kind.entry_size();
    let mapping = socket.map(kind.page_offset(), length).expect("a ring that was made");
    let base = mapping.base();
    // SAFETY: the mapping has the ring's fields at these offsets, and owns them.
    unsafe {
        RingMemory::new(
            base.add(at.producer as usize).cast(),
            base.add(at.consumer as usize).cast(),
            base.add(at.flags as usize).cast(),
            base.add(at.desc as usize).cast(),
            entries,
            mapping.owner().clone(),
        )
    }
}

/// What a [`Port`] is made of.
#[derive(Clone, Copy)]
pub struct Config {
    pub frames: u32,
    pub chunk: u32,
    pub headroom: u32,
    pub fill: u32,
    pub completion: u32,
    pub rx: u32,
    pub tx: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self { frames: 16, chunk: 4096, headroom: 0, fill: 16, completion: 16, rx: 16, tx: 16 }
    }
}

/// A bound socket with its rings and memory. The rings go before the socket, as they should.
pub struct Port {
    pub fill: Producer<u64>,
    pub completion: Consumer<u64>,
    pub rx: Consumer<Descriptor>,
    pub tx: Producer<Descriptor>,
    pub memory: Mapping,
    pub socket: Box<dyn RawSocket>,
}

impl Port {
    /// A socket with all four rings on queue 0 of a device.
    pub fn open(kernel: &dyn Kernel, device: &str, config: Config) -> Self {
        let port = Self::unbound(kernel, config);
        let ifindex = kernel.index_of(device).expect("a device");
        port.socket.bind(&address(ifindex, 0, BindFlags::COPY)).expect("a free queue");
        port
    }

    pub fn unbound(kernel: &dyn Kernel, config: Config) -> Self {
        let socket = socket(kernel);
        let memory = pages((config.frames * config.chunk) as usize);
        let registration =
            UmemReg { chunk_size: config.chunk, headroom: config.headroom, ..registration(&memory) };
        socket.register_umem(&registration, 32, &memory).expect("a good UMEM");
        let sizes = [
            (RingKind::Fill, config.fill),
            (RingKind::Completion, config.completion),
            (RingKind::Rx, config.rx),
            (RingKind::Tx, config.tx),
        ];
        for (kind, entries) in sizes {
            set(&*socket, kind.option(), entries).expect("a ring");
        }
        // SAFETY: each ring is mapped once, and its program's side is worked by this port alone.
        unsafe {
            Self {
                fill: Producer::new(map_ring(&*socket, RingKind::Fill, config.fill)),
                completion: Consumer::new(map_ring(&*socket, RingKind::Completion, config.completion)),
                rx: Consumer::new(map_ring(&*socket, RingKind::Rx, config.rx)),
                tx: Producer::new(map_ring(&*socket, RingKind::Tx, config.tx)),
                memory,
                socket,
            }
        }
    }

    /// Puts addresses into FILL.
    pub fn refill(&mut self, addresses: impl IntoIterator<Item = u64>) {
        for address in addresses {
            assert!(self.fill.reserve(1).push(address), "FILL is full");
        }
    }

    /// Puts a descriptor into TX.
    pub fn queue(&mut self, addr: u64, len: u32, options: u32) {
        assert!(self.tx.reserve(1).push(Descriptor { addr, len, options }), "TX is full");
    }

    /// Writes a packet into the UMEM and queues it.
    pub fn queue_packet(&mut self, addr: u64, bytes: &[u8]) {
        self.write(addr, bytes);
        self.queue(addr, bytes.len() as u32, 0);
    }

    pub fn write(&mut self, addr: u64, bytes: &[u8]) {
        assert!(addr as usize + bytes.len() <= self.memory.len());
        // SAFETY: in the memory, and the tests write only to frames that the kernel does not hold.
        unsafe {
            let to = self.memory.base().as_ptr().add(addr as usize);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
    }

    pub fn read(&self, addr: u64, len: u32) -> Vec<u8> {
        assert!(addr as usize + len as usize <= self.memory.len());
        let mut bytes = vec![0; len as usize];
        // SAFETY: in the memory, and nothing writes to it while no call is under way.
        unsafe {
            let from = self.memory.base().as_ptr().add(addr as usize);
            std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len());
        }
        bytes
    }

    /// Takes everything from RX: descriptors with their bytes.
    pub fn received(&mut self) -> Vec<(Descriptor, Vec<u8>)> {
        let descriptors: Vec<_> = self.rx.take(u32::MAX).collect();
        descriptors.into_iter().map(|desc| (desc, self.read(desc.addr, desc.len))).collect()
    }

    /// Takes everything from COMPLETION.
    pub fn completed(&mut self) -> Vec<u64> {
        self.completion.take(u32::MAX).collect()
    }

    pub fn statistics(&self) -> XdpStatistics {
        statistics(&*self.socket)
    }
}

/// A packet of `len` bytes that differs from others by `seed`.
pub fn packet(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

pub fn xskmap(kernel: &dyn Kernel, max_entries: u32) -> Handle {
    let spec = MapSpec { kind: XSKMAP, key_size: 4, value_size: 4, max_entries, flags: 0, name: "xsks" };
    kernel.create_map(&spec).expect("an XSKMAP")
}

pub fn enter(kernel: &dyn Kernel, map: &Handle, key: u32, socket: &dyn RawSocket) -> Result<(), Errno> {
    let fd = socket.as_fd().as_raw_fd();
    kernel.update_map((**map).as_fd(), &key.to_ne_bytes(), &fd.to_ne_bytes(), 0)
}

/// Loads a program; on refusal, the errno and what the log says.
pub fn load(kernel: &dyn Kernel, instructions: &[Insn]) -> Result<Handle, (Errno, String)> {
    let mut log = String::new();
    let spec = ProgramSpec { instructions, flags: 0, name: "test" };
    kernel.load_program(&spec, &mut log).map_err(|errno| (errno, log))
}

/// `return bpf_redirect_map(&map, ctx->rx_queue_index, flags)`.
pub fn redirect(map: &Handle, flags: i32) -> Vec<Insn> {
    let mut program = vec![asm::load(Width::W, Reg::R2, Reg::R1, asm::XDP_MD_RX_QUEUE_INDEX)];
    program.extend(asm::load_map(Reg::R1, (**map).as_fd().as_raw_fd()));
    program.extend([
        asm::alu_imm(asm::Alu::Mov, Reg::R3, flags),
        asm::call(asm::FN_REDIRECT_MAP),
        asm::exit(),
    ]);
    program
}

/// A program that gives every packet to `socket`, attached to a device. Dropping it detaches.
pub struct Steered {
    _link: Handle,
    _program: Handle,
    pub map: Handle,
}

pub fn steer(kernel: &dyn Kernel, device: &str, socket: &dyn RawSocket) -> Steered {
    let map = xskmap(kernel, 1);
    enter(kernel, &map, 0, socket).expect("an entry");
    let program = load(kernel, &redirect(&map, 0)).expect("a good program");
    let ifindex = kernel.index_of(device).expect("a device");
    let link = kernel.attach((*program).as_fd(), ifindex, 0).expect("a device without a program");
    Steered { _link: link, _program: program, map }
}
