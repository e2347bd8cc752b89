fn take(rx: &mut xsk::RxRing) {
    let a = rx.take(1);
    let b = rx.take(1);
    drop((a, b));
}

fn main() {}
