//! A machine's state as bytes, and back.
//!
//! Restoring goes through KVM in this order: the clock, because each vCPU's TSC is set by how far it went
//! on; the vCPUs; the interrupt controllers, which hand what is pending to the vCPUs' local APICs as soon
//! as they are set; the devices, which may raise an interrupt; and last the timer, which starts to count.

mod devices;
mod saved;

pub use saved::SavedState;

use kvm_bindings::{KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip};

use super::{Machine, Phase, processor};
use crate::capability::KvmCallError;
use crate::config::{
    Backing, ClockMode, HugePages, LocalChoices, MachineConfig, MemoryChoices, MemoryConfig, NetConfig,
};
use crate::saved::sections::{
    Clock, Irqchip, MachineShape, MemoryPages, Pit, Power as SavedPower, Serial as SavedSerial,
    StateSections, Time, Vcpu as SavedVcpu, VirtioMmio as SavedVirtio,
};
use crate::saved::{Announced, Reader, StateError, Writer, check_announced, from_abi_bytes, to_abi_bytes};
use crate::vcpu::{self, StateContext};

impl Machine {
    /// What a target must build before it can take this machine's memory and state.
    #[must_use]
    pub fn description(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        let huge_pages = match self.config.memory.huge_pages {
            HugePages::Transparent => MemoryPages::TRANSPARENT,
            HugePages::Off => MemoryPages::OFF,
            // A machine that had to do without goes on wishing.
            HugePages::Pool | HugePages::PoolIfFree => MemoryPages::POOL_2_MIB,
        };
        let mut written = writer.add(&self.shape());
        if huge_pages != MemoryPages::TRANSPARENT {
            written = written.and_then(|()| writer.add(&MemoryPages { huge_pages }));
        }
        if let Some(features) = self.network_features() {
            written = written.and_then(|()| writer.add(&features));
        }
        written = written.and_then(|()| devices::describe(self, &mut writer));
        written = written.and_then(|()| writer.add(&self.shown_cpu()));
        written = written.and_then(|()| writer.add(&StateSections::of(&self.state_sections())));
        match self.config.clock {
            ClockMode::Realtime => {}
            ClockMode::Monotonic => {
                written = written.and_then(|()| writer.add(&Time { clock: Time::MONOTONIC }));
            }
        }
        written.and_then(|()| writer.finish()).expect("a machine's shape is a few bytes of plain values")
    }

    /// The configuration for a described machine on this host. Memory is as it was at the source, where `local` does not
    /// say otherwise, except that huge pages of the host's pool are only taken if there are enough.
    ///
    /// # Errors
    /// The bytes are damaged or of another version, the machine can't be built by anybody, or a
    /// tap is missing, or what was chosen for its disks doesn't fit.
    pub fn config_from_description(bytes: &[u8], local: LocalChoices) -> Result<MachineConfig, StateError> {
        let reader = Reader::new(bytes)?;
        if let Some(announced) = reader.optional::<StateSections>()? {
            check_announced(&announced)?;
        }
        let clock = match reader.optional::<Time>()?.map(|Time { clock }| clock) {
            Some(Time::MONOTONIC) => ClockMode::Monotonic,
            Some(Time::REALTIME) => ClockMode::Realtime,
            // What a later version may have, and an older one always had.
            Some(_) | None => ClockMode::Realtime,
        };
        let described = match reader.optional::<MemoryPages>()?.map(|MemoryPages { huge_pages }| huge_pages) {
            Some(MemoryPages::OFF) => HugePages::Off,
            Some(MemoryPages::POOL_2_MIB) => HugePages::PoolIfFree,
            // A wish that a later version may have, and this one can't grant.
            Some(_) | None => HugePages::Transparent,
        };
        let shape: MachineShape = reader.one()?;
        let MachineShape { memory_bytes, shared_memory, cpus, net_mac } = shape;
        let LocalChoices { tap, disks, serial, memory: MemoryChoices { backing, huge_pages, node }, cpu } =
            local;
        let net = match (net_mac, tap) {
            (Some(mac), Some(tap)) => Some(NetConfig { tap, mac }),
            (Some(mac), None) => {
                let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
                return Err(StateError::NeedsTap { mac });
            }
            (None, Some(tap)) => return Err(StateError::NoUseForTap { tap }),
            (None, None) => None,
        };
        let described_backing = if shared_memory { Backing::SharedMemfd } else { Backing::PrivateAnonymous };
        let memory = MemoryConfig {
            size_bytes: memory_bytes,
            backing: backing.unwrap_or(described_backing),
            huge_pages: huge_pages.unwrap_or(described),
            node,
        };
        let (disks, rng) = devices::from_description(&reader, disks)?;
        let cpu = processor::described(reader.optional()?, cpu)?;
        let config = MachineConfig { memory, cpus, cpu, net, disks, rng, serial, clock };
        config.check()?;
        Ok(config)
    }

