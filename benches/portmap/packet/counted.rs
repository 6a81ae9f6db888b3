//! What the kernel itself counts (`bpf_stats`): runs and nanoseconds of a program in real traffic.

use std::fs::File;
use std::io::{self, Read as _};
use std::mem::{size_of, zeroed};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use aya_obj::generated::{bpf_attr, bpf_cmd, bpf_stats_type};
use portmap::sys::bpf::program::Program;

use super::{Concern, Programs};
use crate::Res;
use crate::rate::{DIRECT, HOSTPORT};
use crate::rig::{Rig, on_new_thread};
use crate::traffic::{Exchanges, connections, datagrams, serve_datagrams, serve_exchanges};

/// A port that no claim has, in the pod that has no hostPort.
const UNKNOWN: (Ipv4Addr, u16) = (DIRECT.0, 9000);
/// Programs that packets meet.
const PACKETS: &[&str] = &["pm_uplink_in", "pm_pod_in", "pm_out"];
/// The same, with the empty ones behind them.
const CONTROLLED: &[&str] =
    &["pm_uplink_in", "pm_pod_in", "pm_out", "empty_uplink_in", "empty_pod_in", "empty_out"];
/// The one that connect(2) of IPv4 meets.
pub const CALLS: &[&str] = &["pm_connect4"];

/// The kernel counts while this lives; reading the clock makes every program slower.
pub struct Counting {
    _enabled: OwnedFd,
}

impl Counting {
    /// Linux 5.8.
    #[expect(unsafe_code, reason = "the library has no use for this command of bpf(2)")]
    pub fn start() -> Res<Self> {
        // SAFETY: integers and arrays of integers throughout.
        let mut attr: bpf_attr = unsafe { zeroed() };
        attr.enable_stats.type_ = bpf_stats_type::BPF_STATS_RUN_TIME as u32;
        // SAFETY: `attr` is as large as said, and has no addresses.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                bpf_cmd::BPF_ENABLE_STATS as u32,
                &raw mut attr,
                size_of::<bpf_attr>(),
            )
        };
        match i32::try_from(result) {
            // SAFETY: a new descriptor belongs to nobody else.
            Ok(fd) if fd >= 0 => Ok(Self { _enabled: unsafe { OwnedFd::from_raw_fd(fd) } }),
            _ => Err(format!("bpf_stats: {}", io::Error::last_os_error()).into()),
        }
    }

    /// Runs and nanoseconds of a program since it was loaded, as far as somebody counted.
    fn of(&self, program: &Program) -> Res<(u64, u64)> {
        let mut text = String::new();
        File::open(format!("/proc/self/fdinfo/{}", program.fd().as_raw_fd()))?
            .read_to_string(&mut text)?;
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|value| value.trim().parse().ok())
                .ok_or_else(|| format!("fdinfo of a program has no {name}"))
        };
        Ok((field("run_cnt:")?, field("run_time_ns:")?))
    }
}

/// Traffic, and the programs that it meets.
pub struct Traffic {
    pub name: &'static str,
    pub concern: Concern,
    pub programs: &'static [&'static str],
    kind: Kind,
}

#[derive(Clone, Copy)]
enum Kind {
    Tcp,
    Udp,
    Hostport,
    Connect(Ipv4Addr, u16),
}

pub const TRAFFIC: [Traffic; 5] = [
    Traffic { name: "TCP", concern: Concern::Others, programs: CONTROLLED, kind: Kind::Tcp },
    Traffic { name: "UDP", concern: Concern::Others, programs: CONTROLLED, kind: Kind::Udp },
    Traffic {
        name: "TCP by a hostPort",
        concern: Concern::Ours,
        programs: PACKETS,
        kind: Kind::Hostport,
    },
    Traffic {
        name: "connect(2)",
        concern: Concern::Others,
        programs: CALLS,
        kind: Kind::Connect(UNKNOWN.0, UNKNOWN.1),
    },
    Traffic {
        name: "connect(2) to a hostPort",
        concern: Concern::Ours,
        programs: CALLS,
        kind: Kind::Connect(Ipv4Addr::LOCALHOST, HOSTPORT.1),
    },
];

/// What makes the traffic on one node.
pub struct Talk {
    unknown: Exchanges,
    hostport: Exchanges,
}

impl Talk {
    pub fn new(rig: &Rig) -> Res<Self> {
        serve_exchanges(&rig.pod_a, 80)?;
        serve_exchanges(&rig.pod_b, UNKNOWN.1)?;
        serve_datagrams(&rig.pod_b, UNKNOWN.1)?;
        let open = |to: (Ipv4Addr, u16)| {
            on_new_thread(|| {
                rig.client.enter()?;
                Exchanges::open(SocketAddr::from(to))
            })
        };
        Ok(Self { unknown: open(UNKNOWN)?, hostport: open(HOSTPORT)? })
    }

    fn make(&mut self, rig: &Rig, kind: Kind, time: Duration) -> Res<f64> {
        match kind {
            Kind::Tcp => self.unknown.requests(time),
            Kind::Hostport => self.hostport.requests(time),
            Kind::Udp => on_new_thread(|| {
                rig.client.enter()?;
                datagrams(SocketAddr::from(UNKNOWN), time)
            }),
            Kind::Connect(address, port) => {
                rig.on(|| connections(SocketAddr::from((address, port)), time))
            }
        }
    }

    /// Nanoseconds a run of each of the programs.
    pub fn round(
        &mut self,
        rig: &Rig,
        programs: &Programs,
        traffic: &Traffic,
        counting: &Counting,
        time: Duration,
    ) -> Res<Vec<f64>> {
        let mut costs = Vec::new();
        let before = traffic.programs.iter().map(|name| counting.of(programs.get(name)?));
        let before = before.collect::<Res<Vec<_>>>()?;
        self.make(rig, traffic.kind, time)?;
        for (name, (runs, nanoseconds)) in traffic.programs.iter().zip(before) {
            let after = counting.of(programs.get(name)?)?;
            costs.push(mean(name, after.0 - runs, after.1 - nanoseconds)?);
        }
        Ok(costs)
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts of a fraction of a second fit in a double")]
fn mean(program: &str, runs: u64, nanoseconds: u64) -> Res<f64> {
    match runs {
        0 => Err(format!("{program} did not run: its hook is not where the traffic is").into()),
        _ => Ok(nanoseconds as f64 / runs as f64),
    }
}
