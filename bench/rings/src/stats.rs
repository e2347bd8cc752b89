//! Medians, and how far to trust them.

/// The middle and the quartiles of some figures.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quartiles {
    /// A quarter is below.
    pub low: f64,
    /// The median.
    pub mid: f64,
    /// A quarter is above.
    pub high: f64,
}

/// The quartiles of `figures`.
///
/// # Panics
///
/// When there are none.
pub fn quartiles(figures: &[f64]) -> Quartiles {
    assert!(!figures.is_empty(), "no figures");
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |part: f64| {
        let place = part * (sorted.len() - 1) as f64;
        let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
        below + (above - below) * place.fract()
    };
    Quartiles { low: at(0.25), mid: at(0.5), high: at(0.75) }
}

/// The interval that holds the true median with a probability of at least 95 %, from order
/// statistics alone: nothing is assumed of the distribution. `None` below 6 figures.
pub fn interval(figures: &[f64]) -> Option<(f64, f64)> {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    // Of n figures, the number below the median is binomial (n, 1/2). Leave out `k` at either end
    // for as long as both tails together stay within 5 %.
    let n = sorted.len();
    let mut term = 0.5f64.powi(n as i32);
    let (mut tail, mut k) = (0.0, 0);
    while tail + term <= 0.025 {
        tail += term;
        k += 1;
        term *= (n + 1 - k) as f64 / k as f64;
    }
    (k > 0).then(|| (sorted[k - 1], sorted[n - k]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_of_few_figures_lie_between_them() {
        assert_eq!(quartiles(&[3.0, 1.0, 2.0, 5.0, 4.0]), Quartiles { low: 2.0, mid: 3.0, high: 4.0 });
        assert_eq!(quartiles(&[1.0, 2.0]).mid, 1.5);
    }

    #[test]
    fn interval_of_the_median_is_that_of_the_tables() {
        let figures: Vec<f64> = (1..=15).map(f64::from).collect();
        assert_eq!(interval(&figures), Some((4.0, 12.0)));
        let figures: Vec<f64> = (1..=25).map(f64::from).collect();
        assert_eq!(interval(&figures), Some((8.0, 18.0)));
        assert_eq!(interval(&[1.0, 2.0, 3.0, 4.0, 5.0]), None);
    }
}
