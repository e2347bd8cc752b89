fn slots<'a>(mut tx: xsk::TxRing) -> xsk::rings::TxSlots<'a> {
    tx.reserve(1)
}

fn main() {}
