fn send(tx: &mut xsk::TxRing, packet: xsk::Packet) {
    let mut slots = tx.reserve(2);
    let _ = slots.push(packet);
    let _ = slots.push(packet);
}

fn main() {}
