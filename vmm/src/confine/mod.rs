//! Takes from this process what it has no use for, so that a guest or a peer that breaks into it finds little.
//!
//! Two things are taken, a thread at a time:
//!
//! - *system calls*: each thread has a seccomp filter for its [`Role`], on top of that of the thread that started it;
//! - *capabilities*: every thread but the one that opens devices and taps ([`Role::Opener`]) gives up all of them.
//!
//! Nothing happens before a process has asked for it with [`begin`], so a library's user decides. A system call
//! that a filter does not know is not carried out, fails with ENOSYS as on a kernel that lacks it, and is
//! counted ([`refusals`]): whoever took a thread over gets no further, and a guest does not die because a C library has learned a new
//! call. What is not here: namespaces, chroot and users of their own, which whoever starts ferry can add.

mod filters;
mod refused;

use std::sync::OnceLock;

pub use refused::{Refusal, refusals};

use crate::heap;
use seccompiler::{SeccompAction, SeccompFilter, TargetArch};

/// What becomes of system calls that a filter does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seccomp {
    /// They fail with ENOSYS and are counted.
    On,
    /// They are carried out, and the kernel logs them (audit, or `dmesg`).
    Log,
    /// There are no filters.
    Off,
}

/// What a thread is for, which decides what it may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It opens KVM, taps and disks, and keeps the process's capabilities for it.
    Opener,
    /// It serves the control API and the control connections, keeps records, and starts the other threads.
    Control,
    /// It runs a vCPU.
    Vcpu,
    /// It serves a device: it reads and writes what is open already.
    Device,
    /// It sends or receives guest memory, or packs it.
    Data,
}

impl Role {
    const ALL: [Self; 5] = [Self::Opener, Self::Control, Self::Vcpu, Self::Device, Self::Data];

    /// For people.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Opener => "opener",
            Self::Control => "control",
            Self::Vcpu => "vCPU",
            Self::Device => "device",
            Self::Data => "data",
        }
    }

    /// Whether threads of this role start others: those that send pages start those that pack them, and the serial port's
    /// one for each console.
    const fn starts_threads(self) -> bool {
        match self {
            Self::Opener | Self::Control | Self::Device | Self::Data => true,
            Self::Vcpu => false,
        }
    }

    const fn index(self) -> usize {
        match self {
            Self::Opener => 0,
            Self::Control => 1,
            Self::Vcpu => 2,
            Self::Device => 3,
            Self::Data => 4,
        }
    }
}

/// Why a thread could not be confined.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// The kernel or the list of calls did not let the filter through.
    #[error(
        "this kernel does not take the seccomp filter of the {role} thread: {error}; '--seccomp off' does without"
    )]
    Filter {
        /// Of which thread.
        role: &'static str,
        /// What it said.
        error: String,
    },
    /// The signal that refused calls raise can't be handled.
    #[error("refused system calls can't be caught: {0}")]
    Handler(vmm_sys_util::errno::Error),
    /// The thread could not give up its capabilities.
    #[error("the {role} thread can't give up its capabilities: {error}")]
    Capabilities {
        /// Of which thread.
        role: &'static str,
        /// What the kernel said.
        error: rustix::io::Errno,
    },
}

static SECCOMP: OnceLock<Seccomp> = OnceLock::new();

/// Confines this thread as `role`, and from now on every thread of ferry that is started. Call it before any other thread lives: those
/// would keep what they have. Only the first call of a process counts.
///
/// # Errors
/// That the kernel refuses; the thread is then as it was, or has its filter but not yet given up its capabilities.
pub fn begin(seccomp: Seccomp, role: Role) -> Result<(), ConfineError> {
    if SECCOMP.set(seccomp).is_ok() && seccomp != Seccomp::Off {
        heap::settle();
        refused::catch().map_err(ConfineError::Handler)?;
    }
    try_enter(role)
}

/// Confines the calling thread as `role` for the rest of its life, if [`begin`] has been called. That this fails where it
/// worked for the first thread is not expected; it is said, and the thread has the filter of the one that started it.
pub fn enter(role: Role) {
    if let Err(error) = try_enter(role) {
        tracing::error!("{error}");
    }
}

fn try_enter(role: Role) -> Result<(), ConfineError> {
    let Some(seccomp) = SECCOMP.get() else { return Ok(()) };
    refused::of_this_thread(role);
    // First: the filters of most threads no longer allow it.
    if role != Role::Opener {
        let none = rustix::thread::CapabilitySet::empty();
        let sets = rustix::thread::CapabilitySets { effective: none, permitted: none, inheritable: none };
        rustix::thread::set_capabilities(None, sets)
            .map_err(|error| ConfineError::Capabilities { role: role.name(), error })?;
    }
    let action = match seccomp {
        Seccomp::On => SeccompAction::Trap,
        Seccomp::Log => SeccompAction::Log,
        Seccomp::Off => return Ok(()),
    };
    apply(role, action).map_err(|error| ConfineError::Filter { role: role.name(), error: error.to_string() })
}

fn apply(role: Role, action: SeccompAction) -> Result<(), Box<dyn std::error::Error>> {
    let refused = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    let refused = if action == SeccompAction::Trap { refused } else { action.clone() };
    let quiet = filters::refused_quietly(role)?;
    install(quiet, SeccompAction::Allow, refused)?;
    install(filters::of(role)?, action, SeccompAction::Allow)
}

/// Adds a filter to those of the calling thread.
fn install(
    rules: filters::Rules,
    of_others: SeccompAction,
    of_these: SeccompAction,
) -> Result<(), Box<dyn std::error::Error>> {
    let filter = SeccompFilter::new(rules, of_others, of_these, TargetArch::x86_64)?;
    let program: seccompiler::BpfProgram = filter.try_into()?;
    Ok(seccompiler::apply_filter(&program)?)
}

#[cfg(test)]
mod tests;
