//! The control API: HTTP with JSON over the VM's Unix socket. It answers during a migration.

use std::convert::Infallible;
use std::sync::Arc;

use anyhow::Context;
use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, put};
use axum::{Json, Router};
use bytes::Bytes;
use ferry_vmm::unix_listener::{self, SocketFile};
use tokio::net::UnixListener;

use super::migration::{self, MigrationTask};
use super::{Life, Refused, VmHost};
use crate::api::{
    self, BandwidthRequest, ErrorBody, GuestReport, MigrationEvent, MigrationRequest, ResolveRequest, VmInfo,
};
use crate::state_dir::StateDir;

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        (StatusCode::CONFLICT, Json(ErrorBody { error: self.0 })).into_response()
    }
}

/// The socket, and its file, which goes with it. Only the user who hosts the VM reaches it, whatever the umask is.
pub(crate) struct ControlSocket {
    listener: UnixListener,
    _file: SocketFile,
}

/// Serves `host`'s socket until the process is to end and every answer under way is given.
pub(crate) async fn serve(host: Arc<VmHost>, socket: ControlSocket) -> anyhow::Result<()> {
    let ended = Arc::clone(&host);
    let ControlSocket { listener, _file } = socket;
    axum::serve(listener, routes(host))
        .with_graceful_shutdown(async move { ended.until_ended().await })
        .await
        .context("the control socket failed")
}

/// Binds `host`'s control socket.
pub(crate) fn bind(state: &StateDir, host: &VmHost) -> anyhow::Result<ControlSocket> {
    let path = state.socket(&host.name);
    let listening = unix_listener::listen_at(&path).and_then(|(listener, file)| {
        Ok(ControlSocket { listener: UnixListener::from_std(listener)?, _file: file })
    });
    listening.with_context(|| format!("can't make the control socket {}", path.display()))
}

fn routes(host: Arc<VmHost>) -> Router {
    Router::new()
        .route(api::VM, get(info))
        .route(api::PAUSE, put(pause))
        .route(api::RESUME, put(resume))
        .route(api::STOP, put(stop))
        .route(api::RESOLVE, put(resolve))
        .route(api::POWER_BUTTON, put(power_button))
        .route(api::GUEST, get(guest))
        .route(api::MIGRATION, axum::routing::post(start).delete(cancel))
        .route(api::MIGRATION_BANDWIDTH, put(bandwidth))
        .route(api::MIGRATION_EVENTS, get(events))
        .with_state(host)
}

async fn info(State(host): State<Arc<VmHost>>) -> Json<VmInfo> {
    Json(host.info())
}

async fn guest(State(host): State<Arc<VmHost>>) -> Result<Json<GuestReport>, Refused> {
    host.guest_report().map(Json)
}

/// Runs `work`, which may block, and answers with the VM's state afterwards.
async fn change(
    host: Arc<VmHost>,
    work: impl FnOnce(&VmHost) -> Result<(), Refused> + Send + 'static,
) -> Result<Json<VmInfo>, Refused> {
    let worker = Arc::clone(&host);
    tokio::task::spawn_blocking(move || work(&worker))
        .await
        .map_err(|error| Refused(format!("it failed within ferry: {error}")))??;
    Ok(Json(host.info()))
}

async fn pause(State(host): State<Arc<VmHost>>) -> Result<Json<VmInfo>, Refused> {
    change(host, VmHost::pause).await
}

async fn resume(State(host): State<Arc<VmHost>>) -> Result<Json<VmInfo>, Refused> {
    change(host, VmHost::resume).await
}

async fn stop(State(host): State<Arc<VmHost>>) -> Result<Json<VmInfo>, Refused> {
    change(host, |host| host.stop("it was stopped")).await
}

async fn power_button(State(host): State<Arc<VmHost>>) -> Result<Json<VmInfo>, Refused> {
    change(host, VmHost::press_power_button).await
}

async fn resolve(
    State(host): State<Arc<VmHost>>,
    Json(request): Json<ResolveRequest>,
) -> Result<StatusCode, Refused> {
    host.resolve(request.decision.into())?;
    Ok(StatusCode::ACCEPTED)
}

async fn start(
    State(host): State<Arc<VmHost>>,
    Json(request): Json<MigrationRequest>,
) -> Result<Response, Refused> {
    let task = migration::start(&host, request)?;
    Ok((StatusCode::ACCEPTED, stream(task)).into_response())
}

async fn cancel(State(host): State<Arc<VmHost>>) -> Result<StatusCode, Refused> {
    current(&host)?.cancel();
    Ok(StatusCode::ACCEPTED)
}

async fn bandwidth(
    State(host): State<Arc<VmHost>>,
    Json(request): Json<BandwidthRequest>,
) -> Result<StatusCode, Refused> {
    current(&host)?.set_bandwidth(request.bytes_per_s)?;
    Ok(StatusCode::NO_CONTENT)
}

async fn events(State(host): State<Arc<VmHost>>) -> Result<Response, Refused> {
    Ok(stream(current(&host)?).into_response())
}

fn current(host: &VmHost) -> Result<Arc<MigrationTask>, Refused> {
    let none = || Refused(format!("'{}' has not been asked to migrate", host.name));
    match &*host.life() {
        Life::Here(here) => here.migration.clone().ok_or_else(none),
        Life::Gone { last, .. } => Ok(Arc::clone(last)),
        Life::Waiting { .. } | Life::Receiving { .. } | Life::Ended { .. } => Err(none()),
    }
}

/// A migration's events from its start to its end, one JSON object a line.
fn stream(task: Arc<MigrationTask>) -> impl IntoResponse {
    let position = Some((task, 0usize, (0, 0)));
    let lines = futures::stream::unfold(position, |position| async {
        let (task, from, seen) = position?;
        let (events, transferred) = task.next_events(from, seen).await;
        let mut text = Vec::new();
        if transferred != seen {
            let (round_pages, wire_bytes) = transferred;
            line(&mut text, &MigrationEvent::Transferred { round_pages, wire_bytes });
        }
        events.iter().for_each(|event| line(&mut text, event));
        let over = events.last().is_some_and(MigrationEvent::is_last);
        let next = (!over).then(|| (task, from + events.len(), transferred));
        Some((Ok::<_, Infallible>(Bytes::from(text)), next))
    });
    ([("content-type", "application/x-ndjson")], Body::from_stream(lines))
}

fn line(text: &mut Vec<u8>, event: &MigrationEvent) {
    serde_json::to_writer(&mut *text, event).expect("our own types have a JSON form");
    text.push(b'\n');
}
