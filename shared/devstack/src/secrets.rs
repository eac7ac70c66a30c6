//! The private servers' passwords: random, made once per data directory, readable by the owner alone, never logged.

use std::{collections::BTreeMap, fmt, fs, path::Path};

use rand::RngExt;
use serde::{Deserialize, Serialize};

use crate::{NatsRole, StackError, lock::write_private};

const FILE: &str = "secrets.json";
const PASSWORD_CHARS: usize = 43;

#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Secrets {
    pub postgres: String,
    /// By the role's name.
    pub nats: BTreeMap<String, String>,
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secrets(***)")
    }
}

impl Secrets {
    pub fn load_or_make(data_dir: &Path) -> Result<Self, StackError> {
        let path = data_dir.join(FILE);
        let mut secrets = fs::read(&path)
            .ok()
            .and_then(|bytes| serde_json::from_slice::<Secrets>(&bytes).ok())
            .unwrap_or_else(|| Secrets { postgres: password(), nats: BTreeMap::new() });
        for role in NatsRole::ALL {
            secrets.nats.entry(role.name().to_owned()).or_insert_with(password);
        }
        write_private(&path, &serde_json::to_vec(&secrets).expect("strings encode"))?;
        Ok(secrets)
    }

    pub fn nats(&self, role: NatsRole) -> &str {
        self.nats.get(role.name()).expect("load_or_make fills in every role")
    }
}

/// 256 bits in characters that need no quoting in a URL, a file or SQL.
fn password() -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut rng = rand::rng();
    (0..PASSWORD_CHARS).map(|_| ALPHABET[rng.random_range(0..64usize)] as char).collect()
}
