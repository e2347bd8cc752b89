fn twice(frame: xsk::Frame) -> (xsk::Frame, xsk::Frame) {
    (frame.clone(), frame)
}

fn main() {}
