//! The journal against crashes: as a state machine, over a disk that tears writes, and over files that are wrong.

mod disk;
mod files;
mod machine;

use proptest::{prelude::ProptestConfig, test_runner::RngSeed};
use reliant_types::ToolCallId;

use super::state::Header;

const SEED: u64 = 4;

/// The same cases in every run, unless PROPTEST_RNG_SEED asks for others.
fn seeded(config: ProptestConfig) -> ProptestConfig {
    let rng_seed = match config.rng_seed {
        RngSeed::Random => RngSeed::Fixed(SEED),
        asked => asked,
    };
    ProptestConfig { rng_seed, ..config }
}

fn call(n: u8) -> ToolCallId {
    ToolCallId(uuid::Uuid::from_u128(0x0190_0000_0000_7000_8000_0000_0000_0000 + u128::from(n)))
}

fn header(generation: i64, repeatable: bool) -> Header {
    Header { generation, repeatable, tool: "shell".into(), ..Default::default() }
}
