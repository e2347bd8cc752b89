use xsk::ring::{Producer, RingMemory};

fn make(memory: RingMemory<u64>) -> Producer<u64> {
    Producer::new(memory)
}

fn main() {}
