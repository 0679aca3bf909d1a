//! The two ends of a data stream, each a thread's own socket: plain, where pages go straight between socket and guest
//! memory, or within TLS, where they are encrypted and decrypted on the way.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;

use ferry_protocol::{PAGE_BYTES, PageRange};
use rustls::{ClientConnection, ServerConnection};

use crate::ports::GuestPages;

/// What is encrypted at once: four records of the largest kind, which still fit the processor's second cache.
const ENCRYPT_BYTES: usize = 64 << 10;

/// What is taken from the socket at once.
const RECEIVE_BYTES: usize = 256 << 10;

/// The source's end.
#[derive(Debug)]
pub(crate) struct DataWriter {
    socket: TcpStream,
    tls: Option<Box<Encryption>>,
}

#[derive(Debug)]
struct Encryption {
    connection: ClientConnection,
    /// What is not encrypted yet, less than [`ENCRYPT_BYTES`] and a page.
    plain: Vec<u8>,
}

impl DataWriter {
    pub(crate) const fn plain(socket: TcpStream) -> Self {
        Self { socket, tls: None }
    }

    pub(crate) fn tls(socket: TcpStream, connection: ClientConnection) -> Self {
        let plain = Vec::with_capacity(ENCRYPT_BYTES + PAGE_BYTES);
        Self { socket, tls: Some(Box::new(Encryption { connection, plain })) }
    }

    pub(crate) const fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// Writes `bytes`, all of them.
    pub(crate) fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Some(tls) = &mut self.tls else { return self.socket.write_all(bytes) };
        tls.put(bytes, &mut self.socket)?;
        tls.flush(&mut self.socket)
    }

    /// Writes `header` and then the pages of `ranges`, all of them.
    pub(crate) fn send(
        &mut self,
        pages: &dyn GuestPages,
        header: &[u8],
        ranges: &[PageRange],
    ) -> io::Result<()> {
        let Self { socket, tls } = self;
        let Some(tls) = tls else { return pages.send(socket.as_fd(), header, ranges) };
        tls.put(header, socket)?;
        for &range in ranges {
            let mut failed = None;
            pages.for_each_page(range, &mut |_, bytes| {
                if failed.is_none() {
                    failed = tls.put(bytes, socket).err();
                }
            });
            failed.map_or(Ok(()), Err)?;
        }
        tls.flush(socket)
    }
}

impl Encryption {
    fn put(&mut self, bytes: &[u8], socket: &mut TcpStream) -> io::Result<()> {
        for piece in bytes.chunks(ENCRYPT_BYTES) {
            self.plain.extend_from_slice(piece);
            if self.plain.len() >= ENCRYPT_BYTES {
                self.flush(socket)?;
            }
        }
        Ok(())
    }

    fn flush(&mut self, socket: &mut TcpStream) -> io::Result<()> {
        let mut rest = self.plain.as_slice();
        while !rest.is_empty() {
            let taken = self.connection.writer().write(rest)?;
            rest = &rest[taken..];
            while self.connection.wants_write() {
                match self.connection.write_tls(socket) {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
        }
        self.plain.clear();
        Ok(())
    }
}

/// The target's end.
#[derive(Debug)]
pub(crate) struct DataReader {
    inner: Inner,
}

#[derive(Debug)]
enum Inner {
    Plain(TcpStream),
    Tls(Box<Decryption>),
}

#[derive(Debug)]
struct Decryption {
    socket: BufReader<TcpStream>,
    connection: ServerConnection,
}

impl DataReader {
    pub(crate) const fn plain(socket: TcpStream) -> Self {
        Self { inner: Inner::Plain(socket) }
    }

    pub(crate) fn tls(socket: TcpStream, connection: ServerConnection) -> Self {
        let socket = BufReader::with_capacity(RECEIVE_BYTES, socket);
        Self { inner: Inner::Tls(Box::new(Decryption { socket, connection })) }
    }

    pub(crate) fn socket(&self) -> &TcpStream {
        match &self.inner {
            Inner::Plain(socket) => socket,
            Inner::Tls(decryption) => decryption.socket.get_ref(),
        }
    }

    /// Fills `bytes`.
    pub(crate) fn read_exact(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        match &mut self.inner {
            Inner::Plain(socket) => socket.read_exact(bytes),
            Inner::Tls(decryption) => decryption.read_exact(bytes),
        }
    }

    /// Reads the pages of `ranges`, all of them.
    pub(crate) fn receive(&mut self, pages: &dyn GuestPages, ranges: &[PageRange]) -> io::Result<()> {
        match &mut self.inner {
            Inner::Plain(socket) => pages.receive(socket.as_fd(), ranges),
            Inner::Tls(decryption) => decryption.receive(pages, ranges),
        }
    }
}

impl Decryption {
    fn receive(&mut self, pages: &dyn GuestPages, ranges: &[PageRange]) -> io::Result<()> {
        let mut page = [0; PAGE_BYTES];
        for number in ranges.iter().flat_map(|range| range.first()..range.first() + range.count()) {
            let mut reader = self.connection.reader();
            // A whole page of what is decrypted already goes straight into guest memory.
            if let Ok(chunk) = reader.fill_buf()
                && let Some(bytes) = chunk.first_chunk::<PAGE_BYTES>()
            {
                pages.write(number, bytes);
                reader.consume(PAGE_BYTES);
                continue;
            }
            self.read_exact(&mut page)?;
            pages.write(number, &page);
        }
        Ok(())
    }

    /// Decrypts what comes next.
    fn fill(&mut self) -> io::Result<()> {
        self.connection.read_tls(&mut self.socket)?;
        self.connection
            .process_new_packets()
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, super::tls::in_words(&error)))?;
        // An answer of TLS itself, as to a change of keys.
        while self.connection.wants_write() {
            self.connection.write_tls(self.socket.get_mut())?;
        }
        Ok(())
    }
}

impl Read for Decryption {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.connection.reader().read(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.fill()?,
                read => return read,
            }
        }
    }
}
