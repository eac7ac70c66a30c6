use std::{io::Write as _, time::Duration};

use super::*;
use crate::Secret;

#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Config {
    store: StoreConfig,
    admin: AdminConfig,
    name: String,
    tags: Vec<String>,
    providers: Vec<Provider>,
    nested: Option<Box<Config>>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct StoreConfig {
    url: String,
    password: Secret,
    max_connections: u32,
    verbose: bool,
    #[serde(with = "humantime_serde")]
    acquire_timeout: Duration,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            url: String::new(),
            password: Secret::new("built in"),
            max_connections: 10,
            verbose: false,
            acquire_timeout: Duration::from_secs(5),
        }
    }
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Provider {
    name: String,
    #[serde(default)]
    base_url: String,
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

fn read(text: &str, env: &[(&str, &str)], flags: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let file = file(text);
    let pairs = |list: &[(&str, &str)]| list.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    load(&Sources { file: Some(file.path().to_owned()), env: pairs(env), flags: pairs(flags) })
}

#[test]
fn flags_are_over_env_over_file_over_defaults() {
    let text = "name = 'file'\n[store]\nurl = 'file'\nmax_connections = 1\n";
    let config = read(text, &[], &[]).unwrap();
    assert_eq!((config.name.as_str(), config.store.max_connections), ("file", 1));
    assert_eq!(config.store.password.expose(), "built in", "a default secret survives a merge");
    let env = [("RELIANT_STORE__URL", "env"), ("RELIANT_STORE__MAX_CONNECTIONS", "2"), ("PATH", "/bin")];
    let config = read(text, &env, &[("store.max_connections", "3")]).unwrap();
    assert_eq!((config.name.as_str(), config.store.url.as_str(), config.store.max_connections), ("file", "env", 3));
}

#[test]
fn text_takes_the_type_of_its_key() {
    let env = [
        ("RELIANT_NAME", "123"),
        ("RELIANT_TAGS", "a, b"),
        ("RELIANT_STORE__VERBOSE", "true"),
        ("RELIANT_STORE__ACQUIRE_TIMEOUT", "250ms"),
        ("RELIANT_STORE__PASSWORD", "007"),
        ("RELIANT_ADMIN__LISTEN", "127.0.0.1:7441"),
        ("RELIANT_PROVIDERS", "[{ name = 'x', base_url = 'http://x' }]"),
    ];
    let config = read("", &env, &[]).unwrap();
    assert_eq!(config.name, "123");
    assert_eq!(config.tags, ["a", "b"]);
    assert!(config.store.verbose);
    assert_eq!(config.store.acquire_timeout, Duration::from_millis(250));
    assert_eq!(config.store.password.expose(), "007");
    assert_eq!(config.admin.listen.port(), 7441);
    assert_eq!(config.providers[0].base_url, "http://x");
}

#[test]
fn an_unknown_key_is_named_with_its_source_and_the_nearest_known_one() {
    let error = read("[store]\nurll = 'x'\n", &[], &[]).unwrap_err().to_string();
    assert!(error.contains("'store.urll'") && error.contains("did you mean 'store.url'?"), "{error}");
    let error = read("", &[("RELIANT_STORE__MAX_CONECTIONS", "1")], &[]).unwrap_err().to_string();
    assert!(error.contains("the environment variable RELIANT_STORE__MAX_CONECTIONS"), "{error}");
    assert!(error.contains("did you mean 'store.max_connections'?"), "{error}");
    let error = read("", &[], &[("banana", "1")]).unwrap_err().to_string();
    assert!(error.contains("the flag --banana") && error.contains("known here are: store, admin"), "{error}");
    let error = read("[stor]\nurl = 'x'\n", &[], &[]).unwrap_err().to_string();
    assert!(error.contains("'stor.url'") && error.contains("did you mean 'store'?"), "{error}");
    let error = read("[[providers]]\nname = 'x'\nbaseurl = 'y'\n", &[], &[]).unwrap_err().to_string();
    assert!(error.contains("'providers.baseurl'") && error.contains("'providers.base_url'"), "{error}");
}

#[test]
fn reserved_variables_are_no_keys() {
    assert!(read("", &[("RELIANT_TOKEN", "x"), ("RELIANT_CALL_ID", "y")], &[]).is_ok());
}

#[test]
fn a_value_that_does_not_fit_names_key_and_source_and_not_itself() {
    let error = read("", &[("RELIANT_STORE__MAX_CONNECTIONS", "hunter2")], &[]).unwrap_err().to_string();
    assert!(error.contains("store.max_connections") && error.contains("RELIANT_STORE__MAX_CONNECTIONS"), "{error}");
    assert!(!error.contains("hunter2"), "{error}");
    let error = read("[store]\nacquire_timeout = 'soon'\n", &[], &[]).unwrap_err().to_string();
    assert!(error.contains("store.acquire_timeout"), "{error}");
    let error = read("[[providers]]\nbase_url = 'y'\n", &[], &[]).unwrap_err().to_string();
    assert!(error.contains("missing field `name`"), "{error}");
}

#[test]
fn broken_files_say_where() {
    let error = read("name = 'x'\n\n[store\n", &[], &[]).unwrap_err().to_string();
    assert!(error.contains("line 3"), "{error}");
    let missing = Sources { file: Some("/does/not/exist.toml".into()), ..Sources::default() };
    assert!(load::<Config>(&missing).unwrap_err().to_string().contains("/does/not/exist.toml"));
}

#[test]
fn a_dump_shows_no_secret_and_reads_back() {
    let env = [("RELIANT_STORE__PASSWORD", "hunter2"), ("RELIANT_STORE__URL", "postgres://ada:hunter2@db/x")];
    let config = read("", &env, &[]).unwrap();
    let text = redacted(&config);
    assert!(!text.contains("hunter2"), "{text}");
    assert!(text.contains("password = \"***\"") && text.contains("acquire_timeout = \"5s\""), "{text}");
    assert!(toml::from_str::<Config>(&text).is_ok());
}

#[test]
fn origins_say_where_a_value_came_from() {
    let sources = Sources::default().flag("name", Some("x")).flag("store.url", None::<String>);
    let loaded = load_with_origins::<Config>(&sources).unwrap();
    assert_eq!(loaded.origins.len(), 1);
    assert_eq!(loaded.origins["name"], Source::Flag("name".to_owned()));
}

proptest::proptest! {
    /// Whatever the environment says, it is a configuration or an error; a text key takes every text as it is.
    #[test]
    fn any_environment_is_a_config_or_an_error(name in "[A-Z_]{0,20}", value in ".{0,40}") {
        let _ = read("", &[(&format!("RELIANT_{name}"), &value)], &[]);
        let config = read("", &[("RELIANT_NAME", &value)], &[]).unwrap();
        proptest::prop_assert_eq!(config.name, value);
    }
}
