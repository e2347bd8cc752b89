fn asks(tx: &xsk::TxRing) {
    std::thread::scope(|threads| {
        threads.spawn(|| tx.needs_wakeup());
    });
}

fn main() {}
