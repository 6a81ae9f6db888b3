//! How much is measured.

use std::time::Duration;

pub struct Plan {
    /// Numbers of other mappings beside the measured calls, rising.
    pub others: Vec<u16>,
    pub rounds: usize,
    /// Rounds that are measured however long they take.
    pub min_rounds: usize,
    /// How long a group of calls may go on beyond its least number of rounds.
    pub patience: Duration,
    /// Nodes that get their first ADD.
    pub first_rounds: usize,
    /// Numbers of pod links beside the new one.
    pub links: Vec<u16>,
    /// Numbers of mappings for the connection rates and the cost of packets, rising.
    pub mappings: Vec<u16>,
    pub rate_rounds: usize,
    pub rate_time: Duration,
    /// Conntrack entries beside the UDP calls.
    pub entries: u32,
    pub flow_rounds: usize,
    /// Bytes of a transfer whose throughput is measured.
    pub volume: u64,
    pub packet_rounds: usize,
    /// Runs of a program on a frame that it does not change, per round.
    pub repeats: u32,
}

impl Plan {
    pub fn full() -> Self {
        Self {
            others: vec![0, 1000, 5000],
            rounds: 15,
            min_rounds: 7,
            patience: Duration::from_secs(45),
            first_rounds: 7,
            links: vec![0, 100],
            mappings: vec![1, 1000, 10_000],
            // Many short turns: a burst of load elsewhere spoils some of everybody's, which the
            // median forgives, and not one lane's whole share.
            rate_rounds: 35,
            rate_time: Duration::from_millis(140),
            entries: 100_000,
            flow_rounds: 21,
            volume: 256 << 20,
            packet_rounds: 15,
            repeats: 200_000,
        }
    }

    pub fn quick() -> Self {
        Self {
            others: vec![0, 1000],
            rounds: 5,
            min_rounds: 3,
            patience: Duration::from_secs(10),
            first_rounds: 3,
            links: vec![0, 20],
            mappings: vec![1, 1000],
            rate_rounds: 11,
            rate_time: Duration::from_millis(100),
            entries: 100_000,
            flow_rounds: 7,
            volume: 64 << 20,
            packet_rounds: 5,
            repeats: 50_000,
        }
    }
}
