//! The story, on the real servers: one chapter a file. `./dev test` brings the servers up and runs it.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod house;
mod proxy;

mod command_line;
mod consumers;
mod hardship;
mod messages;
mod privacy;
mod races;
mod refusals;
mod statements;
mod users;
