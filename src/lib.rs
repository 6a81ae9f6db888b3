//! `portmap` forwards hostPorts of pods: a chained CNI plugin.

pub mod demo;
pub mod model;
pub mod sys;
