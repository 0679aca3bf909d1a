//! The durable record that each host keeps of each VM it has had to do with.
//!
//! ```text
//!  0        4         6      8        12        16
//!  +--------+---------+------+--------+---------+------------------+
//!  | "FRRC" | version | zero | length | crc32c  | body (length)    |
//!  +--------+---------+------+--------+---------+------------------+
//!    bytes    u16 LE    u16    u32 LE   u32 LE    postcard
//! ```
//!
//! The checksum covers the first 12 bytes and the body. A record that is torn or damaged reads as an error,
//! which a host treats as *in doubt*: it is never permission to run. Writing it durably (temporary file,
//! fsync, rename, fsync of the folder) is the engine's work.

use serde::{Deserialize, Serialize};

use crate::ident::{Epoch, MigrationId, VmId, VmName};

/// What every record begins with.
pub const RECORD_MAGIC: [u8; 4] = *b"FRRC";

/// The record format that this crate writes.
pub const RECORD_VERSION: u16 = 1;

const HEADER_BYTES: usize = 16;

/// The longest record body; a real one has under 200 bytes.
const BODY_BYTES_MAX: usize = 4096;

/// What this host last knew of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Which VM.
    pub vm: VmId,
    /// Its name.
    pub name: VmName,
    /// The epoch that the standing speaks of.
    pub epoch: Epoch,
    /// Where this host stands in that epoch.
    pub standing: Standing,
    /// The attempt that the standing speaks of: the one that is received or was discarded here, or to which this
    /// host gave the epoch. `None` while this host owns the VM.
    pub migration: Option<MigrationId>,
    /// The migration by which this host came to own the VM; `None` for one that was started here or is not owned yet.
    /// It stays when the VM is given away, so that the source of that migration can still be told that it ran here.
    pub arrived_by: Option<MigrationId>,
}

/// Where a host stands towards a VM in one epoch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Standing {
    /// This host owns the VM in this epoch and may run it.
    Running,
    /// This host, the source, has given this epoch to `target` and never runs it by itself.
    Committed {
        /// The target's address as the operator gave it.
        target: String,
    },
    /// The target runs this epoch; this host has let go.
    Released {
        /// The target's address as the operator gave it.
        target: String,
    },
    /// This host, the target, is being prepared for this epoch and has not run it.
    Receiving {
        /// The source's address.
        source: String,
    },
    /// This host, the target, has not run this epoch and never shall.
    Discarded,
    /// The VM was running here in this epoch and was ended on purpose.
    Stopped,
}

impl Standing {
    /// The standing in a word, for people.
    #[must_use]
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Committed { .. } => "committed",
            Self::Released { .. } => "released",
            Self::Receiving { .. } => "receiving",
            Self::Discarded => "discarded",
            Self::Stopped => "stopped",
        }
    }
}

/// Why bytes are no record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Too short, too long, or of another kind.
    #[error("it is not a record of ferry, or it is torn ({0} bytes)")]
    Torn(usize),
    /// Written by another version.
    #[error("it has format version {0}, this ferry reads {RECORD_VERSION}")]
    Version(u16),
    /// The checksum is wrong.
    #[error("its checksum is wrong")]
    Checksum,
    /// The body can't be read.
    #[error("its body can't be read: {0}")]
    Body(String),
}

impl Record {
    /// The record of a VM that was not brought here by a migration, and that no migration is taking away.
    #[must_use]
    pub const fn of_own(vm: VmId, name: VmName, epoch: Epoch, standing: Standing) -> Self {
        Self { vm, name, epoch, standing, migration: None, arrived_by: None }
    }

    /// Whether this host was ready to run `epoch` by `migration` and gave it up, or has lost what it received of it:
    /// it has not run it and can't any more. A record of another attempt never says so.
    #[must_use]
    pub fn never_ran(&self, migration: MigrationId, epoch: Epoch) -> bool {
        let given_up = match self.standing {
            Standing::Receiving { .. } | Standing::Discarded => true,
            Standing::Running
            | Standing::Stopped
            | Standing::Committed { .. }
            | Standing::Released { .. } => false,
        };
        given_up && self.epoch == epoch && self.migration == Some(migration)
    }

