// A consumer in Java with RabbitMQ's client: hears that users changed, and keeps up by fetching their latest record.
//
//   AMQP_URL=amqp://localhost TIDINGS_URL=http://127.0.0.1:8080 TIDINGS_API_KEY=tdg_.. TIDINGS_QUEUE=badges java -cp JARS Consumer.java 'user.*'
//
// A notice is only a hint to look. docs/consuming has the rules that this program follows, and a page about this library.

import com.google.gson.Gson;
import com.google.gson.GsonBuilder;
import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonParseException;
import com.google.gson.JsonPrimitive;
import com.rabbitmq.client.AMQP.BasicProperties;
import com.rabbitmq.client.Address;
import com.rabbitmq.client.AlreadyClosedException;
import com.rabbitmq.client.Channel;
import com.rabbitmq.client.Connection;
import com.rabbitmq.client.ConnectionFactory;
import com.rabbitmq.client.DefaultConsumer;
import com.rabbitmq.client.Envelope;
import com.rabbitmq.client.ListAddressResolver;
import com.rabbitmq.client.ShutdownSignalException;
import java.io.FileDescriptor;
import java.io.FileOutputStream;
import java.io.IOException;
import java.net.URI;
import java.net.URISyntaxException;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.net.http.HttpResponse.BodyHandlers;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.HashSet;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.concurrent.BlockingQueue;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.LinkedBlockingQueue;
import java.util.concurrent.ThreadLocalRandom;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.TimeoutException;
import java.util.function.Predicate;
import java.util.regex.Pattern;
import javax.net.ssl.SSLContext;
import javax.net.ssl.SSLParameters;
import javax.net.ssl.SSLSocket;

public class Consumer {
    static final String OWNER = required("TIDINGS_URL").replaceAll("/$", "");
    static final String EXCHANGE = setting("TIDINGS_EXCHANGE", "masterdata");
    static final String QUEUE = required("TIDINGS_QUEUE");
    static final String MARK = QUEUE + ".resync"; // a queue that is there as long as a resync is owed, whatever becomes of this process
    static final boolean DECLARE = !"no".equals(System.getenv("TIDINGS_DECLARE"));
    // For a state that the owner has told of and does not show.
    static final Duration PATIENCE = Duration.ofMillis((long) (1000 * seconds("TIDINGS_PATIENCE_S", "30")));

    // From one look whether the exchange is there to the next.
    static final Duration CHECK = Duration.ofMillis((long) (1000 * seconds("TIDINGS_CHECK_S", "10")));

    static final Pattern UUID = Pattern.compile("(?i)[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}");
    static final String DELAY = "[1-9]\\d{0,3}"; // a Retry-After that is followed; any other is a second
    static final long LONGEST_DELAY_S = 120; // whoever stands before the owner may ask for hours
    static final Set<Integer> DENIALS = Set.of(401, 403); // nothing is wrong with the message: the key may be about to be replaced
    static final Set<Integer> OUTAGES = Set.of(404, 408, 410, 429, 502, 503, 504); // 404 and 410 of whoever stands between; the owner's own is an answer
    static final Gson JSON = new GsonBuilder().serializeNulls().create();
    static final FileOutputStream OUT = new FileOutputStream(FileDescriptor.out); // System.out keeps it to itself when it cannot write
    static final HttpClient HTTP = HttpClient.newBuilder().connectTimeout(Duration.ofSeconds(10)).build(); // follows no redirect

    /** A message that no repetition helps; the text never quotes the message. */
    static class SetAside extends Exception {
        SetAside(String reason) { super(reason); }
    }

    /** Somebody asked us to leave. */
    static class Stop extends Exception {}

    /** The latest 10,000 entries. What is forgotten costs one needless fetch. */
    static class Memory<T> extends LinkedHashMap<String, T> {
        Memory() { super(16, 0.75f, true); }
        @Override protected boolean removeEldestEntry(Map.Entry<String, T> eldest) { return size() > 10_000; }
    }

    record Message(long tag, BasicProperties properties, byte[] body) {}

    static final Message LOST = new Message(0, null, null), CANCELLED = new Message(0, null, null), LEAVE = new Message(0, null, null);

    final Memory<Boolean> seen = new Memory<>(); // message ids
    final Memory<Long> versions = new Memory<>(); // highest version handled, by user; your own copy would keep it beside the data
    final List<String> keys;
    final CountDownLatch stop = new CountDownLatch(1);
    volatile BlockingQueue<Message> inbox = new LinkedBlockingQueue<>();
    volatile int exitCode = 1; // until it has left in order
    boolean missed;
    int failures;

