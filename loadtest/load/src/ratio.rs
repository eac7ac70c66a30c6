//! Whether two things that were measured by turns differ: the ratio of each round's pair, and an interval around their
//! trimmed mean.
//!
//! Each pair was measured within seconds, so that whatever else the machine does falls on both alike. A fifth of the pairs
//! at either end is left out: a neighbour's burst then costs precision and does not make a difference.

/// Student's t for one chance in 10,000 at either end, by degrees of freedom from 1 to 30. A comparison has some thirty
/// figures: with this, a comparison of a thing with itself names one by mistake once in some two hundred runs.
const T: [f64; 30] = [
    3183.1, 70.7, 22.2, 13.03, 9.68, 8.02, 7.06, 6.44, 6.01, 5.69, 5.45, 5.26, 5.11, 4.99, 4.88, 4.79, 4.71, 4.65,
    4.59, 4.54, 4.49, 4.45, 4.42, 4.38, 4.35, 4.32, 4.3, 4.28, 4.25, 4.23,
];
/// Share of the pairs that is left out at either end.
const TRIM: f64 = 0.2;
/// A difference that is sure but smaller is of no account: two builds of the same source may differ so by their layout.
const SMALLEST: f64 = 0.02;
/// An interval that reaches further than this to either side says nothing: a tenth more could hide in it.
const WIDEST: f64 = 0.10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Same,
    Lower,
    Higher,
    /// The pairs were too different from each other to tell.
    Unclear,
}

/// B over A.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ratio {
    /// The trimmed mean, by logarithms.
    pub middle: f64,
    pub low: f64,
    pub high: f64,
    pub pairs: usize,
}

impl Ratio {
    /// Of `(a, b)` pairs, measured in one round each. `None` where fewer than three can be compared: zeros and what is no
    /// number have no ratio.
    pub fn of(pairs: &[(f64, f64)]) -> Option<Self> {
        let comparable = |value: f64| value.is_finite() && value > 0.0;
        let mut logs: Vec<f64> =
            pairs.iter().filter(|(a, b)| comparable(*a) && comparable(*b)).map(|(a, b)| (b / a).ln()).collect();
        if logs.len() < 3 {
            return None;
        }
        logs.sort_by(f64::total_cmp);
        let cut = (logs.len() as f64 * TRIM) as usize;
        let kept = &logs[cut..logs.len() - cut];
        let middle = kept.iter().sum::<f64>() / kept.len() as f64;
        let reach = reach(&logs, cut);
        Some(Self {
            middle: middle.exp(),
            low: (middle - reach).exp(),
            high: (middle + reach).exp(),
            pairs: logs.len(),
        })
    }

    pub fn verdict(&self) -> Verdict {
        if self.low > 1.0 && self.middle > 1.0 + SMALLEST {
            Verdict::Higher
        } else if self.high < 1.0 && self.middle < 1.0 / (1.0 + SMALLEST) {
            Verdict::Lower
        } else if self.spread() > WIDEST {
            Verdict::Unclear
        } else {
            Verdict::Same
        }
    }

    /// How far the interval reaches to the upper side, as a share.
    pub fn spread(&self) -> f64 {
        self.high / self.middle - 1.0
    }
}

/// Half of the interval (Yuen's, of a trimmed mean): by the deviation of the sorted `logs` after the `cut` ones at either
/// end are pulled in to the outermost that stay.
fn reach(logs: &[f64], cut: usize) -> f64 {
    let count = logs.len();
    let (least, most) = (logs[cut], logs[count - 1 - cut]);
    let pulled: Vec<f64> = logs.iter().map(|log| log.clamp(least, most)).collect();
    let mean = pulled.iter().sum::<f64>() / count as f64;
    let variance = pulled.iter().map(|log| (log - mean).powi(2)).sum::<f64>() / (count - 1) as f64;
    let kept_share = (count - 2 * cut) as f64 / count as f64;
    let freedom = count - 2 * cut - 1;
    T[freedom.min(T.len()) - 1] * variance.sqrt() / (kept_share * (count as f64).sqrt())
}

#[cfg(test)]
mod tests {
    use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

    use super::*;

    /// Pairs whose ratio is `effect`, with a noise of so much on each value, a drift of the machine, and bursts.
    fn pairs(count: usize, effect: f64, noise: f64, seed: u64) -> Vec<(f64, f64)> {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut value = |at: usize| {
            let drift = 1.0 + 0.5 * (at as f64 / 10.0).sin();
            // The sum of uniform numbers: near enough to a bell.
            let bell = (0..12).map(|_| rng.random::<f64>()).sum::<f64>() - 6.0;
            let burst = if rng.random::<f64>() < 0.05 { 1.8 } else { 1.0 };
            10.0 * drift * (noise * bell).exp() * burst
        };
        (0..count).map(|at| (value(at), value(at) * effect)).collect()
    }

    #[test]
    fn the_same_against_itself_shows_no_difference() {
        let named = (0..3000)
            .filter(|seed| {
                let verdict = Ratio::of(&pairs(24, 1.0, 0.04, *seed)).unwrap().verdict();
                matches!(verdict, Verdict::Higher | Verdict::Lower)
            })
            .count();
        assert!(named <= 3, "{named} of 3,000");
    }

    #[test]
    fn a_tenth_more_is_seen_and_its_sign_is_right() {
        let seen = |effect| {
            let verdict = |seed| Ratio::of(&pairs(24, effect, 0.03, seed)).unwrap().verdict();
            (0..200)
                .filter(|seed| verdict(*seed) == if effect > 1.0 { Verdict::Higher } else { Verdict::Lower })
                .count()
        };
        assert!(seen(1.10) >= 190, "{} of 200", seen(1.10));
        assert!(seen(1.0 / 1.10) >= 190, "{} of 200", seen(1.0 / 1.10));
    }

    #[test]
    fn an_unquiet_machine_is_said_to_be_one() {
        let verdicts = (0..100).map(|seed| Ratio::of(&pairs(24, 1.0, 0.4, seed)).unwrap().verdict());
        assert!(verdicts.filter(|verdict| *verdict == Verdict::Unclear).count() >= 95);
        // Three pairs carry no verdict unless they agree to a hair.
        assert_eq!(Ratio::of(&[(1.0, 1.1), (1.0, 1.12), (1.0, 1.08)]).unwrap().verdict(), Verdict::Unclear);
    }

    #[test]
    fn what_has_no_ratio_is_left_out() {
        assert_eq!(Ratio::of(&[(1.0, 2.0), (0.0, 1.0), (f64::NAN, 1.0), (1.0, 2.0)]), None);
        let ratio = Ratio::of(&[(1.0, 2.0), (0.0, 1.0), (2.0, 4.0), (3.0, 6.0)]).unwrap();
        assert_eq!((ratio.pairs, (ratio.middle * 1000.0).round()), (3, 2000.0));
        assert_eq!(ratio.verdict(), Verdict::Higher);
    }
}
