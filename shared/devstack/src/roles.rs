//! A whole mesh of role processes over given servers: what `reliant up`, `reliant demo` and the tests start.

use reliant_types::{boxed, environment::passes};
use std::{
    ffi::OsString,
    fmt::Write as _,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{
    NatsRole, Stack, StackError,
    lock::write_private,
    mesh::{RoleProcess, RoleSpec},
};

/// A role in debug mode starts in well under a second; a loaded machine may take its time.
const START_PATIENCE: Duration = Duration::from_secs(60);

/// What to start.
#[derive(Debug, Clone)]
pub struct MeshSpec {
    /// The `reliant` binary.
    pub binary: PathBuf,
    /// Holds the configuration, logs and address files.
    pub dir: PathBuf,
    pub database_url: String,
    pub temporal_address: String,
    pub task_queue: String,
    /// PEM file with the key that signs people's tokens.
    pub jwt_key_file: PathBuf,
    pub apis: usize,
    pub workers: usize,
    pub gateways: usize,
    /// Fixed addresses of the first api, gateway, and of admin listeners are wished for; else any port.
    pub usual_ports: bool,
    /// More TOML for the configuration file.
    pub extra_config: String,
    /// For every role.
    pub env: Vec<(String, String)>,
    /// For single roles, by name (`api-0`); wins over all else in their environment.
    pub role_env: Vec<(String, String, String)>,
}

/// Running role processes. Dropped, they are killed; [`Mesh::stop`] drains them.
#[derive(Debug)]
pub struct Mesh {
    pub spec: MeshSpec,
    pub config_file: PathBuf,
    pub sim: RoleProcess,
    pub apis: Vec<RoleProcess>,
    pub workers: Vec<RoleProcess>,
    pub gateways: Vec<RoleProcess>,
}

impl Mesh {
    #[boxed]
    pub async fn start(spec: MeshSpec, stack: &Stack) -> Result<Self, StackError> {
        let sim_listen = if spec.usual_ports { usual(7445) } else { "127.0.0.1:0".to_owned() };
        let sim = RoleSpec {
            name: "model-sim".to_owned(),
            role: "model-sim",
            args: vec!["model-sim".into(), format!("--listen={sim_listen}").into()],
            ..role(&spec, Path::new("/dev/null"), "model-sim", 0)
        };
        let sim = RoleProcess::start(sim, START_PATIENCE).await?;
        let config_file = spec.dir.join("reliant.toml");
        let sim_url = sim.addresses().listen.map(|address| format!("http://{address}/v1")).unwrap_or_default();
        write_private(&config_file, config_toml(&spec, &sim_url).as_bytes())?;

        // The first api brings the schema up to date; the others may then come all at once.
        let first = RoleProcess::start(server(&spec, stack, &config_file, "api", 0), START_PATIENCE).await?;
        let mut mesh = Self { config_file, sim, apis: vec![first], workers: vec![], gateways: vec![], spec };
        let start = |role, count: usize, from: usize| {
            let specs: Vec<_> =
                (from..count).map(|index| server(&mesh.spec, stack, &mesh.config_file, role, index)).collect();
            futures::future::try_join_all(specs.into_iter().map(|spec| RoleProcess::start(spec, START_PATIENCE)))
        };
        let (apis, workers, gateways) = tokio::try_join!(
            start("api", mesh.spec.apis, 1),
            start("worker", mesh.spec.workers, 0),
            start("gateway", mesh.spec.gateways, 0),
        )?;
        mesh.apis.extend(apis);
        mesh.workers = workers;
        mesh.gateways = gateways;
        Ok(mesh)
    }

    /// `http://` address of an api replica.
    pub fn api_url(&self, index: usize) -> String {
        url(&self.apis[index])
    }

    pub fn gateway_url(&self, index: usize) -> String {
        url(&self.gateways[index])
    }

    /// Starts a daemon process for the machine's person. Its token goes by a file of its own.
    #[boxed]
    pub async fn start_daemon(&self, daemon: DaemonSpec) -> Result<RoleProcess, StackError> {
        let mut text = format!(
            "[daemon]\ngateway = {}\ntoken = {}\nstate_dir = {}\nadmin = {}\n",
            quoted(&daemon.gateway_url),
            quoted(&daemon.token),
            quoted(&daemon.state_dir.to_string_lossy()),
            quoted(&if self.spec.usual_ports { usual(7447) } else { "127.0.0.1:0".to_owned() }),
        );
        let _ = writeln!(text, "environment = {}", serde_json::Value::from(daemon.environment.clone()));
        text.push_str(&daemon.extra_config);
        for (name, path) in &daemon.roots {
            let _ = write!(
                text,
                "\n[[daemon.roots]]\nname = {}\npath = {}\n",
                quoted(name),
                quoted(&path.to_string_lossy())
            );
        }
        if let Some(telemetry) = self.spec.extra_config.find("[telemetry]") {
            let _ = write!(text, "\n{}", &self.spec.extra_config[telemetry..]);
        }
        std::fs::create_dir_all(&daemon.state_dir).map_err(StackError::io("make the directory", &daemon.state_dir))?;
        let config = daemon.state_dir.join("daemon.toml");
        write_private(&config, text.as_bytes())?;
        let mut spec = role(&self.spec, &config, "daemon", 0);
        spec.name = daemon.name;
        spec.addresses = false;
        spec.inherits = Some(daemon_variables(&daemon.environment));
        spec.args.extend(["daemon".into(), "start".into()]);
        if let Some((_, path)) = daemon.roots.first() {
            spec.working_dir = path.clone();
        }
        RoleProcess::start(spec, START_PATIENCE).await
    }

    /// Drains everything: first who takes work in, last who carries it.
    #[boxed]
    pub async fn stop(&mut self, patience: Duration) {
        for roles in [&mut self.apis, &mut self.workers, &mut self.gateways] {
            futures::future::join_all(roles.iter_mut().map(|role| role.stop(patience))).await;
        }
        self.sim.stop(patience).await;
    }
}

/// A daemon of one person.
#[derive(Debug, Clone)]
pub struct DaemonSpec {
    /// Names its log.
    pub name: String,
    pub gateway_url: String,
    pub token: String,
    pub state_dir: PathBuf,
    /// Name and directory of each root.
    pub roots: Vec<(String, PathBuf)>,
    /// Variables of this process that the daemon and its tools get besides the harmless ones.
    pub environment: Vec<String>,
    /// More keys of `[daemon]`.
    pub extra_config: String,
}

/// The names of this process's variables that a daemon gets. Keys of model providers and addresses of databases are for
/// the other roles: the daemon runs what models ask for.
fn daemon_variables(named: &[String]) -> Vec<String> {
    let own = |name: &str| name.starts_with("RELIANT_DAEMON__") || name.starts_with("RELIANT_TELEMETRY__");
    std::env::vars_os()
        .filter_map(|(name, _)| name.into_string().ok())
        .filter(|name| own(name) || passes(name, named))
        .collect()
}

fn url(role: &RoleProcess) -> String {
    role.addresses().listen.map(|address| format!("http://{address}")).unwrap_or_default()
}

/// The usual port where it is free, else any.
fn usual(port: u16) -> String {
    let free = std::net::TcpListener::bind(("127.0.0.1", port)).is_ok();
    format!("127.0.0.1:{}", if free { port } else { 0 })
}

fn role(spec: &MeshSpec, config: &Path, role: &'static str, index: usize) -> RoleSpec {
    let mut args: Vec<OsString> = Vec::new();
    if config != Path::new("/dev/null") {
        args.extend([OsString::from("--config"), config.into()]);
    }
    let mut env: Vec<(OsString, OsString)> = spec.env.iter().map(|(key, value)| (key.into(), value.into())).collect();
    env.push(("RELIANT_TELEMETRY__SPOOL_DIR".into(), spec.dir.join("spans").into()));
    RoleSpec {
        name: format!("{role}-{index}"),
        role,
        binary: spec.binary.clone(),
        args,
        env,
        inherits: None,
        addresses: true,
        dir: spec.dir.clone(),
        working_dir: spec.dir.clone(),
    }
}

fn server(spec: &MeshSpec, stack: &Stack, config: &Path, name: &'static str, index: usize) -> RoleSpec {
    let mut role = role(spec, config, name, index);
    role.args.extend(["server".into(), name.into()]);
    let usual_ports = spec.usual_ports && index == 0;
    let (listen, admin) = match name {
        "api" => (Some(7440), 7441),
        "gateway" => (Some(7442), 7443),
        _ => (None, 7444),
    };
    let at = |port| if usual_ports { usual(port) } else { "127.0.0.1:0".to_owned() };
    if let Some(port) = listen {
        role.args.push(format!("--set={name}.listen={}", at(port)).into());
    }
    role.args.push(format!("--set={name}.admin={}", at(admin)).into());
    let nats_role = match name {
        "api" => NatsRole::Api,
        "gateway" => NatsRole::Gateway,
        _ => NatsRole::Worker,
    };
    role.env.push(("RELIANT_BUS__URL".into(), stack.nats_url_for(nats_role).into()));
    if let Some(user) = stack.nats_user(nats_role) {
        role.env.push(("RELIANT_BUS__INBOX_PREFIX".into(), user.inbox_prefix.into()));
    }
    let own = spec.role_env.iter().filter(|(of, _, _)| *of == role.name);
    role.env.extend(own.map(|(_, key, value)| (key.into(), value.into())));
    role
}

fn quoted(text: &str) -> String {
    // A TOML basic string is a JSON string but for DEL, which no path or URL of ours has.
    serde_json::Value::from(text).to_string()
}

fn config_toml(spec: &MeshSpec, sim_url: &str) -> String {
    let mut text = format!(
        "# Written at each start; changes made here are lost.\n\
         [store]\nurl = {}\n\n\
         [flows]\naddress = {}\ntask_queue = {}\n\n\
         [auth]\njwt_key_file = {}\n\n\
         [sim]\nurl = {}\n",
        quoted(&spec.database_url),
        quoted(&spec.temporal_address),
        quoted(&spec.task_queue),
        quoted(&spec.jwt_key_file.to_string_lossy()),
        quoted(sim_url),
    );
    if !spec.extra_config.is_empty() {
        let _ = write!(text, "\n{}", spec.extra_config);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_gets_harmless_and_named_variables_only() {
        // Cargo sets these for every test.
        let usual = daemon_variables(&[]);
        assert!(usual.contains(&"PATH".to_owned()) && !usual.contains(&"CARGO_PKG_NAME".to_owned()), "{usual:?}");
        let named = daemon_variables(&["CARGO_PKG_NAME".to_owned()]);
        assert!(named.contains(&"CARGO_PKG_NAME".to_owned()) && !named.contains(&"CARGO_PKG_VERSION".to_owned()));
    }
}
