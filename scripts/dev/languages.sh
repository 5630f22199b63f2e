# shellcheck shell=bash
# Languages: what the consumers in examples/consumers need to run in their tests.
# Promise: a language that cannot be tested here is named, before the tests and after them, with the way to get it; with
# TIDINGS_TEST_ALL_LANGUAGES there is none. Root gets all that Debian has; Ruby and Python are unpacked for everyone else, too.

NODE_CONSUMER=$ROOT/examples/consumers/node
JARS=/usr/share/java
MISSING_LANGUAGES=()

provide_languages() {
    local language
    provide ruby python
    TIDINGS_TEST_PYTHON=$(find_python) TIDINGS_TEST_RUBY=$(find_ruby)
    export TIDINGS_TEST_PYTHON TIDINGS_TEST_RUBY
    ((EUID != 0)) || provide_each node go java php
    # In a shell of its own: without the registry there is no Node here, which is not the end for an ordinary user.
    ! find_node >/dev/null || find_amqplib || (get_amqplib) || true
    for language in node go java php; do
        can_test "$language" || MISSING_LANGUAGES+=("$language")
    done
    ! TIDINGS_TEST_NODE=$(find_node) || export TIDINGS_TEST_NODE
    ((${#MISSING_LANGUAGES[@]} == 0)) || say_languages_are_missing
}

# All of them with one call of apt; else each by itself, as a Debian that has dropped one is not to keep the others away.
provide_each() {
    local tool
    (provide "$@") || for tool in "$@"; do (provide "$tool") || true; done
}

can_test() { "find_$1" >/dev/null && { [[ $1 != node ]] || find_amqplib; }; }

# Both parts, program and library, or nothing.
# The program itself: what is called node may be a wrapper, and a signal to it would not reach the consumer.
find_node() { command -v npm >/dev/null && node -p process.execPath 2>/dev/null; }
find_go() { command -v go && [[ -d /usr/share/gocode/src/github.com/rabbitmq/amqp091-go ]]; }
find_java() { command -v java && command -v javac >/dev/null && [[ -e $JARS/amqp-client.jar && -e $JARS/gson.jar && -e $JARS/slf4j-nop.jar ]]; }
find_php() {
    command -v php && php -r '@include "PhpAmqpLib/autoload.php";
        exit(class_exists("PhpAmqpLib\\Connection\\AMQPConnectionFactory") && extension_loaded("curl") && extension_loaded("pcntl") ? 0 : 1);'
}

# Debian has no amqplib. npm checks what it gets against the committed lock.
get_amqplib() {
    logged "$DEV/log/packages.log" "getting amqplib with npm" \
        npm --prefix "$NODE_CONSUMER" ci --no-audit --no-fund --fetch-retries=1 --fetch-retry-mintimeout=1000
}

find_amqplib() {
    (cd "$NODE_CONSUMER" && node -e 'const { version } = require("./node_modules/amqplib/package.json");
        process.exit(version === require("./package.json").dependencies.amqplib ? 0 : 1)') 2>/dev/null
}

# cargo test, with those tests left out: libtest's own arguments come after `--`.
test_without_languages() {
    local language skip=()
    for language in "${MISSING_LANGUAGES[@]}"; do skip+=(--skip "consumers::$language::"); done
    [[ " $* " == *" -- "* ]] || skip=(-- "${skip[@]}")
    cargo test --locked --workspace "$@" "${skip[@]}"
}

say_languages_are_missing() {
    local language packages=()
    # shellcheck disable=SC2207 # package names have no spaces
    for language in "${MISSING_LANGUAGES[@]}"; do packages+=($(package_of "$language")); done
    [[ -z ${TIDINGS_TEST_ALL_LANGUAGES-} ]] || die "these languages cannot be tested here: ${MISSING_LANGUAGES[*]}" "sudo apt-get install ${packages[*]}"
    say "SKIPPED: the consumers in ${MISSING_LANGUAGES[*]} are not tested, as there is no interpreter or no library for them here"
    say "hint: sudo apt-get install ${packages[*]}"
    [[ " ${MISSING_LANGUAGES[*]} " != *" node "* ]] || say "hint: and for node, where npm finds its registry: cd $NODE_CONSUMER && npm ci"
}
