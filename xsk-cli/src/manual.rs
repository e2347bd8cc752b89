//! Shell completions and man pages, made from the definitions of the command line.

use std::io::{self, Write};

use clap::CommandFactory;
use clap_mangen::Man;

use crate::cli::{self, Cli};
use crate::failure::Failure;

/// `xsk completions`.
pub(crate) fn completions(args: &cli::Completions) -> Result<(), Failure> {
    // Into a buffer: writing it straight to a closed pipe would panic.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "xsk", &mut script);
    Ok(io::stdout().write_all(&script)?)
}

/// `xsk man`.
pub(crate) fn man(args: &cli::Man) -> Result<(), Failure> {
    let command = Cli::command().disable_help_subcommand(true);
    match &args.dir {
        None => {
            let mut page = Vec::new();
            Man::new(command).render(&mut page)?;
            Ok(io::stdout().write_all(&page)?)
        }
        Some(dir) => clap_mangen::generate_to(command, dir).map_err(|error| {
            Failure::new(
                &format!("cannot write man pages to {}", dir.display()),
                error.to_string(),
                "Each page is a file in that directory.",
                "name a directory that exists and that you may write to".into(),
            )
        }),
    }
}
