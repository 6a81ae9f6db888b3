//! The CNI protocol: environment, envelope, results and errors. Knows nothing of ports.

pub mod envelope;
pub mod invocation;
pub mod json;
pub mod reply;
pub mod result;
pub mod version;
