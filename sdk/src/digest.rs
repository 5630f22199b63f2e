//! Digest: a few numbers that tell whether two sides hold the same versions of the same users, and where they do not.
//!
//! Promise: the same definition as `GET /v1/digest`, which SHA-256 and a few shifts give in any language.
//! Not here, on purpose: profiles. A version stands for the state it numbers.

use sha2::{Digest as _, Sha256};
use uuid::Uuid;

/// The most buckets that users can be spread over; any number must be a power of two.
pub const MAX_BUCKETS: u32 = 1 << 16;

/// What the living users of a bucket come to. Order does not matter: users may be added as they are found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Digest {
    pub count: u64,
    /// The entry hashes of all of them, XORed. On the wire: 16 hex digits.
    pub hash: u64,
}

impl Digest {
    /// Adds a living user.
    pub fn add(&mut self, id: Uuid, version: i64) {
        self.merge(Self { count: 1, hash: entry_hash(id, version) });
    }

    /// Adds the users of another digest. They must not be here already.
    pub fn merge(&mut self, other: Self) {
        self.count += other.count;
        self.hash ^= other.hash;
    }
}

/// The first 8 bytes of SHA-256 over the 16 bytes of the id and the version as 8 bytes; big endian, all of them.
pub fn entry_hash(id: Uuid, version: i64) -> u64 {
    let hash = Sha256::new().chain_update(id.as_bytes()).chain_update(version.to_be_bytes()).finalize();
    hash[..8].iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// Where a user belongs among `buckets`, a power of two: the top bits of the first 2 bytes of SHA-256 over the 16 bytes of the id.
pub fn bucket(id: Uuid, buckets: u32) -> u32 {
    let hash = Sha256::digest(id.as_bytes());
    let place = u64::from(hash[0]) << 8 | u64::from(hash[1]);
    // Multiplied instead of shifted, so that no number of buckets can make it panic.
    (place * u64::from(buckets) / u64::from(MAX_BUCKETS)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    // Computed with Python's hashlib.
    const ANA: Uuid = Uuid::from_u128(0x0193a2b4_7c1e_7d53_9a51_2f5d8c0e4b6a);
    const BEN: Uuid = Uuid::from_u128(0x00000000_0000_4000_8000_000000000001);
    const MAX: Uuid = Uuid::max();

    #[test]
    fn entries_are_hashed_as_published() {
        let hashes = [(ANA, 7), (ANA, 8), (BEN, 1), (MAX, 9_007_199_254_740_991)].map(|(id, v)| entry_hash(id, v));
        assert_eq!(
            hashes,
            [0xaa66_5fab_35e9_2c5f, 0x93a2_df18_aa71_bba5, 0x2541_3eb5_e7e7_5247, 0x8b32_4aab_6739_b500]
        );
    }

    #[test]
    fn buckets_are_the_top_bits_of_the_place() {
        let spread = |id| [1, 2, 16, 256, MAX_BUCKETS].map(|buckets| bucket(id, buckets));
        assert_eq!(spread(ANA), [0, 0, 0, 4, 1_053]);
        assert_eq!(spread(BEN), [0, 1, 8, 134, 34_468]);
        assert_eq!(spread(MAX), [0, 0, 5, 90, 23_238]);
    }

    #[test]
    fn the_order_of_users_does_not_matter_and_each_of_them_does() {
        let of = |users: &[(Uuid, i64)]| {
            users.iter().fold(Digest::default(), |mut digest, (id, version)| {
                digest.add(*id, *version);
                digest
            })
        };
        let both = of(&[(ANA, 7), (BEN, 1)]);
        assert_eq!(both, of(&[(BEN, 1), (ANA, 7)]));
        assert_eq!(both, Digest { count: 2, hash: 0xaa66_5fab_35e9_2c5f ^ 0x2541_3eb5_e7e7_5247 });
        assert_ne!(both, of(&[(ANA, 8), (BEN, 1)]));
        assert_ne!(both, of(&[(ANA, 7)]));
    }
}
