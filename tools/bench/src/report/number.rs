//! Numbers as they are shown: three significant digits, in the unit in which a metric is best read.

use crate::results::Metric;
use crate::stats::metric::Unit;

/// Bytes of a MiB.
pub const MIB: f64 = 1_048_576.0;

/// The last second of the year 9999.
const UNIX_S_MAX: u64 = 253_402_300_799;

/// Bytes of a page.
pub const PAGE_BYTES: f64 = 4096.0;

/// What a metric is shown in.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shown {
    /// The unit's name.
    pub unit: &'static str,
    /// What values are multiplied with to be in it.
    pub factor: f64,
}

/// The unit in which `metric` is shown: always the same, so that columns can be compared at a glance.
#[must_use]
pub fn shown(metric: Metric) -> Shown {
    match (metric, metric.unit()) {
        (Metric::TotalMs, _) => Shown { unit: "s", factor: 1e-3 },
        (_, Unit::Ms) => Shown { unit: "ms", factor: 1.0 },
        (_, Unit::S) => Shown { unit: "s", factor: 1.0 },
        (_, Unit::Bytes) => Shown { unit: "MiB", factor: 1.0 / MIB },
        (_, Unit::Count) => Shown { unit: "", factor: 1.0 },
        (_, Unit::Share) => Shown { unit: "%", factor: 100.0 },
    }
}

/// `value` of `metric` in the unit in which it is shown, without the unit's name.
#[must_use]
pub fn value_of(metric: Metric, value: f64) -> String {
    let value = value * shown(metric).factor;
    match metric.unit() {
        Unit::Count => whole(value),
        Unit::Ms | Unit::S | Unit::Bytes | Unit::Share => digits(value),
    }
}

/// The same with the unit's name.
#[must_use]
pub fn with_unit(metric: Metric, value: f64) -> String {
    let unit = shown(metric).unit;
    let space = if unit.is_empty() { "" } else { " " };
    format!("{}{space}{unit}", value_of(metric, value))
}

/// The name of `metric` with the unit in which it is shown, for headings.
#[must_use]
pub fn heading(metric: Metric) -> String {
    let unit = shown(metric).unit;
    if unit.is_empty() { metric.title().to_owned() } else { format!("{}, {unit}", metric.title()) }
}

/// Three significant digits; whole numbers from 100 on, with commas between thousands.
#[must_use]
pub fn digits(value: f64) -> String {
    if !value.is_finite() {
        return "–".to_owned();
    }
    let size = value.abs();
    if size < 5e-4 {
        return "0".to_owned();
    }
    // What is rounded up to the next power of ten has one digit more before the point.
    let power = size.log10().floor();
    let rounded = if size / 10f64.powf(power) >= 9.995 { power + 1.0 } else { power };
    if rounded >= 2.0 {
        return whole(value);
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 1 to 6")]
    let decimals = (2.0 - rounded).clamp(1.0, 6.0) as usize;
    signed(&format!("{value:.decimals$}"))
}

/// A ratio: two decimals, three close to 1, one from 10 on, none from 100 on.
#[must_use]
pub fn ratio(value: f64) -> String {
    if (value - 1.0).abs() < 0.0095 && value != 1.0 {
        format!("{value:.3}")
    } else if value < 9.995 {
        format!("{value:.2}")
    } else {
        digits(value)
    }
}

/// A short time in ms: two decimals, one from 10 on, none from 100 on.
#[must_use]
pub fn short_ms(value: f64) -> String {
    if value.abs() < 9.995 { signed(&format!("{value:.2}")) } else { digits(value) }
}

/// A whole number with commas between thousands.
#[must_use]
pub fn whole(value: f64) -> String {
    let text = format!("{value:.0}");
    let (sign, figures) = text.strip_prefix('-').map_or(("", text.as_str()), |figures| ("-", figures));
    let mut grouped = String::new();
    for (index, figure) in figures.chars().enumerate() {
        if index > 0 && (figures.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(figure);
    }
    signed(&format!("{sign}{grouped}"))
}

/// `text` with a minus sign as it is printed, and without one where only zeros follow.
fn signed(text: &str) -> String {
    match text.strip_prefix('-') {
        Some(rest) if rest.trim_matches(['0', '.']).is_empty() => rest.to_owned(),
        Some(rest) => format!("−{rest}"),
        None => text.to_owned(),
    }
}

/// A moment as `2026-11-21 08:50 UTC`.
#[must_use]
pub fn moment(unix_s: u64) -> String {
    let at = std::time::UNIX_EPOCH + std::time::Duration::from_secs(unix_s.min(UNIX_S_MAX));
    let text = humantime::format_rfc3339_seconds(at).to_string();
    format!("{} UTC", text[..16].replace('T', " "))
}

/// A stretch of time as `23m 52s`.
#[must_use]
pub fn span(seconds: f64) -> String {
    std::time::Duration::try_from_secs_f64(seconds.round())
        .map_or_else(|_| "–".to_owned(), |span| humantime::format_duration(span).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits_count() {
        let cases = [
            (0.0, "0"),
            (0.0004, "0"),
            (0.04567, "0.0457"),
            (1.0, "1.00"),
            (9.996, "10.0"),
            (12.34, "12.3"),
            (99.96, "100"),
            (123.4, "123"),
            (1234.5, "1,234"),
            (1_234_567.0, "1,234,567"),
            (-0.5, "−0.500"),
            (-1500.0, "−1,500"),
            (f64::NAN, "–"),
        ];
        for (value, text) in cases {
            assert_eq!(digits(value), text, "{value}");
        }
        assert_eq!((ratio(0.714), ratio(12.34)), ("0.71".to_owned(), "12.3".to_owned()));
        assert_eq!(
            (ratio(0.9992), short_ms(0.08), short_ms(12.34)),
            ("0.999".into(), "0.08".into(), "12.3".into())
        );
        assert_eq!(whole(-0.2), "0");
    }

    #[test]
    fn metrics_have_their_units() {
        assert_eq!(with_unit(Metric::TotalMs, 1534.0), "1.53 s");
        assert_eq!(with_unit(Metric::WireBytes, 4096.0 * MIB), "4,096 MiB");
        assert_eq!(with_unit(Metric::SlowDown, 0.123), "12.3 %");
        assert_eq!(with_unit(Metric::HttpFailed, 3.0), "3");
        assert_eq!(heading(Metric::CpuS), "CPU time, s");
    }

    #[test]
    fn moments_are_civil() {
        assert_eq!(moment(0), "1970-01-01 00:00 UTC");
        assert_eq!(moment(951_782_400), "2000-02-29 00:00 UTC");
        assert_eq!(moment(1_795_251_018), "2026-11-21 08:50 UTC");
        assert_eq!(moment(u64::MAX), "9999-12-31 23:59 UTC");
        assert_eq!((span(4.1), span(1432.0)), ("4s".to_owned(), "23m 52s".to_owned()));
        assert_eq!(span(f64::NAN), "–");
    }
}
