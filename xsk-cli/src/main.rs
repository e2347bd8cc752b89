//! The command `xsk`: AF_XDP at work, for people who want to see, measure and check.
#![forbid(unsafe_code)]

mod cli;
mod demo;
mod failure;
mod guard;
mod info;
mod manual;
mod packet;
mod report;
mod sample;
mod signals;

use std::process::ExitCode;

use clap::Parser;

use crate::cli::{Cli, Command};

fn main() -> ExitCode {
    // Wrong usage ends here, with status 2.
    let cli = Cli::parse();
    let json = cli.command.json();
    let result = match &cli.command {
        Command::Rxdrop(args) => sample::run_rxdrop(args),
        Command::Txonly(args) => sample::run_txonly(args),
        Command::L2fwd(args) => sample::run_l2fwd(args),
        Command::Demo(args) => demo::run(args),
        Command::Info(args) => info::run(args),
        Command::Completions(args) => manual::completions(args),
        Command::Man(args) => manual::man(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) if failure.is_broken_pipe() => ExitCode::SUCCESS,
        Err(failure) => {
            failure.print(json);
            ExitCode::FAILURE
        }
    }
}
