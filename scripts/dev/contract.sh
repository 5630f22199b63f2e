# shellcheck shell=bash
# Contract: a running service is asked everything that openapi.yaml allows, and much that it does not.
# Promise: a service, a database and an exchange of its own, all of them gone afterwards; nothing else is touched.

SCHEMATHESIS_VERSION=4.32.5
# The id, the subscription and the message of the document's own examples.
EXAMPLE_USER=0193a2b4-7c1e-7d53-9a51-2f5d8c0e4b6a
EXAMPLE_SUBSCRIPTION=orders

# schemathesis [ARGS]: with a key that may do everything, then with one that may do nothing. ARGS go to both runs.
schemathesis() {
    local tools=$DEV/schemathesis status=0
    require_rust
    take_lock
    provide linker curl "${OWN_SERVERS[@]}"
    bring_up_servers
    release_lock
    use_servers
    get_schemathesis "$tools"
    # Beside an example cargo builds the dependencies as it does for tests: where those were built, nothing is left to do.
    build --example replay
    trap end_contract_service EXIT
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
    local ready=$DEV/run/contract.ready
    contract_psql "drop database if exists contract with (force)"
    contract_psql "create database contract"
    CONTRACT_DATABASE_URL=$(database_beside contract)
    # What the last one said must not be taken for what this one says.
    : >"$ready"
    DATABASE_URL=$CONTRACT_DATABASE_URL TIDINGS_EXCHANGE=contract TIDINGS_LISTEN=127.0.0.1:0 TIDINGS_RATE_LIMIT=off \
        "$(binary)" serve >"$ready" 2>"$DEV/log/contract.log" 9>&- &
    CONTRACT_SERVICE=$!
    until grep -q '^tidings ready on ' "$ready"; do
        kill -0 "$CONTRACT_SERVICE" 2>/dev/null || die "tidings does not get ready" "tail $DEV/log/contract.log"
        pause 0.2
    done
    CONTRACT_URL=$(sed -n 's/^tidings ready on //p' "$ready")
    CONTRACT_KEY=$(DATABASE_URL=$CONTRACT_DATABASE_URL "$(binary)" client create contract --scope admin --purpose 'asking everything' 2>/dev/null)
}

end_contract_service() {
    if [[ -n ${CONTRACT_SERVICE-} ]]; then
        kill "$CONTRACT_SERVICE" 2>/dev/null || true
        wait "$CONTRACT_SERVICE" 2>/dev/null || true
    fi
    contract_psql "drop database if exists contract with (force)" || true
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
