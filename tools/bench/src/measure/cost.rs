//! CPU time by thread and peak memory of a process, as the kernel accounts them.
//!
//! A thread's time comes from its `schedstat` (nanoseconds). The process's comes from its CPU clock, which also has
//! the threads that ended: the difference is shown as `(ended)`.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use nix::time::clock_getcpuclockid;
use nix::unistd::Pid;
use procfs::process::{MMPermissions, MemoryMap, MemoryMaps, Process};

use super::MeasureError;
use crate::results::{ProcessCost, ProcessRole, ThreadCost};

/// The least size of a mapping that can be a guest's memory: above stacks and heaps, below every guest and the part of
/// one that lies above the hole for devices.
const GUEST_MAPPING_BYTES_MIN: u64 = 32 << 20;

/// What a process had used at a moment.
#[derive(Debug, Clone, Default)]
pub struct CostSnapshot {
    cpu: Duration,
    /// By thread id: name, time.
    threads: BTreeMap<i32, (String, Duration)>,
}

/// Makes the kernel forget the peak of the memory of `pid` so far.
pub fn forget_peak(pid: u32) {
    // Where it is not allowed, the peak is that of the process's whole life, which is no less true of its size.
    let _ = fs::write(format!("/proc/{pid}/clear_refs"), "5");
}

/// What `pid` has used until now.
///
/// # Errors
/// [`MeasureError::Process`] if it has ended.
pub fn snapshot(pid: u32) -> Result<CostSnapshot, MeasureError> {
    let failed = |what, source| MeasureError::Process { what, pid, source };
    let id = i32::try_from(pid).map_err(|error| failed("the id", error.into()))?;
    let cpu = clock_getcpuclockid(Pid::from_raw(id))
        .and_then(|clock| clock.now())
        .map_err(|error| failed("the CPU time", error.into()))?;
    let tasks = Process::new(id)
        .and_then(|process| process.tasks())
        .map_err(|error| failed("the threads", error.into()))?;
    // A thread may end while it is being looked at; its time is then among the ended.
    let threads = tasks.flatten().filter_map(|task| {
        let name = task.stat().ok()?.comm;
        let time = Duration::from_nanos(task.schedstat().ok()?.sum_exec_runtime);
        Some((task.tid, (name, time)))
    });
    Ok(CostSnapshot { cpu: Duration::from(cpu), threads: threads.collect() })
}

/// What `pid` used between two snapshots, with the peak of its memory until now.
#[must_use]
pub fn between(
    role: ProcessRole,
    pid: u32,
    before: &CostSnapshot,
    after: &CostSnapshot,
    is_vcpu: impl Fn(&str) -> bool,
) -> ProcessCost {
    let cpu = after.cpu.saturating_sub(before.cpu);
    let mut by_name: BTreeMap<&str, Duration> = BTreeMap::new();
    let mut seen = Duration::ZERO;
    for (id, (name, until)) in &after.threads {
        let from = before.threads.get(id).map_or(Duration::ZERO, |(_, from)| *from);
        let used = until.saturating_sub(from);
        seen += used;
        *by_name.entry(name).or_default() += used;
    }
    let ended = cpu.saturating_sub(seen);
    if !ended.is_zero() {
        by_name.insert("(ended)", ended);
    }
    let vcpus: Duration = by_name.iter().filter(|(name, _)| is_vcpu(name)).map(|(_, used)| *used).sum();
    let mut threads: Vec<ThreadCost> = by_name
        .into_iter()
        .map(|(name, used)| ThreadCost {
            name: name.to_owned(),
            cpu_s: used.as_secs_f64(),
            vcpu: is_vcpu(name),
        })
        .collect();
    threads.sort_by(|a, b| b.cpu_s.total_cmp(&a.cpu_s));
    ProcessCost {
        role,
        cpu_s: cpu.as_secs_f64(),
        cpu_engine_s: cpu.saturating_sub(vcpus).as_secs_f64(),
        threads,
        peak_memory_bytes: peak_memory_bytes(pid).unwrap_or_default(),
        guest_memory_bytes: None,
    }
}

/// A thread's CPU time, cheap to look at often: threads that end take their accounts with them.
#[derive(Debug)]
pub struct ThreadClock {
    /// The thread's id.
    pub id: i32,
    account: File,
}

impl ThreadClock {
    /// The clock of thread `id` of `pid`, if it is still there.
    #[must_use]
    pub fn of(pid: u32, id: i32) -> Option<Self> {
        let account = File::open(format!("/proc/{pid}/task/{id}/schedstat")).ok()?;
        Some(Self { id, account })
    }

    /// What it has used; `None` once it has ended.
    #[must_use]
    pub fn cpu(&self) -> Option<Duration> {
        let mut text = [0; 64];
        let length = self.account.read_at(&mut text, 0).ok()?;
        let words = std::str::from_utf8(&text[..length]).ok()?;
        words.split_ascii_whitespace().next()?.parse().ok().map(Duration::from_nanos)
    }
}

