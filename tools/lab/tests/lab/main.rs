//! The lab on real network namespaces, as root. One test server stands in for the VM.

mod http;
mod namespaces;
mod probes;
mod server;
mod tier;
