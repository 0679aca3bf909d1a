//! What machine this is, as reports name it.

use std::fs;

use procfs::{CpuInfo, Current, Meminfo};

use crate::results::MachineInfo;

/// Everything that can be found out; what can't be stays empty.
pub(super) fn info() -> MachineInfo {
    let cpus = CpuInfo::current().ok();
    let cpu = cpus.as_ref().and_then(|cpus| cpus.model_name(0).map(ToOwned::to_owned)).unwrap_or_default();
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    MachineInfo {
        cpu,
        cores: cpus.and_then(|cpus| u32::try_from(cpus.num_cores()).ok()).unwrap_or_default(),
        memory_bytes: Meminfo::current().map(|memory| memory.mem_total).unwrap_or_default(),
        kernel: kernel.trim().to_owned(),
        kvm: kvm(),
        ferry: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

/// The module behind /dev/kvm. One that is built into the kernel can't be told apart here.
fn kvm() -> String {
    let modules = ["kvm_intel", "kvm_amd", "kvm_pvm"];
    let loaded =
        modules.into_iter().find(|module| fs::exists(format!("/sys/module/{module}")).unwrap_or(false));
    loaded.unwrap_or("unknown").to_owned()
}
