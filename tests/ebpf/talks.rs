//! Connections that stay open, on every path that a hostPort has.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use portmap::demo::netns::Netns;
use portmap::demo::topology::Lab;
use portmap::demo::traffic::{Call, Failure, Reply, Session, Transport, reach};
use portmap::model::Family;

use super::{Scene, TIMEOUT};

/// Open connections to hostPort 8080 of pod-a.
pub struct Talks<'a> {
    lab: &'a Lab,
    callers: &'static [&'static str],
    sessions: Vec<(String, Session)>,
}

impl<'a> Talks<'a> {
    /// From the client, from the node by its addresses and by the loopback's, from another pod, from
    /// the pod itself.
    pub fn open(lab: &'a Lab) -> Self {
        Self::open_from(lab, &["client", "node", "pod-a", "pod-b"])
    }

    /// From some of them only.
    pub fn open_from(lab: &'a Lab, callers: &'static [&'static str]) -> Self {
        let mut talks = Talks { lab, callers, sessions: Vec::new() };
        for (what, call) in talks.calls() {
            let from = talks.netns(&what);
            let mut session =
                Session::open(from, call).unwrap_or_else(|failure| panic!("{what}: {failure}"));
            let reply = session.ask().unwrap_or_else(|failure| panic!("{what}: {failure}"));
            assert_eq!(reply.server, lab.pods[0].name, "{what}");
            talks.sessions.push((what, session));
        }
        talks
    }

    fn calls(&self) -> Vec<(String, Call)> {
        let mut calls = Vec::new();
        for family in &self.lab.options.families {
            let loopback = match family {
                Family::V4 => std::net::Ipv4Addr::LOCALHOST.into(),
                Family::V6 => std::net::Ipv6Addr::LOCALHOST.into(),
            };
            let port = Scene::port(0);
            let outer = self.lab.node_socket(*family, port);
            let inner = std::net::SocketAddr::new(loopback, port);
            for transport in [Transport::Tcp, Transport::Udp, Transport::UdpUnconnected] {
                for (from, target) in [
                    ("client", outer),
                    ("node", outer),
                    ("node", inner),
                    ("pod-b", outer),
                    ("pod-a", outer),
                ] {
                    let what = format!("{from} {transport} {target}");
                    calls.push((what, Call::new(transport, target, TIMEOUT)));
                }
            }
        }
        calls.retain(|(what, _)| self.callers.iter().any(|caller| what.starts_with(caller)));
        calls
    }

    fn netns(&self, what: &str) -> &'a Netns {
        match what.split(' ').next().unwrap() {
            "client" => &self.lab.client,
            "node" => &self.lab.node,
            "pod-b" => &self.lab.pods[1].netns,
            _ => &self.lab.pods[0].netns,
        }
    }

    /// Every connection is asked something.
    pub fn go_on(&mut self) {
        for (what, session) in &mut self.sessions {
            session.ask().unwrap_or_else(|failure| panic!("{what}: {failure}"));
        }
    }

    /// Asks on every connection, and makes new ones, again and again while something happens. A
    /// datagram that is lost is a failure.
    pub fn during(&mut self, action: impl FnOnce() + Send) {
        self.while_calling(action, &|from, call| reach(from, call));
    }

    /// As [`Talks::during`], but the first datagrams of a new connection may be lost: between programs
    /// with different maps there is a moment in which one has seen the question and another has to see
    /// the answer. As resolvers do, it is asked again.
    pub fn during_a_change_of_maps(&mut self, action: impl FnOnce() + Send) {
        self.while_calling(action, &|from, call| {
            let mut attempts = if call.transport == Transport::Tcp { 1 } else { 10 };
            loop {
                let short = Call { timeout: call.timeout / attempts, ..call };
                attempts -= 1;
                match reach(from, short) {
                    Err(_) if attempts > 0 => std::thread::sleep(call.timeout / 30),
                    result => return result,
                }
            }
        });
    }

    fn while_calling(
        &mut self,
        action: impl FnOnce() + Send,
        call_anew: &dyn Fn(&Netns, Call) -> Result<Reply, Failure>,
    ) {
        let (done, rounds) = (AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            let (done, rounds) = (&done, &rounds);
            let actor = scope.spawn(move || {
                // Not before the talks have begun, and not before they have gone on for a while.
                wait_for(rounds, 1);
                let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(action));
                wait_for(rounds, rounds.load(Ordering::SeqCst).saturating_add(2));
                done.store(true, Ordering::SeqCst);
                result
            });
            let _freed = Freed(rounds);
            let calls = self.calls();
            while !done.load(Ordering::SeqCst) {
                self.go_on();
                for (what, call) in &calls {
                    call_anew(self.netns(what), *call)
                        .unwrap_or_else(|failure| panic!("new: {what}: {failure}"));
                }
                rounds.fetch_add(1, Ordering::SeqCst);
            }
            if let Err(panic) = actor.join().unwrap() {
                std::panic::resume_unwind(panic);
            }
        });
    }
}

/// Lets the actor end also where a talk fails: the scope waits for it.
struct Freed<'a>(&'a AtomicUsize);

impl Drop for Freed<'_> {
    fn drop(&mut self) {
        self.0.store(usize::MAX, Ordering::SeqCst);
    }
}

fn wait_for(rounds: &AtomicUsize, number: usize) {
    while rounds.load(Ordering::SeqCst) < number {
        std::thread::yield_now();
    }
}
