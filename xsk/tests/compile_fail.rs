//! What the compiler must refuse: every way to have a frame twice, late, or out of nothing.
//!
//! The texts beside the programs are those of one compiler, the one that CI pins. After an update
//! write them anew with `TRYBUILD=overwrite cargo test -p xsk --test compile_fail`, and read what
//! changed: each must still fail for the reason that its name says.

#![cfg(not(any(loom, miri)))]

#[test]
fn misuse_of_frames_and_rings_does_not_compile() {
    let programs = trybuild::TestCases::new();
    programs.pass("tests/compile_pass/*.rs");
    programs.compile_fail("tests/compile_fail/*.rs");
}
