//! CPU profiles: what of a host's processor a guest is shown.
//!
//! A profile only ever takes away from what KVM supports on the host. `host` takes nothing away; `x86-64-v2` and
//! `x86-64-v3` leave the levels of the x86-64 psABI and what every kernel needs beside them; a file starts from one of
//! these and adds and removes features by name. Reading files is the caller's.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use kvm_bindings::kvm_cpuid_entry2;
use serde::Deserialize;

use super::words::{Feature, IN_MOTION, LEAF_SIZES, LEAF_XSAVE, Register, WORDS, Word};

/// The longest file that is taken for a profile, in bytes.
pub const CPU_PROFILE_BYTES_MAX: usize = 64 << 10;

/// The longest name of a profile, in bytes.
pub(crate) const NAME_BYTES_MAX: usize = 64;

/// What the psABI calls the baseline, with what kernels expect beside it: the machine's own devices and clocks.
/// The mitigations are kept because hiding them would leave the guest open to what its host is safe from.
const BASELINE: &str = "fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse \
     sse2 ht x2apic tsc_deadline_timer hypervisor tsc_adjust arat syscall nx rdtscp lm mp cmp_legacy cr8_legacy topoext \
     nonstop_tsc md_clear spec_ctrl intel_stibp spec_ctrl_ssbd amd_ibpb amd_ssbd lfence_rdtsc null_sel_clr_base \
     kvm_clocksource kvm_nop_io_delay kvm_clocksource2 kvm_steal_time kvm_pv_eoi kvm_pv_unhalt \
     kvmclock_stable";
const V2: &str = "pni ssse3 cx16 sse4_1 sse4_2 popcnt lahf_lm";
const V3: &str = "fma movbe xsave osxsave avx f16c bmi1 avx2 bmi2 abm";

/// What must be there for a level, in the order of the psABI.
const NEEDED_V2: &str = "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3";
const NEEDED_V3: &str =
    "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3 avx avx2 bmi1 bmi2 f16c fma abm movbe xsave";

/// Leaves that tell of features whose state or meaning is a host's own: performance counters, SGX, processor trace,
/// AMX, AVX10, SVM, memory encryption. Only the profile `host` shows them.
const LEAVES_OF_HOST: [u32; 13] =
    [0xa, 0x12, 0x14, 0x1b, 0x1c, 0x1d, 0x1e, 0x23, 0x24, 0x8000_000a, 0x8000_001f, 0x8000_0020, 0x8000_0022];

/// Physical addresses that every server processor of the last fifteen years has.
const PHYSICAL_ADDRESS_BITS: u8 = 46;

/// Which processor a guest is shown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuProfile {
    name: Option<String>,
    base: Level,
    add: BTreeSet<String>,
    remove: BTreeSet<String>,
    physical_address_bits: Option<u8>,
}

/// What a profile starts from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
enum Level {
    #[default]
    #[serde(rename = "host")]
    Host,
    /// Not for operators: guests of today don't run on it.
    #[serde(skip)]
    Baseline,
    #[serde(rename = "x86-64-v2")]
    V2,
    #[serde(rename = "x86-64-v3")]
    V3,
}

/// A profile that can't be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CpuProfileError {
    /// There is no profile of that name.
    #[error(
        "there is no CPU profile '{name}'; give host, x86-64-v2, x86-64-v3 or the path of a file (./NAME or /..)"
    )]
    Unknown {
        /// What was asked for.
        name: String,
    },
    /// The file is no profile.
    #[error("{name} is not a CPU profile: {what}")]
    Malformed {
        /// The file.
        name: String,
        /// What is wrong with it.
        what: String,
    },
}

/// A profile as it is in a file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileOf {
    base: Level,
    #[serde(default)]
    add: BTreeSet<String>,
    #[serde(default)]
    remove: BTreeSet<String>,
    physical_address_bits: Option<u8>,
}

impl FromStr for CpuProfile {
    type Err = CpuProfileError;

    /// A profile that ferry brings along.
    fn from_str(name: &str) -> Result<Self, CpuProfileError> {
        let base = match name {
            "host" => Level::Host,
            "x86-64-v2" => Level::V2,
            "x86-64-v3" => Level::V3,
            _ => return Err(CpuProfileError::Unknown { name: name.to_owned() }),
        };
        Ok(Self::of(base))
    }
}

