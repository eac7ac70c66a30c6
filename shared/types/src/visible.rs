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
pub fn is_hidden(c: char) -> bool {
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
}
