//! Programs on a device's packets as filters of its clsact qdisc (Linux 4.5), by rtnetlink. They
//! are gone with the device.

use std::io;
use std::os::fd::AsRawFd;

use netlink_packet_core::{
    DefaultNla, Emitable, NLA_F_NESTED, NLM_F_CREATE, NLM_F_ECHO, NLM_F_EXCL, parse_u32,
};
use netlink_packet_route::tc::{TcHandle, TcHeader};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::Direction;
use super::program::Program;
use super::refusal::explained;
use crate::sys::netlink::attributes::{attributes, find, text};
use crate::sys::netlink::socket::{Message, NetlinkSocket};

const HEADER: usize = 20;

// linux/pkt_cls.h
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_ID: u16 = 11;
/// The program's return value is the verdict.
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;

/// A filter of any kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    pub slot: Slot,
    /// `ETH_P_*`, in host byte order: `ETH_P_ALL` for a filter that sees every packet.
    pub protocol: u16,
    /// "bpf", "flower", "matchall" and others.
    pub kind: String,
    /// What tc shows for a program, given by whoever attached it.
    pub name: Option<String>,
    /// The program, of a bpf filter.
    pub program: Option<u32>,
}

/// Where a filter stands among others of its device and direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot {
    /// Lower ones run first. All filters of one priority are of one kind and protocol.
    pub priority: u16,
    /// Tells filters of one priority apart. The one that was attached last runs first; a filter that
    /// is replaced keeps its place.
    pub handle: u32,
}

/// A socket that talks of qdiscs and filters in the network namespace of the thread that opened it.
pub struct Clsact {
    socket: NetlinkSocket,
}

impl Clsact {
    /// # Errors
    ///
    /// What making the socket returned.
    pub fn open() -> io::Result<Self> {
        Ok(Self { socket: NetlinkSocket::open_for_short(NETLINK_ROUTE)? })
    }

    /// Makes the clsact qdisc of the device with index `device` if it has none, and says whether it
    /// had none.
    ///
    /// # Errors
    ///
    /// What rtnetlink returns: `ENOENT` from a kernel without `sch_ingress`, `ENODEV`, `EPERM`
    /// without `CAP_NET_ADMIN`. `EBUSY` if the device has an ingress qdisc, which takes clsact's
    /// place; filters for egress would land at its ingress.
    pub fn ensure(&mut self, device: u32) -> io::Result<bool> {
        let request = message(libc::RTM_NEWQDISC, &qdisc(device), vec![kind("clsact")]);
        match self.send(&request, NLM_F_CREATE | NLM_F_EXCL) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                match self.qdisc_kind(device)?.as_deref() {
                    Some("clsact") => Ok(false),
                    _ => Err(io::Error::from_raw_os_error(libc::EBUSY)),
                }
            }
            Err(error) => Err(error),
        }
    }

    /// "clsact" or "ingress", whichever the device has.
    ///
    /// # Errors
    ///
    /// What rtnetlink returns.
    pub fn qdisc_kind(&mut self, device: u32) -> io::Result<Option<String>> {
        let request = message(libc::RTM_GETQDISC, &qdisc(device), Vec::new());
        // The answer is a notification, which comes to the asker if it wants an echo.
        let answers = self.socket.request(&request, NLM_F_ECHO, |found, payload| {
            (found == libc::RTM_NEWQDISC)
                .then(|| find(payload.get(HEADER..)?, libc::TCA_KIND).map(text))?
        });
        match answers {
            // EINVAL: the device has had one.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => {
                Ok(None)
            }
            other => Ok(other?.into_iter().next()),
        }
    }

    /// The filters of a device in the order in which they run; none if it has no clsact qdisc, or is
    /// not there.
    ///
    /// # Errors
    ///
    /// What rtnetlink returns. So do all below.
    pub fn filters(&mut self, device: u32, direction: Direction) -> io::Result<Vec<Filter>> {
        let header = filter(device, direction, Slot { priority: 0, handle: 0 }, 0);
        let request = message(libc::RTM_GETTFILTER, &header, Vec::new());
        let answer = self.socket.dump(&request, |found, payload| {
            (found == libc::RTM_NEWTFILTER).then(|| read_filter(payload))?
        });
        match answer {
            // No ingress or clsact qdisc, to some kernels.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => {
                Ok(Vec::new())
            }
            other => other,
        }
    }

    /// Attaches a program, or puts it in the place of the one that has the slot: no packet is
    /// without one of the two. The device needs a clsact qdisc. Costs 0.03 ms, without a grace
    /// period of RCU.
    pub fn put(
        &mut self,
        device: u32,
        direction: Direction,
        slot: Slot,
        name: &str,
        program: &Program,
    ) -> io::Result<()> {
        let options = [
            DefaultNla::new(TCA_BPF_FD, program.fd().as_raw_fd().to_ne_bytes().to_vec()),
            DefaultNla::new(TCA_BPF_NAME, terminated(name)),
            DefaultNla::new(TCA_BPF_FLAGS, TCA_BPF_FLAG_ACT_DIRECT.to_ne_bytes().to_vec()),
        ];
        let mut nested = vec![0; options.as_slice().buffer_len()];
        options.as_slice().emit(&mut nested);
        let attributes =
            vec![kind("bpf"), DefaultNla::new(libc::TCA_OPTIONS | NLA_F_NESTED, nested)];
        let header = filter(device, direction, slot, libc::ETH_P_ALL as u16);
        self.send(&message(libc::RTM_NEWTFILTER, &header, attributes), NLM_F_CREATE)
    }

    /// Detaches what has the slot; says whether anything had it.
    pub fn remove(&mut self, device: u32, direction: Direction, slot: Slot) -> io::Result<bool> {
        let header = filter(device, direction, slot, libc::ETH_P_ALL as u16);
        removed(self.send(&message(libc::RTM_DELTFILTER, &header, vec![kind("bpf")]), 0))
    }

    /// Removes the clsact qdisc unless anybody has filters there; says whether it was removed. Only
    /// for one that the caller has made: whoever else has made it may be about to use it.
    pub fn remove_unused(&mut self, device: u32) -> io::Result<bool> {
        for direction in Direction::ALL {
            if !self.filters(device, direction)?.is_empty() {
                return Ok(false);
            }
        }
        self.remove_qdisc(device)
    }

    /// Removes the clsact qdisc with all filters that it has; says whether there was one.
    pub fn remove_qdisc(&mut self, device: u32) -> io::Result<bool> {
        let request = message(libc::RTM_DELQDISC, &qdisc(device), vec![kind("clsact")]);
        removed(self.send(&request, 0))
    }

    fn send(&mut self, request: &Message, flags: u16) -> io::Result<()> {
        self.socket.request(request, flags, |_, _| None::<()>).map(drop).map_err(explained)
    }
}

