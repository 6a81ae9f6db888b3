//! This plugin's filters among others' on a device.

use std::io;

use crate::sys::bpf::Direction;
use crate::sys::bpf::clsact::{Clsact, Filter, Slot};
use crate::sys::bpf::program::Program;

/// Tells the filter from others of its priority.
const HANDLE: u32 = 0x504d;
/// What tc shows of the filter.
const NAME: &str = "portmap";
/// The same on a device that had no clsact qdisc before: it goes with the filter. The name is the one
/// place where that is remembered, since it lives as long as the qdisc.
const NAME_WITH_QDISC: &str = "portmap with clsact";

/// Filters of all devices of the node.
pub struct Filters {
    clsact: Clsact,
}

impl Filters {
    pub fn open() -> io::Result<Self> {
        Ok(Self { clsact: Clsact::open()? })
    }

    /// The program of this plugin's filter.
    pub fn program(&mut self, device: u32, direction: Direction) -> io::Result<Option<u32>> {
        let filters = self.clsact.filters(device, direction)?;
        Ok(filters.into_iter().find(is_own).and_then(|filter| filter.program))
    }

    /// Attaches a program, in the place of another version of it if there is one.
    pub fn attach(
        &mut self,
        device: u32,
        direction: Direction,
        program: &Program,
    ) -> io::Result<()> {
        let filters = self.clsact.filters(device, direction)?;
        if let Some(own) = filters.iter().find(|filter| is_own(filter)) {
            let name = own.name.as_deref().unwrap_or(NAME);
            return self.clsact.put(device, direction, own.slot, name, program);
        }
        let made = self.clsact.ensure(device)?;
        // The second direction follows the first one, which made the qdisc.
        let name = if made || self.made_qdisc(device)? { NAME_WITH_QDISC } else { NAME };
        self.clsact.put(device, direction, free_slot(&filters), name, program)
    }

    /// Detaches this plugin's filters, and with them the qdisc if it came with them and nobody else has
    /// filters there.
    pub fn detach(&mut self, device: u32) -> io::Result<()> {
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
        if made && !others {
            // Both filters in one step: a kill in between would leave a qdisc that nobody remembers.
            return self.clsact.remove_qdisc(device).map(drop);
        }
        own.into_iter()
            .try_for_each(|(direction, slot)| self.clsact.remove(device, direction, slot).map(drop))
    }

    /// Detaches this plugin's filter of one direction, where another program has taken over.
    pub fn detach_from(&mut self, device: u32, direction: Direction) -> io::Result<()> {
        let filters = self.clsact.filters(device, direction)?;
        let Some(own) = filters.iter().find(|filter| is_own(filter)) else {
            return Ok(());
        };
        self.clsact.remove(device, direction, own.slot)?;
        if own.name.as_deref() == Some(NAME_WITH_QDISC) {
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
    filter.slot.handle == HANDLE && matches!(filter.name.as_deref(), Some(NAME | NAME_WITH_QDISC))
}

/// The first priority that takes a program for packets of every protocol: a priority has one kind and
/// one protocol. Of several in one priority the newest runs first.
fn free_slot(filters: &[Filter]) -> Slot {
    let fits = |priority: &u16| {
        filters.iter().filter(|filter| filter.slot.priority == *priority).all(|filter| {
            filter.kind == "bpf"
                && i32::from(filter.protocol) == libc::ETH_P_ALL
                && filter.slot.handle != HANDLE
        })
    };
    Slot { priority: (1..u16::MAX).find(fits).unwrap_or(u16::MAX), handle: HANDLE }
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
        let priority = |filters: &[Filter]| free_slot(filters).priority;
        assert_eq!(priority(&[]), 1);
        assert_eq!(priority(&[filter(1, 1, libc::ETH_P_ALL, "bpf")]), 1);
        assert_eq!(priority(&[filter(1, 1, libc::ETH_P_IP, "bpf")]), 2);
        let others = [
            filter(1, 1, libc::ETH_P_ALL, "u32"),
            filter(2, HANDLE, libc::ETH_P_ALL, "bpf"),
            filter(9, 1, libc::ETH_P_IP, "u32"),
        ];
        assert_eq!(priority(&others), 3);
    }
}
