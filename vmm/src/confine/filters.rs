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
const EVERY: [Sysno; 47] = [
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
const CONTROL: [Sysno; 73] = [
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
    Sysno::newfstatat,
    Sysno::open,
    Sysno::openat,
    Sysno::pipe2,
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

/// ioctls whose numbers have these bits in common. One that is not listed is refused: among those of terminals is one that types
/// into what the operator reads.
#[derive(Debug, Clone, Copy)]
struct Ioctls {
    mask: u64,
    bits: u64,
}

impl Ioctls {
    const fn one(number: u64) -> Self {
        Self { mask: 0xFFFF_FFFF, bits: number }
    }

    /// All of the kind whose letter is the second byte.
    const fn kind(letter: u8) -> Self {
        Self { mask: 0xFF00, bits: (letter as u64) << 8 }
    }
}

/// KVM's.
const KVM: Ioctls = Ioctls::kind(0xAE);
/// That which finds pages that were never touched.
const PAGE_MAP: Ioctls = Ioctls::kind(0x66);
/// Those of taps, which have the upper quarter of the terminals' numbers for themselves.
const TAP: Ioctls = Ioctls { mask: 0xFFC0, bits: 0x54C0 };
/// Whether reading and writing wait.
const NON_BLOCKING: Ioctls = Ioctls::one(libc::FIONBIO);
/// Those of block devices.
const BLOCK_DEVICE: Ioctls = Ioctls::kind(0x12);
/// Those of network interfaces; what changes one needs a capability.
const INTERFACE: Ioctls = Ioctls::kind(0x89);
/// Whether a descriptor is a terminal, its mode and size, how much is there to be read, and that it is closed on exec.
const TERMINAL: [Ioctls; 7] = [
    Ioctls::one(libc::TCGETS),
    Ioctls::one(libc::TCSETS),
    Ioctls::one(libc::TCSETSW),
    Ioctls::one(libc::TCSETSF),
    Ioctls::one(libc::TIOCGWINSZ),
    Ioctls::one(libc::FIONREAD),
    Ioctls::one(libc::FIOCLEX),
];

/// Calls whose first argument names a process or a thread, 0 being the caller: of another process, even one of the same user, nothing
/// is sent to, moved or limited.
const OF_ITSELF: [Sysno; 3] = [Sysno::move_pages, Sysno::prlimit64, Sysno::sched_setaffinity];

/// The kinds of socket that a control thread may make. Name resolution uses netlink.
const SOCKETS: [i32; 4] = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];

/// What `role` may do.
pub(super) fn of(role: Role) -> Result<Rules, BackendError> {
    let mut rules = Rules::new();
    let (calls, ioctls): (&[&[Sysno]], &[Ioctls]) = match role {
        Role::Vcpu => (&[], &[KVM]),
        Role::Device => (&[&DEVICE], &[KVM, TAP, NON_BLOCKING, BLOCK_DEVICE]),
        Role::Data => (&[&DATA], &[PAGE_MAP, NON_BLOCKING]),
        Role::Control | Role::Opener => {
            (&[&DEVICE, &DATA, &CONTROL], &[KVM, PAGE_MAP, TAP, NON_BLOCKING, BLOCK_DEVICE, INTERFACE])
        }
    };
    let is_control = matches!(role, Role::Control | Role::Opener);
    for call in EVERY.iter().chain(&CLONES).chain(calls.iter().copied().flatten()) {
        rules.insert(i64::from(call.id()), Vec::new());
    }
    let executable =
        if is_control { vec![is_not(2, WRITE)?, is_not(2, EXECUTE)?] } else { vec![is_not(2, EXECUTE)?] };
    rules.insert(i64::from(Sysno::mmap.id()), executable.clone());
    rules.insert(i64::from(Sysno::mprotect.id()), executable);
    // A thread names itself, and confines itself further.
    let itself = [libc::PR_SET_NAME, libc::PR_SET_NO_NEW_PRIVS]
        .map(|what| with(0, Eq, u64::from(what.unsigned_abs())));
    rules.insert(i64::from(Sysno::prctl.id()), itself.into_iter().collect::<Result<_, _>>()?);
    let terminal: &[Ioctls] = if is_control { &TERMINAL } else { &[] };
    let ioctls = ioctls.iter().chain(terminal).map(|ioctl| with(1, MaskedEq(ioctl.mask), ioctl.bits));
    rules.insert(i64::from(Sysno::ioctl.id()), ioctls.collect::<Result<_, _>>()?);
    // A vCPU's thread is kicked by a signal.
    let own = u64::from(std::process::id());
    rules.insert(i64::from(Sysno::tgkill.id()), vec![with(0, Eq, own)?]);
    if is_control {
        for call in OF_ITSELF {
            rules.insert(i64::from(call.id()), vec![with(0, Eq, 0)?, with(0, Eq, own)?]);
        }
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