    Consumer(String[] keys) { this.keys = keys.length > 0 ? List.of(keys) : List.of("#"); }

    /** The library sends heartbeats from a thread of its own meanwhile. Jitter keeps consumers from coming back all at once. */
    void pause(long ms) throws InterruptedException, Stop {
        if (stop.await((long) (ms * ThreadLocalRandom.current().nextDouble(1, 2)), TimeUnit.MILLISECONDS)) throw new Stop();
    }

    /** Read anew for each request when it is in a file: a new key takes effect without a restart. */
    static String key() throws IOException {
        String file = System.getenv("TIDINGS_API_KEY_FILE");
        String found = (file == null ? required("TIDINGS_API_KEY") : Files.readString(Path.of(file))).strip();
        if (!found.matches("[!-~]+")) throw new IOException("the key is not one word of printable ASCII"); // never quoted
        return found;
    }

    /** Of what came an object, which is empty if none did. */
    record Answer(int status, JsonObject found, String after) {
        static Answer of(HttpResponse<String> answer) {
            JsonObject found = null;
            try {
                found = JSON.fromJson(answer.body(), JsonObject.class);
            } catch (JsonParseException e) {
                // Whoever stands between answers with anything.
            }
            String after = answer.headers().firstValue("Retry-After").orElse("");
            return new Answer(answer.statusCode(), found == null ? new JsonObject() : found, after);
        }

        String code() { return found.get("code") instanceof JsonPrimitive code ? code.getAsString() : ""; }

        /** Whether it is the owner's word on a user: his record, or that he is deleted. Whoever stands between says 200 and 410 as well. */
        boolean isLatest() {
            return status == 410 ? code().equals("user_deleted") && hasVersion(found) : status == 200 && isRecord(found);
        }

        /** No deletion: that is 410. Whoever stands between, or is no owner at all, says 404 as well. */
        boolean isUnknown() { return status == 404 && code().equals("user_not_found"); }

        boolean isPage() {
            if (status != 200 || !found.has("next") || !(found.get("users") instanceof JsonArray users)) return false;
            for (JsonElement user : users) if (!isRecord(user)) return false;
            return true;
        }
    }

    static boolean isRecord(JsonElement found) {
        return found instanceof JsonObject record && record.get("profile") instanceof JsonObject && hasVersion(record);
    }

    static boolean hasVersion(JsonObject found) {
        return found.get("version") instanceof JsonPrimitive version && version.isNumber() && version.getAsString().matches("[1-9]\\d{0,17}");
    }

    /** Within 10 s, the body included, which the timeout of a request leaves out. */
    static Answer ask(String path) throws IOException, InterruptedException {
        HttpRequest request = HttpRequest.newBuilder(URI.create(OWNER + path)).header("Authorization", "Bearer " + key()).build();
        CompletableFuture<HttpResponse<String>> answer = HTTP.sendAsync(request, BodyHandlers.ofString());
        try {
            return Answer.of(answer.get(10, TimeUnit.SECONDS));
        } catch (ExecutionException failed) {
            throw new IOException(failed.getCause());
        } catch (TimeoutException late) {
            throw new IOException(late);
        } finally {
            answer.cancel(true); // gives up the connection, unless the answer is there
        }
    }

    /** Once, before anything is taken from the queue: a wrong key, or address, is the end. An outage is waited for later. */
    static void checkKey() throws IOException, InterruptedException {
        key(); // here, where it is no outage that there is none
        try {
            int status = ask("/v1/users?limit=1").status();
            if (DENIALS.contains(status)) System.err.println("the owner refuses the key: " + status);
            else if (status >= 300 && status < 400) System.err.println("TIDINGS_URL leads elsewhere: " + status);
            else return;
            System.exit(1);
        } catch (IOException outage) {
            System.err.println("the owner cannot be asked: " + kind(outage)); // whatever it is, the fetches wait
        }
    }

    /** Without its text, which may quote what came. What `ask` wrapped says more. */
    static String kind(IOException outage) {
        return (outage.getCause() == null ? outage : outage.getCause()).getClass().getSimpleName();
    }

