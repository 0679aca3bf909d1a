//! The tables are read back as a kernel reads them, and by Intel's own disassembler where it is installed.

use std::process::Command;

use super::*;
use crate::config::CPUS_MAX;

/// More windows than any machine has.
const WINDOWS: u32 = 18;

fn windows(count: u32) -> Vec<VirtioWindow> {
    let window = |index: u32| VirtioWindow {
        address: crate::devices::MMIO_START + u64::from(index) * WINDOW_BYTES,
        interrupt: crate::devices::mmio_interrupt(index),
    };
    (0..count).map(window).collect()
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// The table at an address, by the length in its own header.
fn table(bytes: &[u8], address: u64) -> &[u8] {
    let start = usize::try_from(address - ADDRESS).unwrap();
    &bytes[start..][..u32_at(&bytes[start..], 4) as usize]
}

/// A kernel's way from the RSDP to the tables.
struct Found<'a> {
    fadt: &'a [u8],
    madt: &'a [u8],
    dsdt: &'a [u8],
    facs: &'a [u8],
}

fn find(bytes: &[u8]) -> Found<'_> {
    assert_eq!(&bytes[..8], b"RSD PTR ");
    assert_eq!((sum(&bytes[..20]), sum(&bytes[..36])), (0, 0));
    assert_eq!(bytes[15], 2, "with an XSDT");
    let root = table(bytes, u64_at(bytes, 24));
    assert_eq!((&root[..4], sum(root)), (&b"XSDT"[..], 0));
    let [fadt, madt] = [36, 44].map(|at| table(bytes, u64_at(root, at)));
    assert_eq!(root.len(), 52);
    let [facs, dsdt] = [36, 40].map(|at| table(bytes, u32_at(fadt, at).into()));
    assert_eq!(u64_at(fadt, 140), u64::from(u32_at(fadt, 40)), "both addresses of the DSDT");
    for (found, signature) in [(fadt, b"FACP"), (madt, b"APIC"), (dsdt, b"DSDT")] {
        assert_eq!((&found[..4], sum(found)), (&signature[..], 0));
    }
    assert_eq!((&facs[..4], facs.len(), u32_at(fadt, 36) % 64), (&b"FACS"[..], 64, 0));
    Found { fadt, madt, dsdt, facs }
}

#[test]
fn a_kernel_finds_every_table_and_each_has_its_checksum() {
    for (cpus, count) in [(1, 0), (2, 1), (CPUS_MAX, WINDOWS)] {
        let bytes = build(cpus, &windows(count));
        let found = find(&bytes);
        assert_eq!(found.facs[32], 1, "the FACS's version");
        assert_eq!(found.fadt.len(), 276);
    }
}

#[test]
fn the_fixed_hardware_is_where_the_bus_has_it() {
    let bytes = build(1, &[]);
    let fadt = find(&bytes).fadt;
    assert_eq!(u16::from_le_bytes([fadt[46], fadt[47]]), 9);
    assert_eq!((u32_at(fadt, 48), u32_at(fadt, 56), u32_at(fadt, 64)), (0, 0x600, 0x604));
    assert_eq!((fadt[88], fadt[89], fadt[91]), (4, 2, 0), "and no PM timer");
    let flags = u32_at(fadt, 112);
    assert_eq!(flags & (1 << 4), 0, "the power button is fixed hardware");
    assert_ne!(flags & (1 << 10), 0, "there is a reset register");
    assert_eq!(flags & (1 << 20), 0, "the hardware is not reduced");
    // Address space, width, offset, access size, address.
    assert_eq!(fadt[116..128], [1, 8, 0, 1, 0xf9, 0x0c, 0, 0, 0, 0, 0, 0]);
    assert_eq!(fadt[128], 6);
    assert_eq!(fadt[148..160], [1, 32, 0, 2, 0x00, 0x06, 0, 0, 0, 0, 0, 0]);
    assert_eq!(fadt[172..184], [1, 16, 0, 2, 0x04, 0x06, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn the_madt_lists_processors_lines_and_the_level_of_acpis_own() {
    for cpus in [1, 2, CPUS_MAX] {
        let bytes = build(cpus, &[]);
        let madt = find(&bytes).madt;
        assert_eq!((u32_at(madt, 36), u32_at(madt, 40)), (0xfee0_0000, 1));
        let mut rest = &madt[44..];
        for index in 0..cpus {
            assert_eq!(rest[..8], [0, 8, index, index, 1, 0, 0, 0]);
            rest = &rest[8..];
        }
        let expected: &[u8] = &[
            1, 12, cpus, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0, // I/O APIC
            2, 10, 0, 9, 9, 0, 0, 0, 0x0d, 0, // interrupt 9: level, active high
            4, 6, 0xff, 0, 0, 1, // NMI
        ];
        assert_eq!(rest, expected);
    }
}

/// What iasl makes of the DSDT, or `None` where it is not installed, which CI does not accept.
fn disassemble(dsdt: &[u8]) -> Option<String> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("dsdt.aml");
    std::fs::write(&path, dsdt).unwrap();
    let output = Command::new("iasl").arg("-d").arg(&path).output();
    let output = match output {
        Ok(output) => output,
        Err(error) => {
            println!("SKIPPED (can't run iasl, of the package acpica-tools: {error})");
            assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "CI needs iasl: {error}");
            return None;
        }
    };
    assert!(output.status.success(), "{output:?}");
    Some(std::fs::read_to_string(path.with_extension("dsl")).unwrap())
}

#[test]
fn the_devices_are_what_intels_disassembler_reads() {
    let bytes = build(2, &windows(WINDOWS));
    let Some(text) = disassemble(find(&bytes).dsdt) else { return };
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let has = |expected: &str| assert!(words.contains(expected), "'{expected}' is not in:\n{text}");
    has(r#"Device (COM1) { Name (_HID, EisaId ("PNP0501")"#);
    has("IO (Decode16, 0x03F8, // Range Minimum 0x03F8, // Range Maximum 0x01, // Alignment 0x08, // Length");
    has(r#"Device (V000) { Name (_HID, "LNRO0005") // _HID: Hardware ID Name (_UID, Zero)"#);
    has(r#"Device (V017) { Name (_HID, "LNRO0005") // _HID: Hardware ID Name (_UID, 0x11)"#);
    has("Memory32Fixed (ReadWrite, 0xD0011000, // Address Base 0x00001000, // Address Length");
    has("Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive, ,, ) { 0x00000017, }");
    has("Name (_S5, Package (0x04)");
    has("{ 0x05, 0x05, Zero, Zero }");
    assert!(!words.contains("0x00000009, }"), "no device has ACPI's own interrupt");
    assert_eq!(words.matches("LNRO0005").count(), 18);
}
