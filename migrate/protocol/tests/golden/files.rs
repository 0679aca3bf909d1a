//! Reading, comparing and blessing golden files.

use std::fmt::Write as _;
use std::path::PathBuf;

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name)
}

fn blessing() -> bool {
    std::env::var_os("FERRY_BLESS").is_some_and(|value| value == "1")
}

/// Checks that the golden file `name` has exactly `text`.
pub(crate) fn check(name: &str, text: &str) {
    let path = path(name);
    if blessing() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        return std::fs::write(&path, text).unwrap();
    }
    let golden = std::fs::read_to_string(&path).unwrap_or_else(|error| {
        panic!("{}: {error}; bless it with FERRY_BLESS=1 if it is new", path.display())
    });
    let difference = golden.lines().zip(text.lines()).position(|(golden, now)| golden != now);
    if let Some(line) = difference {
        let of = |text: &str| text.lines().nth(line).unwrap().to_owned();
        panic!("{} line {}:\n  was {}\n  is  {}", path.display(), line + 1, of(&golden), of(text));
    }
    assert_eq!(golden.lines().count(), text.lines().count(), "{} has another length", path.display());
}

/// Checks the golden bytes `name` and gives them back as the file has them.
pub(crate) fn check_bytes(name: &str, what: &str, bytes: &[u8]) -> Vec<u8> {
    let mut text = format!("# {what}\n");
    for line in bytes.chunks(16) {
        let hex: Vec<String> = line.iter().map(|byte| format!("{byte:02x}")).collect();
        writeln!(text, "{}", hex.join(" ")).unwrap();
    }
    check(&format!("{name}.hex"), &text);
    let file = std::fs::read_to_string(path(&format!("{name}.hex"))).unwrap();
    file.lines()
        .filter(|line| !line.starts_with('#'))
        .flat_map(str::split_whitespace)
        .map(|byte| u8::from_str_radix(byte, 16).expect("two hexadecimal digits"))
        .collect()
}

/// Checks that no golden file lies in `folder` that no test has asked for.
pub(crate) fn check_complete(folder: &str, mut expected: Vec<String>) {
    let mut found: Vec<String> = std::fs::read_dir(path(folder))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    found.sort();
    expected.sort();
    assert_eq!(found, expected, "in tests/golden/{folder}");
}
