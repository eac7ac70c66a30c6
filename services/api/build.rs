//! The web page is built by npm and embedded. Where it was not built, a placeholder says so, and Rust builds alone.

fn main() -> std::io::Result<()> {
    let dist = std::path::Path::new("../web/dist");
    std::fs::create_dir_all(dist)?;
    let index = dist.join("index.html");
    if !index.exists() {
        std::fs::write(
            &index,
            "<!doctype html>\n<meta charset=\"utf-8\">\n<title>reliant</title>\n<p>The web page was not built into this binary. \
             Run <code>make web</code> and build again; the <code>reliant chat</code> command works without it.</p>\n",
        )?;
    }
    println!("cargo:rerun-if-changed=../web/dist");
    println!("cargo:rerun-if-changed=build.rs");
    Ok(())
}
