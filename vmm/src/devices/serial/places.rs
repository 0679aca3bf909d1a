//! Opening what a serial port is connected to.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use nix::pty::openpty;
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
use nix::unistd::ttyname;

use super::{SerialError, Terminal};
use crate::config::SerialTarget;
use crate::unix_listener::{self, SocketFile};

/// This process's standard input, to be opened a second time.
const STDIN: &str = "/proc/self/fd/0";

/// What a target consists of.
#[derive(Debug, Default)]
pub(super) struct Opened {
    /// May block whoever writes.
    pub(super) output: Option<File>,
    /// Does not block whoever reads it after poll said that there is something.
    pub(super) input: Option<File>,
    pub(super) listener: Option<Listener>,
    pub(super) terminal: Option<Terminal>,
}

/// A listening socket, non-blocking, and its file if that is to go with it.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) socket: UnixListener,
    _file: Option<SocketFile>,
}

pub(super) fn open(target: &SerialTarget) -> Result<Opened, SerialError> {
    match target {
        SerialTarget::Null => Ok(Opened::default()),
        SerialTarget::Stdout => Ok(Opened { output: Some(stdout()?), ..Opened::default() }),
        SerialTarget::Stdio => Ok(Opened { output: Some(stdout()?), input: stdin(), ..Opened::default() }),
        SerialTarget::Pty => pseudo_terminal().map_err(|error| SerialError::Terminal(error.into())),
        SerialTarget::Socket(path) => {
            let error = |source| SerialError::Socket { path: path.clone(), source };
            Ok(Opened { listener: Some(Listener::bind(path).map_err(error)?), ..Opened::default() })
        }
        SerialTarget::File(path) => {
            let opened = OpenOptions::new().create(true).append(true).open(path);
            let output = opened.map_err(|source| SerialError::File { path: path.clone(), source })?;
            Ok(Opened { output: Some(output), ..Opened::default() })
        }
    }
}

fn stdout() -> Result<File, SerialError> {
    // Not through `io::stdout`, whose lock a stuck write would keep from the whole process.
    let stdout = io::stdout().as_fd().try_clone_to_owned().map_err(SerialError::Stdout)?;
    Ok(File::from(stdout))
}

/// The standard input, opened anew: it must not block, and a flag set on the shared one would be the shell's as well.
fn stdin() -> Option<File> {
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(STDIN);
    match opened {
        Ok(file) => Some(file),
        // A socket, or the terminal of another user.
        Err(error) => {
            tracing::warn!(%error, "the standard input can't be opened again, so the serial port has no input from it");
            None
        }
    }
}

fn pseudo_terminal() -> nix::Result<Opened> {
    let pair = openpty(None, None)?;
    // Raw, or the terminal would send the guest's own output back as input.
    let mut settings = tcgetattr(&pair.slave)?;
    cfmakeraw(&mut settings);
    tcsetattr(&pair.slave, SetArg::TCSANOW, &settings)?;
    let path = ttyname(&pair.slave)?;
    let output = pair.master.try_clone().map_err(|_| nix::Error::EMFILE)?;
    Ok(Opened {
        output: Some(File::from(output)),
        input: Some(File::from(pair.master)),
        listener: None,
        terminal: Some(Terminal { path, _end: pair.slave }),
    })
}

impl Listener {
    /// Takes over a socket whose file is the caller's business.
    pub(super) fn adopt(socket: UnixListener) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self { socket, _file: None })
    }

    /// Listens at `path`. Who connects gets nothing before the machine runs.
    fn bind(path: &Path) -> io::Result<Self> {
        let (socket, file) = unix_listener::listen_at(path)?;
        Ok(Self { socket, _file: Some(file) })
    }
}
