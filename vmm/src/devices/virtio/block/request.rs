//! One request of a virtio block device (virtio 1.2, section 5.2.6): what the guest asks for, checked, and done.
//!
//! ```text
//! readable by the device:  type u32 │ reserved u32 │ sector u64 │ data of a write, or ranges
//! writable by the device:  data of a read, or the serial number │ status u8
//! ```
//!
//! Data goes through a buffer of the thread's own, so the guest may change what it has handed over at any time.

use std::io::{self, Read, Write};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::{DescriptorChain, Reader, Writer};
use vm_memory::bitmap::MS;

use super::super::mmio::BrokenQueue;
use crate::disk::{Disk, SECTOR_BYTES};
use crate::memory::TrackedMemory;

/// The most data that a request may have: drivers split what is larger, and a pause waits for no more than this.
pub(super) const DATA_BYTES_MAX: usize = 32 << 20;

/// The most of one range to discard.
pub(super) const DISCARD_SECTORS_MAX: u32 = 1 << 21;
/// The most ranges of one request to discard.
pub(super) const DISCARD_RANGES_MAX: u32 = 16;
/// The most of the range to zero: where the storage can't do it, so much is written.
pub(super) const ZERO_SECTORS_MAX: u32 = 1 << 15;
/// The most ranges of one request to zero.
pub(super) const ZERO_RANGES_MAX: u32 = 1;

/// Bytes of a disk's serial number, filled up with zeroes.
pub(super) type Serial = [u8; crate::config::DISK_SERIAL_BYTES_MAX];

const HEADER_BYTES: usize = 16;
const RANGE_BYTES: usize = 16;

/// How a request ended, if not well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failure {
    Io,
    Unsupported,
}

impl From<io::Error> for Failure {
    fn from(_: io::Error) -> Self {
        Self::Io
    }
}

/// A request whose frame is sound.
pub(super) struct Request<'a> {
    kind: u32,
    sector: u64,
    from_guest: Reader<'a, MS<'a, TrackedMemory>>,
    to_guest: Writer<'a, MS<'a, TrackedMemory>>,
    status: Writer<'a, MS<'a, TrackedMemory>>,
}

/// What a request is done on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Medium<'a> {
    pub(super) disk: &'a Disk,
    pub(super) serial: &'a Serial,
    /// Whether what was written must be on the storage at once: the driver does not know how to flush.
    pub(super) write_through: bool,
}

impl<'a> Request<'a> {
    /// Reads the frame of a request; one without header or status breaks the queue, for nothing could be answered.
    pub(super) fn parse(
        chain: DescriptorChain<&'a TrackedMemory>,
        memory: &'a TrackedMemory,
    ) -> Result<Self, BrokenQueue> {
        let broken = BrokenQueue(virtio_queue::Error::InvalidChain);
        let mut from_guest = chain.clone().reader(memory)?;
        let mut to_guest = chain.writer(memory)?;
        let mut header = [0; HEADER_BYTES];
        let Some(data_bytes) = to_guest.available_bytes().checked_sub(1) else { return Err(broken) };
        let status = to_guest.split_at(data_bytes)?;
        if from_guest.read_exact(&mut header).is_err() {
            return Err(broken);
        }
        let (kind, sector) = (number(&header[..4]), number(&header[8..]));
        let kind = u32::try_from(kind).expect("four bytes");
        Ok(Self { kind, sector, from_guest, to_guest, status })
    }

    /// Does what is asked for and writes the status; gives the bytes of the chain that were written at most.
    pub(super) fn perform(mut self, medium: Medium<'_>, buffer: &mut [u8]) -> u32 {
        let written = self.to_guest.available_bytes() + 1;
        let status = match self.act(medium, buffer) {
            Ok(()) => VIRTIO_BLK_S_OK,
            Err(Failure::Io) => VIRTIO_BLK_S_IOERR,
            Err(Failure::Unsupported) => VIRTIO_BLK_S_UNSUPP,
        };
        // There is room for it, as was seen when the request was parsed.
        let _ = self.status.write_all(&[u8::try_from(status).expect("0 to 2")]);
        u32::try_from(written).unwrap_or(u32::MAX)
    }