impl fmt::Display for CpuProfile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl CpuProfile {
    const fn of(base: Level) -> Self {
        Self { name: None, base, add: BTreeSet::new(), remove: BTreeSet::new(), physical_address_bits: None }
    }

    /// What ferry's own profiles have at least; for finding out what shows through.
    pub(crate) const fn baseline() -> Self {
        Self::of(Level::Baseline)
    }

    /// The profiles that ferry brings along and that guests are started with to be moved, the richest first.
    pub(crate) fn portable() -> [Self; 2] {
        [Self::of(Level::V3), Self::of(Level::V2)]
    }

    /// A profile from the text of a TOML file that is called `name`:
    ///
    /// ```toml
    /// base = "x86-64-v3"             # or host, x86-64-v2
    /// add = ["aes", "avx512f"]       # names as in /proc/cpuinfo, where the host has the feature
    /// remove = ["movbe"]
    /// physical_address_bits = 40     # at most the host's
    /// ```
    ///
    /// # Errors
    /// The text is too long or no TOML, or names a feature that ferry doesn't know.
    pub fn from_toml(name: &str, text: &str) -> Result<Self, CpuProfileError> {
        let malformed = |what: String| CpuProfileError::Malformed { name: name.to_owned(), what };
        if text.len() > CPU_PROFILE_BYTES_MAX {
            return Err(malformed(format!("it is longer than {CPU_PROFILE_BYTES_MAX} bytes")));
        }
        let FileOf { base, add, remove, physical_address_bits } =
            toml::from_str(text).map_err(|error| malformed(error.message().to_owned()))?;
        if let Some(name) = add.iter().chain(&remove).find(|name| Feature::named(name).is_none()) {
            return Err(malformed(format!(
                "no feature is called '{name}'; names are those of /proc/cpuinfo"
            )));
        }
        if let Some(name) = add.intersection(&remove).next() {
            return Err(malformed(format!("'{name}' is both added and removed")));
        }
        if let Some(name) = add.iter().chain(&remove).find(|name| IN_MOTION.contains(&name.as_str())) {
            return Err(malformed(format!("'{name}' is not a profile's to decide")));
        }
        if let Some(bits) = physical_address_bits.filter(|bits| !(36..=52).contains(bits)) {
            return Err(malformed(format!("physical_address_bits is {bits}; give 36 to 52")));
        }
        let name = if name.len() <= NAME_BYTES_MAX { name } else { "a file" };
        Ok(Self { name: Some(name.to_owned()), base, add, remove, physical_address_bits })
    }

    /// What it is called: `host`, `x86-64-v2`, `x86-64-v3`, or its file.
    #[must_use]
    pub fn name(&self) -> &str {
        self.name.as_deref().unwrap_or(match self.base {
            Level::Host => "host",
            Level::Baseline => "baseline",
            Level::V2 => "x86-64-v2",
            Level::V3 => "x86-64-v3",
        })
    }

    /// What remains of `leaves`. Nothing is added that isn't there.
    pub(crate) fn apply(&self, leaves: &[kvm_cpuid_entry2]) -> Vec<kvm_cpuid_entry2> {
        let mut leaves = leaves.to_vec();
        for word in &WORDS {
            let mask = self.mask(word);
            for leaf in leaves.iter_mut().filter(|leaf| word.is_in(leaf)) {
                *word.register.of_mut(leaf) &= mask;
            }
        }
        if self.base != Level::Host {
            for leaf in leaves.iter_mut().filter(|leaf| LEAVES_OF_HOST.contains(&leaf.function)) {
                (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0);
            }
        }
        self.narrow_addresses(&mut leaves);
        // A KVM whose list is at odds with itself knows best what it does; `host` leaves it alone.
        if *self != Self::default() {
            settle_xsave(&mut leaves);
        }
        leaves
    }

