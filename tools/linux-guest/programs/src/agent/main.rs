//! `guest-agent`: runs inside the Linux guest, does the work that the test asks for over TCP, and checks it.
//!
//! Every connection asks one line at a time and gets one line for each, as [`lines`](ferry_linux_guest_programs::lines)
//! says; connections don't wait for each other. Whatever is wrong goes to the console as well, so that it is seen even
//! if the network is what fails.

mod clock;
mod disk;
mod loads;
mod memory;
mod power;
mod serve;

fn main() -> anyhow::Result<()> {
    power::watch_button();
    serve::forever()
}
