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
use crate::source::Resolution;

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

/// The operator's decision goes against the record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the record of '{name}' in epoch {epoch} refuses that: {why}")]
pub struct Unresolvable {
    /// The VM.
    pub name: VmName,
    /// The epoch that the record speaks of.
    pub epoch: Epoch,
    /// What the record proves, in a sentence.
    pub why: String,
}

/// Why bytes are no record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Too short, too long, or of another kind.
    #[error("it is not a record of ferry, or it is torn ({0} bytes)")]
    Torn(usize),
    /// Written by another version.
    #[error("it has format version {found}, this ferry reads {read}")]
    Version {
        /// Its version.
        found: u16,
        /// The one that is read.
        read: u16,
    },
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

    /// Whether this host can't tell by the record alone who has the VM.
    #[must_use]
    pub const fn in_doubt(&self) -> bool {
        match self.standing {
            Standing::Committed { .. } => true,
            Standing::Running
            | Standing::Stopped
            | Standing::Released { .. }
            | Standing::Receiving { .. }
            | Standing::Discarded => false,
        }
    }

    /// What the record becomes when the operator decides by it, on a host where no process has the guest's memory any more.
    ///
    /// # Errors
    /// [`Unresolvable`]: what the record proves wrong, or what there is nothing left for.
    pub fn resolved(&self, resolution: Resolution) -> Result<Self, Unresolvable> {
        let refuse = |what: &str| {
            Err(Unresolvable { name: self.name.clone(), epoch: self.epoch, why: what.to_owned() })
        };
        let standing = match (&self.standing, resolution) {
            (Standing::Committed { target }, Resolution::Discard) => {
                Standing::Released { target: target.clone() }
            }
            (Standing::Receiving { .. }, Resolution::Discard) => Standing::Discarded,
            (Standing::Committed { .. }, Resolution::Resume | Resolution::ResumeAlone) => {
                return refuse(
                    "it was given away, and the memory that was kept here was lost with its process; if no other host runs \
                     it, --discard lets it be started anew",
                );
            }
            (
                Standing::Receiving { .. } | Standing::Discarded,
                Resolution::Resume | Resolution::ResumeAlone,
            ) => {
                return refuse("it has never run here, and what had arrived is gone; its source has it");
            }
            (Standing::Released { .. }, Resolution::Resume | Resolution::ResumeAlone) => {
                return refuse("its target has said that it runs there, so here it would be a second one");
            }
            (Standing::Released { .. } | Standing::Discarded | Standing::Stopped, Resolution::Discard)
            | (Standing::Stopped, Resolution::Resume | Resolution::ResumeAlone) => {
                return refuse("nothing is in doubt, and this host has let go of it already");
            }
            (Standing::Running, Resolution::Resume | Resolution::ResumeAlone | Resolution::Discard) => {
                return refuse(
                    "this host owns it, so nothing is in doubt; its process is gone, and it may be started anew",
                );
            }
        };
        Ok(Self { standing, ..self.clone() })
    }

    const SEALED: Sealed = Sealed { magic: RECORD_MAGIC, version: RECORD_VERSION };

    /// The record as a file has it.
    ///
    /// # Panics
    /// Never for names and addresses of sane length: the body is bounded.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        Self::SEALED.seal(self)
    }

    /// Reads a record; the bytes must be exactly one.
    ///
    /// # Errors
    /// [`RecordError`]: the record is in doubt.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        Self::SEALED.open(bytes)
    }
}

/// A kind of small durable thing, framed and checked as drawn above.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sealed {
    pub(crate) magic: [u8; 4],
    pub(crate) version: u16,
}

impl Sealed {
    pub(crate) fn seal<T: Serialize>(self, content: &T) -> Vec<u8> {
        let body = postcard::to_stdvec(content).expect("our own type has a postcard form");
        assert!(body.len() <= BODY_BYTES_MAX, "a record of {} bytes", body.len());
        let mut bytes = self.magic.to_vec();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend([0, 0]);
        bytes.extend(u32::try_from(body.len()).expect("bounded above").to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes), &body);
        bytes.extend(crc.to_le_bytes());
        bytes.extend(body);
        bytes
    }

    pub(crate) fn open<'a, T: Deserialize<'a>>(self, bytes: &'a [u8]) -> Result<T, RecordError> {
        let torn = RecordError::Torn(bytes.len());
        let Some((header, body)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
            return Err(torn);
        };
        let length = u32::from_le_bytes([header[8], header[9], header[10], header[11]]);
        // A longer one could be read but not be written again.
        let fits = body.len() <= BODY_BYTES_MAX && usize::try_from(length) == Ok(body.len());
        if header[..4] != self.magic || !fits {
            return Err(torn);
        }
        let crc = crc32c::crc32c_append(crc32c::crc32c(&header[..12]), body);
        if crc.to_le_bytes() != header[12..16] {
            return Err(RecordError::Checksum);
        }
        let version = u16::from_le_bytes([header[4], header[5]]);
        if version != self.version {
            return Err(RecordError::Version { found: version, read: self.version });
        }
        match postcard::take_from_bytes(body) {
            Ok((content, [])) => Ok(content),
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
    fn the_operator_decides_only_what_the_record_leaves_open() {
        let target = || "b".to_owned();
        let cases = [
            (Standing::Running, None),
            (Standing::Committed { target: target() }, Some(Standing::Released { target: target() })),
            (Standing::Released { target: target() }, None),
            (Standing::Receiving { source: target() }, Some(Standing::Discarded)),
            (Standing::Discarded, None),
            (Standing::Stopped, None),
        ];
        for (standing, discarded) in cases {
            let record = Record { standing: standing.clone(), ..record() };
            assert_eq!(record.resolved(Resolution::Discard).ok().map(|record| record.standing), discarded);
            // Without the guest's memory nothing can be resumed, whatever the record says.
            let refused = record.resolved(Resolution::Resume).unwrap_err().to_string();
            assert!(refused.contains("'web' in epoch 3"), "{refused}");
            assert_eq!(record.in_doubt(), matches!(standing, Standing::Committed { .. }));
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
    fn a_record_that_is_too_long_to_be_written_is_refused() {
        for (address_bytes, fits) in [(4000, true), (5000, false)] {
            let record =
                Record { standing: Standing::Receiving { source: "a".repeat(address_bytes) }, ..record() };
            let body = postcard::to_stdvec(&record).unwrap();
            let mut bytes = [RECORD_MAGIC.as_slice(), &RECORD_VERSION.to_le_bytes(), &[0, 0]].concat();
            bytes.extend(u32::try_from(body.len()).unwrap().to_le_bytes());
            let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes), &body);
            bytes.extend(crc.to_le_bytes());
            bytes.extend(body);
            let torn = RecordError::Torn(bytes.len());
            assert_eq!(Record::decode(&bytes), if fits { Ok(record) } else { Err(torn) });
        }
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
