fn forge(frame: xsk::Frame) -> xsk::Packet {
    xsk::Packet { frame, len: 9999, offset: 0, options: 0 }
}

fn main() {}