    /** What the owner says, once it is what is wanted, asked for as long as it takes. What is waited for is told, once for each fetch. */
    JsonObject fetch(String path, Predicate<Answer> isWanted) throws InterruptedException, SetAside, Stop {
        long end = System.nanoTime() + PATIENCE.toNanos();
        Set<String> told = new HashSet<>();
        while (true) {
            Answer answer;
            try {
                answer = ask(path);
            } catch (IOException outage) {
                complainOnce(told, "the owner cannot be asked: " + kind(outage));
                pause(1000);
                continue;
            }
            int status = answer.status();
            if (isWanted.test(answer)) return answer.found();
            if (answer.isUnknown()) throw new SetAside("the owner never knew this user");
            if (DENIALS.contains(status)) {
                complainOnce(told, "the owner refuses the key: " + status);
                pause(1000);
                continue;
            }
            if (status >= 400 && !OUTAGES.contains(status)) throw new SetAside("the owner answered " + status);
            if (!answer.code().equals("not_yet_visible")) {
                complainOnce(told, "the owner cannot be asked: " + status);
            } else if (System.nanoTime() > end) {
                throw new SetAside("the owner shows no state this new");
            }
            pause(answer.after().matches(DELAY) ? 1000 * Math.min(Long.parseLong(answer.after()), LONGEST_DELAY_S) : 1000);
        }
    }

    static void complainOnce(Set<String> told, String text) {
        if (told.add(text)) System.err.println(text);
    }

    record Notice(String userId, long version) {}

    static Notice read(Message message) throws SetAside {
        try {
            JsonObject notice = JSON.fromJson(new String(message.body, StandardCharsets.UTF_8), JsonObject.class);
            String userId = notice.getAsJsonPrimitive("user_id").getAsString();
            // Whoever republishes a message may narrow the integer: Long, Integer, Short, Byte.
            Object version = message.properties.getHeaders().get("version");
            boolean isWhole = version instanceof Long || version instanceof Integer || version instanceof Short || version instanceof Byte;
            if (isWhole && ((Number) version).longValue() > 0 && UUID.matcher(userId).matches()) {
                return new Notice(userId.toLowerCase(), ((Number) version).longValue());
            }
        } catch (JsonParseException | ClassCastException | NullPointerException e) {
            // Falls through: whatever is missing or of another kind, it is no notice.
        }
        throw new SetAside("not a notice");
    }

    /** Here your own copy would be written, or forgotten when there is no profile any more. What fails is tried again. */
    void keep(String event, String userId, JsonObject latest) throws IOException {
        Map<String, Object> line = new LinkedHashMap<>();
        line.put("event", event);
        line.put("user_id", userId);
        line.put("version", latest.has("profile") ? latest.get("version") : null);
        line.put("profile", latest.get("profile"));
        OUT.write((JSON.toJson(line) + "\n").getBytes(StandardCharsets.UTF_8));
        versions.put(userId, latest.get("version").getAsLong()); // of the deleted too: no late notice brings them back
    }

    boolean isNews(String userId, long version) { return version > versions.getOrDefault(userId, 0L); }

    /** The type is for the curious: whatever happened, the latest record is fetched, for a type unknown here too. */
    void handle(Message message) throws IOException, InterruptedException, SetAside, Stop {
        String id = message.properties.getMessageId();
        if (id != null && seen.containsKey(id)) return;
        Notice notice = read(message);
        boolean isBackfill = message.properties.getHeaders().containsKey("tidings-backfill"); // for those who lost what they held
        if (isNews(notice.userId, notice.version) || isBackfill) {
            String path = "/v1/users/" + notice.userId + "?min_version=" + notice.version;
            keep(message.properties.getType(), notice.userId, fetch(path, Answer::isLatest));
        }
        if (id != null) seen.put(id, true);
    }

    /** Everybody as of now, when news may have been missed. Whom you hold and do not meet here was deleted: ask for each. */
    void resync() throws IOException, InterruptedException, SetAside, Stop {
        System.err.println("news may have been missed: resync");
        String after = "";
        while (true) {
            JsonObject page = fetch("/v1/users?limit=500" + after, Answer::isPage);
            for (var user : page.getAsJsonArray("users")) {
                JsonObject latest = user.getAsJsonObject();
                String id = latest.get("id").getAsString();
                if (isNews(id, latest.get("version").getAsLong())) keep("resync", id, latest);
            }
            if (page.get("next").isJsonNull()) return;
            after = "&after=" + page.get("next").getAsString();
            pause(0);
        }
    }

