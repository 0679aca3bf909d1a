//! Kernel structures as bytes.
//!
//! KVM's structures are a stable binary interface, so their bytes are the most durable form that there
//! is: they mean the same to every kernel and to every version of the Rust bindings.

// UNSAFETY: reads C structures as bytes and back.
#![expect(unsafe_code, reason = "C structures are read as bytes and back")]

use kvm_bindings::{
    kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_pit_state2, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};

use super::StateError;

/// A structure that the kernel reads and writes.
///
/// # Safety
/// It is plain C data without padding that is not a named field, and every bit pattern is a valid value.
pub(crate) unsafe trait KernelAbi: Copy {}

macro_rules! kernel_abi {
    ($($name:ty),* $(,)?) => {$(
        // SAFETY: include/uapi/linux/kvm.h and asm/kvm.h: integers, arrays and unions of integers, with
        // the padding spelt out as fields.
        unsafe impl KernelAbi for $name {}
    )*};
}

kernel_abi!(
    kvm_clock_data,
    kvm_cpuid_entry2,
    kvm_debugregs,
    kvm_irqchip,
    kvm_lapic_state,
    kvm_pit_state2,
    kvm_regs,
    kvm_sregs,
    kvm_vcpu_events,
    kvm_xcrs,
);

/// The bytes of a kernel structure.
pub(crate) fn to_abi_bytes<T: KernelAbi>(value: &T) -> Vec<u8> {
    let mut bytes = vec![0; size_of::<T>()];
    // SAFETY: both sides are `size_of::<T>()` bytes and apart; `KernelAbi` says that all of them are
    // initialised.
    unsafe { std::ptr::copy_nonoverlapping((&raw const *value).cast(), bytes.as_mut_ptr(), bytes.len()) };
    bytes
}

/// A kernel structure from its bytes, of which there must be exactly as many as it has.
pub(crate) fn from_abi_bytes<T: KernelAbi>(section: &'static str, bytes: &[u8]) -> Result<T, StateError> {
    if bytes.len() != size_of::<T>() {
        return Err(StateError::Invalid {
            section,
            what: format!("{} bytes where {} belong", bytes.len(), size_of::<T>()),
        });
    }
    // SAFETY: the slice has exactly the structure's length, the read is unaligned, and `KernelAbi` says
    // that any bytes are a value.
    Ok(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_back() {
        let regs = kvm_regs { rip: 0x1122_3344_5566_7788, rflags: 2, ..kvm_regs::default() };
        let bytes = to_abi_bytes(&regs);
        assert_eq!(from_abi_bytes::<kvm_regs>("vcpu", &bytes).unwrap(), regs);
        let error = from_abi_bytes::<kvm_regs>("vcpu", &bytes[1..]).unwrap_err();
        assert!(error.to_string().contains("143 bytes where 144 belong"), "{error}");
    }
}
