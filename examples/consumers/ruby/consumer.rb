# A consumer in Ruby with Bunny: hears that users changed, and keeps up by fetching their latest record.
#
#   AMQP_URL=amqp://localhost TIDINGS_URL=http://127.0.0.1:8080 TIDINGS_API_KEY=tdg_.. TIDINGS_QUEUE=badges ruby consumer.rb 'user.*'
#
# A notice is only a hint to look. docs/consuming has the rules that this program follows, and a page about this library.

require "bunny"
require "json"
require "net/http"
require "set"

AMQP_URL = ENV.fetch("AMQP_URL")
OWNER = URI(ENV.fetch("TIDINGS_URL"))
EXCHANGE = ENV.fetch("TIDINGS_EXCHANGE", "masterdata")
QUEUE = ENV.fetch("TIDINGS_QUEUE")
MARK = "#{QUEUE}.resync" # a queue that is there as long as a resync is owed, whatever becomes of this process
DECLARE = ENV["TIDINGS_DECLARE"] != "no"
KEYS = ARGV.empty? ? ["#"] : ARGV
BROKER = AMQ::URI.parse(AMQP_URL) rescue {} # its own complaint would quote the password
abort "AMQP_URL is not the address of a broker: amqp:// or amqps:// and a host" if BROKER[:host].to_s.empty?
abort "TIDINGS_URL does not begin with http:// or https://" unless OWNER.is_a?(URI::HTTP)
abort "TIDINGS_DECLARE is neither yes nor no" unless ["yes", "no", "", nil].include?(ENV["TIDINGS_DECLARE"])

def seconds(name, otherwise)
  value = ENV.fetch(name, otherwise)
  /\A\d{1,9}(\.\d+)?\z/.match?(value) ? value.to_f : abort("#{name} is not a number of seconds")
end

PATIENCE_S = seconds("TIDINGS_PATIENCE_S", "30") # for a state that the owner has told of and does not show
CHECK_S = seconds("TIDINGS_CHECK_S", "10") # from one look whether the exchange is there to the next

UUID = /\A\h{8}(-\h{4}){3}-\h{12}\z/
DELAY = /\A[1-9]\d{0,3}\z/ # a Retry-After that is followed; any other is a second
LONGEST_DELAY_S = 120 # whoever stands before the owner may ask for hours
DENIALS = [401, 403] # nothing is wrong with the message: the key may be about to be replaced
REDIRECTS = 300..399 # never followed: the key would go along
OUTAGES = [404, 408, 410, 429, 502, 503, 504] # 404 and 410 of whoever stands between; the owner's own is an answer
NETWORK = [SystemCallError, SocketError, IOError, Timeout::Error, Net::ProtocolError, Net::HTTPBadResponse, OpenSSL::SSL::SSLError]

class SetAside < StandardError; end # a message that no repetition helps; its text never quotes the message
class Stop < StandardError; end

# The latest 10,000 entries. What is forgotten costs one needless fetch.
class Memory < Hash
  def remember(key, value)
    delete(key)
    store(key, value)
    shift if size > 10_000
  end
end

SEEN = Memory.new     # message ids
VERSIONS = Memory.new # highest version handled, by user; your own copy would keep it beside the data
HTTP = Net::HTTP.new(OWNER.host, OWNER.port)
HTTP.use_ssl = OWNER.scheme == "https"

def now = Process.clock_gettime(Process::CLOCK_MONOTONIC)

# Bunny sends heartbeats from a thread of its own meanwhile. The jitter keeps consumers from coming back all at once.
def pause(seconds)
  over = now + seconds * (1 + rand)
  sleep 0.05 until $stopping || now >= over
  raise Stop if $stopping
end

# Read anew for each request when it is in a file: a new key takes effect without a restart.
def key
  file = ENV["TIDINGS_API_KEY_FILE"]
  text = file ? File.binread(file) : ENV.fetch("TIDINGS_API_KEY").b
  text[/\A\s*([!-~]+)\s*\z/, 1] or raise IOError, "the key is not one word of printable ASCII" # never quoted
end

# Status, the object that came, empty if none did, and when to ask again. Within 10 s, whatever the owner does: Net::HTTP's own limits
# count from each piece that arrives.
def ask(path)
  answer = Timeout.timeout(10) do
    HTTP.start unless HTTP.started?
    HTTP.get(OWNER.path.chomp("/") + path, "Authorization" => "Bearer #{key}")
  end
  found = JSON.parse(answer.body) rescue nil
  [answer.code.to_i, found.is_a?(Hash) ? found : {}, answer["Retry-After"].to_s]
