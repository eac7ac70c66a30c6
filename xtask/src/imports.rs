//! Who may import whom. `types ← telemetry ← {rpc, bus, store, flows, models} ← middleware ← runtime ←
//! {client, devstack} ← services ← tests`: a crate imports leftward only, siblings do not import each other.

use std::collections::BTreeMap;

/// A crate's place from left to right; a crate may import those with a smaller number.
const PLACES: &[(&str, u8)] = &[
    ("reliant-types", 0),
    ("reliant-telemetry", 1),
    ("reliant-rpc", 2),
    ("reliant-bus", 2),
    ("reliant-store", 2),
    ("reliant-flows", 2),
    ("reliant-models", 2),
    ("reliant-middleware", 3),
    ("reliant-runtime", 4),
    ("reliant-client", 5),
    ("reliant-devstack", 5),
    ("reliant-api", 6),
    ("reliant-worker", 6),
    ("reliant-gateway", 6),
    ("reliant-daemon", 6),
    ("reliant-model-sim", 6),
    ("reliant-observe", 6),
    // Composes the services, and is the only one to do so beside the tests.
    ("reliant-cli", 7),
    ("reliant-harness", 8),
    ("reliant-load", 8),
    ("reliant-e2e", 9),
    ("reliant-chaos", 9),
    ("reliant-bench", 9),
    ("xtask", 9),
];

/// Foreign crates that only some of ours may name. A name that ends in `-` stands for all that begin so.
const RESERVED: &[(&str, &[&str])] = &[
    // The harness reads rows by itself: who checks the store cannot believe it.
    ("sqlx", &["reliant-store", "reliant-harness"]),
    ("async-nats", &["reliant-bus"]),
    ("temporalio-", &["reliant-flows", "reliant-worker"]),
];

/// Every breach of the rules, given each member's direct dependencies of any kind.
pub fn breaches(members: &BTreeMap<String, Vec<String>>) -> Vec<String> {
    let mut found = Vec::new();
    for (name, dependencies) in members {
        let Some(place) = place(name) else {
            found.push(format!(
                "the crate {name} has no place in the import order; give it one in xtask/src/imports.rs"
            ));
            continue;
        };
        for dependency in dependencies {
            if let Some(theirs) = self::place(dependency) {
                if theirs >= place {
                    let side = if theirs == place { "its sibling" } else { "on its right" };
                    found.push(format!("{name} imports {dependency}, which is {side}"));
                }
            } else if members.contains_key(dependency) {
                found.push(format!("{name} imports {dependency}, which has no place in the import order"));
            }
            for (reserved, allowed) in RESERVED {
                let is_it = dependency == reserved || (reserved.ends_with('-') && dependency.starts_with(reserved));
                if is_it && !allowed.contains(&name.as_str()) {
                    found.push(format!("{name} names {dependency}; only {} may", allowed.join(" and ")));
                }
            }
        }
    }
    found
}

fn place(name: &str) -> Option<u8> {
    PLACES.iter().find(|(of, _)| *of == name).map(|(_, place)| *place)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &str, dependencies: &[&str]) -> Vec<String> {
        let dependencies = dependencies.iter().map(|&dependency| dependency.to_owned()).collect();
        breaches(&BTreeMap::from([(name.to_owned(), dependencies)]))
    }

    #[test]
    fn leftward_imports_pass() {
        assert!(check("reliant-api", &["reliant-types", "reliant-store", "reliant-runtime", "tonic"]).is_empty());
        assert!(check("reliant-cli", &["reliant-api", "reliant-worker", "reliant-devstack"]).is_empty());
        assert!(check("reliant-store", &["sqlx"]).is_empty());
        assert!(check("reliant-worker", &["temporalio-sdk"]).is_empty());
    }

    #[test]
    fn wrong_imports_are_caught() {
        for (name, dependency, said) in [
            ("reliant-types", "reliant-store", "on its right"),
            ("reliant-store", "reliant-bus", "its sibling"),
            ("reliant-api", "reliant-worker", "its sibling"),
            ("reliant-middleware", "reliant-client", "on its right"),
            ("reliant-gateway", "reliant-cli", "on its right"),
            ("reliant-api", "sqlx", "only reliant-store and reliant-harness may"),
            ("reliant-gateway", "async-nats", "only reliant-bus may"),
            ("reliant-api", "temporalio-client", "only reliant-flows and reliant-worker may"),
        ] {
            let found = check(name, &[dependency]);
            assert_eq!(found.len(), 1, "{name} -> {dependency}: {found:?}");
            assert!(found[0].contains(said), "{found:?}");
        }
        assert_eq!(check("reliant-newcomer", &[]).len(), 1);
    }
}
