//! `ferry console`: the terminal of a VM's serial port, for as long as somebody wants to look.
//!
//! ```text
//!  keys ──► (Ctrl-] ends it) ──► NAME.console ──► serial port        raw terminal, put back on every way out
//!  screen ◄────────────────────── NAME.console ◄── what was said last, and all that comes
//! ```

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write, stdin, stdout};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use anyhow::{Context, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::signal::unix::{SignalKind, signal};

use super::err;
use crate::cli::ConsoleArgs;
use crate::state_dir::StateDir;
use crate::terminal::{Mode, Terminal};

/// Ctrl-], as in telnet.
const DETACH: u8 = 0x1d;

const CHUNK_BYTES_MAX: usize = 4096;

/// Keys that the VM has not taken yet, in bytes; beyond that none are read.
const WAITING_BYTES_MAX: usize = 64 << 10;

/// Why it is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// Ctrl-] was typed.
    Detached,
    /// The VM has ended here.
    Closed,
    /// A signal came.
    Interrupted,
}

pub(crate) async fn run(args: ConsoleArgs) -> anyhow::Result<ExitCode> {
    let state = StateDir::from_environment()?;
    let path = state.console(&args.name);
    let console = match UnixStream::connect(&path) {
        Ok(console) => console,
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            return Err(error).with_context(|| format!("no permission to use {}", path.display()));
        }
        Err(_) => bail!(
            "there is no VM '{}' on this host (nothing answers at {}); 'ferry list' shows what there is",
            args.name,
            path.display()
        ),
    };
    console.set_nonblocking(true)?;
    let mut signals =
        [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup(), SignalKind::quit()]
            .map(signal)
            .into_iter()
            .collect::<io::Result<Vec<_>>>()?;
    let terminal = Terminal::enter(Mode::Raw).context("can't put the terminal into raw mode")?;
    if terminal.is_some() {
        err(format_args!("{}: attached; Ctrl-] detaches\r", args.name));
    }
    let (stop, stopped) = UnixStream::pair()?;
    let is_terminal = terminal.is_some();
    let mut pump = tokio::task::spawn_blocking(move || pump(&console, &stopped, is_terminal));
    let signalled = futures::future::select_all(signals.iter_mut().map(|signal| Box::pin(signal.recv())));
    let end = tokio::select! {
        end = &mut pump => end??,
        _ = signalled => End::Interrupted,
    };
    drop(stop);
    drop(terminal);
    match end {
        End::Detached => err(format_args!("\n{}: detached", args.name)),
        End::Closed => {
            err(format_args!("\n{}: closed; the VM has ended or moved, see 'ferry info'", args.name))
        }
        End::Interrupted => {}
    }
    Ok(if end == End::Interrupted { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Passes bytes both ways until one of the ends. The end of the standard input is none: what the VM says goes on.
fn pump(console: &UnixStream, stopped: &UnixStream, is_terminal: bool) -> io::Result<End> {
    // Neither through the library's buffers nor its locks.
    let mut keys = File::from(stdin().as_fd().try_clone_to_owned()?);
    let mut screen = File::from(stdout().as_fd().try_clone_to_owned()?);
    let mut waiting = Vec::new();
    let mut reads_keys = true;
    loop {
        let key_flags = PollFlags::POLLIN;
        let mut entries = vec![
            PollFd::new(stopped.as_fd(), PollFlags::POLLIN),
            PollFd::new(console.as_fd(), console_flags(&waiting)),
        ];
        if reads_keys && waiting.len() < WAITING_BYTES_MAX {
            entries.push(PollFd::new(keys.as_fd(), key_flags));
        }
        match poll(&mut entries, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready: Vec<bool> = entries.iter().map(|entry| entry.any().unwrap_or(true)).collect();
        if ready[0] {
            return Ok(End::Interrupted);
        }
        if ready[1] && (!show(console, &mut screen)? || !pass_on(console, &mut waiting)?) {
            return Ok(End::Closed);
        }
        if ready.get(2) == Some(&true) {
            let mut chunk = [0; CHUNK_BYTES_MAX];
            let count = keys.read(&mut chunk)?;
            let typed = &chunk[..count];
            reads_keys = !typed.is_empty();
            let detach = typed.iter().position(|key| is_terminal && *key == DETACH);
            waiting.extend_from_slice(&typed[..detach.unwrap_or(typed.len())]);
            if !pass_on(console, &mut waiting)? {
                return Ok(End::Closed);
            }
            if detach.is_some() {
                return Ok(End::Detached);
            }
        }
    }
}

fn console_flags(waiting: &[u8]) -> PollFlags {
    if waiting.is_empty() { PollFlags::POLLIN } else { PollFlags::POLLIN | PollFlags::POLLOUT }
}

/// Shows what the VM says; false at its end.
fn show(mut console: &UnixStream, screen: &mut File) -> io::Result<bool> {
    let mut chunk = [0; CHUNK_BYTES_MAX];
    match console.read(&mut chunk) {
        Ok(0) => Ok(false),
        Ok(count) => screen.write_all(&chunk[..count]).map(|()| true),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(false),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(true),
        Err(error) => Err(error),
    }
}

/// Sends as much of `waiting` as is taken; false if the VM is gone.
fn pass_on(mut console: &UnixStream, waiting: &mut Vec<u8>) -> io::Result<bool> {
    if waiting.is_empty() {
        return Ok(true);
    }
    match console.write(waiting) {
        Ok(count) => {
            waiting.drain(..count);
            Ok(true)
        }
        Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => Ok(false),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(true),
        Err(error) => Err(error),
    }
}
