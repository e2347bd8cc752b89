#![deny(unused_must_use)]

fn send(tx: &mut xsk::TxRing, packet: xsk::Packet) {
    tx.reserve(1).push(packet);
}

fn main() {}
