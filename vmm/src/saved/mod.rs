//! The envelope of saved state: sections that say what they are, so that another version of this
//! program can take, skip or refuse each by name.
//!
//! ```text
//!  0        4        6        8               12
//! ┌────────┬────────┬────────┬────────────────┐
//! │ "FVMS" │ format │ count  │ total bytes    │  once; total includes this header
//! ├────────┴┬───────┴┬───────┴────────┬───────┴────────┬─────────────┐
//! │ kind    │ version│ length         │ crc32c (bytes) │ bytes       │  `count` times
//! └─────────┴────────┴────────────────┴────────────────┴─────────────┘
//!   u16       u16      u32              u32               little-endian throughout
//! ```
//!
//! A kind with its top bit set is optional: who does not know it skips it. Any other unknown kind is
//! refused. The bytes of a section are postcard, with a type of its own in [`sections`]; the current version of it and the
//! one before are read. docs/state.md has the rule and what to do when a section changes.
//! Encryption and compression are not its business.

mod abi;
mod announced;
mod bounded;
mod previous;
pub(crate) mod sections;

use serde::Serialize;
use serde::de::DeserializeOwned;

pub(crate) use abi::{from_abi_bytes, to_abi_bytes};
pub(crate) use announced::{Announced, check_announced};

use crate::capability::KvmCallError;
use crate::config::ConfigError;
use crate::cpu::CpuError;

/// The most that saved state may take: 64 vCPUs with 12 KiB of extended state each stay far below.
pub const STATE_BYTES_MAX: usize = 16 << 20;

const MAGIC: [u8; 4] = *b"FVMS";
const FORMAT: u16 = 1;
const HEADER_BYTES: usize = 12;
const OPTIONAL: u16 = 0x8000;

