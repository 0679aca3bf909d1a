//! Saved states by their sections: taken apart, bent section by section, and put together with counts, lengths and checksums
//! right. The format is that of ferry-vmm's envelope (docs/state.md).

use crate::bytes::{Taker, filled};
use crate::mutate::ENDS;

/// Magic, format, count, length.
const HEADER_BYTES: usize = 12;

/// Sections beyond this many say nothing new.
const SECTIONS_MAX: usize = 256;

/// As many changes are made to one state.
const CHANGES_MAX: usize = 64;

/// A section, without its checksum.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// What it is.
    pub kind: u16,
    /// In which version.
    pub version: u16,
    /// Its contents.
    pub body: Vec<u8>,
}

/// The sections behind a header, as far as they follow each other; the last one may be cut.
#[must_use]
pub fn sections(bytes: &[u8]) -> Vec<Section> {
    let mut sections = Vec::new();
    let mut rest = bytes.get(HEADER_BYTES..).unwrap_or_default();
    while let Some((header, behind)) = rest.split_first_chunk::<12>()
        && sections.len() < SECTIONS_MAX
    {
        let number = |at: usize| u16::from_le_bytes(filled(&header[at..at + 2]));
        let length = usize::try_from(u32::from_le_bytes(filled(&header[4..8]))).unwrap_or(usize::MAX);
        let (body, next) = behind.split_at(length.min(behind.len()));
        sections.push(Section { kind: number(0), version: number(2), body: body.to_vec() });
        rest = next;
    }
    sections
}

/// A state of these sections.
#[must_use]
pub fn state(sections: &[Section]) -> Vec<u8> {
    let mut bytes = b"FVMS\x01\x00".to_vec();
    bytes.extend(u16::try_from(sections.len()).unwrap_or(u16::MAX).to_le_bytes());
    bytes.extend([0; 4]);
    for Section { kind, version, body } in sections {
        bytes.extend(kind.to_le_bytes());
        bytes.extend(version.to_le_bytes());
        bytes.extend(u32::try_from(body.len()).unwrap_or(u32::MAX).to_le_bytes());
        bytes.extend(crc32c::crc32c(body).to_le_bytes());
        bytes.extend(body);
    }
    let total = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    bytes[8..12].copy_from_slice(&total.to_le_bytes());
    bytes
}

/// `sections` with the changes that `taker` says, until it has no more: which section, where in it, what, and with which value. So
/// every section is as likely to be bent, however short it is.
#[must_use]
pub fn bent(mut sections: Vec<Section>, taker: &mut Taker<'_>) -> Vec<Section> {
    for _ in 0..CHANGES_MAX {
        if taker.0.is_empty() || sections.is_empty() {
            break;
        }
        let index = usize::from(taker.byte()) % sections.len();
        let at = usize::from(u16::from_le_bytes([taker.byte(), taker.byte()]));
        let (what, value) = (taker.byte(), taker.byte());
        let Section { version, body, .. } = &mut sections[index];
        let at = at % (body.len() + 1);
        let here = body.iter_mut().skip(at);
        match what % 10 {
            0 => here.take(1).for_each(|byte| *byte = value),
            1 => here.take(1).for_each(|byte| *byte ^= 1 << (value % 8)),
            2 => {
                let number = ENDS[usize::from(value) % ENDS.len()].to_le_bytes();
                here.zip(number).for_each(|(byte, new)| *byte = new);
            }
            3 => here.zip(taker.some(8)).for_each(|(byte, new)| *byte = *new),
            4 => here.take(usize::from(value)).for_each(|byte| *byte = 0xff),
            5 => {
                let end = (at + usize::from(value % 32) + 1).min(body.len());
                body.drain(at..end);
            }
            6 => {
                let inserted = vec![taker.byte(); usize::from(value % 32) + 1];
                body.splice(at..at, inserted);
            }
            7 => *version = u16::from(value % 5),
            8 => {
                sections.remove(index);
            }
            _ => {
                if sections.len() < SECTIONS_MAX {
                    let copy = sections[index].clone();
                    sections.insert(usize::from(value) % (index + 1), copy);
                }
            }
        }
    }
    sections
}
