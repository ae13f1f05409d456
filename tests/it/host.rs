//! The machine around the daemon: a service manager that wants to hear of it, and a limit on open files that is too low.

use std::process::{Command, Stdio};
use std::time::Duration;

use tokio::net::UnixDatagram;

use crate::harness::{Directory, PATIENCE};

fn serve(program: &str, directory: &Directory) -> Command {
    let mut command = Command::new(program);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command.env("SWITCHBOARD__DATA__DIR", directory.0.join("data"));
    for listener in ["API", "ADMIN"] {
        command.env(format!("SWITCHBOARD__{listener}__LISTEN"), "127.0.0.1:0");
    }
    // Nobody listens there, and no number asks.
    command.env("SWITCHBOARD__WHATSAPP__URL", "ws://127.0.0.1:9/ws/chat");
    command.env("SWITCHBOARD__WHATSAPP__VERSION", "2.3000.1");
    command
}

async fn heard(socket: &UnixDatagram) -> String {
    let mut word = [0; 256];
    let length = tokio::time::timeout(PATIENCE, socket.recv(&mut word)).await.expect("a word in time").unwrap();
    String::from_utf8_lossy(&word[..length]).trim().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_manager_hears_of_readiness_life_and_the_end() {
    let directory = Directory::new();
    let path = directory.0.join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    let mut command = serve(env!("CARGO_BIN_EXE_switchboard"), &directory);
    command.arg("serve").stderr(Stdio::null()).env("NOTIFY_SOCKET", &path);
    command.env("WATCHDOG_USEC", Duration::from_secs(1).as_micros().to_string());
    let mut daemon = command.spawn().unwrap();
    let mut first = [heard(&socket).await, heard(&socket).await];
    first.sort();
    assert_eq!(first, ["READY=1", "WATCHDOG=1"]);
    for _ in 0..3 {
        assert_eq!(heard(&socket).await, "WATCHDOG=1");
    }
    assert!(Command::new("kill").args(["-TERM", &daemon.id().to_string()]).status().unwrap().success());
    while heard(&socket).await != "STOPPING=1" {}
    let ended = tokio::task::spawn_blocking(move || daemon.wait()).await.unwrap().unwrap();
    assert!(ended.success(), "{ended}");
}

#[tokio::test(flavor = "multi_thread")]
async fn too_few_open_files_are_a_clear_error_at_the_start() {
    let directory = Directory::new();
    let mut command = serve("sh", &directory);
    let program = env!("CARGO_BIN_EXE_switchboard");
    command.args(["-c", "ulimit -n 300 && exec \"$0\" serve", program]);
    let ended = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(69), "{said}");
    assert!(said.contains("0 numbers need 768 open files and 300 are allowed"), "{said}");
}
