# shellcheck shell=bash
# RabbitMQ: private brokers, each on free loopback ports with an epmd of its own. The one named main is for everyone; tests
# start more to hurt them.
# Promise: what the machine has set up for its own RabbitMQ is neither read nor written.

broker_url() { echo "amqp://guest:guest@127.0.0.1:$(port "rabbitmq-$1")/%2f"; }
management_url() { echo "http://guest:guest@127.0.0.1:$(port "rabbitmq-$1-management")"; }
amqps_url() { echo "amqps://guest:guest@localhost:$(port "rabbitmq-$1-tls")/%2f"; }
print_tls_urls() { printf '%s\n' "AMQPS_URL=$(amqps_url "$1")" "MANAGEMENT_URL=https://guest:guest@localhost:$(port "rabbitmq-$1-management")"; }
broker_names() { find "$DEV/brokers" -mindepth 1 -maxdepth 1 -type d -printf '%f\n' 2>/dev/null | sort; }

start_broker() (
    name=$1 server=rabbitmq-$1 epmd=epmd-$(seed_of "$1")
    if [[ $(state_of "$server") == frozen ]]; then die "broker $name is frozen" "./dev broker thaw $name"; fi
    if ! alive "$server"; then
        stop_broker "$name"
        for part in "$server" "$server-dist" "$server-management" "$server-tls"; do choose_port "$part"; done
        if [[ $(seed_of "$name") == "$name" ]]; then start_epmd "$epmd"; fi
        set_up_broker "$name"
        launch "$server" "$(find_rabbitmq)/rabbitmq-server"
    fi
    wait_ready "$server" 120 speaks_amqp "$(port "$server")"
    join_cluster "$name"
)

# Erlang would start an epmd by itself, but one that nobody could find again to stop it.
start_epmd() (
    choose_port "$1"
    use_unpacked
    launch "$1" "$(find_epmd)" -port "$(port "$1")" -address 127.0.0.1
    wait_ready "$1" 10 is_taken "$(port "$1")"
)

# Clusters: a broker that joins another one finds it by that one's epmd, and is let in by its cookie.

# The broker by which NAME finds its cluster: itself, if it has joined none.
seed_of() { cat "$DEV/brokers/$1/seed" 2>/dev/null || echo "$1"; }

# use_seed NAME OTHER: from its first start on the broker is a node of OTHER's cluster.
use_seed() {
    must_run "$2"
    mkdir -p "$DEV/brokers/$1"
    cp "$DEV/brokers/$2/.erlang.cookie" "$DEV/brokers/$1/"
    seed_of "$2" >"$DEV/brokers/$1/seed"
}

join_cluster() {
    local name=$1 home=$DEV/brokers/$1 seed
    seed=$(seed_of "$name")
    [[ $seed != "$name" && ! -e $home/joined ]] || return 0
    local step
    for step in stop_app "join_cluster $seed@localhost" start_app; do
        # shellcheck disable=SC2086 # a command and its argument
        rabbitmqctl "$name" $step || die "$name cannot join $seed" "its log: ./dev logs rabbitmq-$name"
    done
    touch "$home/joined"
} >&2

stop_broker() {
    stop_process "rabbitmq-$1" TERM 30
    stop_process "epmd-$1" TERM 5
    stop_foundling "$1"
}

# Nothing of it stays but its address, which a new one of that name may get again. The one that a cluster joined is forgotten last: the epmd is its.
forget_broker() {
    [[ $1 != main ]] || die "main is everybody's" "./dev down --wipe"
    stop_broker "$1"
    rm -rf "${DEV:?}/brokers/$1"
}

# A broker that misses its epmd starts another, which is in nobody's records but answers at the same port.
stop_foundling() (
    port=$(port "epmd-$1")
    [[ -n $port ]] || return 0
    use_unpacked
    is_free "$port" || "$(find_epmd)" -port "$port" -kill >/dev/null 2>&1 || true
)

rabbitmqctl() (
    set_up_broker "$1"
    shift
    exec "$(find_rabbitmq)/rabbitmqctl" "$@"
)

