//! What can go wrong while a testbed is made or used.

use std::io;

/// A failure of the testbed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The kernel refused something.
    #[error("{doing}: {source}")]
    System {
        /// What was being done.
        doing: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel refused the generator's program.
    #[error("loading the generator's program: {source}\n{log}")]
    Program {
        /// What the kernel said.
        source: io::Error,
        /// What the verifier said.
        log: String,
    },
    /// The thread has a testbed already.
    #[error("this thread is inside a testbed already; use another thread for a second one")]
    Nested,
    /// An end did not come up in time.
    #[error("{name} did not come up within {seconds} s")]
    LinkDown {
        /// The end.
        name: String,
        /// How long was waited.
        seconds: u64,
    },
    /// A frame is too short for its headers, and its number if it has one.
    #[error("a frame of {len} bytes is too short: this one needs at least {least}")]
    FrameTooShort {
        /// Length that was asked for.
        len: usize,
        /// Length that is needed.
        least: usize,
    },
    /// A frame is longer than what carries it.
    #[error("a frame of {len} bytes is too long: at most {most} here")]
    FrameTooLong {
        /// Length that was asked for.
        len: usize,
        /// Length that is possible.
        most: usize,
    },
    /// The frame of a generator has no place for a number.
    #[error("the frame has no number to overwrite; build it with `UdpFrame::number`")]
    NotNumbered,
    /// No flow was found that arrives on some queue, or a frame did not arrive at all.
    #[error("no flow leads to some of the receive queues of {name}")]
    NoFlowForQueue {
        /// The receiving end.
        name: String,
    },
    /// No CPU that this thread may use leads to that receive queue.
    #[error(
        "no usable CPU leads to receive queue {queue} of {queues}: it is the sending CPU modulo the queues"
    )]
    NoCpuForQueue {
        /// The queue that was asked for.
        queue: u32,
        /// Queues that there are.
        queues: u32,
    },
}

impl Error {
    /// For `map_err`: the kernel refused what is described.
    pub(crate) fn system<E: Into<io::Error>>(doing: impl Into<String>) -> impl FnOnce(E) -> Self {
        move |source| Self::System { doing: doing.into(), source: source.into() }
    }

    /// As [`Self::system`], with the error of the last C library call of this thread.
    pub(crate) fn last_os(doing: impl Into<String>) -> Self {
        Self::System { doing: doing.into(), source: io::Error::last_os_error() }
    }
}
