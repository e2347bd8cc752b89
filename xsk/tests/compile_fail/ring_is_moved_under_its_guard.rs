fn moved(mut tx: xsk::TxRing) {
    let slots = tx.reserve(1);
    drop(tx);
    drop(slots);
}

fn main() {}
