//! The workload guest's report, read out of the memory of whatever process runs it.
//!
//! A VMM maps guest memory into its own, so `/proc/PID/mem` shows it to whoever may trace the process. All VMMs put
//! guest-physical address 0 at the start of a mapping; the report page lies at a fixed distance from there. The kernel
//! shows mappings that touch as one, and memory above the hole for devices may lie right below the rest. Reading
//! does not stop the guest. A page that the process has not touched yet is brought in by reading it, so a target is
//! only looked at once its guest may run.

use std::fs::File;
use std::os::unix::fs::FileExt;

use ferry_guest_abi::{PAGE_SIZE, REPORT_GPA, Report};
use procfs::process::{MMPermissions, MMapPath, Process};

use super::MeasureError;

/// Where the hole for devices begins in all VMMs: there is never more memory than this below it.
const LOW_MEMORY_BYTES_MAX: u64 = 3 << 30;

/// Where guest-physical address 0 may lie in a mapping: at its start, or above the part of guest memory that the guest
/// has above the hole.
fn starts((from, to): (u64, u64)) -> impl Iterator<Item = u64> {
    let above = to.checked_sub(LOW_MEMORY_BYTES_MAX).filter(|start| *start > from);
    std::iter::once(from).chain(above)
}

/// A process whose guest's report is known to be at an address.
#[derive(Debug)]
pub struct GuestWindow {
    memory: File,
    address: u64,
}

impl GuestWindow {
    /// Finds the report of the guest with `memory_mib` of memory in process `pid`.
    ///
    /// # Errors
    /// [`MeasureError::NoReport`] before the guest has started, and if it is not the workload guest.
    pub fn find(pid: u32, memory_mib: u32) -> Result<Self, MeasureError> {
        let process_error = |what, source| MeasureError::Process { what, pid, source };
        let id = i32::try_from(pid).map_err(|error| process_error("the id", error.into()))?;
        let maps = Process::new(id)
            .and_then(|process| process.maps())
            .map_err(|error| process_error("the mappings", error.into()))?;
        let memory = File::open(format!("/proc/{pid}/mem"))
            .map_err(|error| process_error("the memory", error.into()))?;
        // Below a hole for devices, a mapping may be only a part of guest memory, but never less than this.
        let least = REPORT_GPA + PAGE_SIZE as u64;
        let most = u64::from(memory_mib) << 20;
        let holds_guest = |map: &&procfs::process::MemoryMap| {
            let size = map.address.1 - map.address.0;
            let special = matches!(
                map.pathname,
                MMapPath::Stack | MMapPath::Vdso | MMapPath::Vvar | MMapPath::Vsyscall
            );
            let writable = map.perms.contains(MMPermissions::READ | MMPermissions::WRITE);
            size >= least && size <= most.saturating_mul(2) && writable && !special
        };
        for start in maps.iter().filter(holds_guest).flat_map(|map| starts(map.address)) {
            let window = Self {
                memory: memory.try_clone().map_err(|error| process_error("the memory", error.into()))?,
                address: start + REPORT_GPA,
            };
            if window.report().is_some() {
                return Ok(window);
            }
        }
        Err(MeasureError::NoReport { pid })
    }

    /// What the guest reports now; `None` if there is no report, or the process has ended.
    #[must_use]
    pub fn report(&self) -> Option<Report> {
        let mut page = [0; PAGE_SIZE];
        self.memory.read_exact_at(&mut page, self.address).ok()?;
        Report::parse(&page).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_may_begin_above_what_it_has_above_the_hole() {
        let of = |range| starts(range).collect::<Vec<_>>();
        assert_eq!(of((1 << 40, (1 << 40) + (1 << 30))), [1 << 40]);
        assert_eq!(of((1 << 40, (1 << 40) + (3 << 30))), [1 << 40]);
        assert_eq!(of((1 << 40, (1 << 40) + (8 << 30))), [1 << 40, (1 << 40) + (5 << 30)]);
    }
}
