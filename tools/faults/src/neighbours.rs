//! Who answers for the guest's address, asked from the client.

use std::net::{SocketAddr, UdpSocket};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use ferry_guest_abi::UDP_ECHO_PORT;
use ferry_lab::capture::FrameKind;
use ferry_lab::network::lab::{CLIENT_INTERFACE, CLIENT_IPV4, VM_IPV4, VM_MAC};
use ferry_lab::{Capture, Lab, LabClock, Scope, SwitchPort};

use crate::plan::Side;

/// How often the client asks before it gives up.
const ASKS: u32 = 10;

/// How long it waits for each answer.
const ANSWER_PATIENCE: Duration = Duration::from_millis(1500);

/// How long answers of others are waited for.
const OTHERS: Duration = Duration::from_millis(60);

/// How often the guest's address is asked for, should nobody have answered: a host that announces the guest at that very moment has
/// answered before the guest could.
const TRIES: u32 = 5;

/// Asks for the guest's address, and says something to the guest.
///
/// # Errors
/// If nobody answers, more than one does, or it is not on `side`.
pub fn only_one_answers(lab: &Lab, side: Side) -> anyhow::Result<()> {
    let mut tries = 1;
    while !is_answered_once(lab)? {
        if tries == TRIES {
            bail!("nobody has answered the client's questions who has {VM_IPV4}");
        }
        tries += 1;
    }
    let port = match side {
        Side::Source => SwitchPort::HostA,
        Side::Target => SwitchPort::HostB,
    };
    let seen = lab.vm_port(VM_MAC)?;
    if seen != Some(port) {
        bail!("the guest at the {side} was last seen behind {seen:?}");
    }
    Ok(())
}

/// Asks once; whether somebody has answered, and nobody else.
fn is_answered_once(lab: &Lab) -> anyhow::Result<bool> {
    let capture =
        Capture::start(&lab.client, LabClock::start(), CLIENT_INTERFACE, Scope::Announcements, |_| true)?;
    forget_neighbours(lab)?;
    lab.client.run(say_something)??;
    std::thread::sleep(OTHERS);
    let frames = capture.stop().frames;
    let asked = frames
        .iter()
        .filter(|frame| matches!(frame.kind(), FrameKind::ArpRequest { target, .. } if target == VM_IPV4));
    let answers: Vec<_> = frames
        .iter()
        .filter_map(|frame| {
            if let FrameKind::ArpReply { mac, ip } = frame.kind() {
                (ip == VM_IPV4).then_some(mac)
            } else {
                None
            }
        })
        .collect();
    let asked = asked.count();
    if answers.len() > asked || answers.iter().any(|mac| *mac != VM_MAC) {
        bail!("the client asked {asked} times who has {VM_IPV4}, and was answered by {answers:?}");
    }
    Ok(!answers.is_empty())
}

fn forget_neighbours(lab: &Lab) -> anyhow::Result<()> {
    let mut command = Command::new("ip");
    command.args(["neigh", "flush", "dev", CLIENT_INTERFACE]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let status = lab.client.spawn(command)?.wait()?;
    // It fails if there is nothing to flush on some versions, which is as good.
    let _ = status;
    Ok(())
}

fn say_something() -> anyhow::Result<()> {
    let socket = UdpSocket::bind(SocketAddr::from((CLIENT_IPV4, 0)))?;
    socket.connect(SocketAddr::from((VM_IPV4, UDP_ECHO_PORT)))?;
    socket.set_read_timeout(Some(ANSWER_PATIENCE))?;
    for _ in 0..ASKS {
        // What is refused or lost is asked again.
        if socket.send(&[7; 32]).is_ok() && socket.recv(&mut [0; 64]).is_ok() {
            return Ok(());
        }
    }
    Err(std::io::Error::last_os_error()).with_context(|| format!("nobody at {VM_IPV4} answers"))
}
