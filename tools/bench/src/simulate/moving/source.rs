//! What the source's core wants done.

use std::time::Duration;

use ferry_migrate::protocol::digest::MemoryDigest;
use ferry_migrate::protocol::message::NetworkIdentity;
use ferry_migrate::protocol::source::{Action, Event, Progress, RoundReport, RoundSent};
use ferry_migrate::protocol::target as target_core;
use ferry_migrate::protocol::{PageBitmap, StreamIndex};
use ferry_migrate::report::ms;

use super::super::costs::{RoundLoad, float, round};
use super::super::hardware::Hardware;
use super::super::network::{FlowRequest, Milestone};
use super::super::run::RoundLine;
use super::{Due, Moving, Purpose, Stage, factor};

/// What TCP sends before the first acknowledgement, in bytes: ten segments (RFC 6928).
const FIRST_WINDOW_BYTES: f64 = 14_480.0;

const GIB: f64 = 1_073_741_824.0;

impl Moving {
    pub(super) fn perform_source(&mut self, action: Action, stage: &mut Stage<'_>) {
        let hardware = stage.hardware;
        match action {
            Action::Connect { delay } => {
                let at = stage.now + delay + self.handshake(stage);
                stage.at(at, Due::Source(Event::Connected));
            }
            Action::Send(message) => self.send_to_target(message, stage),
            Action::AskWitness(_) => unreachable!("there is no witness"),
            Action::SendMemory(_) => unreachable!("simulated hosts share no memory"),
            Action::OpenStreams { .. } => {
                // They are opened one after another.
                let took = self.handshake(stage) * u32::from(self.order.settings.streams);
                stage.at(stage.now + took, Due::Source(Event::StreamsOpened));
            }
            Action::CloseStreams => {
                if let Some((flow, _)) = self.flow.take() {
                    stage.network.remove_flow(flow);
                }
                self.round = None;
            }
            Action::StartDirtyLog => {
                let cost_us = hardware.log_start_us_per_gib * self.gib();
                let (began, done) = self.source_job(cost_us, stage);
                drop(self.memory.read(began));
                stage.at(done, Due::Source(Event::DirtyLogStarted));
            }
            Action::ReadDirtyLog => self.read_dirty_log(stage),
            // Nobody waits for its end.
            Action::StopDirtyLog => {}
            Action::SendPages { pages, fence, paused, first: _, whole: _ } => {
                self.send_pages(&pages, fence, paused, stage);
            }
            Action::ReopenStreams { .. } => unreachable!("simulated links do not break"),
            Action::PauseVm => {
                let cost_us = hardware.pause_us + hardware.pause_us_per_vcpu * self.cpus();
                let (began, done) = self.source_job(cost_us, stage);
                // A guest of which one vCPU stands still is not counted as running.
                self.stopped_at = Some(began);
                self.memory.stop(began);
                self.free_processors(stage.network);
                stage.at(done, Due::Source(Event::Paused));
            }
            Action::SaveState => self.save_state(stage),
            Action::ResumeVm => {
                let (_, done) = self.source_job(hardware.run_us, stage);
                self.runs_at = self.stopped_at.map(|_| done);
                stage.at(done, Due::Source(Event::VmResumed));
            }
            Action::ReleaseVm => {}
            Action::WriteRecord(_) => {
                let (began, done) = self.source_job(hardware.source_record_us, stage);
                let took = done.saturating_sub(began);
                stage.at(done, Due::Source(Event::RecordWritten { took }));
            }
            Action::RehearseRecord(_) => {
                let (began, done) = self.source_job(hardware.source_record_us, stage);
                let took = done.saturating_sub(began);
                stage.at(done, Due::Source(Event::RecordRehearsed { took }));
            }
            Action::Report(progress) => self.note(&progress, stage),
            Action::Finish(outcome) => self.outcome = Some(outcome),
        }
    }

    /// Puts a job on the thread of the source's VM; when it begins and when it is done.
    fn source_job(&mut self, cost_us: f64, stage: &Stage<'_>) -> (Duration, Duration) {
        let took = self.scattered(cost_us, stage.hardware);
        let began = self.source_side.worker_free_at.max(stage.now);
        self.source_side.worker_free_at = began + took;
        (began, began + took)
    }

