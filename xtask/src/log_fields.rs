//! Fields of logs and spans: an id says whose it is, by the same name everywhere (`tool.call_id`, and not `call`).

/// Entities that lines are searched by. One of them alone is no field's name: its id has one in
/// shared/telemetry/src/names.rs.
const ENTITIES: &[&str] = &["call", "chat", "daemon", "turn", "user"];
const MACROS: &[&str] = &[
    "trace",
    "debug",
    "info",
    "warn",
    "error",
    "event",
    "span",
    "trace_span",
    "debug_span",
    "info_span",
    "warn_span",
    "error_span",
];

/// Line and name of each field of a macro of `tracing` that is called as an entity is.
pub fn bare_entities(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (at, path) in text.match_indices("tracing::") {
        let rest = &text[at + path.len()..];
        let Some((name, inside)) = rest.split_once("!(") else { continue };
        if !MACROS.contains(&name) {
            continue;
        }
        let line = text[..at].matches('\n').count() + 1;
        let names = fields(&arguments(inside), name.ends_with("span"));
        found.extend(names.into_iter().filter(|name| ENTITIES.contains(&name.as_str())).map(|name| (line, name)));
    }
    found
}

/// What stands between the commas of a call, up to its end.
fn arguments(inside: &str) -> Vec<String> {
    let mut arguments = vec![String::new()];
    let (mut depth, mut in_text, mut is_escaped) = (0, false, false);
    for c in inside.chars() {
        match c {
            '"' if !is_escaped => in_text = !in_text,
            '(' | '[' | '{' if !in_text => depth += 1,
            ')' | ']' | '}' if !in_text && depth == 0 => break,
            ')' | ']' | '}' if !in_text => depth -= 1,
            ',' if !in_text && depth == 0 => {
                arguments.push(String::new());
                continue;
            }
            _ => {}
        }
        is_escaped = in_text && c == '\\' && !is_escaped;
        arguments.last_mut().expect("there is always one").push(c);
    }
    arguments
}

/// The names of the fields among these. They stand after a span's name, and before an event's message, whose own arguments
/// are none.
fn fields(arguments: &[String], is_span: bool) -> Vec<String> {
    let arguments = arguments.iter().map(|argument| argument.trim());
    let is_text = |argument: &&str| argument.starts_with('"');
    let of_fields: Vec<&str> = if is_span {
        arguments.skip_while(|argument| !is_text(argument)).skip(1).collect()
    } else {
        arguments.take_while(|argument| !is_text(argument)).collect()
    };
    of_fields.into_iter().filter_map(field).collect()
}

/// `name = value`, `%name`, `?name` or `name`; `target: ...` and expressions are no fields.
fn field(argument: &str) -> Option<String> {
    let name = argument.split_once('=').map_or(argument, |(name, _)| name).trim().trim_start_matches(['%', '?']);
    let is_name = name.chars().all(|c| c.is_alphanumeric() || "_.".contains(c)) && !name.is_empty();
    is_name.then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(source: &str, expected: &[(usize, &str)]) {
        let found = bare_entities(source);
        let found: Vec<_> = found.iter().map(|(line, name)| (*line, name.as_str())).collect();
        assert_eq!(found, expected, "{source}");
    }

    #[test]
    fn an_id_without_its_entitys_name_is_found() {
        check(r#"tracing::error!(call = %id, "a call ended");"#, &[(1, "call")]);
        check(r#"tracing::warn!(%daemon, ?call, "skipped");"#, &[(1, "daemon"), (1, "call")]);
        check(r#"tracing::debug!(error = %chain(&error, "x, y"), %turn, "not released")"#, &[(1, "turn")]);
        check("f();\ntracing::info!(\n    target: \"x\",\n    user,\n    \"said\"\n);", &[(2, "user")]);
        check(r#"tracing::info_span!(parent: None, "turn.claim", chat = %chat)"#, &[(1, "chat")]);
        check(r#"tracing::info_span!("a \" (", turn = 1)"#, &[(1, "turn")]);
        check(r#"tracing::event!(Level::INFO, daemon = id, "x"); let user = 1;"#, &[(1, "daemon")]);
    }

    #[test]
    fn names_of_the_list_and_what_is_no_field_pass() {
        check(r#"tracing::warn!(tool.call_id = %call, daemon.id = %daemon, "skipped");"#, &[]);
        check(r#"tracing::info!("a {} of {chat}", turn, user = user);"#, &[]);
        check(r#"tracing::info!(count = f(call, turn), "x"); g(chat, user);"#, &[]);
        check(r#"tracing::info_span!(parent: chat, "turn.claim", turn.id = %turn)"#, &[]);
        check("let call = tracing::field::display(turn); other::warn!(turn)", &[]);
    }
}
