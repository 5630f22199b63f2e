"""txoutbox, with asyncpg for Postgres and aiormq for RabbitMQ, on uvloop.

    DATABASE_URL=postgres://.. AMQP_URL=amqp://.. EXCHANGE=.. python relay.py setup|relay

README.md beside the folders says why each setting is as it is.
"""

import asyncio
import os
import sys
from datetime import timedelta

import aiormq
import asyncpg
import uvloop
from aiormq.abc import Basic
from txoutbox import OutboxMessage, Relay, RelayConfig
from txoutbox.adapters.postgres import PostgresStorage

BATCH = int(os.environ.get("BATCH", "500"))
EXCHANGE = os.environ["EXCHANGE"]
# Seconds between two looks at an empty table. A hint by `notify` would have the commits of all writers wait for each other.
POLL_S = 0.005


async def storage() -> PostgresStorage:
    pool = await asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=2, max_size=4)
    return PostgresStorage(pool, strict_ordering=False, delete_on_ack=True)


async def setup() -> None:
    outbox = await storage()
    await outbox.create_schema()
    await outbox.pool.close()


async def relay() -> None:
    outbox = await storage()
    connection = await aiormq.connect(os.environ["AMQP_URL"])
    channel = await connection.channel(publisher_confirms=True)

    async def publish(message: OutboxMessage) -> None:
        # Returns when the broker has confirmed. Without `wait`, the channel is not held for a flush of the socket per message.
        await channel.basic_publish(
            message.payload,
            exchange=EXCHANGE,
            routing_key=message.topic,
            properties=properties(message),
            mandatory=True,
            wait=False,
        )

    config = RelayConfig(batch_size=BATCH, concurrency=BATCH, lease=timedelta(seconds=60), poll_min=POLL_S, poll_max=POLL_S)
    worker = Relay(outbox, publish, config=config)
    await worker.run(handle_signals=True)


def properties(message: OutboxMessage) -> Basic.Properties:
    facts = message.headers
    return Basic.Properties(
        delivery_mode=2,
        message_id=facts["id"],
        message_type=message.topic,
        content_type="application/json",
        timestamp=message.created_at,
        app_id="tidings",
        headers={
            "version": int(facts["version"]),
            "traceparent": facts["traceparent"],
            "cloudEvents_specversion": "1.0",
            "cloudEvents_id": facts["id"],
            "cloudEvents_source": "urn:tidings:masterdata",
            "cloudEvents_type": message.topic,
            "cloudEvents_subject": facts["subject"],
            "cloudEvents_time": facts["time"],
            **{f"field.{field}": True for field in facts["fields"].split()},
        },
    )


uvloop.run({"setup": setup, "relay": relay}[sys.argv[1]]())
