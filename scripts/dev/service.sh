# shellcheck shell=bash
# Service: builds tidings and runs it in the background.
# Promise: what runs is what was built last, with the servers in use now.

binary() { echo "${CARGO_TARGET_DIR:-$ROOT/target}/debug/tidings"; }

# build [ARGS]: ARGS go to cargo. On a terminal cargo shows its own progress; elsewhere that would be hundreds of lines. Errors are shown
# whole.
build() {
    local cargo_build=(cargo build --locked --manifest-path "$ROOT/Cargo.toml" --bin tidings "$@")
    if [[ -t 2 ]]; then
        "${cargo_build[@]}" 9>&- || die "the build failed"
    else
        with_progress building "${cargo_build[@]}" --quiet 9>&- || die "the build failed"
    fi
}

# Leaves the service alone when it is well and nothing has changed; else stops it, in good order, and starts it anew.
start_service() {
    local wanted
    use_servers
    wanted=$(fingerprint)
    if [[ $(state_of tidings) == running && $(cat "$DEV/run/tidings.fingerprint" 2>/dev/null) == "$wanted" ]] && service_is_ready; then
        return
    fi
    stop_service
    choose_address
    TIDINGS_LISTEN=$(service_address) launch tidings "$(binary)" serve
    echo "$wanted" >"$DEV/run/tidings.fingerprint"
    (wait_ready tidings 30 service_becomes_ready) || {
        local answer
        # One that is gone has said why, and answers nothing.
        answer=$(ask_readiness | tail -n 1) || exit 1
        die "tidings does not get ready" "GET /readyz says: $answer"
    }
}

# The service itself allows its requests 20 seconds to end.
stop_service() { stop_process tidings TERM 25; }

# The key of this checkout's own client, which may do everything. Made anew when the database does not know it any more: not when the
# service is busy, as the old one, which somebody may be using, is revoked then.
key() {
    local file=$DEV/key
    if [[ ! -s $file ]] || is_unknown "$(<"$file")"; then make_key "$file"; fi
    cat "$file"
}

make_key() {
    local made
    use_servers
    "$(binary)" client revoke dev 2>/dev/null || true
    made=$("$(binary)" client create dev --scope admin --purpose 'development on this machine' 2>/dev/null) ||
        die "there can be no key" "$(binary) client create dev --scope admin"
    (umask 077 && echo "$made" >"$1")
}

# By hand, as there may be no curl.
is_unknown() {
    local status
    status=$({
        printf 'GET /v1/users?limit=1 HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %s\r\nConnection: close\r\n\r\n' "$1" >&3
        timeout 5 head -n 1 <&3
    } 2>/dev/null 3<>"/dev/tcp/$(host_of "$(service_address)")/$(port_of_service)")
    [[ $status == 'HTTP/1.1 401 '* ]]
}

# What a running service was started from: the binary, all that it reads from its environment, and the files that are named
# there. Hashed, as it may contain passwords.
fingerprint() {
    local name
    {
        stat --format '%i %Y %s' "$(binary)"
        for name in $(compgen -e | grep -E '^(DATABASE_|AMQP_|TIDINGS_|PG|SSL_CERT_|RUST_LOG)' | sort); do
            printf '%s=%s\n' "$name" "${!name-}"
            if [[ -f ${!name-} && -r ${!name-} ]]; then sha256sum <"${!name-}"; fi
        done
    } | sha256sum
}

choose_address() {
    local address=${TIDINGS_LISTEN:-127.0.0.1:8080}
    if ! is_free "${address##*:}" "$(host_of "$address")"; then
        [[ -z ${TIDINGS_LISTEN-} ]] || die "port ${address##*:} is taken" "give another address in TIDINGS_LISTEN"
        choose_port tidings
        say "port 8080 is taken by another program, so tidings takes $(port tidings)"
        address=127.0.0.1:$(port tidings)
    fi
    echo "$address" >"$DEV/run/tidings.address"
}

service_address() { cat "$DEV/run/tidings.address" 2>/dev/null || echo -; }

service_is_ready() { [[ $(ask_readiness) == 'HTTP/1.1 200 '* ]]; }

# Prints the whole answer, which says what is amiss. By hand, as there may be no curl.
ask_readiness() {
    {
        printf 'GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n' >&3
        timeout 5 cat <&3
    } 2>/dev/null 3<>"/dev/tcp/$(host_of "$(service_address)")/$(port_of_service)"
}

# Twice a second is enough: the service logs each time that it had to say no.
service_becomes_ready() {
    service_is_ready || { pause 0.4 && false; }
}

service_url() {
    alive tidings || die "tidings does not run" "./dev run"
    local host
    host=$(host_of "$(service_address)")
    [[ $host != *:* ]] || host="[$host]"
    echo "http://$host:$(port_of_service)"
}

# Where it is reached from here: who listens everywhere listens at the loopback address, too.
host_of() {
    case ${1%:*} in
        0.0.0.0) echo 127.0.0.1 ;;
        '[::]') echo ::1 ;;
        *) tr -d '[]' <<<"${1%:*}" ;;
    esac
}

port_of_service() {
    local address
    address=$(service_address)
    echo "${address##*:}"
}

print_what_to_try() {
    local url curl=curl dev=./dev user key
    url=$(service_url)
    key=$(key)
    user=$(</proc/sys/kernel/random/uuid)
    [[ $PWD == "$ROOT" ]] || dev=$ROOT/dev
    command -v curl >/dev/null || curl=$(find_curl)
    cat <<END
tidings is ready at $url

Create a user:
  $curl -sS -X PUT $url/v1/users/$user -H 'authorization: Bearer $key' -H 'content-type: application/json' -d '{"profile":{"first_name":"Ana","job_title":"Author"}}'

Watch the news, in a second terminal:
  $dev tail

Amend the user, and see the news arrive there:
  $curl -sS -X PATCH $url/v1/users/$user -H 'authorization: Bearer $key' -H 'content-type: application/merge-patch+json' -d '{"profile":{"job_title":"Editor"}}'

The key may do everything; \`$dev key\` prints it again. To stop everything: $dev down
END
}

# The built tidings with the servers of this checkout.
tidings() {
    [[ -x $(binary) ]] || die "tidings is not built yet" "./dev run"
    use_servers
    if alive tidings; then
        TIDINGS_URL=$(service_url)
        TIDINGS_API_KEY=$(key)
        export TIDINGS_URL TIDINGS_API_KEY
    fi
    exec "$(binary)" "$@"
}

# An example application with a database of its own, beside the running service.
app() {
    local name=${1-} program=${CARGO_TARGET_DIR:-$ROOT/target}/debug/examples/${1-}
    [[ -f $ROOT/examples/$name/main.rs && $name =~ ^(orders|events|crm|invoices)$ ]] ||
        die "no such application: $name" "orders, events, crm and invoices are in examples/"
    shift
    case ${1-} in -h | --help) build_app "$name" && exec "$program" "$@" ;; esac
    TIDINGS_URL=$(service_url)
    TIDINGS_API_KEY=$(key)
    use_servers
    provide postgres
    APP_DATABASE_URL=$(database_beside "app_$name")
    (psql_at "$APP_DATABASE_URL" -qc '') >&2 2>/dev/null || (psql_at "$DATABASE_URL" -qc "create database app_$name") >&2 || die "there can be no database app_$name"
    export TIDINGS_URL TIDINGS_API_KEY APP_DATABASE_URL
    build_app "$name"
    exec "$program" "$@"
}

build_app() {
    with_progress "building $1" cargo build --quiet --locked --manifest-path "$ROOT/Cargo.toml" --example "$1" || die "the build failed"
}
