//! Why words are not a workload. The errors keep a copy of the word, as there is no allocator to borrow from.

use core::fmt;

/// A copy of the word that an error is about, cut after [`Word::LEN_MAX`] bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Word {
    bytes: [u8; Self::LEN_MAX],
    len: u8,
}

impl Word {
    /// Longest word that is kept whole, bytes.
    pub const LEN_MAX: usize = 47;

    pub(super) fn new(word: &str) -> Self {
        let mut kept = Self { bytes: [0; Self::LEN_MAX], len: 0 };
        for piece in word.chars() {
            let at = usize::from(kept.len);
            let Some(room) = kept.bytes.get_mut(at..at + piece.len_utf8()) else { break };
            piece.encode_utf8(room);
            kept.len = u8::try_from(at + piece.len_utf8()).unwrap_or(kept.len);
        }
        kept
    }

    /// The word.
    #[must_use]
    pub fn as_str(&self) -> &str {
        // Only whole characters were put in, so this always is UTF-8.
        core::str::from_utf8(&self.bytes[..usize::from(self.len)]).unwrap_or_default()
    }
}

impl fmt::Debug for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.as_str())
    }
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why words are not a workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WorkloadError {
    /// There are no words.
    Empty,
    /// The first word is not a mode.
    UnknownMode {
        /// The word.
        word: Word,
    },
    /// A word is not `key=value`.
    NotKeyValue {
        /// The word.
        word: Word,
    },
    /// The mode has no such key.
    UnknownKey {
        /// The word.
        word: Word,
        /// The mode.
        mode: &'static str,
        /// Keys that it has.
        allowed: &'static str,
    },
    /// A key is given twice.
    Repeated {
        /// The second word.
        word: Word,
    },
    /// A value is out of range or malformed.
    BadValue {
        /// The word.
        word: Word,
        /// What would be right.
        allowed: &'static str,
    },
    /// A key that the mode can't do without is missing.
    Missing {
        /// The mode.
        mode: &'static str,
        /// The key, with the form of its value.
        key: &'static str,
    },
    /// The shares of a fill don't add up to 100 percent.
    Shares {
        /// What they add up to.
        total: u32,
    },
}

impl fmt::Display for WorkloadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => write!(f, "the workload has no words; start with {MODES}"),
            Self::UnknownMode { word } => write!(f, "unknown workload '{word}'; there are {MODES}"),
            Self::NotKeyValue { word } => write!(f, "workload word '{word}' is not of the form key=value"),
            Self::UnknownKey { word, mode, allowed } => {
                write!(f, "workload '{mode}' does not know '{word}'; it takes {allowed}")
            }
            Self::Repeated { word } => write!(f, "workload word '{word}' gives its key a second time"),
            Self::BadValue { word, allowed } => {
                write!(f, "workload word '{word}': the value must be {allowed}")
            }
            Self::Missing { mode, key } => write!(f, "workload '{mode}' needs {key}"),
            Self::Shares { total } => {
                write!(f, "workload: zero=, text= and random= add up to {total} percent, they must make 100")
            }
        }
    }
}

impl core::error::Error for WorkloadError {}

const MODES: &str = "idle, dirty, fill, http";
