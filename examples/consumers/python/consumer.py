"""A consumer in Python with pika: hears that users changed, and keeps up by fetching their latest record.

    AMQP_URL=amqp://localhost TIDINGS_URL=http://127.0.0.1:8080 TIDINGS_API_KEY=tdg_.. TIDINGS_QUEUE=badges python3 consumer.py 'user.*'

A notice is only a hint to look. docs/consuming has the rules that this program follows, and a page about this library.
"""

import json
import os
import random
import re
import signal
import sys
import threading
import time
from collections import OrderedDict
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import HTTPErrorProcessor, Request, build_opener

import pika
from pika.exceptions import AMQPError, ChannelClosedByBroker

AMQP_URL = os.environ["AMQP_URL"]
OWNER = os.environ["TIDINGS_URL"].rstrip("/")
EXCHANGE = os.environ.get("TIDINGS_EXCHANGE", "masterdata")
QUEUE = os.environ["TIDINGS_QUEUE"]
MARK = f"{QUEUE}.resync"  # a queue that is there as long as a resync is owed, whatever becomes of this process
DECLARE = os.environ.get("TIDINGS_DECLARE") != "no"
KEYS = sys.argv[1:] or ["#"]


def is_broker(url):
    try:
        pika.URLParameters(url)
        return urlsplit(url).scheme in ("amqp", "amqps") and bool(urlsplit(url).hostname)
    except Exception:  # its text would quote the password
        return False


if not is_broker(AMQP_URL):
    sys.exit("AMQP_URL is not the address of a broker: amqp:// or amqps:// and a host")
if not re.match("https?://", OWNER, re.IGNORECASE):
    sys.exit("TIDINGS_URL does not begin with http:// or https://")
if os.environ.get("TIDINGS_DECLARE", "") not in ("yes", "no", ""):
    sys.exit("TIDINGS_DECLARE is neither yes nor no")


def seconds(name, otherwise):
    value = os.environ.get(name, otherwise)
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]+)?", value):
        sys.exit(f"{name} is not a number of seconds")
    return float(value)


PATIENCE_S = seconds("TIDINGS_PATIENCE_S", "30")  # for a state that the owner has told of and does not show
CHECK_S = seconds("TIDINGS_CHECK_S", "10")  # from one look whether the exchange is there to the next
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
DELAY = re.compile(r"[1-9][0-9]{0,3}")  # a Retry-After that is followed; any other is a second
LONGEST_DELAY_S = 120  # whoever stands before the owner may ask for hours
DENIALS = (401, 403)  # nothing is wrong with the message: the key may be about to be replaced
REDIRECTS = range(300, 400)  # never followed: the key would go along
OUTAGES = (404, 408, 410, 429, 502, 503, 504)  # 404 and 410 of whoever stands between; the owner's own is an answer


class SetAside(Exception):
    """A message that no repetition helps; the text never quotes the message."""


class Stop(Exception):
    """Somebody asked us to leave."""


class Memory(OrderedDict):
    """The latest 10,000 entries. What is forgotten costs one needless fetch."""

    def remember(self, key, value):
        self[key] = value
        self.move_to_end(key)
        if len(self) > 10_000:
            self.popitem(last=False)


def complain(text):
    print(text, file=sys.stderr, flush=True)


def complain_once(told, text):
    if text not in told:
        complain(text)
    told.add(text)


