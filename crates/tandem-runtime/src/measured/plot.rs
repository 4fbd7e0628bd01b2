//! Pictures of a benchmark: tokens per second against context, and where a step's time goes.

use std::path::Path;

use anyhow::anyhow;
use plotters::prelude::*;

const WIDTH: u32 = 900;
const PANEL: u32 = 340;
const FONT: &str = "sans-serif";

/// Draws the curve (if it has two points or more) above one bar per entry of `bars`: a name and ms by operation.
///
/// # Errors
/// When `file` cannot be written.
pub fn draw(file: &Path, title: &str, curve: &[(f64, f64)], bars: &[(String, Vec<(&str, f64)>)]) -> anyhow::Result<()> {
    let failed = |e: &dyn std::fmt::Display| anyhow!("cannot write the plot {}: {e}", file.display());
    let has_curve = curve.len() > 1;
    let bars_height = 150 + 60 * bars.len() as u32;
    let height = 40 + bars_height + if has_curve { PANEL } else { 0 };
    let root = SVGBackend::new(file, (WIDTH, height)).into_drawing_area();
    root.fill(&WHITE).map_err(|e| failed(&e))?;
    let area = root.titled(title, (FONT, 18)).map_err(|e| failed(&e))?;
    let (top, bottom) = area.split_vertically(if has_curve { PANEL } else { 0 });
    if has_curve {
        draw_curve(&top, curve).map_err(|e| failed(&e))?;
    }
    draw_bars(&bottom, bars).map_err(|e| failed(&e))?;
    root.present().map_err(|e| failed(&e))
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Drawn<'a> = Result<(), DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>>;

fn draw_curve<'a>(area: &Area<'a>, curve: &[(f64, f64)]) -> Drawn<'a> {
    let mut points = curve.to_vec();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    let last = points.last().map_or(1.0, |p| p.0).max(1.0);
    let top = points.iter().map(|p| p.1).fold(0.0, f64::max) * 1.15;
    let mut chart = ChartBuilder::on(area)
        .margin(15)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..last * 1.05, 0.0..top)?;
    chart
        .configure_mesh()
        .label_style((FONT, 14))
        .x_desc("tokens of context")
        .y_desc("tokens per second")
        .light_line_style(WHITE)
        .draw()?;
    chart.draw_series(std::iter::once(PathElement::new(points.clone(), BLUE.stroke_width(2))))?;
    chart.draw_series(points.iter().map(|p| Circle::new(*p, 4, BLUE.filled())))?;
    Ok(())
}

fn draw_bars<'a>(area: &Area<'a>, bars: &[(String, Vec<(&str, f64)>)]) -> Drawn<'a> {
    let longest = bars.iter().map(|(_, rows)| rows.iter().map(|r| r.1).sum::<f64>()).fold(0.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .margin(15)
        .margin_bottom(70)
        .x_label_area_size(40)
        .y_label_area_size(10)
        .build_cartesian_2d(0.0..longest * 1.02, 0.0..bars.len() as f64)?;
    chart.configure_mesh().label_style((FONT, 14)).disable_y_mesh().disable_y_axis().x_desc("ms per step").draw()?;
    for (i, (name, rows)) in bars.iter().enumerate() {
        let low = (bars.len() - 1 - i) as f64;
        let mut start = 0.0;
        for (color, (_, ms)) in rows.iter().enumerate() {
            let bar = [(start, low + 0.1), (start + ms, low + 0.65)];
            chart.draw_series(std::iter::once(Rectangle::new(bar, Palette99::pick(color).filled())))?;
            start += ms;
        }
        chart.draw_series(std::iter::once(Text::new(name.clone(), (0.0, low + 0.95), (FONT, 14))))?;
    }
    // A legend below the axis, three to a line.
    let (_, height) = area.dim_in_pixel();
    for (i, (name, _)) in bars.first().map_or(&[][..], |(_, rows)| rows).iter().enumerate() {
        let (x, y) = (30 + 220 * (i as i32 / 3), height as i32 - 62 + 19 * (i as i32 % 3));
        area.draw(&Rectangle::new([(x, y), (x + 12, y + 12)], Palette99::pick(i).filled()))?;
        area.draw(&Text::new(name.to_string(), (x + 18, y), (FONT, 14)))?;
    }
    Ok(())
}
