//! Generates service stubs only; the messages are those of `reliant-types`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let proto = std::path::Path::new("../../proto");
    println!("cargo:rerun-if-changed={}", proto.display());
    let mut files: Vec<_> =
        std::fs::read_dir(proto.join("reliant/v1"))?.map(|entry| entry.map(|e| e.path())).collect::<Result<_, _>>()?;
    files.retain(|path| path.extension().is_some_and(|ext| ext == "proto"));
    files.sort();
    let mut compiler = protox::Compiler::new([proto])?;
    compiler.include_imports(true).include_source_info(true).open_files(&files)?;
    let encoded = compiler.encode_file_descriptor_set();
    let set = <prost_types::FileDescriptorSet as prost::Message>::decode(encoded.as_slice())?;
    tonic_prost_build::configure()
        // Clients are made over `reliant_rpc::channel`, which has our timeouts; a generated `connect` would also collide
        // with the tunnel's RPC of that name.
        .build_transport(false)
        .extern_path(".reliant.v1", "::reliant_types::pb")
        .compile_fds(set)?;
    Ok(())
}
