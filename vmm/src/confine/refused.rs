//! System calls that a filter did not let through: each fails with ENOSYS and is counted by role and number.
//!
//! Everything here runs in a signal handler, in the middle of whatever the thread was doing, so it touches atomics and
//! the thread's own cell only. Who is interested asks ([`refusals`]).

// UNSAFETY: a signal handler reads and writes the registers that the kernel hands it.
#![expect(unsafe_code, reason = "a signal handler changes the interrupted thread's registers")]

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

use syscalls::Sysno;
use vmm_sys_util::errno;
use vmm_sys_util::signal::register_signal_handler;

use super::Role;

/// Numbers above all that x86-64 has; higher ones are counted in the last place.
const NUMBERS: usize = 512;

static COUNTS: [[AtomicU64; NUMBERS]; Role::ALL.len()] =
    [const { [const { AtomicU64::new(0) }; NUMBERS] }; Role::ALL.len()];

thread_local! {
    // Constant and without a destructor, so a signal handler may read it.
    static ROLE: Cell<Role> = const { Cell::new(Role::Control) };
}

/// System calls of one kind that one kind of thread tried and was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// By which threads.
    pub role: Role,
    /// Its name, or its number where it has none that is known.
    pub system_call: String,
    /// How often.
    pub count: u64,
}

/// What has been refused since the process began.
#[must_use]
pub fn refusals() -> Vec<Refusal> {
    let mut refusals = Vec::new();
    for role in Role::ALL {
        for (number, count) in COUNTS[role.index()].iter().enumerate() {
            let count = count.load(Ordering::Relaxed);
            if count > 0 {
                let system_call =
                    Sysno::new(number).map_or_else(|| number.to_string(), |call| call.name().to_owned());
                refusals.push(Refusal { role, system_call, count });
            }
        }
    }
    refusals
}

/// Of which role the calling thread is.
pub(super) fn of_this_thread(role: Role) {
    ROLE.set(role);
}

/// Installs the handler.
pub(super) fn catch() -> Result<(), errno::Error> {
    register_signal_handler(libc::SIGSYS, refuse)
}

extern "C" fn refuse(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let context = context.cast::<libc::ucontext_t>();
    let rax = usize::try_from(libc::REG_RAX).unwrap_or_default();
    // SAFETY: the kernel hands a handler that was installed with SA_SIGINFO a context that is its own until it returns. For
    // a call that seccomp trapped, RAX holds its number (the kernel has rolled the call back), and what is put there
    // is what the call returns.
    let register = unsafe { &mut (*context).uc_mcontext.gregs[rax] };
    let number = usize::try_from(*register).unwrap_or(NUMBERS).min(NUMBERS - 1);
    COUNTS[ROLE.get().index()][number].fetch_add(1, Ordering::Relaxed);
    *register = -i64::from(libc::ENOSYS);
}
