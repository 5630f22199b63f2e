<?php
// A consumer in PHP with php-amqplib: hears that users changed, and keeps up by fetching their latest record.
//
//   AMQP_URL=amqp://localhost TIDINGS_URL=http://127.0.0.1:8080 TIDINGS_API_KEY=tdg_.. TIDINGS_QUEUE=badges php consumer.php 'user.*'
//
// A notice is only a hint to look. docs/consuming has the rules that this program follows, and a page about this library.

declare(strict_types=1);

use PhpAmqpLib\Channel\AMQPChannel;
use PhpAmqpLib\Connection\AbstractConnection;
use PhpAmqpLib\Connection\AMQPConnectionConfig;
use PhpAmqpLib\Connection\AMQPConnectionFactory;
use PhpAmqpLib\Exception\AMQPBasicCancelException;
use PhpAmqpLib\Exception\AMQPExceptionInterface;
use PhpAmqpLib\Exception\AMQPProtocolChannelException;
use PhpAmqpLib\Exception\AMQPTimeoutException;
use PhpAmqpLib\Message\AMQPMessage;
use PhpAmqpLib\Wire\AMQPTable;

// Composer's, or Debian's.
require is_file(__DIR__ . '/vendor/autoload.php') ? __DIR__ . '/vendor/autoload.php' : 'PhpAmqpLib/autoload.php';

function refuse(string $why): never
{
    fwrite(STDERR, "$why\n");
    exit(1);
}

function setting(string $name, ?string $otherwise = null): string
{
    $value = getenv($name);
    return $value === false ? $otherwise ?? refuse("$name is not set") : $value; // "0" is false to PHP
}

function seconds(string $name, string $otherwise): float
{
    $value = setting($name, $otherwise);
    return preg_match('/\A\d{1,9}(\.\d+)?\z/', $value) ? (float) $value : refuse("$name is not a number of seconds");
}

/** Read anew for each request when it is in a file: a new key takes effect without a restart. Empty if it is not one word of printable ASCII. */
function apiKey(): string
{
    $file = getenv('TIDINGS_API_KEY_FILE');
    $text = trim($file === false ? setting('TIDINGS_API_KEY') : (string) @file_get_contents($file));
    return preg_match('/\A[!-~]+\z/', $text) ? $text : '';
}

/** By a clock that does not jump. */
function now(): float
{
    return hrtime(true) / 1e9;
}

function isVersion(mixed $number): bool
{
    return is_int($number) && $number > 0;
}

function isRecord(array $found): bool
{
    return ($found['profile'] ?? null) instanceof stdClass && isVersion($found['version'] ?? null);
}

/** Whether it is the owner's word on a user: his record, or that he is deleted. Whoever stands between says 200 and 410 as well. */
function isLatest(int $status, array $found): bool
{
    $isGone = $status === 410 && ($found['code'] ?? null) === 'user_deleted' && isVersion($found['version'] ?? null);
    return $isGone || ($status === 200 && isRecord($found));
}

/** No deletion: that is 410. Whoever stands between, or is no owner at all, says 404 as well. */
function isUnknown(int $status, array $found): bool
{
    return $status === 404 && ($found['code'] ?? null) === 'user_not_found';
}

function isPage(int $status, array $found): bool
{
    $users = $found['users'] ?? null;
    return $status === 200 && array_key_exists('next', $found) && is_array($users)
        && array_filter($users, fn(mixed $user) => isRecord((array) $user)) === $users;
}

function isBroker(): bool
{
    return in_array(BROKER['scheme'] ?? '', ['amqp', 'amqps'], true) && (BROKER['host'] ?? '') !== '';
}

function idOf(AMQPMessage $message): string
{
    return $message->has('message_id') ? $message->get('message_id') : '';
}

