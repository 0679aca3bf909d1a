//! KVM's two ways to tell which pages a guest wrote: the bitmap with manual protection, which ferry uses, beside the dirty
//! ring. It decides nothing by itself; what was decided from it is in docs/performance.md.
//!
//! Both are used as plainly as they allow, by ioctl, on a guest of a few instructions that writes a word to each of a
//! number of pages. Measured is what the machine monitor pays for switching on and for taking in what was written, and how
//! long the guest takes to write. A guest that writes faster than the monitor looks stops at a full ring and goes on after a
//! reset; that is part of its time.

// UNSAFETY: guest memory, the ring and vCPU state are foreign mappings and raw structures.
#![expect(unsafe_code, reason = "KVM's interfaces are raw addresses")]
#![expect(clippy::disallowed_methods, reason = "a bench measures real time")]

use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use criterion::{Criterion, SamplingMode, criterion_group, criterion_main};
use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_PAGE_OFFSET,
    KVM_MEM_LOG_DIRTY_PAGES, KVMIO, kvm_clear_dirty_log, kvm_dirty_gfn, kvm_enable_cap, kvm_regs,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_iowr_nr};

mod numbers {
    //! Ioctls that kvm-ioctls does not wrap.
    use super::*;
    ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
    ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);
}

const PAGE_BYTES: usize = 4096;

/// The largest ring that KVM offers.
const RING_ENTRIES: usize = 65_536;

/// Pages that a clearing call covers. The guest does not run meanwhile, so the call may be long.
const CLEAR_PAGES: usize = 65_536;

/// Where the program lies, and from where on it writes.
const CODE_GPA: usize = 0x1000;
const DATA_GPA: usize = 0x20_0000;

/// again: mov [edi], eax; add edi, edx; dec ecx; jnz again; hlt
const PROGRAM: [u8; 8] = [0x89, 0x07, 0x01, 0xd7, 0x49, 0x75, 0xf9, 0xf4];

/// A page was dirtied; the monitor has taken it in.
const GFN_DIRTY: u32 = 1;
const GFN_RESET: u32 = 2;

/// KVM_EXIT_DIRTY_RING_FULL, which kvm-ioctls has no name for.
const EXIT_RING_FULL: u32 = 31;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Log {
    Bitmap,
    Ring,
}

/// A mapping, unmapped when dropped.
struct Mapping {
    pointer: *mut u8,
    bytes: usize,
}

