//! Bare TCP between two processes: one writes from a warm buffer, the other reads and discards.
//!
//! A thread a connection and side, blocking calls, nothing set on the sockets but `TCP_NODELAY`. The source is done once
//! the target has said on every connection how much it read, so that no byte still lies in a buffer.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::ExitCode;

use anyhow::{Context, anyhow};

use super::{parse, say};
use crate::engine::tcp::words::{Said, SendOrder, SourceOrder, TargetOrder};

/// Bytes of a write, and of the buffer that is read into.
const CHUNK_BYTES: usize = 1 << 20;

/// A buffer whose pages are there. No byte is zero, in case anything on the way cares.
fn warm_buffer() -> Vec<u8> {
    vec![0xA5; CHUNK_BYTES]
}

/// Runs a source: waits for its order on standard input, sends, and stays until it is killed.
///
/// # Errors
/// If the order is none.
pub fn source(order: &str) -> anyhow::Result<ExitCode> {
    let SourceOrder { bytes, streams } = parse(order)?;
    let mut buffers: Vec<Vec<u8>> = (0..streams).map(|_| warm_buffer()).collect();
    say(&Said::Ready)?;
    let mut line = String::new();
    if std::io::stdin().read_line(&mut line)? == 0 {
        return Ok(ExitCode::SUCCESS);
    }
    let SendOrder { target } = parse(&line)?;
    let sent = send_all(target, bytes, &mut buffers);
    say(&match sent {
        Ok(bytes) => Said::Sent { bytes },
        Err(error) => Said::Failed { reason: format!("{error:#}") },
    })?;
    std::io::stdin().read_line(&mut line)?;
    Ok(ExitCode::SUCCESS)
}

/// Sends `bytes` over as many connections as there are buffers; how many the target has read.
fn send_all(target: SocketAddr, bytes: u64, buffers: &mut [Vec<u8>]) -> anyhow::Result<u64> {
    let streams = u64::try_from(buffers.len()).context("the streams can't be counted")?;
    std::thread::scope(|scope| {
        let sending: Vec<_> = (0..)
            .zip(buffers)
            .map(|(index, buffer)| {
                let share = bytes / streams + u64::from(index < bytes % streams);
                scope.spawn(move || send(target, share, buffer))
            })
            .collect();
        sending
            .into_iter()
            .map(|thread| thread.join().map_err(|_| anyhow!("a sending thread broke off"))?)
            .sum::<anyhow::Result<u64>>()
    })
}

fn send(target: SocketAddr, bytes: u64, buffer: &[u8]) -> anyhow::Result<u64> {
    let mut stream = TcpStream::connect(target).with_context(|| format!("can't connect to {target}"))?;
    stream.set_nodelay(true)?;
    let mut left = bytes;
    while left > 0 {
        let next = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        stream.write_all(&buffer[..next]).with_context(|| format!("can't send to {target}"))?;
        left -= u64::try_from(next)?;
    }
    stream.shutdown(Shutdown::Write)?;
    let mut read = [0; 8];
    stream.read_exact(&mut read).context("the target does not say what it has read")?;
    Ok(u64::from_le_bytes(read))
}

/// Runs a target: takes its connections, reads them to their ends, and stays until it is killed.
///
/// # Errors
/// If it can't listen or read, or the order is none.
pub fn target(order: &str) -> anyhow::Result<ExitCode> {
    let TargetOrder { listen, streams } = parse(order)?;
    let listener =
        TcpListener::bind(SocketAddr::new(listen, 0)).with_context(|| format!("can't listen at {listen}"))?;
    let mut buffers: Vec<Vec<u8>> = (0..streams).map(|_| warm_buffer()).collect();
    say(&Said::Listening { address: listener.local_addr()? })?;
    std::thread::scope(|scope| {
        let mut reading = Vec::new();
        for buffer in &mut buffers {
            let (stream, _) = listener.accept().context("can't take a connection")?;
            reading.push(scope.spawn(move || discard(stream, buffer)));
        }
        for thread in reading {
            thread.join().map_err(|_| anyhow!("a reading thread broke off"))??;
        }
        anyhow::Ok(())
    })?;
    std::io::stdin().read_line(&mut String::new())?;
    Ok(ExitCode::SUCCESS)
}

/// Reads until the source has no more, and tells it how much that was.
fn discard(mut stream: TcpStream, buffer: &mut [u8]) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    let mut total = 0_u64;
    loop {
        let read = stream.read(buffer).context("can't read")?;
        if read == 0 {
            break;
        }
        total += u64::try_from(read)?;
    }
    stream.write_all(&total.to_le_bytes()).context("can't tell the source what was read")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A target that reads everything but says that it read one byte less.
    fn lying_target(listener: &TcpListener) {
        let (mut stream, _) = listener.accept().unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        stream.write_all(&(all.len() as u64 - 1).to_le_bytes()).unwrap();
    }

    #[test]
    fn every_byte_is_sent_once_over_all_connections() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let target = std::thread::spawn(move || {
            let readers: Vec<_> = (0..3)
                .map(|_| {
                    let (stream, _) = listener.accept().unwrap();
                    std::thread::spawn(move || discard(stream, &mut warm_buffer()).unwrap())
                })
                .collect();
            readers.into_iter().for_each(|reader| reader.join().unwrap());
            listener
        });
        // No multiple of the streams, nor of a write.
        let bytes = (5 << 20) + 3;
        assert_ne!(bytes % 3, 0);
        let mut buffers: Vec<Vec<u8>> = (0..3).map(|_| warm_buffer()).collect();
        assert_eq!(send_all(address, bytes, &mut buffers).unwrap(), bytes);
        let listener = target.join().unwrap();
        let liar = std::thread::spawn(move || lying_target(&listener));
        assert_eq!(send_all(address, 10, &mut [warm_buffer()]).unwrap(), 9, "the target's word counts");
        liar.join().unwrap();
    }

    #[test]
    fn nobody_listening_is_a_failure_in_words() {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let error = send_all(address, 1, &mut [warm_buffer()]).unwrap_err();
        assert!(format!("{error:#}").contains(&address.to_string()), "{error:#}");
    }
}
