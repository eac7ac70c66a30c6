//! The known name that a mistyped one was probably meant to be.

/// The nearest of `known`, if it is near enough to be a slip of the hand: a third of the letters at most.
pub(super) fn nearest<'a>(typed: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let (distance, name) = known.into_iter().map(|name| (distance(typed, name), name)).min()?;
    (distance <= typed.chars().count().max(3) / 3).then_some(name)
}

/// Edits to get from one to the other: insert, delete, replace, swap neighbours.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut before: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i; b.len() + 1];
        for j in 1..=b.len() {
            let replace = last[j - 1] + usize::from(a[i - 1] != b[j - 1]);
            row[j] = replace.min(last[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                row[j] = row[j].min(before[j - 2] + 1);
            }
        }
        before = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_are_found_and_strangers_are_not() {
        let known = ["url", "max_connections", "acquire_timeout"];
        let check = |typed, expected| assert_eq!(nearest(typed, known), expected, "{typed}");
        check("ulr", Some("url"));
        check("urls", Some("url"));
        check("max_conections", Some("max_connections"));
        check("aquire_timeout", Some("acquire_timeout"));
        check("banana", None);
        assert_eq!(nearest("x", []), None);
    }
}
