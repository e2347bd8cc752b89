//! What went wrong, in the form in which the command tells it: to a person, or as JSON.

use std::io;

use anstyle::{AnsiColor, Style};
use serde::Serialize;

/// Why the command ends before its work is done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// Something failed, and can be explained.
    #[error("{}: {}", .0.doing, .0.cause)]
    Explained(Box<Explanation>),
    /// The output can't be written.
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
}

/// A failure, explained: what was being done, why it failed, and what to do.
#[derive(Debug, Serialize)]
pub(crate) struct Explanation {
    pub(crate) doing: String,
    pub(crate) cause: String,
    pub(crate) why: String,
    pub(crate) remedy: String,
    /// What the kernel answered, where it was asked.
    pub(crate) errno: Option<i32>,
    /// What the kernel's verifier said, where it refused a program.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) log: Option<String>,
}

#[derive(Serialize)]
struct Event<'a> {
    event: &'static str,
    #[serde(flatten)]
    explanation: &'a Explanation,
}

const ERROR: Style = AnsiColor::Red.on_default().bold();
const LABEL: Style = AnsiColor::Cyan.on_default().bold();
const DIM: Style = Style::new().dimmed();

impl Failure {
    /// A failure of the command's own.
    pub(crate) fn new(doing: &str, cause: String, why: &str, remedy: String) -> Self {
        let explanation =
            Explanation { doing: doing.into(), cause, why: why.into(), remedy, errno: None, log: None };
        Self::Explained(Box::new(explanation))
    }

    /// Whether it is only that nobody reads the output any more, as in `xsk rxdrop … | head`.
    pub(crate) fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }

    /// Tells it: as JSON on standard output, or in words on standard error.
    ///
    /// What can't be written is lost: there is nowhere else to tell it.
    pub(crate) fn print(&self, json: bool) {
        use std::io::Write as _;
        let Self::Explained(explanation) = self else {
            let _ = writeln!(anstream::stderr(), "{ERROR}error:{ERROR:#} {self}");
            return;
        };
        if json {
            if let Ok(line) = serde_json::to_string(&Event { event: "error", explanation }) {
                let _ = writeln!(anstream::stdout(), "{line}");
            }
        } else {
            let _ = write!(anstream::stderr(), "{}", explanation.in_words());
        }
    }
}

impl Explanation {
    /// As the library's `{:#}`, with colour for its parts.
    fn in_words(&self) -> String {
        let Self { doing, cause, why, remedy, errno, log } = self;
        let mut text = format!(
            "{ERROR}error:{ERROR:#} {doing}: {cause}\n\
             {LABEL}   why:{LABEL:#} {why}\n\
             {LABEL}    do:{LABEL:#} {remedy}\n"
        );
        if let Some(errno) = errno {
            let errno = io::Error::from_raw_os_error(*errno);
            text += &format!("{DIM}kernel: {errno}{DIM:#}\n");
        }
        if let Some(log) = log {
            text += &format!("{DIM}{}{DIM:#}\n", log.trim_end());
        }
        text
    }
}

impl From<xsk::Error> for Failure {
    fn from(error: xsk::Error) -> Self {
        let log = match error.cause() {
            xsk::Cause::Verifier { log } => Some(log.clone()),
            _ => None,
        };
        Self::Explained(Box::new(Explanation {
            doing: error.doing().to_string(),
            cause: error.cause().to_string(),
            why: error.cause().why().into(),
            remedy: error.remedy(),
            errno: error.errno().map(|errno| errno.raw_os_error()),
            log,
        }))
    }
}

impl From<xsk_testbed::Error> for Failure {
    fn from(error: xsk_testbed::Error) -> Self {
        Self::new(
            "cannot make the private devices",
            error.to_string(),
            "The demo makes network namespaces and a veth pair, and loads programs.",
            "run it as root on a kernel with veth and BPF; containers often forbid it".into(),
        )
    }
}
