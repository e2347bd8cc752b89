fn make() -> xsk::Packet {
    Default::default()
}

fn main() {}
