# shellcheck shell=bash
# Contract: a running service is asked everything that openapi.yaml allows, and much that it does not.
# Promise: a service, a database and a broker of its own, all of them gone afterwards, also when it is interrupted; nothing else is touched.

SCHEMATHESIS_VERSION=4.32.5
# The id, the subscription and the message of the document's own examples.
EXAMPLE_USER=0193a2b4-7c1e-7d53-9a51-2f5d8c0e4b6a
EXAMPLE_SUBSCRIPTION=orders

# schemathesis [ARGS]: with a key that may do everything, then with one that may do nothing. ARGS go to both runs.
schemathesis() {
    local tools=$DEV/schemathesis status=0
    # A name that nobody else has, also where others share the server that was given.
    CONTRACT=contract_$(tr -d - </proc/sys/kernel/random/uuid)
    require_rust
    take_lock
    # psql comes with Postgres, wherever that runs.
    provide linker curl postgres rabbitmq
    [[ -n $GIVEN_DATABASE_URL ]] || start_postgres main
    DATABASE_URL=${GIVEN_DATABASE_URL:-$(postgres_url)}
    trap end_contract_service EXIT
    start_broker "$CONTRACT"
    release_lock
    get_schemathesis "$tools"
    # Beside an example cargo builds the dependencies as it does for tests: where those were built, nothing is left to do.
    build --example replay
    start_contract_service
    seed_contract_service
    ask_everything "$tools" "$CONTRACT_KEY" "$@" || status=1
    # Nobody knows this key: every route under /v1 has to refuse it, and nothing may be learnt from how.
    ask_everything "$tools" "tdg_nobody_nothing" "$@" || status=1
    return "$status"
}

get_schemathesis() {
    [[ $("$1/bin/schemathesis" --version 2>/dev/null) != *"$SCHEMATHESIS_VERSION"* ]] || return 0
    logged "$DEV/log/packages.log" "getting schemathesis with pip" get_schemathesis_by_pip "$1" ||
        die "schemathesis cannot be had" "it needs Python with venv (apt-get install python3-venv) and its package index"
}

get_schemathesis_by_pip() {
    /usr/bin/python3 -m venv "$1" &&
        "$1/bin/pip" install --quiet --disable-pip-version-check "schemathesis==$SCHEMATHESIS_VERSION"
}

start_contract_service() {
    local ready=$DEV/run/$CONTRACT.ready
    contract_psql "create database $CONTRACT"
    : >"$ready"
    contract_tidings serve >"$ready" 2>"$DEV/log/contract.log" &
    CONTRACT_SERVICE=$!
    until grep -q '^tidings ready on ' "$ready"; do
        kill -0 "$CONTRACT_SERVICE" 2>/dev/null || die "tidings does not get ready" "tail $DEV/log/contract.log"
        pause 0.2
    done
    CONTRACT_URL=$(sed -n 's/^tidings ready on //p' "$ready")
    CONTRACT_KEY=$(contract_tidings client create contract --scope admin --purpose 'asking everything' 2>/dev/null)
}

# contract_tidings ARGS..: becomes tidings, with the settings of this service and none of those that are in the environment: a
# DATABASE_URL_FILE there would count for more than our DATABASE_URL.
contract_tidings() {
    local url
    url=$(database_beside "$CONTRACT")
    unset "${!DATABASE_URL@}" "${!AMQP_@}" "${!TIDINGS_@}"
    export DATABASE_URL=$url AMQP_URL TIDINGS_RABBITMQ_MANAGEMENT_URL TIDINGS_LISTEN=127.0.0.1:0 TIDINGS_RATE_LIMIT=off
    AMQP_URL=$(broker_url "$CONTRACT")
    TIDINGS_RABBITMQ_MANAGEMENT_URL=$(management_url "$CONTRACT")
    exec "$(binary)" "$@"
}

end_contract_service() {
    # Who is impatient twice would leave something behind.
    trap '' INT TERM HUP
    if [[ -n ${CONTRACT_SERVICE-} ]]; then
        kill "$CONTRACT_SERVICE" 2>/dev/null || true
        wait "$CONTRACT_SERVICE" 2>/dev/null || true
    fi
    # What cannot be cleared away keeps nothing else from it, and the run has the status that it had.
    contract_psql "drop database if exists $CONTRACT with (force)" || true
    (forget_broker "$CONTRACT") || true
    rm -f "$DEV/run/$CONTRACT.ready" "$DEV"/{ports,log}/{epmd,rabbitmq}-"$CONTRACT"*
}

contract_psql() { (psql_at "$DATABASE_URL" -qc "$1") >&2; }

# Somebody to be found, and a subscription with a queue.
seed_contract_service() {
    contract_put "users/$EXAMPLE_USER" '{"profile":{"first_name":"Ana","job_title":"Author"}}'
    contract_put "subscriptions/$EXAMPLE_SUBSCRIPTION" \
        '{"routing_keys":["user.deleted"],"fields":["address"],"owner":"team-orders","purpose":"cancels pending orders"}'
}

contract_put() {
    local curl=curl
    command -v curl >/dev/null || curl=$(find_curl)
    "$curl" -sS --fail-with-body -o /dev/null -X PUT "$CONTRACT_URL/v1/$1" -H "authorization: Bearer $CONTRACT_KEY" \
        -H 'content-type: application/json' -d "$2"
}

ask_everything() {
    local tools=$1 key=$2
    shift 2
    TIDINGS_API_KEY=$key "$tools/bin/schemathesis" --config-file "$ROOT/.ci/schemathesis.toml" run \
        "$CONTRACT_URL/openapi.yaml" --checks all "$@"
}
