//! The lines that the agent and whoever asks it exchange over TCP, easy to type by hand.
//!
//! ```text
//!   request   memory start mib=8 rate=1000
//!   answer    ok checked=2048 errors=0; and what a person may want to read
//!   or        error there is no such load
//! ```

use std::fmt::{self, Display};

/// The longest line that either side reads, in bytes.
pub const LINE_BYTES_MAX: u64 = 4096;

/// The fields of an answer, and a sentence if there is something to say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    fields: Vec<(String, String)>,
    note: String,
}

impl Answer {
    /// The same with another field.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Display) -> Self {
        self.fields.push((name.into(), value.to_string()));
        self
    }

    /// The same with a sentence; what would end the line is taken out of it.
    #[must_use]
    pub fn noting(mut self, note: &str) -> Self {
        self.note = note.replace(['\n', '\r'], " ");
        self
    }

    /// The sentence, or nothing.
    #[must_use]
    pub fn note(&self) -> &str {
        &self.note
    }

    /// The number in field `name`.
    ///
    /// # Errors
    /// A sentence, if there is no such field or no number in it.
    pub fn number(&self, name: &str) -> Result<i64, String> {
        let found = self.fields.iter().find(|(field, _)| field == name);
        let (_, value) = found.ok_or_else(|| format!("the answer '{self}' has no field '{name}'"))?;
        value.parse().map_err(|_| format!("'{name}={value}' of the answer is no whole number"))
    }

    /// Reads an answer.
    ///
    /// # Errors
    /// The agent's own sentence if it refused, or that the line is no answer.
    pub fn parse(line: &str) -> Result<Self, String> {
        let line = line.trim_end();
        if let Some(refusal) = line.strip_prefix("error ") {
            return Err(refusal.to_owned());
        }
        let rest = line.strip_prefix("ok").ok_or_else(|| format!("'{line}' is no answer"))?;
        let (fields, note) = rest.split_once(';').unwrap_or((rest, ""));
        Ok(Self { fields: words(fields)?, note: note.trim_start().to_owned() })
    }
}

impl Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ok")?;
        for (name, value) in &self.fields {
            write!(f, " {name}={value}")?;
        }
        if self.note.is_empty() { Ok(()) } else { write!(f, "; {}", self.note) }
    }
}

/// The words `name=value` of a line.
///
/// # Errors
/// Which word is none.
pub fn words(line: &str) -> Result<Vec<(String, String)>, String> {
    let pair = |word: &str| {
        let (name, value) = word.split_once('=').ok_or_else(|| format!("'{word}' is not name=value"))?;
        Ok((name.to_owned(), value.to_owned()))
    };
    line.split_whitespace().map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_reads_back() {
        let answer = Answer::default().with("errors", 0).with("offset_us", -3).noting("a; b\nc");
        let line = answer.to_string();
        assert_eq!(line, "ok errors=0 offset_us=-3; a; b c");
        let read = Answer::parse(&line).unwrap();
        assert_eq!((read.number("errors"), read.number("offset_us"), read.note()), (Ok(0), Ok(-3), "a; b c"));
        assert!(read.number("other").unwrap_err().contains("'other'"));
    }

    #[test]
    fn a_refusal_is_an_error_and_so_is_what_is_no_answer() {
        assert_eq!(Answer::parse("error no such load\n"), Err("no such load".into()));
        assert!(Answer::parse("HTTP/1.1 200").is_err());
        assert!(Answer::parse("ok word").is_err());
        assert!(Answer::parse("ok a=x").unwrap().number("a").is_err());
    }
}
