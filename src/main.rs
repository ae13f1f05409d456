//! The `switchboard` binary: arguments, configuration, telemetry, one command.

fn main() {}
