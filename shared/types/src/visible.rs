//! Shows characters that a screen hides or that reorder what stands around them, so that a person who approves or trusts
//! a text has read all of it.

/// The text with each hidden or reordering character in the form `⟨U+202E⟩`. Newlines and tabs stay.
pub fn visible(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if is_hidden(c) {
            shown.push_str(&format!("⟨U+{:04X}⟩", u32::from(c)));
        } else {
            shown.push(c);
        }
    }
    shown
}

/// Controls other than newline and tab, Unicode's format characters, line separators, variation selectors, tags, and
/// letters without a shape.
fn is_hidden(c: char) -> bool {
    match c {
        '\n' | '\t' => false,
        '\u{ad}' | '\u{34f}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}' | '\u{890}'..='\u{891}' => {
            true
        }
        '\u{8e2}' | '\u{115f}'..='\u{1160}' | '\u{17b4}'..='\u{17b5}' | '\u{180b}'..='\u{180f}' => true,
        '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{2800}' | '\u{3164}' => true,
        '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}' | '\u{110bd}' | '\u{110cd}' => true,
        '\u{13430}'..='\u{1343f}' | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}' => true,
        '\u{e0000}'..='\u{e0fff}' => true,
        c => c.is_control(),
    }
}

/// A text in rows of a bounded width, so that no newline and no long line pushes another part off the screen. Of more
/// than `rows_max` rows the first and the last are shown around a count of those left out; `true`: some are left out.
pub fn bounded(text: &str, width: usize, rows_max: usize) -> (Vec<String>, bool) {
    let shown = visible(text);
    let mut rows = Vec::new();
    for line in shown.split('\n') {
        let chars: Vec<char> = line.chars().collect();
        if chars.is_empty() {
            rows.push(String::new());
        }
        rows.extend(chars.chunks(width.max(1)).map(|row| row.iter().collect::<String>()));
    }
    if rows.len() <= rows_max {
        return (rows, false);
    }
    let last = rows_max / 3;
    let first = rows_max - last;
    let left_out = rows.len() - rows_max;
    let tail = rows.split_off(rows.len() - last);
    rows.truncate(first);
    rows.push(format!("… {left_out} more lines; press v to see all …"));
    rows.extend(tail);
    (rows, true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_and_reordering_characters_are_shown() {
        assert_eq!(visible("rm \u{202e}x\u{2066}"), "rm ⟨U+202E⟩x⟨U+2066⟩");
        for hidden in ['\u{200b}', '\u{feff}', '\u{e0041}', '\u{fe0f}', '\u{e0100}', '\u{1b}', '\r', '\u{ad}', '\u{85}']
        {
            assert_eq!(visible(&hidden.to_string()), format!("⟨U+{:04X}⟩", u32::from(hidden)));
        }
        let plain = "echo \"äöü 漢字 🙂\"\n\tnext";
        assert_eq!(visible(plain), plain);
    }

    #[test]
    fn a_long_text_keeps_its_beginning_and_its_end_on_the_screen() {
        let text = format!("first{}last", "\n".repeat(1000));
        let (rows, cut) = bounded(&text, 80, 9);
        assert!(cut);
        assert_eq!(rows.len(), 10);
        assert_eq!(rows[0], "first");
        assert_eq!(rows[6], "… 992 more lines; press v to see all …");
        assert_eq!(rows[9], "last");
        assert_eq!(bounded(&"x".repeat(200), 80, 9).0.len(), 3);
        assert_eq!(bounded("one\ntwo", 80, 9), (vec!["one".into(), "two".into()], false));
    }
}
