//! Which of the host's features a guest sees although its CPUID says otherwise.
//!
//! Hardware virtualisation intercepts CPUID in every ring. A back end of KVM that runs the guest's ring 3 on the bare processor may
//! not, and then a guest finds, and uses, what no profile can hide. So a throw-away machine is shown the baseline only,
//! asked in ring 3 what it sees, and forgotten. That takes a few milliseconds, once in a process.

use std::sync::OnceLock;
use std::time::Duration;

use kvm_bindings::{CpuId, kvm_cpuid_entry2, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};

use super::profile::CpuProfile;
use super::words::{Register, WORDS, settled};
use crate::capability::{self, KvmCallError};
use crate::config::{Backing, HugePages, MemoryConfig};
use crate::memory::dirty_log::DirtyLog;
use crate::memory::{self, GuestRam, MEMORY_BYTES_MIN, PAGE_BYTES};

/// Where the throw-away machine has its page tables, its code and its answers.
const TABLES: u64 = 0x1000;
const CODE: u64 = 0x5000;
const ANSWERS: u64 = 0x6000;
/// Where nothing is: writing there ends the run.
const DONE: u64 = 0xd000_0000;

/// Present, writable, for ring 3, accessed, dirty; and a page of 2 MiB.
const TABLE_BITS: u64 = 0x27;
const LARGE_BITS: u64 = 0xe7;

/// Exits that are waited for, of which the last one should be the write to [`DONE`].
const EXITS_MAX: u32 = 64;

/// What could be found out.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Leaks {
    /// What shows through, as a table of features; empty where CPUID is what KVM was told.
    Known(Vec<kvm_cpuid_entry2>),
    /// The question could not be asked, for this reason.
    Unknown(String),
}

/// What shows through on this host, asked once.
pub(crate) fn of_host(kvm: &Kvm, supported: &[kvm_cpuid_entry2]) -> &'static Leaks {
    static ASKED: OnceLock<Leaks> = OnceLock::new();
    ASKED.get_or_init(|| match ask(kvm, supported) {
        Ok(leaks) => Leaks::Known(leaks),
        Err(reason) => Leaks::Unknown(reason),
    })
}

/// Leaves to ask for: those with words of features, but for KVM's own, which no processor has.
fn questions() -> Vec<(u32, u32)> {
    let mut leaves: Vec<_> = WORDS.iter().map(|word| (word.function, word.index)).collect();
    leaves.retain(|(function, _)| *function != super::words::LEAF_KVM_FEATURES);
    leaves.dedup();
    leaves.sort_unstable();
    leaves.dedup();
    leaves
}

fn ask(kvm: &Kvm, supported: &[kvm_cpuid_entry2]) -> Result<Vec<kvm_cpuid_entry2>, String> {
    let shown = CpuProfile::baseline().apply(supported);
    let seen = see(kvm, &shown)?;
    let mut leaks = Vec::new();
    for mut leaf in seen {
        let all = leaf;
        (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0);
        for word in WORDS.iter().filter(|word| word.is_in(&all)) {
            *word.register.of_mut(&mut leaf) = word.register.of(&all) & settled(word) & !word.of(&shown);
        }
        if [Register::Eax, Register::Ebx, Register::Ecx, Register::Edx].iter().any(|of| of.of(&leaf) != 0) {
            leaks.push(leaf);
        }
    }
    Ok(leaks)
}

/// What a guest's ring 3 sees when it is shown `leaves`.
fn see(kvm: &Kvm, leaves: &[kvm_cpuid_entry2]) -> Result<Vec<kvm_cpuid_entry2>, String> {
    let call = |error: KvmCallError| format!("{error}: {}", error.source);
    let vm = kvm.create_vm().map_err(KvmCallError::new("create a machine")).map_err(call)?;
    let memory = MemoryConfig {
        huge_pages: HugePages::Off,
        ..MemoryConfig::new(MEMORY_BYTES_MIN, Backing::PrivateAnonymous)
    };
    let ram = memory::allocate(&memory).map_err(|error| error.to_string())?;
    let mode = capability::enable_dirty_log_modes(&vm);
    let _slots = DirtyLog::register(&vm, &ram, mode).map_err(call)?;
    vm.set_tss_address(capability::TSS_ADDRESS).map_err(|error| error.to_string())?;
    let mut fd = vm.create_vcpu(0).map_err(KvmCallError::new("create a vCPU")).map_err(call)?;
    let table = CpuId::from_entries(leaves).map_err(|_| "too many CPUID leaves".to_owned())?;
    fd.set_cpuid2(&table).map_err(KvmCallError::new("set a vCPU's CPUID")).map_err(call)?;
    let questions = questions();
    write_program(&ram, &questions);
    enter_ring3(&fd).map_err(call)?;
    run(&mut fd)?;
    let mut answers = [0; PAGE_BYTES];
    ram.read_page(ANSWERS / PAGE_BYTES as u64, &mut answers).map_err(|error| error.to_string())?;
    let words = answers.chunks_exact(16).map(|answer| {
        let word =
            |at: usize| u32::from_le_bytes([answer[at], answer[at + 1], answer[at + 2], answer[at + 3]]);
        [word(0), word(4), word(8), word(12)]
    });
    let leaf = |((function, index), [eax, ebx, ecx, edx]): ((u32, u32), [u32; 4])| kvm_cpuid_entry2 {
        function,
        index,
        eax,
        ebx,
        ecx,
        edx,
        ..kvm_cpuid_entry2::default()
    };
    Ok(questions.into_iter().zip(words).map(leaf).collect())
}

