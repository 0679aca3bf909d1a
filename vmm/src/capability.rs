//! The one place that asks KVM what it can do.
//!
//! What a machine can't do without is required by name; the rest is optional, and whoever uses it asks
//! here first. Nothing is concluded from a kernel version or a processor model.

use kvm_bindings::{
    CpuId, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MAX_CPUID_ENTRIES, kvm_enable_cap,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vmm_sys_util::errno;

/// Bytes of the extended state that KVM_GET_XSAVE has always returned.
pub(crate) const XSAVE_BYTES: usize = 4096;

/// Three pages for Intel's real-mode emulation, in the hole for devices, where no guest looks.
pub(crate) const TSS_ADDRESS: usize = 0xfffb_d000;

const LEAF_FEATURES: u32 = 1;
const ECX1_TSC_DEADLINE: u32 = 1 << 24;

const KVM_API_VERSION: i32 = 12;

/// Capabilities without which no machine can be built.
const REQUIRED: [(Cap, &str); 15] = [
    (Cap::UserMemory, "USER_MEMORY"),
    (Cap::SetTssAddr, "SET_TSS_ADDR"),
    (Cap::ExtCpuid, "EXT_CPUID"),
    (Cap::Irqchip, "IRQCHIP"),
    (Cap::Pit2, "PIT2"),
    (Cap::PitState2, "PIT_STATE2"),
    (Cap::Irqfd, "IRQFD"),
    (Cap::Ioeventfd, "IOEVENTFD"),
    (Cap::ImmediateExit, "IMMEDIATE_EXIT"),
    (Cap::MpState, "MP_STATE"),
    (Cap::VcpuEvents, "VCPU_EVENTS"),
    (Cap::Debugregs, "DEBUGREGS"),
    (Cap::Xsave, "XSAVE"),
    (Cap::Xcrs, "XCRS"),
    (Cap::AdjustClock, "ADJUST_CLOCK"),
];

/// Memory type range registers, which KVM keeps for each vCPU and does not list: the variable and the
/// fixed ranges, and the default type (Intel SDM, volume 3, section 12.11).
const MTRRS: [std::ops::RangeInclusive<u32>; 5] =
    [0x200..=0x20f, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26f, 0x2ff..=0x2ff];

/// KVM refused a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("KVM refused to {action}")]
pub struct KvmCallError {
    /// What was asked of KVM, as a verb with its object.
    pub action: &'static str,
    /// What the kernel said.
    #[source]
    pub source: errno::Error,
}

impl KvmCallError {
    pub(crate) fn new(action: &'static str) -> impl Fn(errno::Error) -> Self {
        move |source| Self { action, source }
    }
}

/// Why KVM can't be used on this host.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// There is no /dev/kvm.
    #[error(
        "there is no /dev/kvm: load the kernel module kvm_intel or kvm_amd, and turn virtualisation on in \
         the firmware (or, in a virtual machine, nested virtualisation on its host)"
    )]
    Missing,
    /// /dev/kvm may not be opened by this user.
    #[error(
        "no permission to open /dev/kvm: run as root or join its group, usually with: usermod -aG kvm $USER"
    )]
    NoPermission,
    /// /dev/kvm can't be opened for another reason.
    #[error("can't open /dev/kvm")]
    Open(#[source] errno::Error),
    /// The kernel speaks another KVM API.
    #[error("/dev/kvm speaks KVM API version {found}, and this program speaks {KVM_API_VERSION}")]
    ApiVersion {
        /// What the kernel reported.
        found: i32,
    },
    /// A capability is missing.
    #[error("this host's KVM lacks KVM_CAP_{name}, which every machine needs; use a newer kernel")]
    Lacks {
        /// The capability, without its prefix.
        name: &'static str,
    },
    /// A call failed.
    #[error(transparent)]
    Call(#[from] KvmCallError),
}

/// How the dirty log works on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DirtyLogMode {
    /// Reading the log leaves it as it is, and clearing is a call of its own.
    pub(crate) manual_protect: bool,
    /// The log starts with every page set, and nothing is write-protected until it is cleared.
    pub(crate) initially_set: bool,
}

/// What this host's KVM offers beyond the required.
#[derive(Clone, Debug)]
pub(crate) struct Capabilities {
    /// CPUID leaves that KVM can present to a guest.
    pub(crate) cpuid: CpuId,
    /// MSRs that make up a vCPU's state.
    pub(crate) msr_indices: Vec<u32>,
    pub(crate) identity_map_address: bool,
    /// Whether a guest's TSC can have another frequency than the host's.
    pub(crate) scales_tsc: bool,
    pub(crate) vcpus_max: usize,
}

/// Opens /dev/kvm and checks what every machine needs.
pub(crate) fn open() -> Result<(Kvm, Capabilities), KvmError> {
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::Missing,
        libc::EACCES | libc::EPERM => KvmError::NoPermission,
        _ => KvmError::Open(error),
    })?;
    let found = kvm.get_api_version();
    if found != KVM_API_VERSION {
        return Err(KvmError::ApiVersion { found });
    }
    for (capability, name) in REQUIRED {
        if !kvm.check_extension(capability) {
            return Err(KvmError::Lacks { name });
        }
    }
    let mut cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(KvmCallError::new("list the CPUID leaves that it supports"))?;
    // KVM's own local APIC has it, whatever the list says (Documentation/virt/kvm/api.rst, 4.46).
    if kvm.check_extension(Cap::TscDeadlineTimer) {
        let features = cpuid.as_mut_slice().iter_mut().find(|leaf| leaf.function == LEAF_FEATURES);
        features.into_iter().for_each(|leaf| leaf.ecx |= ECX1_TSC_DEADLINE);
    }
    let msrs = kvm.get_msr_index_list().map_err(KvmCallError::new("list the MSRs of a vCPU"))?;
    let mut msr_indices = msrs.as_slice().to_vec();
    let unlisted = MTRRS.into_iter().flatten().filter(|index| !msrs.as_slice().contains(index));
    msr_indices.extend(unlisted);
    let capabilities = Capabilities {
        cpuid,
        msr_indices,
        scales_tsc: kvm.check_extension(Cap::TscControl),
        identity_map_address: kvm.check_extension(Cap::SetIdentityMapAddr),
        vcpus_max: kvm.get_max_vcpus(),
    };
    Ok((kvm, capabilities))
}

/// Turns on the most precise kind of dirty log that the host has.
pub(crate) fn enable_dirty_log_modes(vm: &VmFd) -> DirtyLogMode {
    let offered = vm.check_extension_raw(u64::from(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2));
    let offered = u32::try_from(offered).unwrap_or(0);
    for wanted in [
        KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET,
        KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    ] {
        let mut request =
            kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..kvm_enable_cap::default() };
        request.args[0] = u64::from(wanted);
        if offered & wanted == wanted && vm.enable_cap(&request).is_ok() {
            return DirtyLogMode {
                manual_protect: true,
                initially_set: wanted & KVM_DIRTY_LOG_INITIALLY_SET != 0,
            };
        }
    }
    DirtyLogMode { manual_protect: false, initially_set: false }
}

/// Bytes of a vCPU's extended state; more than [`XSAVE_BYTES`] only with features like AMX.
pub(crate) fn xsave_bytes(vm: &VmFd) -> usize {
    let reported = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
    reported.max(XSAVE_BYTES)
}
