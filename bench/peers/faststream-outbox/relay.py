"""faststream-outbox, relaying to RabbitMQ with FastStream's own broker, as its documentation shows.

    DATABASE_URL=postgres://.. AMQP_URL=amqp://.. EXCHANGE=.. python relay.py setup|relay

README.md beside the folders says why each setting is as it is.
"""

import logging
import os
import sys

import uvloop
from aio_pika import DeliveryMode, Message
from faststream import FastStream
from faststream.rabbit import ExchangeType, RabbitBroker, RabbitExchange, RabbitResponse
from faststream_outbox import OutboxBroker, make_outbox_table, outbox_autovacuum_ddl
from faststream_outbox.annotations import OutboxMessage
from sqlalchemy import MetaData, text
from sqlalchemy.ext.asyncio import create_async_engine

WORKERS = int(os.environ.get("WORKERS", "40"))
BATCH = int(os.environ.get("BATCH", "500"))
FLUSH = int(os.environ.get("FLUSH", "20"))
QUEUE = "profile.updated"
# Seconds between two looks at an empty table. A hint by `notify` would have the commits of all writers wait for each other.
POLL_S = 0.005

metadata = MetaData()
table = make_outbox_table(metadata, table_name="outbox")
engine = create_async_engine(
    os.environ["DATABASE_URL"].replace("postgres://", "postgresql+asyncpg://"), pool_size=WORKERS + 2, max_overflow=0
)
rabbit = RabbitBroker(os.environ["AMQP_URL"], logger=None)
outbox = OutboxBroker(engine, outbox_table=table, logger=None)
exchange = RabbitExchange(os.environ["EXCHANGE"], type=ExchangeType.TOPIC, durable=True)
news = rabbit.publisher(exchange=exchange, routing_key=QUEUE, mandatory=True, persist=True)


async def undecoded(message: OutboxMessage) -> bytes:
    return message.body


@news
@outbox.subscriber(
    QUEUE,
    max_workers=WORKERS,
    fetch_batch_size=BATCH,
    min_fetch_interval=POLL_S,
    max_fetch_interval=POLL_S,
    terminal_flush_batch_size=FLUSH,
    decoder=undecoded,
)
async def relay(body: bytes, message: OutboxMessage) -> RabbitResponse:
    facts = message.headers
    return RabbitResponse(
        Message(
            body,
            delivery_mode=DeliveryMode.PERSISTENT,
            message_id=facts["id"],
            type=QUEUE,
            content_type="application/json",
            timestamp=message.raw_message.created_at,
            app_id="tidings",
            headers={
                "version": int(facts["version"]),
                "traceparent": facts["traceparent"],
                "cloudEvents_specversion": "1.0",
                "cloudEvents_id": facts["id"],
                "cloudEvents_source": "urn:tidings:masterdata",
                "cloudEvents_type": QUEUE,
                "cloudEvents_subject": facts["subject"],
                "cloudEvents_time": facts["time"],
                **{f"field.{field}": True for field in facts["fields"].split()},
            },
        )
    )


async def setup() -> None:
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
        await connection.execute(text(outbox_autovacuum_ddl("outbox", vacuum_cost_delay=0)))


async def serve() -> None:
    logging.disable(logging.WARNING)
    await FastStream(outbox, logger=None, on_startup=[rabbit.start]).run()


uvloop.run({"setup": setup, "relay": serve}[sys.argv[1]]())