    fn act(&mut self, medium: Medium<'_>, buffer: &mut [u8]) -> Result<(), Failure> {
        let Medium { disk, serial, write_through } = medium;
        let changes =
            matches!(self.kind, VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES);
        if changes && disk.is_read_only() {
            return Err(Failure::Io);
        }
        match self.kind {
            VIRTIO_BLK_T_IN => self.read(disk, buffer)?,
            VIRTIO_BLK_T_OUT => self.write(disk, buffer)?,
            VIRTIO_BLK_T_FLUSH if disk.is_read_only() => {}
            VIRTIO_BLK_T_FLUSH => disk.sync()?,
            VIRTIO_BLK_T_GET_ID => {
                let length = serial.len().min(self.to_guest.available_bytes());
                self.to_guest.write_all(&serial[..length])?;
            }
            VIRTIO_BLK_T_DISCARD => {
                for Range { offset, bytes, .. } in
                    self.ranges(disk, DISCARD_RANGES_MAX, DISCARD_SECTORS_MAX, 0)?
                {
                    disk.discard(offset, bytes)?;
                }
            }
            VIRTIO_BLK_T_WRITE_ZEROES => {
                let flags = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
                for Range { offset, bytes, flags } in
                    self.ranges(disk, ZERO_RANGES_MAX, ZERO_SECTORS_MAX, flags)?
                {
                    disk.write_zeroes(offset, bytes, flags != 0)?;
                }
            }
            _ => return Err(Failure::Unsupported),
        }
        if changes && write_through {
            disk.sync()?;
        }
        Ok(())
    }

    fn read(&mut self, disk: &Disk, buffer: &mut [u8]) -> Result<(), Failure> {
        let mut left = self.to_guest.available_bytes();
        let mut offset = checked_offset(disk, self.sector, left)?;
        while left > 0 {
            let length = left.min(buffer.len());
            let piece = &mut buffer[..length];
            disk.read_at(piece, offset)?;
            self.to_guest.write_all(piece)?;
            (left, offset) = (left - length, offset + length as u64);
        }
        Ok(())
    }

    fn write(&mut self, disk: &Disk, buffer: &mut [u8]) -> Result<(), Failure> {
        let mut left = self.from_guest.available_bytes();
        let mut offset = checked_offset(disk, self.sector, left)?;
        while left > 0 {
            let length = left.min(buffer.len());
            let piece = &mut buffer[..length];
            self.from_guest.read_exact(piece)?;
            disk.write_at(piece, offset)?;
            (left, offset) = (left - length, offset + length as u64);
        }
        Ok(())
    }

    /// The ranges of a request, all of them sound.
    fn ranges(
        &mut self,
        disk: &Disk,
        ranges_max: u32,
        sectors_max: u32,
        flags_known: u32,
    ) -> Result<Vec<Range>, Failure> {
        let bytes = self.from_guest.available_bytes();
        let count = bytes / RANGE_BYTES;
        if !bytes.is_multiple_of(RANGE_BYTES) || count == 0 || count > ranges_max as usize {
            return Err(Failure::Io);
        }
        let mut ranges = Vec::with_capacity(count);
        for _ in 0..count {
            let mut range = [0; RANGE_BYTES];
            self.from_guest.read_exact(&mut range)?;
            let [sectors, flags] = [&range[8..12], &range[12..]].map(|part| u32::try_from(number(part)));
            let (sectors, flags) = (sectors.expect("four bytes"), flags.expect("four bytes"));
            if flags & !flags_known != 0 {
                return Err(Failure::Unsupported);
            }
            if sectors > sectors_max {
                return Err(Failure::Io);
            }
            let bytes = u64::from(sectors) * SECTOR_BYTES;
            let offset = range_offset(disk, number(&range[..8]), bytes)?;
            if bytes > 0 {
                ranges.push(Range { offset, bytes, flags });
            }
        }
        Ok(ranges)
    }
}

/// A part of the disk, in bytes.
#[derive(Clone, Copy, Debug)]
struct Range {
    offset: u64,
    bytes: u64,
    flags: u32,
}

/// Where `bytes` of data from `sector` on begin, if they are whole sectors of the disk and not too many.
fn checked_offset(disk: &Disk, sector: u64, bytes: usize) -> Result<u64, Failure> {
    if bytes > DATA_BYTES_MAX || !(bytes as u64).is_multiple_of(SECTOR_BYTES) {
        return Err(Failure::Io);
    }
    range_offset(disk, sector, bytes as u64)
}

fn range_offset(disk: &Disk, sector: u64, bytes: u64) -> Result<u64, Failure> {
    let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Failure::Io)?;
    let end = offset.checked_add(bytes).ok_or(Failure::Io)?;
    if end <= disk.size_bytes() { Ok(offset) } else { Err(Failure::Io) }
}

/// A little-endian number of at most eight bytes.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}
