# A consumer in Ruby with Bunny: keeps up with users by hearing that they changed and fetching their latest record.
#
#   AMQP_URL=amqp://localhost TIDINGS_URL=http://127.0.0.1:8080 TIDINGS_QUEUE=badges ruby bunny.rb profile.updated user.deleted
#
# A message is only a hint to look. The record is fetched when the message is handled, so duplicates and reordering do no harm:
# whatever order they come in, the last fetch sees the last state.

require "bunny"
require "json"
require "net/http"

EXCHANGE = ENV.fetch("TIDINGS_EXCHANGE", "masterdata")
QUEUE = ENV.fetch("TIDINGS_QUEUE")
KEYS = ARGV.empty? ? ["#"] : ARGV
REMEMBERED = 10_000

# The latest record, at least as new as the change that woke us; nil when the user is gone.
def fetch(user_id, version)
  loop do
    answer = Net::HTTP.get_response(URI("#{ENV.fetch('TIDINGS_URL')}/v1/users/#{user_id}?min_version=#{version}"))
    case answer.code
    when "200" then return JSON.parse(answer.body)
    when "404", "410" then return nil
    when "503" then sleep Integer(answer["Retry-After"] || 1)
    else raise "GET of user #{user_id} answered #{answer.code}"
    end
  rescue SystemCallError, IOError, Timeout::Error
    sleep 1
  end
end

def handle(properties, body)
  user_id = JSON.parse(body).fetch("user_id")
  user = fetch(user_id, properties.headers.fetch("version"))
  # Here your own copy would be written, or forgotten when there is no user any more.
  puts JSON.generate(event: properties.type, user_id:, version: user&.fetch("version"), profile: user&.fetch("profile"))
end

connection = Bunny.new(ENV.fetch("AMQP_URL"), heartbeat: 10).start
channel = connection.create_channel
channel.prefetch(20)

# What can never be handled goes to a queue of its own, where a person looks; without one it would be lost.
channel.queue("#{QUEUE}.dead", durable: true, arguments: { "x-queue-type" => "quorum" })
queue = channel.queue(QUEUE, durable: true, arguments: {
  "x-queue-type" => "quorum", "x-dead-letter-exchange" => "", "x-dead-letter-routing-key" => "#{QUEUE}.dead"
})
exchange = channel.topic(EXCHANGE, durable: true)
KEYS.each { |key| queue.bind(exchange, routing_key: key) }

$stdout.sync = true
seen = {} # of message ids, in order of arrival
queue.subscribe(manual_ack: true, block: true) do |delivery, properties, body|
  unless seen.key?(properties.message_id)
    handle(properties, body)
    seen[properties.message_id] = true
    seen.shift if seen.size > REMEMBERED
  end
  channel.ack(delivery.delivery_tag)
rescue StandardError => error
  warn "message #{properties.message_id} is set aside: #{error.class}"
  channel.reject(delivery.delivery_tag)
end