    pub(super) fn gib(&self) -> f64 {
        float(self.order.guest.memory_bytes) / GIB
    }

    pub(super) fn cpus(&self) -> f64 {
        f64::from(self.order.guest.cpus)
    }

    fn read_dirty_log(&mut self, stage: &mut Stage<'_>) {
        let hardware = stage.hardware;
        // What is read is what was dirty when reading began; clearing takes longer the more there is.
        let began = self.source_side.worker_free_at.max(stage.now);
        let pages = self.memory.read(began);
        let cost_us = hardware.log_read_us
            + hardware.log_read_us_per_gib * self.gib()
            + hardware.log_clear_page_us * float(pages.count() * self.order.page_scale);
        let (began, done) = self.source_job(cost_us, stage);
        stage.at(done, Due::Source(Event::DirtyLogRead { pages, took: done.saturating_sub(began) }));
    }

    fn save_state(&mut self, stage: &mut Stage<'_>) {
        let hardware = stage.hardware;
        let (began, done) =
            self.source_job(hardware.save_us + hardware.save_us_per_vcpu * self.cpus(), stage);
        let bytes = round(hardware.state_bytes + hardware.state_bytes_per_vcpu * self.cpus());
        let state = vec![0; usize::try_from(bytes).unwrap_or(usize::MAX)];
        let (network, runs) = (NetworkIdentity::default(), true);
        let saved = Event::StateSaved { state, network, runs, took: done.saturating_sub(began) };
        stage.at(done, Due::Source(saved));
    }

    fn send_pages(&mut self, pages: &PageBitmap, fence: u32, paused: bool, stage: &mut Stage<'_>) {
        let page_factor = factor(stage.hardware.page_jitter, &mut self.random);
        let costs = if self.order.route.switched { stage.hardware.behind_switch() } else { *stage.hardware };
        let hardware = slower(&costs, page_factor);
        let settings = &self.order.settings;
        let first = fence == 1;
        let how = (settings.streams, settings.compression);
        let work =
            RoundLoad::new((pages, self.order.page_scale), first, &self.order.guest, how).work(&hardware);
        let route = &self.order.route;
        let bytes = float(work.sent.wire_bytes);
        let mut rate_max = (bytes / work.slowest_s.max(1e-9)).min(route.window_rate(work.streams, &hardware));
        if let (Some(cap), false) = (settings.bandwidth_bytes_per_s, paused) {
            rate_max = rate_max.min(cap);
        }
        let mut uses: Vec<_> =
            route.forward.iter().map(|&resource| (resource, hardware.wire_overhead)).collect();
        uses.push((route.source_cpu, work.source_cpu_s / bytes));
        uses.push((route.target_cpu, work.target_cpu_s / bytes));
        let buffered_bytes = hardware.socket_buffer_bytes * f64::from(work.streams);
        let weight = f64::from(work.streams);
        let request = FlowRequest { bytes, buffered_bytes, uses, weight, rate_max };
        let begins = stage.now
            + self.scattered(hardware.round_us, &hardware)
            + if first { self.slow_start(&request, stage) } else { Duration::ZERO };
        if buffered_bytes >= bytes {
            // All of it fits the sockets' buffers, so that the link holds nobody up.
            let written = begins + Duration::from_secs_f64(work.slowest_source_s);
            stage.at(written, Due::Source(Event::RoundSent(self.as_core_counts(work.sent))));
        }
        self.wire_bytes += bytes * hardware.wire_overhead;
        self.cpu_s.0 += work.source_cpu_s;
        self.cpu_s.1 += work.target_cpu_s;
        self.round = Some(work);
        stage.at(begins, Due::Flow { request: Box::new(request), fence });
    }

    /// Pages as the core counts them: those of its bitmaps.
    fn as_core_counts(&self, sent: RoundSent) -> RoundSent {
        let scale = self.order.page_scale;
        RoundSent {
            raw_pages: sent.raw_pages / scale,
            zero_pages: sent.zero_pages / scale,
            packed_pages: sent.packed_pages / scale,
            ..sent
        }
    }

