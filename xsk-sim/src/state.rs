//! Everything that the simulated kernel knows, under one lock, and the steps that it takes.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Weak};

use xsk::kernel::{Errno, InterfaceInfo, Numbered};
use xsk::xdp::asm::{XDP_PASS, XDP_REDIRECT, XDP_TX};

use crate::bpf::{Context, Program, XskMap};
use crate::files;
use crate::net::{Arrival, LinkId, Network};
use crate::pool::{Pool, PoolId};
use crate::socket::{Socket, SocketId};

/// What a descriptor stands for.
#[derive(Clone, Debug)]
pub(crate) enum Object {
    Socket(SocketId),
    Map(Arc<XskMap>),
    Program(Arc<Program>),
    /// A link, with its program, which it keeps when it has lost its device.
    Link(LinkId, Arc<Program>),
}

/// The state of one simulated kernel.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) net: Network,
    pub(crate) sockets: BTreeMap<SocketId, Socket>,
    pub(crate) pools: BTreeMap<PoolId, Pool>,
    /// Open descriptors.
    pub(crate) files: HashMap<RawFd, Object>,
    /// Watches over devices, by their descriptors.
    pub(crate) watches: HashMap<RawFd, Watched>,
    /// Descriptors of threads that sleep until something can happen. They are told once.
    pub(crate) sleepers: Vec<Arc<OwnedFd>>,
    /// Every map that lives: a socket that closes leaves them.
    pub(crate) maps: Vec<Weak<XskMap>>,
    /// Every program that lives, by number.
    pub(crate) programs: BTreeMap<u32, Weak<Program>>,
    /// Pools without a socket, whose queue is not yet free: Linux frees it from a work queue.
    releases: VecDeque<PoolId>,
    /// The last number that was given out.
    last: u64,
    /// Sockets and pools that are gone. They hold memory of the program's, whose owners are not
    /// to be dropped under the lock: they may call back.
    pub(crate) dead: Dead,
}

/// A device that is watched.
#[derive(Debug)]
pub(crate) struct Watched {
    index: u32,
    event: Arc<OwnedFd>,
    /// What there was to tell of the device when it was last looked at; `None` once it is gone.
    seen: Option<InterfaceInfo>,
    /// Something changed since the watch was last asked: its descriptor is readable.
    pub(crate) told: bool,
}

/// What was removed and waits to be dropped outside the lock.
#[derive(Debug, Default)]
pub(crate) struct Dead {
    sockets: Vec<Socket>,
    pools: Vec<Pool>,
}

