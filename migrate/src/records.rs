//! Durable records as files, one for each name and VM: written to a temporary file, fsynced, renamed over the old one, and the folder
//! fsynced. A crash at any point leaves the old record or the new one, never a mixture.
//!
//! A record is only as durable as the file system it is on. On tmpfs (the default /run/ferry) it survives every
//! crash of ferry, but not one of the host; then the guest that it speaks of is gone as well.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use ferry_protocol::record::RecordError;
use ferry_protocol::{Record, VmId, VmName};

use crate::fault::{self, RecordOf, RecordStep, Step};
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

/// The records of all VMs that had to do with one local name: `NAME.VM.record` each. A VM that comes under a name thus
/// never erases what this host still owes to another.
#[derive(Debug, Clone)]
pub struct FileRecords {
    folder: PathBuf,
    name: VmName,
}

const EXTENSION: &str = "record";

/// Of the temporary file that becomes the record.
const EXTENSION_NEW: &str = "record-new";

impl FileRecords {
    /// The records of `name` in `folder`, which must exist.
    #[must_use]
    pub fn new(folder: PathBuf, name: VmName) -> Self {
        Self { folder, name }
    }

    /// Every record of the name.
    ///
    /// # Errors
    /// If one of them can't be read: its VM is in doubt.
    pub fn all(&self) -> Result<Vec<Record>, RecordFileError> {
        self.each()?.into_iter().collect()
    }

    /// Every record of the name, each with why it can't be read if that is so.
    ///
    /// # Errors
    /// If the folder can't be read.
    pub fn each(&self) -> Result<Vec<Result<Record, RecordFileError>>, RecordFileError> {
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Self::io_error("look for", &self.folder)(error)),
        };
        let mut records = Vec::new();
        for entry in entries {
            let path = entry.map_err(Self::io_error("look for", &self.folder))?.path();
            if self.is_ours(&path) {
                records.extend(Self::read(&path).transpose());
            }
        }
        Ok(records)
    }

    /// Moves a damaged record out of the way, so that nothing is in doubt by it any more, and keeps it for whoever wants to
    /// know what it was. Gives its new place.
    ///
    /// # Errors
    /// If it can't be renamed.
    pub fn set_aside(&self, path: &Path) -> Result<PathBuf, RecordFileError> {
        let aside = path.with_extension("record-damaged");
        fs::rename(path, &aside).map_err(Self::io_error("set aside", path))?;
        let folder = File::open(&self.folder).and_then(|folder| folder.sync_all());
        folder.map_err(Self::io_error("sync the folder of", path))?;
        Ok(aside)
    }

    /// Removes what a process that was killed while it wrote a record of the name has left: never the record itself, and
    /// nothing that anybody reads. Only for whoever alone may write records of the name.
    pub fn remove_unfinished(&self) {
        for entry in fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|extension| extension == EXTENSION_NEW)
                && self.is_ours(&path.with_extension(EXTENSION))
            {
                // It is as harmless as it is useless.
                let _ = fs::remove_file(path);
            }
        }
    }

    fn path(&self, vm: VmId) -> PathBuf {
        self.folder.join(format!("{}.{vm}.{EXTENSION}", self.name))
    }

    fn is_ours(&self, path: &Path) -> bool {
        let stem = path.file_name().and_then(|name| name.to_str()?.strip_suffix(&format!(".{EXTENSION}")));
        let vm = stem.and_then(|stem| stem.strip_prefix(self.name.as_str())?.strip_prefix('.'));
        vm.is_some_and(|vm| VmId::from_hex(vm).is_some())
    }

    fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RecordFileError {
        let path = path.to_owned();
        move |source| RecordFileError::Io { action, path, source }
    }

    fn write(&self, path: &Path, record: &Record) -> Result<(), RecordFileError> {
        let at = |step| fault::try_point(Step::Record(RecordOf::from(&record.standing), step));
        let temporary = path.with_extension(EXTENSION_NEW);
        at(RecordStep::Begins).map_err(Self::io_error("create", &temporary))?;
        let mut file = File::create(&temporary).map_err(Self::io_error("create", &temporary))?;
        at(RecordStep::Created)
            .and_then(|()| file.write_all(&record.encode()))
            .map_err(Self::io_error("write", &temporary))?;
        at(RecordStep::Written).and_then(|()| file.sync_all()).map_err(Self::io_error("sync", &temporary))?;
        at(RecordStep::Synced)
            .and_then(|()| fs::rename(&temporary, path))
            .map_err(Self::io_error("replace", path))?;
        at(RecordStep::Renamed)
            .and_then(|()| File::open(&self.folder))
            .and_then(|folder| folder.sync_all())
            .and_then(|()| at(RecordStep::Durable))
            .map_err(Self::io_error("sync the folder of", path))
    }

    fn read(path: &Path) -> Result<Option<Record>, RecordFileError> {
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Self::io_error("read", path)(error)),
        };
        let damaged = |source| RecordFileError::Damaged { path: path.to_owned(), source };
        Record::decode(&bytes).map(Some).map_err(damaged)
    }
}

