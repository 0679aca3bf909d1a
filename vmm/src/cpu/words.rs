//! The words of CPUID that list features bit by bit, and what each bit is called.
//!
//! Names are those of /proc/cpuinfo, where Linux has one. Leaves that describe sizes, caches or topology are not here.

use kvm_bindings::kvm_cpuid_entry2;

/// One of the four registers that CPUID fills.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Eax => "eax",
            Self::Ebx => "ebx",
            Self::Ecx => "ecx",
            Self::Edx => "edx",
        }
    }

    pub(crate) fn of(self, leaf: &kvm_cpuid_entry2) -> u32 {
        match self {
            Self::Eax => leaf.eax,
            Self::Ebx => leaf.ebx,
            Self::Ecx => leaf.ecx,
            Self::Edx => leaf.edx,
        }
    }

    pub(crate) fn of_mut(self, leaf: &mut kvm_cpuid_entry2) -> &mut u32 {
        match self {
            Self::Eax => &mut leaf.eax,
            Self::Ebx => &mut leaf.ebx,
            Self::Ecx => &mut leaf.ecx,
            Self::Edx => &mut leaf.edx,
        }
    }
}

/// A register of a leaf whose bits are features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Word {
    pub(crate) function: u32,
    pub(crate) index: u32,
    pub(crate) register: Register,
    /// The names of bits 0, 1, and so on, separated by blanks; `-` has none.
    names: &'static str,
}

/// A bit of a [`Word`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Feature {
    pub(crate) word: &'static Word,
    pub(crate) bit: u32,
}

impl Word {
    const fn new(function: u32, index: u32, register: Register, names: &'static str) -> Self {
        Self { function, index, register, names }
    }

    /// What a table says in this word; 0 if it has no such leaf.
    pub(crate) fn of(&self, leaves: &[kvm_cpuid_entry2]) -> u32 {
        let leaf = leaves.iter().find(|leaf| self.is_in(leaf));
        leaf.map_or(0, |leaf| self.register.of(leaf))
    }

    pub(crate) fn is_in(&self, leaf: &kvm_cpuid_entry2) -> bool {
        (leaf.function, leaf.index) == (self.function, self.index)
    }

    /// The name of a bit, if it has one.
    pub(crate) fn name(&self, bit: u32) -> Option<&'static str> {
        let bit = usize::try_from(bit).expect("below 32");
        self.names.split_whitespace().nth(bit).filter(|name| *name != "-")
    }
}

impl Feature {
    /// The feature of that name.
    pub(crate) fn named(wanted: &str) -> Option<Self> {
        WORDS.iter().find_map(|word| {
            let bit = word.names.split_whitespace().position(|name| name == wanted && name != "-")?;
            Some(Self { word, bit: u32::try_from(bit).expect("a word has 32 names at most") })
        })
    }

    pub(crate) fn mask(self) -> u32 {
        1 << self.bit
    }
}

/// `avx2 (leaf 7, ebx bit 5)`.
impl std::fmt::Display for Feature {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Word { function, index, register, names: _ } = self.word;
        if let Some(name) = self.word.name(self.bit) {
            write!(f, "{name} (")?;
        } else {
            f.write_str("a feature without a name (")?;
        }
        if *function < 10 {
            write!(f, "leaf {function}")?
        } else {
            write!(f, "leaf {function:#x}")?
        }
        if *index != 0 {
            write!(f, ".{index}")?;
        }
        write!(f, ", {} bit {})", register.name(), self.bit)
    }
}

pub(crate) const LEAF_XSAVE: u32 = 0xd;
pub(crate) const LEAF_KVM_FEATURES: u32 = 0x4000_0001;
pub(crate) const LEAF_SIZES: u32 = 0x8000_0008;