define('BROKER', parse_url(setting('AMQP_URL')) ?: []);
define('OWNER', rtrim(setting('TIDINGS_URL'), '/'));
isBroker() || refuse('AMQP_URL is not the address of a broker: amqp:// or amqps:// and a host');
preg_match('~\Ahttps?://~i', OWNER) || refuse('TIDINGS_URL does not begin with http:// or https://');
in_array(getenv('TIDINGS_DECLARE'), ['yes', 'no', '', false], true) || refuse('TIDINGS_DECLARE is neither yes nor no');
define('EXCHANGE', setting('TIDINGS_EXCHANGE', 'masterdata'));
define('QUEUE', setting('TIDINGS_QUEUE'));
define('MARK', QUEUE . '.resync'); // a queue that is there as long as a resync is owed, whatever becomes of this process
define('DECLARES', getenv('TIDINGS_DECLARE') !== 'no');
define('PATIENCE_S', seconds('TIDINGS_PATIENCE_S', '30')); // for a state that the owner has told of and does not show
define('CHECK_S', seconds('TIDINGS_CHECK_S', '10')); // from one look whether the exchange is there to the next
define('KEYS', array_slice($argv, 1) ?: ['#']);

const UUID = '/\A[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\z/i';
const DELAY = '/^retry-after:\s*([1-9]\d{0,3})\s*$/i'; // a Retry-After that is followed; any other is a second
const LONGEST_DELAY_S = 120; // whoever stands before the owner may ask for hours
const DENIALS = [401, 403]; // nothing is wrong with the message: the key may be about to be replaced
const OUTAGES = [404, 408, 410, 429, 502, 503, 504]; // 404 and 410 of whoever stands between; the owner's own is an answer

/** A message that no repetition helps; the text never quotes the message. */
final class SetAside extends Exception {}

/** Somebody asked us to leave. */
final class Stop extends Exception {}

/** The latest 10,000 entries. What is forgotten costs one needless fetch. */
final class Memory
{
    private array $kept = [];

    public function of(string $key): mixed
    {
        return $this->kept[$key] ?? null;
    }

    public function remember(string $key, mixed $value): void
    {
        unset($this->kept[$key]);
        $this->kept[$key] = $value;
        if (count($this->kept) > 10_000) {
            unset($this->kept[array_key_first($this->kept)]);
        }
    }
}

final class Consumer
{
    public bool $stopping = false;
    private bool $missed = false;
    private int $failures = 0;
    private ?AbstractConnection $connection = null;
    private CurlHandle $http; // one handle keeps its connection

    public function __construct(
        private Memory $seen = new Memory(), // message ids
        private Memory $versions = new Memory(), // highest version handled, by user; your own copy would keep it beside the data
    ) {
        $this->http = curl_init();
    }

    /** Sends heartbeats meanwhile: PHP has no thread for them. Jitter keeps consumers from coming back all at once. */
    private function pause(float $seconds): void
    {
        $over = now() + $seconds * (1 + lcg_value());
        while (!$this->stopping && now() < $over) {
            usleep(50_000);
            $this->connection?->checkHeartBeat();
        }
        if ($this->stopping) {
            throw new Stop();
        }
    }

    /** Status, the object that came, empty if none did, and the seconds after which to ask again. Without an answer it is 0 and why. */
    private function ask(string $path): array
    {
        $key = apiKey();
        if ($key === '') { // moved away, in the middle of being replaced
            return [0, ['why' => 'no key'], 1];
        }
        $after = 1;
        $header = function ($http, string $line) use (&$after): int {
            $after = preg_match(DELAY, $line, $found) ? min((int) $found[1], LONGEST_DELAY_S) : $after;
            return strlen($line);
        };
        curl_setopt_array($this->http, [CURLOPT_URL => OWNER . $path, CURLOPT_RETURNTRANSFER => true, CURLOPT_TIMEOUT => 10,
            CURLOPT_HEADERFUNCTION => $header, CURLOPT_HTTPHEADER => ['Authorization: Bearer ' . $key]]);
        $body = curl_exec($this->http);
        return $body === false
            ? [0, ['why' => curl_strerror(curl_errno($this->http))], $after] // curl_error() may quote what came
            : [curl_getinfo($this->http, CURLINFO_RESPONSE_CODE), (array) json_decode($body), $after]; // objects stay objects: {} is not []
    }

