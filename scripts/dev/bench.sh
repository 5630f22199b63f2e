# shellcheck shell=bash
# Bench: measures tidings beside what its servers allow, on a Postgres and a RabbitMQ for that alone.
# Promise: commits are as durable as in production (fsync stays on). A server that was given is used as it is.

# 512 clients of pgbench, the service, and whoever looks. The rest is what a server of a million users would have: with 256 MB of
# buffers and a checkpoint each gigabyte one would measure the disk.
BENCH_POSTGRES_SETTINGS=(
    -c max_connections=700
    -c shared_buffers=1GB
    -c max_wal_size=4GB
)

bench() {
    case ${1-} in
        peers) shift && exec "$ROOT/bench/peers/run" "$@" ;;
        -h | --help | list | plot) build_bench && exec "$(bench_binary)" "$@" ;;
    esac
    require_rust
    take_lock
    # pgbench comes with Postgres, wherever that runs.
    provide linker wrk postgres "${OWN_SERVERS[@]}"
    bring_up_bench_servers
    release_lock
    build_bench
    export DATABASE_URL=${GIVEN_DATABASE_URL:-$(postgres_url bench)} AMQP_URL=${GIVEN_AMQP_URL:-$(broker_url bench)}
    BENCH_COMMIT=$(git describe --always --dirty=+ --exclude '*' 2>/dev/null || echo unknown)
    export BENCH_COMMIT
    use_unpacked
    PATH=$(find_postgres):$DEV/bin:$PATH
    ulimit -n "$(ulimit -Hn)"
    exec "$(bench_binary)" "$@"
}

bring_up_bench_servers() {
    local starting=() one status=0
    POSTGRES_SETTINGS+=("${BENCH_POSTGRES_SETTINGS[@]}")
    [[ -n $GIVEN_DATABASE_URL ]] || { start_postgres bench & starting+=($!); }
    [[ -n $GIVEN_AMQP_URL ]] || { start_broker bench & starting+=($!); }
    for one in "${starting[@]}"; do wait "$one" || status=1; done
    ((status == 0)) || exit 1
}

build_bench() {
    cd "$ROOT" || exit
    with_progress "building the bench" \
        cargo build --quiet --locked --release --package tidings --bin tidings --package tidings-bench --bin tidings-bench
}

bench_binary() { echo "${CARGO_TARGET_DIR:-$ROOT/target}/release/tidings-bench"; }
