//! Forwards every packet between two interfaces, both ways, as a cable would.
//!
//! ```sh
//! cargo run --example forward -- eth1 eth2
//! ```

use std::error::Error;

use xsk::{Device, Port};

fn main() -> Result<(), Box<dyn Error>> {
    let names: Vec<_> = std::env::args().skip(1).collect();
    let [a, b] = &names[..] else { return Err("usage: forward INTERFACE INTERFACE".into()) };
    let [mut a, mut b] = open(&Device::open(a)?, &Device::open(b)?)?;
    loop {
        Port::wait_any(&mut [&mut a, &mut b], None)?;
        forward(&mut a, &mut b)?;
    }
}

/// Two ports that share their memory: packets go from one to the other without a copy.
pub fn open(a: &Device, b: &Device) -> xsk::Result<[Port; 2]> {
    Port::open_each([Port::builder(a), Port::builder(b)])
}

/// One turn, both ways; returns how many packets there were.
pub fn forward(a: &mut Port, b: &mut Port) -> xsk::Result<u32> {
    Ok(a.forward(b, |packet| packet)? + b.forward(a, |packet| packet)?)
}
