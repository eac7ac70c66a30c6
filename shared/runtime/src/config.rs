//! Configuration: defaults under a TOML file under `RELIANT_*` variables under flags. Unknown keys are refused.
//!
//! A config type derives `Deserialize`, `Serialize` and `Default` with `#[serde(default, deny_unknown_fields)]`; durations
//! use `humantime_serde`, secrets are [`crate::Secret`]. `RELIANT_STORE__URL` is the key `store.url`: two underscores go
//! one level down.

mod nearest;
mod redact;
mod value;

use std::{
    collections::BTreeMap,
    fmt,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use toml::{Table, Value};

pub use redact::redacted;

/// What every variable of ours begins with.
pub const ENV_PREFIX: &str = "RELIANT_";

/// Variables that are ours and are no config keys. Those of a call mark the processes of tools, from which `reliant` may
/// be run as well.
pub const ENV_RESERVED: &[&str] = &[
    "RELIANT_CONFIG",
    "RELIANT_TOKEN",
    "RELIANT_ENDPOINT",
    "RELIANT_API_URL",
    "RELIANT_DATA_DIR",
    "RELIANT_DAEMON_STATE_DIR",
    "RELIANT_TOOLS_DIR",
    "RELIANT_OBSERVE_URL",
    "RELIANT_CACHE",
    "RELIANT_LOG",
    "RELIANT_NO_SYSTEM_POSTGRES",
    "RELIANT_CALL_ID",
    "RELIANT_CALL_INDEX",
    "RELIANT_TURN_ID",
    "RELIANT_ITERATION",
    "RELIANT_RECORD",
    "RELIANT_MCP_STATE",
];

/// Tests are steered by variables that begin so.
const ENV_TEST_PREFIX: &str = "RELIANT_TEST_";

/// Where a role's front listens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ListenConfig {
    /// Address and port; port 0 takes a free one.
    pub listen: SocketAddr,
}

impl Default for ListenConfig {
    fn default() -> Self {
        Self { listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)) }
    }
}

/// Where a role's admin pages listen. Not for the public network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdminConfig {
    /// Address and port; port 0 takes a free one.
    pub listen: SocketAddr,
}

impl Default for AdminConfig {
    fn default() -> Self {
        Self { listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)) }
    }
}

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    File(PathBuf),
    Env(String),
    Flag(String),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Env(name) => write!(f, "the environment variable {name}"),
            Self::Flag(name) => write!(f, "the flag --{name}"),
        }
    }
}

/// Why there is no configuration. Values are not repeated: one of them may be a secret.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("the configuration file {path} cannot be read")]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path}, line {line}: this is not TOML: {message}")]
    Syntax { path: PathBuf, line: usize, message: String },
    #[error("{from} sets '{key}', which is not a known key{}", suggestion(.nearest, .known))]
    UnknownKey { key: String, from: Source, nearest: Option<String>, known: Vec<String> },
    #[error("{from} sets '{key}', but its value does not fit: {message}")]
    Value { key: String, from: Source, message: String },
    #[error("the configuration is not complete: {0}")]
    Incomplete(String),
}

fn suggestion(nearest: &Option<String>, known: &[String]) -> String {
    match nearest {
        Some(nearest) => format!("; did you mean '{nearest}'?"),
        None if known.is_empty() => String::new(),
        None => format!("; known here are: {}", known.join(", ")),
    }
}

/// What a configuration is made of, weakest first.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// Read if given; a file that is named must exist.
    pub file: Option<PathBuf>,
    /// All variables of the process; others than `RELIANT_*` are passed over.
    pub env: Vec<(String, String)>,
    /// Dotted keys with their values as text.
    pub flags: Vec<(String, String)>,
}

impl Sources {
    /// The process's environment, and the file that `RELIANT_CONFIG` names, if it does.
    pub fn from_process() -> Self {
        let env: Vec<_> = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        let file = env.iter().find(|(name, _)| name == "RELIANT_CONFIG").map(|(_, path)| path.into());
        Self { file, env, flags: Vec::new() }
    }

    pub fn file(mut self, path: Option<impl AsRef<Path>>) -> Self {
        if let Some(path) = path {
            self.file = Some(path.as_ref().to_owned());
        }
        self
    }

    /// A flag that was given; `None` changes nothing.
    pub fn flag(mut self, key: &str, value: Option<impl fmt::Display>) -> Self {
        self.flags.extend(value.map(|value| (key.to_owned(), value.to_string())));
        self
    }
}

/// A configuration, and where each value that is no default came from.
#[derive(Debug)]
pub struct Loaded<T> {
    pub value: T,
    /// By dotted key.
    pub origins: BTreeMap<String, Source>,
}

/// Reads and checks a configuration.
pub fn load<T: DeserializeOwned + Serialize + Default>(sources: &Sources) -> Result<T, ConfigError> {
    load_with_origins(sources).map(|loaded| loaded.value)
}

/// Like [`load`], and says where each value came from.
pub fn load_with_origins<T>(sources: &Sources) -> Result<Loaded<T>, ConfigError>
where
    T: DeserializeOwned + Serialize + Default,
{
    let mut merged = Table::new();
    let mut origins = BTreeMap::new();
    let mut put = |key: Vec<String>, value: Value, from: Source| {
        origins.insert(key.join("."), from);
        value::insert(&mut merged, &key, value);
    };
    if let Some(path) = &sources.file {
        for (key, value) in value::leaves(&read_file(path)?) {
            let from = Source::File(path.clone());
            value::check::<T>(&key, &value, &from)?;
            put(key, value, from);
        }
    }
    for (name, text) in &sources.env {
        let Some(rest) = name.strip_prefix(ENV_PREFIX) else { continue };
        if ENV_RESERVED.contains(&name.as_str()) || name.starts_with(ENV_TEST_PREFIX) {
            continue;
        }
        let key: Vec<String> = rest.split("__").map(str::to_ascii_lowercase).collect();
        let from = Source::Env(name.clone());
        let value = value::from_text::<T>(&key, text, &from)?;
        put(key, value, from);
    }
    for (key, text) in &sources.flags {
        let from = Source::Flag(key.clone());
        let key: Vec<String> = key.split('.').map(str::to_owned).collect();
        let value = value::from_text::<T>(&key, text, &from)?;
        put(key, value, from);
    }
    let value =
        T::deserialize(Value::Table(merged)).map_err(|error| ConfigError::Incomplete(value::sentence(&error)))?;
    Ok(Loaded { value, origins })
}

fn read_file(path: &Path) -> Result<Table, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    text.parse::<Table>().map_err(|error| {
        let end = error.span().map_or(0, |span| span.start).min(text.len());
        let line = text.as_bytes()[..end].iter().filter(|byte| **byte == b'\n').count() + 1;
        ConfigError::Syntax { path: path.to_owned(), line, message: error.message().to_owned() }
    })
}

#[cfg(test)]
mod tests;
