//! Saving and restoring a vCPU.
//!
//! The order matters to KVM, in both directions. Saving starts with the MP state, because reading it
//! settles pending INIT and SIPI, and ends with the events, which the calls before may change.
//! Restoring starts with CPUID, which decides what else may be set; the local APIC follows the APIC
//! base in sregs; the TSC precedes the deadline that is counted by it, and the deadline follows the
//! APIC's timer mode.
//!
//! How the TSC goes on is in `time`.

// UNSAFETY: KVM's extended state has no fixed length.
#![expect(unsafe_code, reason = "KVM_GET_XSAVE2 writes, and KVM_SET_XSAVE reads, a length that KVM decides")]

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MAX_MSR_ENTRIES, Msrs, Xsave, kvm_cpuid_entry2, kvm_mp_state,
    kvm_msr_entry, kvm_xsave,
};
use kvm_ioctls::VcpuFd;

use super::time::{self, TimedState, TscPlan};
use crate::capability::{KvmCallError, XSAVE_BYTES};
use crate::saved::sections::Vcpu as SavedVcpu;
use crate::saved::{StateError, from_abi_bytes, to_abi_bytes};

const SECTION: &str = "vcpu";

/// Setting one of these has KVM write into guest memory at once: the wall clock (Documentation/virt/kvm/x86/msr.rst), and Hyper-V's
/// hypercall page and page for each vCPU (arch/x86/kvm/hyperv.c). No guest of ferry's is told of the latter, but a state that
/// a peer made up may name them, and KVM does not ask what the guest was told.
const MSRS_THAT_WRITE_MEMORY: [u32; 4] = [0x11, 0x4b56_4d00, 0x4000_0001, 0x4000_0073];

const MSR_MACHINE_CHECK_CAPABILITY: u32 = 0x179;
const MSR_MACHINE_CHECK_FIRST: u32 = 0x400;

const XSAVE_BYTES_MAX: usize = 64 << 10;

/// What saving and restoring needs to know of the host.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StateContext<'a> {
    /// Bytes of a vCPU's extended state on this host.
    pub(crate) xsave_bytes: usize,
    pub(crate) msr_indices: &'a [u32],
}

/// Saves a vCPU whose thread is parked.
pub(crate) fn save(index: u8, fd: &VcpuFd, context: StateContext<'_>) -> Result<SavedVcpu, StateError> {
    let call = KvmCallError::new;
    let mp_state = fd.get_mp_state().map_err(call("get a vCPU's MP state"))?.mp_state;
    let regs = fd.get_regs().map_err(call("get a vCPU's registers"))?;
    let sregs = fd.get_sregs().map_err(call("get a vCPU's system registers"))?;
    let xsave = get_xsave(fd, context.xsave_bytes)?;
    let xcrs = fd.get_xcrs().map_err(call("get a vCPU's extended control registers"))?;
    let debugregs = fd.get_debug_regs().map_err(call("get a vCPU's debug registers"))?;
    let lapic = fd.get_lapic().map_err(call("get a vCPU's local APIC"))?;
    let tsc_khz = fd.get_tsc_khz().ok();
    let tsc_offset = time::get_tsc_offset(fd);
    let mut msrs = get_msrs(fd, context.msr_indices)?;
    msrs.extend(get_msrs(fd, &machine_check_banks(fd)?)?);
    let cpuid = fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(call("get a vCPU's CPUID"))?;
    let events = fd.get_vcpu_events().map_err(call("get a vCPU's events"))?;
    Ok(SavedVcpu {
        index,
        cpuid: cpuid.as_slice().iter().map(to_abi_bytes).collect(),
        mp_state,
        regs: to_abi_bytes(&regs),
        sregs: to_abi_bytes(&sregs),
        xsave,
        xcrs: to_abi_bytes(&xcrs),
        debugregs: to_abi_bytes(&debugregs),
        lapic: to_abi_bytes(&lapic),
        events: to_abi_bytes(&events),
        msrs,
        tsc_khz,
        tsc_offset,
    })
}

