//! How a device's thread waits for its guest: on a queue's notification and on the kick that ends its wait.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::parking::Kick;

const FOREVER: i32 = -1;
const TOKEN_NOTIFY: u64 = 0;
const TOKEN_KICK: u64 = 1;

/// Wakes all threads of a device from their waits.
#[derive(Debug)]
pub(super) struct DeviceKick(EventFd);

impl DeviceKick {
    pub(super) fn new() -> io::Result<Self> {
        EventFd::new(EFD_NONBLOCK).map(Self)
    }
}

impl Kick for DeviceKick {
    fn kick(&self) {
        // A full counter is a kick already.
        let _ = self.0.write(1);
    }

    fn reset(&self) {
        // It fails if there was no kick.
        let _ = self.0.read();
    }
}

impl AsRawFd for DeviceKick {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// What one thread waits with. A kick wakes all threads of a device, a notification as few as possible.
#[derive(Debug)]
pub(super) struct QueueWait(Epoll);

impl QueueWait {
    pub(super) fn new(notify: &EventFd, kick: &DeviceKick) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let notified = EpollEvent::new(EventSet::IN | EventSet::EXCLUSIVE, TOKEN_NOTIFY);
        epoll.ctl(ControlOperation::Add, notify.as_raw_fd(), notified)?;
        epoll.ctl(ControlOperation::Add, kick.as_raw_fd(), EpollEvent::new(EventSet::IN, TOKEN_KICK))?;
        Ok(Self(epoll))
    }

    /// Waits for either, and takes the notification.
    pub(super) fn wait(&self, notify: &EventFd) -> io::Result<()> {
        let mut events = [EpollEvent::default(); 2];
        let count = match self.0.wait(FOREVER, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        if events[..count].iter().any(|event| event.data() == TOKEN_NOTIFY) {
            // Another thread may have been faster.
            let _ = notify.read();
        }
        Ok(())
    }
}
