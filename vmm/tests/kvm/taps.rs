//! Machines and taps: a tap belongs to one machine at a time, and is free again afterwards.

use std::process::Command;

use crate::support::{COUNTING, config, counter, kvm_or_skip, let_count, machine_with};
use ferry_vmm::tap::{Tap, TapError};
use ferry_vmm::{BuildError, Machine, MachineConfig, NetConfig};
use nix::sched::{CloneFlags, unshare};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

fn namespace_or_skip() -> bool {
    let Err(error) = unshare(CloneFlags::CLONE_NEWNET) else { return kvm_or_skip() };
    println!("SKIPPED tier tap: can't make a network namespace: {error}");
    assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "CI needs root: {error}");
    false
}

fn config_with_tap(tap: &str) -> MachineConfig {
    let mut config = config(16 << 20);
    config.net = Some(NetConfig { tap: tap.into(), mac: MAC });
    config
}

fn refusal(tap: &str) -> TapError {
    match Machine::build(&config_with_tap(tap)) {
        Err(BuildError::Tap(error)) => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_tap_that_cannot_be_had_is_named_with_the_reason() {
    if !namespace_or_skip() {
        return;
    }
    assert!(matches!(refusal("tap0"), TapError::Missing { name } if name == "tap0"));
    assert!(matches!(refusal("lo"), TapError::NotATap { .. }));
    Tap::make_persistent("tap0").unwrap();
    let machine = machine_with(&config_with_tap("tap0"), COUNTING);
    assert_eq!(machine.mac(), Some(MAC));
    assert!(matches!(refusal("tap0"), TapError::Busy { name } if name == "tap0"));
    machine.run().unwrap();
    let_count(&machine, 10);
    machine.stop();
    let count = counter(&machine);
    // The memory stays, the tap is free.
    let other = Machine::build(&config_with_tap("tap0")).unwrap();
    assert_eq!(counter(&machine), count);
    drop(other);
    Machine::build(&config_with_tap("tap0")).unwrap();
}

#[test]
fn a_machine_outlives_the_deletion_of_its_tap() {
    if !namespace_or_skip() {
        return;
    }
    Tap::make_persistent("tap0").unwrap();
    let machine = machine_with(&config_with_tap("tap0"), COUNTING);
    machine.run().unwrap();
    let deleted = Command::new("ip").args(["link", "delete", "tap0"]).status().unwrap();
    assert!(deleted.success());
    let_count(&machine, 1000);
    machine.pause().unwrap();
    machine.save_state().unwrap();
    machine.run().unwrap();
    assert!(machine.send_to_network(&[0; 60]).is_err());
}
