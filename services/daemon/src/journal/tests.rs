//! The journal against crashes: as a state machine, over a disk that tears writes, and over files that are wrong.

mod disk;
mod files;
mod machine;

use reliant_types::ToolCallId;

use super::state::Header;

fn call(n: u8) -> ToolCallId {
    ToolCallId(uuid::Uuid::from_u128(0x0190_0000_0000_7000_8000_0000_0000_0000 + u128::from(n)))
}

fn header(generation: i64, repeatable: bool) -> Header {
    Header { generation, repeatable, tool: "shell".into(), ..Default::default() }
}