class Consumer:
    def __init__(self):
        self.seen = Memory()  # message ids
        self.versions = Memory()  # highest version handled, by user; your own copy would keep it beside the data
        self.connection = None
        self.missed = False
        self.stopping = False
        self.failures = 0

    def pause(self, seconds):
        """Waits, while pika sends its heartbeats: it has no thread of its own for them. Jitter keeps consumers apart."""
        over = time.monotonic() + seconds * random.uniform(1, 2)
        while not self.stopping and time.monotonic() < over:
            self.connection.sleep(0.05) if self.connection else time.sleep(0.05)
        if self.stopping:
            raise Stop

    def fetch(self, path, wanted):
        """What the owner says, once it is what is wanted, asked for as long as it takes. What is waited for is told, once for each fetch."""
        patience = time.monotonic() + PATIENCE_S
        told = set()
        while True:
            try:
                status, found, after = ask(path)
            except (OSError, HTTPException) as error:
                complain_once(told, f"the owner cannot be asked: {kind(error)}")
                self.pause(1)
                continue
            if wanted(status, found):
                return found
            if is_unknown(status, found):
                raise SetAside("the owner never knew this user")
            if status in DENIALS:
                complain_once(told, f"the owner refuses the key: {status}")
                self.pause(1)
                continue
            if status >= 400 and status not in OUTAGES:
                raise SetAside(f"the owner answered {status}")
            if found.get("code") != "not_yet_visible":
                complain_once(told, f"the owner cannot be asked: {status}")
            elif time.monotonic() > patience:
                raise SetAside("the owner shows no state this new")
            self.pause(min(int(after), LONGEST_DELAY_S) if DELAY.fullmatch(after) else 1)

    def keep(self, event, user_id, record):
        """Here your own copy would be written, or forgotten when there is no profile any more. What fails is tried again."""
        profile = record.get("profile")
        version = record["version"] if profile is not None else None
        line = {"event": event, "user_id": user_id, "version": version, "profile": profile}
        print(json.dumps(line), flush=True)
        self.versions.remember(user_id, record["version"])  # of the deleted too: no late notice brings them back

    def handle(self, properties, body):
        """The type is for the curious: whatever happened, the latest record is fetched, for a type unknown here too."""
        if properties.message_id in self.seen:
            return
        user_id, version = read(properties, body)
        # A backfill is for those who lost what they held.
        if version > self.versions.get(user_id, 0) or "tidings-backfill" in properties.headers:
            self.keep(properties.type, user_id, self.fetch(f"/v1/users/{user_id}?min_version={version}", is_latest))
        if properties.message_id:
            self.seen.remember(properties.message_id, True)

    def insist(self, properties, body):
        """Until it is done: when your own database is away, nothing is wrong with the message."""
        while True:
            try:
                return self.handle(properties, body)
            except (Stop, SetAside, AMQPError):
                raise
            except Exception as error:  # its text may quote what was fetched
                complain(f"message {properties.message_id} is tried again: {type(error).__name__}")
                self.pause(1)

    def resync(self):
        """Everybody as of now, when news may have been missed. Whom you hold and do not meet here was deleted: ask for each."""
        complain("news may have been missed: resync")
        page = {"next": ""}
        while page["next"] is not None:
            page = self.fetch("/v1/users?limit=500" + (f"&after={page['next']}" if page["next"] else ""), is_page)
            for user in page["users"]:
                if user["version"] > self.versions.get(user["id"], 0):
                    self.keep("resync", user["id"], user)
            self.pause(0)

    def deliver(self, channel, delivery, properties, body):
        try:
            self.insist(properties, body)
        except SetAside as reason:
            complain(f"message {properties.message_id} is set aside: {reason}")
            channel.basic_reject(delivery.delivery_tag, requeue=False)
        else:
            channel.basic_ack(delivery.delivery_tag)

    def prepare(self):
        """A channel, once all is there that a session stands on, and bound. A queue or an exchange that was not there is a resync that is owed."""
        if self.missed or not is_there(self.connection, QUEUE):
            self.owe()  # first: QUEUE without the mark says that nothing was missed
        channel = self.connection.channel()
        try:
            if DECLARE:
                declare(channel)
            channel.queue_declare(QUEUE, passive=True)
        except ChannelClosedByBroker as error:
            if error.reply_code == 404:  # no exchange
                self.owe()
            raise
        return channel

    def owe(self):
        self.missed = True
        if DECLARE:
            channel = self.connection.channel()
            channel.queue_declare(MARK, durable=True, arguments={"x-queue-type": "quorum"})
            channel.close()

    def session(self):
        parameters = pika.URLParameters(AMQP_URL)
        parameters.heartbeat = 30  # longer than a fetch may take
        self.connection = pika.BlockingConnection(parameters)
        self.missed = self.missed or (DECLARE and is_there(self.connection, MARK))
        channel = self.prepare()
        channel.basic_qos(prefetch_count=20)
        # After the bindings and before the first message, so that there is no gap between the two.
        if self.missed:
            self.resync()
        if DECLARE and self.missed:
            channel.queue_delete(MARK)
        self.missed = False
        look = time.monotonic() + CHECK_S
        # Once a second the loop looks whether it should leave.
        for delivery, properties, body in channel.consume(QUEUE, inactivity_timeout=1):
            self.failures = 0
            if self.stopping:
                return
            if delivery:
                self.deliver(channel, delivery, properties, body)
            if time.monotonic() > look:  # nobody tells when the exchange is deleted, and our bindings with it
                self.prepare().close()
                look = time.monotonic() + CHECK_S
                if self.missed:
                    return
        self.missed = True  # a loop that ends by itself: the queue was deleted

    def run(self):
        while not self.stopping:
            try:
                self.session()
            except Stop:
                raise
            except Exception as error:
                # The broker's own words are safe to show; another error's may quote what was fetched.
                complain(f"session ended: {type(error).__name__} {getattr(error, 'reply_text', '')}")
            finally:
                self.connection = close(self.connection)
            self.pause(min(0.25 * 2**self.failures, 10))
            self.failures = min(self.failures + 1, 6)


