//! Machines come and go without leaving threads, files or mappings behind. Alone in its process, because
//! it counts those of the process.

mod support;

use std::fs;

use ferry_vmm::Machine;
use support::*;

fn count(directory: &str) -> usize {
    fs::read_dir(directory).unwrap().count()
}

#[test]
fn a_dropped_machine_leaves_nothing() {
    if !kvm_or_skip() {
        return;
    }
    let mut config = config(16 << 20);
    config.cpus = 2;
    let cycle = || {
        let machine = machine_with(&config, COUNTING);
        machine.run().unwrap();
        let_count(&machine, 100);
        machine.pause().unwrap();
        let state = machine.save_state().unwrap();
        let target = Machine::build(&config).unwrap();
        copy_memory(&machine.ram(), &target.ram());
        target.restore_state(&state).unwrap();
        target.run().unwrap();
        let_count(&target, 100);
    };
    cycle();
    let maps = || fs::read_to_string("/proc/self/maps").unwrap().lines().count();
    let before = (count("/proc/self/task"), count("/proc/self/fd"), maps());
    for _ in 0..20 {
        cycle();
    }
    let after = (count("/proc/self/task"), count("/proc/self/fd"), maps());
    assert_eq!((after.0, after.1), (before.0, before.1), "threads and files");
    assert!(after.2 <= before.2 + 4, "{} mappings became {}", before.2, after.2);
}
