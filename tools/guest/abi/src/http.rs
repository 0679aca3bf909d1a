//! The HTTP that the guest speaks: reading a request's head, writing a response's.
//!
//! `GET` and `HEAD` of one file with HTTP/1.1 keep-alive, and 404 for the rest. No request bodies, no
//! ranges, no chunks. Pure functions over bytes; connections and buffers are the guest's.

use crate::{HTTP_FILE_LEN, HTTP_FILE_PATH};
use core::fmt::{self, Write};

/// Longest request head that is read, bytes.
pub const REQUEST_HEAD_LEN_MAX: usize = 2048;

/// Longest response head that is written, bytes.
pub const RESPONSE_HEAD_LEN_MAX: usize = 160;

/// How a request is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Status {
    /// The file.
    Ok = 200,
    /// Not HTTP, or a request with a body.
    BadRequest = 400,
    /// Another path.
    NotFound = 404,
    /// Neither GET nor HEAD.
    MethodNotAllowed = 405,
    /// The head is longer than [`REQUEST_HEAD_LEN_MAX`].
    HeadTooLong = 431,
}

impl Status {
    const fn reason(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::BadRequest => "Bad Request",
            Self::NotFound => "Not Found",
            Self::MethodNotAllowed => "Method Not Allowed",
            Self::HeadTooLong => "Request Header Fields Too Large",
        }
    }
}

/// What to send for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// The status.
    pub status: Status,
    /// Whether the body follows; `HEAD` only wants to know its length.
    pub sends_body: bool,
    /// Whether the connection stays open for another request.
    pub keep_alive: bool,
}

impl Answer {
    /// An answer after which the connection can't go on, as nobody knows where the next request starts.
    #[must_use]
    pub const fn closing(status: Status) -> Self {
        Self { status, sends_body: false, keep_alive: false }
    }

    /// Length that the response's head announces, bytes.
    #[must_use]
    pub const fn content_len(&self) -> usize {
        match self.status {
            Status::Ok => HTTP_FILE_LEN,
            Status::BadRequest | Status::NotFound | Status::MethodNotAllowed | Status::HeadTooLong => 0,
        }
    }

    /// Length of the body that follows the head, bytes.
    #[must_use]
    pub const fn body_len(&self) -> usize {
        if self.sends_body { self.content_len() } else { 0 }
    }

    /// Writes the response's head into `out` and returns its length.
    pub fn write_head(&self, out: &mut [u8; RESPONSE_HEAD_LEN_MAX]) -> usize {
        let mut head = Head { out, len: 0 };
        let connection = if self.keep_alive { "keep-alive" } else { "close" };
        // The longest head is some 130 bytes, so nothing is ever cut off.
        let _ = write!(
            head,
            "HTTP/1.1 {} {}\r\nContent-Type: application/octet-stream\r\nContent-Length: {}\r\nConnection: {connection}\r\n\r\n",
            self.status as u16,
            self.status.reason(),
            self.content_len(),
        );
        head.len
    }
}

struct Head<'a> {
    out: &'a mut [u8; RESPONSE_HEAD_LEN_MAX],
    len: usize,
}

impl Write for Head<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = self.out.get_mut(self.len..self.len + text.len()).ok_or(fmt::Error)?;
        room.copy_from_slice(text.as_bytes());
        self.len += text.len();
        Ok(())
    }
}

/// Length of the request head at the start of `bytes`, with its empty line; `None` if it isn't complete.
#[must_use]
pub fn head_len(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|four| four == b"\r\n\r\n").map(|at| at + 4)
}

