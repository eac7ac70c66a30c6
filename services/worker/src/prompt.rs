//! The system prompt: one template, filled with what is true for this chat now.

use reliant_types::pb;

const TEMPLATE: &str = include_str!("prompt.md");

/// What the prompt says of the chat.
pub struct PromptFacts<'a> {
    pub date: chrono::NaiveDate,
    /// None: no daemon was chosen, or it never connected.
    pub machine: Option<Machine<'a>>,
    pub tools: &'a [&'a pb::ToolDeclaration],
    pub plan: bool,
}

pub struct Machine<'a> {
    pub hostname: &'a str,
    pub os: &'a str,
    pub root: Option<&'a pb::Root>,
}

/// The date changes once a day and the rest with the daemon, so that a provider's prompt cache keeps working.
pub fn system_prompt(facts: &PromptFacts<'_>) -> String {
    let machine = match &facts.machine {
        None => "No machine is connected to this chat, so you have no tools. Answer from what you know, and say that \
                 tools need a daemon: `reliant daemon register`, then `reliant daemon start` on the developer's machine, \
                 then choose it for this chat."
            .to_owned(),
        Some(machine) => {
            let mut text = format!("The machine is '{}', running {}.", machine.hostname, machine.os);
            match machine.root {
                Some(root) => text.push_str(&format!(" The root of this chat is '{}', at {}.", root.name, root.path)),
                None => text.push_str(" No root is chosen."),
            }
            text
        }
    };
    let tools = if facts.tools.is_empty() {
        String::new()
    } else {
        let names: Vec<_> = facts.tools.iter().map(|tool| tool.name.as_str()).collect();
        let mut text = format!("# Tools\nYou have: {}.", names.join(", "));
        if facts.plan {
            text.push_str(
                " This chat is in plan mode: you can look, not change. Work out what should be done, and present it as \
                 a plan that the developer can approve.",
            );
        }
        text
    };
    let agents = match facts.machine.as_ref().and_then(|machine| machine.root) {
        Some(root) if !root.agents_md.trim().is_empty() => {
            format!("# The project's own instructions (AGENTS.md)\n{}", root.agents_md.trim())
        }
        _ => String::new(),
    };
    let filled = fill(&[
        ("{{date}}", facts.date.to_string().as_str()),
        ("{{machine}}", &machine),
        ("{{tools}}", &tools),
        ("{{agents}}", &agents),
    ]);
    filled.trim().to_owned()
}

/// Each place is filled once and what is put in is not looked at again: an AGENTS.md cannot name a place.
fn fill(values: &[(&str, &str)]) -> String {
    let mut out = String::with_capacity(TEMPLATE.len() + values.iter().map(|(_, value)| value.len()).sum::<usize>());
    let mut rest = TEMPLATE;
    while let Some(at) = rest.find("{{") {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        match values.iter().find(|(name, _)| rest.starts_with(name)) {
            Some((name, value)) => {
                out.push_str(value);
                rest = &rest[name.len()..];
            }
            None => {
                out.push_str("{{");
                rest = &rest[2..];
            }
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_is_filled() {
        let root = pb::Root {
            id: "r".into(),
            name: "shop".into(),
            path: "/home/ann/shop".into(),
            agents_md: "Use tabs. {{date}} {{tools}}".into(),
        };
        let shell = pb::ToolDeclaration { name: "shell".into(), ..Default::default() };
        let text = system_prompt(&PromptFacts {
            date: chrono::NaiveDate::from_ymd_opt(2026, 2, 3).unwrap(),
            machine: Some(Machine { hostname: "laptop", os: "linux", root: Some(&root) }),
            tools: &[&shell],
            plan: true,
        });
        for part in [
            "2026-02-03",
            "'laptop'",
            "/home/ann/shop",
            "You have: shell.",
            "plan mode",
            "Use tabs. {{date}} {{tools}}",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(!text.contains("{{machine}}"));
    }

    #[test]
    fn without_a_machine_it_says_so() {
        let date = chrono::NaiveDate::from_ymd_opt(2026, 2, 3).unwrap();
        let text = system_prompt(&PromptFacts { date, machine: None, tools: &[], plan: false });
        assert!(text.contains("No machine is connected") && !text.contains("# Tools") && !text.contains("{{"));
    }
}
