//! Compiles the protobuf messages (no services; those are made in `reliant-rpc`).

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
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("reliant.fds"), &encoded)?;
    let set = <prost_types::FileDescriptorSet as prost::Message>::decode(encoded.as_slice())?;
    prost_build::Config::new().bytes(["."]).compile_fds(set)?;
    Ok(())
}