/// Page tables for the machine's memory and for [`DONE`], and the questions as code.
fn write_program(ram: &GuestRam, questions: &[(u32, u32)]) {
    let page_bytes = PAGE_BYTES as u64;
    let write = |address: u64, entries: &[(usize, u64)]| {
        let mut page = [0; PAGE_BYTES];
        for (entry, value) in entries {
            page[entry * 8..][..8].copy_from_slice(&value.to_le_bytes());
        }
        ram.write_page(address / page_bytes, &page).expect("the machine has 2 MiB");
    };
    let table = |number: u64| TABLES + number * page_bytes;
    write(table(0), &[(0, table(1) | TABLE_BITS)]);
    write(table(1), &[(0, table(2) | TABLE_BITS), (3, table(3) | TABLE_BITS)]);
    write(table(2), &[(0, LARGE_BITS)]);
    let place = usize::try_from((DONE >> 21) & 0x1ff).expect("nine bits");
    write(table(3), &[(place, DONE | LARGE_BITS)]);

    let low = |address: u64| u32::try_from(address).expect("below 4 GiB").to_le_bytes();
    let mut code = vec![0xbf]; // mov edi, ANSWERS
    code.extend(low(ANSWERS));
    for (function, index) in questions {
        code.push(0xb8); // mov eax, function
        code.extend(function.to_le_bytes());
        code.push(0xb9); // mov ecx, index
        code.extend(index.to_le_bytes());
        code.extend([0x0f, 0xa2]); // cpuid
        code.extend([0x89, 0x07, 0x89, 0x5f, 4, 0x89, 0x4f, 8, 0x89, 0x57, 12]); // mov [rdi..], eax ebx ecx edx
        code.extend([0x83, 0xc7, 16]); // add edi, 16
    }
    code.push(0xbf); // mov edi, DONE
    code.extend(low(DONE));
    code.extend([0xc6, 0x07, 1]); // mov byte ptr [rdi], 1
    code.extend([0xeb, 0xfe]); // stay here
    let mut page = [0; PAGE_BYTES];
    page[..code.len()].copy_from_slice(&code);
    ram.write_page(CODE / page_bytes, &page).expect("the machine has 2 MiB");
}

/// 64-bit mode with paging, in ring 3, with the selectors that Linux has.
fn enter_ring3(fd: &VcpuFd) -> Result<(), KvmCallError> {
    let mut sregs = fd.get_sregs().map_err(KvmCallError::new("get a vCPU's system registers"))?;
    let data = kvm_segment {
        limit: 0xffff_ffff,
        selector: 0x2b,
        type_: 3,
        present: 1,
        dpl: 3,
        db: 1,
        s: 1,
        g: 1,
        ..kvm_segment::default()
    };
    let code = kvm_segment { selector: 0x33, type_: 11, db: 0, l: 1, ..data };
    let task = kvm_segment { selector: 0x40, limit: 0x67, type_: 11, present: 1, ..kvm_segment::default() };
    sregs = kvm_sregs {
        cs: code,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: task,
        cr0: 0x8001_0033,
        cr3: TABLES,
        cr4: 0x620,
        // Long mode, enabled and active.
        efer: 0x500,
        ..sregs
    };
    fd.set_sregs(&sregs).map_err(KvmCallError::new("set a vCPU's system registers"))?;
    let regs = kvm_regs { rip: CODE, rsp: CODE, rflags: 2, ..kvm_regs::default() };
    fd.set_regs(&regs).map_err(KvmCallError::new("set a vCPU's registers"))
}

/// Runs until the code has written to [`DONE`].
fn run(fd: &mut VcpuFd) -> Result<(), String> {
    for _ in 0..EXITS_MAX {
        match fd.run() {
            Ok(VcpuExit::MmioWrite(DONE, _)) => return Ok(()),
            Ok(VcpuExit::Intr) => {}
            Ok(other) => return Err(format!("the machine that was to ask left with {other:?}")),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                std::thread::sleep(Duration::from_micros(100));
            }
            Err(error) => return Err(format!("KVM_RUN failed: {error}")),
        }
    }
    Err("the machine that was to ask was interrupted all the time".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::words::Feature;

    #[test]
    #[expect(clippy::disallowed_methods, reason = "only printed")]
    fn a_guest_is_asked_what_it_sees() {
        let Ok((kvm, capabilities)) = capability::open() else {
            println!("SKIPPED tier kvm: KVM can't be used here");
            assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "CI needs /dev/kvm");
            return;
        };
        let supported = capabilities.cpuid.as_slice();
        let began = std::time::SystemTime::now();
        let seen = see(&kvm, supported).unwrap();
        println!("asked in {:?}", began.elapsed());
        for name in ["fpu", "sse2", "lm", "syscall"] {
            let feature = Feature::named(name).unwrap();
            assert_ne!(feature.word.of(&seen) & feature.mask(), 0, "{name}: {seen:x?}");
        }
        let Leaks::Known(leaks) = of_host(&kvm, supported) else { panic!("the question could not be asked") };
        for word in &WORDS {
            for bit in (0..32).filter(|bit| word.of(leaks) & (1 << bit) != 0) {
                println!("shows through: {}", Feature { word, bit });
            }
        }
    }
}
