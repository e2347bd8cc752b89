//! Receive and drop.

use std::hint::spin_loop;

use xsk::{Port, Result};

use super::NAP;

/// Takes packets and gives their frames back, for as long as `go_on` says. It is asked once a turn,
/// with how many packets there were so far.
pub(crate) fn run(
    port: &mut Port,
    poll: bool,
    mut go_on: impl FnMut(&mut [&mut Port], u64) -> bool,
) -> Result<()> {
    let mut received = 0;
    while go_on(&mut [port], received) {
        let taken = port.receive(|_| {})?;
        received += u64::from(taken);
        if taken != 0 {
            continue;
        }
        if poll {
            port.wait(Some(NAP))?;
        } else {
            spin_loop();
        }
    }
    Ok(())
}
