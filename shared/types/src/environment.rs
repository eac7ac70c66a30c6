//! Which environment variables may reach a tool's process: an allow-list, because a provider's key or a database's
//! address may have any name. The daemon applies it to what it starts, and `reliant up` to the daemon itself.

/// The person, the terminal, the language, the place of temporary files, and the network's way out.
const USUAL: &[&str] = &[
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "HOSTNAME",
    "LANG",
    "LANGUAGE",
    "TERM",
    "COLORTERM",
    "NO_COLOR",
    "TZ",
    "TMPDIR",
    "TMP",
    "TEMP",
    "EDITOR",
    "VISUAL",
    "PAGER",
    "CI",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "all_proxy",
    "no_proxy",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "CURL_CA_BUNDLE",
    "REQUESTS_CA_BUNDLE",
    "NODE_EXTRA_CA_CERTS",
    "GIT_SSL_CAINFO",
    "LD_LIBRARY_PATH",
    "LIBRARY_PATH",
    "CPATH",
    "PKG_CONFIG_PATH",
    "MANPATH",
    "INFOPATH",
    "NIX_PATH",
    "NIX_PROFILES",
    "NIX_SSL_CERT_FILE",
    "LOCALE_ARCHIVE",
    "XDG_CONFIG_HOME",
    "XDG_DATA_HOME",
    "XDG_CACHE_HOME",
    "XDG_STATE_HOME",
    "XDG_CONFIG_DIRS",
    "XDG_DATA_DIRS",
];

/// Where toolchains live and how they build. `XDG_RUNTIME_DIR` and the addresses of agents and buses are left out:
/// what listens there acts for the person and not for the project.
const TOOLCHAINS: &[&str] = &[
    "CARGO_HOME",
    "RUSTUP_HOME",
    "RUSTUP_TOOLCHAIN",
    "CARGO_TARGET_DIR",
    "CARGO_BUILD_JOBS",
    "CARGO_INCREMENTAL",
    "CARGO_NET_OFFLINE",
    "RUSTFLAGS",
    "RUSTC_WRAPPER",
    "RUST_BACKTRACE",
    "GOPATH",
    "GOROOT",
    "GOBIN",
    "GOCACHE",
    "GOMODCACHE",
    "GOFLAGS",
    "GOTOOLCHAIN",
    "JAVA_HOME",
    "JDK_HOME",
    "GRADLE_HOME",
    "MAVEN_HOME",
    "M2_HOME",
    "KOTLIN_HOME",
    "SDKMAN_DIR",
    "ANDROID_HOME",
    "ANDROID_SDK_ROOT",
    "ANDROID_NDK_HOME",
    "NVM_DIR",
    "NVM_BIN",
    "FNM_DIR",
    "FNM_MULTISHELL_PATH",
    "VOLTA_HOME",
    "PNPM_HOME",
    "BUN_INSTALL",
    "DENO_DIR",
    "NODE_PATH",
    "NODE_ENV",
    "VIRTUAL_ENV",
    "CONDA_PREFIX",
    "CONDA_DEFAULT_ENV",
    "CONDA_EXE",
    "PYENV_ROOT",
    "PYTHONPATH",
    "PYTHONHOME",
    "UV_PYTHON_INSTALL_DIR",
    "PIPX_HOME",
    "POETRY_HOME",
    "RBENV_ROOT",
    "GEM_HOME",
    "GEM_PATH",
    "ASDF_DIR",
    "ASDF_DATA_DIR",
    "MISE_DATA_DIR",
    "DOTNET_ROOT",
    "GHCUP_INSTALL_BASE_PREFIX",
    "OPAM_SWITCH_PREFIX",
    "JULIA_DEPOT_PATH",
    "CC",
    "CXX",
    "CFLAGS",
    "CXXFLAGS",
    "LDFLAGS",
    "AR",
    "LD",
    "MAKEFLAGS",
    "CUDA_HOME",
    "CUDA_PATH",
    "LLVM_CONFIG",
];

/// Whether a variable of this name reaches tools without being named in the configuration.
pub fn is_harmless(name: &str) -> bool {
    USUAL.contains(&name) || TOOLCHAINS.contains(&name) || name.starts_with("LC_")
}

/// Whether a configuration may name this variable: the project's own settings never reach a tool.
pub fn may_be_named(name: &str) -> bool {
    !name.is_empty() && !name.contains(['=', '\0']) && !name.to_ascii_uppercase().starts_with("RELIANT_")
}

/// Whether a variable of this name reaches tools: a harmless one, or one that the configuration names.
pub fn passes(name: &str, named: &[String]) -> bool {
    is_harmless(name) || (may_be_named(name) && named.iter().any(|named| named == name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_variable_that_carries_a_secret_is_harmless() {
        for name in ["PATH", "HOME", "LC_ALL", "CARGO_HOME", "VIRTUAL_ENV", "https_proxy"] {
            assert!(is_harmless(name), "{name}");
        }
        for name in [
            "ANTHROPIC_API_KEY",
            "OPENAI_API_KEY",
            "DATABASE_URL",
            "NATS_URL",
            "GITHUB_TOKEN",
            "AWS_SECRET_ACCESS_KEY",
            "MY_DB_PASSWORD",
            "SSH_AUTH_SOCK",
            "DBUS_SESSION_BUS_ADDRESS",
            "XDG_RUNTIME_DIR",
            "RELIANT_DAEMON__TOKEN",
            "LD_PRELOAD",
        ] {
            assert!(!is_harmless(name), "{name}");
        }
        assert!(may_be_named("DATABASE_URL") && !may_be_named("RELIANT_STORE__URL") && !may_be_named(""));
    }
}
