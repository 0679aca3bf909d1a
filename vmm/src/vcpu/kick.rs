//! Getting a vCPU thread out of KVM_RUN, and the parts of `kvm_run` that kvm-ioctls does not show.
//!
//! Two steps: set `immediate_exit`, which makes the next KVM_RUN return at once, then signal the
//! thread, which ends a KVM_RUN that is under way. Between them they leave no gap.

// UNSAFETY: `kvm_run` is memory shared with the kernel; one byte of it is written by other threads.
#![expect(unsafe_code, reason = "kvm_run is memory shared with the kernel")]

use std::mem::offset_of;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use vmm_sys_util::errno;
use vmm_sys_util::signal::{self, Error as SignalError, SIGRTMIN, register_signal_handler};

use crate::memory::PAGE_BYTES;

/// Installs the handler of the kick signal, which does nothing: only the interruption counts.
pub(crate) fn install_signal_handler() -> Result<(), errno::Error> {
    extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN(), ignore)
}

/// Lets the calling thread be interrupted by the kick signal.
pub(super) fn unblock_signal() -> Result<(), SignalError> {
    signal::unblock_signal(SIGRTMIN())
}

/// Makes one vCPU's thread leave KVM_RUN.
#[derive(Debug)]
pub(crate) struct VcpuKick {
    /// A second mapping of the first page of the vCPU's `kvm_run`, so that no Rust reference of
    /// kvm-ioctls aliases the byte that is written here.
    page: NonNull<u8>,
    /// The thread, while it lives: its number may belong to another one afterwards.
    thread: Mutex<Option<libc::pid_t>>,
}

/// Held by a vCPU's thread for as long as it can be signalled.
#[derive(Debug)]
pub(super) struct Signalled<'a>(&'a VcpuKick);

impl Drop for Signalled<'_> {
    fn drop(&mut self) {
        *self.0.lock_thread() = None;
    }
}

// SAFETY: the mapping belongs to this value alone and is only accessed atomically.
unsafe impl Send for VcpuKick {}
// SAFETY: as above.
unsafe impl Sync for VcpuKick {}

impl VcpuKick {
    pub(super) fn new(fd: &VcpuFd) -> Result<Self, errno::Error> {
        const { assert!(offset_of!(kvm_run, immediate_exit) < PAGE_BYTES) };
        let length = NonZeroUsize::new(PAGE_BYTES).expect("a page is not empty");
        // SAFETY: the descriptor is open during the call.
        let file = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new shared mapping of the vCPU's file at an address of the kernel's choice touches
        // no memory of ours.
        let page = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, file, 0) };
        let page = page.map_err(|error| errno::Error::new(error as i32))?;
        Ok(Self { page: page.cast(), thread: Mutex::new(None) })
    }

    /// Called by the vCPU's thread, once, which keeps what is returned until its end.
    pub(super) fn set_thread(&self) -> Signalled<'_> {
        let id = nix::unistd::gettid().as_raw();
        assert!(self.lock_thread().replace(id).is_none(), "a vCPU has one thread");
        Signalled(self)
    }

    fn lock_thread(&self) -> MutexGuard<'_, Option<libc::pid_t>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn request_exit(&self) {
        self.immediate_exit().store(1, Ordering::SeqCst);
        let thread = self.lock_thread();
        let Some(id) = *thread else { return };
        let (process, signal) = (nix::unistd::getpid().as_raw(), SIGRTMIN());
        // The thread can't end while its number is locked, so the signal reaches nobody else.
        // SAFETY: tgkill takes numbers only, and the signal has a handler that does nothing.
        unsafe { libc::syscall(libc::SYS_tgkill, process, id, signal) };
    }

    pub(super) fn clear(&self) {
        self.immediate_exit().store(0, Ordering::SeqCst);
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        let byte = self.page.as_ptr().wrapping_add(offset_of!(kvm_run, immediate_exit));
        // SAFETY: the byte lies in the mapping, which lives as long as `self`; an AtomicU8 has the
        // layout of a byte, and the kernel only reads it.
        unsafe { AtomicU8::from_ptr(byte) }
    }
}

impl Drop for VcpuKick {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, one page long, and no reference to it outlives `self`.
        let done = unsafe { munmap(self.page.cast(), PAGE_BYTES) };
        debug_assert!(done.is_ok(), "unmapping our own page can't fail");
    }
}

/// KVM_EXIT_INTERNAL_ERROR in detail.
#[derive(Debug)]
pub(super) struct InternalError {
    pub(super) suberror: u32,
    pub(super) data: Vec<u64>,
}

/// Reads the details after KVM_RUN returned KVM_EXIT_INTERNAL_ERROR.
pub(super) fn internal_error(fd: &mut VcpuFd) -> InternalError {
    // SAFETY: every member of the union is plain integers, so reading any of them is defined; the exit
    // reason says that this one was written.
    let internal = unsafe { fd.get_kvm_run().__bindgen_anon_1.internal };
    let count = usize::try_from(internal.ndata).unwrap_or(usize::MAX).min(internal.data.len());
    InternalError { suberror: internal.suberror, data: internal.data[..count].to_vec() }
}
