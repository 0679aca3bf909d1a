//! What the guest's kernel has to be told where KVM is the PVM back end, and nowhere else.

use std::fs;

/// Parameters for a kernel whose ring 0 is interpreted:
///
/// - `rodata=off`: marking the kernel's text read-only splits its large pages and flushes, for seconds of interpreting;
/// - `tsc=reliable`: the watchdog would distrust the counter, since interpreted code reads the clocks too slowly;
/// - `rcupdate.rcu_cpu_stall_suppress=1`: on a busy host it takes the guest so long to get anywhere that it would print
///   stacks, which take longer still;
/// - `clearcpuid=`: features whose instructions the interpreter lacks, or that the host's CPUID shows whatever the
///   guest is told.
const KERNEL: &str = "rodata=off tsc=reliable rcupdate.rcu_cpu_stall_suppress=1 \
    clearcpuid=xsave,smap,smep,cx16,erms,fsrm,popcnt,fsgsbase,rdrand,rdseed";

/// Without XSAVE the kernel switches tasks with FXSAVE, which leaves out the upper halves of the AVX registers, while
/// CPUID still shows programs AVX: the C library is told not to use it. An unknown parameter with a value becomes the
/// first process's environment.
const C_LIBRARY: &str =
    "GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW,-AVX2,-AVX,-XSAVE,-XSAVEC,-ERMS,-FSRM";

/// The parameters that this machine's KVM needs: none if it has a processor's virtualisation to itself.
pub(crate) fn parameters() -> String {
    let processors = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = processors.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let has_hardware = flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm");
    if has_hardware { String::new() } else { format!("{KERNEL} {C_LIBRARY}") }
}
