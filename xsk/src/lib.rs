//! AF_XDP for Rust.
#![deny(unsafe_code)]

#[allow(unsafe_code)]
pub mod abi;
pub mod device;
pub mod error;
#[allow(unsafe_code)]
pub mod kernel;
#[allow(unsafe_code)]
pub mod ring;
pub mod rings;
pub mod socket;
#[allow(unsafe_code)]
mod sync;
#[allow(unsafe_code)]
pub mod umem;
pub mod xdp;

pub use device::Device;
pub use error::{Cause, Error, Result};
pub use rings::{CompletionRing, FillRing, RxRing, TxRing};
pub use socket::{Mode, Socket};
pub use umem::{Frame, Packet, Pool, Umem};
