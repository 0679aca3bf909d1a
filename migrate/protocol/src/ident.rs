//! Names and numbers that identify things, each a type of its own so that they can't be mixed up.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Which life of a VM: it grows with every change of owner, so that two owners never share one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Epoch(u64);

impl Epoch {
    /// The epoch in which a VM is first started.
    pub const FIRST: Self = Self(1);

    /// The largest epoch that a peer may name: far beyond any real one, far enough from the end to count on.
    pub const MAX: Self = Self(u64::MAX / 2);

    /// The epoch `number`.
    #[must_use]
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// The epoch that a target prepares when the source runs this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }

    /// The plain number.
    #[must_use]
    pub const fn number(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

macro_rules! id16 {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub [u8; 16]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }
    };
}

id16! {
    /// A VM's identity for its whole life, whatever host runs it: 16 random bytes chosen at its start.
    VmId
}
id16! {
    /// One attempt at a migration: 16 random bytes. Data streams and reconnections name it to join.
    MigrationId
}

impl VmId {
    /// Reads what [`fmt::Display`] writes: 32 hexadecimal digits.
    #[must_use]
    pub fn from_hex(text: &str) -> Option<Self> {
        if text.len() != 32 || !text.is_ascii() {
            return None;
        }
        let mut bytes = [0; 16];
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).ok()?;
        }
        Some(Self(bytes))
    }
}

/// The most data streams that a migration may use.
pub const STREAMS_MAX: u16 = 64;

/// Which data stream, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamIndex(u16);

impl StreamIndex {
    /// Stream `index` of `streams`; `None` if there is no such stream.
    #[must_use]
    pub fn new(index: u16, streams: u16) -> Option<Self> {
        (index < streams && streams <= STREAMS_MAX).then_some(Self(index))
    }

    /// The plain number.
    #[must_use]
    pub const fn number(self) -> u16 {
        self.0
    }
}

/// The longest VM name, in bytes.
pub const VM_NAME_BYTES_MAX: usize = 64;

/// A VM's name as people say it: 1 to 64 of `A-Z a-z 0-9 . _ -`, beginning with a letter or a digit, so
/// that it is safe as a file name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmName(String);

/// Why a text can't be a VM's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{0}' can't be a VM's name: take 1 to {VM_NAME_BYTES_MAX} of A-Z a-z 0-9 . _ -, beginning with a letter or a digit"
)]
pub struct VmNameError(String);

impl VmName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for VmName {
    type Error = VmNameError;

    fn try_from(text: String) -> Result<Self, VmNameError> {
        let fits = (1..=VM_NAME_BYTES_MAX).contains(&text.len());
        let clean = text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
        let begins = text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
        if fits && clean && begins {
            Ok(Self(text))
        } else {
            Err(VmNameError(text.chars().take(VM_NAME_BYTES_MAX + 1).collect()))
        }
    }
}

impl std::str::FromStr for VmName {
    type Err = VmNameError;

    fn from_str(text: &str) -> Result<Self, VmNameError> {
        Self::try_from(text.to_owned())
    }
}

impl From<VmName> for String {
    fn from(name: VmName) -> Self {
        name.0
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_their_folder_are_refused() {
        for bad in ["", "../x", ".hidden", "a/b", "a b", "-x", &"x".repeat(65)] {
            assert!(bad.parse::<VmName>().is_err(), "{bad:?}");
        }
        for good in ["vm1", "web.example-2_a", &"x".repeat(64)] {
            assert!(good.parse::<VmName>().is_ok(), "{good:?}");
        }
    }

    #[test]
    fn vm_ids_read_back_from_hex() {
        let id = VmId([0xa5; 16]);
        assert_eq!(VmId::from_hex(&id.to_string()), Some(id));
        assert_eq!(VmId::from_hex("a5"), None);
        assert_eq!(VmId::from_hex(&"é".repeat(16)), None);
    }
}
