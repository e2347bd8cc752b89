//! A program of the library's on a wrapped kernel, and what must hold of its frames.
#![allow(dead_code, unreachable_pub, reason = "each test file uses a part of this module")]

use std::collections::HashSet;

use xsk::socket::RxTx;
use xsk::umem::Census;
use xsk::xdp::{AttachMode, DefaultProgram};
use xsk::{Device, Frame, Packet, Pool, Socket, Umem};
use xsk_sim::Sim;
use xsk_sim::wrap::{Builder, Wrapper};

pub const FRAMES: u32 = 16;
pub const CHUNK: u32 = 2048;

/// A packet that a device takes.
pub const PACKET: [u8; 60] = [7; 60];

#[derive(Debug)]
/// A socket on `sim0` that receives and sends, on a wrapped kernel.
pub struct Bed {
    pub xsk: RxTx,
    pub program: DefaultProgram,
    pub pool: Pool,
    pub umem: Umem,
    pub device: Device,
    pub wrapper: Wrapper,
    pub sim: Sim,
    /// Where the UMEM starts.
    base: usize,
}

/// What a program can hold.
#[derive(Debug)]
pub enum Held {
    Frame(Frame),
    Packet(Packet),
}

impl Held {
    pub fn index(&self, umem: &Umem) -> u32 {
        match self {
            Self::Frame(frame) => umem.index(frame),
            Self::Packet(packet) => umem.index_of(packet),
        }
        .expect("a frame of this UMEM")
    }
}

impl From<Held> for Frame {
    fn from(held: Held) -> Self {
        match held {
            Held::Frame(frame) => frame,
            Held::Packet(packet) => packet.into_frame(),
        }
    }
}

/// Where the memory of a UMEM starts, as the packets of its first chunk tell.
fn base(umem: &Umem, pool: &mut Pool) -> usize {
    let packets: Vec<_> = std::iter::from_fn(|| pool.packet(0, 1)).collect();
    let first = packets.iter().find(|packet| umem.index_of(packet) == Some(0)).expect("a full pool");
    let base = first.as_ptr().addr();
    packets.into_iter().rev().for_each(|packet| pool.put(packet));
    base
}

impl Bed {
    /// Rings of 16, a UMEM of 16 frames of 2048 bytes, all of them in the pool.
    pub fn new(wrap: impl FnOnce(Builder) -> Builder, ledger: bool) -> Self {
        Self::with(wrap, ledger, |xsk| xsk)
    }

