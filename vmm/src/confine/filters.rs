//! Which system calls the threads of each role may make.
//!
//! The lists are what the roles need on purpose, what Rust's and C's libraries need to allocate, lock, wait, panic and end a thread,
//! and nothing else. A thread keeps the filters of the one that started it, so [`Role::Control`] allows whatever
//! any other does. Arguments are looked at where a call can do much more than it is meant for.

use std::collections::BTreeMap;

use seccompiler::SeccompCmpOp::{Eq, MaskedEq};
use seccompiler::{BackendError, SeccompCmpArgLen, SeccompCondition, SeccompRule};
use syscalls::Sysno;

use super::Role;

/// System calls with the rules that they must fit, any if there are none.
pub(super) type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// For every thread: memory, locks, time, signals, and what is open already.
const EVERY: [Sysno; 48] = [
    Sysno::brk,
    // Gives up what is left; nobody can get any back.
    Sysno::capset,
    Sysno::clock_getres,
    Sysno::clock_gettime,
    Sysno::clock_nanosleep,
    Sysno::close,
    Sysno::epoll_ctl,
    Sysno::epoll_pwait,
    Sysno::epoll_wait,
    Sysno::exit,
    Sysno::exit_group,
    Sysno::fcntl,
    Sysno::fstat,
    Sysno::futex,
    Sysno::getpid,
    Sysno::getrandom,
    Sysno::gettid,
    Sysno::getpriority,
    Sysno::lseek,
    Sysno::madvise,
    Sysno::membarrier,
    Sysno::mincore,
    Sysno::mremap,
    Sysno::munmap,
    Sysno::nanosleep,
    Sysno::poll,
    Sysno::ppoll,
    Sysno::pread64,
    Sysno::preadv,
    Sysno::pwrite64,
    Sysno::pwritev,
    Sysno::read,
    Sysno::readv,
    Sysno::restart_syscall,
    Sysno::rseq,
    Sysno::rt_sigaction,
    Sysno::rt_sigprocmask,
    Sysno::rt_sigreturn,
    Sysno::sched_getaffinity,
    Sysno::sched_yield,
    Sysno::seccomp,
    Sysno::set_robust_list,
    Sysno::setpriority,
    Sysno::sigaltstack,
    Sysno::tgkill,
    Sysno::timerfd_settime,
    Sysno::write,
    Sysno::writev,
];

/// For device threads also.
const DEVICE: [Sysno; 10] = [
    Sysno::accept4,
    Sysno::fallocate,
    Sysno::fdatasync,
    Sysno::fsync,
    Sysno::recvfrom,
    Sysno::recvmsg,
    Sysno::sendmsg,
    Sysno::sendto,
    Sysno::shutdown,
    Sysno::sync_file_range,
];

/// For data threads also.
const DATA: [Sysno; 10] = [
    Sysno::fallocate,
    Sysno::getpeername,
    Sysno::getsockname,
    Sysno::getsockopt,
    Sysno::recvfrom,
    Sysno::recvmsg,
    Sysno::sendmsg,
    Sysno::sendto,
    Sysno::setsockopt,
    Sysno::shutdown,
];

/// For control threads also: files, sockets, threads.
const CONTROL: [Sysno; 76] = [
    Sysno::accept,
    Sysno::access,
    Sysno::arch_prctl,
    Sysno::bind,
    Sysno::capget,
    Sysno::chmod,
    Sysno::connect,
    Sysno::dup,
    Sysno::dup2,
    Sysno::dup3,
    Sysno::epoll_create1,
    Sysno::eventfd2,
    Sysno::faccessat,
    Sysno::faccessat2,
    Sysno::fadvise64,
    Sysno::fchmod,
    Sysno::fchmodat,
    Sysno::fchown,
    Sysno::flock,
    Sysno::fstatfs,
    Sysno::ftruncate,
    Sysno::get_mempolicy,
    Sysno::getcwd,
    Sysno::getdents64,
    Sysno::getegid,
    Sysno::geteuid,
    Sysno::getgid,
    Sysno::getrlimit,
    Sysno::getrusage,
    Sysno::gettimeofday,
    Sysno::getuid,
    Sysno::inotify_add_watch,
    Sysno::inotify_init1,
    Sysno::link,
    Sysno::linkat,
    Sysno::listen,
    Sysno::lstat,
    Sysno::mbind,
    Sysno::memfd_create,
    Sysno::mkdir,
    Sysno::mkdirat,
    Sysno::move_pages,
    Sysno::newfstatat,
    Sysno::open,
    Sysno::openat,
    Sysno::pipe2,
    Sysno::prlimit64,
    Sysno::process_madvise,
    Sysno::readlink,
    Sysno::readlinkat,
    Sysno::recvmmsg,
    Sysno::rename,
    Sysno::renameat,
    Sysno::renameat2,
    Sysno::rmdir,
    Sysno::rt_sigtimedwait,
    Sysno::sched_getparam,
    Sysno::sched_getscheduler,
    Sysno::sched_setaffinity,
    Sysno::sendmmsg,
    Sysno::set_mempolicy,
    Sysno::set_tid_address,
    Sysno::socketpair,
    Sysno::stat,
    Sysno::statfs,
    Sysno::statx,
    Sysno::sync,
    Sysno::syncfs,
    Sysno::sysinfo,
    Sysno::timerfd_create,
    Sysno::timerfd_gettime,
    Sysno::umask,
    Sysno::uname,
    Sysno::unlink,
    Sysno::unlinkat,
    Sysno::utimensat,
];