/// Why state can't be saved, read or restored.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The machine is not in the right status.
    #[error("can't {action}: the machine is {status}, and must be {needed}")]
    WrongStatus {
        /// What was asked for.
        action: &'static str,
        /// What it is.
        status: &'static str,
        /// What it must be.
        needed: &'static str,
    },
    /// The bytes are no saved state of this program.
    #[error("this is not saved machine state: it does not start with {MAGIC:?}")]
    Magic,
    /// The envelope has another format.
    #[error("saved machine state of format {found}; this version reads format {FORMAT}")]
    Format {
        /// The format found.
        found: u16,
    },
    /// The bytes end early, go on too long, or a length is impossible.
    #[error("saved machine state is damaged: {what}")]
    Damaged {
        /// What is wrong.
        what: &'static str,
    },
    /// A section's bytes don't match their checksum.
    #[error("saved machine state is damaged: the checksum of {section} is wrong")]
    Checksum {
        /// Which section.
        section: String,
    },
    /// A mandatory section that this version does not know.
    #[error(
        "the machine's state has {section}, which this version of ferry doesn't know and can't leave out; update \
         ferry here"
    )]
    UnknownSection {
        /// Which section, by name as far as it is known, and by number.
        section: String,
    },
    /// The state has a section that its description did not announce.
    #[error(
        "the state has {section}, which the machine's description does not announce; this is a fault of ferry's"
    )]
    Unannounced {
        /// Which section.
        section: String,
    },
    /// A section in a version that this program does not read.
    #[error(
        "{section} has version {found}, and this version of ferry reads {}; {}",
        versions(*.oldest, *.known),
        if .found > .known { "update ferry here" } else { "migrate by way of a host with a version in between" }
    )]
    SectionVersion {
        /// Which section, by name and number.
        section: String,
        /// Its version.
        found: u16,
        /// The oldest version that this program reads.
        oldest: u16,
        /// The version that it writes.
        known: u16,
    },
    /// A section that is needed is missing, or there are too many of it.
    #[error("saved machine state has {found} {section} sections where {expected} belong")]
    SectionCount {
        /// Which section.
        section: &'static str,
        /// How many were found.
        found: usize,
        /// How many belong there.
        expected: usize,
    },
    /// A section's bytes don't decode.
    #[error("the {section} section can't be decoded")]
    Decode {
        /// Which section.
        section: &'static str,
        /// What the decoder said.
        #[source]
        source: postcard::Error,
    },
    /// A section decodes to something impossible.
    #[error("the {section} section is impossible: {what}")]
    Invalid {
        /// Which section.
        section: &'static str,
        /// What is wrong with it.
        what: String,
    },
    /// The state is of a machine with another shape.
    #[error("the saved state is of another machine: {what}")]
    OtherMachine {
        /// What differs.
        what: String,
    },
    /// The described machine can't be built.
    #[error("the described machine can't be built")]
    Config(#[from] ConfigError),
    /// The machine has a network interface, and no tap was given for it.
    #[error(
        "the machine has a network interface with MAC address {mac} and needs a tap on this host; \
         give one with --net tap=NAME"
    )]
    NeedsTap {
        /// Its address.
        mac: String,
    },
    /// A tap was given for a machine without a network interface.
    #[error("the machine has no network interface, so it has no use for tap '{tap}'; leave it out")]
    NoUseForTap {
        /// The tap that was given.
        tap: String,
    },
    /// The guest uses features of its network interface that this host can't give it.
    #[error(
        "the guest's driver uses what the network interface can't do on this host: {missing}; give it a host whose \
         kernel has these offloads for taps"
    )]
    NetworkFeatures {
        /// Which, in words.
        missing: String,
    },
    /// The number of disks that were named is not that of the machine.
    #[error(
        "the machine has {disks} disks, and {given} were named here; name each with --disk path=.. in their order, or \
         none to take them from where they are at the source"
    )]
    DiskChoices {
        /// How many were named.
        given: usize,
        /// How many it has.
        disks: usize,
    },
    /// A disk is read-only at one side and writable at the other.
    #[error("disk '{}' is {at_source} at the source and was named as {here} here", path.display())]
    DiskAccess {
        /// Its path on this host.
        path: std::path::PathBuf,
        /// What it is at the source.
        at_source: &'static str,
        /// What was said here.
        here: &'static str,
    },
    /// The guest's processor can't be had here.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// KVM refused a call.
    #[error(transparent)]
    Kvm(#[from] KvmCallError),
    /// KVM refused an MSR's value, and the vCPU has another.
    #[error(
        "vCPU {vcpu} can't take {value:#x} in MSR {index:#x}: this host's processor or KVM lacks the feature"
    )]
    Msr {
        /// Which vCPU.
        vcpu: u8,
        /// Which MSR.
        index: u32,
        /// The value that it should have.
        value: u64,
    },
    /// The guest's TSC would go back.
    #[error(
        "the TSC of vCPU {vcpu} would go back by {by_ms} ms on this host: its KVM shows guests the host's own TSC and can't \
         offset it; migrate to a host that has been up for longer, or whose KVM can"
    )]
    TscBackwards {
        /// Which vCPU.
        vcpu: u8,
        /// By how much.
        by_ms: u64,
    },
    /// A device could not take its state.
    #[error("the {device} can't take its saved state: {what}")]
    Device {
        /// Which device.
        device: &'static str,
        /// Why not.
        what: String,
    },
}

/// A type of section: what it is called and which version is written.
pub(crate) trait Section: Serialize + DeserializeOwned {
    const KIND: u16;
    const VERSION: u16;
    const NAME: &'static str;
    /// The oldest version that is read: the current one or the one before.
    const OLDEST: u16;

    /// Reads the version before the current one, and gives back what follows it.
    fn take_previous(body: &[u8]) -> Result<(Self, &[u8]), postcard::Error>;
}

fn versions(oldest: u16, known: u16) -> String {
    if oldest == known { known.to_string() } else { format!("{oldest} and {known}") }
}

