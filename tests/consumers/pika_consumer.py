"""A consumer in Python with pika: keeps up with users by hearing that they changed and fetching their latest record.

    AMQP_URL=amqp://localhost TIDINGS_URL=http://127.0.0.1:8080 TIDINGS_QUEUE=badges python3 pika_consumer.py profile.updated

A message is only a hint to look. The record is fetched when the message is handled, so duplicates and reordering do no harm:
whatever order they come in, the last fetch sees the last state.
"""

import json
import os
import sys
from collections import OrderedDict
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import pika

EXCHANGE = os.environ.get("TIDINGS_EXCHANGE", "masterdata")
QUEUE = os.environ["TIDINGS_QUEUE"]
KEYS = sys.argv[1:] or ["#"]
REMEMBERED = 10_000


def fetch(user_id, version, pause):
    """The latest record, at least as new as the change that woke us; None when the user is gone."""
    while True:
        try:
            with urlopen(f"{os.environ['TIDINGS_URL']}/v1/users/{user_id}?min_version={version}", timeout=10) as answer:
                return json.load(answer)
        except HTTPError as error:
            if error.code in (404, 410):
                return None
            if error.code != 503:
                raise
            pause(int(error.headers.get("Retry-After", 1)))
        except (URLError, OSError):
            pause(1)


def handle(properties, body, pause):
    user_id = json.loads(body)["user_id"]
    user = fetch(user_id, properties.headers["version"], pause)
    # Here your own copy would be written, or forgotten when there is no user any more.
    user = user or {"version": None, "profile": None}
    line = {"event": properties.type, "user_id": user_id, "version": user["version"], "profile": user["profile"]}
    print(json.dumps(line), flush=True)


def main():
    connection = pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"]))
    channel = connection.channel()
    channel.basic_qos(prefetch_count=20)

    # What can never be handled goes to a queue of its own, where a person looks; without one it would be lost.
    channel.queue_declare(f"{QUEUE}.dead", durable=True, arguments={"x-queue-type": "quorum"})
    dead = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": f"{QUEUE}.dead"}
    channel.queue_declare(QUEUE, durable=True, arguments={"x-queue-type": "quorum", **dead})
    channel.exchange_declare(EXCHANGE, "topic", durable=True)
    for key in KEYS:
        channel.queue_bind(QUEUE, EXCHANGE, key)

    seen = OrderedDict()  # of message ids, in order of arrival

    def on_message(channel, delivery, properties, body):
        try:
            if properties.message_id not in seen:
                # connection.sleep and not time.sleep: heartbeats go on meanwhile.
                handle(properties, body, connection.sleep)
                seen[properties.message_id] = True
                if len(seen) > REMEMBERED:
                    seen.popitem(last=False)
            channel.basic_ack(delivery.delivery_tag)
        except Exception as error:
            print(f"message {properties.message_id} is set aside: {type(error).__name__}", file=sys.stderr)
            channel.basic_reject(delivery.delivery_tag, requeue=False)

    channel.basic_consume(QUEUE, on_message)
    channel.start_consuming()


if __name__ == "__main__":
    main()