impl RecordStore for FileRecords {
    fn load(&self, vm: VmId) -> Result<Option<Record>, PortError> {
        Ok(Self::read(&self.path(vm))?)
    }

    fn store(&self, record: &Record) -> Result<(), PortError> {
        Ok(self.write(&self.path(record.vm), record)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_protocol::Epoch;
    use ferry_protocol::record::Standing;

    fn record(epoch: u64) -> Record {
        let name = "web".parse().unwrap();
        Record::of_own(VmId([1; 16]), name, Epoch::new(epoch), Standing::Running)
    }

    fn records(folder: &Path) -> FileRecords {
        FileRecords::new(folder.to_owned(), "web".parse().unwrap())
    }

    #[test]
    fn the_newest_record_is_the_one_that_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let records = records(folder.path());
        assert_eq!(records.load(VmId([1; 16])).unwrap(), None);
        records.store(&record(1)).unwrap();
        records.store(&record(2)).unwrap();
        assert_eq!(records.load(VmId([1; 16])).unwrap(), Some(record(2)));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn another_vm_of_the_name_erases_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let records = records(folder.path());
        records.store(&record(1)).unwrap();
        records.store(&Record { vm: VmId([2; 16]), ..record(9) }).unwrap();
        assert_eq!(records.load(VmId([1; 16])).unwrap(), Some(record(1)));
        // Other names' records are not this one's, even where one name begins with the other.
        let other = FileRecords::new(folder.path().to_owned(), "we".parse().unwrap());
        other.store(&record(5)).unwrap();
        assert_eq!(records.all().unwrap().len(), 2);
        assert_eq!(other.all().unwrap(), [record(5)]);
    }

    #[test]
    fn what_a_killed_writer_has_left_is_removed_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let records = records(folder.path());
        records.store(&record(1)).unwrap();
        let unfinished = records.path(VmId([3; 16])).with_extension(EXTENSION_NEW);
        let of_another = FileRecords::new(folder.path().to_owned(), "we".parse().unwrap());
        let of_another = of_another.path(VmId([3; 16])).with_extension(EXTENSION_NEW);
        fs::write(&unfinished, "half").unwrap();
        fs::write(&of_another, "half").unwrap();
        records.remove_unfinished();
        assert!(!unfinished.exists() && of_another.exists());
        assert_eq!(records.all().unwrap(), [record(1)]);
    }

    #[test]
    fn a_damaged_record_is_in_doubt_not_absent() {
        let folder = tempfile::tempdir().unwrap();
        let records = records(folder.path());
        records.store(&record(1)).unwrap();
        let mut bytes = record(1).encode();
        bytes.truncate(bytes.len() - 1);
        fs::write(records.path(VmId([1; 16])), bytes).unwrap();
        let error = records.load(VmId([1; 16])).unwrap_err();
        assert!(error.to_string().contains("in doubt"), "{error}");
        assert!(records.all().is_err());
    }

    #[test]
    fn a_missing_folder_is_named() {
        let records = records(Path::new("/nonexistent/ferry"));
        let error = records.store(&record(1)).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/ferry/web."), "{error}");
        assert!(records.all().unwrap().is_empty());
    }
}
