//! Test hosts, load and measurement for live migrations: what `ferry demo` and the lab tests share.
//!
//! ```text
//!   host-a                    switch                    host-b
//!   br0 ── uplink ═════ port-a ┐     ┌ port-b ═════ uplink ── br0
//!    └ tap0 (the VM)           ├ br0 ┤                  tap0 ┘
//!                              └ port-client
//!                                    ║
//!                              client: eth0  (HttpLoad, UdpProbe, TcpProbe, Capture)
//! ```
//!
//! Everything lives in anonymous network namespaces ([`Namespace`]), which vanish with the process
//! that made them, however it ends. Real time is inherent here, so all measurements share one
//! [`LabClock`].
//!
//! The crate knows nothing of machines or of migration: it makes taps, and somebody else opens them.

pub mod capture;
pub mod clock;
pub mod http;
pub mod namespace;
pub mod network;
pub mod plot;
pub mod probe;
pub mod timeline;

pub use capture::{Capture, Scope};
pub use clock::LabClock;
pub use http::{ExpectedBody, HttpLoad, HttpReport, HttpTarget};
pub use namespace::{Namespace, NamespaceError};
pub use network::lab::{Lab, SwitchPort};
pub use network::{Links, Mac, NetworkError};
pub use plot::{Band, MigrationPlot};
