//! eBPF in the kernel: maps, programs, their names in a bpffs, and where programs are attached.
//!
//! `aya-obj` takes the object file apart; everything else is bpf(2) and rtnetlink. Whatever is made
//! here outlives the process: maps and programs through their pins, attachments because they are
//! made by `BPF_PROG_ATTACH` and by filters, not by links, which would end with the process or,
//! pinned, stay behind when their device is gone.
//!
//! Errors are those of the kernel, as [`std::io::Error`] with its `errno`. Those that say only that
//! something is not permitted, or not there at all, have what explains them in their text instead.

pub mod cgroup;
pub mod clsact;
pub mod cookie;
mod element;
pub mod features;
pub mod map;
pub mod name;
pub mod numbers;
pub mod object;
pub mod pins;
pub mod program;
mod refusal;
mod syscall;
pub mod tcx;

use std::io;
use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};

pub use refusal::require_capabilities;
pub use syscall::Attached;

/// Which packets of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// Those that come in by the device.
    Ingress,
    /// Those that go out by it.
    Egress,
}

impl Direction {
    pub const ALL: [Direction; 2] = [Self::Ingress, Self::Egress];
}

/// Does `work` on all `items`, as many at a time as there are processors. The results have the order
/// of the items.
fn in_parallel<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> io::Result<Vec<R>> {
    let next = AtomicUsize::new(0);
    let share = || {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(index) else { return done };
            done.push((index, work(item)));
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get).min(items.len());
    let mut results = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(share)).collect();
        let mut results = share();
        for other in others {
            results.extend(other.join().map_err(|_| io::Error::other("a thread has panicked"))?);
        }
        io::Result::Ok(results)
    })?;
    results.sort_by_key(|(index, _)| *index);
    Ok(results.into_iter().map(|(_, result)| result).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

    use super::*;

    #[test]
    fn results_have_the_order_of_the_items() {
        let items: Vec<u32> = (0..100).collect();
        assert_eq!(in_parallel(&items, |item| *item).unwrap(), items);
        assert!(in_parallel(&[] as &[u32], |item| *item).unwrap().is_empty());
    }
}