    /** A channel is spent when the broker says no. */
    static boolean isThere(Connection connection, String queue) throws IOException {
        Channel channel = connection.createChannel();
        try {
            channel.queueDeclarePassive(queue);
            channel.close();
            return true;
        } catch (IOException | TimeoutException refused) {
            if (reason(refused).contains("NOT_FOUND")) return false;
            throw new IOException(refused);
        }
    }

    void declare(Channel channel) throws IOException {
        channel.exchangeDeclare(QUEUE, "direct", true); // our own door: dead letters go through it, backfills come
        Map<String, Object> kept = Map.of("x-queue-type", "quorum", "x-delivery-limit", 1_000_000);
        channel.queueDeclare(QUEUE + ".dead", true, false, false, kept);
        channel.queueBind(QUEUE + ".dead", QUEUE, "dead");
        channel.queueDeclare(QUEUE, true, false, false, Map.of("x-queue-type", "quorum", "x-delivery-limit", 1000,
                "x-dead-letter-exchange", QUEUE, "x-dead-letter-routing-key", "dead"));
        channel.queueBind(QUEUE, QUEUE, "work");
        for (String key : keys) channel.queueBind(QUEUE, EXCHANGE, key);
    }

    /** Until it is done: when your own database is away, nothing is wrong with the message. */
    void insist(Message message) throws InterruptedException, SetAside, Stop {
        while (true) {
            try {
                handle(message);
                return;
            } catch (IOException | RuntimeException error) { // its text may quote what was fetched
                System.err.println("message " + message.properties.getMessageId() + " is tried again: " + error.getClass().getSimpleName());
                pause(1000);
            }
        }
    }

    void deliver(Channel channel, Message message) throws IOException, InterruptedException, Stop {
        try {
            insist(message);
        } catch (SetAside reason) {
            System.err.println("message " + message.properties.getMessageId() + " is set aside: " + reason.getMessage());
            channel.basicReject(message.tag, false);
            return;
        }
        channel.basicAck(message.tag, false);
    }

    /** Puts what happens into the inbox: the library's own threads do none of the work, and nothing interrupts it. */
    static DefaultConsumer into(BlockingQueue<Message> inbox, Channel channel) {
        return new DefaultConsumer(channel) {
            @Override public void handleDelivery(String tag, Envelope envelope, BasicProperties properties, byte[] body) {
                inbox.add(new Message(envelope.getDeliveryTag(), properties, body));
            }
            @Override public void handleCancel(String tag) { inbox.add(CANCELLED); } // the queue was deleted
            @Override public void handleShutdownSignal(String tag, ShutdownSignalException cause) { inbox.add(LOST); }
        };
    }

    static Connection connect() throws Exception {
        ConnectionFactory factory = new ConnectionFactory();
        factory.setUri(required("AMQP_URL"));
        factory.setRequestedHeartbeat(30);
        factory.setConnectionTimeout(10_000);
        factory.setAutomaticRecoveryEnabled(false); // it would not tell us what was lost meanwhile
        if (factory.isSSL()) {
            // By itself the client believes any certificate of any host.
            factory.useSslProtocol(SSLContext.getDefault());
            factory.setSocketConfigurator(socket -> {
                SSLParameters parameters = ((SSLSocket) socket).getSSLParameters();
                parameters.setEndpointIdentificationAlgorithm("HTTPS");
                ((SSLSocket) socket).setSSLParameters(parameters);
                socket.setTcpNoDelay(true);
            });
        }
        // By name: the client would look up its address and compare the certificate with that.
        return factory.newConnection(new ListAddressResolver(List.of(new Address(factory.getHost(), factory.getPort()))));
    }

    void owe(Connection connection) throws IOException, TimeoutException {
        missed = true;
        if (!DECLARE) return;
        Channel channel = connection.createChannel();
        channel.queueDeclare(MARK, true, false, false, Map.of("x-queue-type", "quorum"));
        channel.close();
    }

    /** A channel, once all is there that a session stands on, and bound. A queue or an exchange that was not there is a resync that is owed. */
    Channel prepare(Connection connection) throws IOException, TimeoutException {
        if (missed || !isThere(connection, QUEUE)) owe(connection); // first: QUEUE without the mark says that nothing was missed
        Channel channel = connection.createChannel();
        try {
            if (DECLARE) declare(channel);
            channel.queueDeclarePassive(QUEUE);
        } catch (IOException refused) {
            if (reason(refused).contains("NOT_FOUND")) owe(connection); // no exchange
            throw refused;
        }
        return channel;
    }

