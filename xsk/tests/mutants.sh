#!/bin/sh
# Negative controls: each patch in mutants/ breaks the library in one place, and the test that it
# names must fail. First the same tests pass on the library as it is.
#
# A patch says in its `run:` line which tool (test, miri, loom), which test file and which test.
# Needs the nightly toolchain with miri. Works on copies in a temporary directory.
set -eu

root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export CARGO_TARGET_DIR="${MUTANTS_TARGET_DIR:-$work/target}"
export RUST_BACKTRACE=0

copy() { # DIRECTORY
    mkdir "$1"
    (cd "$root" && tar cf - --exclude=target --exclude=.git .) | tar xf - -C "$1"
}

run() { # TOOL DIRECTORY ARGUMENTS...
    tool=$1 dir=$2
    shift 2
    case $tool in
        test) (cd "$dir" && cargo test -q -p xsk "$@") ;;
        miri) (cd "$dir" && cargo +nightly miri test -q -p xsk "$@") ;;
        loom) (cd "$dir" && RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR="$CARGO_TARGET_DIR/loom" cargo test -q -p xsk "$@") ;;
        *) echo "no such tool: $tool" >&2; exit 2 ;;
    esac
}

# All copies share the target directory, so that dependencies are built once. Cargo tells the copies
# apart by the age of their files alone: hence each is touched before it is built.
failed=0
copy "$work/clean"
touch "$work/clean/xsk/src/lib.rs"
for patch in "$root"/xsk/tests/mutants/*.patch; do
    # shellcheck disable=SC2046
    set -- $(sed -n 's/^run: //p' "$patch")
    if ! run "$1" "$work/clean" --test "$2" "$3" > "$work/log" 2>&1; then
        cat "$work/log"
        echo "$2 $3: fails without a patch"
        exit 1
    fi
done
for patch in "$root"/xsk/tests/mutants/*.patch; do
    name=$(basename "$patch" .patch)
    # shellcheck disable=SC2046
    set -- $(sed -n 's/^run: //p' "$patch")
    copy "$work/$name"
    patch -s -p1 -d "$work/$name" < "$patch"
    touch "$work/$name/xsk/src/lib.rs"
    if ! run "$1" "$work/$name" --test "$2" --no-run > "$work/log" 2>&1; then
        cat "$work/log"
        echo "$name: does not compile"
        failed=1
    elif run "$1" "$work/$name" --test "$2" "$3" > "$work/log" 2>&1; then
        echo "$name: NOT caught by $2 $3"
        failed=1
    else
        echo "$name: caught by $1: $(grep -m1 -E '^error: |panicked at|signal' "$work/log" | cut -c1-140)"
    fi
done
exit $failed
