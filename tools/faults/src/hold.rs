//! Where a process that has come to its fault's place waits until it may go on.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::Context;

/// A socket for one process that is to be held.
#[derive(Debug)]
pub struct Hold {
    listener: UnixListener,
    path: PathBuf,
}

/// A process that is held. Dropping it lets it go on.
#[derive(Debug)]
pub struct Held {
    stream: UnixStream,
    /// Where it is held.
    pub step: String,
}

impl Hold {
    /// Waits at `path`.
    ///
    /// # Errors
    /// If the socket can't be made.
    pub fn new(path: PathBuf) -> anyhow::Result<Self> {
        let listener = UnixListener::bind(&path).with_context(|| path.display().to_string())?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, path })
    }

    /// Where the process is to connect.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The process, once it is there.
    ///
    /// # Errors
    /// If the socket fails.
    pub fn held(&self) -> anyhow::Result<Option<Held>> {
        let mut stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        stream.set_nonblocking(false)?;
        let mut step = String::new();
        let mut byte = [0];
        while stream.read(&mut byte)? == 1 && byte != *b"\n" {
            step.push(char::from(byte[0]));
        }
        Ok(Some(Held { stream, step }))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // It may have been killed meanwhile.
        let _ = self.stream.write_all(b"g");
    }
}
