//! The drawing as one HTML file: inline SVG, light or dark as the reader prefers, no network.
//!
//! Below the whole run, a second chart shows the moments around the downtime, which would be a hair's
//! breadth in the first. Every text that comes from outside is escaped.

use std::fmt::Write as _;

use super::svg::{Chart, escape};
use super::{Extent, MigrationPlot, axis};

/// How much the second chart shows before and after the downtime, at least.
const AROUND_DOWNTIME_MS_MIN: f64 = 150.0;

const STYLE: &str = r"
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1f2328; --faint: #59636e; --grid: #e3e7ec; --rule: #8b949e;
  --line: #0b62d6; --area: #0b62d614; --band: #6e7bd21a; --band-odd: #6e7bd233;
  --stop: #cf222e; --stop-area: #cf222e2b; --hover: #0b62d61f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #0f141a; --ink: #e6edf3; --faint: #9aa7b4; --grid: #262d36; --rule: #6b7681;
    --line: #62aaff; --area: #62aaff1c; --band: #8f9cf01c; --band-odd: #8f9cf038;
    --stop: #ff7b72; --stop-area: #ff7b7238; --hover: #62aaff2e;
  }
}
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', sans-serif; }
main { max-width: 960px; margin: 0 auto; padding: 28px 20px 40px; }
h1 { font-size: 21px; line-height: 1.25; font-weight: 600; margin: 0 0 14px; }
figure { margin: 0 0 22px; }
figcaption { color: var(--faint); margin: 0 0 2px; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 12px system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', sans-serif; fill: var(--faint); }
svg .name { fill: var(--ink); }
svg .stop-name { fill: var(--stop); font-weight: 600; }
svg .grid { stroke: var(--grid); }
svg .rule { stroke: var(--rule); }
svg .line { fill: none; stroke: var(--line); stroke-width: 1.5; stroke-linejoin: round; }
svg .area { fill: var(--area); }
svg .band { fill: var(--band); }
svg .band.odd { fill: var(--band-odd); }
svg .stop { fill: var(--stop-area); stroke: var(--stop); stroke-width: 1; }
svg .hover { fill: transparent; }
svg .hover:hover { fill: var(--hover); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; font-weight: normal; padding: 4px 28px 4px 0; border-bottom: 1px solid var(--grid); }
th { color: var(--faint); }
";

impl MigrationPlot {
    /// Draws a complete HTML document.
    #[must_use]
    pub fn to_html(&self) -> String {
        let extent = self.extent();
        let top = axis::round_top(extent.mib_per_s_max);
        let title = escape(&self.title);
        let mut page = format!(
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n"
        );
        let whole = Chart { plot: self, extent, top, height: 380.0, id: "whole", time_in_s: true };
        page.push_str(&figure("The whole run", &whole));
        if let Some(near) = self.around_downtime(extent) {
            let near = Chart { plot: self, extent: near, top, height: 260.0, id: "stop", time_in_s: false };
            page.push_str(&figure("Around the downtime", &near));
        }
        page.push_str(&self.table());
        page.push_str("</main>\n</body>\n</html>\n");
        page
    }

    fn around_downtime(&self, extent: Extent) -> Option<Extent> {
        let (from_ms, to_ms) = self.downtime.filter(|(from, to)| from.is_finite() && to.is_finite())?;
        let margin_ms = (2.0 * (to_ms - from_ms)).max(AROUND_DOWNTIME_MS_MIN);
        let from_ms = (from_ms - margin_ms).max(extent.from_ms);
        let to_ms = (to_ms + margin_ms).min(extent.to_ms);
        Some(Extent { from_ms, to_ms: to_ms.max(from_ms + 1.0), ..extent })
    }

    fn table(&self) -> String {
        if self.facts.is_empty() {
            return String::new();
        }
        let mut table = String::from("<table>\n");
        for (name, value) in &self.facts {
            let (name, value) = (escape(name), escape(value));
            // Writing to a string can't fail.
            let _ = writeln!(table, "<tr><th scope=\"row\">{name}</th><td>{value}</td></tr>");
        }
        table.push_str("</table>\n");
        table
    }
}

fn figure(caption: &str, chart: &Chart<'_>) -> String {
    format!("<figure>\n<figcaption>{caption}</figcaption>\n{}</figure>\n", chart.draw())
}

#[cfg(test)]
mod tests {
    use super::super::Band;
    use super::*;

    fn hostile() -> MigrationPlot {
        let text = "<script>alert(\"1\")</script> & 'more'".to_owned();
        MigrationPlot {
            title: text.clone(),
            samples: (0..2000).map(|index| (f64::from(index), f64::from(index % 100))).collect(),
            bands: vec![Band { from_ms: 100.0, to_ms: 1900.0, label: text.clone() }],
            downtime: Some((1500.0, 1520.0)),
            facts: vec![(text.clone(), text)],
        }
    }

    #[test]
    fn text_from_outside_is_escaped_everywhere() {
        let page = hostile().to_html();
        assert!(!page.contains("<script"), "{page}");
        assert!(!page.contains("& '"), "{page}");
        assert!(page.matches("&lt;script&gt;alert(&quot;1&quot;)").count() >= 5);
    }

    #[test]
    fn the_page_needs_no_network_and_its_elements_are_closed() {
        let page = hostile().to_html();
        for outside in ["http:", "https:", "src=", "href=", "@import", "url(http"] {
            let allowed = page.matches("http://www.w3.org/2000/svg").count();
            let found = page.matches(outside).count();
            assert!(found == 0 || (outside == "http:" && found == allowed), "{outside}");
        }
        for element in ["svg", "g", "figure", "table", "text", "title", "main", "body", "html", "clipPath"] {
            let opened =
                page.matches(&format!("<{element}>")).count() + page.matches(&format!("<{element} ")).count();
            assert_eq!(opened, page.matches(&format!("</{element}>")).count(), "{element}");
        }
        assert!(!page.contains("NaN") && !page.contains("inf"));
    }

    #[test]
    fn what_is_missing_is_left_out() {
        let page = MigrationPlot::default().to_html();
        assert!(!page.contains("Around the downtime") && !page.contains("<table"));
        assert!(page.contains("<svg") && !page.contains("NaN"));
    }
}