/// Calls that make threads and processes. [`refused_quietly`] says which of them fail.
const CLONES: [Sysno; 2] = [Sysno::clone, Sysno::clone3];

/// The kinds of ioctl, by the second byte of their number: that which finds pages that were never touched, KVM's, those of terminals and taps, of block devices, and of
/// network interfaces.
const PAGE_MAP: u64 = 0x6600;
const KVM: u64 = 0xAE00;
const TERMINAL_AND_TAP: u64 = 0x5400;
const BLOCK_DEVICE: u64 = 0x1200;
const INTERFACE: u64 = 0x8900;

/// The kinds of socket that a control thread may make. Name resolution uses netlink.
const SOCKETS: [i32; 4] = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];

/// What `role` may do.
pub(super) fn of(role: Role) -> Result<Rules, BackendError> {
    let mut rules = Rules::new();
    let (calls, ioctls): (&[&[Sysno]], &[u64]) = match role {
        Role::Vcpu => (&[], &[KVM]),
        Role::Device => (&[&DEVICE], &[KVM, TERMINAL_AND_TAP, BLOCK_DEVICE]),
        Role::Data => (&[&DATA], &[PAGE_MAP]),
        Role::Control | Role::Opener => {
            (&[&DEVICE, &DATA, &CONTROL], &[KVM, PAGE_MAP, TERMINAL_AND_TAP, BLOCK_DEVICE, INTERFACE])
        }
    };
    for call in EVERY.iter().chain(&CLONES).chain(calls.iter().copied().flatten()) {
        rules.insert(i64::from(call.id()), Vec::new());
    }
    let is_control = matches!(role, Role::Control | Role::Opener);
    let executable =
        if is_control { vec![is_not(2, WRITE)?, is_not(2, EXECUTE)?] } else { vec![is_not(2, EXECUTE)?] };
    rules.insert(i64::from(Sysno::mmap.id()), executable.clone());
    rules.insert(i64::from(Sysno::mprotect.id()), executable);
    // A thread names itself, and confines itself further.
    let itself = [libc::PR_SET_NAME, libc::PR_SET_NO_NEW_PRIVS]
        .map(|what| with(0, Eq, u64::from(what.unsigned_abs())));
    rules.insert(i64::from(Sysno::prctl.id()), itself.into_iter().collect::<Result<_, _>>()?);
    let kinds = ioctls.iter().map(|&kind| with(1, MaskedEq(0xFF00), kind)).collect::<Result<_, _>>()?;
    rules.insert(i64::from(Sysno::ioctl.id()), kinds);
    if is_control {
        rules.insert(i64::from(Sysno::prctl.id()), Vec::new());
        let families = SOCKETS.map(|family| with(0, Eq, u64::from(family.unsigned_abs())));
        rules.insert(i64::from(Sysno::socket.id()), families.into_iter().collect::<Result<_, _>>()?);
    }
    Ok(rules)
}

/// What fails with ENOSYS without a signal: the C library calls these with all signals blocked, and a process that is sent one that
/// is blocked is killed. So these are not counted either.
///
/// Threads are made, if at all, with the older call, whose flags are no memory that a filter can't see; processes never.
pub(super) fn refused_quietly(role: Role) -> Result<Rules, BackendError> {
    let [older, newer] = CLONES.map(|call| i64::from(call.id()));
    let flags =
        [libc::CLONE_VM, libc::CLONE_THREAD].map(|flag| with(0, MaskedEq(u64::from(flag.unsigned_abs())), 0));
    let not_a_thread =
        if role.starts_threads() { flags.into_iter().collect::<Result<_, _>>()? } else { Vec::new() };
    Ok(Rules::from([(older, not_a_thread), (newer, Vec::new())]))
}

const WRITE: u64 = 2;
const EXECUTE: u64 = 4;

/// Memory that does not get this right: a control thread may load a library, which is executed but not written, as
/// resolving a host's name may need; others need neither.
fn is_not(argument: u8, right: u64) -> Result<SeccompRule, BackendError> {
    with(argument, MaskedEq(right), 0)
}

fn with(argument: u8, operator: seccompiler::SeccompCmpOp, value: u64) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?])
}
