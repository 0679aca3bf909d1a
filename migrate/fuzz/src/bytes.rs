//! Taking numbers from bytes, and putting checksums right so that what stands behind them is reached.

/// Bytes that are taken from the front, zeroes once there are none left.
#[derive(Debug, Clone, Copy)]
pub struct Taker<'a>(pub &'a [u8]);

impl<'a> Taker<'a> {
    /// The next byte.
    pub const fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((first, rest)) => {
                self.0 = rest;
                *first
            }
            None => 0,
        }
    }

    /// The next eight as a number.
    pub fn number(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    /// As many bytes as there are, at most `count`.
    pub fn some(&mut self, count: usize) -> &'a [u8] {
        let (some, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        some
    }
}

/// `bytes` in an array, followed by zeroes or cut.
#[must_use]
pub fn filled<const N: usize>(bytes: &[u8]) -> [u8; N] {
    std::array::from_fn(|at| bytes.get(at).copied().unwrap_or_default())
}

/// Makes the checksum behind `covered` bytes right.
pub fn seal(bytes: &mut [u8], covered: usize) {
    let crc = crc32c::crc32c(&bytes[..covered]);
    bytes[covered..covered + 4].copy_from_slice(&crc.to_le_bytes());
}

/// Makes length and checksum of each whole control message right, as far as they follow each other.
#[must_use]
pub fn sealed_messages(bytes: &[u8]) -> Vec<u8> {
    let mut sealed = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some((header, behind)) = rest.split_first_chunk::<16>() {
        let announced = usize::try_from(u32::from_le_bytes(filled(&header[8..12]))).unwrap_or(usize::MAX);
        let (body, next) = behind.split_at(announced.min(behind.len()));
        let mut header = *header;
        header[..6].copy_from_slice(b"FRRY\x01\x00");
        header[8..12].copy_from_slice(&u32::try_from(body.len()).unwrap_or(u32::MAX).to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&header[..12]), body);
        header[12..16].copy_from_slice(&crc.to_le_bytes());
        sealed.extend(header);
        sealed.extend(body);
        rest = next;
    }
    sealed.extend(rest);
    sealed
}

/// Makes length and checksum of a record, or of what a witness holds, right.
#[must_use]
pub fn sealed_record(bytes: &[u8]) -> Vec<u8> {
    let mut sealed = bytes.to_vec();
    if let Some((header, body)) = sealed.split_first_chunk_mut::<16>() {
        header[8..12].copy_from_slice(&u32::try_from(body.len()).unwrap_or(u32::MAX).to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&header[..12]), body);
        header[12..16].copy_from_slice(&crc.to_le_bytes());
    }
    sealed
}
