//! Durable records as files: written to a temporary file, fsynced, renamed over the old one, and the folder
//! fsynced. A crash at any point leaves the old record or the new one, never a mixture.
//!
//! A record is only as durable as the file system it is on. On tmpfs (the default /run/ferry) it survives every
//! crash of ferry, but not one of the host; then the guest that it speaks of is gone as well.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use ferry_protocol::Record;
use ferry_protocol::record::RecordError;

use crate::ports::{PortError, RecordStore};

/// Why a record could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum RecordFileError {
    /// A file operation failed.
    #[error("can't {action} the record {path}")]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// The file is no whole record.
    #[error("the record {path} can't be trusted, so who owns its VM is in doubt")]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: RecordError,
    },
}

/// One VM's record in one file.
#[derive(Debug, Clone)]
pub struct FileRecords {
    path: PathBuf,
}

impl FileRecords {
    /// The record in `path`, whose folder must exist.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RecordFileError {
        let path = path.to_owned();
        move |source| RecordFileError::Io { action, path, source }
    }

    fn write(&self, bytes: &[u8]) -> Result<(), RecordFileError> {
        let temporary = self.path.with_extension("record-new");
        let mut file = File::create(&temporary).map_err(Self::io_error("create", &temporary))?;
        file.write_all(bytes).map_err(Self::io_error("write", &temporary))?;
        file.sync_all().map_err(Self::io_error("sync", &temporary))?;
        fs::rename(&temporary, &self.path).map_err(Self::io_error("replace", &self.path))?;
        let folder = self.path.parent().unwrap_or(Path::new("."));
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(Self::io_error("sync the folder of", &self.path))
    }

    fn read(&self) -> Result<Option<Record>, RecordFileError> {
        let bytes = match fs::read(&self.path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Self::io_error("read", &self.path)(error)),
        };
        let damaged = |source| RecordFileError::Damaged { path: self.path.clone(), source };
        Record::decode(&bytes).map(Some).map_err(damaged)
    }
}

impl RecordStore for FileRecords {
    fn load(&self) -> Result<Option<Record>, PortError> {
        Ok(self.read()?)
    }

    fn store(&self, record: &Record) -> Result<(), PortError> {
        Ok(self.write(&record.encode())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_protocol::record::Standing;
    use ferry_protocol::{Epoch, VmId};

    fn record(epoch: u64) -> Record {
        let name = "web".parse().unwrap();
        Record { vm: VmId([1; 16]), name, epoch: Epoch::new(epoch), standing: Standing::Running }
    }

    #[test]
    fn the_newest_record_is_the_one_that_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let records = FileRecords::new(folder.path().join("web.record"));
        assert_eq!(records.load().unwrap(), None);
        records.store(&record(1)).unwrap();
        records.store(&record(2)).unwrap();
        assert_eq!(records.load().unwrap(), Some(record(2)));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn a_damaged_record_is_in_doubt_not_absent() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web.record");
        let mut bytes = record(1).encode();
        bytes.truncate(bytes.len() - 1);
        fs::write(&path, bytes).unwrap();
        let error = FileRecords::new(path).load().unwrap_err();
        assert!(error.to_string().contains("in doubt"), "{error}");
    }

    #[test]
    fn a_missing_folder_is_named() {
        let records = FileRecords::new("/nonexistent/ferry/web.record".into());
        let error = records.store(&record(1)).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/ferry/web.record-new"), "{error}");
    }
}
