//! Server-sent events, parsed as the bytes come. The result does not depend on where the chunks are cut, also within a
//! character or between CR and LF; memory is bounded by the two limits, whatever is sent.

/// One line of a stream.
pub const LINE_MAX_BYTES: usize = 1024 * 1024;
/// The data lines of one event together.
pub const EVENT_MAX_BYTES: usize = 2 * 1024 * 1024;
/// An event's name; longer ones are cut, for no provider has them.
const NAME_MAX_BYTES: usize = 128;

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SseError {
    #[error("a line of the event stream is longer than 1 MiB")]
    Line,
    #[error("an event of the stream is longer than 2 MiB")]
    Event,
    #[error("the event stream is not UTF-8")]
    Utf8,
}

/// See the module. After an error or a handler's refusal the parser is not to be used again.
#[derive(Debug, Default)]
pub struct SseParser {
    /// The line that the last chunk left unfinished.
    line: Vec<u8>,
    data: Vec<u8>,
    has_data: bool,
    name: Vec<u8>,
    /// The last byte was CR: an LF now belongs to it.
    after_cr: bool,
    /// A byte order mark may stand before the first line.
    past_first_line: bool,
}

impl SseParser {
    /// Takes a chunk and hands every event that is complete to `handle` as (name, data). An unfinished event at the end
    /// of the stream is none, as the standard says.
    pub fn feed<E: From<SseError>>(
        &mut self,
        mut chunk: &[u8],
        mut handle: impl FnMut(&str, &str) -> Result<(), E>,
    ) -> Result<(), E> {
        while !chunk.is_empty() {
            if self.after_cr {
                self.after_cr = false;
                if chunk[0] == b'\n' {
                    chunk = &chunk[1..];
                    continue;
                }
            }
            let end = chunk.iter().position(|byte| matches!(byte, b'\n' | b'\r'));
            let part = &chunk[..end.unwrap_or(chunk.len())];
            if self.line.len() + part.len() > LINE_MAX_BYTES {
                return Err(SseError::Line.into());
            }
            let Some(end) = end else {
                self.line.extend_from_slice(part);
                return Ok(());
            };
            self.after_cr = chunk[end] == b'\r';
            chunk = &chunk[end + 1..];
            if self.line.is_empty() {
                self.take_line(part, &mut handle)?;
            } else {
                let mut line = std::mem::take(&mut self.line);
                line.extend_from_slice(part);
                let done = self.take_line(&line, &mut handle);
                line.clear();
                // The buffer is kept for the next line, unless this one was a giant.
                if line.capacity() <= 64 * 1024 {
                    self.line = line;
                }
                done?;
            }
        }
        Ok(())
    }

