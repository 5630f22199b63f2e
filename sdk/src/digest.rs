//! Digest: count and hash over (id, version), by which two copies find their differences without moving data.
//!
//! Promise: equal sets have equal digests in any order of adding; owner and consumers compute the same.
//! Not here, on purpose: protection against somebody who makes up users whose hashes cancel out.

use sha2::{Digest as _, Sha256};
use uuid::Uuid;

/// A digest can be asked for in 1 to this many buckets, a power of two.
pub const MAX_BUCKETS: u32 = 65_536;

/// Of some users: how many, and the exclusive or of their hashes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Digest {
    pub count: u64,
    pub hash: u64,
}

impl Digest {
    pub fn add(&mut self, id: Uuid, version: i64) {
        self.count += 1;
        self.hash ^= entry_hash(id, version);
    }
}

/// The first 8 bytes, big endian, of SHA-256 over the 16 bytes of the id and the version as 8 bytes, big endian.
pub fn entry_hash(id: Uuid, version: i64) -> u64 {
    let hash = Sha256::new().chain_update(id.as_bytes()).chain_update(version.to_be_bytes()).finalize();
    hash.iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// Which of `buckets`, a power of two, a user belongs to: the top bits of the first two bytes of SHA-256 over the id.
pub fn bucket(id: Uuid, buckets: u32) -> u32 {
    let hash = Sha256::digest(id.as_bytes());
    let place = u32::from(hash[0]) << 8 | u32::from(hash[1]);
    place / (MAX_BUCKETS / buckets.clamp(1, MAX_BUCKETS))
}
