//! Whether the host can hold a guest's memory.
//!
//! Guest memory is mapped without reserving it, so the kernel would hand it out until a process gets
//! killed. This check refuses first. It can't see what others will take later.

use std::fs;

use super::MemoryError;

/// Checks that the host has `wanted` bytes of memory available now (MemAvailable in /proc/meminfo: free
/// memory and what the kernel can reclaim without swapping). A target calls it before the first page
/// arrives, [`Machine::build`](crate::Machine::build) calls it itself.
///
/// # Errors
/// [`MemoryError::NotEnoughMemory`] with both figures; [`MemoryError::Io`] if /proc can't be read.
pub fn check_available(wanted: u64) -> Result<(), MemoryError> {
    let text = fs::read_to_string("/proc/meminfo").map_err(|source| MemoryError::Io {
        action: "read /proc/meminfo",
        bytes: wanted,
        source,
    })?;
    // A kernel too old for the field gives nothing to judge by.
    match available_bytes(&text) {
        Some(available) if available < wanted => Err(MemoryError::NotEnoughMemory { wanted, available }),
        Some(_) | None => Ok(()),
    }
}

fn available_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernels_figure() {
        let text = "MemTotal:       24000000 kB\nMemFree: 1 kB\nMemAvailable:   22345678 kB\nBuffers: 5 kB\n";
        assert_eq!(available_bytes(text), Some(22_345_678 * 1024));
        assert_eq!(available_bytes("MemTotal: 1 kB\n"), None);
    }
}
