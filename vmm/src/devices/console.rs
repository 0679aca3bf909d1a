//! Where a serial port's output goes: to each reader through a bounded queue, which a thread of its own writes out.
//!
//! ```text
//!  vCPU ──┬► queue of 64 KiB (what does not fit is lost) ──► thread ──► file, pipe or terminal
//!         ├► the same for each console that is attached
//!         └► the last 8 KiB, which a new console gets first
//! ```
//!
//! A pipe that nobody reads or a slow disk blocks its thread and never a vCPU, which would keep the
//! machine from pausing. The threads are not joined: one may be stuck for as long as its reader likes.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread;
use std::time::Duration;

use crate::confine::{self, Role};

/// Output that waits for its reader at most, in bytes.
const QUEUE_BYTES_MAX: usize = 64 << 10;

/// Bytes that are written at once at most.
const CHUNK_BYTES_MAX: usize = 4096;

/// Output that is kept for a console that comes later, in bytes: a screen or two.
const RECENT_BYTES_MAX: usize = 8 << 10;

/// How long the last words of a machine that goes away may take to be written.
const LAST_WORDS_MS: u64 = 200;

/// Takes output without ever blocking; the default takes it for those who come later.
#[derive(Debug, Default)]
pub(super) struct Console {
    writers: Vec<(ReaderId, Writer)>,
    recent: VecDeque<u8>,
}

/// Tells the readers of a console apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ReaderId(pub(super) u64);

#[derive(Debug)]
pub(super) struct Writer {
    queue: SyncSender<u8>,
    /// Disconnected when the thread has ended.
    ended: Receiver<()>,
}

impl Console {
    /// Starts a thread that writes to `file` what was said last and all that comes.
    pub(super) fn add(&mut self, id: ReaderId, file: File) -> io::Result<()> {
        let (queue, bytes) = mpsc::sync_channel(QUEUE_BYTES_MAX);
        let (alive, ended) = mpsc::channel();
        thread::Builder::new().name("console".into()).spawn(move || {
            confine::enter(Role::Device);
            write_out(&bytes, file);
            drop(alive);
        })?;
        for byte in &self.recent {
            // It has room for far more.
            let _ = queue.try_send(*byte);
        }
        self.writers.push((id, Writer { queue, ended }));
        Ok(())
    }

    /// Takes out a reader. Dropping what is returned may wait for its last words.
    pub(super) fn remove(&mut self, id: ReaderId) -> Option<Writer> {
        let index = self.writers.iter().position(|(other, _)| *other == id)?;
        Some(self.writers.swap_remove(index).1)
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
        for byte in bytes {
            if self.recent.len() == RECENT_BYTES_MAX {
                self.recent.pop_front();
            }
            self.recent.push_back(*byte);
            for (_, Writer { queue, ended: _ }) in &self.writers {
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

impl Drop for Writer {
    fn drop(&mut self) {
        // The queue must close before the wait, or the thread would never end.
        let (closed, _) = mpsc::sync_channel(0);
        drop(std::mem::replace(&mut self.queue, closed));
        // Whether it ended or is stuck, there is nothing more to do here.
        let _ = self.ended.recv_timeout(Duration::from_millis(LAST_WORDS_MS));
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
            let mut console = Console::default();
            console.add(ReaderId(0), File::options().append(true).open(&path).unwrap()).unwrap();
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

    #[test]
    fn whoever_comes_later_gets_what_was_said_last_and_the_others_go_on() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let mut console = Console::default();
        console.add(ReaderId(1), File::create(path("first")).unwrap()).unwrap();
        let early = vec![b'a'; 2 * RECENT_BYTES_MAX];
        console.write_all(&early).unwrap();
        console.add(ReaderId(2), File::create(path("second")).unwrap()).unwrap();
        console.write_all(b"b").unwrap();
        drop(console.remove(ReaderId(2)));
        assert!(console.remove(ReaderId(2)).is_none());
        console.write_all(b"c").unwrap();
        drop(console);
        assert_eq!(std::fs::read(path("first")).unwrap(), [&early[..], b"bc"].concat());
        let second = std::fs::read(path("second")).unwrap();
        assert_eq!(second, [&early[..RECENT_BYTES_MAX], b"b"].concat());
    }
}
