#!/bin/sh
# What the long-term memory recalls and what it is worth on real text, on one GPU. About 25 minutes of an H200.
#
#     runs/recall_on_gpu.sh mqar RESULTS                   # recall from scratch
#     runs/recall_on_gpu.sh needles CORPORA RUNS RESULTS   # 100m with recall rows: needles by distance (10 minutes)
#     runs/recall_on_gpu.sh text CORPORA RUNS RESULTS      # 100m with and without long-term memory: loss by position
#
# CORPORA holds books.train, code.train, more.books.train, more.code.train, books.valid and code.valid (.jsonl.xz, one JSON
# string a line). RUNS gets the runs, RESULTS a JSON file each. The same command goes on where it was stopped.
# PYTHON names the interpreter if it is not the one in .venv; MINUTES, STEPS and SEEDS change how long it takes. What follows
# RESULTS goes to `mm-rec train`, for example --optimizer adamw or --kept_pairs 60.
set -eu

python=${PYTHON:-$(dirname "$0")/../.venv/bin/python}
part=$1
shift

link() {  # link FOLDER FILES... puts links to files into a folder
    mkdir -p "$1"
    folder=$1
    shift
    for file; do ln -sf "$file" "$folder/"; done
}

mqar() {  # mqar NAME FLAGS... learns one task
    name=$1
    shift
    $python -m benchmarks.recall mqar --state "$results/$name.state" --result "$results/$name.json" "$@"
}

train() {  # train RUNNER RUNS FLAGS... trains stage1, then stage2 with the state carried
    runner=$1 folder=$2
    shift 2
    for stage in stage1 stage2; do
        $python -m $runner train --stage $stage --preset 100m --checkpoint_dir "$folder" --eval_interval 100000 "$@" \
            $(eval echo \$length_$stage) --batch_size "$(eval echo \$rows_$stage)" --seq_len "$(eval echo \$tokens_$stage)"
    done
}

held_out() {  # held_out RUNNER RUNS NAME FLAGS... measures a trained model
    runner=$1 folder=$2 name=$3
    shift 3
    $python -m $runner trained --model "$folder" --result "$results/$name.json" --label "$name" \
        --documents text="$corpora/books.valid.jsonl.xz" --documents code="$corpora/code.valid.jsonl.xz" "$@"
}

case $part in
mqar)
    results=$1
    mkdir -p "$results"
    for seed in ${SEEDS:-0 1 2}; do
        mqar "mqar_512_seed$seed" --tokens 512 --pairs 32 --seeds "$seed" --label MM-Rec
        mqar "mqar_1024_seed$seed" --tokens 1024 --pairs 64 --seeds "$seed" --label MM-Rec
        mqar "mqar_2048_seed$seed" --tokens 2048 --pairs 128 --seeds "$seed" --rates 2e-3 --precision bf16 --label MM-Rec
        mqar "mqar_512_others_seed$seed" --tokens 512 --pairs 32 --seeds "$seed" --filler others --label MM-Rec
    done
    mqar transformer_512 --tokens 512 --pairs 32 --model transformer --label Transformer
    ;;
needles)
    corpora=$(cd "$1" && pwd) runs=$2 results=$3
    mkdir -p "$results"
    link "$runs/data/text" "$corpora"/*books.train.*
    link "$runs/data/code" "$corpora"/*code.train.*
    minutes=${MINUTES:-7.3} # of training; what is read and measured takes two more
    length_stage1="--minutes $(awk "BEGIN { print $minutes * 0.77 }")" rows_stage1=4 tokens_stage1=4096 # small steps, and long rows
    length_stage2="--minutes $(awk "BEGIN { print $minutes * 0.23 }")" rows_stage2=4 tokens_stage2=8192
    shift 3
    train mm_rec.cli "$runs" --data_dir "$runs/data" --recall_share "${SHARE:-0.25}" "$@"
    held_out benchmarks.recall "$runs" needles
    ;;
text)
    corpora=$(cd "$1" && pwd) runs=$2 results=$3
    mkdir -p "$results"
    link "$runs/data/text" "$corpora"/books.train.*
    link "$runs/data/code" "$corpora"/code.train.*
    length_stage1="--max_steps ${STEPS:-1000}" rows_stage1=32 tokens_stage1=512
    length_stage2="--max_steps $((${STEPS:-1000} / 8))" rows_stage2=4 tokens_stage2=8192
    for seed in ${SEEDS:-0 1 2}; do
        set -- --data_dir "$runs/data" --recall_share 0 --seed "$seed"
        train mm_rec.cli "$runs/with_$seed" "$@"
        train "benchmarks.without_memory mm_rec.cli" "$runs/without_$seed" "$@"
        held_out benchmarks.recall "$runs/with_$seed" "with_$seed" --distances
        held_out "benchmarks.without_memory benchmarks.recall" "$runs/without_$seed" "without_$seed" --distances
    done
    ;;
*)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
