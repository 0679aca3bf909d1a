//! The lab on real network namespaces, as root. One test server stands in for the VM.

mod captures;
mod http;
mod namespaces;
mod probes;
mod server;
mod tier;
