//! Throughput over the time of a migration: what is drawn, in the terminal and as HTML.
//!
//! The x axis is milliseconds on whatever clock the caller uses; the y axis starts at zero. Drawing
//! is in [`MigrationPlot::to_terminal`] and [`MigrationPlot::to_html`].

pub mod axis;
mod html;
mod svg;
mod terminal;

use serde::Serialize;

/// A stretch of time with a name, such as one pre-copy round.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Band {
    /// When it began, in milliseconds.
    pub from_ms: f64,
    /// When it ended.
    pub to_ms: f64,
    /// Its name, a word or two.
    pub label: String,
}

/// All that a drawing of a migration shows.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct MigrationPlot {
    /// The headline, plain text.
    pub title: String,
    /// The throughput as `(t_ms, mib_per_s)`, in order of time. Values that are not finite are left out.
    pub samples: Vec<(f64, f64)>,
    /// The phases of the migration. The first one's beginning is the migration's.
    pub bands: Vec<Band>,
    /// When the guest was stopped and when it ran again, in milliseconds.
    pub downtime: Option<(f64, f64)>,
    /// The main figures, as name and value.
    pub facts: Vec<(String, String)>,
}

/// What part of the plane is drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Extent {
    from_ms: f64,
    to_ms: f64,
    mib_per_s_max: f64,
}

impl MigrationPlot {
    /// Where the samples, bands and the downtime lie; never empty.
    fn extent(&self) -> Extent {
        let band_ends = self.bands.iter().flat_map(|band| [band.from_ms, band.to_ms]);
        let downtime_ends = self.downtime.into_iter().flat_map(|(from_ms, to_ms)| [from_ms, to_ms]);
        let times = self.points().map(|(t_ms, _)| t_ms).chain(band_ends).chain(downtime_ends);
        let (from_ms, to_ms) = times
            .filter(|t_ms| t_ms.is_finite())
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), t_ms| (low.min(t_ms), high.max(t_ms)));
        let (from_ms, to_ms) =
            if from_ms <= to_ms { (from_ms, to_ms.max(from_ms + 1.0)) } else { (0.0, 1.0) };
        let mib_per_s_max = self.points().map(|(_, rate)| rate).fold(0.0, f64::max);
        Extent { from_ms, to_ms, mib_per_s_max: if mib_per_s_max > 0.0 { mib_per_s_max } else { 1.0 } }
    }

    fn points(&self) -> impl Iterator<Item = (f64, f64)> {
        self.samples.iter().copied().filter(|(t_ms, rate)| t_ms.is_finite() && rate.is_finite())
    }

    /// When the migration began, if it is known.
    fn migration_start_ms(&self) -> Option<f64> {
        self.bands.iter().map(|band| band.from_ms).filter(|t_ms| t_ms.is_finite()).reduce(f64::min)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_extent_spans_samples_bands_and_downtime() {
        let plot = MigrationPlot {
            samples: vec![(5.0, 2.0), (f64::NAN, 9.0), (9.0, f64::INFINITY)],
            bands: vec![Band { from_ms: 2.0, to_ms: 7.0, label: "round 0".into() }],
            downtime: Some((7.0, 11.0)),
            ..MigrationPlot::default()
        };
        assert_eq!(plot.extent(), Extent { from_ms: 2.0, to_ms: 11.0, mib_per_s_max: 2.0 });
        assert_eq!(plot.migration_start_ms(), Some(2.0));
    }

    #[test]
    fn the_extent_of_nothing_is_not_empty() {
        let extent = MigrationPlot::default().extent();
        assert!(extent.to_ms > extent.from_ms && extent.mib_per_s_max > 0.0);
    }
}