impl State {
    /// A number that was never given out before.
    pub(crate) fn number(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    /// The socket of a handle, which exists for as long as the handle.
    pub(crate) fn socket(&mut self, id: SocketId) -> &mut Socket {
        self.sockets.get_mut(&id).expect("a socket lives as long as its file")
    }

    /// What lives under a number.
    pub(crate) fn numbered(&self, kind: Numbered, id: u32) -> Option<Object> {
        match kind {
            Numbered::Program => self.programs.get(&id)?.upgrade().map(Object::Program),
            Numbered::Map => {
                self.maps.iter().filter_map(Weak::upgrade).find(|map| map.id() == id).map(Object::Map)
            }
            Numbered::Link => {
                let is_it = |object: &&Object| matches!(object, Object::Link(link, _) if link.id() == id);
                self.files.values().find(is_it).cloned()
            }
        }
    }

    /// The map of an open descriptor.
    pub(crate) fn map(&self, fd: RawFd) -> Result<Arc<XskMap>, Errno> {
        match self.files.get(&fd) {
            Some(Object::Map(map)) => Ok(map.clone()),
            _ => Err(Errno::INVAL),
        }
    }

    /// A descriptor of an object is about to be closed.
    pub(crate) fn close(&mut self, fd: RawFd) {
        match self.files.remove(&fd) {
            Some(Object::Link(link, _)) => {
                let open = |object: &Object| matches!(object, Object::Link(other, _) if *other == link);
                if !self.files.values().any(open) {
                    for device in self.net.devices.values_mut() {
                        device.detach(link);
                    }
                }
            }
            // The socket itself may live on, by what was mapped of it.
            Some(Object::Socket(id)) => self.socket(id).event = None,
            Some(Object::Map(_) | Object::Program(_)) | None => {}
        }
        self.maps.retain(|map| map.strong_count() > 0);
        self.programs.retain(|_, program| program.strong_count() > 0);
    }

    /// Begins a watch over a device, which tells by the descriptor `event`.
    pub(crate) fn watch(&mut self, index: u32, event: Arc<OwnedFd>) -> Result<(), Errno> {
        let seen = Some(self.net.describe(index)?);
        self.watches.insert(event.as_raw_fd(), Watched { index, event, seen, told: false });
        Ok(())
    }

    /// Tells those who watch devices of what changed, and those who sleep that something can happen.
    pub(crate) fn tell(&mut self) {
        for watched in self.watches.values_mut() {
            let now = self.net.describe(watched.index).ok();
            if watched.seen != now {
                watched.seen = now;
                watched.told = true;
                files::signal(&watched.event);
            }
        }
        if self.can_step() {
            self.sleepers.drain(..).for_each(files::signal);
        }
    }

    /// Neither a descriptor nor a mapping of a socket is left.
    pub(crate) fn release_socket(&mut self, id: SocketId) {
        for map in self.maps.iter().filter_map(Weak::upgrade) {
            map.forget(id);
        }
        let Some(socket) = self.sockets.remove(&id) else { return };
        if let Some(pool) = socket.pool
            && !self.sockets.values().any(|other| other.pool == Some(pool))
        {
            self.releases.push_back(pool);
        }
        self.dead.sockets.push(socket);
    }

    /// Frees the queue of a pool that no socket uses.
    fn release_pool(&mut self, id: PoolId) {
        let Some(pool) = self.pools.remove(&id) else { return };
        if let Some(device) = self.net.devices.get_mut(&pool.device) {
            device.queues[usize::from(pool.queue)].pool = None;
        }
        self.dead.pools.push(pool);
    }

    /// Frees every queue that waits for it, as Linux does sooner or later.
    pub(crate) fn release_pools(&mut self) {
        while let Some(pool) = self.releases.pop_front() {
            self.release_pool(pool);
        }
    }

    /// Removes a device, and what was on it.
    pub(crate) fn remove_device(&mut self, index: u32) {
        self.net.devices.remove(&index);
        self.net.wire.retain(|arrival| arrival.device != index);
        for socket in self.sockets.values_mut() {
            socket.lose_device(index);
        }
    }

    /// Whether a step would have anything happen.
    fn can_step(&self) -> bool {
        !self.releases.is_empty() || !self.net.wire.is_empty() || self.net.is_resetting()
    }

    /// One thing happens; `false` when there is nothing to happen.
    pub(crate) fn step(&mut self) -> bool {
        let happened = if let Some(pool) = self.releases.pop_front() {
            self.release_pool(pool);
            true
        } else if let Some(arrival) = self.net.wire.pop_front() {
            self.arrive(arrival);
            true
        } else {
            false
        };
        // A link that is away for a number of steps is so during all of them.
        let resetting = self.net.step_resets();
        happened || resetting
    }

    /// A packet comes in from the wire.
    fn arrive(&mut self, arrival: Arrival) {
        let Arrival { device: ifindex, queue, mut packet } = arrival;
        let Some(device) = self.net.devices.get_mut(&ifindex).filter(|device| device.works()) else { return };
        let queue = device.queue_of(queue, &packet);
        let Some(program) = device.program() else {
            device.stack.push(packet);
            return;
        };
        let outcome = program.run(&mut packet, Context { ifindex, queue });
        match (outcome.verdict, outcome.target) {
            (XDP_PASS, _) => device.stack.push(packet),
            (XDP_TX, _) => {
                // What the device can't send is dropped.
                self.net.send(ifindex, queue, packet);
            }
            (XDP_REDIRECT, Some(socket)) => self.deliver(socket, ifindex, queue, &packet),
            // XDP_DROP; XDP_ABORTED and what is no verdict are traced on Linux as well.
            _ => {}
        }
    }
}
