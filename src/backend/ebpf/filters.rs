//! This plugin's filters among others' on a device.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use crate::sys::bpf::Direction;
use crate::sys::bpf::clsact::{Clsact, Filter, Slot};
use crate::sys::bpf::program::Program;

/// Tell the filter from others of its priority. The second one is for moving it before others, while
/// the first one still has it.
const HANDLES: [u32; 2] = [0x504d, 0x504e];
/// What tc shows of the filter.
const NAME: &str = "portmap";
/// The same on a device that had no clsact qdisc before: it goes with the filter. The name is the one
/// place where that is remembered, since it lives as long as the qdisc.
const NAME_WITH_QDISC: &str = "portmap with clsact";

/// Filters of all devices of the node.
pub struct Filters {
    clsact: Clsact,
    /// Devices that have got their qdisc from this very value.
    made: BTreeSet<u32>,
    /// What has been read and not been changed from here since. Between a look and what follows from it
    /// others may change it as well as between a second look and that.
    seen: BTreeMap<(u32, Direction), Vec<Filter>>,
}

impl Filters {
    pub fn open() -> io::Result<Self> {
        Ok(Self { clsact: Clsact::open()?, made: BTreeSet::new(), seen: BTreeMap::new() })
    }

    /// Whether a clsact qdisc is there, or can be made: an ingress qdisc takes its place.
    pub fn have_room(&mut self, device: u32) -> io::Result<bool> {
        Ok(self.clsact.qdisc_kind(device)?.is_none_or(|kind| kind == "clsact"))
    }

    /// The program of this plugin's filter, unless others' programs run before it: they may end a
    /// packet's way, as Cilium's do.
    pub fn program(&mut self, device: u32, direction: Direction) -> io::Result<Option<u32>> {
        let filters = self.clsact.filters(device, direction)?;
        let program = first(&filters).and_then(|filter| filter.program);
        self.seen.insert((device, direction), filters);
        Ok(program)
    }

