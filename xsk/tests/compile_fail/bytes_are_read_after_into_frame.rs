fn read(packet: xsk::Packet) -> u8 {
    let _frame = packet.into_frame();
    packet[0]
}

fn main() {}
