#!/usr/bin/env bash
# The broker's users of tidings, each with the rights it needs and no more. Run it where rabbitmqctl works, as often as you like.
# Promise: passwords come from stdin and are on no command line; a user that is there keeps its password, and gets its rights and its
# tag anew; a virtual host that is not there yet is made.
set -euo pipefail

help() {
    cat <<'END'
  rabbitmq-users.sh relay NAME          publishes to the exchange, and can do nothing else: AMQP_URL
  rabbitmq-users.sh registry NAME       declares the exchange and the subscriptions, reads dead letters, backfills; cannot publish to
                                        the exchange: AMQP_REGISTRY_URL
  rabbitmq-users.sh consumer NAME QUEUE        an application whose subscription QUEUE is registered: its queue, and its retries
  rabbitmq-users.sh declaring-consumer NAME QUEUE   one that declares its own queue
  rabbitmq-users.sh monitor NAME        reads figures from the management API: TIDINGS_RABBITMQ_MANAGEMENT_URL
  rabbitmq-users.sh rights ROLE [QUEUE] prints what it would give: configure, write and read, a line each

A new user's password is read from stdin, a line. Settings: EXCHANGE (masterdata), VHOST (/), RABBITMQCTL (rabbitmqctl).
END
}

EXCHANGE=${EXCHANGE-masterdata} VHOST=${VHOST-/}
read -ra CTL <<<"${RABBITMQCTL-rabbitmqctl}"
# The exchange as a regular expression; tests give one of their own.
EXCHANGE_PATTERN=${EXCHANGE_PATTERN-$(sed 's/[^A-Za-z0-9_-]/\\&/g' <<<"$EXCHANGE")}

# configure, write, read: what names the user may make and delete; publish and bind to; consume and bind from.
rights() {
    local queue=${2-} own
    queue=$(sed 's/[^A-Za-z0-9_-]/\\&/g' <<<"$queue")
    own="$queue(\\.fields|\\.dead|\\.resync|\\.retry\\.[0-9]+)?"
    case $1 in
        relay) printf '%s\n' '^$' "^$EXCHANGE_PATTERN\$" '^$' ;;
        # A subscription may have any name that begins with a small letter. Not the exchange: what is published there is news.
        registry) printf '%s\n' '^[a-z][a-z0-9._-]*$|'"^$EXCHANGE_PATTERN\$" "^(?!$EXCHANGE_PATTERN\$)[a-z][a-z0-9._-]*\$" '^[a-z][a-z0-9._-]*$|'"^$EXCHANGE_PATTERN\$" ;;
        consumer) need_queue "$queue" && printf '%s\n' '^$' "^$queue\$" "^$queue\$" ;;
        declaring-consumer) need_queue "$queue" && printf '%s\n' "^$own\$" "^$own\$" "^($EXCHANGE_PATTERN|$own)\$" ;;
        monitor) printf '%s\n' '^$' '^$' '^$' ;;
        *) help >&2 && exit 2 ;;
    esac
}

# To the end: whoever still writes when nobody reads any more is killed for it, and with pipefail that is a no.
is_among() {
    local lines
    lines=$(cat)
    grep -qxF -- "$1" <<<"$lines"
}

need_queue() { [[ -n $1 ]] || { help >&2 && exit 2; }; }

give() {
    local role=$1 name=$2 all password given=() tag=()
    all=$(rights "$role" "${3-}")
    mapfile -t given <<<"$all"
    # rabbitmqctl would take what is on stdin, whatever it is asked.
    if ! "${CTL[@]}" -q list_users </dev/null | cut -f 1 | is_among "$name"; then
        # Without a line end at the end of the file, read says no and has read all the same.
        IFS= read -rs password || [[ -n $password ]] || { echo "error: a new user's password is read from stdin, and there is none" >&2 && exit 2; }
        # Without -q: RabbitMQ 4 reads a password only where these two words stand alone.
        "${CTL[@]}" add_user "$name" <<<"$password" >/dev/null
    fi
    "${CTL[@]}" -q list_vhosts </dev/null | is_among "$VHOST" || "${CTL[@]}" -q add_vhost "$VHOST" </dev/null
    "${CTL[@]}" -q set_permissions -p "$VHOST" "$name" "${given[@]}" </dev/null
    # The least that the management API answers. Who is no monitor has none, not even one from before.
    [[ $role != monitor ]] || tag=(management)
    "${CTL[@]}" -q set_user_tags "$name" "${tag[@]}" </dev/null
}

case ${1-help} in
    help | -h | --help) help ;;
    rights) rights "${2-}" "${3-}" ;;
    *) give "$1" "${2:?a user needs a name}" "${3-}" ;;
esac
