fn copy(mut packet: xsk::Packet) {
    let (a, b) = (&mut packet[..1], &mut packet[1..]);
    a.copy_from_slice(b);
}

fn main() {}
