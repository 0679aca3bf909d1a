//! Figures as inline SVG, one module a kind of figure.
//!
//! Colours, fonts and strokes are classes of the page's style ([`super::html`]), so that a figure is light or dark as
//! the page is. Every drawn value carries itself in `data-` attributes, in the unit of the JSON, and every mark of an
//! axis its value and place: what is drawn can be read back and held against the results, which a test does.
//!
//! Lengths are in the SVG's own units, which are CSS pixels at full width. Not here: captions and tables.

pub(crate) mod boxes;
pub(crate) mod curve;
pub(crate) mod forest;
pub(crate) mod parts;
pub(crate) mod scale;
pub(crate) mod timeline;
pub(crate) mod witness;

use maud::{Markup, html};

use self::scale::Scale;
use super::cast::{Look, Mark};

/// About how wide a character of the figures' font is at most, to tell which labels have room.
pub(crate) const CHARACTER_WIDTH: f64 = 7.0;

/// The same of names, which are bold.
pub(crate) const NAME_CHARACTER_WIDTH: f64 = 7.7;

/// How far figures are scaled up and down to fit; below that they scroll.
const SCALE_MAX: f64 = 1.08;
const SCALE_MIN: f64 = 0.74;

/// Half the width of a mark.
pub(crate) const MARK_RADIUS: f64 = 4.0;

/// A length with the digits that can be seen.
pub(crate) fn px(length: f64) -> String {
    let text = format!("{length:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// A figure of that size. `describe` is its text for those who can't see it.
pub(crate) fn figure(width: f64, height: f64, describe: &str, inside: Markup) -> Markup {
    html! {
        svg viewBox=(format!("0 0 {} {}", px(width), px(height))) role="img" aria-label=(describe)
            style=(format!("max-width:{}px;min-width:{}px", px(width * SCALE_MAX), px(width * SCALE_MIN))) {
            (inside)
        }
    }
}

/// `text`, cut to what has room in `width`.
pub(crate) fn fitting(text: &str, width: f64) -> String {
    let count = text.chars().count();
    if count as f64 * CHARACTER_WIDTH <= width {
        return text.to_owned();
    }
    let room = (width / CHARACTER_WIDTH).floor().max(2.0);
    let kept = text.chars().enumerate().take_while(|(index, _)| (*index as f64) < room - 1.0);
    kept.map(|(_, character)| character).chain(['…']).collect()
}

/// A mark of an engine at a place. Hollow ones are for what is less certain.
pub(crate) fn mark(look: &Look, (x, y): (f64, f64), radius: f64, hollow: bool, inside: Markup) -> Markup {
    let class = format!("mark {}{}", look.class, if hollow { " hollow" } else { "" });
    html! {
        path class=(class) d=(outline(look.mark, radius)) transform=(format!("translate({} {})", px(x), px(y))) {
            (inside)
        }
    }
}

/// The outline of a mark around the origin. All shapes have about the same area.
fn outline(mark: Mark, radius: f64) -> String {
    let (r, near, far) = (px(radius), radius * 0.89, radius * 1.25);
    let (n, f) = (px(near), px(far));
    let (up, side, down) = (px(-radius * 1.2), px(radius * 1.2), px(radius * 0.9));
    match mark {
        Mark::Circle => format!("M-{r} 0a{r} {r} 0 1 0 {d} 0a{r} {r} 0 1 0-{d} 0z", d = px(2.0 * radius)),
        Mark::Square => format!("M-{n}-{n}H{n}V{n}H-{n}z"),
        Mark::Diamond => format!("M0-{f}L{f} 0L0 {f}L-{f} 0z"),
        Mark::Up => format!("M0 {up}L{side} {down}H-{side}z"),
        Mark::Down => format!("M0 {side}L{side}-{down}H-{side}z"),
        Mark::Cross => {
            let (a, b) = (px(radius * 0.45), px(radius * 1.2));
            format!("M-{a}-{b}H{a}V-{a}H{b}V{a}H{a}V{b}H-{a}V{a}H-{b}V-{a}H-{a}z")
        }
    }
}

/// A horizontal axis below `bottom` with faint lines up to `top`. `label` names the quantity and its unit.
pub(crate) fn x_axis(scale: &Scale, (top, bottom): (f64, f64), label: &str) -> Markup {
    let (left, right) = scale.places;
    let room = ((right - left) / 48.0).floor().max(2.0);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a few marks")]
    let marks = scale.marks(room as usize);
    html! {
        g class="axis" data-axis="x" data-scale=(scale.kind.name()) {
            @for (value, text) in marks {
                @let x = px(scale.at(value));
                line class="grid" x1=(x) x2=(x) y1=(px(top)) y2=(px(bottom)) data-tick=(value) {}
                text x=(x) y=(px(bottom + 14.0)) text-anchor="middle" { (text) }
            }
            line class="rule" x1=(px(left)) x2=(px(right)) y1=(px(bottom)) y2=(px(bottom)) {}
            text class="unit" x=(px(f64::midpoint(left, right))) y=(px(bottom + 29.0)) text-anchor="middle" {
                (label)
            }
        }
    }
}

/// A vertical axis left of `left` with faint lines to `right` and at most about `marks_max` marks. It has no label:
/// what it shows stands above the figure.
pub(crate) fn y_axis(scale: &Scale, (left, right): (f64, f64), marks_max: usize) -> Markup {
    html! {
        g class="axis" data-axis="y" data-scale=(scale.kind.name()) {
            @for (value, text) in scale.marks(marks_max) {
                @let y = scale.at(value);
                line class="grid" x1=(px(left)) x2=(px(right)) y1=(px(y)) y2=(px(y)) data-tick=(value) {}
                text x=(px(left - 6.0)) y=(px(y + 4.0)) text-anchor="end" { (text) }
            }
        }
    }
}

/// The scenario's downtime budget as a dashed line at `x`, with its name above it.
pub(crate) fn budget_line(
    x: f64,
    (top, bottom): (f64, f64),
    budget_ms: f64,
    (left, right): (f64, f64),
) -> Markup {
    let text = format!("budget {budget_ms} ms");
    let half = text.chars().count() as f64 * CHARACTER_WIDTH / 2.0;
    html! {
        g class="budget" data-budget-ms=(budget_ms) {
            line x1=(px(x)) x2=(px(x)) y1=(px(top)) y2=(px(bottom)) {}
            text x=(px(x.clamp(left + half, right - half))) y=(px(top - 4.0)) text-anchor="middle" { (text) }
        }
    }
}

/// The sum of what is behind a range of whole steps, each `step` long, as a place.
pub(crate) fn row(top: f64, index: usize, step: f64) -> f64 {
    top + (index as f64 + 0.5) * step
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_and_labels_are_short() {
        assert_eq!((px(12.0), px(0.126), px(-3.5)), ("12".to_owned(), "0.13".to_owned(), "-3.5".to_owned()));
        assert_eq!(fitting("cloud-hypervisor", 200.0), "cloud-hypervisor");
        assert_eq!(fitting("cloud-hypervisor", 63.0), "cloud-hy…");
    }
}
