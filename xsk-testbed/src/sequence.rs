//! A checker of numbers that should come one after the other.

use std::collections::BTreeMap;
use std::fmt;

/// Counts what arrived of a numbered stream: in order, lost, late or twice.
///
/// ```
/// let mut seen = xsk_testbed::Sequence::new();
/// for n in [0, 1, 4, 2, 4] {
///     seen.feed(n);
/// }
/// assert_eq!((seen.total(), seen.late(), seen.duplicates()), (5, 1, 1));
/// assert_eq!(seen.gaps().collect::<Vec<_>>(), vec![3..4]);
/// assert!(!seen.is_exactly(5));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sequence {
    /// One more than the highest number that came.
    next: u64,
    total: u64,
    late: u64,
    duplicates: u64,
    /// Numbers below `next` that did not come: the end of each range by its start.
    missing: BTreeMap<u64, u64>,
}

impl Sequence {
    /// A stream that begins with 0.
    pub fn new() -> Self {
        Self::default()
    }

    /// A stream that begins with `first`.
    pub fn starting_at(first: u64) -> Self {
        Self { next: first, ..Self::default() }
    }

    /// Takes the next number that arrived.
    pub fn feed(&mut self, number: u64) {
        self.total += 1;
        if number >= self.next {
            if number > self.next {
                self.missing.insert(self.next, number);
            }
            self.next = number + 1;
            return;
        }
        match self.missing.range(..=number).next_back().map(|(&start, &end)| (start, end)) {
            Some((start, end)) if number < end => {
                self.late += 1;
                self.missing.remove(&start);
                if start < number {
                    self.missing.insert(start, number);
                }
                if number + 1 < end {
                    self.missing.insert(number + 1, end);
                }
            }
            _ => self.duplicates += 1,
        }
    }

    /// Numbers that arrived, duplicates included.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The number that should come next: one more than the highest so far.
    pub fn expected(&self) -> u64 {
        self.next
    }

    /// Numbers that arrived after a higher one.
    pub fn late(&self) -> u64 {
        self.late
    }

    /// Numbers that arrived once more, or were below the first.
    pub fn duplicates(&self) -> u64 {
        self.duplicates
    }

    /// How many numbers did not arrive although a higher one did.
    pub fn missing(&self) -> u64 {
        self.gaps().map(|gap| gap.end - gap.start).sum()
    }

    /// The ranges of numbers that did not arrive although a higher one did.
    pub fn gaps(&self) -> impl Iterator<Item = std::ops::Range<u64>> + '_ {
        self.missing.iter().map(|(&start, &end)| start..end)
    }

    /// Whether each number arrived once and in order, with gaps or without.
    pub fn in_order(&self) -> bool {
        self.late == 0 && self.duplicates == 0
    }

    /// Whether exactly this many numbers arrived: each once, in order, without a gap.
    pub fn is_exactly(&self, count: u64) -> bool {
        self.total == count && self.in_order() && self.missing.is_empty()
    }
}

impl Extend<u64> for Sequence {
    fn extend<I: IntoIterator<Item = u64>>(&mut self, numbers: I) {
        numbers.into_iter().for_each(|number| self.feed(number));
    }
}

impl fmt::Display for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { total, late, duplicates, .. } = self;
        write!(f, "{total} arrived, {} missing, {late} late, {duplicates} duplicates", self.missing())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fed(numbers: impl IntoIterator<Item = u64>) -> Sequence {
        let mut sequence = Sequence::new();
        sequence.extend(numbers);
        sequence
    }

    #[test]
    fn all_in_order_is_exact() {
        let all = fed(0..1000);
        assert!(all.is_exactly(1000));
        assert!(!all.is_exactly(999));
        assert_eq!(all.to_string(), "1000 arrived, 0 missing, 0 late, 0 duplicates");
    }

    #[test]
    fn late_numbers_fill_their_gap_from_any_side() {
        let mut seen = fed([0, 10]);
        assert!(seen.gaps().eq(std::iter::once(1..10)));
        seen.extend([5, 1, 9, 4, 6]);
        assert_eq!(seen.gaps().collect::<Vec<_>>(), [2..4, 7..9]);
        seen.extend([2, 3, 7, 8]);
        assert_eq!((seen.missing(), seen.late(), seen.duplicates(), seen.total()), (0, 9, 0, 11));
        assert!(!seen.in_order());
    }

    #[test]
    fn a_number_that_came_before_is_a_duplicate() {
        let seen = fed([0, 1, 1, 5, 0, 5]);
        assert_eq!((seen.duplicates(), seen.late(), seen.missing()), (3, 0, 3));
    }

    #[test]
    fn a_stream_may_begin_anywhere() {
        let mut seen = Sequence::starting_at(100);
        seen.extend(100..110);
        assert!(seen.is_exactly(10));
        seen.feed(99);
        assert_eq!(seen.duplicates(), 1);
    }
}
