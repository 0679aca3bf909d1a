//! Where a serial port's output goes: a bounded queue that a thread of its own writes out.
//!
//! ```text
//!  vCPU ──► queue of 64 KiB (what does not fit is lost) ──► thread ──► file, pipe or terminal
//! ```
//!
//! A pipe that nobody reads or a slow disk blocks the thread and never a vCPU, which would keep the
//! machine from pausing. The thread is not joined: it may be stuck for as long as its reader likes.

use std::fs::File;
use std::io::{self, Write};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread;
use std::time::Duration;

/// Output that waits for its reader at most, in bytes.
const QUEUE_BYTES_MAX: usize = 64 << 10;

/// Bytes that are written at once at most.
const CHUNK_BYTES_MAX: usize = 4096;

/// How long the last words of a machine that goes away may take to be written.
const LAST_WORDS_MS: u64 = 200;

/// Takes output without ever blocking; the default takes and forgets it.
#[derive(Debug, Default)]
pub(super) struct Console(Option<Writer>);

#[derive(Debug)]
struct Writer {
    queue: SyncSender<u8>,
    /// Disconnected when the thread has ended.
    ended: Receiver<()>,
}

impl Console {
    /// Starts the thread that writes to `file`.
    pub(super) fn start(file: File) -> io::Result<Self> {
        let (queue, bytes) = mpsc::sync_channel(QUEUE_BYTES_MAX);
        let (alive, ended) = mpsc::channel();
        thread::Builder::new().name("console".into()).spawn(move || {
            write_out(&bytes, file);
            drop(alive);
        })?;
        Ok(Self(Some(Writer { queue, ended })))
    }
}

/// Writes what comes until nothing more can come.
fn write_out(bytes: &Receiver<u8>, mut file: File) {
    let mut chunk = Vec::with_capacity(CHUNK_BYTES_MAX);
    while let Ok(first) = bytes.recv() {
        chunk.clear();
        chunk.push(first);
        chunk.extend(bytes.try_iter().take(CHUNK_BYTES_MAX - 1));
        // Output that nobody takes (a full disk, a closed pipe) is lost, and the next is tried.
        if let Err(error) = file.write_all(&chunk) {
            tracing::debug!(%error, "serial output was lost");
        }
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(Writer { queue, ended: _ }) = &self.0 {
            for byte in bytes {
                // Full: the guest says more than anybody reads, and must not wait for it.
                let _ = queue.try_send(*byte);
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        if let Some(Writer { queue, ended }) = self.0.take() {
            drop(queue);
            // Whether it ended or is stuck, there is nothing more to do here.
            let _ = ended.recv_timeout(Duration::from_millis(LAST_WORDS_MS));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::os::unix::fs::OpenOptionsExt;

    use super::*;

    #[test]
    fn a_pipe_that_nobody_reads_blocks_nobody_and_gets_the_first_bytes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pipe");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let mut options = OpenOptions::new();
        let reader = options.read(true).write(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        let (done, returned) = mpsc::channel();
        thread::spawn(move || {
            let mut console = Console::start(File::options().append(true).open(&path).unwrap()).unwrap();
            // More than the pipe and the queue take together.
            for _ in 0..4 * QUEUE_BYTES_MAX {
                console.write_all(b"x").unwrap();
            }
            drop(console);
            done.send(()).unwrap();
        });
        returned.recv_timeout(Duration::from_secs(20)).expect("writing and dropping return");
        let mut first = [0; 4096];
        io::Read::read_exact(&mut &reader, &mut first).unwrap();
        assert!(first.iter().all(|byte| *byte == b'x'));
    }
}
