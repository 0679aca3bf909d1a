//! Loading a bzImage, the compressed kernel that distributions ship, for its 64-bit entry
//! (Documentation/arch/x86/boot.rst).
//!
//! ```text
//!  0x000  boot sector; 0x1f1 setup header, 0x202 "HdrS"
//!  0x200  real-mode code, (setup_sects + 1) · 512 bytes with the boot sector; not used
//!  ...    protected-mode code, loaded at pref_address; its 64-bit entry is 0x200 behind that
//! ```
//!
//! The kernel unpacks itself within init_size bytes from there, so that much memory must be free. The header is
//! checked here, so that every refusal can name its cause; linux-loader then does the loading.

use std::io::{Read, Seek};

use linux_loader::loader::KernelLoader;
use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::bzimage::BzImage;
use vm_memory::{ByteValued, GuestAddress, ReadVolatile};

use super::image::{Image, LoadedKernel, Protocol};
use super::{BootError, HIGH_MEMORY};
use crate::memory::GuestRam;

const HEADER_OFFSET: u64 = 0x1f1;

/// The byte that says how far behind 0x202 the header goes on.
const HEADER_LENGTH_OFFSET: u64 = 0x201;
const MAGIC_OFFSET: u64 = 0x202;
const MAGIC: [u8; 4] = *b"HdrS";
const BOOT_FLAG: u16 = 0xaa55;

const SECTOR_BYTES: u64 = 512;

/// What zero in setup_sects stands for.
const SETUP_SECTORS_DEFAULT: u64 = 4;

/// The unit of syssize.
const PARAGRAPH_BYTES: u64 = 16;

/// The first version (of the header, not of Linux: 3.8) that tells of a 64-bit entry.
const VERSION_MIN: u16 = 0x020c;

const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
const ENTRY_64_OFFSET: u64 = 0x200;

/// Whether an image has a setup header where a bzImage has it.
pub(super) fn is_bzimage<F: Read + Seek>(image: &mut Image<'_, F>) -> Result<bool, BootError> {
    let mut magic = [0; MAGIC.len()];
    if image.bytes < MAGIC_OFFSET + magic.len() as u64 {
        return Ok(false);
    }
    image.read_at(MAGIC_OFFSET, &mut magic)?;
    Ok(magic == MAGIC)
}

/// Loads a bzImage.
pub(super) fn load<F>(ram: &GuestRam, image: &mut Image<'_, F>) -> Result<LoadedKernel, BootError>
where
    F: Read + Seek + ReadVolatile,
{
    let header = read_header(image)?;
    let protected_mode_bytes = check_header(image, &header)?;
    let (start, init_size) = (header.pref_address, u64::from(header.init_size));
    let available = ram.regions()[0].bytes;
    let needed = start.saturating_add(init_size.max(protected_mode_bytes));
    if needed > available {
        return Err(BootError::KernelTooBig { kernel: image.name.to_owned(), needed, available });
    }
    let loaded = BzImage::load(ram.tracked(), Some(GuestAddress(start)), image.file, None);
    loaded.map_err(|error| image.not_bootable(error.to_string()))?;
    Ok(LoadedKernel { entry: start + ENTRY_64_OFFSET, end: needed, protocol: Protocol::Linux64(header) })
}

/// The header, with zeroes where this version of it has nothing yet.
fn read_header<F: Read + Seek>(image: &mut Image<'_, F>) -> Result<setup_header, BootError> {
    let mut header = setup_header::default();
    let known = size_of::<setup_header>() as u64;
    if image.bytes < HEADER_OFFSET + known {
        let what = format!("it is truncated: its {} bytes end inside its setup header", image.bytes);
        return Err(image.not_bootable(what));
    }
    image.read_at(HEADER_OFFSET, header.as_mut_slice())?;
    let mut further = [0];
    image.read_at(HEADER_LENGTH_OFFSET, &mut further)?;
    let length = MAGIC_OFFSET + u64::from(further[0]) - HEADER_OFFSET;
    if length < known {
        let length = usize::try_from(length).expect("a length in a byte");
        header.as_mut_slice()[length..].fill(0);
    }
    Ok(header)
}

/// Refuses what has no 64-bit entry or is not whole; returns how many bytes are to be loaded.
fn check_header<F: Read + Seek>(image: &Image<'_, F>, header: &setup_header) -> Result<u64, BootError> {
    let (boot_flag, version) = (header.boot_flag, header.version);
    let (xloadflags, start) = (header.xloadflags, header.pref_address);
    if boot_flag != BOOT_FLAG {
        return Err(image.not_bootable(format!("its boot sector ends with {boot_flag:#06x}, not 0xaa55")));
    }
    if version < VERSION_MIN {
        let [major, minor] = version.to_be_bytes();
        return Err(image.not_bootable(format!(
            "it speaks version {major}.{minor:02} of the boot protocol, and a 64-bit entry needs 2.12 (Linux 3.8)"
        )));
    }
    if xloadflags & XLF_KERNEL_64 == 0 {
        return Err(
            image.not_bootable("it has no 64-bit entry (XLF_KERNEL_64); give a kernel built for x86-64")
        );
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(image.not_bootable("it is a zImage, which is loaded below 1 MiB; build a bzImage"));
    }
    if start < HIGH_MEMORY {
        let what = format!("it wants to be loaded at {start:#x}, below 1 MiB, where tables go");
        return Err(image.not_bootable(what));
    }
    let setup_sectors = match header.setup_sects {
        0 => SETUP_SECTORS_DEFAULT,
        sectors => u64::from(sectors),
    };
    let setup_bytes = (setup_sectors + 1) * SECTOR_BYTES;
    let whole_bytes = setup_bytes + u64::from(header.syssize) * PARAGRAPH_BYTES;
    // syssize counts whole paragraphs, of which the last one may be short.
    if header.syssize == 0 || image.bytes + PARAGRAPH_BYTES <= whole_bytes {
        let what =
            format!("it is truncated: it says that it has {whole_bytes} bytes, and has {}", image.bytes);
        return Err(image.not_bootable(what));
    }
    let bytes = image.bytes.saturating_sub(setup_bytes);
    if bytes <= ENTRY_64_OFFSET {
        return Err(image.not_bootable(format!("its {bytes} bytes of code end before its 64-bit entry")));
    }
    Ok(bytes)
}