    /// Saves everything but memory. The machine must be paused, or ready to run but never started, as one that arrived
    /// paused is.
    ///
    /// # Errors
    /// It is neither, or KVM refuses.
    pub fn save_state(&self) -> Result<Vec<u8>, StateError> {
        let _operation = self.operate();
        let phase = self.phase();
        if !matches!(phase, Phase::Paused | Phase::Ready) {
            let action = "save the machine's state";
            return Err(StateError::WrongStatus { action, status: phase.name(), needed: "paused" });
        }
        let mut writer = Writer::of_announced(self.state_sections());
        writer.add(&self.shape())?;
        writer.add(&self.save_irqchip()?)?;
        let pit = self.vm.get_pit2().map_err(KvmCallError::new("get the timer's state"))?;
        writer.add(&Pit { state: to_abi_bytes(&pit) })?;
        let (clock, ahead_ns) = self.clock_to_save()?;
        writer.add(&clock)?;
        for vcpu in &self.vcpus {
            let mut saved = vcpu::save(vcpu.index, &vcpu.lock(), self.state_context())?;
            // One that arrived paused and has not run here is not in KVM yet as it was.
            for (index, value) in vcpu.deferred() {
                saved.msrs.iter_mut().filter(|msr| msr.0 == index).for_each(|msr| msr.1 = value);
            }
            vcpu::set_back(&mut saved, ahead_ns);
            writer.add(&saved)?;
        }
        writer.add(&self.bus.serial.save())?;
        if let Some(power) = self.bus.power.save() {
            writer.add(&power)?;
        }
        for transport in &self.bus.virtio {
            writer.add(&transport.save())?;
        }
        devices::save(self, &mut writer)?;
        writer.finish()
    }

    /// Takes on a saved state. The machine must never have run, and its memory must be complete. Memory is read and not
    /// written: another machine may run on it until this one does. A state that was taken on before is replaced.
    ///
    /// # Errors
    /// Damaged, unknown or foreign bytes are refused before anything changes. If KVM or a device
    /// refuses a part, the machine stays unable to run and should be dropped.
    pub fn restore_state(&self, bytes: &[u8]) -> Result<(), StateError> {
        let _operation = self.operate();
        let phase = self.phase();
        if !matches!(phase, Phase::Created | Phase::Ready) {
            let action = "restore a state";
            return Err(StateError::WrongStatus { action, status: phase.name(), needed: "never run" });
        }
        let SavedState { shape: _, irqchip, pit, clock, vcpus, serial, power, virtio, devices: _ } =
            self.decode(bytes)?;
        let Pit { state } = pit;
        let pit = from_abi_bytes("pit", &state)?;
        self.check_cpu(&vcpus[0])?;
        let tsc = self.restore_clock(&clock, &vcpus)?;
        for (vcpu, saved) in self.vcpus.iter().zip(&vcpus) {
            let deferred = vcpu::restore(&vcpu.lock(), saved, self.state_context(), tsc)?;
            vcpu.defer(deferred);
        }
        self.restore_irqchip(&irqchip)?;
        self.bus.serial.restore(&serial)?;
        self.bus.power.restore(power.as_ref())?;
        for (transport, saved) in self.bus.virtio.iter().zip(&virtio) {
            transport.restore(saved, self.ram.tracked())?;
        }
        if let Some(net) = &self.net {
            net.ask_for_announcement();
        }
        self.vm.set_pit2(&pit).map_err(KvmCallError::new("set the timer's state"))?;
        self.set_phase(Phase::Ready);
        Ok(())
    }

