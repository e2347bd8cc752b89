//! AF_XDP for Rust.
#![deny(unsafe_code)]
#[allow(unsafe_code)]
pub mod abi;
#[allow(unsafe_code)]
pub mod kernel;
#[allow(unsafe_code)]
pub mod ring;
#[allow(unsafe_code)]
mod sync;
/// XDP programs and maps.
pub mod xdp;
