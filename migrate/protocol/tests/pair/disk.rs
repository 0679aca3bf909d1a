//! A host's disk with its one record: what becomes of each write, and how long it takes.

use std::collections::VecDeque;
use std::time::Duration;

use ferry_protocol::record::Record;

/// How long a write takes, unless [`Disk::slow`] says otherwise.
const RECORD_WORK: Duration = Duration::from_millis(1);

/// One host's disk.
#[derive(Debug, Default)]
pub(crate) struct Disk {
    pub(crate) record: Option<Record>,
    /// What becomes of the coming writes; without an entry they succeed.
    pub(crate) faults: VecDeque<DiskFault>,
    /// What becomes of the coming rehearsals.
    pub(crate) rehearsal_faults: VecDeque<DiskFault>,
    /// How long the coming writes take, one after another; without an entry [`RECORD_WORK`].
    pub(crate) slow: VecDeque<Duration>,
    /// How many times the record was rehearsed.
    pub(crate) rehearsals: usize,
}

/// What becomes of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DiskFault {
    None,
    /// It fails and nothing is on the disk.
    Lost,
    /// It is reported as failed but is on the disk all the same.
    Landed,
}

impl Disk {
    /// `Ok` if the write is reported as durable.
    pub(crate) fn write(&mut self, record: Record) -> Result<(), String> {
        let fault = self.faults.pop_front().unwrap_or(DiskFault::None);
        self.write_with(record, fault)
    }

    pub(crate) fn rehearse(&mut self, record: Record) -> Result<(), String> {
        self.rehearsals += 1;
        let fault = self.rehearsal_faults.pop_front().unwrap_or(DiskFault::None);
        self.write_with(record, fault)
    }

    fn write_with(&mut self, record: Record, fault: DiskFault) -> Result<(), String> {
        let bytes = record.encode();
        let record = Record::decode(&bytes).expect("a record reads back");
        match fault {
            DiskFault::None => {
                self.record = Some(record);
                Ok(())
            }
            DiskFault::Lost => Err("no space left".to_owned()),
            DiskFault::Landed => {
                self.record = Some(record);
                Err("the folder could not be synced".to_owned())
            }
        }
    }

    pub(crate) fn next_took(&mut self) -> Duration {
        self.slow.pop_front().unwrap_or(RECORD_WORK)
    }

    pub(crate) fn standing(&self) -> Option<(&'static str, u64)> {
        self.record.as_ref().map(|record| (record.standing.word(), record.epoch.number()))
    }
}
