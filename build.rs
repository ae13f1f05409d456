//! Compiles the public contract: protox reads `proto/`, so no system protoc is needed, and keeps comments and custom
//! options in the descriptor set that the reflection service publishes.

use std::error::Error;
use std::path::PathBuf;

const FILES: [&str; 8] = [
    "switchboard/v1/capacity.proto",
    "switchboard/v1/event.proto",
    "switchboard/v1/message.proto",
    "switchboard/v1/number.proto",
    "switchboard/v1/operator.proto",
    "switchboard/v1/tenant.proto",
    "switchboard/v1/webhook.proto",
    "xds/service/orca/v3/orca.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler.include_imports(true).include_source_info(true);
    compiler.open_files(FILES)?;
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    std::fs::write(out.join("switchboard.v1.descriptor.bin"), compiler.encode_file_descriptor_set())?;
    tonic_prost_build::configure().emit_rerun_if_changed(false).compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}