# The environment of one broker and of the commands that talk to it.
set_up_broker() {
    local home=$DEV/brokers/$1
    mkdir -p "$home"
    use_unpacked
    unset "${!RABBITMQ_@}" NOTIFY_SOCKET
    export HOME=$home LANG=C.UTF-8
    export RABBITMQ_NODENAME=$1@localhost
    export RABBITMQ_NODE_IP_ADDRESS=127.0.0.1 RABBITMQ_NODE_PORT RABBITMQ_DIST_PORT ERL_EPMD_PORT
    RABBITMQ_NODE_PORT=$(port "rabbitmq-$1")
    RABBITMQ_DIST_PORT=$(port "rabbitmq-$1-dist")
    ERL_EPMD_PORT=$(port "epmd-$(seed_of "$1")")
    export ERL_EPMD_ADDRESS=127.0.0.1
    export RABBITMQ_MNESIA_BASE=$home/mnesia RABBITMQ_LOG_BASE=$home/log RABBITMQ_LOGS=-
    export RABBITMQ_CONF_ENV_FILE=/nonexistent RABBITMQ_CONFIG_FILE=/nonexistent RABBITMQ_ADVANCED_CONFIG_FILE=/nonexistent
    export RABBITMQ_ENABLED_PLUGINS_FILE=$home/enabled_plugins
    choose_plugins "$1"
    # With input "allowed" the script becomes the server instead of minding it, so that the recorded pid is the server's.
    export RABBITMQ_ALLOW_INPUT=1 RABBITMQ_SERVER_START_ARGS='-noinput +B i'
    export RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS='+S 2:2 -kernel inet_dist_use_interface {127,0,0,1}'
    export RABBITMQ_CTL_ERL_ARGS='-kernel inet_dist_use_interface {127,0,0,1}'
}

# use_tls NAME DIR: from its next start on the broker speaks TLS too, by the certificate in DIR.
use_tls() {
    [[ -f $2/server.crt && -f $2/server.key ]] || die "there are no server.crt and server.key in ${2:-that folder}"
    mkdir -p "$DEV/brokers/$1"
    realpath "$2" >"$DEV/brokers/$1/tls"
}

# Only main, the one of ./dev schemathesis, and brokers with TLS have the management API: it is not what tests hurt, and costs a
# start some time.
choose_plugins() {
    local name=$1 home=$DEV/brokers/$1
    echo '[rabbitmq_management].' >"$home/enabled_plugins"
    export RABBITMQ_CONFIG_FILE=$home/rabbitmq.conf
    if [[ $name == main || $name == contract_* ]]; then
        printf 'management.tcp.%s\n' 'ip = 127.0.0.1' "port = $(port "rabbitmq-$name-management")" >"$home/rabbitmq.conf"
    elif [[ -s $home/tls ]]; then
        tls_settings "$name" "$(<"$home/tls")" >"$home/rabbitmq.conf"
    else
        echo '[].' >"$home/enabled_plugins"
        export RABBITMQ_CONFIG_FILE=/nonexistent
    fi
}

tls_settings() {
    local files=("certfile = $2/server.crt" "keyfile = $2/server.key")
    echo "listeners.ssl.local = 127.0.0.1:$(port "rabbitmq-$1-tls")"
    printf 'ssl_options.%s\n' "${files[@]}" 'verify = verify_none' 'fail_if_no_peer_cert = false'
    printf 'management.ssl.%s\n' "${files[@]}" 'ip = 127.0.0.1' "port = $(port "rabbitmq-$1-management")"
}

find_epmd() { command -v epmd || ls /usr/lib/erlang/erts-*/bin/epmd; }

is_taken() { ! is_free "$1"; }

# The port is open long before the broker serves. It does when it answers the protocol header with the frame of
# Connection.Start, whose first byte is 1.
speaks_amqp() {
    local answer
    answer=$({
        printf 'AMQP\0\0\011\001' >&3
        timeout 2 head -c 1 <&3 | od -An -tx1
    } 2>/dev/null 3<>"/dev/tcp/127.0.0.1/$1") && [[ $answer == *01 ]]
}
