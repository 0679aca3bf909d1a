//! One HTTP/1.1 connection whose received bytes are metered, and one checked exchange over it.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::{fmt, io};

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{CONNECTION, HOST};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::{ExpectedBody, FailureKind, HttpTarget};

/// The largest body that is taken where none is expected.
const BODY_BYTES_MAX: usize = 64 << 20;

/// Why a request got no right answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RequestError {
    #[error("can't connect: {0}")]
    Connect(#[source] io::Error),
    #[error("the connection broke: {}", innermost(.0))]
    Broken(#[source] hyper::Error),
    #[error("the status is {0}")]
    Status(StatusCode),
    #[error("the body has {got} bytes instead of {expected}")]
    Length { got: u64, expected: u64 },
    #[error("the body differs from what is expected, between bytes {from} and {to}")]
    Content { from: usize, to: usize },
    #[error("the body is longer than {BODY_BYTES_MAX} bytes")]
    TooLong,
    #[error("'{0}' is no path that can be asked for")]
    Path(String),
}

impl RequestError {
    pub(crate) fn kind(&self) -> FailureKind {
        match self {
            Self::Connect(_) => FailureKind::Connect,
            Self::Broken(_) => FailureKind::Broken,
            Self::Status(_) => FailureKind::Status,
            Self::Length { .. } | Self::TooLong => FailureKind::Length,
            Self::Content { .. } => FailureKind::Content,
            Self::Path(_) => FailureKind::Request,
        }
    }
}

/// hyper's own sentence seldom says more than "connection error"; the cause below it does.
fn innermost(error: &hyper::Error) -> String {
    let mut deepest: &dyn std::error::Error = error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    deepest.to_string()
}

/// Told of every piece of data that arrives on a connection.
#[derive(Clone)]
pub(crate) struct ByteMeter(Option<Arc<dyn Fn(u64) + Send + Sync>>);

impl ByteMeter {
    pub(crate) fn new(received: impl Fn(u64) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(received)))
    }

    pub(crate) fn none() -> Self {
        Self(None)
    }
}

impl fmt::Debug for ByteMeter {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("ByteMeter")
    }
}

/// A keep-alive connection.
#[derive(Debug)]
pub(crate) struct Client {
    sender: SendRequest<Empty<Bytes>>,
    closing: bool,
}

impl Client {
    /// Connects to the target. `meter` is told of what arrives.
    pub(crate) async fn connect(target: &HttpTarget, meter: ByteMeter) -> Result<Self, RequestError> {
        let stream = TcpStream::connect(target.address).await.map_err(RequestError::Connect)?;
        stream.set_nodelay(true).map_err(RequestError::Connect)?;
        let io = TokioIo::new(MeteredStream { stream, meter });
        let (sender, connection) = http1::handshake(io).await.map_err(RequestError::Broken)?;
        // It ends when the sender is dropped; its error comes back from the request as well.
        tokio::spawn(connection);
        Ok(Self { sender, closing: false })
    }

    /// Whether the server keeps the connection open for another request.
    pub(crate) fn is_reusable(&self) -> bool {
        !self.closing && !self.sender.is_closed()
    }

    /// Asks once and checks the answer; returns its body, empty unless any body is right.
    pub(crate) async fn exchange(&mut self, target: &HttpTarget) -> Result<Bytes, RequestError> {
        let request = Request::get(target.path.as_str())
            .header(HOST, target.address.to_string())
            .body(Empty::new())
            .map_err(|_| RequestError::Path(target.path.clone()))?;
        self.sender.ready().await.map_err(RequestError::Broken)?;
        let response = self.sender.send_request(request).await.map_err(RequestError::Broken)?;
        if response.status() != StatusCode::OK {
            return Err(RequestError::Status(response.status()));
        }
        let connection = response.headers().get(CONNECTION);
        self.closing = connection.is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"close"));
        check_body(response, &target.body).await
    }
}

async fn check_body(
    mut response: Response<Incoming>,
    expected: &ExpectedBody,
) -> Result<Bytes, RequestError> {
    let mut kept = BytesMut::new();
    let mut got = 0;
    while let Some(frame) = response.body_mut().frame().await {
        let frame = frame.map_err(RequestError::Broken)?;
        let Some(data) = frame.data_ref() else { continue };
        match expected {
            ExpectedBody::Any => kept.extend_from_slice(data),
            ExpectedBody::Length(_) => {}
            ExpectedBody::Exactly(right) => {
                let to = got + data.len();
                if right.get(got..to).is_some_and(|right| right != &data[..]) {
                    return Err(RequestError::Content { from: got, to });
                }
            }
        }
        got += data.len();
        if kept.len() > BODY_BYTES_MAX {
            return Err(RequestError::TooLong);
        }
    }
    let got = got as u64;
    match expected {
        ExpectedBody::Any => Ok(kept.freeze()),
        ExpectedBody::Length(expected) if got != *expected => {
            Err(RequestError::Length { got, expected: *expected })
        }
        ExpectedBody::Exactly(right) if got != right.len() as u64 => {
            Err(RequestError::Length { got, expected: right.len() as u64 })
        }
        ExpectedBody::Length(_) | ExpectedBody::Exactly(_) => Ok(Bytes::new()),
    }
}

struct MeteredStream {
    stream: TcpStream,
    meter: ByteMeter,
}

impl AsyncRead for MeteredStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let outcome = Pin::new(&mut self.stream).poll_read(context, buffer);
        let received = buffer.filled().len() - before;
        if let (Some(meter), true) = (&self.meter.0, received > 0) {
            meter(received as u64);
        }
        outcome
    }
}

impl AsyncWrite for MeteredStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
