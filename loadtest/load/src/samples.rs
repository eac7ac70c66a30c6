//! Sorted measurements and their quantiles.

use std::time::Duration;

pub const MS: f64 = 1e3;
pub const US: f64 = 1e6;

/// Sorted samples.
#[derive(Debug, Clone)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// `unit`: [`MS`] or [`US`].
    pub fn of(times: impl IntoIterator<Item = Duration>, unit: f64) -> Self {
        Self::plain(times.into_iter().map(|time| time.as_secs_f64() * unit))
    }

    pub fn plain(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        Self(values)
    }

    /// The nearest sample to a share of them, 0.5 being the median; NaN where there is none.
    pub fn at(&self, share: f64) -> f64 {
        if self.0.is_empty() {
            return f64::NAN;
        }
        self.0[((self.0.len() - 1) as f64 * share).round() as usize]
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_samples() {
        let samples = Samples::plain([3.0, 1.0, 2.0]);
        assert_eq!((samples.at(0.0), samples.at(0.5), samples.at(1.0)), (1.0, 2.0, 3.0));
        assert!(Samples::plain([]).at(0.5).is_nan());
        assert_eq!(Samples::of([Duration::from_millis(7)], MS).at(0.5), 7.0);
    }
}
