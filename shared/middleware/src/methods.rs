//! The methods that exist, and which of them stream. Metrics and spans name only these, so that a scanner's made-up
//! paths make no new time series.

use std::collections::HashMap;

use prost::Message as _;

/// One method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Method {
    /// `package.Service/Method`, as `rpc.method` has it.
    pub name: &'static str,
    /// Either side streams.
    pub streaming: bool,
    /// The caller streams: its request has no end to wait for.
    pub client_streaming: bool,
}

impl Method {
    /// A probe of liveness. It is answered at once, also by a full server: full is not dead.
    pub fn is_probe(&self) -> bool {
        self.name == "grpc.health.v1.Health/Check"
    }
}

/// What a path that no service declares is called.
pub const OTHER: Method = Method { name: "_OTHER", streaming: false, client_streaming: false };

const PLATFORM: &[Method] = &[
    Method { name: "grpc.health.v1.Health/Check", streaming: false, client_streaming: false },
    Method { name: "grpc.health.v1.Health/Watch", streaming: true, client_streaming: false },
    reflection("grpc.reflection.v1.ServerReflection/ServerReflectionInfo"),
    reflection("grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"),
];

const fn reflection(name: &'static str) -> Method {
    Method { name, streaming: true, client_streaming: true }
}

#[derive(Debug)]
pub struct Methods(HashMap<&'static str, Method>);

impl Methods {
    /// All methods of `proto/reliant/v1`, health and reflection.
    pub fn get() -> &'static Methods {
        static METHODS: std::sync::LazyLock<Methods> = std::sync::LazyLock::new(Methods::read);
        &METHODS
    }

    fn read() -> Methods {
        let set = prost_types::FileDescriptorSet::decode(reliant_types::pb::FILE_DESCRIPTOR_SET)
            .expect("the descriptor set was made by our own build");
        let mut methods: HashMap<_, _> = PLATFORM.iter().map(|method| (method.name, *method)).collect();
        for file in &set.file {
            for service in &file.service {
                for method in &service.method {
                    let name = format!("{}.{}/{}", file.package(), service.name(), method.name());
                    // Read once per process, so this is no leak that grows.
                    let name: &'static str = Box::leak(name.into_boxed_str());
                    let streaming = method.server_streaming() || method.client_streaming();
                    let client_streaming = method.client_streaming();
                    methods.insert(name, Method { name, streaming, client_streaming });
                }
            }
        }
        Methods(methods)
    }

    /// The method of an HTTP path, `/package.Service/Method`.
    pub fn of_path(&self, path: &str) -> Method {
        path.strip_prefix('/').and_then(|name| self.0.get(name)).copied().unwrap_or(OTHER)
    }
}

/// The method of `path` among all that exist.
pub fn of_path(path: &str) -> Method {
    Methods::get().of_path(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_are_read_from_the_descriptors() {
        let check = |name: &'static str, streaming, client_streaming| {
            assert_eq!(of_path(&format!("/{name}")), Method { name, streaming, client_streaming });
        };
        check("reliant.v1.MessageService/SendMessage", false, false);
        check("reliant.v1.UpdateService/Subscribe", true, false);
        check("reliant.v1.TunnelService/Connect", true, true);
        check("grpc.health.v1.Health/Watch", true, false);
        for path in
            ["/reliant.v1.MessageService/Nope", "/", "", "/wp-login.php", "reliant.v1.MessageService/SendMessage"]
        {
            assert_eq!(of_path(path), OTHER, "{path}");
        }
    }
}
