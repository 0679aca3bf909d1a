//! A machine's disks at the moments when their owner changes.

use super::Machine;
use crate::disk::DiskError;

impl Machine {
    /// Returns once everything that the guest has written to its disks is on their storage.
    ///
    /// # Errors
    /// Names the first disk whose storage fails.
    pub fn flush_disks(&self) -> Result<(), DiskError> {
        self.disks.iter().try_for_each(|disk| disk.disk().flush())
    }

    /// Owns all of the machine's disks, as [`Machine::run`] does too; nothing to do for those that it owns.
    ///
    /// # Errors
    /// Names a disk that another machine owns; none is owned then that was not before.
    pub fn take_disks(&self) -> Result<(), DiskError> {
        let mut taken = Vec::new();
        for disk in self.disks.iter().map(|disk| disk.disk()) {
            match disk.take() {
                Ok(true) => taken.push(disk),
                Ok(false) => {}
                Err(error) => {
                    for disk in taken {
                        disk.let_go()?;
                    }
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Gives up the ownership of all disks, for another machine to take. This one must be paused, and its disks flushed; it
    /// does not run again before it has taken them back.
    ///
    /// # Errors
    /// Names the first disk that can't be unlocked.
    pub fn let_go_of_disks(&self) -> Result<(), DiskError> {
        self.disks.iter().try_for_each(|disk| disk.disk().let_go())
    }

    /// Lets go of all disks for good, and of being about to own them.
    pub(super) fn close_disks(&self) {
        for disk in self.disks.iter().map(|disk| disk.disk()) {
            if let Err(error) = disk.close() {
                tracing::error!(%error, "a disk may lack what its guest wrote last");
            }
        }
    }
}

#[cfg(test)]
mod tests;
