//! Who may join a migration with a data stream: only who was given its key on the control connection.
//!
//! ```text
//!  target: secret, 32 random bytes for this attempt
//!            | keyed hash of the session's number
//!            v
//!          key of the session  --Admit-->  source
//!            | keyed hash of VM, epoch, migration, session, stream
//!            v                                |
//!          proof of each stream  <---join-----'
//! ```
//!
//! A key is for one set of streams: those of the first connection, and of each after an interruption. Each stream has a
//! proof of its own and is let in once, so a join that was overheard opens nothing: not another stream, not another set,
//! not another migration. Without TLS whoever hears the control connection hears the key as well; what is kept out then is
//! whoever only reaches the port. The hash is BLAKE3 in its keyed mode. Random numbers come from the caller.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ident::{Epoch, MigrationId, VmId};

/// Bytes of secrets, keys and proofs.
pub const PROOF_BYTES: usize = 32;

/// What the target keeps to itself: random, and new for each attempt.
#[derive(Clone)]
pub struct JoinSecret(pub [u8; PROOF_BYTES]);

/// What lets the data streams of one session in.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinKey([u8; PROOF_BYTES]);

/// What a stream joins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The VM that moves.
    pub vm: VmId,
    /// The epoch in which its source runs it.
    pub epoch: Epoch,
    /// The attempt.
    pub migration: MigrationId,
    /// The set of streams; 0, or what [`crate::message::Resume`] has announced.
    pub session: u32,
    /// The stream's number.
    pub stream: u16,
}

/// That whoever opens a stream has the key.
#[derive(Debug, Clone, Copy)]
pub struct Proof(pub [u8; PROOF_BYTES]);

impl JoinSecret {
    /// The key of the set of streams with this number.
    #[must_use]
    pub fn key(&self, session: u32) -> JoinKey {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(b"ferry: key of a session\0").update(&session.to_le_bytes());
        JoinKey(*hasher.finalize().as_bytes())
    }
}

impl JoinKey {
    /// The proof for one stream.
    #[must_use]
    pub fn prove(&self, place: &Place) -> Proof {
        let Place { vm, epoch, migration, session, stream } = place;
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        // All of fixed length, so that no two places are the same bytes.
        hasher
            .update(b"ferry: join of a stream\0")
            .update(&vm.0)
            .update(&epoch.number().to_le_bytes())
            .update(&migration.0)
            .update(&session.to_le_bytes())
            .update(&stream.to_le_bytes());
        Proof(*hasher.finalize().as_bytes())
    }

    /// Whether `proof` is that of whoever joins at `place`. It takes as long whatever the answer.
    #[must_use]
    pub fn admits(&self, place: &Place, proof: &Proof) -> bool {
        blake3::Hash::from_bytes(self.prove(place).0) == blake3::Hash::from_bytes(proof.0)
    }
}

impl fmt::Debug for JoinSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JoinSecret(..)")
    }
}

impl fmt::Debug for JoinKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // It ends up in logs.
        f.write_str("JoinKey(..)")
    }
}

impl PartialEq for Proof {
    fn eq(&self, other: &Self) -> bool {
        blake3::Hash::from_bytes(self.0) == blake3::Hash::from_bytes(other.0)
    }
}

impl Eq for Proof {}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Place = Place {
        vm: VmId([1; 16]),
        epoch: Epoch::new(7),
        migration: MigrationId([2; 16]),
        session: 3,
        stream: 4,
    };

    #[test]
    fn a_proof_is_good_for_its_own_place_and_no_other() {
        let key = JoinSecret([9; 32]).key(3);
        let proof = key.prove(&PLACE);
        assert!(key.admits(&PLACE, &proof));
        for other in [
            Place { vm: VmId([0; 16]), ..PLACE },
            Place { epoch: Epoch::new(8), ..PLACE },
            Place { migration: MigrationId([0; 16]), ..PLACE },
            Place { session: 4, ..PLACE },
            Place { stream: 5, ..PLACE },
        ] {
            assert!(!key.admits(&other, &proof), "{other:?}");
        }
        let mut bent = proof;
        bent.0[31] ^= 1;
        assert!(!key.admits(&PLACE, &bent));
    }

    #[test]
    fn each_session_and_each_secret_has_keys_of_its_own() {
        let secret = JoinSecret([9; 32]);
        let proof = secret.key(3).prove(&PLACE);
        assert!(!secret.key(4).admits(&PLACE, &proof));
        assert!(!JoinSecret([8; 32]).key(3).admits(&PLACE, &proof));
    }

    #[test]
    fn keys_are_not_shown() {
        assert!(!format!("{:?} {:?}", JoinSecret([171; 32]), JoinSecret([171; 32]).key(0)).contains("171"));
    }
}