impl Mapping {
    fn new(bytes: usize, flags: libc::c_int, descriptor: libc::c_int, offset: i64) -> Self {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let pointer = unsafe { libc::mmap(ptr::null_mut(), bytes, protection, flags, descriptor, offset) };
        assert_ne!(pointer, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        Self { pointer: pointer.cast(), bytes }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: it is ours alone, and its machine goes with it.
        unsafe { libc::munmap(self.pointer.cast(), self.bytes) };
    }
}

struct Machine {
    log: Log,
    ring: Option<Mapping>,
    ring_next: usize,
    vcpu: VcpuFd,
    vm: VmFd,
    memory: Mapping,
    words: Vec<u64>,
}

impl Machine {
    /// A machine with one slot of memory, on 4 KiB pages, none of it touched.
    fn new(kvm: &Kvm, bytes: usize, log: Log) -> Option<Self> {
        let vm = kvm.create_vm().expect("a machine");
        let enable = |cap, argument| {
            let cap = kvm_enable_cap { cap, args: [argument, 0, 0, 0], ..kvm_enable_cap::default() };
            vm.enable_cap(&cap)
        };
        match log {
            // Manual protection, and every page set at first.
            Log::Bitmap => enable(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 3).expect("manual protection"),
            Log::Ring => {
                let bytes = (RING_ENTRIES * size_of::<kvm_dirty_gfn>()) as u64;
                enable(KVM_CAP_DIRTY_LOG_RING_ACQ_REL, bytes).ok()?;
            }
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let memory = Mapping::new(bytes, flags, -1, 0);
        // SAFETY: the mapping is larger than the program and its place.
        unsafe { ptr::copy(PROGRAM.as_ptr(), memory.pointer.wrapping_add(CODE_GPA), PROGRAM.len()) };
        let vcpu = vm.create_vcpu(0).expect("a vCPU");
        enter_flat_mode(&vcpu);
        let ring = (log == Log::Ring).then(|| {
            let offset = i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * 4096;
            let bytes = RING_ENTRIES * size_of::<kvm_dirty_gfn>();
            Mapping::new(bytes, libc::MAP_SHARED, vcpu.as_raw_fd(), offset)
        });
        let words = vec![0; bytes / PAGE_BYTES / 64];
        let machine = Self { log, ring, ring_next: 0, vcpu, vm, memory, words };
        machine.set_logging(false);
        Some(machine)
    }

    fn set_logging(&self, on: bool) {
        let slot = kvm_userspace_memory_region {
            slot: 0,
            flags: if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: 0,
            memory_size: self.memory.bytes as u64,
            userspace_addr: self.memory.pointer.expose_provenance() as u64,
        };
        // SAFETY: the range is a live mapping, which the machine keeps as long as its VM.
        unsafe { self.vm.set_user_memory_region(slot) }.expect("the slot");
    }

    /// Has the guest write to `pages` pages, `stride` pages apart. Returns what was taken in on the way.
    fn write(&mut self, pages: usize, stride: usize) -> usize {
        let regs = kvm_regs {
            rip: CODE_GPA as u64,
            rflags: 2,
            rax: 0x5a5a,
            rcx: pages as u64,
            rdx: (stride * PAGE_BYTES) as u64,
            rdi: DATA_GPA as u64,
            ..kvm_regs::default()
        };
        self.vcpu.set_regs(&regs).expect("registers");
        let mut taken = 0;
        loop {
            let exit = self.vcpu.run().expect("it runs");
            if matches!(exit, VcpuExit::Hlt) {
                return taken;
            }
            assert!(matches!(exit, VcpuExit::Unsupported(EXIT_RING_FULL)), "{exit:?}");
            taken += self.harvest_ring();
        }
    }

    /// Takes in what was written since the last call, and has it reported again when it is written again.
    fn harvest(&mut self) -> usize {
        match self.log {
            Log::Bitmap => self.harvest_bitmap(),
            Log::Ring => self.harvest_ring(),
        }
    }

    fn harvest_bitmap(&mut self) -> usize {
        self.words = self.vm.get_dirty_log(0, self.memory.bytes).expect("the log");
        let mut dirty = 0;
        for (index, words) in self.words.chunks_mut(CLEAR_PAGES / 64).enumerate() {
            let pages: u32 = words.iter().map(|word| word.count_ones()).sum();
            if pages == 0 {
                continue;
            }
            dirty += pages as usize;
            let mut request = kvm_clear_dirty_log {
                slot: 0,
                num_pages: u32::try_from(words.len() * 64).expect("CLEAR_PAGES at most"),
                first_page: (index * CLEAR_PAGES) as u64,
                ..kvm_clear_dirty_log::default()
            };
            request.__bindgen_anon_1.dirty_bitmap = words.as_mut_ptr().cast();
            // SAFETY: KVM reads one bit a page, which are `words`.
            let done = unsafe { ioctl_with_ref(&self.vm, numbers::KVM_CLEAR_DIRTY_LOG(), &request) };
            assert_eq!(done, 0);
        }
        dirty
    }

    fn harvest_ring(&mut self) -> usize {
        let entries = self.ring.as_ref().expect("a ring").pointer.cast::<kvm_dirty_gfn>();
        let mut taken = 0;
        loop {
            let entry = entries.wrapping_add(self.ring_next % RING_ENTRIES);
            // SAFETY: the entry lies in the mapped ring; its flags, which come first, are shared with the kernel, hence atomic.
            let flags = unsafe { AtomicU32::from_ptr(entry.cast()) };
            if flags.load(Ordering::Acquire) & GFN_DIRTY == 0 {
                break;
            }
            // SAFETY: the kernel has published the entry, whose second word is the page's number in its slot, and does
            // not write it again before the reset.
            let offset = unsafe { ptr::read_volatile(entry.cast::<u64>().wrapping_add(1)) };
            let page = usize::try_from(offset).expect("a page of ours");
            self.words[page / 64] |= 1 << (page % 64);
            flags.store(GFN_RESET, Ordering::Release);
            self.ring_next += 1;
            taken += 1;
        }
        // SAFETY: the ioctl takes no argument.
        let reset = unsafe { ioctl(&self.vm, numbers::KVM_RESET_DIRTY_RINGS()) };
        assert_eq!(usize::try_from(reset).expect("it works"), taken);
        taken
    }
}

/// 32-bit protected mode without paging, all segments flat.
fn enter_flat_mode(vcpu: &VcpuFd) {
    let mut sregs = vcpu.get_sregs().expect("segments");
    let flat = |mut segment: kvm_bindings::kvm_segment, kind| {
        (segment.base, segment.limit, segment.selector) = (0, u32::MAX, 8);
        (segment.g, segment.db, segment.s, segment.present, segment.type_) = (1, 1, 1, 1, kind);
        segment
    };
    sregs.cs = flat(sregs.cs, 11);
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
        *segment = flat(*segment, 3);
    }
    sregs.cr0 |= 1;
    vcpu.set_sregs(&sregs).expect("segments");
}

/// Times `measured` after `prepare`, for each iteration.
fn timed(count: u64, mut prepare: impl FnMut(), mut measured: impl FnMut()) -> Duration {
    let mut sum = Duration::ZERO;
    for _ in 0..count {
        prepare();
        let began = Instant::now();
        measured();
        sum += began.elapsed();
    }
    sum
}

fn dirty_log(criterion: &mut Criterion) {
    let Ok(kvm) = Kvm::new() else {
        println!("SKIPPED (can't open /dev/kvm)");
        return;
    };
    let mut group = criterion.benchmark_group("dirty-log");
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
    for (name, log) in [("bitmap", Log::Bitmap), ("ring", Log::Ring)] {
        // 3 GiB is the most without a hole for devices; what the rest of a larger guest costs is its share of the bitmap.
        for (size, mib) in [("256 MiB", 256), ("3 GiB", 3072)] {
            let Some(mut machine) = Machine::new(&kvm, mib << 20, log) else {
                println!("SKIPPED (this KVM has no {name})");
                continue;
            };
            let all = (mib << 20) / PAGE_BYTES - DATA_GPA / PAGE_BYTES;
            machine.set_logging(true);
            machine.harvest();
            for pages in [16, 1_000, 10_000, 50_000] {
                let stride = all / pages;
                let harvest = format!("{name}/take in {pages} pages of {size}");
                group.bench_function(harvest, |bench| {
                    bench.iter_custom(|count| {
                        let machine = std::cell::RefCell::new(&mut machine);
                        timed(
                            count,
                            || _ = machine.borrow_mut().write(pages, stride),
                            || assert!(machine.borrow_mut().harvest() >= pages),
                        )
                    });
                });
            }
            let pages = 50_000;
            group.bench_function(format!("{name}/the guest writes {pages} pages of {size}"), |bench| {
                bench.iter_custom(|count| {
                    let machine = std::cell::RefCell::new(&mut machine);
                    timed(
                        count,
                        || _ = machine.borrow_mut().harvest(),
                        || _ = machine.borrow_mut().write(pages, all / pages),
                    )
                });
            });
            group.bench_function(format!("{name}/switch on with {pages} pages of {size} in use"), |bench| {
                bench.iter_custom(|count| {
                    let machine = std::cell::RefCell::new(&mut machine);
                    let prepare = || {
                        let mut machine = machine.borrow_mut();
                        machine.harvest();
                        machine.set_logging(false);
                        machine.write(pages, all / pages);
                    };
                    timed(count, prepare, || machine.borrow().set_logging(true))
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, dirty_log);
criterion_main!(benches);