/// Whether there was anything to remove. EINVAL: no such qdisc, or a priority of another kind.
fn removed(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Err(error)
            if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL | libc::ENODEV)) =>
        {
            Ok(false)
        }
        other => other.map(|()| true),
    }
}

fn message(kind: u16, header: &TcHeader, attributes: Vec<DefaultNla>) -> Message {
    Message::new(kind, header, &attributes)
}

fn kind(name: &str) -> DefaultNla {
    DefaultNla::new(libc::TCA_KIND, terminated(name))
}

fn terminated(text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

fn qdisc(device: u32) -> TcHeader {
    TcHeader {
        index: device.cast_signed(),
        handle: TcHandle { major: u16::MAX, minor: 0 },
        parent: TcHandle::CLSACT,
        ..TcHeader::default()
    }
}

/// The lower half of `tcm_info` is the protocol in network byte order.
fn filter(device: u32, direction: Direction, slot: Slot, protocol: u16) -> TcHeader {
    let minor = match direction {
        Direction::Ingress => TcHandle::MIN_INGRESS,
        Direction::Egress => TcHandle::MIN_EGRESS,
    };
    TcHeader {
        index: device.cast_signed(),
        handle: slot.handle.into(),
        parent: TcHandle { major: u16::MAX, minor },
        info: u32::from(slot.priority) << 16 | u32::from(protocol.to_be()),
        ..TcHeader::default()
    }
}

/// `None` for the entry that stands for a priority as such.
fn read_filter(payload: &[u8]) -> Option<Filter> {
    let header = TcHeader::parse(payload).ok()?;
    let handle = header.handle.into();
    if handle == 0 {
        return None;
    }
    let slot = Slot { priority: (header.info >> 16) as u16, handle };
    let mut filter = Filter {
        slot,
        protocol: u16::from_be(header.info as u16),
        kind: String::new(),
        name: None,
        program: None,
    };
    let mut options: &[u8] = &[];
    for (number, value) in attributes(payload.get(HEADER..)?) {
        match number {
            libc::TCA_KIND => filter.kind = text(value),
            libc::TCA_OPTIONS => options = value,
            _ => {}
        }
    }
    // Numbers of options are the kind's own.
    if filter.kind == "bpf" {
        filter.name = find(options, TCA_BPF_NAME).map(text);
        filter.program = find(options, TCA_BPF_ID).and_then(|id| parse_u32(id).ok());
    }
    Some(filter)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

    use super::*;

    fn nla(number: u16, value: &[u8]) -> Vec<u8> {
        let nla = DefaultNla::new(number, value.to_vec());
        let mut bytes = vec![0; nla.buffer_len()];
        nla.emit(&mut bytes);
        bytes
    }

    fn answer(handle: u32, kind: &str, options: &[u8]) -> Vec<u8> {
        let header = filter(7, Direction::Egress, Slot { priority: 3, handle }, 0x0800);
        let mut bytes = vec![0; HEADER];
        header.emit(&mut bytes);
        bytes.extend(nla(libc::TCA_KIND, &terminated(kind)));
        bytes.extend(nla(libc::TCA_OPTIONS | NLA_F_NESTED, options));
        bytes
    }

    #[test]
    fn a_header_names_device_direction_and_slot() {
        let header = filter(
            7,
            Direction::Ingress,
            Slot { priority: 2, handle: 0x10 },
            libc::ETH_P_ALL as u16,
        );
        let mut bytes = [0; HEADER];
        header.emit(&mut bytes);
        let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!((word(4), word(8), word(12)), (7, 0x10, 0xffff_fff2));
        assert_eq!(word(16), 2 << 16 | u32::from(3_u16.to_be()));
    }

    #[test]
    fn filters_are_told_apart() {
        let options = [nla(TCA_BPF_NAME, b"pm_in\0"), nla(TCA_BPF_ID, &42_u32.to_ne_bytes())];
        let found = read_filter(&answer(5, "bpf", &options.concat())).unwrap();
        assert_eq!(
            found,
            Filter {
                slot: Slot { priority: 3, handle: 5 },
                protocol: 0x0800,
                kind: "bpf".into(),
                name: Some("pm_in".into()),
                program: Some(42),
            }
        );
        let other = read_filter(&answer(5, "flower", &options.concat())).unwrap();
        assert_eq!((other.kind.as_str(), other.name, other.program), ("flower", None, None));
        assert!(read_filter(&answer(0, "bpf", &[])).is_none());
        assert!(read_filter(&[0; 19]).is_none());
    }
}