    /// Whether `migration` brought the VM here as `epoch`, whatever has become of it since.
    #[must_use]
    pub fn ran(&self, migration: MigrationId, epoch: Epoch) -> bool {
        self.arrived_by == Some(migration) && self.epoch >= epoch
    }

    /// The record as a file has it.
    ///
    /// # Panics
    /// Never for names and addresses of sane length: the body is bounded.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let body = postcard::to_stdvec(self).expect("our own type has a postcard form");
        assert!(body.len() <= BODY_BYTES_MAX, "a record of {} bytes", body.len());
        let mut bytes = RECORD_MAGIC.to_vec();
        bytes.extend(RECORD_VERSION.to_le_bytes());
        bytes.extend([0, 0]);
        bytes.extend(u32::try_from(body.len()).expect("bounded above").to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes), &body);
        bytes.extend(crc.to_le_bytes());
        bytes.extend(body);
        bytes
    }

    /// Reads a record; the bytes must be exactly one.
    ///
    /// # Errors
    /// [`RecordError`]: the record is in doubt.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let torn = RecordError::Torn(bytes.len());
        let Some((header, body)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
            return Err(torn);
        };
        let length = u32::from_le_bytes([header[8], header[9], header[10], header[11]]);
        if header[..4] != RECORD_MAGIC || usize::try_from(length) != Ok(body.len()) {
            return Err(torn);
        }
        let crc = crc32c::crc32c_append(crc32c::crc32c(&header[..12]), body);
        if crc.to_le_bytes() != header[12..16] {
            return Err(RecordError::Checksum);
        }
        let version = u16::from_le_bytes([header[4], header[5]]);
        if version != RECORD_VERSION {
            return Err(RecordError::Version(version));
        }
        match postcard::take_from_bytes(body) {
            Ok((record, [])) => Ok(record),
            Ok((_, rest)) => Err(RecordError::Body(format!("{} bytes too many", rest.len()))),
            Err(error) => Err(RecordError::Body(error.to_string())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record {
            vm: VmId([7; 16]),
            name: "web".parse().unwrap(),
            epoch: Epoch::new(3),
            standing: Standing::Committed { target: "10.0.0.2:4444".into() },
            migration: Some(MigrationId([8; 16])),
            arrived_by: None,
        }
    }

    #[test]
    fn a_record_answers_only_for_its_own_migration_and_epoch() {
        let (own, other) = (MigrationId([8; 16]), MigrationId([9; 16]));
        let received = Record { standing: Standing::Receiving { source: "a".into() }, ..record() };
        let discarded = Record { standing: Standing::Discarded, ..record() };
        for record in [received, discarded] {
            let answers = [(own, 3), (own, 2), (own, 4), (other, 3)]
                .map(|(migration, epoch)| record.never_ran(migration, Epoch::new(epoch)));
            assert_eq!(answers, [true, false, false, false]);
            assert!(!record.ran(own, Epoch::new(3)));
        }
        for standing in [record().standing, Standing::Running, Standing::Stopped] {
            let arrived = Record { standing, arrived_by: Some(other), ..record() };
            let answers = [(other, 3), (other, 2), (other, 4), (own, 3)]
                .map(|(migration, epoch)| arrived.ran(migration, Epoch::new(epoch)));
            assert_eq!(answers, [true, true, false, false]);
            assert!(!arrived.never_ran(own, Epoch::new(3)) && !arrived.never_ran(other, Epoch::new(3)));
        }
    }

    #[test]
    fn a_record_reads_back_and_no_part_of_it_does() {
        let bytes = record().encode();
        assert_eq!(Record::decode(&bytes), Ok(record()));
        for length in 0..bytes.len() {
            assert!(Record::decode(&bytes[..length]).is_err(), "torn at {length}");
        }
        assert!(Record::decode(&[bytes.as_slice(), &[0]].concat()).is_err());
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let bytes = record().encode();
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 4;
            assert!(Record::decode(&bad).is_err(), "byte {at}");
        }
    }
}