/// Restores a vCPU that has never run, but for what KVM would write into guest memory: those MSRs are given back, for
/// [`set_before_run`]. The memory may be in use by the machine that the state is of until this one runs.
pub(crate) fn restore(
    fd: &VcpuFd,
    saved: &SavedVcpu,
    context: StateContext<'_>,
    tsc: TscPlan,
) -> Result<Vec<(u32, u64)>, StateError> {
    let SavedVcpu {
        index,
        cpuid,
        mp_state,
        regs,
        sregs,
        xsave,
        xcrs,
        debugregs,
        lapic,
        events,
        msrs,
        tsc_khz,
        // Set with the TSC.
        tsc_offset: _,
    } = saved;
    let call = KvmCallError::new;
    let leaves: Vec<kvm_cpuid_entry2> =
        cpuid.iter().map(|bytes| from_abi_bytes(SECTION, bytes)).collect::<Result<_, _>>()?;
    let leaves = CpuId::from_entries(&leaves).map_err(|_| invalid("too many CPUID leaves".into()))?;
    fd.set_cpuid2(&leaves).map_err(call("set a restored vCPU's CPUID"))?;
    if let Some(khz) = tsc_khz {
        set_tsc_khz(fd, *khz)?;
    }
    let state = kvm_mp_state { mp_state: *mp_state };
    fd.set_mp_state(state).map_err(call("set a vCPU's MP state"))?;
    let regs = from_abi_bytes(SECTION, regs)?;
    fd.set_regs(&regs).map_err(call("set a vCPU's registers"))?;
    let sregs = from_abi_bytes(SECTION, sregs)?;
    fd.set_sregs(&sregs).map_err(call("set a vCPU's system registers"))?;
    // Before the extended state: XCR0 says which of it may be in use.
    let xcrs = from_abi_bytes(SECTION, xcrs)?;
    fd.set_xcrs(&xcrs).map_err(call("set a vCPU's extended control registers"))?;
    set_xsave(fd, xsave, context.xsave_bytes)?;
    let debugregs = from_abi_bytes(SECTION, debugregs)?;
    fd.set_debug_regs(&debugregs).map_err(call("set a vCPU's debug registers"))?;
    let lapic = from_abi_bytes(SECTION, lapic)?;
    fd.set_lapic(&lapic).map_err(call("set a vCPU's local APIC"))?;
    let writes_memory = |msr: &(u32, u64)| MSRS_THAT_WRITE_MEMORY.contains(&msr.0);
    let (deferred, msrs): (Vec<_>, Vec<_>) = msrs.iter().copied().partition(writes_memory);
    set_msrs_and_time(fd, *index, &msrs, &TimedState::of(saved), tsc)?;
    let events = from_abi_bytes(SECTION, events)?;
    fd.set_vcpu_events(&events).map_err(call("set a vCPU's events"))?;
    Ok(deferred)
}

/// Sets what [`restore`] left for the moment in which the guest runs here.
pub(crate) fn set_before_run(fd: &VcpuFd, vcpu: u8, deferred: &[(u32, u64)]) -> Result<(), StateError> {
    // Zero is what they are, and means that the guest never asked for it.
    let asked: Vec<_> = deferred.iter().copied().filter(|(_, address)| *address != 0).collect();
    set_msrs(fd, vcpu, &asked)
}

/// Plain MSRs first, then what counts time.
fn set_msrs_and_time(
    fd: &VcpuFd,
    vcpu: u8,
    msrs: &[(u32, u64)],
    timed: &TimedState,
    tsc: TscPlan,
) -> Result<(), StateError> {
    let plain: Vec<_> = msrs.iter().copied().filter(|(index, _)| !time::is_timed(*index)).collect();
    set_msrs(fd, vcpu, &plain)?;
    time::set_time(fd, timed, tsc)
}

fn invalid(what: String) -> StateError {
    StateError::Invalid { section: SECTION, what }
}

fn get_xsave(fd: &VcpuFd, bytes: usize) -> Result<Vec<u8>, StateError> {
    let mut xsave = new_xsave(bytes)?;
    let call = KvmCallError::new("get a vCPU's extended state");
    if bytes > XSAVE_BYTES {
        // SAFETY: `xsave` has room for the length that KVM_CAP_XSAVE2 reported for this machine, and
        // this process enables no further features.
        unsafe { fd.get_xsave2(&mut xsave) }.map_err(call)?;
        let header = &xsave.as_fam_struct_ref().xsave.region;
        let extra = xsave.as_slice();
        return Ok(header.iter().chain(extra).flat_map(|word| word.to_le_bytes()).collect());
    }
    let region = fd.get_xsave().map_err(call)?.region;
    Ok(region.iter().flat_map(|word| word.to_le_bytes()).collect())
}

