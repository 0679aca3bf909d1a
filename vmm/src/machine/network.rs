//! What a migration has to know of the network interface before the first page moves: which features of it the guest's
//! driver uses, so that a target that can't give them refuses at once.
//!
//! A driver that starts later than the migration is only noticed with the state; the guest then goes on at the source
//! all the same.

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_MAC, VIRTIO_NET_F_STATUS};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::Machine;
use crate::saved::sections::NetworkFeatures;
use crate::saved::{Reader, StateError};

/// What every version of the interface has had on every host.
const EVERYWHERE: u64 =
    1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_F_VERSION_1;

impl Machine {
    /// Whether the machine, which was built for `description`, can give the guest's network driver what it uses.
    ///
    /// # Errors
    /// Names what is missing here, or the description is damaged.
    pub fn check_network(&self, description: &[u8]) -> Result<(), StateError> {
        let used = Reader::new(description)?.all::<NetworkFeatures>()?;
        for NetworkFeatures { used } in used {
            let net = self.net.as_ref().ok_or_else(|| StateError::Invalid {
                section: "network-features",
                what: "the machine has no network interface".into(),
            })?;
            net.check_features(used)?;
        }
        Ok(())
    }

    /// For the description; nothing if any target can give it.
    pub(super) fn network_features(&self) -> Option<NetworkFeatures> {
        let used = self.net.as_ref()?.features();
        (used & !EVERYWHERE != 0).then_some(NetworkFeatures { used })
    }
}
