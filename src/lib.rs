//! `portmap` forwards hostPorts of pods: a chained CNI plugin.

pub mod backend;
pub mod cni;
pub mod conf;
pub mod demo;
pub mod error;
pub mod facts;
pub mod model;
pub mod record;
pub mod sys;
