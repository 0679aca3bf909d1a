//! Sizes, rates and durations as people write them: `1G`, `800M`, `125M/s`, `1Gbit/s`, `50ms`, `5m`.

use std::time::Duration;

/// Bytes: a number with K, M, G or T (binary), optionally followed by `iB` or `B`.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    let bad = || format!("'{text}' is not a size; write it like 512M, 1G or 1073741824");
    let (number, unit) = split(text).ok_or_else(bad)?;
    let shift = match unit.trim_end_matches("iB").trim_end_matches('B') {
        "" => 0,
        "K" | "k" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(bad()),
    };
    scale(number, 2f64.powi(shift)).ok_or_else(bad)
}

/// Bytes a second: a size with `/s`, or a number of `Mbit/s`, `Gbit/s` (decimal).
pub(crate) fn bytes_per_s(text: &str) -> Result<u64, String> {
    let bad = || format!("'{text}' is not a rate; write it like 100M/s or 1Gbit/s");
    let per_s = text.strip_suffix("/s").ok_or_else(bad)?;
    let rate = match per_s.strip_suffix("bit") {
        Some(bits) => {
            let (number, unit) = split(bits).ok_or_else(bad)?;
            let factor = match unit {
                "" => 1.0,
                "k" | "K" => 1e3,
                "M" => 1e6,
                "G" => 1e9,
                _ => return Err(bad()),
            };
            scale(number, factor / 8.0).ok_or_else(bad)?
        }
        None => bytes(per_s).map_err(|_| bad())?,
    };
    if rate == 0 { Err(format!("a rate of '{text}' would never send anything")) } else { Ok(rate) }
}

/// A duration: a number with `ms`, `s`, `m` or `h`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let bad = || format!("'{text}' is not a duration; write it like 50ms, 2s or 5m");
    let (number, unit) = split(text).ok_or_else(bad)?;
    let seconds = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        _ => return Err(bad()),
    };
    let seconds = number * seconds;
    if (0.0..1e9).contains(&seconds) { Ok(Duration::from_secs_f64(seconds)) } else { Err(bad()) }
}

fn split(text: &str) -> Option<(f64, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    Some((number.parse().ok()?, unit))
}

fn scale(number: f64, factor: f64) -> Option<u64> {
    let value = number * factor;
    // 2^53: beyond it a float no longer counts single bytes, and no host has that much.
    let fits = value.is_finite() && (0.0..9e15).contains(&value);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked just above")]
    fits.then_some(value.round() as u64)
}

/// Bytes for people: `1.0 GiB`.
pub(crate) fn show_bytes(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

/// A rate for people: `1.2 GiB/s`.
pub(crate) fn show_rate(bytes_per_s: f64) -> String {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate for people")]
    let whole = bytes_per_s.max(0.0) as u64;
    format!("{}/s", show_bytes(whole))
}

/// Milliseconds for people: `4.2 ms`, `1.27 s`.
pub(crate) fn show_ms(ms: f64) -> String {
    if ms < 10.0 {
        format!("{ms:.1} ms")
    } else if ms < 1000.0 {
        format!("{ms:.0} ms")
    } else {
        format!("{:.2} s", ms / 1e3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_binary_and_rates_of_bits_decimal() {
        assert_eq!(bytes("1G"), Ok(1 << 30));
        assert_eq!(bytes("1.5GiB"), Ok(3 << 29));
        assert_eq!(bytes("4096"), Ok(4096));
        assert_eq!(bytes_per_s("1Gbit/s"), Ok(125_000_000));
        assert_eq!(bytes_per_s("100M/s"), Ok(100 << 20));
        assert_eq!(duration("50ms"), Ok(Duration::from_millis(50)));
        assert_eq!(duration("5m"), Ok(Duration::from_secs(300)));
    }

    #[test]
    fn what_makes_no_sense_says_so() {
        for bad in ["", "G", "1X", "-1G", "1e3", "99999999999T", "1.2.3M"] {
            assert!(bytes(bad).is_err(), "{bad:?}");
        }
        for bad in ["1G", "0M/s", "1Gbit", "fast/s"] {
            assert!(bytes_per_s(bad).is_err(), "{bad:?}");
        }
        for bad in ["50", "ms", "1d", "-1s"] {
            assert!(duration(bad).is_err(), "{bad:?}");
        }
    }
}
