//! Disks and the entropy device in descriptions and saved states, beside the virtio-mmio windows that all devices have.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use super::super::Machine;
use crate::config::{DISK_SERIAL_BYTES_MAX, DISKS_MAX, DiskChoice, DiskConfig, MachineConfig, SourceDisk};
use crate::saved::sections::{DescribedDisk, VirtioBlock, VirtioRng};
use crate::saved::{Announced, Reader, StateError, Writer};

/// Adds what a target has to know of a machine's disks and whether it has an entropy device.
pub(super) fn describe(machine: &Machine, writer: &mut Writer) -> Result<(), StateError> {
    for (config, disk) in machine.config.disks.iter().zip(&machine.disks) {
        let DiskConfig { path, read_only, serial, locked: _, taken_over: _ } = config;
        let SourceDisk { size_bytes, mark } = disk.disk().as_source();
        // A path from the source's working directory means nothing to a target.
        let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
        writer.add(&DescribedDisk {
            path: path.as_os_str().as_bytes().to_vec(),
            size_bytes,
            read_only: *read_only,
            serial: serial.clone(),
            mark,
        })?;
    }
    if machine.config.rng {
        writer.add(&VirtioRng {})?;
    }
    Ok(())
}

/// The disks of a described machine on this host, and whether it has an entropy device.
pub(super) fn from_description(
    reader: &Reader<'_>,
    choices: Vec<DiskChoice>,
) -> Result<(Vec<DiskConfig>, bool), StateError> {
    let described: Vec<DescribedDisk> = reader.at_most(DISKS_MAX)?;
    if !choices.is_empty() && choices.len() != described.len() {
        return Err(StateError::DiskChoices { given: choices.len(), disks: described.len() });
    }
    let mut choices = choices.into_iter();
    let disks = described.into_iter().map(|disk| disk_config(disk, choices.next()));
    let disks = disks.collect::<Result<_, _>>()?;
    Ok((disks, has_rng(reader)?))
}

fn disk_config(described: DescribedDisk, choice: Option<DiskChoice>) -> Result<DiskConfig, StateError> {
    let DescribedDisk { path, size_bytes, read_only, serial, mark } = described;
    let there = OsString::from_vec(path).into();
    let DiskChoice { path, read_only: expected, locked } =
        choice.unwrap_or(DiskChoice { path: there, read_only: None, locked: true });
    if expected.is_some_and(|expected| expected != read_only) {
        return Err(StateError::DiskAccess { path, at_source: access(read_only), here: access(!read_only) });
    }
    let taken_over = Some(SourceDisk { size_bytes, mark });
    Ok(DiskConfig { path, read_only, serial, locked, taken_over })
}

fn access(read_only: bool) -> &'static str {
    if read_only { "read-only" } else { "writable" }
}

fn has_rng(reader: &Reader<'_>) -> Result<bool, StateError> {
    Ok(reader.one_at_most::<VirtioRng>()?.is_some())
}

/// The kinds of sections that [`save`] writes for this machine.
pub(super) fn sections(machine: &Machine) -> impl Iterator<Item = Announced> {
    let disks = (!machine.disks.is_empty()).then(Announced::of::<VirtioBlock>);
    disks.into_iter().chain(machine.config.rng.then(Announced::of::<VirtioRng>))
}

/// Adds what a saved state says of disks and entropy device. Nothing is under way in a machine that is saved, so it is only
/// what the guest has been told of them.
pub(super) fn save(machine: &Machine, writer: &mut Writer) -> Result<(), StateError> {
    for disk in saved_disks(machine) {
        writer.add(&disk)?;
    }
    if machine.config.rng {
        writer.add(&VirtioRng {})?;
    }
    Ok(())
}

/// What a saved state says of them.
#[derive(Debug)]
pub(super) struct SavedDevices {
    disks: Vec<VirtioBlock>,
    rng: bool,
}

/// Reads what [`save`] has written.
pub(super) fn read(reader: &Reader<'_>) -> Result<SavedDevices, StateError> {
    Ok(SavedDevices { disks: reader.at_most(DISKS_MAX)?, rng: has_rng(reader)? })
}

/// Checks that a saved state is of a machine with the same devices.
pub(super) fn check(machine: &Machine, saved: &SavedDevices) -> Result<(), StateError> {
    let MachineConfig { memory: _, cpus: _, cpu: _, net: _, disks: _, rng: our_rng, serial: _, clock: _ } =
        &machine.config;
    let SavedDevices { disks, rng } = saved;
    let ours = saved_disks(machine);
    if *disks != ours {
        let what = format!("it has {}, and this one has {}", in_words(disks), in_words(&ours));
        return Err(StateError::OtherMachine { what });
    }
    if rng != our_rng {
        let what = "only one of the two has an entropy device".to_owned();
        return Err(StateError::OtherMachine { what });
    }
    Ok(())
}

/// Disks in an error: a peer may have said that their serial numbers are as long as it likes.
fn in_words(disks: &[VirtioBlock]) -> String {
    let disks = disks.iter().map(|VirtioBlock { size_bytes, read_only, serial }| {
        let serial: String = serial.iter().flat_map(|it| it.chars()).take(DISK_SERIAL_BYTES_MAX).collect();
        format!("{size_bytes} bytes, {}, serial number {serial:?}", access(*read_only))
    });
    let disks: Vec<_> = disks.collect();
    if disks.is_empty() { "no disks".to_owned() } else { format!("the disks [{}]", disks.join("; ")) }
}

fn saved_disks(machine: &Machine) -> Vec<VirtioBlock> {
    let disks = machine.config.disks.iter().zip(&machine.disks);
    let saved = disks.map(|(config, disk)| VirtioBlock {
        size_bytes: disk.disk().size_bytes(),
        read_only: config.read_only,
        serial: config.serial.clone(),
    });
    saved.collect()
}