fn set_xsave(fd: &VcpuFd, bytes: &[u8], host_bytes: usize) -> Result<(), StateError> {
    if bytes.len() < XSAVE_BYTES || bytes.len() > XSAVE_BYTES_MAX || !bytes.len().is_multiple_of(4) {
        return Err(invalid(format!("{} bytes of extended state", bytes.len())));
    }
    // A host with less room lacks the features of the rest; it can only do without if they are unused.
    if bytes.len() > host_bytes && bytes[host_bytes..].iter().any(|byte| *byte != 0) {
        return Err(invalid("its extended state uses features that this host lacks".into()));
    }
    let mut words =
        bytes.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]));
    let mut xsave = new_xsave(host_bytes)?;
    let mut region = kvm_xsave::default();
    region.region.fill_with(|| words.next().expect("at least XSAVE_BYTES were checked"));
    let mut extra = vec![0_u32; xsave.as_slice().len()];
    for (to, from) in extra.iter_mut().zip(words) {
        *to = from;
    }
    xsave.as_mut_slice().copy_from_slice(&extra);
    let call = KvmCallError::new("set a vCPU's extended state");
    if host_bytes > XSAVE_BYTES {
        // SAFETY: only the fixed region changes, not the length of the array behind it.
        unsafe { xsave.as_mut_fam_struct() }.xsave = region;
        // SAFETY: `xsave` has the length that KVM_CAP_XSAVE2 reported for this machine.
        return Ok(unsafe { fd.set_xsave2(&xsave) }.map_err(call)?);
    }
    // SAFETY: KVM_CAP_XSAVE2 reported no more than the structure's 4096 bytes, so KVM reads no more.
    Ok(unsafe { fd.set_xsave(&region) }.map_err(call)?)
}

/// Room for `bytes` of extended state.
fn new_xsave(bytes: usize) -> Result<Xsave, StateError> {
    let extra = bytes.saturating_sub(XSAVE_BYTES).div_ceil(size_of::<u32>());
    Xsave::new(extra).map_err(|_| invalid(format!("{bytes} bytes of extended state")))
}

/// Every listed MSR that can be read. KVM lists some that this processor does not have.
pub(super) fn get_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, StateError> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        let entries: Vec<_> =
            chunk.iter().map(|&index| kvm_msr_entry { index, ..kvm_msr_entry::default() }).collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| invalid("too many MSRs".into()))?;
        // KVM stops at the first one that it can't read, and says how many it read.
        let read = fd.get_msrs(&mut msrs).map_err(KvmCallError::new("get a vCPU's MSRs"))?;
        values.extend(msrs.as_slice()[..read].iter().map(|msr| (msr.index, msr.data)));
        rest = rest.get(after(read, chunk.len())..).unwrap_or_default();
    }
    Ok(values)
}

/// The MSRs of the machine check banks, which KVM does not list: control, status, address and
/// miscellany of each (Intel SDM, volume 3, section 16.3.2).
fn machine_check_banks(fd: &VcpuFd) -> Result<Vec<u32>, StateError> {
    let capability = get_msrs(fd, &[MSR_MACHINE_CHECK_CAPABILITY])?;
    let banks = capability.first().map_or(0, |(_, value)| value & 0xff);
    let end = MSR_MACHINE_CHECK_FIRST + 4 * u32::try_from(banks).expect("a byte");
    Ok((MSR_MACHINE_CHECK_FIRST..end).collect())
}

/// Sets MSRs. One that KVM refuses is left out only if it has that value already.
pub(super) fn set_msrs(fd: &VcpuFd, vcpu: u8, values: &[(u32, u64)]) -> Result<(), StateError> {
    let mut rest = values;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        let entries: Vec<_> = chunk
            .iter()
            .map(|&(index, data)| kvm_msr_entry { index, data, ..kvm_msr_entry::default() })
            .collect();
        let msrs = Msrs::from_entries(&entries).map_err(|_| invalid("too many MSRs".into()))?;
        let set = fd.set_msrs(&msrs).map_err(KvmCallError::new("set a vCPU's MSRs"))?;
        if let Some(&(index, value)) = chunk.get(set) {
            let current = get_msrs(fd, &[index])?;
            // An MSR that doesn't exist here and was zero there is no loss.
            if current.first().map_or(0, |(_, current)| *current) != value {
                return Err(StateError::Msr { vcpu, index, value });
            }
        }
        rest = rest.get(after(set, chunk.len())..).unwrap_or_default();
    }
    Ok(())
}

/// Where to go on after KVM did `done` of `count` MSRs: behind the one that stopped it, if one did.
fn after(done: usize, count: usize) -> usize {
    if done < count { done + 1 } else { count }
}

fn set_tsc_khz(fd: &VcpuFd, khz: u32) -> Result<(), StateError> {
    // The frequency is only set where it differs: a host without TSC scaling refuses even its own.
    if fd.get_tsc_khz().ok() == Some(khz) {
        return Ok(());
    }
    Ok(fd.set_tsc_khz(khz).map_err(KvmCallError::new("give a vCPU the TSC frequency of its former host"))?)
}
