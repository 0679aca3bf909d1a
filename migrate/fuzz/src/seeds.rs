//! What fuzzing begins with: the golden wire vectors, so that every message and frame is among it, what ferry itself encodes, and
//! the corpus.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use ferry_protocol::encode::delta::BLOCK_BYTES;
use ferry_protocol::encode::pack::{Method, Packer};
use ferry_protocol::witness::{Entry, Verdict};
use ferry_protocol::{Epoch, MigrationId, PAGE_BYTES, VmId};

use crate::conversations;
use crate::targets::FuzzTarget;

/// The repository.
#[must_use]
pub fn repository() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).expect("migrate/fuzz lies two folders deep").to_owned()
}

/// Where inputs for `target` are kept.
#[must_use]
pub fn corpus(target: &FuzzTarget) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name)
}

/// All that there is to begin with.
///
/// # Errors
/// If a file can't be read.
pub fn seeds(target: &FuzzTarget) -> io::Result<Vec<Vec<u8>>> {
    let golden = repository().join("tests/golden");
    let machine = repository().join("vmm/tests/golden");
    // Most functions take a byte or two for themselves from the front.
    let behind = |front: &[u8], inputs: Vec<Vec<u8>>| {
        inputs.into_iter().map(|input| [front, &input].concat()).collect::<Vec<_>>()
    };
    let mut seeds = match target.name {
        "control" => behind(&[1, 7], hex_files(&golden.join("message"))?),
        "target" => conversations::of_target(&hex_files(&golden.join("message"))?),
        "source" => conversations::of_source(&hex_files(&golden.join("message"))?),
        "join" => behind(&[1], hex_files(&golden)?),
        "frame" => behind(&[1, 0, 0, 1, 0, 0, 0, 0, 0], hex_files(&golden.join("frame"))?),
        "packed" => packed(),
        "delta" => deltas(),
        "record" => hex_files(&golden.join("record"))?,
        "description" => files(&machine)?,
        "witness" => entries(),
        "state" => [behind(&[0], files(&machine)?), behind(&[1], files(&machine)?), changes()].concat(),
        "restore" => changes(),
        _ => Vec::new(),
    };
    seeds.extend(files(&corpus(target))?);
    seeds.push(Vec::new());
    Ok(seeds)
}

/// What a witness may hold.
fn entries() -> Vec<Vec<u8>> {
    let entry = |verdict| {
        Entry { vm: VmId([1; 16]), epoch: Epoch::FIRST, migration: MigrationId([2; 16]), verdict }.encode()
    };
    vec![entry(Verdict::Runs), entry(Verdict::Released), entry(Verdict::Discarded)]
}

/// A saved state as it is, and with one change of each kind: see [`crate::states::bent`].
fn changes() -> Vec<Vec<u8>> {
    let mut seeds = vec![vec![2], vec![3]];
    for (section, what) in (0..10u8).flat_map(|section| (0..10).map(move |what| (section, what))) {
        seeds.push(vec![2 + section % 2, section, section.wrapping_mul(29), 0, what, section + what]);
    }
    seeds
}

/// Bodies of deltas: for each page which of its blocks follow, then the blocks.
fn deltas() -> Vec<Vec<u8>> {
    let groups: [&[u32]; 5] = [&[1], &[0, 0x8000_0000], &[u32::MAX], &[3, 0, 5, 1 << 31], &[1; 16]];
    let body = |masks: &[u32]| {
        let blocks: u32 = masks.iter().map(|mask| mask.count_ones()).sum();
        let blocks = (0..blocks).flat_map(|block| [block.to_le_bytes()[0]; BLOCK_BYTES]);
        let front = u8::try_from(masks.len() - 1).unwrap_or_default();
        let masks = masks.iter().flat_map(|mask| mask.to_le_bytes());
        std::iter::once(front).chain(masks).chain(blocks).collect()
    };
    groups.into_iter().map(body).collect()
}

/// Some pages in each packing.
fn packed() -> Vec<Vec<u8>> {
    let page: [u8; PAGE_BYTES] = std::array::from_fn(|at| at.to_le_bytes()[0] / 16);
    let mut seeds = Vec::new();
    for (number, method) in [(0, Method::Lz4), (1, Method::Zstd(1))] {
        let mut packer = Packer::default();
        (0..4).for_each(|_| packer.add(&page));
        seeds.extend(packer.pack(method).map(|body| [&[number, 3], body].concat()));
    }
    seeds
}

/// The files of a folder, in order; none if there is no such folder.
fn files(folder: &Path) -> io::Result<Vec<Vec<u8>>> {
    paths(folder)?.iter().map(fs::read).collect()
}

fn paths(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    match fs::read_dir(folder) {
        Ok(entries) => {
            for entry in entries {
                let path = entry?.path();
                if path.is_file() {
                    paths.push(path);
                }
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    paths.sort();
    Ok(paths)
}

/// The golden files of a folder: bytes in hexadecimal, with comments.
fn hex_files(folder: &Path) -> io::Result<Vec<Vec<u8>>> {
    let mut found = Vec::new();
    for path in paths(folder)?.iter().filter(|path| path.extension().is_some_and(|it| it == "hex")) {
        let text = fs::read_to_string(path)?;
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let words = lines.flat_map(str::split_whitespace).map(|word| u8::from_str_radix(word, 16));
        found.push(words.collect::<Result<_, _>>().map_err(io::Error::other)?);
    }
    Ok(found)
}
