//! The live migration engine: it carries out what the protocol core ([`ferry_protocol`]) decides.
//!
//! ```text
//!            caller: ferry, an orchestrator, a test
//!                 | SourceVm / TargetHost (ports.rs), MigrateOptions
//!                 v
//!   engine/source.rs, engine/target.rs  --events-->  ferry_protocol::{source, target}
//!                 |                     <--actions--
//!     +-----------+-----------+------------------+
//!     v                       v                  v
//!  stream/: one thread     transport/: the    vm_worker: actions on the VM,
//!  a data stream           control connection one after another
//! ```
//!
//! [`migrate`] moves a VM away, [`Receiver`] takes one in. [`machine`] fits [`ferry_vmm::Machine`] to the ports;
//! another machine monitor would bring its own fitting.

pub mod announce;
mod bandwidth;
pub mod engine;
pub mod fault;
pub mod machine;
pub mod ports;
pub mod records;
pub mod report;
mod stream;
mod transport;
pub mod witness;

pub use bandwidth::BandwidthCap;
pub use engine::lobby::TurnedAway;
pub use engine::resolver::Resolver;
pub use engine::source::{MigrateOptions, Update, migrate};
pub use engine::target::{ReceiveOptions, Receiver};
pub use ferry_protocol as protocol;
pub use records::FileRecords;
pub use transport::endpoint::{Endpoint, EndpointError, ListenAddress};
pub use transport::security::{Security, SecurityError};
pub use transport::tls;
pub use transport::tls::{Credentials, Tls, TlsError};
pub use witness::WitnessAddress;