    pub fn with(
        wrap: impl FnOnce(Builder) -> Builder,
        ledger: bool,
        socket: impl FnOnce(xsk::socket::SocketBuilder<'static>) -> xsk::socket::SocketBuilder<'static>,
    ) -> Self {
        let sim = Sim::new();
        let wrapper = wrap(Wrapper::around(sim.kernel())).build();
        let device = Device::open_on(wrapper.kernel(), "sim0").unwrap();
        let (umem, mut pool) =
            Umem::builder().frames(FRAMES).chunk_size(CHUNK).ledger(ledger).build().unwrap();
        let base = base(&umem, &mut pool);
        let xsk = socket(Socket::builder(&device).ring_size(16)).open(&umem).unwrap();
        let program = DefaultProgram::attach(&device, AttachMode::Native).unwrap();
        program.insert(&xsk.socket).unwrap();
        Self { xsk, program, pool, umem, device, wrapper, sim, base }
    }

    /// A packet comes in from the wire, as far as it can.
    pub fn inject(&self) {
        self.wrapper.pump();
        self.sim.inject("sim0", &PACKET).unwrap();
        self.sim.run();
        self.wrapper.pump();
    }

    /// Puts packets into TX, and sends once; returns how many there were frames and room for.
    pub fn transmit(&mut self, n: u32) -> u32 {
        let mut sent = 0;
        let mut slots = self.xsk.tx.reserve(n);
        while slots.room() > 0 {
            let Some(mut packet) = self.pool.packet(0, 60) else { break };
            packet.copy_from_slice(&PACKET);
            slots.push(packet).unwrap();
            sent += 1;
        }
        drop(slots);
        let _ = self.xsk.socket.send().unwrap();
        sent
    }

    /// Takes all that RX and COMPLETION have.
    pub fn take(&mut self) -> Vec<Held> {
        let mut held: Vec<_> = self.xsk.rx.take(u32::MAX).map(Held::Packet).collect();
        held.extend(self.xsk.completion.take(u32::MAX).map(Held::Frame));
        held
    }

    /// Takes all that there is to be had, now and after further calls.
    pub fn take_all(&mut self) -> Vec<Held> {
        let mut held = Vec::new();
        // An index that is wild is true again at the call after the next.
        for _ in 0..4 {
            self.xsk.socket.wake_rx().unwrap();
            held.extend(self.take());
        }
        held
    }

    /// Every packet's bytes are in one chunk of the UMEM.
    pub fn assert_inside(&self, held: &[Held]) {
        for held in held {
            let index = held.index(&self.umem) as usize;
            assert!(index < FRAMES as usize);
            if let Held::Packet(packet) = held {
                let start = packet.as_ptr().addr() - self.base;
                let end = start + packet.len();
                let chunk = CHUNK as usize;
                assert!(!packet.is_empty());
                assert!(start / chunk == index && end <= (index + 1) * chunk, "{start}..{end}");
            }
        }
    }

    /// No frame is there twice: not among those that are held, and not in the pool or the depot. And
    /// the census says how many they are.
    pub fn assert_unique(&mut self, held: &[Held]) -> Census {
        let mut elsewhere: Vec<Frame> = std::iter::from_fn(|| self.pool.take()).collect();
        let in_pool = elsewhere.len();
        let mut depot = self.umem.pool();
        depot.fetch(usize::MAX);
        let in_depot = depot.len();
        elsewhere.extend(std::iter::from_fn(|| depot.take()));
        let mut seen = HashSet::new();
        let all = held.iter().map(|held| held.index(&self.umem));
        for index in all.chain(elsewhere.iter().map(|frame| self.umem.index(frame).unwrap())) {
            assert!(seen.insert(index), "frame {index} is there twice");
        }
        elsewhere.drain(in_pool..).for_each(|frame| depot.put(frame));
        drop(depot);
        elsewhere.into_iter().rev().for_each(|frame| self.pool.put(frame));

        let census = self.umem.census();
        let counted = (census.pools as usize, census.depot as usize, census.program);
        assert_eq!(counted, (in_pool, in_depot, held.len() as i64), "{census:?}");
        if let Some(ledger) = census.ledger_held {
            assert_eq!(ledger as usize, seen.len(), "{census:?}");
        }
        census
    }

    /// Puts everything back into the pool.
    pub fn put(&mut self, held: Vec<Held>) {
        self.pool.extend(held.into_iter().map(Frame::from));
    }

    /// Another socket in place of this one. Frames that it had in FILL, TX or the kernel are lost;
    /// or they are reclaimed.
    pub fn reopen(self, reclaim: bool) -> Self {
        let Self { xsk, program, mut pool, umem, device, wrapper, sim, base } = self;
        drop(xsk);
        sim.run();
        if reclaim {
            drop(pool);
            // SAFETY: the simulated kernel has released the only socket of this UMEM.
            unsafe { umem.reclaim() };
            pool = umem.pool();
            pool.fetch(usize::MAX);
        }
        let xsk = Socket::builder(&device).ring_size(16).open(&umem).unwrap();
        program.insert(&xsk.socket).unwrap();
        Self { xsk, program, pool, umem, device, wrapper, sim, base }
    }

    /// Closes everything, and reclaims what the kernel never gave back: every frame is there once.
    pub fn close(self, held: Vec<Held>) {
        let Self { xsk, program, pool, umem, sim, .. } = self;
        drop((xsk, program, pool, held));
        sim.run();
        let census = umem.census();
        assert_eq!(census.contradiction(), None);
        assert_eq!((census.depot + census.retired, census.program), (FRAMES, 0), "{census:?}");
        // SAFETY: the simulated kernel has released the only sockets of this UMEM.
        let reclaimed = unsafe { umem.reclaim() };
        assert_eq!(reclaimed, census.retired);
        let mut pool = umem.pool();
        assert_eq!(pool.fetch(usize::MAX), FRAMES as usize);
        let indices: HashSet<_> =
            std::iter::from_fn(|| pool.take()).map(|frame| umem.index(&frame)).collect();
        assert_eq!(indices.len(), FRAMES as usize);
    }
}
