#!/usr/bin/env bash
# Every command of the guides, as printed there, in order, in one new folder, with the whole `100m` model:
#
#     MM_REC_MAX_STEPS=20 bash scripts/rehearse_guides.sh FOLDER
#
# The environment's `python3` must have mm_rec. For downloads that should not leave the machine, set HF_ENDPOINT to a
# loopback hub (tests/data/hub_stub.py FOLDER serves any folder as one) and HF_HOME to an empty cache.
# Prints each command, what it printed last, its exit code and time; ends with an error if one fails.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir "$1" && cd "$1" || exit 2
ln -s "$root/mm_rec" mm_rec  # one command names a script by its path in a checkout
failed=0
while IFS=$'\t' read -r expected command; do
    printf '\n$ %s\n' "$command"
    start=$SECONDS
    bash -c "$command" >output 2>&1 </dev/null
    code=$?
    tail -n 4 output
    [[ -e $expected ]] || code="$code, and there is no $expected"
    echo "exit code $code, $((SECONDS - start)) s"
    [[ $code == 0 ]] || failed=$((failed + 1))
done < <(grep -v '^#' "$root/tests/guide_commands.txt")
printf '\n%s\n' "$failed commands failed"
((failed == 0))