    void session() throws Exception {
        inbox = new LinkedBlockingQueue<>();
        Connection connection = connect();
        try {
            missed = missed || (DECLARE && isThere(connection, MARK));
            Channel channel = prepare(connection);
            channel.basicQos(20);
            // After the bindings and before the first message, so that there is no gap between the two.
            if (missed) resync();
            if (DECLARE && missed) channel.queueDelete(MARK);
            missed = false;
            String tag = channel.basicConsume(QUEUE, false, into(inbox, channel));
            failures = 0;
            long look = System.nanoTime() + CHECK.toNanos();
            while (stop.getCount() > 0) {
                Message message = inbox.poll(look - System.nanoTime(), TimeUnit.NANOSECONDS);
                missed |= message == CANCELLED;
                if (message == LOST || message == CANCELLED) throw new IOException(message == LOST ? "lost" : "cancelled");
                if (message != null && message != LEAVE) deliver(channel, message);
                if (System.nanoTime() - look < 0) continue;
                prepare(connection).close(); // nobody tells when the exchange is deleted, and our bindings with it
                if (missed) throw new IOException("lost");
                look = System.nanoTime() + CHECK.toNanos();
            }
            channel.basicCancel(tag);
        } finally {
            connection.abort(10_000); // gives back what was not acknowledged
        }
    }

    void run() throws InterruptedException {
        try {
            while (true) {
                try {
                    session();
                } catch (IOException | AlreadyClosedException | SetAside error) {
                    System.err.println("session ended: " + reason(error));
                } catch (Stop stop) {
                    throw stop;
                } catch (Exception error) {
                    // Its text may quote what was fetched.
                    System.err.println("session ended: " + error.getClass().getName());
                }
                pause(Math.min(250L << failures, 10_000));
                failures = Math.min(failures + 1, 6);
            }
        } catch (Stop stop) {
            exitCode = 0;
        }
    }

    /** The broker's own words are in the cause. */
    static String reason(Throwable error) {
        return error.getCause() == null ? String.valueOf(error.getMessage()) : reason(error.getCause());
    }

    public static void main(String[] keys) throws InterruptedException, IOException {
        if (!isBroker(required("AMQP_URL"))) throw new IllegalStateException("AMQP_URL is not the address of a broker: amqp:// or amqps:// and a host");
        if (!OWNER.matches("(?i)https?://.*")) throw new IllegalStateException("TIDINGS_URL does not begin with http:// or https://");
        if (!setting("TIDINGS_DECLARE", "yes").matches("yes|no")) throw new IllegalStateException("TIDINGS_DECLARE is neither yes nor no");
        checkKey();
        Consumer consumer = new Consumer(keys);
        Thread main = Thread.currentThread();
        // The JVM leaves with 143 after SIGTERM, unless the last word is ours.
        Runtime.getRuntime().addShutdownHook(new Thread(() -> {
            consumer.stop.countDown();
            consumer.inbox.add(LEAVE);
            try {
                main.join(12_000); // longer than a request takes
            } catch (InterruptedException e) {
                // Nobody interrupts a hook.
            }
            // Still at it: the broker is silent. What was not acknowledged comes again.
            Runtime.getRuntime().halt(main.isAlive() ? 0 : consumer.exitCode);
        }));
        consumer.run();
    }

    /** What the library would refuse is found out here, as it may quote the password. A colon or a slash in a name has to be encoded for it. */
    static boolean isBroker(String text) {
        try {
            URI broker = new URI(text);
            return String.valueOf(broker.getScheme()).matches("(?i)amqps?") && broker.getHost() != null
                    && String.valueOf(broker.getRawUserInfo()).split(":").length < 3 && broker.getRawPath().lastIndexOf('/') < 1;
        } catch (URISyntaxException nonsense) {
            return false;
        }
    }

    static String setting(String name, String otherwise) {
        String value = System.getenv(name);
        return value == null || value.isEmpty() ? otherwise : value;
    }

    static double seconds(String name, String otherwise) {
        String value = setting(name, otherwise);
        if (value.matches("\\d{1,9}(\\.\\d+)?")) return Double.parseDouble(value);
        System.err.println(name + " is not a number of seconds");
        System.exit(1);
        return 0;
    }

    static String required(String name) {
        String value = System.getenv(name);
        if (value == null) throw new IllegalStateException(name + " is not set");
        return value;
    }
}
