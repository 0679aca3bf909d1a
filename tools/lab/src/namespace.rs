//! Anonymous network namespaces, and running code and processes inside them.
//!
//! A namespace here is a file descriptor and a thread, and has no name in /run/netns: when the
//! process ends, even by SIGKILL, the kernel frees the namespace and every interface in it. Child
//! processes would keep it alive, so a child should ask for a signal at its parent's death
//! (`PR_SET_PDEATHSIG`). That signal comes when the *thread* that forked it ends, which is why
//! [`Namespace::spawn`] forks from the namespace's own long-lived thread.
//!
//! Left out: interfaces and addresses (see [`crate::network`]), and mount or PID namespaces.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::process::{Child, Command};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};

use crate::network::{Links, NetworkError};

/// Why a namespace could not be made or entered.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// The process may not make network namespaces.
    #[error(
        "can't make a network namespace for '{label}': it takes root (CAP_SYS_ADMIN and CAP_NET_ADMIN); run as root"
    )]
    Permission {
        /// The namespace's label.
        label: String,
    },
    /// The kernel refused otherwise.
    #[error("can't {action} the network namespace of '{label}'")]
    Kernel {
        /// What was tried, as a verb.
        action: &'static str,
        /// The namespace's label.
        label: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The namespace exists, but its loopback interface could not be brought up.
    #[error("can't bring up the loopback interface of '{label}'")]
    Loopback {
        /// The namespace's label.
        label: String,
        /// What failed.
        #[source]
        source: Box<NetworkError>,
    },
}

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace that lives as long as this value and the processes and sockets inside it.
#[derive(Debug)]
pub struct Namespace {
    label: String,
    file: File,
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Namespace {
    /// Makes a namespace whose loopback is up. `label` appears in errors and thread names only.
    ///
    /// # Errors
    /// [`NamespaceError::Permission`] without root; otherwise what the kernel refused.
    pub fn new(label: &str) -> Result<Self, NamespaceError> {
        let kernel_error =
            |action, source| NamespaceError::Kernel { action, label: label.to_owned(), source };
        let (jobs, queue) = mpsc::channel::<Job>();
        let (made, outcome) = mpsc::sync_channel(1);
        let thread = thread::Builder::new()
            .name(format!("netns-{label}"))
            .spawn(move || {
                let file = unshare_here();
                let failed = file.is_err();
                // The receiver waits for exactly this; if it is gone, so is the reason to go on.
                if made.send(file).is_err() || failed {
                    return;
                }
                for job in queue {
                    job();
                }
            })
            .map_err(|source| kernel_error("start a thread for", source))?;
        let outcome = outcome.recv().expect("the thread answers before anything can end it");
        let file = match outcome {
            Ok(file) => file,
            Err(source) if source.raw_os_error() == Some(Errno::EPERM as i32) => {
                return Err(NamespaceError::Permission { label: label.into() });
            }
            Err(source) => return Err(kernel_error("make", source)),
        };
        let namespace = Self { label: label.into(), file, jobs: Some(jobs), thread: Some(thread) };
        Links::of(&namespace)
            .up("lo")
            .map_err(|source| NamespaceError::Loopback { label: label.into(), source: Box::new(source) })?;
        Ok(namespace)
    }

    /// The name given at its making.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Runs `work` on a fresh thread inside the namespace and waits for its result.
    ///
    /// Sockets opened by `work` stay in the namespace wherever they are used later. A panic of
    /// `work` goes on in the caller.
    ///
    /// # Errors
    /// [`NamespaceError::Kernel`] if the thread could not start or enter.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NamespaceError> {
        thread::scope(|scope| {
            let inside = thread::Builder::new()
                .name(format!("in-{}", self.label))
                .spawn_scoped(scope, || self.enter().map(|()| work()))
                .map_err(|source| self.kernel_error("start a thread in", source))?;
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Starts a thread inside the namespace that outlives this call.
    ///
    /// # Errors
    /// [`NamespaceError::Kernel`] if the thread could not start.
    pub fn start_thread<T: Send + 'static>(
        &self,
        name: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<JoinHandle<T>, NamespaceError> {
        let name = name.to_owned();
        // A new thread is born in the namespace of the thread that starts it.
        self.on_own_thread(move || thread::Builder::new().name(name).spawn(work))
            .map_err(|source| self.kernel_error("start a thread in", source))
    }

    /// Starts a process inside the namespace.
    ///
    /// It is forked from a thread that ends with this value, so a child that asked for a
    /// parent-death signal gets it when the namespace is dropped or this process ends.
    ///
    /// # Errors
    /// As [`Command::spawn`].
    pub fn spawn(&self, mut command: Command) -> io::Result<Child> {
        self.on_own_thread(move || command.spawn())
    }

    /// The namespace as a file descriptor, as netlink takes it to move interfaces.
    #[must_use]
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn enter(&self) -> Result<(), NamespaceError> {
        setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET)
            .map_err(|errno| self.kernel_error("enter", errno.into()))
    }

    fn on_own_thread<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = mpsc::sync_channel(1);
        let job = Box::new(move || {
            // The caller waits below, so the receiver is there.
            let _ = done.send(work());
        });
        self.jobs.as_ref().expect("present until dropped").send(job).expect("the thread runs until dropped");
        result.recv().expect("the jobs given here do not panic")
    }

    fn kernel_error(&self, action: &'static str, source: io::Error) -> NamespaceError {
        NamespaceError::Kernel { action, label: self.label.clone(), source }
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // It ends when its queue closes. A panic in it has been reported already.
            let _ = thread.join();
        }
    }
}

/// Moves the calling thread into a new namespace and returns that.
fn unshare_here() -> io::Result<File> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    // Duplicate address detection keeps every IPv6 address unusable for a second. On a kernel or
    // container where these files can't be written, the lab is that second slower and still right.
    for scope in ["all", "default"] {
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{scope}/accept_dad"), "0");
    }
    File::open("/proc/thread-self/ns/net")
}
