# shellcheck shell=bash
# Packages: finds the programs that ./dev needs, and gets from Debian those that are missing.
# Promise: what is installed is used as it is. Root installs with apt, and no service is started by it; an ordinary user
# gets the packages unpacked into .dev/, and nothing outside of it changes.

UNPACKED=$DEV/debian

package_of() {
    case $1 in
        postgres) echo postgresql ;;
        rabbitmq) echo rabbitmq-server ;;
        curl) echo curl ;;
        wrk) echo wrk ;;
        python) echo python3-pika ;;
        ruby) echo ruby-bunny ;;
        node) echo nodejs npm ;;
        go) echo golang-go golang-github-rabbitmq-amqp091-go-dev ;;
        java) echo default-jdk-headless librabbitmq-client-java libgoogle-gson-java ;;
        php) echo php-cli php-amqplib php-curl ;;
        linker) echo gcc libc6-dev ;;
        cxx) echo g++ ;;
        valgrind) echo valgrind ;;
    esac
}

# provide TOOL...: makes sure that each is there.
provide() {
    local tool tools=() packages=()
    for tool in "$@"; do
        "find_$tool" >/dev/null && continue
        tools+=("$tool")
        # shellcheck disable=SC2207 # package names have no spaces
        packages+=($(package_of "$tool"))
    done
    ((${#tools[@]} > 0)) || return 0
    command -v apt-get >/dev/null || die "not found: ${tools[*]}, and no apt-get to get them with" \
        "install them, or give DATABASE_URL and AMQP_URL of servers that run already"
    if ((EUID == 0)); then install_packages "${packages[@]}"; else unpack_packages "${packages[@]}"; fi
    for tool in "${tools[@]}"; do
        "find_$tool" >/dev/null || die "$tool is still not to be found after getting: ${packages[*]}" "see $DEV/log/packages.log"
    done
}

# Each find_TOOL prints where TOOL is, or fails. Installed ones come first, the unpacked one last.

# Prints the folder with postgres, initdb, psql.
find_postgres() {
    local bin
    for bin in $(newest_first /usr/lib/postgresql/*/bin) "$(folder_of postgres)" "$UNPACKED"/usr/lib/postgresql/*/bin; do
        [[ -x $bin/postgres && -x $bin/initdb && -x $bin/psql ]] && is_whole "$bin" && echo "$bin" && return
    done
    return 1
}

# Prints the folder with rabbitmq-server and rabbitmqctl. Debian's commands of those names in /usr/sbin insist on the
# account rabbitmq; the real ones are in its lib folder.
find_rabbitmq() {
    local bin
    for bin in /usr/lib/rabbitmq/bin /opt/rabbitmq/sbin "$(folder_of rabbitmq-server)" "$UNPACKED"/usr/lib/rabbitmq/bin; do
        [[ $bin != /usr/sbin && -x $bin/rabbitmq-server ]] && is_whole "$bin" && echo "$bin" && return
    done
    return 1
}

find_curl() { command -v curl || { [[ -x $DEV/bin/curl ]] && echo "$DEV/bin/curl"; }; }
find_wrk() { command -v wrk || { [[ -x $DEV/bin/wrk ]] && echo "$DEV/bin/wrk"; }; }
find_python() { first_that_runs 'import pika' -c "$(command -v python3)" /usr/bin/python3 "$DEV/bin/python3"; }
find_ruby() { first_that_runs 'require "bunny"' -e "$(command -v ruby)" /usr/bin/ruby "$DEV/bin/ruby"; }
find_linker() { command -v cc; }
find_cxx() { command -v c++; }
find_valgrind() { command -v valgrind; }

newest_first() { printf '%s\n' "$@" | sort --version-sort --reverse; }

folder_of() {
    local command
    command=$(command -v "$1") && dirname "$(readlink -f "$command")"
}

first_that_runs() {
    local code=$1 flag=$2 interpreter
    shift 2
    for interpreter in "$@"; do
        [[ -x $interpreter ]] && "$interpreter" "$flag" "$code" 2>/dev/null && echo "$interpreter" && return
    done
    return 1
}

# An unpacking that was interrupted has left no stamp, and is not to be used.
is_whole() { [[ $1 != "$UNPACKED"/* || -e $UNPACKED/.whole ]]; }

# --- root: apt ---

install_packages() (
    trap allow_services EXIT
    forbid_services
    export DEBIAN_FRONTEND=noninteractive
    local apt=(timeout 900 apt-get -qq -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3)
    say "installing with apt: $*"
    logged "$DEV/log/packages.log" "reading the package lists" "${apt[@]}" update
    logged "$DEV/log/packages.log" "installing $*" "${apt[@]}" install --yes --no-install-recommends "$@"
)

# Debian's packages start their servers as they are installed, and create a Postgres cluster. Both are forbidden for as
# long as the installation takes, with the two switches that Debian has for it.
POLICY=/usr/sbin/policy-rc.d
NO_CLUSTER=/etc/postgresql-common/createcluster.d/tidings-dev.conf
OURS='# Temporary, by ./dev of tidings: no server starts while packages are installed.'

forbid_services() {
    [[ -e $POLICY ]] || { printf '#!/bin/sh\n%s\nexit 101\n' "$OURS" >"$POLICY" && chmod 755 "$POLICY"; }
    mkdir -p "${NO_CLUSTER%/*}"
    echo 'create_main_cluster = false' >"$NO_CLUSTER"
}

# A policy that was there before stays.
allow_services() {
    ! grep -qsF "$OURS" "$POLICY" || rm -f "$POLICY"
    rm -f "$NO_CLUSTER"
}

# --- ordinary user: unpack ---

unpack_packages() {
    local log=$DEV/log/packages.log folder=$DEV/apt deb
    # RabbitMQ's own scripts do not quote the folder that they are in.
    [[ " $* " != *" rabbitmq-server "* || $UNPACKED != *[[:space:]]* ]] ||
        die "the path of this checkout has a space, and RabbitMQ does not run unpacked in such a one: $ROOT" \
            "move the checkout, have it installed (sudo apt-get install rabbitmq-server), or give AMQP_URL of one that runs"
    say "unpacking into .dev/debian: $*"
    mkdir -p "$UNPACKED" "$folder"/{lists,archives}/partial
    logged "$log" "reading the package lists" private_apt update
    logged "$log" "downloading $*" private_apt install --yes --no-install-recommends --download-only "$@"
    # Not before: what was unpacked earlier goes on being used when nothing can be downloaded.
    rm -f "$UNPACKED/.whole"
    for deb in "$folder"/archives/*.deb; do
        logged "$log" "unpacking ${deb##*/}" dpkg-deb --extract "$deb" "$UNPACKED"
    done
    move_erlang
    write_wrappers
    rm -rf "$folder"
    touch "$UNPACKED/.whole"
}

# apt with folders of its own. It reads what the system has installed, and so fetches only what is missing.
private_apt() {
    timeout 900 apt-get -qq -o Dir::State="$DEV/apt" -o Dir::State::lists="$DEV/apt/lists" -o Dir::State::status=/var/lib/dpkg/status \
        -o Dir::Cache="$DEV/apt" -o Dir::Cache::archives="$DEV/apt/archives" -o Dir::Log="$DEV/apt" \
        -o APT::Sandbox::User= -o Debug::NoLocking=1 -o Acquire::Retries=3 "$@"
}

# Erlang's start scripts carry the folder that they were built for.
move_erlang() {
    local script
    for script in "$UNPACKED"/usr/lib/erlang/bin/{erl,start} "$UNPACKED"/usr/lib/erlang/erts-*/bin/{erl,start}; do
        [[ ! -f $script ]] || sed -i "s#ROOTDIR=/.*usr/lib/erlang\$#ROOTDIR=$UNPACKED/usr/lib/erlang#" "$script"
    done
}

# Commands in .dev/bin that bring the libraries along, for whoever calls them.
write_wrappers() {
    mkdir -p "$DEV/bin"
    write_wrapper curl
    write_wrapper wrk
    write_wrapper python3 "PYTHONPATH=$UNPACKED/usr/lib/python3/dist-packages"
    write_wrapper ruby "RUBYLIB=$(joined "$UNPACKED"/usr/lib/{,*/}ruby/{vendor_ruby,vendor_ruby/*.*.*,*.*.*} \
        "$UNPACKED"/usr/{share,lib/*}/rubygems-integration/*/{gems/*/lib,extensions/*/*/*})"
}

# write_wrapper COMMAND [VARIABLE=VALUE]: for the system's COMMAND, else for the unpacked one.
write_wrapper() {
    local program
    for program in /usr/bin/$1 "$UNPACKED/usr/bin/$1"; do
        [[ -x $program ]] || continue
        printf '#!/bin/sh\n# Written by ./dev.\nexec env %q %s %q "$@"\n' \
            "$(unpacked_libraries)" "${2:+$(printf %q "$2")}" "$program" >"$DEV/bin/$1"
        chmod 755 "$DEV/bin/$1"
        return
    done
}

unpacked_libraries() { printf 'LD_LIBRARY_PATH=%s' "$(joined "$UNPACKED"/usr/lib/*-linux-gnu "$UNPACKED"/lib/*-linux-gnu)"; }

# joined PATH...: those that exist, with colons between.
joined() {
    local path all=
    for path in "$@"; do [[ ! -d $path ]] || all+=:$path; done
    printf '%s' "${all#:}"
}

# From here on, this shell and its children find what was unpacked, if anything was. For subshells: nothing that ./dev
# runs besides the servers should see other libraries than the system's.
use_unpacked() {
    [[ -d $UNPACKED ]] || return 0
    # shellcheck disable=SC2163 # exports VARIABLE=VALUE
    export "$(unpacked_libraries)" "PATH=$UNPACKED/usr/bin:$PATH"
}
