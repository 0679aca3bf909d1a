//! The workload guest as a kernel image, built from `tools/guest/kernel` and embedded.
//!
//! Whoever links this crate can boot the guest without a file to find or download. What the guest
//! understands and reports is in `ferry-guest-abi`; how to boot it is the VMM's business (any PVH loader will do).

/// The guest: an ELF image with a PVH entry note, linked at 2 MiB physical.
pub static WORKLOAD_GUEST: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/ferry-guest"));

#[cfg(test)]
mod tests {
    use super::WORKLOAD_GUEST;
    use ferry_guest_abi::REPORT_GPA;
    use ferry_guest_abi::workload::OVERHEAD_MIB;

    fn u16_at(at: usize) -> usize {
        usize::from(u16::from_le_bytes(WORKLOAD_GUEST[at..at + 2].try_into().unwrap()))
    }

    fn u32_at(at: usize) -> u32 {
        u32::from_le_bytes(WORKLOAD_GUEST[at..at + 4].try_into().unwrap())
    }

    fn u64_at(at: usize) -> u64 {
        u64::from_le_bytes(WORKLOAD_GUEST[at..at + 8].try_into().unwrap())
    }

    fn offset_at(at: usize) -> usize {
        usize::try_from(u64_at(at)).unwrap()
    }

    /// File offsets of the program headers of one type.
    fn program_headers(kind: u32) -> Vec<usize> {
        let (start, size, count) = (offset_at(32), u16_at(54), u16_at(56));
        (0..count).map(|i| start + i * size).filter(|at| u32_at(*at) == kind).collect()
    }

    /// Value of a symbol, by name.
    fn symbol(name: &str) -> Option<u64> {
        let (start, size, count) = (offset_at(40), u16_at(58), u16_at(60));
        let sections: Vec<usize> = (0..count).map(|i| start + i * size).collect();
        let table = *sections.iter().find(|at| u32_at(**at + 4) == 2)?;
        let names = offset_at(sections[u32_at(table + 40) as usize] + 24);
        let (from, len) = (offset_at(table + 24), offset_at(table + 32));
        (from..from + len).step_by(24).find_map(|at| {
            let text = &WORKLOAD_GUEST[names + u32_at(at) as usize..];
            let end = text.iter().position(|byte| *byte == 0)?;
            (&text[..end] == name.as_bytes()).then(|| u64_at(at + 8))
        })
    }

    #[test]
    fn the_image_is_a_static_x86_64_elf_in_one_piece_at_2_mib() {
        assert_eq!(&WORKLOAD_GUEST[..6], b"\x7fELF\x02\x01");
        assert_eq!((u16_at(16), u16_at(18)), (2, 62), "not an x86-64 executable");
        let loads = program_headers(1);
        assert_eq!(loads.len(), 1);
        assert_eq!((u64_at(loads[0] + 16), u64_at(loads[0] + 24)), (REPORT_GPA, REPORT_GPA));
        // Two MiB below the image, and page tables for 64 GiB of memory, are the guest's as well.
        let taken = REPORT_GPA + u64_at(loads[0] + 40) + 64 * 4096;
        assert!(taken <= u64::from(OVERHEAD_MIB) << 20, "the guest takes {taken} bytes for itself");
        assert!(program_headers(3).is_empty(), "the image wants a dynamic linker");
    }

    #[test]
    fn the_pvh_note_names_an_entry_inside_the_image() {
        let notes = program_headers(4);
        assert_eq!(notes.len(), 1);
        // Loaders step through notes by the segment's alignment.
        assert_eq!(u64_at(notes[0] + 48), 4);
        let note = offset_at(notes[0] + 8);
        assert_eq!((u32_at(note), u32_at(note + 4), u32_at(note + 8)), (4, 8, 18));
        assert_eq!(&WORKLOAD_GUEST[note + 12..note + 16], b"Xen\0");
        assert_eq!(Some(u64_at(note + 16)), symbol("pvh_entry"));
    }

    #[test]
    fn the_report_page_is_where_hosts_look_for_it() {
        assert_eq!(symbol("report_page"), Some(REPORT_GPA));
    }
}
