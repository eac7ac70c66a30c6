//! A private NATS server. Each role has a user of its own, allowed its own subjects and inboxes alone.

use std::{fmt, fmt::Write, path::Path, time::Duration};

use tokio::{io::AsyncReadExt, net::TcpStream, time::timeout};

use crate::{StackError, lock::write_private, secrets::Secrets};

pub(crate) const CONFIG_FILE: &str = "nats.conf";
/// NATS' own default, said aloud: larger payloads are split before they are published.
const MAX_PAYLOAD_BYTES: usize = 1024 * 1024;
/// A client that does not take its messages is cut off past this.
const MAX_PENDING_BYTES: usize = 64 * 1024 * 1024;
/// Two unanswered pings cut a dead connection.
const PING_INTERVAL: &str = "5s";
const PING_MAX: usize = 2;
const PROBE: Duration = Duration::from_millis(500);

/// A user of the private NATS server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NatsRole {
    /// May use every subject of ours; for a process that holds several roles, and for tests.
    Local,
    Api,
    Worker,
    Gateway,
}

impl NatsRole {
    pub const ALL: [NatsRole; 4] = [NatsRole::Local, NatsRole::Api, NatsRole::Worker, NatsRole::Gateway];

    pub const fn name(self) -> &'static str {
        match self {
            NatsRole::Local => "local",
            NatsRole::Api => "api",
            NatsRole::Worker => "worker",
            NatsRole::Gateway => "gateway",
        }
    }

    /// Where this user's answers arrive; a client of the role must be told to use it.
    pub const fn inbox_prefix(self) -> &'static str {
        match self {
            NatsRole::Local => "_INBOX",
            NatsRole::Api => "_INBOX_api",
            NatsRole::Worker => "_INBOX_worker",
            NatsRole::Gateway => "_INBOX_gateway",
        }
    }

    /// What it may publish and what it may hear, below `reliant.v1.`.
    const fn subjects(self) -> (&'static [&'static str], &'static [&'static str]) {
        match self {
            NatsRole::Local => (&[">"], &[">"]),
            NatsRole::Api => (
                &["tool.*", "update.*.*", "feed.*", "prefix.*", "burst.*", "control.>"],
                &["update.*.*", "feed.*", "presence.*.*", "control.>"],
            ),
            // Revocations come from the api alone.
            NatsRole::Worker => (
                &["tool.*", "update.*.*", "feed.*", "burst.*"],
                &["result.*.*", "prefix.*", "presence.*.*", "burst.*", "control.>"],
            ),
            NatsRole::Gateway => {
                (&["result.*.*", "update.*.*", "feed.*", "presence.*.*"], &["tool.*", "prefix.*", "control.>"])
            }
        }
    }
}

#[derive(Clone, PartialEq, Eq)]
pub struct NatsUser {
    pub name: String,
    pub password: String,
    pub inbox_prefix: &'static str,
}

impl fmt::Debug for NatsUser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NatsUser").field("name", &self.name).field("password", &"***").finish_non_exhaustive()
    }
}

pub(crate) fn user(secrets: &Secrets, role: NatsRole) -> NatsUser {
    NatsUser {
        name: role.name().to_owned(),
        password: secrets.nats(role).to_owned(),
        inbox_prefix: role.inbox_prefix(),
    }
}

pub(crate) fn write_config(data_dir: &Path, port: u16, secrets: &Secrets) -> Result<(), StackError> {
    write_private(&data_dir.join(CONFIG_FILE), config(port, secrets).as_bytes())
}

fn config(port: u16, secrets: &Secrets) -> String {
    let mut text = format!(
        "# Written at each start; changes are lost.\n\
         listen: \"127.0.0.1:{port}\"\n\
         max_payload: {MAX_PAYLOAD_BYTES}\n\
         max_pending: {MAX_PENDING_BYTES}\n\
         ping_interval: \"{PING_INTERVAL}\"\n\
         ping_max: {PING_MAX}\n\
         write_deadline: \"5s\"\n\
         authorization {{\n  users: [\n"
    );
    for role in NatsRole::ALL {
        let (publish, subscribe) = role.subjects();
        let list = |subjects: &[&str], inbox: bool| {
            let mut all: Vec<String> = subjects.iter().map(|subject| format!("\"reliant.v1.{subject}\"")).collect();
            if inbox {
                all.push(format!("\"{}.>\"", role.inbox_prefix()));
            }
            all.join(", ")
        };
        // Who answers requests may publish to the asker's inbox, once for each request; the local user anywhere.
        writeln!(
            text,
            "    {{ user: \"{}\", password: \"{}\", permissions: {{ publish: [{}], subscribe: [{}], allow_responses: true }} }}",
            role.name(),
            secrets.nats(role),
            list(publish, role == NatsRole::Local),
            list(subscribe, true),
        )
        .expect("a String takes everything");
    }
    text.push_str("  ]\n}\n");
    text
}

/// A server that is ready greets with INFO.
pub(crate) async fn is_ready(port: u16) -> bool {
    let greeting = async {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
        let mut start = [0; 5];
        stream.read_exact(&mut start).await?;
        std::io::Result::Ok(&start == b"INFO ")
    };
    matches!(timeout(PROBE, greeting).await, Ok(Ok(true)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_are_kept_to_their_subjects() {
        let dir = tempfile::tempdir().expect("tempdir");
        let secrets = Secrets::load_or_make(dir.path()).expect("secrets");
        let text = config(4222, &secrets);
        let line = |user: &str| {
            text.lines().find(|line| line.contains(&format!("user: \"{user}\""))).expect("a line per role").to_owned()
        };
        assert!(!line("api").contains("result."));
        assert!(!line("worker").contains("\"reliant.v1.presence.*.*\"], subscribe"));
        for (role, revokes) in [("api", true), ("worker", false), ("gateway", false)] {
            let line = line(role);
            let (publish, subscribe) = line.split_once("subscribe:").expect("both lists");
            assert_eq!(publish.contains("control."), revokes, "{role}");
            assert!(subscribe.contains("control."), "{role}");
        }
        assert!(line("gateway").contains("\"_INBOX_gateway.>\""));
        assert!(!line("gateway").contains("\"_INBOX.>\""));
    }
}
