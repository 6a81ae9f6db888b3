//! Series of measurements.

use serde_json::{Value, json};

use crate::memory::Peak;
use crate::plugin::Cost;

/// The middle value; NaN of nothing, which prints as a gap.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match (sorted.len() % 2, sorted.get(middle)) {
        (_, None) => f64::NAN,
        (1, Some(value)) => *value,
        (_, Some(value)) => f64::midpoint(sorted[middle - 1], *value),
    }
}

pub fn min(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::NAN, f64::min)
}

pub fn max(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::NAN, f64::max)
}

/// What repeated calls have cost.
#[derive(Debug, Default)]
pub struct Series {
    pub wall: Vec<f64>,
    pub cpu: Vec<f64>,
    /// Of one call that was not timed.
    pub peak: Peak,
    pub failed: usize,
    pub failure: Option<String>,
}

impl Series {
    pub fn push(&mut self, cost: Cost) {
        self.wall.push(cost.wall_ms);
        self.cpu.push(cost.cpu_ms);
        if let Some(text) = cost.failure {
            self.failed += 1;
            self.failure = Some(text);
        }
    }

    pub fn json(&self) -> Value {
        json!({
            "wall_ms": self.wall,
            "cpu_ms": self.cpu,
            "median_wall_ms": median(&self.wall),
            "median_cpu_ms": median(&self.cpu),
            "peak_own_kib": self.peak.own,
            "peak_largest_kib": self.peak.largest,
            "tools": self.peak.tools.len(),
            "failed": self.failed,
            "failure": self.failure,
        })
    }
}
