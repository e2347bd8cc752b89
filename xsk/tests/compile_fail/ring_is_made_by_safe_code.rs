use std::sync::Arc;
use xsk::{abi::Descriptor, ring::RingMemory, umem::Pair};

fn make(memory: RingMemory<Descriptor>, pair: &Arc<Pair>) -> xsk::RxRing {
    xsk::RxRing::over(memory, pair)
}

fn main() {}
