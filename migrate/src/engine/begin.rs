//! Makes the source's core of what the caller of [`super::source::migrate`] chose.

use ferry_protocol::source::{Config, MemoryPath, Source};
use ferry_protocol::{MemoryLayout, WitnessId};

use super::source::MigrateOptions;
use crate::ports::{Clock, PortError, RecordStore, SourceVm};
use crate::transport::endpoint::Endpoint;

/// The core of a migration of `vm`, whose host has `witness`.
///
/// # Errors
/// If what this host has recorded of the VM can't be read.
pub(super) fn begin(
    vm: &dyn SourceVm,
    records: &dyn RecordStore,
    options: MigrateOptions,
    layout: MemoryLayout,
    witness: Option<WitnessId>,
    clock: &dyn Clock,
) -> Result<Source, PortError> {
    let MigrateOptions {
        migration,
        vm: id,
        name,
        epoch,
        target,
        security: _,
        streams,
        adapt_streams: _,
        compression,
        bandwidth: _,
        witness: _,
        resolver: _,
        verify,
        verify_whole,
        downtime_budget,
        timeout,
        on_timeout,
        reconnect,
    } = options;
    // A record that can't be trusted must not be replaced by one that knows less: who brought the VM here may still ask.
    let arrived_by = records.load(id)?.and_then(|record| record.arrived_by);
    let config = Config {
        migration,
        vm: id,
        name,
        epoch,
        arrived_by,
        memory: match &target {
            Endpoint::Tcp(_) => MemoryPath::Streams,
            Endpoint::Unix(_) => MemoryPath::HandedOver,
        },
        target: target.to_string(),
        witness,
        description: vm.description(),
        streams,
        compression,
        verify,
        verify_whole,
        downtime_budget,
        timeout,
        on_timeout,
        reconnect,
    };
    Ok(Source::new(config, layout, clock.now()))
}