    /// Whether the device has a filter of this plugin, wherever among others'.
    pub fn have_own(&mut self, device: u32) -> io::Result<bool> {
        for direction in Direction::ALL {
            if self.clsact.filters(device, direction)?.iter().any(is_own) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Attaches a program before others', in the place of another version of it if there is one. No
    /// packet is without one of the two.
    pub fn attach(
        &mut self,
        device: u32,
        direction: Direction,
        program: &Program,
    ) -> io::Result<()> {
        let filters = match self.seen.remove(&(device, direction)) {
            Some(filters) => filters,
            None => self.clsact.filters(device, direction)?,
        };
        if let Some(own) = first(&filters) {
            let name = own.name.as_deref().unwrap_or(NAME);
            return self.clsact.put(device, direction, own.slot, name, program);
        }
        let known = self.made.contains(&device);
        let made = !known && self.clsact.ensure(device)?;
        // The second direction follows the first one, which made the qdisc.
        let name = if known || made || self.made_qdisc(device)? { NAME_WITH_QDISC } else { NAME };
        let put = self.clsact.put(device, direction, free_slot(&filters), name, program);
        if made && put.is_err() {
            // Nothing would remember whose it is. The error of `put` is the one to report.
            drop(self.clsact.remove_unused(device));
        }
        put?;
        if made {
            self.made.insert(device);
        }
        for behind in filters.iter().filter(|filter| is_own(filter)) {
            self.clsact.remove(device, direction, behind.slot)?;
        }
        Ok(())
    }

    /// Detaches this plugin's filters, and with them the qdisc if it came with them and nobody else has
    /// filters there.
    pub fn detach(&mut self, device: u32) -> io::Result<()> {
        self.seen.retain(|(seen, _), _| *seen != device);
        let (mut own, mut others, mut made) = (Vec::new(), false, false);
        for direction in Direction::ALL {
            for filter in self.clsact.filters(device, direction)? {
                if is_own(&filter) {
                    made |= filter.name.as_deref() == Some(NAME_WITH_QDISC);
                    own.push((direction, filter.slot));
                } else {
                    others = true;
                }
            }
        }
        self.made.remove(&device);
        if made && !others {
            // Both filters in one step: a kill in between would leave a qdisc that nobody remembers.
            return self.clsact.remove_qdisc(device).map(drop);
        }
        own.into_iter()
            .try_for_each(|(direction, slot)| self.clsact.remove(device, direction, slot).map(drop))
    }

    /// Detaches this plugin's filter of one direction, where another program has taken over.
    pub fn detach_from(&mut self, device: u32, direction: Direction) -> io::Result<()> {
        self.seen.retain(|(seen, _), _| *seen != device);
        let filters = self.clsact.filters(device, direction)?;
        let mut with_qdisc = false;
        for own in filters.iter().filter(|filter| is_own(filter)) {
            self.clsact.remove(device, direction, own.slot)?;
            with_qdisc |= own.name.as_deref() == Some(NAME_WITH_QDISC);
        }
        if with_qdisc {
            self.made.remove(&device);
            self.clsact.remove_unused(device)?;
        }
        Ok(())
    }

    fn made_qdisc(&mut self, device: u32) -> io::Result<bool> {
        for direction in Direction::ALL {
            let filters = self.clsact.filters(device, direction)?;
            if filters.iter().any(|filter| filter.name.as_deref() == Some(NAME_WITH_QDISC)) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

fn is_own(filter: &Filter) -> bool {
    HANDLES.contains(&filter.slot.handle)
        && matches!(filter.name.as_deref(), Some(NAME | NAME_WITH_QDISC))
}

/// Whether it is a program for packets of every protocol, which can share a priority with another.
fn is_alike(filter: &Filter) -> bool {
    filter.kind == "bpf" && i32::from(filter.protocol) == libc::ETH_P_ALL
}

/// This plugin's filter, if it runs before all others that it could run before.
fn first(filters: &[Filter]) -> Option<&Filter> {
    filters.iter().find(|filter| is_alike(filter)).filter(|filter| is_own(filter))
}

/// The first priority that takes a program for packets of every protocol: a priority has one kind and
/// one protocol. Of several in one priority the newest runs first.
fn free_slot(filters: &[Filter]) -> Slot {
    let handle = |priority: u16| {
        let mut others = filters.iter().filter(|filter| filter.slot.priority == priority);
        let taken: Vec<u32> = others.clone().map(|filter| filter.slot.handle).collect();
        let free = HANDLES.into_iter().find(|handle| !taken.contains(handle));
        free.filter(|_| others.all(is_alike))
    };
    let slot = |priority| Some(Slot { priority, handle: handle(priority)? });
    (1..u16::MAX).find_map(slot).unwrap_or(Slot { priority: u16::MAX, handle: HANDLES[0] })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(priority: u16, handle: u32, protocol: i32, kind: &str) -> Filter {
        Filter {
            slot: Slot { priority, handle },
            protocol: protocol.try_into().unwrap_or_default(),
            kind: kind.into(),
            name: None,
            program: None,
        }
    }

    #[test]
    fn a_program_shares_a_priority_with_its_like_only() {
        let slot = |filters: &[Filter]| {
            let Slot { priority, handle } = free_slot(filters);
            (priority, handle)
        };
        let [one, two] = HANDLES;
        assert_eq!(slot(&[]), (1, one));
        assert_eq!(slot(&[filter(1, 1, libc::ETH_P_ALL, "bpf")]), (1, one));
        assert_eq!(slot(&[filter(1, 1, libc::ETH_P_IP, "bpf")]), (2, one));
        assert_eq!(slot(&[filter(1, one, libc::ETH_P_ALL, "bpf")]), (1, two));
        let others = [
            filter(1, 1, libc::ETH_P_ALL, "u32"),
            filter(2, one, libc::ETH_P_ALL, "bpf"),
            filter(2, two, libc::ETH_P_ALL, "bpf"),
            filter(9, 1, libc::ETH_P_IP, "u32"),
        ];
        assert_eq!(slot(&others), (3, one));
    }

    #[test]
    fn ours_is_in_place_before_all_that_it_could_precede() {
        let ours = |priority| Filter {
            name: Some(NAME.into()),
            ..filter(priority, HANDLES[0], libc::ETH_P_ALL, "bpf")
        };
        let theirs = |priority| filter(priority, 1, libc::ETH_P_ALL, "bpf");
        let other = filter(1, 1, libc::ETH_P_IP, "u32");
        assert!(first(&[]).is_none());
        assert!(first(&[theirs(1)]).is_none());
        assert!(first(&[ours(1), theirs(1), theirs(2)]).is_some());
        assert!(first(&[other.clone(), ours(2), theirs(2)]).is_some());
        assert!(first(&[theirs(1), ours(1)]).is_none());
        assert!(first(&[other, theirs(2), ours(3)]).is_none());
    }
}
