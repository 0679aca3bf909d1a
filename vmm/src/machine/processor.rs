//! The processor of one machine: chosen when it is built, described before it moves, checked before it is taken in.

use std::sync::{MutexGuard, PoisonError};

use kvm_bindings::CpuId;
use kvm_ioctls::Kvm;

use super::Machine;
use crate::capability::Capabilities;
use crate::config::MachineConfig;
use crate::cpu::{self, CpuError, CpuModel, CpuProfile, Processor, ShownCpu};
use crate::saved::sections::{Cpu as SavedCpu, Vcpu as SavedVcpu};
use crate::saved::{StateError, from_abi_bytes};

/// What the guest is shown, and what this host could show.
#[derive(Debug)]
pub(super) struct MachineCpu {
    pub(super) shown: Processor,
    offered: Processor,
    /// The profile with which the guest was started, and the limit of this host.
    profile: String,
    limit: CpuProfile,
    /// Why it is not known what shows through.
    leaks_unknown: Option<&'static str>,
    /// Whether `shown` is what the guest has been shown elsewhere, and not what a new guest would be.
    is_described: bool,
}

impl MachineCpu {
    /// What the machine's guest is to be shown.
    ///
    /// # Errors
    /// This host can't: each missing feature by name.
    pub(super) fn choose(
        config: &MachineConfig,
        kvm: &Kvm,
        capabilities: &Capabilities,
        tsc_khz: Option<u32>,
    ) -> Result<Self, CpuError> {
        let limit = match &config.cpu {
            CpuModel::Profile(profile) => profile,
            CpuModel::Shown(shown) => &shown.limit,
        };
        let offered = Processor { tsc_khz, ..cpu::offered(kvm, capabilities, limit, config.cpus) };
        let (shown, profile) = match &config.cpu {
            CpuModel::Profile(profile) => (cpu::of_profile(profile, offered.clone())?, profile.to_string()),
            CpuModel::Shown(described) => {
                let ShownCpu { saved, limit } = &**described;
                let shown = Processor::from_saved(saved);
                cpu::check(&shown, &offered, &saved.profile, limit)?;
                (shown, saved.profile.clone())
            }
        };
        let is_described = matches!(config.cpu, CpuModel::Shown(_));
        let leaks_unknown = cpu::leaks_unknown(kvm, capabilities.cpuid.as_slice());
        Ok(Self { leaks_unknown, shown, offered, profile, limit: limit.clone(), is_described })
    }
}

/// The processor that a description asks for. An older ferry's has none, and is checked when its state comes.
pub(super) fn described(saved: Option<SavedCpu>, limit: CpuProfile) -> Result<CpuModel, StateError> {
    Ok(match saved {
        Some(saved) => CpuModel::Shown(Box::new(ShownCpu { saved: cpu::sound(saved)?, limit })),
        None => CpuModel::Profile(limit),
    })
}

impl Machine {
    /// The profile that the guest's processor has, by name.
    #[must_use]
    pub fn cpu_profile(&self) -> String {
        self.cpu().profile.clone()
    }

    /// The features that the guest sees on this host although it is not shown them, by name: this KVM's back end lets
    /// the host's CPUID through, and no profile can hide them.
    #[must_use]
    pub fn leaked_features(&self) -> Vec<String> {
        let cpu = self.cpu();
        cpu::leaks_in_words(&cpu.offered.leaked, &cpu.shown.leaves)
    }

    /// Why [`Machine::leaked_features`] may be incomplete, if it may.
    #[must_use]
    pub fn leaks_unknown(&self) -> Option<&'static str> {
        self.cpu().leaks_unknown
    }

    /// CPUID of one vCPU of a new guest.
    pub(super) fn cpuid_of(&self, vcpu: u8) -> CpuId {
        let leaves = cpu::for_vcpu(&self.cpu().shown.leaves, vcpu, self.config.cpus);
        cpu::to_kvm(&leaves).expect("KVM's own list, and two leaves of topology, fit")
    }

    /// What goes before the first page, so that a target can refuse.
    pub(super) fn shown_cpu(&self) -> SavedCpu {
        let cpu = self.cpu();
        // What it sees on this host it has seen as well.
        let leaked = cpu::either(&cpu.shown.leaked, &cpu.offered.leaked);
        Processor { leaked, ..cpu.shown.clone() }.to_saved(&cpu.profile)
    }

    /// Takes the processor from the state of a machine whose description had none.
    pub(super) fn check_cpu(&self, first: &SavedVcpu) -> Result<(), StateError> {
        let mut cpu = self.cpu();
        if cpu.is_described {
            return Ok(());
        }
        let leaves = first.cpuid.iter().map(|bytes| from_abi_bytes("vcpu", bytes));
        let shown = Processor {
            leaves: leaves.collect::<Result<_, _>>()?,
            tsc_khz: first.tsc_khz,
            arch_capabilities: cpu.offered.arch_capabilities,
            ..Processor::default()
        };
        "unknown".clone_into(&mut cpu.profile);
        // A KVM that lets features show through lists them in its vCPUs' CPUID as well.
        let leaves = cpu::either(&cpu.offered.leaves, &cpu.offered.leaked);
        let offered = Processor { leaves, ..cpu.offered.clone() };
        cpu::check(&shown, &offered, &cpu.profile, &cpu.limit)?;
        cpu.shown = shown;
        cpu.is_described = true;
        Ok(())
    }

    fn cpu(&self) -> MutexGuard<'_, MachineCpu> {
        self.cpu.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
