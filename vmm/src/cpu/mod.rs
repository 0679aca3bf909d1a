//! The processor that a guest is shown: profiles, what KVM makes of them, and whether another host can go on showing it.
//!
//! ```text
//!   KVM's list ──profile──► table ──place in the machine──► each vCPU       leaks: what shows through all the same
//!                             │                                               │
//!                             └──► description of the machine ◄───────────────┘
//!                                        │ before the first page
//!                                        ▼
//!                             compare with what the target offers ──► refused, each feature by name
//! ```
//!
//! It shows features and narrows them; it emulates none.

mod compare;
mod filter;
mod leaks;
mod profile;
mod topology;
mod words;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::Kvm;

pub use compare::MissingFeature;
pub(crate) use compare::{Processor, is_same_tsc};
pub(crate) use filter::hide_msrs;
use leaks::Leaks;
pub use profile::{CPU_PROFILE_BYTES_MAX, CpuProfile, CpuProfileError};
pub(crate) use topology::for_vcpu;

use crate::capability::Capabilities;
use crate::saved::StateError;
use crate::saved::sections::{Cpu as SavedCpu, CpuidLeaf};
use words::{Feature, WORDS, settled};

/// The processor of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CpuModel {
    /// What the profile leaves of this host's.
    Profile(CpuProfile),
    /// The one that a machine's guest has been shown elsewhere.
    Shown(Box<ShownCpu>),
}

impl Default for CpuModel {
    fn default() -> Self {
        Self::Profile(CpuProfile::default())
    }
}

/// The processor that a guest has been shown elsewhere, from a machine's description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShownCpu {
    pub(crate) saved: SavedCpu,
    /// What this host offers at most.
    pub(crate) limit: CpuProfile,
}

/// Why a machine's guest can't have its processor on this host.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CpuError {
    /// A profile promises more than the host has.
    #[error("this host's processor or KVM can't show a guest the CPU profile {profile}: it lacks {}", listed(.missing))]
    Profile {
        /// The profile's name.
        profile: String,
        /// What it needs and the host lacks.
        missing: Vec<MissingFeature>,
    },
    /// The guest was shown more than this host offers.
    #[error(
        "the guest was shown a processor (CPU profile {profile}) that this host can't offer{}; {}; what is missing: {}",
        limited(.limit.as_deref()), advice(.fits.as_deref()), listed(.missing)
    )]
    Missing {
        /// The profile with which it was started.
        profile: String,
        /// The profile to which this host is limited, if it is.
        limit: Option<String>,
        /// What it was shown and is not offered here.
        missing: Vec<MissingFeature>,
        /// The richest profile with which it could have come.
        fits: Option<String>,
    },
}

fn listed(missing: &[MissingFeature]) -> String {
    missing.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn limited(limit: Option<&str>) -> String {
    limit.map_or_else(String::new, |limit| format!(" (it is limited to {limit})"))
}

fn advice(fits: Option<&str>) -> String {
    match fits {
        Some(fits) => format!("a guest started with --cpu {fits} could move here"),
        None => "none of ferry's own profiles would have done; start guests that are to move here with a profile file \
             that leaves these features out"
            .to_owned(),
    }
}

/// What this host can show: KVM's list as far as `limit` goes, and what shows through.
pub(crate) fn offered(kvm: &Kvm, capabilities: &Capabilities, limit: &CpuProfile, cpus: u8) -> Processor {
    let supported = capabilities.cpuid.as_slice();
    let leaked = match leaks::of_host(kvm, supported) {
        Leaks::Known(leaked) => leaked.clone(),
        Leaks::Unknown(_) => Vec::new(),
    };
    let table = for_vcpu(&limit.apply(supported), 0, cpus);
    Processor {
        leaves: table,
        leaked,
        arch_capabilities: feature_msr(kvm, compare::MSR_ARCH_CAPABILITIES),
        tsc_khz: None,
        scales_tsc: capabilities.scales_tsc,
    }
}

/// The processor that a new machine's guest is shown.
///
/// # Errors
/// The profile needs what the host lacks.
pub(crate) fn of_profile(profile: &CpuProfile, offered: Processor) -> Result<Processor, CpuError> {
    let missing = compare::lacking(profile, &offered);
    if missing.is_empty() {
        return Ok(offered);
    }
    Err(CpuError::Profile { profile: profile.to_string(), missing })
}

/// Whether a guest that was shown `shown` can go on here.
///
/// # Errors
/// Everything that is missing, and what would have worked.
pub(crate) fn check(
    shown: &Processor,
    offered: &Processor,
    profile: &str,
    limit: &CpuProfile,
) -> Result<(), CpuError> {
    let missing = compare::compare(shown, offered);
    if missing.is_empty() {
        return Ok(());
    }
    let fits = compare::profile_that_fits(shown, offered).map(|profile| profile.to_string());
    let limit = (*limit != CpuProfile::default()).then(|| limit.to_string());
    Err(CpuError::Missing { profile: profile.to_owned(), limit, missing, fits })
}

/// Why it is not known what shows through here, if it isn't.
pub(crate) fn leaks_unknown(kvm: &Kvm, supported: &[kvm_cpuid_entry2]) -> Option<&'static str> {
    match leaks::of_host(kvm, supported) {
        Leaks::Known(_) => None,
        Leaks::Unknown(reason) => Some(reason),
    }
}

