//! Bytes that crossed an interface, in both directions, headers of all layers included.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use ferry_lab::Namespace;

use super::MeasureError;

/// The most that the kernel writes about the few interfaces of a test host, bytes.
const TABLE_BYTES_MAX: usize = 16 << 10;

/// The counters of one interface of a namespace.
#[derive(Debug)]
pub struct InterfaceCounter {
    /// Opened inside the namespace, it keeps showing that namespace's interfaces wherever it is read.
    table: File,
    interface: String,
}

impl InterfaceCounter {
    /// Watches `interface` of `namespace`.
    ///
    /// # Errors
    /// [`MeasureError::Counters`] if there is no such interface.
    pub fn of(namespace: &Namespace, interface: &str) -> Result<Self, MeasureError> {
        let failed = |source| MeasureError::Counters { interface: interface.to_owned(), source };
        let table = namespace
            .run(|| File::open("/proc/thread-self/net/dev"))
            .map_err(|error| failed(io::Error::other(error)))?
            .map_err(failed)?;
        let counter = Self { table, interface: interface.to_owned() };
        counter.bytes()?;
        Ok(counter)
    }

    /// Bytes received and sent so far. On a loopback interface every byte is both, and is counted once.
    ///
    /// # Errors
    /// [`MeasureError::Counters`] if the interface is gone.
    pub fn bytes(&self) -> Result<u64, MeasureError> {
        let failed = |source| MeasureError::Counters { interface: self.interface.clone(), source };
        let mut text = vec![0; TABLE_BYTES_MAX];
        let length = self.table.read_at(&mut text, 0).map_err(failed)?;
        let text = String::from_utf8_lossy(&text[..length]);
        bytes_of(&text, &self.interface)
            .ok_or_else(|| failed(io::Error::new(io::ErrorKind::NotFound, "it is not among the interfaces")))
    }
}

fn bytes_of(table: &str, interface: &str) -> Option<u64> {
    let line = table.lines().find_map(|line| line.trim_start().strip_prefix(interface)?.strip_prefix(':'))?;
    let numbers: Vec<u64> = line.split_ascii_whitespace().map_while(|word| word.parse().ok()).collect();
    let (received, sent) = (numbers.first()?, numbers.get(8)?);
    Some(if interface == "lo" { *sent } else { received + sent })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_right_columns_of_the_right_line_are_read() {
        let table = "Inter-|   Receive  |  Transmit\n face |bytes    packets ...\n    lo:  10 1 0 0 0 0 0 0  10 1 0 0 0 0 0 0\n\
                     br0: 5 1 0 0 0 0 0 0 6 1 0 0 0 0 0 0\nuplink:1000 1 0 0 0 0 0 0 234 1 0 0 0 0 0 0\n";
        assert_eq!(bytes_of(table, "lo"), Some(10));
        assert_eq!(bytes_of(table, "uplink"), Some(1234));
        assert_eq!(bytes_of(table, "up"), None);
        assert_eq!(bytes_of(table, "eth0"), None);
    }
}
