//! Compiles the loops in C into this crate, and the program in C beside it.

use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=c");
    let mut loops = cc::Build::new();
    loops.file("c/loops.c").opt_level(3).debug(true).warnings(true).extra_warnings(true).compile("loops");

    let program = PathBuf::from(std::env::var_os("OUT_DIR").expect("set by cargo")).join("socket");
    let compiler = cc::Build::new().opt_level(3).get_compiler();
    let status = Command::new(compiler.path())
        .args(["-O3", "-g", "-Wall", "-Wextra", "c/socket.c", "-o"])
        .arg(&program)
        .args(["-lxdp", "-lbpf"])
        .status();
    match status {
        Ok(status) if status.success() => {}
        _ => panic!("the C compiler failed; Debian: apt-get install gcc libxdp-dev libbpf-dev"),
    }
    println!("cargo:rustc-env=C_PROGRAM={}", program.display());
}