/// Decides how to answer a complete request head.
#[must_use]
pub fn answer(head: &[u8]) -> Answer {
    let Ok(head) = core::str::from_utf8(head) else { return Answer::closing(Status::BadRequest) };
    let mut lines = head.split("\r\n");
    let mut words = lines.next().unwrap_or_default().split(' ');
    let (Some(method), Some(path), Some(version), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Answer::closing(Status::BadRequest);
    };
    if !version.starts_with("HTTP/1.") {
        return Answer::closing(Status::BadRequest);
    }
    let mut keep_alive = version != "HTTP/1.0";
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        let value = value.trim();
        if name.eq_ignore_ascii_case("connection") {
            keep_alive = if keep_alive { !is_listed(value, "close") } else { is_listed(value, "keep-alive") };
        }
        let has_body = name.eq_ignore_ascii_case("content-length") && value != "0";
        if has_body || name.eq_ignore_ascii_case("transfer-encoding") {
            return Answer::closing(Status::BadRequest);
        }
    }
    let status = match method {
        "GET" | "HEAD" if path == HTTP_FILE_PATH => Status::Ok,
        "GET" | "HEAD" => Status::NotFound,
        _ => Status::MethodNotAllowed,
    };
    Answer { status, sends_body: method == "GET", keep_alive }
}

fn is_listed(values: &str, wanted: &str) -> bool {
    values.split(',').any(|value| value.trim().eq_ignore_ascii_case(wanted))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::string::String;

    fn head_of(answer: Answer) -> String {
        let mut out = [0; RESPONSE_HEAD_LEN_MAX];
        let len = answer.write_head(&mut out);
        String::from_utf8(out[..len].to_vec()).unwrap()
    }

    #[test]
    fn requests_and_their_answers() {
        let cases: [(&str, Status, bool, bool); 10] = [
            ("GET /file HTTP/1.1\r\nHost: x\r\n\r\n", Status::Ok, true, true),
            ("HEAD /file HTTP/1.1\r\n\r\n", Status::Ok, false, true),
            ("GET /file HTTP/1.1\r\nConnection: Close\r\n\r\n", Status::Ok, true, false),
            ("GET /file HTTP/1.0\r\n\r\n", Status::Ok, true, false),
            ("GET /file HTTP/1.0\r\nconnection: keep-alive\r\n\r\n", Status::Ok, true, true),
            ("GET / HTTP/1.1\r\n\r\n", Status::NotFound, true, true),
            ("PUT /file HTTP/1.1\r\nContent-Length: 0\r\n\r\n", Status::MethodNotAllowed, false, true),
            ("GET /file HTTP/1.1\r\nContent-Length: 5\r\n\r\n", Status::BadRequest, false, false),
            ("GET /file SPDY\r\n\r\n", Status::BadRequest, false, false),
            ("hello\r\n\r\n", Status::BadRequest, false, false),
        ];
        for (request, status, sends_body, keep_alive) in cases {
            assert_eq!(answer(request.as_bytes()), Answer { status, sends_body, keep_alive }, "{request:?}");
        }
    }

    #[test]
    fn heads_announce_the_length_and_end_with_an_empty_line() {
        let ok = head_of(Answer { status: Status::Ok, sends_body: true, keep_alive: true });
        assert!(ok.starts_with("HTTP/1.1 200 OK\r\n") && ok.ends_with("\r\n\r\n"), "{ok}");
        assert!(ok.contains("\r\nContent-Length: 524288\r\n"), "{ok}");
        let long = head_of(Answer::closing(Status::HeadTooLong));
        assert!(long.contains("Content-Length: 0") && long.ends_with("close\r\n\r\n"), "{long}");
    }

    #[test]
    fn a_head_is_complete_with_its_empty_line() {
        assert_eq!(head_len(b"GET / HTTP/1.1\r\n\r"), None);
        assert_eq!(head_len(b"A\r\n\r\nB\r\n\r\n"), Some(5));
    }

    proptest! {
        #[test]
        fn any_head_is_answered(head in "(GET|PUT|) ?/?f? ?(HTTP/1.[019])?.{0,8}(\r\n[a-z-]{0,9}:?.{0,5}){0,3}") {
            let _ = answer(head.as_bytes());
        }
    }
}
