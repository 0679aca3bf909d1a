//! Draws a made-up migration, to look at the drawings: `cargo run -p ferry-lab --example plot > plot.html`.

use ferry_lab::{Band, MigrationPlot};

fn main() {
    let rate = |t_ms: f64| {
        let wobble = (t_ms * 0.37).sin() * 14.0 + (t_ms * 0.053).cos() * 9.0;
        match t_ms {
            3712.0..3739.0 => 0.0,
            1500.0..3712.0 => 412.0 + 2.0 * wobble,
            _ => 748.0 + wobble,
        }
    };
    let band = |from_ms, to_ms, label: &str| Band { from_ms, to_ms, label: label.into() };
    let fact = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let plot = MigrationPlot {
        title: "Live migration of an 800 MiB web server under load".into(),
        samples: (0..600).map(|index| f64::from(index) * 10.0).map(|t_ms| (t_ms, rate(t_ms))).collect(),
        bands: vec![
            band(1500.0, 3010.0, "round 0"),
            band(3010.0, 3420.0, "round 1"),
            band(3420.0, 3590.0, "round 2"),
            band(3590.0, 3712.0, "round 3"),
        ],
        downtime: Some((3712.0, 3738.6)),
        facts: vec![
            fact("Downtime", "26.6 ms (budget 50 ms)"),
            fact("Longest gap between responses at the client", "41.2 ms"),
            fact("Requests", "8,112 right, 0 failed"),
            fact("Total time", "2.24 s"),
            fact("Bytes on the wire", "861 MiB"),
        ],
    };
    eprint!("{}", plot.to_terminal(100));
    print!("{}", plot.to_html());
}
