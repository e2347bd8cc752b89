fn send(tx: &mut xsk::TxRing, packet: xsk::Packet) -> u8 {
    let bytes: &[u8] = &packet;
    let _ = tx.reserve(1).push(packet);
    bytes[0]
}

fn main() {}