fn peak_memory_bytes(pid: u32) -> Option<u64> {
    let status = Process::new(i32::try_from(pid).ok()?).ok()?.status().ok()?;
    Some(status.vmhwm? * 1024)
}

/// How much guest memory `pid` has in use, bytes: what is there of its large writable mappings. A VMM has no others of
/// that size; before a migration it has no buffers for one either. Reading it walks the page tables of the process, so
/// it is not for the timed step.
#[must_use]
pub fn guest_memory_bytes(pid: u32) -> Option<u64> {
    let maps = Process::new(i32::try_from(pid).ok()?).ok()?.smaps().ok()?;
    Some(large_and_there(&maps))
}

fn large_and_there(maps: &MemoryMaps) -> u64 {
    let is_large = |map: &&MemoryMap| {
        map.address.1 - map.address.0 >= GUEST_MAPPING_BYTES_MIN
            && map.perms.contains(MMPermissions::READ | MMPermissions::WRITE)
    };
    maps.iter().filter(is_large).filter_map(|map| map.extension.map.get("Rss")).sum()
}

impl CostSnapshot {
    /// Adds threads that have ended since `earlier`, with what they had used then.
    pub fn keep_ended(&mut self, earlier: &Self) {
        for (id, thread) in &earlier.threads {
            self.threads.entry(*id).or_insert_with(|| thread.clone());
        }
    }

    /// The ids of the threads that `wanted` names.
    pub fn threads(&self, wanted: impl Fn(&str) -> bool) -> impl Iterator<Item = i32> {
        self.threads.iter().filter(move |(_, (name, _))| wanted(name)).map(|(id, _)| *id)
    }

    /// Notes that thread `id` had used `cpu`.
    pub fn update(&mut self, id: i32, cpu: Duration) {
        if let Some((_, known)) = self.threads.get_mut(&id) {
            *known = cpu.max(*known);
        }
    }
    /// CPU time of all threads, those included that have ended.
    #[must_use]
    pub fn cpu(&self) -> Duration {
        self.cpu
    }
}

#[cfg(test)]
mod tests {
    use procfs::FromRead;

    use super::*;

    #[test]
    fn only_what_is_there_of_large_writable_mappings_is_guest_memory() {
        let mapping = |addresses: &str, permissions: &str, rss_kib: u32| {
            format!("{addresses} {permissions} 00000000 00:00 0 \nSize: 1 kB\nRss: {rss_kib} kB\nPss: 1 kB\n")
        };
        let text = [
            // The guest, in two parts around the hole for devices; only a part of it has been touched.
            mapping("7f0000000000-7f0010000000", "rw-p", 100_000),
            mapping("7f0020000000-7f0024000000", "rw-s", 2000),
            // A heap, a reservation, a file.
            mapping("7f0030000000-7f0031000000", "rw-p", 16_000),
            mapping("7f0040000000-7f0044000000", "---p", 0),
            mapping("7f0050000000-7f0054000000", "r--p", 60_000),
        ];
        let maps = MemoryMaps::from_read(text.concat().as_bytes()).unwrap();
        assert_eq!(large_and_there(&maps), 102_000 << 10);
        // This process has no guest, but can be asked.
        assert!(guest_memory_bytes(std::process::id()).is_some());
    }

    #[test]
    fn work_is_found_under_its_thread_and_after_its_end() {
        let pid = std::process::id();
        let before = snapshot(pid).unwrap();
        let clock = ferry_lab::LabClock::start();
        let spin = move || while clock.now() < Duration::from_millis(50) {};
        std::thread::Builder::new().name("vcpu-spin".into()).spawn(spin).unwrap().join().unwrap();
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let alive = std::thread::Builder::new()
            .name("alive".into())
            .spawn(move || {
                let clock = ferry_lab::LabClock::start();
                while clock.now() < Duration::from_millis(30) {}
                let _ = wait.recv();
            })
            .unwrap();
        std::thread::sleep(Duration::from_millis(200));
        let cost =
            between(ProcessRole::Source, pid, &before, &snapshot(pid).unwrap(), |name| name == "alive");
        drop(go);
        alive.join().unwrap();
        let of = |name: &str| cost.threads.iter().find(|thread| thread.name == name).map_or(0.0, |t| t.cpu_s);
        // A busy machine gives less than 30 ms of CPU for 30 ms of time, but not nothing.
        assert!(of("alive") > 0.0 && of("(ended)") > 0.0, "{cost:?}");
        assert!(cost.cpu_engine_s < cost.cpu_s && cost.peak_memory_bytes > 1 << 20, "{cost:?}");
    }
}
