//! Forgetting tracked flows (`NETLINK_NETFILTER`, ctnetlink).
//!
//! A UDP flow keeps the translation that its first packet got for as long as it lasts, so after a
//! change of rules the entries of the changed ports have to go.

mod message;

use std::collections::HashSet;
use std::io;

use netlink_packet_core::DefaultNla;
use netlink_sys::protocols::NETLINK_NETFILTER;

use super::socket::NetlinkSocket;
use crate::model::{Family, Protocol};
use message::{Filter, deletion, dump_request, entry};
pub use message::{Flow, Tuple};

/// Up to how many ports are asked for one by one. With 100,000 entries in the table, one dump with
/// a filter takes about 40 ms, and one without 300 to 400 ms (Linux 6.18).
const PASSES: usize = 8;

/// Deletes the entries of `family` whose original destination port and protocol are listed and
/// that `wanted` picks. Returns how many were deleted. Entries that end by themselves meanwhile
/// count neither as deleted nor as an error; nor do those that begin anew, which already follow
/// the present rules.
///
/// Since Linux 5.8 the kernel picks the entries, which is ten times as fast as reading them all;
/// what it sends is checked again in any case. Older kernels are asked for the whole table, once.
///
/// # Errors
///
/// What the dump or the first failed deletion returned; the other entries are deleted
/// nevertheless. EBUSY stands for a flow that was offloaded to a flowtable.
pub fn delete(
    family: Family,
    protocols_and_ports: &[(Protocol, u16)],
    wanted: impl Fn(&Flow) -> bool,
) -> io::Result<usize> {
    let listed: HashSet<(u8, u16)> =
        protocols_and_ports.iter().map(|(protocol, port)| (protocol.number(), *port)).collect();
    if listed.is_empty() {
        return Ok(0);
    }
    let mut socket = NetlinkSocket::open(NETLINK_NETFILTER)?;
    let chosen = dump(&mut socket, family, &listed, wanted)?;

    let mut deleted = 0;
    let mut failure = None;
    for identity in chosen {
        match socket.request(&deletion(family, &identity), 0, |_, _| None::<()>) {
            Ok(_) => deleted += 1,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    failure.map_or(Ok(deleted), Err)
}

/// Returns what names each chosen entry in a deletion; an entry may come more than once.
fn dump(
    socket: &mut NetlinkSocket,
    family: Family,
    listed: &HashSet<(u8, u16)>,
    wanted: impl Fn(&Flow) -> bool,
) -> io::Result<Vec<Vec<DefaultNla>>> {
    // Also returns whether everything that came passed the filter.
    let mut read = |filter: Option<Filter>| {
        let mut filtered = true;
        let request = dump_request(family, filter);
        let found = socket.dump(&request, |kind, payload| {
            let pick = |protocol, port| {
                filtered &= filter.is_none_or(|filter| filter.admits(protocol, port));
                listed.contains(&(protocol, port))
            };
            let entry = entry(family, kind, payload, pick)?;
            wanted(&entry.flow).then_some(entry.identity)
        });
        found.map(|found| (found, filtered))
    };
    let filters = filters(listed);
    if filters.is_empty() {
        return Ok(read(None)?.0);
    }
    let mut chosen = Vec::new();
    for filter in filters {
        match read(Some(filter)) {
            Ok((found, true)) => chosen.extend(found),
            // Linux before 5.8 ignores the filter: this was the whole table.
            Ok((found, false)) => return Ok(found),
            // The kernel knows filters, but not this one.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ERANGE)
                ) =>
            {
                return Ok(read(None)?.0);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(chosen)
}

/// The dumps to ask for, each with a filter; none if a filter cannot say what is listed.
fn filters(listed: &HashSet<(u8, u16)>) -> Vec<Filter> {
    if listed.len() <= PASSES {
        let one = |&(protocol, port)| Filter { protocol, port: Some(port) };
        return listed.iter().map(one).collect();
    }
    let protocols: HashSet<u8> = listed.iter().map(|(protocol, _)| *protocol).collect();
    match Vec::from_iter(protocols)[..] {
        [protocol] => vec![Filter { protocol, port: None }],
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_as_narrow_as_they_can_be() {
        let few = filters(&HashSet::from([(17, 53), (132, 53)]));
        assert_eq!(few.len(), 2);
        assert!(few.iter().all(|filter| filter.port == Some(53)));
        let mut many: HashSet<_> = (1..=20).map(|port| (17, port)).collect();
        assert_eq!(filters(&many), [Filter { protocol: 17, port: None }]);
        many.insert((132, 1));
        assert!(filters(&many).is_empty());
    }
}
