//! The registers as ACPI's drivers use them, and as a hostile guest does.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;

use super::*;

/// Remembers its level.
#[derive(Clone, Debug, Default)]
pub(crate) struct Line(Arc<AtomicBool>);

impl InterruptLevel for Line {
    fn set(&self, asserted: bool) {
        self.0.store(asserted, Ordering::SeqCst);
    }
}

fn power() -> (Power, Line) {
    let line = Line::default();
    (Power::new(Box::new(line.clone())), line)
}

impl Line {
    fn is_asserted(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

fn read(power: &Power, port: u16) -> u16 {
    let mut data = [0; 2];
    power.read(port, &mut data);
    u16::from_le_bytes(data)
}

const ENABLE_PORT: u16 = EVENT_PORT + 2;

#[test]
fn a_press_interrupts_until_it_is_acknowledged() {
    let (power, line) = power();
    assert!(!power.press_button(), "nobody listens");
    assert_eq!(read(&power, EVENT_PORT), 0, "and nothing is kept for later");
    power.write(ENABLE_PORT, &POWER_BUTTON.to_le_bytes());
    assert!(power.press_button());
    assert!(power.press_button());
    assert!(line.is_asserted());
    assert_eq!(read(&power, EVENT_PORT), POWER_BUTTON);
    // Other bits acknowledge nothing.
    power.write(EVENT_PORT, &(!POWER_BUTTON).to_le_bytes());
    assert!(line.is_asserted());
    power.write(ENABLE_PORT, &[0, 0]);
    assert!(!line.is_asserted());
    power.write(ENABLE_PORT, &POWER_BUTTON.to_le_bytes());
    assert!(line.is_asserted(), "it is still pending");
    power.write(EVENT_PORT, &POWER_BUTTON.to_le_bytes());
    assert!(!line.is_asserted());
    assert_eq!(read(&power, EVENT_PORT), 0);
}

#[test]
fn acpi_is_on_and_only_sleep_type_five_switches_off() {
    let (power, _) = power();
    assert_eq!(read(&power, CONTROL_PORT), 1);
    // Linux writes the type first, then with the bit that does it.
    for kind in 0..8_u16 {
        let with_type = kind << 10;
        assert_eq!(power.write(CONTROL_PORT, &(with_type | 1).to_le_bytes()), PortEffect::None);
        assert_eq!(read(&power, CONTROL_PORT), with_type | 1);
        let expected = if kind == 5 { PortEffect::Shutdown } else { PortEffect::None };
        assert_eq!(power.write(CONTROL_PORT, &(with_type | SLEEP_NOW).to_le_bytes()), expected, "{kind}");
        assert_eq!(read(&power, CONTROL_PORT), with_type | 1, "doing it is not kept");
    }
    assert_eq!(power.write(CONTROL_PORT + 1, &[0x34]), PortEffect::Shutdown, "by bytes");
    assert_eq!(power.write(CONTROL_PORT + 1, &[0x14]), PortEffect::None);
}

#[test]
fn registers_can_be_read_by_bytes_and_together() {
    let (power, _) = power();
    power.write(EVENT_PORT, &[0, 0, 0x21, 0x07]);
    assert_eq!(read(&power, ENABLE_PORT), 0x0721);
    power.write(ENABLE_PORT + 1, &[0x01]);
    assert_eq!(read(&power, ENABLE_PORT), 0x0121);
    let mut all = [0; 8];
    power.read(EVENT_PORT, &mut all);
    assert_eq!(all, [0, 0, 0x21, 0x01, 1, 0, 0xff, 0xff]);
    let ports = (EVENT_PORT - 1..EVENT_PORT + PORTS + 1).filter(|port| Power::has(*port));
    assert_eq!(ports.count(), 6);
}

#[test]
fn a_press_arrives_with_the_machine() {
    let (source, _) = power();
    assert_eq!(source.save(), None, "there is nothing to take along");
    source.write(ENABLE_PORT, &POWER_BUTTON.to_le_bytes());
    source.write(CONTROL_PORT, &(5_u16 << 10).to_le_bytes());
    source.press_button();
    let saved = source.save().unwrap();
    assert_eq!(saved, SavedPower { status: POWER_BUTTON, enable: POWER_BUTTON, control: 5 << 10 });
    let (target, line) = power();
    target.restore(Some(&saved)).unwrap();
    assert!(line.is_asserted(), "the interrupt is pending at the target");
    assert_eq!(target.save(), Some(saved.clone()));
    target.restore(None).unwrap();
    assert!(!line.is_asserted());
    for impossible in [
        SavedPower { status: 1, ..saved.clone() },
        SavedPower { enable: 2, ..saved.clone() },
        SavedPower { control: SLEEP_NOW, ..saved },
    ] {
        let error = target.restore(Some(&impossible)).unwrap_err();
        assert!(error.to_string().contains("power button"), "{error}");
    }
    assert_eq!(target.save(), None, "a refused state changes nothing");
}

proptest! {
    /// Whatever a guest writes, what is saved can be restored, and the interrupt follows the registers.
    #[test]
    fn any_writes_leave_a_state_that_can_be_saved(
        writes in prop::collection::vec((0..PORTS, prop::collection::vec(any::<u8>(), 0..9), any::<bool>()), 0..20)
    ) {
        let (source, line) = power();
        for (offset, data, press) in writes {
            if press {
                source.press_button();
            }
            source.write(EVENT_PORT + offset, &data);
            source.read(EVENT_PORT + offset, &mut [0; 9]);
            prop_assert_eq!(line.is_asserted(), read(&source, EVENT_PORT) & read(&source, ENABLE_PORT) != 0);
        }
        let (target, target_line) = power();
        target.restore(source.save().as_ref()).unwrap();
        prop_assert_eq!(target.save(), source.save());
        prop_assert_eq!(target_line.is_asserted(), line.is_asserted());
    }
}
