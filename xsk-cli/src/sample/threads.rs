//! How many threads share the queues, and which CPUs they are pinned to.

use std::thread;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::cli::{self, List};
use crate::failure::Failure;
use crate::report::ranges;

/// What was decided.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) threads: usize,
    /// CPUs that the threads are pinned to, one after the other.
    pub(super) cpus: Option<Vec<u32>>,
}

impl Plan {
    /// For so many queues.
    pub(super) fn new(asked: &cli::Threads, queues: usize) -> Result<Self, Failure> {
        let mut cpus = asked.cpus.as_ref().map(pick).transpose()?;
        let have = match &cpus {
            Some(cpus) => cpus.len(),
            // Fewer than the machine has, where the process may not use them all.
            None => thread::available_parallelism().map_or(1, |cpus| cpus.get()),
        };
        let threads = asked.threads.map_or(have, |threads| threads as usize);
        let threads = threads.clamp(1, queues.max(1));
        if let Some(cpus) = &mut cpus {
            cpus.truncate(threads);
        }
        Ok(Self { threads, cpus })
    }
}

/// The CPUs of a list, all of which this process may use.
fn pick(list: &List) -> Result<Vec<u32>, Failure> {
    let cannot = |cause: String, remedy: String| {
        Failure::new(
            "cannot pin threads to CPUs",
            cause,
            "A process runs on the CPUs that it was given, by taskset, a container or the system.",
            remedy,
        )
    };
    let usable =
        sched_getaffinity(None).map_err(|errno| cannot(errno.to_string(), "leave --cpus out".into()))?;
    let all: Vec<u32> =
        (0..CpuSet::MAX_CPU).filter(|cpu| usable.is_set(*cpu)).map(|cpu| cpu as u32).collect();
    match list {
        List::All => Ok(all),
        List::These(cpus) => match cpus.iter().find(|cpu| !all.contains(cpu)) {
            None => Ok(cpus.clone()),
            Some(cpu) => Err(cannot(
                format!("this process may not run on CPU {cpu}"),
                format!("choose among --cpus {}", ranges(&all)),
            )),
        },
    }
}

/// Pins the calling thread.
pub(super) fn pin_to(cpu: u32) -> Result<(), Failure> {
    let mut only = CpuSet::new();
    only.set(cpu as usize);
    sched_setaffinity(None, &only).map_err(|errno| {
        Failure::new(
            &format!("cannot pin a thread to CPU {cpu}"),
            errno.to_string(),
            "A CPU can be switched off, or taken away from the process, at any time.",
            "choose another one for --cpus".into(),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(threads: Option<u32>, cpus: Option<List>, queues: usize) -> Result<Plan, Failure> {
        Plan::new(&cli::Threads { threads, cpus }, queues)
    }

    #[test]
    fn a_thread_has_a_queue_at_least() {
        for (threads, queues, expected) in [(1, 4, 1), (3, 4, 3), (4, 4, 4), (9, 4, 4)] {
            assert_eq!(plan(Some(threads), None, queues).unwrap().threads, expected);
        }
        assert_eq!(plan(None, None, 1).unwrap(), Plan { threads: 1, cpus: None });
    }

    #[test]
    fn without_a_word_there_is_a_thread_a_queue_as_far_as_there_are_cpus() {
        let cpus = thread::available_parallelism().unwrap().get();
        assert_eq!(plan(None, None, 1000).unwrap().threads, cpus.min(1000));
        let all = pick(&List::All).unwrap();
        let one = List::These(all[..1].to_vec());
        let Plan { threads, cpus } = plan(None, Some(one), 4).unwrap();
        assert_eq!((threads, cpus.as_deref()), (1, Some(&all[..1])));
    }

    #[test]
    fn a_cpu_that_is_not_there_is_told_with_those_that_are() {
        let told = plan(None, Some(List::These(vec![9999])), 4).unwrap_err();
        let Failure::Explained(told) = told else { panic!("{told:?}") };
        assert!(told.cause.contains("CPU 9999") && told.remedy.contains("--cpus "), "{told:?}");
    }

    #[test]
    fn a_pinned_thread_stays_on_its_cpu() {
        let all = pick(&List::All).unwrap();
        let last = *all.last().unwrap();
        thread::spawn(move || {
            pin_to(last).unwrap();
            assert_eq!(pick(&List::All).unwrap(), [last]);
        })
        .join()
        .unwrap();
    }
}
