//! Disks of whole machines on KVM: what they write to guest memory is in the dirty log, and one machine at a time has them.

use std::fs::File;
use std::path::PathBuf;

use super::super::{Machine, RunError};
use crate::config::{
    Backing, BootSource, ClockMode, DiskChoice, DiskConfig, Kernel, LocalChoices, MachineConfig,
    MemoryChoices, MemoryConfig, SerialTarget,
};
use crate::cpu::{CpuModel, CpuProfile};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::driver::{Driver, Piece, VERSION_1, eventually};
use crate::disk::DiskError;
use crate::machine::BuildError;
use crate::saved::StateError;
use crate::tiny_kernel::elf;

/// halt: hlt; jmp halt, with interrupts off.
const HALTING: &[u8] = &[0xf4, 0xeb, 0xfd];

const PAGE: u64 = 4096;
/// Chain pieces lie here; what the test itself writes is far from where the disk is read to.
const HEADER: u64 = 0x20_0000;
const INTO: u64 = 0x40_0000;
const READ_BYTES: u32 = 3 << 12;

fn kvm_or_skip() -> bool {
    let Err(error) = File::options().read(true).write(true).open("/dev/kvm") else { return true };
    println!("SKIPPED tier kvm: can't open /dev/kvm: {error}");
    assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "CI needs /dev/kvm: {error}");
    false
}

struct Image {
    _directory: tempfile::TempDir,
    path: PathBuf,
}

fn image() -> Image {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    std::fs::write(&path, vec![0x5a; 1 << 20]).unwrap();
    Image { _directory: directory, path }
}

fn config(images: &[&Image]) -> MachineConfig {
    let disk = |image: &&Image| DiskConfig {
        path: image.path.clone(),
        read_only: false,
        serial: Some("one".into()),
        locked: true,
        taken_over: None,
    };
    MachineConfig {
        memory: MemoryConfig::new(16 << 20, Backing::PrivateAnonymous),
        cpus: 1,
        cpu: CpuModel::default(),
        net: None,
        disks: images.iter().map(disk).collect(),
        rng: true,
        serial: SerialTarget::Null,
        clock: ClockMode::default(),
    }
}

fn halting(config: &MachineConfig) -> Machine {
    let machine = Machine::build(config).unwrap();
    let kernel = Kernel::Image { name: "halting", bytes: Vec::leak(elf(HALTING)) };
    machine.load(&BootSource { kernel, initrd: None, cmdline: String::new(), acpi: false }).unwrap();
    machine
}

fn local(disks: Vec<DiskChoice>) -> LocalChoices {
    LocalChoices {
        tap: None,
        disks,
        serial: SerialTarget::Null,
        memory: MemoryChoices::default(),
        cpu: CpuProfile::default(),
    }
}

fn target_of(machine: &Machine, disks: Vec<DiskChoice>) -> Result<Machine, String> {
    let config = Machine::config_from_description(&machine.description(), local(disks));
    let config = config.map_err(|error| error.to_string())?;
    Machine::build(&config).map_err(|error| error.to_string())
}

fn dirty_pages(machine: &Machine) -> Vec<u64> {
    let pages = machine.ram().page_count();
    let mut words = vec![0_u64; usize::try_from(pages.div_ceil(64)).unwrap()];
    machine.collect_dirty(&mut words).unwrap();
    let is_set = |page: &u64| words[usize::try_from(page / 64).unwrap()] >> (page % 64) & 1 == 1;
    (0..pages).filter(is_set).collect()
}

#[test]
fn what_a_disk_is_read_into_is_in_the_dirty_log() {
    if !kvm_or_skip() {
        return;
    }
    let image = image();
    let machine = halting(&config(&[&image]));
    machine.run().unwrap();
    let driver = Driver::new(machine.disks[0].transport(), machine.ram(), 16);
    driver.start(VERSION_1);
    driver.write(HEADER, &[0; 16]);
    driver.lay(
        0,
        &[Piece::FromGuest(HEADER, 16), Piece::ToGuest(INTO, READ_BYTES), Piece::ToGuest(HEADER + 64, 1)],
    );
    // Something near has been touched before, or the log would report all of its surroundings for the first time.
    driver.write(INTO + 0x10_0000, &[1]);
    machine.start_dirty_log().unwrap();
    dirty_pages(&machine);
    dirty_pages(&machine);
    driver.offer(0);
    eventually("the disk is read", || driver.used() == 1);
    assert_eq!(driver.read(INTO, 4), [0x5a; 4]);
    let dirty = dirty_pages(&machine);
    for page in INTO / PAGE..(INTO + u64::from(READ_BYTES)) / PAGE {
        assert!(dirty.contains(&page), "page {page} was written by the disk and is not in {dirty:?}");
    }
    assert!(!dirty.contains(&((INTO + u64::from(READ_BYTES)) / PAGE)));
    machine.stop_dirty_log().unwrap();
}

