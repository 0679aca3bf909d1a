//! The API of Cloud Hypervisor: HTTP over a Unix socket, one connection a request.
//!
//! Source: `vmm/src/api/openapi/cloud-hypervisor.yaml` of Cloud Hypervisor.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;

/// The longest answer that is taken, in bytes.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// How much of a refusal is quoted, in characters.
const QUOTE_CHARS: usize = 500;

/// Why a request came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// Nobody answers at the socket.
    #[error("can't connect to the API at {socket}")]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// There is no runtime or thread for the request.
    #[error("can't ask for {what}")]
    Start {
        /// The request.
        what: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The connection broke, or what came is no HTTP.
    #[error("the API broke during {what}")]
    Broken {
        /// The request.
        what: String,
        /// What hyper said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No answer came in time.
    #[error("the API did not answer {what} within {waited_ms} ms")]
    Timeout {
        /// The request.
        what: String,
        /// How long it was waited for, in ms.
        waited_ms: u128,
    },
    /// The request was refused.
    #[error("{what} was refused with {status}: {words}")]
    Refused {
        /// The request.
        what: String,
        /// The HTTP status.
        status: StatusCode,
        /// What the body says.
        words: String,
    },
    /// The answer is no JSON.
    #[error("what came for {what} is no JSON")]
    NotJson {
        /// The request.
        what: String,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
}

/// The API of one process.
#[derive(Debug, Clone)]
pub struct Api {
    socket: PathBuf,
}

impl Api {
    /// That at `socket`; it is connected to with every request.
    #[must_use]
    pub fn at(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// Asks for `name`; what comes back, which is `null` if there is nothing to say.
    ///
    /// # Errors
    /// [`ApiError`].
    pub fn get(&self, name: &str, timeout: Duration) -> Result<Value, ApiError> {
        self.request(Method::GET, name, Bytes::new(), Some(timeout))
    }

    /// Orders `name` and does not wait: what comes of it can be received later.
    ///
    /// # Errors
    /// [`ApiError::Start`].
    pub fn put(&self, name: &str, body: &Value) -> Result<Receiver<Result<Value, ApiError>>, ApiError> {
        let (done, answer) = mpsc::channel();
        let (api, order, text) = (self.clone(), name.to_owned(), Bytes::from(body.to_string()));
        let ask = move || {
            // Whoever ordered it may not care any more.
            let _ = done.send(api.request(Method::PUT, &order, text, None));
        };
        thread::Builder::new()
            .name("api".to_owned())
            .spawn(ask)
            .map_err(|source| ApiError::Start { what: name.to_owned(), source })?;
        Ok(answer)
    }

    fn request(
        &self,
        method: Method,
        name: &str,
        body: Bytes,
        timeout: Option<Duration>,
    ) -> Result<Value, ApiError> {
        let what = || name.to_owned();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|source| ApiError::Start { what: what(), source })?;
        runtime.block_on(async {
            let Some(timeout) = timeout else { return self.exchange(method, name, body).await };
            tokio::time::timeout(timeout, self.exchange(method, name, body))
                .await
                .map_err(|_| ApiError::Timeout { what: what(), waited_ms: timeout.as_millis() })?
        })
    }

    async fn exchange(&self, method: Method, name: &str, body: Bytes) -> Result<Value, ApiError> {
        let what = || name.to_owned();
        let broken = |source| ApiError::Broken { what: what(), source };
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|source| ApiError::Connect { socket: self.socket.clone(), source })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| broken(error.into()))?;
        // It ends with the runtime.
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(format!("/api/v1/{name}"))
            .header("host", "localhost")
            .header("content-type", "application/json")
            .body(Full::new(body))
            .map_err(|error| broken(error.into()))?;
        let response = sender.send_request(request).await.map_err(|error| broken(error.into()))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await.map_err(broken)?;
        let bytes = body.to_bytes();
        if !status.is_success() {
            let words: String = String::from_utf8_lossy(&bytes).chars().take(QUOTE_CHARS).collect();
            return Err(ApiError::Refused { what: what(), status, words });
        }
        if bytes.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&bytes).map_err(|source| ApiError::NotJson { what: what(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    /// Answers one request; what it was.
    fn answer(answer: &'static str) -> (tempfile::TempDir, Api, thread::JoinHandle<String>) {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("api");
        let listener = UnixListener::bind(&socket).unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = vec![0; 4096];
            let length = stream.read(&mut request).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
            // Until the client has had enough.
            let _ = stream.read(&mut request);
            String::from_utf8_lossy(&request[..length]).into_owned()
        });
        let api = Api::at(&socket);
        (folder, api, server)
    }

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn requests_are_http_and_answers_are_read() {
        let (_folder, api, server) = answer("HTTP/1.1 200 \r\nContent-Length: 13\r\n\r\n{\"pid\": 1234}");
        assert_eq!(api.get("vmm.ping", LONG).unwrap()["pid"], 1234);
        assert!(server.join().unwrap().starts_with("GET /api/v1/vmm.ping HTTP/1.1\r\n"));
        let (_folder, api, server) = answer("HTTP/1.1 204 \r\nConnection: keep-alive\r\n\r\n");
        let body = serde_json::json!({ "destination_url": "tcp:[::1]:7" });
        let answer = api.put("vm.send-migration", &body).unwrap();
        assert_eq!(answer.recv_timeout(LONG).unwrap().unwrap(), Value::Null);
        let request = server.join().unwrap();
        assert!(request.starts_with("PUT /api/v1/vm.send-migration"), "{request}");
        assert!(request.ends_with(&body.to_string()), "{request}");
    }

    #[test]
    fn refusals_are_quoted_and_silence_ends() {
        let (_folder, api, _server) =
            answer("HTTP/1.1 500 \r\nContent-Length: 17\r\n\r\n[\"VM is not here\"");
        let error = api.get("vm.info", LONG).unwrap_err().to_string();
        assert!(error.contains("vm.info") && error.contains("500") && error.contains("not here"), "{error}");
        let (_folder, api, _server) = answer("");
        assert!(matches!(api.get("vm.info", Duration::from_millis(50)), Err(ApiError::Timeout { .. })));
        let (_folder, api, _server) = answer("HTTP/1.1 200 \r\nContent-Length: 3\r\n\r\nyes");
        assert!(matches!(api.get("vm.info", LONG), Err(ApiError::NotJson { .. })));
        let nowhere = Api::at(Path::new("/nowhere/api"));
        assert!(matches!(nowhere.get("vmm.ping", LONG), Err(ApiError::Connect { .. })));
    }
}
