//! The newcomer's first command.

use std::process::Command;

#[test]
fn the_demo_verifies_every_step_and_exits_with_zero() {
    let output = Command::new(env!("CARGO_BIN_EXE_switchboard")).args(["demo", "--exit"]).output().unwrap();
    let story = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{story}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(story.contains("Every step verified"), "{story}");
    assert!(story.lines().filter(|line| line.contains(" ms  ")).count() >= 8, "each step has its time: {story}");
}