#[test]
fn one_machine_at_a_time_has_a_disk_and_only_its_owner_runs() {
    if !kvm_or_skip() {
        return;
    }
    let (one, two) = (image(), image());
    let config = config(&[&one, &two]);
    let source = halting(&config);
    let error = Machine::build(&config).unwrap_err();
    assert!(matches!(&error, BuildError::Disk(DiskError::InUse { path }) if *path == one.path), "{error}");
    source.run().unwrap();
    let target = target_of(&source, Vec::new()).unwrap();
    let error = target_of(&source, Vec::new()).unwrap_err();
    assert!(error.contains("being taken over"), "{error}");

    source.pause().unwrap();
    source.flush_disks().unwrap();
    let state = source.save_state().unwrap();
    let pages = source.ram().page_count();
    let ram = target.ram();
    source.ram().for_each_page(0, pages, |page, bytes| ram.write_page(page, bytes).unwrap()).unwrap();
    target.restore_state(&state).unwrap();
    assert!(
        matches!(target.run(), Err(RunError::Disk(DiskError::InUse { .. }))),
        "the source has not let go"
    );
    source.let_go_of_disks().unwrap();
    target.run().unwrap();
    assert!(matches!(source.run(), Err(RunError::Disk(DiskError::InUse { .. }))), "the source ran on");
    target.pause().unwrap();
    target.let_go_of_disks().unwrap();
    source.run().unwrap();
    drop(target);
    source.stop();
    drop(Machine::build(&config).unwrap());
}

#[test]
fn a_target_that_gets_only_one_of_two_disks_has_none() {
    if !kvm_or_skip() {
        return;
    }
    let (one, two) = (image(), image());
    let source = halting(&config(&[&one, &two]));
    let target = target_of(&source, Vec::new()).unwrap();
    source.disks[0].disk().let_go().unwrap();
    assert!(matches!(target.take_disks(), Err(DiskError::InUse { path }) if path == two.path));
    source.take_disks().unwrap();
}

#[test]
fn choices_that_do_not_fit_a_description_are_refused_by_name() {
    if !kvm_or_skip() {
        return;
    }
    let (one, two) = (image(), image());
    let source = halting(&config(&[&one]));
    let choice = |image: &Image| DiskChoice { path: image.path.clone(), read_only: None, locked: true };
    let refused = |disks| target_of(&source, disks).unwrap_err();
    assert!(refused(vec![choice(&one), choice(&two)]).contains("1 disks, and 2"));
    assert!(
        refused(vec![DiskChoice { read_only: Some(true), ..choice(&one) }])
            .contains("writable at the source")
    );
    assert!(refused(vec![choice(&two)]).contains("not the file that the source uses"));
    let missing = DiskChoice { path: "/nowhere".into(), ..choice(&one) };
    assert!(refused(vec![missing]).contains("/nowhere"));
    drop(target_of(&source, vec![choice(&one)]).unwrap());
    // Without locks the operator answers for its being the right one, but not for its size.
    File::options().write(true).open(&two.path).unwrap().set_len(4096).unwrap();
    assert!(refused(vec![DiskChoice { locked: false, ..choice(&two) }]).contains("4096 bytes here"));
}

#[test]
fn a_state_with_other_disks_is_refused() {
    if !kvm_or_skip() {
        return;
    }
    let (one, two) = (image(), image());
    let source = halting(&config(&[&one]));
    source.run().unwrap();
    source.pause().unwrap();
    let state = source.save_state().unwrap();
    let mut other = config(&[&two]);
    other.disks[0].serial = Some("other".into());
    let error = Machine::build(&other).unwrap().restore_state(&state).unwrap_err();
    assert!(matches!(&error, StateError::OtherMachine { what } if what.contains("other")), "{error}");
    let without = MachineConfig { rng: false, ..config(&[&two]) };
    assert!(Machine::build(&without).unwrap().restore_state(&state).is_err());
    Machine::build(&config(&[&two])).unwrap().restore_state(&state).unwrap();
}