/// Collects sections into an envelope.
#[derive(Debug)]
pub(crate) struct Writer {
    bytes: Vec<u8>,
    count: u16,
    /// What may be written, if that was announced.
    announced: Option<Vec<Announced>>,
}

impl Writer {
    pub(crate) fn new() -> Self {
        Self { bytes: vec![0; HEADER_BYTES], count: 0, announced: None }
    }

    /// One that takes only sections that a description has announced.
    pub(crate) fn of_announced(announced: Vec<Announced>) -> Self {
        Self { announced: Some(announced), ..Self::new() }
    }

    pub(crate) fn add<S: Section>(&mut self, section: &S) -> Result<(), StateError> {
        if self.announced.as_ref().is_some_and(|all| !all.contains(&Announced::of::<S>())) {
            return Err(StateError::Unannounced { section: name_of(S::KIND) });
        }
        let decode_error = |source| StateError::Decode { section: S::NAME, source };
        let body = postcard::to_stdvec(section).map_err(decode_error)?;
        let length = u32::try_from(body.len()).map_err(|_| StateError::Damaged { what: "it is too long" })?;
        self.bytes.extend(S::KIND.to_le_bytes());
        self.bytes.extend(S::VERSION.to_le_bytes());
        self.bytes.extend(length.to_le_bytes());
        self.bytes.extend(crc32c::crc32c(&body).to_le_bytes());
        self.bytes.extend(body);
        self.count += 1;
        Ok(())
    }

    pub(crate) fn finish(mut self) -> Result<Vec<u8>, StateError> {
        if self.bytes.len() > STATE_BYTES_MAX {
            return Err(StateError::Damaged { what: "it is too long" });
        }
        let total = u32::try_from(self.bytes.len()).expect("STATE_BYTES_MAX fits");
        self.bytes[0..4].copy_from_slice(&MAGIC);
        self.bytes[4..6].copy_from_slice(&FORMAT.to_le_bytes());
        self.bytes[6..8].copy_from_slice(&self.count.to_le_bytes());
        self.bytes[8..12].copy_from_slice(&total.to_le_bytes());
        Ok(self.bytes)
    }
}

/// A section as it lies in the envelope, its checksum verified.
#[derive(Clone, Copy, Debug)]
struct RawSection<'a> {
    kind: u16,
    version: u16,
    body: &'a [u8],
}

/// An envelope whose sections are known and intact.
#[derive(Debug)]
pub(crate) struct Reader<'a> {
    sections: Vec<RawSection<'a>>,
}

impl<'a> Reader<'a> {
    /// Checks the whole envelope.
    pub(crate) fn new(bytes: &'a [u8]) -> Result<Self, StateError> {
        let damaged = |what| StateError::Damaged { what };
        if bytes.len() < MAGIC.len() || bytes[..MAGIC.len()] != MAGIC {
            return Err(StateError::Magic);
        }
        if bytes.len() > STATE_BYTES_MAX {
            return Err(damaged("it is longer than any machine's state"));
        }
        let mut rest = Cursor(&bytes[MAGIC.len()..]);
        let found = rest.u16()?;
        if found != FORMAT {
            return Err(StateError::Format { found });
        }
        let count = rest.u16()?;
        let total = rest.u32()? as usize;
        if total != bytes.len() {
            return Err(damaged("its length is not what its header says"));
        }
        let mut sections = Vec::new();
        for _ in 0..count {
            let (kind, version) = (rest.u16()?, rest.u16()?);
            let (length, checksum) = (rest.u32()? as usize, rest.u32()?);
            let body = rest.take(length)?;
            if crc32c::crc32c(body) != checksum {
                return Err(StateError::Checksum { section: name_of(kind) });
            }
            if sections::known(kind).is_some() {
                sections.push(RawSection { kind, version, body });
            } else if kind & OPTIONAL == 0 {
                return Err(StateError::UnknownSection { section: name_of(kind) });
            }
        }
        if !rest.0.is_empty() {
            return Err(damaged("there are bytes after its last section"));
        }
        Ok(Self { sections })
    }