def key():
    """Read anew for each request when it is in a file: a new key takes effect without a restart."""
    file = os.environ.get("TIDINGS_API_KEY_FILE")
    found = (Path(file).read_text("latin-1") if file else os.environ["TIDINGS_API_KEY"]).strip()
    if not re.fullmatch("[!-~]+", found):
        raise OSError("the key is not one word of printable ASCII")  # never quoted
    return found


def check_key():
    """Once, before anything is taken from the queue: a wrong key, or address, is the end. An outage is waited for later."""
    key()  # here, where it is no outage that there is none
    try:
        status, _, _ = ask("/v1/users?limit=1")
    except (OSError, HTTPException) as error:
        return complain(f"the owner cannot be asked: {kind(error)}")
    if status in DENIALS:
        sys.exit(f"the owner refuses the key: {status}")
    if status in REDIRECTS:
        sys.exit(f"TIDINGS_URL leads elsewhere: {status}")


def kind(error):
    """Without its text, which may quote what came. urllib wraps the error that says more."""
    reason = getattr(error, "reason", None)
    return type(reason if isinstance(reason, Exception) else error).__name__


class AsItComes(HTTPErrorProcessor):
    """No answer is an exception, and no redirect is followed."""

    def http_response(self, _, answer):
        return answer

    https_response = http_response


HTTP = build_opener(AsItComes)


def ask(path):
    """Status, the object that came, empty if none did, and when to ask again."""
    request = Request(OWNER + path, headers={"Authorization": f"Bearer {key()}"})
    with within(10), HTTP.open(request) as answer:
        status, after, body = answer.status, answer.headers.get("Retry-After", "").strip(), answer.read()
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    return status, found if isinstance(found, dict) else {}, after


@contextmanager
def within(seconds):
    """TimeoutError when it takes longer, whatever the owner does: urllib's own limit counts from each piece that arrives."""
    signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def give_up(*_):
    raise TimeoutError


def is_version(number):
    # pika gives a subclass of int for 64 bits, and a bool is an int to Python, though not to us.
    return isinstance(number, int) and not isinstance(number, bool) and number > 0


def is_record(found):
    return isinstance(found, dict) and isinstance(found.get("profile"), dict) and is_version(found.get("version"))


def is_latest(status, found):
    """Whether it is the owner's word on a user: his record, or that he is deleted. Whoever stands between says 200 and 410 as well."""
    if status == 410:
        return found.get("code") == "user_deleted" and is_version(found.get("version"))
    return status == 200 and is_record(found)


def is_unknown(status, found):
    """No deletion: that is 410. Whoever stands between, or is no owner at all, says 404 as well."""
    return status == 404 and found.get("code") == "user_not_found"


def is_page(status, found):
    users = found.get("users")
    return status == 200 and "next" in found and isinstance(users, list) and all(map(is_record, users))


def read(properties, body):
    try:
        notice = json.loads(body)
        user_id, version = notice["user_id"], (properties.headers or {})["version"]
    except (ValueError, TypeError, LookupError, RecursionError):
        raise SetAside("not a notice") from None
    if not isinstance(user_id, str) or not UUID.fullmatch(user_id) or not is_version(version):
        raise SetAside("not a notice")
    return user_id.lower(), version


def is_there(connection, queue):
    channel = connection.channel()
    try:
        channel.queue_declare(queue, passive=True)
        channel.close()
        return True
    except ChannelClosedByBroker as error:
        if error.reply_code != 404:
            raise
        return False


def declare(channel):
    channel.exchange_declare(QUEUE, "direct", durable=True)  # our own door: dead letters go through it, backfills come
    kept = {"x-queue-type": "quorum", "x-delivery-limit": 1_000_000}
    channel.queue_declare(f"{QUEUE}.dead", durable=True, arguments=kept)
    channel.queue_bind(f"{QUEUE}.dead", QUEUE, "dead")
    dead = {"x-dead-letter-exchange": QUEUE, "x-dead-letter-routing-key": "dead"}
    channel.queue_declare(QUEUE, durable=True, arguments={"x-queue-type": "quorum", "x-delivery-limit": 1000, **dead})
    channel.queue_bind(QUEUE, QUEUE, "work")
    for key in KEYS:
        channel.queue_bind(QUEUE, EXCHANGE, key)


def close(connection):
    """Gives back what was not acknowledged."""
    try:
        if connection:
            connection.close()
    except AMQPError:
        pass


if __name__ == "__main__":
    check_key()
    consumer = Consumer()

    def leave(*_):
        if consumer.stopping:
            return
        consumer.stopping = True
        # Longer than a request takes. Then the broker is silent: what was not acknowledged comes again.
        late = threading.Timer(12, os._exit, [0])
        late.daemon = True
        late.start()

    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, leave)
    try:
        consumer.run()
    except Stop:
        pass