    pub(super) fn begin_flow(&mut self, request: FlowRequest, fence: u32, stage: &mut Stage<'_>) {
        if self.round.is_some() {
            self.flow = Some((stage.network.add_flow(request), Purpose::Pages(fence)));
        }
    }

    /// By how much new connections end later than if they had their full rate from the first byte: windows double
    /// every round trip until they hold what the rate needs. Connections that were used a moment ago keep theirs.
    fn slow_start(&self, request: &FlowRequest, stage: &Stage<'_>) -> Duration {
        let route = &self.order.route;
        let round_trip_s = (route.latency * 2).as_secs_f64();
        let narrowest = route
            .forward
            .iter()
            .map(|&resource| stage.network.capacity(resource) / stage.hardware.wire_overhead)
            .fold(request.rate_max, f64::min);
        let first = FIRST_WINDOW_BYTES * request.weight;
        let wanted = narrowest * round_trip_s;
        if wanted <= first {
            return Duration::ZERO;
        }
        // Windows of 1, 2, 4... times the first have sent all of it, or have grown to what is wanted.
        let round_trips = (wanted / first).log2().min((request.bytes / first + 1.0).log2());
        let sent = first * (round_trips.exp2() - 1.0);
        let lost_s = round_trips * round_trip_s - sent / narrowest;
        Duration::from_secs_f64(lost_s.clamp(0.0, 1e6))
    }

    pub(super) fn pages_reach(&mut self, milestone: Milestone, stage: &mut Stage<'_>) {
        let Some(work) = self.round else { return };
        match milestone {
            Milestone::Buffered => {
                stage.at(stage.now, Due::Source(Event::RoundSent(self.as_core_counts(work.sent))));
            }
            Milestone::Done => {
                let Some((_, Purpose::Pages(fence))) = self.flow.take() else { return };
                self.round = None;
                let streams = self.order.settings.streams;
                for stream in (0..streams).filter_map(|number| StreamIndex::new(number, streams)) {
                    let reached =
                        target_core::Event::FenceReached { stream, fence, digest: MemoryDigest::ZERO };
                    stage.at(stage.now + self.order.route.latency, Due::Target(reached));
                }
            }
        }
    }

    fn note(&mut self, progress: &Progress, stage: &Stage<'_>) {
        match progress {
            Progress::RoundStarted { .. } | Progress::Paused => self.round_began = stage.now,
            Progress::RoundDone(report) => self.rounds.push(self.line(report)),
            Progress::Negotiated { .. }
            | Progress::Stopping { .. }
            | Progress::Reconnecting { .. }
            | Progress::Reconnected(_)
            | Progress::Handed
            | Progress::InDoubt { .. }
            | Progress::Undoing { .. } => {}
        }
    }

    fn line(&self, report: &RoundReport) -> RoundLine {
        let RoundReport { round, dirty_pages, sent, took, dirtied_per_s, forecast } = report;
        let scale = self.order.page_scale;
        RoundLine {
            round: *round,
            from_ms: ms(self.round_began.saturating_sub(self.ordered_at)),
            ms: ms(*took),
            dirty_pages: *dirty_pages * scale,
            zero_pages: sent.zero_pages * scale,
            packed_pages: sent.packed_pages * scale,
            wire_bytes: sent.wire_bytes,
            dirtied_pages_per_s: dirtied_per_s.map(|pages| pages * float(scale)),
            forecast_ms: forecast.map(|forecast| ms(forecast.total().expected)),
            forecast_upper_ms: forecast.map(|forecast| ms(forecast.total().upper())),
        }
    }
}

/// The same with pages that cost `by` times as much.
fn slower(hardware: &Hardware, by: f64) -> Hardware {
    Hardware {
        source_page_us: hardware.source_page_us * by,
        target_page_us: hardware.target_page_us * by,
        first_touch_page_us: hardware.first_touch_page_us * by,
        dirtied_page_us: hardware.dirtied_page_us * by,
        extent_us: hardware.extent_us * by,
        source_zero_page_us: hardware.source_zero_page_us * by,
        target_zero_page_us: hardware.target_zero_page_us * by,
        pack_page_us: hardware.pack_page_us * by,
        pack_vain_page_us: hardware.pack_vain_page_us * by,
        unpack_page_us: hardware.unpack_page_us * by,
        ..*hardware
    }
}
