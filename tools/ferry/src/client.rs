//! Talks to a VM's control socket.

use anyhow::{Context, bail};
use bytes::Bytes;
use ferry_migrate::protocol::VmName;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::api::{ErrorBody, MigrationEvent};
use crate::state_dir::StateDir;

/// Sends one request to `name`'s host process.
async fn send(
    state: &StateDir,
    name: &VmName,
    method: Method,
    path: &str,
    body: Option<&impl Serialize>,
) -> anyhow::Result<Response<Incoming>> {
    let socket = state.socket(name);
    let stream = match UnixStream::connect(&socket).await {
        Ok(stream) => stream,
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            return Err(error).with_context(|| format!("no permission to use {}", socket.display()));
        }
        Err(_) => bail!(
            "there is no VM '{name}' on this host (nothing answers at {}); 'ferry list' shows what there is",
            socket.display()
        ),
    };
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let request = Request::builder().method(method).uri(path).header("host", "ferry");
    let request = match body {
        Some(body) => request
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(serde_json::to_vec(body)?)))?,
        None => request.body(Full::default())?,
    };
    let response = sender.send_request(request).await.with_context(|| format!("'{name}' did not answer"))?;
    if response.status().is_success() {
        return Ok(response);
    }
    let status = response.status();
    let bytes = response.into_body().collect().await?.to_bytes();
    match serde_json::from_slice::<ErrorBody>(&bytes) {
        Ok(body) => bail!("{}", body.error),
        Err(_) => bail!("'{name}' answered {status}: {}", String::from_utf8_lossy(&bytes)),
    }
}

/// Sends a request and reads the JSON that comes back.
pub(crate) async fn call<T: DeserializeOwned>(
    state: &StateDir,
    name: &VmName,
    method: Method,
    path: &str,
) -> anyhow::Result<T> {
    let response = send(state, name, method, path, None::<&()>).await?;
    let bytes = response.into_body().collect().await?.to_bytes();
    serde_json::from_slice(&bytes).with_context(|| format!("'{name}' answered what can't be read"))
}

/// Sends a request whose answer has no body.
pub(crate) async fn tell(state: &StateDir, name: &VmName, method: Method, path: &str) -> anyhow::Result<()> {
    tell_with(state, name, method, path, None::<&()>).await
}

/// The same, with a body.
pub(crate) async fn tell_with(
    state: &StateDir,
    name: &VmName,
    method: Method,
    path: &str,
    body: Option<&impl Serialize>,
) -> anyhow::Result<()> {
    send(state, name, method, path, body).await.map(drop)
}

/// A stream of migration events.
pub(crate) struct Events {
    body: Incoming,
    buffer: Vec<u8>,
}

/// Starts what answers with migration events.
pub(crate) async fn events(
    state: &StateDir,
    name: &VmName,
    method: Method,
    path: &str,
    body: Option<&impl Serialize>,
) -> anyhow::Result<Events> {
    let response = send(state, name, method, path, body).await?;
    Ok(Events { body: response.into_body(), buffer: Vec::new() })
}

impl Events {
    /// The next event; `None` if the host process is gone.
    pub(crate) async fn next(&mut self) -> anyhow::Result<Option<MigrationEvent>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return Ok(Some(serde_json::from_slice(&line).context("an event can't be read")?));
            }
            match self.body.frame().await {
                Some(frame) => {
                    if let Ok(data) = frame.context("the host process broke off")?.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
                None => return Ok(None),
            }
        }
    }
}