    /** Once, before anything is taken from the queue: a wrong key, or address, is the end. An outage is waited for later. */
    public function checkKey(): void
    {
        if (apiKey() === '') {
            refuse('there is no key, or it is not one word of printable ASCII');
        }
        [$status, $found] = $this->ask('/v1/users?limit=1');
        if ($status === 0) {
            fwrite(STDERR, "the owner cannot be asked: {$found['why']}\n");
        } elseif (in_array($status, DENIALS, true)) {
            refuse("the owner refuses the key: $status");
        } elseif ($status >= 300 && $status < 400) {
            refuse("TIDINGS_URL leads elsewhere: $status");
        }
    }

    /** What the owner says, once it is what is wanted, asked for as long as it takes. What is waited for is told, once for each fetch. */
    private function fetch(string $path, callable $isWanted): array
    {
        $patience = now() + PATIENCE_S;
        $told = [];
        $say = function (string $text) use (&$told): void {
            isset($told[$text]) || fwrite(STDERR, "$text\n");
            $told[$text] = true;
        };
        while (true) {
            [$status, $found, $after] = $this->ask($path);
            if ($isWanted($status, $found)) {
                return $found;
            }
            if (isUnknown($status, $found)) {
                throw new SetAside('the owner never knew this user');
            }
            if (in_array($status, DENIALS, true)) {
                $say("the owner refuses the key: $status");
                $this->pause(1);
                continue;
            }
            if ($status >= 400 && !in_array($status, OUTAGES, true)) {
                throw new SetAside("the owner answered $status");
            }
            if (($found['code'] ?? null) !== 'not_yet_visible') {
                $say('the owner cannot be asked: ' . ($status ?: $found['why']));
            } elseif (now() > $patience) {
                throw new SetAside('the owner shows no state this new');
            }
            $this->pause($after);
        }
    }

    private function read(AMQPMessage $message): array
    {
        $notice = json_decode($message->getBody());
        $id = $notice instanceof stdClass ? $notice->user_id ?? null : null;
        $version = $message->has('application_headers') ? $message->get('application_headers')->getNativeData()['version'] ?? null : null;
        if (!is_string($id) || !preg_match(UUID, $id) || !is_int($version) || $version < 1) {
            throw new SetAside('not a notice');
        }
        return [strtolower($id), $version];
    }

    /** Here your own copy would be written, or forgotten when there is no profile any more. What fails is tried again. */
    private function keep(?string $event, string $id, array $latest): void
    {
        $profile = $latest['profile'] ?? null;
        $version = $profile === null ? null : $latest['version'];
        $line = json_encode(['event' => $event, 'user_id' => $id, 'version' => $version, 'profile' => $profile], JSON_THROW_ON_ERROR) . "\n";
        if (@fwrite(STDOUT, $line) !== strlen($line)) {
            throw new RuntimeException('stdout cannot be written');
        }
        $this->versions->remember($id, $latest['version']); // of the deleted too: no late notice brings them back
    }

    private function isNews(string $id, int $version): bool
    {
        return $version > ($this->versions->of($id) ?? 0);
    }

    /** The type is for the curious: whatever happened, the latest record is fetched, for a type unknown here too. */
    private function handle(AMQPMessage $message): void
    {
        $messageId = idOf($message);
        if ($this->seen->of($messageId)) {
            return;
        }
        [$id, $version] = $this->read($message);
        $isBackfill = isset($message->get('application_headers')->getNativeData()['tidings-backfill']); // for those who lost what they held
        if ($this->isNews($id, $version) || $isBackfill) {
            $this->keep($message->has('type') ? $message->get('type') : null, $id, $this->fetch("/v1/users/$id?min_version=$version", isLatest(...)));
        }
        if ($messageId !== '') {
            $this->seen->remember($messageId, true);
        }
    }

