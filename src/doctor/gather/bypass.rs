//! Chains that packets meet before rules translate them, and packets that eBPF translates before that.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use super::super::bypass::{Facts, Sample};
use super::super::rules::Packet;
use super::chains::{Stage, chains};
use super::firewall::who;
use super::tables::Tables;
use crate::facts::NodeFacts;
use crate::model::{BackendKind, Family};
use crate::record::Record;
use crate::sys::Host;

pub fn facts(host: &Host, tables: &Tables, live: &[&Record], node: &NodeFacts) -> Facts {
    let samples = samples(live, node);
    if samples.is_empty() {
        return Facts::default();
    }
    let (chains, unread) = chains(host, tables, Stage::Early);
    // Pods call hostPorts, too.
    let pods: BTreeSet<IpAddr> =
        samples.iter().filter_map(|sample| Some(sample.after.target?.ip())).collect();
    let mut devices = node.uplinks.clone();
    devices.extend(pods.into_iter().filter_map(|pod| host.device_towards(pod).ok().flatten()));
    Facts { chains, unread, devices: devices.into_iter().collect(), samples }
}

/// Of every hostPort that eBPF forwards one for each address that it is called by. What another backend
/// forwards meets the chains before it is translated, even where the next pod's backend is eBPF.
fn samples(live: &[&Record], node: &NodeFacts) -> Vec<Sample> {
    let mut samples = Vec::new();
    for record in live.iter().filter(|record| record.backend == BackendKind::Ebpf) {
        for family in Family::ALL {
            for forward in record.forwards(family) {
                let claim = forward.claim;
                let packet = |target: SocketAddr, is_local: bool| Packet {
                    who: who(record, &claim),
                    device: None,
                    protocol: claim.protocol,
                    target: Some(target),
                    is_local,
                    translated: false,
                };
                // Nobody calls a loopback address from outside.
                let outside = node.addresses.iter().filter(|ip| !ip.is_loopback());
                let called = outside.filter(|ip| {
                    Family::of(ip) == family && claim.address.is_none_or(|claimed| claimed == **ip)
                });
                samples.extend(called.map(|ip| Sample {
                    family,
                    before: packet(SocketAddr::new(*ip, claim.port), true),
                    after: packet(forward.target, false),
                }));
            }
        }
    }
    samples
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conf::Options;
    use crate::model::{Attachment, Mapping, Protocol};

    #[test]
    fn what_rules_translate_is_not_passed_by() {
        let addresses: [IpAddr; 3] =
            [[127, 0, 0, 1].into(), [192, 0, 2, 1].into(), [198, 51, 100, 1].into()];
        let node = NodeFacts { addresses: addresses.into(), ..NodeFacts::default() };
        let record = |kind| {
            let (network, ifname) = ("n".into(), "eth0".into());
            let attachment = Attachment { network, container_id: format!("{kind}-pod"), ifname };
            let (host_port, container_port) = (8080, 80);
            let mapping =
                Mapping { protocol: Protocol::Tcp, host_port, container_port, host_ip: None };
            let pod = IpAddr::from([10, 0, 0, 2]).into();
            Record::new(attachment, vec![mapping], vec![pod], Options::default(), kind)
        };
        let live = BackendKind::ALL.map(record);
        let samples = samples(&live.iter().collect::<Vec<_>>(), &node);
        let whose: Vec<&str> = samples.iter().map(|sample| sample.before.who.as_str()).collect();
        assert_eq!(whose, ["tcp 8080 of ebpf-pod"; 2]);
    }
}
