// A consumer in Go with amqp091-go: hears that users changed, and keeps up by fetching their latest record.
//
//	AMQP_URL=amqp://localhost TIDINGS_URL=http://127.0.0.1:8080 TIDINGS_API_KEY=tdg_.. TIDINGS_QUEUE=badges go run . 'user.*'
//
// A notice is only a hint to look. docs/consuming has the rules that this program follows, and a page about this library.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

const longestDelay = 2 * time.Minute // of a Retry-After: whoever stands before the owner may ask for hours

var (
	amqpURL  = required("AMQP_URL")
	owner    = strings.TrimSuffix(required("TIDINGS_URL"), "/")
	exchange = setting("TIDINGS_EXCHANGE", "masterdata")
	queue    = required("TIDINGS_QUEUE")
	mark     = queue + ".resync" // a queue that is there as long as a resync is owed, whatever becomes of this process
	declares = os.Getenv("TIDINGS_DECLARE") != "no"
	patience = seconds("TIDINGS_PATIENCE_S", "30") // for a state that the owner has told of and does not show
	check    = seconds("TIDINGS_CHECK_S", "10")    // from one look whether the exchange is there to the next
	keys     = os.Args[1:]

	uuid  = regexp.MustCompile(`^(?i)[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
	isKey = regexp.MustCompile(`^[!-~]+$`)
	delay = regexp.MustCompile(`^[1-9]\d{0,3}$`) // a Retry-After that is followed; any other is a second

	denials = map[int]bool{401: true, 403: true} // nothing is wrong with the message: the key may be about to be replaced
	// With a 404 and a 410 of whoever stands between; the owner's own is an answer.
	outages = map[int]bool{404: true, 408: true, 410: true, 429: true, 502: true, 503: true, 504: true}

	client   = http.Client{Timeout: 10 * time.Second, CheckRedirect: stay} // keeps its connections
	seen     = newMemory[bool]()                                           // message ids
	versions = newMemory[int64]()                                          // highest version handled, by user; your own copy would keep it beside the data
	missed   = false
	failures = 0
)

// No redirect is followed: the key would go along.
func stay(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// A message that no repetition helps; the text never quotes the message.
type setAside string

func (reason setAside) Error() string { return string(reason) }

// What only the owner says. Whether it is in an answer: whoever stands between says 200 and 410 as well.
type word interface{ isIn(status int) bool }

// A user, or with the code that he is deleted.
type record struct {
	Code    string          `json:"code"`
	ID      string          `json:"id"`
	Version int64           `json:"version"`
	Profile json.RawMessage `json:"profile"`
}

func (r record) isIn(status int) bool {
	isGone := status == 410 && r.Code == "user_deleted"
	isLiving := status == 200 && bytes.HasPrefix(r.Profile, []byte("{"))
	return (isGone || isLiving) && r.Version > 0
}

type page struct {
	Users []record
	Next  json.RawMessage // a string, or null at the end
}

func (p page) isIn(status int) bool {
	isWhole := status == 200 && p.Users != nil && p.Next != nil
	for _, user := range p.Users {
		isWhole = isWhole && user.isIn(200)
	}
	return isWhole
}

type line struct {
	Event   *string         `json:"event"`
	UserID  string          `json:"user_id"`
	Version *int64          `json:"version"`
	Profile json.RawMessage `json:"profile"`
}

// The latest 10,000 entries. What is forgotten costs one needless fetch.
type memory[T any] struct {
	kept map[string]T
	ring [10_000]string
	next int
}

func newMemory[T any]() *memory[T] { return &memory[T]{kept: map[string]T{}} }

func (m *memory[T]) remember(key string, value T) {
	if _, known := m.kept[key]; !known {
		delete(m.kept, m.ring[m.next])
		m.ring[m.next] = key
		m.next = (m.next + 1) % len(m.ring)
	}
	m.kept[key] = value
}

// Jitter keeps consumers from coming back all at once. The library sends heartbeats from a goroutine of its own.
func pause(ctx context.Context, atLeast time.Duration) error {
	select {
	case <-time.After(atLeast + time.Duration(rand.Int63n(int64(atLeast)))):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// What the owner says, once it is what is wanted, asked for as long as it takes. What is waited for is told, once for each fetch.
func fetch[wanted word](ctx context.Context, path string) (none wanted, _ error) {
	end := time.Now().Add(patience)
	told := map[string]bool{}
	say := func(text string) {
		if !told[text] {
			log.Print(text)
		}
		told[text] = true
	}
	for {
		answer, body, err := ask(path)
		wait := time.Second
		if err != nil {
			say("the owner cannot be asked: " + kind(err))
		} else {
			var found wanted
			switch status := answer.StatusCode; {
			case json.Unmarshal(body, &found) == nil && found.isIn(status):
				return found, nil
			case status == 404 && code(body) == "user_not_found": // no deletion: that is 410
				return none, setAside("the owner never knew this user")
			case denials[status]:
				say(fmt.Sprintf("the owner refuses the key: %d", status))
			case status < 400 || outages[status]:
				if code(body) != "not_yet_visible" {
					say(fmt.Sprintf("the owner cannot be asked: %d", status))
				} else if time.Now().After(end) {
					return none, setAside("the owner shows no state this new")
				}
				if after := answer.Header.Get("Retry-After"); delay.MatchString(after) {
					seconds, _ := strconv.Atoi(after) // digits, so it is one
					if wait = time.Duration(seconds) * time.Second; wait > longestDelay {
						wait = longestDelay
					}
				}
			default:
				return none, setAside(fmt.Sprintf("the owner answered %d", status))
			}
		}
		if err := pause(ctx, wait); err != nil {
			return none, err
		}
	}
}

// The stable name of a refusal. Whoever stands between, or is no owner at all, has none.
func code(body []byte) string {
	var refusal struct {
		Code string `json:"code"`
	}
	_ = json.Unmarshal(body, &refusal)
	return refusal.Code
}

// Read anew for each request when it is in a file: a new key takes effect without a restart.
func key() (string, error) {
	text := os.Getenv("TIDINGS_API_KEY")
	if file := os.Getenv("TIDINGS_API_KEY_FILE"); file != "" {
		found, err := os.ReadFile(file)
		if err != nil {
			return "", err
		}
		text = string(found)
	}
	if text = strings.TrimSpace(text); !isKey.MatchString(text) {
		return "", errors.New("the key is not one word of printable ASCII") // never quoted
	}
	return text, nil
}

// Once, before anything is taken from the queue: a wrong key, or address, is the end. An outage is waited for later.
func checkKey() {
	if _, err := key(); err != nil {
		log.Fatal(err)
	}
	if answer, _, err := ask("/v1/users?limit=1"); err != nil {
		log.Print("the owner cannot be asked: " + kind(err))
	} else if status := answer.StatusCode; denials[status] {
		log.Fatalf("the owner refuses the key: %d", status)
	} else if status >= 300 && status < 400 {
		log.Fatalf("TIDINGS_URL leads elsewhere: %d", status)
	}
}

// Without its text, which may quote what came: an errno's own words, and of any other error the type of what is wrapped deepest.
func kind(err error) string {
	for errors.Unwrap(err) != nil {
		err = errors.Unwrap(err)
	}
	if errno, isErrno := err.(syscall.Errno); isErrno {
		return errno.Error()
	}
	return fmt.Sprintf("%T", err)
}

func ask(path string) (*http.Response, []byte, error) {
	request, err := http.NewRequest(http.MethodGet, owner+path, nil)
	if err != nil {
		return nil, nil, err
	}
	key, err := key()
	if err != nil {
		return nil, nil, err
	}
	request.Header.Set("Authorization", "Bearer "+key)
	answer, err := client.Do(request)
	if err != nil {
		return nil, nil, err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body) // in full, or the connection cannot be used again
	return answer, body, err
}

func read(message amqp.Delivery) (userID string, version int64, err error) {
	var notice struct {
		UserID string `json:"user_id"`
	}
	if json.Unmarshal(message.Body, &notice) != nil || !uuid.MatchString(notice.UserID) {
		return "", 0, setAside("not a notice")
	}
	switch given := message.Headers["version"].(type) { // whoever republishes a message may narrow the integer
	case int64:
		version = given
	case int32:
		version = int64(given)
	case int16:
		version = int64(given)
	case int8:
		version = int64(given)
	case byte:
		version = int64(given)
	}
	if version < 1 {
		return "", 0, setAside("not a notice")
	}
	return strings.ToLower(notice.UserID), version, nil
}

// Here your own copy would be written, or forgotten when there is no profile any more. What fails is tried again.
func keep(event *string, userID string, latest record) error {
	out := line{Event: event, UserID: userID, Profile: latest.Profile}
	if latest.Profile != nil {
		out.Version = &latest.Version
	}
	if err := json.NewEncoder(os.Stdout).Encode(out); err != nil {
		return err
	}
	versions.remember(userID, latest.Version) // of the deleted too: no late notice brings them back
	return nil
}

// The type is for the curious: whatever happened, the latest record is fetched, for a type unknown here too.
func handle(ctx context.Context, message amqp.Delivery) error {
	if seen.kept[message.MessageId] {
		return nil
	}
	userID, version, err := read(message)
	if err != nil {
		return err
	}
	_, isBackfill := message.Headers["tidings-backfill"] // for those who lost what they held
	if version > versions.kept[userID] || isBackfill {
		latest, err := fetch[record](ctx, fmt.Sprintf("/v1/users/%s?min_version=%d", userID, version))
		if err != nil {
			return err
		}
		if err := keep(&message.Type, userID, latest); err != nil {
			return err
		}
	}
	if message.MessageId != "" {
		seen.remember(message.MessageId, true)
	}
	return nil
}

// Everybody as of now, when news may have been missed. Whom you hold and do not meet here was deleted: ask for each.
func resync(ctx context.Context) error {
	log.Print("news may have been missed: resync")
	event, after := "resync", ""
	for {
		found, err := fetch[page](ctx, "/v1/users?limit=500"+after)
		if err != nil {
			return err
		}
		for _, user := range found.Users {
			if user.Version > versions.kept[user.ID] {
				if err := keep(&event, user.ID, user); err != nil {
					return err
				}
			}
		}
		var next *string
		if err := json.Unmarshal(found.Next, &next); err != nil || next == nil {
			return err
		}
		after = "&after=" + *next
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
}

func isMissing(err error) bool {
	refusal := (*amqp.Error)(nil)
	return errors.As(err, &refusal) && refusal.Code == amqp.NotFound
}

// Whether a queue exists. A channel is spent when the broker says no.
func isThere(connection *amqp.Connection, name string) (bool, error) {
	channel, err := connection.Channel()
	if err != nil {
		return false, err
	}
	defer channel.Close()
	_, err = channel.QueueDeclarePassive(name, true, false, false, false, nil)
	if isMissing(err) {
		return false, nil
	}
	return err == nil, err
}

func declare(channel *amqp.Channel) error {
	work := amqp.Table{"x-queue-type": "quorum", "x-delivery-limit": int32(1000),
		"x-dead-letter-exchange": queue, "x-dead-letter-routing-key": "dead"}
	dead := amqp.Table{"x-queue-type": "quorum", "x-delivery-limit": int32(1_000_000)}
	// Our own door: dead letters go through it, backfills come.
	err := channel.ExchangeDeclare(queue, "direct", true, false, false, false, nil)
	for name, arguments := range map[string]amqp.Table{queue: work, queue + ".dead": dead} {
		if err == nil {
			_, err = channel.QueueDeclare(name, true, false, false, false, arguments)
		}
	}
	bindings := [][3]string{{queue + ".dead", "dead", queue}, {queue, "work", queue}}
	for _, key := range keys {
		bindings = append(bindings, [3]string{queue, key, exchange})
	}
	for _, b := range bindings {
		if err == nil {
			err = channel.QueueBind(b[0], b[1], b[2], false, nil)
		}
	}
	return err
}

// Until it is done: when your own database is away, nothing is wrong with the message.
func deliver(ctx context.Context, message amqp.Delivery) error {
	for {
		err := handle(ctx, message)
		if err == nil {
			return message.Ack(false)
		}
		if reason := setAside(""); errors.As(err, &reason) {
			log.Printf("message %s is set aside: %s", message.MessageId, reason)
			return message.Reject(false)
		}
		if ctx.Err() == nil { // its text may quote what was fetched
			log.Printf("message %s is tried again: %T", message.MessageId, err)
		}
		if pause(ctx, time.Second) != nil {
			return nil // not ours any more: it goes back
		}
	}
}

func owe(connection *amqp.Connection) error {
	missed = true
	if !declares {
		return nil
	}
	channel, err := connection.Channel()
	if err != nil {
		return err
	}
	defer channel.Close()
	_, err = channel.QueueDeclare(mark, true, false, false, false, amqp.Table{"x-queue-type": "quorum"})
	return err
}

// A channel, once all is there that a session stands on, and bound. A queue or an exchange that was not there is a resync that is owed.
func prepare(connection *amqp.Connection) (*amqp.Channel, error) {
	there, err := isThere(connection, queue)
	if err == nil && (missed || !there) {
		err = owe(connection) // first: the queue without the mark says that nothing was missed
	}
	if err != nil {
		return nil, err
	}
	channel, err := connection.Channel()
	if err == nil && declares {
		err = declare(channel)
	}
	if err == nil {
		_, err = channel.QueueDeclarePassive(queue, true, false, false, false, nil)
	}
	if isMissing(err) { // no exchange
		if err := owe(connection); err != nil {
			return nil, err
		}
	}
	return channel, err
}

func session(ctx context.Context) error {
	connection, err := amqp.DialConfig(amqpURL, amqp.Config{Heartbeat: 30 * time.Second, Dial: amqp.DefaultDial(10 * time.Second)})
	if err != nil {
		return err
	}
	defer connection.Close() // gives back what was not acknowledged
	if declares && !missed {
		if missed, err = isThere(connection, mark); err != nil {
			return err
		}
	}
	channel, err := prepare(connection)
	if err != nil {
		return err
	}
	// With room for one: a notification that nobody takes would hold up the library.
	lost, cancelled := channel.NotifyClose(make(chan *amqp.Error, 1)), channel.NotifyCancel(make(chan string, 1))
	if err := channel.Qos(20, 0, false); err != nil {
		return err
	}
	// After the bindings and before the first message, so that there is no gap between the two.
	if missed {
		if err := resync(ctx); err != nil {
			return err
		}
	}
	if declares && missed {
		if _, err := channel.QueueDelete(mark, false, false, false); err != nil {
			return err
		}
	}
	missed = false
	messages, err := channel.Consume(queue, "tidings", false, false, false, false, nil)
	if err != nil {
		return err
	}
	failures = 0
	look := time.Now().Add(check)
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-time.After(time.Until(look)): // nobody tells when the exchange is deleted, and our bindings with it
			looked, err := prepare(connection)
			if err != nil {
				return err
			}
			looked.Close()
			if missed {
				return errors.New("lost")
			}
			look = time.Now().Add(check)
		case message, open := <-messages:
			if open {
				if err := deliver(ctx, message); err != nil {
					return err
				}
				continue
			}
			// Closed, with nothing in it, when the connection is lost.
			if _, queueDeleted := <-cancelled; queueDeleted {
				missed = true
				return errors.New("cancelled")
			}
			return <-lost
		}
	}
	return channel.Cancel("tidings", false)
}

func main() {
	log.SetFlags(0)
	rand.Seed(time.Now().UnixNano()) // before Go 1.20 all processes would draw the same jitter
	ctx, leave := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer leave()
	if !isBroker(amqpURL) {
		log.Fatal("AMQP_URL is not the address of a broker: amqp:// or amqps:// and a host")
	}
	if !regexp.MustCompile(`^(?i)https?://`).MatchString(owner) {
		log.Fatal("TIDINGS_URL does not begin with http:// or https://")
	}
	if !regexp.MustCompile(`^(yes|no)?$`).MatchString(os.Getenv("TIDINGS_DECLARE")) {
		log.Fatal("TIDINGS_DECLARE is neither yes nor no")
	}
	if len(keys) == 0 {
		keys = []string{"#"}
	}
	checkKey()
	go func() {
		<-ctx.Done()
		time.Sleep(12 * time.Second) // longer than a request takes
		os.Exit(0)                   // the broker is silent: what was not acknowledged comes again
	}()
	for ctx.Err() == nil {
		if err := session(ctx); ctx.Err() == nil {
			log.Printf("session ended: %v", err)
		}
		_ = pause(ctx, 250*time.Millisecond<<failures)
		failures = (failures + 1) % 6 // up to 8 s, then anew
	}
}

// The errors are dropped, as they would quote the password.
func isBroker(text string) bool {
	_, refused := amqp.ParseURI(text)
	address, err := url.Parse(text)
	return refused == nil && err == nil && address.Hostname() != ""
}

func setting(name, otherwise string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return otherwise
}

func seconds(name, otherwise string) time.Duration {
	value := setting(name, otherwise)
	if !regexp.MustCompile(`^\d{1,9}(\.\d+)?$`).MatchString(value) {
		log.Fatalf("%s is not a number of seconds", name)
	}
	seconds, _ := strconv.ParseFloat(value, 64) // digits, so it is one
	return time.Duration(seconds * float64(time.Second))
}

func required(name string) string {
	value := os.Getenv(name)
	if value == "" {
		log.Fatalf("%s is not set", name)
	}
	return value
}