    /** Everybody as of now, when news may have been missed. Whom you hold and do not meet here was deleted: ask for each. */
    private function resync(): void
    {
        fwrite(STDERR, "news may have been missed: resync\n");
        $after = '';
        do {
            $page = $this->fetch("/v1/users?limit=500$after", isPage(...));
            foreach ($page['users'] as $user) {
                if ($this->isNews($user->id, $user->version)) {
                    $this->keep('resync', $user->id, (array) $user);
                }
            }
            $after = "&after={$page['next']}";
            $this->pause(0);
        } while ($page['next'] !== null);
    }

    /** A channel is spent when the broker says no. */
    private function isThere(string $queue): bool
    {
        try {
            $channel = $this->connection->channel();
            $channel->queue_declare($queue, passive: true);
            $channel->close();
            return true;
        } catch (AMQPProtocolChannelException $refusal) {
            return $refusal->amqp_reply_code === 404 ? false : throw $refusal;
        }
    }

    private function declare(AMQPChannel $channel): void
    {
        $channel->exchange_declare(QUEUE, 'direct', durable: true, auto_delete: false); // our own door: dead letters go through it, backfills come
        $kept = new AMQPTable(['x-queue-type' => 'quorum', 'x-delivery-limit' => 1_000_000]);
        $channel->queue_declare(QUEUE . '.dead', durable: true, auto_delete: false, arguments: $kept);
        $channel->queue_bind(QUEUE . '.dead', QUEUE, 'dead');
        $channel->queue_declare(QUEUE, durable: true, auto_delete: false, arguments: new AMQPTable([
            'x-queue-type' => 'quorum', 'x-delivery-limit' => 1000,
            'x-dead-letter-exchange' => QUEUE, 'x-dead-letter-routing-key' => 'dead',
        ]));
        $channel->queue_bind(QUEUE, QUEUE, 'work');
        foreach (KEYS as $key) {
            $channel->queue_bind(QUEUE, EXCHANGE, $key);
        }
    }

    private function deliver(AMQPMessage $message): void
    {
        // What waits behind the message in hand goes back.
        if ($this->stopping) {
            return;
        }
        try {
            $this->insist($message);
        } catch (SetAside $reason) {
            fwrite(STDERR, 'message ' . idOf($message) . " is set aside: {$reason->getMessage()}\n");
            $message->reject(false);
            return;
        }
        $message->ack();
    }

    /** Until it is done: when your own database is away, nothing is wrong with the message. */
    private function insist(AMQPMessage $message): void
    {
        while (true) {
            try {
                $this->handle($message);
                return;
            } catch (Stop | SetAside | AMQPExceptionInterface $error) {
                throw $error;
            } catch (Throwable $error) { // its text may quote what was fetched
                fwrite(STDERR, 'message ' . idOf($message) . ' is tried again: ' . $error::class . "\n");
                $this->pause(1);
            }
        }
    }

    private function owe(): void
    {
        $this->missed = true;
        if (DECLARES) {
            $channel = $this->connection->channel();
            $channel->queue_declare(MARK, durable: true, auto_delete: false, arguments: new AMQPTable(['x-queue-type' => 'quorum']));
            $channel->close();
        }
    }

    /** A channel, once all is there that a session stands on, and bound. A queue or an exchange that was not there is a resync that is owed. */
    private function prepare(): AMQPChannel
    {
        if ($this->missed || !$this->isThere(QUEUE)) {
            $this->owe(); // first: QUEUE without the mark says that nothing was missed
        }
        $channel = $this->connection->channel();
        try {
            if (DECLARES) {
                $this->declare($channel);
            }
            $channel->queue_declare(QUEUE, passive: true);
        } catch (AMQPProtocolChannelException $refusal) {
            if ($refusal->amqp_reply_code === 404) { // no exchange
                $this->owe();
            }
            throw $refusal;
        }
        return $channel;
    }