    /// The features without which the profile is not what it says, in the order in which they are documented.
    pub(crate) fn needed(&self) -> Vec<Feature> {
        let level = match self.base {
            Level::Host | Level::Baseline => "",
            Level::V2 => NEEDED_V2,
            Level::V3 => NEEDED_V3,
        };
        let level = level.split_whitespace().filter(|name| !self.remove.contains(*name));
        level.chain(self.add.iter().map(String::as_str)).filter_map(Feature::named).collect()
    }

    /// The bits of a word that it lets through.
    fn mask(&self, word: &'static Word) -> u32 {
        let bits = |names: &mut dyn Iterator<Item = &str>| {
            let features = names.filter_map(Feature::named).filter(|feature| feature.word == word);
            features.fold(0, |mask, feature| mask | feature.mask())
        };
        let of_level =
            |levels: &[&'static str]| bits(&mut levels.iter().flat_map(|names| names.split_whitespace()));
        let base = match self.base {
            Level::Host => u32::MAX,
            Level::Baseline => of_level(&[BASELINE]),
            Level::V2 => of_level(&[BASELINE, V2]),
            Level::V3 => of_level(&[BASELINE, V2, V3]),
        };
        let base = base | bits_without_names(word);
        let added = bits(&mut self.add.iter().map(String::as_str));
        (base | added) & !bits(&mut self.remove.iter().map(String::as_str))
    }

    fn narrow_addresses(&self, leaves: &mut [kvm_cpuid_entry2]) {
        let of_level = if self.base == Level::Host { None } else { Some(PHYSICAL_ADDRESS_BITS) };
        let Some(most) = self.physical_address_bits.or(of_level) else { return };
        for leaf in leaves.iter_mut().filter(|leaf| leaf.function == LEAF_SIZES) {
            let bits = (leaf.eax & 0xff).min(u32::from(most));
            leaf.eax = (leaf.eax & !0xff) | bits;
        }
    }
}

/// What every profile lets through: on AMD, leaf 0x80000001 repeats what leaf 1 has of the baseline; and which extended
/// state there is follows from the features, see [`settle_xsave`].
fn bits_without_names(word: &Word) -> u32 {
    match (word.function, word.index, word.register) {
        (0x8000_0001, 0, Register::Edx) => 0x0183_f3ff,
        (LEAF_XSAVE, 0, Register::Eax) => u32::MAX,
        _ => 0,
    }
}

/// Which extended state belongs to which feature.
const STATE_OF: [(&str, u32); 5] =
    [("avx", 1 << 2), ("mpx", 3 << 3), ("avx512f", 7 << 5), ("pku", 1 << 9), ("amx_tile", 3 << 17)];

/// Has leaf 0xd speak only of state whose features are shown.
fn settle_xsave(leaves: &mut [kvm_cpuid_entry2]) {
    let word = |function, index, register: Register| {
        let leaf = leaves.iter().find(|leaf| (leaf.function, leaf.index) == (function, index));
        leaf.map_or(0, |leaf| register.of(leaf))
    };
    let (mut user, supervisor) = (word(LEAF_XSAVE, 0, Register::Eax), word(LEAF_XSAVE, 1, Register::Ecx));
    for (name, bits) in STATE_OF {
        let shown = Feature::named(name).is_some_and(|feature| feature.word.of(leaves) & feature.mask() != 0);
        user = if shown { user } else { user & !bits };
    }
    // The legacy area and the header; then what lies furthest behind, as compacted state is never longer.
    let mut bytes = 576;
    for leaf in leaves.iter_mut().filter(|leaf| leaf.function == LEAF_XSAVE && leaf.index >= 2) {
        let of_supervisor = leaf.ecx & 1 != 0;
        let states = if of_supervisor { supervisor } else { user };
        if states.checked_shr(leaf.index).is_none_or(|states| states & 1 == 0) {
            (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0);
        } else if !of_supervisor {
            bytes = bytes.max(leaf.ebx.saturating_add(leaf.eax));
        }
    }
    for leaf in leaves.iter_mut().filter(|leaf| (leaf.function, leaf.index) == (LEAF_XSAVE, 0)) {
        // KVM keeps ebx itself, by what XCR0 is.
        (leaf.eax, leaf.ebx, leaf.ecx) = (user, leaf.ebx.min(bytes), leaf.ecx.min(bytes));
    }
}

#[cfg(test)]
mod tests;