end

# Once, before anything is taken from the queue: a wrong key, or address, is the end. An outage is waited for later.
def check_key
  status, = ask("/v1/users?limit=1")
  abort "the owner refuses the key: #{status}" if DENIALS.include?(status)
  abort "TIDINGS_URL leads elsewhere: #{status}" if REDIRECTS.cover?(status)
rescue *NETWORK => error
  warn "the owner cannot be asked: #{error.class}"
  HTTP.finish if HTTP.started?
end

def version?(number) = number.is_a?(Integer) && number.positive?

def record?(found) = found.is_a?(Hash) && found["profile"].is_a?(Hash) && version?(found["version"])

# Whether it is the owner's word on a user: his record, or that he is deleted. Whoever stands between says 200 and 410 as well.
def latest?(status, found)
  status == 200 ? record?(found) : status == 410 && found["code"] == "user_deleted" && version?(found["version"])
end

# No deletion: that is 410. Whoever stands between, or is no owner at all, says 404 as well.
def unknown?(status, found) = status == 404 && found["code"] == "user_not_found"

def page?(status, found)
  users = found["users"]
  status == 200 && found.key?("next") && users.is_a?(Array) && users.all? { |user| record?(user) }
end

# What the owner says, once it is what is `wanted`, asked for as long as it takes. What is waited for is told, once for each fetch.
def fetch(path, wanted)
  patience = now + PATIENCE_S
  told = Set.new
  say = ->(text) { warn text if told.add?(text) }
  loop do
    status, found, after = ask(path)
    return found if wanted.(status, found)
    raise SetAside, "the owner never knew this user" if unknown?(status, found)
    case status
    when *DENIALS
      say.("the owner refuses the key: #{status}")
      pause(1)
    when ...400, *OUTAGES
      say.("the owner cannot be asked: #{status}") if found["code"] != "not_yet_visible"
      raise SetAside, "the owner shows no state this new" if found["code"] == "not_yet_visible" && now > patience
      pause([(after[DELAY] || 1).to_i, LONGEST_DELAY_S].min)
    else raise SetAside, "the owner answered #{status}"
    end
  rescue *NETWORK => error
    say.("the owner cannot be asked: #{error.class}") # its text may quote what came
    HTTP.finish if HTTP.started?
    pause(1)
  end
end

def read(properties, body)
  notice = JSON.parse(body) rescue nil
  version = properties.headers&.fetch("version", nil)
  raise SetAside, "not a notice" unless notice.is_a?(Hash) && UUID.match?(notice["user_id"].to_s) && version?(version)
  [notice["user_id"].downcase, version]
end

# Here your own copy would be written, or forgotten when there is no profile any more. What fails is tried again.
def keep(event, user_id, record)
  puts JSON.generate(event:, user_id:, version: record["profile"] && record["version"], profile: record["profile"])
  VERSIONS.remember(user_id, record.fetch("version")) # of the deleted too: no late notice brings them back
end

# The type is for the curious: whatever happened, the latest record is fetched, for a type unknown here too.
def handle(properties, body)
  return if SEEN.key?(properties.message_id)
  user_id, version = read(properties, body)
  if version > VERSIONS.fetch(user_id, 0) || properties.headers.key?("tidings-backfill") # for those who lost what they held
    keep(properties.type, user_id, fetch("/v1/users/#{user_id}?min_version=#{version}", method(:latest?)))
  end
  SEEN.remember(properties.message_id, true) if properties.message_id
end

