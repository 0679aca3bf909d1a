//! The control connection's framing: a fixed header, then a postcard body.
//!
//! ```text
//!  0        4         6        8          12        16
//!  +--------+---------+--------+----------+---------+------------------+
//!  | "FRRY" | version | type   | length   | crc32c  | body (length)    |
//!  +--------+---------+--------+----------+---------+------------------+
//!    bytes    u16 LE    u16 LE   u32 LE     u32 LE    postcard
//! ```
//!
//! The checksum covers the first 12 bytes and the body. Magic, version and type stand outside the body,
//! so that a peer of another version can be told so. Types have numbers of their own (see [`crate::message`])
//! that never change their meaning.

use crate::message::{Message, MessageType};

/// What every control message begins with.
pub const CONTROL_MAGIC: [u8; 4] = *b"FRRY";

/// The newest protocol version that this crate speaks.
pub const VERSION_NEWEST: u16 = 1;

/// The oldest protocol version that this crate speaks.
pub const VERSION_OLDEST: u16 = 1;

/// Bytes of a control message's header.
pub const HEADER_BYTES: usize = 16;

/// The longest body: a machine's device state is the largest thing that crosses in one message.
pub const BODY_BYTES_MAX: usize = 16 << 20;

/// Why bytes on the control connection are no message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The peer does not speak this protocol at all.
    #[error("the peer does not speak ferry's protocol (its first bytes were {0:02x?})")]
    Magic([u8; 4]),
    /// The peer speaks a version that this side does not.
    #[error(
        "the peer speaks version {0} of the protocol, this side {VERSION_OLDEST} to {VERSION_NEWEST}; update the older side"
    )]
    Version(u16),
    /// A message type that this version does not have.
    #[error("the peer sent a message of the unknown type {0}")]
    Type(u16),
    /// A length beyond [`BODY_BYTES_MAX`], or what the peer may send yet.
    #[error("the peer announced a message of {0} bytes, above what it may send")]
    TooLong(u32),
    /// The checksum does not fit the bytes.
    #[error("a message of type {message_type} arrived damaged (its checksum is wrong)")]
    Checksum {
        /// The type in its header.
        message_type: u16,
    },
    /// The body is not what its type calls for.
    #[error("the body of a {message_type:?} message can't be read: {cause}")]
    Body {
        /// Which message it claims to be.
        message_type: MessageType,
        /// What the decoder said.
        cause: String,
    },
}

/// The bytes of `message`, header and body.
///
/// # Panics
/// If a body grows beyond [`BODY_BYTES_MAX`]: callers bound what they put into messages.
#[must_use]
pub fn encode(message: &Message) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_BYTES];
    message.encode_body(&mut bytes);
    let body_bytes = bytes.len() - HEADER_BYTES;
    assert!(body_bytes <= BODY_BYTES_MAX, "a body of {body_bytes} bytes");
    bytes[0..4].copy_from_slice(&CONTROL_MAGIC);
    bytes[4..6].copy_from_slice(&VERSION_NEWEST.to_le_bytes());
    bytes[6..8].copy_from_slice(&message.message_type().number().to_le_bytes());
    bytes[8..12].copy_from_slice(&u32::try_from(body_bytes).expect("bounded above").to_le_bytes());
    let crc = checksum(&bytes);
    bytes[12..16].copy_from_slice(&crc.to_le_bytes());
    bytes
}

fn checksum(message: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&message[..12]), &message[HEADER_BYTES..])
}

/// Turns bytes as they arrive into messages. It never holds more than one message and what arrived with it.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
}

impl Decoder {
    /// Takes what arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Whether nothing is left that [`Decoder::next_message`] has not given.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// The next whole message, or `None` until more bytes arrive.
    ///
    /// # Errors
    /// [`WireError`]; the stream can't be read any further afterwards.
    pub fn next_message(&mut self) -> Result<Option<Message>, WireError> {
        self.next_within(BODY_BYTES_MAX)
    }

    /// The same, where a body may have at most so many bytes, as long as the peer is not known.
    ///
    /// # Errors
    /// [`WireError`]; the stream can't be read any further afterwards.
    pub fn next_within(&mut self, body_bytes_max: usize) -> Result<Option<Message>, WireError> {
        if let Some(magic) = self.buffer.first_chunk::<4>().filter(|&magic| *magic != CONTROL_MAGIC) {
            return Err(WireError::Magic(*magic));
        }
        let Some(header) = self.buffer.first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let version = u16::from_le_bytes([header[4], header[5]]);
        let number = u16::from_le_bytes([header[6], header[7]]);
        let length = u32::from_le_bytes([header[8], header[9], header[10], header[11]]);
        let crc = u32::from_le_bytes([header[12], header[13], header[14], header[15]]);
        if !(VERSION_OLDEST..=VERSION_NEWEST).contains(&version) {
            return Err(WireError::Version(version));
        }
        let message_type = MessageType::from_number(number).ok_or(WireError::Type(number))?;
        let body_bytes = usize::try_from(length)
            .ok()
            .filter(|&n| n <= body_bytes_max.min(BODY_BYTES_MAX))
            .ok_or(WireError::TooLong(length))?;
        let Some(whole) = self.buffer.get(..HEADER_BYTES + body_bytes) else {
            return Ok(None);
        };
        if checksum(whole) != crc {
            return Err(WireError::Checksum { message_type: number });
        }
        let message = Message::decode_body(message_type, &whole[HEADER_BYTES..])
            .map_err(|cause| WireError::Body { message_type, cause })?;
        self.buffer.drain(..HEADER_BYTES + body_bytes);
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::tests::one_of_each;
    use proptest::prelude::*;

    #[test]
    fn every_message_reads_back_whatever_the_pieces() {
        for message in one_of_each() {
            for piece_bytes in [1, 3, 17, 4096] {
                let mut decoder = Decoder::default();
                let mut read = Vec::new();
                for piece in [encode(&message), encode(&message)].concat().chunks(piece_bytes) {
                    decoder.push(piece);
                    read.extend(decoder.next_message().unwrap());
                }
                read.extend(decoder.next_message().unwrap());
                assert_eq!(read, [message.clone(), message.clone()]);
            }
        }
    }

    #[test]
    fn each_kind_of_damage_has_its_name() {
        let good = encode(&Message::Ready(crate::message::Ready { record_us: 5 }));
        let decode = |at: usize, to: u8| {
            let mut bytes = good.clone();
            bytes[at] = to;
            let mut decoder = Decoder::default();
            decoder.push(&bytes);
            decoder.next_message().unwrap_err()
        };
        assert!(matches!(decode(0, b'G'), WireError::Magic(_)));
        assert_eq!(decode(4, 9), WireError::Version(9));
        assert_eq!(decode(7, 0xff), WireError::Type(0xff04));
        assert!(matches!(decode(11, 0xff), WireError::TooLong(_)));
        assert_eq!(decode(12, good[12] ^ 1), WireError::Checksum { message_type: 4 });
        assert_eq!(decode(16, good[16] ^ 1), WireError::Checksum { message_type: 4 });
    }

    #[test]
    fn an_http_request_is_refused_at_its_first_bytes() {
        let mut decoder = Decoder::default();
        decoder.push(b"GET ");
        assert_eq!(decoder.next_message(), Err(WireError::Magic(*b"GET ")));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut decoder = Decoder::default();
            decoder.push(&bytes);
            let _ = decoder.next_message();
        }

        #[test]
        fn no_body_makes_it_panic(number in 0u16..20, body in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Some(message_type) = MessageType::from_number(number) {
                let _ = Message::decode_body(message_type, &body);
            }
        }
    }
}
