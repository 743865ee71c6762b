#!/bin/sh
# Pre-train (stages 1 to 3), instruct and chat with the small preset, then measure. Under an hour of 2 cores.
#
#     runs/pipeline_small.sh CORPORA RUNS [FLAGS of mm-rec pipeline]
#
# CORPORA holds books.train, books.valid, code.train and code.valid (one JSON string a line), instruct_* and chat_*
# (conversations in any format that `mm-rec finetune --help` names), each .jsonl, .jsonl.xz, .jsonl.gz or .json.
# RUNS gets everything that is made: a run folder a stage, transcript_PHASE.txt after each phase, evaluation/report.html.
# The same command goes on where it was stopped.
# MM_REC names the program if it is not the one in .venv.
set -eu

here=$(dirname "$0")
program=${MM_REC:-$here/../.venv/bin/mm-rec}
corpora=$(cd "$1" && pwd)
runs=$2
shift 2

link() {  # link FOLDER FILES... puts links to files into a folder of RUNS/data
    folder=$runs/data/$1
    shift
    mkdir -p "$folder"
    for file; do
        [ -e "$file" ] || { echo "error: there is no $file" >&2; exit 2; }
        ln -sf "$file" "$folder/"
    done
}

link text "$corpora"/books.train.*
link code "$corpora"/code.train.*
link instruct "$corpora"/instruct_*
link chat "$corpora"/chat_*

$program pipeline --config "$here/pipeline_small.yaml" --data_dir "$runs/data" --checkpoint_dir "$runs" "$@"
$program eval --model "$runs" --output "$runs/evaluation" --max_bytes 500000 \
    --documents books="$(echo "$corpora"/books.valid.*)" --documents code="$(echo "$corpora"/code.valid.*)"
