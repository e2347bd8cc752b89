//! XDP programs and the XSKMAP.
pub mod asm;
