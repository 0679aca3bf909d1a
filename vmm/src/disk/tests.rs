//! Who gets a disk, and what is written to it.

use super::*;

const SIZE_BYTES: u64 = 1 << 20;

struct Image {
    _directory: tempfile::TempDir,
    path: PathBuf,
}

fn image() -> Image {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    File::create(&path).unwrap().set_len(SIZE_BYTES).unwrap();
    Image { _directory: directory, path }
}

impl Image {
    fn config(&self) -> DiskConfig {
        DiskConfig { path: self.path.clone(), read_only: false, serial: None, locked: true, taken_over: None }
    }

    fn target_of(&self, source: &Disk) -> DiskConfig {
        DiskConfig { taken_over: Some(source.as_source()), ..self.config() }
    }
}

#[test]
fn a_disk_passes_from_source_to_target_and_back() {
    let image = image();
    let source = Disk::open(&image.config()).unwrap();
    let target = Disk::open(&image.target_of(&source)).unwrap();
    let error = target.take().unwrap_err();
    assert!(matches!(error, DiskError::InUse { .. }), "the source still owns it: {error}");
    let error = Disk::open(&image.target_of(&source)).unwrap_err();
    assert!(matches!(error, DiskError::Awaited { .. }), "two targets: {error}");

    source.let_go().unwrap();
    // Between the two nobody can come.
    let error = Disk::open(&image.config()).unwrap_err();
    assert!(matches!(error, DiskError::Awaited { .. }), "{error}");
    target.take().unwrap();
    target.take().unwrap();
    assert!(matches!(source.take().unwrap_err(), DiskError::InUse { .. }));
    assert!(matches!(Disk::open(&image.config()).unwrap_err(), DiskError::InUse { .. }));

    target.let_go().unwrap();
    source.take().unwrap();
    drop((source, target));
    drop(Disk::open(&image.config()).unwrap());
}

#[test]
fn a_source_takes_its_disk_back_from_a_target_that_only_intended() {
    let image = image();
    let source = Disk::open(&image.config()).unwrap();
    let target = Disk::open(&image.target_of(&source)).unwrap();
    source.let_go().unwrap();
    source.take().unwrap();
    assert!(matches!(target.take().unwrap_err(), DiskError::InUse { .. }));
    drop(target);
    drop(Disk::open(&image.target_of(&source)).unwrap());
}

#[test]
fn a_target_refuses_a_file_that_is_not_the_sources() {
    let (shared, local) = (image(), image());
    let source = Disk::open(&shared.config()).unwrap();
    let error = Disk::open(&local.target_of(&source)).unwrap_err();
    assert!(matches!(error, DiskError::NotTheSources { .. }), "{error}");
    // One that somebody else uses is no better.
    let _other = Disk::open(&local.config()).unwrap();
    let error = Disk::open(&local.target_of(&source)).unwrap_err();
    assert!(matches!(error, DiskError::NotTheSources { .. }), "{error}");
    // A source without locks proves nothing.
    let unmarked = SourceDisk { mark: None, ..source.as_source() };
    let config = DiskConfig { taken_over: Some(unmarked), ..shared.config() };
    assert!(matches!(Disk::open(&config).unwrap_err(), DiskError::NotTheSources { .. }));
    drop(Disk::open(&DiskConfig { locked: false, ..config }).unwrap());
}

#[test]
fn what_is_missing_or_has_another_size_is_named() {
    let image = image();
    let source = Disk::open(&image.config()).unwrap();
    let other = SourceDisk { size_bytes: SIZE_BYTES + 512, ..source.as_source() };
    let error = Disk::open(&DiskConfig { taken_over: Some(other), ..image.config() }).unwrap_err();
    assert!(matches!(error, DiskError::OtherSize { size_bytes: SIZE_BYTES, .. }), "{error}");
    drop(source);
    for size_bytes in [0, 511, 513] {
        File::options().write(true).open(&image.path).unwrap().set_len(size_bytes).unwrap();
        let error = Disk::open(&image.config()).unwrap_err();
        assert!(error.to_string().contains(&format!("{size_bytes} bytes")), "{error}");
    }
    let missing = DiskConfig { path: "/nowhere/disk".into(), ..image.config() };
    let error = Disk::open(&missing).unwrap_err();
    assert!(error.to_string().contains("/nowhere/disk"), "{error}");
    for path in ["/", "/dev/null"] {
        let error = Disk::open(&DiskConfig { path: path.into(), ..image.config() }).unwrap_err();
        assert!(matches!(error, DiskError::NotADisk { .. }), "{error}");
    }
}

#[test]
fn readers_share_a_disk_and_exclude_a_writer() {
    let image = image();
    let reader = DiskConfig { read_only: true, ..image.config() };
    let one = Disk::open(&reader).unwrap();
    let other = Disk::open(&reader).unwrap();
    assert!(matches!(
        Disk::open(&image.config()).unwrap_err(),
        DiskError::Awaited { .. } | DiskError::InUse { .. }
    ));
    let target = Disk::open(&DiskConfig { taken_over: Some(one.as_source()), ..reader.clone() }).unwrap();
    target.take().unwrap();
    one.let_go().unwrap();
    drop((one, other, target));
    let writer = Disk::open(&image.config()).unwrap();
    assert!(matches!(Disk::open(&reader).unwrap_err(), DiskError::InUse { .. }));
    drop(writer);
}

#[test]
fn zeroes_are_made_with_and_without_help_of_the_file_system() {
    let image = image();
    let disk = Disk::open(&image.config()).unwrap();
    let filled = vec![0xaa; usize::try_from(SIZE_BYTES).unwrap()];
    for may_unmap in [true, false] {
        disk.write_at(&filled, 0).unwrap();
        disk.write_zeroes(512, 300 << 10, may_unmap).unwrap();
        let mut read = filled.clone();
        disk.read_at(&mut read, 0).unwrap();
        let zeroed = 512..512 + (300 << 10);
        assert!(read[zeroed.clone()].iter().all(|byte| *byte == 0));
        assert!(read[..512].iter().chain(&read[zeroed.end..]).all(|byte| *byte == 0xaa));
    }
    disk.discard(0, SIZE_BYTES).unwrap();
    disk.flush().unwrap();
    assert_eq!(std::fs::metadata(disk.path()).unwrap().len(), SIZE_BYTES);
}