    /// Every section of one type, in order.
    pub(crate) fn all<S: Section>(&self) -> Result<Vec<S>, StateError> {
        let of_kind = self.sections.iter().filter(|section| section.kind == S::KIND);
        of_kind.map(RawSection::decode).collect()
    }

    /// The same, if there are no more than `most` of them: found out before any is decoded.
    pub(crate) fn at_most<S: Section>(&self, most: usize) -> Result<Vec<S>, StateError> {
        let found = self.sections.iter().filter(|section| section.kind == S::KIND).count();
        if found > most {
            let what = format!("there are {found} of it, and no machine has more than {most}");
            return Err(StateError::Invalid { section: S::NAME, what });
        }
        self.all()
    }

    /// The first section of an optional type, if there is one in a version that is known here.
    pub(crate) fn optional<S: Section>(&self) -> Result<Option<S>, StateError> {
        const { assert!(S::KIND & OPTIONAL != 0) };
        let of_kind = self.sections.iter().filter(|section| section.kind == S::KIND);
        of_kind
            .filter(|section| (S::OLDEST..=S::VERSION).contains(&section.version))
            .map(RawSection::decode)
            .next()
            .transpose()
    }

    /// The section of a type that not every state has.
    pub(crate) fn one_at_most<S: Section>(&self) -> Result<Option<S>, StateError> {
        let mut of_kind = self.sections.iter().filter(|section| section.kind == S::KIND);
        match (of_kind.next(), of_kind.count()) {
            (first, 0) => first.map(RawSection::decode).transpose(),
            (_, others) => Err(StateError::SectionCount { section: S::NAME, found: others + 1, expected: 1 }),
        }
    }

    /// The one section of a type.
    pub(crate) fn one<S: Section>(&self) -> Result<S, StateError> {
        self.one_at_most()?.ok_or(StateError::SectionCount { section: S::NAME, found: 0, expected: 1 })
    }
}

impl RawSection<'_> {
    fn decode<S: Section>(&self) -> Result<S, StateError> {
        let taken = if self.version == S::VERSION {
            postcard::take_from_bytes(self.body)
        } else if (S::OLDEST..S::VERSION).contains(&self.version) {
            S::take_previous(self.body)
        } else {
            return Err(StateError::SectionVersion {
                section: name_of(S::KIND),
                found: self.version,
                oldest: S::OLDEST,
                known: S::VERSION,
            });
        };
        let (section, rest) = taken.map_err(|source| StateError::Decode { section: S::NAME, source })?;
        if !rest.is_empty() {
            return Err(StateError::Invalid {
                section: S::NAME,
                what: format!("{} bytes too many", rest.len()),
            });
        }
        Ok(section)
    }
}

/// `virtio-blk (section 0x12)`, or without a name if it has none here.
fn name_of(kind: u16) -> String {
    in_words(sections::known(kind).map(|known| known.name), kind)
}

fn in_words(name: Option<&str>, kind: u16) -> String {
    name.map_or_else(|| format!("section {kind:#04x}"), |name| format!("{name} (section {kind:#04x})"))
}

/// Takes little-endian numbers off the front.
#[derive(Debug)]
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, bytes: usize) -> Result<&'a [u8], StateError> {
        let (taken, rest) =
            self.0.split_at_checked(bytes).ok_or(StateError::Damaged { what: "it ends early" })?;
        self.0 = rest;
        Ok(taken)
    }

    fn u16(&mut self) -> Result<u16, StateError> {
        let bytes = self.take(2)?.try_into().expect("two bytes were taken");
        Ok(u16::from_le_bytes(bytes))
    }

    fn u32(&mut self) -> Result<u32, StateError> {
        let bytes = self.take(4)?.try_into().expect("four bytes were taken");
        Ok(u32::from_le_bytes(bytes))
    }
}

#[cfg(test)]
mod golden;
#[cfg(test)]
mod tests;
