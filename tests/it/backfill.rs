//! Backfill