    fn take_line<E: From<SseError>>(
        &mut self,
        mut line: &[u8],
        handle: &mut impl FnMut(&str, &str) -> Result<(), E>,
    ) -> Result<(), E> {
        if !std::mem::replace(&mut self.past_first_line, true) {
            line = line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line);
        }
        if line.is_empty() {
            return self.dispatch(handle);
        }
        let (field, value) = match line.iter().position(|byte| *byte == b':') {
            Some(colon) => (&line[..colon], &line[colon + 1..]),
            None => (line, &b""[..]),
        };
        let value = value.strip_prefix(b" ").unwrap_or(value);
        match field {
            b"data" => {
                if self.data.len() + value.len() + 1 > EVENT_MAX_BYTES {
                    return Err(SseError::Event.into());
                }
                if std::mem::replace(&mut self.has_data, true) {
                    self.data.push(b'\n');
                }
                self.data.extend_from_slice(value);
            }
            b"event" => {
                self.name.clear();
                self.name.extend_from_slice(&value[..value.len().min(NAME_MAX_BYTES)]);
            }
            // Comments, ids and retry times mean nothing to us.
            _ => {}
        }
        Ok(())
    }

    fn dispatch<E: From<SseError>>(&mut self, handle: &mut impl FnMut(&str, &str) -> Result<(), E>) -> Result<(), E> {
        if std::mem::take(&mut self.has_data) {
            let data = str::from_utf8(&self.data).map_err(|_| SseError::Utf8)?;
            handle(str::from_utf8(&self.name).unwrap_or(""), data)?;
        }
        self.data.clear();
        self.data.shrink_to(64 * 1024);
        self.name.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(chunks: &[&[u8]]) -> Result<Vec<(String, String)>, SseError> {
        let mut parser = SseParser::default();
        let mut events = Vec::new();
        for chunk in chunks {
            parser.feed(chunk, |name, data| {
                events.push((name.to_owned(), data.to_owned()));
                Ok::<_, SseError>(())
            })?;
        }
        Ok(events)
    }

    #[test]
    fn the_standard_forms() {
        let text =
            "\u{feff}: hello\nevent: a\r\ndata: {\"x\":1}\r\n\r\ndata:one\rdata\rdata:  three\r\rid: 7\n\ndata: cut";
        let events = parse(&[text.as_bytes()]).unwrap();
        assert_eq!(events, [("a".into(), "{\"x\":1}".into()), (String::new(), "one\n\n three".into())]);
    }

    #[test]
    fn limits_hold() {
        let mut parser = SseParser::default();
        let chunk = vec![b'x'; 64 * 1024];
        let mut fed = 0;
        let error = loop {
            match parser.feed(&chunk, |_, _| Ok::<_, SseError>(())) {
                Ok(()) => fed += chunk.len(),
                Err(error) => break error,
            }
        };
        assert_eq!((error, fed), (SseError::Line, LINE_MAX_BYTES));
        let mut parser = SseParser::default();
        let line = format!("data: {}\n", "y".repeat(1000));
        let error = (0..10_000).find_map(|_| parser.feed(line.as_bytes(), |_, _| Ok::<_, SseError>(())).err());
        assert_eq!(error, Some(SseError::Event));
        assert_eq!(parse(&[b"data: \xff\n\n"]), Err(SseError::Utf8));
    }

    proptest! {
        #[test]
        fn chunk_boundaries_do_not_matter(
            texts in prop::collection::vec(("[a-z]{0,5}", prop::collection::vec("[^\r\n]{0,20}", 1..4)), 0..6),
            ends in prop::collection::vec(0..3usize, 64),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        ) {
            let mut ends = ends.iter().cycle().map(|end| ["\n", "\r\n", "\r"][*end]);
            let mut line = |text: &str| format!("{text}{}", ends.next().unwrap());
            let mut wire = String::new();
            let mut expected = Vec::new();
            for (name, lines) in &texts {
                // A CR and an LF from two line ends would be read as one: a comment keeps them apart.
                wire.push_str(&line(": comment"));
                wire.push_str(&line(&format!("event: {name}")));
                for data in lines {
                    wire.push_str(&line(&format!("data: {data}")));
                }
                wire.push_str(&line("ignored: field"));
                wire.push_str("\r\n\r\n");
                expected.push((name.clone(), lines.join("\n")));
            }
            let bytes = wire.as_bytes();
            let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
            at.extend([0, bytes.len()]);
            at.sort_unstable();
            let chunks: Vec<&[u8]> = at.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect();
            let whole = parse(&[bytes]).unwrap();
            prop_assert_eq!(&parse(&chunks).unwrap(), &whole);
            let single: Vec<&[u8]> = bytes.chunks(1).collect();
            prop_assert_eq!(&parse(&single).unwrap(), &whole);
            prop_assert_eq!(whole, expected);
        }

        #[test]
        fn any_bytes_are_survived(chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..50), 0..20)) {
            let chunks: Vec<&[u8]> = chunks.iter().map(Vec::as_slice).collect();
            let _ = parse(&chunks);
        }
    }
}