/// What of two tables of features shows through in either.
pub(crate) fn either(a: &[kvm_cpuid_entry2], b: &[kvm_cpuid_entry2]) -> Vec<kvm_cpuid_entry2> {
    let mut all = a.to_vec();
    for leaf in b {
        match all.iter_mut().find(|other| (other.function, other.index) == (leaf.function, leaf.index)) {
            Some(other) => {
                other.eax |= leaf.eax;
                other.ebx |= leaf.ebx;
                other.ecx |= leaf.ecx;
                other.edx |= leaf.edx;
            }
            None => all.push(*leaf),
        }
    }
    all
}

/// The features that show a guest of this host more than its profile, in words.
pub(crate) fn leaks_in_words(leaked: &[kvm_cpuid_entry2], table: &[kvm_cpuid_entry2]) -> Vec<String> {
    let mut told = Vec::new();
    for word in &WORDS {
        let mask = word.of(leaked) & !word.of(table) & settled(word);
        let bits = (0..32).filter(|bit| mask & (1 << bit) != 0);
        told.extend(bits.map(|bit| {
            let name = word.name(bit).map(str::to_owned);
            name.unwrap_or_else(|| Feature { word, bit }.to_string())
        }));
    }
    told
}

/// The value that KVM gives a guest in a feature MSR, where it tells.
fn feature_msr(kvm: &Kvm, index: u32) -> Option<u64> {
    let entry = kvm_msr_entry { index, ..kvm_msr_entry::default() };
    let mut msrs = Msrs::from_entries(&[entry]).ok()?;
    let read = kvm.get_msrs(&mut msrs).ok()?;
    msrs.as_slice().get(..read)?.first().map(|msr| msr.data)
}

impl Processor {
    pub(crate) fn to_saved(&self, profile: &str) -> SavedCpu {
        let Self { leaves, leaked, arch_capabilities: _, tsc_khz, scales_tsc: _ } = self;
        let saved = |leaves: &[kvm_cpuid_entry2]| leaves.iter().map(to_saved_leaf).collect();
        SavedCpu {
            profile: profile.to_owned(),
            leaves: saved(leaves),
            leaked: saved(leaked),
            arch_capabilities: compare::promises_shown(self),
            tsc_khz: *tsc_khz,
        }
    }

    pub(crate) fn from_saved(saved: &SavedCpu) -> Self {
        let SavedCpu { profile: _, leaves, leaked, arch_capabilities, tsc_khz } = saved;
        let live = |leaves: &[CpuidLeaf]| leaves.iter().map(from_saved_leaf).collect();
        Self {
            leaves: live(leaves),
            leaked: live(leaked),
            arch_capabilities: *arch_capabilities,
            tsc_khz: *tsc_khz,
            scales_tsc: false,
        }
    }
}

/// Bounds what another host says of a processor, and makes its words fit to be shown.
pub(crate) fn sound(mut saved: SavedCpu) -> Result<SavedCpu, StateError> {
    let leaves = saved.leaves.len().max(saved.leaked.len());
    if leaves > KVM_MAX_CPUID_ENTRIES {
        return Err(StateError::Invalid { section: "cpu", what: format!("{leaves} leaves of CPUID") });
    }
    saved.profile.retain(|character| !character.is_control());
    saved.profile = saved.profile.chars().take(profile::NAME_BYTES_MAX).collect();
    Ok(saved)
}

fn to_saved_leaf(leaf: &kvm_cpuid_entry2) -> CpuidLeaf {
    let kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, padding: _ } = *leaf;
    CpuidLeaf { function, index, flags, eax, ebx, ecx, edx }
}

fn from_saved_leaf(leaf: &CpuidLeaf) -> kvm_cpuid_entry2 {
    let CpuidLeaf { function, index, flags, eax, ebx, ecx, edx } = *leaf;
    kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..kvm_cpuid_entry2::default() }
}

/// The table as KVM takes it.
pub(crate) fn to_kvm(leaves: &[kvm_cpuid_entry2]) -> Result<CpuId, StateError> {
    let too_many = |_| StateError::Invalid { section: "cpu", what: "too many CPUID leaves".into() };
    CpuId::from_entries(leaves).map_err(too_many)
}