    private function session(): void
    {
        $this->connection = connect();
        $this->missed = $this->missed || (DECLARES && $this->isThere(MARK));
        $channel = $this->prepare();
        $channel->basic_qos(0, 20, false);
        // After the bindings and before the first message, so that there is no gap between the two.
        if ($this->missed) {
            $this->resync();
        }
        if (DECLARES && $this->missed) {
            $channel->queue_delete(MARK);
        }
        $this->missed = false;
        $tag = $channel->basic_consume(QUEUE, callback: fn(AMQPMessage $message) => $this->deliver($message));
        $this->failures = 0;
        $look = now() + CHECK_S;
        while (!$this->stopping) {
            try {
                $channel->wait(timeout: 1); // then it is time to look whether we should leave
            } catch (AMQPTimeoutException) {
                $this->connection->checkHeartBeat();
            } catch (AMQPBasicCancelException $cancelled) { // the queue was deleted
                $this->missed = true;
                throw $cancelled;
            }
            if (now() > $look) { // nobody tells when the exchange is deleted, and our bindings with it
                $this->prepare()->close();
                if ($this->missed) {
                    throw new RuntimeException('lost');
                }
                $look = now() + CHECK_S;
            }
        }
        $channel->basic_cancel($tag);
    }

    /** Gives back what was not acknowledged. Who is silent hears no farewell: the library would wait 10 s for each channel's answer to it. */
    private function hangUp(bool $isSilent): void
    {
        try {
            $isSilent || $this->connection?->close();
        } catch (Throwable) {
        }
        $this->connection?->getIO()->close();
        $this->connection = null;
    }

    public function run(): void
    {
        while (!$this->stopping) {
            $isSilent = false;
            try {
                $this->session();
            } catch (Stop) {
            } catch (Throwable $error) {
                // The broker's own words are safe to show; another error's may quote what was fetched.
                fwrite(STDERR, 'session ended: ' . $error::class . ' ' . ($error instanceof AMQPExceptionInterface ? $error->getMessage() : '') . "\n");
                $isSilent = $error instanceof AMQPTimeoutException && !$this->stopping; // a signal ends a wait for an answer so, too
            }
            $this->hangUp($isSilent);
            try {
                $this->pause(min(0.25 * 2 ** $this->failures++, 10));
            } catch (Stop) {
            }
        }
    }
}

function connect(): AbstractConnection
{
    $config = new AMQPConnectionConfig();
    $isSecure = BROKER['scheme'] === 'amqps';
    if ($isSecure) { // not by setIsSecure(true), with which the library forgets the RPC timeout
        $config->setNetworkProtocol('ssl');
        $config->setStreamContext(stream_context_create(['ssl' => ['verify_peer' => true, 'verify_peer_name' => true]]));
    }
    $config->setHost(BROKER['host']);
    $config->setPort(BROKER['port'] ?? ($isSecure ? 5671 : 5672));
    $config->setUser(rawurldecode(BROKER['user'] ?? 'guest'));
    $config->setPassword(rawurldecode(BROKER['pass'] ?? 'guest'));
    $config->setVhost(rawurldecode(substr(BROKER['path'] ?? '', 1)) ?: '/');
    $config->setHeartbeat(30);
    $config->setConnectionTimeout(10);
    $config->setReadTimeout(65); // the library wants twice the heartbeat and more
    $config->setWriteTimeout(65);
    $config->setChannelRPCTimeout(10); // by itself the library waits for ever when the broker is silent
    $connection = AMQPConnectionFactory::create($config);
    $connection->set_close_on_destruct(false); // or exit() waits for the broker's farewell; run() closes it
    return $connection;
}

pcntl_async_signals(true);
$consumer = new Consumer();
$consumer->checkKey();
foreach ([SIGTERM, SIGINT] as $signal) {
    pcntl_signal($signal, function () use ($consumer): void {
        $consumer->stopping = true;
        pcntl_alarm(12); // longer than a request takes
    });
}
pcntl_signal(SIGALRM, fn() => exit(0)); // the broker is silent: what was not acknowledged comes again
$consumer->run();