    /// Decodes a state and checks that it is of a machine like this one.
    fn decode(&self, bytes: &[u8]) -> Result<SavedState, StateError> {
        let saved = SavedState::decode(bytes)?;
        let ours = self.shape();
        // What holds the memory is each host's own business.
        let shape = MachineShape { shared_memory: ours.shared_memory, ..saved.shape.clone() };
        if shape != ours {
            let what = format!("it has {shape:?}, and this one has {ours:?}");
            return Err(StateError::OtherMachine { what });
        }
        if saved.virtio.len() != self.bus.virtio.len() {
            let (found, expected) = (saved.virtio.len(), self.bus.virtio.len());
            return Err(StateError::SectionCount { section: "virtio-mmio", found, expected });
        }
        devices::check(self, &saved.devices)?;
        Ok(saved)
    }

    /// Every kind of section that [`Machine::save_state`] writes for this machine. One that it writes and that is not here
    /// makes saving fail, so none is forgotten.
    fn state_sections(&self) -> Vec<Announced> {
        let mut sections = vec![
            Announced::of::<MachineShape>(),
            Announced::of::<Irqchip>(),
            Announced::of::<Pit>(),
            Announced::of::<Clock>(),
            Announced::of::<SavedVcpu>(),
            Announced::of::<SavedSerial>(),
            // It is left out of the state of a guest that has never used it, but it may begin to at any time.
            Announced::of::<SavedPower>(),
        ];
        if !self.bus.virtio.is_empty() {
            sections.push(Announced::of::<SavedVirtio>());
        }
        sections.extend(devices::sections(self));
        sections
    }

    fn shape(&self) -> MachineShape {
        let MachineConfig { memory, cpus, cpu: _, net, disks: _, rng: _, serial: _, clock: _ } = &self.config;
        let MemoryConfig { size_bytes, backing, huge_pages: _, node: _ } = memory;
        MachineShape {
            memory_bytes: *size_bytes,
            shared_memory: match backing {
                Backing::PrivateAnonymous => false,
                Backing::SharedMemfd => true,
            },
            cpus: *cpus,
            net_mac: net.as_ref().map(|net| net.mac),
        }
    }

    fn state_context(&self) -> StateContext<'_> {
        StateContext { xsave_bytes: self.xsave_bytes, msr_indices: &self.capabilities.msr_indices }
    }

    fn save_irqchip(&self) -> Result<Irqchip, StateError> {
        let get = |chip_id| -> Result<Vec<u8>, StateError> {
            let mut chip = kvm_irqchip { chip_id, ..kvm_irqchip::default() };
            self.vm
                .get_irqchip(&mut chip)
                .map_err(KvmCallError::new("get an interrupt controller's state"))?;
            Ok(to_abi_bytes(&chip))
        };
        Ok(Irqchip {
            pic_master: get(KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: get(KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: get(KVM_IRQCHIP_IOAPIC)?,
        })
    }

    fn restore_irqchip(&self, saved: &Irqchip) -> Result<(), StateError> {
        let Irqchip { pic_master, pic_slave, ioapic } = saved;
        for (chip_id, bytes) in [
            (KVM_IRQCHIP_PIC_MASTER, pic_master),
            (KVM_IRQCHIP_PIC_SLAVE, pic_slave),
            (KVM_IRQCHIP_IOAPIC, ioapic),
        ] {
            let chip: kvm_irqchip = from_abi_bytes("irqchip", bytes)?;
            if chip.chip_id != chip_id {
                let what = format!("controller {} comes where {chip_id} belongs", chip.chip_id);
                return Err(StateError::Invalid { section: "irqchip", what });
            }
            self.vm.set_irqchip(&chip).map_err(KvmCallError::new("set an interrupt controller's state"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod foreign;
#[cfg(test)]
mod golden;
#[cfg(test)]
mod moves;
#[cfg(test)]
mod tests;