# Everybody as of now, when news may have been missed. Whom you hold and do not meet here was deleted: ask for each.
def resync
  warn "news may have been missed: resync"
  after = nil
  loop do
    page = fetch("/v1/users?limit=500#{after && "&after=#{after}"}", method(:page?))
    page["users"].each { |user| keep("resync", user["id"], user) if user["version"] > VERSIONS.fetch(user["id"], 0) }
    after = page["next"] or return
    pause(0)
  end
end

def declare(channel)
  channel.direct(QUEUE, durable: true) # our own door, through which dead letters go and backfills come
  dead = channel.queue("#{QUEUE}.dead", durable: true, arguments: { "x-queue-type" => "quorum", "x-delivery-limit" => 1_000_000 })
  dead.bind(QUEUE, routing_key: "dead")
  queue = channel.queue(QUEUE, durable: true, arguments: {
    "x-queue-type" => "quorum", "x-delivery-limit" => 1000,
    "x-dead-letter-exchange" => QUEUE, "x-dead-letter-routing-key" => "dead"
  })
  queue.bind(QUEUE, routing_key: "work")
  KEYS.each { |key| queue.bind(EXCHANGE, routing_key: key) }
end

# Until it is done: when your own database is away, nothing is wrong with the message.
def insist(properties, body)
  handle(properties, body)
rescue Stop, SetAside
  raise
rescue StandardError => error # its text may quote what was fetched
  warn "message #{properties.message_id} is tried again: #{error.class}"
  pause(1)
  retry
end

def deliver(channel, delivery, properties, body)
  begin
    insist(properties, body)
  rescue SetAside => reason
    warn "message #{properties.message_id} is set aside: #{reason.message}"
    return channel.reject(delivery.delivery_tag)
  end
  channel.ack(delivery.delivery_tag)
end

# Everything that happens comes through one inbox, so that nothing interrupts the work: Bunny would raise in the main thread.
Inbox = Class.new(Queue) { def raise(*) = push(:lost) }

def owe(connection)
  $missed = true
  return unless DECLARE
  channel = connection.create_channel
  channel.queue(MARK, durable: true, arguments: { "x-queue-type" => "quorum" })
  channel.close
end

# A channel, once all is there that a session stands on, and bound. A queue or an exchange that was not there is a resync that is owed.
def prepare(connection)
  owe(connection) if $missed || !connection.queue_exists?(QUEUE) # first: QUEUE without the mark says that nothing was missed
  channel = connection.create_channel
  declare(channel) if DECLARE
  channel.queue(QUEUE, passive: true)
  channel
rescue Bunny::NotFound # no exchange
  owe(connection)
  raise
end

def session
  inbox = $inbox = Inbox.new
  # Bunny's log goes to stdout by default. Its own recovery would not tell us what was lost meanwhile.
  # Without verify_peer it believes any certificate of amqps://.
  connection = Bunny.new(AMQP_URL, heartbeat: 30, connection_timeout: 10, automatically_recover: false, logger: Logger.new(nil),
                                   recover_from_connection_close: false, session_error_handler: inbox, verify_peer: true)
  connection.start
  $missed ||= DECLARE && connection.queue_exists?(MARK)
  channel = prepare(connection)
  channel.prefetch(20)
  # After the bindings and before the first message, so that there is no gap between the two.
  resync if $missed
  channel.queue_delete(MARK) if DECLARE && $missed
  $missed = false
  queue = channel.queue(QUEUE, passive: true)
  consumer = queue.subscribe(manual_ack: true, on_cancellation: ->(*) { inbox << :cancelled }) { |*message| inbox << message }
  $failures = 0
  look = now + CHECK_S
  clock = Thread.new { loop { sleep CHECK_S; inbox << :look if inbox.empty? } }
  until $stopping || (message = inbox.pop) == :stop
    $missed = true if message == :cancelled # the queue was deleted
    raise Bunny::Exception, message.to_s if %i[lost cancelled].include?(message)
    deliver(channel, *message) unless message == :look
    next unless message == :look || now > look
    prepare(connection).close # nobody tells when the exchange is deleted, and our bindings with it
    raise Bunny::Exception, "lost" if $missed
    look = now + CHECK_S
  end
  consumer.cancel
ensure
  clock&.kill
  connection&.close rescue nil # gives back what was not acknowledged
end

$stdout.sync = true
$failures = 0
%w[TERM INT].each do |signal|
  trap(signal) do
    $stopping = true
    $inbox&.push(:stop)
    # Longer than a request takes. Then the broker is silent: what was not acknowledged comes again.
    Thread.new { sleep 12; exit!(true) }
  end
end
key # here, where it is no outage that there is none
check_key
begin
  session
rescue Stop
rescue StandardError => error
  # The broker's own words are safe to show; another error's may quote what was fetched.
  warn "session ended: #{error.is_a?(Bunny::Exception) ? error.message : error.class}"
  pause([0.25 * 2**$failures, 10].min) rescue exit
  $failures += 1 if $failures < 6
  retry
end
