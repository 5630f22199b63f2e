# shellcheck shell=bash
# Postgres: private instances, each on a free loopback port. The one named main is for everyone; tests start more to change their
# settings.
# Promise: commits are as durable as in production (fsync stays on), and no user's value gets into the server's log.
# Not here, on purpose: a unix socket. Its path must be shorter than 107 bytes, which no checkout can promise.

POSTGRES_SETTINGS=(
    -c listen_addresses=127.0.0.1
    -c unix_socket_directories=
    -c max_connections=300
    -c shared_buffers=256MB
    # The DETAIL of an error and the text of a failed statement carry users' values.
    -c log_error_verbosity=terse
    -c log_min_error_statement=panic
)

postgres_server() { if [[ $1 == main ]]; then echo postgres; else echo "postgres-$1"; fi; }
postgres_url() { echo "postgres://postgres@127.0.0.1:$(port "$(postgres_server "${1-main}")")/tidings"; }
postgres_servers() { find "$DEV/run" \( -name postgres -o -name 'postgres-*' \) -printf '%f\n' 2>/dev/null | sort; }

start_postgres() (
    use_unpacked
    choose_account
    name=$1 server=$(postgres_server "$1") bin=$(find_postgres)
    data=$(postgres_data "$bin" "$name")
    if [[ $(state_of "$server") == frozen ]]; then kill_process "$server"; fi
    if ! alive "$server"; then
        as_account test -d "$data" || create_cluster "$bin" "$data"
        forget_dead_postmaster "$data"
        choose_port "$server"
        launch "$server" "${AS_ACCOUNT[@]}" "$bin/postgres" -D "$data" -p "$(port "$server")" "${POSTGRES_SETTINGS[@]}"
    fi
    wait_ready "$server" 60 postgres_answers "$bin" "$server"
    postgres_query "$bin" "$server" "select 1 from pg_database where datname = 'tidings'" | grep -q . ||
        postgres_query "$bin" "$server" "create database tidings" >/dev/null
)

# Fast shutdown: sessions are ended, nothing is lost.
stop_postgres() { stop_process "$(postgres_server "$1")" INT 20; }

# kill -9, of its sessions too, which are no part of its process group: the next start would be refused while one is there.
kill_postgres() {
    local server pid sessions=()
    server=$(postgres_server "$1")
    alive "$server" || return 0
    pid=$(pid_of "$server")
    read -ra sessions <"/proc/$pid/task/$pid/children" || true
    kill_process "$server"
    # Some may have noticed, and be gone.
    ((${#sessions[@]} == 0)) || kill -KILL "${sessions[@]}" 2>/dev/null || true
}

stop_every_postgres() {
    local server
    for server in $(postgres_servers); do stop_process "$server" INT 20; done
}

postgres_query() { "$1/psql" -XAtq -h 127.0.0.1 -p "$(port "$2")" -U postgres -d postgres -c "$3"; }
postgres_answers() { postgres_query "$1" "$2" 'select 1' >/dev/null 2>&1; }

# The address of another database on the server in use.
database_beside() {
    [[ $DATABASE_URL =~ ^([^:]+://[^/?]*)(/[^?]*)?(\?.*)?$ ]] || die "DATABASE_URL is not the address of a database"
    echo "${BASH_REMATCH[1]}/$1${BASH_REMATCH[3]}"
}

# psql_at URL ARGS..: becomes psql. The password goes by the environment, as everybody on the machine sees the arguments.
psql_at() {
    local url=$1 bin
    bin=$(find_postgres)
    shift
    if [[ $url =~ ^([^:]+://[^:@/?]*):([^@/?]*)(@.*)$ ]]; then
        url=${BASH_REMATCH[1]}${BASH_REMATCH[3]}
        PGPASSWORD=$(percent_decoded "${BASH_REMATCH[2]}")
        export PGPASSWORD
    fi
    use_unpacked
    exec "$bin/psql" "$url" "$@"
}

percent_decoded() {
    local text=${1//\\/\\\\}
    printf '%b' "${text//%/\\x}"
}

# An interrupted initdb leaves only the unfinished folder, which the next one replaces.
create_cluster() {
    local bin=$1 data=$2 log
    log=$(log_of postgres-initdb)
    as_account rm -rf "$data.unfinished"
    logged "$log" "creating a Postgres cluster" "${AS_ACCOUNT[@]}" "$bin/initdb" --pgdata="$data.unfinished" \
        --username=postgres --auth=trust --encoding=UTF8 --locale=C.UTF-8 --no-sync
    as_account mv "$data.unfinished" "$data"
}

# After a kill -9 the pid in postmaster.pid may by now belong to another process of the same account, and Postgres would
# refuse to start for fear of it. Our own record says that no postmaster of ours is alive.
forget_dead_postmaster() {
    local pid
    pid=$(as_account head -n 1 "$1/postmaster.pid" 2>/dev/null) || return 0
    [[ $(readlink "/proc/$pid/exe") == */postgres* ]] || as_account rm -f "$1/postmaster.pid"
}

# Each major version has data of its own: a newer Postgres cannot read an older one's.
postgres_data() {
    local version
    version=$("$1/postgres" --version)
    version=${version##*(PostgreSQL) }
    version=${version%%[!0-9]*}
    if [[ $2 == main ]]; then echo "$(postgres_home)/$version"; else echo "$(postgres_home)/$2-$version"; fi
}

# Postgres refuses to run as root: root runs it with an account that may do nothing else. That is the one whose data is there already; else
# the one that Debian's package brings, which may have come a moment ago.
choose_account() {
    AS_ACCOUNT=(env --chdir=/)
    ((EUID == 0)) || return 0
    POSTGRES_ACCOUNT=$(stat --dereference --format=%U "$DEV/postgres" 2>/dev/null) && [[ $POSTGRES_ACCOUNT != root ]] ||
        POSTGRES_ACCOUNT=$(id -un postgres 2>/dev/null || echo nobody)
    AS_ACCOUNT+=(setpriv "--reuid=$POSTGRES_ACCOUNT" "--regid=$(id -g "$POSTGRES_ACCOUNT")" --clear-groups)
}

as_account() { "${AS_ACCOUNT[@]}" "$@"; }

# .dev/postgres, or where it points to: that account may not be able to get into root's own folders.
postgres_home() {
    local home=$DEV/postgres
    if [[ ! -d $home ]]; then
        as_account test -x "$DEV" || ln -sfn "$(postgres_home_outside)" "$home"
        home=$(readlink -m "$home")
        mkdir -p "$home"
        ((EUID != 0)) || chown "$POSTGRES_ACCOUNT" "$home"
    fi
    readlink -m "$home"
}

postgres_home_outside() { echo "/var/lib/tidings-dev/$(cksum <<<"$ROOT" | cut -d ' ' -f 1)"; }

wipe_postgres() { rm -rf "$(readlink -m "$DEV/postgres")" "$DEV/postgres"; }