/// Every word of features. On AMD, the low bits of leaf 0x80000001's edx repeat those of leaf 1.
pub(crate) static WORDS: [Word; 20] = [
    Word::new(
        1,
        0,
        Register::Edx,
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov \
         pat pse36 pn clflush - dts acpi mmx fxsr sse sse2 ss ht tm ia64 pbe",
    ),
    Word::new(
        1,
        0,
        Register::Ecx,
        "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm \
         - pcid dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor",
    ),
    Word::new(6, 0, Register::Eax, "dtherm ida arat"),
    Word::new(
        7,
        0,
        Register::Ebx,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx rdt_a \
         avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni \
         avx512bw avx512vl",
    ),
    Word::new(
        7,
        0,
        Register::Ecx,
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni \
         avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid - bus_lock_detect cldemote - movdiri movdir64b \
         enqcmd sgx_lc pks",
    ),
    Word::new(
        7,
        0,
        Register::Edx,
        "- sgx_keys avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear \
         rtm_always_abort - tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16 \
         avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities \
         spec_ctrl_ssbd",
    ),
    Word::new(
        7,
        1,
        Register::Eax,
        "sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs fsrc - - - - fred \
         lkgs wrmsrns nmi_src amx_fp16 hreset avx_ifma - - lam msrlist",
    ),
    Word::new(7, 1, Register::Ebx, ""),
    Word::new(7, 1, Register::Ecx, ""),
    Word::new(
        7,
        1,
        Register::Edx,
        "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - - prefetchiti - - - - avx10",
    ),
    Word::new(7, 2, Register::Edx, "intel_psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no"),
    Word::new(
        LEAF_XSAVE,
        0,
        Register::Eax,
        "x87_state sse_state avx_state bndregs_state bndcsr_state opmask_state zmm_hi256_state hi16_zmm_state - \
         pkru_state - - - - - - - xtilecfg_state xtiledata_state",
    ),
    Word::new(LEAF_XSAVE, 1, Register::Eax, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    Word::new(LEAF_KVM_FEATURES, 0, Register::Eax, KVM_NAMES),
    Word::new(
        0x8000_0001,
        0,
        Register::Edx,
        "- - - - - - - - - - - syscall - - - - - - - mp nx - mmxext - - fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    ),
    Word::new(
        0x8000_0001,
        0,
        Register::Ecx,
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp \
         fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx",
    ),
    Word::new(0x8000_0007, 0, Register::Edx, "- - - - - - - - nonstop_tsc"),
    Word::new(LEAF_SIZES, 0, Register::Ebx, AMD_NAMES),
    Word::new(
        0x8000_0021,
        0,
        Register::Eax,
        "no_nested_data_bp wrmsr_xx_base_ns lfence_rdtsc - - verw_clear null_sel_clr_base - autoibrs no_smm_ctl_msr",
    ),
    Word::new(LEAF_XSAVE, 1, Register::Ecx, "- - - - - - - - pt_state - pasid_state cet_u_state cet_s_state"),
];

/// Documentation/virt/kvm/x86/cpuid.rst.
const KVM_NAMES: &str = "kvm_clocksource kvm_nop_io_delay kvm_mmu_op kvm_clocksource2 kvm_async_pf kvm_steal_time \
     kvm_pv_eoi kvm_pv_unhalt - kvm_pv_tlb_flush kvm_async_pf_vmexit kvm_pv_send_ipi kvm_poll_control \
     kvm_pv_sched_yield kvm_async_pf_int kvm_msi_ext_dest_id kvm_hc_map_gpa_range kvm_migration_control - - - - - - \
     kvmclock_stable";

const AMD_NAMES: &str = "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - amd_ibpb - amd_ibrs amd_stibp - \
     amd_stibp_always_on - - - - - amd_ppin amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd btc_no ibpb_ret brs";

/// Bits that come and go with what the guest itself does (CR4, the APIC's base, IA32_MISC_ENABLE) or that ferry decides by the
/// shape of the machine; nothing can be concluded from them.
pub(crate) const IN_MOTION: [&str; 6] = ["osxsave", "ospke", "apic", "monitor", "ht", "hypervisor"];

/// The bits of `word` that say something of the processor.
pub(crate) fn settled(word: &Word) -> u32 {
    let in_motion = IN_MOTION.iter().filter_map(|name| Feature::named(name));
    !in_motion.filter(|feature| feature.word == word).fold(0, |mask, feature| mask | feature.mask())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_at_its_bit() {
        // From arch/x86/include/asm/cpufeatures.h: word, name, bit.
        let expected = [
            ((1, Register::Edx), "sse2", 26),
            ((1, Register::Edx), "pbe", 31),
            ((1, Register::Ecx), "ssse3", 9),
            ((1, Register::Ecx), "avx", 28),
            ((1, Register::Ecx), "hypervisor", 31),
            ((7, Register::Ebx), "avx2", 5),
            ((7, Register::Ebx), "clwb", 24),
            ((7, Register::Ebx), "avx512vl", 31),
            ((7, Register::Ecx), "rdpid", 22),
            ((7, Register::Ecx), "pks", 31),
            ((7, Register::Edx), "arch_capabilities", 29),
            ((7, Register::Edx), "spec_ctrl_ssbd", 31),
            ((7, Register::Eax), "avx512_bf16", 5),
            ((7, Register::Eax), "lam", 26),
            ((0x8000_0001, Register::Edx), "lm", 29),
            ((0x8000_0001, Register::Ecx), "topoext", 22),
            ((0x8000_0001, Register::Ecx), "mwaitx", 29),
            ((0x8000_0007, Register::Edx), "nonstop_tsc", 8),
            ((0x8000_0008, Register::Ebx), "brs", 31),
            ((LEAF_KVM_FEATURES, Register::Eax), "kvmclock_stable", 24),
            ((0xd, Register::Eax), "xtiledata_state", 18),
        ];
        for ((function, register), name, bit) in expected {
            let feature = Feature::named(name).unwrap_or_else(|| panic!("{name} is not there"));
            let found = (feature.word.function, feature.word.register, feature.bit);
            assert_eq!(found, (function, register, bit), "{name}");
        }
        for word in &WORDS {
            assert!(word.names.split_whitespace().count() <= 32, "{word:x?}");
        }
    }

    #[test]
    fn names_are_unique_and_bits_are_told_in_words() {
        let names: Vec<_> = WORDS.iter().flat_map(|word| word.names.split_whitespace()).collect();
        for name in names.iter().filter(|name| **name != "-") {
            assert_eq!(names.iter().filter(|other| *other == name).count(), 1, "{name}");
        }
        assert_eq!(Feature::named("avx2").unwrap().to_string(), "avx2 (leaf 7, ebx bit 5)");
        assert_eq!(Feature::named("avx_vnni").unwrap().to_string(), "avx_vnni (leaf 7.1, eax bit 4)");
        assert_eq!(Feature::named("lm").unwrap().to_string(), "lm (leaf 0x80000001, edx bit 29)");
        let nameless = Feature { word: &WORDS[7], bit: 3 };
        assert_eq!(nameless.to_string(), "a feature without a name (leaf 7.1, ebx bit 3)");
        assert!(Feature::named("-").is_none());
        assert_eq!(settled(&WORDS[4]), !(1 << 4), "ospke");
    }
}
