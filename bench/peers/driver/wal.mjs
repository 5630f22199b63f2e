// Makes sure that the server writes what logical replication reads, and makes no checkpoint while it drains a backlog.
// Exit code 3: it was told to, and needs a restart.

import pg from "pg";

const server = new pg.Client({ connectionString: process.env.DATABASE_URL });
await server.connect();
const { wal_level: level } = (await server.query("show wal_level")).rows[0];
if (level !== "logical") {
  await server.query("alter system set wal_level = 'logical'");
  await server.query("alter system set max_wal_size = '4GB'");
}
await server.end();
process.exitCode = level === "logical" ? 0 : 3;
