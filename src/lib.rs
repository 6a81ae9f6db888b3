//! `portmap` forwards hostPorts of pods: a chained CNI plugin.
//!
//! ```text
//! env + stdin ─► cni::Invocation, cni::Envelope ─► conf::NetConf ─► request::Request
//!                                                                       │
//!            backend::{iptables, nftables} ◄─ engine ◄─ record::Record ◄┘ verb
//!            (pure: objects, rules, scripts)    │
//!                                               └─► sys: processes, files, netlink
//! ```
//!
//! Desired state is a pure function of the records of all attachments; the backends render it and
//! the kernel gets it in one transaction. `commands` are what people run; those that install work on
//! plugin lists as text (`conflist`), those that look show what was read (`inventory`, `who`), and
//! `doctor` judges facts of the node. Only `sys` and `demo` touch the host.

pub mod backend;
pub mod cilium;
pub mod claims;
pub mod cni;
pub mod commands;
pub mod conf;
pub mod conflist;
pub mod demo;
pub mod doctor;
pub mod engine;
pub mod error;
pub mod facts;
pub mod flush;
pub mod inventory;
pub mod model;
pub mod record;
pub mod request;
pub mod sys;
pub mod throttle;
pub mod usage;
pub mod verb;
pub mod who;
