//! What the target's core wants done.

use std::time::Duration;

use ferry_migrate::protocol::target::{Action, Event};

use super::{Due, Moving, Stage};

impl Moving {
    pub(super) fn perform_target(&mut self, action: Action, stage: &mut Stage<'_>) {
        let hardware = stage.hardware;
        match action {
            Action::Send(message) => self.send_to_source(message, stage),
            Action::WriteRecord(_) => {
                let (done, took) = self.target_job(hardware.target_record_us, stage);
                stage.at(done, Due::Target(Event::RecordWritten { took }));
            }
            Action::RehearseRecord(_) => {
                let (done, took) = self.target_job(hardware.target_record_us, stage);
                stage.at(done, Due::Target(Event::RecordRehearsed { took }));
            }
            Action::BuildMachine { .. } => {
                let cost_us = hardware.build_us + hardware.build_us_per_vcpu * self.cpus();
                let (done, _) = self.target_job(cost_us, stage);
                stage.at(done, Due::Target(Event::MachineBuilt));
            }
            Action::ProbeWitness | Action::AskWitness(_) => unreachable!("there is no witness"),
            Action::AdoptMemory { .. } => unreachable!("simulated hosts share no memory"),
            Action::RestoreState(_) => {
                let cost_us = hardware.restore_us + hardware.restore_us_per_vcpu * self.cpus();
                let (done, took) = self.target_job(cost_us, stage);
                stage.at(done, Due::Target(Event::StateRestored { took }));
            }
            Action::RunVm { .. } => {
                let cost_us = hardware.run_us + hardware.run_us_per_vcpu * self.cpus();
                let (done, took) = self.target_job(cost_us, stage);
                self.runs_at = Some(done);
                stage.at(done, Due::Target(Event::VmRunning { took }));
            }
            Action::ExpectStreams { .. } | Action::HangUp => unreachable!("simulated links do not break"),
            // Nobody waits for their end.
            Action::EndStreams
            | Action::DropStaleFrames
            | Action::Announce(_)
            | Action::DiscardMachine
            | Action::Report(_)
            | Action::Finish(_) => {}
        }
    }

    /// Puts a job on the thread of the target's VM; when it is done, and how long it took.
    fn target_job(&mut self, cost_us: f64, stage: &Stage<'_>) -> (Duration, Duration) {
        let took = self.scattered(cost_us, stage.hardware);
        let began = self.target_side.worker_free_at.max(stage.now);
        self.target_side.worker_free_at = began + took;
        (began + took, took)
    }
}
