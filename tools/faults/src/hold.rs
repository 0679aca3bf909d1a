//! Where a process that has come to its fault's place waits until it may go on.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

/// A socket for one process that is to be held.
#[derive(Debug)]
pub struct Hold {
    listener: UnixListener,
    path: PathBuf,
    /// The process's, from its first step on.
    stream: Option<UnixStream>,
}

/// A process that is held. Dropping it lets it go on.
#[derive(Debug)]
pub struct Held {
    stream: UnixStream,
}

impl Hold {
    /// Waits at `path`.
    ///
    /// # Errors
    /// If the socket can't be made.
    pub fn new(path: PathBuf) -> anyhow::Result<Self> {
        let listener = UnixListener::bind(&path).with_context(|| path.display().to_string())?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, path, stream: None })
    }

    /// Where the process is to connect.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The process, once it is held.
    ///
    /// # Errors
    /// If the socket fails, or the process has ended.
    pub fn held(&mut self) -> anyhow::Result<Option<Held>> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error.into()),
            },
        };
        stream.set_nonblocking(true)?;
        match stream.read(&mut [0; 64]) {
            Ok(0) => bail!("the process has ended"),
            Ok(_) => {
                stream.set_nonblocking(false)?;
                Ok(Some(Held { stream }))
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.stream = Some(stream);
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // It may have been killed meanwhile.
        let _ = self.stream.write_all(b"g");
    }
}
